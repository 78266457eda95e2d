r"""Clean candidates that walk towards the posterior, where K independent ones would miss it.

The K draws of a reverse kernel are weighted by :math:`e^{-E}` in one go, and K weights cannot
tell apart more than :math:`\log K` nats: in six dimensions a well of width 0.1 within reach
of a noise of 0.5 is hit by one draw in ten thousand. Sequential Monte Carlo divides the way. The
particles follow

.. math:: \pi_j(x_0) \propto \phi(x_0 | x_t)\, e^{-\beta_j E(x_0)}, \qquad
          0 = \beta_0 < \dots < \beta_J = 1,

each stage weighted by :math:`e^{-(\beta_{j+1} - \beta_j) E}`, resampled, and moved by Metropolis
steps that leave :math:`\pi_j` invariant. Every noisy point chooses its own :math:`\beta`, such
that a stage halves the effective sample size; what is left for the last stage becomes its weight.
A stage costs K energies of each noisy point in each of its moves, and no gradients.

**Moves** are differential evolution: one half of the particles steps by multiples of differences
between two of the other half, then the other way round. Two particles of one well differ by as
much as the well is wide, however far away the next one is, and the difference between two wells
leads from one to the other.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.box_kernel import TruncatedReverseKernel
from rsm_sampler.checked import checked
from rsm_sampler.estimators import PosteriorEstimate, posterior_mean
from rsm_sampler.kernels import ReverseKernel
from rsm_sampler.transitions import sigma_column

__all__ = ["annealed_estimate"]


@checked(skip=("kernel",))
@torch.no_grad()
def annealed_estimate(
    energy: Callable[..., Tensor],
    x_t: Float[Tensor, "n dim"],
    sigma: Float[Tensor, " n"],
    kernel: ReverseKernel | TruncatedReverseKernel,
    num_draws: int,
    *,
    stages: int,
    moves: int = 1,
    generator: torch.Generator | None = None,
) -> PosteriorEstimate:
    r"""Estimate of the denoiser :math:`D = \mathbb E[x_0 | x_t]` by sequential Monte Carlo.

    Arguments:
        energy: The energy of clean points, (n, K, dim) to (n, K), where :math:`+\infty` is
            weight zero. It is called once with all, and then ``stages * moves`` times with each
            half of them.
        x_t: Noisy points, (n, dim).
        sigma: Their noise scales, (n), positive.
        kernel: Where the particles start: the reverse kernel, plain or within a box.
        num_draws: Particles K of each noisy point, at least 4 with stages.
        stages: Resampling stages; with 0 it is
            :func:`~rsm_sampler.estimators.posterior_estimate`.
        moves: Metropolis steps of each particle in a stage.
        generator: Source of randomness, on the device of x_t.

    Returns:
        The estimate. Its effective sample size is that of the last stage's weights.

    Raises:
        ValueError: If a number is too small or the kernel is another one.

    Note:
        This goes beyond the paper, whose candidates are independent (``stages`` = 0).

    References:
        | Sequential Monte Carlo samplers (Del Moral et al., 2006)
        | https://doi.org/10.1111/j.1467-9868.2006.00553.x
        | A Markov chain Monte Carlo version of differential evolution (ter Braak, 2006)
        | https://doi.org/10.1007/s11222-006-8769-1

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
    if moves < 1:
        raise ValueError(f"moves must be at least 1, got {moves}")
    if stages > 0 and num_draws < 4:
        raise ValueError(f"num_draws must be at least 4 with stages, got {num_draws}")
    if isinstance(kernel, TruncatedReverseKernel):
        low, high = (
            edge.to(x_t) if isinstance(edge, Tensor) else edge
            for edge in (kernel.low, kernel.high)
        )
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

    def log_weights(step: Tensor) -> Tensor:
        return torch.where(value == math.inf, -math.inf, -step * value)

    def log_density(x: Tensor, value: Tensor) -> Tensor:
        inside = ((x >= low) & (x <= high)).all(-1)
        kernel_part = (x - x_t.unsqueeze(1)).square().sum(-1) / (2 * variance)
        return torch.where(inside, -kernel_part - beta * value, -math.inf)

    for _ in range(stages):
        step = _next_step(value, 1 - beta)
        log_weight = log_weights(step)
        log_mean += torch.logsumexp(log_weight, -1) - math.log(num_draws)
        chosen = _systematic(torch.softmax(log_weight, -1), generator)
        beta = beta + step
        x = x.gather(1, chosen.unsqueeze(-1).expand_as(x))
        value = value.gather(1, chosen)
        for _ in range(moves):
            for half in (0, 1):
                old, other = x[:, half::2], x[:, 1 - half :: 2]
                new = _proposed(old, other, generator)
                new_value = energy(torch.where((new >= low) & (new <= high), new, old))
                log_ratio = log_density(new, new_value) - log_density(old, value[:, half::2])
                u = torch.rand(
                    log_ratio.shape, dtype=x.dtype, device=x.device, generator=generator
                )
                accept = u.log() < log_ratio
                x[:, half::2] = torch.where(accept.unsqueeze(-1), new, old)
                value[:, half::2] = torch.where(accept, new_value, value[:, half::2])
    return posterior_mean(x, log_weights(1 - beta), log_mean)


def _next_step(value: Tensor, left: Tensor) -> Tensor:
    """The step of beta that halves the sample size, or what is left if that is less, (n, 1).

    It is found within a tenth, from a millionth of what is left on.
    """
    shifted = value.amin(-1, keepdim=True) - value

    def enough(step: Tensor) -> Tensor:
        weight = torch.exp(step * shifted)
        return weight.sum(-1, keepdim=True).square() >= 0.5 * value.shape[-1] * (
            weight.square().sum(-1, keepdim=True)
        )

    low, width = torch.full_like(left, -20.0), 20.0  # log2 of the share of what is left
    for _ in range(7):
        width *= 0.5
        low = torch.where(enough(left * torch.exp2(low + width)), low + width, low)
    return torch.where(enough(left), left, left * torch.exp2(low))


def _systematic(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices of systematic resampling in each row, (n, K)."""
    n, k = weight.shape
    offset = torch.rand((n, 1), dtype=weight.dtype, device=weight.device, generator=generator)
    grid = (torch.arange(k, device=weight.device) + offset) / k
    cumulative = weight.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, grid).clamp(max=k - 1)


def _proposed(x: Tensor, other: Tensor, generator: torch.Generator | None) -> Tensor:
    """Particles moved along differences of others, (n, k, dim)."""
    n, k, dim = x.shape
    m = other.shape[1]
    first = torch.randint(m, (n, k), device=x.device, generator=generator)
    second = torch.randint(m - 1, (n, k), device=x.device, generator=generator)
    second = second + (second >= first)
    pick = [i.unsqueeze(-1).expand_as(x) for i in (first, second)]
    difference = other.gather(1, pick[0]) - other.gather(1, pick[1])
    # A jump from well to well now and then; else around the best length for a normal law, along
    # the difference or, since a few particles span few directions, anywhere.
    u = torch.rand((n, k, 1), dtype=x.dtype, device=x.device, generator=generator)
    length = torch.where(u < 0.1, 1.0, 2.38 / math.sqrt(2 * dim) * (0.45 + u))
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    size = difference.square().sum(-1, keepdim=True).div_(dim).sqrt()
    return x + length * torch.where((u > 0.1) & (u < 0.5), size * noise, difference)
