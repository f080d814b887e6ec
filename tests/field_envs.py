"""Environments as people have them, one kind of trouble each.

They are small and have one action. Where nothing else is said, episodes take 20 steps.
"""

import gymnasium as gym
import numpy as np


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


class BadClose(Track):
    """close() raises once it has been used."""

    def close(self):
        if hasattr(self, "clock"):
            raise ConnectionError("the physics server has gone")


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


class Pictures(Track):
    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)

    def observe(self):
        return np.full((96, 96, 3), self.clock, np.uint8)


class Observations(Track):
    """Observations of unusual types."""

    def __init__(self, kind="float16"):
        super().__init__()
        box, inf = gym.spaces.Box, np.inf
        self.observation_space, self.value = {
            "float16": (box(-inf, inf, (2,), np.float16), lambda k: np.full(2, k, np.float16)),
            "uint8": (box(0, 255, (2,), np.uint8), lambda k: np.full(2, k, np.uint8)),
            "int64": (box(0, 100, (2,), np.int64), lambda k: np.full(2, k)),
            "bool": (gym.spaces.MultiBinary(3), lambda k: np.full(3, k % 2, np.int8)),
            "discrete": (gym.spaces.Discrete(30), int),
            "scalar": (box(-inf, inf, (), np.float64), lambda k: np.float64(k)),
            "empty": (box(0, 1, (0,), np.float32), lambda k: np.zeros(0, np.float32)),
            "huge": (box(-inf, inf, (2,), np.float64), lambda k: np.full(2, 1e12 - k)),
        }[kind]

    def observe(self):
        return self.value(self.clock)


class BothEnds(Track):
    def step(self, action):
        obs, reward, _, end, info = super().step(action)
        return obs, reward, end, end, info


class Wordless(Track):
    def __init__(self):
        raise AssertionError


class Accents(Track):
    def step(self, action):
        raise RuntimeError("décrochage \u2603 \udcff")


class Single(Track):
    """A robot: there is one, and no second copy."""

    copies = 0

    def reset(self, **kwargs):
        if not hasattr(self, "clock"):
            Single.copies += 1
            assert Single.copies == 1, "there is only one robot"
        return super().reset(**kwargs)


class OldApi(Track):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]

    def step(self, action):
        obs, reward, _, done, info = super().step(action)
        return obs, reward, done, info


for cls in list(vars().values()):
    if isinstance(cls, type) and issubclass(cls, Track):
        gym.register(f"{cls.__name__}-v0", cls)
