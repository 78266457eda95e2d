r"""The reweighted score matching losses, for denoisers.

For every weight function :math:`g > 0` of the noisy point the loss

.. math:: \mathcal L^g = \int g(x_t)\, \| s_\theta(x_t) - \nabla \log p_t(x_t) \|^2 dx_t
          \qquad (12)

has the same minimiser. Three choices of g turn it into an expectation that can be sampled:

* :func:`denoising_loss` (9): :math:`g = p_t`, from samples of the target;
* :func:`mirror_descent_loss` (13): :math:`g = Z p_t`, from samples of another law with
  importance weights;
* :func:`reverse_sampling_loss` (14): :math:`g = h_t`, any law of noisy points, from the energy
  alone.

The network is a *denoiser* :math:`D_\theta \approx \mathbb E[x_0 | x_t]` in variance-exploding
coordinates. With Tweedie's formula :math:`s = (D - x_t) / \sigma^2` the losses are weighted
squared errors of D,

.. math:: \ell = \lambda(\sigma)\, \| D_\theta(x_t, \sigma) - \text{target} \|^2,

and :math:`\lambda` is part of g: :func:`score_weight` for the score loss itself,
:func:`noise_weight` for the mean squared error on the noise (7), :func:`edm_weight`, the
default, for errors in units of a preconditioned network's output.

**One network call per noisy point.** With K weighted candidates (14) asks for
:math:`\sum_k \bar w_k \|D_\theta - x_{0,k}\|^2`. That is
:math:`\|D_\theta - \sum_k \bar w_k x_{0,k}\|^2` plus a term without :math:`\theta`: the
gradients are the same, so the candidates are averaged first and the network runs once, not K
times.

All functions return one value per sample; take the mean for a training step.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.estimators import PosteriorEstimate, TargetForm, normalise, posterior_estimate
from rsm_sampler.kernels import Kernel
from rsm_sampler.transitions import forward_kernel, sigma_column

__all__ = [
    "LossWeight",
    "denoising_loss",
    "edm_weight",
    "estimate_loss",
    "mirror_descent_loss",
    "noise_weight",
    "reverse_sampling_loss",
    "score_weight",
]

_DIFFERENCE = 0.1  # of a step: how far the denoiser's derivative looks
_NEIGHBOURS = 8  # rows on either side that tell a row its share of the Jacobian

LossWeight = Callable[[Tensor], Tensor] | Tensor | float | None
"""A function of sigma, values that broadcast to the batch, a number; None: :func:`edm_weight`."""


@checked
def edm_weight(sigma: Float[Tensor, "*batch"], sigma_data: float = 1.0) -> Float[Tensor, "*batch"]:
    r"""Weight that measures errors in units of a preconditioned network's output.

    .. math:: \lambda(\sigma) = \frac{\sigma^2 + \sigma_d^2}{(\sigma\, \sigma_d)^2}
              = \frac{1}{\sigma_d^2} + \frac{1}{\sigma^2}

    Arguments:
        sigma: Noise scales, positive, of any shape.
        sigma_data: Standard deviation :math:`\sigma_d` of the target, per coordinate, in units
            of x.

    Returns:
        The weight, with the shape of sigma, in units of :math:`x^{-2}`.

    References:
        | Elucidating the design space of diffusion-based generative models
        | (Karras et al., 2022), table 1
        | https://arxiv.org/abs/2206.00364

    Example:
        >>> edm_weight(torch.tensor([0.5, 1e4]), sigma_data=2.0)
        tensor([4.2500, 0.2500])
    """
    return 1 / sigma_data**2 + sigma.square().reciprocal()


@checked
def noise_weight(sigma: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Weight :math:`1/\sigma^2`, for the squared error of the predicted noise, (7).

    Arguments:
        sigma: Noise scales, positive, of any shape.

    Returns:
        The weight, with the shape of sigma.

    Example:
        >>> noise_weight(torch.tensor([0.5]))
        tensor([4.])
    """
    return sigma.square().reciprocal()


@checked
def score_weight(sigma: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Weight :math:`1/\sigma^4`, for the squared error of the score, (9).

    Arguments:
        sigma: Noise scales, positive, of any shape.

    Returns:
        The weight, with the shape of sigma.

    Example:
        >>> score_weight(torch.tensor([0.5]))
        tensor([16.])
    """
    return sigma.square().reciprocal().square()


@checked
def denoising_loss(
    denoiser: Callable[..., Tensor],
    x_0: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    *,
    gradient: Float[Tensor, "*batch dim"] | None = None,
    stiffness: Float[Tensor, "*#batch dim"] | None = None,
    jacobian_rows: int = 0,
    context: Float[Tensor, "*batch context_dim"] | None = None,
    loss_weight: LossWeight = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Denoising score matching on samples of the target, helped by gradients of its energy.

    .. math:: \ell = \lambda(\sigma)\, \| D_\theta(x_0 + \sigma \epsilon, \sigma) - y \|^2

    Without gradients :math:`y = x_0`. With :math:`g = \nabla E(x_0)` the difference
    :math:`\delta = \sigma \epsilon - \sigma^2 g` has mean zero given :math:`x_t`, so

    .. math:: y_i = x_{0,i} + \frac{\delta_i}{1 + \sigma^2 s_i}, \qquad s_i = \mathbb E\, g_i^2,

    has the same mean, and of all factors before :math:`\delta_i` this one makes its variance the
    least: :math:`-\mathbb E[x_{0,i} \delta_i] / \mathbb E \delta_i^2`, by the virial theorem
    :math:`\mathbb E[x_{0,i}\, g_i] = 1`. For a normal law nothing is left of the variance.

    The factor may be any matrix that depends on :math:`x_t` alone. Where the posterior of
    :math:`x_0` is nearly normal, its covariance is :math:`\sigma^2 J` with the Jacobian
    :math:`J = \partial D / \partial x_t` (Tweedie's formula in second order), and J is the best
    factor: it knows stiff directions from soft ones, wherever they point. The first rows take

    .. math:: y = x_0 + (1 - a)\, \frac{\delta}{1 + \sigma^2 s} + a\, J \delta

    with the :math:`a \in [0, 1]` of least variance, estimated from neighbouring rows and never
    from a row's own draws, so that the mean stays. Under Lennard-Jones particles 3 to 13 times
    less of the variance is left where noise is below the width of a bond.

    Arguments:
        denoiser: The function :math:`D_\theta(x_t, \sigma)`, or :math:`D_\theta(x_t, \sigma, c)`
            if a context is given; called once with a gradient, with sigma of the batch shape.
        x_0: Samples, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, positive, broadcastable to :math:`(*)`.
        gradient: Gradients of the energy at the samples, with the shape of x_0. The energy must
            be smooth on all of space: not for hard walls, where a boundary term is missing.
        stiffness: The mean squares s of the gradients, broadcastable to the shape of x_0.
            :math:`+\infty` where there is no gradient.
        jacobian_rows: Number of rows, along the first axis of the batch, whose target has the
            Jacobian. Rows must be ordered by noise. Costs two more network calls for them,
            without a gradient.
        context: Conditions c, with shape :math:`(*, \mathrm{context\_dim})`.
        loss_weight: The weight :math:`\lambda`, a function of sigma or values that broadcast to
            :math:`(*)`. If None, :func:`edm_weight` with the denoiser's ``sigma_data`` (1 if it
            has none).
        generator: Source of randomness, on the device of x_0.

    Returns:
        The loss of each sample, with shape :math:`(*)`; the squared norm sums over the
        coordinates.

    Raises:
        ValueError: If one of gradient and stiffness is given without the other, or
            jacobian_rows without them.

    Note:
        :math:`J \delta` is a central difference of step :math:`0.1\, \delta`. The mean of the
        target moves by its error, a six hundredth of the denoiser's third derivative along
        :math:`\delta`.

    References:
        Equation (9)

        | Target score matching (De Bortoli et al., 2024), for g
        | https://arxiv.org/abs/2402.08667

    Example:
        >>> denoising_loss(lambda x_t, sigma: x_t, torch.zeros(3, 2), 1.0).shape
        torch.Size([3])
    """
    if (gradient is None) != (stiffness is None):
        raise ValueError(
            "gradient and stiffness must be given together, got "
            f"{'no ' if gradient is None else ''}gradient and "
            f"{'no ' if stiffness is None else ''}stiffness"
        )
    if jacobian_rows and gradient is None:
        raise ValueError(f"jacobian_rows must be 0 without a gradient, got {jacobian_rows}")
    x_t = forward_kernel(x_0, sigma, generator=generator)
    sigma = sigma_column(sigma, x_0).squeeze(-1).expand(x_0.shape[:-1])
    denoised = _denoised(denoiser, x_t, sigma, context)
    target = x_0
    if gradient is not None and stiffness is not None:
        square = sigma.unsqueeze(-1).square()
        known = torch.as_tensor(stiffness).isfinite()
        delta = torch.where(known, x_t - x_0 - square * gradient, 0)
        step = delta / (1 + square * stiffness)
        target = x_0 + step
        if jacobian_rows:
            rows = slice(jacobian_rows)
            along = _along(
                denoiser,
                x_t[rows],
                delta[rows],
                sigma[rows],
                None if context is None else context[rows],
            )
            more = along - step[rows]
            share = _share(denoised.detach()[rows] - target[rows], more, sigma[rows])
            target = torch.cat([target[rows] + share * more, target[jacobian_rows:]])
    return _weighted_error(denoiser, denoised, sigma, target, loss_weight)


@torch.no_grad()
def _along(
    denoiser: Callable[..., Tensor],
    x_t: Tensor,
    delta: Tensor,
    sigma: Tensor,
    context: Tensor | None,
) -> Tensor:
    """The denoiser's derivative along delta, with the shape of x_t."""
    pair = torch.cat([x_t + _DIFFERENCE * delta, x_t - _DIFFERENCE * delta])
    twice = None if context is None else torch.cat([context, context])
    up, down = _denoised(denoiser, pair, torch.cat([sigma, sigma]), twice).chunk(2)
    return (up - down) / (2 * _DIFFERENCE)


def _share(error: Tensor, more: Tensor, sigma: Tensor) -> Tensor:
    r"""Factors a that make :math:`\|error - a\, more\|^2` least, from other rows of like noise."""
    unit = sigma.unsqueeze(-1).square()
    rows = torch.stack([error * more / unit, more.square() / unit]).flatten(2).sum(-1)
    total = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))
    index = torch.arange(rows.shape[-1], device=rows.device)
    high = (index + _NEIGHBOURS + 1).clamp(max=len(index))
    low = (index - _NEIGHBOURS).clamp(min=0)
    product, square = total[:, high] - total[:, low] - rows
    share = (product / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(0, 1)
    return share.view(-1, *[1] * (error.dim() - 1))


@checked
def mirror_descent_loss(
    denoiser: Callable[..., Tensor],
    x_0: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    log_weight: Float[Tensor, "*batch"],
    *,
    self_normalised: bool = True,
    context: Float[Tensor, "*batch context_dim"] | None = None,
    loss_weight: LossWeight = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Denoising score matching on weighted samples.

    .. math:: \ell = w(x_0)\, \lambda(\sigma)\,
              \| D_\theta(x_0 + \sigma \epsilon, \sigma) - x_0 \|^2

    Samples of a law :math:`\pi_{\rm old}` with :math:`w = e^{Q/\lambda}` train towards
    :math:`\pi_{\rm old}\, e^{Q/\lambda}`; samples of any known density :math:`\pi` with
    :math:`w = e^{-E} / \pi` towards :math:`e^{-E}`.

    Arguments:
        denoiser: As in :func:`denoising_loss`.
        x_0: Samples, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, positive, broadcastable to :math:`(*)`.
        log_weight: Importance log-weights, with shape :math:`(*)`. :math:`-\infty` is a sample
            of weight zero.
        self_normalised: Whether to divide the weights by their mean over the batch, so that a
            constant in ``log_weight`` does not matter. If not, they are taken as they are.
        context: Conditions, with shape :math:`(*, \mathrm{context\_dim})`.
        loss_weight: As in :func:`denoising_loss`.
        generator: Source of randomness, on the device of x_0.

    Returns:
        The loss of each sample, with shape :math:`(*)`; zero where the weight is, and everywhere
        if all weights of a self-normalised batch are.

    Raises:
        ValueError: If log_weight has another shape than the batch.

    Note:
        The mean over a finite batch is itself random: self-normalisation has a bias of order 1/n.

    References:
        Equation (13)

    Example:
        >>> log_weight = torch.tensor([0.0, 0.0, -float("inf")])
        >>> mirror_descent_loss(lambda x_t, sigma: x_t - x_t, torch.ones(3, 2), 1.0, log_weight)
        tensor([6., 6., 0.])
    """
    if log_weight.shape != x_0.shape[:-1]:
        raise ValueError(
            f"log_weight must have the batch shape {tuple(x_0.shape[:-1])}, "
            f"got {tuple(log_weight.shape)}"
        )
    log_weight = log_weight.detach()
    if self_normalised:
        weight = normalise(log_weight.reshape(-1)).reshape(log_weight.shape) * log_weight.numel()
    else:
        weight = log_weight.exp()
    loss = denoising_loss(
        denoiser, x_0, sigma, context=context, loss_weight=loss_weight, generator=generator
    )
    return weight.to(loss.dtype) * loss


@checked
def reverse_sampling_loss(
    denoiser: Callable[..., Tensor],
    energy: Callable[..., Tensor] | None,
    x_t: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    kernel: Kernel,
    num_draws: int,
    *,
    context: Float[Tensor, "*batch context_dim"] | None = None,
    target: TargetForm = "value",
    coefficient: Float[Tensor, "*#batch"] | float | None = None,
    loss_weight: LossWeight = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Reverse sampling score matching, from energies alone.

    .. math:: \ell = \lambda(\sigma)\, \Big\| D_\theta(x_t, \sigma)
              - \sum_{k=1}^K \bar w_k\, x_{0,k} \Big\|^2, \qquad
              \bar w_k \propto e^{-E(x_{0,k})}\, \frac{\phi(x_{0,k} | x_t)}{r(x_{0,k} | x_t)}

    Equal to :func:`posterior_estimate` followed by :func:`estimate_loss`; call those to see the
    effective sample size as well.

    Arguments:
        denoiser: As in :func:`denoising_loss`; called once per noisy point, not once per
            candidate.
        energy: The energy of clean points, called once with all candidates; see
            :func:`~rsm_sampler.estimators.posterior_estimate`. None for kernels that need no
            energy.
        x_t: Noisy points from any law :math:`h_t`, with shape :math:`(*, \mathrm{dim})`; see
            :mod:`rsm_sampler.proposals`.
        sigma: Noise scales, positive, broadcastable to :math:`(*)`.
        kernel: Where the clean candidates come from.
        num_draws: The number K of candidates of each noisy point.
        context: Conditions, with shape :math:`(*, \mathrm{context\_dim})`, for energy and
            denoiser.
        target: ``"value"``, ``"gradient"`` or ``"mixed"`` target, see
            :func:`~rsm_sampler.estimators.posterior_estimate`.
        coefficient: The share of the gradient form in the mixed target; estimated if None.
        loss_weight: As in :func:`denoising_loss`; values that depend on x_t are the family's
            weight g.
        generator: Source of randomness, on the device of x_t.

    Returns:
        The loss of each noisy point, with shape :math:`(*)`. It is exactly 0, with gradient 0,
        where all K candidates have weight zero.

    Raises:
        ValueError: As :func:`~rsm_sampler.estimators.posterior_estimate`.

    Note:
        The weights are self-normalised for each noisy point, which removes :math:`Z p_t` from
        the weight function of (14): its minimiser is the same.

    References:
        Equations (14) and (15), and the logsumexp weights of Algorithm 2

    Example:
        >>> from rsm_sampler.kernels import ReverseKernel
        >>> def energy(x_0):
        ...     return x_0.square().sum(-1) / 2
        >>> def exact(x_t, sigma):
        ...     return x_t / (1 + sigma.square()).unsqueeze(-1)
        >>> x_t, sigma = torch.randn(8, 2), torch.full((8,), 0.5)
        >>> loss = reverse_sampling_loss(exact, energy, x_t, sigma, ReverseKernel(), 4096)
        >>> loss.shape, bool(loss.max() < 0.1)
        (torch.Size([8]), True)
    """
    estimate = posterior_estimate(
        energy,
        x_t,
        sigma,
        kernel,
        num_draws,
        context=context,
        target=target,
        coefficient=coefficient,
        generator=generator,
    )
    return estimate_loss(denoiser, x_t, sigma, estimate, context=context, loss_weight=loss_weight)


@checked
def estimate_loss(
    denoiser: Callable[..., Tensor],
    x_t: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    estimate: PosteriorEstimate,
    *,
    context: Float[Tensor, "*batch context_dim"] | None = None,
    loss_weight: LossWeight = None,
) -> Float[Tensor, "*batch"]:
    r"""Regression on a posterior mean, the second half of :func:`reverse_sampling_loss`.

    Arguments:
        denoiser: As in :func:`denoising_loss`.
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, positive, broadcastable to :math:`(*)`.
        estimate: The targets of these noisy points.
        context: Conditions, with shape :math:`(*, \mathrm{context\_dim})`.
        loss_weight: As in :func:`denoising_loss`.

    Returns:
        The loss of each noisy point, with shape :math:`(*)`; exactly 0, with gradient 0, where
        the effective sample size is 0.

    Example:
        >>> ess = torch.tensor([4.0, 2.0, 0.0])
        >>> estimate = PosteriorEstimate(torch.zeros(3, 2), ess, torch.zeros(3))
        >>> estimate_loss(lambda x_t, sigma: x_t, torch.ones(3, 2), 1.0, estimate)
        tensor([4., 4., 0.])
    """
    sigma = sigma_column(sigma, x_t).squeeze(-1).expand(x_t.shape[:-1])
    denoised = _denoised(denoiser, x_t, sigma, context)
    loss = _weighted_error(denoiser, denoised, sigma, estimate.mean.detach(), loss_weight)
    return torch.where(estimate.ess == 0, torch.zeros_like(loss), loss)


def _denoised(
    denoiser: Callable[..., Tensor], x_t: Tensor, sigma: Tensor, context: Tensor | None
) -> Tensor:
    """One denoiser call, with the shape of x_t."""
    denoised = denoiser(x_t, sigma) if context is None else denoiser(x_t, sigma, context)
    if denoised.shape != x_t.shape:
        raise ValueError(
            f"denoiser must return x_t's shape {tuple(x_t.shape)}, got {tuple(denoised.shape)}"
        )
    return denoised


def _weighted_error(
    denoiser: Callable[..., Tensor],
    denoised: Tensor,
    sigma: Tensor,
    target: Tensor,
    loss_weight: LossWeight,
) -> Tensor:
    """The squared error of what a denoiser gave, weighted, (*batch)."""
    if loss_weight is None:
        loss_weight = edm_weight(sigma, getattr(denoiser, "sigma_data", 1.0))
    elif callable(loss_weight) and not isinstance(loss_weight, Tensor):
        loss_weight = loss_weight(sigma)
    return loss_weight * (denoised - target).square().sum(-1)
