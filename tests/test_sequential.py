"""Sequential Monte Carlo: the right law and log Z, from values alone."""

import math

import pytest
import torch
from scipy import stats

import energies
from rsm_sampler.montecarlo.densities import StudentT
from rsm_sampler.montecarlo.population import _Population, sequential_monte_carlo

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(dim, scale=3.0):
    return StudentT(torch.zeros(dim, dtype=DOUBLE), scale * torch.eye(dim, dtype=DOUBLE))


def visit(energy, dim, *, seed=0, scale=3.0, **options):
    options = {"evaluations": 200_000, "size": 256, **options}
    return sequential_monte_carlo(energy, reference(dim, scale), generator=rng(seed), **options)


@pytest.mark.numbers
def test_a_correlated_gaussian_in_eight_dimensions():
    """Moments and log Z of 8 runs, whose spread is their own standard error.

    A t-test with 7 degrees of freedom at 8 standard errors: false alarm 1e-4. Spreads of 0.3 and
    0.1 make it detect an error of log Z of 0.9, and of the variance along a direction of 0.3.
    """
    dim = 8
    factor = torch.eye(dim, dtype=DOUBLE)
    factor[1:, 0] = 0.8

    def energy(x):
        z = torch.linalg.solve_triangular(factor, x.mT - 1.0, upper=False).mT
        return 0.5 * z.square().sum(-1)

    found = [visit(energy, dim, seed=seed, evaluations=150_000) for seed in range(8)]
    exact = 0.5 * dim * math.log(2 * math.pi)
    columns = {
        "log z": torch.tensor([v.log_z - exact for v in found]),
        "mean": torch.stack([v.points.mean() - 1.0 for v in found]),
        "variance": torch.stack([v.points[:, 0].var() - 1.0 for v in found]),
        "energy": torch.stack([v.energy.mean() - dim / 2 for v in found]),
    }
    for name, column in columns.items():
        se = column.std() / math.sqrt(8)
        assert abs(float(column.mean())) < 8 * float(se), name
    assert float(columns["log z"].std()) < 0.3
    assert float(columns["variance"].std()) < 0.1


@pytest.mark.numbers
def test_wells_get_their_weights_although_each_particle_sees_few():
    """Many-well-32: 16 shares of the deeper well, 0.844, from 6e5 evaluations.

    Snapshots are dependent; the bound of 0.1 is five times the spread seen over seeds, and half of
    what a population that never jumps is off by: it starts from equal shares.
    """
    target = energies.get("many-well-32")
    visited = visit(target, 32, evaluations=600_000, size=512)
    share = target.wells(visited.points).double().mean(0)
    assert (share - target.well_weights[1]).abs().max() < 0.1
    assert abs(float(share.mean() - target.well_weights[1])) < 0.025
    assert abs(visited.log_z - target.log_z) < 1.5
    torch.testing.assert_close(visited.energy, target(visited.points))


def test_dilations_leave_a_law_alone_and_change_the_scale():
    """From 20,000 exact draws of a funnel, 40 dilations each: the first coordinate keeps its law.

    Kolmogorov-Smirnov at 1e-6, 0.019; without the volume in Metropolis's rule it is 0.76. The
    coordinate moves by more than half its width.
    """

    def energy(x):
        first, rest = x[:, 0], x[:, 1:]
        own = 0.5 * rest.square().sum(-1) * (-first).exp() + 0.5 * rest.shape[1] * first
        return first.square() / 4.5 + own

    n, dim, generator = 20_000, 5, rng(1)
    exact = torch.randn(n, dim, generator=generator, dtype=DOUBLE)
    exact[:, 0] *= 1.5
    exact[:, 1:] *= (0.5 * exact[:, :1]).exp()
    population = _Population(energy, reference(dim), n, rng(2))
    population.x, population.beta = exact.clone(), 1.0
    population.energy, population.log_q = population._values(exact)
    for _ in range(40):
        for half in (slice(0, n // 2), slice(n // 2, n)):
            other = population.x[n // 2 :] if half.start == 0 else population.x[: n // 2]
            population._dilations(half, other)
    first = population.x[:, 0]
    assert stats.kstest(first.numpy() / 1.5, "norm").statistic < 0.019
    assert float((first - exact[:, 0]).square().mean().sqrt()) > 0.75


def test_a_funnel_of_ten_dimensions_is_walked_to_its_neck():
    """From 4e5 evaluations, begun in the mouth: the scale's mean within 0.6 of 0, its width of 3.

    512 dependent particles a snapshot; without dilations the mean stays above 2.
    """
    target = energies.get("funnel")
    tril = torch.diag(torch.tensor([2.0] + [15.0] * 9, dtype=DOUBLE))
    loc = torch.tensor([4.0] + [0.0] * 9, dtype=DOUBLE)
    found = sequential_monte_carlo(
        target.energy, StudentT(loc, tril), evaluations=400_000, size=512, generator=rng(4)
    )
    scale = found.points[len(found.points) // 2 :, 0]
    assert abs(float(scale.mean())) < 0.6
    assert abs(float(scale.std()) - 3) < 0.5


def test_evaluations_are_what_was_allowed():
    calls = []

    def energy(x):
        calls.append(len(x))
        return 0.5 * x.square().sum(-1)

    visited = visit(energy, 3, evaluations=10_000, size=65)
    assert sum(calls) <= 10_000
    assert sum(calls) > 9_000
    assert visited.points.shape[1] == 3


def test_infinite_energies_get_no_weight():
    """A normal law on the positive side only."""

    def energy(x):
        return torch.where(x[:, 0] > 0, 0.5 * x.square().sum(-1), torch.inf)

    visited = visit(energy, 2, evaluations=40_000)
    assert bool((visited.points[:, 0] > 0).all())
    assert abs(visited.log_z - math.log(math.pi)) < 0.5


def test_seeds_decide_everything():
    energy = energies.get("many-well-32")
    first, second = (visit(energy, 32, evaluations=30_000, size=64) for _ in range(2))
    assert torch.equal(first.points, second.points)
    assert first.log_z == second.log_z


@pytest.mark.bad_input
@pytest.mark.parametrize(("size", "evaluations"), [(8, 10_000), (64, 100)])
def test_too_few_particles_or_evaluations(size, evaluations):
    with pytest.raises(ValueError, match="size must be at least 16 particles"):
        visit(lambda x: x.square().sum(-1), 2, size=size, evaluations=evaluations)
