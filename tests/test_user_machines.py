"""What users and their machines do: full disks, lost terminals, notebooks, moved folders."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import (
    ENVIRONMENT,
    FORKS,
    TINY,
    before_update,
    command,
    differences,
    failed,
    outcome,
    refused,
    shell,
    start,
    the_run,
    tiny,
    train,
)
from torch._inductor import config as inductor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TRACK = {"env_id": "user_envs:Track-v0"}


# ---- Memory, disk and devices


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_replay_buffer_that_does_not_fit(run, device):
    """It is refused before a folder is made; with the size that is advised the run begins."""
    ended = run("Pictures", buffer_size=50_000_000, device=device)
    refused(ended, "no memory: try --buffer-size ")
    assert not Path("runs").exists()
    advised = int(re.search(r"--buffer-size (\d+)", ended.err)[1])
    short = {"total_timesteps": 42, "eval_episodes": 0}
    ended = run("Pictures", buffer_size=advised, device=device, **short)
    assert ended.code == 0, ended.err


def test_the_memory_of_a_container(run, monkeypatch):
    read_text = Path.read_text

    def limited(path, *args, **kwargs):
        is_limit = str(path) == "/sys/fs/cgroup/memory.max"
        return "1000000\n" if is_limit else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", limited)
    ended = run("Track", buffer_size=100_000)
    refused(ended, "no memory: try --buffer-size ")
    assert run("Track", buffer_size=int(ended.err.split()[-1])).code == 0


def test_a_full_disk(run, algo):
    """The older checkpoint stays as it was. (A limit on file sizes stands in for a full disk.)"""
    resource = pytest.importorskip("resource")
    run("Track")
    run_dir = the_run()
    before = (run_dir / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        ended = command(algo, "--resume", run_dir, "--total-timesteps", 400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed(ended, run_dir, "File too large")
    assert (run_dir / "checkpoint.pt").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_here(algo, run):
    """A run of GPU 1 is not silently one of GPU 0 or of the CPU. Asked to, it goes on there."""
    run("Track")
    path = the_run() / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"]["device"] = "cuda:1"
    torch.save(saved, path)
    refused(command(algo, "--resume", the_run()), "--device cuda:1 fails, try cpu")
    ended = command(algo, "--resume", the_run(), "--device", "cpu", "--total-timesteps", 140)
    assert ended.code == 0, ended.err
    assert command(algo, "--evaluate", the_run(), "--device", "cpu").code == 0


def test_a_compiler_that_fails(algo, run, work, monkeypatch):
    """It is found out before the first step, and training goes on without."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(work / "cache"))
    small = {"diffusion_steps": 1, "hidden_sizes": (16,), "q_grad_weight": 0.0}
    with inductor.patch({"cpp.cxx": ("/bin/false",), "fx_graph_cache": False}):
        ended = run("Track", compile=True, **small)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    failure = "compiling fails, training goes on as with --no-compile: "
    assert ended.out.splitlines()[1].startswith(failure)
    assert json.loads((the_run() / "args.json").read_text())["compile"] is False
    plain = train(algo, algo.Args(**TINY | TRACK | small), "plain")
    assert differences(outcome(the_run()), outcome(plain)) == []


# ---- Folders and files


def test_two_processes_in_one_folder(algo, run):
    run("Track")
    typed = ["--resume", the_run(), "--total-timesteps", 140]
    with FileLock(the_run() / "training.lock"):
        refused(command(algo, *typed), "training.lock")
    assert command(algo, *typed).code == 0


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000])
def test_a_name_too_long_for_a_folder(algo, run, name):
    refused(run("Track", exp_name=name), "File name too long")
    for option in ("--resume", "--evaluate"):
        refused(command(algo, option, name), "ValueError: no dacer_v2 checkpoint ")


def test_runs_is_a_file(run):
    Path("runs").write_text("")
    refused(run("Track"), "NotADirectoryError: ")


def test_moved_and_strangely_named_folders(algo, run):
    run("Track", exp_name="a b/c é")
    moved = the_run().rename("else where")
    assert command(algo, "--resume", moved, "--total-timesteps", 140).code == 0
    assert command(algo, "--evaluate", moved).code == 0
    assert not os.listdir("runs")


def test_a_checkpoint_is_as_good_as_its_folder(algo, run):
    run("Track")
    folder = the_run()
    assert command(algo, "--resume", folder / "checkpoint.pt", "--total-timesteps", 140).code == 0
    assert the_run() == folder
    assert algo.load_checkpoint(folder / "checkpoint.pt")["step"] == 70
    assert command(algo, "--evaluate", folder / "checkpoint.pt").code == 0


@pytest.mark.parametrize("before, after", [(50, 30), (50, 120), (1000, 30), (1000, 90), (30, 30)])
def test_the_buffer_may_change_its_size(algo, run, before, after):
    """The latest transitions stay, and training goes on behind them."""
    run("Track", buffer_size=before)
    old = torch.load(the_run() / "checkpoint.pt", weights_only=True)
    rewards = old["rows"][2].roll(-old["count"], 0)  # the oldest first
    agent = algo.Agent(2, 1, algo.Args(**old["args"]))
    agent.args.buffer_size = after
    buffer = algo.ReplayBuffer(after, 2, 1, "cpu")
    algo.load_run(the_run(), agent, buffer)
    kept = min(len(rewards), after)
    new = buffer.data.reward[:kept].roll(-buffer.count, 0) if kept == after else buffer.data.reward
    assert torch.equal(new[:kept], rewards[-kept:])
    assert min(buffer.count, after) == kept
    more = ["--buffer-size", after, "--total-timesteps", 180]
    ended = command(algo, "--resume", the_run(), *more)
    assert ended.code == 0, ended.err


# ---- Processes, terminals and systems


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(algo, run, number, async_envs):
    """One line that says how to go on, exit code 130, and a run that can be resumed."""

    def send(update):
        if update == 25:
            os.kill(os.getpid(), number)

    with before_update(algo, send):
        ended = run("Track", checkpoint_interval=10, async_envs=async_envs)
    assert ended.code == 130
    assert not multiprocessing.active_children()
    advice = f"--resume {the_run()} goes on from the last checkpoint, if any\n"
    assert ended.err == f"dacer_v2.py: error: KeyboardInterrupt: {advice}"
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["step"] == 40
    assert command(algo, "--resume", the_run()).code == 0


def test_a_run_that_is_suspended(algo, work):
    """For longer than it waits for a step of other processes."""
    pytest.importorskip("resource")  # not on Windows
    limit = 4 if FORKS else 30
    code = f"import {algo.__name__} as script; script.TIMEOUT = {limit}; script.run_command_line()"
    slow = {"env_id": "user_envs:Slow-v0", "async_envs": True, "eval_episodes": 0}
    streams = {"stdout": subprocess.PIPE, "start_new_session": True}
    process = start("-c", code, *tiny(**slow, total_timesteps=84), **streams)
    assert "0 of 84 steps" in process.stdout.readline()
    time.sleep(1)  # Now it waits for one of 42 steps of 0.1 seconds.
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(limit + 1)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(timeout=100) == 0, process.stderr.read()
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["step"] == 42


def test_a_pipe_that_goes_away(algo, work):
    """Training goes on, and the exit code is 0."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start(algo.__file__, *tiny(**TRACK, total_timesteps=240), **streams)
    assert "0 of 240 steps" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["step"] == 120


def test_what_is_said_can_be_read_at_once(algo, monkeypatch):
    class Stream(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    flushed = []
    monkeypatch.setattr(sys, "stdout", Stream())
    algo.say("x")
    assert flushed[-1] == "x\n"


def test_a_terminal_that_goes_away(algo, work):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = start(algo.__file__, *tiny(**TRACK, total_timesteps=240), **streams)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=100) == 0
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["step"] == 120


def test_a_stream_that_can_only_be_written_to(algo, tiny_args, monkeypatch):
    """Logging libraries and windows put such streams in the place of stdout."""

    class Stream(list):
        write = list.append

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    run_dir = train(algo, tiny_args(**TRACK))
    assert any("evaluation" in text for text in stream)
    assert algo.load_checkpoint(run_dir / "checkpoint.pt")["step"] == 60


def test_characters_that_the_locale_cannot_write(algo, work):
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    task = {"env_id": "user_envs:Fails-v0", "env_kwargs": '{"how": "raises accents"}'}
    ended = shell(algo.__file__, *tiny(**task), env=environment)
    error = "RuntimeError: the task raised RuntimeError: d\\xe9crochage \\u2603 \\udcff"
    failed(ended, the_run(), error)


def test_another_way_to_start_processes(work):
    code = (
        "if __name__ == '__main__':\n"
        "    import multiprocessing, dacer_v2\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    dacer_v2.run_command_line()\n"
    )
    Path("start.py").write_text(code)
    ended = shell("start.py", *tiny(**TRACK, async_envs=True, num_envs=1, eval_episodes=0))
    assert ended.code == 0, ended.err


def test_a_system_without_what_linux_has(work):
    """No os.sysconf, no fcntl and no os.fork, as on Windows."""
    code = (
        "import asyncio, os, signal, sys\n"  # asyncio itself asks Linux since Python 3.13.
        "del os.sysconf, os.fork\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import dacer_v2\n"
        "dacer_v2.run_command_line()\n"
    )
    Path("windows.py").write_text(code)
    ended = shell("windows.py", *tiny(**TRACK))
    assert ended.code == 0, ended.err


def test_a_notebook(algo, work, monkeypatch):
    """The file pasted into a cell has no name, and stdout there cannot be reconfigured."""
    cell = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", cell)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    exec(compile(Path(algo.__file__).read_text(), "cell", "exec"), cell.__dict__)  # noqa: S102
    cell.main(cell.Args(**TRACK | TINY), cell.Path("notebook"))
    assert "0 of 120 steps" in sys.stdout.getvalue()
    assert Path("notebook/last.pt").exists()


def test_pre_empted_within_the_warm_up(algo, run, monkeypatch):
    """A checkpoint may fall into it, and the interval may change when a run goes on."""
    check = algo.check_finite

    def interrupted(step, values):
        if step == 30 and "obs" in values:
            raise KeyboardInterrupt
        check(step, values)

    with monkeypatch.context() as patch:
        patch.setattr(algo, "check_finite", interrupted)
        assert run("Track", checkpoint_interval=5).code == 130
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["step"] == 10
    ended = command(algo, "--resume", the_run(), "--checkpoint-interval", 7)
    assert ended.code == 0, ended.err


# ---- Options


def test_options_that_would_be_ignored(algo, run):
    run("Track")
    for option, value in (("batch_size", 3), ("learning_rate", 1), ("num_envs", 4), ("tau", 1)):
        typed = [f"--{option.replace('_', '-')}", value]
        ended = command(algo, "--evaluate", the_run(), *typed)
        refused(ended, f"the run was made with other arguments: {option}\n")
    for typed in (["--async-envs"], ["--total-timesteps", 1000]):
        refused(command(algo, "--evaluate", the_run(), *typed), "made with other arguments: ")
    ended = command(algo, "--resume", the_run(), "--evaluate", the_run())
    refused(ended, "the run was made with other arguments: evaluate\n")


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
def test_an_empty_name(algo, work, option):
    """As of a shell's variable that is not set: no new run of the default task."""
    refused(command(algo, option, ""), "checkpoint")
    assert not list(work.iterdir())


def test_only_checkpoints_are_resumed(algo, run):
    """The one that is named, and no other one in its place."""
    run("Track")
    refused(command(algo, "--resume", the_run() / "best.pt"), "best.pt")
    ended = command(algo, "--resume", the_run() / "checkpoint.pt", "--total-timesteps", 160)
    assert ended.code == 0, ended.err


def test_numbers_of_other_libraries(algo, tiny_args):
    """They are saved as Python's, so that the run can be loaded."""
    unusual = {
        "env_id": np.str_("user_envs:Track-v0"),
        "learning_rate": np.logspace(-5, -3, 3)[1],
        "noise_scale": np.float32(0.1),
        "seed": np.int64(7),
        "exp_name": np.str_("mine"),
        "batch_size": 8.0,
        "hidden_sizes": np.array([16, 16]),
        "device": torch.device("cpu"),
    }
    run_dir = train(algo, tiny_args(**unusual))
    args = algo.load_agent(run_dir).args
    assert (args.learning_rate, args.batch_size, args.hidden_sizes) == (1e-4, 8, (16, 16))
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 7
    train(algo, tiny_args(**unusual))
    with pytest.raises(ValueError, match="batch_size must be 1 to .*, not 8.5"):
        algo.resolve(tiny_args(batch_size=8.5))
    assert algo.resolve(tiny_args(hidden_sizes=16)).hidden_sizes == (16,)
