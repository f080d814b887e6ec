"""Runs survive: what is interrupted goes on bit for bit, what is broken is refused, and nothing saved is lost."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import toy_envs
from kill_and_resume import differences, outcome
from tensorboard.summary.writer import event_file_writer

import dacer
import dacer_v2

TESTS = Path(__file__).parent
ENVS = {"num_envs": 2, "total_timesteps": 200, "learning_starts": 40, "eval_interval": 40, "checkpoint_interval": 20}
# 20 vector steps of warm-up and 80 updates: checkpoints after 20 (alone), 40 (with an evaluation), 60 and 80 of them


@pytest.fixture(autouse=True)
def each_update_is_logged(algo, monkeypatch):
    monkeypatch.setattr(algo, "LOG_INTERVAL", 1)
    # TensorBoard reads a folder's files by name: second, process, count. Here seconds and processes are the same, and 10 < 9
    event_file_writer._global_uid._value = max(event_file_writer._global_uid._value, 10_000)


@pytest.fixture
def stop_after(algo, monkeypatch):
    """Makes the next run stop as SIGTERM would make it, after so many vector steps, and expects it to."""

    def run(steps, *arguments):
        count, interact = [0], algo.Run.interact

        def counted(self, *inputs):
            interact(self, *inputs)
            count[0] += 1
            if count[0] == steps:
                algo.STOP.append(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(algo.Run, "interact", counted)
            with pytest.raises(SystemExit) as stopped:
                algo.main(*arguments)
        algo.STOP.clear()
        assert stopped.value.code == 143

    return run


def the_run(name):
    (run_dir,) = Path("runs").glob(f"*__{name}__*")
    return run_dir


def resume(algo, run_dir, *command_line):
    return algo.main(*algo.resume(str(run_dir), list(command_line)))


@pytest.mark.parametrize("env_id", ["Reach-v0", "Global-v0"])
@pytest.mark.parametrize("stops", [(7,), (20,), (33, 5), (60,), (71, 1, 20)])
def test_an_interrupted_run_goes_on_bit_for_bit(algo, tiny_args, stop_after, stops, env_id):
    """In the warm-up, before the first update, within episodes, with a checkpoint, again and again."""
    args = tiny_args(env_id=f"toy_envs:{env_id}", **ENVS)
    whole = algo.main(args)
    stop_after(stops[0], dataclasses.replace(args, exp_name="stopped"))
    for steps in stops[1:]:
        stop_after(steps, *algo.resume(str(the_run("stopped")), []))
    resumed = resume(algo, the_run("stopped"))
    assert differences(outcome(whole), outcome(resumed)) == []
    assert outcome(whole)["update"] == 80
    assert len(outcome(whole)["curves"]["losses/qf1_loss"]) == 80


def test_the_comparison_sees_a_single_bit(algo, tiny_args):
    run_dir = algo.main(tiny_args(env_id="toy_envs:Reach-v0"))
    a, b = outcome(run_dir), outcome(run_dir)
    b["buffer"]["data"][0][3, 1].view(torch.int32).bitwise_xor_(1)
    b["curves"]["losses/qf1_loss"].pop()
    assert sorted(differences(a, b)) == ["/buffer/data/0", "/curves/losses/qf1_loss"]


@pytest.mark.parametrize(
    "changes", [{"async_envs": True}, {"compile": True}, {"buffer_size": 30}, {"policy_frequency": 3}]
)
def test_exact_with(algo, tiny_args, stop_after, changes):
    """Asynchronous environments, compiled losses, a full ring buffer, another rhythm of the policy."""
    args = tiny_args(env_id="toy_envs:Reach-v0", **{**ENVS, **changes})
    whole = algo.main(args)
    stop_after(71, dataclasses.replace(args, exp_name="stopped"))
    assert differences(outcome(whole), outcome(resume(algo, the_run("stopped")))) == []


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_exact_compiled(algo, tiny_args, stop_after):
    test_exact_with(algo, tiny_args, stop_after, {"compile": True})


@pytest.mark.parametrize("script, how", [("dacer.py", "kill"), ("dacer_v2.py", "saving"), ("dacer_v2.py", "term")])
@pytest.mark.parametrize("algo", [dacer], indirect=True)
def test_kills(script, how):
    """The short form of what kill_and_resume.py does at length: a MuJoCo task in processes that are really killed."""
    tiny = {
        "env-id": "Hopper-v4", "total-timesteps": 1600, "learning-starts": 200, "num-envs": 2, "batch-size": 16,
        "diffusion-steps": 2, "entropy-samples": 8, "entropy-interval": 50, "checkpoint-interval": 30, "eval-interval": 300,
        "eval-episodes": 1, "device": "cpu",
    }  # fmt: skip
    arguments = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    arguments += ["--hidden-sizes", "32", "32", "32", "--no-compile"]
    command = [sys.executable, TESTS / "kill_and_resume.py", "--script", script, "--how", how, "--kills", "2"]
    done = subprocess.run([*command, "--", *arguments], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout


def test_a_longer_run(algo, tiny_args, capsys):
    """--total-timesteps may grow; a run that is complete says so."""
    run_dir = algo.main(tiny_args(env_id="toy_envs:Reach-v0"))
    before = outcome(run_dir)["curves"]
    assert resume(algo, run_dir) == run_dir
    assert "is complete; to go on, raise --total-timesteps above 120" in capsys.readouterr().out
    assert resume(algo, run_dir, "--total-timesteps", "200") == run_dir
    after = outcome(run_dir)
    assert after["update"] == 80
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 200
    assert [step for step, _ in after["curves"]["charts/updates"]] == list(range(42, 202, 2))
    assert all(after["curves"][tag][: len(points)] == points for tag, points in before.items())


@pytest.fixture
def refused(algo, capsys):
    """Tries to resume, expects exit code 2 and one line, and returns that line."""

    def attempt(run_dir, *command_line):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            resume(algo, run_dir, *command_line)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        return message

    return attempt


@pytest.fixture
def run_dir(algo, tiny_args):
    return algo.main(tiny_args(env_id="toy_envs:Reach-v0"))


CHANGES = [("--seed", "7"), ("--num-envs", "3"), ("--learning-rate", "0.1"), ("--env-id", "toy_envs:Counter-v0"),
           ("--total-timesteps", "100"), ("--checkpoint-interval", "7")]  # fmt: skip


@pytest.mark.parametrize("name, value", CHANGES)
def test_arguments_that_would_change_the_run(run_dir, refused, name, value):
    assert f"{name} {value} would change the run in {run_dir}" in refused(run_dir, name, value)
    assert "leave it out" in refused(run_dir, name, value)


def flip_a_byte(path, position=None):
    """Of the largest part of a checkpoint, unless told where."""
    data = bytearray(path.read_bytes())
    if position is None:
        with zipfile.ZipFile(path) as archive:
            part = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
        position = data.find(part) + len(part) // 2
    data[position] ^= 16
    path.write_bytes(data)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    "harm, says",
    [
        pytest.param(lambda path: path.unlink(), "there is no checkpoint", id="none"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-9000]), "not a zip file", id="truncated"),
        pytest.param(flip_a_byte, "is damaged", id="a flipped byte"),
        pytest.param(lambda path: torch.save({"agent": Evil()}, path), "loading could run code", id="would run code"),
    ],
)
def test_broken_checkpoint(run_dir, refused, harm, says):
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    harm(run_dir / "checkpoint.pt")
    harmed = (run_dir / "checkpoint.pt").exists() and (run_dir / "checkpoint.pt").read_bytes()
    assert says in refused(run_dir, "--total-timesteps", "200")
    assert not Path("evil").exists()
    assert ((run_dir / "checkpoint.pt").exists() and (run_dir / "checkpoint.pt").read_bytes()) == harmed
    assert all((run_dir / name).read_bytes() == before[name] for name in before if name != "checkpoint.pt")


@pytest.mark.parametrize("algo", [dacer], indirect=True)
def test_no_flipped_byte_goes_unseen(algo, run_dir):
    """Whichever byte it is: the checkpoint is refused, or (padding between its parts) holds the same numbers."""
    path, whole, refusals = run_dir / "checkpoint.pt", algo.load_checkpoint(run_dir), 0
    original, positions = path.read_bytes(), random.Random(0)
    for _ in range(150):
        path.write_bytes(original)
        flip_a_byte(path, positions.randrange(len(original)))
        try:
            assert differences(whole, algo.load_checkpoint(run_dir)) == []
        except ValueError:
            refusals += 1
    assert refusals > 75


def edit(run_dir, **changes):
    path = run_dir / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def test_checkpoints_of_others(algo, run_dir, refused):
    edit(run_dir, version=0)
    assert f"is of version 0, not {algo.VERSION}" in refused(run_dir)
    edit(run_dir, version=algo.VERSION, algorithm="other")
    assert f"is of other, not of {algo.__name__}; use other.py" in refused(run_dir)


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_a_checkpoint_of_the_other_script(run_dir, capsys):
    with pytest.raises(SystemExit):
        dacer.resume(str(run_dir), [])
    assert "is of dacer_v2, not of dacer; use dacer_v2.py" in capsys.readouterr().err


def test_checkpoints_of_other_sizes(run_dir, refused):
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["args"]
    edit(run_dir, obs_dim=5)
    assert "has (observations, actions) (2, 2), the run to resume (5, 2)" in refused(
        run_dir, "--total-timesteps", "200"
    )
    edit(run_dir, obs_dim=2, args={**saved, "hidden_sizes": (16, 16, 24)})
    assert "size mismatch" in refused(run_dir, "--total-timesteps", "200")


def test_a_published_policy_cannot_be_resumed(run_dir, refused, algo):
    path = run_dir / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in checkpoint.items() if name not in ("optimizers", "buffer")}, path)
    assert "holds the policy alone; it can be evaluated but not resumed" in refused(run_dir)
    assert algo.load_agent(run_dir)


def test_without_the_replay_buffer(algo, tiny_args, stop_after, capsys):
    """A small checkpoint; the resumed run refills the buffer first, and says that it is another run."""
    args = tiny_args(env_id="toy_envs:Reach-v0", **ENVS, save_replay_buffer=False)
    stop_after(50, args)
    run_dir = the_run(algo.__name__)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"] is None
    resume(algo, run_dir)
    assert "the policy acts until there is one; not exactly the same run" in capsys.readouterr().out
    assert outcome(run_dir)["update"] == 80


def test_a_full_disk(algo, run_dir):
    """The older checkpoint stays as it was, and the program says what happened. (A limit on file sizes stands in for it.)"""
    before = (run_dir / "checkpoint.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, algo.__file__, "--resume", run_dir, "--total-timesteps", "400"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2),
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"error: cannot write to {run_dir}: [Errno 27] File too large; the last checkpoint stays" in last
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert not (run_dir / "checkpoint.pt.tmp").exists()


def test_losses_that_diverge(algo, tiny_args, capsys):
    """The run stops with one line that names them, before they reach a checkpoint."""
    with pytest.raises(SystemExit) as stopped:
        algo.main(tiny_args(env_id="toy_envs:Reach-v0", learning_rate=1e30, eval_interval=10))
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: NaN or infinity at environment step 4" in message
    assert " in action; the last checkpoint stays" in message  # by then the weights are 1e30 and still finite
    agent = algo.load_agent(the_run(algo.__name__))
    assert all(value.isfinite().all() for value in agent.state_dict().values())


def test_a_loss_that_is_nan(algo, tiny_args, capsys, monkeypatch):
    policy_loss = algo.Agent.policy_loss

    def broken(self, batch, draws):
        loss, stats = policy_loss(self, batch, draws)
        return loss * float("nan"), {**stats, "actor_loss": loss.detach() * float("nan")}

    monkeypatch.setattr(algo.Agent, "policy_loss", broken)
    with pytest.raises(SystemExit) as stopped:
        algo.main(tiny_args(env_id="toy_envs:Reach-v0"))
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: NaN or infinity at environment step 42 in actor_loss, policy." in message


def test_a_signal_that_also_reaches_the_compiler(algo, tiny_args, capsys, monkeypatch):
    """Ctrl-C ends the compiler's processes as well: no traceback, the exit code of the signal."""

    def interrupted(self, *inputs):
        algo.STOP.append(signal.SIGINT)
        raise RuntimeError("the C++ compiler was killed")

    monkeypatch.setattr(algo.Agent, "critic_loss", interrupted)
    monkeypatch.setattr(algo, "STOP", [])
    with pytest.raises(SystemExit) as stopped:
        algo.main(tiny_args(env_id="toy_envs:Reach-v0"))
    assert stopped.value.code == 130
    assert "SIGINT while compiling; the last checkpoint stays" in capsys.readouterr().err


def test_a_signal_that_reaches_the_first_compilation(algo, monkeypatch):
    """It must not be taken for a machine without a compiler, which the checkpoint would remember."""
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    monkeypatch.setattr(algo, "STOP", [])
    assert not algo.can_compile("cpu")
    algo.STOP.append(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        algo.can_compile("cpu")
    assert stopped.value.code == 143


def test_two_processes_in_one_folder(algo, tiny_args, refused):
    """The second is told, as long as the first lives."""
    fcntl = pytest.importorskip("fcntl")
    run_dir = algo.main(tiny_args(env_id="toy_envs:Reach-v0"))
    with (run_dir / ".lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert f"another process is working in {run_dir}" in refused(run_dir, "--total-timesteps", "200")
    assert resume(algo, run_dir, "--total-timesteps", "200") == run_dir


def test_a_file_system_without_locks(algo, tiny_args, monkeypatch):
    """A run goes on without one."""
    fcntl = pytest.importorskip("fcntl")
    tried = []

    def flock(*arguments):
        tried.append(arguments)
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert (algo.main(tiny_args(env_id="toy_envs:Reach-v0")) / "checkpoint.pt").is_file()
    assert tried


@pytest.mark.parametrize("async_envs", [False, True])
def test_environments_that_cannot_all_be_made(algo, tiny_args, capsys, monkeypatch, async_envs):
    """The first can, the second cannot: one line, and no worker is left to wait for."""
    monkeypatch.setattr(toy_envs.Licensed, "copies", 0)
    with pytest.raises(SystemExit) as stopped:
        algo.main(tiny_args(env_id="toy_envs:Licensed-v0", async_envs=async_envs))
    assert stopped.value.code == 2
    assert "error: cannot make 2 environments toy_envs:Licensed-v0: " in capsys.readouterr().err


def test_large_checkpoints_are_announced(algo, tiny_args, capsys):
    def announced(**changes):
        algo.main(tiny_args(env_id="toy_envs:Reach-v0", **changes))
        return "a checkpoint takes up to 1.1 GB" in capsys.readouterr().out

    assert announced(buffer_size=35_000_000)
    assert not announced(buffer_size=35_000_000, save_replay_buffer=False)
    assert not announced()
