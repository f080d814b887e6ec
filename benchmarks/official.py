"""Trains what the official repository holds (JAX: DACER, DSACT, QSM, DIPO, QVPO) in dacer.py's loop, for the report.

    git clone https://github.com/happy-yan/DACER-Diffusion-with-Online-RL /tmp/official      # results/ are of its commit 848c1f2
    pip install jax dm-haiku optax numpyro numba scikit-learn dill tensorboardX              # beside requirements.txt
    python benchmarks/official.py --code /tmp/official --env-id HalfCheetah-v4 --total-timesteps 1400000

Networks, losses, updates, noise and entropy are theirs; environments, warm-up, buffer, evaluations, checkpoints and all
arguments are dacer.py's, --resume and --evaluate too. Arguments of the algorithm itself hold for DACER; of the others only
T, the widths, the learning rate, gamma and tau do, the rest being as in their scripts/train_mujoco.py. A resumed run of DIPO
starts from the actions as they were taken.
"""

import importlib
import json
import math
import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dacer


@dataclass
class Args(dacer.Args):
    algorithm: Literal["DACER", "DSACT", "QSM", "DIPO", "QVPO"] = "DACER"
    exp_name: str = "official"  # part of the run's folder
    code: str = "/tmp/official"  # folder of the official repository
    label: str | None = None  # the algorithm's name in the report; None: made of --algorithm
    device: str = "cpu"  # of the replay buffer; JAX chooses its own
    compile: bool = False  # of no effect: JAX always compiles

    def __post_init__(self):
        own = (
            "official DACER (JAX)"
            if self.algorithm == "DACER"
            else f"{self.algorithm} (DACER authors' JAX)"
        )
        self.label = self.label or own
        self.diffusion_steps = {"DIPO": 100, "DSACT": 1}.get(self.algorithm, self.diffusion_steps)
        if not (
            self.resume or self.evaluate or Path(self.code, "relax/algorithm/dacer.py").is_file()
        ):
            raise ValueError(f"--code {self.code} is no clone of the official repository")


class Agent:
    """Their algorithm, with what dacer.py asks of its own `Agent` and, in evaluations, of its policy."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        sys.path.insert(0, args.code)
        stub = types.ModuleType(
            "relax.utils.persistence"
        )  # stores policies as code; does not load with JAX 0.10
        stub.make_persist = stub.PersistFunction = None
        sys.modules["relax.utils.persistence"] = stub
        import jax
        from relax.utils.experience import Experience

        clip = jax.numpy.clip  # theirs is of an older JAX
        jax.numpy.clip = lambda x, *ends, a_min=None, a_max=None, **k: clip(
            x, *(ends or (a_min, a_max)), **k
        )
        self.args, self.dims, self.jax, self.Experience = args, (obs_dim, act_dim), jax, Experience
        name, key = args.algorithm.lower(), jax.random.key(args.seed)
        module, network = (
            importlib.import_module(f"relax.{part}.{name}") for part in ("algorithm", "network")
        )

        def mish(x):
            return x * jax.numpy.tanh(jax.nn.softplus(x))

        sizes, T = args.hidden_sizes, {"num_timesteps": args.diffusion_steps}
        dacers = {
            "alpha_lr": args.alpha_lr,
            "delay_alpha_update": args.entropy_interval,
            "reward_scale": args.reward_scale,
        }
        dacers |= {"delay_update": args.policy_frequency, "num_samples": args.entropy_samples}
        dipos = {"action_gradient_steps": 30, "policy_target_delay": 2, "action_grad_norm": 0.16}
        positional, named, settings = {  # of the networks; of the algorithm
            "DACER": ((sizes, sizes, mish), T, dacers),
            "DSACT": ((sizes, partial(jax.nn.gelu, approximate=False)), {}, {}),
            "QSM": ((sizes,), T | {"num_particles": 64}, {}),
            "DIPO": (
                (sizes,),
                T,
                dipos | {"diffusion_buffer": None},
            ),  # which is made after the agent
            "QVPO": (
                (sizes, sizes, mish),
                T | {"num_particles": 4},
                {"alpha_lr": 7e-3, "delay_alpha_update": 250},
            ),
        }[args.algorithm]
        net, params = getattr(network, f"create_{name}_net")(
            key, obs_dim, act_dim, *positional, **named
        )
        if args.algorithm == "DACER":
            get_action, shift = (
                net.get_action,
                math.log(args.noise_scale / 0.15),
            )  # lambda is 0.15 in their code
            net.get_action = lambda key, policy, obs: get_action(
                key, (policy[0], policy[1] + shift), obs
            )
        make = getattr(module, args.algorithm)
        self.algorithm = make(
            net, params, gamma=args.gamma, tau=args.tau, lr=args.learning_rate, **settings
        )
        self.rng = torch.Generator()
        Agent.latest = self  # main makes the agent, then its buffer
        self.policy, self.time_embedding = self, torch.zeros(0)  # whose device make_actor asks for
        self.optimizer = types.SimpleNamespace(
            state_dict=dict, load_state_dict=lambda state: None
        )  # in state_dict

    def key(self, generator: torch.Generator | None = None):
        return self.jax.random.key(int(torch.randint(2**31, (), generator=generator or self.rng)))

    def act(self, obs: np.ndarray) -> Tensor:
        return torch.tensor(self.algorithm.get_action(self.key(), obs.astype(np.float32)))

    def draw_noise(self, *rows: int, generator: torch.Generator):
        """A key; all but DSACT and QSM draw, without exploration noise, from one that they make of the observations."""
        return self.key(generator)

    def __call__(self, obs: Tensor, key) -> Tensor:
        algorithm, params = self.algorithm, self.algorithm.get_policy_params()
        if self.args.algorithm in (
            "DSACT",
            "QSM",
        ):  # theirs without noise gives one mean, or is for one state alone
            return torch.tensor(np.asarray(algorithm._get_action(key, params, obs.numpy())))
        if self.args.algorithm == "QVPO":
            params = algorithm.get_policy_params_to_save()  # the target policy, as in training
        return torch.tensor(np.asarray(algorithm._get_deterministic_action(params, obs.numpy())))

    def update(self, batch: dacer.Batch, step: int) -> dict[str, Tensor]:
        data = {
            name.replace("terminated", "done"): value.numpy()
            for name, value in batch._asdict().items()
        }
        info = self.algorithm.update(self.key(), self.Experience(**data))
        names = {"policy_loss": "actor_loss", "entropy": "entropy"}
        for i in (1, 2):
            names |= {
                f"q{i}_loss": f"qf{i}_loss",
                f"q{i}_mean": f"qf{i}_values",
                f"q{i}_std": f"qf{i}_std",
            }
        return {
            ours: torch.tensor(info[theirs]) for theirs, ours in names.items() if theirs in info
        }

    @property
    def log_alpha(self) -> Tensor:
        is_dacer = (
            self.args.algorithm == "DACER"
        )  # the others' exploration is not scaled by alpha: 0 is logged
        return torch.tensor(
            np.asarray(self.algorithm.state.params.log_alpha) if is_dacer else -math.inf
        )

    def noise_std(self) -> Tensor:
        return self.log_alpha.exp() * self.args.noise_scale

    def state_dict(self) -> dict[str, Tensor]:
        """All that they train: networks, alpha, Adam's moments, the number of updates."""
        return {
            str(i): torch.tensor(np.asarray(x))
            for i, x in enumerate(self.jax.tree.leaves(self.algorithm.state))
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        structure = self.jax.tree.structure(self.algorithm.state)
        self.algorithm.state = self.jax.tree.unflatten(
            structure, [self.jax.numpy.array(x) for x in state.values()]
        )


class Pair(NamedTuple):
    obs: np.ndarray  # (B, obs_dim)
    action: np.ndarray  # (B, d)


class ActionBuffer(dacer.ReplayBuffer):
    """The replay buffer, and beside it the actions that DIPO moves up the gradient of Q, its policy's targets."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str):
        super().__init__(capacity, obs_dim, act_dim, device)
        self.moved = torch.empty_like(self.data.action)
        Agent.latest.algorithm.diffusion_buffer = self

    def add(self, *transitions: np.ndarray | Tensor) -> None:
        rows = torch.arange(self.count, self.count + len(transitions[0])) % self.capacity
        super().add(*transitions)
        self.moved[rows] = self.data.action[rows]

    def sample_with_indices(self, batch_size: int) -> tuple[Pair, Tensor]:
        rows = torch.randint(
            min(self.count, self.capacity), (batch_size,), generator=Agent.latest.rng
        )
        return Pair(self.data.obs[rows].numpy(), self.moved[rows].numpy()), rows

    def replace(self, rows: Tensor, pair: Pair) -> None:
        self.moved[rows] = torch.tensor(np.asarray(pair.action))


def save(path: Path, agent: Agent, **training: object) -> None:
    """As dacer.py; with a checkpoint of the multi-goal task rollouts, for its picture."""
    dacer_save(path, agent, **training)
    if path.name == "checkpoint.pt" and "MultiGoal" in agent.args.env_id:
        task = gym.make(agent.args.env_id, **json.loads(agent.args.env_kwargs)).unwrapped
        act = dacer.make_actor(agent.policy, task.action_space)
        np.savez_compressed(path.with_name("rollouts"), *task.rollouts(act, np.zeros((200, 2))))


if __name__ == "__main__":
    dacer_save, dacer.save = dacer.save, save
    dacer.ALGORITHM, dacer.Args, dacer.Agent, dacer.ReplayBuffer = (
        "official",
        Args,
        Agent,
        ActionBuffer,
    )
    dacer.run_command_line()
