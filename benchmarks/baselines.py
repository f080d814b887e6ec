"""Trains SAC, TD3, DDPG, PPO (stable-baselines3) or TRPO (sb3-contrib), with their defaults, for the report.

    pip install -r benchmarks/requirements.txt                   # beside requirements.txt
    python benchmarks/baselines.py --algorithm TD3 --env-kwargs '{"num_goals": 6}' --seed 2

Evaluations and what is logged of them are dacer.py's: ten episodes and, on the multi-goal task, 200 rollouts from the
origin. The policies of SAC, PPO and TRPO draw their actions there as in training; --deterministic takes their means.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dacer


@dataclass
class Args:
    algorithm: Literal["SAC", "TD3", "DDPG", "PPO", "TRPO"] = "SAC"
    env_id: str = "multigoal_env:MultiGoal-v0"  # any task that dacer.py takes
    env_kwargs: str = "{}"  # JSON object of the task's keyword arguments
    seed: int = 1  # of networks, noise and environment
    total_timesteps: int = 230_000  # environment steps
    num_envs: int | None = (
        None  # parallel environments; None: 20, then SAC, TD3, DDPG learn as often as ours; PPO, TRPO: 1
    )
    eval_interval: int = (
        23_000  # environment steps between two evaluations; one more follows the last step
    )
    eval_episodes: int = 10  # episodes per evaluation
    deterministic: bool = False  # evaluate the means of the policies of SAC, PPO and TRPO


class Policy:
    """A trained model with what dacer.evaluate asks of a policy; takes observations (n, obs_dim), acts in [-1, 1]."""

    def __init__(self, model: object, deterministic: bool):
        self.model, self.deterministic, self.time_embedding = model, deterministic, torch.zeros(0)
        self.dims = (gym.spaces.flatdim(model.observation_space),)

    def draw_noise(self, *rows: int, generator: torch.Generator) -> None:
        """stable-baselines3 draws its own."""

    def __call__(self, obs: Tensor, noise: None) -> Tensor:
        space = self.model.action_space
        action, _ = self.model.predict(obs.numpy(), deterministic=self.deterministic)
        return torch.as_tensor(2 * (action - space.low) / (space.high - space.low) - 1)


def main(args: Args) -> Path:
    """Trains, evaluates, saves the model; returns the run's folder."""
    import sb3_contrib
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    settings = dacer.Args(
        args.env_id, args.env_kwargs, args.seed, eval_episodes=args.eval_episodes, device="cpu"
    )
    dacer.make_envs(settings, 1).close()  # ValueError if the task is none for dacer.py
    if not args.eval_episodes:
        raise ValueError("--eval-episodes must be at least 1")
    name = f"{args.env_id.split(':')[-1]}__{args.algorithm}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path("runs", name.replace("/", "_"))
    args.num_envs = args.num_envs or (1 if args.algorithm in ("PPO", "TRPO") else 20)

    def make_env() -> gym.Env:
        return gym.wrappers.FlattenObservation(gym.make(args.env_id, **json.loads(args.env_kwargs)))

    env = make_vec_env(make_env, args.num_envs, args.seed)
    library = sb3_contrib if args.algorithm == "TRPO" else sb3
    model = getattr(library, args.algorithm)("MlpPolicy", env, seed=args.seed, device="cpu")
    run_dir.mkdir(parents=True)
    commit = os.popen(f'git -C "{ROOT}" describe --always --dirty 2>&1').read().strip()
    said = {
        "label": args.algorithm,
        "commit": commit,
        "library": f"{library.__name__} {library.__version__}",
    }
    (run_dir / "args.json").write_text(
        json.dumps(asdict(args) | said | {"learning_starts": 0}, indent=2)
    )

    class Evaluation(BaseCallback):
        def _on_step(self) -> bool:
            over = (
                self.num_timesteps - args.total_timesteps
            )  # PPO and TRPO go on to the end of their 2,048 steps
            if over >= args.num_envs or (
                over < 0 and self.num_timesteps % args.eval_interval >= args.num_envs
            ):
                return True
            with torch.random.fork_rng():  # training shall not notice
                _, scores = dacer.evaluate(
                    Policy(model, args.deterministic), settings, args.seed + self.num_timesteps
                )
            for tag, score in scores.items():
                writer.add_scalar(f"eval/{tag}", score, self.num_timesteps)
            print(
                f"{self.num_timesteps:,} steps: "
                + ", ".join(f"{tag} {score:.3g}" for tag, score in scores.items())
            )
            return True

    with SummaryWriter(run_dir) as writer:
        model.learn(args.total_timesteps, Evaluation())
    model.save(run_dir / "model")
    if hasattr(task := make_env().unwrapped, "rollouts"):  # of the multi-goal task, for its picture
        act = dacer.make_actor(Policy(model, args.deterministic), task.action_space)
        np.savez_compressed(run_dir / "rollouts", *task.rollouts(act, np.zeros((200, 2))))
    return run_dir


if __name__ == "__main__":
    try:
        print(main(tyro.cli(Args)))
    except (ImportError, ValueError, gym.error.Error) as error:
        missing = (
            "; pip install -r benchmarks/requirements.txt" if isinstance(error, ImportError) else ""
        )
        print(f"baselines.py: error: {error}{missing}", file=sys.stderr)
        sys.exit(2)
