"""What makes the scripts fast changes none of their numbers.

That is compilation, the form of Mish, the buffer, and environments in processes of their own.
"""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ENVIRONMENT, TESTS, TINY
from test_update import gradients, make_agent, make_batch
from torch._inductor import config as inductor

import dacer
import dacer_v2

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@inductor.patch(fx_graph_cache=False)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_compiled_agent_computes_the_same_and_is_compiled_once(device, monkeypatch):
    """Actions, statistics and gradients, at full weight of the Q-gradient; then no update compiles
    anything more.

    (test_golden compares with recorded numbers.) The batch is as large as the hidden layers, so
    that a compiler that takes the memory of weights for activations of their size would be seen. So
    would one that pads matrices, as it does on a GPU if their widths (Ant's, not Hopper's) make
    that faster: Adam takes no gradient with gaps.
    """
    torch.compiler.reset()
    for name in ("has_triton", "check_device", "_should_pad"):
        monkeypatch.setattr(f"torch._inductor.fx_passes.pad_mm.{name}", lambda *_: True)
    size = 32
    settings = {"diffusion_steps": 2, "q_grad_weight": 1.0, "device": device, "entropy_interval": 2}
    eager = make_agent(dacer_v2, compile=False, **settings)
    compiled = make_agent(dacer_v2, compile=True, **settings)
    batch = dacer_v2.Batch(*(x.to(device) for x in make_batch(size)))
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

    def update(first, last):
        for step in range(first, last):
            compiled.act(np.zeros((5, 4)))
            compiled.update(batch, step)

    update(0, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        update(2, 6)
        # Another number of environments would be compiled.
        with pytest.raises(RuntimeError, match="recompile"):
            compiled.act(np.zeros((4, 4)))


@pytest.mark.parametrize("algo", [dacer], indirect=True)
def test_a_compiled_run_repeats_bit_for_bit(algo, tiny_args):
    """Here once with asynchronous environments, which give the same bits. The policy may be
    compiled when it is loaded."""
    args = tiny_args(env_id="toy_envs:Reach-v0", compile=True, diffusion_steps=2)
    algo.main(args, Path("first"))
    algo.main(replace(args, async_envs=True), Path("second"))
    assert json.loads(Path("first/args.json").read_text())["compile"] is True
    first, second = algo.load_agent("first"), algo.load_agent("second", compile=True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    space = gym.make("toy_envs:Reach-v0").action_space
    actions = [algo.make_actor(agent.policy, space)(np.ones((1, 2))) for agent in (first, second)]
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-6)
    # A lone observation is no other shape.
    with torch.compiler.set_stance("fail_on_recompile"):
        algo.make_actor(second.policy, space)(np.ones(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_mish(compiled):
    """It is within 1e-6 of the exact value, and its gradient within 1e-5, at every number that a
    network can meet."""
    torch.compiler.reset()
    mish = torch.compile(dacer.Mish()) if compiled else dacer.Mish()
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
    assert (x.grad - exact_x.grad).abs().max() < 1e-5
    assert mish(torch.tensor(torch.nan)).isnan()


def test_the_buffer_takes_no_memory_before_it_is_used():
    """That of Humanoid has 3 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffer = dacer.ReplayBuffer(1_000_000, 376, 17, "cpu")
    buffer.add(*(torch.zeros(20, *field.shape[1:]) for field in buffer.data))
    assert sum(field.numel() for field in buffer.data) * 4 > 3e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    ("async_envs", "how", "at", "says"),
    [
        (False, "raise", 45, "the simulator diverged"),
        (True, "raise", 45, "the simulator diverged"),
        (True, "exit", 45, "Error"),
        (True, "hang", 45, "TimeoutError"),
        (False, "nan observation", 45, "NaN or infinity in next_obs[1] at environment step 90"),
        (True, "nan reward", 45, "NaN or infinity in reward[1] at environment step 90"),
        (False, "huge reward", 45, "NaN or infinity in reward[1] at environment step 90"),
        (False, "longer observation", 45, "ValueError"),
        (False, "nan reward", 5, "NaN or infinity in an evaluation's reward"),
        (False, "raise", 5, "the simulator diverged"),  # in the evaluation
    ],
)
@pytest.mark.parametrize("algo", [dacer], ids=["dacer"], indirect=True)
def test_an_environment_that_fails(algo, tiny_args, monkeypatch, async_envs, how, at, says):
    """An exception with a note that says how to go on; the last checkpoint stays."""
    monkeypatch.setattr(algo, "TIMEOUT", 2.0)
    monkeypatch.setattr(algo.signal, "signal", lambda *_: None)
    args = tiny_args(env_id="toy_envs:Failing-v0", async_envs=async_envs)
    make_envs, kinds = algo.make_envs, iter(("training's", "evaluations'"))

    def make(args, *rest):
        fails = (next(kinds) == "evaluations'") == (at == 5)
        kwargs = json.dumps({"at": at, "how": how, "fails": fails})
        return make_envs(replace(args, env_kwargs=kwargs), *rest)

    monkeypatch.setattr(algo, "make_envs", make)
    monkeypatch.setattr(algo.tyro, "cli", lambda *_, **__: args)
    with pytest.raises(Exception) as stopped:
        algo.run_command_line()
    (run_dir,) = Path("runs").iterdir()
    assert says in f"{stopped.type.__name__}: {stopped.value}"
    assert f"--resume {run_dir}" in stopped.value.__notes__[0]
    assert algo.load_agent(run_dir)
    for process in multiprocessing.active_children():
        process.join(20)  # Killed, it may take a moment.
    assert not multiprocessing.active_children()


def test_no_process_is_left_of_a_run_that_hung(tmp_path):
    """Were there any, they would hold the pipe, and the wait for its end would not end."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    how = {"env": ENVIRONMENT | {"PYTHONPATH": path}, "cwd": tmp_path, "timeout": 120}
    code = "import dacer; dacer.TIMEOUT = 5.0; dacer.run_command_line()"
    task = ["--env-id", "toy_envs:Failing-v0", "--env-kwargs", '{"how": "hang"}', "--async-envs"]
    words = [sys.executable, "-c", code, *task, *TINY]
    done = subprocess.run(words, **how, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TimeoutError" in done.stderr
