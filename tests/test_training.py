"""Whole runs, in this process: what they store, learn, leave and repeat."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import (
    both_scripts,
    differences,
    evaluate,
    interrupted_at,
    scalars,
    stored,
    train,
)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_transitions(algo, tiny_args):
    """Every stored transition is one that happened, with its true successor, also where an episode
    ended."""
    run_dir = train(algo, tiny_args(env_id="toy_envs:Counter-v0"))
    checkpoint = algo.load_checkpoint(run_dir / "checkpoint.pt")
    assert checkpoint["count"] == len(checkpoint["rows"][0]) == 120
    obs, action, reward, next_obs, terminated = (field.numpy() for field in checkpoint["rows"])
    episode, step = obs.T
    assert (next_obs[:, 0] == episode).all()  # none crosses a reset
    assert (next_obs[:, 1] == step + 1).all()  # the true successor, step 5 included
    assert set(step) == {0, 1, 2, 3, 4}
    assert (terminated == (step == 4) * (episode % 2 == 1)).all()  # truncated ones still bootstrap
    assert terminated.sum() > 5
    assert np.abs(action).max() <= 1
    arrived = -1 + 2 * (action[:, 0] + 1)  # in [-1, 3]
    np.testing.assert_allclose(reward, arrived, atol=1e-5)
    assert len(set(action[:, 0])) > 60  # the copies act apart, as far as they are not at a bound


def test_the_returns_of_training(algo, tiny_args):
    """The mean of the episodes of 5 steps that ended since the warm-up, here of 20 steps."""
    ending = {"env_id": "toy_envs:Counter-v0", "env_kwargs": '{"ending": "terminate"}'}
    run_dir = train(algo, tiny_args(**ending))
    rewards = stored(run_dir)[2].reshape(60, 2)  # of 60 steps in 2 environments
    episodes = rewards[20:].reshape(8, 5, 2).sum(1)
    ((_, found),) = scalars(run_dir)["charts/episodic_return"]
    assert found == pytest.approx(episodes.mean(), abs=1e-4)


def test_copies_whose_episodes_end_apart(algo, tiny_args):
    """In training and in evaluations, the end of one does not touch the other."""
    kwargs = '{"ending": "terminate", "apart": true}'
    run_dir = train(algo, tiny_args(env_id="toy_envs:Counter-v0", env_kwargs=kwargs))
    obs, _, reward, next_obs, terminated = stored(run_dir)
    assert (next_obs == obs + [0, 1]).all()
    reward, terminated = reward.reshape(60, 2), terminated.reshape(60, 2)
    assert (terminated.sum(1) == 1).any()
    returns = []
    for rewards, ends in zip(reward[20:].T, terminated[20:].T):
        episodes = np.split(rewards, np.flatnonzero(ends) + 1)
        returns += [episode.sum() for episode in episodes[:-1]]  # The last one is under way.
    ((_, found),) = scalars(run_dir)["charts/episodic_return"]
    assert found == pytest.approx(np.mean(returns), abs=1e-4)

    envs = algo.make_envs(algo.Args("toy_envs:Counter-v0", kwargs), 2)
    returns, _ = algo.evaluate(lambda obs: np.full((len(obs), 1), 0.1), envs, 4, seed=1)
    for two in np.split(returns, 2):
        assert sorted(two) == pytest.approx([0.5, 0.6])


def test_the_warm_up_is_uniform(algo, tiny_args):
    length = {"learning_starts": 400, "total_timesteps": 402, "eval_episodes": 0}
    action = stored(train(algo, tiny_args(env_id="toy_envs:Reach-v0", **length)))[1][:400]
    quantiles = np.quantile(action, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(quantiles, [-0.9, -0.5, 0.0, 0.5, 0.9], atol=0.1)


def test_the_warm_up_does_not_follow_the_default_type(algo, tiny_args):
    """A task may change it in the middle, and a resumed run begins with it."""
    args = tiny_args(env_id="toy_envs:Reach-v0", eval_episodes=0)
    first = stored(train(algo, args, "first"))[1]
    torch.set_default_dtype(torch.float64)
    try:
        second = stored(train(algo, args, "second"))[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(first[:40], second[:40])


def test_no_checkpoint_repeats_the_random_numbers_of_another(algo, tiny_args):
    run_dir = train(algo, tiny_args(env_id="toy_envs:Reach-v0", checkpoint_interval=5))
    obs, action, *_ = stored(run_dir)
    assert len(np.unique(obs, axis=0)) == len(obs) == 120
    assert len(np.unique(action[:40], axis=0)) == 40  # those of the warm-up: four checkpoints


OTHER_SETTINGS = {
    "gamma": 0.5,
    "tau": 0.1,
    "reward_scale": 1.0,
    "policy_frequency": 3,
    "batch_size": 9,
    "learning_rate": 1e-3,
    "alpha_lr": 0.5,
    "noise_scale": 0.3,
    "entropy_interval": 7,
    "entropy_samples": 12,
    "q_grad_weight": 0.5,
    "time_weight_c": 0.3,
    "time_weight_d": 0.5,
}


def test_each_number_of_the_algorithm_counts(algo, tiny_args):
    """Another value of any of these gives other weights."""
    args = tiny_args(env_id="toy_envs:Reach-v0", total_timesteps=70, eval_episodes=0)
    first = weights(train(algo, args, "first"))
    for name, value in OTHER_SETTINGS.items():
        other = weights(train(algo, replace(args, **{name: value}), name))
        assert differences(first, other), name


def test_environments_move_while_the_agent_learns(algo, tiny_args, monkeypatch):
    events = []

    def note(owner, name):
        call = getattr(owner, name)
        noted = lambda *args: events.append(name) or call(*args)
        monkeypatch.setattr(owner, name, noted)

    note(algo.InParallel, "step_async")
    note(algo.Agent, "update")
    note(algo.InParallel, "step_wait")
    train(algo, tiny_args(env_id="toy_envs:Reach-v0", async_envs=True, eval_episodes=0))
    assert events[-120:] == ["step_async", "update", "step_wait"] * 40


@both_scripts
def test_a_run_leaves_its_record(algo, tiny_args):
    args = tiny_args(
        env_id="toy_envs:Counter-v0", exp_name="tiny", total_timesteps=540, eval_interval=125
    )
    run_dir = train(algo, args)
    record = json.loads((run_dir / "args.json").read_text())
    record["hidden_sizes"] = tuple(record["hidden_sizes"])
    assert algo.Args(**record) == algo.resolve(args)
    assert record["noise_scale"] == 0.1

    curves = scalars(run_dir)
    assert [step for step, _ in curves["charts/SPS"]] == [240, 440, 540]
    assert [step for step, _ in curves["eval/episodic_return"]] == [290, 540]
    expected = {"charts/SPS", "charts/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/qf{i}_{name}" for i in (1, 2) for name in ("loss", "values", "std")}
    expected |= {f"losses/{name}" for name in ("actor_loss", "alpha", "entropy", "omega1")}
    assert expected <= curves.keys()

    agent = algo.load_agent(run_dir)
    assert curves["losses/alpha"][-1][1] == pytest.approx(agent.log_alpha.exp().item())
    assert agent.args.exp_name == "tiny"
    assert same(agent.state_dict(), weights(run_dir))


def test_the_best_evaluation_is_kept(algo, tiny_args, monkeypatch):
    returns, policies = iter([1.0, 3.0, 2.0]), []

    def make_actor(policy, *_):
        policies.append({name: value.clone() for name, value in policy.state_dict().items()})

    def evaluate(*_):
        mean = next(returns)
        return np.array([mean]), {"episodic_return": mean, "episodic_return_std": 0.0}

    monkeypatch.setattr(algo, "make_actor", make_actor)
    monkeypatch.setattr(algo, "evaluate", evaluate)
    run_dir = train(algo, tiny_args(env_id="toy_envs:Reach-v0", total_timesteps=160))
    assert len(policies) == 3
    assert same(algo.load_agent(run_dir / "best.pt").policy.state_dict(), policies[1])
    assert algo.load_checkpoint(run_dir / "best.pt")["update"] == 40
    assert same(algo.load_agent(run_dir).policy.state_dict(), policies[2])


def test_the_best_evaluation_is_remembered(algo, tiny_args, monkeypatch):
    """By a run that goes on."""
    returns = iter([3.0, 1.0, 2.0])

    def evaluate(*_):
        mean = next(returns)
        return np.array([mean]), {"episodic_return": mean, "episodic_return_std": 0.0}

    monkeypatch.setattr(algo, "evaluate", evaluate)
    length = {"total_timesteps": 160, "checkpoint_interval": 10}
    args = tiny_args(env_id="toy_envs:Reach-v0", **length)
    with interrupted_at(algo, 35), pytest.raises(KeyboardInterrupt):
        train(algo, args)
    train(algo, args)
    assert next(returns, None) is None
    assert algo.load_checkpoint("trained/best.pt")["update"] == 20


def test_evaluations_do_not_disturb_training(algo, tiny_args):
    runs = [
        train(algo, tiny_args(env_id="toy_envs:Reach-v0", eval_interval=n), f"every {n}")
        for n in (7, 1000)
    ]
    assert same(*map(weights, runs))


def test_evaluations_play_rounds(algo):
    """Each copy plays one episode a round, which is its first, and no episode is played twice."""

    def act(obs):
        seen.append(obs.copy())
        return np.tile([[0.1]], (len(obs), 1))

    seen, envs = [], algo.make_envs(algo.Args("toy_envs:Counter-v0"), 2)
    returns, scores = algo.evaluate(act, envs, 5, seed=1)
    assert len(seen) == 3 * 5
    np.testing.assert_allclose(returns, np.full(5, 0.5))
    assert scores == pytest.approx({"episodic_return": 0.5, "episodic_return_std": 0.0})

    envs = algo.make_envs(algo.Args("toy_envs:Reach-v0"), 2)
    returns, scores = algo.evaluate(lambda obs: np.zeros_like(obs), envs, 5, seed=1)
    assert len(set(returns)) == 5
    found = scores["episodic_return"], scores["episodic_return_std"]
    assert found == pytest.approx((returns.mean(), returns.std()))


def test_a_run_depends_on_its_seed_alone(algo, tiny_args, monkeypatch):
    """So do the episodes of its evaluations, of which no two are the same."""
    evaluate, evaluations = algo.evaluate, []

    def seen(act, envs, episodes, seed):
        returns, scores = evaluate(act, envs, episodes, seed)
        evaluations.append((seed, *returns))
        return returns, scores

    monkeypatch.setattr(algo, "evaluate", seen)
    runs = [
        train(algo, tiny_args(env_id="toy_envs:Reach-v0", seed=seed), f"{i}")
        for i, seed in enumerate((3, 3, 4))
    ]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))
    first, again, other = np.split(np.array(evaluations), 3)
    assert (first == again).all()
    assert len({*first.flat, *other.flat}) == first.size + other.size


def test_the_first_networks_depend_on_the_seed(algo, tiny_args):
    first, again, other = (
        algo.make_agent(algo.resolve(tiny_args(seed=seed)), 2, 2) for seed in (3, 3, 4)
    )
    assert same(first.state_dict(), again.state_dict())
    for name, parameter in other.named_parameters():
        is_bias = parameter.ndim < 2  # Biases and log_alpha begin with the same values.
        assert is_bias or not torch.equal(parameter, first.get_parameter(name)), name


def test_updates_are_on_what_was_stored_before(algo, tiny_args, monkeypatch):
    """No update knows the step under way, which environments may take meanwhile."""
    sample, counts = algo.ReplayBuffer.sample, []

    def counted(buffer, *rest):
        counts.append(buffer.count)
        return sample(buffer, *rest)

    monkeypatch.setattr(algo.ReplayBuffer, "sample", counted)
    train(algo, tiny_args(env_id="toy_envs:Reach-v0", total_timesteps=50, eval_episodes=0))
    assert counts == [40, 42, 44, 46, 48]


TASKS = [
    "Humanoid",
    "Ant",
    "HalfCheetah",
    "Walker2d",
    "Hopper",
    "Swimmer",
    "InvertedDoublePendulum",
]


@pytest.mark.parametrize(
    "env_id", [f"{task}-{version}" for task in TASKS for version in ("v4", "v5")] + ["Pusher-v5"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_papers_tasks(algo, tiny_args, env_id):
    """Each can be made, and acted in within its bounds."""
    args = algo.resolve(tiny_args(env_id=env_id))
    envs = algo.make_envs(args, 2)
    obs, _ = envs.reset(seed=0)
    space = envs.single_action_space
    agent = algo.Agent(obs.shape[1], space.shape[0], args)
    action = agent.act(obs)
    sent = algo.to_env(action, space)
    assert envs.action_space.contains(sent)
    np.testing.assert_allclose(sent / space.high, action, atol=1e-6)  # their bounds are symmetric
    assert np.isfinite(envs.step(sent)[0]).all()


@both_scripts
def test_the_papers_settings_by_task(algo):
    def settings(**changes):
        args = algo.resolve(algo.Args(device="cpu", total_timesteps=300_000, **changes))
        return args.noise_scale, args.hidden_sizes, args.learning_starts

    assert settings(env_id="Humanoid-v4") == (0.15, (512, 512, 512), 200_000)
    assert settings(env_id="Humanoid-v5") == settings(env_id="Humanoid-v4")
    assert settings(env_id="HalfCheetah-v4") == (0.15, (256, 256, 256), 200_000)
    for task in ("HumanoidStandup-v4", "Ant-v4"):
        assert settings(env_id=task) == (0.1, (256, 256, 256), 30_000)
    given = {"noise_scale": 0.3, "learning_starts": 5}
    noise_scale, _, learning_starts = settings(env_id="toy_envs:Humanoid-v0", **given)
    assert (noise_scale, learning_starts) == (0.3, 20)

    def entropy_interval(**changes):
        return algo.resolve(algo.Args(device="cpu", **changes)).entropy_interval

    assert entropy_interval(total_timesteps=30_030_000) == 10_000
    assert entropy_interval(total_timesteps=100_000) == 100  # at least
    assert entropy_interval(entropy_interval=7) == 7


@both_scripts
def test_learns(algo, tiny_args):
    """A point moves to the origin.

    Untrained policies score below -4. Going straight to the origin scores about -1.1.
    """
    args = algo.resolve(tiny_args(env_id="toy_envs:Reach-v0", eval_episodes=20))
    untrained = evaluate(algo, algo.Agent(2, 2, args).policy, args, seed=0)[0].mean()
    size = {"hidden_sizes": (64, 64), "num_envs": 10, "batch_size": 64, "buffer_size": 10_000}
    length = {"total_timesteps": 9_000, "learning_starts": 1_000, "eval_interval": 10_000}
    rates = {"learning_rate": 2e-3, "gamma": 0.9, "tau": 0.01}
    run_dir = train(algo, replace(args, **size, **length, **rates))
    ((_, learned),) = scalars(run_dir)["eval/episodic_return"]
    assert untrained < -4.0
    assert learned > -1.6


def test_every_1000_updates_a_line_says_how_far_training_is(algo, tiny_args, monkeypatch, capsys):
    monkeypatch.setattr(algo.Agent, "update", lambda *_: {})
    train(algo, tiny_args(env_id="toy_envs:Reach-v0", total_timesteps=2100, eval_episodes=0))
    printed, _ = capsys.readouterr()
    line = r"^([\d,]+) of 2,100 steps, \d+ a second$"
    assert re.findall(line, printed, re.MULTILINE) == ["2,040"]
    assert printed.count("\n") == 2  # one at the start


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_cuda(algo, tiny_args):
    run_dir = train(algo, tiny_args(env_id="toy_envs:Reach-v0", device="cuda"))
    assert weights(run_dir)["log_alpha"].is_cuda
    assert algo.load_agent(run_dir, "cpu").log_alpha.device.type == "cpu"


def test_the_task_that_is_learned_here_is_well_formed():
    check_env(gym.make("toy_envs:Reach-v0").unwrapped, skip_render_check=True)


def test_a_point_of_a_curve_is_of_what_came_since_the_last(algo, tiny_args):
    """Returns of training are logged once, and so is the entropy, which is rare."""
    ending = {"env_id": "toy_envs:Counter-v0", "env_kwargs": '{"ending": "terminate"}'}
    length = {"total_timesteps": 440, "entropy_interval": 1000, "eval_episodes": 0}
    run_dir = train(algo, tiny_args(**ending, **length))
    episodes = stored(run_dir)[2].reshape(220, 2)[20:].reshape(2, 20, 5, 2).sum(2)
    curves = scalars(run_dir)
    found = [value for _, value in curves["charts/episodic_return"]]
    assert found == pytest.approx(episodes.mean((1, 2)), abs=1e-4)
    assert len(curves["losses/entropy"]) == 1


def test_the_warm_up_is_whole_steps_of_all_environments(algo, tiny_args):
    """One at least, and an update comes after it."""
    for asked, made in ((0, 2), (1, 2), (41, 42)):
        assert algo.resolve(tiny_args(learning_starts=asked)).learning_starts == made
    with pytest.raises(ValueError, match="leaves no update"):
        algo.resolve(tiny_args(total_timesteps=40))
