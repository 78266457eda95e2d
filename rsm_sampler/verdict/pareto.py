"""The tail of importance weights."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["pareto_shape"]


def pareto_shape(log_weight: Float[Tensor, " n"]) -> float:
    r"""Shape k of the generalised Pareto law of the largest importance weights.

    Below 0.5 the weights have a variance; above 0.7 their averages are unreliable at any
    affordable n.

    Arguments:
        log_weight: Log-weights, (n), up to a constant.

    Returns:
        The estimate of Zhang and Stephens with the usual weak prior towards 0.5; ``inf`` for fewer
        than 25 weights.

    References:
        | A new and efficient estimation method for the generalized Pareto distribution
        | (Zhang and Stephens, 2009)
        | https://doi.org/10.1198/tech.2009.08017

    Example:
        >>> pareto_shape(torch.zeros(1000)) < 0.1
        True
    """
    n = len(log_weight)
    tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    if tail < 5:
        return math.inf
    ordered = (log_weight.double() - log_weight.amax()).exp().sort().values
    excess = (ordered[-tail:] - ordered[-tail - 1]).clamp(min=0)
    if float(excess[-1]) <= 1e-6 or float(excess[(tail + 2) // 4 - 1]) <= 0:
        return 0.0
    grid = 30 + int(math.sqrt(tail))
    j = torch.arange(1, grid + 1, dtype=torch.float64)
    quartile = excess[(tail + 2) // 4 - 1]
    theta = 1 / excess[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(-1)
    profile = tail * ((-theta / k).log() - k - 1)
    weight = torch.softmax(profile.nan_to_num(-torch.inf), 0)
    best = float((weight * theta).sum())
    shape = float(torch.log1p(-best * excess).mean())
    return (tail * shape + 10 * 0.5) / (tail + 10)
