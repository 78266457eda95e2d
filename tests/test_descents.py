"""Descents: L-BFGS for many points at once, against minima that are known."""

import math

import pytest
import torch

from rsm_sampler.montecarlo.descents import descend, quasi_newton

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def with_slope(energy):
    """Values and gradients by autograd; gradients 0 where values are not finite."""

    def call(x):
        leaf = x.detach().clone().requires_grad_()
        value = energy(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        value = torch.where(value.isnan(), torch.inf, value.detach())
        return value, torch.where(value.isfinite()[:, None], slope, 0.0).nan_to_num(0.0)

    return call


class Counted:
    """An energy with its gradient, whose points are counted."""

    def __init__(self, energy):
        self.call, self.points = with_slope(energy), 0

    def __call__(self, x):
        self.points += len(x)
        return self.call(x)


def test_steps_of_l_bfgs_solve_a_quadratic():
    """With as many conjugate pairs as dimensions the direction is Newton's."""
    dim, generator = 5, rng(3)
    root = torch.randn(2, dim, dim, generator=generator, dtype=DOUBLE)
    hessian = root @ root.mT + torch.eye(dim, dtype=DOUBLE)
    _, axes = torch.linalg.eigh(hessian)
    steps = axes.movedim(-1, 0)  # (pairs, n, dim): conjugate, as those of exact line searches
    changes = (hessian @ steps[..., None])[..., 0]
    slope = torch.randn(2, dim, generator=generator, dtype=DOUBLE)
    newton = -torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(quasi_newton(slope, steps, changes), newton)
    # Pairs without convexity, or of rejected steps, are passed over.
    useless = torch.cat([steps, -steps[:1], 0 * steps[:1]])
    more = torch.cat([changes, changes[:1], changes[:1]])
    torch.testing.assert_close(quasi_newton(slope, useless, more), newton)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("stated", [0.1, 1.0, 10.0])
def test_bowls_in_any_metric_end_at_their_minimum(condition, stated):
    """Six dimensions, axes askew, the widths known to a factor of ten.

    Within a tenth of a nat, or a nat in the longest valley: as much as the ledger allows.
    """
    width = torch.logspace(0, -0.5 * math.log10(condition), 6, dtype=DOUBLE)
    axes, _ = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE, generator=rng(2)))
    start = 3 + 10 * torch.randn(40, 6, dtype=DOUBLE, generator=rng(1))

    def energy(x):
        return 0.5 * (((x - 3) @ axes) / width).square().sum(-1) - 7

    ends = descend(with_slope(energy), start, stated * torch.ones(6, dtype=DOUBLE))
    assert ends.x.shape == (40, 6)
    assert bool(ends.rested.all())
    assert float((ends.energy + 7).amax()) < (0.1 if condition < 1e3 else 1.0)
    torch.testing.assert_close(ends.energy, energy(ends.x))


def test_the_metric_of_the_widths_makes_stretched_axes_alike():
    """Widths over six decades: with them stated, few steps are needed."""
    width = torch.logspace(-3, 3, 10, dtype=DOUBLE)
    energy = Counted(lambda x: 0.5 * ((x - 1) / width).square().sum(-1))
    start = 1 + width * torch.randn(30, 10, dtype=DOUBLE, generator=rng())
    ends = descend(energy, start, width)
    assert bool(ends.rested.all())
    assert float(ends.energy.amax()) < 1e-3
    assert energy.points < 30 * 15


def test_a_curved_valley_is_followed_to_its_end():
    """Rosenbrock's function in two dimensions, from both sides: 38 of 40 within a nat."""

    def energy(x):
        return 100 * (x[:, 1] - x[:, 0].square()).square() + (1 - x[:, 0]).square()

    start = 2 * torch.randn(40, 2, dtype=DOUBLE, generator=rng())
    ends = descend(with_slope(energy), start, torch.ones(2, dtype=DOUBLE), steps=200)
    assert int((ends.energy < 1.0).sum()) >= 38
    assert int(ends.rested.sum()) >= 38


def test_across_a_valley_equal_energies_are_no_rest():
    """A step from wall to wall of a steep valley leaves the energy as it was, far from the end."""
    stiff = torch.tensor([1e4, 1.0], dtype=DOUBLE)
    start = torch.tensor([[0.03, 40.0], [-0.03, 40.0], [0.03, -40.0]], dtype=DOUBLE)
    ends = descend(
        with_slope(lambda x: 0.5 * (stiff * x.square()).sum(-1)),
        start,
        torch.tensor([3.0, 3.0], dtype=DOUBLE),
        steps=300,
    )
    assert float(ends.energy[ends.rested].amax()) < 0.1
    assert bool(ends.rested.all())


@pytest.mark.parametrize("wall", [math.inf, math.nan])
def test_walls_hold_descents_and_let_no_point_through(wall):
    """A slope down to a wall: descents end near it, at finite energies on the way and there."""

    def energy(x):
        return torch.where(x[:, 0] > 1, 3 * x[:, 0] + x[:, 1].square(), wall)

    start = torch.rand(30, 2, dtype=DOUBLE, generator=rng()) * 4 - torch.tensor([1.0, 2.0])
    ends = descend(with_slope(energy), start, torch.ones(2, dtype=DOUBLE))
    assert ends.start.tolist() == (start[:, 0] > 1).nonzero()[:, 0].tolist()
    assert bool(ends.energy.isfinite().all())
    assert bool((ends.x[:, 0] > 1).all())
    assert float(ends.x[:, 0].amax()) < 1.5
    assert bool(ends.path_energy.isfinite().all())


@pytest.mark.parametrize("wall", [math.inf, math.nan])
def test_where_no_step_leads_down_a_descent_rests(wall):
    """In one dimension, at a wall: within 1e-3 of it."""

    def energy(x):
        return torch.where(x[:, 0] > 1, 3 * x[:, 0], wall)

    start = 1.01 + 4 * torch.rand(20, 1, dtype=DOUBLE, generator=rng())
    ends = descend(with_slope(energy), start, torch.ones(1, dtype=DOUBLE))
    assert bool(ends.rested.all())
    assert float(ends.x.amax()) < 1.001


def test_no_start_of_finite_energy_gives_no_end():
    ends = descend(
        lambda x: (torch.full_like(x[:, 0], torch.inf), torch.zeros_like(x)),
        torch.zeros(5, 2, dtype=DOUBLE),
        torch.ones(2, dtype=DOUBLE),
    )
    assert ends.x.shape == (0, 2)
    assert ends.energy.shape == ends.rested.shape == (0,)


@pytest.mark.parametrize("limit", [10, 57, 100, 333, 2000])
@pytest.mark.parametrize("cost", [1, 2, 9])
def test_evaluations_stay_within_the_limit(limit, cost):
    """As long as the starts themselves are within it."""
    energy = Counted(lambda x: (x[:, 0].square() - x[:, 1]).square() + x.square().sum(-1) / 9)
    start = torch.randn(max(1, limit // (4 * cost)), 2, dtype=DOUBLE, generator=rng())
    descend(energy, start, torch.ones(2, dtype=DOUBLE), cost=cost, evaluations=limit)
    assert cost * energy.points <= limit


def test_starts_do_not_disturb_each_other():
    """Each ends where it ends alone: curvature is learned by every point for itself."""

    def energy(x):
        return (x.square() - 4).square().sum(-1) / 8

    start = 4 * torch.randn(12, 3, dtype=DOUBLE, generator=rng())
    width = torch.ones(3, dtype=DOUBLE)
    together = descend(with_slope(energy), start, width)
    alone = torch.cat([descend(with_slope(energy), row[None], width).x for row in start])
    torch.testing.assert_close(together.x, alone, rtol=1e-9, atol=1e-9)
    assert bool((together.x.abs() - 2).abs().lt(0.05).all())


def test_energies_never_rise_beyond_those_of_the_last_steps():
    """The path has the starts first and only accepted points; no end lies above its start."""

    def energy(x):
        return (3 * x).sin().sum(-1) + x.square().sum(-1) / 4

    start = 3 * torch.randn(50, 2, dtype=DOUBLE, generator=rng())
    ends = descend(with_slope(energy), start, torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(ends.path[:50], start)
    torch.testing.assert_close(ends.path_energy, energy(ends.path))
    assert bool((ends.energy <= energy(start)).all())


def test_slopes_without_curvature_are_crossed_in_growing_steps():
    """The sum of |x_i|, from 1,000 widths away: where the slope is constant, steps double."""
    energy = Counted(lambda x: (1 + x.square()).sqrt().sum(-1))
    start = 1000 * torch.randn(30, 3, dtype=DOUBLE, generator=rng())
    ends = descend(energy, start, torch.ones(3, dtype=DOUBLE))
    assert bool(ends.rested.all())
    assert float(ends.energy.amax()) < 3.1
    assert energy.points < 30 * 60


def test_rounding_is_no_curvature():
    """An exactly linear energy, with slopes that differ in their last digits: no point rests."""

    def call(x):
        noise = 1e-15 * torch.randn(x.shape, dtype=DOUBLE, generator=generator)
        return 3 * x.sum(-1), 3 * (1 + noise)

    generator = rng(1)
    start = torch.randn(30, 2, dtype=DOUBLE, generator=rng())
    ends = descend(call, start, torch.ones(2, dtype=DOUBLE), steps=25)
    assert not bool(ends.rested.any())
    assert float(ends.energy.amax()) < -1000
