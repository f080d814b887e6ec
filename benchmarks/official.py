r"""Trains DACER, DSACT, QSM, DIPO or QVPO of the official repository (JAX) in dacer.py's loop, for
the report.

    git clone https://github.com/happy-yan/DACER-Diffusion-with-Online-RL /tmp/official
    pip install jax dm-haiku optax numpyro numba scikit-learn dill tensorboardX
    python benchmarks/official.py --code /tmp/official --env-id HalfCheetah-v4 \
        --total-timesteps 1400000

The results in results/ are of the repository's commit 848c1f2. The packages come beside those of
requirements.txt.

Networks, losses, updates, noise and entropy are theirs. Environments, warm-up, buffer,
evaluations, checkpoints and all arguments are dacer.py's, --resume and --evaluate too. Arguments
of the algorithm itself hold for DACER. For the others, only the widths, the learning rate, gamma
and tau hold, and T for QVPO and QSM; the rest is as in their scripts/train_mujoco.py. A resumed
run of DIPO starts from the actions as they were taken.
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
        own = f"{self.algorithm} (DACER authors' JAX)"
        if self.algorithm == "DACER":
            own = "official DACER (JAX)"
        self.label = self.label or own
        self.diffusion_steps = {"DIPO": 100, "DSACT": 1}.get(self.algorithm, self.diffusion_steps)
        is_new = not (self.resume or self.evaluate)
        if is_new and not Path(self.code, "relax/algorithm/dacer.py").is_file():
            raise ValueError(f"--code {self.code} is no clone of the official repository")


class Agent:
    """Their algorithm, with what dacer.py asks of its own `Agent` and, in evaluations, of its
    policy."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        sys.path.insert(0, args.code)
        # Their module stores policies as code. It does not load with JAX 0.10.
        stub = types.ModuleType("relax.utils.persistence")
        stub.make_persist = stub.PersistFunction = None
        sys.modules["relax.utils.persistence"] = stub
        import jax
        from relax.utils.experience import Experience

        clip = jax.numpy.clip

        def clip_of_older_jax(x, *ends, a_min=None, a_max=None, **rest):  # which they call
            return clip(x, *(ends or (a_min, a_max)), **rest)

        jax.numpy.clip = clip_of_older_jax
        self.args, self.dims = args, (obs_dim, act_dim)
        self.jax, self.Experience = jax, Experience
        name = args.algorithm.lower()
        key = jax.random.key(args.seed)
        module = importlib.import_module(f"relax.algorithm.{name}")
        network = importlib.import_module(f"relax.network.{name}")

        def mish(x):
            return x * jax.numpy.tanh(jax.nn.softplus(x))

        sizes = args.hidden_sizes
        T = {"num_timesteps": args.diffusion_steps}
        dacers = {
            "alpha_lr": args.alpha_lr,
            "delay_alpha_update": args.entropy_interval,
            "reward_scale": args.reward_scale,
            "delay_update": args.policy_frequency,
            "num_samples": args.entropy_samples,
        }
        dipos = {"action_gradient_steps": 30, "policy_target_delay": 2, "action_grad_norm": 0.16}
        dipos |= {"diffusion_buffer": None}  # It is set below.
        qvpos = {"alpha_lr": 7e-3, "delay_alpha_update": 250}
        positional, named, settings = {  # of the networks; of the algorithm
            "DACER": ((sizes, sizes, mish), T, dacers),
            "DSACT": ((sizes, partial(jax.nn.gelu, approximate=False)), {}, {}),
            "QSM": ((sizes,), T | {"num_particles": 64}, {}),
            "DIPO": ((sizes,), T, dipos),
            "QVPO": ((sizes, sizes, mish), T | {"num_particles": 4}, qvpos),
        }[args.algorithm]
        make_net = getattr(network, f"create_{name}_net")
        net, params = make_net(key, obs_dim, act_dim, *positional, **named)
        if args.algorithm == "DACER":
            get_action = net.get_action
            shift = math.log(args.noise_scale / 0.15)  # lambda is 0.15 in their code

            def get_scaled_action(key, policy, obs):
                return get_action(key, (policy[0], policy[1] + shift), obs)

            net.get_action = get_scaled_action
        make = getattr(module, args.algorithm)
        settings |= {"gamma": args.gamma, "tau": args.tau, "lr": args.learning_rate}
        self.algorithm = make(net, params, **settings)
        self.rng = torch.Generator()
        if ActionBuffer.latest is not None:  # An evaluation has none.
            # main makes the buffer, then the agent. DIPO moves the actions in it.
            self.algorithm.diffusion_buffer = ActionBuffer.latest
            ActionBuffer.latest.rng = self.rng
        self.policy = self
        self.time_embedding = torch.zeros(0)  # whose device make_actor asks for
        # What it would hold is in this agent's state_dict.
        self.optimizer = types.SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)

    def key(self, rng: torch.Generator | None = None):
        seed = torch.randint(2**31, (), generator=rng or self.rng)
        return self.jax.random.key(int(seed))

    def act(self, obs: np.ndarray) -> Tensor:
        return torch.tensor(self.algorithm.get_action(self.key(), obs.astype(np.float32)))

    def draw_noise(self, *rows: int, rng: torch.Generator):
        """A key. Without exploration noise, all but DSACT and QSM draw from one of their own, which
        they make from the observations."""
        return self.key(rng)

    def __call__(self, obs: Tensor, key) -> Tensor:
        algorithm, params = self.algorithm, self.algorithm.get_policy_params()
        # Theirs without noise gives one mean, or is for one state alone.
        if self.args.algorithm in ("DSACT", "QSM"):
            return torch.tensor(np.asarray(algorithm._get_action(key, params, obs.numpy())))
        if self.args.algorithm == "QVPO":
            params = algorithm.get_policy_params_to_save()  # the target policy, as in training
        return torch.tensor(np.asarray(algorithm._get_deterministic_action(params, obs.numpy())))

    def update(self, batch: dacer.Batch, number: int) -> dict[str, Tensor]:
        data = {name: value.numpy() for name, value in batch._asdict().items()}
        data["done"] = data.pop("terminated")
        info = self.algorithm.update(self.key(), self.Experience(**data))
        names = {"policy_loss": "actor_loss", "entropy": "entropy"}
        for i in (1, 2):
            names[f"q{i}_loss"] = f"qf{i}_loss"
            names[f"q{i}_mean"] = f"qf{i}_values"
            names[f"q{i}_std"] = f"qf{i}_std"
        known = {theirs: ours for theirs, ours in names.items() if theirs in info}
        return {ours: torch.tensor(info[theirs]) for theirs, ours in known.items()}

    @property
    def log_alpha(self) -> Tensor:
        # Alpha does not scale the others' exploration: 0 is logged.
        if self.args.algorithm != "DACER":
            return torch.tensor(-math.inf)
        return torch.tensor(np.asarray(self.algorithm.state.params.log_alpha))

    def noise_std(self) -> Tensor:
        return self.log_alpha.exp() * self.args.noise_scale

    def state_dict(self) -> dict[str, Tensor]:
        """All that they train: networks, alpha, Adam's moments, the number of updates."""
        leaves = self.jax.tree.leaves(self.algorithm.state)
        return {str(i): torch.tensor(np.asarray(x)) for i, x in enumerate(leaves)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        structure = self.jax.tree.structure(self.algorithm.state)
        leaves = [self.jax.numpy.array(x) for x in state.values()]
        self.algorithm.state = self.jax.tree.unflatten(structure, leaves)


class Pair(NamedTuple):
    obs: np.ndarray  # (B, obs_dim)
    action: np.ndarray  # (B, d)


class ActionBuffer(dacer.ReplayBuffer):
    """The replay buffer, and beside it the actions that DIPO moves up the gradient of Q: they are
    the targets of its policy."""

    latest = None

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str):
        super().__init__(capacity, obs_dim, act_dim, device)
        self.moved = torch.empty_like(self.data.action)
        ActionBuffer.latest = self

    def add(self, *transitions: np.ndarray | Tensor) -> None:
        rows = torch.arange(self.count, self.count + len(transitions[0])) % self.capacity
        super().add(*transitions)
        self.moved[rows] = self.data.action[rows]

    def sample_with_indices(self, batch_size: int) -> tuple[Pair, Tensor]:
        size = min(self.count, self.capacity)
        rows = torch.randint(size, (batch_size,), generator=self.rng)
        return Pair(self.data.obs[rows].numpy(), self.moved[rows].numpy()), rows

    def replace(self, rows: Tensor, pair: Pair) -> None:
        self.moved[rows] = torch.tensor(np.asarray(pair.action))


def save(path: Path, agent: Agent, **training: object) -> None:
    """Saves as dacer.py; with a checkpoint on the multi-goal task also rollouts, for
    results/rollouts.npz."""
    dacer_save(path, agent, **training)
    if path.name == "checkpoint.pt" and "MultiGoal" in agent.args.env_id:
        task = gym.make(agent.args.env_id, **json.loads(agent.args.env_kwargs)).unwrapped
        act = dacer.make_actor(agent.policy, task.action_space)
        np.savez_compressed(path.with_name("rollouts"), *task.rollouts(act, np.zeros((200, 2))))


if __name__ == "__main__":
    dacer_save = dacer.save
    dacer.save = save
    dacer.ALGORITHM = "official"
    dacer.Args = Args
    dacer.Agent = Agent
    dacer.ReplayBuffer = ActionBuffer
    dacer.run_command_line()
