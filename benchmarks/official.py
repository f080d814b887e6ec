"""Trains the official DACER code (JAX) with the environments, warm-up, evaluations and logs of dacer.py, for the report.

    git clone https://github.com/happy-yan/DACER-Diffusion-with-Online-RL /tmp/official      # runs/ has commit 848c1f2
    pip install jax dm-haiku optax numpyro numba scikit-learn dill tensorboardX              # beside requirements.txt
    python benchmarks/official.py --code /tmp/official --env-id HalfCheetah-v4 --diffusion-steps 20

Networks, losses, updates and entropy are theirs, and so is the exploration noise, whose lambda stands in
relax/network/dacer.py (0.15, as for HalfCheetah and Humanoid; other tasks need 0.1). The run lies in
runs/<env>__official_T<T>__<seed>/; every evaluation saves it, and the same command goes on with it.
"""

import importlib.util
import json
import os
import pickle
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import numpy as np
import tyro


@dataclass
class Args:
    code: Path
    """folder of the official repository"""
    env_id: str = "HalfCheetah-v4"
    """the task"""
    seed: int = 1
    """seed of networks, actions, batches and environments"""
    diffusion_steps: int = 20
    """T"""
    total_timesteps: int = 1_400_000
    """environment steps, warm-up included; one update follows each vector step"""
    learning_starts: int = 200_000
    """warm-up steps with uniform random actions"""
    num_envs: int = 20
    """parallel environments"""
    entropy_interval: int = 400
    """updates between two steps of alpha"""
    batch_size: int = 256
    """transitions of a batch"""
    buffer_size: int = 1_000_000
    """transitions the replay buffer holds"""
    eval_interval: int = 3000
    """updates between two evaluations, each of 10 episodes"""
    runs: Path = Path("runs")
    """folder in which the run's folder lies"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_installed(code: Path) -> None:
    """Ends the program with a clear line if their code or the packages it needs are missing."""
    if not (code / "relax" / "algorithm" / "dacer.py").is_file():
        fail(f"{code} is no clone of the official repository; see --help")
    packages = "jax", "haiku", "optax", "numpyro", "numba", "sklearn", "dill", "tensorboardX"
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        fail(f"no module {', '.join(missing)}: what to install stands in the first lines of benchmarks/official.py")


def load_official(args: Args, obs_dim: int, action_dim: int):
    """Their agent with fresh networks, as their scripts/train_mujoco.py makes it."""
    sys.path.insert(0, str(args.code))
    stub = types.ModuleType("relax.utils.persistence")  # stores policies as code; does not load with JAX 0.10
    stub.make_persist = stub.PersistFunction = None
    sys.modules["relax.utils.persistence"] = stub
    import jax
    import jax.numpy as jnp
    from relax.algorithm.dacer import DACER
    from relax.network.dacer import create_dacer_net

    def mish(x):
        return x * jnp.tanh(jax.nn.softplus(x))

    net, params = create_dacer_net(
        jax.random.key(args.seed), obs_dim, action_dim, [256] * 3, [256] * 3, mish, num_timesteps=args.diffusion_steps
    )
    return DACER(net, params, lr=1e-4, delay_alpha_update=args.entropy_interval)


def main(args: Args) -> Path:
    """Trains; returns the run's folder."""
    check_installed(args.code)
    import jax
    import jax.numpy as jnp
    from tensorboardX import SummaryWriter

    folder = args.runs / f"{args.env_id}__official_T{args.diffusion_steps}__{args.seed}"
    logged = {name: value for name, value in vars(args).items() if name not in ("code", "runs")}
    logged |= {"env_kwargs": "{}", "label": f"official DACER (JAX), T = {args.diffusion_steps}"}
    saved, described = folder / "state.pkl", folder / "args.json"
    if described.exists() and not saved.exists():
        fail(f"{folder} has a run but no state.pkl to go on from: move it away")
    if saved.exists() and json.loads(described.read_text()) | {"total_timesteps": args.total_timesteps} != logged:
        fail(f"{folder} is a run with other arguments (args.json): move it away, or give the same ones")
    folder.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps(logged, indent=2))

    def vector(n: int) -> gym.vector.VectorEnv:
        same_step = gym.vector.AutoresetMode.SAME_STEP
        return gym.vector.SyncVectorEnv([lambda: gym.make(args.env_id)] * n, autoreset_mode=same_step)

    envs, eval_envs = vector(args.num_envs), vector(10)
    space = envs.single_action_space
    obs_dim, action_dim = envs.single_observation_space.shape[0], space.shape[0]
    algorithm = load_official(args, obs_dim, action_dim)
    from relax.utils.experience import Experience

    def to_bounds(action: np.ndarray) -> np.ndarray:
        return (space.low + (np.clip(action, -1, 1) + 1) / 2 * (space.high - space.low)).astype(np.float32)

    size = min(args.total_timesteps, args.buffer_size)
    buffer = {
        "obs": np.zeros((size, obs_dim), np.float32),
        "action": np.zeros((size, action_dim), np.float32),
        "reward": np.zeros(size, np.float32),
        "next_obs": np.zeros((size, obs_dim), np.float32),
        "done": np.zeros(size, bool),
    }
    stored, update, seconds = 0, 0, 0.0
    rng, key = np.random.default_rng(args.seed), jax.random.key(1000 + args.seed)

    def step_and_store(obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Stores the transitions, each with its true next observation; returns the observations to go on from."""
        nonlocal stored
        next_obs, reward, terminated, truncated, info = envs.step(to_bounds(action))
        true_next = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            true_next[i] = info["final_obs"][i]
        at = (stored + np.arange(args.num_envs)) % size
        for name, value in zip(buffer, (obs, action, reward, true_next, terminated)):
            buffer[name][at] = value
        stored += args.num_envs
        return next_obs

    def evaluate() -> np.ndarray:
        """Returns of 10 episodes without exploration noise."""
        returns, running = np.zeros(10), np.ones(10, bool)
        obs, _ = eval_envs.reset(seed=777)
        while running.any():
            action = algorithm.get_deterministic_action(obs.astype(np.float32))
            obs, reward, terminated, truncated, _ = eval_envs.step(to_bounds(action))
            returns += reward * running
            running &= ~(terminated | truncated)
        return returns

    if saved.exists():
        state = pickle.loads(saved.read_bytes())
        algorithm.state = jax.tree.map(jnp.asarray, state["algorithm"])
        stored, update, seconds, rng = state["stored"], state["update"], state["seconds"], state["rng"]
        for name, value in state["buffer"].items():
            buffer[name][: len(value)] = value
        obs, _ = envs.reset(seed=1_000_000 + update)
        print(f"goes on after {update} updates", flush=True)
    else:
        obs, _ = envs.reset(seed=args.seed)
        while stored < args.learning_starts:
            obs = step_and_store(obs, rng.uniform(-1, 1, (args.num_envs, action_dim)).astype(np.float32))

    writer = SummaryWriter(str(folder), purge_step=stored + 1 if update else None)
    start, updates = time.time(), (args.total_timesteps - args.learning_starts) // args.num_envs
    tags = {
        "qf1_values": "q1_mean",
        "qf1_std": "q1_std",
        "actor_loss": "policy_loss",
        "entropy": "entropy",
        "alpha": "alpha",
    }
    while update < updates:
        act_key, update_key = jax.random.split(jax.random.fold_in(key, update))
        obs = step_and_store(obs, algorithm.get_action(act_key, obs.astype(np.float32)))
        batch = rng.integers(0, min(stored, size), args.batch_size)
        info = algorithm.update(update_key, Experience(**{name: jnp.asarray(v[batch]) for name, v in buffer.items()}))
        update += 1
        if update % 100 == 0:
            writer.add_scalar("charts/updates", update, stored)
            for tag, name in tags.items():
                writer.add_scalar(f"losses/{tag}", float(info[name]), stored)
        if update % args.eval_interval == 0:
            returns = evaluate()
            writer.add_scalar("eval/episodic_return", returns.mean(), stored)
            writer.add_scalar("eval/episodic_return_std", returns.std(), stored)
            writer.flush()
            elapsed = seconds + time.time() - start
            print(f"{update} updates, {elapsed:.0f} s: {returns.mean():.1f} +- {returns.std():.1f}", flush=True)
            state = {"algorithm": jax.tree.map(np.asarray, algorithm.state), "stored": stored, "update": update}
            state |= {"seconds": elapsed, "rng": rng, "buffer": {name: v[:stored] for name, v in buffer.items()}}
            new = folder / "state.pkl.tmp"
            new.write_bytes(pickle.dumps(state))
            os.replace(new, saved)
            obs, _ = envs.reset(seed=1_000_000 + update)  # as after resuming, so that both give the same run
    writer.close()
    return folder


if __name__ == "__main__":
    main(tyro.cli(Args))
