"""What a bank leaves out although descents have met it."""

import math

import pytest
import torch

import energies
from rsm_sampler import explore
from rsm_sampler.bank.ledger import Basin
from rsm_sampler.bank.missing import left_out
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.pool import Pool
from rsm_sampler.bank.sources import Proposal
from rsm_sampler.montecarlo.densities import Mixture, StudentT
from rsm_sampler.target.coordinates import Bounds
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.problem import Problem

DOUBLE = torch.float64
DIM = 4
PLAN = Plan.within(
    DIM, evaluations=10_000, bank=10_000, chains=10_000, ess=1000, starts=64, slope_cost=2
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def modes(number, apart=12.0):
    """Places far apart on a line."""
    loc = torch.zeros(number, DIM, dtype=DOUBLE)
    loc[:, 0] = apart * torch.arange(number, dtype=DOUBLE)
    return loc


def law(loc, share=0.02):
    """Heavy-tailed components at places, and a broad law about all."""
    broad = StudentT(torch.zeros(DIM, dtype=DOUBLE), 60.0 * torch.eye(DIM, dtype=DOUBLE))
    tril = 1.2 * torch.eye(DIM, dtype=DOUBLE).expand(len(loc), DIM, DIM)
    weight = torch.full((len(loc),), 1 / len(loc), dtype=DOUBLE)
    return Mixture(weight, loc, tril, broad, 8.0, share=share)


def examined(target, covered, *, starts=None, fresh=None, n=2000, seed=0):
    """What is said of a law of components at some of the modes, and the evaluations spent."""
    energy = MeteredEnergy(target.energy, DIM)
    problem = Problem(energy, Bounds(-math.inf, math.inf, DIM))
    starts = [8] * len(target.loc) if starts is None else starts
    basins = [
        Basin(place.double(), float(target.energy(place[None].double())),
              torch.eye(DIM, dtype=DOUBLE), starts=count)
        for place, count in zip(target.loc, starts, strict=True)
    ]  # fmt: skip
    fresh = [False] * len(basins) if fresh is None else fresh
    lack = left_out(
        problem, basins, fresh, law(target.loc.double()[covered]), n, target.log_z, PLAN, Pool(),
        rng(seed),
    )  # fmt: skip
    return None if lack is None else lack.reason, energy.evaluations


def test_a_bank_that_has_all_basins_costs_nothing():
    target = energies.GaussianMixture(modes(3), scale=1.0)
    assert examined(target, [0, 1, 2]) == (None, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_a_basin_that_is_not_among_the_draws_is_said_with_its_mass(share, seed):
    """The stated share is within 5 errors of 64 draws of a law that fits: a tenth of it."""
    target = energies.GaussianMixture(modes(3), scale=1.0, weights=[0.8 - share, 0.2, share])
    said, _ = examined(target, [0, 1], seed=seed)
    assert said is not None
    stated = float(said.split("%")[0].split()[-1]) / 100
    assert stated == pytest.approx(share, rel=0.5)


def test_a_basin_of_little_mass_may_be_missing():
    target = energies.GaussianMixture(modes(3), scale=1.0, weights=[0.6, 0.399, 0.001])
    assert examined(target, [0, 1])[0] is None


def test_a_minimum_that_is_deep_but_narrow_has_no_mass():
    """A shape four times too wide in every coordinate makes half the mass of it; draws tell."""
    target = energies.GaussianMixture(modes(2), scale=1.0, weights=[0.998, 0.002])
    energy = MeteredEnergy(target.energy, DIM)
    problem = Problem(energy, Bounds(-math.inf, math.inf, DIM))
    place = target.loc[1].double()
    basin = Basin(
        place, float(target.energy(place[None])), 4 * torch.eye(DIM, dtype=DOUBLE), starts=9
    )
    laplace = 0.002 * 4.0**DIM
    assert laplace > 0.5
    said = left_out(
        problem, [basin], [False], law(target.loc.double()[[0]]), 2000, 0.0, PLAN, Pool(), rng()
    )
    assert said is None
    assert energy.evaluations > 0


def test_many_basins_that_one_start_met_stand_for_more():
    """Of 40 modes, each with 0.25 % of the mass, each was met once, and none is in the bank.

    There are some 40 * 39 / 2 more of them, by Chao's estimate.
    """
    weights = [0.9] + [0.1 / 40] * 40
    target = energies.GaussianMixture(modes(41), scale=1.0, weights=weights)
    fresh = [False] + [True] * 40
    said, _ = examined(target, [0], starts=[40] + [1] * 40, fresh=fresh, n=2000)
    assert said is not None
    assert "no start" in said
    # The same basins, each met by several starts: there are no others.
    assert examined(target, [0], starts=[40] + [4] * 40, fresh=fresh, n=2000)[0] is None


class Blind:
    """A source that knows of a single place."""

    name = "blind"

    def propose(self, scene):
        one = law(torch.zeros(1, DIM, dtype=DOUBLE))
        return Proposal(self.name, one, scene.draw(one, 500).share())


def test_no_bank_without_a_basin_that_was_seen_is_returned_as_one():
    """Its weights alone look well: all of 95 % of the draws lie in one mode."""
    target = energies.GaussianMixture(modes(2), scale=1.0, weights=[0.6, 0.4])
    found = explore(target.energy, DIM, ess=500, sources=[Blind()], progress=False)
    assert found.method != "blind" or found.verdict != "trustworthy"
    assert any("not among the draws" in reason for reason in found.reasons)
