"""The mixture's entropy against scikit-learn, against known values, and on awkward samples."""

import math

import numpy as np
import pytest
import torch
from helpers import recordings
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

import dacer

AGREEMENT = 0.05  # nats


def sklearn_entropy(actions: torch.Tensor, seed: int = 42) -> np.ndarray:
    """The same estimate from scikit-learn's mixtures, one fit per state."""
    entropies = []
    for samples in actions.double().numpy():
        with threadpool_limits(1):  # Its threads wait for each other longer than they compute.
            mixture = GaussianMixture(3, random_state=seed).fit(samples)
        h = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * mixture.covariances_)[1]
        entropies.append(np.sum(mixture.weights_ * (h - np.log(mixture.weights_))))
    return np.array(entropies)


def modes(num_modes: int, dim: int, states: int = 96, std: float = 0.05) -> torch.Tensor:
    """Samples (states, 200, dim) of equally likely Gaussian modes, at most 3, that lie apart."""
    if dim > 1:
        centres = 0.85 * torch.eye(max(dim, num_modes))[:num_modes, :dim]
    else:
        centres = torch.linspace(-1, 1, num_modes)[:, None]
    return centres[torch.randint(num_modes, (states, 200))] + std * torch.randn(states, 200, dim)


def policy_actions(alpha_lambda: float) -> torch.Tensor:
    policy = dacer.DiffusionPolicy(11, 3, (64, 64, 64), 5)
    with torch.no_grad():
        return policy(2 * torch.randn(96, 1, 11), policy.draw_noise(96, 200), alpha_lambda)


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(lambda: 0.3 * torch.randn(96, 200, 1), id="gaussian-1d"),
        pytest.param(lambda: 0.3 * torch.randn(96, 200, 8), id="gaussian-8d"),
        pytest.param(lambda: 2 * torch.rand(96, 200, 3) - 1, id="uniform-3d"),
        pytest.param(lambda: modes(2, 3), id="two-modes-3d"),
        pytest.param(lambda: modes(3, 3), id="three-modes-3d"),
        pytest.param(lambda: modes(3, 8, std=0.2), id="three-wide-modes-8d"),
        pytest.param(lambda: policy_actions(0.1), id="policy"),
    ],
)
def test_agrees_with_sklearn(samples):
    torch.manual_seed(1)
    actions = samples()
    entropy = dacer.mixture_entropy(actions)
    assert entropy.shape == (len(actions),)
    assert abs(entropy.mean().item() - sklearn_entropy(actions).mean()) < AGREEMENT


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_modes_far_apart(dim):
    """With three modes that do not overlap, one for each component, the entropy is log(3) + that of
    one Gaussian.

    (Two modes leave a component to spare. It splits a Gaussian, and the estimate lies above the
    true value, as scikit-learn's does: see above.)
    """
    torch.manual_seed(2)
    exact = math.log(3) + 0.5 * dim * math.log(2 * math.pi * math.e * 0.05**2)
    # (64, 2000, dim): so many have little bias.
    actions = torch.cat([modes(3, dim, states=64, std=0.05) for _ in range(10)], 1)
    assert abs(dacer.mixture_entropy(actions).mean().item() - exact) < AGREEMENT


@pytest.mark.parametrize("dim", [1, 2, 17])
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(lambda dim: torch.full((8, 200, dim), 0.3), id="all-equal"),
        pytest.param(lambda dim: torch.ones(8, 200, dim), id="all-at-the-bound"),
        pytest.param(lambda dim: torch.randn(8, 200, dim).sign(), id="in-the-corners"),
        pytest.param(
            lambda dim: (5 * torch.randn(8, 200, dim)).clamp(-1, 1), id="pressed-against-the-bounds"
        ),
        pytest.param(lambda dim: torch.randn(8, 200, 1).expand(8, 200, dim), id="on-a-line"),
        pytest.param(lambda dim: torch.randn(8, 3, dim), id="three-samples"),
        pytest.param(lambda dim: 1e-9 * torch.randn(8, 200, dim), id="almost-equal"),
    ],
)
def test_never_nan(samples, dim):
    torch.manual_seed(3)
    assert dacer.mixture_entropy(samples(dim)).isfinite().all()


def test_all_equal_is_the_floor():
    """One point has only the covariance floor of 1e-6 left."""
    entropy = dacer.mixture_entropy(torch.full((4, 200, 2), 0.5))
    torch.testing.assert_close(entropy, torch.full((4,), math.log(2 * math.pi * math.e * 1e-6)))


def test_states_do_not_mix():
    """Each state's estimate is its own: side by side, a narrow and a wide state keep theirs."""
    torch.manual_seed(4)
    narrow, wide = 0.01 * torch.randn(32, 200, 2), torch.randn(32, 200, 2)
    together = dacer.mixture_entropy(torch.cat([narrow, wide]))
    assert abs(together[:32].mean().item() - sklearn_entropy(narrow).mean()) < AGREEMENT
    assert abs(together[32:].mean().item() - sklearn_entropy(wide).mean()) < AGREEMENT


def test_each_state_stops_by_itself():
    """States that go on beside one that has stopped leave its estimate as it is when alone."""
    torch.manual_seed(5)
    easy = modes(3, 2, states=1)  # stops after a few steps, a uniform state much later
    hard = 2 * torch.rand(16, 200, 2) - 1
    estimates = []
    for actions in (easy, torch.cat([easy, hard])):
        torch.manual_seed(6)  # the draws of the first state's centres
        estimates.append(dacer.mixture_entropy(actions)[0])
    torch.testing.assert_close(estimates[0], estimates[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", recordings(), ids=lambda path: path.stem)
def test_recorded_entropies(path):
    """The entropy of the recorded actions, which is scikit-learn's.

    Few states were recorded, so each side averages 16 random starts of every fit.
    """
    torch.manual_seed(0)
    golden = np.load(path)
    actions = torch.from_numpy(golden["entropy/actions"])
    recorded = golden["entropy/per_state"]
    np.testing.assert_allclose(sklearn_entropy(actions), recorded, atol=1e-3)
    theirs = np.mean([sklearn_entropy(actions, seed) for seed in range(16)])
    assert abs(dacer.mixture_entropy(actions.repeat(16, 1, 1)).mean().item() - theirs) < 0.05
