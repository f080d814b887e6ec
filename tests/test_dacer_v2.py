"""What DACERv2 adds: the Q-gradient field objective L_g, its weight, and nothing else."""

import ast
import difflib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, differences, outcome, small_agent, train
from torch import nn

import dacer
import dacer_v2

OBS_DIM, ACT_DIM, B, T = 4, 3, 64, 5


class QuadraticCritic(nn.Module):
    """m_i = -0.5 sum_j k_ij (a_j - c_ij)^2. Which is the smaller depends on the action."""

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
    settings = {"q_grad_weight": 1.0, "diffusion_steps": T} | changes
    agent = small_agent(dacer_v2, (OBS_DIM, ACT_DIM), **settings)
    agent.critic = critic
    obs, next_obs = torch.randn(2, B, OBS_DIM)
    batch = dacer_v2.Batch(obs, torch.rand(B, ACT_DIM), torch.randn(B), next_obs, torch.zeros(B))
    return agent, batch, agent.draw(B)[2:]


def q_grad_loss(agent, batch, draws):
    """L_g with its graph, by the difference that its weight makes."""
    agent.args.q_grad_weight = 1.0
    with_it, _ = agent.policy_loss(batch, *draws)
    agent.args.q_grad_weight = 0.0
    without, _ = agent.policy_loss(batch, *draws)
    return with_it - without


@pytest.mark.parametrize("c, d", [(0.4, -1.8), (0.0, 0.0), (-0.3, 0.5)])
def test_against_numbers_by_hand(c, d):
    """L_g in float64 with NumPy, state by state, from the chain and the network's predictions."""
    agent, batch, (noise, steps) = make(QuadraticCritic(), time_weight_c=c, time_weight_d=d)
    stats = agent.policy_loss(batch, noise, steps)[1]

    policy, smaller = agent.policy, set()
    k, center = (x.detach().double().numpy() for x in (agent.critic.k, agent.critic.c))
    with torch.no_grad():
        s, times = policy.fixed_parts(batch.obs)
        chain = policy.denoise(s, times, noise)
        assert torch.equal(chain[T], noise[T])
        eps = [policy.eps_theta(s, chain[t], times[t - 1]) for t in range(1, T + 1)]
    terms, norms = [], []
    for i in range(B):
        t = int(steps[i])
        a_t = chain[t][i].double().numpy()
        q = [-np.sum(k[j] * (a_t - center[j]) ** 2) for j in (0, 1)]
        j = np.argmin(q)
        g = -k[j] * (a_t - center[j])
        smaller.add(j)
        norms.append(np.sqrt(np.sum(g**2)))
        target = np.exp(c * t + d) * g / (norms[-1] + 1e-8)
        score = -eps[t - 1][i].double().numpy()
        terms.append(np.sum((target - score) ** 2))
    assert set(steps.tolist()) == set(range(1, T + 1)), "every step must be drawn"
    assert smaller == {0, 1}, "each critic must be the smaller one somewhere"
    np.testing.assert_allclose(stats["q_grad_loss"], np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(stats["q_grad_norm"], np.mean(norms), rtol=1e-5)


def test_no_gradient_no_target():
    """Where Q does not depend on the action the target is zero: L_g is the mean of |S|^2."""
    agent, batch, (noise, t) = make(FlatCritic())
    stats = agent.policy_loss(batch, noise, t)[1]
    s, times = agent.policy.fixed_parts(batch.obs)
    a_t = torch.stack(agent.policy.denoise(s, times, noise))[t, torch.arange(B)]
    eps = agent.policy.eps_theta(s, a_t, times[t - 1])
    torch.testing.assert_close(stats["q_grad_loss"], eps.square().sum(-1).mean().detach())
    assert stats["q_grad_norm"] == 0
    assert all(value.isfinite().all() for value in stats.values())


def test_gradient_reaches_all_of_the_policy_and_nothing_else():
    """Nor does it reach the states of the chain: the objective guides a step from where the chain
    is, and does not move the chain."""
    agent, batch, draws = make(QuadraticCritic())
    noise = draws[0].requires_grad_()
    loss = q_grad_loss(agent, batch, draws)
    of_critic = list(agent.critic.parameters())
    found = torch.autograd.grad(loss, of_critic, allow_unused=True, retain_graph=True)
    assert found == (None, None)
    for name, parameter in agent.policy.named_parameters():
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    # The two L_q leave that much of each other.
    assert torch.autograd.grad(loss, noise)[0].abs().max() < 1e-6


def test_minimising_it_alone_climbs_q():
    """The sign: with L_g as all but the only loss, the chain's actions move up Q."""
    agent, batch, (noise, _) = make(QuadraticCritic(), q_grad_weight=1.0)

    def mean_q():
        with torch.no_grad():
            return agent.critic(batch.obs, agent.policy(batch.obs, noise))[0].amin(0).mean().item()

    before = mean_q()
    optimizer = torch.optim.Adam(agent.policy.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        draws = agent.policy.draw_noise(B), torch.randint(1, T + 1, (B,))
        q_grad_loss(agent, batch, draws).backward()
        optimizer.step()
    assert before < -0.5  # the best is 0
    assert mean_q() > before + 0.1  # with the sign flipped it falls by about 0.25


def test_policy_loss_adds_it_up():
    agent, batch, draws = make(QuadraticCritic(), q_grad_weight=0.3)
    loss, stats = agent.policy_loss(batch, *draws)
    torch.testing.assert_close(loss, stats["q_loss"] + 0.3 * stats["q_grad_loss"])
    assert stats["actor_loss"] == loss


@pytest.mark.parametrize("diffusion_steps", [1, 5, 20])
def test_the_largest_weight_does_not_depend_on_the_number_of_steps(diffusion_steps):
    """w(T) = exp(c T + d) is the paper's, if nobody sets c. On the multi-goal task w is 1."""
    args = {"diffusion_steps": diffusion_steps, "device": "cpu"}
    c = dacer_v2.resolve(dacer_v2.Args(**args)).time_weight_c
    assert c * diffusion_steps == pytest.approx(0.4 * 5)
    assert dacer_v2.resolve(dacer_v2.Args(**args, time_weight_c=0.3)).time_weight_c == 0.3
    assert dacer_v2.resolve(dacer_v2.Args(**args), time_weight_c=0.4).time_weight_c == 0.4
    goals = dacer_v2.Args("multigoal_env:MultiGoal-v0", **args)
    assert dacer_v2.resolve(goals).time_weight_c == 0


@pytest.mark.parametrize("diffusion_steps", [1, 50])
def test_any_number_of_diffusion_steps(diffusion_steps):
    agent, batch, draws = make(QuadraticCritic(), diffusion_steps=diffusion_steps)
    loss, stats = agent.policy_loss(batch, *draws)
    assert loss.isfinite()
    assert stats["q_grad_loss"] > 0


def test_eta_zero_is_dacer_bit_for_bit(work):
    """Whole runs: without the Q-gradient the second script is the first, random numbers too."""
    args = {"env_id": "toy_envs:Reach-v0"} | TINY
    first = outcome(train(dacer, dacer.Args(**args), "first"))
    second = outcome(train(dacer_v2, dacer_v2.Args(**args, q_grad_weight=0.0), "second"))
    for part in ("agent", "optimizer", "rows"):
        assert differences(first["checkpoint.pt"][part], second["checkpoint.pt"][part]) == []


# What the second paper adds to or changes: here the two scripts may differ.
OF_THE_PAPER = {
    "module docstring",
    "ALGORITHM",
    "Args",
    "DEFAULTS",
    "TASKS['MultiGoal']",
    "Agent.policy_loss",
    "Agent.q_grad_loss",
}
# Elsewhere they may differ in these lines, in which the chain is kept, t is drawn and handed on,
# c and d may be negative, and c follows T. "-" are those of dacer.py, "+" those of dacer_v2.py.
ELSEWHERE = {
    "DiffusionPolicy.denoise": '''
-    def denoise(self, state_part: Tensor, time_parts: Tensor, noise: Tensor) -> Tensor:
-        """The denoised x_0, (..., d), made from the noise of `draw_noise`."""
-        return x
+    def denoise(self, state_part: Tensor, time_parts: Tensor, noise: Tensor) -> list[Tensor]:
+        """The chain [x_0, x_1, ..., x_T], each (..., d), made from the noise of `draw_noise`."""
+        chain = [x]
+            chain.append(x)
+        return chain[::-1]
''',
    "DiffusionPolicy.forward": """
-        x_0 = self.denoise(*self.fixed_parts(obs), noise)
+        x_0 = self.denoise(*self.fixed_parts(obs), noise)[0]
""",
    "Agent.backward": """
-        next_noise, z, noise = draws
-            policy_loss, policy_stats = self.policy_loss(batch, noise)
+        next_noise, z, *policy_draws = draws  # noise and, if eta > 0, t
+            policy_loss, policy_stats = self.policy_loss(batch, *policy_draws)
""",
    "Agent.draw": '''
-        """The random numbers of an update: noise of a', z of critic_loss, noise of a."""
-        return next_noise, z, noise
+        """The random numbers of an update: noise of a', z of critic_loss, noise of a, steps t."""
+        if self.args.q_grad_weight == 0:
+            return next_noise, z, noise
+        t = torch.randint(1, self.policy.T + 1, (B,), device=z.device, generator=self.rng)
+        return next_noise, z, noise, t
''',
    "resolve": """
+        least = -100 if name.startswith("time_weight") else least  # any sign
+    if args.time_weight_c is None:
+        args.time_weight_c = 2 / args.diffusion_steps  # 0.4 at T = 5, as in the paper
""",
}


def owners(source: str) -> list[str]:
    """For each line, the definition that it belongs to: a function, a class, a method, or an
    assigned name. Comments and empty lines belong to what follows them."""
    names = []

    def fill(node: ast.stmt, name: str) -> None:
        names.extend([name] * (node.end_lineno - len(names)))

    for node in ast.parse(source).body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.Expr):
            name = "module docstring"
        if isinstance(node, ast.Assign | ast.AugAssign):
            name = ast.unparse(getattr(node, "target", None) or node.targets[0])
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            is_method = isinstance(child, ast.FunctionDef)
            fill(child, f"{name}.{child.name}" if is_method else name)
        fill(node, name)
    return names


def test_the_diff_is_the_second_paper():
    """Outside the places where the paper adds something, the two files are the same text."""
    texts = [Path(module.__file__).read_text() for module in (dacer, dacer_v2)]
    first, second = (text.splitlines() for text in texts)
    owner_of = [owners(text) for text in texts]
    dropped, added = {}, {}  # lines by definition
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            for i in range(i1, i2):
                dropped.setdefault(owner_of[0][i], []).append(first[i])
            for j in range(j1, j2):
                added.setdefault(owner_of[1][j], []).append(second[j])
    assert dropped.keys() | added.keys() == OF_THE_PAPER | ELSEWHERE.keys()
    for name, lines in ELSEWHERE.items():
        found = [f"-{line}" for line in dropped.get(name, [])]
        found += [f"+{line}" for line in added.get(name, [])]
        assert found == lines.strip("\n").splitlines()
    assert "Agent.q_grad_loss" not in dropped
    assert {line.split(":")[0].strip() for line in dropped["Args"]} == {"diffusion_steps"}
    names = {line.split(":")[0].strip() for line in added["Args"]}
    assert names == {"diffusion_steps", "q_grad_weight", "time_weight_c", "time_weight_d"}
