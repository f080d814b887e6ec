"""What makes the scripts fast changes none of their numbers.

That compiled runs can be resumed, and compile nothing on the way, is in test_resume.py.
"""

import resource
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, small_agent, small_batch, train
from torch._inductor import config as inductor

import dacer
import dacer_v2

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@inductor.patch(fx_graph_cache=False)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_compiled_agent_computes_the_same(device, monkeypatch):
    """Actions, statistics and gradients, at full weight of the Q-gradient.

    The batch is as large as the hidden layers, so that a compiler that takes the memory of weights
    for activations of their size would be seen. So would one that pads matrices, as it does on a
    GPU if their widths (Ant's, not Hopper's) make that faster: Adam takes no gradient with gaps.
    """
    torch.compiler.reset()
    for name in ("has_triton", "check_device", "_should_pad"):
        monkeypatch.setattr(f"torch._inductor.fx_passes.pad_mm.{name}", lambda *_: True)
    size = 32
    settings = {"diffusion_steps": 2, "q_grad_weight": 1.0, "hidden_sizes": (size, size)}
    eager = small_agent(dacer_v2, compile=False, device=device, **settings)
    compiled = small_agent(dacer_v2, compile=True, device=device, **settings)
    batch = dacer_v2.Batch(*(x.to(device) for x in small_batch(dacer_v2, size)))
    draws = eager.draw(size)
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        compiled.backward(batch, draws, True)
    for update_policy in (True, False):
        expected, _, stats = gradients(eager, batch, draws, update_policy)
        found, _, compiled_stats = gradients(compiled, batch, draws, update_policy)
        learning = [eager.critic, eager.policy] if update_policy else [eager.critic]
        assert len(expected) == sum(len(list(net.parameters())) for net in learning)
        torch.testing.assert_close(found | compiled_stats, expected | stats, rtol=1e-4, atol=1e-6)
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in compiled.parameters())
    with torch.no_grad():
        inputs = batch.obs, draws[0], eager.noise_std()
        actions = [agent.policy(*inputs).clone() for agent in (eager, compiled)]
        copied = deepcopy(compiled.policy)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not torch.equal(copied(*inputs), actions[1])  # It has weights of its own.
    torch.testing.assert_close(*actions)
    for name, value in eager.state_dict().items():
        assert torch.equal(value, compiled.state_dict()[name])  # Nothing has been written to.

    obs = batch.obs.cpu().numpy()
    acted = compiled.act(obs)
    kept = acted.clone()
    compiled.act(-obs)
    assert torch.equal(acted, kept)  # A CUDA graph would write over it.
    for agent in (eager, compiled):
        agent.rng.manual_seed(3)
    for number in range(1, 5):  # Not 0: rounding may change the clusters of the entropy.
        wanted, found = (agent.update(batch, number) for agent in (eager, compiled))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_loaded_policy_may_be_compiled(algo, tiny_args):
    """A lone observation is no other shape."""
    args = tiny_args(env_id="toy_envs:Reach-v0", diffusion_steps=1, hidden_sizes=(16,))
    train(algo, args)
    torch.compiler.reset()
    space = gym.make("toy_envs:Reach-v0").action_space
    eager, compiled = (algo.load_agent("trained", compile=compile) for compile in (False, True))
    actions = [algo.make_actor(agent.policy, space)(np.ones((1, 2))) for agent in (eager, compiled)]
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        lone = algo.make_actor(compiled.policy, space)(np.ones(2))
    np.testing.assert_allclose(lone, actions[0][0], atol=1e-6)


def test_a_copy_of_a_compiled_agent_has_its_own_update(algo, tiny_args):
    agent = algo.Agent(2, 1, algo.resolve(tiny_args(compile=True)))
    copied = deepcopy(agent)
    assert copied.backward.__self__ is copied
    assert copied.rng is not agent.rng
    assert copied.rng.get_state().equal(agent.rng.get_state())


@pytest.mark.parametrize("compiled", [False, True])
def test_mish(compiled):
    """It is within 1e-6 of the exact value, and its gradient within 1e-5, at every number that a
    network can meet."""
    torch.compiler.reset()
    mish = torch.compile(dacer.Mish()) if compiled else dacer.Mish()
    tiny = torch.logspace(-44, 0, 20_000, dtype=torch.float64)
    x = torch.cat([torch.linspace(-120, 120, 50_001, dtype=torch.float64), tiny, -tiny]).float()
    x = torch.cat([x, torch.tensor([0.0, 1e10, 3e38, -1e10, -3e38, torch.nan])])
    exact_x = x.double().requires_grad_()
    exact = F.mish(exact_x)
    exact[:-1].sum().backward()
    x.requires_grad_()
    value = mish(x)
    value[:-1].sum().backward()
    scale = exact.detach().abs().clamp(min=1)
    assert ((value.double() - exact).abs() / scale)[:-1].max() < 1e-6
    assert (x.grad - exact_x.grad)[:-1].abs().max() < 1e-5
    assert value[-1].isnan()


def test_the_buffer_takes_no_memory_before_it_is_used():
    """That of Humanoid has 3 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffer = dacer.ReplayBuffer(1_000_000, 376, 17, "cpu")
    buffer.add(*(torch.zeros(20, *field.shape[1:]) for field in buffer.data))
    assert sum(field.numel() for field in buffer.data) * 4 > 3e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
