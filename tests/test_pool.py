"""Joint weights of draws of several laws, against sums by hand."""

import math

import pytest
import torch

from energies import GaussianMixture
from rsm_sampler.bank.pool import Pool
from rsm_sampler.montecarlo.densities import Mixture, ScaleLadder, StudentT

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def target():
    loc = torch.tensor([[0.0, 0.0], [6.0, 2.0], [-3.0, 5.0]])
    return GaussianMixture(loc, torch.tensor([1.0, 0.6, 1.3]), weights=[0.5, 0.2, 0.3])


def student(at, scale):
    return StudentT(torch.tensor(at, dtype=DOUBLE), scale * torch.eye(len(at), dtype=DOUBLE))


def laws():
    """From far too wide to one that follows the target, one of which misses most of it."""
    ladder = ScaleLadder(
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=DOUBLE),
        torch.logspace(-4, 5, 32, dtype=DOUBLE),
    )
    mixture = Mixture(
        torch.tensor([0.5, 0.2, 0.3], dtype=DOUBLE),
        target().loc.double(),
        torch.eye(2, dtype=DOUBLE).expand(3, 2, 2).clone(),
        student([0.0, 0.0], 5.0),
        5.0,
    )
    return [
        (ladder, 2000), (student([1.0, 2.0], 6.0), 500), (student([6.0, 2.0], 0.3), 300),
        (mixture, 3000),
    ]  # fmt: skip


def filled(pairs, seed=0, read=()):
    pool, generator, energy = Pool(), rng(seed), target().energy
    for t, (law, n) in enumerate(pairs):
        x = law.sample(n, generator)
        pool.add(law, x, energy(x))
        if t in read:
            _ = pool.weights
    return pool


def by_hand(pool):
    total = sum(
        count * law.log_prob(pool.x).exp()
        for law, count in zip(pool.laws, pool.counts, strict=True)
    )
    return -pool.energy - (total / len(pool)).log()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 2, 0]])
@pytest.mark.parametrize("read", [(), (0, 1, 2), (1,)])
def test_joint_weights_are_sums_by_hand_in_any_order(order, read):
    """Where they are above the largest less 60 nats; below, no more is promised than that.

    The sum over laws grows as weights are looked at, whenever that is.
    """
    pool = filled([laws()[i] for i in order], read=read)
    weights, exact = pool.weights.value, by_hand(pool)
    heavy = exact > exact.amax() - 60
    torch.testing.assert_close(weights[heavy], exact[heavy], rtol=1e-9, atol=1e-9)
    assert bool((weights[~heavy] <= exact.amax() - 60 + 1e-9).all())
    assert int((~heavy).sum()) > 0 or 0 not in order  # points too far out to say anything


def test_a_point_weighs_the_same_whoever_asks_first():
    one, other = filled(laws(), read=(0, 1, 2)).weights, filled(laws()).weights
    torch.testing.assert_close(one.normalised(), other.normalised(), rtol=1e-9, atol=1e-25)


def test_the_joint_law_gives_the_same_weights():
    pool = filled(laws())
    exact = -pool.energy - pool.law.log_prob(pool.x)
    heavy = exact > exact.amax() - 60
    torch.testing.assert_close(pool.weights.value[heavy], exact[heavy], rtol=1e-9, atol=1e-9)


def test_joint_weights_give_log_z_and_shares_of_modes():
    """Within 5 standard errors; draws of the laws, not of the joint one, have even less spread."""
    pool = filled(laws(), seed=2)
    weights = pool.weights
    assert abs(float(weights.log_mean())) <= 5 * float(weights.log_mean_se())
    share, error = weights.mean(target().responsibilities(pool.x))
    assert bool(((share - target().weights).abs() <= 5 * error).all())
    assert float(error.amax()) < 0.02


def test_own_weights_owe_nothing_to_other_laws():
    pool, energy = Pool(), target().energy
    for law, n in laws():
        x = law.sample(n, rng(n))
        own = pool.add(law, x, energy(x))
        torch.testing.assert_close(own.value, -energy(x) - law.log_prob(x))


def test_infinite_energies_have_no_weight():
    pool, law = Pool(), student([0.0], 1.0)
    x = law.sample(100, rng())
    energy = torch.where(x[:, 0] > 0, 0.0, torch.inf)
    own = pool.add(law, x, energy)
    for weights in (own, pool.weights):
        assert torch.equal(weights.value == -torch.inf, x[:, 0] <= 0)
    pool.add(law, x, torch.full_like(energy, torch.inf))
    assert int((pool.weights.value > -torch.inf).sum()) == int((x[:, 0] > 0).sum())


def test_a_law_that_misses_the_target_spoils_nothing():
    """A thousand draws in the wrong place are a share of the points that weigh little."""
    pairs = laws()[3:]
    before = float(filled(pairs).weights.ess())
    after = float(filled([*pairs, (student([50.0, 50.0], 0.1), 1000)]).weights.ess())
    assert after > 0.98 * before


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_trimmed_is_what_the_last_laws_alone_give(most):
    pairs = laws()
    pool = filled(pairs, read=(1,))
    x, energy = pool.x.clone(), pool.energy.clone()
    pool.trim(most)
    kept = min(most, len(pairs))
    n = sum(count for _, count in pairs[-kept:])
    assert pool.laws == [law for law, _ in pairs[-kept:]]
    assert pool.counts == [count for _, count in pairs[-kept:]]
    assert torch.equal(pool.x, x[-n:])
    assert torch.equal(pool.energy, energy[-n:])
    exact = by_hand(pool)
    heavy = exact > exact.amax() - 60
    torch.testing.assert_close(pool.weights.value[heavy], exact[heavy], rtol=1e-9, atol=1e-9)


def test_an_empty_pool_has_no_points():
    pool = Pool()
    assert len(pool) == 0
    pool.trim(3)
    assert len(pool) == 0
    assert math.isinf(float(filled(laws()).weights.tempered(1.0).value.amin())) is False
