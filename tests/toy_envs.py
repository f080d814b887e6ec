"""Small environments whose numbers are known."""

import os
import random
import signal
import time

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Counts its steps, so that every transition can be checked.

    The observation is [number of the episode, step within it], the reward the action as it
    arrived. Episodes take 5 steps. Where `ending` is "both", the odd ones end by termination and
    the others by truncation.
    """

    def __init__(self, ending="both"):
        self.observation_space = gym.spaces.Box(0.0, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(np.array([-1.0]), np.array([3.0]), dtype=np.float64)
        self.ending, self.episode = ending, -1

    def observe(self):
        return np.array([self.episode, self.t], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        terminates = self.ending == "terminate" or (self.ending == "both" and self.episode % 2 == 1)
        done = self.t == 5
        return self.observe(), float(action[0]), done and terminates, done and not terminates, {}


class Reach(gym.Env):
    """Moves a point p to the origin within 8 steps; the reward is -|p|^2.

    Who always stands still scores about -5.3.
    """

    def __init__(self):
        self.observation_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(
            np.array([-0.5, -0.25]), np.array([0.25, 0.5]), dtype=np.float64
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.p, self.t = self.np_random.uniform(-1.0, 1.0, 2), 0
        return self.p.astype(np.float32), {}

    def step(self, action):
        self.p, self.t = np.clip(self.p + action, -2.0, 2.0), self.t + 1
        return self.p.astype(np.float32), -float(np.square(self.p).sum()), False, self.t == 8, {}


class Odd(gym.Env):
    """Spaces of unusual shapes: observations of any kind, and actions in a box of any shape and
    bounds."""

    def __init__(self, kind="dict"):
        box = gym.spaces.Box(-1.0, 1.0, (2, 2), np.float32)
        self.observation_space = {
            "dict": gym.spaces.Dict({"a": box, "b": gym.spaces.Discrete(3)}),
            "tuple": gym.spaces.Tuple((box, gym.spaces.MultiBinary(2))),
            "matrix": box,
            "sequence": gym.spaces.Sequence(box),
        }.get(kind, box)
        low = np.array([[-2.0, 0.0, 5.0]], np.float32)
        high = np.array([[2.0, 1.0, 9.0]], np.float32)
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        if kind == "unbounded":
            self.action_space = gym.spaces.Box(-np.inf, 1.0, (2,), np.float32)
        if kind == "integer":
            self.action_space = gym.spaces.Box(0, 5, (2,), np.int64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.0, False, False, {}


class Failing(Reach):
    """Reach, but at its `at`-th step it does what `how` says, if it `fails`."""

    def __init__(self, at=30, how="raise", fails=True):
        super().__init__()
        self.at, self.how, self.fails, self.steps = at, how, fails, 0

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        is_broken = self.how == "nan reset" and self.steps >= self.at
        return obs * np.float32(np.nan if is_broken else 1), info

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if not self.fails or self.steps != self.at:
            return obs, reward, terminated, truncated, info
        if self.how == "exit":
            os._exit(1)
        if self.how == "hang":
            time.sleep(1000)
        if self.how == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        if self.how == "sys.exit":
            raise SystemExit(0)
        if self.how == "raise":
            raise RuntimeError("the simulator diverged")
        reward = {"nan reward": np.nan, "huge reward": 1e39}.get(self.how, reward)
        obs = {
            "nan observation": np.float32([0.0, np.nan]),
            "longer observation": np.zeros(3, np.float32),
        }.get(self.how, obs)
        return obs, reward, terminated, truncated, info


class Global(Reach):
    """Reach, disturbed by numbers from the global generators of NumPy and Python."""

    def step(self, action):
        return super().step(action + 0.1 * np.random.uniform(-1, 1, 2) + random.uniform(-0.1, 0.1))


class Licensed(Reach):
    """Reach, which can be made here, but not in a worker process."""

    main_process = os.getpid()

    def __init__(self):
        super().__init__()
        if os.getpid() != self.main_process:
            raise RuntimeError("no licence is left")


gym.register("Counter-v0", Counter)
gym.register("Failing-v0", Failing, max_episode_steps=10)
gym.register("Reach-v0", Reach)
gym.register("Global-v0", Global)
gym.register("Humanoid-v0", Reach)
gym.register("Licensed-v0", Licensed, max_episode_steps=8)
gym.register("Odd-v0", Odd, max_episode_steps=6)
