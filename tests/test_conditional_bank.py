"""Banks of conditional energies: a row of weighted points for each context."""

import math

import pytest
import torch

from rsm_sampler.bank.conditional import conditional_bank
from rsm_sampler.bank.plan import Plan
from rsm_sampler.target.contexts import Contexts
from rsm_sampler.target.coordinates import Bounds
from rsm_sampler.target.energy import EnergyError, MeteredEnergy
from rsm_sampler.target.problem import Problem

DOUBLE = torch.float64


def uniform(n, generator):
    return 4 * torch.rand(n, 1, dtype=DOUBLE, generator=generator) - 2


def normal(n, generator):
    return torch.randn(n, 1, dtype=DOUBLE, generator=generator)


def bank_of(energy, draw, *, evaluations, bank, rows):
    """The bank, and the meter that counted for it."""
    meter = MeteredEnergy(energy, 1, context_dim=1)
    contexts = Contexts(draw, 1, torch.device("cpu"))
    problem = Problem(meter, Bounds(-math.inf, math.inf, 1), contexts=contexts)
    plan = Plan.within(1, evaluations=evaluations, bank=bank, chains=1000, ess=1000.0, starts=16,
                       slope_cost=1)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return conditional_bank(problem, plan, rows, generator), meter


def test_contexts_get_a_row_of_points_each():
    """The bank of E(x, c) = |x - c|^2 / 2 in one dimension: rows of 128, weighted means near c.

    A weighted mean of a row within 6 standard errors of the delta method, and a bias of 0.05.
    """
    bank, meter = bank_of(
        lambda x, context: (x - context).square().sum(-1) / 2, uniform,
        evaluations=20_000, bank=32 * 128, rows=32,
    )  # fmt: skip
    assert bank.points.shape == (32, 128, 1)
    assert bank.log_weight.shape == (32, 128)
    assert bank.context.shape == (32, 1)
    assert meter.counts.keys() == {"search"}
    assert meter.evaluations <= 20_000 + 32 * 128
    weight = bank.log_weight.softmax(-1)
    mean = (weight * bank.points[..., 0]).sum(-1)
    se = (weight.square() * (bank.points[..., 0] - bank.context).square()).sum(-1).sqrt()
    assert bool(((mean - bank.context[:, 0]).abs() <= 6 * se + 0.05).all())
    assert abs(bank.log_z - 0.5 * math.log(2 * math.pi)) < 0.1


@pytest.mark.parametrize(("width", "refused"), [(0.5, False), (0.05, True)])
def test_contexts_whose_narrow_law_was_missed_are_left_out(width, refused):
    """Walls about each context; if a tenth of the contexts and more are missed, it says so."""

    def energy(x, context):
        inside = (x - context).abs().amax(-1) < width
        return torch.where(inside, 0.0, torch.inf)

    options = {"evaluations": 14_000, "bank": 200 * 32, "rows": 200}
    if refused:
        with pytest.raises(EnergyError, match=r"every context, .* of 200 contexts, such as \["):
            bank_of(energy, normal, **options)
        return
    bank, _ = bank_of(energy, normal, **options)
    assert 180 <= len(bank.context) == len(bank.points) == len(bank.log_weight) < 200
    assert bool(bank.log_weight.amax(-1).isfinite().all())
    inside = bank.log_weight > -torch.inf
    off = (bank.points[..., 0] - bank.context).abs()
    assert float(off[inside].max()) < width


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_conditional_energies_that_cannot_be_normalised_are_refused(sign):
    with pytest.raises(EnergyError, match="cannot be normalised"):
        bank_of(
            lambda x, context: sign * (x - context).square().sum(-1), uniform,
            evaluations=60_000, bank=32 * 64, rows=32,
        )  # fmt: skip


@pytest.mark.parametrize("evaluations", [200, 500, 1111, 5000])
def test_conditional_banks_stay_within_their_evaluations(evaluations):
    _, meter = bank_of(
        lambda x, context: (x - context).square().sum(-1) / 2, uniform,
        evaluations=evaluations, bank=evaluations, rows=4,
    )  # fmt: skip
    assert meter.evaluations <= 2 * evaluations
