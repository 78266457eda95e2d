"""Basins that were seen, and where descents start."""

import math

import pytest
import torch

from rsm_sampler.bank.ledger import Basin, Ledger
from rsm_sampler.bank.starts import independent_starts, line_minima
from rsm_sampler.montecarlo.densities import ScaleLadder, StudentT
from rsm_sampler.montecarlo.descents import descend
from rsm_sampler.target.coordinates import Bounds
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.problem import Problem

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def problem_of(energy, dim, *, gradients="auto"):
    coordinates = Bounds(-math.inf, math.inf, dim)
    return Problem(MeteredEnergy(energy, dim), coordinates, gradients=gradients)


def wells(x):
    """Four equal wells at (+-2, +-2), of curvature 4 in both directions."""
    return (x.square() - 4).square().sum(-1) / 8


def filled(problem, start, width=None, *, independent=True):
    width = torch.ones(problem.dim, dtype=DOUBLE) if width is None else width
    ledger = Ledger(problem)
    ends = descend(lambda x: problem.value_and_slope(x, width), start, width)
    ledger.add(ends.x[ends.rested], ends.energy[ends.rested], width, independent=independent)
    return ledger


@pytest.mark.parametrize("gradients", ["autograd", "differences"])
def test_minima_shapes_and_starts_of_wells(gradients):
    """Minima to 1e-2, energies to 1e-4, covariances to 5 %; every start is counted once."""
    start = 4 * torch.randn(60, 2, dtype=DOUBLE, generator=rng())
    ledger = filled(problem_of(wells, 2, gradients=gradients), start)
    assert len(ledger.basins) == 4
    assert {tuple(b.x.sign().int().tolist()) for b in ledger.basins} == {
        (1, 1), (1, -1), (-1, 1), (-1, -1)
    }  # fmt: skip
    for basin in ledger.basins:
        assert bool((basin.x.abs() - 2).abs().lt(1e-2).all())
        assert abs(basin.energy) < 1e-4
        covariance = basin.factor @ basin.factor.mT
        torch.testing.assert_close(
            covariance, torch.eye(2, dtype=DOUBLE) / 4, rtol=0.05, atol=0.01
        )
    # A start on a ridge ends anywhere; all others end in the well of their quadrant.
    assert ledger.starts == sum(b.starts for b in ledger.basins) + ledger.lost == 60
    assert ledger.lost == 0
    assert sum(b.others for b in ledger.basins) == 0
    assert not ledger.crowded


def test_shapes_are_inverse_curvatures_along_any_axes():
    """A bowl with condition 1e4, widths stated a thousand times too large in one direction."""
    dim = 6
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=DOUBLE, generator=rng(3)))
    scale = torch.logspace(0, -2, dim, dtype=DOUBLE)
    covariance = (axes * scale.square()) @ axes.mT
    hessian = torch.linalg.inv(covariance)
    ledger = Ledger(problem_of(lambda x: 0.5 * ((x @ hessian) * x).sum(-1), dim))
    near = 1e-3 * torch.randn(1, dim, dtype=DOUBLE, generator=rng())
    energy = 0.5 * ((near @ hessian) * near).sum(-1)
    ledger.add(near, energy, torch.ones(dim, dtype=DOUBLE), independent=True)
    (basin,) = ledger.basins
    torch.testing.assert_close(basin.factor @ basin.factor.mT, covariance, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(basin.x, torch.zeros(dim, dtype=DOUBLE), rtol=0, atol=1e-5)
    factor = ledger.factor(torch.full((dim,), 0.3, dtype=DOUBLE), torch.ones(dim, dtype=DOUBLE))
    torch.testing.assert_close(factor @ factor.mT, covariance, rtol=1e-3, atol=1e-6)


def test_no_shape_is_wider_than_four_widths():
    """In a direction that the energy leaves flat the curvature says nothing."""
    ledger = Ledger(problem_of(lambda x: 0.5 * x[:, 0].square(), 2))
    zero = torch.zeros(1, 2, dtype=DOUBLE)
    ledger.add(zero, zero[:, 0], torch.tensor([1.0, 2.0], dtype=DOUBLE), independent=True)
    covariance = ledger.basins[0].factor @ ledger.basins[0].factor.mT
    torch.testing.assert_close(
        covariance, torch.diag(torch.tensor([1.0, 64.0], dtype=DOUBLE)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("gradients", ["autograd", "differences"])
def test_saddles_are_no_basins(gradients):
    """Of the wells: one maximum and four saddles, at rest for a gradient."""
    problem = problem_of(wells, 2, gradients=gradients)
    saddles = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, -2.0]], dtype=DOUBLE)
    ledger = Ledger(problem)
    width = torch.ones(2, dtype=DOUBLE)
    assert ledger.add(saddles, wells(saddles), width, independent=True) == 0
    assert (ledger.starts, ledger.lost, ledger.basins) == (0, 0, [])
    # What came to rest there is to go on from beside it, where the energy is lower.
    assert len(ledger.saddles) == 3
    for point in ledger.saddles:
        nearest = torch.cdist(point[None], saddles)[0]
        assert float(nearest.amin()) < 0.1
        assert bool(wells(point[None]) < wells(saddles[nearest.argmin()][None]))


def test_a_narrower_well_beside_a_minimum_leaves_the_shape_and_is_a_lead():
    """Half the mass of width 1, half of width 0.02 a fifth away: both are basins."""

    def energy(x):
        wide = 0.5 * x.square().sum(-1)
        centre = torch.zeros(x.shape[-1], dtype=x.dtype)
        centre[0] = 0.2
        narrow = 0.5 * ((x - centre) / 0.02).square().sum(-1) + 8 * math.log(0.02)
        return -torch.logaddexp(-wide, -narrow)

    ledger = Ledger(problem_of(energy, 8))
    zero = torch.zeros(1, 8, dtype=DOUBLE)
    ledger.add(zero, energy(zero), torch.ones(8, dtype=DOUBLE), independent=True)
    (basin,) = ledger.basins
    covariance = basin.factor @ basin.factor.mT
    torch.testing.assert_close(covariance, torch.eye(8, dtype=DOUBLE), rtol=0.05, atol=0.02)
    leads = torch.cat(ledger.leads)
    assert bool((energy(leads) < basin.energy - 1).all())


def test_ends_belong_to_a_basin_within_three_widths_at_the_energy_of_its_curvature():
    ledger = Ledger(problem_of(lambda x: 0.5 * x.square().sum(-1), 1))
    width = torch.ones(1, dtype=DOUBLE)
    ledger.add(torch.zeros(1, 1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE), width,
               independent=True)  # fmt: skip
    x = torch.tensor([[0.5], [2.0], [0.1]], dtype=DOUBLE)
    energy = torch.tensor([0.125, 2.9, 0.005], dtype=DOUBLE)  # the second has 0.9 nats to go
    assert ledger.add(x, energy, width, independent=False) == 0
    assert (ledger.basins[0].starts, ledger.basins[0].others) == (1, 3)
    assert ledger.starts == 1


def test_a_lower_end_moves_the_minimum():
    """The energy at the minimum is that of the lowest end that belongs to it."""
    ledger = Ledger(problem_of(lambda x: 0.5 * x.square().sum(-1), 1))
    ledger.basins.append(
        Basin(torch.tensor([0.3], dtype=DOUBLE), 0.045, torch.eye(1, dtype=DOUBLE))
    )
    x = torch.tensor([[0.01]], dtype=DOUBLE)
    ledger.add(x, 0.5 * x[:, 0].square(), torch.ones(1, dtype=DOUBLE), independent=True)
    assert len(ledger.basins) == 1
    assert float(ledger.basins[0].x) == 0.01


def test_a_ring_of_minima_is_crowded():
    """Each start rests somewhere else on a circle of radius 1000 and width 0.01."""

    def energy(x):
        return 0.5 * ((x.norm(dim=-1) - 1000) / 0.01).square()

    start = 1000 * torch.randn(60, 2, dtype=DOUBLE, generator=rng())
    ledger = filled(problem_of(energy, 2), start, torch.full((2,), 700.0, dtype=DOUBLE))
    assert ledger.crowded
    assert ledger.starts + len(ledger.saddles) >= 50


def test_few_starts_are_no_sign_of_many_basins():
    """Forty starts in 32 equal basins: 23 are seen on average, 12 of them once; of 1,000 all.

    More than 24 alone has a probability of 3e-6 (4.5 standard deviations of 2.7).
    """
    generator = rng()

    def ledger_of(basins):
        ledger = Ledger(problem_of(wells, 2))
        for count in torch.randint(basins, (40,), generator=generator).bincount().tolist():
            if count:
                ledger.basins.append(Basin(torch.zeros(2), 0.0, torch.eye(2), starts=count))
        ledger.starts = 40
        return ledger

    assert not any(ledger_of(32).crowded for _ in range(100))
    assert all(ledger_of(1000).crowded for _ in range(100))
    assert not Ledger(problem_of(wells, 2)).crowded


def test_more_basins_than_can_be_held_are_said():
    """Three hundred wells, each with a start: 256 are kept, the others are lost."""
    x = 4.0 * torch.arange(300, dtype=DOUBLE)[:, None]

    def energy(x):
        return 20 * (1 - (math.pi * x[:, 0] / 2).cos())

    ledger = Ledger(problem_of(energy, 1))
    ledger.add(x, energy(x), torch.full((1,), 1.0, dtype=DOUBLE), independent=True)
    assert len(ledger.basins) == 256
    assert ledger.full
    assert ledger.crowded
    assert (ledger.starts, ledger.lost) == (300, 44)


def test_minima_without_a_barrier_between_them_are_one_valley():
    """A circle of radius 3 and width 0.3: neighbouring ends join, whatever their order.

    All starts are counted in the first minimum of a valley.
    """

    def energy(x):
        return 0.5 * ((x.norm(dim=-1) - 3) / 0.3).square()

    start = 3 * torch.randn(200, 2, dtype=DOUBLE, generator=rng())
    ledger = filled(problem_of(energy, 2), start, torch.full((2,), 2.0, dtype=DOUBLE))
    assert len(ledger.basins) > 3
    assert len(ledger.valleys) == 1
    assert ledger.valleys[0].starts == ledger.starts - ledger.lost
    assert not ledger.crowded


@pytest.mark.parametrize("gradients", ["autograd", "differences"])
@pytest.mark.parametrize("width", [1e-2, 1e-4, 1e-6])
def test_curvatures_are_those_of_the_basin_however_narrow(width, gradients):
    """A spike in a slab of width 1: its root within a factor of 1.5 of its width."""

    def energy(x):
        square = 0.5 * x.square().sum(-1)
        spike = -square / width**2 - 3 * math.log(width)
        return -torch.logsumexp(torch.stack([-square, spike], -1), -1)

    ledger = Ledger(problem_of(energy, 3, gradients=gradients))
    x = torch.zeros(1, 3, dtype=DOUBLE)
    ledger.add(x, energy(x), torch.full((3,), 1.5, dtype=DOUBLE), independent=True)
    size = torch.linalg.svdvals(ledger.basins[0].factor)
    assert bool((size > width / 1.5).all() and (size < 1.5 * width).all())


def test_curvatures_keep_their_digits_where_widths_differ_by_a_million():
    """A normal law with widths from 1e-3 to 1e3 along turned axes, far from the origin."""
    width = torch.logspace(-3, 3, 8, dtype=DOUBLE)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=DOUBLE, generator=rng()))[0]
    root, centre = turn * width, torch.full((8,), 30.0, dtype=DOUBLE)
    inverse = torch.linalg.inv(root)

    def energy(x):
        return 0.5 * ((x - centre) @ inverse.mT).square().sum(-1)

    ledger = Ledger(problem_of(energy, 8))
    ledger.add(
        centre[None] + 1e-4, energy(centre[None] + 1e-4), 1e3 * torch.ones(8, dtype=DOUBLE),
        independent=True,
    )  # fmt: skip
    size = torch.linalg.svdvals(inverse @ ledger.basins[0].factor)
    assert bool((size > 0.9).all() and (size < 1.1).all())


def test_starts_that_curvatures_foretell_are_counted_without_a_descent():
    """In quadratic wells all are; beside a well that is not known none within it is."""

    def energy(x):
        near, far = (0.5 * (x - y).square().sum(-1) / s**2 for y, s in ((0.0, 1.0), (40.0, 0.5)))
        return -torch.logsumexp(torch.stack([-near, -far], -1), -1)

    ledger = filled(problem_of(energy, 2), torch.zeros(1, 2, dtype=DOUBLE) + 0.3)
    x = torch.cat([
        3 * torch.randn(50, 2, dtype=DOUBLE, generator=rng()),
        40 + 3 * torch.randn(50, 2, dtype=DOUBLE, generator=rng(1)),
    ])  # fmt: skip
    basin = ledger.foretold(x, energy(x))
    assert basin.tolist() == [0] * 50 + [-1] * 50
    before = ledger.starts
    ledger.credit(basin[basin >= 0])
    assert ledger.starts == before + 50 == ledger.basins[0].starts
    assert Ledger(problem_of(energy, 2)).foretold(x, energy(x)).tolist() == [-1] * 100


# Starts


def ladder(kind, dim=2):
    return ScaleLadder(
        torch.full((dim,), kind),
        torch.zeros(dim, dtype=DOUBLE),
        torch.logspace(-2, 3, 20, dtype=DOUBLE),
    )


def broad(dim=2, loc=5.0):
    return StudentT(torch.full((dim,), loc, dtype=DOUBLE), torch.eye(dim, dtype=DOUBLE))


def test_starts_in_a_box_are_uniform_and_owe_nothing_to_what_is_known():
    one, other = (
        independent_starts(500, ladder(2), law, rng()) for law in (broad(), broad(2, -9.0))
    )
    assert torch.equal(one, other)
    assert torch.equal(one, ladder(2).sample(500, rng()))


def test_a_quarter_of_the_starts_have_the_scales_of_the_survey():
    """The others lie about the broad law at (5e6, 5e6), half of all within 16 times its width.

    A draw at such a scale of the survey, up to 1000, is far from there.
    """
    start = independent_starts(1000, ladder(0), broad(2, 5e6), rng())
    assert start.shape == (1000, 2)
    far = (start - 5e6).norm(dim=-1)
    assert int((far > 1e6).sum()) == 250
    # Of those stretched by up to 16 nearly all are within 50, by up to 256 three quarters.
    share = float((far < 50).double().mean())
    assert 0.62 < share < 0.74  # 0.682 by 400,000 draws; the standard deviation is below 0.015
    assert bool((far[:100] > 1e6).any())  # any part of them has the same law


def test_line_scans_find_a_narrow_well_along_a_coordinate():
    """A well of width 0.05 in eight dimensions, eight widths along one axis of a wide one."""
    place = torch.zeros(8, dtype=DOUBLE)
    place[3] = -8.0

    def energy(x):
        wide = 0.5 * x.square().sum(-1)
        narrow = 0.5 * ((x - place) / 0.3).square().sum(-1) + 8 * math.log(0.3)
        return -torch.logaddexp(-wide, -narrow)

    problem = problem_of(energy, 8)
    basin = Basin(torch.zeros(8, dtype=DOUBLE), 0.0, torch.eye(8, dtype=DOUBLE))
    start = line_minima(problem, basin, [basin], 10_000, rng())
    assert float((start - place).norm(dim=-1).amin()) < 1.5
    assert problem.energy.evaluations <= 10_000


def test_line_scans_look_along_the_lines_to_other_basins():
    """Three wells on a line askew: from the first by way of the second to the third."""
    step = torch.tensor([3.0, 1.0, -2.0, 0.5], dtype=DOUBLE)
    loc = torch.stack([0 * step, step, 4 * step])

    def energy(x):
        return -torch.logsumexp(-0.5 * ((x[:, None] - loc) / 0.2).square().sum(-1), -1)

    problem = problem_of(energy, 4)
    basins = [Basin(m, 0.0, 0.2 * torch.eye(4, dtype=DOUBLE)) for m in loc[:2]]
    start = line_minima(problem, basins[0], basins, 10_000, rng())
    nearest = torch.cdist(start, loc).argmin(-1)
    assert 2 in nearest.tolist()


@pytest.mark.parametrize("most", [1, 73, 500])
def test_line_scans_stay_within_their_evaluations(most):
    """A single line of 73 points is the least."""
    problem = problem_of(wells, 2)
    basin = Basin(torch.full((2,), 2.0, dtype=DOUBLE), 0.0, torch.eye(2, dtype=DOUBLE) / 2)
    line_minima(problem, basin, [basin], most, rng())
    assert problem.energy.evaluations <= max(73, most)
