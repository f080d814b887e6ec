"""How strongly each of the two losses of DACERv2's policy pulls on its weights.

    python benchmarks/eta.py runs/ant-v2-T5-eta0.01-1 runs/<run> ...

The states are those that the policy visits. See docs/choosing-eta.md.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dacer_v2

NUM_STATES = 4096


def visited_states(agent: dacer_v2.Agent) -> torch.Tensor:
    """(NUM_STATES, obs_dim), of 16 environments without exploration noise."""
    envs = dacer_v2.make_envs(agent.args, 16)
    act = dacer_v2.make_actor(agent.policy, envs.single_action_space)
    obs, _ = envs.reset(seed=0)
    visited = []
    for _ in range(NUM_STATES // 16):
        visited.append(obs)
        obs, *_ = envs.step(act(obs))
    envs.close()
    return torch.as_tensor(np.concatenate(visited), dtype=torch.float32)


def gradients(agent: dacer_v2.Agent, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of L_q and of L_g by all weights of the policy, each as one vector."""
    policy = agent.policy
    t = torch.randint(1, policy.T + 1, (len(obs),), generator=agent.rng)
    parts = policy.fixed_parts(obs)
    noise = policy.draw_noise(len(obs), rng=agent.rng)
    chain = policy.denoise(*parts, noise)
    action = (chain[0] + agent.noise_std() * noise[0]).clamp(-1, 1)
    q_loss = -agent.min_q(obs, action).mean()
    q_grad_loss, _ = agent.q_grad_loss(obs, *parts, chain, t)
    weights = list(policy.parameters())
    found = []
    for loss in (q_loss, q_grad_loss):
        by_weight = torch.autograd.grad(loss, weights, retain_graph=True)
        found.append(torch.cat([gradient.flatten() for gradient in by_weight]))
    return tuple(found)


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Prints a row for each run of dacer_v2.py."""
    try:
        agents = {run.name: dacer_v2.load_agent(run) for run in runs}
    except ValueError as error:
        print(f"eta.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print("| run | eta | gradient of L_q | gradient of eta L_g | ratio | cosine |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, agent in agents.items():
        eta = agent.args.q_grad_weight
        of_q, of_g = gradients(agent, visited_states(agent))
        lengths = of_q.norm(), eta * of_g.norm()
        cosine = torch.cosine_similarity(of_q, of_g, dim=0)
        shown = *lengths, lengths[1] / lengths[0], cosine
        print(f"| {name} | {eta:g} | {' | '.join(f'{value:.2g}' for value in shown)} |")


if __name__ == "__main__":
    tyro.cli(main)
