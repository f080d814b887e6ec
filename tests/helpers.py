"""What the tests share: a tiny run, the command line, failures, and what a run computed."""

import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MODULES = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(MODULES),
    "PYTHONWARNINGS": "ignore",
}

# TensorBoard orders a run's files by name: second, process, count. Within a second, 10 would come
# before 9.
event_file_writer._global_uid._value = max(event_file_writer._global_uid._value, 10_000)

# Elsewhere, and since Python 3.14, a new process takes seconds.
FORKS = multiprocessing.get_context().get_start_method() == "fork"

# For tests that take `algo`: they run for each script. See conftest.py.
both_scripts = pytest.mark.parametrize("algo", ["dacer", "dacer_v2"], indirect=True)

# 20 steps of the warm-up and 40 updates with 2 evaluations, in a second.
TINY = {
    "total_timesteps": 120,
    "learning_starts": 40,
    "num_envs": 2,
    "batch_size": 8,
    "buffer_size": 1000,
    "hidden_sizes": (16, 16, 16),
    "diffusion_steps": 2,
    "entropy_samples": 8,
    "entropy_interval": 10,
    "eval_interval": 20,
    "eval_episodes": 2,
    "device": "cpu",
    "compile": False,
}


def words(**arguments: object) -> list[str]:
    """Arguments as they are typed on the command line."""
    typed = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            typed += [f"--{flag}", *map(str, values)]
    return typed


def tiny(**changes: object) -> list[str]:
    """The command-line arguments of a tiny run."""
    return words(**TINY | changes)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.rstrip("\n").split("\n")[-1]


def command(algo: ModuleType, *arguments: object) -> Ended:
    """A script's command line, in this process."""
    return in_process(algo.run_command_line, algo.__file__, *arguments)


def program(path: Path, *arguments: object) -> Ended:
    """Another program's command line, in this process."""
    return in_process(lambda: runpy.run_path(str(path), run_name="__main__"), path, *arguments)


def in_process(call: Callable, *argv: object) -> Ended:
    """What a call prints, and how a process would end with it."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code, handler = 0, signal.getsignal(signal.SIGTERM)
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch("sys.argv", [*map(str, argv)]),
    ):
        try:
            call()
        except SystemExit as end:
            code = end.code
        except Exception:  # as Python does with what nobody catches
            traceback.print_exc()
            code = 1
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Ended(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def shell(script: str | Path, *arguments: object, **how: object) -> Ended:
    """A script's command line, in a process of its own."""
    how = {"env": ENVIRONMENT, "timeout": 120} | how
    typed = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        typed, check=False, capture_output=True, text=True, errors="replace", **how
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def start(script: str | Path, *arguments: object, **how: object) -> subprocess.Popen:
    """The same, under way. Its stderr can be read."""
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.Popen(
        [sys.executable, *map(str, (script, *arguments))], env=ENVIRONMENT, **how
    )


def refused(ended: Ended, line: str) -> None:
    """What cannot be begun is answered by one line on stderr and exit code 2."""
    assert ended.code == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith(("dacer.py: error: ", "dacer_v2.py: error: "))
    assert line in ended.err


def failed(ended: Ended, run_dir: Path, error: str) -> None:
    """Training that fails ends with a traceback of this error and a line that says how to go on.

    The exit code is 1, and what was saved is finite.
    """
    assert ended.code == 1, ended.err
    assert "Traceback" in ended.err
    *_, named, advice = ended.err.splitlines()
    assert error in named
    assert advice == f"--resume {run_dir} goes on from the last checkpoint, if any"
    for name in ("checkpoint.pt", "last.pt"):
        saved = torch.load(run_dir / name, weights_only=True)["agent"]
        assert all(value.isfinite().all() for value in saved.values())


def before_update(algo: ModuleType, do: Callable) -> Any:
    """A patch by which `do` is called with the number of each update before it."""
    update = algo.Agent.update

    def patched(self: object, batch: tuple, number: int) -> dict:
        do(number)
        return update(self, batch, number)

    return mock.patch.object(algo.Agent, "update", patched)


def interrupted_at(algo: ModuleType, stop: int) -> Any:
    """A patch by which the update of this number is interrupted as by Ctrl-C."""

    def interrupt(number: int) -> None:
        if number == stop:
            raise KeyboardInterrupt

    return before_update(algo, interrupt)


def train(algo: ModuleType, args: object, name: str = "trained") -> Path:
    algo.main(args, Path(name))
    return Path(name)


def evaluate(algo: ModuleType, policy: object, args: object, seed: int) -> tuple:
    """Returns and scores of a policy, with as many copies of the task as the scripts make."""
    with closing(algo.make_envs(args, min(args.eval_episodes, args.num_envs))) as envs:
        act = algo.make_actor(policy, envs.single_action_space, seed)
        return algo.evaluate(act, envs, args.eval_episodes, seed)


def the_run() -> Path:
    """The only run in this folder."""
    (run_dir,) = Path("runs").iterdir()
    return run_dir


def stored(run_dir: Path) -> list:
    """The stored transitions: obs, action, reward, next_obs, terminated."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return [field.numpy() for field in saved["rows"]]


def scalars(run_dir: Path) -> dict[str, list]:
    """The curves of a run, each a list of steps and values."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run computed: its checkpoint, its last and best weights and its curves."""
    saved = {path.name: torch.load(path, weights_only=True) for path in run_dir.glob("*.pt")}
    curves = scalars(run_dir)
    del curves["charts/SPS"]
    return saved | {"curves": curves}


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of the entries in which two outcomes differ, in a single bit or more."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        return [] if same and a.numpy().tobytes() == b.numpy().tobytes() else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        parts = {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys()}
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        parts = dict(enumerate(zip(a, b)))
    else:
        return [] if a == b else [name]
    return [diff for key, (x, y) in parts.items() for diff in differences(x, y, f"{name}/{key}")]


def small_agent(algo: ModuleType, sizes: tuple[int, int] = (4, 2), **changes: object) -> Any:
    """An agent for states and actions of these sizes, the same each time."""
    torch.manual_seed(0)
    small = {"hidden_sizes": (32, 32, 32), "noise_scale": 0.1}
    small |= {"entropy_interval": 1000, "entropy_samples": 10}
    settings = small | {"device": "cpu", "compile": False} | changes
    return algo.Agent(*sizes, algo.resolve(algo.Args(**settings)))


def small_batch(algo: ModuleType, size: int = 64, sizes: tuple[int, int] = (4, 2)) -> tuple:
    """Random transitions, the same each time."""
    torch.manual_seed(1)
    obs, next_obs = torch.randn(2, size, sizes[0])
    action, terminated = 2 * torch.rand(size, sizes[1]) - 1, (torch.rand(size) < 0.3).float()
    return algo.Batch(obs, action, torch.randn(size), next_obs, terminated)


def gradients(agent: Any, batch: tuple, draws: tuple, update_policy: bool = True) -> tuple:
    """An update's gradients by the names of their parameters, the new omega, and the statistics."""
    agent.zero_grad()
    omega, stats = agent.backward(batch, draws, update_policy)
    found = {name: x.grad.clone() for name, x in agent.named_parameters() if x.grad is not None}
    return found, omega, stats


def recordings() -> list[Path]:
    """Files of numbers that the official implementation computed, with its random draws.

    Further ones are taken from the folder that the environment variable DACER_GOLDEN names.
    """
    folders = [TESTS / "golden", *filter(None, [os.environ.get("DACER_GOLDEN")])]
    found = [sorted(Path(folder).glob("*.npz")) for folder in folders]
    assert all(found), f"no recordings in one of {folders}"
    return sorted({path.resolve() for paths in found for path in paths})
