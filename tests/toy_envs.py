"""Small tasks whose numbers are known. Nothing is wrong with them."""

import random

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Counts its steps, so that every transition can be checked.

    The observation is [number of the episode, step within it], the reward the action as it
    arrived. Episodes take 5 steps, or, where the copies are `apart`, those of every other copy 6.
    Where `ending` is "both", the odd ones end by termination and the others by truncation.
    """

    def __init__(self, ending="both", apart=False):
        self.observation_space = gym.spaces.Box(0.0, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(np.array([-1.0]), np.array([3.0]), dtype=np.float64)
        self.ending, self.apart, self.episode = ending, apart, -1
        self.length = 5

    def observe(self):
        return np.array([self.episode, self.t], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.apart and seed is not None:
            self.length = 5 + seed % 2
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        terminates = self.ending == "terminate" or (self.ending == "both" and self.episode % 2 == 1)
        done = self.t == self.length
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


class Global(Reach):
    """Reach, disturbed by numbers from the global generators of NumPy and Python."""

    def step(self, action):
        return super().step(action + 0.1 * np.random.uniform(-1, 1, 2) + random.uniform(-0.1, 0.1))


gym.register("Counter-v0", Counter)
gym.register("Reach-v0", Reach)
gym.register("Global-v0", Global)
gym.register("Humanoid-v0", Reach)
