"""DACER: Diffusion Actor-Critic with Entropy Regulator, in one file.

Y. Wang et al., "Diffusion Actor-Critic with Entropy Regulator", NeurIPS 2024 (arXiv:2405.15177). Critic: DSAC,
J. Duan et al., "Distributional Soft Actor-Critic with Three Refinements" (arXiv:2310.05858).

The policy is the reverse process of a diffusion model; it denoises x_T ~ N(0, I) in steps t = T..1, given the state s:

    x0_hat  = clip(x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_theta(s, x_t, t), -1, 1)
    x_{t-1} = x0_hat beta_t sqrt(abar_{t-1}) / (1 - abar_t)  +  x_t (1 - abar_{t-1}) sqrt(1 - beta_t) / (1 - abar_t)
              +  1[t > 1] sqrt(beta_t (1 - abar_{t-1}) / (1 - abar_t)) N(0, I)
    a       = clip(x_0 + alpha lambda N(0, I), -1, 1)                             exploration noise: off in evaluation

with abar_t = prod_{i <= t} (1 - beta_i). Unlike SAC's, alpha weighs no term of a loss: it scales the exploration noise.
Every update, on a batch (s, a, r, s') and with all gradients at the parameters from before it:

    critics:  y = reward_scale r + gamma (1 - terminated) min_i m_i'(s', a'), a' ~ policy(s'), in the DSAC loss below
    policy:   minimise -min_i m_i(s, a), a ~ policy(s), through all T steps                        every 2nd update
    targets:  Polyak averages of the critics                                                       every 2nd update
    alpha:    log_alpha <- log_alpha - Adam(H - H_target), H_target = -0.9 d, H the policy's entropy, estimated by
              a Gaussian mixture fitted to 200 actions of each state                 every entropy_interval updates
"""

import json
import math
import os
import random
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM, VERSION = "dacer", 2  # written into checkpoints, and demanded of them


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium task with a bounded Box of actions; module:Name-v0 imports your module first
    env_kwargs: str = "{}"  # JSON object of the task's keyword arguments, e.g. '{"max_episode_steps": 1000}'
    seed: int = 1  # of networks, noise, replay samples and environments
    total_timesteps: int = 30_000_000  # environment steps of the whole run, warm-up included
    num_envs: int = 20  # parallel environments; a step of all of them is followed by one update
    async_envs: bool = False  # simulate each environment in a process of its own
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and replay buffer
    compile: bool = True  # torch.compile: a minute or two at the first start, then up to twice as fast (GPU: far more)
    exp_name: str = ALGORITHM  # part of the run's folder, runs/<env>__<exp_name>__<seed>__<time>
    diffusion_steps: int = 20  # T
    noise_scale: float | None = None  # lambda; this and the next two: by task if left out, see TASKS
    hidden_sizes: tuple[int, ...] | None = None  # widths of the hidden layers of all networks
    learning_starts: int | None = None  # warm-up: environment steps with uniform random actions
    entropy_interval: int | None = None  # updates between two steps of log_alpha; None: by task, else updates / 150
    entropy_samples: int = 200  # actions drawn per state for the entropy estimate
    learning_rate: float = 1e-4  # Adam's, of policy and critics
    alpha_lr: float = 0.03  # Adam's, of log_alpha
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak step of the target critics and of omega
    reward_scale: float = 0.2  # rewards are multiplied by it before they are learned from
    policy_frequency: int = 2  # policy and target critics are updated in every policy_frequency-th update
    eval_interval: int = 15_000  # updates between two evaluations; one more follows the last update
    eval_episodes: int = 10  # episodes per evaluation, without exploration noise; 0: no evaluation
    checkpoint_interval: int = 5_000  # updates between two checkpoints, at which all environments are reset
    resume: str | None = None  # folder of an interrupted run to go on with
    evaluate: str | None = None  # folder (or best.pt) of a run whose policy is to be replayed, for --eval-episodes
    capture_video: bool = False  # with --evaluate: record the first episode to <run>/videos (needs moviepy)


# What the paper sets by task (MultiGoal's are ours), under the task's name without its version
DEFAULTS = {"noise_scale": 0.1, "hidden_sizes": (256, 256, 256), "learning_starts": 30_000}
TASKS = {
    "Humanoid": {"noise_scale": 0.15, "hidden_sizes": (512, 512, 512), "learning_starts": 200_000},
    "HalfCheetah": {"noise_scale": 0.15, "learning_starts": 200_000},
    "MultiGoal": {"entropy_interval": 1000},
}
FREE = {"seed", "device", "compile", "async_envs", "eval_episodes", "total_timesteps"}  # may change in a run
EVAL_STEPS, TIMEOUT = 10_000, 600.0  # at which an evaluation's episodes are cut; seconds for a worker process's step
LIMIT = """set a limit: --env-kwargs '{"max_episode_steps": 1000}'"""


class Mish(nn.Module):
    """mish(x) = x tanh(softplus(x)) = x n / (n + 2), n = e^x (e^x + 2): compiled, far faster than nn.Mish on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        e = x.clamp(max=20.0).exp()  # beyond 20 the quotient is 1
        n = e * (e + 2)
        return x * (n / (n + 2))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with Mish between them; initial weights as in the official code."""
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layer, std = nn.Linear(fan_in, fan_out), 1 / math.sqrt(fan_in)
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
        layers += [layer, Mish()]
    return nn.Sequential(*layers[:-1])


class DiffusionPolicy(nn.Module):
    """The reverse process of a variance-preserving diffusion as a policy; t = T..1 as in the equations above."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...], T: int, time_dim: int = 16):
        super().__init__()
        self.T, self.dims = T, (obs_dim, act_dim, time_dim)
        self.time_mlp = mlp(time_dim, 2 * time_dim, time_dim)
        self.eps_net = mlp(sum(self.dims), *hidden_sizes, act_dim)  # on [s, x_t, time embedding]
        t, b_min, b_max = np.arange(1, T + 1), 0.1, 10.0  # bounds of the variance-preserving schedule
        beta = np.append(0, 1 - np.exp(-b_min / T - (b_max - b_min) * (2 * t - 1) / (2 * T**2)))  # beta[t], t = 0..T
        self.beta, self.abar = beta.tolist(), np.cumprod(1 - beta).tolist()
        phase = (t - 1)[:, None] * 10_000.0 ** -(np.arange(time_dim // 2) / (time_dim // 2))  # zero-based in here alone
        embedding = np.concatenate([np.sin(phase), np.cos(phase)], -1) / np.sqrt(time_dim)  # (T, time_dim)
        self.register_buffer("time_embedding", torch.from_numpy(embedding).float())

    def context(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """What states obs (..., obs_dim) and t = 1..T add to eps_net's first layer: (..., H), (T, H); computed once."""
        w_s, _, w_t = self.eps_net[0].weight.split(self.dims, 1)
        return F.linear(obs, w_s, self.eps_net[0].bias), F.linear(self.time_mlp(self.time_embedding), w_t)

    def eps_theta(self, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The predicted noise eps_theta(s, x_t, t), (..., d), for x_t (..., d); s and t (..., H) are from `context`."""
        w_x = self.eps_net[0].weight.split(self.dims, 1)[1]
        return self.eps_net[1:](s + F.linear(x, w_x) + t)

    def denoise(self, context: tuple[Tensor, Tensor], noise: Tensor) -> list[Tensor]:
        """The chain [x_0, ..., x_T], each (..., d), from the normals of `draw_noise`."""
        (s, times), beta, abar, xs = context, self.beta, self.abar, [noise[self.T]]
        for t in range(self.T, 0, -1):
            eps = self.eps_theta(s, xs[0], times[t - 1])
            x0 = (xs[0] / math.sqrt(abar[t]) - math.sqrt(1 / abar[t] - 1) * eps).clamp(-1, 1)
            from_x0 = beta[t] * math.sqrt(abar[t - 1]) / (1 - abar[t])
            from_xt = (1 - abar[t - 1]) * math.sqrt(1 - beta[t]) / (1 - abar[t])
            std = math.sqrt(beta[t] * (1 - abar[t - 1]) / (1 - abar[t]))  # 0 at t = 1
            xs.insert(0, from_x0 * x0 + from_xt * xs[0] + std * noise[t - 1])
        return xs

    def forward(self, obs: Tensor, noise: Tensor, noise_std: float | Tensor = 0.0) -> Tensor:
        """Actions (..., d) in [-1, 1] for obs (..., obs_dim); noise from `draw_noise`, noise_std = alpha lambda."""
        return (self.denoise(self.context(obs), noise)[0] + noise_std * noise[0]).clamp(-1, 1)

    def draw_noise(self, *rows: int, generator: torch.Generator | None = None) -> Tensor:
        """A chain's normals (T + 1, *rows, d): x_T last, then those of steps t = T..2; the first is for exploration."""
        return torch.randn(self.T + 1, *rows, self.dims[1], device=self.time_embedding.device, generator=generator)


class TwinCritic(nn.Module):
    """Two independent distributional critics: each gives the mean and std of the return's distribution."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.q1, self.q2 = (mlp(obs_dim + act_dim, *hidden_sizes, 2) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Means and stds, (2, B) each, for obs (B, obs_dim) and actions (B, d)."""
        out = torch.stack([q(torch.cat([obs, action], -1)) for q in (self.q1, self.q2)])  # (2, B, 2)
        return out[..., 0], F.softplus(out[..., 1])


def mixture_entropy(actions: Tensor, K: int = 3) -> Tensor:
    """DACER's estimate of the entropy (S,), in nats, of S distributions, from samples `actions` (S, n, d) of each.

    H = sum_k w_k (-log w_k + 0.5 log((2 pi e)^d |Sigma_k|)) of a Gaussian mixture fitted to all states at once, with
    the start, floor (1e-6) and stopping rule (1e-3) of scikit-learn's GaussianMixture, which the official code takes.
    """
    S, n, d = actions.shape
    # k-means++ draws each next centre with probability ~ squared distance to the nearest so far; then k-means
    centres = actions[:, :1]  # the samples are in no order, the first is as good as any
    for _ in range(K - 1):
        chosen = torch.multinomial(torch.cdist(actions, centres).amin(-1).square() + 1e-20, 1)  # (S, 1)
        centres = torch.cat([centres, actions.take_along_dim(chosen[..., None], 1)], 1)
    for _ in range(10):
        resp = F.one_hot(torch.cdist(actions, centres).argmin(-1), K).to(actions).mT  # responsibilities (S, K, n)
        centres = resp @ actions / resp.sum(-1, keepdim=True).clamp(min=1)
    x, resp = actions.mT.double().contiguous(), resp.double()  # in single precision, thin covariances would fail
    eye, states, entropy = torch.eye(d).to(x), torch.arange(S, device=x.device), x.new_zeros(S)
    last, change = x.new_full((S,), -math.inf), x.new_full((S,), math.inf)  # mean log-likelihoods
    for _ in range(101):
        # M-step: weights (S, K), means (S, K, d), Cholesky factors of the covariances (S, K, d, d)
        count = resp.sum(-1) + 1e-12
        weight, mean = count / n, resp @ x.mT / count[..., None]
        second = ((resp[:, :, None] * x[:, None]).flatten(1, 2) @ x.mT).view(-1, K, d, d) / count[..., None, None]
        chol = torch.linalg.cholesky(second - mean[..., None] * mean[..., None, :] + 1e-6 * eye)
        log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # of chol
        entropy[states] = (weight * (log_det - weight.log())).sum(-1) + 0.5 * d * math.log(2 * math.pi * math.e)
        on = change >= 1e-3  # only states whose likelihood still changes go on
        if not on.any():
            break
        states, x, weight, mean, chol, log_det, last = (v[on] for v in (states, x, weight, mean, chol, log_det, last))
        # E-step: log(w_k N(x; mu_k, Sigma_k)) (S, K, n), but for a constant
        whiten = torch.linalg.solve_triangular(chol, eye, upper=False)
        z = whiten.flatten(1, 2) @ x - (whiten @ mean[..., None]).flatten(1, 2)  # (S, K d, n)
        log_prob = (weight.log() - log_det)[..., None] - 0.5 * z.square().view(-1, K, d, n).sum(2)
        resp, previous, last = log_prob.softmax(1), last, log_prob.logsumexp(1).mean(-1)
        change = (last - previous).abs()
    return entropy.float()


class Batch(NamedTuple):
    obs: Tensor  # (B, obs_dim)
    action: Tensor  # (B, d), in [-1, 1]
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, obs_dim), the true successor, also where an episode ended
    terminated: Tensor  # (B,), 1 where the task ended; a time limit does not count


class Agent(nn.Module):
    """All that learns: policy, critics, target critics, log_alpha and omega."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.args, self.dims = args, (obs_dim, act_dim)
        self.policy = DiffusionPolicy(obs_dim, act_dim, args.hidden_sizes, args.diffusion_steps)
        self.critic = TwinCritic(obs_dim, act_dim, args.hidden_sizes)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha, self.target_entropy = nn.Parameter(torch.tensor(3.0).log()), -0.9 * act_dim  # official values
        self.register_buffer("omega", torch.zeros(2))  # running mean of the critics' stds; 0: not yet set
        self.to(args.device)
        networks = {"params": [*self.policy.parameters(), *self.critic.parameters()], "lr": args.learning_rate}
        self.optimizer = torch.optim.Adam([networks, {"params": [self.log_alpha], "lr": args.alpha_lr}], fused=True)
        if args.compile:
            options = {"triton.cudagraphs": args.device != "cpu", "shape_padding": False}  # Adam wants dense gradients
            with_gradients = torch._dynamo.config.patch(trace_autograd_ops=True)  # losses and gradients as one graph
            self.backward = with_gradients(torch.compile(self.backward, fullgraph=True, dynamic=False, options=options))
            options |= {"cpp_wrapper": args.device == "cpu", "size_asserts": False}  # alone, acting is Python-bound
            options |= {"post_grad_fusion_options": {"decompose_mm_pass": {}}}  # CPU, one row: sums beat products
            self.policy.compile(dynamic=False, options=options)

    def noise_std(self) -> Tensor:
        """Standard deviation alpha lambda of the exploration noise."""
        return self.log_alpha.detach().exp() * self.args.noise_scale

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> Tensor:
        """Actions (..., d) with exploration noise for obs (..., obs_dim)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.args.device)
        return self.policy(obs, self.policy.draw_noise(*obs.shape[:-1]), self.noise_std())

    def backward(self, batch: Batch, draws: tuple, update_policy: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the critics' loss (DSAC) and, if asked, of the policy's. Returns new omega (2,); statistics."""
        args, (next_noise, z, *policy_draws) = self.args, draws
        with torch.no_grad():
            next_action = self.policy(batch.next_obs, next_noise, self.noise_std())
            next_mean, next_std = self.target_critic(batch.next_obs, next_action)  # (2, B)
            smaller = next_mean.argmin(0, keepdim=True)  # (1, B), per sample the more pessimistic critic
            bootstrap = args.gamma * (1 - batch.terminated)
            next_z = next_mean + next_std * z.clamp(-3, 3)
            y = args.reward_scale * batch.reward + bootstrap * next_mean.gather(0, smaller)  # (1, B)
            y_z = args.reward_scale * batch.reward + bootstrap * next_z.gather(0, smaller)
        mean, std = self.critic(batch.obs, batch.action)  # (2, B)
        with torch.no_grad():
            # Ascent on log N(y; m, sigma), of slope (y - m) / sigma^2 in m, ((m - y)^2 - sigma^2) / sigma^3 in sigma.
            # Refinements: m follows the expected target y, only sigma a sampled one, cut at m +- 3 omega (y_b); y is of
            # the smaller critic; omega^2 undoes 1 / sigma^2, by which steps would depend on the rewards. 0.1 is DSAC's.
            m, sigma, mean_std = mean.detach(), std.detach(), std.mean(1)
            omega = torch.where(self.omega == 0, mean_std, torch.lerp(self.omega, mean_std, args.tau))  # (2,)
            y_b = m + (y_z - m).clamp(-3 * omega[:, None], 3 * omega[:, None])
            mean_slope = (y - m) / (sigma**2 + 0.1)
            std_slope = ((m - y_b) ** 2 - sigma**2) / (sigma**3 + 0.1)
        critic_loss = -(omega**2 + 0.1) * (mean * mean_slope + std * std_slope).mean(1)  # (2,)
        loss = critic_loss.sum()
        stats = {"qf{}_loss": critic_loss.detach(), "qf{}_values": m.mean(1), "qf{}_std": mean_std, "omega{}": omega}
        if update_policy:  # no parameter has a gradient from both losses, so that they may be added
            policy_loss, policy_stats = self.policy_loss(batch, *policy_draws)
            loss, stats = loss + policy_loss, stats | policy_stats
        loss.backward()
        return omega, stats

    def min_q(self, obs: Tensor, action: Tensor) -> Tensor:
        """min(m_1, m_2)(s, a), (B,); gradients flow to the action, but not to the critics' parameters."""
        parameters = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, parameters, (obs, action))[0].amin(0)

    def policy_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_q = -mean min(m_1, m_2)(s, a) of actions with exploration noise."""
        action = self.policy(batch.obs, noise, self.noise_std())
        loss = -self.min_q(batch.obs, action).mean()
        return loss, {"actor_loss": loss.detach()}

    @torch.no_grad()
    def entropy(self, obs: Tensor) -> Tensor:
        """Mean entropy, in nats, of the policy with exploration noise in the states obs (B, obs_dim)."""
        policy, n, std = self.policy, self.args.entropy_samples, self.noise_std()
        parts = obs.split(32)  # all at once would not fit a CPU's cache
        actions = [policy(part[:, None], policy.draw_noise(len(part), n), std).clone() for part in parts]
        return mixture_entropy(torch.cat(actions)).mean()

    def update(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The `step`-th update, from 0; returns statistics. All gradients are taken before any parameter moves."""
        B, device, update_policy = len(batch.obs), batch.obs.device, step % self.args.policy_frequency == 0
        draws = self.policy.draw_noise(B), torch.randn(2, B, device=device), self.policy.draw_noise(B)
        self.optimizer.zero_grad()
        stats = {"entropy": self.entropy(batch.obs)} if step % self.args.entropy_interval == 0 else {}
        if stats:
            self.log_alpha.grad = stats["entropy"] - self.target_entropy  # of log_alpha (H - H_target)
        omega, others = self.backward(batch, draws, update_policy)
        stats |= {name: value.clone() for name, value in others.items()}  # CUDA graphs write their results anew
        self.omega.copy_(omega)
        self.optimizer.step()  # leaves parameters without a gradient as they are
        if update_policy:
            for target, parameter in zip(self.target_critic.parameters(), self.critic.parameters()):
                target.data.lerp_(parameter.data, self.args.tau)
        return stats


class ReplayBuffer:
    """Ring buffer of the latest `capacity` transitions; untouched pages of it take no memory on a CPU."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str):
        shapes = Batch((obs_dim,), (act_dim,), (), (obs_dim,), ())
        self.data = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.capacity, self.device, self.count = capacity, device, 0  # count: of all transitions ever added

    def add(self, *transitions: np.ndarray | Tensor) -> None:  # the fields of `Batch`
        rows = torch.arange(self.count, self.count + len(transitions[0]), device=self.device) % self.capacity
        for stored, new in zip(self.data, transitions):
            stored[rows] = torch.as_tensor(new, device=self.device).to(stored.dtype)
        self.count += len(rows)

    def sample(self, batch_size: int) -> Batch:
        rows = torch.randint(min(self.count, self.capacity), (batch_size,), device=self.device)
        return Batch(*(stored[rows] for stored in self.data))


class Plain(gym.wrappers.FlattenObservation):
    """What training takes from a task: flat copies of observations, reward and ends as numbers, and no `info`."""

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        return super().reset(**kwargs)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, float(np.asarray(reward).item()), bool(terminated), bool(truncated), {}

    def close(self) -> None:
        with suppress(Exception):  # a simulator that fails on its way out shall not take with it what was measured
            super().close()


def make_envs(args: Args, num_envs: int, asynchronous: bool = False, video: str = "") -> gym.vector.VectorEnv:
    """Copies of the task. Done ones reset within the same step; `final_obs` keeps their end. `video`: a folder."""

    def make_env(record: bool) -> gym.Env:
        env = gym.make(args.env_id, **json.loads(args.env_kwargs), **({"render_mode": "rgb_array"} if record else {}))
        return Plain(gym.wrappers.RecordVideo(env, video, lambda episode: episode == 0) if record else env)

    makers = [lambda record=video != "" and i == 0: make_env(record) for i in range(num_envs)]
    vectorize = gym.vector.AsyncVectorEnv if asynchronous else gym.vector.SyncVectorEnv
    envs = vectorize(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    if asynchronous:  # a worker that hangs shall not hang the run, nor its end
        step_wait, reset_wait = envs.step_wait, envs.reset_wait
        envs.step_wait = lambda timeout=TIMEOUT: step_wait(timeout)
        envs.reset_wait = lambda timeout=TIMEOUT: reset_wait(timeout)
        envs.close_extras = lambda **_: [worker.kill() for worker in envs.processes]
    return envs


def to_env(action: Tensor, space: gym.spaces.Box) -> np.ndarray:
    """Maps actions in [-1, 1]^d, (n, d), to the bounds of the environment's action space, (n, *space.shape)."""
    action = action.cpu().numpy().reshape(-1, *space.shape)
    return np.clip(space.low + (action + 1) / 2 * (space.high - space.low), space.low, space.high).astype(space.dtype)


def check_finite(global_step: int, values: dict[str, np.ndarray | Tensor | float]) -> None:
    """FloatingPointError if a value is NaN, or infinite in single precision; `{}` in a name: the row, from 1."""
    for name, value in values.items():
        wrong = ~torch.atleast_1d(torch.as_tensor(value)).float().isfinite()
        if wrong.any():
            name = name.format(wrong.nonzero()[0, 0].item() + 1)
            raise FloatingPointError(f"NaN or infinity in {name} at environment step {global_step}")


def make_actor(policy: DiffusionPolicy, space: gym.spaces.Box, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The policy without exploration noise: a flat observation (obs_dim,), or n of them, to the task's action(s)."""
    rng = torch.Generator(policy.time_embedding.device).manual_seed(seed)  # its own: training shall not notice

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        rows = np.array(obs, np.float32, ndmin=2)
        if rows.shape[1:] != policy.dims[:1] or not np.isfinite(rows).all():
            raise ValueError(f"observations must be finite and have a width of {policy.dims[0]}, not {np.shape(obs)}")
        action = policy(torch.as_tensor(rows, device=rng.device), policy.draw_noise(len(rows), generator=rng))
        return to_env(action, space).reshape(np.shape(obs)[:-1] + space.shape)

    return act


def evaluate(policy: DiffusionPolicy, args: Args, seed: int, video: str = "") -> tuple[np.ndarray, dict[str, float]]:
    """The returns (eval_episodes,) of one episode in each copy of the task, and the scores to be logged."""
    envs = make_envs(args, args.eval_episodes, video=video)
    act = make_actor(policy, envs.single_action_space, seed)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    obs, _ = envs.reset(seed=seed % 2**30)
    for step in range(EVAL_STEPS):
        obs, reward, terminated, truncated, _ = envs.step(act(obs))
        check_finite(step, {"an evaluation's reward": reward[running]})
        returns[running] += reward[running]
        running &= ~(terminated | truncated)
        if not running.any():
            break
    else:
        tqdm.write(f"{running.sum()} episodes were cut after {EVAL_STEPS} steps of the evaluation; {LIMIT}")
    report = getattr(envs.envs[0].unwrapped, "policy_report", lambda act: {})  # a task may have measures of its own
    scores = {"episodic_return": float(returns.mean()), "episodic_return_std": float(returns.std()), **report(act)}
    envs.close()
    return returns, scores


def load_checkpoint(path: str | Path) -> dict:
    """What a run's folder, or a file in it, holds, on the CPU; ValueError if it is of no use. Runs no code from it."""
    files = [file for file in (Path(path, "checkpoint.pt"), Path(path, "best.pt")) if file.is_file()] or [Path(path)]
    try:
        with zipfile.ZipFile(files[0]) as archive:  # torch.save writes one, with checksums that torch.load ignores
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
        if (made_by := (checkpoint["algorithm"], checkpoint["version"])) != (ALGORITHM, VERSION):
            raise ValueError(f"it was made by {made_by[0]}.py, version {made_by[1]}")
        return checkpoint
    except Exception as error:  # a broken file fails in many ways
        raise ValueError(f"no {ALGORITHM} checkpoint {path}: {type(error).__name__}: {error}".split(". ")[0]) from error


def load_agent(path: str | Path, device: str = "cpu", compile: bool = False) -> Agent:
    """The trained agent of a run's folder or best.pt. `compile`: up to 20 s at the first call with each batch size."""
    checkpoint = load_checkpoint(path)
    agent = Agent(*checkpoint["dims"], Args(**checkpoint["args"] | {"device": device, "compile": compile}))
    agent.load_state_dict(agent.state_dict() | checkpoint["agent"])  # published policies lack the target critics
    return agent


def save(path: Path, agent: Agent, **training: object) -> None:
    """Writes the agent, and what `training` needs besides, to a file that is complete at every instant."""
    checkpoint = {"algorithm": ALGORITHM, "version": VERSION, "args": asdict(agent.args), "dims": agent.dims}
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save(checkpoint | {"agent": agent.state_dict()} | training, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def resolve(args: Args) -> Args:
    """Fills in what depends on the task. Raises what is wrong with arguments, task or machine."""
    by_task = DEFAULTS | TASKS.get(args.env_id.split(":")[-1].split("-v")[0], {})
    args = replace(args, **{name: value for name, value in by_task.items() if getattr(args, name) is None})
    for name, value in vars(args).items():
        for number in (value or (0,)) if isinstance(value, tuple) else (value,):  # no hidden layer is wrong, too
            least = int(isinstance(number, int) and name not in ("seed", "learning_starts", "eval_episodes"))
            most = 1 if name in ("gamma", "tau") else 1e15
            if type(number) in (int, float) and not least <= number <= most:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} to {most:g}, but it is {value}")
    updates = args.total_timesteps // args.num_envs - math.ceil(args.learning_starts / args.num_envs)
    args.entropy_interval = args.entropy_interval or max(100, updates // 150)  # the paper's: 10,000 of 1.5 million
    envs = make_envs(args, 1)
    obs_space, space = envs.single_observation_space, envs.single_action_space
    envs.close()
    box = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and np.abs([space.low, space.high]).max() < 1e9
    row = 4 * (2 * math.prod(obs_space.shape or ()) + math.prod(space.shape or ()) + 2)  # bytes of a transition
    size, ram = row * args.buffer_size * (not args.evaluate), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wrong = {
        f"--total-timesteps leaves no update after the warm-up, --learning-starts {args.learning_starts}": updates < 1,
        "--capture-video goes with --evaluate": args.capture_video and args.evaluate is None,
        "--evaluate needs --eval-episodes": args.evaluate is not None and args.eval_episodes == 0,
        "--device cuda: PyTorch finds none here": args.device == "cuda" and not torch.cuda.is_available(),
        f"observations do not flatten into a vector: {obs_space}": not isinstance(obs_space, gym.spaces.Box),
        f"no bounded Box of real actions, but {space}; see gymnasium.wrappers.TransformAction": not box,
        f"no memory for a replay buffer of {size / 1e9:.1f} GB; try --buffer-size {ram // 2 // row}": size > ram,
    }
    for message in (message for message, applies in wrong.items() if applies):
        raise ValueError(f"{args.env_id}: {message}")
    return args


def main(args: Args, run_dir: Path) -> None:
    """Trains an agent in the folder run_dir, made for it; where that holds a checkpoint, goes on from there."""
    args = resolve(args)
    envs, device = make_envs(args, args.num_envs, args.async_envs), args.device
    torch.compiler.reset()  # or a process that trains agent after agent would reach PyTorch's limit of compilations
    torch.manual_seed(args.seed)
    space, obs_dim = envs.single_action_space, math.prod(envs.single_observation_space.shape)
    agent = Agent(obs_dim, math.prod(space.shape), replace(args, resume=None))
    buffer = ReplayBuffer(args.buffer_size, *agent.dims, device)
    first, warmup, best = 0, math.ceil(args.learning_starts / args.num_envs), -math.inf
    if (run_dir / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(run_dir)
        if other := {k for k, v in vars(agent.args).items() if v != checkpoint["args"].get(k, v)} - FREE:
            raise ValueError(f"{run_dir} was made with other arguments: {', '.join(other)}")
        first, best = checkpoint["step"], checkpoint["best"]
        agent.load_state_dict(checkpoint["agent"])
        agent.optimizer.load_state_dict(deepcopy(checkpoint["optimizer"]))
        buffer.add(*checkpoint["rows"])
        buffer.count = checkpoint["count"]
        del checkpoint  # or its file, replaced by the next checkpoint, would keep its disk space
    last = max(first, args.total_timesteps // args.num_envs)
    run_dir.mkdir(parents=True, exist_ok=True)
    commit = os.popen(f'git -C "{Path(__file__).parent}" describe --always --dirty 2>&1').read().strip()
    (run_dir / "args.json").write_text(json.dumps(asdict(args) | {"commit": commit}, indent=2))
    (run_dir / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
    writer = SummaryWriter(run_dir, purge_step=first * args.num_envs + 1)  # strikes out what a killed run wrote later
    pace = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
    bar = tqdm(range(first, last), args.env_id, last, initial=first, unit=" steps", unit_scale=args.num_envs, **pace)
    print(f"{run_dir}: {last - warmup:,} updates on {device}{'; the first compile for a minute or two' * args.compile}")
    print(f"the replay buffer takes up to {sum(x.nbytes for x in buffer.data) / 1e9:.2f} GB")
    print(f"all environments are reset every {args.checkpoint_interval} updates; longer episodes never end: {LIMIT}")
    with closing(envs), writer, bar:
        for step in chain(bar, [last]):
            # Save, and start everything anew from (seed, step): a run that is resumed here does just what this one does
            update, global_step = step - warmup, (step + 1) * args.num_envs
            if step in (first, last) or (update > 0 and update % args.checkpoint_interval == 0):
                writer.flush()
                check_finite(step * args.num_envs, agent.state_dict())
                rows = [torch.from_numpy(x[: buffer.count].cpu().numpy()) for x in buffer.data]  # x[:n] would save x
                state = {"rows": rows, "count": buffer.count, "optimizer": agent.optimizer.state_dict()}
                save(run_dir / "checkpoint.pt", agent, step=step, best=best, **state)
                if step == last:
                    break
                seed = int(np.random.SeedSequence((args.seed, step)).generate_state(1)[0] >> 2)  # some take just 31
                [set_seed(seed) for set_seed in (random.seed, np.random.seed, torch.manual_seed)]
                obs, _ = envs.reset(seed=seed)
                returns, finished, stats = np.zeros(args.num_envs), [], {}
            # Act
            action = agent.act(obs) if update >= 0 else 2 * torch.rand(args.num_envs, agent.dims[1], device=device) - 1
            # Step
            next_obs, reward, terminated, truncated, infos = envs.step(to_env(action, space))
            successor, done = next_obs.copy(), terminated | truncated
            if done.any():  # these have been reset already
                successor[done] = np.stack(infos["final_obs"][done])
            check_finite(global_step, {"obs[{}]": np.c_[obs, successor], "actions[{}]": action, "rewards[{}]": reward})
            # Store
            buffer.add(obs, action, reward, successor, terminated)
            obs, returns = next_obs, returns + reward
            finished += returns[done & (update >= 0)].tolist()
            returns[done] = 0.0
            if update < 0:
                continue
            # Update
            stats |= agent.update(buffer.sample(args.batch_size), update)
            # Log
            if (update + 1) % 100 == 0 or step + 1 == last:
                check_finite(global_step, stats)
                stats |= {"alpha": agent.log_alpha.exp(), "exploration_noise_std": agent.noise_std()}
                for name, value in stats.items():  # qf{}_loss: qf1_loss and qf2_loss
                    for i, number in enumerate(value.flatten().tolist(), start=1):
                        writer.add_scalar(f"losses/{name.format(i)}", number, global_step)
                sps = args.num_envs * (step + 1 - first) / bar.format_dict["elapsed"]
                writer.add_scalar("charts/SPS", sps, global_step)
                writer.add_scalar("charts/updates", update + 1, global_step)
                if finished:
                    writer.add_scalar("charts/episodic_return", np.mean(finished), global_step)
                finished, stats = [], {}
            # Evaluate
            if args.eval_episodes and ((update + 1) % args.eval_interval == 0 or step + 1 == last):
                _, scores = evaluate(agent.policy, args, 1000 * args.seed + step)  # episodes of its own
                for name, score in scores.items():
                    writer.add_scalar(f"eval/{name}", score, global_step)
                score = "evaluation {episodic_return:.1f} +- {episodic_return_std:.1f}".format(**scores)
                tqdm.write(f"{global_step:,} steps: {score}")
                bar.set_postfix_str(score, refresh=False)
                if scores["episodic_return"] > best:
                    best = scores["episodic_return"]
                    save(run_dir / "best.pt", agent, update=update + 1)


def run_command_line() -> None:
    """Does what the command line asks for. Whatever fails ends here, in one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the locale can write
    run_dir = None  # as long as there is none, what is wrong is the input
    try:
        args = tyro.cli(Args)
        if (folder := args.resume or args.evaluate) is not None:
            folder = Path(folder).parent if Path(folder).is_file() else Path(folder)
            saved = Args(**load_checkpoint(args.evaluate or folder / "checkpoint.pt")["args"])
            here = min(saved.device, Args.device)  # the CPU, where there is no CUDA
            args = tyro.cli(Args, default=replace(saved, device=here, compile=saved.compile and not args.evaluate))
            changed = {name for name, value in vars(args).items() if value != getattr(saved, name)}
            if refused := changed - FREE - ({"resume"} if args.resume else {"evaluate", "capture_video", "env_kwargs"}):
                raise ValueError(f"these cannot be changed in {folder}: {', '.join(refused)}")
            if args.resume and changed & {"seed", "device", "compile"}:
                print("from here on these are not the bits of the run without the change")
            args = resolve(args)
        if args.evaluate is not None:
            agent, video = load_agent(args.evaluate, args.device, args.compile), str(folder / "videos")
            returns, _ = evaluate(agent.policy, args, args.seed, video if args.capture_video else "")
            print(*(f"episode {i}: return {score:.1f}" for i, score in enumerate(returns, start=1)), sep="\n")
            print(f"{args.env_id}, {len(returns)} episodes: {returns.mean():.1f} +- {returns.std():.1f} (mean +- std)")
        else:
            name = f"{args.env_id.split(':')[-1]}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
            run_dir = folder or Path("runs", name.replace("/", "_"))
            main(replace(args, resume=None), run_dir)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        disk = f" {error.__context__ or ''}" * (type(error) is RuntimeError)  # torch.save hides what the disk said
        message = f"{type(error).__name__}: {error}{disk}"
        if begun := run_dir is not None and run_dir.exists():
            with suppress(OSError):  # on a full disk
                [file.unlink() for file in run_dir.glob("*.tmp")]
                (run_dir / "error.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            message += f" (more in {run_dir}/error.txt); the last checkpoint stays, --resume {run_dir} goes on from it"
        print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1 if begun else 2)


if __name__ == "__main__":
    run_command_line()
