"""Conditional mixtures: posterior, evidence and draws for every context."""

import math

import pytest
import torch
from scipy import integrate, stats

from energies import ConditionalMixture, GaussianMixture


def general():
    """Full covariances, two observed combinations of three coordinates, and an offset."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, 3, generator=rng, dtype=torch.float64)
    prior = GaussianMixture(
        3 * torch.randn(3, 3, generator=rng, dtype=torch.float64),
        covariance=root @ root.mT + 0.3 * torch.eye(3, dtype=torch.float64),
        weights=[0.2, 0.5, 0.3],
    )
    matrix = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    return ConditionalMixture(prior, matrix, [0.5, 1.0], offset=torch.tensor([1.0, -2.0]))


TASKS = {"line": ConditionalMixture.line, "plane": ConditionalMixture.plane, "general": general}


@pytest.mark.parametrize("name", TASKS)
def test_posterior_is_bayes_rule(name):
    task = TASKS[name]()
    x, c = task.sample_joint(30, torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(-task(x, c) - task.log_z(c), task.log_prob(x, c))
    for i in range(5):
        posterior = task.posterior(c[i])
        assert posterior.log_z == 0.0
        torch.testing.assert_close(posterior.log_prob(x), -task(x, c[i]) - task.log_z(c[i]))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("sigma", [0.0, 0.4, 30.0])
def test_batched_contexts_are_a_loop(name, sigma):
    task = TASKS[name]()
    c = task.sample_context(4, torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(
        5, 4, task.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    for i in range(4):
        posterior = task.posterior(c[i])
        torch.testing.assert_close(task(x, c)[:, i], task(x[:, i], c[i]))
        torch.testing.assert_close(
            task.log_prob(x, c, sigma)[:, i], posterior.log_prob(x[:, i], sigma)
        )
        torch.testing.assert_close(task.score(x, c, sigma)[:, i], posterior.score(x[:, i], sigma))
        torch.testing.assert_close(
            task.denoiser(x, sigma, c)[:, i], posterior.denoiser(x[:, i], sigma)
        )


def test_evidence_by_quadrature():
    task = ConditionalMixture.line()
    for c in (-4.0, 0.3, 5.0):
        context = torch.tensor([c], dtype=torch.float64)

        def density(x, context=context):
            return float(torch.exp(-task(torch.tensor([x], dtype=torch.float64), context)))

        integral, _ = integrate.quad(density, -8, 8, points=[-3, 0, 3], limit=200)
        assert float(task.log_z(context)) == pytest.approx(math.log(integral), abs=1e-7)


def test_score_is_the_gradient():
    task = general()
    x, c = task.sample_joint(6, torch.Generator().manual_seed(3), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(-task(x, c).sum(), x)
    torch.testing.assert_close(task.score(x, c), gradient)


@pytest.mark.numbers
def test_every_draw_has_its_posterior_law():
    """Probability transforms are uniform, for joint and conditional draws; alarm below 1e-6."""
    task, n = ConditionalMixture.line(), 4_000
    rng = torch.Generator().manual_seed(4)
    x, c = task.sample_joint(n, rng, dtype=torch.float64)
    again = task.sample(c, generator=rng)
    band = math.sqrt(math.log(2 / 3e-7) / (2 * n))
    laws = [task.posterior(row) for row in c]
    for draws in (x, again):
        u = [float(law.marginal_cdf(row)) for law, row in zip(laws, draws, strict=True)]
        assert stats.kstest(u, "uniform").statistic <= band
    # the contexts follow the evidence, itself a mixture
    evidence = GaussianMixture(
        task.prior.loc, covariance=task.prior.covariances + 1.5**2, weights=task.prior.weights
    )
    u = evidence.marginal_cdf(c)[:, 0]
    assert stats.kstest(u.numpy(), "uniform").statistic <= band


def test_many_draws_for_a_few_contexts():
    """Marginal DKW per context and coordinate; alarm below 1e-6."""
    task, n = general(), 10_000
    c = task.sample_context(3, torch.Generator().manual_seed(5), dtype=torch.float64)
    draws = task.sample(c, n, generator=torch.Generator().manual_seed(6))
    assert draws.shape == (n, 3, 3)
    band = math.sqrt(math.log(2 / 1e-7) / (2 * n))
    for i in range(3):
        u = task.posterior(c[i]).marginal_cdf(draws[:, i]).numpy()
        assert max(stats.kstest(u[:, j], "uniform").statistic for j in range(3)) <= band


def test_plane_has_exact_cells_and_changing_weights():
    task = ConditionalMixture.plane()
    left, middle = task.posterior(torch.tensor([-4.0])), task.posterior(torch.tensor([-2.0]))
    assert int((left.mode_weights > 0.05).sum()) == 3
    assert int((middle.mode_weights > 0.05).sum()) == 6
    edges = torch.linspace(-8, 8, 33)
    assert left.rotation is None  # closed-form cells
    assert float(left.cell_masses(edges, edges).sum()) == pytest.approx(1, abs=1e-9)
    line = ConditionalMixture.line().posterior(torch.tensor([1.0]))
    assert line.cell_masses(edges).shape == (32,)


def test_dtype_device_and_shapes():
    task = ConditionalMixture.plane()
    x, c = task.sample_joint(7)
    assert x.dtype == c.dtype == torch.float32
    assert task(x, c).shape == task(x, c[0]).shape == (7,)
    assert task(x.to("meta"), c.to("meta")).device.type == "meta"
    assert task.denoiser(x, torch.rand(7), c).shape == (7, 2)
    assert task.sample(c[0], (2, 3)).shape == (2, 3, 2)


@pytest.mark.bad_input
def test_bad_input_is_named():
    prior = GaussianMixture.paper()
    with pytest.raises(ValueError, match=r"matrix must have shape \(context_dim, 2\)"):
        ConditionalMixture(prior, torch.ones(1, 3), 1.0)
    with pytest.raises(ValueError, match="noise_std must be positive"):
        ConditionalMixture(prior, torch.ones(1, 2), 0.0)
    with pytest.raises(ValueError, match=r"offset must have shape \(1,\)"):
        ConditionalMixture(prior, torch.ones(1, 2), 1.0, offset=torch.ones(2))
    task = ConditionalMixture.plane()
    with pytest.raises(ValueError, match=r"context must broadcast to shape \(3, 1\)"):
        task(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"context must have shape \(1,\)"):
        task.posterior(torch.zeros(2, 1))
