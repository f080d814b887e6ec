"""Runs survive: what is interrupted goes on bit for bit, and nothing that was saved is lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, TESTS, TINY, Ended, command, shell, the_run, train
from kill_and_resume import differences, outcome
from tensorboard.summary.writer import event_file_writer

import dacer_v2

REACH = {"env_id": "toy_envs:Reach-v0"}


@pytest.fixture(autouse=True)
def ordered_event_files():
    """TensorBoard orders a run's files by name: second, process, count. Here seconds and processes
    are the same, and 10 would come before 9."""
    event_file_writer._global_uid._value = max(event_file_writer._global_uid._value, 10_000)


def two_threads(*words):
    # If they waited actively, a busy machine would be slow.
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 400}
    return subprocess.run([sys.executable, *words], check=False, **how)


@pytest.mark.parametrize(
    "name, compile",
    [("dacer", "--no-compile"), ("dacer_v2", "--no-compile"), ("dacer_v2", "--compile")],
)
def test_exact_with_two_threads(name, compile):
    """The same command twice, and interrupted twice and resumed: the same bits."""
    done = two_threads(TESTS / "exact.py", name, compile)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    "script, how", [("dacer.py", "kill"), ("dacer_v2.py", "saving"), ("dacer_v2.py", "term")]
)
def test_kills(script, how):
    """Processes are really killed: the short form of what kill_and_resume.py does at length."""
    tiny = {
        "env-id": "Hopper-v4",
        "total-timesteps": 1000,
        "learning-starts": 200,
        "num-envs": 2,
        "diffusion-steps": 2,
        "entropy-samples": 8,
        "entropy-interval": 50,
        "checkpoint-interval": 5,
        "eval-interval": 100,
        "eval-episodes": 1,
        "batch-size": 32,
        "device": "cpu",
    }
    arguments = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    arguments += ["--hidden-sizes", "64", "64", "64", "--no-compile"]
    words = ["--script", script, "--how", how, "--kills", "2", "--max-seconds", "1"]
    done = two_threads(TESTS / "kill_and_resume.py", *words, "--", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout


def test_the_comparison_sees_a_single_bit(tiny_args, algo):
    run_dir = train(algo, tiny_args(**REACH))
    a, b = outcome(run_dir), outcome(run_dir)
    b["checkpoint.pt"]["rows"][0][3, 1].view(torch.int32).bitwise_xor_(1)
    b["curves"]["losses/qf1_loss"].pop()
    assert sorted(differences(a, b)) == ["/checkpoint.pt/rows/0", "/curves/losses/qf1_loss"]


CHANGED = [
    {},
    {"buffer_size": 30},
    {"policy_frequency": 3},
    {"env_id": "toy_envs:Global-v0"},
    {"checkpoint_interval": 7},
]


@pytest.mark.parametrize("stops", [(0,), (7, 8), (20,), (39,)])
@pytest.mark.parametrize("changes", CHANGED)
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_interrupted_at_any_moment(algo, tiny_args, monkeypatch, stops, changes):
    """In the first update and later, with a full ring buffer, other rhythms, and generators that
    the task shares."""
    args = tiny_args(**{**REACH, "checkpoint_interval": 10, **changes})
    whole, update = outcome(train(algo, args, "whole")), algo.Agent.update
    for stop in stops:

        def interrupted(self, batch, number, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return update(self, batch, number)

        with monkeypatch.context() as patch:
            patch.setattr(algo.Agent, "update", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(algo, args, "stopped")
    assert differences(whole, outcome(train(algo, args, "stopped"))) == []


@pytest.mark.parametrize("env_id", ["toy_envs:Reach-v0", "toy_envs:Counter-v0", "Hopper-v4"])
def test_asynchronous_environments_give_the_same_bits(algo, tiny_args, env_id):
    runs = [
        outcome(train(algo, tiny_args(env_id=env_id, async_envs=a), f"async {a}"))
        for a in (False, True)
    ]
    for run in runs:
        for name in ("checkpoint.pt", "last.pt", "best.pt"):
            del run[name]["args"]
    assert differences(*runs) == []


def test_a_longer_run(algo, tiny_args, monkeypatch):
    """--total-timesteps may grow; the curves go on where they were."""
    args = tiny_args(**REACH, total_timesteps=240)
    run_dir = train(algo, args)
    before = outcome(run_dir)["curves"]
    assert command(algo, "--resume", run_dir).code == 0
    assert outcome(run_dir)["curves"] == before
    assert command(algo, "--resume", run_dir, "--total-timesteps", 480).code == 0
    after = outcome(run_dir)
    assert after["checkpoint.pt"]["step"] == 240
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 480
    assert [value for _, value in after["curves"]["charts/updates"]] == [100, 200, 220]
    assert all(after["curves"][tag][: len(points)] == points for tag, points in before.items())


@pytest.mark.parametrize(
    "change",
    [
        "--eval-episodes 1",
        "--async-envs",
        "--no-compile",
        "--checkpoint-interval 7",
        "--buffer-size 70",
        "--seed 3",
    ],
)
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_what_may_change(algo, tiny_args, change):
    """A run whose evaluation, simulation or compiler fails can go on without it."""
    run_dir = train(algo, tiny_args(**REACH))
    checkpoint = torch.load(run_dir / "checkpoint.pt")
    checkpoint["args"]["compile"] = "compile" in change  # as if it had been
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    ended = command(algo, "--resume", run_dir, *change.split(), "--total-timesteps", 160)
    assert ended.code == 0, ended.err
    assert algo.load_checkpoint(run_dir / "checkpoint.pt")["step"] == 80
    keeps_bits = change in ("--eval-episodes 1", "--async-envs")
    assert ("not those of the unchanged run" in ended.out) == (not keeps_bits)


CHANGES = ["--num-envs 3", "--learning-rate 0.1", "--env-id toy_envs:Counter-v0", "--gamma 0.5"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_arguments_that_would_change_the_run(algo, tiny_args, change):
    run_dir = train(algo, tiny_args(**REACH))
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError, match="other arguments: learning_rate"):
        train(algo, tiny_args(**REACH, learning_rate=0.1))
    ended = command(algo, "--resume", run_dir, *change.split())
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert change.split()[0][2:].replace("-", "_") in ended.err
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def failed(ended: Ended, run_dir: Path, algo, *words: str, code: int = 1) -> None:
    """A traceback (but for Ctrl-C), the way on in its last line, and a run that can be resumed."""
    assert ended.code == code, ended.err
    assert ("Traceback" in ended.err) == (code == 1)
    assert f"--resume {run_dir}" in ended.last_line
    for word in words:
        assert word in ended.err
    checkpoint = algo.load_checkpoint(run_dir / "checkpoint.pt")
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())
    assert all(value.isfinite().all() for value in algo.load_agent(run_dir).state_dict().values())


@pytest.fixture(params=[dacer_v2], ids=["dacer_v2"])
def script(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return request.param


HOWS = {
    "raise": "the task raised RuntimeError: the simulator diverged",
    "sys.exit": "the task raised SystemExit: 0",
    "nan reward": "reward[",
    "huge reward": "reward[",
    "nan observation": "obs[",
    "nan reset": "obs[",
    "longer observation": "Error",
}


@pytest.mark.parametrize("async_envs", ["--no-async-envs", "--async-envs"])
@pytest.mark.parametrize("how", HOWS)
def test_an_environment_that_fails(script, how, async_envs):
    kwargs = json.dumps({"how": how})
    task = ["--env-id", "toy_envs:Failing-v0", "--env-kwargs", kwargs]
    ended = command(script, *task, async_envs, *TINY)
    failed(ended, the_run(), script, HOWS[how])
    for worker in multiprocessing.active_children():
        worker.join(20)  # Killed, it may take a moment.
    assert not multiprocessing.active_children()


def start(*words, **how):
    """A script in a process of its own, under way."""
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, env=ENVIRONMENT, **streams, **how)


@pytest.mark.parametrize("how", ["exit", "hang", "stubborn"])
def test_a_worker_that_fails(script, tmp_path, how):
    """It dies, hangs, or hangs and does not mind SIGTERM. The run ends all the same, and so do all
    its processes."""
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS.parent)!r})\n"
        "import dacer_v2; dacer_v2.TIMEOUT = 3.0; dacer_v2.run_command_line()\n"
    )
    (tmp_path / "start.py").write_text(code)
    task = ["--env-id", "toy_envs:Failing-v0", "--env-kwargs", json.dumps({"how": how})]
    words = [tmp_path / "start.py", *task, "--async-envs", *TINY, "--exp-name", how]
    process = start(*words, start_new_session=True)
    try:
        # It ends when nobody holds stderr any more, the workers included.
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    failed(Ended(process.returncode, "", err), the_run(), script)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(script, number):
    words = ["--env-id", "toy_envs:Reach-v0", *TINY, "--total-timesteps", 10_000_000]
    process = start(script.__file__, *words)
    while process.poll() is None and not list(Path().glob("runs/*/checkpoint.pt")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=40)
    failed(Ended(process.returncode, "", err), the_run(), script, "KeyboardInterrupt", code=130)


def test_a_full_disk(script):
    """The older checkpoint stays as it was. (A limit on file sizes stands in for a full disk.)"""
    resource = pytest.importorskip("resource")
    command(script, "--env-id", "toy_envs:Reach-v0", *TINY)
    run_dir = the_run()
    before = (run_dir / "checkpoint.pt").read_bytes()
    limit = (len(before) // 2,) * 2

    def before_the_start():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    words = ["--resume", run_dir, "--total-timesteps", 400]
    ended = shell(script, *words, preexec_fn=before_the_start)
    failed(ended, run_dir, script, "File too large")
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_weights_and_losses_that_diverge(script):
    rates = ["--learning-rate", 1e14, "--alpha-lr", 1e14]
    ended = command(script, "--env-id", "toy_envs:Reach-v0", *TINY, *rates)
    failed(ended, the_run(), script, "NaN or infinity in ")


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_nan_in_training(script, monkeypatch, what):
    """It is found at the next log of losses, or before the next checkpoint."""
    update = script.Agent.update

    def broken(self, batch, number):
        stats = update(self, batch, number)
        if number == 29 and what == "weight":  # No later update comes before the checkpoint.
            self.target_critic.q1[0].weight.data[0, 0] = float("nan")
        return stats if what == "weight" else stats | {"actor_loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(script.Agent, "update", broken)
    ended = command(script, "--env-id", "toy_envs:Reach-v0", *TINY, "--checkpoint-interval", 30)
    name = {"loss": "actor_loss", "weight": "target_critic.q1.0.weight"}[what]
    failed(ended, the_run(), script, f"NaN or infinity in {name}")


def test_environments_that_cannot_all_be_made(script):
    """Of a worker that cannot start this process knows no more than that. The worker says why on
    stderr."""
    ended = command(script, "--env-id", "toy_envs:Licensed-v0", *TINY, "--async-envs")
    assert ended.code == 2
    assert ended.last_line.startswith("dacer_v2.py: error: ")
    assert not list(Path("runs").glob("*"))
