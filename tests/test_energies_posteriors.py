"""Posteriors of real data, against independent computations."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import energies
from energies import LogisticRegression, from_numpy, hare_lynx_energy
from energies.hare_lynx import HARES, LYNXES
from rsm_sampler.montecarlo.densities import StudentT


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- hares and lynxes -----------------------------------------------------------------------------

PUBLISHED = np.array([0.55, 0.028, 0.80, 0.024, 33.98, 5.95, 0.25, 0.25])  # posterior means


@pytest.mark.parametrize("seed", range(3))
def test_the_simulator_by_scipy(seed):
    """SciPy's integrator and densities; priors normalised there, unnormalised here."""
    rng = np.random.default_rng(seed)
    theta = np.log(PUBLISHED) + 0.1 * rng.normal(size=(2, 8))
    expected = []
    for row in theta:
        a, b, c, d, u, v, *sigma = np.exp(row)

        def slope(t, z, a=a, b=b, c=c, d=d):
            return [(a - b * z[1]) * z[0], (-c + d * z[0]) * z[1]]

        path = integrate.solve_ivp(slope, (0, 20), [u, v], t_eval=range(21), rtol=1e-10, atol=1e-9)
        log_p = 0.0
        for observed, fitted, s in zip((HARES, LYNXES), path.y, sigma, strict=True):
            log_p += stats.lognorm(s, scale=fitted).logpdf(observed).sum()
            log_p += stats.lognorm(1, scale=math.exp(-1)).logpdf(s)
        log_p += stats.norm(1, 0.5).logpdf([a, c]).sum()
        log_p += stats.norm(0.05, 0.05).logpdf([b, d]).sum()
        log_p += stats.lognorm(1, scale=10).logpdf([u, v]).sum()
        expected.append(-(log_p + row.sum()))  # the Jacobian of the logarithms
    found = hare_lynx_energy(theta)
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], abs=2e-3)


def test_exploding_populations_have_no_weight():
    theta = np.log(PUBLISHED)[None].repeat(2, 0)
    theta[1, 0] = 8.0
    energy = hare_lynx_energy(theta)
    assert np.isfinite(energy[0]) and energy[1] > 1e5


@pytest.mark.numbers
def test_a_chain_finds_the_published_means():
    """Random-walk chains; means within a quarter of a posterior standard deviation."""
    start = torch.from_numpy(
        np.log(PUBLISHED) + 0.03 * np.random.default_rng(0).normal(size=(60, 8))
    )
    x = energies.chains.long_chains(
        from_numpy(hare_lynx_energy), start, 600, burn_in=400, thinning=30, method="rw",
        generator=seeded(),
    ).exp()  # fmt: skip
    gap = (x.mean(0) - torch.from_numpy(PUBLISHED)) / x.std(0)
    assert float(gap.abs().max()) < 0.25 + 0.1  # the chains' own error


# -- logistic regression --------------------------------------------------------------------------


def small():
    x = torch.randn(40, 1, generator=seeded(1), dtype=torch.float64) * 3 + 7
    y = (torch.rand(40, generator=seeded(2)) < torch.sigmoid((x[:, 0] - 7) / 2)).double()
    return LogisticRegression(x, y, prior_std=1.5), x, y


def test_energies_by_scipy():
    target, x, y = small()
    z = ((x - x.mean()) / x.std(correction=0))[:, 0].numpy()
    w = torch.randn(3, 2, 2, generator=seeded(), dtype=torch.float64)
    energy = target(w)
    for index in np.ndindex(3, 2):
        b, a = w[index].tolist()
        p = 1 / (1 + np.exp(-(b + a * z)))
        log_p = (
            stats.bernoulli(p).logpmf(y.numpy()).sum() + stats.norm(0, 1.5).logpdf([b, a]).sum()
        )
        assert float(energy[index]) == pytest.approx(-log_p, rel=1e-10)


def test_mode_laplace_and_chains_agree_with_quadrature():
    """Two dimensions: log Z and moments on a grid."""
    target, _, _ = small()
    axis = torch.linspace(-6, 6, 400, dtype=torch.float64)
    grid = target.mode + torch.cartesian_prod(axis, axis)
    log_weight = -target(grid)
    log_z = float(torch.logsumexp(log_weight, 0)) + 2 * math.log(12 / 399)
    assert target.log_z_laplace == pytest.approx(log_z, abs=0.1)
    gradient = torch.autograd.functional.jacobian(target.energy, target.mode)
    assert float(gradient.abs().max()) < 1e-8
    mean = torch.softmax(log_weight, 0) @ grid
    x = target.reference(2000, chains=100, burn_in=300, thinning=20, generator=seeded(3))
    error = x.view(100, 20, 2).mean(1).std(0) / 10
    assert bool(((x.mean(0) - mean).abs() <= 5 * error).all())


def test_breast_cancer():
    pytest.importorskip("sklearn")
    target = energies.get("breast-cancer")
    assert target.dim == 31 and target.log_z is None
    gradient = torch.autograd.functional.jacobian(target.energy, target.mode)
    assert float(gradient.abs().max()) < 1e-8
    x = target.reference(1000, chains=100, burn_in=600, thinning=30, generator=seeded(4))
    energy = target(x).view(100, -1).mean(1)
    wide = StudentT(target.mode, 1.1 * torch.linalg.cholesky(target.covariance), 20.0)
    draws = wide.sample(100_000, seeded(5))
    weight = torch.softmax(-target(draws) - wide.log_prob(draws), 0)  # worth 3,000 draws
    assert float(1 / weight.square().sum()) > 1500
    error = math.hypot(float(energy.std()) / 10, 4 / math.sqrt(1500))
    assert abs(float(energy.mean() - weight @ target(draws))) <= 5 * error
    halves = float(energy[:50].mean() - energy[50:].mean())
    assert abs(halves) <= 5 * float(energy.std()) * math.sqrt(2 / 50)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(4)), r"labels must have shape \(3,\), got \(4,\)"),
        ((torch.zeros(3, 2), torch.full((3,), 0.5)), r"labels must be 0 or 1, got \[0.5\]"),
    ],
)
def test_bad_data_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogisticRegression(*arguments)
    with pytest.raises(ValueError, match="prior_std must be positive"):
        LogisticRegression(torch.zeros(3, 1), torch.tensor([0.0, 1.0, 1.0]), prior_std=0.0)
