import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsm_sampler.schedules import (
    EDM,
    Cosine,
    DiscreteSchedule,
    Geometric,
    Linear,
    VariancePreserving,
)

# beta_1, beta_T, alpha_bar at 1, 5, 10, 15, 20, and the root of the last, at T = 20; as printed.
GOLDEN = [
    (
        Cosine(20),
        "7.99272e-3 0.999 0.992007 0.847012 0.493844 0.144272 6.0596e-6 2.462e-3",
    ),
    (
        Linear(20, scale=0.8),
        "8.0e-5 0.7992 0.999920 0.637399 0.109435 3.14235e-3 5.2684e-6 2.295e-3",
    ),
    (
        Linear(20, scale=0.3),
        "3.0e-5 0.2997 0.999970 0.850659 0.473109 0.165368 3.46367e-2 0.1861",
    ),
    (
        Cosine(20, scale=0.8),
        "6.39418e-3 0.7992 0.993606 0.876118 0.571887 0.219563 4.6848e-3 0.06845",
    ),
    (
        Linear(20),
        "1.0e-4 0.999 0.999900 0.563603 0.0548213 3.37671e-4 6.44e-11 8.0e-6",
    ),
    (
        VariancePreserving(20),
        "1.72249e-2 0.385917 0.982775 0.715785 0.275960 0.0573046 6.40933e-3 0.08006",
    ),
]
DISCRETE = [row[0] for row in GOLDEN] + [Cosine(1), VariancePreserving(1000), Cosine(1000)]
DISCRETE.append(DiscreteSchedule.through(torch.tensor([1e-3, 0.2, 1.0, 80.0])))
CONTINUOUS = [Geometric(0.01, 160.0), EDM(0.002, 80.0), EDM(0.1, 10.0, rho=1.0)]
SCHEDULES = DISCRETE + CONTINUOUS


def printed(value, text):
    """The value with as many digits as the text has, as a number."""
    digits = len(text.split("e")[0].replace(".", "").lstrip("0"))
    return float(f"{value:.{digits}g}")


@pytest.mark.parametrize(("schedule", "row"), GOLDEN)
def test_golden_values_to_the_printed_digits(schedule, row):
    values = [schedule.betas[0], schedule.betas[-1]]
    values += [schedule.alpha_bar(t) for t in (1, 5, 10, 15, 20)]
    values.append(schedule.alpha_bar(20).sqrt())
    for value, text in zip(values, row.split(), strict=True):
        assert printed(value.item(), text) == float(text)


@pytest.mark.parametrize("schedule", DISCRETE)
def test_reverse_mean_is_consistent(schedule):
    """c_1(1) = 1, c_2(1) = 0 and c_1 + c_2 sqrt(alpha_bar_t) = sqrt(alpha_bar_{t-1})."""
    alpha_bar = schedule.alpha_bar(torch.arange(schedule.num_steps + 1))
    now, before, beta = alpha_bar[1:], alpha_bar[:-1], schedule.betas
    # 1 - alpha_bar by the noise scale, precise where alpha_bar is nearly one
    lost = schedule.sigma(torch.arange(schedule.num_steps + 1)).square() * alpha_bar
    c_1 = beta * before.sqrt() / lost[1:]
    c_2 = lost[:-1] * (1 - beta).sqrt() / lost[1:]
    assert c_1[0].item() == pytest.approx(1, rel=1e-12)
    assert c_2[0].item() == 0
    torch.testing.assert_close(c_1 + c_2 * now.sqrt(), before.sqrt(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", DISCRETE)
def test_discrete_alpha_bar_is_the_product_of_the_alphas(schedule):
    alpha_bar = schedule.alpha_bar(torch.arange(1, schedule.num_steps + 1))
    torch.testing.assert_close(alpha_bar, (1 - schedule.betas).cumprod(0), rtol=1e-10, atol=0)
    assert schedule.alpha_bar(0) == 1
    assert schedule.sigma(0) == 0


@pytest.mark.parametrize("schedule", DISCRETE)
def test_log_alpha_bar_is_linear_within_a_step(schedule):
    step = torch.arange(schedule.num_steps, dtype=torch.float64)
    ends = schedule.alpha_bar(step).log(), schedule.alpha_bar(step + 1).log()
    quarter = schedule.alpha_bar(step + 0.25).log()
    torch.testing.assert_close(quarter, 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_inverts_sigma(schedule):
    t = torch.linspace(0, schedule.t_max, 4001, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.time(schedule.sigma(t)), t, rtol=1e-9, atol=1e-9 * schedule.t_max
    )
    sigma = schedule.sigma(t)
    torch.testing.assert_close(schedule.sigma(schedule.time(sigma)), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_grows_and_signal_falls(schedule):
    t = torch.linspace(0, schedule.t_max, 4001, dtype=torch.float64)
    assert (schedule.sigma(t).diff() > 0).all()
    assert (schedule.alpha_bar(t).diff() < 0).all()
    torch.testing.assert_close(
        schedule.alpha_bar(t) * (1 + schedule.sigma(t).square()), torch.ones_like(t)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_sampler_grids_fall_to_exactly_zero(schedule, num_steps):
    sigmas = schedule.sigmas(num_steps)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] == schedule.sigma(schedule.t_max)


def test_the_grid_of_a_discrete_schedule_holds_its_own_steps():
    schedule = Cosine(20)
    torch.testing.assert_close(schedule.sigmas(), schedule.sigma(torch.arange(20, -1, -1)))
    torch.testing.assert_close(schedule.sigmas(5), schedule.sigmas()[::4], rtol=0, atol=0)


@given(st.floats(1e-3, 1.0), st.lists(st.floats(1.01, 3.0), max_size=15))
def test_a_schedule_has_the_levels_it_is_made_from(lowest, ratios):
    levels = lowest * torch.tensor([1.0, *ratios], dtype=torch.float64).cumprod(0)
    found = DiscreteSchedule.through(levels)
    assert found.num_steps == len(levels)
    # Rates up to 35, of relative errors of a few 1e-16, are summed and turned back.
    torch.testing.assert_close(found.sigmas()[:-1].flip(0), levels, rtol=1e-12, atol=0)


def test_the_grids_of_continuous_schedules_end_at_their_ends():
    assert EDM(0.002, 80.0).sigmas(18)[[0, -2]].tolist() == pytest.approx([80.0, 0.002], rel=1e-12)
    geometric = Geometric(0.01, 160.0).sigmas(9)
    assert geometric[[0, -2]].tolist() == pytest.approx([160.0, 0.01], rel=1e-12)
    ratio = geometric[:-2] / geometric[1:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_edm_matches_the_published_formula():
    i, n = torch.arange(18, dtype=torch.float64), 18
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM(0.002, 80.0).sigmas(18)[:-1], expected)


@given(
    num_steps=st.integers(1, 200),
    rates=st.floats(1e-8, 0.999),
    where=st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_constant_rates_of_any_size(num_steps, rates, where):
    schedule = DiscreteSchedule(torch.full((num_steps,), rates, dtype=torch.float64))
    t = torch.tensor(where, dtype=torch.float64) * num_steps
    rate = -math.log1p(-rates) * t
    inside = rate < 700  # beyond, sigma overflows
    sigma = schedule.sigma(t)[inside]
    torch.testing.assert_close(sigma, rate[inside].expm1().sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.time(sigma), t[inside], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [Cosine(20), Geometric(0.01, 100.0), EDM(0.01, 100.0)])
def test_precision_and_shape_follow_the_argument(schedule):
    single = torch.rand(3, 1, 2)
    for function in (schedule.sigma, schedule.alpha_bar, schedule.time):
        assert function(single).dtype == torch.float32
        assert function(single).shape == single.shape
        assert function(single.double()).dtype == torch.float64
        assert function(torch.ones(2, dtype=torch.long)).dtype == torch.float64
        assert function(0.5).shape == ()
        torch.testing.assert_close(function(single), function(single.double()).float())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tensors_are_clamped_to_the_range(schedule):
    t = torch.tensor([-1.0, schedule.t_max + 1])
    ends = torch.tensor([0.0, schedule.t_max])
    torch.testing.assert_close(schedule.sigma(t), schedule.sigma(ends), rtol=0, atol=0)
    beyond = torch.tensor([0.0, 1e30])
    torch.testing.assert_close(schedule.time(beyond), ends, rtol=0, atol=0)


def test_the_rates_given_are_not_shared():
    betas = torch.tensor([0.1, 0.2])
    schedule = DiscreteSchedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0].item() == pytest.approx(0.1)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(0), "num_steps must be at least 1, got 0"),
        (lambda: Linear(-3), "num_steps must be at least 1, got -3"),
        (lambda: VariancePreserving(0), "num_steps must be at least 1, got 0"),
        (lambda: Linear(5, beta_min=0.5, beta_max=0.1), "beta_min must be less than beta_max"),
        (lambda: Linear(5, beta_max=1.5), "betas must lie within"),
        (lambda: Linear(5, scale=2.0), "betas must lie within"),
        (lambda: Linear(5, scale=0.0), "scale must be positive and finite, got 0.0"),
        (lambda: Cosine(5, beta_max=1.0), "betas must lie within"),
        (lambda: Cosine(5, offset=-0.1), "offset must be at least 0, got -0.1"),
        (lambda: VariancePreserving(5, beta_min=0.0), "beta_min must be positive"),
        (lambda: DiscreteSchedule(torch.tensor([0.5, 0.0])), "from 0 to 0.5"),
        (lambda: DiscreteSchedule(torch.tensor([0.5, math.nan])), "betas must lie within"),
        (lambda: DiscreteSchedule(torch.zeros(0)), r"shape \(num_steps,\), got \(0,\)"),
        (lambda: DiscreteSchedule(torch.zeros(2, 2)), r"got \(2, 2\)"),
        (lambda: DiscreteSchedule.through(torch.zeros(2, 2)), r"must have shape .*\(2, 2\)"),
        (lambda: DiscreteSchedule.through(torch.tensor([0.0, 1.0])), r"above 0.*\[0.0, 1"),
        (lambda: DiscreteSchedule.through(torch.tensor([1.0, 1.0])), "rise from above 0"),
        (lambda: DiscreteSchedule.through(torch.tensor([1.0, math.inf])), "be finite, got"),
        (lambda: Geometric(1.0, 0.1), "sigma_min must be less than sigma_max, got 1.0 and 0.1"),
        (lambda: Geometric(0.0, 1.0), "sigma_min must be positive and finite, got 0.0"),
        (lambda: Geometric(0.1, math.inf), "sigma_max must be finite, got inf"),
        (lambda: EDM(0.1, 1.0, rho=-1.0), "rho must be positive and finite, got -1.0"),
        (lambda: EDM(0.1, 1.0).sigmas(), "num_steps must be given"),
        (lambda: EDM(0.1, 1.0).sigmas(0), "num_steps must be at least 1, got 0"),
        (lambda: Cosine(20).sigmas(0), "num_steps must be at least 1, got 0"),
        (lambda: Cosine(20).sigma(21), r"t must lie in \[0, 20\], got 21"),
        (lambda: Cosine(20).alpha_bar(math.nan), r"t must be a finite number, got nan"),
        (lambda: Geometric(0.1, 1.0).time(2.0), r"sigma must lie in \[0.1, 1\], got 2.0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
