"""Tasks that do what public reports tell of: to processes, exceptions, seeds and global settings.

They are small changes of `Track`, whose episodes take 20 steps.
"""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from field_envs import Track


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


class TwoArguments(Exception):
    """It can be pickled, but not made again."""

    def __init__(self, code, text):
        super().__init__(f"{code} {text}")


class Raises(Track):
    """Raises `kind` in a step, a reset or its construction."""

    def __init__(self, kind="lock", where="step"):
        super().__init__()
        self.kind, self.where, self.resets = kind, where, 0
        if where == "constructor":
            self.fail()

    def fail(self):
        if self.kind == "lock":
            error = RuntimeError("simulator lost")
            error.lock = threading.Lock()
            raise error
        if self.kind == "two":
            raise TwoArguments(7, "joint limit")
        if self.kind == "stop":
            next(iter(()))
        sys.exit({"exit": 0, "exit with words": "window closed"}[self.kind])

    def reset(self, **kwargs):
        self.resets += 1
        if self.where == "reset" and self.resets == 3:
            self.fail()
        return super().reset(**kwargs)

    def step(self, action):
        if self.where == "step" and self.clock == 5:
            self.fail()
        return super().step(action)


class Once(Track):
    """A port that one process can open once."""

    opened = 0

    def __init__(self):
        super().__init__()
        Once.opened += 1
        assert Once.opened == 1, "the port is in use"


class Counted(Track):
    """Counts its copies."""

    copies = 0

    def __init__(self):
        super().__init__()
        Counted.copies += 1


class Settings(Track):
    """Changes settings of PyTorch, NumPy, Python and the process at `where`."""

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


SEEDS = []  # of all resets of ShowsSeed


class ShowsSeed(Track):
    def reset(self, *, seed=None, options=None):
        if seed is not None:
            SEEDS.append(seed)
        return super().reset(seed=seed)


for cls in list(vars().values()):
    if isinstance(cls, type) and issubclass(cls, Track) and cls is not Track:
        gym.register(f"{cls.__name__}-v0", cls)
