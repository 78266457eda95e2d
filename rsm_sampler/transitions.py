r"""Transition laws of the diffusion: forwards, and in between two times.

Everything is in variance-exploding coordinates, :math:`x_t = x_0 + \sigma_t \epsilon` (see
:mod:`rsm_sampler.schedules`),

.. math:: q(x_t | x_0) = \mathcal N(x_t; x_0, \sigma_t^2 I),

and the law at an earlier time :math:`s < t`, given both ends, is

.. math:: q(x_s | x_t, x_0) = \mathcal N\big(x_s;\; x_0 + r^2 (x_t - x_0),\;
          \sigma_s^2 (1 - r^2)\, I\big), \qquad r = \sigma_s / \sigma_t .

Variance-preserving coordinates, in which papers write, are :math:`x_t / \sqrt{1 + \sigma_t^2}`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = [
    "forward_kernel",
    "forward_log_prob",
    "posterior",
    "sigma_column",
    "variance_exploding",
    "variance_preserving",
]


@checked
def sigma_column(
    sigma: Float[Tensor, "*#batch"] | float, x: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*#batch 1"]:
    r"""Noise scales with a last axis of size one, in the precision and on the device of x.

    Arguments:
        sigma: Noise scales, broadcastable to the batch shape of x.
        x: Points, with shape :math:`(*, \mathrm{dim})`.

    Returns:
        The noise scales, ready to multiply x.

    Raises:
        ValueError: If sigma is a negative number, or its shape does not broadcast to the batch
            shape of x.

    Example:
        >>> sigma_column(torch.tensor([1.0, 2.0]), torch.zeros(2, 3)).shape
        torch.Size([2, 1])
    """
    if not isinstance(sigma, Tensor):
        if not sigma >= 0:
            raise ValueError(f"sigma must be at least 0, got {sigma}")
        return torch.full((1,), float(sigma), dtype=x.dtype, device=x.device)
    batch = x.shape[:-1]
    lead = len(batch) - sigma.ndim
    if lead < 0 or any(s not in (1, b) for s, b in zip(sigma.shape, batch[lead:], strict=True)):
        raise ValueError(
            f"sigma must broadcast to the batch shape {tuple(batch)}, got {tuple(sigma.shape)}"
        )
    return sigma.to(dtype=x.dtype, device=x.device).unsqueeze(-1)


@checked
def variance_preserving(
    x: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float
) -> Float[Tensor, "*batch dim"]:
    r"""The paper's variable, :math:`\sqrt{\bar\alpha}\, x = x / \sqrt{1 + \sigma^2}`.

    Densities change with the volume:
    :math:`\log p^{\mathrm{VP}} = \log p + \frac{d}{2} \log(1 + \sigma^2)`.

    Arguments:
        x: Noisy points in variance-exploding coordinates, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, broadcastable to :math:`(*)`.

    Returns:
        The points in variance-preserving coordinates, with the shape of x.

    Example:
        >>> variance_preserving(torch.tensor([5.0]), 3.0 / 4.0)
        tensor([4.])
    """
    column = sigma_column(sigma, x)
    return x / torch.hypot(column, torch.ones_like(column))


@checked
def variance_exploding(
    x_vp: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float
) -> Float[Tensor, "*batch dim"]:
    r"""Inverse of :func:`variance_preserving`, :math:`x = \sqrt{1 + \sigma^2}\, x^{\mathrm{VP}}`.

    Arguments:
        x_vp: Noisy points in the paper's coordinates, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, broadcastable to :math:`(*)`.

    Returns:
        The points in variance-exploding coordinates, with the shape of x_vp.

    Example:
        >>> variance_exploding(torch.tensor([4.0]), 3.0 / 4.0)
        tensor([5.])
    """
    column = sigma_column(sigma, x_vp)
    return x_vp * torch.hypot(column, torch.ones_like(column))


@checked
def forward_kernel(
    x_0: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch dim"]:
    r"""Draw of the forward process, :math:`x_t = x_0 + \sigma\, \epsilon` with normal noise.

    Arguments:
        x_0: Clean points, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales in units of x, broadcastable to :math:`(*)`.
        generator: Source of randomness, on the device of x_0.

    Returns:
        Noisy points, with the shape of x_0.

    References:
        Equation (6), divided by :math:`\sqrt{\bar\alpha_t}`

    Example:
        >>> forward_kernel(torch.zeros(5, 2), torch.full((5,), 3.0)).shape
        torch.Size([5, 2])
    """
    noise = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device, generator=generator)
    return x_0 + sigma_column(sigma, x_0) * noise


@checked
def forward_log_prob(
    x_t: Float[Tensor, "*batch dim"],
    x_0: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
) -> Float[Tensor, "*batch"]:
    r"""Log-density of the forward process, :math:`\log \mathcal N(x_t; x_0, \sigma^2 I)`.

    It is symmetric, hence also the log-density :math:`\log \phi(x_0 | x_t)` of the reverse
    kernel (15).

    Arguments:
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        x_0: Clean points, with the same shape.
        sigma: Noise scales, broadcastable to :math:`(*)`.

    Returns:
        The log-density in nats, with shape :math:`(*)`.

    References:
        Equations (6), (15) and (23)

    Example:
        >>> forward_log_prob(torch.zeros(2), torch.zeros(2), 1.0)
        tensor(-1.8379)
    """
    column = sigma_column(sigma, x_t)
    return isotropic_log_prob((x_t - x_0) / column, column)


@checked
def posterior(
    x_t: Float[Tensor, "*batch dim"],
    x_0: Float[Tensor, "*batch dim"],
    sigma_t: Float[Tensor, "*#batch"] | float,
    sigma_s: Float[Tensor, "*#batch"] | float,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*#batch 1"]]:
    r"""Law of a point between a noisy and a clean one, :math:`q(x_s | x_t, x_0)` for s < t.

    .. math:: \mathcal N\Big(x_0 + \frac{\sigma_s^2}{\sigma_t^2} (x_t - x_0),\;
              \frac{\sigma_s^2 (\sigma_t^2 - \sigma_s^2)}{\sigma_t^2} I\Big)

    Arguments:
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        x_0: Clean points, or their estimates, with the same shape.
        sigma_t: Noise scales of x_t, positive, broadcastable to :math:`(*)`.
        sigma_s: Noise scales of the wanted point, at most sigma_t.

    Returns:
        The mean, with the shape of x_t, and the standard deviation, with a last axis of size one
        so that ``mean + std * noise`` is a draw.

    References:
        Equation (8), with the square root of the variance in front of the noise

    Example:
        >>> mean, std = posterior(torch.tensor([4.0]), torch.tensor([0.0]), 2.0, 1.0)
        >>> mean, std.square()
        (tensor([1.]), tensor([0.7500]))
    """
    from_sigma, to_sigma = sigma_column(sigma_t, x_t), sigma_column(sigma_s, x_t)
    ratio = to_sigma / from_sigma
    std = ratio * ((from_sigma - to_sigma) * (from_sigma + to_sigma)).sqrt()
    return torch.lerp(x_0, x_t, ratio.square()), std


def isotropic_log_prob(standardised: Tensor, scale: Tensor) -> Tensor:
    """Normal log-density at points (*batch, dim) in units of the scale, (*batch or 1, 1)."""
    dim = standardised.shape[-1]
    log_volume = dim * (scale.squeeze(-1).log() + math.log(2 * math.pi) / 2)
    return -standardised.square().sum(-1) / 2 - log_volume
