"""The multi-goal task against numbers worked out by hand, its two forms against each other, and its pictures."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import multigoal_env
from multigoal_env import MultiGoalVectorEnv, Task, coverage, rollout

ENV_ID = "multigoal_env:MultiGoal-v0"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_it():
    check_env(gym.make(ENV_ID, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("num_goals", [2, 4, 5, 12])
def test_goals_lie_evenly_on_a_circle(num_goals):
    goals = Task(num_goals).goals
    assert len(goals) == num_goals
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 5.0)
    gaps = np.linalg.norm(goals - np.roll(goals, 1, 0), axis=1)
    np.testing.assert_allclose(gaps, 10 * np.sin(np.pi / num_goals))
    np.testing.assert_allclose(goals[0], (5.0, 0.0))


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
    env = gym.make(ENV_ID).unwrapped
    env.reset(seed=0, options={"position": position})
    obs, got, terminated, truncated, _ = env.step(np.array(action))
    np.testing.assert_allclose(obs, next_position, rtol=1e-6)
    np.testing.assert_allclose(got, reward)
    assert (terminated, truncated) == (arrived, False)


def test_constants_are_keyword_arguments():
    constants = {"num_goals": 6, "goal_radius": 2, "bound": 3, "goal_threshold": 0.5, "goal_reward": 7, "action_cost": 2,
                 "distance_cost": 4, "init_std": 0.0}  # fmt: skip
    env = gym.make(ENV_ID, **constants)
    assert env.reset(seed=0)[0].tolist() == [0, 0]
    assert env.observation_space.high.tolist() == [3, 3]
    rewards = [env.step(np.array([0.8, 0.0]))[1:3] for _ in range(2)]
    assert rewards[0] == pytest.approx((-2 * 0.64 - 4 * 1.44, False))
    assert rewards[1] == pytest.approx((-2 * 0.64 - 4 * 0.16 + 7, True))


def test_starts():
    env = gym.make(ENV_ID)
    first = env.reset(seed=3)[0]
    assert np.array_equal(first, env.reset(seed=3)[0])
    assert not np.array_equal(first, env.reset(seed=4)[0])
    starts = np.array([env.reset()[0] for _ in range(2000)])
    np.testing.assert_allclose(starts.std(0), 0.1, rtol=0.1)
    np.testing.assert_allclose(starts.mean(0), 0.0, atol=0.01)


def test_cut_at_100_steps():
    env = gym.make(ENV_ID)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


@pytest.mark.parametrize("num_goals", [1, 13, -2, 4.5])
def test_number_of_goals_out_of_range(num_goals):
    with pytest.raises(ValueError, match=f"num_goals must be 2 to 12, but it is {num_goals}"):
        gym.make(ENV_ID, num_goals=num_goals)


@pytest.mark.parametrize("kwargs", [{}, {"num_goals": 6, "bound": 5.5}])
def test_vector_form_is_the_single_one(kwargs):
    """Step by step, arrivals, truncations and resets included."""
    make = lambda: gym.make(ENV_ID, **kwargs)
    single = gym.vector.SyncVectorEnv([make] * 5, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    vector = gym.make_vec(ENV_ID, num_envs=5, **kwargs)
    assert isinstance(vector.unwrapped, MultiGoalVectorEnv)
    assert vector.single_observation_space == single.single_observation_space
    assert vector.action_space == single.action_space
    rng, ends = np.random.default_rng(0), np.zeros(2, int)
    for reset in ({"seed": [3, 1, 4, 1, 5]}, {"options": {"position": (1.0, 2.0)}}, {"seed": 7}):
        assert np.array_equal(vector.reset(**reset)[0], single.reset(**reset)[0])
    goal = rng.integers(4, size=5)
    for step in range(400):
        actions = rng.uniform(-1, 1, (5, 2)).astype(np.float32)
        actions[:3] *= 0.1  # these will be cut
        actions[3:] = 0.5 * actions[3:] + 0.5 * vector.unwrapped.task.goals[goal[3:]] / 5  # these arrive
        mine, theirs = vector.step(actions), single.step(actions)
        for a, b in zip(mine[:4], theirs[:4], strict=True):
            assert np.array_equal(a, b), step
        done = mine[2] | mine[3]
        assert ("final_obs" in mine[4]) == done.any() == ("final_obs" in theirs[4])
        if done.any():
            assert np.array_equal(mine[4]["final_obs"][done], np.stack(theirs[4]["final_obs"][done]))
        ends += (mine[2].sum(), mine[3].sum())
    assert (ends > 5).all()


def test_coverage():
    assert coverage(np.array([50, 50, 50, 50])) == pytest.approx(1)
    assert coverage(np.array([200, 0, 0, 0])) == 0
    assert coverage(np.array([100, 100, 0, 0])) == pytest.approx(0.5)
    assert coverage(np.array([30, 10])) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2))
    assert coverage(np.zeros(4, int)) == 0


def test_rollouts_rest_where_they_arrive():
    towards = np.array([[1.0, 0.0], [0.0, -1.0], [0.01, 0.01]])
    path, goals = rollout(lambda obs: towards, Task(), np.zeros((3, 2)), max_steps=20)
    assert goals.tolist() == [0, 3, -1]
    np.testing.assert_allclose(path[5:, 0], np.tile((5.0, 0.0), (16, 1)))
    np.testing.assert_allclose(path[-1, 2], (0.2, 0.2))


@pytest.fixture
def trained(algo, tiny_args):
    return algo.main(tiny_args(env_id=ENV_ID, env_kwargs='{"num_goals": 5}', total_timesteps=240))


def draw(monkeypatch, *arguments):
    import tyro

    monkeypatch.setattr(sys, "argv", ["multigoal_env.py", *map(str, arguments)])
    tyro.cli(multigoal_env.main)


def test_pictures(trained, monkeypatch, capsys):
    """Each picture is there and shows something where arrows, surface and trajectories must be, and in TensorBoard."""
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draw(monkeypatch, trained)
    out = capsys.readouterr().out
    assert "coverage" in out
    assert "reached each goal" in out
    pictures = {path.stem: imread(path)[..., :3] for path in [*trained.glob("*.png"), trained.parent / "multigoal.png"]}
    assert pictures.keys() == {"policy", "value", "starts", "multigoal"}
    for picture in pictures.values():
        height, width = picture.shape[:2]
        middle = picture[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4].reshape(-1, 3)
        colored = (middle.max(1) - middle.min(1)) > 0.2  # grid, goals and level curves are black and grey
        assert colored.mean() > 0.001
    images = EventAccumulator(str(trained), size_guidance={"images": 0}).Reload().Tags()["images"]
    assert set(images) == {"policy", "value", "starts", "multigoal"}


def test_evaluations_log_coverage(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(trained)).Reload().Tags()["scalars"]
    assert {"eval/coverage", "eval/arrived"} <= set(tags)


def test_policy_report():
    """Half of the rollouts go east and half north; a quarter of all stops short."""
    half = np.arange(200) % 2 == 0
    speed = np.where(np.arange(200) % 4 == 3, 0.0, 1.0)
    act = lambda obs: np.where(half[:, None], (1.0, 0.0), (0.0, 1.0)) * speed[:, None]
    report = multigoal_env.MultiGoalEnv(4).policy_report(act)
    assert report == {"coverage": coverage(np.array([100, 50, 0, 0])), "arrived": 0.75}


def test_bad_input(trained, tiny_args, algo, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as exit_:
            draw(monkeypatch, *arguments)
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    other = algo.main(tiny_args(env_id="toy_envs:Counter-v0"))
    capsys.readouterr()
    assert "is a run on toy_envs:Counter-v0" in refused(other)
    assert "is a run on toy_envs:Counter-v0" in refused(trained, other)
    assert not list(trained.glob("*.png"))
    assert "is not the folder of a run" in refused(tmp_path / "missing")
    (other / "checkpoint.pt").unlink()
    assert "no checkpoint" in refused(other)
    assert "at least one run" in refused()
