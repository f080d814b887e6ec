"""Updates the official DACER code (JAX) and dacer.py from one state with one set of random numbers, and compares.

    python benchmarks/official.py --code /tmp/official --diffusion-steps 5        # trains; that file says what to install
    python benchmarks/same_update.py --code /tmp/official --run runs/HalfCheetah-v4__official_T5__1

tests/test_golden.py does so from fresh networks; this does it from where a run ended, with its replay buffer and Adam's
moments. Rounding differs, and training amplifies it: what should stay small is the difference in the first tens of updates.
"""

import json
import pickle
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import official

import dacer


@dataclass
class Args:
    code: Path
    """folder of the official repository"""
    run: Path
    """folder of a run of benchmarks/official.py, with its state.pkl"""
    updates: int = 50
    """updates to compare"""


def main(args: Args) -> None:
    """Prints, after every tenth update, how far each network's change is from the official one's, relative to it."""
    official.check_installed(args.code)
    import jax

    if not (args.run / "args.json").is_file() or not (args.run / "state.pkl").is_file():
        official.fail(f"{args.run} is no folder of a run of benchmarks/official.py with its state.pkl")
    saved_args = json.loads((args.run / "args.json").read_text())
    names = [field.name for field in fields(official.Args) if field.name in saved_args]
    trained = official.Args(args.code, **{name: saved_args[name] for name in names})
    spaces = gym.make(trained.env_id)
    obs_dim, act_dim = spaces.observation_space.shape[0], spaces.action_space.shape[0]
    theirs = official.load_official(trained, obs_dim, act_dim)
    saved = pickle.loads((args.run / "state.pkl").read_bytes())
    theirs.state = jax.tree.map(jax.numpy.asarray, saved["algorithm"])
    buffer, T = {name: values.astype(np.float32) for name, values in saved["buffer"].items()}, trained.diffusion_steps
    from relax.utils.experience import Experience

    ours = dacer.Agent(obs_dim, act_dim, dacer.resolve(dacer.Args(
        env_id=trained.env_id, diffusion_steps=T, noise_scale=0.15, entropy_interval=trained.entropy_interval,
        hidden_sizes=(256, 256, 256), device="cpu", compile=False,
    )))  # fmt: skip
    critic, target = ours.critic, ours.target_critic
    networks = {"policy": ours.policy, "q1": critic.q1, "q2": critic.q2, "target_q1": target.q1, "target_q2": target.q2}

    def arrays(tree: dict) -> list[torch.Tensor]:
        """Their parameters of a network, or what belongs to each of them, in the order of ours."""
        return [torch.from_numpy(np.array(layer[part].T)) for layer in tree.values() for part in ("w", "b")]

    # Our agent takes their state
    state = theirs.state
    ours.omega.copy_(torch.tensor([state.mean_q1_std.item(), state.mean_q2_std.item()]))
    with torch.no_grad():
        ours.log_alpha.fill_(state.params.log_alpha.item())
        for name, network in networks.items():
            for parameter, value in zip(network.parameters(), arrays(getattr(state.params, name)), strict=True):
                parameter.copy_(value)
    start = {name: arrays(getattr(state.params, name)) for name in networks}
    for name, optimizer in (
        ("policy", ours.policy_optimizer), ("q1", ours.critic_optimizer), ("q2", ours.critic_optimizer),
    ):  # fmt: skip
        adam = getattr(state.opt_state, name)[0]
        for parameter, first, second in zip(networks[name].parameters(), arrays(adam.mu), arrays(adam.nu), strict=True):
            moments = {"exp_avg": first, "exp_avg_sq": second}
            optimizer.state[parameter] = {"step": torch.tensor(float(adam.count)), **moments}
    adam = state.opt_state.log_alpha[0]
    moments = {"step": float(adam.count), "exp_avg": adam.mu.item(), "exp_avg_sq": adam.nu.item()}
    ours.alpha_optimizer.state[ours.log_alpha] = {name: torch.tensor(value) for name, value in moments.items()}

    @jax.jit
    def draws(key: jax.Array) -> tuple:
        """The random numbers that their update makes of a key, in the layout of dacer.Draws."""

        def normals(key: jax.Array) -> jax.Array:
            key, explore = jax.random.split(key)
            first, steps = jax.random.split(key)
            shape = trained.batch_size, act_dim
            steps = jax.random.normal(steps, (T, *shape))[:-1]  # the last step adds none
            both = jax.random.normal(first, (1, *shape)), steps, jax.random.normal(explore, (1, *shape))
            return jax.numpy.concatenate(both)

        keys = jax.random.split(key, 5)
        z = [jax.random.normal(k, (trained.batch_size,)).clip(-3, 3) for k in keys[2:4]]
        return normals(keys[0]), jax.numpy.stack(z), normals(keys[1])

    rng, step = np.random.default_rng(0), int(state.step)
    print(f"{trained.env_id}, T = {T}, from update {step:,}: |our change - theirs| / |theirs| since then")
    for update in range(1, args.updates + 1):
        key = jax.random.key(update)
        rows = rng.integers(0, len(buffer["obs"]), trained.batch_size)
        batch = {name: values[rows] for name, values in buffer.items()}
        info = theirs.update(key, Experience(**{name: jax.numpy.asarray(values) for name, values in batch.items()}))
        given = dacer.Batch(*map(torch.from_numpy, batch.values()))
        stats = ours.update(given, dacer.Draws(*(torch.from_numpy(np.array(x)) for x in draws(key))), step)
        if step % trained.entropy_interval == 0:  # two fits of a mixture never agree to the last digit
            ours.update_alpha(torch.tensor(float(info["entropy"])))
        step += 1
        if update == 1 or update % 10 == 0:
            line = []
            for name, network in networks.items():
                now = arrays(getattr(theirs.state.params, name))
                difference = sum((p.detach() - x).square().sum() for p, x in zip(network.parameters(), now))
                change = sum((x - x0).square().sum() for x, x0 in zip(now, start[name]))
                line.append(f"{name} {(difference / change).sqrt():.1e}")
            q = f"mean of Q {stats['qf{}_values'][0]:.4f} and {float(info['q1_mean']):.4f}"
            print(f"{update:5d} updates: {', '.join(line)}; {q}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
