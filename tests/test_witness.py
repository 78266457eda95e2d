"""The witness: descents, coverage, masses; and a nested sampler of another library."""

import math

import pytest
import torch
from scipy import stats

from energies import GaussianMixture
from rsm_sampler.energy_sampler import WeightedDraws
from rsm_sampler.target.coordinates import Affine, Bounds
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.verdict.descents import descend, draw_starts, find_basins
from rsm_sampler.verdict.diagnosis import diagnose
from rsm_sampler.verdict.landscape import Landscape
from rsm_sampler.verdict.regions import cells_of, clusters_of
from rsm_sampler.verdict.witness import find_witness

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def landscape(energy, dim, low=-math.inf, high=math.inf):
    return Landscape(MeteredEnergy(energy, dim), Bounds(low, high, dim))


def isotropic(loc, std, weights):
    loc = torch.as_tensor(loc, dtype=DOUBLE)
    std = torch.as_tensor(std, dtype=DOUBLE)[:, None].expand(loc.shape)
    return GaussianMixture(loc, std, weights=torch.tensor(weights, dtype=DOUBLE))


def by_values(target):
    """The same energy without a graph."""

    def energy(x):
        return target(x.detach()).detach()

    return energy


# The energy in unbounded coordinates


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, 1.0), (-1.0, math.inf)])
@pytest.mark.parametrize("plain", [False, True])
def test_slopes_are_those_of_the_energy_and_of_the_volume(bounds, plain):
    """Against differences of the value, to the precision of single precision points."""

    def energy(x):
        value = (x - 0.3).square().sum(-1) + x[:, 0] * x[:, 1]
        return value.detach() if plain else value

    there = landscape(energy, 3, *bounds)
    u = torch.randn(5, 3, dtype=DOUBLE, generator=rng())
    value, slope = there.value_and_slope(u, torch.full((5, 1), 0.02, dtype=DOUBLE))
    assert there.differentiable is not plain
    assert torch.allclose(value, there.value(u), atol=1e-6)
    for i in range(3):
        step = torch.zeros(3, dtype=DOUBLE)
        step[i] = 0.05
        expected = (there.value(u + step) - there.value(u - step)) / 0.1
        assert torch.allclose(slope[:, i], expected, atol=5e-3)


def test_the_witness_counts_what_it_asks():
    energy = MeteredEnergy(lambda x: x.square().sum(-1), 2)
    there = Landscape(energy, Bounds(-math.inf, math.inf, 2))
    there.value(torch.zeros(7, 2, dtype=DOUBLE))
    there.value_and_slope(torch.ones(3, 2, dtype=DOUBLE), torch.ones(3, 1, dtype=DOUBLE))
    assert there.evaluations == 7 + 4 + 6  # two points tell that autograd works
    assert energy.counts == {"witness": 17}


# Descents


@pytest.mark.parametrize("plain", [False, True])
def test_descents_end_at_the_bottom_from_near_and_far(plain):
    curvature = torch.tensor([1.0, 100.0, 0.01, 25.0], dtype=DOUBLE)

    def energy(x):
        value = 0.5 * (curvature.to(x) * (x - 2).square()).sum(-1)
        return value.detach() if plain else value

    scale = torch.logspace(-3, 4, 40, dtype=DOUBLE)[:, None]
    start = 2 + scale * torch.randn(40, 4, dtype=DOUBLE, generator=rng())
    there = landscape(energy, 4)
    x, value, _, ended = descend(there, start, 0.1 * scale[:, 0])
    assert bool(ended.all())
    assert float(0.5 * (curvature * (x - 2).square()).sum(-1).amax()) < 2.0
    # One that is at rest across a valley may not have gone along it.
    assert float(value.quantile(0.9)) < 0.1


def test_a_descent_ends_at_a_wall_and_stays_where_the_energy_is_finite():
    def energy(x):
        return torch.where(x[:, 0] > 1, x.square().sum(-1), math.inf)

    start = torch.tensor([[3.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE)
    x, value, _, _ = descend(landscape(energy, 2), start, torch.ones(2, dtype=DOUBLE))
    assert value[0] < 1.2 and x[0, 0] >= 1
    assert value[1] == math.inf and torch.equal(x[1], start[1])


def test_starts_are_uniform_over_a_box_half_of_the_time():
    """Kolmogorov-Smirnov on the half within; false alarm below 1e-6.

    The other half, on the ladder, is symmetric about the middle; so exactly half of all is below.
    """
    u = draw_starts(20_000, torch.zeros(2, dtype=DOUBLE), 1.0, torch.tensor([True, True]), rng())
    x = torch.special.ndtr(u)
    below = int((x[:, 0] < 0.5).sum())
    low, high = stats.binom(20_000, 0.5).interval(1 - 1e-6)
    assert low <= below <= high
    # A tenth of the box in its middle: a tenth of the uniform half, and what the ladder adds.
    middle = int(((x - 0.5).abs() < 0.05).all(-1).sum())
    assert middle >= stats.binom(20_000, 0.005).ppf(1e-6)
    corner = int((x > 1 - 1e-4).all(-1).sum())
    assert corner > 200  # the uniform law alone has none: 20,000 times 1e-8


@pytest.mark.parametrize("plain", [False, True])
def test_every_mode_is_found_with_its_mass(plain):
    """Masses by Laplace's approximation, exact for well separated Gaussian modes."""
    target = isotropic(
        [[0.0, 0.0, 0.0], [7.0, 0.0, 0.0], [-4.0, 6.0, 5.0]], [1.0, 0.5, 1.5], [0.5, 0.3, 0.2]
    )
    energy = by_values(target) if plain else target
    ledger = find_basins(landscape(energy, 3), torch.zeros(3, dtype=DOUBLE), 1.0, 30_000, rng())
    assert len(ledger.basins) == 3
    assert len(ledger.unlisted) == 0
    for basin, loc, weight in zip(
        ledger.basins, target.loc.double(), [0.5, 0.3, 0.2], strict=True
    ):
        assert torch.allclose(basin.loc, loc, atol=0.05)
        log_mass = basin.log_mass + 1.5 * math.log(2 * math.pi)
        assert math.exp(log_mass) == pytest.approx(weight, rel=0.05)
    assert sum(basin.starts for basin in ledger.basins) == ledger.starts


# What it finds


HIDDEN = {
    "a spike in a slab": isotropic([[0.0] * 8, [0.2] + [0.0] * 7], [1.0, 0.02], [0.5, 0.5]),
    "a narrower mode": isotropic(
        [[-8.0] + [0.0] * 7, [8.0] + [0.0] * 7], [1.0, 0.3], [0.75, 0.25]
    ),
    "far away": isotropic([[0.0, 0.0], [60.0, 80.0]], [1.0, 1.0], [0.6, 0.4]),
    "along the diagonal": isotropic([[0.0] * 12, [5.0] * 12], [1.0, 0.5], [0.7, 0.3]),
}


class Exact:
    """Exact draws of a law, shown to a target."""

    context_dim = draw_context = None
    device = torch.device("cpu")

    def __init__(self, law, log_z=0.0, coordinates=None, **search):
        self.law, self.log_z, self.search, self.dim = law, log_z, search, law.dim
        self.coordinates = coordinates or Bounds(-math.inf, math.inf, law.dim)
        self.affine = Affine(law.mean.double(), torch.linalg.cholesky(law.covariance.double()))

    def weighted_draws(self, n, *, energy, context=None, generator=None):
        x = self.law.sample((n,), generator=generator, dtype=DOUBLE)
        value = energy(x, purpose="diagnosis")
        return WeightedDraws(x, -value - self.law.log_prob(x), value, self.law.log_prob(x))


def without(target, mode):
    keep = torch.arange(len(target.weights)) != mode
    return GaussianMixture(
        target.loc[keep], covariance=target.covariances[keep], weights=target.weights[keep]
    )


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_mode_is_found_and_the_whole_is_trusted(kind):
    """False alarm below 5e-3 for each that is trusted, by the count in the module's docstring."""
    target = HIDDEN[kind]
    report = diagnose(Exact(target), energy=MeteredEnergy(target, target.dim))
    assert report.verdict == "trustworthy", str(report)
    assert abs(report.witness.log_z) <= 5 * report.witness.log_z_se
    for mode in range(2):
        report = diagnose(Exact(without(target, mode)), energy=MeteredEnergy(target, target.dim))
        assert report.verdict == "not trustworthy", str(report)
        assert any("a basin at x = (" in text for text in report.findings), str(report)


def random_mixture(seed, dim):
    """Two to five modes, widths within a factor of two, at least 6 wider widths apart."""
    generator = rng(seed)
    modes = int(torch.randint(2, 6, (), generator=generator))
    std = 0.5 + 0.5 * torch.rand(modes, generator=generator, dtype=DOUBLE)
    loc = torch.zeros(0, dim, dtype=DOUBLE)
    half = 6.0 * modes ** (1 / dim)
    while len(loc) < modes:
        trial = half * (2 * torch.rand(1, dim, generator=generator, dtype=DOUBLE) - 1)
        if len(loc) == 0 or float(torch.cdist(trial, loc).amin()) >= 6:
            loc = torch.cat([loc, trial])
    weights = 0.2 + torch.rand(modes, generator=generator, dtype=DOUBLE)
    return isotropic(loc, std, (weights / weights.sum()).tolist())


@pytest.mark.parametrize("seed", range(7))
def test_a_random_mixture_with_a_mode_hidden_is_never_trusted(seed):
    """In 2 to 8 dimensions; false alarm of the whole below 5e-3 each."""
    dim = 2 + seed
    target = random_mixture(seed, dim)
    hidden = int(target.weights.argmin())
    energy = MeteredEnergy(target, dim)
    assert diagnose(Exact(target), energy=energy, seed=seed).verdict == "trustworthy"
    report = diagnose(Exact(without(target, hidden)), energy=energy, seed=seed)
    assert report.verdict == "not trustworthy", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("dim", range(2, 9))
def test_honesty_over_many_random_mixtures(dim):
    """None of 20 with a mode hidden is trusted; of 20 whole ones at most one is not.

    With a false alarm rate of 5e-3 two of 20 have probability 5e-3.
    """
    alarms = 0
    for seed in range(100, 120):
        target = random_mixture(seed, dim)
        energy = MeteredEnergy(target, dim)
        alarms += not diagnose(Exact(target), energy=energy, seed=seed).trustworthy
        hidden = seed % len(target.weights)
        report = diagnose(Exact(without(target, hidden)), energy=energy, seed=seed)
        assert not report.trustworthy, (seed, str(report))
    assert alarms <= 1


def test_the_witness_owes_nothing_to_the_draws():
    """The same estimates and the same coverage, whatever the sampler's draws are."""
    target = HIDDEN["far away"]
    found = [
        find_witness(landscape(target, 2), draws, 20_000, rng(3))[0]
        for draws in (torch.zeros(500, 2, dtype=DOUBLE), torch.full((500, 2), 1e3, dtype=DOUBLE))
    ]
    assert found[0].log_z == found[1].log_z
    assert found[0].ess == found[1].ess
    assert found[0].coverage == found[1].coverage


def test_energies_without_gradients_are_looked_at_too():
    target = HIDDEN["a narrower mode"]
    energy = MeteredEnergy(by_values(target), 8)
    report = diagnose(Exact(without(target, 1)), energy=energy)
    assert report.verdict == "not trustworthy", str(report)


def test_mass_in_the_corner_of_a_box_is_found():
    """Half of the mass within a thousandth of one corner, half of it uniform."""

    def energy(x):
        corner = 2 * math.log(1000.0) - 1000 * (1 - x.double()).sum(-1)
        return -torch.logaddexp(corner, torch.zeros_like(corner)).to(x) + math.log(2.0)

    z = torch.special.ndtri(
        torch.rand(4000, 2, dtype=DOUBLE, generator=rng())
    )  # the uniform part alone
    witness, masses = find_witness(landscape(energy, 2, 0.0, 1.0), z, 65_536, rng(1))
    assert witness.conclusive
    assert abs(witness.log_z) <= 5 * witness.log_z_se
    assert float((witness.masses - masses).abs().amax()) == pytest.approx(0.5, abs=0.05)


def test_a_witness_without_a_finite_energy_confirms_nothing():
    z = torch.randn(2000, 2, dtype=DOUBLE, generator=rng())
    nowhere = landscape(lambda x: torch.full_like(x[:, 0], math.inf), 2)
    witness, _ = find_witness(nowhere, z, 2000, rng())
    assert not witness.conclusive
    assert witness.ess == 0 and witness.log_z == -math.inf and witness.log_z_se == math.inf
    assert witness.coverage.basins == 0


@pytest.mark.numbers
def test_a_wall_hides_nothing_from_the_witness():
    """A wall in 30 dimensions, and a fifth of the draws behind it."""

    def walled(x):
        value = 2 * (x.square() - 1).square().sum(-1)
        return torch.where(x[:, 0] > 0, value, math.inf)

    z = torch.randn(4000, 30, dtype=DOUBLE, generator=rng()).sign()
    z[:, 0] = torch.where(torch.arange(4000) % 5 == 0, -1.0, 1.0)
    witness, masses = find_witness(landscape(walled, 30), z, 20_000, rng(1))
    # The draws behind the wall have regions of their own, which the witness knows to be empty.
    assert float((masses - witness.masses).max()) > 0.01
    assert witness.evaluations <= 9 * 20_000


@pytest.mark.numbers
def test_an_inconclusive_witness_accuses_of_nothing():
    """The uniform law on a cube in 60 dimensions, drawn exactly: nothing mixes there."""

    def cube(x):
        return torch.where((x.abs() < 1).all(-1), 0.0, math.inf)

    class Cube:
        coordinates, dim, context_dim = Bounds(-math.inf, math.inf, 60), 60, None
        affine = Affine(torch.zeros(60, dtype=DOUBLE), torch.eye(60, dtype=DOUBLE) / math.sqrt(3))
        search, draw_context, device = {}, None, torch.device("cpu")

        def weighted_draws(self, n, *, energy, context, generator):
            x = 2 * torch.rand(n, 60, generator=generator) - 1
            value = energy(x, purpose="diagnosis")
            return WeightedDraws(x, torch.zeros(n), value, torch.full((n,), -60 * math.log(2.0)))

    report = diagnose(Cube(), 4000, energy=MeteredEnergy(cube, 60), witness_evaluations=20_000)
    assert not report.witness.conclusive
    assert report.verdict == "cannot tell", str(report)


# A mode without a basin


@pytest.mark.slow
def test_the_statement_stays_true_where_nobody_can_find_the_mode():
    """A golf hole: too narrow to be met. The basin's share of starts is below what is excluded."""
    target = isotropic([[0.0] * 3, [1.7] * 3], [1.0, 0.001], [0.6, 0.4])
    starts = draw_starts(
        200_000, torch.zeros(3, dtype=DOUBLE), 1.0, torch.zeros(3, dtype=torch.bool), rng(9)
    )
    own = (starts - target.loc[1].double()).norm(dim=-1) < 0.01  # ten widths, a generous basin
    for seed in range(5):
        report = diagnose(Exact(without(target, 1)), energy=MeteredEnergy(target, 3), seed=seed)
        if report.trustworthy:
            assert float(own.double().mean()) < report.coverage.excluded
            assert report.coverage.width(0.4) > 0.001


# Regions


def test_regions_hold_every_cell_and_every_mode():
    """Of well-separated modes each is a union of cells, and one of the regions is that union."""
    target = GaussianMixture.grid(4, spacing=20.0, std=1.0)
    points = target.sample((4000,), generator=rng(), dtype=DOUBLE)
    cells = cells_of(points, rng(1))
    regions = clusters_of(cells)
    assert regions.shape == (24, 24 + 22)
    assert torch.equal(regions[:, :24], torch.eye(24, dtype=DOUBLE))
    owner = target.responsibilities(cells).argmax(-1)
    for k in range(4):
        assert (regions == (owner == k).double().unsqueeze(-1)).all(0).any()


def test_few_distinct_points_make_few_cells():
    points = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=DOUBLE)
    cells = cells_of(points, rng())
    assert sorted(cells[:, 0].tolist()) == [0.0, 1.0]
    assert torch.equal(clusters_of(cells), torch.eye(2, dtype=DOUBLE))
    assert torch.equal(clusters_of(cells[:1]), torch.ones(1, 1, dtype=DOUBLE))
