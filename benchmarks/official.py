"""Trains the official DACER code (JAX) in dacer.py's training loop, for the report.

    git clone https://github.com/happy-yan/DACER-Diffusion-with-Online-RL /tmp/official      # results/ are of its commit 848c1f2
    pip install jax dm-haiku optax numpyro numba scikit-learn dill tensorboardX              # beside requirements.txt
    python benchmarks/official.py --code /tmp/official --env-id HalfCheetah-v4 --total-timesteps 1400000

Networks, losses, updates, noise and entropy are theirs; environments, warm-up, buffer, evaluations, checkpoints and all
arguments are dacer.py's, --resume and --evaluate too.
"""

import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dacer


@dataclass
class Args(dacer.Args):
    exp_name: str = "official"  # part of the run's folder
    code: str = "/tmp/official"  # folder of the official repository
    label: str = "official DACER (JAX)"  # the algorithm's name in the report
    device: str = "cpu"  # of the replay buffer; JAX chooses its own
    compile: bool = False  # of no effect: JAX always compiles

    def __post_init__(self):
        if not Path(self.code, "relax/algorithm/dacer.py").is_file():
            raise ValueError(f"--code {self.code} is no clone of the official repository")


class Agent:
    """Their algorithm, with what dacer.py asks of its own `Agent` and, in evaluations, of its policy."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        sys.path.insert(0, args.code)
        stub = types.ModuleType("relax.utils.persistence")  # stores policies as code; does not load with JAX 0.10
        stub.make_persist = stub.PersistFunction = None
        sys.modules["relax.utils.persistence"] = stub
        import jax
        from relax.algorithm.dacer import DACER
        from relax.network.dacer import create_dacer_net
        from relax.utils.experience import Experience

        self.args, self.dims, self.jax, self.Experience = args, (obs_dim, act_dim), jax, Experience
        key, sizes = jax.random.key(args.seed), args.hidden_sizes

        def mish(x):
            return x * jax.numpy.tanh(jax.nn.softplus(x))

        net, params = create_dacer_net(key, obs_dim, act_dim, sizes, sizes, mish, num_timesteps=args.diffusion_steps)
        get_action, shift = net.get_action, math.log(args.noise_scale / 0.15)  # theirs has lambda = 0.15 in its code
        net.get_action = lambda key, policy, obs: get_action(key, (policy[0], policy[1] + shift), obs)
        self.algorithm = DACER(
            net,
            params,
            gamma=args.gamma,
            lr=args.learning_rate,
            alpha_lr=args.alpha_lr,
            tau=args.tau,
            delay_alpha_update=args.entropy_interval,
            delay_update=args.policy_frequency,
            reward_scale=args.reward_scale,
            num_samples=args.entropy_samples,
        )
        self.policy, self.time_embedding = self, torch.zeros(0)  # whose device make_actor asks for
        self.optimizer = types.SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)  # in state_dict

    def key(self):
        return self.jax.random.key(int(torch.randint(2**31, ())))

    def act(self, obs: np.ndarray) -> Tensor:
        return torch.tensor(self.algorithm.get_action(self.key(), obs.astype(np.float32)))

    def draw_noise(self, *rows: int, generator: torch.Generator) -> None:
        """Without exploration noise, they draw from a key that they make of the observations."""

    def __call__(self, obs: Tensor, noise: None) -> Tensor:
        return torch.tensor(self.algorithm.get_deterministic_action(obs.numpy()))

    def update(self, batch: dacer.Batch, step: int) -> dict[str, Tensor]:
        data = {name.replace("terminated", "done"): value.numpy() for name, value in batch._asdict().items()}
        info = self.algorithm.update(self.key(), self.Experience(**data))
        names = {
            f"q{i}_{theirs}": f"qf{i}_{ours}"
            for i in (1, 2)
            for theirs, ours in (("loss", "loss"), ("mean", "values"), ("std", "std"))
        }
        names |= {"policy_loss": "actor_loss", "entropy": "entropy"}
        return {ours: torch.tensor(info[theirs]) for theirs, ours in names.items()}

    @property
    def log_alpha(self) -> Tensor:
        return torch.tensor(np.asarray(self.algorithm.state.params.log_alpha))

    def noise_std(self) -> Tensor:
        return self.log_alpha.exp() * self.args.noise_scale

    def state_dict(self) -> dict[str, Tensor]:
        """All that they train: networks, alpha, Adam's moments, the number of updates."""
        return {str(i): torch.tensor(np.asarray(x)) for i, x in enumerate(self.jax.tree.leaves(self.algorithm.state))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        structure = self.jax.tree.structure(self.algorithm.state)
        self.algorithm.state = self.jax.tree.unflatten(structure, [self.jax.numpy.array(x) for x in state.values()])


if __name__ == "__main__":
    dacer.ALGORITHM, dacer.Args, dacer.Agent = "official", Args, Agent
    dacer.run_command_line()
