r"""What K weighted clean candidates say about one noisy point.

A kernel (see :mod:`rsm_sampler.kernels`) gives candidates :math:`x_{0,k}` of a noisy point
:math:`x_t` with log-weights :math:`\log w_k = -E(x_{0,k}) + \text{correction}`. With
:math:`\bar w_k = w_k / \sum_j w_j`, they estimate

* the denoiser, in the *value form*
  :math:`D = \mathbb E[x_0 | x_t] \approx \sum_k \bar w_k x_{0,k}`, from energies alone;
* the denoiser again, in the *gradient form*
  :math:`D = x_t - \sigma^2\, \mathbb E[\nabla E(x_0) | x_t]
  \approx x_t - \sigma^2 \sum_k \bar w_k \nabla E(x_{0,k})`;
* the score, by Tweedie's formula :math:`\nabla \log p_t(x_t) = (D - x_t) / \sigma^2`;
* the density, :math:`\log p_t(x_t) + \log Z \approx \log \frac1K \sum_k w_k`.

The two forms have the same expectation: integrate
:math:`\int e^{-E(x_0)} \nabla_{x_t} \mathcal N(x_t; x_0, \sigma^2 I) dx_0` by parts. The value
form has little variance at high noise, the gradient form at low noise, and any affine mixture
:math:`(1 - c)\,\text{value} + c\,\text{gradient}` is valid too: their difference, whose
expectation is zero, is a control variate. Integration by parts leaves a term on the boundary of
a bounded support, which the gradient form does not know of; it is refused for kernels that are
bounded, and must not be used with energies that jump to :math:`+\infty`.

Self-normalised estimates have a bias of order 1/K; the effective sample size tells how far K is
from enough. Nothing here reads a value back from a device, except :func:`effective_sample_size`,
which checks its input.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.kernels import Kernel
from rsm_sampler.target.gradients import value_and_gradient
from rsm_sampler.transitions import sigma_column

__all__ = [
    "PosteriorEstimate",
    "ScoreEstimate",
    "TargetForm",
    "effective_sample_size",
    "normalise",
    "posterior_estimate",
    "posterior_mean",
    "score_estimate",
]

TargetForm = Literal["value", "gradient", "mixed"]


@dataclass(frozen=True)
class PosteriorEstimate:
    r"""Estimate of the clean point behind a noisy one.

    Attributes:
        mean: The denoiser :math:`D = \mathbb E[x_0 | x_t]`, with shape
            :math:`(*, \mathrm{dim})`. Where all draws have weight zero it is finite but
            meaningless.
        ess: Effective sample size, with shape :math:`(*)`, counted in draws; 0 where all draws
            have weight zero.
        log_mean_weight: :math:`\log \frac1K \sum_k w_k` with shape :math:`(*)`. With the kernels
            of this package and their constant it estimates :math:`\log p_t(x_t) + \log Z` in
            variance-exploding coordinates; add :math:`\frac{d}{2} \log(1 + \sigma^2)` for the
            paper's.
        entropy: Entropy of the normalised weights, with shape :math:`(*)`, in nats, at most
            :math:`\log K`; None where it was not computed.
    """

    mean: Float[Tensor, "*batch dim"]
    ess: Float[Tensor, "*batch"]
    log_mean_weight: Float[Tensor, "*batch"]
    entropy: Float[Tensor, "*batch"] | None = None


@dataclass(frozen=True)
class ScoreEstimate:
    r"""Estimate of the score at a noisy point.

    Attributes:
        score: :math:`\nabla \log p_t(x_t)`, with shape :math:`(*, \mathrm{dim})`.
        ess: As in :class:`PosteriorEstimate`.
        log_mean_weight: As in :class:`PosteriorEstimate`.
    """

    score: Float[Tensor, "*batch dim"]
    ess: Float[Tensor, "*batch"]
    log_mean_weight: Float[Tensor, "*batch"]


@checked
def effective_sample_size(log_weight: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    r"""Number of equally weighted samples that importance weights are worth.

    .. math:: \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2} \in [1, n]

    Arguments:
        log_weight: Log-weights, with shape :math:`(*, n)`, each row up to a constant.
            :math:`-\infty` is a sample of weight zero.

    Returns:
        The effective sample size, with shape :math:`(*)`, counted in samples.

    Raises:
        ValueError: If a row is empty, has a NaN or :math:`+\infty` weight, or only zero weights.

    References:
        | Monte Carlo theory, methods and examples, chapter 9 (Owen, 2013)
        | https://artowen.su.domains/mc

    Example:
        >>> effective_sample_size(torch.zeros(4))
        tensor(4.)
    """
    if log_weight.ndim == 0 or log_weight.shape[-1] == 0:
        raise ValueError(
            f"log_weight must have a weight in every row, got shape {tuple(log_weight.shape)}"
        )
    bad = (log_weight.isnan() | (log_weight == math.inf)).any(-1)
    if bool(bad.any()):
        raise ValueError(
            "log_weight must have no NaN or +inf, "
            f"got {int(bad.sum())} rows of {bad.numel()} with one"
        )
    ess = _summarise(log_weight).ess
    dead = ess == 0
    if bool(dead.any()):
        raise ValueError(
            "log_weight must have a weight above zero in every row, "
            f"got {int(dead.sum())} rows of {dead.numel()} without one"
        )
    return ess


@checked
def normalise(log_weight: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    r"""Weights that sum to one, :math:`\bar w_k = w_k / \sum_j w_j`.

    Arguments:
        log_weight: Log-weights, with shape :math:`(*, n)`, each row up to a constant.
            :math:`-\infty` is a weight of zero.

    Returns:
        The weights, with the same shape. A row of zero weights alone stays zero; one with NaN or
        :math:`+\infty` becomes NaN.

    Example:
        >>> normalise(torch.tensor([0.0, 0.0, -math.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    return _summarise(log_weight).weight


@checked
def posterior_mean(
    x_0: Float[Tensor, "*batch draws dim"],
    log_weight: Float[Tensor, "*batch draws"],
    log_constant: Float[Tensor, "*batch"] | None = None,
) -> PosteriorEstimate:
    r"""Self-normalised mean of weighted candidates, :math:`\sum_k \bar w_k x_{0,k}`.

    Arguments:
        x_0: Candidates, with shape :math:`(*, K, \mathrm{dim})`; an expanded view is not copied.
        log_weight: Log-weights, with shape :math:`(*, K)`, each row up to a constant.
            :math:`-\infty` is a candidate of weight zero.
        log_constant: That constant, with shape :math:`(*)`; zero if None. It enters
            ``log_mean_weight`` alone.

    Returns:
        The estimate. Rows of zero weights alone have mean 0, effective sample size 0 and log mean
        weight :math:`-\infty`.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Equation (25), whose factor :math:`\bar\alpha_t^{-d/2}` is 1 in these
        coordinates

    Example:
        >>> estimate = posterior_mean(torch.tensor([[0.0], [3.0]]), torch.tensor([2.0, 1.0]).log())
        >>> estimate.mean, estimate.ess
        (tensor([1.]), tensor(1.8000))
    """
    if x_0.shape[:-1] != log_weight.shape:
        raise ValueError(
            f"log_weight must have shape {tuple(x_0.shape[:-1])}, one for each x_0, "
            f"got {tuple(log_weight.shape)}"
        )
    weights = _summarise(log_weight, log_constant)
    entropy = -torch.xlogy(weights.weight, weights.weight).sum(-1)
    mean = _weighted_sum(weights.weight, x_0)
    return PosteriorEstimate(mean, weights.ess, weights.log_mean, entropy)


@checked
def posterior_estimate(
    energy: Callable[..., Tensor] | None,
    x_t: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    kernel: Kernel,
    num_draws: int,
    *,
    context: Float[Tensor, "*batch context_dim"] | None = None,
    target: TargetForm = "value",
    coefficient: Float[Tensor, "*#batch"] | float | None = None,
    generator: torch.Generator | None = None,
) -> PosteriorEstimate:
    r"""Estimate of the denoiser :math:`D = \mathbb E[x_0 | x_t]` from K candidates each.

    Arguments:
        energy: The energy :math:`E(x_0)`, or :math:`E(x_0, c)` if a context is given, called
            once with all candidates, :math:`(*, K, \mathrm{dim})`, and the context expanded to
            :math:`(*, K, \mathrm{context\_dim})`; it returns :math:`(*, K)`. :math:`+\infty` is
            weight zero. None for kernels that need no energy.
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, positive, broadcastable to :math:`(*)`.
        kernel: Where the candidates come from.
        num_draws: The number K of candidates of each noisy point.
        context: Conditions c, with shape :math:`(*, \mathrm{context\_dim})`.
        target: ``"value"`` needs energies only; ``"gradient"`` and ``"mixed"`` need an energy
            that autograd can differentiate, on an unbounded support.
        coefficient: The share c of the gradient form in the mixed one; may lie outside of [0,
            1]. If None, the one that minimises the estimated variance, for each noisy point from
            its own draws.
        generator: Source of randomness, on the device of x_t.

    Returns:
        The estimate, without gradient.

    Raises:
        ValueError: If the target is unknown or does not suit the kernel, an energy is missing or
            superfluous, it returns another shape, or it cannot be differentiated where its
            gradient is wanted.

    Note:
        The value form alone is the method of the paper. An estimated coefficient is a function
        of the same draws as the estimate it multiplies, which adds a bias of order 1/K, on top
        of that of self-normalisation, which is of the same order.

    References:
        Equations (14), (15) and (23)

    Example:
        >>> from rsm_sampler.kernels import ReverseKernel
        >>> def energy(x_0):
        ...     return x_0.square().sum(-1) / 2
        >>> x_t, rng = torch.tensor([[2.0, 0.0]]), torch.Generator().manual_seed(0)
        >>> estimate = posterior_estimate(energy, x_t, 1.0, ReverseKernel(), 10_000, generator=rng)
        >>> bool((estimate.mean - torch.tensor([[1.0, 0.0]])).abs().max() < 0.1)
        True
    """
    shift, weights = _displacement(
        energy, x_t, sigma, kernel, num_draws, context, target, coefficient, generator
    )
    entropy = -torch.xlogy(weights.weight, weights.weight).sum(-1)
    return PosteriorEstimate(x_t.detach() + shift, weights.ess, weights.log_mean, entropy)


@checked
def score_estimate(
    energy: Callable[..., Tensor] | None,
    x_t: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    kernel: Kernel,
    num_draws: int,
    *,
    context: Float[Tensor, "*batch context_dim"] | None = None,
    target: TargetForm = "value",
    coefficient: Float[Tensor, "*#batch"] | float | None = None,
    generator: torch.Generator | None = None,
) -> ScoreEstimate:
    r"""Estimate of the score :math:`\nabla \log p_t(x_t) = (D - x_t) / \sigma^2`.

    The displacement :math:`D - x_t` is estimated itself, not as a difference, so that the
    gradient form is precise at small noise. Arguments and errors are those of
    :func:`posterior_estimate`.

    Arguments:
        energy: The energy, see :func:`posterior_estimate`.
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, positive, broadcastable to :math:`(*)`.
        kernel: Where the candidates come from.
        num_draws: The number K of candidates of each noisy point.
        context: Conditions, with shape :math:`(*, \mathrm{context\_dim})`.
        target: ``"value"``, ``"gradient"`` or ``"mixed"``.
        coefficient: The share of the gradient form in the mixed one; estimated if None.
        generator: Source of randomness, on the device of x_t.

    Returns:
        The estimate, without gradient. The score of the paper's variable is
        :math:`\sqrt{1 + \sigma^2}` times this one.

    Raises:
        ValueError: As :func:`posterior_estimate`.

    References:
        Equation (20)

    Example:
        >>> from rsm_sampler.kernels import ReverseKernel
        >>> def energy(x_0):
        ...     return 3.0 * x_0.sum(-1)
        >>> x_t = torch.zeros(2)
        >>> score_estimate(energy, x_t, 0.1, ReverseKernel(), 8, target="gradient").score
        tensor([-3.0000, -3.0000])
    """
    shift, weights = _displacement(
        energy, x_t, sigma, kernel, num_draws, context, target, coefficient, generator
    )
    score = shift / sigma_column(sigma, x_t).square()
    return ScoreEstimate(score, weights.ess, weights.log_mean)


@dataclass(frozen=True)
class _Weights:
    """Normalised weights (*batch, K), effective sample size and log mean weight (*batch)."""

    weight: Tensor
    ess: Tensor
    log_mean: Tensor


def _summarise(log_weight: Tensor, log_constant: Tensor | None = None) -> _Weights:
    largest = log_weight.amax(-1, keepdim=True)
    # A row of zero weights alone: shift by 0, and every weight stays exactly 0.
    largest = torch.where(largest == -math.inf, torch.zeros_like(largest), largest)
    weight = torch.exp(log_weight - largest)
    total = weight.sum(-1, keepdim=True)
    log_mean = (largest + total.log()).squeeze(-1) - math.log(log_weight.shape[-1])
    if log_constant is not None:
        log_mean = log_mean + log_constant
    # The largest weight is 1, so neither sum is below 1 unless all weights are zero.
    ess = total.squeeze(-1).square() / weight.square().sum(-1).clamp(min=1.0)
    return _Weights(weight / total.clamp(min=1.0), ess, log_mean)


def _weighted_sum(weight: Tensor, x: Tensor) -> Tensor:
    """Sum over the draws of weight (*batch, K) times x (*batch, K, dim)."""
    batch = x.shape[:-2]
    if all(stride == 0 or size == 1 for stride, size in zip(x.stride(), batch, strict=False)):
        return weight @ x[(0,) * len(batch)]  # candidates shared by the batch: one matrix product
    return torch.matmul(weight.unsqueeze(-2), x).squeeze(-2)


def _displacement(
    energy: Callable[..., Tensor] | None,
    x_t: Tensor,
    sigma: Tensor | float,
    kernel: Kernel,
    num_draws: int,
    context: Tensor | None,
    target: TargetForm,
    coefficient: Tensor | float | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, _Weights]:
    """Estimate of D - x_t, with the weights behind it."""
    if target not in get_args(TargetForm):
        raise ValueError(f"target must be one of {get_args(TargetForm)}, got {target!r}")
    if target != "value" and (kernel.bounded or not kernel.needs_energy):
        raise ValueError(
            f"target must be 'value' for {type(kernel).__name__}, got {target!r}: "
            + ("it leaves out the boundary" if kernel.bounded else "it calls no energy")
        )
    if kernel.needs_energy == (energy is None):
        rule = "given" if kernel.needs_energy else "None"
        raise ValueError(f"energy must be {rule} for {type(kernel).__name__}, got {energy!r}")
    if coefficient is not None and target != "mixed":
        raise ValueError(f"coefficient must be None unless target is 'mixed', got {coefficient}")

    x_t = x_t.detach()
    draws = kernel.draw(x_t, sigma, num_draws, generator=generator)
    if energy is None:
        weights = _summarise(draws.log_correction, draws.log_constant)
        return _weighted_sum(weights.weight, draws.x_0) - x_t, weights

    value, gradient = _evaluate(energy, draws.x_0, context, with_gradient=target != "value")
    weights = _summarise(draws.log_correction - value, draws.log_constant)
    if gradient is None:
        return _weighted_sum(weights.weight, draws.x_0) - x_t, weights
    # Where the weight is zero the gradient may be NaN, beyond an infinite energy for one.
    gradient = torch.where(
        (weights.weight > 0).unsqueeze(-1), gradient, torch.zeros_like(gradient)
    )
    step = sigma_column(sigma, x_t).square().unsqueeze(-2) * -gradient
    by_gradient = _weighted_sum(weights.weight, step)
    if target == "gradient":
        return by_gradient, weights
    offset = draws.x_0 - x_t.unsqueeze(-2)
    by_value = _weighted_sum(weights.weight, offset)
    if coefficient is None:
        column = _optimal_coefficient(weights.weight, offset, step, by_value, by_gradient)
        column = column.unsqueeze(-1)
    elif isinstance(coefficient, Tensor):
        column = coefficient.to(x_t).unsqueeze(-1)
    else:
        column = torch.full((1,), coefficient, dtype=x_t.dtype, device=x_t.device)
    return torch.lerp(by_value, by_gradient, column), weights


def _optimal_coefficient(
    weight: Tensor, value: Tensor, gradient: Tensor, by_value: Tensor, by_gradient: Tensor
) -> Tensor:
    r"""Share c of the gradient form with the least variance, (*batch).

    To first order in 1/K the variance of a self-normalised mean of the vectors :math:`u_k` is
    :math:`\sum_k \bar w_k^2 \|u_k - \bar u\|^2`. With :math:`u = v + c\,(g - v)`, all centred, the
    minimum is at
    :math:`c = \sum_k \bar w_k^2\, v_k \cdot (v_k - g_k) / \sum_k \bar w_k^2 \|v_k - g_k\|^2`.

    By this c the value form moves by :math:`c\,(\bar g - \bar v)`, in expectation zero. Where few
    draws carry the weight, the variances are underestimated and the move can be far too long: it
    is cut where :math:`\|\bar g - \bar v\|` is more than five of its own standard errors, which
    limits the move to five standard errors of the value form. A single draw keeps the value form.
    """
    value = value - by_value.unsqueeze(-2)
    difference = value - (gradient - by_gradient.unsqueeze(-2))
    square = weight.square()
    covariance = (square * (value * difference).sum(-1)).sum(-1)
    variance = (square * difference.square().sum(-1)).sum(-1)
    move = (by_gradient - by_value).square().sum(-1)
    shorten = (25 * variance / move).sqrt().clamp(max=1.0)
    defined = (variance > 0) & (move > 0)
    return torch.where(defined, covariance / variance * shorten, torch.zeros_like(move))


def _evaluate(
    energy: Callable[..., Tensor], x_0: Tensor, context: Tensor | None, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Energy of the candidates (*batch, K) and its gradient (*batch, K, dim), in one call."""
    arguments: tuple[Tensor, ...] = ()
    if context is not None:
        arguments = (context.unsqueeze(-2).expand(*x_0.shape[:-1], context.shape[-1]),)
    gradient = None
    if with_gradient:
        value, gradient = value_and_gradient(lambda x: energy(x, *arguments), x_0)
    else:
        with torch.no_grad():
            value = energy(x_0, *arguments)
    if value.shape != x_0.shape[:-1]:
        raise ValueError(
            f"energy must return one value per point, shape {tuple(x_0.shape[:-1])}, "
            f"got {tuple(value.shape)}"
        )
    return value.to(x_0.dtype), gradient
