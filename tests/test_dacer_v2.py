"""What DACERv2 adds: the Q-gradient field objective L_g, its weight, and nothing else."""

import ast
import difflib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dacer
import dacer_v2

OBS_DIM, ACT_DIM, B, T = 4, 3, 64, 5


class QuadraticCritic(nn.Module):
    """m_i = -0.5 sum_j k_ij (a_j - c_ij)^2: which of the two is the smaller depends on the action."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([[1.0, 4.0, 0.25], [2.0, 0.5, 1.0]]))
        self.c = nn.Parameter(torch.tensor([[0.5, -0.2, 0.1], [-0.4, 0.3, 0.6]]))

    def forward(self, obs, action):
        mean = -0.5 * (self.k[:, None] * (action - self.c[:, None]) ** 2).sum(-1)
        return mean, torch.ones(2, len(obs))


class FlatCritic(nn.Module):
    """Does not depend on the action."""

    def forward(self, obs, action):
        mean = 0.0 * action.sum(-1) + obs.sum(-1)
        return torch.stack([mean, mean + 1]), torch.ones(2, len(obs))


def make(critic, **changes):
    """An agent with this critic, a batch, and the draws of an update."""
    torch.manual_seed(0)
    settings = {
        "q_grad_weight": 1.0,
        "diffusion_steps": T,
        "hidden_sizes": (32, 32, 32),
        "device": "cpu",
        "compile": False,
    }
    agent = dacer_v2.Agent(OBS_DIM, ACT_DIM, dacer_v2.resolve(dacer_v2.Args(**settings | changes)))
    agent.critic = critic
    obs, next_obs = torch.randn(2, B, OBS_DIM)
    batch = dacer_v2.Batch(obs, torch.rand(B, ACT_DIM), torch.randn(B), next_obs, torch.zeros(B))
    return agent, batch, agent.draw(B)


def q_gradient_loss(agent, batch, draws):
    context = agent.policy.context(batch.obs)
    return agent.q_gradient_loss(batch.obs, context, agent.policy.denoise(context, draws.noise), draws.t)


@pytest.mark.parametrize("c, d", [(0.4, -1.8), (0.0, 0.0), (-0.3, 0.5)])
def test_against_numbers_by_hand(c, d):
    """L_g in float64 with NumPy, state by state, from the chain's states and the network's predictions."""
    agent, batch, draws = make(QuadraticCritic(), time_weight_c=c, time_weight_d=d)
    loss, stats = q_gradient_loss(agent, batch, draws)

    policy, smaller = agent.policy, set()
    k, center = (parameter.detach().double().numpy() for parameter in (agent.critic.k, agent.critic.c))
    with torch.no_grad():
        context = policy.context(batch.obs)
        chain = policy.denoise(context, draws.noise)  # x_T, ..., x_0
        eps = [policy.noise_net(context[0] + context[1][t - 1], chain[T - t]).double().numpy() for t in range(1, T + 1)]
    terms, norms, cosines = [], [], {t: [] for t in range(1, T + 1)}
    for i in range(B):
        t = int(draws.t[i]) + 1  # the paper counts from 1
        a_t = chain[T - t][i].double().numpy()
        j = np.argmin([-np.sum(k[j] * (a_t - center[j]) ** 2) for j in (0, 1)])  # the smaller critic
        g = -k[j] * (a_t - center[j])
        smaller.add(j)
        target = np.exp(c * t + d) * g / (np.sqrt(np.sum(g**2)) + 1e-8)
        score = -eps[t - 1][i]
        terms.append(np.sum((target - score) ** 2))
        norms.append(np.sqrt(np.sum(g**2)))
        cosines[t].append(target @ score / np.linalg.norm(target) / np.linalg.norm(score))
    assert all(cosines.values()), "every step must be drawn"
    assert smaller == {0, 1}, "each critic must be the smaller one somewhere"
    np.testing.assert_allclose(loss.item(), np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(stats["q_grad_norm"].item(), np.mean(norms), rtol=1e-5)
    np.testing.assert_allclose(stats["q_grad_cosine_t{}"], [np.mean(v) for v in cosines.values()], atol=1e-5)


def test_no_gradient_no_target():
    """Where Q does not depend on the action the target is zero: L_g is the mean of |S|^2, not NaN."""
    agent, batch, draws = make(FlatCritic())
    loss, stats = q_gradient_loss(agent, batch, draws)
    context = agent.policy.context(batch.obs)
    a_t = torch.stack(agent.policy.denoise(context, draws.noise))[T - 1 - draws.t, torch.arange(B)]
    eps = agent.policy.noise_net(context[0] + context[1][draws.t], a_t)
    torch.testing.assert_close(loss, eps.square().sum(-1).mean())
    assert stats["q_grad_norm"] == 0
    assert all(value.isfinite().all() for value in stats.values())


def test_gradient_reaches_all_of_the_policy_and_nothing_else():
    agent, batch, draws = make(QuadraticCritic())
    loss = q_gradient_loss(agent, batch, draws)[0]
    critic = torch.autograd.grad(loss, list(agent.critic.parameters()), allow_unused=True, retain_graph=True)
    assert critic == (None, None)
    for name, parameter in agent.policy.named_parameters():
        gradient = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        assert gradient.abs().sum() > 0, name


def test_chain_states_are_fixed():
    """The objective guides a step from where the chain is; it does not move the chain towards easier states."""
    agent, batch, draws = make(QuadraticCritic())
    noise = draws.noise.requires_grad_()
    context = agent.policy.context(batch.obs)
    loss = agent.q_gradient_loss(batch.obs, context, agent.policy.denoise(context, noise), draws.t)[0]
    assert torch.autograd.grad(loss, noise, allow_unused=True) == (None,)


def test_minimising_it_alone_climbs_q():
    """The sign: with L_g as the only loss, the chain's actions move up Q."""
    agent, batch, draws = make(QuadraticCritic())

    def mean_q():
        with torch.no_grad():
            return agent.critic(batch.obs, agent.policy(batch.obs, draws.noise))[0].amin(0).mean().item()

    before = mean_q()
    optimizer = torch.optim.Adam(agent.policy.parameters(), 1e-3)
    for _ in range(300):
        loss = q_gradient_loss(agent, batch, agent.draw(B))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < -0.5  # the best is 0
    assert mean_q() > before + 0.15  # with the sign flipped it falls by about 0.25


def test_policy_loss_adds_it_up():
    agent, batch, draws = make(QuadraticCritic(), q_grad_weight=0.3)
    loss, stats = agent.policy_loss(batch, draws)
    torch.testing.assert_close(loss, stats["q_loss"] + 0.3 * stats["q_grad_loss"])
    assert stats["actor_loss"] == loss


@pytest.mark.parametrize("diffusion_steps", [1, 50])
def test_any_number_of_diffusion_steps(diffusion_steps):
    agent, batch, draws = make(QuadraticCritic(), diffusion_steps=diffusion_steps)
    loss, stats = agent.policy_loss(batch, draws)
    assert loss.isfinite()
    assert stats["q_grad_cosine_t{}"].shape == (diffusion_steps,)


def test_eta_zero_is_dacer_bit_for_bit(tmp_path, monkeypatch):
    """Whole runs: without the Q-gradient the second script is the first, random numbers included."""
    monkeypatch.chdir(tmp_path)
    tiny = {
        "env_id": "toy_envs:Reach-v0", "total_timesteps": 200, "learning_starts": 40, "num_envs": 2, "batch_size": 16,
        "hidden_sizes": (16, 16, 16), "diffusion_steps": 4, "entropy_samples": 8, "buffer_size": 1000, "device": "cpu",
        "compile": False,
    }  # fmt: skip
    first = dacer.main(dacer.Args(**tiny))
    second = dacer_v2.main(dacer_v2.Args(**tiny, q_grad_weight=0.0))
    guided = dacer_v2.main(dacer_v2.Args(**tiny, q_grad_weight=0.1))
    one, two, three = (torch.load(run / "checkpoint.pt", weights_only=True)["agent"] for run in (first, second, guided))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], three[key]) for key in one if key.startswith("policy"))


# Where dacer_v2.py may have lines that dacer.py has not, and every line of dacer.py that it may leave out or change.
MAY_ADD = {"module docstring", "ALGORITHM", "Args", "DEFAULTS", "TASKS", "BOUNDS", "resolve", "Draws", "Agent.draw", "Agent.q_gradient",
           "Agent.q_gradient_loss", "Agent.policy_loss"}  # fmt: skip
MAY_DROP = {
    '"""DACER: Diffusion Actor-Critic with Entropy Regulator, in one file.',
    "    diffusion_steps: int = 20",
    'DEFAULTS = {"noise_scale": 0.1, "hidden_sizes": (256, 256, 256), "learning_starts": 30_000}',
    '    "MultiGoal": {"entropy_interval": 1000},',
    'ALGORITHM = "dacer"',
    "        return Draws(self.policy.draw_noise(batch_size), z, self.policy.draw_noise(batch_size))",
    '        """L_q = -mean min(m_1, m_2)(s, a) of actions with exploration noise, and statistics."""',
    "        action = self.policy(batch.obs, draws.noise, self.noise_std())",
    "        loss = -self.fixed_critic(batch.obs, action)[0].amin(0).mean()",
    '        return loss, {"actor_loss": loss.detach()}',
}


def owners(source: str) -> list[str]:
    """For each line, the definition that it belongs to: a function, a class (or its method), an assigned name."""
    names = [""] * (len(source.splitlines()) + 1)
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Expr):
            name = "module docstring"
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        names[node.lineno - 1 : node.end_lineno + 1] = [name] * (node.end_lineno + 2 - node.lineno)
        for method in (child for child in getattr(node, "body", []) if isinstance(child, ast.FunctionDef)):
            names[method.lineno - 1 : method.end_lineno + 1] = [f"{name}.{method.name}"] * (
                method.end_lineno + 2 - method.lineno
            )
    return names


def test_the_diff_is_the_second_paper():
    """Outside the places where the paper adds something, the two files are the same text."""
    first, second = (Path(module.__file__).read_text() for module in (dacer, dacer_v2))
    belongs = owners(second)
    matcher = difflib.SequenceMatcher(None, first.splitlines(), second.splitlines(), autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            assert set(first.splitlines()[i1:i2]) <= MAY_DROP
            assert set(belongs[j1:j2]) <= MAY_ADD
