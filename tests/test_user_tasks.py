"""What users' tasks do: unusual spaces and types, failures, and harm to what they share."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import user_envs
from helpers import FORKS, command, failed, refused, scalars, stored, the_run, tiny, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

sync_and_async = pytest.mark.parametrize("async_envs", [False, True])


# ---- Spaces and types


@pytest.mark.parametrize(
    "name, async_envs", [("OneArray", False), ("OneArray", True), ("OneDict", False)]
)
def test_observations_are_copied(run, name, async_envs):
    assert run(name, async_envs=async_envs).code == 0
    obs, _, _, successor, _ = stored(the_run())
    assert (successor[:, 0] == obs[:, 0]).all()  # of the same episode
    assert (successor[:, 1] == obs[:, 1] + 1).all()
    assert successor[:, 1].max() == 20


@pytest.mark.parametrize("kind", ["vector", "matrix", "0-d", "float16", "bool", "int"])
def test_rewards_are_numbers(algo, tiny_args, kind):
    args = tiny_args(env_id="user_envs:Rewards-v0", env_kwargs=json.dumps({"kind": kind}))
    envs = algo.make_envs(args, 2)
    envs.reset(seed=1)
    for step in range(1, 20):
        obs, reward, terminated, truncated, _ = envs.step(np.ones((2, 1), np.float32))
        true = -(obs[:, 0].astype(float) ** 2)
        true = {"bool": true < -0.5, "int": np.round(true)}.get(kind, true)
        np.testing.assert_allclose(reward, true, atol=1e-3)
        assert (terminated.any(), truncated.any()) == (False, False)
    assert envs.step(np.ones((2, 1), np.float32))[3].all()


@sync_and_async
def test_info_is_not_read(run, async_envs):
    ended = run("Infos", async_envs=async_envs)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("seed", [2**31, 10**12])
def test_seeds_fit_a_c_int(run, seed):
    ended = run("CInt", seed=seed)
    assert ended.code == 0, ended.err


OBSERVATIONS = ["float16", "float64", "huge", "uint8", "int64", "bool", "discrete", "scalar"]
OBSERVATIONS += ["empty", "matrix", "dict", "tuple", "other byte order"]


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_unusual_observations(run, kind):
    """They are flattened; the task seeds its space with the number of the step."""
    ended = run("Observations", {"kind": kind}, total_timesteps=44, eval_episodes=1)
    assert ended.code == 0, ended.err
    first = stored(the_run())[0][:40:2]  # of the first copy, in the warm-up of 20 steps
    space = user_envs.Observations(kind).observation_space
    for clock, obs in enumerate(first):
        space.seed(clock)
        np.testing.assert_allclose(obs, gym.spaces.flatten(space, space.sample()), rtol=1e-6)


@sync_and_async
def test_bounds_of_each_copy(run, async_envs):
    """Those of observations do not matter. Those of actions have to be the same."""
    ended = run("Varied", async_envs=async_envs)
    assert ended.code == 0, ended.err
    ended = run("Varied", {"what": "actions"}, async_envs=async_envs)
    refused(ended, "action space")


def test_an_argument_of_any_name(run):
    ended = run("Named", {"function": "rastrigin"})
    assert ended.code == 0, ended.err


def test_a_task_that_answers_any_name(run):
    ended = run("Forwards")
    assert ended.code == 0, ended.err


def test_a_task_that_has_grown(algo, run, monkeypatch):
    """Its run cannot go on, and stays as it is."""
    run("Track")
    before = (the_run() / "checkpoint.pt").read_bytes()

    class Grown(user_envs.Observations):
        def __init__(self):
            super().__init__("bool")

    monkeypatch.setattr(gym.spec("Track-v0"), "entry_point", Grown)
    ended = command(algo, "--resume", the_run(), "--total-timesteps", 160)
    refused(ended, "size mismatch for policy")
    assert (the_run() / "checkpoint.pt").read_bytes() == before


def test_observations_without_a_length(run):
    refused(run("Observations", {"kind": "sequence"}), "user_envs:Observations-v0: no vector")
    assert not Path("runs").exists()


UNUSUAL_BOUNDS = [
    {"shape": ()},
    {"shape": (2, 2), "dtype": "float64"},
    {"low": 3, "high": 7},
]


@pytest.mark.parametrize("bounds", UNUSUAL_BOUNDS)
def test_unusual_bounds(run, bounds):
    ended = run("Bounds", bounds, total_timesteps=44, eval_episodes=1)
    assert ended.code == 0, ended.err


NO_BOUNDS = [
    {"high": np.inf},
    {"low": -3e38, "high": 3e38},
    {"low": -1e12},
    {"low": 0, "high": 5, "dtype": "int64"},
]


@pytest.mark.parametrize("bounds", NO_BOUNDS)
def test_unbounded_or_integer_actions(run, bounds):
    ended = run("Bounds", bounds)
    refused(ended, "no vector and bounded Box of real actions")
    assert ended.err.endswith("; see gymnasium.wrappers.TransformAction\n")
    assert not Path("runs").exists()


def test_the_advice_for_unbounded_actions_works(run):
    """What the line names, TransformAction with a finite Box, is enough."""
    finite = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    make = lambda: gym.wrappers.TransformAction(user_envs.Bounds(high=np.inf), lambda a: a, finite)
    gym.register("Finite-v0", make)
    assert run("Finite").code == 0


def test_the_old_api(run):
    refused(run("OldApi"), "ValueError: Output array is the wrong shape")
    assert not Path("runs").exists()


# ---- Episodes


def test_both_ends_at_once(run):
    """Termination counts: 2 environments, 60 steps, episodes of 20."""
    assert run("BothEnds").code == 0
    assert stored(the_run())[-1].sum() == 6


def test_an_evaluation_ends(algo, run, monkeypatch):
    monkeypatch.setattr(algo, "EVAL_STEPS", 30)
    ended = run("Endless")
    assert ended.code == 0
    assert "2 episodes were cut after 30 steps" in ended.out
    assert "set max_episode_steps" in ended.out
    cured = command(algo, "--evaluate", the_run(), "--env-kwargs", '{"max_episode_steps": 20}')
    assert cured.code == 0
    assert "were cut" not in cured.out
    longer = command(algo, "--evaluate", the_run(), "--env-kwargs", '{"max_episode_steps": 40}')
    assert "were cut" not in longer.out


def test_evaluations_share_no_episodes(algo, run, monkeypatch):
    monkeypatch.setattr(user_envs.ShowsSeed, "seeds", seeds := [])
    run("ShowsSeed", eval_interval=10, eval_episodes=5)
    played = seeds[2:]  # A run resets twice before its first step.
    assert len({*played}) == len(played)  # nor with training
    for seed in (1, 2, 3):
        for _ in range(2):  # The same seed gives the same episodes.
            ended = command(algo, "--evaluate", the_run(), "--seed", seed)
            assert ended.code == 0, ended.err
    evaluations = [tuple(seeds[i : i + 6]) for i in range(len(seeds) - 36, len(seeds), 6)]
    assert evaluations[::2] == evaluations[1::2]
    assert len({seed for three in evaluations[::2] for seed in three}) == 18


# ---- Copies


def test_an_evaluation_makes_as_many_copies_as_training(run, monkeypatch):
    monkeypatch.setattr(user_envs.Counted, "copies", 0)
    ended = run("Counted", eval_episodes=9, eval_interval=10)
    assert ended.out.count("evaluation -") == 4
    assert user_envs.Counted.copies == 4  # two for training, two for evaluations


def test_a_single_robot(run, monkeypatch):
    """One environment and no evaluation make one copy of the task."""
    monkeypatch.setattr(user_envs.Counted, "copies", 0)
    ended = run("Counted", num_envs=1, eval_episodes=0)
    assert ended.code == 0, ended.err
    assert user_envs.Counted.copies == 1


@sync_and_async
@pytest.mark.parametrize("fails", [False, True])
def test_every_task_is_closed(run, async_envs, fails):
    ended = run("Simulator", {"fails": fails}, async_envs=async_envs)
    assert ended.code == int(fails), ended.err
    opened = {path.name.split("-")[1] for path in Path().glob("opened-*")}
    closed = {path.name.split("-")[1] for path in Path().glob("closed-*")}
    assert len(opened) >= 4
    # Where a worker's task fails, Gymnasium's worker closes it as well.
    assert opened == closed


@sync_and_async
def test_a_close_that_raises_spoils_nothing(run, async_envs):
    ended = run("BadClose", async_envs=async_envs)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("task", ["Scores", "StaticScores"])
def test_scores_of_the_name_of_the_return(run, algo, task):
    """The return stays what was measured, and the run can go on."""
    assert run(task).code == 0
    assert algo.load_checkpoint(the_run() / "checkpoint.pt")["best"] < 0
    assert scalars(the_run())["eval/distance"]
    assert command(algo, "--resume", the_run(), "--total-timesteps", 160).code == 0


def test_metadata_that_cannot_be_sent(run):
    ended = run("LockInMetadata", async_envs=True)
    assert ended.code == 0, ended.err


# ---- Failures


@sync_and_async
def test_training_sends_no_action_that_is_not_finite(run, async_envs):
    ended = run("Motors", learning_rate=1e15, eval_episodes=0, async_envs=async_envs)
    failed(ended, the_run(), "FloatingPointError: NaN or infinity in action at step")


def assert_no_process_is_left():
    for worker in multiprocessing.active_children():
        worker.join(20)  # Killed, it may take a moment.
    assert not multiprocessing.active_children()


RAISES = {
    "raises a lock": "RuntimeError: the task raised RuntimeError: simulator lost",
    "raises two arguments": "RuntimeError: the task raised TwoArguments: 7 joint limit",
    "stops": "RuntimeError: the task raised StopIteration",
    "exits": "RuntimeError: the task raised SystemExit: 0",
    "exits with words": "RuntimeError: the task raised SystemExit: window closed",
}


@sync_and_async
@pytest.mark.parametrize("how", RAISES)
def test_whatever_a_step_raises_is_a_failure(run, how, async_envs):
    ended = run("Fails", {"how": how}, async_envs=async_envs)
    failed(ended, the_run(), RAISES[how])
    assert_no_process_is_left()


@sync_and_async
def test_a_reset_that_raises(run, async_envs):
    ended = run("Fails", {"how": "exits", "where": "reset"}, async_envs=async_envs)
    failed(ended, the_run(), RAISES["exits"])


@pytest.mark.parametrize("how", [*RAISES, "asserts"])
def test_a_task_that_cannot_be_made(run, how):
    ended = run("Fails", {"how": how, "where": "constructor"})
    refused(ended, RAISES.get(how, "RuntimeError: the task raised AssertionError"))
    assert not Path("runs").exists()


def test_a_copy_that_cannot_be_made(run):
    """Those before it are closed."""
    refused(run("Ports", num_envs=5), "the task raised OSError: port 3 is in use")
    assert user_envs.Ports.in_use == 0
    ended = run("Ports", num_envs=2, eval_episodes=2)
    assert "the task raised OSError: port 3 is in use" in ended.err
    assert user_envs.Ports.in_use == 0


def test_a_refused_task_is_closed(run):
    refused(run("Ports", {"actions": 3}, num_envs=2), "no vector and bounded Box")
    assert user_envs.Ports.in_use == 0


NOT_FINITE = {
    ("NaN reward", "step"): "NaN or infinity in reward at step 60",
    ("huge reward", "step"): "NaN or infinity in reward at step 60",
    ("NaN observation", "step"): "NaN or infinity in next_obs at step 60",
    ("NaN observation", "reset"): "NaN or infinity in obs at step 42",
}


@pytest.mark.parametrize("how, where", NOT_FINITE)
def test_what_is_not_finite_is_named(run, how, where):
    """Numbers beyond single precision are not, either."""
    ended = run("Fails", {"how": how, "where": where})
    failed(ended, the_run(), f"FloatingPointError: {NOT_FINITE[how, where]}")


def test_a_first_observation_that_is_infinite(run):
    refused(run("Blind"), "FloatingPointError: NaN or infinity in obs at step 0")
    assert not Path("runs").exists()


@sync_and_async
def test_an_observation_of_another_length(run, async_envs):
    ended = run("Fails", {"how": "longer observation"}, async_envs=async_envs)
    failed(
        ended, the_run(), f"ValueError: {'could not broadcast' if async_envs else 'Output array'}"
    )


def test_a_worker_that_dies(run):
    failed(run("Fails", {"how": "dies"}, async_envs=True), the_run(), "EOFError")
    assert_no_process_is_left()


def test_a_worker_that_hangs(algo, run, monkeypatch):
    """And does not mind SIGTERM. The run ends all the same, and so do all its processes."""
    monkeypatch.setattr(algo, "TIMEOUT", 5.0 if FORKS else 20.0)
    failed(run("Fails", {"how": "hangs"}, async_envs=True), the_run(), "TimeoutError")
    assert_no_process_is_left()


def test_a_worker_that_hangs_when_it_starts(algo, run, monkeypatch):
    monkeypatch.setattr(algo, "TIMEOUT", 2.0)
    started = time.monotonic()
    ended = run("SlowStart", async_envs=True)
    refused(ended, "TimeoutError")
    assert not Path("runs").exists()
    assert time.monotonic() - started < 60
    assert_no_process_is_left()


def test_a_worker_that_cannot_start(run):
    """This process knows no more of it than that. The worker says why on stderr."""
    ended = run("Licensed", async_envs=True)
    assert ended.code == 2
    assert ended.last_line.startswith("dacer_v2.py: error: ")
    assert not Path("runs").exists()


def test_a_rare_failure_is_passed_with_another_seed(algo, run):
    ended = run("Breaks", total_timesteps=240, eval_episodes=0)
    run_dir = the_run()
    failed(ended, run_dir, "FloatingPointError: NaN or infinity in reward at step ")
    what = ended.err.splitlines()[-2]
    again = command(algo, "--resume", run_dir)
    failed(again, run_dir, what)
    others = [command(algo, "--resume", run_dir, "--seed", seed) for seed in (2, 3, 4)]
    assert any(other.code != 2 and what not in other.err for other in others)


IN_EVALUATIONS = {
    "NaN reward": "FloatingPointError: NaN or infinity in an evaluation's reward at step",
    "exits": RAISES["exits"],
}


@pytest.mark.parametrize("how", IN_EVALUATIONS)
def test_a_task_that_fails_in_an_evaluation(algo, run, monkeypatch, how):
    """In training, and in an evaluation alone."""
    monkeypatch.setattr(user_envs.Fails, "copies", 0)
    kwargs = {"how": how, "spared": 2}  # those of training
    failed(run("Fails", kwargs), the_run(), IN_EVALUATIONS[how])
    user_envs.Fails.copies = 2
    words = "--evaluate", the_run(), "--env-kwargs", json.dumps(kwargs), "--eval-episodes", 4
    refused(command(algo, *words), IN_EVALUATIONS[how])


def test_imported_it_raises_ordinary_exceptions(algo, tiny_args):
    with pytest.raises(ValueError, match="TransformAction"):
        train(algo, tiny_args(env_id="CartPole-v1"))
    with pytest.raises(FloatingPointError, match="in reward at step 60"):
        train(algo, tiny_args(env_id="user_envs:Fails-v0", env_kwargs='{"how": "NaN reward"}'))


# ---- What the task shares with the script


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_settings_that_a_task_changes(algo, run, where):
    """PyTorch's default type and its gradients, and the working directory."""
    before = os.getcwd()
    try:
        ended = run("Settings", {"where": where})
        os.chdir(before)
        assert ended.code == 0, ended.err
        saved = torch.load(the_run() / "checkpoint.pt", weights_only=True)
        types = {value.dtype for value in (*saved["agent"].values(), *saved["rows"])}
        assert types == {torch.float32}
        torch.set_default_dtype(torch.float64)
        act = algo.make_actor(algo.load_agent(the_run()).policy, user_envs.Track().action_space)
        assert act(np.zeros(2)).shape == (1,)
        ended = command(algo, "--evaluate", the_run())
        assert ended.code == 0, ended.err
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        os.chdir(before)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_task_that_reseeds_everything(run, where):
    """The agent's draws differ from episode to episode and from seed to seed, as they would."""
    short = {"total_timesteps": 120, "eval_episodes": 0}
    run("Reseeds", {"where": where}, **short)
    first = stored(the_run())[1][:40, 0].reshape(20, 2)  # of the warm-up
    assert len(np.unique(first)) == 40
    run("Reseeds", {"where": where}, seed=2, **short)
    (second,) = (stored(path)[1] for path in Path("runs").glob("*__2__*"))
    assert (first[:, 0] != second[:40, 0].reshape(20, 2)[:, 0]).all()


def test_the_agent_and_the_task_draw_other_numbers(run):
    """Both draw two numbers after a reset with the same seed."""
    run("Draws", num_envs=1, total_timesteps=42, eval_episodes=0)
    obs, action, *_ = stored(the_run())
    assert abs(obs[0, 0]) > 0
    assert obs[0, 0] != action[0, 0]


def test_the_data_of_a_task_are_not_copied(algo, tiny_args, monkeypatch):
    """Not more often than by `gymnasium.make`."""
    monkeypatch.setattr(user_envs.Dataset, "copies", 0)
    gym.make("user_envs:Data-v0")
    by_gymnasium = user_envs.Dataset.copies
    assert by_gymnasium > 0
    algo.make_envs(tiny_args(env_id="user_envs:Data-v0"), 3).close()
    assert user_envs.Dataset.copies == 4 * by_gymnasium


def test_a_task_of_ones_own(algo, work, monkeypatch):
    """`module:Name-v0` imports the module, and --env-kwargs reaches the task.

    In an evaluation it adds to the arguments of the run.
    """
    kwargs = '{"ending": "terminate"}'
    trained = command(algo, *tiny(env_id="toy_envs:Counter-v0", env_kwargs=kwargs))
    assert trained.code == 0, trained.err
    assert stored(the_run())[-1].sum() == 24
    made, make_envs = [], algo.make_envs
    monkeypatch.setattr(algo, "make_envs", lambda *how: made.append(how[0]) or make_envs(*how))
    for new in ({"max_episode_steps": 3}, {"ending": "truncate"}):
        asked = command(algo, "--evaluate", the_run(), "--env-kwargs", json.dumps(new))
        assert asked.code == 0, asked.err
        assert json.loads(made.pop().env_kwargs) == {"ending": "terminate"} | new


def test_scores_that_end_the_process(run):
    failed(run("QuitsScoring"), the_run(), "the task raised SystemExit")


def test_a_task_that_closes_slowly(run):
    ended = run("ClosesSlowly", async_envs=True, eval_episodes=0)
    assert ended.code == 0, ended.err
    in_main = Path(f"closed-{os.getpid()}")  # the copy that tells the spaces
    assert in_main.exists()
    assert len(list(Path().glob("closed-*"))) == 3


def test_a_reset_that_hangs(algo, run, monkeypatch):
    monkeypatch.setattr(algo, "TIMEOUT", 5.0 if FORKS else 20.0)
    ended = run("Fails", {"how": "hangs", "where": "reset"}, async_envs=True)
    failed(ended, the_run(), "TimeoutError")
