import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rsm_sampler.metrics import (
    dkw_band,
    elbo,
    eubo,
    forward_effective_sample_size,
    grid_total_variation,
    kl_paired,
    ks_per_coordinate,
    mmd2,
    mode_weight_total_variation,
    mode_weights,
    nll,
    sliced_wasserstein2,
    total_variation,
    total_variation_floor,
    wasserstein2,
    wasserstein2_1d,
)

quick = settings(derandomize=True, deadline=None, max_examples=30)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


# --- transport --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_wasserstein2_is_the_best_of_all_assignments(dim):
    x, y = normal(5, dim), normal(5, dim, seed=1) + 1
    best = min(
        (x - y[list(order)]).square().sum(-1).mean().sqrt().item()
        for order in itertools.permutations(range(5))
    )
    assert wasserstein2(x, y).item() == pytest.approx(best, rel=1e-12)


@quick
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 99), st.floats(0.1, 50))
def test_wasserstein2_is_a_distance_in_the_units_of_the_points(n, dim, seed, scale):
    x, y, z = (normal(n, dim, seed=seed + i) for i in range(3))
    distance = wasserstein2(x, y).item()
    order = torch.randperm(n, generator=rng(seed))
    assert wasserstein2(x[order], y).item() == pytest.approx(distance)
    assert wasserstein2(y, x).item() == pytest.approx(distance)
    assert wasserstein2(scale * x, scale * y).item() == pytest.approx(scale * distance)
    assert distance <= wasserstein2(x, z).item() + wasserstein2(z, y).item() + 1e-12
    assert wasserstein2(x, x[order]).item() == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein2(x, y, 16, rng()).item() <= distance + 1e-12


def test_wasserstein2_of_a_shift_is_its_length_even_far_from_the_origin():
    x = normal(300, 3, dtype=torch.float64) + 1e6
    shift = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert wasserstein2(x, x + shift).item() == pytest.approx(5, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (6, 4), (5, 7), (8, 8)])
def test_wasserstein2_1d_matches_repeated_points(n, m):
    x, y = normal(2, n), normal(2, m, seed=1)
    repeated = [
        wasserstein2(x[i].repeat_interleave(m)[:, None], y[i].repeat_interleave(n)[:, None])
        for i in range(2)
    ]
    torch.testing.assert_close(wasserstein2_1d(x, y), torch.stack(repeated))


def test_sliced_wasserstein2_of_a_shift():
    """False alarm below 1e-6; detects a mean square off by 7 %: a missing root, or factor d."""
    x, num = normal(50, 3), 4000
    shift = torch.tensor([0.0, 0.0, 6.0], dtype=torch.float64)
    square = sliced_wasserstein2(x, x + shift, num, rng()).item() ** 2
    # cos² of a random direction in three dimensions: mean 1/3, variance 4/45.
    assert abs(square - 36 / 3) <= 5 * 36 * math.sqrt(4 / 45 / num)


def test_sliced_wasserstein2_takes_any_sizes_and_only_its_generator():
    x, y = normal(10, 2), normal(13, 2, seed=1)
    before = torch.random.get_rng_state()
    first = sliced_wasserstein2(x, y, 32, rng(5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, sliced_wasserstein2(x, y, 32, rng(5)))
    assert not torch.equal(first, sliced_wasserstein2(x, y, 32, rng(6)))


# --- kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd2_matches_its_double_sum(unbiased):
    x, y, widths = normal(4, 2), normal(6, 2, seed=1) + 0.5, [0.5, 2.0]

    def mean_kernel(a, b, distinct):
        values = [
            sum(math.exp(-(p - q).square().sum().item() / (2 * h * h)) for h in widths) / 2
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (distinct and i == j)
        ]
        return sum(values) / len(values)

    expected = (
        mean_kernel(x, x, unbiased) + mean_kernel(y, y, unbiased) - 2 * mean_kernel(x, y, False)
    )
    assert mmd2(x, y, widths, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_mmd2_is_unbiased(shift):
    """False alarm below 1e-6; detects the V-statistic, which is 0.04 too large at n = 20."""
    repeats, n, h = 1200, 20, 1.0
    draws = normal(repeats, 2, n, 1)
    values = np.array([mmd2(x, y + shift, [h]).item() for x, y in draws])

    def expected_kernel(delta):
        return h / math.sqrt(h * h + 2) * math.exp(-(delta**2) / (2 * (h * h + 2)))

    exact = 2 * expected_kernel(0) - 2 * expected_kernel(shift)
    assert abs(values.mean() - exact) <= 5 * values.std() / math.sqrt(repeats) < 0.03


def test_mmd2_median_heuristic_makes_it_free_of_units():
    x, y = normal(40, 2), normal(50, 2, seed=1) + 1
    assert mmd2(7 * x, 7 * y).item() == pytest.approx(mmd2(x, y).item())
    assert mmd2(x, x.clone(), unbiased=False).item() == pytest.approx(0, abs=1e-12)


# --- total variation --------------------------------------------------------------------


def test_total_variation_of_batches():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(total_variation(p, q), torch.tensor([1.0, 0.0]).double())


def test_grid_total_variation_matches_numpy_and_counts_the_outside():
    samples = 2 * normal(500, 2)
    edges = [torch.linspace(-3, 3, 7), torch.linspace(-2, 4, 5)]
    masses = torch.rand(6, 4, generator=rng(), dtype=torch.float64)
    masses = 0.9 * masses / masses.sum()
    counts, _, _ = np.histogram2d(
        samples[:, 0].numpy(), samples[:, 1].numpy(), bins=[e.double().numpy() for e in edges]
    )
    outside = 1 - counts.sum() / 500
    expected = (np.abs(counts / 500 - masses.numpy()).sum() + abs(outside - 0.1)) / 2
    assert grid_total_variation(samples, masses, edges).item() == pytest.approx(expected)


def test_grid_total_variation_at_edges_and_beyond():
    edges, masses = [torch.tensor([0.0, 1.0, 2.0])], torch.tensor([0.5, 0.5])
    inside = torch.tensor([[0.0], [1.0], [2.0], [0.999]])  # the last edge belongs to its cell
    assert grid_total_variation(inside, masses, edges).item() == 0
    lost = torch.tensor([[math.nan], [math.inf], [-math.inf], [-1e-3]])
    assert grid_total_variation(lost, masses, edges).item() == 1


@pytest.mark.parametrize("masses", [[0.2, 0.3, 0.5], [0.2, 0.3], [1.0], [0.25, 0.75, 0.0]])
@pytest.mark.parametrize("n", [1, 4])
def test_total_variation_floor_is_the_exact_expectation(masses, n):
    p = [*masses, 1 - sum(masses)]
    expected = 0.0
    for draw in itertools.product(range(len(p)), repeat=n):
        counts = np.bincount(draw, minlength=len(p))
        expected += math.prod(p[i] for i in draw) * np.abs(counts / n - p).sum() / 2
    floor = total_variation_floor(torch.tensor(masses, dtype=torch.float64), n)
    assert floor.item() == pytest.approx(expected, abs=1e-12)


def test_total_variation_floor_tends_to_the_gaussian_formula():
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    for n, tolerance in ((10_000, 1e-3), (100_000_000, 1e-6)):
        gaussian = (2 * p * (1 - p) / (math.pi * n)).sqrt().sum().item() / 2
        assert total_variation_floor(p, n).item() == pytest.approx(gaussian, rel=tolerance)


def test_exact_draws_score_the_floor_on_average():
    """False alarm below 1e-6; detects a floor off by 3 %."""
    masses = torch.rand(5, 5, generator=rng(), dtype=torch.float64)
    masses = masses / masses.sum()
    edges = [torch.arange(6.0), torch.arange(6.0)]
    n, repeats = 50, 400
    cells = torch.multinomial(masses.flatten(), n * repeats, True, generator=rng(1))
    points = torch.stack((cells // 5, cells % 5), dim=-1) + 0.5
    values = np.array(
        [grid_total_variation(x, masses, edges).item() for x in points.view(repeats, n, 2)]
    )
    error = 5 * values.std() / math.sqrt(repeats)
    assert abs(values.mean() - total_variation_floor(masses, n).item()) <= error < 0.03


def test_mode_weights_are_mean_responsibilities():
    responsibilities = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(mode_weights(responsibilities), torch.tensor([0.5, 0.5]).double())
    off = mode_weight_total_variation(responsibilities, torch.tensor([0.9, 0.1]))
    assert off.item() == pytest.approx(0.4)


# --- distribution functions -------------------------------------------------------------


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_ks_matches_its_definition_with_and_without_ties(n, m, ties, seed):
    x, y = normal(n, 2, seed=seed), normal(m, 2, seed=seed + 1)
    if ties:
        x, y = (2 * x).round() / 2, (2 * y).round() / 2
    points = torch.cat((x, y))
    gaps = [(x <= u).double().mean(0) - (y <= u).double().mean(0) for u in points]
    torch.testing.assert_close(ks_per_coordinate(x, y), torch.stack(gaps).abs().amax(0))
    one = [stats.kstest(x[:, j].numpy(), stats.norm.cdf).statistic for j in range(2)]
    torch.testing.assert_close(
        ks_per_coordinate(x, [stats.norm.cdf] * 2), torch.tensor(one, dtype=torch.float64)
    )


def test_exact_samples_stay_within_the_band():
    """False alarm 1e-6; detects a shift of 0.15 standard deviations."""
    n = 4000
    x, y = normal(n, 3), normal(2 * n, 3, seed=1)
    assert (ks_per_coordinate(x, [stats.norm.cdf] * 3) <= dkw_band(n, num_tests=3)).all()
    assert (ks_per_coordinate(x, y) <= dkw_band(n, 2 * n, num_tests=3)).all()
    assert (ks_per_coordinate(x + 0.15, [stats.norm.cdf] * 3) > dkw_band(n, num_tests=3)).all()


# --- densities --------------------------------------------------------------------------


def gaussian_log_prob(x, mean):
    return -0.5 * (x - mean).square() - 0.5 * math.log(2 * math.pi)


def test_densities_of_shifted_gaussians():
    """p = N(0, 1), q = N(m, 1): KL = m²/2 both ways, forward ESS = exp(-m²). Five errors each."""
    n, m, log_z = 20_000, 0.5, 3.0
    x, from_q = normal(n), normal(n, seed=1) + m
    log_p, log_q = gaussian_log_prob(x, 0), gaussian_log_prob(x, m)
    kl = kl_paired(log_p, log_q)
    assert abs(kl.value - m * m / 2) <= 5 * kl.standard_error < 0.03
    assert kl.standard_error == pytest.approx(m / math.sqrt(n), rel=0.05)
    entropy = nll(log_p)
    assert abs(entropy.value - 0.5 * math.log(2 * math.pi * math.e)) <= 5 * entropy.standard_error
    upper = eubo(log_z + log_p - log_q)
    assert abs(upper.value - log_z - m * m / 2) <= 5 * upper.standard_error
    lower = elbo(log_z + gaussian_log_prob(from_q, 0) - gaussian_log_prob(from_q, m))
    assert abs(lower.value - log_z + m * m / 2) <= 5 * lower.standard_error
    weight = (log_p - log_q).exp()
    share = forward_effective_sample_size(log_z + log_p - log_q, log_z)
    assert abs(1 / share.item() - math.exp(m * m)) <= 5 * weight.std().item() / math.sqrt(n)
    harmonic = forward_effective_sample_size(log_p - log_q)
    torch.testing.assert_close(harmonic, forward_effective_sample_size(log_p - log_q + 700))
    assert harmonic.item() == pytest.approx(share.item(), rel=0.05)


def test_a_missed_mode_is_infinite_not_dropped():
    log_q = torch.tensor([0.0, -math.inf])
    assert kl_paired(torch.zeros(2), log_q) == (math.inf, math.inf)
    assert nll(log_q).value == math.inf
    assert eubo(-log_q).value == math.inf
    assert elbo(log_q).value == -math.inf
    assert forward_effective_sample_size(-log_q).item() == 0


def test_values_are_float64_whatever_comes_in():
    x, y = normal(20, 2, dtype=torch.float32), normal(20, 2, seed=1, dtype=torch.float32)
    for value in (wasserstein2(x, y), mmd2(x, y), sliced_wasserstein2(x, y, 8, rng())):
        assert value.dtype == torch.float64 and value.shape == ()
    assert ks_per_coordinate(x, y).dtype == torch.float64


half = torch.tensor([0.5, 0.5])
unit_edges = [torch.tensor([0.0, 1.0, 2.0])]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wasserstein2(torch.zeros(2, 2), torch.zeros(3, 2)), "same number of points"),
        (
            lambda: wasserstein2(torch.zeros(2, 2), torch.zeros(2, 3)),
            r"y must have shape \(m, 2\), got \(2, 3\)",
        ),
        (lambda: wasserstein2(torch.zeros(0, 2), torch.zeros(0, 2)), "must not be empty"),
        (lambda: wasserstein2(torch.full((2, 2), math.nan), torch.zeros(2, 2)), "x must be finit"),
        (lambda: sliced_wasserstein2(torch.ones(1, 1), torch.ones(1, 1), 0), "num_projections"),
        (lambda: mmd2(torch.zeros(1, 1), torch.ones(4, 1)), "at least 2 points each"),
        (lambda: mmd2(torch.zeros(4, 1), torch.zeros(4, 1)), "bandwidths must be given"),
        (lambda: mmd2(torch.zeros(4, 1), torch.ones(4, 1), [-1.0]), "bandwidths must be pos"),
        (lambda: total_variation(half, torch.ones(2)), "q must sum to 1"),
        (lambda: total_variation(half, torch.tensor([1.5, -0.5])), "q must be non-negative"),
        (
            lambda: total_variation(half, torch.ones(3) / 3),
            r"q must have shape \(2,\), got \(3,\)",
        ),
        (lambda: grid_total_variation(torch.zeros(0, 1), half, unit_edges), "at least 1 point"),
        (lambda: grid_total_variation(torch.zeros(1, 2), half, unit_edges), "per coordinate"),
        (lambda: grid_total_variation(torch.zeros(1, 1), half[:1], unit_edges), "between edges"),
        (
            lambda: grid_total_variation(torch.zeros(1, 1), half, [torch.tensor([0.0, 0.0, 1.0])]),
            "edges must increase",
        ),
        (lambda: total_variation_floor(half, 0), "n must be at least 1, got 0"),
        (lambda: total_variation_floor(2 * half, 5), "at most 1, got 2"),
        (lambda: mode_weights(torch.zeros(0, 2)), "at least 1 sample"),
        (lambda: mode_weights(torch.ones(3, 2)), "responsibilities must sum to 1"),
        (
            lambda: ks_per_coordinate(torch.zeros(3, 2), torch.zeros(3, 1)),
            r"reference .* \(m, 2\), got \(3, 1\)",
        ),
        (lambda: ks_per_coordinate(torch.zeros(3, 2), [stats.norm.cdf]), "one cdf per coord"),
        (lambda: dkw_band(0), "n must be at least 1"),
        (lambda: dkw_band(10, false_alarm=0.0), "false_alarm must be between"),
        (
            lambda: kl_paired(torch.zeros(2), torch.zeros(3)),
            r"log_q must have shape \(2,\), got \(3,\)",
        ),
        (lambda: kl_paired(torch.tensor([0.0, -math.inf]), torch.zeros(2)), "log_p must be fin"),
        (lambda: nll(torch.tensor([math.nan, 0.0])), "log_q must have no NaN"),
        (lambda: elbo(torch.zeros(1)), "at least 2 values"),
        (lambda: forward_effective_sample_size(torch.zeros(0)), "must not be empty"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
