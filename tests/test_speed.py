"""What makes the scripts fast changes none of their numbers: compilation, the form of Mish, CUDA graphs, the buffer."""

import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_agent(algo, compile=True, device="cpu"):
    torch.compiler.reset()
    torch.manual_seed(0)
    args = algo.resolve(algo.Args(hidden_sizes=(16, 16), diffusion_steps=2, device=device, compile=compile))
    return algo.Agent(3, 2, args)


def make_batch(algo, size=8, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(size, *shape, generator=generator) for shape in ((3,), (2,), (), (3,))]
    return algo.Batch(*(part.to(device) for part in (*parts, torch.zeros(size))))


def few_updates(algo, agent, first, last):
    batch = make_batch(algo)
    for step in range(first, last):
        agent.act(np.zeros((5, 3)))
        agent.update(batch, agent.draw(8), step)
        agent.update_alpha(agent.entropy(batch.obs))


def test_nothing_is_compiled_after_the_first_two_updates(algo):
    agent = make_agent(algo)
    few_updates(algo, agent, 0, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        few_updates(algo, agent, 2, 6)
        with pytest.raises(RuntimeError, match="recompile"):  # another number of environments would be compiled
            agent.act(np.zeros((4, 3)))


def test_a_compiled_agent_computes_the_same(algo):
    """(test_golden compares both with recorded numbers, where eta is 0.)"""
    results = []
    for compile in (False, True):
        agent, batch = make_agent(algo, compile), make_batch(algo)
        stats = agent.update(batch, agent.draw(8), 0)
        stats |= agent.update(batch, agent.draw(8), 1)
        results.append(stats | dict(agent.named_parameters()))
    for name, eager in results[0].items():
        torch.testing.assert_close(results[1][name], eager, rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_compiler(algo, tiny_args, monkeypatch, capsys):
    """A run says so in one line and goes on without."""

    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    run_dir = algo.main(tiny_args(env_id="toy_envs:Reach-v0", compile=True))
    said = [line for line in capsys.readouterr().out.splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1
    assert "No working C++ compiler found" in said[0]
    assert not algo.load_agent(run_dir).args.compile


@pytest.mark.parametrize("compiled", [False, True])
def test_mish(algo, compiled):
    """Within 1e-6 of the exact value, and so is its gradient; infinities and NaN are treated as by PyTorch's own."""
    torch.compiler.reset()
    mish = torch.compile(algo.Mish.apply) if compiled else algo.Mish.apply
    tiny = torch.logspace(-44, 0, 20_000, dtype=torch.float64)
    x = torch.cat([torch.linspace(-120, 120, 50_001, dtype=torch.float64), tiny, -tiny]).float()
    x = torch.cat([x, torch.tensor([0.0, 1e10, 3e38, -1e10, -3e38])])
    exact_x = x.double().requires_grad_()
    exact = F.mish(exact_x)
    exact.sum().backward()
    x.requires_grad_()
    value = mish(x)
    value.sum().backward()
    scale = exact.detach().abs().clamp(min=1)
    assert ((value.double() - exact).abs() / scale).max() < 1e-6
    assert (x.grad - exact_x.grad).abs().max() < 1e-6
    extreme = torch.tensor([torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(mish(extreme), F.mish(extreme), equal_nan=True, rtol=0, atol=0)


def test_the_buffer_takes_no_memory_before_it_is_used(algo):
    """That of Humanoid has 3 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffer = algo.ReplayBuffer(1_000_000, 376, 17, "cpu")
    buffer.add(*(torch.zeros(20, *field.shape[1:]) for field in buffer.data))
    assert sum(field.numel() for field in buffer.data) * 4 > 3e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(("async_envs", "seen"), [(False, [42, 44, 46]), (True, [40, 42, 44])])
def test_what_an_update_sees(algo, tiny_args, monkeypatch, async_envs, seen):
    """Asynchronous environments step during the update: their transitions join the next batch."""
    sizes, original = [], algo.ReplayBuffer.sample

    def sample(self, batch_size):
        sizes.append(int(self.size))
        return original(self, batch_size)

    monkeypatch.setattr(algo.ReplayBuffer, "sample", sample)
    algo.main(tiny_args(env_id="toy_envs:Reach-v0", async_envs=async_envs, entropy_interval=1000))
    assert sizes[0] == sizes[1]  # the first update also estimates the entropy
    assert sizes[1:4] == seen


@pytest.mark.parametrize(
    ("async_envs", "how", "says"),
    [(False, "raise", "the simulator diverged"), (True, "raise", "the simulator diverged"), (True, "exit", "")],
)
def test_an_environment_that_fails(algo, tiny_args, capsys, async_envs, how, says):
    """One line, exit code 2, the traceback in a file; the checkpoint of the last evaluation stays."""
    kwargs = f'{{"at": 45, "how": "{how}"}}'
    with pytest.raises(SystemExit) as stopped:
        algo.main(tiny_args(env_id="toy_envs:Failing-v0", env_kwargs=kwargs, async_envs=async_envs, eval_episodes=1))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "toy_envs:Failing-v0 failed at environment step 90" in error
    assert says in error
    run_dir = error.split("(more in ")[1].removesuffix("/error.txt)")
    assert algo.load_agent(run_dir)


def test_async_environments_need_a_first_transition(algo, tiny_args, capsys):
    with pytest.raises(SystemExit):
        algo.main(tiny_args(env_id="toy_envs:Reach-v0", async_envs=True, learning_starts=0))
    assert "--async-envs needs --learning-starts 1 or more" in capsys.readouterr().err


@needs_cuda
def test_cuda_graphs_replay_the_same_updates(algo):
    """From the fourth update of either kind on graphs are replayed; they compute what plain updates compute."""
    batch, weights = make_batch(algo, device="cuda"), []
    for graphed in (False, True):
        agent = make_agent(algo, device="cuda")
        draws = agent.draw(8)
        update = lambda step, agent=agent, draws=draws: agent.update(batch, draws, step)
        update = algo.GraphedUpdates(update, 2) if graphed else update
        for step in range(12):
            stats = update(step)
        assert stats["qf{}_loss"].isfinite().all()
        weights.append([parameter.detach().clone() for parameter in agent.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
