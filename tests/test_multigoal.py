"""The multi-goal task against numbers worked out by hand, and its pictures of policies that go straight to known goals."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.utils.env_checker import check_env
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import dacer
import dacer_v2
import multigoal_env
from multigoal_env import COLORS, MultiGoalEnv, coverage

ENV_ID = "multigoal_env:MultiGoal-v0"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num_goals", [2, 4, 5, 12])
def test_goals_lie_evenly_on_a_circle(num_goals):
    env = gym.make(ENV_ID, num_goals=num_goals, render_mode="rgb_array").unwrapped
    check_env(env)
    np.testing.assert_allclose(np.linalg.norm(env.goals, axis=1), np.full(num_goals, 5.0))
    np.testing.assert_allclose(np.linalg.norm(np.diff(env.goals, axis=0), axis=1), 10 * np.sin(np.pi / num_goals))
    np.testing.assert_allclose(env.goals[0], (5.0, 0.0))


@pytest.mark.parametrize("num_goals", [1, 13, 4.5])
def test_number_of_goals_out_of_range(num_goals):
    with pytest.raises(ValueError, match=f"num_goals must be 2 to 12, but it is {num_goals}"):
        gym.make(ENV_ID, num_goals=num_goals)


@pytest.mark.parametrize(
    "position, action, next_position, reward, arrived",
    [
        ((0, 0), (0.5, 0.0), (0.5, 0.0), -30 * 0.25 - 4.5**2, False),
        ((0, 0), (0.3, -0.4), (0.3, -0.4), -30 * 0.25 - (0.3**2 + 4.6**2), False),
        ((3.5, 0), (0.6, 0.0), (4.1, 0.0), -30 * 0.36 - 0.9**2 + 10, True),
        ((3.5, 0), (0.5, 0.0), (4.0, 0.0), -30 * 0.25 - 1.0, False),  # at distance 1 it has not arrived
        ((0, 0), (-3.0, 0.5), (-1.0, 0.5), -30 * 1.25 - (16 + 0.25), False),  # the action is clipped
        ((6.5, 6.8), (1.0, 1.0), (7.0, 7.0), -30 * 2 - (4 + 49), False),  # and so is the position
    ],
)
def test_steps_by_hand(position, action, next_position, reward, arrived):
    env = MultiGoalEnv()
    env.reset(seed=0)
    env.position = np.array(position, float)
    obs, got, terminated, truncated, _ = env.step(np.array(action))
    np.testing.assert_allclose(obs, next_position, rtol=1e-6)
    np.testing.assert_allclose(got, reward)
    assert (terminated, truncated) == (arrived, False)


def test_starts_and_cut_at_100_steps():
    env = gym.make(ENV_ID)
    assert np.array_equal(env.reset(seed=3)[0], env.reset(seed=3)[0])
    starts = np.array([env.reset()[0] for _ in range(2000)])
    np.testing.assert_allclose(starts.std(0), 0.1, rtol=0.1)
    np.testing.assert_allclose(starts.mean(0), 0.0, atol=0.01)
    assert [env.step(np.zeros(2))[2:4] for _ in range(100)] == [(False, False)] * 99 + [(False, True)]


def test_coverage():
    three_to_one = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    for hits, expected in (
        ([50] * 4, 1),
        ([200, 0, 0, 0], 0),
        ([9, 9, 0, 0], 0.5),
        ([30, 10], three_to_one),
        ([0, 0], 0),
    ):
        assert coverage(np.array(hits)) == pytest.approx(expected)


def test_rollouts_rest_where_they_arrive():
    actions = np.array([[1.0, 0.0], [0.0, -1.0], [0.01, 0.01]])
    path, goals = MultiGoalEnv().rollouts(lambda obs: actions, np.zeros((3, 2)))
    assert goals.tolist() == [0, 3, -1]
    assert path.shape == (101, 3, 2)
    np.testing.assert_allclose(path[5:, 0], np.tile((5.0, 0.0), (96, 1)))  # at (4, 0) it has not arrived yet
    np.testing.assert_allclose(path[-1, 2], (1.0, 1.0))


def test_policy_report():
    """Half of the rollouts go east and half north; a quarter of all stops short."""
    row = np.arange(200)[:, None]
    act = lambda obs: np.where(row % 2 == 0, (1.0, 0.0), (0.0, 1.0)) * (row % 4 != 3)
    assert MultiGoalEnv(4).policy_report(act) == {"coverage": coverage(np.array([100, 50, 0, 0])), "arrived": 0.75}


def draw(monkeypatch, *folders):
    monkeypatch.setattr(sys, "argv", ["multigoal_env.py", *map(str, folders)])
    tyro.cli(multigoal_env.main)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes folders whose policies go straight to the goals numbered `targets`, in turn, and whose value is -|p|^2."""

    def load_agent(folder):
        args = SimpleNamespace(**json.loads((folder / "args.json").read_text()))
        q = lambda obs: -args.reward_scale * obs.square().sum(-1)
        return SimpleNamespace(
            args=args, policy=args.targets, critic=lambda obs, _: (torch.stack([q(obs) + 3, q(obs)]), 0)
        )

    def act(targets, obs):
        way = MultiGoalEnv(6).goals[np.resize(targets, len(obs))] - obs
        return 0.5 * way / np.linalg.norm(way, axis=1, keepdims=True)

    for script in (dacer, dacer_v2):
        monkeypatch.setattr(script, "load_agent", load_agent)
        monkeypatch.setattr(script, "make_actor", lambda targets, space, seed: partial(act, targets))

    def make(targets, **changes):
        args = {
            "env_id": ENV_ID,
            "env_kwargs": '{"num_goals": 6}',
            "seed": 1,
            "diffusion_steps": 5,
            "reward_scale": 0.2,
        }
        folder = tmp_path / f"to{targets}"
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({**args, "targets": targets, **changes}))
        return folder

    return make


def goals_shown(path, region=()):
    """The goals whose colour is in a picture."""
    picture = imread(path)[..., :3][region]
    return [goal for goal in range(6) if (np.abs(picture - to_rgb(COLORS[goal])).max(-1) < 0.01).sum() > 9]


def test_pictures_show_the_goals_reached(make_run, monkeypatch, capsys):
    """Of three seeds the comparison shows the median, and below it the other algorithm."""
    v2 = {"q_grad_weight": 5.0, "time_weight_c": 0.4, "time_weight_d": -1.8}
    targets = [[1, 2, 4, 5], [0], [1, 4], [3]]
    runs = [make_run(goals, seed=seed, **(v2 if seed < 3 else {})) for seed, goals in enumerate(targets)]
    draw(monkeypatch, *runs)
    out = capsys.readouterr().out
    assert "[1, 4]: DACERv2, T = 5, eta = 5, seed 2: coverage 0.387, arrived 100.0%" in out  # log 2 / log 6
    assert "[3]: DACER, T = 5, seed 3: coverage 0.000" in out
    for run, goals in zip(runs, targets):
        assert goals_shown(run / "starts.png") == goals
        assert goals_shown(run / "policy.png", np.s_[320:380, 325:390]) == goals  # the arrows from the origin
        assert len(list(run.glob("events.out.tfevents.*.pictures"))) == 1
    assert goals_shown(runs[0].parent / "multigoal.png") == [1, 3, 4]
    value = multigoal_env.Run(runs[0]).value(np.array([(0.0, 0.0), (3.0, 4.0)]))
    np.testing.assert_allclose(value, (0.0, -25.0), atol=1e-5)


def test_a_trained_run(algo, tiny_args, monkeypatch, capsys):
    """Real agents fit the pictures; another task, and folders that are no run, are refused in one line."""
    trained = algo.main(tiny_args(env_id=ENV_ID, env_kwargs='{"num_goals": 5}', total_timesteps=120))
    draw(monkeypatch, trained)
    assert {path.name for path in trained.glob("*.png")} == {"policy.png", "value.png", "starts.png"}
    assert imread(trained / "value.png")[..., :3].std() > 0.1

    empty = trained.parent / "empty"
    empty.mkdir()
    (empty / "args.json").write_text((trained / "args.json").read_text())
    args = tiny_args(env_id="toy_envs:Counter-v0", total_timesteps=44)
    bad = {"is a run on toy_envs:Counter-v0": [algo.main(args)], "checkpoint": [empty], "No such file": ["missing"]}
    capsys.readouterr()
    for message, folders in {**bad, "at least one run": []}.items():
        with pytest.raises(SystemExit) as exit_:
            draw(monkeypatch, *folders)
        err = capsys.readouterr().err
        assert (exit_.value.code, err.count("\n"), message in err) == (2, 1, True)
