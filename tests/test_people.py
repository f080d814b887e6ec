"""What users, their machines and their tasks do to a training script, after public reports."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import people_envs
import pytest
import torch
from filelock import FileLock
from helpers import ENVIRONMENT, TINY, command, shell, the_run, train

import dacer_v2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def algo():
    """What is tested here is the same text in both scripts."""
    return dacer_v2


@pytest.fixture
def run(algo, tmp_path, monkeypatch):
    """Trains on a task of people_envs.py by the command line; **kwargs are the task's."""
    monkeypatch.chdir(tmp_path)

    def run(name, *more, **kwargs):
        task = ["--env-id", f"people_envs:{name}-v0", "--env-kwargs", json.dumps(kwargs)]
        return command(algo, *task, *TINY, *more)

    return run


def rows(run_dir):
    """The stored transitions: obs, action, reward, next_obs, terminated."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return [field.numpy() for field in saved["rows"]]


@pytest.mark.parametrize("async_envs", ["--no-async-envs", "--async-envs"])
@pytest.mark.parametrize("fails", [False, True])
def test_every_task_is_closed(run, async_envs, fails):
    ended = run("Simulator", async_envs, fails=fails)
    assert ended.code == int(fails), ended.err
    opened = {path.name.split("-")[1] for path in Path().glob("opened-*")}
    closed = {path.name.split("-")[1] for path in Path().glob("closed-*")}
    assert len(opened) >= 4
    # Where a worker's task fails, Gymnasium's worker closes it as well.
    assert opened == closed


WORDS = {
    "lock": "RuntimeError: simulator lost",
    "two": "TwoArguments: 7 joint limit",
    "stop": "StopIteration",
    "exit": "SystemExit: 0",
    "exit with words": "SystemExit: window closed",
}


@pytest.mark.parametrize("async_envs", ["--no-async-envs", "--async-envs"])
@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("where", ["step", "reset"])
def test_whatever_a_task_raises_is_a_failure(run, async_envs, kind, where):
    ended = run("Raises", async_envs, "--eval-episodes", 0, kind=kind, where=where)
    assert ended.code == 1, ended.err
    assert f"the task raised {WORDS[kind]}" in ended.err
    assert f"--resume {the_run()}" in ended.last_line


@pytest.mark.parametrize("kind", WORDS)
def test_a_task_that_cannot_be_made(run, kind):
    ended = run("Raises", kind=kind, where="constructor")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert WORDS[kind] in ended.err
    assert not Path("runs").exists()


def test_a_task_that_ends_the_process_in_an_evaluation(algo, run):
    assert run("Raises", "--eval-episodes", 0, kind="exit", where="never").code == 0
    kwargs = json.dumps({"kind": "exit", "where": "step"})
    ended = command(algo, "--evaluate", the_run(), "--env-kwargs", kwargs, "--eval-episodes", 1)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "SystemExit" in ended.err


def test_a_port_that_opens_once(run, monkeypatch):
    monkeypatch.setattr(people_envs.Once, "opened", 0)
    ended = run("Once", "--num-envs", 1, "--eval-episodes", 0)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_settings_that_a_task_changes(algo, run, where):
    """PyTorch's default type and its gradients, and the working directory."""
    before = os.getcwd()
    try:
        ended = run("Settings", where=where)
        os.chdir(before)
        assert ended.code == 0, ended.err
        saved = torch.load(the_run() / "checkpoint.pt", weights_only=True)
        types = {value.dtype for value in (*saved["agent"].values(), *saved["rows"])}
        assert types == {torch.float32}
        torch.set_default_dtype(torch.float64)
        act = algo.make_actor(algo.load_agent(the_run()).policy, people_envs.Track().action_space)
        assert act(np.zeros(2)).shape == (1,)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        os.chdir(before)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_task_that_reseeds_everything(run, where):
    """The agent's draws differ from episode to episode and from seed to seed, as they would."""
    run("Reseeds", "--total-timesteps", 200, "--eval-episodes", 0, where=where)
    first = rows(the_run())[1][:40, 0].reshape(20, 2)
    assert len(np.unique(first)) == 40
    run("Reseeds", "--total-timesteps", 200, "--eval-episodes", 0, "--seed", 2, where=where)
    (second,) = (rows(path)[1] for path in Path("runs").glob("*__2__*"))
    assert (first[:, 0] != second[:40, 0].reshape(20, 2)[:, 0]).all()


def test_evaluations_share_no_episodes(algo, run):
    people_envs.SEEDS.clear()
    run("ShowsSeed", "--eval-interval", 10, "--eval-episodes", 5)
    for seed in (1, 2, 3):
        for _ in range(2):  # The same seed gives the same episodes.
            ended = command(algo, "--evaluate", the_run(), "--seed", seed, "--eval-episodes", 5)
            assert ended.code == 0, ended.err
    seeds = people_envs.SEEDS
    evaluations = [tuple(seeds[i : i + 6]) for i in range(len(seeds) - 36, len(seeds), 6)]
    assert evaluations[::2] == evaluations[1::2]
    assert len({seed for three in evaluations[::2] for seed in three}) == 18


def test_an_evaluation_makes_as_many_copies_as_training(run, monkeypatch):
    monkeypatch.setattr(people_envs.Counted, "copies", 0)
    ended = run("Counted", "--eval-episodes", 9, "--eval-interval", 10)
    assert ended.out.count("evaluation -") == 4
    assert people_envs.Counted.copies == 4  # two for training, two for evaluations


def test_the_memory_of_a_container(algo, tiny_args, monkeypatch):
    read_text = Path.read_text

    def limited(path, *args, **kwargs):
        is_limit = str(path) == "/sys/fs/cgroup/memory.max"
        return "1000000\n" if is_limit else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", limited)
    with pytest.raises(ValueError, match="--buffer-size (\\d+)") as error:
        train(algo, tiny_args(env_id="people_envs:Counted-v0", buffer_size=100_000))
    assert not Path("trained").exists()
    advice = int(str(error.value).split()[-1])
    train(algo, tiny_args(env_id="people_envs:Counted-v0", buffer_size=advice))


@pytest.mark.parametrize("before, after", [(50, 30), (50, 120), (1000, 30), (1000, 90), (30, 30)])
def test_the_buffer_may_change_its_size(algo, run, before, after):
    """The latest transitions stay, and training goes on behind them."""
    run("ShowsSeed", "--buffer-size", before)
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
    assert ("not those of the unchanged run" in ended.out) == (before != after)


def test_a_compiler_that_fails(algo, tmp_path):
    """It is found out before the first step, and training goes on without."""
    environment = {**ENVIRONMENT, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    words = ["--env-id", "people_envs:Counted-v0", *TINY, "--compile"]
    ended = shell(algo, *words, cwd=tmp_path, env=environment)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert "--no-compile" in lines[1]
    assert "Traceback" not in ended.err
    (record,) = tmp_path.glob("runs/*/args.json")
    assert json.loads(record.read_text())["compile"] is False


def start(algo, *words, **how):
    words = [sys.executable, algo.__file__, "--env-id", "people_envs:Counted-v0", *TINY, *words]
    return subprocess.Popen([*map(str, words)], env=ENVIRONMENT, **how)


@pytest.mark.parametrize("stream", ["stdout", "both"])
def test_a_pipe_that_goes_away(algo, tmp_path, stream):
    """Training goes on, what is printed at the start is there at once, and the exit code is 0."""
    stderr = subprocess.STDOUT if stream == "both" else subprocess.PIPE
    more = ["--total-timesteps", 600, "--eval-interval", 20]
    process = start(algo, *more, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert "updates" in process.stdout.readline() + process.stdout.readline()
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    (folder,) = tmp_path.glob("runs/*")
    assert algo.load_checkpoint(folder / "checkpoint.pt")["step"] == 300


def test_a_terminal_that_goes_away(algo, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    more = ["--total-timesteps", 600, "--eval-interval", 20]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(algo, *more, cwd=tmp_path, start_new_session=True, **streams)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=100) == 0
    (folder,) = tmp_path.glob("runs/*")
    assert algo.load_checkpoint(folder / "checkpoint.pt")["step"] == 300


def test_two_processes_in_one_folder(algo, run):
    run("Counted")
    with FileLock(the_run() / "training.lock"):
        words = ["--resume", the_run(), "--total-timesteps", 140]
        ended = shell(algo, *words, cwd=Path.cwd())
        assert (ended.code, "Traceback" in ended.err) == (2, False)
        assert "training.lock" in ended.last_line
    assert command(algo, *words).code == 0


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000])
def test_a_name_too_long_for_a_folder(algo, run, name):
    ended = run("Counted", "--exp-name", name)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "too long" in ended.err
    for option in ("--resume", "--evaluate"):
        ended = command(algo, option, name)
        assert (ended.code, ended.err.count("\n")) == (2, 1)


def test_runs_is_a_file(run):
    Path("runs").write_text("")
    ended = run("Counted")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "runs" in ended.err


def test_a_system_without_what_linux_has(algo, tmp_path):
    """No os.sysconf, no fcntl and no os.fork, as on Windows."""
    code = (
        "import os, signal, sys\n"
        "del os.sysconf, os.fork\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        f"sys.path.insert(0, {str(Path(algo.__file__).parent)!r})\n"
        "import dacer_v2\n"
        "dacer_v2.run_command_line()\n"
    )
    (tmp_path / "windows.py").write_text(code)
    script = type("script", (), {"__file__": str(tmp_path / "windows.py")})
    ended = shell(script, "--env-id", "people_envs:Counted-v0", *TINY, cwd=tmp_path)
    assert ended.code == 0, ended.err


def test_a_notebook(algo, tmp_path, monkeypatch):
    """The file pasted into a cell has no name, and stdout there cannot be reconfigured."""
    monkeypatch.chdir(tmp_path)
    cell = Path(algo.__file__).read_text()
    code = (
        "import io, sys, types\n"
        "cell = types.ModuleType('__main__')\n"
        "sys.modules['__main__'] = cell\n"
        "sys.argv = ['ipykernel_launcher.py', '-f', 'kernel.json']\n"
        "sys.stdout = io.StringIO()\n"
        f"exec(compile({cell!r}, 'cell', 'exec'), cell.__dict__)\n"
        "args = cell.Args('people_envs:Counted-v0', total_timesteps=120, learning_starts=40,\n"
        "    num_envs=2, batch_size=8, hidden_sizes=(8, 8, 8), compile=False, eval_episodes=2)\n"
        "cell.main(args, cell.Path('notebook'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert Path("notebook/last.pt").exists()


def test_whole_numbers_for_fractions(algo, tiny_args):
    changes = {"noise_scale": 0, "q_grad_weight": 0, "gamma": 1, "time_weight_d": -1}
    args = algo.resolve(tiny_args(env_id="people_envs:Counted-v0", **changes))
    assert {name: getattr(args, name) for name in changes} == changes
    with pytest.raises(ValueError, match="q_grad_weight"):
        algo.resolve(tiny_args(q_grad_weight=-1))


def test_a_copy_of_a_compiled_agent_has_its_own_update(algo, tiny_args):
    agent = algo.Agent(2, 1, algo.resolve(tiny_args(compile=True)))
    copied = deepcopy(agent)
    assert copied.backward.__self__ is copied
    assert copied.rng is not agent.rng
    assert copied.rng.get_state().equal(agent.rng.get_state())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_here(algo, run):
    """A run of GPU 1 is not silently one of GPU 0; the line says how to go on."""
    run("Counted")
    path = the_run() / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"]["device"] = "cuda:1"
    torch.save(saved, path)
    ended = command(algo, "--resume", the_run())
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--device cuda:1" in ended.err
    ended = command(algo, "--resume", the_run(), "--device", "cpu", "--total-timesteps", 140)
    assert ended.code == 0, ended.err
    assert "not those of the unchanged run" in ended.out


def test_pre_empted_within_the_warm_up(algo, run, monkeypatch):
    """A checkpoint may fall into it, and the interval may change when a run goes on."""
    check, steps = algo.check_finite, []

    def interrupted(step, values):
        steps.append(step)
        if step == 30 and "obs" in values:
            raise KeyboardInterrupt
        check(step, values)

    with monkeypatch.context() as patch:
        patch.setattr(algo, "check_finite", interrupted)
        assert run("Counted", "--checkpoint-interval", 5).code == 130
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["step"] == 10
    ended = command(algo, "--resume", the_run(), "--checkpoint-interval", 7)
    assert ended.code == 0, ended.err
