"""The parts of an update that the recorded numbers leave open.

They are tested in dacer.py; dacer_v2.py has the same text there.
"""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import evaluate, gradients, small_agent, small_batch
from torch import nn

import dacer
import dacer_v2

OBS_DIM, ACT_DIM, B = 4, 2, 64


def moved(module, before):
    pairs = zip(module.parameters(), before.parameters(), strict=True)
    return [not torch.equal(new, old) for new, old in pairs]


def test_initial_weights():
    """Truncated normal of std 1/sqrt(fan_in), cut at two std, and zero bias.

    The cut leaves 0.88 of the std.
    """
    torch.manual_seed(0)
    net = dacer.mlp(100, 400, 300)
    assert [type(layer) for layer in net] == [nn.Linear, dacer.Mish, nn.Linear]
    for layer in net[::2]:
        weight = layer.weight * layer.in_features**0.5
        assert 1.9 < weight.abs().max() <= 2
        assert abs(weight.std() - 0.8796) < 0.01
        assert not layer.bias.any()


@pytest.mark.parametrize("diffusion_steps", [1, 2, 50])
def test_any_number_of_diffusion_steps(diffusion_steps):
    agent, batch = small_agent(dacer, diffusion_steps=diffusion_steps), small_batch(dacer)
    action = agent.act(batch.obs.numpy())
    assert action.shape == (B, ACT_DIM)
    assert action.abs().max() <= 1
    stats = agent.update(batch, 0)
    assert {"entropy", "actor_loss"} <= stats.keys()
    assert all(value.isfinite().all() for value in stats.values())


def test_exploration_noise():
    """alpha * lambda is the noise's std, starts at 3 lambda, and is off where no std is given."""
    agent = small_agent(dacer, noise_scale=0.02)
    assert abs(agent.noise_std() - 0.06) < 1e-6
    obs, noise = torch.randn(1000, OBS_DIM), agent.policy.draw_noise(1000)
    plain, noisy = agent.policy(obs, noise), agent.policy(obs, noise, agent.noise_std())
    inside = noisy.abs() < 1
    assert inside.any()
    torch.testing.assert_close((noisy - plain)[inside], (0.06 * noise[0])[inside])
    agent.rng.manual_seed(5)
    acted = agent.act(obs.numpy())
    agent.rng.manual_seed(5)
    noise = agent.policy.draw_noise(1000, rng=agent.rng)
    assert torch.equal(acted, agent.policy(obs, noise, agent.noise_std()))


class Table(nn.Module):
    """Critics whose means and stds are a table with one entry per sample.

    So gradients can be read off it.
    """

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean), nn.Parameter(std)

    def forward(self, obs, action):
        return self.mean, self.std


@pytest.mark.parametrize("omega", [0.0, 0.4])
def test_critic_loss_by_hand(omega):
    """DSAC's loss and its slopes in float64, sample by sample.

    Which target critic is the smaller is found for each sample. (Other public code takes one of
    them for the whole batch. That gives another number, as the last lines hold.)
    """
    agent = small_agent(dacer, gamma=0.9, tau=0.02, reward_scale=0.3)
    batch = small_batch(dacer)
    next_noise, _, noise = agent.draw(B)
    z = 3 * torch.randn(2, B)  # many beyond +-3
    agent.critic = Table(torch.randn(2, B), 0.2 + torch.rand(2, B))
    agent.target_critic = Table(torch.randn(2, B), 0.2 + torch.rand(2, B))
    agent.omega.fill_(omega)
    found, new_omega, stats = gradients(agent, batch, (next_noise, z, noise), update_policy=False)

    def table(critic):
        return critic.mean.detach().double().numpy(), critic.std.detach().double().numpy()

    (m, s), (target_m, target_s) = table(agent.critic), table(agent.target_critic)
    z = z.double().numpy()
    reward, terminated = batch.reward.double().numpy(), batch.terminated.double().numpy()
    smaller = target_m.argmin(0)
    assert 10 < smaller.sum() < B - 10
    assert 10 < terminated.sum() < B - 10
    w = np.where(omega == 0, s.mean(1), omega + 0.02 * (s.mean(1) - omega))

    def loss_and_slopes(chosen):
        loss, slopes = np.zeros(2), np.zeros((2, 2, B))
        for i in (0, 1):
            for b in range(B):
                j = chosen[b]
                sample = target_m[j, b] + target_s[j, b] * np.clip(z[j, b], -3, 3)
                discount = 0.9 * (1 - terminated[b])
                y = 0.3 * reward[b] + discount * target_m[smaller[b], b]
                y_z = 0.3 * reward[b] + discount * sample
                y_b = m[i, b] + np.clip(y_z - m[i, b], -3 * w[i], 3 * w[i])
                slope_m = (y - m[i, b]) / (s[i, b] ** 2 + 0.1)
                slope_s = ((m[i, b] - y_b) ** 2 - s[i, b] ** 2) / (s[i, b] ** 3 + 0.1)
                loss[i] -= (w[i] ** 2 + 0.1) * (m[i, b] * slope_m + s[i, b] * slope_s) / B
                slopes[:, i, b] = -(w[i] ** 2 + 0.1) * np.array([slope_m, slope_s]) / B
        return loss, slopes

    loss, slopes = loss_and_slopes(smaller)
    np.testing.assert_allclose(new_omega, w, rtol=1e-5)
    np.testing.assert_allclose([stats["qf1_loss"], stats["qf2_loss"]], loss, rtol=1e-4)
    found = torch.stack([found["critic.mean"], found["critic.std"]])
    np.testing.assert_allclose(found, slopes, rtol=1e-4, atol=1e-7)
    for of_all in (0, 1):
        assert (np.abs(loss - loss_and_slopes(np.full(B, of_all))[0]) > 1e-3 * np.abs(loss)).all()


def test_the_critics_differ_and_their_targets_are_copies():
    """Before the first update."""
    agent = small_agent(dacer)
    assert not torch.equal(agent.critic.q1[0].weight, agent.critic.q2[0].weight)
    targets = agent.target_critic.state_dict()
    assert all(
        torch.equal(targets[name], value) for name, value in agent.critic.state_dict().items()
    )


def test_the_random_numbers_of_an_update():
    """They are independent normals, and the steps t are equally likely."""
    agent = small_agent(dacer_v2, diffusion_steps=2)
    next_noise, z, noise, t = agent.draw(20_000)
    columns = [part for tensor in (next_noise, noise) for part in tensor.unbind()]
    columns = torch.cat([*columns, z.T], dim=1)
    torch.testing.assert_close(columns.T.cov(), torch.eye(columns.shape[1]), rtol=0, atol=0.05)
    assert (columns.abs() > 3).any(0).all()
    assert t.unique().tolist() == [1, 2]
    assert abs(t.float().mean() - 1.5) < 0.02


def test_the_entropy_is_that_of_noisy_actions():
    """40 states are more than are sampled at once."""
    agent = small_agent(dacer, entropy_samples=12, noise_scale=0.15)
    obs = small_batch(dacer, 40).obs
    agent.rng.manual_seed(3)
    found = agent.entropy(obs)
    agent.rng.manual_seed(3)
    actions = []
    for part in obs.split(32):
        noise = agent.policy.draw_noise(len(part), 12, rng=agent.rng)
        with torch.no_grad():
            actions.append(agent.policy(part[:, None], noise, 3 * 0.15))  # alpha is 3 at the start
    wanted = dacer.mixture_entropy(torch.cat(actions), rng=agent.rng).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_agent_draws_from_its_own_generator():
    """Whatever tasks do to the global one."""
    ours, theirs = small_agent(dacer, entropy_interval=1), small_agent(dacer, entropy_interval=1)
    batch = small_batch(dacer)
    for agent in (ours, theirs):
        agent.rng.manual_seed(7)
    for step in range(3):
        state = torch.get_rng_state()
        ours.update(batch, step)
        acted = ours.act(batch.obs.numpy())
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(step)  # as a task may
        theirs.update(batch, step)
        assert torch.equal(acted, theirs.act(batch.obs.numpy()))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_what_moves_when():
    """Critics and omega move in every update, policy and targets in every second, and log_alpha, as
    is asked for here, in every third."""
    agent, batch = small_agent(dacer, entropy_interval=3), small_batch(dacer)
    for step in range(7):
        before, omega = deepcopy(agent), agent.omega.clone()
        stats = agent.update(batch, step)
        assert all(moved(agent.critic, before.critic))
        assert not torch.equal(agent.omega, omega)
        for net in ("policy", "target_critic"):
            assert set(moved(getattr(agent, net), getattr(before, net))) == {step % 2 == 0}
        assert (agent.log_alpha != before.log_alpha) == (step % 3 == 0) == ("entropy" in stats)
        assert ("actor_loss" in stats) == (step % 2 == 0)


@pytest.mark.parametrize("step", [0, 1])
def test_gradients_are_those_from_before_the_update(step):
    """Each network's gradient is of its own loss alone, and at the parameters that all networks
    have before any of them moves."""
    agent, batch = small_agent(dacer, learning_rate=0.1), small_batch(dacer)
    before, draws = deepcopy(agent), agent.draw(B)
    agent.draw = lambda size: draws
    agent.update(batch, step)
    expected = gradients(before, batch, draws, update_policy=False)[0]
    if step == 0:
        loss, _ = before.policy_loss(batch, draws[2])
        policy = dict(before.policy.named_parameters(prefix="policy"))
        found = torch.autograd.grad(loss, list(policy.values()), retain_graph=True)
        expected |= dict(zip(policy, found))
        critics = torch.autograd.grad(loss, list(before.critic.parameters()), allow_unused=True)
        assert not any(gradient is not None for gradient in critics)
    learned = {name: x.grad for name, x in agent.named_parameters() if x.grad is not None}
    assert learned.keys() - {"log_alpha"} == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(learned[name], gradient, rtol=1e-4, atol=1e-7)
        assert not learned[name].requires_grad
        parameter, old = agent.get_parameter(name), before.get_parameter(name)
        step_size = 0.1 * gradient / (gradient.abs() + 1e-8)  # Adam's first
        torch.testing.assert_close(parameter, old - step_size, rtol=1e-3, atol=1e-3)


def test_targets_follow_the_new_critics():
    agent, batch = small_agent(dacer, tau=0.1, learning_rate=0.1), small_batch(dacer)
    before = deepcopy(agent.target_critic)
    agent.update(batch, 0)
    for old, new, critic in zip(
        before.parameters(), agent.target_critic.parameters(), agent.critic.parameters()
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * critic.detach())
        assert (new - old).abs().max() > 1e-3
        assert not new.requires_grad  # nor does a graph of all averages so far hang on it
        assert new.grad_fn is None


@pytest.mark.parametrize("entropy, sign", [(-5.0, 1), (5.0, -1)])
def test_alpha_seeks_the_target_entropy(entropy, sign):
    """Too little entropy raises the exploration noise, too much lowers it."""
    agent, batch = small_agent(dacer, alpha_lr=0.05), small_batch(dacer)
    before, states = agent.log_alpha.item(), []
    agent.entropy = lambda obs: states.append(obs) or torch.tensor(entropy)
    agent.update(batch, 0)
    assert states[0] is batch.obs
    # Adam's first step is the learning rate.
    assert abs(agent.log_alpha.item() - before - sign * 0.05) < 1e-4
    assert agent.target_entropy == -0.9 * ACT_DIM
    torch.testing.assert_close(agent.log_alpha.grad, torch.tensor(entropy + 0.9 * ACT_DIM))


@pytest.mark.parametrize("script", [dacer, dacer_v2])
def test_policy_gradient_flows_through_the_whole_chain(script):
    """The loss depends on x_T by way of every step, on each step's noise, and on the exploration
    noise."""
    agent, batch = small_agent(script, diffusion_steps=3), small_batch(script)
    _, _, noise, *t = agent.draw(B)
    agent.policy_loss(batch, noise.requires_grad_(), *t)[0].backward()
    assert noise.grad.abs().sum((1, 2)).gt(0).all()


def test_replay_buffer_is_a_ring():
    buffer = dacer.ReplayBuffer(5, 1, 1, "cpu")
    for start in (0, 3):
        rows = np.arange(start, start + 3)
        buffer.add(rows[:, None], rows[:, None] / 10, 2.0 * rows, rows[:, None] + 1, rows % 2 == 0)
        torch.manual_seed(0)
        batch = buffer.sample(1000)
        # 0 was overwritten by 5
        assert set(batch.obs[:, 0].tolist()) == ({0, 1, 2} if start == 0 else {1, 2, 3, 4, 5})
        torch.testing.assert_close(batch.next_obs, batch.obs + 1)
        torch.testing.assert_close(batch.reward, 2 * batch.obs[:, 0])
        torch.testing.assert_close(batch.action, batch.obs / 10)
        torch.testing.assert_close(batch.terminated, (batch.obs[:, 0] % 2 == 0).float())
    with pytest.raises(ValueError):  # A field that is left out would hold what was in memory.
        buffer.add(rows[:, None], rows[:, None], rows, rows[:, None])
    # Three rows for one of the other fields would be stored with it three times.
    with pytest.raises((IndexError, RuntimeError)):
        buffer.add(rows[:, None], np.ones((1, 1)), np.ones(1), rows[:, None], np.zeros(1))
    # These are more than it holds: it keeps the latest.
    rows = torch.arange(12.0)
    buffer.add(*(rows.reshape(-1, *[1] * (field.ndim - 1)) for field in buffer.data))
    assert all({*field.flatten().tolist()} == {7, 8, 9, 10, 11} for field in buffer.data)
    assert (buffer.data.obs == buffer.data.next_obs).all()


def test_actions_are_mapped_to_the_bounds():
    space = gym.spaces.Box(np.float32([[-2.0, 0.0, 0.1]]), np.float32([[2.0, 1.0, 0.7]]))
    sent = dacer.to_env(torch.tensor([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), space)
    assert sent.shape == (3, 1, 3)
    assert sent.dtype == np.float32
    expected = [[-2, 0, 0.1], [0, 0.5, 0.4], [2, 1, 0.7]]
    np.testing.assert_allclose(sent[:, 0], expected, rtol=1e-6, atol=1e-7)
    assert all(action in space for action in sent)
    assert all(action in space for action in dacer.to_env(2 * torch.rand(1000, 3) - 1, space))
    # In single precision -1 + (0.1 - -1) is more than 0.1.
    space = gym.spaces.Box(np.float32([-1.0]), np.float32([0.1]))
    assert dacer.to_env(torch.ones(1, 1), space)[0] in space


def test_an_agent_acts_for_one_observation_or_many():
    agent = small_agent(dacer)
    assert agent.act(np.ones((5, OBS_DIM))).shape == (5, ACT_DIM)
    assert agent.act(np.ones(OBS_DIM)).shape == (1, ACT_DIM)


def test_a_part_that_a_reader_adds_learns():
    """All that has gradients is stepped, with the networks' learning rate, and log_alpha with its
    own."""

    class WithEncoder(dacer.Agent):
        def to(self, *where):  # Where __init__ calls it, all parts are there.
            self.encoder = nn.Linear(2, 2)
            return super().to(*where)

    agent = WithEncoder(OBS_DIM, ACT_DIM, small_agent(dacer).args)
    networks, alpha = ({*map(id, group["params"])} for group in agent.optimizer.param_groups)
    learning = agent.encoder, agent.policy, agent.critic
    assert networks == {id(p) for part in learning for p in part.parameters()}
    assert alpha == {id(agent.log_alpha)}


def test_an_actor_takes_one_observation_or_many():
    space = gym.spaces.Box(-2.0, 2.0, (ACT_DIM,))
    policy, obs = small_agent(dacer).policy, np.ones((5, OBS_DIM))
    act = dacer.make_actor(policy, space, seed=1)
    first = act(obs)
    assert first.shape == (5, ACT_DIM)
    assert not np.array_equal(act(obs), first)  # It has new noise in every step.
    assert act(obs[0]) in space
    assert act(obs[:1]).shape == (1, ACT_DIM)
    assert np.array_equal(dacer.make_actor(policy, space, seed=1)(obs), first)
    for wrong in (np.ones(OBS_DIM + 1), np.ones((OBS_DIM, 1)), np.full(OBS_DIM, np.nan)):
        with pytest.raises(ValueError, match="no observation of 4 finite numbers"):
            act(wrong)


def test_an_actor_does_not_explore():
    """Its action is the denoised x_0, from noise of its own seed."""
    space = gym.spaces.Box(-1.0, 1.0, (ACT_DIM,))
    policy, obs = small_agent(dacer).policy, np.ones((5, OBS_DIM), np.float32)
    noise = policy.draw_noise(5, rng=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = policy.denoise(*policy.fixed_parts(torch.as_tensor(obs)), noise)
    found = dacer.make_actor(policy, space, seed=4)(obs)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_evaluations_take_no_training_randomness():
    agent = small_agent(dacer, sizes=(2, 2), env_id="toy_envs:Reach-v0", eval_episodes=4)

    def returns(seed):
        return evaluate(dacer, agent.policy, agent.args, seed)[0]

    state = agent.rng.get_state()
    first, again = returns(3), returns(3)
    assert first.shape == (4,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, returns(4))
    assert torch.equal(state, agent.rng.get_state())
