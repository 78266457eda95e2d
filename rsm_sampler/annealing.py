r"""Clean candidates that walk towards the posterior, where K independent ones would miss it.

The K draws of a reverse kernel are weighted by :math:`e^{-E}` in one go, and K weights cannot
tell apart more than :math:`\log K` nats: in six dimensions a well of width 0.1 within reach
of a noise of 0.5 is hit by one draw in ten thousand. Sequential Monte Carlo divides the way. The
particles follow

.. math:: \pi_j(x_0) \propto \phi(x_0 | x_t)\, e^{-\beta_j E(x_0)}, \qquad
          0 = \beta_0 < \dots < \beta_J = 1,

each stage weighted by :math:`e^{-(\beta_{j+1} - \beta_j) E}`, resampled, and moved by a Metropolis
step that leaves :math:`\pi_j` invariant, its length fitted to the spread of the particles. Every
noisy point chooses its own :math:`\beta`, such that a stage halves the effective sample size;
what is left for the last stage becomes its weight. Each stage costs K energies of each noisy
point, and no gradients.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.estimators import PosteriorEstimate
from rsm_sampler.kernels import ReverseKernel, TruncatedReverseKernel, sigma_column

__all__ = ["annealed_estimate"]


@torch.no_grad()
def annealed_estimate(
    energy: Callable[..., Tensor],
    x_t: Float[Tensor, "n dim"],
    sigma: Float[Tensor, " n"],
    kernel: ReverseKernel | TruncatedReverseKernel,
    num_draws: int,
    *,
    stages: int,
    generator: torch.Generator | None = None,
) -> PosteriorEstimate:
    r"""Estimate of the denoiser :math:`D = \mathbb E[x_0 | x_t]` by sequential Monte Carlo.

    Arguments:
        energy: The energy of clean points, (n, K, dim) to (n, K); called ``stages + 1`` times.
        x_t: Noisy points, (n, dim).
        sigma: Their noise scales, (n), positive.
        kernel: Where the particles start: the reverse kernel, plain or within a box.
        num_draws: Particles K of each noisy point.
        stages: Resampling stages; with 0 it is
            :func:`~rsm_sampler.estimators.posterior_estimate`.
        generator: Source of randomness, on the device of x_t.

    Returns:
        The estimate. Its effective sample size is that of the last stage's weights.

    Raises:
        ValueError: If stages is negative or the kernel is another one.

    Note:
        This goes beyond the paper, whose candidates are independent (``stages`` = 0).

    References:
        | Sequential Monte Carlo samplers (Del Moral et al., 2006)
        | https://doi.org/10.1111/j.1467-9868.2006.00553.x

    Example:
        >>> def energy(x):  # a well of width 0.02, ten noise scales away
        ...     return ((x - 0.5) / 0.02).square().sum(-1) / 2
        >>> x_t, sigma = torch.zeros(4, 3), torch.full((4,), 0.5)
        >>> rng = torch.Generator().manual_seed(0)
        >>> estimate = annealed_estimate(
        ...     energy, x_t, sigma, ReverseKernel(), 64, stages=20, generator=rng
        ... )
        >>> bool((estimate.mean - 0.5).abs().max() < 0.02)
        True
    """
    if stages < 0:
        raise ValueError(f"stages must be at least 0, got {stages}")
    if isinstance(kernel, TruncatedReverseKernel):
        low, high = kernel.low, kernel.high
    elif isinstance(kernel, ReverseKernel):
        low, high = -math.inf, math.inf
    else:
        raise ValueError(
            "kernel must be a ReverseKernel or a TruncatedReverseKernel, "
            f"got {type(kernel).__name__}"
        )
    draws = kernel.draw(x_t, sigma, num_draws, generator=generator)
    x, constant = draws.x_0, draws.log_constant
    assert constant is not None
    value, variance = energy(x), sigma_column(sigma, x_t).square()
    beta = torch.zeros_like(value[:, :1])
    log_mean = constant.clone()
    for _ in range(stages):
        step = _next_step(value, 1 - beta)
        log_weight = -step * value
        log_mean += torch.logsumexp(log_weight, -1) - math.log(num_draws)
        weight = torch.softmax(log_weight, -1)
        beta = beta + step
        chosen = _systematic(weight, generator)
        x = x.gather(1, chosen.unsqueeze(-1).expand_as(x))
        value = value.gather(1, chosen)
        x, value = _move(energy, x, value, x_t, variance, beta, low, high, generator)
    log_weight = -(1 - beta) * value
    weight = torch.softmax(log_weight, -1)
    log_mean += torch.logsumexp(log_weight, -1) - math.log(num_draws)
    mean = (weight.unsqueeze(-1) * x).sum(1)
    entropy = -torch.xlogy(weight, weight).sum(-1)
    return PosteriorEstimate(mean, 1 / weight.square().sum(-1), log_mean, entropy)


def _next_step(value: Tensor, left: Tensor) -> Tensor:
    """The largest step of beta, at most what is left, that keeps half the sample size, (n, 1)."""
    shifted = value - value.amin(-1, keepdim=True)
    low, high = torch.zeros_like(left), left
    for _ in range(16):
        middle = 0.5 * (low + high)
        weight = torch.exp(-middle * shifted)
        ess = weight.sum(-1, keepdim=True).square() / weight.square().sum(-1, keepdim=True)
        enough = ess >= 0.5 * value.shape[-1]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    weight = torch.exp(-left * shifted)
    ess = weight.sum(-1, keepdim=True).square() / weight.square().sum(-1, keepdim=True)
    return torch.where(ess >= 0.5 * value.shape[-1], left, low)


def _systematic(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices of systematic resampling in each row, (n, K)."""
    n, k = weight.shape
    offset = torch.rand((n, 1), dtype=weight.dtype, device=weight.device, generator=generator)
    grid = (torch.arange(k, device=weight.device) + offset) / k
    cumulative = weight.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, grid).clamp(max=k - 1)


def _move(
    energy: Callable[..., Tensor],
    x: Tensor,
    value: Tensor,
    x_t: Tensor,
    variance: Tensor,
    beta: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A random-walk Metropolis step of all particles, as long as their spread allows."""
    dim = x.shape[-1]
    spread = x.std(1, keepdim=True) * (1.7 / math.sqrt(dim))
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    new = x + spread * noise
    inside = ((new >= low) & (new <= high)).all(-1)
    new_value = energy(torch.where(inside.unsqueeze(-1), new, x))
    centre, twice = x_t.unsqueeze(1), 2 * variance
    old_distance = (x - centre).square().sum(-1)
    new_distance = (new - centre).square().sum(-1)
    log_ratio = (old_distance - new_distance) / twice + beta * (value - new_value)
    u = torch.rand(value.shape, dtype=x.dtype, device=x.device, generator=generator)
    accept = inside & (u.log() < log_ratio)
    return (
        torch.where(accept.unsqueeze(-1), new, x),
        torch.where(accept, new_value, value),
    )
