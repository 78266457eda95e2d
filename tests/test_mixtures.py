"""Mixtures that are adapted to weighted points."""

import math

import pytest
import torch

from rsm_sampler.montecarlo.densities import Mixture, ScaleLadder, StudentT
from rsm_sampler.montecarlo.mixtures import allocated, cholesky, extended, refitted, split
from rsm_sampler.montecarlo.weights import LogWeights

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def broad(dim=2, scale=8.0):
    return StudentT(torch.zeros(dim, dtype=DOUBLE), scale * torch.eye(dim, dtype=DOUBLE))


def law(weight=(0.3, 0.7), *, df=50.0, share=0.05):
    """Two components, ten widths apart, of different shapes."""
    return Mixture(
        torch.tensor(weight, dtype=DOUBLE),
        torch.tensor([[-6.0, 0.0], [6.0, 2.0]], dtype=DOUBLE),
        torch.tensor([[[1.0, 0.0], [0.5, 0.7]], [[0.4, 0.0], [0.0, 1.2]]], dtype=DOUBLE),
        broad(),
        df,
        share=share,
    )


def blurred():
    """A start that has both in sight, and neither right."""
    return Mixture(
        torch.tensor([0.5, 0.5], dtype=DOUBLE),
        torch.tensor([[-4.0, 1.0], [4.0, 1.0]], dtype=DOUBLE),
        2 * torch.eye(2, dtype=DOUBLE).expand(2, 2, 2).clone(),
        broad(),
        50.0,
    )


def equal(n):
    return torch.full((n,), 1 / n, dtype=DOUBLE)


def fit(mixture, x, weight):
    return float(weight @ mixture.log_prob(x))


def covariances(mixture):
    return mixture.scale_tril @ mixture.scale_tril.mT


def moments(mixture):
    """Mean and covariance of the components together, for shapes taken as covariances."""
    weight = mixture.weight / mixture.weight.sum()
    mean = weight @ mixture.loc
    gap = mixture.loc - mean
    within = (weight[:, None, None] * covariances(mixture)).sum(0)
    return mean, within + (weight[:, None] * gap).mT @ gap


def test_cholesky_bears_singular_matrices():
    matrix = torch.tensor([[[4.0, 2.0], [2.0, 1.0]], [[9.0, 0.0], [0.0, 0.0]]], dtype=DOUBLE)
    factor = cholesky(matrix)
    torch.testing.assert_close(factor @ factor.mT, matrix, rtol=1e-8, atol=1e-8)


def test_a_mixture_is_recovered_from_its_draws():
    """20,000 draws: shares to 0.02, locations and shapes within 5 standard errors (0.06).

    Draws of the broad law, a twentieth, belong to no component: they widen those a little.
    """
    exact = law(share=0.0)
    n = 20_000
    x = exact.sample(n, rng())
    found = refitted(blurred(), x, equal(n), steps=20)
    torch.testing.assert_close(found.weight, exact.weight, rtol=0, atol=0.02)
    torch.testing.assert_close(found.loc, exact.loc, rtol=0, atol=0.06)
    wide = covariances(exact) * 50 / 48  # the covariance of a Student-t law of 50
    torch.testing.assert_close(covariances(found), wide, rtol=0.08, atol=0.06)


def test_weights_count_like_copies():
    """Draws of equal components with weights 3 : 7, and as many copies of the points."""
    x = law((0.5, 0.5), share=0.0).sample(3000, rng())
    copies = torch.where(x[:, 0] < 0, 3, 7)
    weighted = refitted(blurred(), x, copies / copies.sum().double(), steps=3)
    repeated = x.repeat_interleave(copies, 0)
    copied = refitted(blurred(), repeated, equal(len(repeated)), steps=3)
    torch.testing.assert_close(weighted.weight, copied.weight, rtol=1e-9, atol=0)
    # The damping knows that copies are no new points: 4 and 2 d of some hundred effective ones.
    torch.testing.assert_close(weighted.loc, copied.loc, rtol=0.02, atol=0.05)
    assert float(weighted.weight[0]) == pytest.approx(0.3, abs=0.05)


def test_the_fit_improves_with_every_step():
    """The weighted log-likelihood rises, up to the damping and the tails of the components."""
    x = law(share=0.0).sample(5000, rng())
    weight = LogWeights(torch.randn(5000, generator=rng(1), dtype=DOUBLE)).normalised()
    mixture, before = blurred(), -math.inf
    for _ in range(15):
        now = fit(mixture, x, weight)
        assert now >= before - 1e-3
        before, mixture = now, refitted(mixture, x, weight, steps=1)
    assert before > fit(blurred(), x, weight) + 0.5
    assert before > fit(law(), x, weight) - 0.05


def test_few_points_leave_a_component_as_it_was():
    """With two points near it: by n / (n + 2 d) to their covariance, a third of the way."""
    mixture = law(share=0.0)
    x = torch.tensor([[6.0, 2.2], [6.0, 1.8]], dtype=DOUBLE)
    found = refitted(mixture, x, equal(2), steps=1)
    torch.testing.assert_close(found.loc[-1], mixture.loc[1], rtol=0, atol=1e-6)
    points = torch.tensor([[0.0, 0.0], [0.0, 0.04]], dtype=DOUBLE)
    exact = torch.lerp(covariances(mixture)[1], points, 2 / (2 + 2 * 2))
    torch.testing.assert_close(covariances(found)[-1], exact, rtol=1e-4, atol=1e-6)


def one(scale, dim=20):
    loc, tril = torch.zeros(1, dim, dtype=DOUBLE), scale * torch.eye(dim, dtype=DOUBLE)[None]
    return Mixture(torch.ones(1, dtype=DOUBLE), loc, tril, broad(dim), 80.0)


@pytest.mark.parametrize("seed", range(3))
def test_few_points_do_not_spoil_a_component_that_fits(seed):
    """60 points in 20 dimensions, whose own covariance has eigenvalues from 0.2 to 2.3.

    Chance explains what they show of a shift and of another shape: little of it may enter the fit.
    """
    x = torch.randn(60, 20, dtype=DOUBLE, generator=rng(seed))
    own = torch.linalg.eigvalsh(torch.cov(x.mT))
    assert float(own[0]) < 0.4 and float(own[-1]) > 1.8
    fitted = refitted(one(1.0), x, equal(60))
    value = torch.linalg.eigvalsh(covariances(fitted)[0])
    assert float(value[0]) > 0.7 and float(value[-1]) < 1.4
    assert float(fitted.loc.norm()) < 0.5 * float(x.mean(0).norm())


def test_few_points_move_a_component_that_does_not_fit():
    """Four times too wide and three widths off: four steps of trust 0.6 leave 0.026 of either."""
    x = torch.randn(60, 20, dtype=DOUBLE, generator=rng(1))
    x[:, 0] += 12.0
    fitted = refitted(one(4.0), x, equal(60))
    assert float(covariances(fitted)[0].diagonal().mean()) == pytest.approx(
        1 + 0.026 * 15, abs=0.4
    )
    assert float(fitted.loc[0, 0]) == pytest.approx(12.0, abs=0.6)


def test_components_without_points_are_given_up_and_rare_ones_stay_in_sight():
    mixture = Mixture(
        torch.full((3,), 1 / 3, dtype=DOUBLE),
        torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 500.0]], dtype=DOUBLE),
        torch.eye(2, dtype=DOUBLE).expand(3, 2, 2).clone(),
        broad(),
        50.0,
    )
    x = torch.randn(1000, 2, generator=rng(), dtype=DOUBLE)
    x[0, 0] += 30  # a thousandth of the weight
    found = refitted(mixture, x, equal(1000), steps=2)
    assert found.loc.shape == (2, 2)
    assert float(found.weight.amin()) >= 0.02 / 2 / 1.02
    assert float(found.weight.sum()) == pytest.approx(1.0)


def test_a_new_broad_law_takes_the_place_of_the_old_one():
    x = law().sample(500, rng())
    box = ScaleLadder(torch.full((2,), 2), torch.zeros(2, dtype=DOUBLE), torch.ones(1).double())
    assert refitted(law(), x, equal(500)).broad is not box
    assert refitted(law(), x, equal(500), broad=box).broad is box


@pytest.mark.parametrize("most", [2, 3, 4, 100])
def test_halves_have_mean_and_covariance_of_the_whole(most):
    mixture = law()
    halves = split(mixture, most, torch.ones(len(mixture.loc), dtype=torch.bool))
    assert len(halves.loc) == max(2, min(4, most))
    for one, other in zip(moments(halves), moments(mixture), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    assert float(halves.weight.sum()) == pytest.approx(1.0)
    if most == 3:  # the heaviest first, along its longest axis, a width apart
        apart = halves.loc[2] - halves.loc[1]
        torch.testing.assert_close(
            apart.abs(), torch.tensor([0.0, 1.2], dtype=DOUBLE), rtol=0, atol=1e-9
        )
    torch.testing.assert_close(mixture.loc, law().loc)  # as it was


def test_light_components_are_not_split():
    """Less than a quarter of an equal share."""
    poor = torch.ones(2, dtype=torch.bool)
    assert len(split(law((0.1, 0.9)), 100, poor).loc) == 3


def test_components_that_fit_are_not_split():
    assert len(split(law(), 100, torch.tensor([False, True])).loc) == 3
    assert len(split(law(), 100, torch.zeros(2, dtype=torch.bool)).loc) == 2


def test_more_components_have_their_share_together():
    new = torch.tensor([[0.0, 9.0], [0.0, -9.0], [1.0, 1.0]], dtype=DOUBLE)
    tril = torch.eye(2, dtype=DOUBLE).expand(3, 2, 2)
    found = extended(law(), new, tril, share=0.3)
    torch.testing.assert_close(
        found.weight, torch.tensor([0.21, 0.49, 0.1, 0.1, 0.1], dtype=DOUBLE)
    )
    torch.testing.assert_close(found.loc[2:], new)
    x = law().sample(100, rng())
    # The share of the broad law is as before; the rest is that of the parts.
    other = Mixture(equal(3), new, tril, law().broad, 50.0, share=law().share)
    mixed = torch.logaddexp(law().log_prob(x) + math.log(0.7), other.log_prob(x) + math.log(0.3))
    torch.testing.assert_close(found.log_prob(x), mixed)


@pytest.mark.parametrize("true", [(0.3, 0.7), (0.5, 0.5)])
def test_shares_are_moved_to_where_the_weights_are_uneven(true):
    """A component that fits badly gets more draws than its mass.

    The target's first component is wider in one direction than the mixture's, whose tails reach
    there. The variance of weights falls, to within a tenth of the least over all shares.
    """
    target = law(true, share=0.0)
    target.scale_tril[0] = target.scale_tril[0] @ torch.diag(torch.tensor([1.0, 2.5])).double()
    mixture, n = law(true, df=5.0), 20_000

    def variance(mixture, seed):
        x = mixture.sample(n, rng(seed))
        value = target.log_prob(x) - mixture.log_prob(x)
        return float(1 / LogWeights(value).ess() - 1 / n) * n, x, value

    _, x, value = variance(mixture, 0)
    before = variance(mixture, 1)[0]
    weight = LogWeights(value).normalised()
    better = mixture
    for _ in range(3):
        better = allocated(better, x, -target.log_prob(x), weight)
    after = variance(better, 1)[0]
    assert after < before
    grid = [law((a, 1 - a), df=5.0) for a in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    assert after < 1.1 * min(variance(each, 1)[0] for each in grid)
    assert float(better.weight[0]) > true[0]
    assert float(better.weight.sum()) == pytest.approx(1.0)


def test_a_mixture_that_fits_keeps_its_shares():
    """At p = q all weights are one: a step leaves the shares within 0.02."""
    mixture = law()
    x = mixture.sample(20_000, rng())
    found = allocated(mixture, x, -mixture.log_prob(x), equal(20_000))
    torch.testing.assert_close(found.weight, mixture.weight, rtol=0, atol=0.02)
