import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsm_sampler.box_kernel import TruncatedReverseKernel
from rsm_sampler.estimators import PosteriorEstimate, posterior_estimate
from rsm_sampler.kernels import BankKernel, GaussianReferenceKernel, ReverseKernel
from rsm_sampler.losses import (
    denoising_loss,
    edm_weight,
    estimate_loss,
    mirror_descent_loss,
    noise_weight,
    reverse_sampling_loss,
    score_weight,
)
from rsm_sampler.transitions import forward_kernel
from tests.exact import IsotropicMixture, NoReadBack, two_modes

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


class Network(torch.nn.Module):
    """A small denoiser that counts its calls and the points it has seen."""

    def __init__(self, dim, context_dim=0, dtype=DOUBLE):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(dim + 1 + context_dim, 8, dtype=dtype))
        self.out = torch.nn.Parameter(normal(8, dim, seed=1, dtype=dtype))
        self.calls = []

    def forward(self, x_t, sigma, context=None):
        self.calls.append(tuple(x_t.shape))
        parts = [x_t, sigma.log().unsqueeze(-1), *([] if context is None else [context])]
        return torch.tanh(torch.cat(parts, -1) @ self.weight) @ self.out


def quadratic(x_0):
    return x_0.square().sum(-1) / 2


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()))


# --- one network call ---


@pytest.mark.parametrize("target", ["value", "gradient"])
@pytest.mark.parametrize("weighting", [edm_weight, noise_weight, score_weight])
def test_averaging_first_has_the_gradient_of_all_regressions(target, weighting):
    """Golden item 3, to rounding: sum_k w_k |D - x_k|^2 against |D - sum_k w_k x_k|^2."""
    mixture, network, num_draws = two_modes(), Network(2), 12
    x_t, sigma = 2 * normal(6, 2), normal(6, seed=3).exp()
    loss = reverse_sampling_loss(
        network, mixture.energy, x_t, sigma, ReverseKernel(), num_draws,
        target=target, loss_weight=weighting, generator=rng(),
    )  # fmt: skip
    x_0 = ReverseKernel().draw(x_t, sigma, num_draws, generator=rng()).x_0
    weight = (-mixture.energy(x_0)).softmax(-1)
    targets = x_0
    if target == "gradient":
        targets = x_t[:, None] + sigma.square()[:, None, None] * mixture.score(x_0)
    copies = network(x_t[:, None].expand_as(x_0), sigma[:, None].expand(6, num_draws))
    each = (weight * (copies - targets).square().sum(-1)).sum(-1) * weighting(sigma)
    assert network.calls == [(6, 2), (6, num_draws, 2)]
    parameters = list(network.parameters())
    for row in range(6):
        one = torch.autograd.grad(loss[row], parameters, retain_graph=True)
        many = torch.autograd.grad(each[row], parameters, retain_graph=True)
        for first, second in zip(one, many, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    spread = (weight[..., None] * targets.square()).sum((-2, -1))
    spread = spread - (weight[..., None] * targets).sum(-2).square().sum(-1)
    torch.testing.assert_close(each, loss + weighting(sigma) * spread)


def test_network_and_energy_are_called_once():
    energies = []

    def energy(x_0, context):
        energies.append((tuple(x_0.shape), tuple(context.shape)))
        return quadratic(x_0)

    network, context = Network(3, context_dim=2), normal(5, 2)
    x_t = normal(5, 3)
    for target in ("value", "gradient", "mixed"):
        energies.clear()
        network.calls.clear()
        loss = reverse_sampling_loss(
            network, energy, x_t, 0.5, ReverseKernel(), 64, context=context, target=target
        )
        assert network.calls == [(5, 3)]
        assert energies == [((5, 64, 3), (5, 64, 2))]
        assert loss.shape == (5,)
    network.calls.clear()
    denoising_loss(network, x_t, 0.5, context=context)
    mirror_descent_loss(network, x_t, 0.5, normal(5), context=context)
    reverse_sampling_loss(
        network, None, x_t, 0.5, BankKernel(normal(9, 3)), 9, context=context
    )  # and no energy
    assert network.calls == [(5, 3)] * 3


# --- weights of the loss ---


def test_weights_are_the_three_usual_losses():
    """Of the denoiser, the noise (7) and the score (9), from one denoiser."""
    network, x_0, sigma = Network(2), normal(7, 2), normal(7, seed=1).exp()
    x_t = forward_kernel(x_0, sigma, generator=rng())
    denoised, column = network(x_t, sigma), sigma[:, None]

    def loss(weight):
        return denoising_loss(network, x_0, sigma, loss_weight=weight, generator=rng())

    noise, score = (x_t - denoised) / column, (denoised - x_t) / column.square()
    true_noise, true_score = (x_t - x_0) / column, -(x_t - x_0) / column.square()
    torch.testing.assert_close(loss(1.0), (denoised - x_0).square().sum(-1))
    torch.testing.assert_close(loss(noise_weight), (noise - true_noise).square().sum(-1))
    torch.testing.assert_close(loss(score_weight), (score - true_score).square().sum(-1))
    g = normal(7, seed=5).exp()
    torch.testing.assert_close(loss(g), g * loss(1.0))

    network.sigma_data = 2.5
    output_scale = sigma * 2.5 / (sigma.square() + 2.5**2).sqrt()
    torch.testing.assert_close(loss(None), loss(1.0) / output_scale.square())


def test_a_preconditioned_network_without_output_has_a_loss_of_one():
    """D = s^2 x / (s^2 + sigma^2) for N(0, s^2): expected loss 1 per coordinate at every sigma.

    64,000 chi-squared terms at each noise scale: 6 standard errors, false alarm below 1e-7.
    """
    std, dim = 1.7, 4
    for sigma in (0.01, 0.5, 3.0, 200.0):

        def skip(x_t, sigma):
            return x_t / (1 + sigma.square() / std**2).unsqueeze(-1)

        skip.sigma_data = std
        loss = denoising_loss(skip, std * normal(16_000, dim), sigma, generator=rng(1))
        assert abs(loss.mean().item() / dim - 1) <= 6 * math.sqrt(2 / (dim * 16_000))


# --- the minimisers ---


def mean_gradient(loss, parameters):
    """Mean over the samples of d loss / d parameters, and its standard error, (parameters)."""
    groups = [
        torch.autograd.grad(part.sum(), parameters, retain_graph=True)
        for part in loss.reshape(200, -1)
    ]
    rows = torch.stack([torch.cat([g.reshape(-1) for g in group]) for group in groups])
    return rows.sum(0) / loss.numel(), rows.std(0) * math.sqrt(200) / loss.numel()


class Affine:
    """D = a x + b with a and b of a normal law N(mean, variance): exact there."""

    def __init__(self, mean, variance, sigma):
        self.a = torch.tensor(variance / (variance + sigma**2), dtype=DOUBLE, requires_grad=True)
        self.b = ((1 - self.a.detach()) * mean).requires_grad_()
        self.parameters = [self.a, self.b]

    def __call__(self, x_t, sigma):
        return self.a * x_t + self.b


@pytest.mark.numbers
@pytest.mark.parametrize("self_normalised", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_mirror_descent_recovers_the_tilted_normal_law(self_normalised, temperature):
    """Golden item 5: the exact denoiser of pi_MD is stationary, that of pi_old is not.

    Gradients in a and b of D = a x + b over 200,000 samples, 200 groups, 6 standard errors (t with
    199 degrees of freedom: false alarm below 1e-7 for all). Detects a temperature off by 3 %.
    """
    old_mean, old_variance, m, c, sigma = (
        torch.tensor([0.5, -1.0], dtype=DOUBLE),
        0.8,
        1.2,
        1.5,
        0.7,
    )
    x_0 = old_mean + math.sqrt(old_variance) * normal(200_000, 2)
    log_weight = -(x_0 - m).square().sum(-1) / (2 * c * temperature)
    precision = 1 / old_variance + 1 / (c * temperature)
    mean = (old_mean / old_variance + m / (c * temperature)) / precision

    def gradient(denoiser):
        loss = mirror_descent_loss(
            denoiser, x_0, sigma, log_weight, self_normalised=self_normalised, generator=rng(1)
        )
        return mean_gradient(loss, denoiser.parameters)

    value, error = gradient(Affine(mean, 1 / precision, sigma))
    assert (value.abs() <= 6 * error).all()
    value, error = gradient(Affine(old_mean, old_variance, sigma))
    assert (value.abs() > 12 * error).any()


@pytest.mark.parametrize("target", ["value", "gradient", "mixed"])
def test_reverse_sampling_recovers_the_energys_normal_law(target):
    """Golden item 4 for the loss: the exact denoiser of exp(-E) is stationary: 6 standard errors.

    200 noisy points of the law p_t at K = 10,000: the sum's standard error is s / sqrt(200 K), the
    bias c s / K with c of a few units, so a seventh of c errors; t with 199 degrees of freedom, 3
    gradients: false alarm below 1e-6. A variance off by 10 % is seen with twice that margin.
    """
    mean, variance, sigma = 0.5, 0.7, 0.8
    x_t = mean + math.sqrt(variance + sigma**2) * normal(200, 2)

    def gradient(denoiser):
        loss = reverse_sampling_loss(
            denoiser, lambda x_0: (x_0 - mean).square().sum(-1) / (2 * variance), x_t, sigma,
            ReverseKernel(), 10_000, target=target, generator=rng(),
        )  # fmt: skip
        return mean_gradient(loss, denoiser.parameters)

    centre = torch.tensor([mean, mean], dtype=DOUBLE)
    value, error = gradient(Affine(centre, variance, sigma))
    # The mixed target is exact for a normal law, and so is its gradient: zero to rounding.
    assert (value.abs() <= 6 * error + 1e-9).all()
    value, error = gradient(Affine(centre, 1.1 * variance, sigma))
    assert (value.abs() > 12 * error).any()


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_targets_agree_on_a_mixture(sigma):
    """Gradients of the three losses at one network differ by their standard errors only (6).

    200 noisy points of the law p_t at K = 10,000, as above; the 40 parameters of the network, two
    comparisons: false alarm below 1e-6. Targets with independent draws, so nothing cancels.
    """
    mixture, network = two_modes(), Network(2)
    x_t = forward_kernel(mixture.sample(200, generator=rng(7)), sigma, generator=rng(8))
    losses = {
        target: reverse_sampling_loss(
            network, mixture.energy, x_t, sigma, ReverseKernel(), 10_000,
            target=target, generator=rng(seed),
        )
        for seed, target in enumerate(["value", "gradient", "mixed"])
    }  # fmt: skip
    parameters = list(network.parameters())
    for target in ("gradient", "mixed"):
        value, error = mean_gradient(losses["value"] - losses[target], parameters)
        assert (value.abs() <= 6 * error + 1e-12).all()


# --- identities ---


def test_equal_weights_are_plain_denoising():
    """Golden item 7, on the same draws."""
    network, x_0 = Network(2), normal(9, 2)
    plain = denoising_loss(network, x_0, 0.5, generator=rng())
    for log_weight in (torch.zeros(9, dtype=DOUBLE), torch.full((9,), 800.0, dtype=DOUBLE)):
        weighted = mirror_descent_loss(network, x_0, 0.5, log_weight, generator=rng())
        torch.testing.assert_close(weighted, plain)
    absolute = mirror_descent_loss(
        network, x_0, 0.5, torch.full((9,), math.log(2)), self_normalised=False, generator=rng()
    )
    torch.testing.assert_close(absolute, 2 * plain)


@given(shift=st.floats(-1e3, 1e3), factor=st.floats(1e-3, 1e3))
def test_shift_of_q_and_joint_scale_with_the_temperature(shift, factor):
    """Golden item 9, for both losses, on the same draws."""
    network, x, temperature = Network(2), normal(5, 2), 0.7

    def q(x_0):
        return -quadratic(x_0 - 0.3) + x_0[..., 0].sin()

    def sdac(q, temperature):
        return reverse_sampling_loss(
            network, lambda x_0: -q(x_0) / temperature, x, 0.5, ReverseKernel(), 8, generator=rng()
        )

    def dpmd(q, temperature):
        return mirror_descent_loss(network, x, 0.5, q(x) / temperature, generator=rng())

    for update in (sdac, dpmd):
        plain = update(q, temperature)
        torch.testing.assert_close(update(lambda x_0: q(x_0) + shift, temperature), plain)
        scaled = update(lambda x_0: factor * q(x_0), factor * temperature)
        torch.testing.assert_close(scaled, plain)


def test_the_batch_mean_of_the_weights_is_one():
    log_weight = 3 * normal(4, 5)
    loss = mirror_descent_loss(
        lambda x_t, sigma: x_t - x_t, torch.ones(4, 5, 1), 0.5, log_weight, loss_weight=1.0
    )
    assert loss.mean().item() == pytest.approx(1)
    torch.testing.assert_close(
        loss.flatten().double(), 20 * log_weight.flatten().softmax(0), rtol=1e-5, atol=1e-6
    )


def test_the_loss_is_the_estimate_followed_by_the_regression():
    network, x_t, sigma = Network(2), normal(5, 2), 0.5
    whole = reverse_sampling_loss(
        network, quadratic, x_t, sigma, ReverseKernel(), 8, generator=rng()
    )
    estimate = posterior_estimate(quadratic, x_t, sigma, ReverseKernel(), 8, generator=rng())
    assert torch.equal(whole, estimate_loss(network, x_t, sigma, estimate))


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    dim=st.integers(1, 3),
    points=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_batch_against_loop_and_order_of_the_candidates(batch, dim, points, dtype):
    network = Network(dim, dtype=dtype)
    x_t, sigma = normal(*batch, dim, dtype=dtype), normal(*batch, seed=1, dtype=dtype).exp()
    bank, log_weight = (
        normal(points, dim, seed=2, dtype=dtype),
        normal(points, seed=3, dtype=dtype),
    )

    def loss(x_t, sigma, order):
        kernel = BankKernel(bank[order], log_weight[order])
        return reverse_sampling_loss(network, None, x_t, sigma, kernel, points)

    forward, backward = torch.arange(points), torch.arange(points).flip(0)
    together = loss(x_t, sigma, forward)
    assert together.shape == tuple(batch)
    assert together.dtype == dtype
    torch.testing.assert_close(loss(x_t, sigma, backward), together)
    flat = zip(x_t.reshape(-1, dim), sigma.reshape(-1), strict=True)
    alone = torch.stack([loss(x, s, forward) for x, s in flat]).reshape(batch)
    torch.testing.assert_close(alone, together)


# --- weight zero ---


@pytest.mark.parametrize("target", ["value", "gradient", "mixed"])
def test_a_row_of_weight_zero_has_loss_and_gradient_zero(target):
    def energy(x_0):
        return torch.where(x_0.norm(dim=-1) < 2, quadratic(x_0), math.inf)

    network = Network(2)
    x_t = torch.tensor([[0.0, 0.0], [90.0, 0.0], [1.0, 1.0]], dtype=DOUBLE)

    def loss(x_t):
        return reverse_sampling_loss(
            network, energy, x_t, 0.5, ReverseKernel(), 32, target=target, generator=rng()
        )

    whole = loss(x_t)
    assert whole[1] == 0
    assert (whole[[0, 2]] > 0).all()
    for gradient in gradients(whole[1], network):
        assert (gradient == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss(x_t).sum(), network))


@pytest.mark.parametrize("self_normalised", [True, False])
def test_samples_of_weight_zero_have_loss_zero(self_normalised):
    network, x_0 = Network(2), normal(3, 2)

    def loss(log_weight):
        return mirror_descent_loss(
            network, x_0, 0.5, torch.tensor(log_weight), self_normalised=self_normalised
        )

    some = loss([0.0, -math.inf, 0.0])
    assert some[1] == 0
    assert (some[[0, 2]] > 0).all()
    none = loss([-math.inf] * 3)
    assert (none == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(none.sum(), network))


def test_nan_energies_reach_the_loss():
    loss = reverse_sampling_loss(
        lambda x_t, sigma: x_t, lambda x_0: x_0.sum(-1) * math.nan, normal(2, 2), 0.5,
        ReverseKernel(), 4,
    )  # fmt: skip
    assert loss.isnan().all()


# --- the rest ---


@pytest.mark.parametrize(
    "kernel",
    [ReverseKernel(), GaussianReferenceKernel(0.0, 2.0), TruncatedReverseKernel(-1.0, 1.0)],
)
def test_nothing_is_read_back(kernel):
    network = Network(2, dtype=torch.float32)
    x_t, sigma = normal(5, 2, dtype=torch.float32), torch.full((5,), 0.5)
    with NoReadBack():
        loss = reverse_sampling_loss(network, quadratic, x_t, sigma, kernel, 8)
        loss = loss + denoising_loss(network, x_t, sigma)
        loss = loss + mirror_descent_loss(network, x_t, sigma, torch.zeros(5))
        loss.mean().backward()
    assert loss.dtype == torch.float32


def test_no_gradient_flows_into_targets_and_weights():
    network = Network(2)
    x_t, log_weight = normal(3, 2), normal(3).requires_grad_()
    estimate = PosteriorEstimate(
        normal(3, 2).requires_grad_(), torch.ones(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    )
    loss = estimate_loss(network, x_t, 0.5, estimate)
    loss = loss + mirror_descent_loss(network, x_t, 0.5, log_weight)
    loss.sum().backward()
    assert estimate.mean.grad is None
    assert log_weight.grad is None


@pytest.mark.bad_input
def test_bad_input_is_named():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"log_weight must have shape \(3,\), got \(2,\)"):
        mirror_descent_loss(lambda x_t, sigma: x_t, x, 1.0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"denoiser must return x_t's shape \(3, 2\), got \(3,\)"):
        denoising_loss(lambda x_t, sigma: x_t.sum(-1), x, 1.0)
    with pytest.raises(ValueError, match="target must be 'value' for TruncatedReverseKernel"):
        reverse_sampling_loss(
            lambda x_t, sigma: x_t, quadratic, x, 1.0, TruncatedReverseKernel(-1.0, 1.0), 4,
            target="gradient",
        )  # fmt: skip


def test_the_exact_denoiser_has_the_least_loss():
    """Over any other: the difference of two denoising losses is |D - D*|^2 on average.

    Paired on 50,000 samples; 6 standard errors, false alarm below 1e-8.
    """
    mixture, sigma = two_modes(), 0.8
    x_0 = mixture.sample(50_000, generator=rng())
    wrong = IsotropicMixture(mixture.means, mixture.stds * 1.1, mixture.weights)
    losses = [
        denoising_loss(d.denoiser, x_0, sigma, loss_weight=1.0, generator=rng(1))
        for d in (wrong, mixture)
    ]
    x_t = forward_kernel(x_0, sigma, generator=rng(1))
    gap = (wrong.denoiser(x_t, sigma) - mixture.denoiser(x_t, sigma)).square().sum(-1)
    difference = losses[0] - losses[1] - gap
    assert abs(difference.mean()) <= 6 * difference.std() / math.sqrt(50_000)
    assert (losses[0] - losses[1]).mean() > 0.5 * gap.mean()
