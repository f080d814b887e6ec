"""DACERv2: Diffusion Actor-Critic with Entropy Regulator and a Q-gradient field, in one file.

Y. Wang et al., "Enhanced DACER Algorithm with High Diffusion Efficiency", 2025 (arXiv:2505.23426).
Y. Wang et al., "Diffusion Actor-Critic with Entropy Regulator", NeurIPS 2024 (arXiv:2405.15177).
DSAC: J. Duan et al., "Distributional Soft Actor-Critic with Three Refinements", arXiv:2310.05858.

The policy is the reverse process of a diffusion model. Given the state s, it starts from noise
x_T ~ N(0, I) and denoises it in the steps t = T..1:

    x0_hat  = clip(x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_theta(s, x_t, t), -1, 1)
    x_{t-1} = x0_hat beta_t sqrt(abar_{t-1}) / (1 - abar_t)
              + x_t (1 - abar_{t-1}) sqrt(1 - beta_t) / (1 - abar_t)
              + 1[t > 1] sqrt(beta_t (1 - abar_{t-1}) / (1 - abar_t)) N(0, I)
    a       = clip(x_0 + alpha lambda N(0, I), -1, 1)    (lambda: noise_scale; evaluations: a = x_0)

with beta_t = 1 - exp(-0.1 / T - 9.9 (2t - 1) / (2 T^2)) and abar_t = prod_{i <= t} (1 - beta_i).
Unlike SAC's, alpha is in no loss term: it scales the exploration noise, also in the losses' a and
a'. Critics learn in every update, policy and targets in every 2nd, alpha in every
entropy_interval-th. An update computes all gradients before any parameter moves:

    critics:  the means m_i(s, a) and stds sigma_i(s, a), i = 1, 2, of the return by DSAC's loss,
              with y = reward_scale r + gamma (1 - terminated) min_i m_i'(s', a'), a' ~ policy(s')
    policy:   minimise -min_i m_i(s, a), a ~ policy(s), through all T steps, plus
              eta |w(t) g / |g| + eps_theta(s, x_t, t)|^2, w(t) = exp(c t + d), at one random t
              of each chain; g = grad_a min_i m_i(s, a) at a = x_t. With x_t and g held
              constant, each step learns to follow the Q-gradient field
    targets:  m_i' and sigma_i' come from Polyak averages of the critics
    alpha:    log_alpha <- log_alpha - Adam(H - H_target), H_target = -0.9 dim(a); H is the
              mean entropy of a, by Gaussian mixtures fitted to 200 actions of each state
"""

# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "tensorboard==2.21.0", "filelock==4.3.1"]
# ///

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

ALGORITHM = "dacer_v2"
SCRIPT = Path(globals().get("__file__", f"{ALGORITHM}.py"))  # A notebook's cell has no file.


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium task; module:Name-v0 imports the module
    env_kwargs: str = "{}"  # its arguments: '{"max_episode_steps": 1000}'
    seed: int = 1  # of everything random
    total_timesteps: int = 30_000_000  # environment steps, warm-up included
    num_envs: int = 20  # environments; an update per step of them all
    async_envs: bool = False  # each in a process of its own
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and buffer
    compile: bool = True  # takes a minute or two; then faster
    exp_name: str = SCRIPT.stem  # part of the folder's name
    diffusion_steps: int = 5  # T
    q_grad_weight: float | None = None  # eta; 0: DACER; None: by task
    time_weight_c: float | None = None  # c of w(t) = exp(c t + d); None: 2 / T, or by task
    time_weight_d: float | None = None  # d of w(t); c = d = 0: w = 1; None: by task
    noise_scale: float | None = None  # lambda; None: by task
    hidden_sizes: tuple[int, ...] | None = None  # of hidden layers; None: by task
    learning_starts: int | None = None  # random first steps; None: by task
    entropy_interval: int | None = None  # updates per step of alpha; None: by task, run
    entropy_samples: int = 200  # actions per state for the entropy
    learning_rate: float = 1e-4  # Adam's, of policy and critics
    alpha_lr: float = 0.03  # Adam's, of log_alpha
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak step of targets and omega
    reward_scale: float = 0.2  # rewards are multiplied by it
    policy_frequency: int = 2  # updates of critics for one of policy and targets
    eval_interval: int = 15_000  # updates between evaluations; one more at the end
    eval_episodes: int = 10  # per evaluation; 0: none
    checkpoint_interval: int = 5_000  # updates between saves; each resets all tasks
    resume: str | None = None  # folder of a run to go on with
    evaluate: str | None = None  # a run's folder (last.pt) or best.pt


# What replaces None; see resolve, too. MultiGoal's are our own values.
DEFAULTS = {"noise_scale": 0.1, "hidden_sizes": (256, 256, 256), "learning_starts": 30_000}
# eta is 0.01 or 1 in the paper, which does not name the tasks.
DEFAULTS |= {"q_grad_weight": 0.01, "time_weight_d": -1.8}
TASKS = {
    "Humanoid": {"noise_scale": 0.15, "hidden_sizes": (512, 512, 512), "learning_starts": 200_000},
    "HalfCheetah": {"noise_scale": 0.15, "learning_starts": 200_000},
    "MultiGoal": {"entropy_interval": 1000},
}
TASKS["MultiGoal"] |= {"q_grad_weight": 2.0, "time_weight_c": 0.0, "time_weight_d": 0.0}


# ======== The algorithm ========


class Mish(nn.Module):
    """F.mish: x tanh(softplus(x)) = x n / (n + 2), n = e^x (e^x + 2), faster if compiled."""

    def forward(self, x: Tensor) -> Tensor:
        e = x.clamp(max=20.0).exp()  # Beyond 20 the quotient is 1.
        n = e * (e + 2)
        return x * (n / (n + 2))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with Mish between them; initial weights as in the official code."""
    layers = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layer = nn.Linear(fan_in, fan_out)
        std = 1 / math.sqrt(fan_in)
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
        layers += [layer, Mish()]
    return nn.Sequential(*layers[:-1])


class DiffusionPolicy(nn.Module):
    """The policy: a variance-preserving diffusion's reverse process. d is act_dim."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...], T: int):
        super().__init__()
        time_dim = 16
        self.T, self.dims = T, (obs_dim, act_dim, time_dim)
        self.time_mlp = mlp(time_dim, 2 * time_dim, time_dim)
        self.eps_net = mlp(sum(self.dims), *hidden_sizes, act_dim)  # takes [s, x_t, e_t]
        self.beta, self.abar = [0.0], [1.0]  # the noise schedule at t = 0..T
        for t in range(1, T + 1):
            beta = 1 - math.exp(-0.1 / T - 9.9 * (2 * t - 1) / (2 * T**2))
            self.beta.append(beta)
            self.abar.append(self.abar[-1] * (1 - beta))
        # Sinusoids of the step: [sin(k f_j), cos(k f_j)] / sqrt(16), k = t - 1, f_j = 10000^(-j/8).
        f = 10_000.0 ** -(torch.arange(time_dim // 2) / (time_dim // 2))  # (8,)
        phase = torch.arange(T)[:, None] * f  # (T, 8)
        embedding = torch.cat([phase.sin(), phase.cos()], -1) / math.sqrt(time_dim)
        self.register_buffer("time_embedding", embedding)  # (T, 16)

    # eps_net's first layer is W_s s + W_x x_t + W_t e_t + bias, e_t = time_mlp(sinusoids of t).
    # All but W_x x_t is computed once in a chain.
    def fixed_parts(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """W_s s + bias, (..., width), of states (..., obs_dim), and W_t e_t, (T, width)."""
        first = self.eps_net[0]
        W_s, _, W_t = first.weight.split(self.dims, dim=1)
        e = self.time_mlp(self.time_embedding)  # e_t of all t, (T, 16)
        return F.linear(obs, W_s, first.bias), F.linear(e, W_t)

    def eps_theta(self, state_part: Tensor, x: Tensor, time_part: Tensor) -> Tensor:
        """The predicted noise eps_theta(s, x_t, t), (..., d), of x_t (..., d)."""
        _, W_x, _ = self.eps_net[0].weight.split(self.dims, dim=1)
        first_layer = state_part + F.linear(x, W_x) + time_part  # (..., width)
        return self.eps_net[1:](first_layer)

    def denoise(self, state_part: Tensor, time_parts: Tensor, noise: Tensor) -> list[Tensor]:
        """The chain [x_0, x_1, ..., x_T], each (..., d), made from the noise of `draw_noise`."""
        x = noise[self.T]
        chain = [x]
        for t in range(self.T, 0, -1):
            beta, abar, abar_before = self.beta[t], self.abar[t], self.abar[t - 1]
            eps = self.eps_theta(state_part, x, time_parts[t - 1])
            x0_hat = (x / math.sqrt(abar) - math.sqrt(1 / abar - 1) * eps).clamp(-1, 1)
            from_x0 = beta * math.sqrt(abar_before) / (1 - abar)
            from_xt = (1 - abar_before) * math.sqrt(1 - beta) / (1 - abar)
            x = from_x0 * x0_hat + from_xt * x
            if t > 1:
                x = x + math.sqrt(beta * (1 - abar_before) / (1 - abar)) * noise[t - 1]
            chain.append(x)
        return chain[::-1]

    def forward(self, obs: Tensor, noise: Tensor, noise_std: float | Tensor = 0.0) -> Tensor:
        """Actions (..., d) in states (..., obs_dim). To explore, noise_std is alpha lambda."""
        x_0 = self.denoise(*self.fixed_parts(obs), noise)[0]
        return (x_0 + noise_std * noise[0]).clamp(-1, 1)

    def draw_noise(self, *rows: int, rng: torch.Generator | None = None) -> Tensor:
        """Normals (T + 1, *rows, d): [T] is x_T itself, [t] goes into x_t, and [0] explores."""
        return self.time_embedding.new_empty(self.T + 1, *rows, self.dims[1]).normal_(generator=rng)


class TwinCritic(nn.Module):
    """Two independent critics: each gives mean and std of the return's distribution."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *hidden_sizes, 2)
        self.q2 = mlp(obs_dim + act_dim, *hidden_sizes, 2)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Means and stds, (2, B) each, for states (B, obs_dim) and actions (B, d)."""
        x = torch.cat([obs, action], -1)
        out = torch.stack([self.q1(x), self.q2(x)])  # (2, B, 2)
        return out[..., 0], F.softplus(out[..., 1])


def mixture_entropy(actions: Tensor, K: int = 3, rng: torch.Generator | None = None) -> Tensor:
    """DACER's estimate of the entropies (S,), in nats, of S distributions from samples (S, n, d).

    H = sum_k w_k (0.5 log((2 pi e)^d |Sigma_k|) - log w_k) of Gaussian mixtures, which EM fits to
    all S sets at once. 1e-3, 100 and m_step's 1e-6 are scikit-learn's, as in the official code.
    """
    x = actions.mT.double().contiguous()  # (S, d, n); thin covariances need doubles.
    weight, mean, chol = m_step(x, k_means(actions, K, rng).double())
    log_lik = x.new_full((len(x),), -math.inf)
    active = torch.arange(len(x), device=x.device)  # whose likelihood still changes
    for _ in range(100):
        resp, now = e_step(x[active], weight[active], mean[active], chol[active])
        weight[active], mean[active], chol[active] = m_step(x[active], resp)
        change = (now - log_lik[active]).abs()
        log_lik[active] = now
        active = active[change >= 1e-3]
        if len(active) == 0:
            break
    half_log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # 0.5 log |Sigma_k|, (S, K)
    gaussian = 0.5 * x.shape[1] * math.log(2 * math.pi * math.e) + half_log_det  # (S, K)
    return (weight * (gaussian - weight.log())).sum(-1).float()


def k_means(actions: Tensor, K: int, rng: torch.Generator | None) -> Tensor:
    """Clusters of samples (S, n, d), one-hot (S, K, n): k-means, begun by k-means++."""
    centres = actions[:, :1]  # (S, 1, d), as random as any other
    for _ in range(K - 1):
        distance = torch.cdist(actions, centres).amin(-1)  # (S, n), perhaps all 0
        chosen = torch.multinomial(distance.square() + 1e-20, 1, generator=rng)  # (S, 1)
        centres = torch.cat([centres, actions.take_along_dim(chosen[..., None], 1)], 1)
    for _ in range(10):
        nearest = torch.cdist(actions, centres).argmin(-1)  # (S, n)
        clusters = F.one_hot(nearest, K).to(actions).mT  # (S, K, n)
        centres = clusters @ actions / clusters.sum(-1, keepdim=True).clamp(min=1)  # (S, K, d)
    return clusters


def m_step(x: Tensor, resp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w_k = mean_n r_kn, (S, K), mu_k = E_k[x], (S, K, d), and the Cholesky factors (S, K, d, d) of
    Sigma_k = E_k[x x^T] - mu_k mu_k^T + 1e-6 I. E_k weighs x_n by r_kn (resp)."""
    S, d, n = x.shape
    count = resp.sum(-1) + 1e-12  # (S, K), never 0
    mean = resp @ x.mT / count[..., None]
    weighted = resp[:, :, None] * x[:, None]  # (S, K, d, n)
    moment = (weighted.flatten(1, 2) @ x.mT).view(S, -1, d, d) / count[..., None, None]
    covariance = moment - mean[..., None] * mean[..., None, :] + 1e-6 * torch.eye(d).to(x)
    return count / n, mean, torch.linalg.cholesky(covariance)


def e_step(x: Tensor, weight: Tensor, mean: Tensor, chol: Tensor) -> tuple[Tensor, Tensor]:
    """Responsibilities r_kn = w_k N(x_n; mu_k, Sigma_k) / sum_j w_j N(x_n; mu_j, Sigma_j),
    (S, K, n), and mean log-likelihoods of the samples (S,), without their constant part."""
    S, K, d = mean.shape
    inverse = torch.linalg.solve_triangular(chol, torch.eye(d).to(x), upper=False)  # (S, K, d, d)
    # z = L_k^-1 (x_n - mu_k), L_k the Cholesky factor
    z = (inverse.flatten(1, 2) @ x).view(S, K, d, -1) - inverse @ mean[..., None]  # (S, K, d, n)
    half_log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (S, K)
    log_prob = (weight.log() - half_log_det)[..., None] - 0.5 * z.square().sum(2)  # (S, K, n)
    return log_prob.softmax(1), log_prob.logsumexp(1).mean(-1)


class Batch(NamedTuple):
    obs: Tensor  # (B, obs_dim)
    action: Tensor  # (B, d), in [-1, 1]
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, obs_dim), the true successor, also where an episode ended
    terminated: Tensor  # (B,), 1 where the task ended; a time limit does not count.


class Agent(nn.Module):
    """What learns: policy, critics, their targets, log_alpha and omega."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.args, self.dims = args, (obs_dim, act_dim)
        self.policy = DiffusionPolicy(obs_dim, act_dim, args.hidden_sizes, args.diffusion_steps)
        self.critic = TwinCritic(obs_dim, act_dim, args.hidden_sizes)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(3.0)))  # the official code's start
        self.target_entropy = -0.9 * act_dim
        self.register_buffer("omega", torch.zeros(2))  # running means of the critics' stds
        self.to(args.device, torch.float32)
        self.rng = torch.Generator(args.device).manual_seed(args.seed)
        networks = [p for p in self.parameters() if p.requires_grad and p is not self.log_alpha]
        self.optimizer = torch.optim.Adam(networks, args.learning_rate, fused=True)
        self.optimizer.add_param_group({"params": [self.log_alpha], "lr": args.alpha_lr})
        if args.compile:
            compile_agent(self)

    def noise_std(self) -> Tensor:
        """Standard deviation alpha lambda of the exploration noise."""
        return self.log_alpha.detach().exp() * self.args.noise_scale

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> Tensor:
        """Actions (n, d) with exploration noise for observations (n, obs_dim)."""
        obs = torch.atleast_2d(torch.as_tensor(obs, dtype=torch.float32, device=self.args.device))
        noise = self.policy.draw_noise(len(obs), rng=self.rng)
        return self.policy(obs, noise, self.noise_std()).clone()  # A CUDA graph reuses its result.

    def critic_loss(self, batch: Batch, noise: Tensor, z: Tensor) -> tuple[Tensor, Tensor, dict]:
        """DSAC's loss of both critics, the new omega (2,), and statistics.

        loss_i  = -(omega_i^2 + 0.1) mean(m_i [(y - m_i) / (sigma_i^2 + 0.1)]
                      + sigma_i [((y_b - m_i)^2 - sigma_i^2) / (sigma_i^3 + 0.1)])
        y       = reward_scale r + gamma (1 - terminated) m_j',  j = argmin_i m_i' of each sample
        y_z     = reward_scale r + gamma (1 - terminated) (m_j' + sigma_j' clip(z_j, -3, 3))
        y_b     = m_i + clip(y_z - m_i, -3 omega_i, 3 omega_i)
        omega_i = the new running mean of mean(sigma_i),  z ~ N(0, 1)

        omega_i and the [] are held constant. Without 0.1 the [] are d/dm_i log N(y; m_i, sigma_i)
        and d/dsigma_i log N(y_b; m_i, sigma_i). omega_i^2 undoes their scale.
        """
        mean, std = self.critic(batch.obs, batch.action)  # m_i and sigma_i, (2, B)
        with torch.no_grad():
            next_action = self.policy(batch.next_obs, noise, self.noise_std())
            next_mean, next_std = self.target_critic(batch.next_obs, next_action)  # (2, B)
            next_sample = next_mean + next_std * z.clamp(-3, 3)  # (2, B)
            j = next_mean.argmin(0, keepdim=True)  # (1, B)
            reward = self.args.reward_scale * batch.reward  # (B,)
            discount = self.args.gamma * (1 - batch.terminated)  # (B,)
            y = reward + discount * next_mean.gather(0, j)  # (1, B)
            y_z = reward + discount * next_sample.gather(0, j)  # (1, B)
            average_std = std.mean(1)  # (2,)
            omega = torch.lerp(self.omega, average_std, self.args.tau)
            omega = torch.where(self.omega == 0, average_std, omega)  # It is 0 at first.
            limit = 3 * omega[:, None]
            y_b = mean + (y_z - mean).clamp(-limit, limit)  # (2, B)
            mean_slope = (y - mean) / (std**2 + 0.1)  # (2, B)
            std_slope = ((y_b - mean) ** 2 - std**2) / (std**3 + 0.1)  # (2, B)
        losses = -(omega**2 + 0.1) * (mean * mean_slope + std * std_slope).mean(1)  # (2,)
        stats = {}
        for i in (0, 1):
            stats[f"qf{i + 1}_loss"] = losses[i].detach()
            stats[f"qf{i + 1}_values"] = mean[i].detach().mean()
            stats[f"qf{i + 1}_std"] = average_std[i]
            stats[f"omega{i + 1}"] = omega[i]
        return losses.sum(), omega, stats

    def min_q(self, obs: Tensor, action: Tensor) -> Tensor:
        """min_i m_i(s, a), (B,). Gradients reach the action, not the critics' parameters."""
        parameters = {name: value.detach() for name, value in self.critic.named_parameters()}
        mean, _ = torch.func.functional_call(self.critic, parameters, (obs, action))
        return mean.amin(0)

    def policy_loss(self, batch: Batch, noise: Tensor, t: Tensor | None = None) -> tuple:
        """-mean min_i m_i(s, a) + eta q_grad_loss, a with exploration noise, and statistics."""
        parts = self.policy.fixed_parts(batch.obs)
        chain = self.policy.denoise(*parts, noise)
        action = (chain[0] + self.noise_std() * noise[0]).clamp(-1, 1)
        loss = -self.min_q(batch.obs, action).mean()
        stats = {"q_loss": loss.detach()}
        if t is not None:  # eta > 0
            q_grad_loss, q_grad_stats = self.q_grad_loss(batch.obs, *parts, chain, t)
            loss = loss + self.args.q_grad_weight * q_grad_loss
            stats |= q_grad_stats
        stats["actor_loss"] = loss.detach()
        return loss, stats

    def q_grad_loss(
        self, obs: Tensor, state_part: Tensor, time_parts: Tensor, chain: list[Tensor], t: Tensor
    ) -> tuple[Tensor, dict]:
        """mean |w(t) g / |g| + eps_theta(s, x_t, t)|^2. -eps_theta is the score but for its scale.

        t, (B,), is one step of each state's chain, and x_t what that step denoises. x_t and
        g = grad_a min_i m_i(s, a) at a = x_t are held constant.
        """
        x_t = torch.stack(chain)[t, torch.arange(len(t), device=t.device)].detach()  # (B, d)
        g = torch.func.grad(lambda a: self.min_q(obs, a).sum())(x_t)  # (B, d)
        norm = g.norm(dim=-1, keepdim=True)  # |g|, (B, 1)
        w = torch.exp(self.args.time_weight_c * t.float() + self.args.time_weight_d)  # (B,)
        guide = w[:, None] * g / (norm + 1e-8)  # (B, d)
        # time_parts[t - 1], with gradients added up in a fixed order.
        at_step = F.one_hot(t - 1, self.policy.T).float()  # (B, T)
        eps = self.policy.eps_theta(state_part, x_t, at_step @ time_parts)  # (B, d)
        loss = (guide + eps).square().sum(-1).mean()
        return loss, {"q_grad_loss": loss.detach(), "q_grad_norm": norm.mean()}

    def backward(self, batch: Batch, draws: tuple, update_policy: bool) -> tuple[Tensor, dict]:
        """Sets .grad by critics' and, if asked, policy's loss; returns new omega, statistics."""
        next_noise, z, *policy_draws = draws  # noise and, if eta > 0, t
        loss, omega, stats = self.critic_loss(batch, next_noise, z)
        if update_policy:
            # One pass: no parameter has gradients of both losses.
            policy_loss, policy_stats = self.policy_loss(batch, *policy_draws)
            loss = loss + policy_loss
            stats |= policy_stats
        loss.backward()
        return omega, stats

    @torch.no_grad()
    def entropy(self, obs: Tensor) -> Tensor:
        """Mean entropy, in nats, of the policy with exploration noise in states obs."""
        actions = []
        for part in obs.split(32):  # (32, 200, d) actions fit into a CPU's cache.
            noise = self.policy.draw_noise(len(part), self.args.entropy_samples, rng=self.rng)
            actions.append(self.policy(part[:, None], noise, self.noise_std()).clone())
        return mixture_entropy(torch.cat(actions), rng=self.rng).mean()

    def draw(self, B: int) -> tuple[Tensor, ...]:
        """The random numbers of an update: noise of a', z of critic_loss, noise of a, steps t."""
        z = torch.randn(2, B, dtype=torch.float32, device=self.args.device, generator=self.rng)
        next_noise = self.policy.draw_noise(B, rng=self.rng)
        noise = self.policy.draw_noise(B, rng=self.rng)
        if self.args.q_grad_weight == 0:
            return next_noise, z, noise
        t = torch.randint(1, self.policy.T + 1, (B,), device=z.device, generator=self.rng)
        return next_noise, z, noise, t

    @torch.enable_grad()  # A task may have disabled it.
    def update(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """The update of this number, from 0 on. Returns statistics, a scalar each."""
        update_policy = number % self.args.policy_frequency == 0
        stats = {}
        self.optimizer.zero_grad()
        if number % self.args.entropy_interval == 0:
            stats["entropy"] = self.entropy(batch.obs)
            self.log_alpha.grad = stats["entropy"] - self.target_entropy
        omega, loss_stats = self.backward(batch, self.draw(len(batch.obs)), update_policy)
        self.omega.copy_(omega)
        stats |= {name: value.clone() for name, value in loss_stats.items()}  # See act.
        self.optimizer.step()  # It moves what has a gradient.
        if update_policy:
            for target, critic in zip(self.target_critic.parameters(), self.critic.parameters()):
                target.data.lerp_(critic.data, self.args.tau)
        return stats


def compile_agent(agent: Agent) -> None:
    """Makes updates and actions faster; only rounding differs."""
    cpu = agent.args.device.startswith("cpu")
    options = {"triton.cudagraphs": not cpu, "shape_padding": False}  # Fused Adam refuses padding.
    backward = torch.compile(type(agent).backward, fullgraph=True, dynamic=False, options=options)
    during_calls = torch._dynamo.config.patch(trace_autograd_ops=True)  # compiles .backward()
    agent.backward = MethodType(during_calls(backward), agent)
    options = options | {"cpp_wrapper": cpu}  # C++ calls an action's kernels faster.
    options["post_grad_fusion_options"] = {"decompose_mm_pass": {}}  # products of one row as sums
    agent.policy.compile(dynamic=False, options=options)


# ======== Around it: environments, evaluation, saving, training ========

TIMEOUT = 600  # seconds to wait for another process
EVAL_STEPS = 10_000  # longest evaluated episode, if a task sets no more
MAY_CHANGE = {"seed", "device", "compile", "checkpoint_interval", "buffer_size", "eval_episodes"}
MAY_CHANGE_ON_RESUME = MAY_CHANGE | {"async_envs", "exp_name", "total_timesteps"}  # of a run


def say(text: str) -> None:
    """Prints at once. Training goes on if nobody can read it."""
    try:
        print(text, flush=hasattr(sys.stdout, "flush"))
    except Exception:
        sys.stdout = None  # Now print is silent.


class ReplayBuffer:
    """Ring buffer of transitions. On a CPU, unused rows take no memory."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str):
        limits = [math.inf]
        with suppress(AttributeError, OSError, ValueError):  # Windows, or no limit
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
            limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
        shapes = Batch((obs_dim,), (act_dim,), (), (obs_dim,), ())
        row = 4 * sum(map(math.prod, shapes))  # bytes
        if device.startswith("cpu") and capacity * row > min(limits):
            raise ValueError(f"no memory: try --buffer-size {min(limits) // row // 2}")
        like = {"dtype": torch.float32, "device": device}
        self.data = Batch(*(torch.empty(capacity, *shape, **like) for shape in shapes))
        self.capacity, self.device = capacity, device
        self.count = 0  # rows ever added

    def add(self, *transitions: np.ndarray | Tensor) -> None:
        """Stores n transitions: the fields of `Batch`, (n, ...)."""
        rows = torch.arange(self.count, self.count + len(transitions[0]), device=self.device)
        for stored, new in zip(self.data, transitions, strict=True):
            stored.index_copy_(0, rows % self.capacity, torch.as_tensor(new).to(stored))
        self.count += len(rows)

    def sample(self, batch_size: int, rng: torch.Generator | None = None) -> Batch:
        size = min(self.count, self.capacity)
        rows = torch.randint(size, (batch_size,), device=self.device, generator=rng)
        return Batch(*(stored[rows] for stored in self.data))


class Plain(gym.wrappers.FlattenObservation):
    """What training sees of a task: flat copies of observations, float rewards, no `info`."""

    def __init__(self, args: Args):
        super().__init__(self.call(gym.make, args.env_id, **json.loads(args.env_kwargs)))
        flat, space = self.observation_space, self.action_space
        boxes = all(isinstance(x, gym.spaces.Box) for x in (flat, space))
        if not boxes or space.dtype.kind != "f" or np.abs([space.low, space.high]).max() > 1e9:
            self.close()
            what = f"no vector and bounded Box of real actions, but {flat} and {space}"
            raise ValueError(f"{args.env_id}: {what}; see gymnasium.wrappers.TransformAction")
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, flat.shape)  # Bounds may vary.
        self.max_steps = getattr(self.env, "_max_episode_steps", None)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:  # Tasks may draw from these.
            spaces = self.unwrapped.action_space.seed, self.unwrapped.observation_space.seed
            for set_seed in (random.seed, np.random.seed, torch.manual_seed, *spaces):
                set_seed(seed + 1)  # not the agent's
        return self.call(super().reset, seed=seed, options=options)[0], {}

    def step(self, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, _ = self.call(super().step, action)
        return obs, float(np.asarray(reward).item()), bool(terminated), bool(truncated), {}

    def call(self, function: Callable, /, *args, **kwargs):
        """Calls the task. What it raises becomes an error that can be pickled."""
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"the task raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        with suppress(Exception, SystemExit):
            super().close()


class InParallel(gym.vector.AsyncVectorEnv):
    """Environments in other processes. One that hangs or dies ends the run."""

    def _check_spaces(self) -> None:
        self.get_attr("render_mode")  # super() has no limit
        super()._check_spaces()

    def _poll_pipe_envs(self, _: float | None) -> bool:
        """Two halves of TIMEOUT: one may pass while suspended."""
        if not any(map(super()._poll_pipe_envs, (TIMEOUT / 2, TIMEOUT / 2))):
            raise TimeoutError(f"no answer in {TIMEOUT} seconds")
        return True

    def close_extras(self, **_) -> None:
        """Asks each process to close its task; kills what has not ended in time."""
        for pipe in self.parent_pipes:
            with suppress(OSError, AttributeError):  # of a process that ended
                pipe.send(("close", None))
        deadline = time.monotonic() + 30
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()


def make_envs(args: Args, num_envs: int, parallel: bool = False) -> VectorEnv:
    """Copies of the task. One that is done is reset in the same step."""
    if parallel:
        return InParallel([lambda: Plain(args)] * num_envs, autoreset_mode="SameStep")
    with ExitStack() as made:  # closes the others if one fails
        makers = [lambda: made.enter_context(closing(Plain(args)))] * num_envs
        envs = gym.vector.SyncVectorEnv(makers, autoreset_mode="SameStep")
        made.pop_all()
    return envs


def to_env(action: Tensor, space: gym.spaces.Box) -> np.ndarray:
    """Maps actions in [-1, 1]^d, (n, d), to the task's bounds, (n, *space.shape)."""
    action = action.cpu().numpy().reshape(-1, *space.shape)
    action = space.low + (action + 1) / 2 * (space.high - space.low)
    return np.clip(action, space.low, space.high).astype(space.dtype)


def check_finite(step: int, values: dict) -> None:
    """FloatingPointError if a value is NaN, or infinite in single precision."""
    for name, value in values.items():
        if not torch.as_tensor(value).float().isfinite().all():
            raise FloatingPointError(f"NaN or infinity in {name} at step {step}")


def derive_seed(*numbers: int) -> int:
    """A seed of 30 bits made of numbers; some tasks take no more."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 2)


def make_actor(policy: DiffusionPolicy, space: gym.spaces.Box, seed: int = 0) -> Callable:
    """The policy without exploration noise, for one flat observation or n."""
    rng = torch.Generator(policy.time_embedding.device).manual_seed(seed)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        rows = np.array(obs, np.float32, ndmin=2)
        if rows.shape[1:] != policy.dims[:1] or not np.isfinite(rows).all():
            raise ValueError(f"no observation of {policy.dims[0]} finite numbers: {obs}")
        noise = policy.draw_noise(len(rows), rng=rng)
        action = policy(torch.as_tensor(rows, device=rng.device), noise)
        return to_env(action, space).reshape(np.shape(obs)[:-1] + space.shape)

    return act


def evaluate(act: Callable, envs: VectorEnv, episodes: int, seed: int) -> tuple:
    """The returns of `act`, (episodes,), and scores. Each copy plays one episode a round."""
    rounds = []
    for number in range(math.ceil(episodes / envs.num_envs)):
        obs, _ = envs.reset(seed=derive_seed(seed, number))
        returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
        for step in range(max(EVAL_STEPS, envs.get_attr("max_steps")[0] or 0)):
            obs, reward, terminated, truncated, _ = envs.step(act(obs))
            check_finite(step, {"an evaluation's reward": reward[running]})
            returns[running] += reward[running]
            running &= ~(terminated | truncated)
            if not running.any():
                break
        if running.any():
            say(f"{running.sum()} episodes were cut after {step + 1} steps: set max_episode_steps")
        rounds.append(returns)
    returns = np.concatenate(rounds)[:episodes]
    scores = {"episodic_return": float(returns.mean()), "episodic_return_std": float(returns.std())}
    task = envs.envs[0].unwrapped
    own = envs.envs[0].call(task.policy_report, act) if hasattr(type(task), "policy_report") else {}
    return returns, own | scores


def save(path: Path, agent: Agent, **training: object) -> None:
    """Saves the agent and `training`. `path` is never half-written."""
    content = {"algorithm": ALGORITHM, "args": asdict(agent.args)}
    content |= {"dims": agent.dims, "agent": agent.state_dict()} | training
    temporary = Path(path).with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    load_checkpoint(temporary)  # fails if it cannot be loaded
    temporary.replace(path)


def load_checkpoint(path: str | Path) -> dict:
    """The content of a file, or of a folder's last.pt, else best.pt; runs no code."""
    file = Path(path)
    try:
        if file.is_dir():
            file = file / ("last.pt" if (file / "last.pt").exists() else "best.pt")
        content = torch.load(file, "cpu", weights_only=True, mmap=True)
        if content["algorithm"] != ALGORITHM:
            raise ValueError(f"it was made by {content['algorithm']}.py")
        return content | {"args": asdict(Args(**content["args"]))}
    except Exception as error:
        raise ValueError(f"no {ALGORITHM} checkpoint {file}: {error!r}") from error


def load_agent(path: str | Path, device: str = "cpu", compile: bool = False) -> Agent:
    """The trained agent of a run's folder, or of a file in it."""
    saved = load_checkpoint(path)
    agent = Agent(*saved["dims"], Args(**saved["args"] | {"device": device, "compile": compile}))
    agent.load_state_dict(saved["agent"])
    return agent


def resolve(args: Args, **saved: object) -> Args:
    """Arguments completed as saved or by task; ValueError if they cannot work."""
    task = args.env_id.split(":")[-1].rsplit("-v", 1)[0]
    known = DEFAULTS | TASKS.get(task, {}) | saved
    missing = {name: value for name, value in known.items() if getattr(args, name) is None}
    texts = {name: str(getattr(args, name)) for name in ("env_id", "exp_name", "device")}
    args = replace(args, **missing, **texts)
    for field in fields(args):  # Numbers are checked and made plain.
        name, value = field.name, getattr(args, field.name)
        is_count = field.type in (int, int | None, tuple[int, ...] | None)
        if value is None or not (is_count or field.type in (float, float | None)):
            continue
        least = 1 if is_count and name not in ("seed", "learning_starts", "eval_episodes") else 0
        least = -100 if name.startswith("time_weight") else least  # any sign
        most = 1 if name in ("gamma", "tau") else 10**15
        exact = np.array(value, int if is_count else float, ndmin=name == "hidden_sizes")
        if not exact.size or np.any((exact != value) | (exact < least) | (exact > most)):
            raise ValueError(f"{name} must be {least} to {most}, not {value!r}")
        setattr(args, name, tuple(exact.tolist()) if exact.ndim else exact.item())
    warmup = max(1, math.ceil(args.learning_starts / args.num_envs))
    args.learning_starts = warmup * args.num_envs
    updates = args.total_timesteps // args.num_envs - warmup
    if updates < 1:
        raise ValueError("--total-timesteps leaves no update after --learning-starts")
    if args.entropy_interval is None:
        args.entropy_interval = max(100, updates // 150)  # as in the papers
    if args.time_weight_c is None:
        args.time_weight_c = 2 / args.diffusion_steps  # 0.4 at T = 5, as in the paper
    try:
        args.env_kwargs = json.dumps(dict(json.loads(args.env_kwargs)))
    except Exception as error:
        raise ValueError(f"--env-kwargs is no JSON object: {error}") from error
    try:  # The entropy takes doubles.
        torch.ones(1, dtype=torch.float64, device=args.device) + 1
    except Exception as error:
        raise ValueError(f"--device {args.device} fails, try cpu: {error}"[:300]) from error
    return args


@torch.enable_grad()
def make_agent(args: Args, obs_dim: int, act_dim: int) -> Agent:
    """A new agent. Where compiling its update fails, it goes without."""
    torch.compiler.reset()  # PyTorch limits compilations.
    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, act_dim, args)
    if args.compile:
        say("compiling for a minute or two")
        try:
            any_batch = ReplayBuffer(args.batch_size, obs_dim, act_dim, args.device).data
            for update_policy in (True, False):
                agent.backward(any_batch, agent.draw(args.batch_size), update_policy)
                agent.optimizer.zero_grad()
            agent.act(np.zeros((args.num_envs, obs_dim)))
        except Exception as error:
            say(f"compiling fails, training goes on as with --no-compile: {error!r}"[:900])
            return make_agent(replace(args, compile=False), obs_dim, act_dim)
    return agent


def check_changes(args: Args, saved: dict, may_change: set[str]) -> None:
    """ValueError if an argument differs from a saved run's and may not."""
    changed = {name for name, value in saved.items() if getattr(args, name) != value}
    if refused := changed - may_change:
        raise ValueError(f"the run was made with other arguments: {', '.join(sorted(refused))}")


def load_run(folder: Path, agent: Agent, buffer: ReplayBuffer) -> tuple[int, float]:
    """Loads the checkpoint into both. Returns its step and best return."""
    saved = load_checkpoint(folder / "checkpoint.pt")
    needed = saved["step"] + (agent.args.seed != saved["args"]["seed"])  # new seed: 1 step more
    if needed * agent.args.num_envs > agent.args.total_timesteps:
        raise ValueError("--total-timesteps: the run has no step left")
    agent.load_state_dict(saved["agent"])
    agent.optimizer.load_state_dict(deepcopy(saved["optimizer"]))  # not the file's pages
    rows, count = saved["rows"], saved["count"]
    if buffer.capacity != saved["args"]["buffer_size"]:  # Keep the latest, the oldest first.
        rows = [field.roll(-count, 0)[-buffer.capacity :] for field in rows]
        count = len(rows[0])
    buffer.count = 0  # Rows hold offline data, too.
    buffer.add(*rows)
    buffer.count = count
    return saved["step"], saved["best"]


def main(args: Args, run_dir: Path) -> None:
    """Trains in the folder run_dir. If it has .pt files, goes on from checkpoint.pt."""
    folder = Path(run_dir).absolute()  # A task may change directories.
    saved = load_checkpoint(folder / "checkpoint.pt")["args"] if any(folder.glob("*.pt")) else {}
    args = replace(resolve(args, **saved), resume=None)
    check_changes(args, saved, MAY_CHANGE_ON_RESUME)
    with closing(make_envs(args, args.num_envs, args.async_envs)) as envs:
        check_finite(0, {"obs": envs.reset(seed=derive_seed(args.seed))[0]})
        obs_dim = envs.single_observation_space.shape[0]
        act_dim = math.prod(envs.single_action_space.shape)
        buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, args.device)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "training.lock", timeout=0):
            agent = make_agent(args, obs_dim, act_dim)
            begin = load_run(folder, agent, buffer) if saved else (0, -math.inf)
            (folder / "args.json").write_text(json.dumps(asdict(agent.args), indent=2))
            try:
                train(folder, agent, buffer, envs, begin)
            except BaseException as error:
                error.add_note(f"--resume {run_dir} goes on from the last checkpoint, if any")
                raise


def train(folder: Path, agent: Agent, buffer: ReplayBuffer, envs: VectorEnv, begin: tuple) -> None:
    """The training loop, from what load_run returned."""
    args, n, space = agent.args, envs.num_envs, envs.single_action_space
    first, best = begin
    warmup, last = args.learning_starts // n, args.total_timesteps // n
    size = sum(field.nbytes for field in buffer.data) / 1e9
    say(f"{folder}: {first * n:,} of {last * n:,} steps, replay buffer of up to {size:.2f} GB")
    start = time.monotonic()
    writer = SummaryWriter(folder, purge_step=first * n + 1)  # hides later logs
    eval_envs = make_envs(args, min(args.eval_episodes, n)) if args.eval_episodes else None
    with writer, closing(eval_envs) if eval_envs else ExitStack():
        for step in range(first, last + 1):
            update = step - warmup  # negative in the warm-up
            steps = (step + 1) * n  # environment steps

            # Save, and start anew from (seed, step), as resuming does.
            if step in (first, last) or update % args.checkpoint_interval == 0:
                check_finite(step * n, agent.state_dict())
                writer.flush()
                # By NumPy: torch.save writes all of a sliced tensor.
                rows = [torch.from_numpy(x[: buffer.count].cpu().numpy()) for x in buffer.data]
                state = {"rows": rows, "count": buffer.count, "step": step, "best": best}
                state["optimizer"] = agent.optimizer.state_dict()
                save(folder / "checkpoint.pt", agent, **state)
                del rows, state
                save(folder / "last.pt", agent)
                if step == last:
                    break
                seed = derive_seed(args.seed, step)
                agent.rng.manual_seed(seed)
                obs, _ = envs.reset(seed=seed)
                returns, finished, stats = np.zeros(n), [], {}

            # Act. Environments in other processes move while it learns.
            if update >= 0:
                action = agent.act(obs)
            else:
                action = buffer.data.action.new_empty(n, agent.dims[1])
                action.uniform_(-1, 1, generator=agent.rng)
            check_finite(steps, {"obs": obs, "action": action})
            sent = to_env(action, space)
            if args.async_envs:
                envs.step_async(sent)

            # Update on what is stored.
            if update >= 0:
                stats |= agent.update(buffer.sample(args.batch_size, agent.rng), update)

            # Step and store.
            result = envs.step_wait() if args.async_envs else envs.step(sent)
            next_obs, reward, terminated, truncated, infos = result
            done = terminated | truncated
            successor = next_obs.copy()
            if done.any():  # They have been reset.
                successor[done] = np.stack(infos["final_obs"][done])
            check_finite(steps, {"reward": reward, "next_obs": successor})
            buffer.add(obs, action, reward, successor, terminated)
            obs = next_obs
            returns += reward
            finished += returns[done].tolist()
            returns[done] = 0
            if update < 0:
                continue

            # Log.
            saves = (update + 1) % args.checkpoint_interval == 0 or step + 1 == last
            if (update + 1) % 100 == 0 or saves:
                check_finite(steps, stats)
                stats["alpha"] = agent.log_alpha.exp()
                for name, value in stats.items():
                    writer.add_scalar(f"losses/{name}", value.item(), steps)
                speed = (steps - first * n) / (time.monotonic() - start)
                writer.add_scalar("charts/SPS", speed, steps)
                if finished:
                    writer.add_scalar("charts/episodic_return", np.mean(finished), steps)
                finished, stats = [], {}
                if (update + 1) % 1000 == 0:
                    say(f"{steps:,} of {last * n:,} steps, {speed:.0f} a second")

            # Evaluate.
            if eval_envs and ((update + 1) % args.eval_interval == 0 or step + 1 == last):
                seed = derive_seed(args.seed, step, 1)
                act = make_actor(agent.policy, space, seed)
                played, scores = evaluate(act, eval_envs, args.eval_episodes, seed)
                for name, score in scores.items():
                    writer.add_scalar(f"eval/{name}", score, steps)
                say(f"{steps:,} steps: evaluation {played.mean():.5g} +- {played.std():.5g}")
                if scores["episodic_return"] > best:
                    best = scores["episodic_return"]
                    save(folder / "best.pt", agent, update=update + 1)


def run() -> None:
    """Trains, goes on with a run, or evaluates one, as sys.argv says."""
    args = tyro.cli(Args)
    if args.resume is not None:
        path = Path(args.resume)
        folder = path.parent if path.name == "checkpoint.pt" else path
        saved = load_checkpoint(folder / "checkpoint.pt")["args"]
        return main(tyro.cli(Args, default=Args(**saved)), folder)
    if args.evaluate is None:
        task = args.env_id.split(":")[-1]
        name = f"{task}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        return main(args, Path("runs", name.replace("/", "_")))
    saved = load_checkpoint(args.evaluate)["args"]
    args = resolve(tyro.cli(Args, default=Args(**saved)))
    check_changes(args, saved, MAY_CHANGE | {"evaluate", "env_kwargs"})
    args.env_kwargs = json.dumps(json.loads(saved["env_kwargs"]) | json.loads(args.env_kwargs))
    policy, seed = load_agent(args.evaluate, args.device).policy, derive_seed(args.seed)
    episodes = args.eval_episodes or 10  # A run may have 0.
    with closing(make_envs(args, min(episodes, args.num_envs))) as envs:
        act = make_actor(policy, envs.single_action_space, seed)
        returns, _ = evaluate(act, envs, episodes, seed)
    print(f"{args.env_id}, {len(returns)} episodes: {returns.mean():.5g} +- {returns.std():.5g}")


def run_command_line() -> None:
    """What cannot be begun is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        run()
    except (Exception, KeyboardInterrupt) as error:
        notes = getattr(error, "__notes__", [])  # main adds one in training.
        stopped = isinstance(error, KeyboardInterrupt)
        if notes and not stopped:
            raise
        words = f"{type(error).__name__}: {error} {' '.join(notes)}".split()
        print(f"{SCRIPT.name}: error: {' '.join(words)}", file=sys.stderr)
        sys.exit(130 if stopped else 2)


if __name__ == "__main__" and "__file__" in globals():
    run_command_line()
