r"""Where noisy points come from: the law h_t of reverse sampling score matching.

The loss (14) holds for *any* law :math:`h_t(x_t)` of full support: it decides where the denoiser
is precise, not what it converges to. A good one is broad enough to cover every mode of the
target and does not waste points where a sampler never comes. The sampler starts from a wide
normal law and ends at the target, so most proposals here are of the form
:math:`x_t = x_0 + \sigma \epsilon` with clean points :math:`x_0` from a broad law, a buffer, or
the model itself; a mixture of a broad law with the model combines exploration and precision.

A proposal is any object with a method ``draw(n, sigma, *, generator=None)`` that returns n noisy
points in variance-exploding coordinates, one for each noise scale. Draws take the precision and
the device of the proposal's own points.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices
from rsm_sampler.transitions import forward_kernel, sigma_column, variance_exploding

__all__ = [
    "Coordinates",
    "GaussianProposal",
    "MixtureProposal",
    "PerturbedBuffer",
    "PerturbedModel",
    "Proposal",
    "UniformProposal",
]

Coordinates = Literal["clean", "variance_preserving"]


@runtime_checkable
class Proposal(Protocol):
    """A law of noisy points for every noise scale."""

    def draw(
        self, n: int, sigma: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Noisy points.

        Arguments:
            n: The number of points.
            sigma: Their noise scales, with shape (n,).
            generator: Source of randomness.

        Returns:
            Noisy points in variance-exploding coordinates, with shape (n, dim).
        """


class GaussianProposal:
    r"""A normal law, of the clean point or of the paper's noisy variable.

    Arguments:
        loc: Mean, with shape :math:`(\mathrm{dim})`; decides precision and device.
        scale: Standard deviation, positive, a number or with shape :math:`(\mathrm{dim})`.
        coordinates: With ``"clean"`` loc and scale describe :math:`x_0`, in units of x, and
            :math:`x_t = x_0 + \sigma \epsilon`. With ``"variance_preserving"`` they describe
            :math:`\sqrt{\bar\alpha_t}\, x_t`, alike at every noise scale.

    Raises:
        ValueError: If loc is not a vector, scale is not positive, or the coordinates are unknown.

    References:
        The toy problem (30): :math:`h_t = \mathcal N(0, 4I)` is loc 0 and scale 2, with
        ``coordinates="variance_preserving"``

    Example:
        >>> GaussianProposal(torch.zeros(3), 2.0).draw(5, torch.full((5,), 10.0)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        loc: Float[Tensor, " dim"],
        scale: Float[Tensor, " dim"] | float,
        *,
        coordinates: Coordinates = "clean",
    ) -> None:
        _check_vector("loc", loc)
        if not bool((torch.as_tensor(scale) > 0).all()):
            raise ValueError(f"scale must be positive, got {scale}")
        _check_coordinates(coordinates)
        self.loc = loc
        self.scale = torch.as_tensor(scale, dtype=loc.dtype, device=loc.device)
        self.coordinates = coordinates

    def draw(
        self, n: int, sigma: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Noisy points, see :class:`Proposal`."""
        _check_sigma(n, sigma)
        noise = torch.randn(
            (n, len(self.loc)), dtype=self.loc.dtype, device=self.loc.device, generator=generator
        )
        if self.coordinates == "variance_preserving":
            return variance_exploding(self.loc + self.scale * noise, sigma)
        # The sum of the two normal variables is drawn at once.
        return self.loc + torch.hypot(sigma_column(sigma, noise), self.scale) * noise


class UniformProposal:
    r"""A uniform law on a box, of the clean point or of the paper's noisy variable.

    Arguments:
        low: Lower end of the box, with shape :math:`(\mathrm{dim})`; decides precision and device.
        high: Upper end, with the same shape.
        coordinates: With ``"clean"`` the box holds :math:`x_0`, in units of x, and
            :math:`x_t = x_0 + \sigma \epsilon`. With ``"variance_preserving"`` it holds
            :math:`\sqrt{\bar\alpha_t}\, x_t`, alike at every noise scale.

    Raises:
        ValueError: If the ends are not finite vectors of one shape, low is not less than high,
            or the coordinates are unknown.

    References:
        The toy problem (30): :math:`h_t` uniform on :math:`[-6, 6]^2`, with
        ``coordinates="variance_preserving"``

    Example:
        >>> box = UniformProposal(torch.tensor([-6.0, -6.0]), torch.tensor([6.0, 6.0]))
        >>> box.draw(5, torch.zeros(5)).abs().max() <= 6
        tensor(True)
    """

    def __init__(
        self,
        low: Float[Tensor, " dim"],
        high: Float[Tensor, " dim"],
        *,
        coordinates: Coordinates = "clean",
    ) -> None:
        _check_vector("low", low)
        if low.shape != high.shape:
            raise ValueError(
                f"high must have the shape {tuple(low.shape)}, got {tuple(high.shape)}"
            )
        if not bool((low < high).all() and (high - low).isfinite().all()):
            raise ValueError(f"low must be less than high and both finite, got {low} and {high}")
        _check_coordinates(coordinates)
        self.low = low
        self.high = high
        self.coordinates = coordinates

    def draw(
        self, n: int, sigma: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Noisy points, see :class:`Proposal`."""
        _check_sigma(n, sigma)
        u = torch.rand(
            (n, len(self.low)), dtype=self.low.dtype, device=self.low.device, generator=generator
        )
        inside = torch.lerp(self.low, self.high, u)
        if self.coordinates == "variance_preserving":
            return variance_exploding(inside, sigma)
        return forward_kernel(inside, sigma, generator=generator)


class PerturbedModel:
    r"""Samples of the model itself, made noisy, :math:`x_t = x_0 + \sigma \epsilon`.

    Arguments:
        sample_fn: A function ``sample_fn(n, generator=generator)`` that returns n clean points,
            with shape :math:`(n, \mathrm{dim})`. It is called once per draw, without gradients.

    Raises:
        ValueError: By ``draw``, if the function returns another shape.

    Example:
        >>> def sample(n, generator=None):
        ...     return torch.randn(n, 2, generator=generator)
        >>> PerturbedModel(sample).draw(5, torch.full((5,), 10.0)).shape
        torch.Size([5, 2])
    """

    def __init__(self, sample_fn: Callable[..., Tensor]) -> None:
        self.sample_fn = sample_fn

    @torch.no_grad()
    def draw(
        self, n: int, sigma: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Noisy points, see :class:`Proposal`."""
        _check_sigma(n, sigma)
        x_0 = self.sample_fn(n, generator=generator)
        if x_0.ndim != 2 or len(x_0) != n:
            raise ValueError(f"sample_fn must return shape ({n}, dim), got {tuple(x_0.shape)}")
        return forward_kernel(x_0, sigma, generator=generator)


class PerturbedBuffer:
    r"""Stored points, drawn by weight and made noisy, :math:`x_t = x_0 + \sigma \epsilon`.

    The draws are with replacement and stratified: a point comes up nearly as often as its
    weight says.

    Arguments:
        points: The buffer, with shape :math:`(m, \mathrm{dim})`; decides precision and device.
        log_weight: Log-weights, with shape :math:`(m)`, up to a constant; equal if None.
            :math:`-\infty` is a point that never comes up.

    Raises:
        ValueError: If the shapes do not fit, or the log-weights have a NaN, :math:`+\infty`, or
            are all :math:`-\infty`.

    Example:
        >>> PerturbedBuffer(torch.randn(100, 2)).draw(5, torch.full((5,), 0.1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        points: Float[Tensor, "points dim"],
        log_weight: Float[Tensor, " points"] | None = None,
    ) -> None:
        if log_weight is None:
            log_weight = points.new_zeros(len(points))
        self.points = points.detach()
        self._cumulative_weight = cumulative_weight(self.points, log_weight.detach())

    def draw(
        self, n: int, sigma: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Noisy points, see :class:`Proposal`."""
        _check_sigma(n, sigma)
        index = stratified_indices(self._cumulative_weight, n, generator)
        # Strata are in order of the buffer: shuffle, so that no row is tied to a part of it.
        order = torch.randperm(n, device=index.device, generator=generator)
        return forward_kernel(self.points[index[order]], sigma, generator=generator)


class MixtureProposal:
    r"""One of several proposals for each row, part i with probability :math:`w_i`.

    Of n rows part i gets :math:`\lfloor n w_i \rfloor`, which ones is random, and only the few
    rows that remain are assigned by independent draws. Every row has the probabilities
    :math:`w_i` exactly, and no part draws points that are thrown away, beyond one for each
    remaining row.

    Arguments:
        parts: The proposals.
        weights: Their probabilities, non-negative, up to a factor.

    Raises:
        ValueError: If there are no parts, as many weights as parts are not given, or a weight is
            negative or all of them are zero.

    Example:
        >>> near = GaussianProposal(torch.zeros(2), 0.1)
        >>> far = GaussianProposal(torch.full((2,), 100.0), 0.1)
        >>> x_t = MixtureProposal([near, far], [3, 1]).draw(8, torch.zeros(8))
        >>> int((x_t[:, 0] > 50).sum())
        2
    """

    def __init__(self, parts: Sequence[Proposal], weights: Sequence[float | int]) -> None:
        if len(parts) == 0:
            raise ValueError("parts must have at least one proposal, got none")
        if len(weights) != len(parts):
            raise ValueError(f"weights must have {len(parts)} values, got {len(weights)}")
        total = sum(weights)
        if not (all(weight >= 0 for weight in weights) and 0 < total < float("inf")):
            raise ValueError(f"weights must be non-negative and not all zero, got {list(weights)}")
        self.parts = list(parts)
        self.weights = [weight / total for weight in weights]

    def draw(
        self, n: int, sigma: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Noisy points, see :class:`Proposal`."""
        _check_sigma(n, sigma)
        # Rounded, so that 0.1 of 10 rows is one row and not 0.9999.
        shares = [round(n * weight, 9) for weight in self.weights]
        counts = [int(share) for share in shares]
        order = torch.randperm(n, device=sigma.device, generator=generator)
        *rows, rest = order.split([*counts, n - sum(counts)])
        pieces, spare, left = [], [], []
        for part, share, count, row in zip(self.parts, shares, counts, rows, strict=True):
            # One call per part: its own rows, and a candidate for each row that is left over.
            own = torch.cat([row, rest]) if share > count else row
            if len(own) == 0:
                continue
            drawn = part.draw(len(own), sigma[own], generator=generator)
            pieces.append(drawn[:count])
            if len(own) > count:
                spare.append(drawn[count:])
                left.append(share - count)
        if spare:
            pieces.append(_choose(torch.stack(spare), left, generator))
        mixed = torch.cat(pieces)
        return torch.empty_like(mixed).index_copy_(0, order.to(mixed.device), mixed)


def _choose(candidates: Tensor, weights: list[float], generator: torch.Generator | None) -> Tensor:
    """One of the candidates (parts, rows, dim) for each row, by independent weighted draws."""
    rows, device = candidates.shape[1], candidates.device
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    u = torch.rand(rows, dtype=torch.float64, device=device, generator=generator)
    choice = torch.searchsorted((ends / ends[-1]).to(device), u, right=True)
    return candidates[choice, torch.arange(rows, device=device)]


def _check_vector(name: str, value: Tensor) -> None:
    if value.ndim != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a floating tensor of shape (dim,), "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def _check_coordinates(coordinates: str) -> None:
    if coordinates not in get_args(Coordinates):
        raise ValueError(
            f"coordinates must be one of {get_args(Coordinates)}, got {coordinates!r}"
        )


def _check_sigma(n: int, sigma: Tensor) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if sigma.shape != (n,):
        raise ValueError(f"sigma must have shape ({n},), got {tuple(sigma.shape)}")
