"""Gaussian mixtures: closed forms against autograd, quadrature and draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from energies import GaussianMixture
from energies.target import Target


def full_mixture(seed=0, dim=2, modes=3):
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(modes, dim, dim, generator=rng, dtype=torch.float64)
    covariance = root @ root.mT + 0.2 * torch.eye(dim, dtype=torch.float64)
    loc = 3 * torch.randn(modes, dim, generator=rng, dtype=torch.float64)
    weights = torch.rand(modes, generator=rng, dtype=torch.float64) + 0.1
    return GaussianMixture(loc, covariance=covariance, weights=weights)


MIXTURES = {
    "paper": GaussianMixture.paper,
    "gmm40": GaussianMixture.gmm40,
    "full": full_mixture,
    "full-9d": lambda: full_mixture(1, dim=9, modes=4),
    "diagonal-10d": lambda: GaussianMixture(
        torch.arange(20.0).reshape(2, 10) / 5, torch.linspace(0.3, 2.0, 20).reshape(2, 10)
    ),
}


def test_gmm40_is_the_published_target():
    target = GaussianMixture.gmm40()
    first = torch.tensor([[-0.2995, 21.4577], [-32.9218, -29.4376], [-15.4062, 10.7263]])
    torch.testing.assert_close(target.loc[:3].float(), first, atol=1e-4, rtol=0)
    assert torch.pdist(target.loc).min() == pytest.approx(1.18, abs=0.005)
    torch.testing.assert_close(
        target.variance, torch.full((40, 2), 1.7247).double(), atol=1e-4, rtol=0
    )
    assert target.log_z == 0.0


def test_gmm40_has_the_published_entropy():
    """Mean of 200,000 energies; five standard errors, 0.015 nats, and the rounding of 6.858."""
    target = GaussianMixture.gmm40()
    x = target.sample(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy = target(x)
    assert abs(float(energy.mean()) - 6.858) < 5 * float(energy.std()) / math.sqrt(len(x)) + 5e-4


@pytest.mark.parametrize("name", MIXTURES)
def test_log_prob_agrees_with_scipy(name):
    target = MIXTURES[name]()
    x = target.sample(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    density = sum(
        w * stats.multivariate_normal(m, c).pdf(x.numpy())
        for w, m, c in zip(
            target.weights.numpy(), target.loc.numpy(), target.covariances.numpy(), strict=True
        )
    )
    torch.testing.assert_close(target.log_prob(x), torch.from_numpy(density).log())
    torch.testing.assert_close(-target(x), target.log_prob(x))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("sigma", [0.0, 0.3, 20.0])
def test_score_and_denoiser_agree_with_autograd(name, sigma):
    target = MIXTURES[name]()
    x = target.sample((4, 5), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(target.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(target.score(x, sigma), gradient)
    torch.testing.assert_close(target.denoiser(x, sigma), x + sigma**2 * gradient)  # Tweedie


def test_noise_levels_may_differ_within_a_batch():
    target = full_mixture()
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.0, 0.5, 2.0, 100.0])
    for method in (target.log_prob, target.score, target.denoiser, target.responsibilities):
        batched = method(x, sigma)
        for i, s in enumerate(sigma.tolist()):
            torch.testing.assert_close(batched[:, i], method(x[:, i], s))


def test_noised_law_is_the_law_of_noisy_draws():
    """DKW on each coordinate of x_0 + sigma noise; false alarm below 1e-6, detects 0.02."""
    target, sigma, n = full_mixture(), 1.3, 20_000
    rng = torch.Generator().manual_seed(3)
    x = target.sample(n, generator=rng, dtype=torch.float64)
    x = x + sigma * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    band = math.sqrt(math.log(2 / 5e-7) / (2 * n))
    for i in range(2):
        u = target.marginal_cdf(x, sigma)[:, i]
        assert stats.kstest(u.numpy(), "uniform").statistic <= band
    noised = target.noised(sigma)
    torch.testing.assert_close(noised.log_prob(x[:50]), target.log_prob(x[:50], sigma))


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_mixtures_marginals_and_weights(name):
    """DKW per coordinate and Pearson's chi-square on components; false alarm below 1e-6 each."""
    target, n = MIXTURES[name](), 20_000
    x = target.sample(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    band = math.sqrt(math.log(2 / (1e-6 / target.dim)) / (2 * n))
    u = target.marginal_cdf(x).numpy()
    assert max(stats.kstest(u[:, i], "uniform").statistic for i in range(target.dim)) <= band
    # mean responsibilities are the weights; they are means of n numbers in [0, 1]: Hoeffding
    share = target.responsibilities(x).mean(0)
    bound = math.sqrt(math.log(2 * len(share) / 1e-6) / (2 * n))
    assert float((share - target.mode_weights).abs().max()) <= bound


def test_moments_of_samples():
    target, n = full_mixture(5), 100_000
    x = target.sample(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    error = (x.mean(0) - target.mean) / target.covariance.diagonal().sqrt()
    assert float(error.abs().max()) <= 5 / math.sqrt(n)
    products = (x - target.mean)[:, :, None] * (x - target.mean)[:, None, :]
    bound = 5 * products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - target.covariance).abs() <= bound).all())


@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_shift_and_permutation_change_nothing(shift, seed):
    target = full_mixture(seed)
    order = torch.tensor([2, 0, 1])
    other = GaussianMixture(
        target.loc[order] + shift,
        covariance=target.covariances[order],
        weights=7 * target.weights[order],
    )
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(other(x + shift), target(x), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        other.denoiser(x + shift, 0.7) - shift, target.denoiser(x, 0.7), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(
        other.responsibilities(x + shift),
        target.responsibilities(x)[:, order],
        rtol=1e-6,
        atol=1e-7,
    )


def test_isotropic_diagonal_and_full_agree():
    loc = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    isotropic = GaussianMixture(loc, 0.5)
    others = [
        GaussianMixture(loc, torch.tensor([0.5, 0.5])),
        GaussianMixture(loc, torch.full((2, 2), 0.5)),
        GaussianMixture(loc, covariance=0.25 * torch.eye(2)),
        GaussianMixture(loc, covariance=0.25 * torch.eye(2).expand(2, 2, 2)),
    ]
    for other in others:
        torch.testing.assert_close(other(x), isotropic(x))
        torch.testing.assert_close(other.score(x, 0.3), isotropic.score(x, 0.3))


def test_far_away_and_at_extreme_noise_nothing_breaks():
    target = GaussianMixture.paper()
    x = torch.tensor([[1e5, -1e5], [3.0, 3.0]])
    assert bool(target.score(x).isfinite().all())
    sigma = torch.tensor([1e6, 1e-8])
    torch.testing.assert_close(
        target.denoiser(x, sigma), torch.tensor([[1.8, 1.8], [3.0, 3.0]]), atol=1e-4, rtol=1e-4
    )
    assert bool(target(torch.tensor([[torch.nan, 0.0]])).isnan().all())


def test_closed_form_and_adaptive_cell_masses_agree():
    target = GaussianMixture.paper()
    edges = torch.tensor([-7.0, -3.0, -2.9, 0.0, 2.5, 8.0]), torch.tensor([-6.0, 1.0, 4.0])
    exact = target.cell_masses(*edges)
    torch.testing.assert_close(Target.cell_masses(target, *edges), exact, atol=1e-8, rtol=0)
    turned = GaussianMixture(target.loc, covariance=torch.eye(2), weights=target.weights)
    torch.testing.assert_close(turned.cell_masses(*edges), exact, atol=1e-8, rtol=0)


def test_cell_masses_keep_their_digits_in_the_tail():
    line = GaussianMixture(torch.zeros(1, 1), 1.0)
    masses = line.cell_masses(torch.tensor([10.0, 11.0]))
    assert float(masses[0]) == pytest.approx(stats.norm.sf(10) - stats.norm.sf(11), rel=1e-10)


def test_grid_and_random_mixtures():
    grid = GaussianMixture.grid(modes=9, spacing=4.0, std=0.5)
    assert sorted(set(grid.loc.flatten().tolist())) == [-4.0, 0.0, 4.0]
    assert GaussianMixture.grid(8, dim=3).loc.shape == (8, 3)
    torch.testing.assert_close(GaussianMixture.grid().variance, torch.full((9, 2), 0.3).double())
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        target = GaussianMixture.random(3, 12, min_separation=5, min_weight=0.03, generator=rng)
        assert float(torch.pdist(target.loc).min()) >= 5
        assert float(target.weights.min()) >= 0.03 - 1e-12
        assert float(target.weights.sum()) == pytest.approx(1)


def test_constants_made_in_inference_mode_serve_gradients_later():
    target = GaussianMixture.paper()
    x = torch.randn(3, 2)
    with torch.inference_mode():
        target(x)
    x.requires_grad_()
    target(x).sum().backward()
    assert x.grad is not None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(3), 1.0), "loc must have shape \\(modes, dim\\)"),
        (lambda: GaussianMixture(torch.zeros(3, 2)), "either scale or covariance"),
        (lambda: GaussianMixture(torch.zeros(3, 2), torch.ones(4)), "scale must have shape"),
        (lambda: GaussianMixture(torch.zeros(3, 2), -1.0), "scale must be positive"),
        (lambda: GaussianMixture(torch.zeros(1, 2), 1.0, weights=[0.0]), "weights must be 1 pos"),
        (
            lambda: GaussianMixture(torch.zeros(1, 2), covariance=torch.ones(2, 2)),
            "covariance must be positive definite",
        ),
        (
            lambda: GaussianMixture(
                torch.zeros(1, 2), covariance=torch.tensor([[1.0, 0.5], [0, 1]])
            ),
            "covariance must be symmetric",
        ),
        (lambda: GaussianMixture.grid(8), "to the power of dim = 2, got 8"),
        (lambda: GaussianMixture.random(2, 5, min_weight=0.3), "min_weight must lie in"),
        (lambda: GaussianMixture.paper().noised(-1.0), "sigma must be finite and not negative"),
        (lambda: GaussianMixture.paper()(torch.zeros(4, 3)), r"x must have shape \(..., 2\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
