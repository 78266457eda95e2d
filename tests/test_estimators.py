import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rsm_sampler.box_kernel import TruncatedReverseKernel
from rsm_sampler.estimators import (
    effective_sample_size,
    normalise,
    posterior_estimate,
    posterior_mean,
    score_estimate,
)
from rsm_sampler.kernels import BankKernel, GaussianReferenceKernel, Kernel, ReverseKernel
from rsm_sampler.transitions import variance_preserving
from tests.exact import IsotropicMixture, NoReadBack, two_modes

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def quadratic(x_0):
    return x_0.square().sum(-1) / 2


log_weights = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
    elements=st.one_of(st.floats(-700, 700), st.just(-np.inf)),
)


# --- weights ---


@given(log_weights)
def test_weights_and_their_sample_size(values):
    log_weight = torch.from_numpy(values)
    weight = normalise(log_weight)
    alive = (log_weight > -math.inf).any(-1)
    torch.testing.assert_close(weight.sum(-1), alive.double())
    assert (weight[log_weight == -math.inf] == 0).all()
    if not alive.all():
        return
    ess = effective_sample_size(log_weight)
    torch.testing.assert_close(ess, 1 / weight.square().sum(-1))
    assert ((ess > 1 - 1e-12) & (ess < log_weight.shape[-1] + 1e-12)).all()
    shift = normal(*log_weight.shape[:-1], 1) * 100
    torch.testing.assert_close(effective_sample_size(log_weight + shift), ess)
    torch.testing.assert_close(normalise(log_weight + shift), weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(effective_sample_size(log_weight.flip(-1)), ess)


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_equal_weights_are_worth_themselves(n):
    assert effective_sample_size(torch.full((3, n), 1e4)).tolist() == pytest.approx([n] * 3)
    one = torch.full((n,), -math.inf)
    one[n // 2] = -5e3
    assert effective_sample_size(one) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("log_weight", "message"),
    [
        (torch.tensor(0.0), r"log_weight must have shape \(..., n\), got \(\)"),
        (torch.zeros(3, 0), r"a weight in every row, got shape \(3, 0\)"),
        (torch.tensor([[0.0, math.nan], [0.0, 0.0]]), "no NaN or .inf, got 1 rows of 2 with one"),
        (torch.tensor([0.0, math.inf]), "no NaN or .inf, got 1 rows of 1 with one"),
        (
            torch.tensor([[0.0], [-math.inf], [-math.inf]]),
            "above zero .*, got 2 rows of 3 without",
        ),
    ],
)
def test_rows_without_a_sample_size_are_named(log_weight, message):
    with pytest.raises(ValueError, match=message):
        effective_sample_size(log_weight)


def test_bad_weights_stay_visible_without_a_check():
    bad = torch.tensor([[0.0, math.nan], [0.0, math.inf]])
    assert normalise(bad).isnan().any(-1).all()
    assert posterior_mean(torch.zeros(2, 2, 1), bad).mean.isnan().all()


# --- posterior mean ---


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    draws=st.integers(1, 6),
    dim=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_posterior_mean_row_by_row_and_in_any_order(batch, draws, dim, dtype):
    x_0, log_weight = normal(*batch, draws, dim, dtype=dtype), 3 * normal(*batch, draws, seed=1)
    log_weight = log_weight.to(dtype)
    estimate = posterior_mean(x_0, log_weight)
    assert estimate.mean.dtype == estimate.ess.dtype == estimate.log_mean_weight.dtype == dtype
    flat = zip(x_0.reshape(-1, draws, dim), log_weight.reshape(-1, draws), strict=True)
    rows = [((w.exp()[:, None] * x).sum(0) / w.exp().sum(), w.exp().mean().log()) for x, w in flat]
    torch.testing.assert_close(estimate.mean.reshape(-1, dim), torch.stack([m for m, _ in rows]))
    torch.testing.assert_close(
        estimate.log_mean_weight.reshape(-1),
        torch.stack([z for _, z in rows]),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(estimate.ess, effective_sample_size(log_weight))
    order = torch.randperm(draws, generator=rng())
    again = posterior_mean(x_0[..., order, :], log_weight[..., order])
    torch.testing.assert_close(again.mean, estimate.mean)
    torch.testing.assert_close(again.ess, estimate.ess)


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_candidates_shared_by_the_batch_give_the_same_mean(batch):
    shared = normal(7, 3).expand(*batch, 7, 3)
    log_weight = normal(*batch, 7, seed=1)
    expected = posterior_mean(shared.clone(memory_format=torch.contiguous_format), log_weight)
    torch.testing.assert_close(posterior_mean(shared, log_weight).mean, expected.mean)


def test_rows_of_zero_weights_alone():
    log_weight = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
    estimate = posterior_mean(torch.ones(2, 2, 3), log_weight, torch.tensor([5.0, 5.0]))
    assert estimate.mean.tolist() == [[0.0] * 3, [1.0] * 3]
    assert estimate.ess.tolist() == [0.0, 1.0]
    assert estimate.log_mean_weight.tolist() == [-math.inf, pytest.approx(5 - math.log(2))]


@pytest.mark.bad_input
def test_posterior_mean_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"log_weight must have shape \(2, 3\), got \(2, 4\)"):
        posterior_mean(torch.zeros(2, 3, 1), torch.zeros(2, 4))


# --- estimates against the exact denoiser, score and density ---


def cases():
    mixture = two_modes()
    bank = mixture.sample(40_000, generator=rng(9))
    broad = 3 * normal(40_000, 2, seed=10)
    log_broad = -broad.square().sum(-1) / 18 - math.log(18 * math.pi)
    return [
        ("plain, low noise", ReverseKernel(), 0.4, 40_000),
        ("plain", ReverseKernel(), 1.0, 40_000),
        ("reference", GaussianReferenceKernel(0.0, 3.0), 2.0, 40_000),
        ("reference, high noise", GaussianReferenceKernel(0.5, 3.0), 1000.0, 40_000),
        ("bank of samples", BankKernel(bank), 1.0, 40_000),
        ("weighted bank", BankKernel(broad, mixture.log_prob(broad) - log_broad), 1.0, 40_000),
        ("resampled bank", BankKernel(broad, mixture.log_prob(broad) - log_broad), 2.0, 20_000),
    ]


def case_id(value):
    """The same in every process: no address of an object."""
    return type(value).__name__ if isinstance(value, Kernel) else str(value)


@pytest.mark.parametrize(("name", "kernel", "sigma", "num_draws"), cases(), ids=case_id)
def test_value_form_finds_the_exact_posterior(name, kernel, sigma, num_draws):
    """Denoiser and log-density within 6 standard errors, of which the bias of order 1/K is 0.1.

    The standard error is the delta method's, from the draws themselves. 24 comparisons of a normal
    variable: false alarm below 1e-7. It is about 1 % of the posterior's width, so a missing
    correction or a constant off by 3 % fails. The resampled bank has the error of its 40,000
    points on top of that of its 20,000 draws, which at most doubles the variance.
    """
    mixture = two_modes()
    x_t = mixture.means[[0, 1, 0, 1]] + sigma * normal(4, 2, seed=2)
    energy = mixture.energy if kernel.needs_energy else None
    estimate = posterior_estimate(energy, x_t, sigma, kernel, num_draws, generator=rng())

    draws = kernel.draw(x_t, sigma, num_draws, generator=rng())
    log_weight = draws.log_correction
    if energy is not None:
        log_weight = log_weight - mixture.energy(draws.x_0)
    weight = log_weight.softmax(-1)[..., None]
    centred = draws.x_0 - (weight * draws.x_0).sum(-2, keepdim=True)
    error = (weight * centred).square().sum(-2).sqrt() * (1.5 if name == "resampled bank" else 1)
    exact = mixture.denoiser(x_t, sigma)
    assert (error < 0.06 * (sigma / math.hypot(sigma, 1)) * 1.5).all()
    assert ((estimate.mean - exact).abs() <= 6 * error).all()

    log_error = (num_draws / estimate.ess - 1).clamp(min=0).div(num_draws).sqrt()
    log_error = log_error * 1.5 + 1e-9 if name == "resampled bank" else log_error + 1e-9
    log_density = mixture.log_prob(x_t, sigma)
    assert log_error.max() < 0.06
    assert ((estimate.log_mean_weight - log_density).abs() <= 6 * log_error).all()
    torch.testing.assert_close(estimate.ess, 1 / weight.square().sum((-2, -1)))


def test_density_by_product_in_both_coordinates():
    """log p_t + log Z, and of the paper's variable with -d/2 log alpha_bar; 6 standard errors."""
    mixture, sigma = two_modes(log_z=2.5), 0.8
    x_t = normal(5, 2, seed=3)
    num_draws = 40_000
    estimate = posterior_estimate(
        mixture.energy, x_t, sigma, ReverseKernel(), num_draws, generator=rng()
    )
    error = 6 * (1 / estimate.ess - 1 / num_draws).sqrt()
    assert ((estimate.log_mean_weight - mixture.log_prob(x_t, sigma) - 2.5).abs() <= error).all()
    # The density of y = sqrt(ab) x is that of the mixture with all lengths scaled by sqrt(ab).
    root = 1 / math.sqrt(1 + sigma**2)
    paper = IsotropicMixture(mixture.means * root, mixture.stds * root, mixture.weights)
    log_density = paper.log_prob(variance_preserving(x_t, sigma), sigma * root)
    by_product = estimate.log_mean_weight - mixture.dim / 2 * math.log(root**2)
    assert ((by_product - log_density - 2.5).abs() <= error).all()


def test_the_box_kernel_is_normalised_by_its_share():
    """exp(-x) on [-1, 2] in one dimension against quadrature; 6 standard errors, as above."""
    num_draws, sigma = 40_000, 0.9
    x_t = torch.tensor([[-6.0], [-1.0], [0.3], [2.0], [9.0]], dtype=DOUBLE)
    kernel = TruncatedReverseKernel(-1.0, 2.0)
    estimate = posterior_estimate(
        lambda x_0: x_0.sum(-1), x_t, sigma, kernel, num_draws, generator=rng()
    )
    nodes, quadrature = np.polynomial.legendre.leggauss(200)
    x_0 = torch.from_numpy(0.5 + 1.5 * nodes)
    joint = (
        -x_0 - (x_t - x_0).square() / (2 * sigma**2) - math.log(2 * math.pi) / 2 - math.log(sigma)
    )
    mass = torch.from_numpy(1.5 * quadrature) * joint.exp()
    total = mass.sum(-1)
    exact = (mass * x_0).sum(-1) / total
    variance = (mass * x_0.square()).sum(-1) / total - exact.square()
    error = 6 * (variance / estimate.ess).sqrt() * 1.5  # 1.5: weights and values go together
    assert ((estimate.mean[:, 0] - exact).abs() <= error).all()
    log_error = 6 * (1 / estimate.ess - 1 / num_draws).sqrt()
    assert ((estimate.log_mean_weight - total.log()).abs() <= log_error).all()


@pytest.mark.parametrize("target", ["value", "gradient", "mixed"])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.5])
def test_every_form_finds_the_exact_score(target, sigma):
    """Within 6 delta-method standard errors of the form's own terms; false alarm below 1e-7.

    Detects a gradient of the wrong sign or scale, and a mixture that is not affine.
    """
    mixture, num_draws = two_modes(), 20_000
    x_t = mixture.means[[0, 1, 0, 1]] + sigma * normal(4, 2, seed=2)
    estimate = score_estimate(
        mixture.energy, x_t, sigma, ReverseKernel(), num_draws, target=target, generator=rng()
    )
    x_0 = ReverseKernel().draw(x_t, sigma, num_draws, generator=rng()).x_0
    weight = (-mixture.energy(x_0)).softmax(-1)[..., None]

    def error(terms):
        return (weight * (terms - (weight * terms).sum(-2, keepdim=True))).square().sum(-2).sqrt()

    by_value, by_gradient = (x_0 - x_t[:, None]) / sigma**2, mixture.score(x_0)
    errors = {"value": error(by_value), "gradient": error(by_gradient)}
    # The best mixture is at least as good as either in the sum over coordinates.
    errors["mixed"] = torch.minimum(
        errors["value"].norm(dim=-1), errors["gradient"].norm(dim=-1)
    ).unsqueeze(-1)
    assert ((estimate.score - mixture.score(x_t, sigma)).abs() <= 6 * errors[target]).all()


def test_mixed_form_runs_from_value_to_gradient():
    x_t, sigma = normal(6, 2), torch.linspace(0.2, 2, 6, dtype=DOUBLE)

    def estimate(**options):
        return posterior_estimate(
            two_modes().energy, x_t, sigma, ReverseKernel(), 50, generator=rng(), **options
        ).mean

    value, gradient = estimate(target="value"), estimate(target="gradient")
    mixed = {c: estimate(target="mixed", coefficient=c) for c in (0.0, 1.0, 0.25, -0.5)}
    torch.testing.assert_close(mixed[0.0], value)
    torch.testing.assert_close(mixed[1.0], gradient)
    torch.testing.assert_close(mixed[0.25], 0.75 * value + 0.25 * gradient)
    torch.testing.assert_close(mixed[-0.5], 1.5 * value - 0.5 * gradient)
    by_row = estimate(target="mixed", coefficient=torch.tensor([0.0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(by_row[::2], value[::2])
    torch.testing.assert_close(by_row[1::2], gradient[1::2])


@pytest.mark.parametrize("std", [0.3, 1.0, 4.0])
def test_the_estimated_coefficient_is_exact_for_a_normal_target(std):
    """There one form is affine in the other, and c = s^2 / (s^2 + sigma^2) has no variance."""
    target = IsotropicMixture([[1.0, -2.0, 0.5]], [std], [1.0])
    sigma = std * torch.linspace(0.1, 1, 8, dtype=DOUBLE)
    x_t = target.means + torch.hypot(sigma, target.stds)[:, None] * normal(8, 3)
    estimate = posterior_estimate(
        target.energy, x_t, sigma, ReverseKernel(), 64, target="mixed", generator=rng()
    )
    torch.testing.assert_close(estimate.mean, target.denoiser(x_t, sigma), rtol=1e-8, atol=1e-8)


def test_the_estimated_coefficient_minimises_the_estimated_variance():
    mixture, sigma = two_modes(), 0.7
    x_t = normal(5, 2)

    def estimate(coefficient):
        return posterior_estimate(
            mixture.energy, x_t, sigma, ReverseKernel(), 40, target="mixed",
            coefficient=coefficient, generator=rng(),
        ).mean  # fmt: skip

    value, gradient, best = estimate(0.0), estimate(1.0), estimate(None)
    c = ((best - value) * (gradient - value)).sum(-1) / (gradient - value).square().sum(-1)
    x_0 = ReverseKernel().draw(x_t, sigma, 40, generator=rng()).x_0
    weight = (-mixture.energy(x_0)).softmax(-1)[..., None]

    def variance(c):
        c = c[:, None, None]
        terms = (1 - c) * (x_0 - x_t[:, None]) + c * sigma**2 * mixture.score(x_0)
        return (weight * (terms - (weight * terms).sum(-2, keepdim=True))).square().sum((-2, -1))

    for step in (-0.3, -1e-3, 1e-3, 0.3):
        assert (variance(c + step) > variance(c)).all()


@pytest.mark.parametrize("sigma", [1.0, 10.0, 1000.0])
def test_a_few_heavy_draws_do_not_send_the_mixed_form_away(sigma):
    """The move from the value form is at most five of its standard errors, whatever the energy."""
    x_t = sigma * normal(200, 2)

    def energy(x_0):
        return 1e6 * x_0.square().square().sum(-1)

    value, mixed = (
        posterior_estimate(
            energy, x_t, sigma, ReverseKernel(), 16, target=target, generator=rng()
        ).mean
        for target in ("value", "mixed")
    )
    x_0 = ReverseKernel().draw(x_t, sigma, 16, generator=rng()).x_0
    weight = (-energy(x_0)).softmax(-1)[..., None]
    error = (weight * (x_0 - value[:, None])).square().sum((-2, -1)).sqrt()
    assert ((mixed - value).norm(dim=-1) <= 5.001 * error + 1e-9 * sigma).all()


def test_a_single_draw_keeps_the_value_form():
    x_t = normal(3, 2)
    mixed = posterior_estimate(
        quadratic, x_t, 1.0, ReverseKernel(), 1, target="mixed", generator=rng()
    )
    value = posterior_estimate(quadratic, x_t, 1.0, ReverseKernel(), 1, generator=rng())
    torch.testing.assert_close(mixed.mean, value.mean)


def test_score_by_gradients_is_precise_at_small_noise():
    """In single precision, where D - x_t as a difference would be off by 1e-7 * 1e3 / 1e-8."""
    x_t = torch.tensor([[1000.0, -3.0]])
    score = score_estimate(
        lambda x_0: 2 * x_0[..., 0] - x_0[..., 1], x_t, 1e-4, ReverseKernel(), 4, target="gradient"
    ).score
    torch.testing.assert_close(score, torch.tensor([[-2.0, 1.0]]))


def test_bias_is_of_order_one_over_the_number_of_draws():
    """Golden item 4: the mean error of sum w_k noise_k halves as K doubles.

    For Q = -|a - m|^2 / (2 c), temperature t: p_0 = N(m, c t) and
    noise* = sqrt(1 - ab) (a_t - sqrt(ab) m) / (ab c t + 1 - ab). 200,000 rows; the ratio of the
    mean errors at K = 16 and 64, with 6 standard errors (false alarm 1e-8), excludes K^-1/2
    and K^-2.
    """
    m, variance, alpha_bar, paper = 0.5, 0.7, 0.4, 1.9
    sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
    exact = (
        math.sqrt(1 - alpha_bar) * (paper - math.sqrt(alpha_bar) * m)
        / (alpha_bar * variance + 1 - alpha_bar)
    )  # fmt: skip
    x_t = torch.full((200_000, 1), paper / math.sqrt(alpha_bar), dtype=DOUBLE)
    errors = {}
    for num_draws in (16, 64):
        estimate = posterior_estimate(
            lambda x_0: (x_0 - m).square().sum(-1) / (2 * variance),
            x_t, sigma, ReverseKernel(), num_draws, generator=rng(num_draws),
        )  # fmt: skip
        noise = (x_t - estimate.mean)[:, 0] / sigma
        errors[num_draws] = noise.mean().item() - exact, 6 * noise.std().item() / len(noise) ** 0.5
    (coarse, coarse_error), (fine, fine_error) = errors[16], errors[64]
    assert abs(coarse) > 3 * coarse_error
    low = (abs(coarse) - coarse_error) / (abs(fine) + fine_error)
    high = (abs(coarse) + coarse_error) / (abs(fine) - fine_error)
    assert 2.0 < low < high < 8.0


# --- energies ---


def test_the_energy_is_called_once_with_all_candidates():
    calls = []

    def energy(x_0, context):
        calls.append((x_0.shape, context.shape, context.stride(), torch.is_grad_enabled()))
        return quadratic(x_0) + context.sum(-1)

    x_t, context = normal(4, 5, 2), normal(4, 5, 3)
    for target, grad in [("value", False), ("gradient", True), ("mixed", True)]:
        calls.clear()
        posterior_estimate(energy, x_t, 0.5, ReverseKernel(), 8, context=context, target=target)
        assert calls == [((4, 5, 8, 2), (4, 5, 8, 3), (15, 3, 0, 1), grad)]


def test_context_conditions_each_row():
    x_t, context = normal(4, 2), 3 * normal(4, 2, seed=1)

    def energy(x_0, centre):
        return quadratic(x_0 - centre)

    together = posterior_estimate(energy, x_t, 0.5, ReverseKernel(), 2000, context=context)
    # 6 standard errors of sqrt(1/5) / sqrt(ESS); false alarm below 1e-7
    exact = (4 * x_t + context) / 5
    assert ((together.mean - exact).abs() <= 6 * (0.2 / together.ess[:, None]).sqrt() * 1.5).all()


def test_no_gradient_leaves_and_none_lands_in_the_energy():
    scale = torch.ones((), dtype=DOUBLE, requires_grad=True)
    x_t = normal(3, 2).requires_grad_()
    for target in ("value", "gradient", "mixed"):
        with torch.no_grad():
            estimate = posterior_estimate(
                lambda x_0: scale * quadratic(x_0), x_t, 0.5, ReverseKernel(), 8, target=target
            )
        assert not estimate.mean.requires_grad
        assert scale.grad is None
        assert x_t.grad is None


@pytest.mark.parametrize("target", ["value", "gradient", "mixed"])
def test_infinite_energies_are_weight_zero(target):
    """Also where their gradient is NaN; rows with no other draw are finite, with sample size 0."""

    def energy(x_0):
        squared = 1 - x_0.square().sum(-1)
        return -torch.where(squared > 0, squared, 0.0).sqrt().log()  # NaN gradients outside

    x_t = torch.tensor([[0.0, 0.0], [50.0, 0.0]], dtype=DOUBLE)
    estimate = posterior_estimate(
        energy, x_t, 0.5, ReverseKernel(), 64, target=target, generator=rng()
    )
    assert estimate.mean.isfinite().all()
    assert estimate.ess[0] > 1
    assert estimate.ess[1] == 0
    assert estimate.log_mean_weight[1] == -math.inf


@given(shift=st.floats(-1e4, 1e4))
def test_a_constant_in_the_energy_moves_the_density_alone(shift):
    x_t = normal(3, 2)

    def estimate(energy, target):
        return posterior_estimate(
            energy, x_t, 0.5, ReverseKernel(), 8, target=target, generator=rng()
        )

    for target in ("value", "gradient", "mixed"):
        plain = estimate(quadratic, target)
        shifted = estimate(lambda x_0: quadratic(x_0) + shift, target)
        torch.testing.assert_close(shifted.mean, plain.mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(shifted.ess, plain.ess, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(shifted.log_mean_weight, plain.log_mean_weight - shift)


def test_single_precision_survives_a_noisy_point_far_outside_of_the_box():
    """The share of the box, exp(-10^6), is kept apart from the weights, which it would drown."""
    x_t = torch.tensor([[30.0, -20.0]])
    kernel, sigma = TruncatedReverseKernel(-1.0, 1.0), 0.02

    def energy(x_0):
        return 40 * x_0.sum(-1).square()

    single = posterior_estimate(energy, x_t, sigma, kernel, 64, generator=rng())
    draws = kernel.draw(x_t, sigma, 64, generator=rng())
    assert single.log_mean_weight < -5e5
    double = posterior_mean(draws.x_0.double(), -energy(draws.x_0.double()))
    torch.testing.assert_close(single.mean.double(), double.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.ess.double(), double.ess, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        (ReverseKernel(), "value"),
        (ReverseKernel(), "gradient"),
        (GaussianReferenceKernel(0.0, 2.0), "mixed"),
        (TruncatedReverseKernel(-1.0, 1.0), "value"),
        (BankKernel(normal(32, 2, dtype=torch.float32)), "value"),
    ],
)
def test_nothing_is_read_back_and_precision_is_kept(kernel, target):
    x_t, sigma = normal(3, 2, dtype=torch.float32), torch.tensor(0.5, dtype=DOUBLE)
    with NoReadBack():
        energy = quadratic if kernel.needs_energy else None
        estimate = posterior_estimate(energy, x_t, sigma, kernel, 8, target=target)
        score = score_estimate(energy, x_t, sigma, kernel, 8, target=target)
    assert estimate.mean.dtype == estimate.ess.dtype == score.score.dtype == torch.float32
    assert estimate.mean.shape == score.score.shape == (3, 2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((quadratic, ReverseKernel()), {"target": "noise"}, "target must be one of .*'noise'"),
        (
            (quadratic, TruncatedReverseKernel(-1.0, 1.0)),
            {"target": "gradient"},
            "target must be 'value' for TruncatedReverseKernel, got 'gradient': .* boundary",
        ),
        (
            (quadratic, TruncatedReverseKernel(-1.0, math.inf)),
            {"target": "mixed"},
            "target must be 'value' for TruncatedReverseKernel, got 'mixed'",
        ),
        (
            (None, BankKernel(torch.zeros(4, 2))),
            {"target": "gradient"},
            "target must be 'value' for BankKernel, got 'gradient': it calls no energy",
        ),
        ((quadratic, BankKernel(torch.zeros(4, 2))), {}, "energy must be None for BankKernel"),
        ((None, ReverseKernel()), {}, "energy must be given for ReverseKernel, got None"),
        (
            (quadratic, ReverseKernel()),
            {"coefficient": 0.5},
            "coefficient must be None unless target is 'mixed', got 0.5",
        ),
        (
            (lambda x_0: x_0, ReverseKernel()),
            {},
            r"energy must return one value per point, shape \(3, 4\), got \(3, 4, 2\)",
        ),
        (
            (lambda x_0: x_0.detach().sum(-1), ReverseKernel()),
            {"target": "gradient"},
            "energy must be differentiable by autograd",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    energy, kernel = arguments
    for function in (posterior_estimate, score_estimate):
        with pytest.raises(ValueError, match=message):
            function(energy, torch.zeros(3, 2), 1.0, kernel, 4, **options)
