"""What the tests of whole runs share: short runs, the command line in this process, evaluations."""

import importlib
import io
import os
import signal
import subprocess
import sys
import traceback
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

TESTS = Path(__file__).resolve().parent
TINY = {
    "total-timesteps": 120,
    "learning-starts": 40,
    "num-envs": 2,
    "batch-size": 8,
    "buffer-size": 1000,
    "device": "cpu",
    "diffusion-steps": 2,
    "entropy-samples": 8,
    "eval-episodes": 2,
}
TINY = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
TINY += ["--hidden-sizes", "16", "16", "16", "--no-compile"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.rstrip("\n").split("\n")[-1]


def command(algo: ModuleType, *arguments: object) -> Ended:
    """The script's command line, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code, handler = 0, signal.getsignal(signal.SIGTERM)
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch("sys.argv", [algo.__file__, *map(str, arguments)]),
    ):
        try:
            algo.run_command_line()
        except SystemExit as end:
            code = end.code
        except Exception:  # as Python does with what nobody catches
            traceback.print_exc()
            code = 1
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Ended(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def shell(algo: ModuleType, *arguments: object, **how: object) -> Ended:
    """The script's command line, in a process of its own."""
    how = {"env": ENVIRONMENT, "timeout": 120} | how
    words = [sys.executable, algo.__file__, *map(str, arguments)]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, errors="replace", **how
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def train(algo: ModuleType, args: object, name: str = "trained") -> Path:
    algo.main(args, Path(name))
    return Path(name)


def evaluate(algo: ModuleType, policy: object, args: object, seed: int) -> tuple:
    """Returns and scores of a policy, with as many copies of the task as the scripts make."""
    with closing(algo.make_envs(args, min(args.eval_episodes, args.num_envs))) as envs:
        act = algo.make_actor(policy, envs.single_action_space, seed)
        return algo.evaluate(act, envs, args.eval_episodes, seed)


def the_run() -> Path:
    (run_dir,) = Path("runs").iterdir()
    return run_dir


def load(name: str) -> ModuleType:
    """One of the scripts, by its name."""
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    return importlib.import_module(name)
