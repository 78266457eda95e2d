r"""Weighted sets of points: effective size, log Z, tempering, resampling.

Points :math:`x_i \sim q` with log-weights :math:`\log w_i = -E(x_i) - \log q(x_i)` stand for the
law :math:`e^{-E} / Z`. Everything that is ever asked of such weights is asked of
:class:`LogWeights`, in log space and double precision:

.. math:: \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \qquad
    \log \hat Z = \log \frac1n \sum_i w_i, \qquad
    \mathrm{se}(\log \hat Z) = \sqrt{\frac{1}{\mathrm{ESS}} - \frac1n}.

Resampling turns weighted points into equally weighted ones. One uniform variable in each of n
equal strata of the weights' distribution function gives every point its expected number of
copies, with less variance than n independent draws.

References:
    | Monte Carlo theory, methods and examples, chapter 9 (Owen, 2013)
    | https://artowen.su.domains/mc

    | Pareto smoothed importance sampling (Vehtari et al., 2024), section 2
    | https://arxiv.org/abs/1507.02646
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_FEW, _PEAK = 25, 10.0  # weights without a tail: so many, none of so many times their mean

__all__ = ["LogWeights", "cumulative_weight", "pareto_shape", "stratified_indices"]


class LogWeights:
    r"""Log-weights of n points, or of several rows of n points.

    Arguments:
        value: Log-weights, with shape :math:`(*, n)`, up to a constant in each row where only
            ratios matter. :math:`-\infty` is a point of weight zero; NaN and :math:`+\infty` are
            refused.

    Raises:
        ValueError: If a row is empty, or a value is NaN or :math:`+\infty`.

    Example:
        >>> weights = LogWeights(torch.zeros(4))
        >>> float(weights.ess()), float(weights.log_mean())
        (4.0, 0.0)
    """

    def __init__(self, value: Float[Tensor, "*rows n"]) -> None:
        value = value.detach().double()
        if value.ndim < 1 or value.shape[-1] == 0:
            raise ValueError(
                f"value must have at least one weight, got shape {tuple(value.shape)}"
            )
        if bool((value.isnan() | value.isposinf()).any()):
            raise ValueError("value must have no NaN or +inf, got one")
        self.value = value

    @property
    def usable(self) -> Tensor:
        """Whether any point of a row has a weight, with the shape of the rows."""
        return self.value.amax(-1) > -torch.inf

    def normalised(self) -> Float[Tensor, "*rows n"]:
        """Weights of sum one in each row; zeros where no point has a weight."""
        return torch.softmax(self.value, -1).nan_to_num(0.0)

    def ess(self) -> Float[Tensor, "*rows"]:
        """Effective sample size of each row, in points; 0 where no point has a weight."""
        square = self.normalised().square().sum(-1)
        return torch.where(square > 0, 1 / square, 0.0)

    def share(self) -> float:
        """Effective sample size over the number of points, over all rows."""
        return float(self.ess().sum()) / self.value.numel()

    def log_mean(self) -> Float[Tensor, "*rows"]:
        """Logarithm of the mean weight of each row: log Z."""
        return torch.logsumexp(self.value, -1) - math.log(self.value.shape[-1])

    def log_mean_se(self) -> Float[Tensor, "*rows"]:
        """Its standard error by the delta method; infinite where no point has a weight."""
        variance = (1 / self.ess() - 1 / self.value.shape[-1]).clamp(min=0)
        return variance.sqrt()

    def mean(self, values: Float[Tensor, "n *shape"]) -> tuple[Tensor, Tensor]:
        """Weighted mean of values at the points of a single row, and its standard error.

        Arguments:
            values: One value, or tensor of values, for each point.

        Returns:
            The mean and the standard error by the delta method for a ratio of means.
        """
        weight = self.normalised()
        flat = values.double().reshape(len(weight), -1)
        mean = weight @ flat
        error = (weight.square() @ (flat - mean).square()).sqrt()
        return mean.reshape(values.shape[1:]), error.reshape(values.shape[1:])

    def tempered(self, beta: float) -> "LogWeights":
        """The weights to the power beta."""
        zero = self.value == -torch.inf
        return LogWeights(torch.where(zero, self.value, beta * self.value))

    def largest_power(self, least: float) -> float:
        """The largest beta up to 1 at which the weights to the power beta have that ESS.

        Arguments:
            least: Effective sample size to keep, in points, over all rows.

        Returns:
            Beta, at least 1e-18: with no more points of weight than that it cannot be reached.
        """
        if float(self.ess().sum()) >= least:
            return 1.0
        low, high = math.log(1e-18), 0.0
        for _ in range(48):
            middle = 0.5 * (low + high)
            if float(self.tempered(math.exp(middle)).ess().sum()) >= least:
                low = middle
            else:
                high = middle
        return math.exp(low)

    def resampled(self, n: int, generator: torch.Generator | None = None) -> Int[Tensor, " n"]:
        """Indices of points of a single row, drawn by weight with replacement, increasing.

        Arguments:
            n: Number of indices.
            generator: Source of randomness, on the device of the weights.
        """
        return stratified_indices(cumulative_weight(self.value[:, None], self.value), n, generator)

    def pareto_shape(self) -> float:
        """Shape of the tail of a single row's weights; see :func:`pareto_shape`."""
        return pareto_shape(self.value[self.value > -torch.inf])

    def unseen(self) -> float:
        r"""Share of the total that lies beyond the largest weight of a single row.

        For a generalised Pareto tail of shape k < 1 the mean beyond the largest of n weights,
        :math:`w_{(n)}`, is about :math:`w_{(n)} / (1 - k)`, and a draw lies there with probability
        1 / n: together :math:`w_{(n)} / ((1 - k) \sum_i w_i)`. Infinite from k = 1 on. Weights of
        which none is ten times the mean have no tail, whatever the shape of their small excesses:
        the share of the largest.
        """
        largest = float(self.normalised().amax())
        if len(self.value) >= _FEW and largest * len(self.value) < _PEAK:
            return largest
        shape = self.pareto_shape()
        return largest / (1 - shape) if shape < 1 else math.inf


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
    j = torch.arange(1, grid + 1, dtype=torch.float64, device=excess.device)
    quartile = excess[(tail + 2) // 4 - 1]
    theta = 1 / excess[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(-1)
    profile = tail * ((-theta / k).log() - k - 1)
    weight = torch.softmax(profile.nan_to_num(-torch.inf), 0)
    best = float((weight * theta).sum())
    shape = float(torch.log1p(-best * excess).mean())
    return (tail * shape + 10 * 0.5) / (tail + 10)
