"""How guidance shows in a policy: how long eps_theta is in each denoising step.

    python benchmarks/eta.py runs/ant-v2-T5-eta0.01-1 runs/<run>/checkpoint.pt ...

The states are those that the policy visits. See docs/choosing-eta.md.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dacer
import dacer_v2

NUM_STATES = 64
SAMPLES = 100  # actions in each state


def load(run: Path) -> dacer.Agent | dacer_v2.Agent:
    """The agent of a run of either script."""
    try:
        return dacer_v2.load_agent(run)
    except ValueError:
        return dacer.load_agent(run)


def visited_states(agent: dacer.Agent | dacer_v2.Agent) -> torch.Tensor:
    """(NUM_STATES, obs_dim): every second one of the first of 4 environments."""
    envs = dacer_v2.make_envs(agent.args, 4)
    act = dacer_v2.make_actor(agent.policy, envs.single_action_space)
    obs, _ = envs.reset(seed=0)
    visited = []
    for _ in range(2 * NUM_STATES):
        visited.append(obs)
        obs, *_ = envs.step(act(obs))
    envs.close()
    return torch.as_tensor(np.concatenate(visited)[::8], dtype=torch.float32)


@torch.no_grad()
def measure(agent: dacer.Agent | dacer_v2.Agent, obs: torch.Tensor) -> tuple[list[float], float]:
    """Mean lengths of eps_theta for t = 1..T, and the mean standard deviation of an action."""
    # Both scripts have the same policy, and dacer_v2's returns the whole chain.
    sizes = agent.args.hidden_sizes, agent.args.diffusion_steps
    policy = dacer_v2.DiffusionPolicy(*agent.dims, *sizes)
    policy.load_state_dict(agent.policy.state_dict())
    state_part, time_parts = policy.fixed_parts(obs.repeat_interleave(SAMPLES, 0))
    chain = policy.denoise(state_part, time_parts, policy.draw_noise(len(state_part)))
    lengths = []
    for t in range(1, policy.T + 1):
        eps = policy.eps_theta(state_part, chain[t], time_parts[t - 1])
        lengths.append(eps.norm(dim=-1).mean().item())
    actions = chain[0].clamp(-1, 1).view(len(obs), SAMPLES, -1)
    return lengths, actions.std(1).mean().item()


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Prints a row for each run, and for those of dacer_v2.py the length w(t) that L_g wants."""
    if not runs:
        raise ValueError("name one run or more")
    agents = {str(run): load(run) for run in runs}
    torch.manual_seed(0)
    for name, agent in agents.items():
        lengths, std = measure(agent, visited_states(agent))
        rows = {"length of eps_theta": lengths}
        if isinstance(agent, dacer_v2.Agent):
            c, d = agent.args.time_weight_c, agent.args.time_weight_d
            rows["w(t)"] = [np.exp(c * t + d) for t in range(1, len(lengths) + 1)]
            name += f": eta = {agent.args.q_grad_weight:g}"
        print(f"{name}, standard deviation of an action: {std:.2f}")
        for what, row in rows.items():
            shown = "  ".join(f"{length:5.2f}" for length in row)
            print(f"  {what:19}  t = 1..{len(row)}  {shown}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (RuntimeError, ValueError) as error:
        print(f"eta.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
