"""The parts of an update that the recorded numbers leave open."""

import numpy as np
import pytest
import torch


def make_agent(algo, obs_dim=4, act_dim=2, **changes):
    torch.manual_seed(0)
    return algo.Agent(
        obs_dim, act_dim, algo.resolve(algo.Args(hidden_sizes=(32, 32, 32), device="cpu", compile=False, **changes))
    )


def make_batch(algo, size=64, obs_dim=4, act_dim=2, terminated=0.0):
    torch.manual_seed(1)
    obs, next_obs = torch.randn(2, size, obs_dim)
    return algo.Batch(
        obs, 2 * torch.rand(size, act_dim) - 1, torch.randn(size), next_obs, torch.full((size,), terminated)
    )


def snapshot(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(module, before):
    return [not torch.equal(new, old) for new, old in zip(module.parameters(), before)]


def test_initial_weights(algo):
    """Truncated normal of std 1/sqrt(fan_in), cut at two std (which leaves 0.88 of it), and zero bias."""
    torch.manual_seed(0)
    layer = algo.linear(400, 300)
    assert layer.weight.abs().max() <= 2 / np.sqrt(400)
    assert layer.weight.abs().max() > 1.9 / np.sqrt(400)
    assert abs(layer.weight.std() * np.sqrt(400) - 0.8796) < 0.01
    assert not layer.bias.any()


@pytest.mark.parametrize("diffusion_steps", [1, 2, 50])
def test_any_number_of_diffusion_steps(algo, diffusion_steps):
    agent, batch = make_agent(algo, diffusion_steps=diffusion_steps), make_batch(algo)
    action = agent.act(batch.obs.numpy())
    assert action.shape == (64, 2)
    assert action.abs().max() <= 1
    stats = agent.update(batch, agent.draw(64), 0) | agent.update_alpha(agent.entropy(batch.obs[:4]))
    assert all(value.isfinite().all() for value in stats.values())


def test_exploration_noise(algo):
    """alpha * lambda is the noise's std, starts at 3 lambda, and is off where no std is given."""
    agent = make_agent(algo, noise_scale=0.02)
    assert abs(agent.noise_std() - 0.06) < 1e-6
    obs, noise = torch.randn(1000, 4), agent.policy.draw_noise(1000)
    plain, noisy = agent.policy(obs, noise), agent.policy(obs, noise, agent.noise_std())
    inside = noisy.abs() < 1
    assert inside.any()
    torch.testing.assert_close((noisy - plain)[inside], (0.06 * noise[-1])[inside])


def test_termination_stops_the_bootstrap_and_truncation_does_not(algo):
    agent = make_agent(algo)
    for terminated, depends in ((1.0, False), (0.0, True)):
        batch, draws = make_batch(algo, terminated=terminated), agent.draw(64)
        elsewhere = batch._replace(next_obs=batch.next_obs + 1.0)
        same = torch.equal(agent.critic_loss(batch, draws)[0], agent.critic_loss(elsewhere, draws)[0])
        assert same != depends


def test_what_moves_when(algo):
    """Critics move in every update, policy and targets in every second, log_alpha by a step of its own."""
    agent, batch = make_agent(algo), make_batch(algo)
    for step in range(4):
        nets = {"critic": agent.critic, "policy": agent.policy, "target": agent.target_critic}
        before = {name: snapshot(net) for name, net in nets.items()}
        log_alpha = agent.log_alpha.item()
        agent.update(batch, agent.draw(64), step)
        if step == 2:
            agent.update_alpha(torch.tensor(1.0))
        assert all(moved(agent.critic, before["critic"]))
        assert (
            all(moved(agent.policy, before["policy"])) == any(moved(agent.policy, before["policy"])) == (step % 2 == 0)
        )
        assert all(moved(agent.target_critic, before["target"])) == (step % 2 == 0)
        assert (agent.log_alpha.item() != log_alpha) == (step == 2)


def test_targets_follow_the_new_critics(algo):
    agent, batch = make_agent(algo, tau=0.1, learning_rate=0.1), make_batch(algo)
    before = snapshot(agent.target_critic)
    agent.update(batch, agent.draw(64), 0)
    for old, new, critic in zip(before, agent.target_critic.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * critic.detach())
        assert (new - old).abs().max() > 1e-3
        assert not new.requires_grad  # nor does a graph of all averages so far hang on it
        assert new.grad_fn is None


def test_alpha_seeks_the_target_entropy(algo):
    """Too little entropy raises the exploration noise, too much lowers it."""
    for entropy, sign in ((-5.0, 1), (5.0, -1)):
        agent = make_agent(algo)
        before = agent.log_alpha.item()
        agent.update_alpha(torch.tensor(entropy))
        assert abs(agent.log_alpha.item() - before - sign * 0.03) < 1e-4  # Adam's first step is the learning rate


def test_policy_gradient_flows_through_the_whole_chain(algo):
    """The loss depends on x_T by way of every step: the gradient with respect to it is not zero."""
    agent = make_agent(algo, diffusion_steps=3)
    batch, draws = make_batch(algo), agent.draw(64)
    noise = draws.noise.requires_grad_()
    agent.policy_loss(batch, draws._replace(noise=noise))[0].backward()
    assert noise.grad.abs().sum((1, 2)).gt(0).all()


def test_policy_loss_leaves_the_critics_alone(algo):
    """An update's critic gradient is that of the critic loss alone; the policy loss has none for the critics."""
    agent, batch = make_agent(algo), make_batch(algo)
    draws = agent.draw(64)
    expected = torch.autograd.grad(agent.critic_loss(batch, draws)[0], list(agent.critic.parameters()))
    agent.update(batch, draws, 0)
    for parameter, gradient in zip(agent.critic.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    loss, critics = agent.policy_loss(batch, draws)[0], list(agent.critic.parameters())
    assert not any(g is not None for g in torch.autograd.grad(loss, critics, allow_unused=True))


def test_replay_buffer_is_a_ring(algo):
    buffer = algo.ReplayBuffer(5, 1, 1, "cpu")
    for start in (0, 3):
        rows = np.arange(start, start + 3)
        buffer.add(rows[:, None], rows[:, None] / 10, 2.0 * rows, rows[:, None] + 1, rows % 2 == 0)
    assert (buffer.size, buffer.position) == (5, 1)
    torch.manual_seed(0)
    batch = buffer.sample(1000)
    assert set(batch.obs[:, 0].tolist()) == {1, 2, 3, 4, 5}  # 0 was overwritten by 5
    torch.testing.assert_close(batch.next_obs, batch.obs + 1)
    torch.testing.assert_close(batch.reward, 2 * batch.obs[:, 0])
    torch.testing.assert_close(batch.action, batch.obs / 10)
    torch.testing.assert_close(batch.terminated, (batch.obs[:, 0] % 2 == 0).float())


def test_evaluation_takes_no_exploration_noise_and_no_training_randomness(algo):
    agent = make_agent(algo, obs_dim=2, act_dim=2)
    args = algo.resolve(algo.Args(env_id="toy_envs:Reach-v0"))
    envs = algo.make_envs(args, 4)

    def returns(seed):
        return algo.evaluate(algo.make_actor(agent.policy, envs.single_action_space, seed), envs, seed)

    state = torch.get_rng_state()
    first, again = returns(3), returns(3)
    assert first.shape == (4,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, returns(4))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        agent.log_alpha.fill_(5.0)
    assert np.array_equal(first, returns(3))
