r"""Indices drawn by weight.

Resampling turns weighted points into equally weighted ones. One uniform variable in each of n
equal strata of the weights' distribution function gives every point its expected number of
copies, with less variance than n independent draws.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["cumulative_weight", "stratified_indices"]


def cumulative_weight(
    points: Float[Tensor, "points dim"], log_weight: Float[Tensor, " points"]
) -> Float[Tensor, " points"]:
    r"""Distribution function over weighted points, for :func:`stratified_indices`.

    Arguments:
        points: The points, with shape :math:`(n, \mathrm{dim})`; only their number matters.
        log_weight: Their log-weights, with shape :math:`(n)`, up to a constant.

    Returns:
        Increasing values that end in exactly 1, in double precision, with shape :math:`(n)`.

    Raises:
        ValueError: If the shapes do not fit, or the log-weights have a NaN, :math:`+\infty`, or
            are all :math:`-\infty`.

    Example:
        >>> cumulative_weight(torch.zeros(4, 2), torch.zeros(4))
        tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must have shape (points, dim), got {tuple(points.shape)}")
    if log_weight.shape != points.shape[:1]:
        raise ValueError(
            f"log_weight must have shape ({len(points)},), got {tuple(log_weight.shape)}"
        )
    total = log_weight.double().logsumexp(0)
    if not bool(total.isfinite()):
        raise ValueError(
            "log_weight must have no NaN or +inf and at least one finite value, "
            f"got a total of {total.item()}"
        )
    weight = (log_weight.double() - total).exp().cumsum(0)
    return weight / weight[-1]


def stratified_indices(
    cumulative: Float[Tensor, " points"], num_draws: int, generator: torch.Generator | None = None
) -> Int[Tensor, " draws"]:
    r"""Indices drawn by weight with replacement, one from each stratum of equal probability.

    Each index has the same expected number of draws as if they were independent, with less
    variance.

    Arguments:
        cumulative: Distribution function, with shape :math:`(n)`, from :func:`cumulative_weight`.
        num_draws: The number of indices.
        generator: Source of randomness, on the device of cumulative.

    Returns:
        Increasing indices, with shape :math:`(\mathrm{num\_draws})`.

    Example:
        >>> stratified_indices(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64), 4)
        tensor([0, 0, 2, 2])
    """
    device = cumulative.device
    u = torch.rand(num_draws, dtype=torch.float64, device=device, generator=generator)
    u = (u + torch.arange(num_draws, dtype=torch.float64, device=device)) / num_draws
    return torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
