"""The commands as a user types them: training, evaluating, and mistakes, answered in one line."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, command, evaluate, shell, the_run, train

import dacer
import dacer_v2


def test_train_and_evaluate_a_mujoco_task(algo, tmp_path, monkeypatch):
    """Warm-up, updates, evaluation, checkpoint; then the evaluation of what was trained."""
    monkeypatch.chdir(tmp_path)
    trained = shell(algo, "--env-id", "Hopper-v4", "--seed", "5", *TINY)
    assert trained.code == 0, trained.err
    assert re.search(r"120 steps: evaluation -?[\d.]+ \+- [\d.]+", trained.out)
    run_dir = the_run()
    assert run_dir.name.startswith(f"Hopper-v4__{algo.__name__}__5__")
    files = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert files == {"args", "best", "checkpoint", "events", "last", "training"}

    replayed = command(algo, "--evaluate", run_dir, "--eval-episodes", 3)
    assert replayed.code == 0, replayed.err
    agent = algo.load_agent(run_dir)
    agent.args.eval_episodes = 3
    returns, _ = evaluate(algo, agent.policy, agent.args, algo.derive_seed(5))
    assert len(returns) == 3
    said = f"Hopper-v4, 3 episodes: {returns.mean():.1f} +- {returns.std():.1f}\n"
    assert replayed.out == said


def test_an_environment_of_ones_own(algo, tmp_path, monkeypatch):
    """`module:Name-v0` imports the module, and --env-kwargs reaches the environment."""
    monkeypatch.chdir(tmp_path)
    trained = command(
        algo, "--env-id", "toy_envs:Counter-v0", "--env-kwargs", '{"ending": "terminate"}', *TINY
    )
    assert trained.code == 0, trained.err
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["rows"][-1].sum() == 24


def test_two_runs_in_one_second_do_not_share_a_folder(algo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(algo, "main", lambda args, run_dir: run_dir.mkdir(parents=True))
    assert [command(algo, "--env-id", "toy_envs:Reach-v0").code for _ in range(3)] == [0, 0, 0]


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to another process")
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_ctrl_c_ends_an_evaluation(algo, tiny_args, monkeypatch):
    run_dir = train(algo, tiny_args(env_id="toy_envs:Reach-v0"))
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    monkeypatch.setattr(algo, "to_env", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    ended = command(algo, "--evaluate", run_dir)
    assert (ended.code, ended.err.count("\n")) == (130, 1)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.fixture
def refused(algo, tmp_path, monkeypatch):
    """Runs the command line and returns the one line that it says.

    It expects exit code 2, and that no file is made or changed.
    """
    monkeypatch.chdir(tmp_path)

    def attempt(*arguments):
        before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
        ended = command(algo, *arguments)
        assert ended.code == 2, ended.err
        assert ended.err.count("\n") == 1, ended.err
        assert ended.err.startswith(f"{Path(algo.__file__).name}: error: ")
        assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before
        return ended.err

    return attempt


BAD_ARGUMENTS = [
    ("discrete actions", "CartPole-v1", [], "Discrete(2)"),
    (
        "integer actions",
        "toy_envs:Odd-v0",
        ["--env-kwargs", '{"kind": "integer"}'],
        "bounded Box of real actions",
    ),
    (
        "unbounded actions",
        "toy_envs:Odd-v0",
        ["--env-kwargs", '{"kind": "unbounded"}'],
        "TransformAction",
    ),
    (
        "observations without a length",
        "toy_envs:Odd-v0",
        ["--env-kwargs", '{"kind": "sequence"}'],
        "no vector",
    ),
    ("unknown environment", "Hoper-v4", [], "Did you mean: `Hopper`"),
    ("unknown module", "nowhere:Hopper-v4", [], "nowhere"),
    ("env-kwargs that are no JSON", "Hopper-v4", ["--env-kwargs", "{a: 1}"], "JSONDecodeError"),
    ("env-kwargs that are no object", "Hopper-v4", ["--env-kwargs", "[1]"], "TypeError"),
    (
        "env-kwargs that the task does not take",
        "Hopper-v4",
        ["--env-kwargs", '{"wings": 2}'],
        "wings",
    ),
    ("no diffusion step", "Hopper-v4", ["--diffusion-steps", 0], "diffusion_steps must be 1 to"),
    ("no environment", "Hopper-v4", ["--num-envs", 0], "num_envs must be 1 to"),
    ("no batch", "Hopper-v4", ["--batch-size", 0], "batch_size must be 1 to"),
    ("no buffer", "Hopper-v4", ["--buffer-size", -5], "buffer_size must be 1 to"),
    ("no hidden units", "Hopper-v4", ["--hidden-sizes", 16, 0], "hidden_sizes must be 1 to"),
    (
        "a total below the warm-up",
        "Hopper-v4",
        ["--total-timesteps", 1000],
        "--total-timesteps leaves no update",
    ),
    ("a negative seed", "Hopper-v4", ["--seed", -1], "seed must be 0 to"),
    ("tau above 1", "Hopper-v4", ["--tau", 3], "tau must be 0 to 1, but it is 3"),
    ("gamma that is no number", "Hopper-v4", ["--gamma", "nan"], "gamma must be 0 to 1"),
    ("an unknown device", "Hopper-v4", ["--device", "abacus"], "abacus"),
    ("no folder to evaluate", "Hopper-v4", ["--evaluate", "missing"], "missing"),
    ("no folder to resume", "Hopper-v4", ["--resume", "missing"], "missing"),
]


@pytest.mark.parametrize(
    "env_id, arguments, says", [pytest.param(*rest, id=name) for name, *rest in BAD_ARGUMENTS]
)
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_bad_input(refused, env_id, arguments, says):
    assert says in refused("--env-id", env_id, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_no_cuda(refused):
    assert "CUDA" in refused("--device", "cuda")


@pytest.fixture
def run_dir(algo, tiny_args):
    """The folder of a finished run."""
    return train(algo, tiny_args(env_id="toy_envs:Counter-v0"))


def edit(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5000]), id="truncated"),
        pytest.param(lambda path: path.write_text("weights"), id="no checkpoint at all"),
        pytest.param(lambda path: torch.save({"agent": 1}, path), id="another program's"),
        pytest.param(lambda path: torch.save([1, 2], path), id="a list"),
        pytest.param(lambda path: torch.save(Evil(), path), id="would run code"),
        pytest.param(lambda path: torch.save({"agent": Evil()}, path), id="would run code within"),
        pytest.param(lambda path: edit(path, version=0), id="another version"),
        pytest.param(lambda path: edit(path, algorithm="other"), id="another script's"),
    ],
)
@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_broken_checkpoint(run_dir, refused, harm):
    for option, name in (("--evaluate", "last.pt"), ("--resume", "checkpoint.pt")):
        harm(run_dir / name)
        assert str(run_dir / name) in refused(option, run_dir)
    assert not Path("evil").exists()


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_a_checkpoint_of_the_other_script(run_dir):
    ended = command(dacer, "--evaluate", run_dir)
    assert ended.code == 2
    assert "it was made by dacer_v2.py" in ended.err


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_the_policy_alone_cannot_be_resumed(run_dir, refused, algo):
    """best.pt without its checkpoint is for acting alone."""
    alone = Path("alone")
    alone.mkdir()
    shutil.copy(run_dir / "best.pt", alone)
    assert command(algo, "--evaluate", alone).code == 0
    refused("--resume", alone)


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_bad_evaluation(run_dir, refused):
    refused("--evaluate", run_dir, "--seed", -1)
    refused("--evaluate", run_dir, "--eval-episodes", 0)
    edit(run_dir / "last.pt", args=torch.load(run_dir / "last.pt")["args"] | {"env_id": "Gone-v0"})
    assert "Gone" in refused("--evaluate", run_dir)


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_a_copy_under_another_name_reads_its_runs(algo, run_dir, tmp_path):
    path = shutil.copy(algo.__file__, tmp_path / "my_algorithm.py")
    copy = type("script", (), {"__file__": path})
    replayed = shell(copy, "--evaluate", run_dir, "--eval-episodes", "1")
    assert replayed.code == 0, replayed.err
