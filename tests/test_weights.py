"""Weighted sets of points against float64 sums by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from rsm_sampler.montecarlo.weights import (
    LogWeights,
    cumulative_weight,
    pareto_shape,
    stratified_indices,
)

DOUBLE = torch.float64
SHAPES = npst.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(least, most):
    """Arrays of log-weights, some of them -inf."""
    number = st.floats(least, most) | st.just(-math.inf)
    return SHAPES.flatmap(lambda shape: npst.arrays(np.float64, shape, elements=number))


def scaled(value):
    """Weights over the largest of each row, by hand; zeros where there is none."""
    top = value.max(-1, keepdims=True)
    return np.exp(value - np.where(np.isfinite(top), top, 0.0)), top[..., 0]


@given(rows_of(-1e6, 1e6))
def test_sizes_and_means_are_sums_by_hand(value):
    weights = LogWeights(torch.from_numpy(value))
    w, top = scaled(value)
    some = np.isfinite(top)
    n = value.shape[-1]
    total = w.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = np.where(some, total**2 / (w**2).sum(-1), 0.0)
        log_mean = np.where(some, top + np.log(total / n), -np.inf)
        error = np.where(some, np.sqrt(np.maximum(1 / ess - 1 / n, 0)), np.inf)
        normal = np.where(some[..., None], w / total[..., None], 0.0)
    np.testing.assert_allclose(weights.ess().numpy(), ess, rtol=1e-9)
    np.testing.assert_allclose(weights.log_mean().numpy(), log_mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(weights.log_mean_se().numpy(), error, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(weights.normalised().numpy(), normal, rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(weights.usable.numpy(), some)
    assert weights.share() == pytest.approx(ess.sum() / value.size, rel=1e-9)


@given(rows_of(-1e3, 1e3), st.floats(-1e12, 1e12))
def test_ratios_do_not_change_with_a_constant(value, shift):
    """Shifts of up to 1e12 nats leave four digits of a nat in double precision."""
    weights, moved = (LogWeights(torch.from_numpy(v)) for v in (value, value + shift))
    torch.testing.assert_close(moved.ess(), weights.ess(), rtol=2e-3, atol=0)
    torch.testing.assert_close(
        moved.log_mean() - shift, weights.log_mean(), rtol=0, atol=1e-3 + 1e-12
    )


@given(rows_of(-1e3, 1e3), st.floats(1e-6, 3.0))
def test_tempered_weights_are_powers(value, beta):
    tempered = LogWeights(torch.from_numpy(value)).tempered(beta)
    exact = np.where(np.isneginf(value), -np.inf, beta * value)
    np.testing.assert_array_equal(tempered.value.numpy(), exact)


@given(
    npst.arrays(np.float64, st.integers(2, 60), elements=st.floats(-1e4, 1e4)),
    st.floats(0.05, 0.95),
)
def test_the_largest_power_keeps_the_effective_size(value, share):
    """At it the size is as wanted; at a thousandth more it would be less, unless it is one."""
    weights = LogWeights(torch.from_numpy(value))
    least = max(1.0, share * len(value))
    beta = weights.largest_power(least)
    assert 1e-18 <= beta <= 1
    assert float(weights.tempered(beta).ess()) >= least * (1 - 1e-9)
    if beta < 1:
        assert float(weights.tempered(1.001 * beta).ess()) < least * (1 + 1e-9)


def test_a_size_beyond_the_points_of_weight_gives_the_least_power():
    weights = LogWeights(torch.tensor([0.0, 5.0, -math.inf, -math.inf]))
    assert weights.largest_power(3.0) == pytest.approx(1e-18)


def test_powers_of_several_rows_are_of_their_sum():
    value = 30 * torch.randn(5, 40, generator=rng(), dtype=DOUBLE)
    beta = LogWeights(value).largest_power(60.0)
    size = sum(float(LogWeights(beta * row).ess()) for row in value)
    assert size == pytest.approx(60.0, rel=1e-6)


def test_weighted_means_and_errors_are_sums_by_hand():
    value = torch.randn(50, generator=rng(), dtype=DOUBLE)
    y = torch.randn(50, 2, 3, generator=rng(1), dtype=DOUBLE)
    mean, error = LogWeights(value).mean(y)
    w = np.exp(value.numpy())
    exact = (w[:, None, None] * y.numpy()).sum(0) / w.sum()
    square = (w**2)[:, None, None] * (y.numpy() - exact) ** 2
    np.testing.assert_allclose(mean.numpy(), exact, rtol=1e-12)
    np.testing.assert_allclose(error.numpy(), np.sqrt(square.sum(0)) / w.sum(), rtol=1e-12)
    one, _ = LogWeights(value).mean(torch.ones(50))
    assert one.shape == ()
    assert float(one) == pytest.approx(1.0)


def test_the_error_of_log_z_is_the_spread_of_its_estimates():
    """Of 400 sets of lognormal weights: a variance within its chi-square interval.

    The mean stated variance differs from the true one by the delta method's remainder, some 2 %
    at 2,000 weights, and by its own spread; 5 % is allowed for. False alarm 1e-6.
    """
    value = torch.randn(400, 2000, generator=rng(), dtype=DOUBLE) - 0.5
    weights = LogWeights(value)
    z = weights.log_mean()
    stated = float(weights.log_mean_se().square().mean())
    low, high = stats.chi2(400).interval(1 - 1e-6)
    assert 0.95 * low <= float(z.square().sum()) / stated <= 1.05 * high


@given(
    npst.arrays(np.float64, st.integers(1, 30), elements=st.floats(-50, 50)), st.integers(1, 500)
)
def test_resampled_copies_are_the_expected_number_within_one(value, n):
    """A stratified draw gives each point floor or ceil of n w copies, or one beyond either."""
    index = LogWeights(torch.from_numpy(value)).resampled(n, rng())
    assert bool((index.diff() >= 0).all())
    copies = index.bincount(minlength=len(value)).numpy()
    w = np.exp(value - value.max())
    assert np.abs(copies - n * w / w.sum()).max() < 2


def test_points_without_weight_are_not_drawn():
    value = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    assert set(LogWeights(value).resampled(1000, rng()).tolist()) == {1, 3}


def test_resampling_is_unbiased():
    """Mean copies over 4,000 draws of 3 from weights 1 : 2 : 5; within 5 standard errors."""
    cumulative = cumulative_weight(torch.zeros(3, 1), torch.tensor([1.0, 2.0, 5.0]).log())
    generator = rng()
    copies = torch.stack(
        [stratified_indices(cumulative, 3, generator).bincount(minlength=3) for _ in range(4000)]
    ).double()
    exact = 3 * torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE) / 8
    assert bool(((copies.mean(0) - exact).abs() <= 5 * copies.std(0) / math.sqrt(4000)).all())


# Tails


@pytest.mark.parametrize("shape", [0.0, 0.3, 0.7, 1.2])
def test_the_shape_of_a_generalised_pareto_tail(shape):
    """Of 40,000 draws the largest 600 tell it: standard deviation (1 + k) / sqrt(600).

    The prior pulls towards 0.5 by 10 / 610 of the gap. Within 5 standard deviations.
    """
    w = stats.genpareto(shape).rvs(40_000, random_state=np.random.default_rng(0))
    found = pareto_shape(torch.from_numpy(w).log())
    tail = math.ceil(3 * math.sqrt(40_000))
    expected = (tail * shape + 10 * 0.5) / (tail + 10)
    assert abs(found - expected) < 5 * (1 + shape) / math.sqrt(tail)


def test_bounded_weights_have_a_light_tail():
    """Uniform weights: a generalised Pareto law of shape -1."""
    w = torch.rand(10_000, generator=rng(), dtype=DOUBLE)
    assert pareto_shape(w.log()) < 0
    assert pareto_shape(torch.zeros(1000)) == 0.0


@pytest.mark.parametrize("n", [5, 24])
def test_few_weights_tell_no_shape(n):
    assert pareto_shape(torch.randn(n, generator=rng())) == math.inf
    assert LogWeights(torch.randn(n, generator=rng())).unseen() == math.inf


def test_the_shape_does_not_change_with_a_constant_or_zeros():
    value = 2 * torch.randn(5000, generator=rng(), dtype=DOUBLE)
    shape = pareto_shape(value)
    assert pareto_shape(value + 1e5) == pytest.approx(shape, rel=1e-6)
    zeros = torch.cat([value, torch.full((500,), -math.inf, dtype=DOUBLE)])
    assert LogWeights(zeros).pareto_shape() == pytest.approx(shape, rel=1e-12)


def test_the_unseen_share_is_about_what_lies_beyond_the_largest_weight():
    r"""Pareto weights of shape 1/2: E[w; w > m] = 2 / m of a mean of 2, in closed form.

    The largest m of n has :math:`m^2 = n / e` with e exponential. The estimate, m / n, over the
    truth, 1 / m, is 1 / e: its logarithm has the mean 0.577 (Euler's constant) and the standard
    deviation 1.28, and a little more from the spread of the shape, which the factor 1 / (1 - k)
    skews by some 0.1. Over 400 sets within 5 standard errors and that.
    """
    n, logs = 4000, []
    for seed in range(400):
        value = -0.5 * torch.rand(n, generator=rng(seed), dtype=DOUBLE).log()
        logs.append(math.log(LogWeights(value).unseen() * float(value.max().exp())))
    assert abs(np.mean(logs) - np.euler_gamma) < 5 * np.std(logs) / math.sqrt(400) + 0.1
    heavy = -1.5 * torch.rand(n, generator=rng(), dtype=DOUBLE).log()  # no mean: shape 3/2
    assert LogWeights(heavy).unseen() == math.inf


# At the door


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(0), r"value must have at least one weight, got shape \(0,\)"),
        (torch.zeros(3, 0), r"value must have at least one weight, got shape \(3, 0\)"),
        (torch.tensor([0.0, math.nan]), r"value must have no NaN or \+inf, got one"),
        (torch.tensor([0.0, math.inf]), r"value must have no NaN or \+inf, got one"),
    ],
)
def test_what_are_no_weights_is_refused(value, match):
    with pytest.raises(ValueError, match=match):
        LogWeights(value)


@pytest.mark.bad_input
def test_a_single_number_is_refused():
    with pytest.raises(ValueError, match=r"at least one weight, got shape \(\)"):
        LogWeights(torch.tensor(1.0))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("points", "log_weight", "match"),
    [
        (torch.zeros(3), torch.zeros(3), r"points must have shape \(points, dim\), got \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0), r"points must have shape"),
        (torch.zeros(3, 2), torch.zeros(2), r"log_weight must have shape \(3,\), got \(2,\)"),
        (torch.zeros(2, 2), torch.full((2,), -math.inf), r"at least one finite value"),
        (torch.zeros(2, 2), torch.tensor([0.0, math.nan]), r"no NaN or \+inf"),
    ],
)
def test_distribution_functions_need_weights(points, log_weight, match):
    with pytest.raises(ValueError, match=match):
        cumulative_weight(points, log_weight)


def test_weights_without_any_have_no_size():
    weights = LogWeights(torch.full((4,), -math.inf))
    assert not bool(weights.usable)
    assert float(weights.ess()) == 0.0
    assert float(weights.log_mean()) == -math.inf
    assert float(weights.log_mean_se()) == math.inf
    assert weights.normalised().tolist() == [0.0] * 4
