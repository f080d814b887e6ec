"""The commands as a user types them: training, evaluating, and mistakes, answered in one line."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, both_scripts, command, evaluate, refused, shell, the_run, tiny, train

import dacer
import dacer_v2


@both_scripts
def test_train_and_evaluate_a_mujoco_task(algo, work):
    """Warm-up, updates, evaluation, checkpoint; then the evaluation of what was trained."""
    trained = command(algo, *tiny(env_id="Hopper-v4", seed=5))
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
    said = f"Hopper-v4, 3 episodes: {returns.mean():.5g} +- {returns.std():.5g}\n"
    assert replayed.out == said


def test_two_runs_in_one_second_do_not_share_a_folder(algo, work, monkeypatch):
    monkeypatch.setattr(algo, "main", lambda args, run_dir: run_dir.mkdir(parents=True))
    assert [command(algo, "--env-id", "toy_envs:Reach-v0").code for _ in range(3)] == [0, 0, 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, which no test changes."""
    args = dacer_v2.Args("toy_envs:Counter-v0", **TINY)
    return train(dacer_v2, args, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run_dir(work, trained):
    """A copy of it in the working directory."""
    return Path(shutil.copytree(trained, "trained"))


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to another process")
def test_ctrl_c_ends_an_evaluation(algo, run_dir, monkeypatch):
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    monkeypatch.setattr(algo, "to_env", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    ended = command(algo, "--evaluate", run_dir)
    assert ended.code == 130
    assert ended.err == "dacer_v2.py: error: KeyboardInterrupt:\n"
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.fixture
def assert_refused(algo, work):
    """Runs the command line, which is to answer with this line and neither make nor change a
    file."""

    def files():
        return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}

    def attempt(line, *arguments):
        before = files()
        refused(command(algo, *arguments), line)
        assert files() == before

    return attempt


BAD_ARGUMENTS = [
    ("discrete actions", "CartPole-v1", [], "Discrete(2)"),
    (
        "time_weight_c that is no number",
        "Hopper-v4",
        ["--time-weight-c", "nan"],
        "time_weight_c must be ",
    ),
    ("unknown environment", "Hoper-v4", [], "Did you mean: `Hopper`"),
    ("unknown module", "nowhere:Hopper-v4", [], "nowhere"),
    ("env-kwargs that are no JSON", "Hopper-v4", ["--env-kwargs", "{a: 1}"], "--env-kwargs is no "),
    ("env-kwargs that are no object", "Hopper-v4", ["--env-kwargs", "[1]"], "--env-kwargs is no "),
    ("env-kwargs that are nothing", "Hopper-v4", ["--env-kwargs", ""], "--env-kwargs is no "),
    ("env-kwargs that are null", "Hopper-v4", ["--env-kwargs", "null"], "--env-kwargs is no "),
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
    ("tau above 1", "Hopper-v4", ["--tau", 3], "tau must be 0 to 1, not 3"),
    ("gamma that is no number", "Hopper-v4", ["--gamma", "nan"], "gamma must be 0 to 1"),
    ("an unknown device", "Hopper-v4", ["--device", "abacus"], "abacus"),
    ("no folder to evaluate", "Hopper-v4", ["--evaluate", "missing"], "missing"),
    ("no folder to resume", "Hopper-v4", ["--resume", "missing"], "missing"),
]


@pytest.mark.parametrize(
    "env_id, arguments, says", [pytest.param(*rest, id=name) for name, *rest in BAD_ARGUMENTS]
)
def test_bad_input(assert_refused, env_id, arguments, says):
    assert_refused(says, "--env-id", env_id, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(assert_refused):
    assert_refused("--device cuda fails, try cpu", "--device", "cuda")


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
        pytest.param(lambda path: edit(path, algorithm="other"), id="another script's"),
        pytest.param(lambda path: edit(path, args={"wings": 2}), id="an unknown argument"),
    ],
)
def test_broken_checkpoint(run_dir, assert_refused, harm):
    for option, name in (("--evaluate", "last.pt"), ("--resume", "checkpoint.pt")):
        harm(run_dir / name)
        assert_refused(f"ValueError: no dacer_v2 checkpoint {run_dir / name}: ", option, run_dir)
    assert not Path("evil").exists()


def test_a_checkpoint_of_the_other_script(run_dir):
    refused(command(dacer, "--evaluate", run_dir), "it was made by dacer_v2.py")


def test_the_policy_alone_cannot_be_resumed(run_dir, assert_refused, algo):
    """best.pt without its checkpoint is for acting alone."""
    alone = Path("alone")
    alone.mkdir()
    shutil.copy(run_dir / "best.pt", alone)
    assert command(algo, "--evaluate", alone).code == 0
    assert_refused("ValueError: no dacer_v2 checkpoint alone/checkpoint.pt: ", "--resume", alone)


def test_bad_evaluation(run_dir, assert_refused):
    assert_refused("seed must be 0 to", "--evaluate", run_dir, "--seed", -1)
    edit(run_dir / "last.pt", args=torch.load(run_dir / "last.pt")["args"] | {"env_id": "Gone-v0"})
    assert_refused("Environment `Gone` doesn't exist", "--evaluate", run_dir)


def test_a_run_without_evaluations_can_be_evaluated(algo, work):
    assert command(algo, *tiny(env_id="toy_envs:Reach-v0", eval_episodes=0)).code == 0
    assert ", 10 episodes: " in command(algo, "--evaluate", the_run()).out


def test_a_copy_under_another_name_reads_its_runs(algo, run_dir):
    path = shutil.copy(algo.__file__, "my_algorithm.py")
    replayed = shell(path, "--evaluate", run_dir, "--eval-episodes", "1")
    assert replayed.code == 0, replayed.err


def test_whole_numbers_for_fractions_and_signs(algo, tiny_args):
    """The exponents of the time weight may be negative, and eta may not."""
    changes = {"noise_scale": 0, "q_grad_weight": 0, "gamma": 1, "time_weight_d": -1}
    args = algo.resolve(tiny_args(**changes))
    assert {name: getattr(args, name) for name in changes} == changes
    with pytest.raises(ValueError, match="q_grad_weight must be 0 to"):
        algo.resolve(tiny_args(q_grad_weight=-1))


def test_an_evaluation_is_of_the_file_that_is_named(algo, run_dir):
    """Not of another one in its folder."""
    (run_dir / "last.pt").write_text("weights")
    assert command(algo, "--evaluate", run_dir / "best.pt").code == 0


def test_a_policy_of_a_gpu_acts_on_a_cpu(algo, run_dir):
    path = run_dir / "last.pt"
    edit(path, args=torch.load(path, weights_only=True)["args"] | {"device": "cuda:7"})
    assert algo.load_agent(run_dir).args.device == "cpu"
