"""Exploration: weighted draws, log Z and basins of targets with exact answers."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

import energies
from energies import Funnel, GaussianMixture
from rsm_sampler import EnergyError, Exploration, explore
from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.explorer import explore_problem
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.sources import BasinMixture, Kernels, Proposal
from rsm_sampler.montecarlo.densities import Mixture, StudentT
from rsm_sampler.montecarlo.weights import LogWeights
from rsm_sampler.target.coordinates import Bounds
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.problem import Problem

DOUBLE = torch.float64
SHIFT = 7.3  # energies are shifted: log Z is never 0 by accident


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Target:
    """An energy with log Z, and shares of its parts.

    Arguments:
        parts: Log-densities of the parts with their weights, from (n, dim) to (n, parts).
        dim: Length of a point.
        weights: The shares, (parts).
        options: For the call of ``explore``.
    """

    def __init__(self, parts, dim, weights, **options):
        self.parts, self.dim, self.options = parts, dim, options
        self.weights = torch.as_tensor(weights, dtype=DOUBLE)
        self.log_z = -SHIFT

    def energy(self, x):
        return SHIFT - torch.logsumexp(self.parts(x), -1)

    def explore(self, **options):
        return explore(self.energy, self.dim, progress=False, **{**self.options, **options})

    def shares(self, found):
        """Weighted shares of the parts, and their standard errors."""
        seen = found.log_weight > -torch.inf
        weights = LogWeights(found.log_weight[seen])
        return weights.mean(torch.softmax(self.parts(found.x[seen]), -1))

    def distance(self, found):
        """Total variation of the shares of the parts."""
        return 0.5 * float((self.shares(found)[0] - self.weights).abs().sum())


def gaussians(dim, *components, **options):
    """Isotropic Gaussians: (weight, centre, width)."""
    weight = torch.tensor([c[0] for c in components], dtype=DOUBLE)
    loc = torch.stack([torch.as_tensor(c[1], dtype=DOUBLE).expand(dim) for c in components])
    width = torch.tensor([c[2] for c in components], dtype=DOUBLE)

    def parts(x):
        square = ((x.double()[:, None] - loc) / width[:, None]).square().sum(-1)
        return weight.log() - dim * (width * math.sqrt(2 * math.pi)).log() - 0.5 * square

    return Target(parts, dim, weight, **options)


def axis(i, dim, length):
    return length * torch.nn.functional.one_hot(torch.tensor(i), dim).double()


def nan_wall():
    target = gaussians(2, (0.5, axis(0, 2, -6.0), 1.0), (0.5, axis(0, 2, 6.0), 1.0))
    free = target.energy
    target.energy = lambda x: torch.where(x[:, 0].abs() < 2.5, torch.nan, free(x))
    return target  # 2e-4 of the mass is in the wall


def hole(dim=3):
    """A narrow mode within |x| < 1, a wide one beyond |x| > 4, infinite energies between."""
    inside = stats.chi2(dim).cdf((1 / 0.2) ** 2)
    outside = stats.chi2(dim).sf((4 / 4.0) ** 2)

    def parts(x):
        square = x.double().square().sum(-1)
        one = math.log(0.35 / inside) - 0.5 * dim * math.log(2 * math.pi * 0.04) - square / 0.08
        two = math.log(0.65 / outside) - 0.5 * dim * math.log(2 * math.pi * 16) - square / 32
        one = torch.where(square < 1, one, -torch.inf)
        return torch.stack([one, torch.where(square > 16, two, -torch.inf)], -1)

    target = Target(parts, dim, [0.35, 0.65])
    target.shares = lambda found: LogWeights(found.log_weight).mean(
        torch.stack([found.x.norm(dim=-1) < 2.5, found.x.norm(dim=-1) >= 2.5], -1).double()
    )
    return target


def corner(dim=2, rate=1000.0):
    """Half uniform over the box, half piled up in a corner."""

    def parts(x):
        pile = dim * (math.log(rate) - math.log1p(-math.exp(-rate))) - rate * (1 - x).sum(-1)
        return torch.stack([torch.zeros_like(pile), pile], -1) - math.log(2)

    return Target(parts, dim, [0.5, 0.5], bounds=(0.0, 1.0))


def cauchy():
    """Two Cauchy laws, 100 apart, one ten times as wide."""
    laws = [torch.distributions.Cauchy(*(torch.tensor(v, dtype=DOUBLE) for v in pair))
            for pair in ((-50.0, 1.0), (50.0, 10.0))]  # fmt: skip
    return Target(
        lambda x: torch.stack([law.log_prob(x[:, 0]) for law in laws], -1) - math.log(2),
        1,
        [0.5, 0.5],
    )


def mix8():
    """Six Gaussians with covariances of their own, the smallest of 4 %."""
    generator = np.random.default_rng(8)
    loc, covariance = generator.uniform(-5, 5, (6, 8)), []
    for _ in range(6):
        q, _ = np.linalg.qr(generator.standard_normal((8, 8)))
        covariance.append((q * generator.uniform(0.4, 1.2, 8) ** 2) @ q.T)
    weight = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.06, 0.04], dtype=DOUBLE)
    law = torch.distributions.MultivariateNormal(
        torch.from_numpy(loc), torch.from_numpy(np.stack(covariance))
    )
    return Target(lambda x: law.log_prob(x[:, None]) + weight.log(), 8, weight)


def lopsided():
    """Three unequal modes in the plane, with mean and covariance in closed form."""
    loc = torch.tensor([[0.0, 0.0], [6.0, 2.0], [-3.0, 5.0]])
    return GaussianMixture(loc, torch.tensor([1.0, 0.6, 1.3]), weights=[0.5, 0.2, 0.3])


KINDS = {
    "two far": lambda: gaussians(
        2, (0.6, 0.0, 1.0), (0.4, torch.tensor([60.0, 80.0]), 1.0)
    ),
    "two of different widths": lambda: gaussians(
        5, (0.75, axis(0, 5, -8.0), 1.0), (0.25, axis(0, 5, 8.0), 0.5)
    ),
    "two in 8-D": lambda: gaussians(
        8, (0.75, axis(0, 8, -8.0), 1.0), (0.25, axis(0, 8, 8.0), 0.3)
    ),
    "three in 12-D": lambda: gaussians(12, (0.5, 0.0, 1.0), (0.3, 5.0, 0.5), (0.2, -6.0, 0.4)),
    "wide and low in 12-D": lambda: gaussians(12, (0.4, 0.0, 1.0), (0.6, 6.0, 4.0)),
    "isolated in 20-D": lambda: gaussians(
        20, (0.5, 0.0, 1.0), (0.25, 8.0, 0.5), (0.25, -15.0, 1.5)
    ),
    "five and one": lambda: gaussians(
        4,
        (0.17, axis(0, 4, 3.0), 0.5),
        (0.17, axis(0, 4, -3.0), 0.5),
        (0.17, axis(1, 4, 3.0), 0.5),
        (0.17, axis(1, 4, -3.0), 0.5),
        (0.17, axis(2, 4, 3.0), 0.5),
        (0.15, 40.0, 0.1),
    ),
    "spike and slab in 8-D": lambda: gaussians(8, (0.5, 0.0, 1.0), (0.5, axis(0, 8, 0.2), 0.02)),
    "spike and slab in 10-D": lambda: gaussians(10, (0.4, 0.0, 1.0), (0.6, 0.1, 0.1)),
    "spike and slab in 13-D": lambda: gaussians(13, (0.5, 0.0, 1.0), (0.5, axis(0, 13, 0.2), 0.1)),
    "near duplicates in 30-D": lambda: gaussians(
        30, (0.8, 0.0, 1.0), (0.2, axis(0, 30, 7.0), 0.7)
    ),
    "corner": corner,
    "wall of NaN": nan_wall,
    "hole": hole,
    "Cauchy": cauchy,
    "mix8": mix8,
}  # fmt: skip
BRIEF = ["two far", "two in 8-D", "three in 12-D", "spike and slab in 8-D",
         "spike and slab in 10-D", "corner", "wall of NaN", "hole", "Cauchy"]  # fmt: skip
LEFT_OUT = {"wall of NaN": 5e-4}  # mass that is no part of the target: log Z is less by that


def right(target, found, missing=0.0):
    """Trustworthy, with shares and log Z as they are.

    At 10,000 effective draws a share of a half has a standard error of 0.005, log Z of 0.01: the
    bounds 0.03 and 0.05 are six and five of these.
    """
    assert found.verdict == "trustworthy", str(found)
    assert target.distance(found) <= 0.03
    assert abs(found.log_z - target.log_z) <= min(0.05, 5 * found.log_z_se + missing)
    assert found.ess >= 10_000
    assert found.ess / len(found.x) >= 0.1
    assert found.evaluations == sum(found.counts.values())


@pytest.mark.parametrize("kind", BRIEF)
def test_kinds_of_targets_that_were_hard(kind):
    target = KINDS[kind]()
    right(target, target.explore(seed=1), LEFT_OUT.get(kind, 0.0))


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_targets_that_were_hard_by_any_seed(kind, seed):
    target = KINDS[kind]()
    right(target, target.explore(seed=seed), LEFT_OUT.get(kind, 0.0))


def random_direction(dim, length, seed):
    direction = torch.randn(dim, dtype=DOUBLE, generator=rng(seed))
    return length * direction / direction.norm()


@pytest.mark.parametrize("width", [1e-2, 1e-3])
def test_a_spike_in_a_slab_in_a_wider_one_keeps_its_mass(width):
    target = gaussians(3, (0.3, 3.0, width), (0.3, 3.0, 1.0), (0.4, 3.0, 100.0))
    right(target, target.explore(seed=0), 0.0)


def test_a_spike_of_a_ten_thousandth_is_kept_or_not_trusted():
    target = gaussians(3, (0.5, 3.0, 1e-4), (0.5, 3.0, 1.0))
    found = target.explore(seed=0)
    assert found.verdict != "trustworthy" or target.distance(found) <= 0.03


@pytest.mark.parametrize(("dim", "width"), [(4, 0.5), (6, 0.6), (8, 0.7), (12, 0.9)])
@pytest.mark.parametrize("budget", [None, 20_000])
def test_a_mode_in_any_direction_is_met(dim, width, budget):
    """Twelve widths off, on no axis and no diagonal: 0.2 % of the starts of a descent reach it."""
    target = gaussians(dim, (0.5, 0.0, 1.0), (0.5, random_direction(dim, 12.0, dim), width))
    found = target.explore(seed=0, budget=budget)
    assert found.coverage.starts > 1000
    assert target.distance(found) <= 0.03
    assert found.verdict == "trustworthy"


@pytest.mark.parametrize(("dim", "number"), [(5, 30), (3, 80)])
def test_many_modes_of_different_widths_are_never_claimed_wrongly(dim, number):
    """Among wide modes a small one with a thirtieth of the mass may catch none of all starts."""
    generator = rng(number)
    centre = 40 * torch.rand(number, dim, dtype=DOUBLE, generator=generator) - 20
    width = 0.7 + 0.5 * torch.rand(number, dtype=DOUBLE, generator=generator)
    target = gaussians(
        dim, *((1 / number, c, float(w)) for c, w in zip(centre, width, strict=True))
    )
    found = target.explore(seed=0)
    assert found.coverage.starts >= 512
    assert target.distance(found) <= 0.1
    assert abs(found.log_z - target.log_z) <= 0.1


def test_a_normal_law_with_widths_over_four_decades_is_weighed():
    """Turned axes in twenty dimensions, its centre far off: no descent comes to rest in time."""
    dim = 20
    width = torch.logspace(-2, 2, dim, dtype=DOUBLE)
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=DOUBLE, generator=rng()))[0]
    centre = random_direction(dim, 100.0, 1)

    def energy(x):
        square = (((x - centre) @ turn) / width).square().sum(-1)
        return 0.5 * square + width.log().sum() + 0.5 * dim * math.log(2 * math.pi)

    found = explore(energy, dim, seed=0, progress=False)
    assert found.method == "mixture"
    assert abs(found.log_z) <= 0.05


def eggbox(x):
    return -((2 + (x / 2).cos().prod(-1)) ** 5)


def eggbox_answers():
    """log Z by the trapezoid rule, and the 13 highest points, alike but for their places."""
    grid = torch.linspace(-5 * math.pi, 5 * math.pi, 2001, dtype=DOUBLE)
    value = -eggbox(torch.cartesian_prod(grid, grid)).view(2001, 2001)
    edge = torch.ones(2001, dtype=DOUBLE)
    edge[[0, -1]] = 0.5
    log_z = float(torch.logsumexp((value + (edge[:, None] * edge).log()).flatten(), 0))
    place = torch.arange(-2, 3, dtype=DOUBLE)
    place = torch.cartesian_prod(place, place)
    place = 2 * math.pi * place[place.sum(-1) % 2 == 0]
    return log_z + 2 * math.log(float(grid[1] - grid[0])), place


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]
)
def test_every_mode_of_the_eggbox_is_there(seed):
    log_z, place = eggbox_answers()
    found = explore(eggbox, 2, bounds=(-5 * math.pi, 5 * math.pi), seed=seed, progress=False)
    nearest = torch.cdist(found.x, place).argmin(-1)
    share, _ = LogWeights(found.log_weight).mean(torch.nn.functional.one_hot(nearest, 13).double())
    assert len(found.basins) == 13
    assert float(share.amin()) > 0.5 / 13
    assert 0.5 * float((share - 1 / 13).abs().sum()) <= 0.03
    assert abs(found.log_z - log_z) <= min(0.05, 5 * found.log_z_se)
    assert found.verdict == "trustworthy"


BEYOND_STARTS = pytest.mark.xfail(
    reason="within its share of the budget too few starts come to rest to meet all of 32 wells"
)


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize(
    ("dim", "gradients"),
    [
        (5, "auto"),
        pytest.param(60, "auto", marks=BEYOND_STARTS),
        pytest.param(60, "differences", marks=BEYOND_STARTS),
    ],
)
def test_all_of_32_wells_are_found(dim, gradients):
    """Each has 1/32 of the mass: none below half of it; log Z within 5 stated errors."""
    target = energies.SymmetricManyWell(dim)
    found = explore(target.energy, dim, gradients=gradients, progress=False)
    share, error = LogWeights(found.log_weight).mean(target.responsibilities(found.x).double())
    assert float(error.amax()) < 0.1 / 32
    assert float(share.amin()) > 0.5 / 32
    assert abs(found.log_z - target.log_z) <= 5 * found.log_z_se < 0.1


def test_too_many_basins_are_no_claim_of_all_of_them():
    """2^16 wells: an estimate of independent draws that is right, or no trust."""
    target = energies.get("many-well-32")
    found = explore(target.energy, 32, budget=40_000, ess=1000, progress=False)
    if found.verdict == "trustworthy":
        assert abs(found.log_z - target.log_z) <= 5 * found.log_z_se


def test_twenty_dimensions_have_exact_weights():
    """A Gaussian of std 3 at 7 in 20-D: mean and spread within 5 stated errors."""
    found = explore(lambda x: ((x - 7) / 3).square().sum(-1) / 2, 20, ess=2000, progress=False)
    z = (found.x - 7) / 3
    mean, error = LogWeights(found.log_weight).mean(torch.stack([z, z.square() - 1], 1))
    assert bool((mean.abs() <= 5 * error).all())
    assert float(error.amax()) < 0.1
    assert abs(found.log_z - 20 * math.log(3 * math.sqrt(2 * math.pi))) <= 5 * found.log_z_se


# The law of all sources


class Given:
    """A source of one's own: a wide normal-like law about given places."""

    name = "given"

    def __init__(self, loc, scale=1.5):
        self.loc, self.scale, self.asked = loc, scale, 0

    def propose(self, scene):
        self.asked += 1
        dim = self.loc.shape[-1]
        law = Mixture(
            torch.full((len(self.loc),), 1 / len(self.loc), dtype=DOUBLE),
            self.loc.double(),
            self.scale * torch.eye(dim, dtype=DOUBLE).expand(len(self.loc), dim, dim),
            scene.defence,
            5.0,
        )
        return Proposal(self.name, law, scene.draw(law, 500).share())


SOURCES = {
    "mixture": BasinMixture,
    "kernels": Kernels,
    "given": lambda: Given(lopsided().loc),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", range(2))
def test_weights_of_any_source_are_exact(source, seed):
    """log Z, shares of modes, mean and covariance within 5 stated errors, which are small.

    Ten quantities for each source and seed, each with a false alarm of 6e-7.
    """
    target = lopsided()
    found = explore(
        lambda x: target.energy(x) + SHIFT, 2, seed=seed, ess=4000,
        sources=[SOURCES[source]()], progress=False,
    )  # fmt: skip
    assert found.method == source
    assert found.ess >= 4000
    assert abs(found.log_z + SHIFT) <= 5 * found.log_z_se < 0.1
    weights = LogWeights(found.log_weight)
    share, error = weights.mean(target.responsibilities(found.x))
    assert bool(((share - target.weights).abs() <= 5 * error).all())
    assert float(error.amax()) < 0.015
    z = found.x - target.mean
    values = torch.stack([z[:, 0], z[:, 1], z[:, 0] ** 2, z[:, 1] ** 2, z[:, 0] * z[:, 1]], -1)
    (a, c), (_, b) = target.covariance.tolist()
    mean, error = weights.mean(values)
    exact = torch.tensor([0, 0, a, b, c], dtype=DOUBLE)
    assert bool(((mean - exact).abs() <= 5 * error).all())


def test_masses_of_basins_are_those_of_the_modes():
    """Within 5 stated errors and the overlap of neighbours, 1 %."""
    target = lopsided()
    found = explore(target.energy, 2, seed=3, progress=False)
    assert len(found.basins) == 3
    for basin in found.basins:
        nearest = (target.loc - basin.location).norm(dim=-1).argmin()
        assert float((target.loc[nearest] - basin.location).norm()) < 0.1
        assert abs(basin.mass - float(target.weights[nearest])) <= 5 * basin.mass_se + 0.01
        assert basin.mass_se < 0.01
    masses = [basin.mass for basin in found.basins]
    assert masses == sorted(masses, reverse=True)
    assert sum(masses) == pytest.approx(1.0)


@pytest.mark.parametrize("dim", [1, 3])
def test_the_standard_error_of_log_z_is_honest(dim):
    """Squared z-scores of 12 explorations are chi-square up to the error's own error.

    False alarm below 1e-5. Detects a standard error wrong by a factor of 2.5 either way.
    """
    target = gaussians(dim, (0.6, 0.0, 1.0), (0.4, 7.0, 0.5))
    scores = []
    for seed in range(12):
        found = target.explore(seed=seed, ess=1500)
        scores.append((found.log_z - target.log_z) / found.log_z_se)
    low, high = stats.chi2(12).interval(1 - 1e-5)
    assert low <= sum(score**2 for score in scores) <= high


def test_chains_say_that_they_cannot_tell():
    """Where no source proposes anything: equal weights, no error of log Z, no trust."""

    class Nothing:
        name = "nothing"

        def propose(self, scene):
            return None

    found = explore(lopsided().energy, 2, sources=[Nothing()], budget=40_000, progress=False)
    assert found.method == "chains"
    assert found.verdict == "cannot tell"
    assert math.isnan(found.log_z_se)
    assert bool((found.log_weight == 0).all())
    assert any("chains" in reason for reason in found.reasons)
    share = lopsided().responsibilities(found.x).mean(0)
    assert float((share - lopsided().weights).abs().amax()) < 0.25  # dependent draws


def test_a_source_of_ones_own_is_asked_in_its_turn():
    """Another one is not asked when nothing better is worth its cost."""
    first, second = Given(lopsided().loc, 1.0), Given(lopsided().loc, 1.0)
    found = explore(lopsided().energy, 2, sources=[first, second], ess=100, progress=False)
    assert (first.asked, second.asked) == (1, 0)
    assert found.method == "given"


# Location, scale, log Z


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (0.01, 0.0), (100.0, 0.0), (1.0, 50.0), (0.01, 0.5)]
)
def test_finds_location_and_scale_of_any_target(scale, shift):
    """Weighted means and log Z within 5 standard errors: 6 of them, 6e-7 each."""
    law = lopsided()
    found = explore(law.affine(shift, scale).energy, 2, ess=3000, progress=False)
    z = (found.x - shift) / scale - law.mean
    mean, error = LogWeights(found.log_weight).mean(z)
    assert bool((mean.abs() <= 5 * error).all())
    assert float(error.amax()) < 0.1
    assert abs(found.log_z - 2 * math.log(scale)) <= 5 * found.log_z_se < 0.15


@pytest.mark.parametrize("dim", [2, 4])
def test_long_and_thin_targets_are_found_in_any_direction(dim):
    """A rotated Gaussian a thousand times longer than wide; log Z within 5 standard errors."""
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=DOUBLE, generator=rng(1))).Q
    variance = torch.ones(dim, dtype=DOUBLE)
    variance[0] = 1e6
    covariance = (rotation * variance) @ rotation.T
    target = GaussianMixture(torch.zeros(1, dim), covariance=covariance[None])
    found = explore(target.energy, dim, ess=3000, progress=False)
    assert found.verdict == "trustworthy"
    assert abs(found.log_z) <= 5 * found.log_z_se


def test_a_hint_of_centre_and_scale_reaches_beyond_the_survey():
    target = lopsided().affine(1e7, 1.0)
    options = {"ess": 2000, "progress": False}
    found = explore(target.energy, 2, centre=[1e7, 1e7], scale=3.0, **options)
    assert abs(found.log_z) <= 5 * found.log_z_se
    assert found.evaluations < 15_000
    assert "the given centre" in found.coverage.region
    assert "the origin" in explore(lopsided().energy, 2, **options).coverage.region


def test_points_reach_the_energy_in_double_precision():
    """A law of width 1e-3 at a Julian date; single precision has steps of 0.25 there."""
    seen = set()

    def energy(x):
        seen.add(x.dtype)
        return 0.5 * ((x[:, 0] - 2_460_000.125) / 1e-3).square()

    found = explore(energy, 1, centre=[2.46e6], scale=0.01, ess=1000, progress=False)
    assert seen == {DOUBLE}
    mean, error = LogWeights(found.log_weight).mean(found.x[:, 0] - 2_460_000.125)
    assert abs(float(mean)) <= 5 * float(error) < 1e-3


# Bounds


@pytest.mark.parametrize(
    ("energy", "dim", "bounds", "log_z"),
    [
        (lambda x: 2 * x.sum(-1) - x.log().sum(-1), 2, (0.0, math.inf), 2 * math.log(0.25)),
        (lambda x: x.sum(-1) / 1e4, 1, (0.0, math.inf), math.log(1e4)),
        (lambda x: -3 * x.sum(-1), 3, (-math.inf, 0.0), -3 * math.log(3)),
        (lambda x: (x - 5).sum(-1), 2, (5.0, math.inf), 0.0),
        (lambda x: 0 * x[:, 0], 1, (-1.0, 2.0), math.log(3)),
        (
            lambda x: -(2 * x.log() + 5 * (1 - x).log()).sum(-1), 1, (0.0, 1.0),
            math.lgamma(3) + math.lgamma(6) - math.lgamma(9),
        ),
        (
            lambda x: x[:, 0] + 0.5 * (x[:, 1] - 3).square() - x[:, 2] + 0 * x[:, 3], 4,
            ([0.0, -math.inf, -math.inf, 2.0], [math.inf, math.inf, 1.0, 4.0]),
            0.5 * math.log(2 * math.pi) + 1 + math.log(2),
        ),
    ],
    ids=["gamma", "long exponential", "from above", "shifted", "uniform", "beta", "all kinds"],
)  # fmt: skip
def test_bounds_of_all_kinds(energy, dim, bounds, log_z):
    found = explore(energy, dim, bounds=bounds, ess=3000, progress=False)
    assert abs(found.log_z - log_z) <= 5 * found.log_z_se < 0.15
    assert found.verdict == "trustworthy"
    low, high = (torch.as_tensor(bound, dtype=DOUBLE) for bound in bounds)
    assert bool(((found.x > low) & (found.x < high)).all())


# Energies of all kinds


def test_energies_that_are_infinite_almost_everywhere():
    """A ball of radius 1, of which one point of 3,000 of the survey sees anything."""
    centre = torch.tensor([3.0, -2.0, 1.0], dtype=DOUBLE)
    found = explore(
        lambda x: torch.where((x - centre).norm(dim=-1) < 1, 0.0, torch.inf), 3,
        ess=2000, progress=False,
    )  # fmt: skip
    assert abs(found.log_z - math.log(4 / 3 * math.pi)) <= 5 * found.log_z_se < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_few_finite_points_far_off_are_no_unbounded_energy(seed):
    """A disk of radius 60 at (300, -200): three points of the survey's thousand lie in it."""
    centre = torch.tensor([300.0, -200.0], dtype=DOUBLE)

    def energy(x):
        away = (x - centre).norm(dim=-1)
        return torch.where(away < 60, 0.5 * (away / 20).square(), torch.inf)

    found = explore(energy, 2, ess=2000, seed=seed, progress=False)
    log_z = math.log(2 * math.pi * 400 * (1 - math.exp(-4.5)))
    assert abs(found.log_z - log_z) <= 5 * found.log_z_se < 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_half_a_plane_without_energy_has_no_mass(value):
    """Half a Gaussian: log Z is that of the whole less log 2, within 5 standard errors."""

    def energy(x):
        return torch.where(x[:, 0] < 0, value, (x - 0.5).square().sum(-1) / 2)

    found = explore(energy, 2, ess=3000, progress=False)
    assert found.log_weight.softmax(0)[found.x[:, 0] < 0].sum() == 0
    exact = math.log(2 * math.pi) + float(torch.special.log_ndtr(torch.tensor(0.5)))
    assert abs(found.log_z - exact) <= 5 * found.log_z_se


def test_plateaus_and_jumps():
    """Constant within a square, infinite outside; and the whole part of |x| + |y|."""
    found = explore(
        lambda x: torch.where((x.abs() < 2).all(-1), 0.0, torch.inf), 2, ess=2000, progress=False
    )
    assert abs(found.log_z - math.log(16)) <= 5 * found.log_z_se < 0.2
    found = explore(lambda x: x.abs().sum(-1).floor(), 2, ess=2000, progress=False)
    exact = 4 * sum(math.exp(-k) * (k + 0.5) for k in range(200))
    assert abs(found.log_z - math.log(exact)) <= 5 * found.log_z_se < 0.2


def test_energies_of_numpy_go_by_differences():
    energy = energies.from_numpy(lambda x: 0.5 * ((x - 2) ** 2).sum(-1))
    found = explore(energy, 5, ess=2000, progress=False)
    assert abs(found.log_z - 2.5 * math.log(2 * math.pi)) <= 5 * found.log_z_se < 0.2
    assert found.verdict == "trustworthy"


@pytest.mark.parametrize("gradients", ["autograd", "differences", "none"])
def test_gradients_by_any_way_find_the_same(gradients):
    target = lopsided()
    found = explore(target.energy, 2, gradients=gradients, ess=2000, progress=False)
    assert len(found.basins) == 3
    assert abs(found.log_z) <= 5 * found.log_z_se


def test_a_scale_by_its_logarithm_may_overflow_far_out():
    """As probabilistic programs have it: exp(1e5) is infinite."""

    def energy(x):
        scale = x[:, 0].exp()
        value = 0.5 * x[:, 0].square() + 0.5 * (x[:, 1] / scale).square() + x[:, 0]
        return torch.where(x[:, 0].abs() < 80, value, torch.inf)

    found = explore(energy, 2, ess=3000, progress=False)
    assert abs(found.log_z - math.log(2 * math.pi)) < 0.1


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_heaviest_tails_are_not_refused(dim):
    """A Cauchy law has no moments, but mass one."""
    exact = math.lgamma(0.5 * (1 + dim)) - 0.5 * (1 + dim) * math.log(math.pi)
    for seed in range(2):
        found = explore(
            lambda x: 0.5 * (1 + dim) * torch.log1p(x.square().sum(-1)), dim,
            seed=seed, ess=2000, progress=False,
        )  # fmt: skip
        if found.verdict == "trustworthy":
            assert abs(found.log_z + exact) <= 5 * found.log_z_se + 0.02


# Energies that cannot be sampled

IMPOSSIBLE = {
    "flipped": (lambda x: -x.square().sum(-1), 2),
    "flipped slowly": (lambda x: -x.square().sum(-1) / 1e6, 3),
    "flipped cusp": (lambda x: -x.abs().sum(-1), 1),
    "constant 1-D": (lambda x: torch.zeros_like(x[:, 0]), 1),
    "constant 2-D": (lambda x: torch.zeros_like(x[:, 0]), 2),
    "constant 6-D": (lambda x: torch.full_like(x[:, 0], 3.0), 6),
    "flat axis": (lambda x: x[:, 0].square() / 2, 2),
    "flat third axis": (lambda x: x[:, :2].square().sum(-1) / 2, 3),
    "linear": (lambda x: x[:, 0], 2),
    "flipped mixture": (lambda x: -lopsided().energy(x), 2),
    "flat diagonal": (lambda x: 50 * (x[:, 0] - x[:, 1]).square(), 2),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("seed", range(3))
def test_energies_that_cannot_be_normalised_are_refused(kind, seed):
    energy, dim = IMPOSSIBLE[kind]
    with pytest.raises(EnergyError, match=r"exp\(-energy\) cannot be normalised.*opposite sign"):
        explore(energy, dim, seed=seed, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_molecule_that_nothing_holds_is_never_trusted(seed):
    """Two flat directions of six, neither along an axis: refused, or it cannot be told."""

    def energy(x):
        places = x.view(-1, 3, 2)
        return torch.cdist(places, places).square().sum((1, 2))

    try:
        found = explore(energy, 6, seed=seed, ess=2000, progress=False)
    except EnergyError as error:
        assert "cannot be normalised" in str(error)
    else:
        assert found.verdict == "cannot tell"
        assert math.isnan(found.log_z_se)


def test_an_energy_that_depends_on_the_batch_is_refused():
    with pytest.raises(EnergyError, match=r"value of its own, whatever other points .* dim=-1"):
        explore(lambda x: 0.5 * x.square().sum(-1) + x.mean(), 2, progress=False)
    with pytest.raises(EnergyError, match="value of its own"):
        explore(lambda x: (x - x.mean(0)).square().sum(-1), 2, progress=False)


def test_noise_is_said():
    generator = rng()

    def energy(x):
        return 0.5 * x.square().sum(-1) + 0.3 * torch.randn(len(x), generator=generator)

    found = explore(energy, 2, seed=0, progress=False)
    assert found.verdict == "cannot tell"
    assert "noise" in found.reasons[-1]


@pytest.mark.parametrize("after", [2000, 12_000])
def test_an_interrupt_ends_with_the_points_so_far(after):
    """The target is wider than its first proposals: an estimate within a nat by then."""
    seen = 0

    def energy(x):
        nonlocal seen
        seen += len(x)
        if seen > after:
            raise KeyboardInterrupt
        return 0.5 * x.square().sum(-1)

    found = explore(energy, 2, seed=0, progress=False)
    assert found.verdict == "cannot tell"
    assert "interrupted" in found.reasons[-1]
    assert abs(found.log_z - math.log(2 * math.pi)) < 1
    assert len(found.x) <= after


def test_an_interrupt_before_any_point_is_passed_on():
    def energy(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(energy, 2, progress=False)


def test_a_wrong_hint_is_named():
    with pytest.raises(EnergyError, match="given scale"):
        explore(lambda x: 0.5 * x.square().sum(-1), 2, scale=1e-9, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_energy_without_a_finite_value_names_the_region(value):
    with pytest.raises(EnergyError, match=r"finite somewhere, got NaN or inf at all \d+ points, "
                       r"drawn between \(-\S+, -\S+\) and \(\S+, \S+\)"):  # fmt: skip
        explore(lambda x: torch.full_like(x[:, 0], value), 2, progress=False)


# Budgets, time


@pytest.mark.parametrize("budget", [500, 501, 777, 1111, 5000, 20_000])
@pytest.mark.parametrize(
    ("make", "dim"),
    [(lopsided, 2), (lambda: Funnel(dim=5), 5), (lambda: Funnel(dim=20), 20)],
    ids=["plane", "funnel", "funnel 20-D"],
)
@pytest.mark.parametrize("gradients", ["auto", "differences"])
def test_budgets_are_never_exceeded(make, dim, budget, gradients):
    """The energy itself counts its points; a gradient is one more evaluation than its value."""
    target, points = make(), 0

    def energy(x):
        nonlocal points
        points += len(x)
        return target.energy(x)

    found = explore(energy, dim, budget=budget, gradients=gradients, progress=False)
    assert points <= found.evaluations <= budget
    assert found.evaluations == sum(found.counts.values())
    assert found.x.isfinite().all()
    assert found.x.shape[1] == dim


@pytest.mark.parametrize(
    ("energy", "dim", "bounds"),
    [
        (lambda x: x[:, 0].square(), 1, None),
        (lambda x: 0 * x[:, 0], 1, (0.0, 1.0)),
        (lambda x: x.sum(-1), 3, (0.0, math.inf)),
        (corner().energy, 2, (0.0, 1.0)),
        (lambda x: torch.where(x[:, 0] > 0, x.square().sum(-1), torch.inf), 4, None),
    ],
    ids=["1-D", "box", "half-infinite", "corner", "half a space"],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_least_budget_serves_all_kinds(energy, dim, bounds, seed):
    found = explore(energy, dim, bounds=bounds, budget=500, seed=seed, progress=False)
    assert found.evaluations <= 500
    assert found.verdict == "cannot tell"
    assert len(found.reasons) > 0
    assert bool(found.x.isfinite().all())


def test_a_larger_ess_takes_more_evaluations_and_is_reached():
    few, many = (explore(lopsided().energy, 2, ess=n, progress=False) for n in (500, 20_000))
    assert few.ess >= 500
    assert many.ess >= 20_000
    assert few.evaluations < 15_000 < 20_000 < many.evaluations


def test_time_is_kept():
    """Calls of 2 ms: after the half second that is given at most one phase goes on."""

    def energy(x):
        time.sleep(0.002)
        return target.energy(x)

    target = gaussians(2, (0.5, 0.0, 1.0), (0.5, 9.0, 1.0))
    started = time.perf_counter()
    found = explore(energy, 2, seconds=0.5, ess=1e6, progress=False)
    assert isinstance(found, Exploration)
    assert time.perf_counter() - started < 5.0
    assert found.ess < 1e6


def test_slow_energies_are_not_called_beyond_a_scale():
    """Calls take 50 ms where |x| > 100: the survey stops there, and nothing goes beyond."""
    slow = []

    def energy(x):
        far = x.abs().amax() > 1000
        if far:
            slow.append(float(x.abs().amax()))
            time.sleep(0.2)
        return 0.5 * x.square().sum(-1)

    found = explore(energy, 2, ess=1000, progress=False)
    assert len(slow) <= 5  # a few of the survey, and starts at most as far out
    assert "1e+05" not in found.coverage.region
    assert abs(found.log_z - math.log(2 * math.pi)) <= 5 * found.log_z_se


# Reports, determinism, state


def test_one_seed_decides_everything():
    one, again, other = (
        explore(lopsided().energy, 2, seed=seed, ess=1000, progress=False) for seed in (5, 5, 6)
    )
    assert torch.equal(one.x, again.x)
    assert torch.equal(one.log_weight, again.log_weight)
    assert (one.log_z, one.counts, one.basins[0].mass) == (
        again.log_z, again.counts, again.basins[0].mass
    )  # fmt: skip
    assert not torch.equal(one.x[:100], other.x[:100])


def test_global_random_numbers_are_left_alone():
    before = torch.random.get_rng_state()
    explore(lopsided().energy, 2, ess=500, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reports_say_what_was_looked_at():
    found = explore(lopsided().energy, 2, ess=1000, progress=False)
    text = str(found)
    for part in ("verdict      trustworthy", "log Z", "basins       3", "coverage", "with 95 %"):
        assert part in text
    assert found.coverage.starts >= 128
    assert found.coverage.excluded == pytest.approx(1 - 0.05 ** (1 / found.coverage.starts))
    assert (1 - found.coverage.excluded) ** found.coverage.starts == pytest.approx(0.05)
    x = found.resample(3000, generator=rng())
    assert x.shape == (3000, 2)
    share = lopsided().responsibilities(x).mean(0)
    assert float((share - lopsided().weights).abs().amax()) < 5 * 0.5 * math.sqrt(1 / 3000 + 1e-3)


def found_of(energy, dim, bounds=(-math.inf, math.inf), **options):
    meter = MeteredEnergy(energy, dim)
    problem = Problem(meter, Bounds(*bounds, dim))
    plan = Plan.within(dim, evaluations=40_000, bank=20_000, chains=40_000, ess=2000.0, starts=64,
                       slope_cost=2)  # fmt: skip
    return explore_problem(problem, plan, rng(), **options), problem, plan


def test_a_bank_survives_its_state_and_grows():
    found, problem, _ = found_of(lopsided().energy, 2)
    bank = found.bank
    again = Bank.from_state(bank.state(), torch.device("cpu"))
    assert torch.equal(again.points, bank.points)
    assert (again.log_z, again.ess, again.method) == (bank.log_z, bank.ess, bank.method)
    assert torch.equal(
        again.density.log_prob(bank.points[0]), bank.density.log_prob(bank.points[0])
    )
    n, seen = bank.points.shape[1], problem.energy.evaluations
    more = again.extended(n, lambda x, c: problem.potential(x), rng(1))
    assert problem.energy.evaluations == seen + n
    assert more.points.shape == (1, 2 * n, 2)
    assert torch.equal(more.points[:, :n], bank.points)
    assert torch.equal(more.log_weight[:, :n], bank.log_weight)
    assert abs(more.log_z) <= 5 * more.log_z_se
    assert more.ess > 1.7 * bank.ess


def test_weights_of_a_bank_are_those_of_its_density():
    """The joint density of all laws behind its points: what `extended` goes on with."""
    found, problem, _ = found_of(lopsided().energy, 2)
    bank = found.bank
    exact = -problem.potential(bank.points[0]) - bank.density.log_prob(bank.points[0])
    heavy = exact > exact.amax() - 50
    torch.testing.assert_close(bank.log_weight[0][heavy], exact[heavy], rtol=1e-7, atol=1e-7)


def test_what_was_found_is_told_in_plain_values():
    found, problem, _ = found_of(corner().energy, 2, (0.0, 1.0))
    record = found.record(problem.coordinates)
    assert record["region"] == "searched the box of the bounds, uniformly"
    assert record["starts"] == found.ledger.starts
    for basin in record["basins"]:
        assert all(0 < value < 1 for value in basin["x"])


def test_phases_are_reported_in_order():
    phases = []
    found_of(lopsided().energy, 2, report=phases.append)
    kinds = [phase.split(" ")[0] for phase in phases]
    order = ["survey", "bracket", "descents", "lines", "mixture", "bank,"]
    assert sorted(set(kinds), key=kinds.index)[:4] == order[:4]
    assert kinds[-1] == "bank,"


def test_a_plan_prints_all_that_it_will_do():
    plan = found_of(lopsided().energy, 2)[2]
    text = str(plan)
    for name in ("survey", "starts", "least", "bank", "chains", "total"):
        assert any(line.startswith(name) for line in text.splitlines())
    with pytest.raises(AttributeError):
        plan.starts = 3


@pytest.mark.parametrize("free", [256, 500, 3000, 10**6])
@pytest.mark.parametrize("cost", [2, 61])
def test_a_plan_stays_within_its_budget(free, cost):
    plan = Plan.within(30, evaluations=120_000, bank=100_000, chains=250_000, ess=1e4, starts=128,
                       slope_cost=cost, free=free)  # fmt: skip
    assert plan.total == free
    assert plan.evaluations + plan.bank <= free
    assert plan.chains <= free
    assert plan.worth(0.1, 1000)
    assert not plan.worth(plan.best, 1)


# At the door


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ess": 0}, "ess must be at least 1, got 0"),
        ({"ess": math.nan}, "ess must be at least 1, got nan"),
        ({"budget": 499}, "budget must be at least 500, got 499"),
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"seconds": math.nan}, "seconds must be .*, got nan"),
        ({"bounds": (1.0, 0.0)}, "bounds must have low below high"),
        (
            {"bounds": (0.0, 1.0), "centre": [2.0, 0.5]},
            "centre must be 2 numbers within the bounds",
        ),
        ({"centre": [0.0]}, "centre must be 2 numbers within the bounds"),
    ],
)
def test_arguments_are_looked_at_before_any_work(options, match):
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(-1)

    with pytest.raises(ValueError, match=match):
        explore(energy, 2, progress=False, **options)
    assert sum(calls) <= 2  # whether autograd works


def test_dimensions_are_looked_at():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        explore(lambda x: x.sum(-1), 0, progress=False)
    with pytest.raises(EnergyError, match="one value per point"):
        explore(lambda x: x, 2, progress=False)


def test_a_box_bounds_its_starts_uniformly():
    """The scene of a source knows the laws: the survey's is the box, a Student-t is the broad."""
    seen = []

    class Looks:
        name = "looks"

        def propose(self, scene):
            seen.append(scene)
            return Kernels().propose(scene)

    explore(corner().energy, 2, bounds=(0.0, 1.0), sources=[Looks()], ess=500, progress=False)
    (scene,) = seen
    assert scene.ladder.boxed
    assert scene.defence is scene.ladder
    assert isinstance(scene.broad, StudentT)
    assert scene.left > 0


@pytest.mark.parametrize("budget", [600, 3000, 20_000])
def test_a_budget_is_kept_where_starts_end_nowhere(budget):
    """A funnel: descents run into its neck, and fresh starts are sent out again and again."""

    def funnel(x):
        return 0.5 * (x[:, 0] / 3).square() + (
            0.5 * x[:, 1:].square() * (-x[:, :1]).exp() + 0.5 * x[:, :1]
        ).sum(-1)

    found = explore(funnel, 10, budget=budget, seed=1, progress=False)
    assert found.evaluations <= budget
    assert found.verdict != "trustworthy" or budget > 3000
