"""What is interrupted goes on bit for bit, and nothing that was saved is lost."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ENVIRONMENT,
    TESTS,
    command,
    differences,
    failed,
    interrupted_at,
    outcome,
    refused,
    scalars,
    shell,
    the_run,
    tiny,
    train,
    words,
)

REACH = {"env_id": "toy_envs:Reach-v0"}


@pytest.mark.parametrize("compile", ["--no-compile", "--compile"])
def test_two_threads_give_the_same_bits(compile, work):
    """Nothing may be added up in the order in which threads happen to arrive."""
    # If they waited actively, a busy machine would be slow.
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    ended = shell(TESTS / "tools/exact.py", "dacer_v2", compile, env=environment, timeout=400)
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.endswith("different: nothing\n")


def test_kills(work):
    """A process is really killed, at a random moment and while it saves: the short form of what
    kill_and_resume.py does at length."""
    short = {"env_id": "Hopper-v4", "total_timesteps": 1200, "learning_starts": 200}
    short |= {"checkpoint_interval": 5, "eval_interval": 100, "eval_episodes": 1}
    kills = ["--script", "dacer_v2.py", "--how", "kill", "saving", "--kills", 2, "--max-seconds", 1]
    ended = shell(TESTS / "tools/kill_and_resume.py", *kills, "--", *tiny(**short), timeout=300)
    assert ended.code == 0, ended.out + ended.err
    assert "2 x kill saving" in ended.out
    assert "the same, bit for bit" in ended.out


def test_the_comparison_sees_a_single_bit(algo, tiny_args):
    run_dir = train(algo, tiny_args(**REACH))
    a, b = outcome(run_dir), outcome(run_dir)
    b["checkpoint.pt"]["rows"][0][3, 1].view(torch.int32).bitwise_xor_(1)
    b["curves"]["losses/qf1_loss"].pop()
    assert sorted(differences(a, b)) == ["/checkpoint.pt/rows/0", "/curves/losses/qf1_loss"]


CHANGED = [
    {},
    {"buffer_size": 30},  # a full ring
    {"policy_frequency": 3},
    {"env_id": "toy_envs:Global-v0"},  # generators that the task shares
    {"env_id": "user_envs:Draws-v0"},
    {"env_id": "user_envs:SamplesSpaces-v0"},
    {"checkpoint_interval": 7},
]


@pytest.mark.parametrize("changes", CHANGED)
def test_interrupted_at_many_moments(algo, tiny_args, changes):
    args = tiny_args(**{**REACH, "checkpoint_interval": 10, **changes})
    whole = outcome(train(algo, args, "whole"))
    for stop in (0, 7, 8, 20, 39):
        with interrupted_at(algo, stop), pytest.raises(KeyboardInterrupt):
            train(algo, args, "stopped")
    assert differences(whole, outcome(train(algo, args, "stopped"))) == []


def test_interrupted_within_the_warm_up(algo, tiny_args, monkeypatch):
    args, check_finite = tiny_args(**REACH, checkpoint_interval=10), algo.check_finite
    whole = outcome(train(algo, args, "whole"))

    def interrupted(step, values):
        if step == 36:
            raise KeyboardInterrupt
        check_finite(step, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(algo, "check_finite", interrupted)
        train(algo, args, "stopped")
    assert algo.load_checkpoint("stopped/checkpoint.pt")["step"] == 10
    assert differences(whole, outcome(train(algo, args, "stopped"))) == []


@pytest.mark.parametrize("env_id", ["toy_envs:Counter-v0", "Hopper-v4"])
def test_asynchronous_environments_give_the_same_bits(algo, tiny_args, env_id):
    run_dirs = [
        train(algo, tiny_args(env_id=env_id, async_envs=async_envs), f"async {async_envs}")
        for async_envs in (False, True)
    ]
    names = {"checkpoint.pt", "last.pt", "best.pt"}
    changed = {f"/{name}/args/async_envs" for name in names}
    assert set(differences(*map(outcome, run_dirs))) == changed


def test_a_longer_run(algo, tiny_args):
    """--total-timesteps may grow; the curves go on where they were."""
    run_dir = train(algo, tiny_args(**REACH, total_timesteps=240))
    before = outcome(run_dir)["curves"]
    assert command(algo, "--resume", run_dir).code == 0
    assert outcome(run_dir)["curves"] == before
    assert command(algo, "--resume", run_dir, "--total-timesteps", 480).code == 0
    after = outcome(run_dir)
    assert after["checkpoint.pt"]["step"] == 240
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 480
    assert [step for step, _ in after["curves"]["losses/qf1_loss"]] == [240, 440, 480]
    assert all(after["curves"][tag][: len(points)] == points for tag, points in before.items())


def test_a_run_that_grows_ends_as_one_of_that_length(algo, tiny_args):
    """If its first end was a regular checkpoint."""
    args = tiny_args(**REACH, checkpoint_interval=10, eval_episodes=0)
    whole = outcome(train(algo, args, "whole"))["checkpoint.pt"]
    train(algo, replace(args, total_timesteps=80), "grown")
    grown = outcome(train(algo, args, "grown"))["checkpoint.pt"]
    assert differences(whole, grown) == []


def test_a_run_is_not_shortened(algo, tiny_args):
    """An end that lies behind it is refused, and its length stays."""
    run_dir = train(algo, tiny_args(**REACH, total_timesteps=240))
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    ended = command(algo, "--resume", run_dir, "--total-timesteps", 200)
    refused(ended, "ValueError: --total-timesteps: the run has no step left")
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_a_complete_run_keeps_its_seed(algo, tiny_args):
    """A loop over seeds that names one folder would train the first of them alone."""
    run_dir = train(algo, tiny_args(**REACH))
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError, match="total-timesteps: the run has no step left"):
        train(algo, tiny_args(**REACH, seed=2))
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_what_cannot_be_loaded_is_not_saved(algo, tiny_args, work):
    """Arrays, say, in a checkpoint of one's own: the old one stays."""
    agent = algo.Agent(2, 2, algo.resolve(tiny_args(compile=False)))
    path = Path("checkpoint.pt")
    algo.save(path, agent, statistics=1.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="numpy"):
        algo.save(path, agent, statistics=np.ones(3))
    assert path.read_bytes() == before


def test_what_was_in_the_buffer_before_training_is_not_doubled(algo, tiny_args, work, monkeypatch):
    """Offline data that a changed `main` adds at each start: a checkpoint holds them already."""

    class Filled(algo.ReplayBuffer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.add(*(torch.full((30, *field.shape[1:]), 0.5) for field in self.data))

    monkeypatch.setattr(algo, "ReplayBuffer", Filled)
    args = tiny_args(**REACH, compile=False, buffer_size=1000)
    run_dir = train(algo, args)
    first = torch.load(run_dir / "checkpoint.pt")
    train(algo, replace(args, total_timesteps=args.total_timesteps + 20))
    second = torch.load(run_dir / "checkpoint.pt")
    assert second["count"] == first["count"] + 20
    assert len(second["rows"][0]) == second["count"]
    for old, new in zip(first["rows"], second["rows"]):
        assert torch.equal(old, new[: len(old)])


MAY_CHANGE = [
    {"eval_episodes": 1},
    {"async_envs": True},
    {"compile": False},
    {"checkpoint_interval": 7},
    {"buffer_size": 70},
    {"seed": 3},
]


@pytest.mark.parametrize("change", MAY_CHANGE)
def test_what_may_change(algo, tiny_args, change):
    """A run whose evaluation, simulation or compiler fails can go on without it."""
    run_dir = train(algo, tiny_args(**REACH))
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["compile"] = "compile" in change  # as if it had been
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    ended = command(algo, "--resume", run_dir, *words(**change), "--total-timesteps", 160)
    assert ended.code == 0, ended.err
    now = algo.load_checkpoint(run_dir / "checkpoint.pt")
    assert now["step"] == 80
    assert {name: now["args"][name] for name in change} == change


def test_nothing_else_may_change(algo, tiny_args):
    """Nothing but what resuming.md names."""
    may_change = {"total_timesteps", "eval_episodes", "async_envs", "exp_name", "seed", "device"}
    may_change |= {"compile", "checkpoint_interval", "buffer_size"}
    args = algo.resolve(tiny_args(**REACH))
    for name, value in asdict(args).items():
        saved = asdict(args) | {name: ("not", value)}
        if name in may_change:
            algo.check_changes(args, saved, algo.MAY_CHANGE_ON_RESUME)
            continue
        with pytest.raises(ValueError, match=f"other arguments: {name}$"):
            algo.check_changes(args, saved, algo.MAY_CHANGE_ON_RESUME)


def test_arguments_that_would_change_the_run(algo, tiny_args):
    run_dir = train(algo, tiny_args(**REACH))
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError, match="other arguments: learning_rate"):
        train(algo, tiny_args(**REACH, learning_rate=0.1))
    changes = {"num_envs": 4, "learning_rate": 0.1, "env_id": "toy_envs:Counter-v0", "gamma": 0.5}
    for name, value in changes.items():
        ended = command(algo, "--resume", run_dir, *words(**{name: value}))
        refused(ended, f"ValueError: the run was made with other arguments: {name}\n")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_the_same_call_with_more_steps(algo, tiny_args):
    """What was left to the task or to the length of the run stays as it was; so does what means
    the same in other words."""
    args = tiny_args(env_id="multigoal_env:MultiGoal-v0", env_kwargs='{"num_goals":4}')
    run_dir = train(algo, args)
    before = algo.load_checkpoint(run_dir / "checkpoint.pt")["args"]
    args = replace(args, env_kwargs='{"num_goals": 4}', exp_name="renamed", entropy_interval=None)
    train(algo, replace(args, total_timesteps=200))
    after = algo.load_checkpoint(run_dir / "checkpoint.pt")
    assert after["step"] == 100
    assert after["args"] == before | {"total_timesteps": 200, "exp_name": "renamed"}


def test_defaults_that_depend_on_the_length(algo, tiny_args):
    args = tiny_args(**REACH, entropy_interval=None, total_timesteps=60_000)
    before = asdict(algo.resolve(args))
    longer = replace(args, total_timesteps=600_000)
    assert algo.resolve(longer).entropy_interval > before["entropy_interval"]
    assert algo.resolve(longer, **before).entropy_interval == before["entropy_interval"]


def test_policies_without_a_checkpoint_are_not_overwritten(algo, tiny_args):
    run_dir = train(algo, tiny_args(**REACH))
    (run_dir / "checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError, match="no dacer_v2 checkpoint .*checkpoint.pt: FileNotFound"):
        train(algo, tiny_args(**REACH))
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("interval", [50, 150, 5000])
def test_a_checkpoint_loses_no_statistics(algo, tiny_args, interval):
    """It begins them anew, so they are logged before."""
    args = tiny_args(**REACH, total_timesteps=1060, checkpoint_interval=interval)
    args = replace(args, entropy_interval=100, eval_episodes=0)
    curves = outcome(train(algo, args))["curves"]
    alphas = [value for _, value in curves["losses/alpha"]]
    assert len(curves["losses/entropy"]) == len(set(alphas)) == 6


def test_the_first_command_may_be_repeated(algo, work):
    """Also where the warm-up was rounded up to whole steps of all environments."""
    typed = tiny(**REACH, learning_starts=41)
    assert command(algo, *typed).code == 0
    ended = command(algo, *typed, "--resume", the_run())
    assert ended.code == 0, ended.err


def test_learning_rates_with_which_it_diverges(algo, work):
    rates = {"learning_rate": 1e14, "alpha_lr": 1e14, "eval_episodes": 0}
    ended = command(algo, *tiny(**REACH, **rates))
    failed(ended, the_run(), "FloatingPointError: NaN or infinity in ")


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_nan_in_training(algo, work, monkeypatch, what):
    """It is found before the next checkpoint."""
    update = algo.Agent.update

    def broken(self, batch, number):
        stats = update(self, batch, number)
        if number == 29 and what == "weight":  # No later update comes before the checkpoint.
            self.target_critic.q1[0].weight.data[0, 0] = float("nan")
        return stats if what == "weight" else stats | {"actor_loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(algo.Agent, "update", broken)
    ended = command(algo, *tiny(**REACH, checkpoint_interval=30))
    name = {"loss": "actor_loss", "weight": "target_critic.q1.0.weight"}[what]
    error = f"FloatingPointError: NaN or infinity in {name} at step 100"
    failed(ended, the_run(), error)


def test_the_speed_of_a_run_that_goes_on_is_its_own(algo, tiny_args, monkeypatch):
    """By a clock that ticks when it is read: 20 steps in a second."""
    run_dir = train(algo, tiny_args(**REACH))
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr(algo, "time", clock)
    train(algo, tiny_args(**REACH, total_timesteps=140))
    assert scalars(run_dir)["charts/SPS"][-1] == (140, 20)
