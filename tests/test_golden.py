"""Reproduces numbers recorded from the official JAX implementation, with its random draws.

That a compiled agent computes the same is in test_speed.py.
"""

import numpy as np
import pytest
import torch
from helpers import recordings
from torch import nn

import dacer
import dacer_v2

TOLERANCE = 1e-5

CASES = [(path, script) for path in recordings() for script in (dacer, dacer_v2)]
cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{case[0].stem}-{case[1].__name__}") for case in CASES],
    indirect=True,
)


@pytest.fixture
def case(request):
    """The script and the recording."""
    path, script = request.param
    with np.load(path) as arrays:
        yield script, dict(arrays)
    largest = max(deviations, default=0.0)  # `pytest -rP` shows it.
    print(f"\n{request.node.callspec.id}: largest deviation |a - b| / (1 + |b|) {largest:.1e}")
    deviations.clear()


deviations = []


def close(actual, expected):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape
    deviations.append((np.abs(actual - expected) / (1 + np.abs(expected))).max())
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """A network's linear layers under their names in the recordings."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return {f"linear_{i}" if i else "linear": layer for i, layer in enumerate(layers)}


def networks(agent) -> dict[str, nn.Module]:
    critic, target = agent.critic, agent.target_critic
    return {
        "policy": agent.policy,
        "q1": critic.q1,
        "q2": critic.q2,
        "target_q1": target.q1,
        "target_q2": target.q2,
    }


@pytest.fixture
def agent(case):
    script, golden = case
    first, second, *_ = (i for i in range(100) if f"update{i}/entropy_actions" in golden)
    assert first == 0
    args = script.Args(
        diffusion_steps=int(golden["diffusion_steps"]),
        hidden_sizes=tuple(golden["hidden"].tolist()),
        noise_scale=float(golden["noise_scale"]),
        entropy_interval=second,
        device="cpu",
        compile=False,
        **({"q_grad_weight": 0.0} if script is dacer_v2 else {}),
    )
    agent = script.Agent(int(golden["obs_dim"]), int(golden["act_dim"]), args)
    with torch.no_grad():
        for net_name, net in networks(agent).items():
            for name, layer in linears(net).items():
                layer.weight.copy_(torch.from_numpy(golden[f"init/{net_name}/{name}/w"].T))
                layer.bias.copy_(torch.from_numpy(golden[f"init/{net_name}/{name}/b"]))
        agent.log_alpha.fill_(float(golden["init/log_alpha"]))
    return agent


def policy_noise(golden, prefix):
    """The draws of one action in the layout of `DiffusionPolicy.draw_noise`.

    The noise that was recorded for the last step is not used.
    """
    explore, steps, x_T = (golden[prefix + name] for name in ("explore_noise", "step_noise", "x_T"))
    from_2_on = steps[-2::-1]  # recorded from t = T on
    return torch.from_numpy(np.concatenate([explore[None], from_2_on, x_T[None]]))


@cases
def test_networks(case, agent):
    _, golden = case
    policy = agent.policy
    close(policy.beta[1:], golden["schedule/betas"])
    close(policy.abar[1:], golden["schedule/alphas_cumprod"])
    assert policy.abar[0] == 1
    close(policy.time_embedding, golden["time_embedding"])
    obs, action = torch.from_numpy(golden["forward/obs"]), torch.from_numpy(golden["forward/act"])
    s, times = policy.fixed_parts(obs)
    for t, eps in enumerate(golden["forward/eps"], start=1):
        close(policy.eps_theta(s, action, times[t - 1]), eps)
    mean, std = agent.critic(obs, action)
    close(mean[0], golden["forward/q1_mean"])
    close(std[0], golden["forward/q1_std"])


@cases
def test_sampled_actions(case, agent):
    _, golden = case
    obs, noise = torch.from_numpy(golden["forward/obs"]), policy_noise(golden, "sample/")
    with torch.no_grad():
        close(agent.policy(obs, noise, agent.noise_std()), golden["sample/action"])
        close(agent.policy(obs, noise), golden["sample/action_without_exploration"])


@cases
def test_updates(case, agent):
    """Losses, statistics and all weights, update after update."""
    script, golden = case
    updates = {}
    for key, value in golden.items():
        if key.startswith("update"):
            number, name = key.removeprefix("update").split("/", 1)
            updates.setdefault(int(number), {})[name] = value
    assert len(updates) > 1
    compared = 0
    for i, update in sorted(updates.items()):
        names = ("obs", "action", "reward", "next_obs", "done")
        batch = script.Batch(*(torch.from_numpy(update[name].astype(np.float32)) for name in names))
        z = torch.from_numpy(np.stack([update["z1"], update["z2"]]))
        draws = policy_noise(update, "next_"), z, policy_noise(update, "pi_")
        agent.draw = lambda size, draws=draws: draws
        with torch.no_grad():  # recorded also where the policy does not step
            close(agent.policy_loss(batch, draws[2])[0], update["info/policy_loss"])
        agent.entropy = lambda _, value=update["info/entropy"]: torch.tensor(value)
        stats = agent.update(batch, i)

        assert ("entropy" in stats) == ("entropy_actions" in update)
        if "actor_loss" in stats:
            close(stats["actor_loss"], update["info/policy_loss"])
        for j in (0, 1):
            close(stats[f"qf{j + 1}_loss"], update[f"info/q{j + 1}_loss"])
            close(stats[f"qf{j + 1}_values"], update[f"info/q{j + 1}_mean"])
            close(stats[f"qf{j + 1}_std"], update[f"info/q{j + 1}_std"])
            close(agent.omega[j], update[f"info/mean_q{j + 1}_std"])
        if "after/log_alpha" in update:
            compared += 1
            close(agent.log_alpha, update["after/log_alpha"])
            for net_name, net in networks(agent).items():
                for name, layer in linears(net).items():
                    close(layer.weight.T, update[f"after/{net_name}/{name}/w"])
                    close(layer.bias, update[f"after/{net_name}/{name}/b"])
    assert compared > 1
