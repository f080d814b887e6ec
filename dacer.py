"""DACER: Diffusion Actor-Critic with Entropy Regulator, in one file.

Y. Wang et al., "Diffusion Actor-Critic with Entropy Regulator", NeurIPS 2024 (arXiv:2405.15177). Critic: J. Duan et al.,
"Distributional Soft Actor-Critic with Three Refinements" (arXiv:2310.05858).

The policy is the reverse process of a diffusion model; it denoises x_T ~ N(0, I) in T steps, given the state s:

    x0_hat  = clip(x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_theta(x_t, s, t), -1, 1)
    x_{t-1} = x0_hat beta_t sqrt(abar_{t-1}) / (1 - abar_t)  +  x_t (1 - abar_{t-1}) sqrt(1 - beta_t) / (1 - abar_t)
              +  1[t > 1] sqrt(beta_t (1 - abar_{t-1}) / (1 - abar_t)) N(0, I)
    a       = clip(x_0 + alpha lambda N(0, I), -1, 1)                             exploration noise: off in evaluation

with abar_t = prod_{i <= t} (1 - beta_i). Unlike SAC's, alpha stands in no loss: it scales the exploration noise alone.

Every update, on a batch (s, a, r, s') and with all gradients at the parameters from before it:

    critics:  y = reward_scale r + gamma (1 - terminated) min_i m_i'(s', a'), a' ~ policy(s'), in the DSAC loss below
    policy:   minimise -min_i m_i(s, a), a ~ policy(s), through all T steps                        every 2nd update
    targets:  Polyak averages of the critics                                                       every 2nd update
    alpha:    log_alpha <- log_alpha - Adam(H - H_target), with H the policy's entropy, estimated by a Gaussian
              mixture fitted to 200 actions of each state                            every entropy_interval updates
"""

import atexit
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "dacer"

# ----------------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium task with a bounded Box action space; `module:Name-v0` imports your module first"""
    env_kwargs: str = "{}"
    """JSON object of keyword arguments for gymnasium.make, e.g. '{"use_contact_forces": true}'"""
    seed: int = 1
    """seed of networks, noise, replay samples and environments"""
    total_timesteps: int = 30_000_000
    """environment steps of the whole run, warm-up included"""
    num_envs: int = 20
    """parallel environments; each vector step is followed by one update"""
    async_envs: bool = False
    """simulate every environment in a process of its own, during the update; its transitions join the next batch"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one"""
    compile: bool = True
    """compile gradients and action sampling with torch.compile: a minute at the first start, then 1.4 to 2.2 times as fast"""
    tf32: bool = False
    """on CUDA: matrix products in TF32, faster and less precise"""
    exp_name: str = ALGORITHM
    """name of this experiment in the run's folder, runs/<env>__<exp_name>__<seed>__<time>"""

    diffusion_steps: int = 20
    """T, the number of denoising steps"""
    noise_scale: float | None = None
    """lambda, the exploration noise's std is alpha * lambda; None: the paper's for the task, else 0.1"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers; None: the paper's for the task, else 256 256 256"""
    learning_starts: int | None = None
    """warm-up: environment steps with uniform random actions; None: the paper's for the task, else 30,000"""
    learning_rate: float = 1e-4
    """Adam step size of policy and critics"""
    alpha_lr: float = 0.03
    """Adam step size of log_alpha"""
    entropy_interval: int | None = None
    """updates between two steps of log_alpha; None: the task's, else a 150th of the run's updates"""
    entropy_samples: int = 200
    """actions drawn per state for the entropy estimate"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer, in transitions"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak step of the target critics and of omega"""
    reward_scale: float = 0.2
    """rewards are multiplied by this before they are learned from"""
    policy_frequency: int = 2
    """policy and target critics are updated on every policy_frequency-th update"""

    eval_interval: int = 15_000
    """updates between two evaluations; one more follows the last update"""
    eval_episodes: int = 10
    """episodes per evaluation, without exploration noise"""
    checkpoint_interval: int = 15_000
    """updates between two checkpoints; each evaluation saves one too"""
    save_replay_buffer: bool = True
    """checkpoints hold the replay buffer; without it they are small, but a run cannot be resumed exactly"""
    resume: str | None = None
    """folder of an interrupted run to go on with; its arguments apply, of which only --total-timesteps may be raised"""
    evaluate: str | None = None
    """folder of a run whose policy is to be replayed on its task; of the others, only --device, --seed, --eval-episodes apply"""
    capture_video: bool = False
    """with --evaluate: record the first episode to <run>/videos (needs the package moviepy)"""


# What the paper sets per task (MultiGoal's are ours), by the task's name without its version.
DEFAULTS = {"noise_scale": 0.1, "hidden_sizes": (256, 256, 256), "learning_starts": 30_000}
TASKS = {
    "Humanoid": {"noise_scale": 0.15, "hidden_sizes": (512, 512, 512), "learning_starts": 200_000},
    "HalfCheetah": {"noise_scale": 0.15, "learning_starts": 200_000},
    "MultiGoal": {"entropy_interval": 1000},
}
BOUNDS = {
    "seed": (0, 2**32 - 1), "total_timesteps": (1, math.inf), "num_envs": (1, math.inf), "diffusion_steps": (1, math.inf),
    "noise_scale": (0.0, math.inf), "hidden_sizes": (1, math.inf), "learning_starts": (0, math.inf),
    "learning_rate": (0.0, math.inf), "alpha_lr": (0.0, math.inf), "entropy_interval": (1, math.inf),
    "entropy_samples": (3, math.inf), "batch_size": (1, math.inf), "buffer_size": (1, math.inf), "gamma": (0.0, 1.0),
    "tau": (0.0, 1.0), "reward_scale": (0.0, math.inf), "policy_frequency": (1, math.inf), "eval_interval": (1, math.inf),
    "eval_episodes": (1, math.inf), "checkpoint_interval": (1, math.inf),
}  # fmt: skip


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr and an exit code: for mistakes of the user, not of the code."""
    print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def check_bounds(args: Args) -> None:
    """Ends the program with a clear line if a number is out of its bounds."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or not all(least <= number <= most and math.isfinite(number) for number in numbers):
            wanted = f"{least} or more" if most == math.inf else f"between {least} and {most}"
            fail(f"--{name.replace('_', '-')} must be {wanted}, but it is {value}")


def find_device(device: str) -> str:
    """The device that `--device auto|cpu|cuda` means on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def num_iterations(args: Args) -> tuple[int, int]:
    """Vector steps of the warm-up, and updates after it (one per vector step)."""
    warmup = math.ceil(args.learning_starts / args.num_envs)
    return warmup, args.total_timesteps // args.num_envs - warmup


def resolve(args: Args) -> Args:
    """Checks the arguments and fills in those that depend on the task. Bad values end the program (exit code 2)."""
    task = re.sub(r"-v\d+$", "", args.env_id.split(":")[-1])
    filled = {**DEFAULTS, **TASKS.get(task, {})}
    args = dataclasses.replace(args, **{k: v for k, v in filled.items() if getattr(args, k) is None})
    check_bounds(args)
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size {args.buffer_size} cannot hold one step of --num-envs {args.num_envs} environments")
    updates = num_iterations(args)[1]
    if updates < 1:
        fail(f"--total-timesteps {args.total_timesteps} leaves no update after a warm-up of {args.learning_starts} steps; "
             "raise it, or lower --learning-starts")  # fmt: skip
    if args.async_envs and args.learning_starts < 1:
        fail("--async-envs needs --learning-starts 1 or more: the first update comes before its own transitions")
    entropy_interval = args.entropy_interval or max(1, round(updates / 150))
    return dataclasses.replace(args, device=find_device(args.device), entropy_interval=entropy_interval)


# -------------------------------------------------------------------------------------------------------- environments


def make_envs(
    args: Args, num_envs: int, asynchronous: bool = False, video_folder: Path | None = None
) -> gym.vector.VectorEnv:
    """Vector environment with flat observations. Done copies reset within the same step; `final_obs` keeps their end."""
    kwargs, main_process = json.loads(args.env_kwargs), os.getpid()

    def make_env(record: bool = False) -> gym.Env:
        if os.getpid() != main_process:  # a worker: it ends when the main process tells it to, also after Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)
        env = gym.make(args.env_id, **kwargs | ({"render_mode": "rgb_array"} if record else {}))
        if record:  # the first episode
            env = gym.wrappers.RecordVideo(env, str(video_folder), lambda episode: episode == 0, disable_logger=True)
        if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
            env = gym.wrappers.FlattenObservation(env)
        return env

    if asynchronous:  # at exit Python would end its workers by the signal that they ignore, and wait for ever
        atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])
    vectorize = gym.vector.AsyncVectorEnv if asynchronous else gym.vector.SyncVectorEnv
    makers = [partial(make_env, record=video_folder is not None and i == 0) for i in range(num_envs)]
    return vectorize(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def check_env(args: Args) -> None:
    """Ends the program with a clear line if the task cannot be made or its spaces cannot be learned with."""
    try:
        kwargs = json.loads(args.env_kwargs)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        fail(f"--env-kwargs must be a JSON object such as '{{\"key\": 1}}', but it is {args.env_kwargs!r}")
    try:
        envs = make_envs(args, num_envs=1)
    except Exception as error:  # noqa: BLE001 - whatever a user's own environment raises is the user's to read
        fail(f"cannot make --env-id {args.env_id} with --env-kwargs {args.env_kwargs}: {error}")
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    envs.close()
    if not isinstance(obs_space, gym.spaces.Box):
        fail(f"{args.env_id} has observations that do not flatten into one vector: {obs_space}")
    if not isinstance(action_space, gym.spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
        fail(f"{args.env_id} has the action space {action_space}; DACER needs a Box of real numbers")
    if not action_space.is_bounded():
        fail(f"{args.env_id} has unbounded actions, {action_space}; wrap it in gymnasium's RescaleAction or ClipAction")


def to_env(action: Tensor, space: gym.spaces.Box) -> np.ndarray:
    """Maps actions in [-1, 1]^d, (n, d), to the bounds of the environment's action space, (n, *space.shape)."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    action = action.cpu().numpy().reshape(-1, *space.shape)
    return np.clip(low + (action + 1.0) / 2.0 * (high - low), low, high).astype(space.dtype)


def check_finite(**quantities: np.ndarray) -> None:
    """FloatingPointError if one of these, (n, ...) for n environments, is NaN or too large for single precision."""
    for name, values in quantities.items():
        wrong = ~(np.abs(values) <= np.finfo(np.float32).max)  # NaN compares as false
        if wrong.any():
            i = wrong.reshape(len(wrong), -1).any(1).argmax()
            raise FloatingPointError(f"{name} {values[i][wrong[i]].flat[0]} from environment {i} of {len(wrong)}")


# ------------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    obs: Tensor  # (B, obs_dim)
    action: Tensor  # (B, d), in [-1, 1]
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, obs_dim), the true successor, also where an episode ended
    terminated: Tensor  # (B,), 1 where the task ended; a time limit does not count


class ReplayBuffer:
    """Ring buffer of the latest `capacity` transitions on `device`; untouched pages of it take no memory on a CPU."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str):
        shapes = Batch((obs_dim,), (act_dim,), (), (obs_dim,), ())
        self.data = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.capacity, self.device, self.position = capacity, device, 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device, where a CUDA graph reads it

    def add(self, *transitions: np.ndarray | Tensor) -> None:
        """Stores n transitions, given as the fields of `Batch` with n rows each."""
        n = len(transitions[0])
        rows = torch.arange(self.position, self.position + n, device=self.device) % self.capacity
        for stored, new in zip(self.data, transitions):
            stored[rows] = torch.as_tensor(new, device=self.device).to(stored.dtype)
        self.position = (self.position + n) % self.capacity
        self.size.add_(n).clamp_(max=self.capacity)

    def sample(self, batch_size: int) -> Batch:
        rows = (torch.rand(batch_size, dtype=torch.float64, device=self.device) * self.size).long()
        return Batch(*(stored[rows] for stored in self.data))

    def state_dict(self) -> dict[str, Any]:
        """The stored transitions and the position in the ring, for a checkpoint."""
        size = int(self.size)  # through NumPy, since torch.save would write the whole of a sliced tensor
        return {"position": self.position, "data": [torch.from_numpy(x[:size].cpu().numpy()) for x in self.data]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Brings back what `state_dict` gave; RuntimeError if its sizes are others."""
        self.position = state["position"]
        self.size.fill_(len(state["data"][0]))
        for stored, rows in zip(self.data, state["data"]):
            stored[: len(rows)] = rows


# -------------------------------------------------------------------------------------------------- policy and critics

TIME_DIM = 16  # of the time embedding


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Linear layer; weights from a normal of std 1/sqrt(fan_in) cut at 2 std, zero bias (the official initialisation)."""
    layer = nn.Linear(fan_in, fan_out)
    std = 1.0 / math.sqrt(fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2.0 * std, b=2.0 * std)
    nn.init.zeros_(layer.bias)
    return layer


class Mish(torch.autograd.Function):
    """mish(x) = x tanh(softplus(x)) = x n / (n + 2), n = e^x (e^x + 2): compiled, a fifth of F.mish's time on a CPU."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        e = x.clamp(max=20.0).exp()  # beyond 20 the quotient is 1
        n = e * (e + 2)
        return x * (n / (n + 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x = x.clamp(max=20.0)
        e = x.exp()
        n = e * (e + 2)
        r = 1 / (n + 2)
        return grad * (n * r + x * (4 * e * (e + 1) * r * r))


class MishLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Mish.apply(x)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with Mish between them."""
    layers = [module for fan_in, fan_out in pairwise(sizes) for module in (linear(fan_in, fan_out), MishLayer())]
    return nn.Sequential(*layers[:-1])


class DiffusionPolicy(nn.Module):
    """The reverse process of a variance-preserving diffusion as a policy.

    `t` is the ZERO-BASED step throughout: t = T - 1 denoises x_T, t = 0 yields x_0.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...], diffusion_steps: int):
        super().__init__()
        self.dims, self.T = (obs_dim, act_dim, TIME_DIM), diffusion_steps
        self.time_mlp = mlp(TIME_DIM, 2 * TIME_DIM, TIME_DIM)
        self.eps_in = linear(sum(self.dims), hidden_sizes[0])  # on [s, x_t, time embedding]
        self.eps_out = nn.Sequential(MishLayer(), mlp(*hidden_sizes, act_dim))

        k = torch.arange(self.T, dtype=torch.float64)  # the paper's t - 1
        b_min, b_max = 0.1, 10.0
        beta = 1 - torch.exp(-b_min / self.T - (b_max - b_min) * (2 * k + 1) / (2 * self.T**2))
        abar = torch.cumprod(1 - beta, 0)
        abar_prev = F.pad(abar[:-1], (1, 0), value=1.0)
        x0_from_xt, x0_from_eps = abar.rsqrt(), (1 / abar - 1).sqrt()
        mean_from_x0 = beta * abar_prev.sqrt() / (1 - abar)
        mean_from_xt = (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar)
        std = (beta * (1 - abar_prev) / (1 - abar)).sqrt()  # 0 at t = 0
        schedule = torch.stack([x0_from_xt, x0_from_eps, mean_from_x0, mean_from_xt, std], -1)  # (T, 5)
        self.register_buffer("schedule", schedule.float(), persistent=False)
        phase = k[:, None] * 10_000.0 ** -(torch.arange(TIME_DIM // 2) / (TIME_DIM // 2))  # (T, TIME_DIM / 2)
        embedding = torch.cat([phase.sin(), phase.cos()], -1) / math.sqrt(TIME_DIM)  # (T, TIME_DIM)
        self.register_buffer("time_embedding", embedding.float(), persistent=False)

    def context(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """What of the first layer stays the same along a chain: its products with s (..., H) and every time (T, H)."""
        w_obs, _, w_time = self.eps_in.weight.split(self.dims, 1)
        return F.linear(obs, w_obs, self.eps_in.bias), F.linear(self.time_mlp(self.time_embedding), w_time)

    def noise_net(self, from_context: Tensor, x: Tensor) -> Tensor:
        """eps_theta (..., d) from the first layer's products with state and time (..., H), and x (..., d)."""
        return self.eps_out(from_context + F.linear(x, self.eps_in.weight.split(self.dims, 1)[1]))

    def denoise_step(self, from_obs: Tensor, from_time: Tensor, x: Tensor, noise: Tensor, schedule: Tensor) -> Tensor:
        """x_{t-1} (..., d) from x_t and noise (..., d), with step t's rows of `from_time` and `schedule`."""
        x0_from_xt, x0_from_eps, mean_from_x0, mean_from_xt, std = schedule.unbind()
        x0 = (x0_from_xt * x - x0_from_eps * self.noise_net(from_obs + from_time, x)).clamp(-1, 1)
        return mean_from_x0 * x0 + mean_from_xt * x + std * noise

    def denoise(self, context: tuple[Tensor, Tensor], noise: Tensor) -> list[Tensor]:
        """The chain [x_T, ..., x_0] from normals (T + 1, ..., d): x_T, then each step's; the last step has std 0."""
        from_obs, from_time = context
        chain = [noise[0].clone()]  # (..., d); a copy, as the inputs of a compiled region may not overlap
        for t in reversed(range(self.T)):
            chain.append(self.denoise_step(from_obs, from_time[t], chain[-1], noise[self.T - t], self.schedule[t]))
        return chain

    def draw_noise(self, *rows: int, generator: torch.Generator | None = None) -> Tensor:
        """The standard normals of one call of `forward`: (T + 1, *rows, d), the last is the exploration noise."""
        device = self.time_embedding.device
        return torch.randn(self.T + 1, *rows, self.dims[1], device=device, generator=generator)

    def forward(self, obs: Tensor, noise: Tensor, noise_std: float | Tensor = 0.0) -> Tensor:
        """Actions (..., d) in [-1, 1] for obs (..., obs_dim); `noise` from draw_noise, noise_std = alpha * lambda."""
        return (self.denoise(self.context(obs), noise)[-1] + noise_std * noise[-1]).clamp(-1, 1)


class TwinCritic(nn.Module):
    """Two independent distributional critics: each gives the mean and std of the return's distribution."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *hidden_sizes, 2)
        self.q2 = mlp(obs_dim + act_dim, *hidden_sizes, 2)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Means and stds, (2, B) each, for obs (B, obs_dim) and actions (B, d)."""
        x = torch.cat([obs, action], -1)
        out = torch.stack([self.q1(x), self.q2(x)])  # (2, B, 2)
        return out[..., 0], F.softplus(out[..., 1])


# ------------------------------------------------------------------------------------------------- entropy of the policy


NUM_COMPONENTS = 3  # K, of the mixture


def kmeans(x: Tensor, trials: int = 3, max_iterations: int = 20) -> Tensor:
    """Clusters the samples x (S, n, d) of each state: (S, K, n), 1 for members. Greedy k-means++, then Lloyd's steps."""
    states = torch.arange(len(x), device=x.device)
    centres = x[:, :1]  # (S, k, d); the samples are in no order, the first is as good as any
    nearest = torch.cdist(centres, x)[:, 0].square()  # (S, n), squared distance to the nearest centre
    for _ in range(NUM_COMPONENTS - 1):
        # Candidates are drawn with probability ~ `nearest`; the one that lowers its sum most becomes a centre
        mass = nearest.cumsum(-1)[:, None]  # (S, 1, n)
        draw = torch.rand(len(x), trials, 1, device=x.device) * mass[..., -1:]
        candidates = x[states[:, None], (mass <= draw).sum(-1).clamp(max=x.shape[1] - 1)]  # (S, trials, d)
        lowered = torch.minimum(torch.cdist(candidates, x).square(), nearest[:, None])  # (S, trials, n)
        best = lowered.sum(-1).argmin(-1)
        centres, nearest = torch.cat([centres, candidates[states, best][:, None]], 1), lowered[states, best]
    for _ in range(max_iterations):
        closeness = centres @ x.mT - 0.5 * centres.square().sum(-1, keepdim=True)  # (S, K, n), up to a term of x alone
        closest = closeness == closeness.amax(1, keepdim=True)
        member = (closest & (closest.cumsum(1) == 1)).to(x.dtype)  # of equally close centres, the first
        count = member.sum(-1, keepdim=True)
        previous, centres = centres, torch.where(count > 0, member @ x / count.clamp(min=1), centres)
        if torch.equal(previous, centres):
            break
    return member


def mixture_entropy(actions: Tensor, max_iterations: int = 100, tolerance: float = 1e-3, floor: float = 1e-6) -> Tensor:
    """Estimated entropy (S,), in nats, of the S distributions that the samples `actions` (S, n, d) were drawn from.

    Fits a full-covariance Gaussian mixture to each state's samples, in one batched EM, and returns DACER's estimate
    H = sum_k w_k (-log w_k + 0.5 log((2 pi e)^d |Sigma_k|)), an upper bound of the mixture's entropy that is exact where its
    components do not overlap. `floor` is added to the diagonal of every covariance. A state stops when its mean
    log-likelihood changes by less than `tolerance`: going on would lower its entropy.
    """
    S, n, d = actions.shape
    resp = kmeans(actions.float()).double()  # responsibilities (S, K, n)
    x = actions.double().mT  # (S, d, n); in single precision, thin covariances would fail
    x = x - x.mean(-1, keepdim=True)
    # Both steps of EM are linear in these features of a sample: 1, x, and the products x_i x_j of i <= j
    i, j = torch.triu_indices(d, d, device=x.device)
    features = torch.cat([torch.ones_like(x[:, :1]), x, x[:, i] * x[:, j]], 1)  # (S, f, n)
    times = torch.where(i == j, 1.0, 2.0)  # that x_i x_j occurs in a quadratic form
    square = torch.zeros(d, d, dtype=torch.long, device=x.device)  # from the products to a symmetric matrix
    square[i, j] = square[j, i] = torch.arange(len(i), device=x.device)
    eye = torch.eye(d, device=x.device, dtype=x.dtype)
    entropy, states = x.new_zeros(S), torch.arange(S, device=x.device)
    moving = torch.ones(S, dtype=torch.bool, device=x.device)
    likelihood, change = x.new_full((S,), -math.inf), x.new_full((S,), math.inf)
    for _ in range(max_iterations + 1):
        # M-step: weights (S, K), means (S, K, d), Cholesky factors of the covariances (S, K, d, d)
        sums = (features @ resp.mT).mT  # (S, K, f); in this order up to twice as fast
        count = sums[..., 0] + 1e-12
        moments = sums[..., 1:] / count[..., None]
        weight, mean, second = count / n, moments[..., :d], moments[..., d:][..., square]
        covariance = second - mean[..., None] * mean[..., None, :]
        factor = torch.linalg.cholesky(covariance + floor * eye)
        half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (S, K)
        h = 0.5 * d * math.log(2 * math.pi * math.e) + half_log_det
        entropy[states] = torch.where(moving, (torch.special.entr(weight) + weight * h).sum(-1), entropy[states])
        moving &= change.abs() >= tolerance
        if not moving.any():
            break
        # E-step: log(w_k N(x; mu_k, Sigma_k)) (S, K, n) and responsibilities
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        precision = inverse.mT @ inverse
        slope = (precision @ mean[..., None])[..., 0]  # (S, K, d)
        offset = weight.log() - half_log_det - 0.5 * ((slope * mean).sum(-1) + d * math.log(2 * math.pi))
        form = torch.cat([offset[..., None], slope, -0.5 * times * precision[..., i, j]], -1)  # (S, K, f)
        log_prob = form @ features
        resp = log_prob.softmax(1)
        log_sum = log_prob.amax(1) - resp.amax(1).log()  # (S, n), log sum_k exp(log_prob): the log-likelihoods
        change, likelihood = log_sum.mean(-1) - likelihood, log_sum.mean(-1)
        if 2 * moving.sum() < len(moving):  # drop the states that have stopped
            features, resp, states = features[moving], resp[moving], states[moving]
            change, likelihood, moving = change[moving], likelihood[moving], moving[moving]
    return entropy.float()


# -------------------------------------------------------------------------------------------------- losses and update

WHOLE_GRAPH_STEPS = 10  # the largest T whose losses and gradients are compiled as one graph


class Draws(NamedTuple):
    """All random numbers of one update, so that a recorded update can be replayed."""

    next_noise: Tensor  # (T + 1, B, d), of the target action
    z: Tensor  # (2, B), of the target critics' return samples, clipped at 3
    noise: Tensor  # (T + 1, B, d), of the policy loss's action


class Agent(nn.Module):
    """All that learns: policy, critics, target critics, log_alpha, omega, and their optimizers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.args, self.obs_dim, self.act_dim = args, obs_dim, act_dim
        self.policy = DiffusionPolicy(obs_dim, act_dim, args.hidden_sizes, args.diffusion_steps)
        self.critic = TwinCritic(obs_dim, act_dim, args.hidden_sizes)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(3.0)))
        self.register_buffer("omega", torch.zeros(2))  # running mean of the critics' stds; 0: not yet set
        self.target_entropy = -0.9 * act_dim
        self.to(args.device)
        adam = partial(torch.optim.Adam, fused=True, capturable=args.device == "cuda")
        self.policy_optimizer = adam(self.policy.parameters(), args.learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.learning_rate)
        self.alpha_optimizer = adam([self.log_alpha], args.alpha_lr)
        self.optimizers = self.policy_optimizer, self.critic_optimizer, self.alpha_optimizer  # in a checkpoint's order
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, options={"size_asserts": False})
        compiled = compiled if args.compile else lambda function: function
        if args.compile and args.diffusion_steps <= WHOLE_GRAPH_STEPS:  # all gradients as one graph: a tenth faster
            with_autograd = torch._dynamo.config.patch(trace_autograd_ops=True)
            self.gradients = with_autograd(compiled(self.gradients))
        elif args.compile:  # that graph would take minutes to compile: each loss by itself, the chain's step just once
            step = self.policy.denoise_step
            self.policy.denoise_step = torch.compiler.nested_compile_region(lambda *inputs: step(*inputs))
            self.critic_loss, self.policy_loss = compiled(self.critic_loss), compiled(self.policy_loss)
        self.sample_actions = compiled(self.policy.forward)

    def noise_std(self) -> Tensor:
        """Standard deviation alpha * lambda of the exploration noise."""
        return self.log_alpha.detach().exp() * self.args.noise_scale

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> Tensor:
        """Actions (n, d) with exploration noise for obs (n, obs_dim)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.args.device)
        return self.sample_actions(obs, self.policy.draw_noise(len(obs)), self.noise_std())

    def draw(self, batch_size: int) -> Draws:
        """The random numbers of one update."""
        z = torch.randn(2, batch_size, device=self.args.device).clamp(-3, 3)
        return Draws(self.policy.draw_noise(batch_size), z, self.policy.draw_noise(batch_size))

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of both critics' losses (DSAC with three refinements), the new omega (2,), and statistics."""
        args = self.args
        with torch.no_grad():
            next_action = self.policy(batch.next_obs, draws.next_noise, self.noise_std())
            next_mean, next_std = self.target_critic(batch.next_obs, next_action)  # (2, B)
            smaller = next_mean.argmin(0, keepdim=True)  # (1, B), per sample the more pessimistic critic
            next_z = next_mean + next_std * draws.z
            bootstrap = args.gamma * (1 - batch.terminated)
            y = args.reward_scale * batch.reward + bootstrap * next_mean.gather(0, smaller)  # (1, B)
            y_z = args.reward_scale * batch.reward + bootstrap * next_z.gather(0, smaller)

        mean, std = self.critic(batch.obs, batch.action)  # (2, B)
        with torch.no_grad():
            # Ascent on log N(y; m, sigma), whose slopes are (y - m) / sigma^2 in m, ((m - y)^2 - sigma^2) / sigma^3 in sigma.
            # The three refinements: the mean follows the expected target y, and only the std follows a sampled one, cut at
            # m +- 3 omega (y_b); y is the smaller critic's; omega^2 undoes the division by sigma^2, by which steps would
            # depend on the scale of the rewards. Only the loss's gradient has a meaning, not its value.
            m, s, mean_std = mean.detach(), std.detach(), std.mean(1)
            omega = torch.where(self.omega == 0, mean_std, torch.lerp(self.omega, mean_std, args.tau))  # (2,)
            bound = 3 * omega[:, None]
            y_b = m + (y_z - m).clamp(-bound, bound)
            mean_slope = (y - m) / (s**2 + 0.1)
            std_slope = ((m - y_b) ** 2 - s**2) / (s**3 + 0.1)
        loss = -(omega**2 + 0.1) * (mean * mean_slope + std * std_slope).mean(1)  # (2,)
        stats = {"qf{}_loss": loss.detach(), "qf{}_values": m.mean(1), "qf{}_std": mean_std, "omega{}": omega}
        return loss.sum(), omega, stats

    def fixed_critic(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The critics' means and stds, (2, B) each; gradients flow to the action, but not to the critics' parameters."""
        parameters = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, parameters, (obs, action))

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """L_q = -mean min(m_1, m_2)(s, a) of actions with exploration noise, and statistics."""
        action = self.policy(batch.obs, draws.noise, self.noise_std())
        loss = -self.fixed_critic(batch.obs, action)[0].amin(0).mean()
        return loss, {"actor_loss": loss.detach()}

    @torch.no_grad()
    def entropy(self, obs: Tensor) -> Tensor:
        """Mean entropy, in nats, of the policy with exploration noise in the states obs (B, obs_dim)."""
        actions = []
        for part in obs.split(32):  # all at once would not fit a CPU's cache
            noise = self.policy.draw_noise(len(part), self.args.entropy_samples)
            actions.append(self.sample_actions(part[:, None], noise, self.noise_std()))
        return mixture_entropy(torch.cat(actions)).mean()

    def gradients(
        self, batch: Batch, draws: Draws, delayed: bool
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, dict[str, Tensor]]:
        """Gradients of the critics' loss and, if `delayed`, of the policy's, by parameter; new omega (2,); statistics."""
        loss, omega, stats = self.critic_loss(batch, draws)
        critic_gradients, policy_gradients = torch.autograd.grad(loss, list(self.critic.parameters())), ()
        if delayed:
            loss, policy_stats = self.policy_loss(batch, draws)
            policy_gradients = torch.autograd.grad(loss, list(self.policy.parameters()))
            stats = stats | policy_stats
        return critic_gradients, policy_gradients, omega, stats

    def update(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        """One update of policy, critics and targets, the `step`-th from 0. Returns statistics.

        All gradients are taken before the first parameter moves: the policy is judged by the critics from before.
        """
        delayed = step % self.args.policy_frequency == 0
        critic_gradients, policy_gradients, omega, stats = self.gradients(batch, draws, delayed)
        self.omega.copy_(omega)
        for network, its_gradients in ((self.critic, critic_gradients), (self.policy, policy_gradients)):
            for parameter, gradient in zip(network.parameters(), its_gradients):  # the policy has none if not delayed
                parameter.grad = gradient.contiguous()  # fused Adam takes that for granted
        if delayed:
            self.policy_optimizer.step()
        self.critic_optimizer.step()
        if delayed:
            with torch.no_grad():
                targets, critics = list(self.target_critic.parameters()), list(self.critic.parameters())
                torch._foreach_lerp_(targets, critics, self.args.tau)
        return stats

    def update_alpha(self, entropy: Tensor) -> dict[str, Tensor]:
        """One step of log_alpha, given the policy's entropy from before the update that it goes with."""
        self.alpha_optimizer.zero_grad()
        (self.log_alpha * (entropy - self.target_entropy)).backward()
        self.alpha_optimizer.step()
        return {"entropy": entropy}


class GraphedUpdates:
    """Replays whole updates as CUDA graphs, one with the policy's part and one without: Python launches nothing.

    The first three updates of either kind run as they are, as PyTorch demands; capturing one does not execute it.
    """

    def __init__(self, update: Callable[[int], dict[str, Tensor]], policy_frequency: int):
        self.update, self.policy_frequency = update, policy_frequency
        self.calls, self.graphs = {True: 0, False: 0}, {}

    def __call__(self, step: int) -> dict[str, Tensor]:
        delayed = step % self.policy_frequency == 0
        self.calls[delayed] += 1
        if self.calls[delayed] <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                stats = self.update(step)
            torch.cuda.current_stream().wait_stream(stream)
            return stats
        if delayed not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                stats = self.update(step)
            self.graphs[delayed] = graph, stats
        graph, stats = self.graphs[delayed]
        graph.replay()
        return stats


# ------------------------------------------------------------------------------------- evaluation, logging, checkpoints


def make_actor(policy: DiffusionPolicy, space: gym.spaces.Box, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The trained policy as a function: flat observations (n, obs_dim) to actions (n, *space.shape) of the environment.

    Without exploration noise. Draws from a generator of its own, so that evaluating does not disturb the training.
    """
    device = policy.time_embedding.device
    generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        noise = policy.draw_noise(len(obs), generator=generator)
        return to_env(policy(torch.as_tensor(obs, dtype=torch.float32, device=device), noise), space)

    return act


def evaluate(act: Callable[[np.ndarray], np.ndarray], envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """Returns (num_envs,) of one whole episode in each copy; `act` as from make_actor."""
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(envs.num_envs).tolist())
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(act(obs))
        returns += reward * running
        running &= ~(terminated | truncated)
    check_finite(**{"return": returns})
    return returns


def loss_scalars(stats: dict[str, Tensor]) -> dict[str, float]:
    """An update's statistics as curves; of a vector, with `{}` in its name, each entry, counted from 1."""
    return {f"losses/{k.format(i)}": x for k, v in stats.items() for i, x in enumerate(v.reshape(-1).tolist(), start=1)}


def write_args(run_dir: Path, args: Args) -> None:
    """Writes <run>/args.json; through a temporary file, so that it is complete at every instant."""
    (run_dir / "args.json.tmp").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    os.replace(run_dir / "args.json.tmp", run_dir / "args.json")


def make_run_dir(args: Args) -> Path:
    """New folder runs/<env>__<exp_name>__<seed>__<time> with the arguments in force and this script's source.

    Ends the program with a clear line if it cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", args.env_id.split(":")[-1]) + f"__{args.exp_name}__{args.seed}"
    run_dir = Path("runs") / f"{name}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        run_dir.mkdir(parents=True)
        write_args(run_dir, args)
        shutil.copy(__file__, run_dir)
    except OSError as error:
        fail(f"cannot write to {run_dir}: {error}")
    return run_dir


def random_states(device: str) -> dict[str, Any]:
    """The states of all global random generators."""
    name, keys, *rest = np.random.get_state()
    cuda = {"cuda": torch.cuda.get_rng_state()} if device == "cuda" else {}
    return {"torch": torch.get_rng_state(), "numpy": (name, keys.tolist(), *rest), "python": random.getstate(), **cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Puts the global random generators into these states."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


VERSION = 1  # of the layout of a checkpoint


def load_checkpoint(run_dir: str | Path) -> dict[str, Any]:
    """The checkpoint in a run's folder, on the CPU; ValueError if there is none to use. Executes no code from the file."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"there is no checkpoint in {run_dir}: {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes one, with checksums that torch.load ignores
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        algorithm, version = checkpoint["algorithm"], checkpoint["version"]
        if missing := {"args", "update", "obs_dim", "act_dim", "agent"} - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except pickle.UnpicklingError as error:
        raise ValueError(f"cannot read the checkpoint {path}: it holds objects whose loading could run code") from error
    except Exception as error:  # a broken file fails in many ways
        raise ValueError(f"cannot read the checkpoint {path}: {type(error).__name__}: {error}") from error
    if algorithm != ALGORITHM:
        raise ValueError(f"{path} is of {algorithm}, not of {ALGORITHM}; use {algorithm}.py")
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, not {VERSION}; use the copy of the script in {run_dir}")
    return checkpoint


def can_compile(device: str) -> bool:
    """Whether torch.compile works here (it needs a C++ compiler on a CPU, Triton on CUDA); prints one line if not."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is missing, training works without
        if STOP:  # Ctrl-C reached the compiler too
            raise SystemExit(128 + STOP[0]) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"torch.compile does not work here; going on without, more slowly ({reason})")
        return False
    return True


def load_agent(run_dir: str | Path, device: str = "cpu", compile: bool = False) -> Agent:
    """The trained agent of a run's folder; ValueError if there is none. Executes no code from the file.

    `compile`: the policy is compiled at its first call with each number of observations (up to 8), in 5 to 15 seconds.
    """
    checkpoint = load_checkpoint(run_dir)
    try:
        args = Args(**{**checkpoint["args"], "device": device, "compile": False})
        agent = Agent(checkpoint["obs_dim"], checkpoint["act_dim"], args)
        agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # a file that was edited fails in many ways
        raise ValueError(f"cannot read the checkpoint in {run_dir}: {type(error).__name__}: {error}") from error
    if compile and can_compile(device):
        options = {"cpp_wrapper": True, "size_asserts": False}  # for single actions, Python's part counts
        agent.policy.forward = torch.compile(agent.policy.forward, dynamic=False, options=options)
    return agent


# --------------------------------------------------------------------------------------------------------------- main

LOG_INTERVAL = 100  # updates
ENV_TIMEOUT = 600  # seconds that asynchronous environments have for a step
STOP = []  # the signal that asks the run to stop, once it came


def request_stop(signum: int, frame: Any) -> None:
    """Handles SIGINT and SIGTERM: the run saves a checkpoint after this update. A second one ends the program at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    STOP.append(signum)


class Run:
    """What surrounds the learning: environments, curves, checkpoints. Failures there end the program with one line."""

    def __init__(self, args: Args, run_dir: Path, envs: gym.vector.VectorEnv, agent: Agent, buffer: ReplayBuffer):
        self.args, self.run_dir, self.envs, self.agent, self.buffer = args, run_dir, envs, agent, buffer
        self.global_step, self.stats, self.bar = 0, {}, tqdm(disable=True)
        self.returns = np.zeros(args.num_envs)  # so far, of the episodes under way
        self.finished = []  # returns of the episodes that ended since the last log

    def open_curves(self, purge_step: int | None = None) -> None:
        """Begins to write curves; of what an interrupted run wrote, points from purge_step on are struck out."""
        try:
            self.lock_folder()
            write_args(self.run_dir, self.args)
            self.writer = SummaryWriter(self.run_dir, purge_step=purge_step)
        except OSError as error:
            self.stop(f"cannot write to {self.run_dir}: {error}")

    def lock_folder(self) -> None:
        """Ends the program if another process works in this folder; Windows and some file systems cannot tell."""
        self.lock = (self.run_dir / ".lock").open("w")  # locked until it is closed, or this process ends
        try:
            import fcntl

            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is working in {self.run_dir}")
        except (ImportError, OSError):
            pass

    def close(self) -> None:
        """Ends the progress bar and the curves; another process may go on with the run."""
        self.bar.close()
        for name in ("writer", "lock"):
            with suppress(OSError, AttributeError):  # on a full disk; or if it has not been opened yet
                getattr(self, name).close()

    def stop(self, message: str, code: int = 2) -> NoReturn:
        """Ends the program with one line."""
        for process in getattr(self.envs, "processes", []):  # they cannot be asked to close: one may be dead
            process.kill()
        self.envs.closed = True
        self.close()
        saved = (self.run_dir / "checkpoint.pt").is_file()
        fail(message + f"; the last checkpoint stays, --resume {self.run_dir} goes on from it" * saved, code)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within it, whatever the environments raise ends the program; the traceback goes to error.txt."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of a user's own environment that may be anything
            with suppress(OSError):
                (self.run_dir / "error.txt").write_text(traceback.format_exc())
            where = f"{self.args.env_id} failed at environment step {self.global_step}"
            self.stop(f"{where}: {type(error).__name__}: {error} (more in {self.run_dir}/error.txt)")

    def write(self, scalars: dict[str, float]) -> None:
        """Adds a point to each of these curves."""
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.global_step)
        except OSError as error:
            self.stop(f"cannot write to {self.run_dir}: {error}")

    def check_learning(self, **more: Tensor) -> None:
        """Ends the program if a loss or a weight, or one of `more`, is no longer finite."""
        numbers = self.stats | self.agent.state_dict() | more
        finite = torch.stack([value.isfinite().all() for value in numbers.values()])
        if not finite.all():
            wrong = [name.format(1) for name, good in zip(numbers, finite.tolist()) if not good]
            self.stop(f"NaN or infinity at environment step {self.global_step} in {', '.join(wrong[:4])}")

    def start_episodes(self, update: int) -> None:
        """Resets all environments to what the seed and `update` alone decide, whatever came before."""
        self.started, self.env_actions = update, []  # enough to repeat these episodes
        self.returns[:] = 0.0
        seeds = np.random.SeedSequence((self.args.seed, update)).generate_state(self.args.num_envs).tolist()
        random.seed(seeds[0]), np.random.seed(seeds[0])  # there are environments that draw from these
        with self.guarded():
            if self.args.async_envs:
                self.envs.reset_async(seed=seeds)
                self.obs, _ = self.envs.reset_wait(timeout=ENV_TIMEOUT)
            else:
                self.obs, _ = self.envs.reset(seed=seeds)

    def interact(self, action: Tensor, learn: Callable[[], None] = lambda: None) -> None:
        """One step of the environments with actions (n, d), whose transitions are stored, and then `learn()`.

        Asynchronous environments simulate while it learns, from a batch without these transitions.
        """
        env_action = to_env(action, self.envs.single_action_space)
        if not np.isfinite(env_action).all():
            self.check_learning(action=action)
        if self.args.async_envs:
            with self.guarded():
                self.envs.step_async(env_action)
            learn()
        with self.guarded():
            returned = self.envs.step_wait(timeout=ENV_TIMEOUT) if self.args.async_envs else self.envs.step(env_action)
            next_obs, reward, terminated, truncated, infos = returned
            successor, done = next_obs, terminated | truncated
            if done.any():  # those copies have been reset already, and their last observations are in final_obs
                successor = next_obs.copy()
                successor[done] = np.stack(infos["final_obs"][done])
            check_finite(reward=reward, observation=successor, reset_observation=next_obs)
        self.buffer.add(self.obs, action, reward, successor, terminated)
        self.env_actions.append(env_action)
        self.obs = next_obs
        self.returns += reward
        self.finished += self.returns[done].tolist()
        self.returns[done] = 0.0
        if not self.args.async_envs:
            learn()

    def save(self, update: int) -> None:
        """Writes checkpoint.pt, from which a resumed run goes on bit for bit; at every instant a complete one lies there.

        `update`: updates done, or minus the vector steps of the warm-up to come.
        """
        self.check_learning()
        episodes = {"started": self.started, "env_actions": torch.from_numpy(np.array(self.env_actions))}
        checkpoint = {
            "algorithm": ALGORITHM, "version": VERSION, "args": dataclasses.asdict(self.args), "update": update,
            "obs_dim": self.agent.obs_dim, "act_dim": self.agent.act_dim, "agent": self.agent.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.agent.optimizers],
            "global_step": self.global_step, "random": random_states(self.args.device), "episodes": episodes,
            "returns": self.returns.tolist(), "finished": self.finished, "stats": self.stats,
            "buffer": self.buffer.state_dict() if self.args.save_replay_buffer else None,
        }  # fmt: skip
        temporary = self.run_dir / "checkpoint.pt.tmp"
        try:
            self.writer.flush()  # or the curves would lack what the checkpoint is past
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.run_dir / "checkpoint.pt")
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            cause = error.__context__  # of torch.save's RuntimeError: the disk's own words
            self.stop(f"cannot write to {self.run_dir}: {cause if isinstance(cause, OSError) else error}")

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Brings back what `save` saved; copies all of it, as the tensors of a checkpoint lie in its file."""
        checkpoint = {name: value if name == "buffer" else deepcopy(value) for name, value in checkpoint.items()}
        try:
            self.agent.load_state_dict(checkpoint["agent"])
            for optimizer, state in zip(self.agent.optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            if checkpoint["buffer"] is not None:
                self.buffer.load_state_dict(checkpoint["buffer"])
        except (LookupError, RuntimeError, ValueError) as error:
            self.stop(f"cannot resume {self.run_dir}, sizes differ: {error}")
        self.global_step = checkpoint["global_step"]
        self.start_episodes(checkpoint["episodes"]["started"])
        for env_action in checkpoint["episodes"]["env_actions"].numpy():  # the same episodes, to where they were
            with self.guarded():
                self.obs, *_ = self.envs.step(env_action)
            self.env_actions.append(env_action)
        self.returns[:], self.finished = checkpoint["returns"], checkpoint["finished"]
        self.stats = {name: value.to(self.args.device) for name, value in checkpoint["stats"].items()}
        set_random_states(checkpoint["random"])
        if checkpoint["buffer"] is None:
            print("the checkpoint holds no replay buffer: the policy acts until there is one; not exactly the same run")
            for _ in range(max(1, num_iterations(self.args)[0])):
                self.interact(self.agent.act(self.obs))


def replay(args: Args) -> np.ndarray:
    """Returns (eval_episodes,) of the trained policy in the folder args.evaluate; prints them, records the first if asked."""
    check_bounds(args)
    try:
        agent = load_agent(args.evaluate, find_device(args.device))
    except ValueError as error:
        fail(str(error))
    check_env(agent.args)
    video_folder = Path(args.evaluate) / "videos" if args.capture_video else None
    try:
        envs = make_envs(agent.args, args.eval_episodes, video_folder=video_folder)
        returns = evaluate(make_actor(agent.policy, envs.single_action_space, args.seed), envs, args.seed)
    except Exception as error:  # noqa: BLE001 - whatever a user's own environment raises is the user's to read
        if video_folder is None:
            fail(f"{agent.args.env_id} failed: {type(error).__name__}: {error}")
        fail(f"cannot record a video: {error} (it needs moviepy, and MUJOCO_GL=egl where there is no display)")
    envs.close()
    for episode, episodic_return in enumerate(returns, start=1):
        print(f"episode {episode}: return {episodic_return:.1f}")
    env_id, episodes = agent.args.env_id, args.eval_episodes
    print(f"{env_id}, {episodes} episodes: {returns.mean():.1f} +- {returns.std():.1f} (mean +- std)")
    return returns


def resume(run_dir: str, command_line: list[str] | None = None) -> tuple[Args, dict[str, Any]]:
    """Arguments and checkpoint of an interrupted run, for main. Command-line arguments may not change what it computes."""
    try:
        checkpoint = load_checkpoint(run_dir)
        saved = Args(**{**checkpoint["args"], "resume": run_dir})
    except (ValueError, TypeError) as error:
        fail(f"cannot resume {run_dir}: {error}")
    needed = {"optimizers", "global_step", "random", "episodes", "returns", "finished", "stats", "buffer"}
    if not needed <= checkpoint.keys():
        fail(f"the checkpoint in {run_dir} holds the policy alone; it can be evaluated but not resumed")
    args = tyro.cli(Args, args=command_line, default=saved)
    for name, before in dataclasses.asdict(saved).items():
        now = getattr(args, name)
        if now != before and not (name == "total_timesteps" and now > before):
            option = f"--{name.replace('_', '-')}"
            fail(f"{option} {now} would change the run in {run_dir}, which has {before}; leave it out")
    return args, checkpoint


def main(args: Args, checkpoint: dict[str, Any] | None = None) -> Path:
    """Trains an agent and returns the folder of its run; `main(*resume(run_dir, []))` goes on with an old one."""
    if (args.resume is None) != (checkpoint is None):
        raise ValueError("a run is resumed by main(*resume(run_dir, []))")
    args = resolve(args)
    check_env(args)
    warmup, updates = num_iterations(args)
    # The warm-up's vector steps count up to zero, where the updates begin
    first = -warmup if checkpoint is None else checkpoint["update"]
    if first >= updates:
        print(f"the run in {args.resume} is complete; to go on, raise --total-timesteps above {args.total_timesteps}")
        return Path(args.resume)
    # Asynchronous environments fork, so before anything starts threads
    try:
        envs = make_envs(args, args.num_envs, asynchronous=args.async_envs)
        eval_envs = make_envs(args, args.eval_episodes)
    except Exception as error:  # noqa: BLE001 - whatever a user's own environment raises is the user's to read
        fail(f"cannot make {args.num_envs} environments {args.env_id}: {type(error).__name__}: {error}")
    torch.compiler.reset()  # or a process that trains agent after agent would reach PyTorch's limit of compilations
    run_dir = args.resume
    args = dataclasses.replace(args, compile=args.compile and can_compile(args.device), resume=None)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.manual_seed(args.seed)
    obs_dim, act_dim = envs.single_observation_space.shape[0], math.prod(envs.single_action_space.shape)
    agent = Agent(obs_dim, act_dim, args)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, args.device)
    if checkpoint is not None and (sizes := (checkpoint["obs_dim"], checkpoint["act_dim"])) != (obs_dim, act_dim):
        fail(f"{args.env_id} has (observations, actions) {obs_dim, act_dim}, the run to resume {sizes}")
    run = Run(args, Path(run_dir or make_run_dir(args)), envs, agent, buffer)
    by_task = ", ".join(f"{name} {getattr(args, name)}" for name in DEFAULTS)
    print(f"{args.env_id} on {args.device}: {by_task}, entropy_interval {args.entropy_interval}, {updates:,} updates")
    print(f"run folder: {run.run_dir}")
    if args.save_replay_buffer and (size := sum(stored.nbytes for stored in buffer.data)) > 1e9:
        print(f"a checkpoint takes up to {size / 1e9:.1f} GB; --no-save-replay-buffer leaves the replay buffer out")
    if args.compile:
        print("the first updates are compiled: a minute or so, or seconds if that was done here before")
    if checkpoint is None:
        run.open_curves()
        with suppress(OSError):  # of which the first checkpoint will tell
            run.writer.add_text("arguments", "\n".join(f"    {k} = {v}" for k, v in dataclasses.asdict(args).items()))
        run.start_episodes(0)
        run.save(first)
    else:
        run.open_curves(purge_step=checkpoint["global_step"] + 1)
        run.restore(checkpoint)
        checkpoint.clear()  # or its file, replaced by the next checkpoint, would keep its disk space
        print(f"resumed at environment step {run.global_step:,}, update {max(first, 0):,}")

    def update_networks(update: int) -> dict[str, Tensor]:
        return agent.update(buffer.sample(args.batch_size), agent.draw(args.batch_size), update)

    if args.device == "cuda" and args.compile:
        update_networks = GraphedUpdates(update_networks, args.policy_frequency)

    def learn(update: int) -> None:
        step_alpha = update % args.entropy_interval == 0
        entropy = agent.entropy(buffer.sample(args.batch_size).obs) if step_alpha else None
        run.stats |= update_networks(update)
        if step_alpha:
            run.stats |= agent.update_alpha(entropy)

    last_eval = ""
    if first < 0:
        done = {"total": warmup, "initial": warmup + first}
        run.bar = tqdm(desc="warm-up", **done, unit_scale=args.num_envs, unit=" steps", leave=False)
    for update in range(first, updates):
        run.global_step = (warmup + update + 1) * args.num_envs
        if update == max(first, 0):
            run.bar.close()
            run.bar = tqdm(desc=args.env_id, total=updates, initial=update, unit=" updates", smoothing=0.05)
            start = time.time()
        if update == 0:
            run.finished.clear()

        # Act, store, learn
        if update < 0:
            run.interact(2 * torch.rand(args.num_envs, act_dim, device=args.device) - 1)
        else:
            try:
                run.interact(agent.act(run.obs), partial(learn, update))
            except Exception:
                if STOP:  # it reached the compiler too, which is another process
                    run.stop(f"{signal.Signals(STOP[0]).name} while compiling", code=128 + STOP[0])
                raise
        run.bar.set_postfix_str(f"{run.global_step:,} env steps{last_eval}", refresh=False)
        run.bar.update()

        # Log
        if update >= 0 and (update % LOG_INTERVAL == 0 or update + 1 == updates):
            run.stats |= {"alpha": agent.log_alpha.detach().exp(), "exploration_noise_std": agent.noise_std()}
            sps = (update + 1 - max(first, 0)) * args.num_envs / (time.time() - start)
            episodes = {"charts/episodic_return": np.mean(run.finished)} if run.finished else {}
            run.write({**loss_scalars(run.stats), "charts/updates": update + 1, "charts/SPS": sps, **episodes})
            run.finished.clear()
            run.check_learning()

        # Evaluate
        evaluated = update >= 0 and ((update + 1) % args.eval_interval == 0 or update + 1 == updates)
        if evaluated:
            act = make_actor(agent.policy, eval_envs.single_action_space, args.seed + update)
            with run.guarded():
                returns = evaluate(act, eval_envs, args.seed + update)
                scores = {"episodic_return": returns.mean(), "episodic_return_std": returns.std()}
                if hasattr(eval_envs.envs[0].unwrapped, "policy_report"):  # a task may measure policies in its own way
                    scores |= eval_envs.envs[0].unwrapped.policy_report(act)
            run.write({f"eval/{name}": score for name, score in scores.items()})
            last_eval = f", evaluation {returns.mean():.1f} +- {returns.std():.1f}"

        # Save; all environments start anew, as they do in a run resumed from here
        if evaluated or (update >= 0 and (update + 1) % args.checkpoint_interval == 0):
            run.start_episodes(update + 1)
            run.save(update + 1)
        elif STOP:
            run.save(update + 1)
        if STOP:
            break

    run.close(), envs.close(), eval_envs.close()
    if update + 1 < updates:
        name = signal.Signals(STOP[0]).name
        print(f"{name}: stopped at environment step {run.global_step:,}; to go on: --resume {run.run_dir}")
        raise SystemExit(128 + STOP[0])
    print(f"final{last_eval[1:]} over {args.eval_episodes} episodes; to replay: --evaluate {run.run_dir}")
    return run.run_dir


if __name__ == "__main__":
    cli_args = tyro.cli(Args)
    if cli_args.evaluate is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
        replay(cli_args)
    else:
        signal.signal(signal.SIGINT, request_stop), signal.signal(signal.SIGTERM, request_stop)
        main(*(resume(cli_args.resume) if cli_args.resume is not None else (cli_args,)))
