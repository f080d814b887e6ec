"""Whole runs, in this process: what they store, learn, leave and repeat."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run_dir: Path) -> dict[str, list]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def stored(algo, monkeypatch):
    """The replay buffers that runs make."""
    buffers = []

    class Recorded(algo.ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    monkeypatch.setattr(algo, "ReplayBuffer", Recorded)
    return buffers


@pytest.mark.parametrize("async_envs", [False, True])
def test_transitions(algo, tiny_args, stored, async_envs):
    """Every stored transition is one that happened, with its true successor, also where an episode ended."""
    algo.main(tiny_args(env_id="toy_envs:Counter-v0", async_envs=async_envs))
    buffer = stored[0]
    assert buffer.size == 120
    obs, action, reward, next_obs, terminated = (field[: buffer.size].numpy() for field in buffer.data)
    episode, step = obs.T
    assert (next_obs[:, 0] == episode).all()  # none crosses a reset
    assert (next_obs[:, 1] == step + 1).all()  # the true successor, step 5 included
    assert set(step) == {0, 1, 2, 3, 4}
    assert (terminated == (step == 4) * (episode % 2 == 1)).all()  # truncated ones still bootstrap
    assert terminated.sum() > 5
    assert np.abs(action).max() <= 1
    np.testing.assert_allclose(reward, -1 + 2 * (action[:, 0] + 1), atol=1e-5)  # actions arrive in [-1, 3]
    assert len(set(action[:, 0])) > 60  # the copies act apart, as far as they are not at a bound


def test_a_run_leaves_its_record(algo, tiny_args):
    args = tiny_args(env_id="toy_envs:Counter-v0", exp_name="tiny")
    run_dir = algo.main(args)
    assert run_dir.parent == Path("runs")
    assert run_dir.name.startswith("Counter-v0__tiny__1__")
    assert (run_dir / Path(algo.__file__).name).read_text() == Path(algo.__file__).read_text()
    assert json.loads((run_dir / "args.json").read_text())["noise_scale"] == 0.1

    curves = scalars(run_dir)
    assert [(event.step, event.value) for event in curves["charts/updates"]] == [(42, 1), (120, 40)]
    assert [event.step for event in curves["eval/episodic_return"]] == [80, 120]
    expected = {"charts/SPS", "charts/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/qf{i}_{name}" for i in (1, 2) for name in ("loss", "values", "std")}
    expected |= {f"losses/{name}" for name in ("actor_loss", "alpha", "entropy", "exploration_noise_std", "omega1")}
    assert expected <= curves.keys()
    alpha = curves["losses/alpha"][0].value
    assert curves["losses/exploration_noise_std"][0].value == pytest.approx(0.1 * alpha)

    agent = algo.load_agent(run_dir)
    assert agent.args.exp_name == "tiny"
    assert same(agent.state_dict(), weights(run_dir))


def test_two_runs_in_one_second_do_not_share_a_folder(algo, tiny_args):
    args = algo.resolve(tiny_args(env_id="toy_envs:Counter-v0"))
    assert len({algo.make_run_dir(args) for _ in range(3)}) == 3


def test_a_run_repeats_bit_for_bit(algo, tiny_args, monkeypatch):
    monkeypatch.setattr(algo, "LOG_INTERVAL", 1)
    runs = [algo.main(tiny_args(env_id="toy_envs:Reach-v0", seed=seed)) for seed in (3, 3, 4)]
    losses = [[event.value for event in scalars(run)["losses/qf1_loss"]] for run in runs]
    assert same(weights(runs[0]), weights(runs[1]))
    assert len(losses[0]) == 40
    assert losses[0] == losses[1]
    assert not same(weights(runs[0]), weights(runs[2]))
    assert losses[0] != losses[2]


@pytest.mark.parametrize("kind", ["dict", "tuple", "matrix"])
def test_spaces_of_any_shape(algo, tiny_args, kind):
    algo.main(tiny_args(env_id="toy_envs:Odd-v0", env_kwargs=json.dumps({"kind": kind})))


TASKS = ["Humanoid", "Ant", "HalfCheetah", "Walker2d", "Hopper", "Swimmer", "InvertedDoublePendulum"]


@pytest.mark.parametrize("env_id", [f"{task}-{version}" for task in TASKS for version in ("v4", "v5")] + ["Pusher-v5"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_papers_tasks(algo, tiny_args, env_id):
    """Each can be made, acted in within its bounds, and updated on."""
    args = algo.resolve(tiny_args(env_id=env_id))
    algo.check_env(args)
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
        args = algo.resolve(algo.Args(device="cpu", **changes))
        return args.noise_scale, args.hidden_sizes, args.learning_starts

    assert settings(env_id="Humanoid-v4") == (0.15, (512, 512, 512), 200_000)
    assert settings(env_id="Humanoid-v5") == settings(env_id="Humanoid-v4")
    assert settings(env_id="HalfCheetah-v4") == (0.15, (256, 256, 256), 200_000)
    assert settings(env_id="HumanoidStandup-v4") == settings(env_id="Ant-v4") == (0.1, (256, 256, 256), 30_000)
    assert settings(env_id="my_module:Humanoid-v4", noise_scale=0.3, learning_starts=5)[::2] == (0.3, 5)
    assert algo.resolve(algo.Args(total_timesteps=30_030_000)).entropy_interval == 10_000
    assert algo.resolve(algo.Args(entropy_interval=7)).entropy_interval == 7


def test_learns(algo, tiny_args):
    """Moving a point to the origin: untrained policies score below -4, going straight there scores about -1.1."""
    args = algo.resolve(tiny_args(env_id="toy_envs:Reach-v0"))
    envs = algo.make_envs(args, 20)
    act = algo.make_actor(algo.Agent(2, 2, args).policy, envs.single_action_space)
    untrained = algo.evaluate(act, envs, seed=0).mean()
    run_dir = algo.main(
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
        )
    )
    learned = scalars(run_dir)["eval/episodic_return"][-1].value
    assert untrained < -4.0
    assert learned > -1.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_cuda(algo, tiny_args):
    run_dir = algo.main(tiny_args(env_id="toy_envs:Reach-v0", device="cuda"))
    assert weights(run_dir)["log_alpha"].is_cuda
    assert algo.load_agent(run_dir, "cpu").log_alpha.device.type == "cpu"


def test_the_toy_environments_are_well_formed():
    from gymnasium.utils.env_checker import check_env

    check_env(gym.make("Reach-v0").unwrapped, skip_render_check=True)
