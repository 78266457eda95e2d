import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from torch.distributions import Normal

from rsm_sampler.box_kernel import AnchoredKernel, TruncatedReverseKernel, _tail_depth
from rsm_sampler.estimators import posterior_estimate
from rsm_sampler.kernels import BankKernel, GaussianReferenceKernel, ReverseKernel
from rsm_sampler.montecarlo.weights import stratified_indices
from rsm_sampler.schedules import Cosine, Linear, VariancePreserving
from rsm_sampler.transitions import (
    forward_kernel,
    forward_log_prob,
    posterior,
    sigma_column,
    variance_exploding,
    variance_preserving,
)
from tests.exact import NoReadBack

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def ks_band(n, false_alarm=1e-6):
    """Dvoretzky-Kiefer-Wolfowitz: the empirical law of n draws is this near with that risk."""
    return math.sqrt(math.log(2 / false_alarm) / (2 * n))


# --- coordinates and the forward process ---


@pytest.mark.parametrize("schedule", [Cosine(20), Linear(20), VariancePreserving(20)])
def test_coordinates_are_those_of_the_paper(schedule):
    """(6): x_0 + sigma noise, times sqrt(alpha_bar), is sqrt(ab) x_0 + sqrt(1 - ab) noise."""
    t = torch.arange(1, 21)
    x_0 = normal(20, 3)
    x_t = forward_kernel(x_0, schedule.sigma(t), generator=rng(1))
    noise = normal(20, 3, seed=1)
    alpha_bar = schedule.alpha_bar(t)[:, None]
    paper = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(variance_preserving(x_t, schedule.sigma(t)), paper)
    torch.testing.assert_close(variance_exploding(paper, schedule.sigma(t)), x_t)


@given(sigma=st.floats(0, 1e15), dtype=st.sampled_from([torch.float32, DOUBLE]))
def test_coordinate_changes_are_inverse_of_each_other(sigma, dtype):
    x = normal(5, 3, dtype=dtype)
    torch.testing.assert_close(variance_exploding(variance_preserving(x, sigma), sigma), x)


def test_forward_kernel_has_its_gaussian_law():
    """Detects a mean off by 0.05 or a scale off by 7 %; false alarm below 1e-6."""
    n, x_0, sigma = 20_000, 1.7, 0.8
    x_t = forward_kernel(torch.full((n, 1), x_0, dtype=DOUBLE), sigma, generator=rng())
    law = stats.norm(x_0, sigma)
    assert stats.kstest(x_t[:, 0].numpy(), law.cdf).statistic <= ks_band(n)


def test_forward_kernel_without_noise_is_the_identity():
    x_0 = normal(4, 2)
    assert torch.equal(forward_kernel(x_0, 0.0), x_0)


def test_forward_log_prob_is_the_normal_density():
    x_t, x_0, sigma = normal(6, 3), normal(6, 3, seed=1), normal(6, seed=2).exp()
    expected = Normal(x_0, sigma[:, None]).log_prob(x_t).sum(-1)
    torch.testing.assert_close(forward_log_prob(x_t, x_0, sigma), expected)
    torch.testing.assert_close(forward_log_prob(x_0, x_t, sigma), expected)


@pytest.mark.parametrize("t", [1, 5, 10, 15, 20])
def test_forward_over_reverse_density_is_a_power_of_alpha_bar(t):
    """Golden item 2: q(x_t|x_0) / phi(x_0|x_t) = alpha_bar^(-d/2) in the paper's coordinates."""
    schedule, dim = Cosine(20), 3
    alpha_bar, sigma = schedule.alpha_bar(t), schedule.sigma(t)
    x_0, paper = normal(50, dim), normal(50, dim, seed=1)
    forward = Normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt()).log_prob(paper).sum(-1)
    x_t = variance_exploding(paper, sigma)
    reverse = forward_log_prob(x_t, x_0, sigma)
    mean, variance = paper / alpha_bar.sqrt(), (1 - alpha_bar) / alpha_bar
    torch.testing.assert_close(reverse, Normal(mean, variance.sqrt()).log_prob(x_0).sum(-1))
    ratio = (-dim / 2 * alpha_bar.log()).expand(50)
    torch.testing.assert_close(forward - reverse, ratio, rtol=1e-9, atol=1e-9 / alpha_bar.item())


@pytest.mark.parametrize(
    "schedule", [Cosine(20), Linear(20, scale=0.8), Linear(20, scale=0.3), VariancePreserving(20)]
)
def test_posterior_is_the_reverse_step_of_the_paper(schedule):
    """(8): both forms of the mean, and the variance, whose root multiplies the noise."""
    t = torch.arange(1, 21)
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(t - 1)
    now, before = schedule.alpha_bar(t)[:, None], schedule.alpha_bar(t - 1)[:, None]
    beta = schedule.betas[:, None]
    x_0, paper = normal(20, 3), normal(20, 3, seed=1)
    mean, std = posterior(variance_exploding(paper, sigma_t), x_0, sigma_t, sigma_s)

    c_1 = beta * before.sqrt() / (1 - now)
    c_2 = (1 - before) * (1 - beta).sqrt() / (1 - now)
    expected = c_1 * x_0 + c_2 * paper
    torch.testing.assert_close(variance_preserving(mean, sigma_s), expected, rtol=1e-9, atol=1e-9)
    score = -(paper - now.sqrt() * x_0) / (1 - now)
    by_score = (paper + beta * score) / (1 - beta).sqrt()
    # (x_t + beta score) cancels: its rounding error is 1e-16 / sqrt(alpha_t) / (1 - alpha_bar_t)
    torch.testing.assert_close(expected, by_score, rtol=1e-9, atol=1e-9)
    variance = (1 - before) / (1 - now) * beta
    torch.testing.assert_close(
        variance_preserving(std, sigma_s).square(), variance, rtol=1e-8, atol=0
    )


def test_the_last_step_gives_the_clean_point():
    x_t, x_0 = normal(4, 2), normal(4, 2, seed=1)
    mean, std = posterior(x_t, x_0, 0.7, 0.0)
    assert torch.equal(mean, x_0)
    assert (std == 0).all()


def test_posterior_composes_to_the_forward_process():
    """If x_t has variance sigma_t^2 around x_0, the drawn x_s has sigma_s^2."""
    sigma_t, sigma_s = normal(9).exp() + 1, normal(9).exp()
    zero = torch.zeros(9, 1, dtype=DOUBLE)
    ratio, std = posterior(zero + 1, zero, sigma_t, sigma_s)
    variance = (ratio * sigma_t[:, None]).square() + std.square()
    torch.testing.assert_close(variance, sigma_s[:, None].square())


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    dim=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
    data=st.data(),
)
def test_sigma_broadcasts_to_the_batch_alone(shape, dim, dtype, data):
    x = normal(*shape, dim, dtype=dtype)
    keep = data.draw(st.integers(0, len(shape)))
    sizes = [size if data.draw(st.booleans()) else 1 for size in shape[len(shape) - keep :]]
    sigma = normal(*sizes).exp()
    column = sigma_column(sigma, x)
    assert column.dtype == dtype
    assert torch.broadcast_shapes(column.shape, x.shape) == x.shape
    expected = forward_log_prob(x, torch.zeros_like(x), sigma.expand(shape))
    got = forward_log_prob(x, torch.zeros_like(x), sigma)
    assert torch.equal(got, expected)
    flat = zip(x.reshape(-1, dim), sigma.expand(shape).reshape(-1), strict=True)
    loop = [forward_log_prob(row, torch.zeros_like(row), s.item()) for row, s in flat]
    torch.testing.assert_close(got.reshape(-1), torch.stack(loop))


# --- kernels: what all of them promise ---


def kernels():
    points = normal(64, 3, seed=3)
    return [
        ReverseKernel(),
        ReverseKernel(antithetic=True),
        GaussianReferenceKernel(0.3, 2.0),
        GaussianReferenceKernel(torch.tensor([0.0, 1.0, -4.0]), 2.0, antithetic=True),
        TruncatedReverseKernel(-1.0, 1.0),
        TruncatedReverseKernel(torch.tensor([-1.0, -math.inf, 0.0]), math.inf),
        AnchoredKernel(torch.tensor([0.5, -0.2, 0.9]), -1.0, 1.0),
        BankKernel(points, normal(64, seed=4)),
    ]


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
def test_draws_have_their_shapes_and_the_seed_decides(kernel, dtype, shape):
    x_t = normal(*shape, dtype=dtype).requires_grad_()
    with NoReadBack():
        draws = kernel.draw(x_t, 0.7, 8, generator=rng())
    assert draws.x_0.shape == (*shape[:-1], 8, 3)
    assert draws.log_correction.shape == (*shape[:-1], 8)
    assert draws.log_constant.shape == shape[:-1]
    for value in (draws.x_0, draws.log_correction, draws.log_constant):
        assert value.dtype == dtype
        assert value.isfinite().all()
        assert not value.requires_grad
    again = kernel.draw(x_t, torch.full(shape[:-1], 0.7), 8, generator=rng())
    torch.testing.assert_close(again.x_0, draws.x_0)


@pytest.mark.bad_input
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: type(kernel).__name__)
def test_bad_draws_are_named(kernel):
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        kernel.draw(torch.zeros(2, 3), 1.0, 0)
    with pytest.raises(
        ValueError, match=r"sigma must broadcast to the batch shape \(2,\), got \(3"
    ):
        kernel.draw(torch.zeros(2, 3), torch.ones(3), 2)
    with pytest.raises(ValueError, match=r"sigma must be at least 0, got -1\.0"):
        kernel.draw(torch.zeros(2, 3), -1.0, 2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianReferenceKernel(0.0, 0.0), "scale must be positive and finite, got 0.0"),
        (lambda: TruncatedReverseKernel(1.0, 1.0), "low must be less than high, got 1.0 and 1.0"),
        (lambda: AnchoredKernel(torch.zeros(3), -1.0, 1.0, scales=()), "scales must be positive"),
        (
            lambda: AnchoredKernel(torch.zeros(3), -1.0, 1.0, share=1.0),
            r"share must be in \[0, 1\), got 1.0",
        ),
        (lambda: TruncatedReverseKernel(math.nan, 1.0), "low must be less than high, got nan"),
        (
            lambda: BankKernel(torch.zeros(3)),
            r"points must have shape \(points, dim\), got \(3,\)",
        ),
        (lambda: BankKernel(torch.zeros(0, 2)), r"points must have shape .*, got \(0, 2\)"),
        (lambda: BankKernel(torch.zeros(3, 2), torch.zeros(2)), r"shape \(3,\), got \(2,\)"),
        (lambda: BankKernel(torch.zeros(1, 2), torch.tensor([math.nan])), "got a total of nan"),
        (lambda: BankKernel(torch.zeros(1, 2), torch.tensor([-math.inf])), "got a total of -inf"),
        (
            lambda: BankKernel(torch.zeros(3, 2)).draw(torch.zeros(2), 1.0, 4),
            "num_draws must be at most the bank's 3 points, got 4",
        ),
        (
            lambda: ReverseKernel(antithetic=True).draw(torch.zeros(2), 1.0, 3),
            "num_draws must be even for antithetic draws, got 3",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the reverse kernel (15) ---


@pytest.mark.parametrize("t", [1, 10, 20])
def test_reverse_kernel_is_equation_15(t):
    """Candidate = (x_t - sqrt(1 - ab) noise) / sqrt(ab), and the noise leads back to x_t."""
    schedule = Cosine(20)
    alpha_bar, sigma = schedule.alpha_bar(t), schedule.sigma(t).item()
    paper = normal(7, 3, seed=5)
    x_t = variance_exploding(paper, sigma)
    draws = ReverseKernel().draw(x_t, sigma, 11, generator=rng())
    noise = normal(7, 11, 3)
    expected = (paper[:, None] - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    torch.testing.assert_close(draws.x_0, expected, rtol=1e-9, atol=1e-9 * sigma)
    torch.testing.assert_close((x_t[:, None] - draws.x_0) / sigma, noise)
    assert (draws.log_correction == 0).all()
    assert (draws.log_constant == 0).all()


def test_antithetic_draws_mirror_each_other():
    x_t = normal(5, 3)
    for kernel, centre in [
        (ReverseKernel(antithetic=True), x_t),
        (GaussianReferenceKernel(0.0, 3.0, antithetic=True), 9 / 13 * x_t),
    ]:
        x_0 = kernel.draw(x_t, 2.0, 10, generator=rng()).x_0
        torch.testing.assert_close(x_0[:, :5] + x_0[:, 5:], 2 * centre[:, None].expand(5, 5, 3))


# --- the Gaussian reference ---


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 3.0, 1e3, 1e6])
def test_gaussian_reference_knows_its_density(sigma):
    """log phi - log r from the densities, including the constant; and r's law by KS.

    The KS part detects a mean off by 0.05 or a scale off by 7 %; false alarm below 1e-6 each.
    """
    loc, scale, n = torch.tensor([1.0, -2.0], dtype=DOUBLE), 3.0, 20_000
    x_t = loc + math.hypot(sigma, scale) * normal(2)
    draws = GaussianReferenceKernel(loc, scale).draw(x_t, sigma, n, generator=rng())
    variance = 1 / (1 / sigma**2 + 1 / scale**2)
    mean = variance * (x_t / sigma**2 + loc / scale**2)
    r = Normal(mean, math.sqrt(variance))
    phi = forward_log_prob(draws.x_0, x_t.expand(n, 2), sigma)
    correction = draws.log_correction + draws.log_constant
    expected = phi - r.log_prob(draws.x_0).sum(-1)
    torch.testing.assert_close(correction, expected, rtol=1e-6, atol=1e-6)
    standard = ((draws.x_0 - mean) / math.sqrt(variance)).numpy()
    for column in standard.T:
        assert stats.kstest(column, stats.norm.cdf).statistic <= ks_band(n)


def test_a_wide_reference_is_the_reverse_kernel():
    x_t = normal(5, 3)
    wide = GaussianReferenceKernel(0.0, 1e9).draw(x_t, 0.8, 6, generator=rng())
    plain = ReverseKernel().draw(x_t, 0.8, 6, generator=rng())
    torch.testing.assert_close(wide.x_0, plain.x_0)
    assert wide.log_correction.abs().max() < 1e-15


# --- the box ---


NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(200)


def tail_mass(distance, depth):
    """Integral of exp(-distance y - y^2 / 2) from 0 to depth, by Gauss-Legendre quadrature."""
    depth = min(depth, 40 / max(distance, 1) + (0 if distance > 4 else 10))  # nothing beyond
    y = depth * (NODES + 1) / 2
    return (NODE_WEIGHTS * np.exp(-distance * y - y * y / 2)).sum() * depth / 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (DOUBLE, 1e-10)])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.1, 1.0, 3.0, 10.0, 100.0, 500.0, 1e4])
def test_depth_behind_the_edge_inverts_the_distribution_function(distance, dtype, tolerance):
    """Against quadrature, from boxes far narrower than sigma to half-lines, however far away."""
    v = torch.tensor([0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6], dtype=dtype)
    for width in (1e-6, 1e-4, 1e-3, 5e-3, 0.011, 0.03, 0.1, 1.0, 5.0, 50.0, math.inf):
        arguments = torch.tensor(distance, dtype=dtype), torch.tensor(width, dtype=dtype)
        depth, log_mass = _tail_depth(v, *arguments)
        mass = tail_mass(distance, width)
        share = [tail_mass(distance, value) / mass for value in depth.tolist()]
        np.testing.assert_allclose(share, v.numpy(), rtol=0, atol=tolerance)
        expected = math.log(mass) - distance**2 / 2 - math.log(2 * math.pi) / 2
        assert log_mass.item() == pytest.approx(expected, rel=tolerance, abs=3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.5, math.inf), (-math.inf, -2.0), (-math.inf, math.inf)]
)
@pytest.mark.parametrize("sigma", [0.3, 2.0, 1e5])
def test_truncated_draws_have_their_law(dtype, low, high, sigma):
    """Each x_t by itself, by KS: detects a shift by 0.05 widths; false alarm below 1e-6 each."""
    n = 20_000
    centres = torch.tensor([-5.0, -1.0, -0.4, 0.0, 0.9, 1.0, 2.5], dtype=dtype)
    draws = TruncatedReverseKernel(low, high).draw(centres[:, None], sigma, n, generator=rng())
    for centre, x_0, log_mass in zip(centres.tolist(), draws.x_0, draws.log_constant, strict=True):
        a, b = (low - centre) / sigma, (high - centre) / sigma
        law = stats.truncnorm(a, b, centre, sigma)
        x_0 = x_0[:, 0].double().numpy()
        if sigma == 1e5 and (low, high) == (-1.0, 1.0):
            law = stats.uniform(low, high - low)  # to 1e-5
        assert stats.kstest(x_0, law.cdf).statistic <= ks_band(n)
        share = special.log_ndtr(b) + np.log(-np.expm1(special.log_ndtr(a) - special.log_ndtr(b)))
        if sigma < 1e5:
            assert log_mass.item() == pytest.approx(share, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("away", [30.0, 300.0, 3000.0])
def test_far_outside_the_law_is_exponential(dtype, side, away):
    """away sigma outside, depth * away / sigma is exponential up to 1 / away^2; KS as above."""
    n, sigma = 20_000, 0.01
    x_t = torch.full((1,), side * (1 + away * sigma), dtype=dtype)
    x_0 = TruncatedReverseKernel(-1.0, 1.0).draw(x_t, sigma, n, generator=rng()).x_0
    away = (abs(x_t.item()) - 1) / sigma  # as rounded
    depth = (1 - side * x_0[:, 0].double().numpy()) * away / sigma
    resolution = torch.finfo(dtype).eps * away / sigma  # of x_0 beside 1, in units of the depth
    allowed = ks_band(n) + 1 / away**2 + resolution
    assert stats.kstest(depth, stats.expon.cdf).statistic <= allowed


@given(
    centre=st.floats(-1e6, 1e6),
    log_sigma=st.floats(-4, 8),
    low=st.one_of(st.just(-math.inf), st.floats(-1e3, 1e3)),
    width=st.one_of(st.just(math.inf), st.floats(1e-2, 1e3)),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_truncated_draws_stay_inside(centre, log_sigma, low, width, dtype):
    high = low + width if math.isfinite(low) else width
    low, high = torch.tensor([low], dtype=dtype), torch.tensor([high], dtype=dtype)
    x_t = torch.tensor([[centre], [0.0], [max(-1e9, low.item())]], dtype=dtype)
    draws = TruncatedReverseKernel(low, high).draw(x_t, 10**log_sigma, 200, generator=rng())
    assert draws.x_0.isfinite().all()
    assert (draws.x_0 >= low).all()
    assert (draws.x_0 <= high).all()
    assert not draws.log_constant.isnan().any()
    assert (draws.log_constant <= 1e-6).all()
    if low.isfinite() and 10**log_sigma > 1e3 * width and abs(centre) < 10**log_sigma:
        # Nearly uniform: 200 draws have a mean within 7 standard errors, 1e-11, and not one value.
        middle = (draws.x_0.double().mean(-2) - low.double()) / width
        assert ((middle - 0.5).abs() < 7 / math.sqrt(12 * 200) + 1e-3).all()


def test_mirrored_boxes_give_mirrored_laws():
    """Exactly: the same uniform draws are read from the edge that faces the noisy point."""
    x_t = torch.tensor([[-7.0, -0.3, 0.2, 4.0]], dtype=DOUBLE)
    right = TruncatedReverseKernel(-0.5, 2.0).draw(x_t, 0.7, 50, generator=rng())
    left = TruncatedReverseKernel(-2.0, 0.5).draw(-x_t, 0.7, 50, generator=rng())
    torch.testing.assert_close(left.x_0, -right.x_0)
    torch.testing.assert_close(left.log_constant, right.log_constant)


@pytest.mark.parametrize("anchor", [0.6, -1.0])
@pytest.mark.parametrize("sigma", [0.3, 2.0, 400.0])
def test_anchored_weights_are_those_of_the_kernel(anchor, sigma):
    """Weighted means of x, x^2 and 1 over the cut normal law, whatever the anchor.

    Weights are at most 2, values at most 1: six standard errors of 40,000 draws are 0.06, of
    which the measured spread is used; false alarm below 1e-8 each. Without the weights the mean
    is off by half its distance to the anchor.
    """
    n = 40_000
    x_t = torch.tensor([[0.2], [1.0 + 2 * sigma]], dtype=DOUBLE)
    kernel = AnchoredKernel(torch.tensor([anchor], dtype=DOUBLE), -1.0, 1.0, scales=(0.05, 0.4))
    draws = kernel.draw(x_t, sigma, n, generator=rng())
    weight = draws.log_correction.exp()
    assert weight.max() <= 2 + 1e-9
    for row, centre in enumerate(x_t[:, 0].tolist()):
        law = stats.truncnorm((-1 - centre) / sigma, (1 - centre) / sigma, centre, sigma)
        for power, exact in ((0, 1.0), (1, law.mean()), (2, law.moment(2))):
            part = weight[row] * draws.x_0[row, :, 0] ** power
            assert part.mean().item() == pytest.approx(
                exact, abs=6 * part.std().item() / math.sqrt(n)
            )
    plain = TruncatedReverseKernel(-1.0, 1.0).draw(x_t, sigma, 10, generator=rng())
    torch.testing.assert_close(draws.log_constant, plain.log_constant)


def test_an_anchor_in_the_well_finds_it():
    """A well of width 0.05 in six dimensions, where 64 candidates of the kernel see nothing."""
    well = torch.tensor([0.5, -0.3, 0.1, 0.7, -0.6, 0.0], dtype=DOUBLE)

    def energy(x):
        return ((x - well) / 0.05).square().sum(-1) / 2

    x_t = well + 2.0 * normal(200, 6)
    near = well + 0.05 * normal(200, 6, seed=1)
    found = {}
    for kernel in (TruncatedReverseKernel(-1.0, 1.0), AnchoredKernel(near, -1.0, 1.0)):
        estimate = posterior_estimate(energy, x_t, 2.0, kernel, 64, generator=rng())
        found[type(kernel)] = (estimate.mean - well).square().mean().sqrt().item()
    assert found[AnchoredKernel] < 0.06 < 0.3 < found[TruncatedReverseKernel]


def test_no_share_is_the_kernel_itself():
    x_t = normal(5, 3)
    plain = TruncatedReverseKernel(-1.0, 1.0).draw(x_t, 0.7, 8, generator=rng())
    without = AnchoredKernel(torch.zeros(3), -1.0, 1.0, share=0.3).draw(
        x_t, 0.7, 8, generator=rng()
    )  # less than one for each scale
    assert torch.equal(plain.x_0, without.x_0)


# --- the bank ---


def test_a_whole_bank_is_shared_and_weighs_by_the_forward_density():
    points, log_weight = normal(50, 3), normal(50, seed=1)
    x_t, sigma = normal(4, 2, 3, seed=2), normal(4, 1, seed=3).exp()
    draws = BankKernel(points, log_weight).draw(x_t, sigma, 50)
    assert torch.equal(draws.x_0, points.expand(4, 2, 50, 3))
    assert draws.x_0.data_ptr() == points.data_ptr()
    assert draws.x_0.stride()[:2] == (0, 0)
    forward = forward_log_prob(x_t.unsqueeze(-2).expand_as(draws.x_0), draws.x_0, sigma[..., None])
    total = draws.log_correction + draws.log_constant.unsqueeze(-1)
    torch.testing.assert_close(total, log_weight + forward)


def test_a_bank_far_from_the_origin_keeps_its_precision():
    points = 1000 + normal(50, 2, dtype=torch.float32)
    x_t = points[:5] + 0.01
    draws = BankKernel(points).draw(x_t, 0.01, 50)
    exact = BankKernel(points.double()).draw(x_t.double(), 0.01, 50)
    near = exact.log_correction > -50
    torch.testing.assert_close(
        draws.log_correction[near].double(), exact.log_correction[near], rtol=1e-4, atol=1e-4
    )


def test_a_resampled_bank_draws_by_weight():
    """Shares of 4 points over 40,000 draws; stratified, so each is within one draw of its own."""
    points = torch.arange(4, dtype=DOUBLE)[:, None]
    weight = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=DOUBLE)
    bank = BankKernel(points.repeat(20_000, 1), weight.log().repeat(20_000))
    draws = bank.draw(torch.zeros(3, 1, dtype=DOUBLE), 1.0, 40_000, generator=rng())
    assert draws.x_0.stride()[0] == 0
    shares = draws.x_0[0, :, 0].long().bincount(minlength=4) / 40_000
    # At most independent draws' variance: 6 standard errors, false alarm below 1e-8.
    assert ((shares - weight).abs() <= 6 * (weight * (1 - weight) / 40_000).sqrt()).all()
    # The weights are used up: all that is left is the forward density and the mean weight 1/4.
    forward = -draws.x_0[..., 0].square() / 2
    torch.testing.assert_close(draws.log_correction, forward + math.log(0.25))


@given(
    log_weight=st.lists(st.floats(-30, 30), min_size=1, max_size=30),
    num_draws=st.integers(1, 50),
)
def test_stratified_counts_are_near_their_expectation(log_weight, num_draws):
    """An interval of length p meets whole strata once each: its count is within 2 of n p."""
    weight = torch.tensor(log_weight, dtype=DOUBLE).softmax(0)
    cumulative = weight.cumsum(0)
    index = stratified_indices(cumulative / cumulative[-1], num_draws, rng())
    assert (index.diff() >= 0).all()
    counts = index.bincount(minlength=len(weight))
    assert ((counts - num_draws * weight).abs() < 2 + 1e-9).all()
