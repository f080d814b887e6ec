"""Reproduces numbers recorded from the official JAX implementation, with the random draws that it used.

Further recordings are taken from the folder that the environment variable DACER_GOLDEN names.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_entropy import sklearn_entropy
from torch import nn

FOLDERS = [Path(__file__).parent / "golden", *map(Path, filter(None, [os.environ.get("DACER_GOLDEN")]))]
RECORDINGS = sorted({path.resolve() for folder in FOLDERS for path in folder.glob("*.npz")})
TOLERANCE = 1e-5

for folder in FOLDERS:
    assert any(path.parent == folder.resolve() for path in RECORDINGS), f"no recordings in {folder}"


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as arrays:
        return dict(arrays)


def close(actual, expected):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """A network's linear layers under their names in the recordings."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return {f"linear_{i}" if i else "linear": layer for i, layer in enumerate(layers)}


def networks(agent) -> dict[str, nn.Module]:
    critic, target = agent.critic, agent.target_critic
    return {"policy": agent.policy, "q1": critic.q1, "q2": critic.q2, "target_q1": target.q1, "target_q2": target.q2}


@pytest.fixture
def mode():
    return "eager"


@pytest.fixture
def agent(algo, golden, mode):
    args = algo.Args(
        diffusion_steps=int(golden["diffusion_steps"]),
        hidden_sizes=tuple(golden["hidden"].tolist()),
        noise_scale=float(golden["noise_scale"]),
        device="cpu",
        compile=mode == "compiled",
        **({"q_grad_weight": 0.0} if hasattr(algo.Args, "q_grad_weight") else {}),
    )
    agent = algo.Agent(int(golden["obs_dim"]), int(golden["act_dim"]), args)
    with torch.no_grad():
        for net_name, net in networks(agent).items():
            for name, layer in linears(net).items():
                layer.weight.copy_(torch.from_numpy(golden[f"init/{net_name}/{name}/w"].T))
                layer.bias.copy_(torch.from_numpy(golden[f"init/{net_name}/{name}/b"]))
        agent.log_alpha.fill_(float(golden["init/log_alpha"]))
    return agent


def policy_noise(golden, prefix):
    """The draws of one action in the layout of `DiffusionPolicy.draw_noise`; the last step's noise is not used."""
    draws = [golden[prefix + "x_T"][None], golden[prefix + "step_noise"][:-1], golden[prefix + "explore_noise"][None]]
    return torch.from_numpy(np.concatenate(draws))


def test_schedule(agent, golden):
    names = ["sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2"]
    for column, name in zip(agent.policy.schedule.T, names):
        close(column, golden[f"schedule/{name}"])
    close(agent.policy.schedule[:, 4].square(), golden["schedule/posterior_variance"])


def test_time_embedding(agent, golden):
    close(agent.policy.time_embedding, golden["time_embedding"])


def test_predicted_noise(agent, golden):
    context = agent.policy.context(torch.from_numpy(golden["forward/obs"]))
    x = torch.from_numpy(golden["forward/act"])
    for t, eps in enumerate(golden["forward/eps"]):
        close(agent.policy.noise_net(context[0] + context[1][t], x), eps)


def test_critic(agent, golden):
    mean, std = agent.critic(torch.from_numpy(golden["forward/obs"]), torch.from_numpy(golden["forward/act"]))
    close(mean[0], golden["forward/q1_mean"])
    close(std[0], golden["forward/q1_std"])


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_sampled_actions(agent, golden):
    obs, noise = torch.from_numpy(golden["forward/obs"]), policy_noise(golden, "sample/")
    close(agent.sample_actions(obs, noise, agent.noise_std()), golden["sample/action"])
    close(agent.sample_actions(obs, noise), golden["sample/action_without_exploration"])


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_updates(algo, agent, golden, mode):
    """Losses, statistics and all weights, update after update."""
    num_updates = len({key.split("/")[0] for key in golden if key.startswith("update")})
    assert num_updates > 1
    compared = 0
    for i in range(num_updates):
        update = {
            key.removeprefix(f"update{i}/"): value for key, value in golden.items() if key.startswith(f"update{i}/")
        }
        data = (
            update["obs"],
            update["action"],
            update["reward"],
            update["next_obs"],
            update["done"].astype(np.float32),
        )
        batch = algo.Batch(*map(torch.from_numpy, data))
        z = torch.from_numpy(np.stack([update["z1"], update["z2"]]))
        draws = algo.Draws(policy_noise(update, "next_"), z, policy_noise(update, "pi_"))
        if mode == "eager":  # recorded also where the policy does not step
            with torch.no_grad():
                close(agent.policy_loss(batch, draws)[0], update["info/policy_loss"])
        entropy = torch.tensor(update["info/entropy"]) if "entropy_actions" in update else None
        stats = agent.update(batch, draws, i)
        if entropy is not None:
            agent.update_alpha(entropy)

        if "actor_loss" in stats:
            close(stats["actor_loss"], update["info/policy_loss"])
        for j in (0, 1):
            close(stats["qf{}_loss"][j], update[f"info/q{j + 1}_loss"])
            close(stats["qf{}_values"][j], update[f"info/q{j + 1}_mean"])
            close(stats["qf{}_std"][j], update[f"info/q{j + 1}_std"])
            close(agent.omega[j], update[f"info/mean_q{j + 1}_std"])
        if "after/log_alpha" in update:
            compared += 1
            close(agent.log_alpha, update["after/log_alpha"])
            for net_name, net in networks(agent).items():
                for name, layer in linears(net).items():
                    close(layer.weight.T, update[f"after/{net_name}/{name}/w"])
                    close(layer.bias, update[f"after/{net_name}/{name}/b"])
    assert compared > 1


def test_entropy(algo, golden):
    """The recorded actions' entropy. Few states were recorded, so each side averages 16 random starts of every fit."""
    torch.manual_seed(0)
    actions = torch.from_numpy(golden["entropy/actions"])
    np.testing.assert_allclose(
        sklearn_entropy(actions), golden["entropy/per_state"], atol=1e-3
    )  # the recording's source
    theirs = np.mean([sklearn_entropy(actions, seed) for seed in range(16)])
    assert abs(algo.mixture_entropy(actions.repeat(16, 1, 1)).mean().item() - theirs) < 0.05
