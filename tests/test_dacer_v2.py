"""What DACERv2 adds: the Q-gradient field objective L_g, its weight, and nothing else."""

import ast
import difflib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_update import draw, gradients, make_agent
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
    """An agent with this critic, a batch, and the policy's draws of an update: its noise, and t."""
    agent = make_agent(
        dacer_v2, (OBS_DIM, ACT_DIM), **{"q_grad_weight": 1.0, "diffusion_steps": T} | changes
    )
    agent.critic = critic
    obs, next_obs = torch.randn(2, B, OBS_DIM)
    batch = dacer_v2.Batch(obs, torch.rand(B, ACT_DIM), torch.randn(B), next_obs, torch.zeros(B))
    return agent, batch, draw(agent)[2:]


def q_grad_loss(agent, batch, draws):
    """L_g with its graph, by the difference that its weight makes."""
    agent.args.q_grad_weight = 1.0
    with_it = agent.policy_loss(batch, *draws)[0]
    agent.args.q_grad_weight = 0.0
    return with_it - agent.policy_loss(batch, *draws)[0]


@pytest.mark.parametrize("c, d", [(0.4, -1.8), (0.0, 0.0), (-0.3, 0.5)])
def test_against_numbers_by_hand(c, d):
    """L_g in float64 with NumPy, state by state, from the chain's states and the network's predictions."""
    agent, batch, (noise, steps) = make(QuadraticCritic(), time_weight_c=c, time_weight_d=d)
    stats = agent.policy_loss(batch, noise, steps)[1]

    policy, smaller = agent.policy, set()
    k, center = (
        parameter.detach().double().numpy() for parameter in (agent.critic.k, agent.critic.c)
    )
    with torch.no_grad():
        s, times = policy.fixed_parts(batch.obs)
        chain = policy.denoise(s, times, noise)
        assert torch.equal(chain[T], noise[T])
        eps = {
            t: policy.eps_theta(s, chain[t], times[t - 1]).double().numpy() for t in range(1, T + 1)
        }
    terms, norms, cosines = [], [], {t: [] for t in range(1, T + 1)}
    for i in range(B):
        t = int(steps[i])
        a_t = chain[t][i].double().numpy()
        j = np.argmin(
            [-np.sum(k[j] * (a_t - center[j]) ** 2) for j in (0, 1)]
        )  # the smaller critic
        g = -k[j] * (a_t - center[j])
        smaller.add(j)
        target = np.exp(c * t + d) * g / (np.sqrt(np.sum(g**2)) + 1e-8)
        score = -eps[t][i]
        terms.append(np.sum((target - score) ** 2))
        norms.append(np.sqrt(np.sum(g**2)))
        cosines[t].append(target @ score / np.linalg.norm(target) / np.linalg.norm(score))
    assert all(cosines.values()), "every step must be drawn"
    assert smaller == {0, 1}, "each critic must be the smaller one somewhere"
    np.testing.assert_allclose(stats["q_grad_loss"], np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(stats["q_grad_norm"], np.mean(norms), rtol=1e-5)
    for t, values in cosines.items():
        np.testing.assert_allclose(stats[f"q_grad_cosine_t{t}"], np.mean(values), atol=1e-5)


def test_no_gradient_no_target():
    """Where Q does not depend on the action the target is zero: L_g is the mean of |S|^2, not NaN."""
    agent, batch, (noise, t) = make(FlatCritic())
    stats = agent.policy_loss(batch, noise, t)[1]
    s, times = agent.policy.fixed_parts(batch.obs)
    a_t = torch.stack(agent.policy.denoise(s, times, noise))[t, torch.arange(B)]
    eps = agent.policy.eps_theta(s, a_t, times[t - 1])
    torch.testing.assert_close(stats["q_grad_loss"], eps.square().sum(-1).mean().detach())
    assert stats["q_grad_norm"] == 0
    assert all(value.isfinite().all() for value in stats.values())


def test_gradient_reaches_all_of_the_policy_and_nothing_else():
    """Nor the chain's states: the objective guides a step from where the chain is, it does not move the chain."""
    agent, batch, draws = make(QuadraticCritic())
    noise = draws[0].requires_grad_()
    loss = q_grad_loss(agent, batch, draws)
    critic = torch.autograd.grad(
        loss, list(agent.critic.parameters()), allow_unused=True, retain_graph=True
    )
    assert critic == (None, None)
    for name, parameter in agent.policy.named_parameters():
        gradient = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        assert gradient.abs().sum() > 0, name
    assert (
        torch.autograd.grad(loss, noise)[0].abs().max() < 1e-6
    )  # what the two L_q leave of each other


def test_minimising_it_alone_climbs_q():
    """The sign: with L_g as all but the only loss, the chain's actions move up Q."""
    agent, batch, (noise, _) = make(QuadraticCritic(), q_grad_weight=1.0)

    def mean_q():
        with torch.no_grad():
            return agent.critic(batch.obs, agent.policy(batch.obs, noise))[0].amin(0).mean().item()

    before = mean_q()
    optimizer = torch.optim.Adam(agent.policy.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        q_grad_loss(
            agent, batch, (agent.policy.draw_noise(B), torch.randint(1, T + 1, (B,)))
        ).backward()
        optimizer.step()
    assert before < -0.5  # the best is 0
    assert mean_q() > before + 0.15  # with the sign flipped it falls by about 0.25


def test_policy_loss_adds_it_up():
    agent, batch, draws = make(QuadraticCritic(), q_grad_weight=0.3)
    loss, stats = agent.policy_loss(batch, *draws)
    torch.testing.assert_close(loss, stats["q_loss"] + 0.3 * stats["q_grad_loss"])
    assert stats["actor_loss"] == loss


@pytest.mark.parametrize("diffusion_steps", [1, 50])
def test_any_number_of_diffusion_steps(diffusion_steps):
    agent, batch, draws = make(QuadraticCritic(), diffusion_steps=diffusion_steps)
    loss, stats = agent.policy_loss(batch, *draws)
    assert loss.isfinite()
    assert f"q_grad_cosine_t{diffusion_steps}" in stats


def test_eta_zero_is_dacer_bit_for_bit(tmp_path, monkeypatch):
    """Whole runs: without the Q-gradient the second script is the first, random numbers included."""
    monkeypatch.chdir(tmp_path)
    tiny = {
        "env_id": "toy_envs:Reach-v0", "total_timesteps": 200, "learning_starts": 40, "num_envs": 2, "batch_size": 16,
        "hidden_sizes": (16, 16, 16), "diffusion_steps": 4, "entropy_samples": 8, "buffer_size": 1000, "device": "cpu",
        "compile": False,
    }  # fmt: skip
    dacer.main(dacer.Args(**tiny), Path("first"))
    dacer_v2.main(dacer_v2.Args(**tiny, q_grad_weight=0.0), Path("second"))
    dacer_v2.main(dacer_v2.Args(**tiny, q_grad_weight=0.1), Path("guided"))
    runs = ("first", "second", "guided")
    one, two, three = (
        torch.load(f"{run}/checkpoint.pt", weights_only=True)["agent"] for run in runs
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], three[key]) for key in one if key.startswith("policy"))


def different_gradients(compile: bool, repeats: int = 30) -> set[str]:
    """Parameters whose gradients are not the same bits each time, from the same inputs and on two threads."""
    assert torch.get_num_threads() == 2
    size, sizes = 256, (11, 3)
    agent = make_agent(dacer_v2, sizes, hidden_sizes=(256, 256), q_grad_weight=1.0, compile=compile)
    batch = dacer_v2.Batch(*(torch.randn(size, *shape) for shape in ((11,), (3,), (), (11,), ())))
    draws, state = (
        draw(agent, size),
        {name: value.clone() for name, value in agent.state_dict().items()},
    )
    found = [gradients(agent, batch, draws)[0] for _ in range(repeats)]
    assert all(
        torch.equal(value, state[name]) for name, value in agent.state_dict().items()
    )  # none was written to
    assert found[0].keys() == {
        name for part in ("policy", "critic") for name in state if name.startswith(f"{part}.")
    } - {"policy.time_embedding"}
    return {
        name for name in found[0] for other in found if not torch.equal(other[name], found[0][name])
    }


@pytest.mark.parametrize("compile", [False, True])
def test_two_threads_give_the_same_bits_every_time(compile):
    """Nothing may be added up in the order in which threads happen to arrive, as an index's backward pass does."""
    tests = Path(__file__).parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
    }
    code = f"import torch, test_dacer_v2 as t; torch.set_num_threads(2); print(t.different_gradients({compile}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr[-2000:]


# Where dacer_v2.py may have lines that dacer.py has not, and every line of dacer.py that it may leave out or change.
MAY_ADD = {
    "module docstring",
    "(ALGORITHM, VERSION)",
    "Args",
    "DEFAULTS",
    "TASKS['MultiGoal']",
    "Agent.policy_loss",
    "Agent.q_grad_loss",
    "Agent.update",
}
MAY_DROP = {
    '"""DACER: Diffusion Actor-Critic with Entropy Regulator, in one file.',
    'ALGORITHM, VERSION = "dacer", 2  # in checkpoints',
    "    diffusion_steps: int = 20  # T",
    "    def policy_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, dict]:",
    '        """-mean min_i m_i(s, a) of actions with exploration noise, and statistics."""',
    "        action = self.policy(batch.obs, noise, self.noise_std())",
    '        return loss, {"actor_loss": loss.detach()}',
}
# What it may have in functions that are not the second paper's
ADDED_ELSEWHERE = {
    "Agent.update": [
        "        if self.args.q_grad_weight > 0:",
        "            t = torch.randint(1, policy.T + 1, (B,), device=device, generator=self.rng)",
        "            draws += (t,)",
    ],
}


def owners(source: str) -> list[str]:
    """For each line, the definition that it belongs to: a function, a class (or its method), an assigned name."""
    names = [""] * (len(source.splitlines()) + 1)
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Expr):
            name = "module docstring"
        if isinstance(node, ast.Assign | ast.AugAssign):
            name = ast.unparse(getattr(node, "target", None) or node.targets[0])
        names[node.lineno - 1 : node.end_lineno + 1] = [name] * (node.end_lineno + 2 - node.lineno)
        for method in (
            child for child in getattr(node, "body", []) if isinstance(child, ast.FunctionDef)
        ):
            names[method.lineno - 1 : method.end_lineno + 1] = [f"{name}.{method.name}"] * (
                method.end_lineno + 2 - method.lineno
            )
    return names


def test_the_diff_is_the_second_paper():
    """Outside the places where the paper adds something, the two files are the same text."""
    first, second = (Path(module.__file__).read_text().splitlines() for module in (dacer, dacer_v2))
    belongs = owners("\n".join(second))
    dropped, added = [], {}
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(
        None, first, second, autojunk=False
    ).get_opcodes():
        if tag != "equal":
            dropped += first[i1:i2]
            for j in range(j1, j2):
                added.setdefault(belongs[j], []).append(second[j])
    assert sorted(dropped) == sorted(
        MAY_DROP
    )  # nothing that is not the second paper's, and no stale permission
    assert added.keys() == MAY_ADD
    assert {name: added[name] for name in ADDED_ELSEWHERE} == ADDED_ELSEWHERE
    names = {line.split(":")[0].strip() for line in added["Args"]}
    assert names == {"diffusion_steps", "q_grad_weight", "time_weight_c", "time_weight_d"}
