"""Trains SAC, TD3, DDPG, PPO (of stable-baselines3) or TRPO (of sb3-contrib), for the report.

    pip install -r benchmarks/requirements.txt  # beside requirements.txt
    python benchmarks/baselines.py --algorithm TD3 --env-kwargs '{"num_goals": 6}' --seed 2

Their settings are the defaults of these libraries. With 20 environments, SAC, TD3 and DDPG learn
as often as dacer.py. The evaluations, and what is logged of them, are dacer.py's: ten episodes
and, on the multi-goal task, 200 rollouts from the origin. In all of them the policies of SAC, PPO
and TRPO draw their actions as in training; --deterministic takes their means.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
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
    num_envs: int | None = None  # environments; None: 1 for PPO and TRPO, 20 for the others
    eval_interval: int = 23_000  # environment steps between evaluations; one more at the end
    eval_episodes: int = 10  # episodes per evaluation
    deterministic: bool = False  # evaluate the means of the policies of SAC, PPO and TRPO


@contextmanager
def generators_kept() -> Iterator[None]:
    """The global generators go on after it as if nothing had been drawn in between."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def main(args: Args) -> Path:
    """Trains, evaluates, saves the model; returns the run's folder."""
    import sb3_contrib
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    counts = args.total_timesteps, args.eval_interval, args.eval_episodes
    if min(counts) < 1 or args.seed < 0 or (args.num_envs or 0) < 0:
        raise ValueError("--seed must be 0 or more, and the other numbers 1 or more")
    if not args.env_kwargs.lstrip().startswith("{"):
        raise ValueError("--env-kwargs must be a JSON object")
    # An error here says that the task is none for dacer.py.
    eval_envs = dacer.make_envs(dacer.Args(args.env_id, args.env_kwargs), args.eval_episodes)
    task = args.env_id.split(":")[-1]
    now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    name = f"{task}__{args.algorithm}__{args.seed}__{now}"
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
    content = asdict(args) | said | {"learning_starts": 0}
    (run_dir / "args.json").write_text(json.dumps(content, indent=2))

    def act(obs: np.ndarray) -> np.ndarray:
        """Actions for observations (n, obs_dim)."""
        return model.predict(obs, deterministic=args.deterministic)[0]

    class Evaluation(BaseCallback):
        def _on_step(self) -> bool:
            # PPO and TRPO go on to the end of their 2,048 steps.
            over = self.num_timesteps - args.total_timesteps
            is_due = self.num_timesteps % args.eval_interval < args.num_envs
            is_last = 0 <= over < args.num_envs
            if not is_last and (over > 0 or not is_due):
                return True
            with generators_kept():
                seed = dacer.derive_seed(args.seed, self.num_timesteps)
                _, scores = dacer.evaluate(act, eval_envs, args.eval_episodes, seed)
            for tag, score in scores.items():
                writer.add_scalar(f"eval/{tag}", score, self.num_timesteps)
            words = ", ".join(f"{tag} {score:.3g}" for tag, score in scores.items())
            print(f"{self.num_timesteps:,} steps: {words}")
            return True

    with SummaryWriter(run_dir) as writer:
        model.learn(args.total_timesteps, Evaluation())
    model.save(run_dir / "model")
    plain = make_env().unwrapped
    if hasattr(plain, "rollouts"):  # of the multi-goal task, for results/rollouts.npz
        np.savez_compressed(run_dir / "rollouts", *plain.rollouts(act, np.zeros((200, 2))))
    return run_dir


if __name__ == "__main__":
    try:
        print(main(tyro.cli(Args)))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        is_missing = isinstance(error, ImportError)
        advice = "; pip install -r benchmarks/requirements.txt" if is_missing else ""
        print(f"baselines.py: error: {error}{advice}", file=sys.stderr)
        sys.exit(2)
