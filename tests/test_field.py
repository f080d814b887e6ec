"""People's own environments, machines and habits: what a training script has to put up with.

The environments are in `field_envs.py`.
"""

import json
import os
import re
from pathlib import Path

import field_envs
import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, TINY, command, shell, the_run, train

import dacer
import dacer_v2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=[dacer_v2], ids=["dacer_v2"])
def algo(request):
    """What is tested here is the same text in both scripts."""
    return request.param


@pytest.fixture
def run(algo, tmp_path, monkeypatch):
    """Trains on a task of field_envs.py by the command line; **kwargs are the task's."""
    monkeypatch.chdir(tmp_path)

    def run(name, *more, **kwargs):
        task = ["--env-id", f"field_envs:{name}-v0", "--env-kwargs", json.dumps(kwargs)]
        return command(algo, *task, *TINY, *more)

    return run


def rows(run_dir):
    return [field.numpy() for field in dacer_v2.load_checkpoint(run_dir / "checkpoint.pt")["rows"]]


@pytest.mark.parametrize("async_envs", ["--no-async-envs", "--async-envs"])
@pytest.mark.parametrize("name", ["OneArray", "OneDict"])
def test_observations_are_copied(run, name, async_envs):
    assert run(name, async_envs).code == 0
    obs, _, _, successor, _ = rows(the_run())
    assert (successor[:, 0] == obs[:, 0]).all()  # of the same episode
    assert (successor[:, 1] == obs[:, 1] + 1).all()
    assert successor[:, 1].max() == 20


@pytest.mark.parametrize("kind", ["vector", "matrix", "0-d", "float16", "bool", "int"])
def test_rewards_are_numbers(run, kind):
    assert run("Rewards", kind=kind).code == 0
    *_, reward, successor, _ = rows(the_run())
    true = -(successor[:, 0].astype(float) ** 2)
    true = {"bool": true < -0.5, "int": np.round(true)}.get(kind, true)
    np.testing.assert_allclose(reward, true, atol=1e-3)


@pytest.mark.parametrize("async_envs", ["--no-async-envs", "--async-envs"])
def test_info_is_not_read(run, async_envs):
    ended = run("Infos", async_envs)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("seed", [2**31 - 1, 2**31, 2**32, 10**12])
def test_seeds_fit_a_c_int(run, seed):
    ended = run("CInt", "--seed", seed)
    assert ended.code == 0, ended.err


def test_an_evaluation_ends(algo, run, monkeypatch):
    monkeypatch.setattr(algo, "EVAL_STEPS", 30)
    ended = run("Endless")
    assert ended.code == 0
    assert "2 episodes were cut after 30 steps" in ended.out
    assert """set a limit: --env-kwargs '{"max_episode_steps": 1000}'""" in ended.out
    cured = command(algo, "--evaluate", the_run(), "--env-kwargs", '{"max_episode_steps": 20}')
    assert cured.code == 0
    assert "were cut" not in cured.out


def test_episodes_longer_than_the_checkpoint_interval_are_announced(run):
    words = "Endless", "--checkpoint-interval", 15, "--eval-episodes", 0
    out = run(*words).out
    assert "episodes of over 15 steps" in out
    assert "max_episode_steps" in out
    assert "max_episode_steps" not in run(*words, max_episode_steps=15).out


def test_a_rare_failure_is_named_and_passed_with_another_seed(algo, run):
    ended = run("Breaks", "--total-timesteps", 240, "--eval-episodes", 0)
    assert ended.code == 1
    for word in ("NaN", "reward[", "environment step"):
        assert word in ended.err
    run_dir, what = the_run(), ended.err.splitlines()[-2]  # The last line is the note.
    again = command(algo, "--resume", run_dir)
    assert (again.code, again.err.splitlines()[-2]) == (1, what)
    others = [command(algo, "--resume", run_dir, "--seed", seed) for seed in range(2, 10)]
    assert all("not those of the unchanged run" in other.out for other in others)
    assert any(what not in other.err for other in others)


@pytest.mark.parametrize(
    "bounds",
    [
        {"high": np.inf},
        {"low": -3e38, "high": 3e38},
        {"low": -1e12},
        {"low": 0, "high": 5, "dtype": "int64"},
    ],
)
def test_unbounded_actions(run, bounds):
    ended = run("Bounds", **bounds)
    assert ended.code == 2
    assert "gymnasium.wrappers.TransformAction" in ended.last_line
    assert not Path("runs").exists()


def test_the_advice_for_unbounded_actions_works(run):
    """What the line names, TransformAction with a finite Box, is enough."""
    gym = field_envs.gym
    finite = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    make = lambda: gym.wrappers.TransformAction(field_envs.Bounds(high=np.inf), lambda a: a, finite)
    gym.register("Finite-v0", make)
    assert run("Finite").code == 0


@pytest.mark.parametrize(
    "bounds", [{"shape": ()}, {"shape": (2, 2), "dtype": "float64"}, {"low": 3, "high": 7}]
)
def test_unusual_bounds(run, bounds):
    ended = run("Bounds", **bounds)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "kind", ["float16", "uint8", "int64", "bool", "discrete", "scalar", "empty", "huge"]
)
def test_unusual_observations(run, kind):
    ended = run("Observations", kind=kind)
    assert ended.code == 0, ended.err


def test_both_ends_at_once(run):
    """Termination counts: 2 environments, 60 steps, episodes of 20."""
    assert run("BothEnds").code == 0
    assert rows(the_run())[-1].sum() == 6


def test_a_replay_buffer_that_does_not_fit(algo, run):
    """It is refused before a folder is made; with the size that is advised the run begins."""
    ended = run("Pictures", "--buffer-size", 50_000_000)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert not Path("runs").exists()
    advised = int(re.search(r"--buffer-size (\d+)", ended.err)[1])
    ended = run("Pictures", "--buffer-size", advised, "--total-timesteps", 42)
    assert ended.code == 0, ended.err


def test_the_device_may_change(algo, run, monkeypatch):
    """A run of a GPU goes on without one."""
    run("Track")
    path = the_run() / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"]["device"] = "cuda"
    torch.save(checkpoint, path)
    ended = command(algo, "--resume", the_run(), "--device", "cpu", "--total-timesteps", 140)
    assert ended.code == 0, ended.err
    assert command(algo, "--evaluate", the_run(), "--device", "cpu").code == 0


def test_imported_it_raises_ordinary_exceptions(tiny_args, algo):
    with pytest.raises(ValueError, match="TransformAction"):
        train(algo, tiny_args(env_id="CartPole-v1"))
    with pytest.raises(FloatingPointError):
        train(algo, tiny_args(env_id="field_envs:Breaks-v0", total_timesteps=2000))


def test_interrupted_in_a_notebook_it_goes_on_at_once(tiny_args, algo, monkeypatch):
    update = algo.Agent.update

    def interrupted(self, batch, number):
        if number == 20:
            raise KeyboardInterrupt
        return update(self, batch, number)

    args = tiny_args(env_id="field_envs:Track-v0")
    with monkeypatch.context() as patch:
        patch.setattr(algo.Agent, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(algo, args)
    assert algo.load_checkpoint(train(algo, args) / "checkpoint.pt")["step"] == 60


def test_options_that_would_be_ignored(algo, run):
    run("Track")
    for option in (
        ["--batch-size", 3],
        ["--learning-rate", 1],
        ["--num-envs", 3],
        ["--exp-name", "x"],
    ):
        ended = command(algo, "--evaluate", the_run(), *option)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert option[0][2:].replace("-", "_") in ended.err.replace("-", "_")
    ended = command(algo, "--resume", the_run(), "--evaluate", the_run())
    assert ended.code == 2


def test_one_observation_gives_one_action(algo):
    policy = algo.DiffusionPolicy(5, 2, (8, 8, 8), 3)
    act = algo.make_actor(policy, field_envs.gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
    assert act(np.zeros(5)).shape == (2,)
    assert act(np.zeros((1, 5))).shape == (1, 2)
    assert act(np.zeros((7, 5))).shape == (7, 2)
    for wrong in (np.zeros(4), np.zeros((5, 1)), np.zeros(10), np.full(5, np.nan)):
        with pytest.raises(ValueError, match="5 finite numbers"):
            act(wrong)


def test_a_single_robot(algo, run, monkeypatch):
    monkeypatch.setattr(field_envs.Single, "copies", 0)
    ended = run("Single", "--num-envs", 1, "--eval-episodes", 0)
    assert ended.code == 0, ended.err


def test_the_best_policy_is_kept(algo, run):
    run("Track")
    best = the_run() / "best.pt"
    assert best.stat().st_size < 200_000
    assert command(algo, "--evaluate", best).code == 0
    assert isinstance(algo.load_agent(best), algo.Agent)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_locale_cannot_write(algo, tmp_path, encoding):
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    ended = shell(algo, "--env-id", "field_envs:Accents-v0", *TINY, cwd=tmp_path, env=environment)
    assert ended.code == 1
    assert "the task raised RuntimeError: d" in ended.err
    assert "crochage \\u2603" in ended.err
    assert "--resume" in ended.last_line


def test_a_checkpoint_is_as_good_as_its_folder(algo, run):
    run("Track")
    folder = the_run()
    assert command(algo, "--resume", folder / "checkpoint.pt", "--total-timesteps", 140).code == 0
    assert the_run() == folder
    assert algo.load_checkpoint(folder / "checkpoint.pt")["step"] == 70
    assert command(algo, "--evaluate", folder / "checkpoint.pt").code == 0


def test_every_line_names_the_type(run):
    ended = run("Wordless")
    assert ended.code == 2
    assert "AssertionError" in ended.last_line


def test_the_old_api_is_refused(run):
    ended = run("OldApi")
    assert ended.code in (1, 2)


def test_moved_and_strangely_named_folders(algo, run):
    run("Track", "--exp-name", "a b/c é")
    moved = the_run().rename("else where")
    assert command(algo, "--resume", moved, "--total-timesteps", 140).code == 0
    assert command(algo, "--evaluate", moved).code == 0
    assert not os.listdir("runs")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(algo, tmp_path, method):
    code = (
        "if __name__ == '__main__':\n"
        "    import multiprocessing, dacer_v2\n"
        f"    multiprocessing.set_start_method('{method}')\n"
        "    dacer_v2.run_command_line()\n"
    )
    arguments = ["--env-id", "field_envs:Track-v0", "--async-envs", *TINY]
    path = os.pathsep.join([str(Path(dacer.__file__).parent), ENVIRONMENT["PYTHONPATH"]])
    (tmp_path / "start.py").write_text(code)
    fake = type("script", (), {"__file__": str(tmp_path / "start.py")})
    ended = shell(fake, *arguments, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": path})
    assert ended.code == 0, ended.err
