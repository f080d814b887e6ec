"""What makes the scripts fast changes none of their numbers: compilation, the form of Mish, CUDA graphs, the buffer."""

import json
import multiprocessing
import re
import resource
from pathlib import Path

import gymnasium as gym
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


@pytest.mark.parametrize("whole_graph_steps", [1, 10])
def test_a_compiled_agent_computes_the_same(algo, monkeypatch, whole_graph_steps):
    """Losses and gradients, in one graph and in several, with the Q-gradient's full weight.

    (test_golden compares with recorded numbers: T = 5 in one graph, T = 20 in several.)
    """
    monkeypatch.setattr(algo, "WHOLE_GRAPH_STEPS", whole_graph_steps)
    results = []
    for compile in (False, True):
        agent, batch = make_agent(algo, compile), make_batch(algo)
        if hasattr(agent.args, "q_grad_weight"):
            agent.args.q_grad_weight = 1.0
        if compile:
            with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
                agent.update(batch, agent.draw(8), 0)
        torch.manual_seed(2)
        stats = agent.update(batch, agent.draw(8), 0)
        gradients = {name: parameter.grad for name, parameter in agent.named_parameters() if parameter.grad is not None}
        results.append(stats | gradients)
    assert len(results[0]) > 20
    for name, eager in results[0].items():
        torch.testing.assert_close(results[1][name], eager, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loaded_policy_may_be_compiled(algo, tiny_args):
    run_dir, obs = algo.main(tiny_args(env_id="toy_envs:Reach-v0")), np.ones((1, 2))
    torch.compiler.reset()
    space = gym.make("toy_envs:Reach-v0").action_space
    actions = [
        algo.make_actor(algo.load_agent(run_dir, compile=compile).policy, space)(obs) for compile in (False, True)
    ]
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-6)


def test_a_compiled_run_repeats_bit_for_bit(algo, tiny_args):
    """Here with asynchronous environments."""
    args = tiny_args(env_id="toy_envs:Reach-v0", compile=True, async_envs=True)
    first, second = algo.main(args), algo.main(args)
    assert json.loads((first / "args.json").read_text())["compile"] is True
    for a, b in zip(algo.load_agent(first).parameters(), algo.load_agent(second).parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_compiler(algo, tiny_args, monkeypatch, capsys):
    """A run says so in one line and goes on without."""

    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    run_dir = algo.main(tiny_args(env_id="toy_envs:Reach-v0", compile=True))
    said = [line for line in capsys.readouterr().out.splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1
    assert "No working C++ compiler found" in said[0]
    assert json.loads((run_dir / "args.json").read_text())["compile"] is False


@pytest.mark.parametrize("compiled", [False, True])
def test_mish(algo, compiled):
    """Within 1e-6 of the exact value, and so is its gradient; infinities and NaN give what PyTorch's own gives."""
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
    extreme = torch.tensor([torch.inf, -torch.inf, torch.nan], requires_grad=True)
    value = mish(extreme)
    torch.testing.assert_close(value, F.mish(extreme), equal_nan=True, rtol=0, atol=0)
    value.sum().backward()  # PyTorch's gradient at infinity is NaN, where the limit is 1
    torch.testing.assert_close(extreme.grad, torch.tensor([1.0, torch.nan, torch.nan]), equal_nan=True)


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
    ("async_envs", "how", "at", "step", "says"),
    [
        (False, "raise", 45, 90, "the simulator diverged"),
        (True, "raise", 45, 90, "the simulator diverged"),
        (True, "exit", 45, 90, ""),
        (True, "hang", 45, 90, "TimeoutError"),
        (False, "nan observation", 45, 90, "observation nan from environment 0 of 2"),
        (True, "nan reward", 45, 90, "reward nan from environment 0 of 2"),
        (False, "huge reward", 45, 90, "reward 1e+39 from environment 0 of 2"),
        (False, "longer observation", 45, 90, "ValueError"),
        (False, "nan reward", 12, 120, "return nan from environment 0 of 3"),
        (False, "raise", 12, 120, "the simulator diverged"),  # in the second evaluation
    ],
)
def test_an_environment_that_fails(algo, tiny_args, capfd, monkeypatch, async_envs, how, at, step, says):
    """One line, exit code 2, the traceback in a file; the checkpoint of an evaluation that went well stays."""
    monkeypatch.setattr(algo, "ENV_TIMEOUT", 2)
    kwargs = json.dumps({"at": at, "how": how, "fails": at == 45})
    evaluate = algo.evaluate

    def fails_too(act, envs, seed):  # where no training environment does
        for env in envs.envs:
            env.unwrapped.fails = at == 12
        return evaluate(act, envs, seed)

    monkeypatch.setattr(algo, "evaluate", fails_too)
    with pytest.raises(SystemExit) as stopped:
        algo.main(tiny_args(env_id="toy_envs:Failing-v0", env_kwargs=kwargs, async_envs=async_envs))
    assert stopped.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{algo.__name__}.py: error: toy_envs:Failing-v0 failed at environment step {step}: ")
    assert says in error
    run_dir = Path(
        re.search(r"\(more in (.*)/error.txt\); the last checkpoint stays, --resume \1 goes on from it$", error)[1]
    )
    assert "Error" in (run_dir / "error.txt").read_text()
    assert algo.load_agent(run_dir)
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children()


def test_async_environments_need_a_first_transition(algo, tiny_args, capsys):
    with pytest.raises(SystemExit):
        algo.main(tiny_args(env_id="toy_envs:Reach-v0", async_envs=True, learning_starts=0))
    assert "--async-envs needs --learning-starts 1 or more" in capsys.readouterr().err


@needs_cuda
@pytest.mark.parametrize("whole_graph_steps", [1, 10])
def test_cuda_graphs_replay_the_same_updates(algo, monkeypatch, whole_graph_steps):
    """Graphs compute what plain updates compute: own random numbers, a growing buffer and steps of alpha included."""
    monkeypatch.setattr(algo, "WHOLE_GRAPH_STEPS", whole_graph_steps)
    histories = []
    for graphed in (False, True):
        agent = make_agent(algo, device="cuda")
        buffer = algo.ReplayBuffer(1000, 3, 2, "cuda")
        buffer.add(*make_batch(algo))

        def update(step, agent=agent, buffer=buffer):
            return agent.update(buffer.sample(8), agent.draw(8), step)

        update = algo.GraphedUpdates(update, 2) if graphed else update
        torch.manual_seed(3)
        history = []
        for step in range(14):
            stats = update(step)
            agent.update_alpha(torch.tensor(float(step), device="cuda"))
            buffer.add(*make_batch(algo))
            history.append({name: value.clone() for name, value in stats.items()} | {"omega": agent.omega.clone()})
        histories.append(history)
    for plain, replayed in zip(*histories):
        torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-4)
