"""Tasks as users have them, one kind of trouble each.

They are small changes of `Track`: it has one action, and episodes of 20 steps.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch


class Track(gym.Env):
    """Nothing wrong here: observation (position, clock), reward -position^2."""

    dtype = np.float32

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), self.dtype)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def observe(self):
        return np.array([self.x, self.clock], self.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.clock = self.np_random.uniform(-1, 1), 0
        return self.observe(), {}

    def step(self, action):
        self.clock += 1
        self.x = float(np.clip(self.x + 0.1 * np.ravel(action)[0], -1, 1))
        return self.observe(), -(self.x**2), False, self.clock >= 20, {}


class OneArray(Track):
    """All observations are one array, (number of the episode, clock), which each step and each
    reset writes over."""

    array, episode = None, 0

    def observe(self):
        if self.array is None:
            self.array = np.zeros(2, np.float32)
        self.episode += self.clock == 0
        self.array[:] = self.episode, self.clock
        return self.array


class OneDict(OneArray):
    """The same with a dictionary of arrays."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Dict(
            {"one": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)}
        )

    def observe(self):
        return {"one": super().observe()}


class Rewards(Track):
    """Reward and end as arrays and NumPy's own types."""

    def __init__(self, kind="vector"):
        super().__init__()
        self.kind = {
            "vector": lambda value: np.array([value]),
            "matrix": lambda value: np.array([[value]]),
            "0-d": np.array,
            "float16": np.float16,
            "bool": lambda value: np.bool_(value < -0.5),
            "int": round,
        }[kind]

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, self.kind(reward), np.array(False), np.bool_(truncated), info


class Infos(Track):
    """`info` as vector environments cannot merge it: lengths, types and keys that change, and
    ragged lists."""

    def info(self):
        k = self.clock
        strange = {
            "a": np.zeros(k % 4 + 1),
            "b": "word" if k % 2 else k,
            "c": None if k % 3 else {"d": k},
            f"e{k}": k,
        }
        return {**strange, "ragged": [np.zeros(k % 3), k], "final_obs": k, "_final_obs": "taken"}

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs, self.info()

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, self.info()


class CInt(Track):
    """Hands its seed to code that takes a C int, and nothing of NumPy's."""

    def reset(self, *, seed=None, options=None):
        assert seed is None or (type(seed) is int and 0 <= seed < 2**31), seed
        return super().reset(seed=seed)


class Endless(Track):
    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


class Breaks(Track):
    """One of 60 rewards is NaN, by the environment's own random numbers."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.nan if self.np_random.random() < 1 / 60 else reward, *rest


class Bounds(Track):
    """Actions in a box of unusual bounds."""

    def __init__(self, low=-1.0, high=1.0, shape=(1,), dtype="float32"):
        super().__init__()
        self.action_space = gym.spaces.Box(
            float(low), float(high), tuple(shape), np.dtype(dtype).type
        )

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(np.zeros(1))


class Observations(Track):
    """Observations of unusual types and shapes."""

    def __init__(self, kind="float16"):
        super().__init__()
        spaces, inf = gym.spaces, np.inf
        box = spaces.Box(-1.0, 1.0, (2, 2), np.float32)
        self.observation_space = {
            "float16": spaces.Box(-inf, inf, (2,), np.float16),
            "float64": spaces.Box(-inf, inf, (2,), np.float64),
            "huge": spaces.Box(1e12, 1.001e12, (2,), np.float64),
            "other byte order": spaces.Box(-inf, inf, (2,), np.dtype(">f4")),
            "uint8": spaces.Box(0, 255, (2,), np.uint8),
            "int64": spaces.Box(0, 100, (2,), np.int64),
            "bool": spaces.MultiBinary(3),
            "discrete": spaces.Discrete(30),
            "scalar": spaces.Box(-inf, inf, (), np.float64),
            "empty": spaces.Box(0, 1, (0,), np.float32),
            "matrix": box,
            "dict": spaces.Dict({"a": box, "b": spaces.Discrete(3)}),
            "tuple": spaces.Tuple((box, spaces.MultiBinary(2))),
            "sequence": spaces.Sequence(box),
        }[kind]

    def observe(self):
        self.observation_space.seed(self.clock)
        return self.observation_space.sample()


class Varied(Track):
    """Each copy has bounds of its own, of observations or of actions."""

    copies = 0

    def __init__(self, what="observations"):
        super().__init__()
        Varied.copies += 1
        high = 1.0 + Varied.copies + os.getpid() % 1000  # in other processes, too
        if what == "observations":
            self.observation_space = gym.spaces.Box(-high, high, (2,), np.float32)
        else:
            self.action_space = gym.spaces.Box(-high, high, (1,), np.float32)


class Named(Track):
    """Its argument has a name that a wrapper might have, too."""

    def __init__(self, function="sphere"):
        assert function == "rastrigin"
        super().__init__()


class Forwards(Track):
    """Answers any name, as the client of a remote simulator does."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: None


class Blind(Track):
    """A sensor that sees nothing says so by infinity."""

    def observe(self):
        return np.full(2, np.inf, np.float32)


class Pictures(Track):
    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)

    def observe(self):
        return np.full((96, 96, 3), self.clock, np.uint8)


class BothEnds(Track):
    def step(self, action):
        obs, reward, _, end, info = super().step(action)
        return obs, reward, end, end, info


class OldApi(Track):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]

    def step(self, action):
        obs, reward, _, done, info = super().step(action)
        return obs, reward, done, info


class Simulator(Track):
    """Holds a process from its construction to its `close`, and leaves a file at each."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.process = subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL)
        Path(f"opened-{self.process.pid}").touch()

    def step(self, action):
        if self.fails and self.clock == 7:
            raise ConnectionError("the simulator is gone")
        return super().step(action)

    def close(self):
        self.process.kill()
        self.process.wait()
        Path(f"closed-{self.process.pid}").touch()


class Counted(Track):
    """Counts its copies."""

    copies = 0

    def __init__(self):
        super().__init__()
        Counted.copies += 1


class Settings(Track):
    """Changes PyTorch's default type and its gradients, and the working directory, at `where`."""

    def __init__(self, where="constructor"):
        super().__init__()
        self.where = where
        if where == "constructor":
            self.change()

    def change(self):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")

    def reset(self, **kwargs):
        if self.where == "reset":
            self.change()
        return super().reset(**kwargs)

    def step(self, action):
        if self.where == "step":
            self.change()
        return super().step(action)


class Reseeds(Track):
    """Seeds the global generators with each reset or step."""

    def __init__(self, where="reset"):
        super().__init__()
        self.where = where

    def seed_all(self):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def reset(self, **kwargs):
        self.seed_all()
        return super().reset(**kwargs)

    def step(self, action):
        if self.where == "step":
            self.seed_all()
        return super().step(action)


class Draws(Track):
    """Its observations at the start are drawn from PyTorch's global generator."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return torch.empty(2).uniform_(-1, 1).numpy(), {}


class SamplesSpaces(Track):
    """Draws from its own spaces."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.observation_space.sample(), {}

    def step(self, action):
        _, *rest = super().step(action)
        return np.repeat(self.action_space.sample(), 2), *rest


class Dataset:
    """Data that counts how often they are copied."""

    copies = 0

    def __deepcopy__(self, memo):
        Dataset.copies += 1
        return self


class Data(Track):
    """Its registration holds data."""

    def __init__(self, data):
        super().__init__()
        self.data = data


class ShowsSeed(Track):
    """Keeps the seeds of all resets."""

    seeds: ClassVar = []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seeds.append(seed)
        return super().reset(seed=seed)


class BadClose(Track):
    """close() raises once it has been used."""

    def close(self):
        if hasattr(self, "clock"):
            raise ConnectionError("the physics server has gone")


class TwoArguments(Exception):
    """It can be pickled, but not made again."""

    def __init__(self, code, text):
        super().__init__(f"{code} {text}")


class Fails(Track):
    """Fails as `how` says: in its 30th step, in its fourth reset, or when it is made.

    The first `spared` copies do not fail.
    """

    copies = 0

    def __init__(self, how, where="step", spared=0):
        super().__init__()
        self.how, self.steps, self.resets = how, 0, 0
        self.where = where if Fails.copies >= spared else "nowhere"
        Fails.copies += 1
        if where == "constructor":
            self.fail()

    def fail(self):
        if self.how == "raises a lock":  # which cannot be pickled
            error = RuntimeError("simulator lost")
            error.lock = threading.Lock()
            raise error
        if self.how == "raises two arguments":
            raise TwoArguments(7, "joint limit")
        if self.how == "raises accents":
            raise RuntimeError("décrochage \u2603 \udcff")
        if self.how == "asserts":
            raise AssertionError
        if self.how == "stops":
            next(iter(()))
        if self.how == "exits":
            sys.exit(0)
        if self.how == "exits with words":
            sys.exit("window closed")
        if self.how == "dies":
            os._exit(1)
        if self.how == "hangs":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.resets += 1
        if self.where == "reset" and self.resets == 4:
            self.fail()
            obs[1] = np.nan
        return obs, info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.steps += 1
        if self.where == "step" and self.steps == 30:
            self.fail()
            reward = {"NaN reward": np.nan, "huge reward": 1e39}.get(self.how, reward)
            nan, longer = np.float32([0, np.nan]), np.zeros(3, np.float32)
            obs = {"NaN observation": nan, "longer observation": longer}.get(self.how, obs)
        return obs, reward, *rest


class SlowStart(Track):
    """Takes for ever to be made in another process than the main one."""

    def __init__(self):
        super().__init__()
        if multiprocessing.parent_process() is not None:
            time.sleep(1000)


class Motors(Track):
    """Obeys finite actions only."""

    def step(self, action):
        assert np.isfinite(action).all(), "a motor broke"
        return super().step(action)


class Scores(Track):
    """Scores itself, one of them under the name of training's own."""

    def policy_report(self, act):
        return {"episodic_return": np.float64(1e9), "distance": 1.5}


class StaticScores(Track):
    """Needs no task for its scores."""

    policy_report = staticmethod(lambda act: {"episodic_return": 1e9, "distance": 1.5})


class QuitsScoring(Track):
    def policy_report(self, act):
        sys.exit()


class ClosesSlowly(Track):
    """As a robot that is parked."""

    def close(self):
        time.sleep(6)
        Path(f"closed-{os.getpid()}").touch()


class Ports(Track):
    """Each copy takes one of three ports, as a robot or a simulator would."""

    in_use = 0

    def __init__(self, actions=0):
        super().__init__()
        if actions:
            self.action_space = gym.spaces.Discrete(actions)
        if Ports.in_use == 3:
            raise OSError("port 3 is in use")
        Ports.in_use += 1

    def close(self):
        Ports.in_use -= 1


class Slow(Track):
    """Computes for 0.1 seconds in each step, not counting those in which it is suspended."""

    def step(self, action):
        begin = time.process_time()
        while time.process_time() < begin + 0.1:
            pass
        return super().step(action)


class LockInMetadata(Track):
    metadata: ClassVar = {"lock": threading.Lock()}


class Licensed(Track):
    """Can be made in the main process alone."""

    def __init__(self):
        super().__init__()
        if multiprocessing.parent_process() is not None:
            raise RuntimeError("no licence is left")


for cls in list(vars().values()):
    if isinstance(cls, type) and issubclass(cls, Track):
        kwargs = {"data": Dataset()} if cls is Data else {}
        gym.register(f"{cls.__name__}-v0", cls, kwargs=kwargs)
