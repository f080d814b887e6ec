"""The multi-goal task against numbers worked out by hand, and its pictures.

The pictures are of policies that go straight to goals.
"""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import ROOT, program, shell
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from mpl_toolkits.mplot3d import Axes3D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    distances = np.linalg.norm(np.diff(env.goals, axis=0), axis=1)
    np.testing.assert_allclose(distances, 10 * np.sin(np.pi / num_goals))
    np.testing.assert_allclose(env.goals[0], (5.0, 0.0))


@pytest.mark.parametrize("num_goals", [1, 13, 4.5])
def test_number_of_goals_out_of_range(num_goals):
    with pytest.raises(ValueError, match=f"num_goals must be 2 to 12, but it is {num_goals}"):
        gym.make(ENV_ID, num_goals=num_goals)


def test_steps_by_hand():
    position = np.array([(0, 0), (0, 0), (3.5, 0), (3.5, 0), (0, 0), (6.5, 6.8)])
    action = np.array([(0.5, 0), (0.3, -0.4), (0.6, 0), (0.5, 0), (-3, 0.5), (1, 1)])
    moved = [(0.5, 0), (0.3, -0.4), (4.1, 0), (4, 0), (-1, 0.5), (7, 7)]  # (-3, 0.5) is clipped.
    squared = np.array([4.5**2, 0.09 + 4.6**2, 0.9**2, 1, 16.25, 53])  # distances
    cost = 30 * np.array([0.25, 0.25, 0.36, 0.25, 1.25, 2]) + squared
    arrives = np.arange(6) == 2  # The next stops at distance 1, and has not arrived.
    env = MultiGoalEnv()
    for got, expected in zip(env.advance(position, action), (moved, 10 * arrives - cost, arrives)):
        np.testing.assert_allclose(got, expected)
    for i in range(6):
        env.position = position[i]
        obs, reward, terminated, truncated, _ = env.step(action[i])
        expected = *moved[i], 10 * arrives[i] - cost[i]
        np.testing.assert_allclose((*obs, reward), expected, rtol=1e-6)
        assert (terminated, truncated) == (arrives[i], False)


def test_starts_and_cut_at_100_steps():
    env = gym.make(ENV_ID)
    assert np.array_equal(env.reset(seed=3)[0], env.reset(seed=3)[0])
    starts = np.array([env.reset()[0] for _ in range(2000)])
    np.testing.assert_allclose((starts.mean(0), starts.std(0)), ([0, 0], [0.1, 0.1]), atol=0.01)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


def test_coverage():
    three_to_one = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    for hits, expected in (
        ([50] * 4, 1),
        ([9, 0, 0, 0], 0),
        ([9, 9, 0, 0], 0.5),
        ([30, 10], three_to_one),
        ([0, 0], 0),
    ):
        assert coverage(np.array(hits)) == pytest.approx(expected)


def test_rollouts_rest_where_they_arrive():
    actions = np.array([[1.0, 0.0], [0.0, -1.0], [0.01, 0.01]])
    path, goals = MultiGoalEnv().rollouts(lambda obs: actions, np.zeros((3, 2)))
    assert goals.tolist() == [0, 3, -1]
    # At (4, 0) it has not arrived yet.
    np.testing.assert_allclose(path[5:, 0], np.tile((5.0, 0.0), (96, 1)))
    np.testing.assert_allclose(path[-1, 2], (1.0, 1.0))


def test_policy_report():
    """Half of the rollouts go east and half north; a quarter of all stops short."""
    row = np.arange(200)[:, None]
    act = lambda obs: np.where(row % 2 == 0, (1.0, 0.0), (0.0, 1.0)) * (row % 4 != 3)
    assert MultiGoalEnv(4).policy_report(act) == {
        "coverage": coverage(np.array([100, 50, 0, 0])),
        "arrived": 0.75,
    }


def straight(targets, obs):
    """A policy that goes straight to the goals numbered `targets`, in turn."""
    way = MultiGoalEnv(6).goals[np.resize(targets, len(obs))] - obs
    return 0.5 * way / np.linalg.norm(way, axis=1, keepdims=True)


def stub_agent(folder):
    """An agent with targets for a policy, whose value is -|p|^2."""
    args = SimpleNamespace(**json.loads((folder / "args.json").read_text()))

    def critic(obs, action):
        value = -args.reward_scale * obs.square().sum(-1)
        return torch.stack([0 * value + 3, value]), None

    return SimpleNamespace(args=args, policy=args.targets, critic=critic)


def goals_shown(path, region=()):
    """The goals whose colour is in a picture."""
    picture = imread(path)[..., :3][region]

    def count(color):
        return (np.abs(picture - to_rgb(color)).max(-1) < 0.01).sum()

    return [goal for goal in range(6) if count(COLORS[goal]) > 9]


def test_pictures_show_the_goals_reached(tmp_path, monkeypatch, capsys):
    """Of three seeds the comparison shows the median, and beside it the other algorithm."""
    make_actor = lambda targets, space, seed: partial(straight, targets)
    for script in (dacer, dacer_v2):
        monkeypatch.setattr(script, "load_agent", stub_agent)
        monkeypatch.setattr(script, "make_actor", make_actor)
    targets = [1, 2, 4, 5], [0], [1, 4], [3]
    runs = {tmp_path / str(seed): goals for seed, goals in enumerate(targets)}
    for seed, (run, targets) in enumerate(runs.items()):
        args = {
            "env_id": ENV_ID,
            "env_kwargs": '{"num_goals": 6}',
            "diffusion_steps": 5,
            "reward_scale": 0.2,
        }
        v2 = {"q_grad_weight": 5.0, "time_weight_c": 0.4, "time_weight_d": -1.8} if seed < 3 else {}
        run.mkdir()
        (run / "args.json").write_text(json.dumps(dict(seed=seed, targets=targets, **args, **v2)))
        torch.save({"algorithm": "dacer_v2" if v2 else "dacer"}, run / "last.pt")
    multigoal_env.main(tuple(runs))
    out = capsys.readouterr().out
    log_2_over_log_6 = "coverage 0.387, arrived 100.0%"
    assert f"2: DACERv2, T = 5, eta = 5, w = exp(0.4 t -1.8), seed 2: {log_2_over_log_6}" in out
    assert "3: DACER, T = 5, seed 3: coverage 0.000" in out
    for run, targets in runs.items():
        assert goals_shown(run / "starts.png") == targets
        around_the_origin = np.s_[320:380, 325:390]
        assert goals_shown(run / "policy.png", around_the_origin) == targets
    to_the_right = np.s_[335:365, 362:390]  # Goal 3 is to the left of the origin.
    assert goals_shown(run / "policy.png", to_the_right) == []
    assert goals_shown(tmp_path / "multigoal.png") == [1, 3, 4]
    height, width = imread(tmp_path / "multigoal.png").shape[:2]
    assert width > height
    values = multigoal_env.Run(run).value(np.array([(0, 0), (3, 4)]))
    np.testing.assert_allclose(values, (0, -25), atol=1e-5)


def test_a_trained_run(algo, tiny_args, capsys):
    """Real agents fit the pictures. Another task, and folders that are no run, are refused in one
    line."""
    trained, other = Path("trained"), Path("other")
    kwargs = '{"num_goals": 5, "max_episode_steps": 9}'
    algo.main(tiny_args(env_id=ENV_ID, env_kwargs=kwargs, total_timesteps=120), trained)
    multigoal_env.main((trained,))
    pictures = {path.name for path in trained.glob("*.png")}
    assert pictures == {"policy.png", "value.png", "starts.png"}
    assert imread(trained / "value.png")[..., :3].std() > 0.1
    # Another file there would end the curves in an open TensorBoard.
    assert len(list(trained.glob("events.out.tfevents.*"))) == 1
    assert len(list(trained.glob("pictures/events.out.tfevents.*"))) == 1

    (trained / "value.png").unlink()
    (trained / "value.png").mkdir()  # so that it cannot be written
    ended = shell(multigoal_env.__file__, trained)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert "multigoal_env.py: error: " in ended.err

    algo.main(tiny_args(env_id="toy_envs:Counter-v0", total_timesteps=44), other)
    bad = {
        "is a run on toy_envs:Counter-v0": (other,),
        "No such file": (Path("missing"),),
        "at least one run": (),
    }
    for checkpoint in trained.glob("*.pt"):
        checkpoint.unlink()
    Path("list").mkdir()
    torch.save([3], "list/last.pt")
    bad["cannot load list"] = (Path("list"),)
    Path("foreign").mkdir()
    torch.save({"algorithm": "not_here"}, "foreign/last.pt")
    bad["No module named 'not_here'"] = (Path("foreign"),)
    capsys.readouterr()
    for message, folders in {**bad, "best.pt": (trained,)}.items():
        with pytest.raises(SystemExit) as exit_:
            multigoal_env.main(folders)
        err = capsys.readouterr().err
        assert (exit_.value.code, err.count("\n"), message in err) == (2, 1, True)


def test_the_picture_of_the_task_is_not_upside_down():
    env = MultiGoalEnv()
    env.position = np.array([-1.0, 3.0])
    row, column = np.argwhere((env.render() == 0).all(-1)).mean(0)
    assert (column / 279 * 14 - 7, 7 - row / 279 * 14) == pytest.approx((-1, 3), abs=0.1)


def test_the_value_is_the_mean_over_actions():
    """Of 16 in each state, by the smaller critic."""
    act = lambda rows: np.arange(len(rows), dtype=np.float32)[:, None]
    critic = lambda _, action: (torch.stack([action[:, 0], action[:, 0] + 1]), None)
    agent = SimpleNamespace(critic=critic, args=SimpleNamespace(reward_scale=0.5))
    run = SimpleNamespace(new_act=lambda: act, agent=agent)
    assert multigoal_env.Run.value(run, np.zeros((2, 2))).tolist() == [15, 47]


def stub_run(algorithm="A", num_goals=4, score=0.0, **more):
    name, env = f"{algorithm} {score}", MultiGoalEnv(num_goals)
    scores = {"coverage": score}
    return SimpleNamespace(algorithm=algorithm, name=name, env=env, report=scores, **more)


def test_values_and_starts_stand_where_they_are(monkeypatch):
    surfaces, starts = [], []
    monkeypatch.setattr(Axes3D, "plot_surface", lambda _, *xyz, **how: surfaces.append(xyz))
    monkeypatch.setattr(multigoal_env, "draw_rollouts", lambda axes, run, s: starts.append(s))
    run = stub_run(value=lambda positions: 2 * positions[:, 0] + positions[:, 1])
    multigoal_env.value_picture(run)
    multigoal_env.starts_picture(run)
    ((x, y, value),) = surfaces
    np.testing.assert_allclose(value, 2 * x + y)
    assert starts == multigoal_env.STARTS


def test_the_comparison_has_its_rows_and_columns(monkeypatch):
    """Of two seeds it shows the worse, and where there is no run, nothing."""
    monkeypatch.setattr(multigoal_env, "draw_rollouts", lambda *_: [])
    runs = [stub_run("A", 6, 0.9), stub_run("A", 4, 0.6), stub_run("A", 4, 0.2)]
    figure = multigoal_env.comparison_picture([*runs, stub_run("B", 4, 0.5)])
    assert [axes.get_title() for axes in figure.axes] == [
        "A 0.2\ncoverage 0.20, the median of 2 runs\nmean 0.40, worst 0.20\n[]",
        "A 0.9\ncoverage 0.90\n[]",
        "B 0.5\ncoverage 0.50\n[]",
        "",
    ]


def test_the_weight_is_named_in_the_title(work):
    folder = Path(shutil.copytree(ROOT / "runs/goals4-v2-T5-eta2-w1-2", "run"))
    assert multigoal_env.Run(folder).algorithm == "DACERv2, T = 5, eta = 2, w = 1"
    agent = dacer_v2.load_agent(folder)
    agent.args.time_weight_c, agent.args.time_weight_d = 0.4, -1.8
    dacer_v2.save(folder / "last.pt", agent)
    assert multigoal_env.Run(folder).algorithm == "DACERv2, T = 5, eta = 2, w = exp(0.4 t -1.8)"


def test_a_run_of_a_changed_script_is_its_own(work, monkeypatch):
    """The policy of a script that has a name of its own acts by that script."""
    changed = Path(dacer_v2.__file__).read_text().replace('= "dacer_v2"', '= "changed_v2"')
    Path("changed_v2.py").write_text(changed)
    monkeypatch.syspath_prepend(work)
    script = importlib.import_module("changed_v2")
    published = dacer_v2.load_agent(ROOT / "runs/goals4-v2-T5-eta2-w1-2")
    Path("run").mkdir()
    script.save("run/last.pt", published)
    run = multigoal_env.Run(Path("run"))
    assert run.script is script
    assert run.algorithm == "changed_v2, T = 5, eta = 2, w = 1"
    film = ROOT / "benchmarks/film.py", "run", "goals.webp", "--first", 0, "--task-kwargs", "{}"
    ended = program(*film)
    assert ended.code == 0, ended.err
    assert Path("goals.webp").exists()


def test_a_run_that_is_named_twice_is_drawn_once(work, monkeypatch):
    folder = Path(shutil.copytree(ROOT / "runs/goals4-v2-T5-eta2-w1-2", "run"))
    compared = []
    for name in ("policy", "value", "starts"):
        monkeypatch.setattr(multigoal_env, f"{name}_picture", lambda _: Figure((1, 1)))
    draw = multigoal_env.comparison_picture
    monkeypatch.setattr(
        multigoal_env, "comparison_picture", lambda runs: compared.extend(runs) or draw(runs)
    )
    multigoal_env.main((folder, folder.absolute()))
    assert len(compared) == 1


def test_the_pictures_have_their_names_in_tensorboard(work, monkeypatch):
    run = Path(shutil.copytree(ROOT / "runs/goals4-v2-T5-eta2-w1-2", "run"))
    for name in ("policy", "value", "starts", "comparison"):
        monkeypatch.setattr(multigoal_env, f"{name}_picture", lambda _: Figure((1, 1)))
    multigoal_env.main((run,))
    images = EventAccumulator(str(run / "pictures")).Reload().Tags()["images"]
    assert sorted(images) == ["policy", "starts", "value"]
