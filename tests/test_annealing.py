import math

import pytest
import torch

from rsm_sampler.annealing import annealed_estimate
from rsm_sampler.box_kernel import TruncatedReverseKernel
from rsm_sampler.estimators import posterior_estimate
from rsm_sampler.kernels import GaussianReferenceKernel, ReverseKernel
from tests.exact import IsotropicMixture, NoReadBack

DOUBLE = torch.float64
BOX = TruncatedReverseKernel(-1.0, 1.0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(law, n, sigma):
    x_0 = law.sample(n, rng(1))
    return x_0 + sigma * torch.randn(x_0.shape, dtype=DOUBLE, generator=rng(2)), torch.full(
        (n,), sigma, dtype=DOUBLE
    )


def test_without_stages_it_is_the_plain_estimate():
    law = IsotropicMixture([[0.3, 0.0]], [0.2], [1.0])
    x_t, sigma = noisy(law, 20, 0.5)
    for kernel in (ReverseKernel(), BOX):
        mine = annealed_estimate(law.energy, x_t, sigma, kernel, 64, stages=0, generator=rng(3))
        plain = posterior_estimate(law.energy, x_t, sigma, kernel, 64, generator=rng(3))
        torch.testing.assert_close(mine.mean, plain.mean)
        torch.testing.assert_close(mine.ess, plain.ess)
        torch.testing.assert_close(mine.log_mean_weight, plain.log_mean_weight)


def test_narrow_wells_in_six_dimensions():
    """Against the exact denoiser; plain draws are ten times further off.

    The error of a coordinate's mean over 64 particles of spread 0.08 is about 0.01 to 0.02.
    """
    law = IsotropicMixture([[0.3] * 6], [0.08], [1.0])
    x_t, sigma = noisy(law, 200, 1.0)
    exact = law.denoiser(x_t, sigma)
    errors = []
    for stages in (0, 24):
        estimate = annealed_estimate(
            law.energy, x_t, sigma, BOX, 64, stages=stages, generator=rng(3)
        )
        errors.append((estimate.mean - exact).square().mean().sqrt().item())
    assert errors[1] < 0.03 and errors[0] > 5 * errors[1]


def test_the_normaliser_is_estimated_too():
    """log p_t(x_t) + log Z; the exponential of its error has mean one, within five errors."""
    law = IsotropicMixture([[0.5, -0.2]], [0.1], [1.0], log_z=0.7)
    x_t, sigma = noisy(law, 400, 0.6)
    estimate = annealed_estimate(
        law.energy, x_t, sigma, ReverseKernel(), 64, stages=10, moves=2, generator=rng(3)
    )
    ratio = (estimate.log_mean_weight - law.log_prob(x_t, sigma) - 0.7).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 0.6


def test_weights_of_two_wells():
    """The share of the likelier well, on average over noisy points that cannot tell."""
    law = IsotropicMixture([[0.4, 0.4], [-0.4, -0.4]], [0.15, 0.15], [0.7, 0.3])
    x_t = torch.zeros(600, 2, dtype=DOUBLE)
    sigma = torch.full((600,), 5.0, dtype=DOUBLE)
    estimate = annealed_estimate(law.energy, x_t, sigma, BOX, 256, stages=8, generator=rng(3))
    mean = estimate.mean.mean().item()
    error = estimate.mean.mean(-1).std().item() / math.sqrt(600)
    assert abs(mean - 0.4 * (0.7 - 0.3)) < 5 * error + 0.01  # self-normalisation


def test_two_narrow_wells_far_apart_in_six_dimensions():
    """Steps as long as the wells are wide, although the particles fill both of them.

    The share of a well is right within five standard errors and 0.02 of self-normalisation; steps
    as long as the whole spread (2 in this case, 24 widths) leave it wrong by more than 0.1.
    """
    law = IsotropicMixture([[0.4] * 6, [-0.4] * 6], [0.08, 0.08], [0.7, 0.3])
    x_t, sigma = noisy(law, 150, 2.0)
    estimate = annealed_estimate(
        law.energy, x_t, sigma, BOX, 128, stages=20, moves=6, generator=rng(3)
    )
    error = (estimate.mean - law.denoiser(x_t, sigma)).mean(-1) / 0.8
    assert abs(error.mean()) < 0.02 + 5 * error.std() / math.sqrt(150)
    assert error.std() < 0.2


def test_infinite_energies_have_weight_zero():
    """Half of the box is forbidden; one noisy point is given nothing but forbidden candidates."""
    law = IsotropicMixture([[0.3, 0.0]], [0.2], [1.0])

    def energy(x):
        value = torch.where(x[..., 0] < 0.3, math.inf, law.energy(x))
        value[-1] = math.inf
        return value

    x_t, sigma = noisy(law, 50, 0.5)
    for stages in (0, 4):
        estimate = annealed_estimate(energy, x_t, sigma, BOX, 64, stages=stages, generator=rng())
        alive = estimate.ess > 0
        assert alive[:-1].double().mean() > 0.9 and (estimate.mean[alive, 0] > 0.3).all()
        assert estimate.mean[-1].eq(0).all() and estimate.ess[-1] == 0
        assert estimate.log_mean_weight[-1] == -math.inf
        assert estimate.log_mean_weight[alive].isfinite().all()


def test_nothing_is_read_back():
    law = IsotropicMixture([[0.3, 0.0]], [0.2], [1.0])
    x_t, sigma = noisy(law, 20, 0.5)
    with NoReadBack():
        annealed_estimate(law.energy, x_t, sigma, BOX, 16, stages=3, generator=rng())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": -1}, "stages must be at least 0, got -1"),
        ({"moves": 0}, "moves must be at least 1, got 0"),
        ({"num_draws": 3}, "num_draws must be at least 4 with stages, got 3"),
        (
            {"kernel": GaussianReferenceKernel(0.0, 1.0)},
            "kernel must be a ReverseKernel or a Truncated",
        ),
    ],
)
def test_bad_arguments(options, message):
    given = {"kernel": ReverseKernel(), "num_draws": 4, "stages": 1, **options}
    with pytest.raises(ValueError, match=message):
        annealed_estimate(lambda x: x.sum(-1), torch.zeros(1, 1), torch.ones(1), **given)
