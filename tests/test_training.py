"""Whole runs, in this process: what they store, learn, leave and repeat."""

import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run_dir: Path) -> dict[str, list]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("async_envs", [False, True])
def test_transitions(algo, tiny_args, async_envs):
    """Every stored transition is one that happened, with its true successor, also where an episode ended."""
    run_dir = train(algo, tiny_args(env_id="toy_envs:Counter-v0", async_envs=async_envs))
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
    np.testing.assert_allclose(
        reward, -1 + 2 * (action[:, 0] + 1), atol=1e-5
    )  # actions arrive in [-1, 3]
    assert len(set(action[:, 0])) > 60  # the copies act apart, as far as they are not at a bound


def test_a_run_leaves_its_record(algo, tiny_args):
    args = tiny_args(
        env_id="toy_envs:Counter-v0", exp_name="tiny", total_timesteps=540, eval_interval=125
    )
    run_dir = train(algo, args)
    assert (run_dir / Path(algo.__file__).name).read_text() == Path(algo.__file__).read_text()
    record = json.loads((run_dir / "args.json").read_text())
    assert record["noise_scale"] == 0.1
    assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", record["commit"])

    curves = scalars(run_dir)
    assert [(e.step, e.value) for e in curves["charts/updates"]] == [
        (240, 100),
        (440, 200),
        (540, 250),
    ]
    assert [event.step for event in curves["eval/episodic_return"]] == [290, 540]
    expected = {"charts/SPS", "charts/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/qf{i}_{name}" for i in (1, 2) for name in ("loss", "values", "std")}
    expected |= {
        f"losses/{name}"
        for name in ("actor_loss", "alpha", "entropy", "exploration_noise_std", "omega1")
    }
    assert expected <= curves.keys()
    alpha = curves["losses/alpha"][0].value
    assert curves["losses/exploration_noise_std"][0].value == pytest.approx(0.1 * alpha)

    agent = algo.load_agent(run_dir)
    assert agent.args.exp_name == "tiny"
    assert same(agent.state_dict(), weights(run_dir))


def test_the_best_evaluation_is_kept(algo, tiny_args, monkeypatch):
    returns, policies = iter([1.0, 3.0, 2.0]), []

    def evaluate(policy, *_):
        policies.append({name: value.clone() for name, value in policy.state_dict().items()})
        return None, {"episodic_return": next(returns), "episodic_return_std": 0.0}

    monkeypatch.setattr(algo, "evaluate", evaluate)
    run_dir = train(algo, tiny_args(env_id="toy_envs:Reach-v0", total_timesteps=160))
    assert len(policies) == 3
    assert same(algo.load_agent(run_dir / "best.pt").policy.state_dict(), policies[1])
    assert algo.load_checkpoint(run_dir / "best.pt")["update"] == 40
    assert same(algo.load_agent(run_dir).policy.state_dict(), policies[2])


def test_evaluations_do_not_disturb_training(algo, tiny_args):
    runs = [
        train(algo, tiny_args(env_id="toy_envs:Reach-v0", eval_interval=n), f"every {n}")
        for n in (7, 1000)
    ]
    assert same(*map(weights, runs))


def test_evaluations_are_without_exploration_noise(algo, tiny_args):
    """And the same seed gives the same returns."""
    args = algo.resolve(tiny_args(env_id="toy_envs:Reach-v0"))
    agent = algo.Agent(2, 2, args)
    returns, _ = algo.evaluate(agent.policy, args, seed=3)
    agent.log_alpha.data.fill_(50.0)
    torch.rand(1)
    assert (algo.evaluate(agent.policy, args, seed=3)[0] == returns).all()
    assert (algo.evaluate(agent.policy, args, seed=4)[0] != returns).any()


def test_a_run_depends_on_its_seed_alone(algo, tiny_args, monkeypatch):
    evaluate, evaluations = algo.evaluate, []
    monkeypatch.setattr(
        algo, "evaluate", lambda *args: evaluations.append(args[2]) or evaluate(*args)
    )
    runs = [
        train(algo, tiny_args(env_id="toy_envs:Reach-v0", seed=seed), f"{i}")
        for i, seed in enumerate((3, 3, 4))
    ]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))
    first, again, other = np.split(np.array(evaluations), 3)
    assert (first == again).all() and (
        np.abs(other - first) >= tiny_args().eval_episodes
    ).all()  # its own


@pytest.mark.parametrize("kind", ["dict", "tuple", "matrix"])
def test_spaces_of_any_shape(algo, tiny_args, kind):
    train(algo, tiny_args(env_id="toy_envs:Odd-v0", env_kwargs=json.dumps({"kind": kind})))


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
    """Each can be made, acted in within its bounds, and updated on."""
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


def test_the_papers_settings_by_task(algo):
    def settings(**changes):
        args = algo.resolve(algo.Args(device="cpu", total_timesteps=300_000, **changes))
        return args.noise_scale, args.hidden_sizes, args.learning_starts

    assert settings(env_id="Humanoid-v4") == (0.15, (512, 512, 512), 200_000)
    assert settings(env_id="Humanoid-v5") == settings(env_id="Humanoid-v4")
    assert settings(env_id="HalfCheetah-v4") == (0.15, (256, 256, 256), 200_000)
    assert (
        settings(env_id="HumanoidStandup-v4")
        == settings(env_id="Ant-v4")
        == (0.1, (256, 256, 256), 30_000)
    )
    assert settings(env_id="toy_envs:Humanoid-v0", noise_scale=0.3, learning_starts=5)[::2] == (
        0.3,
        20,
    )
    assert (
        algo.resolve(algo.Args(total_timesteps=30_030_000, device="cpu")).entropy_interval == 10_000
    )
    assert algo.resolve(algo.Args(entropy_interval=7, device="cpu")).entropy_interval == 7


def test_learns(algo, tiny_args):
    """Moving a point to the origin: untrained policies score below -4, going straight there scores about -1.1."""
    args = algo.resolve(tiny_args(env_id="toy_envs:Reach-v0"))
    untrained = algo.evaluate(algo.Agent(2, 2, args).policy, args, seed=0)[0].mean()
    run_dir = train(
        algo,
        tiny_args(
            env_id="toy_envs:Reach-v0",
            hidden_sizes=(64, 64, 64),
            total_timesteps=31_000,
            learning_starts=1_000,
            num_envs=20,
            batch_size=128,
            buffer_size=30_000,
            learning_rate=1e-3,
            gamma=0.9,
            entropy_samples=50,
            entropy_interval=50,
            eval_interval=100_000,
            eval_episodes=20,
        ),
    )
    learned = scalars(run_dir)["eval/episodic_return"][-1].value
    assert untrained < -4.0
    assert learned > -1.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_cuda(algo, tiny_args):
    run_dir = train(algo, tiny_args(env_id="toy_envs:Reach-v0", device="cuda"))
    assert weights(run_dir)["log_alpha"].is_cuda
    assert algo.load_agent(run_dir, "cpu").log_alpha.device.type == "cpu"


def test_the_toy_environments_are_well_formed():
    from gymnasium.utils.env_checker import check_env

    check_env(gym.make("Reach-v0").unwrapped, skip_render_check=True)
