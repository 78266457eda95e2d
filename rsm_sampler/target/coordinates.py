r"""The coordinates in which the diffusion runs.

Users' coordinates x may be bounded, far from the origin, and stretched. The diffusion model
works on :math:`z \in \mathbb R^d` with mean about 0 and covariance about the identity:

.. math:: u = m + L z, \qquad x = b(u),

with :math:`m, L` found by the search (:mod:`rsm_sampler.bank.explorer`) and :math:`b` applied to
each coordinate. With the logistic function :math:`\varsigma(u) = 1 / (1 + e^{-u})` and the
standard normal distribution function :math:`\Phi`,

================= ================================ ===========================
bounds            :math:`b(u)`                     :math:`b'(u)`
================= ================================ ===========================
none              :math:`u`                        1
:math:`l < x`     :math:`l - \log \varsigma(-u)`   :math:`\varsigma(u)`
:math:`x < h`     :math:`h + \log \varsigma(u)`    :math:`\varsigma(-u)`
:math:`l < x < h` :math:`l + (h - l) \Phi(u)`      :math:`(h - l) \Phi'(u)`
================= ================================ ===========================

What is uniform between two bounds is normal in u, and a pole :math:`x^{a - 1}` at a bound has the
tail of a normal law of variance :math:`1 / a`.

A density follows its coordinates: :math:`E_u(u) = E(b(u)) - \sum_i \log b'(u_i)`, and
:math:`\log p(x) = \log p(z) - \log|\det L| - \sum_i \log b'(u_i)`.

For particles that only feel each other :math:`x = b(u)` is an isometry from fewer coordinates
instead, :class:`MeanFree`.

Points stay strictly inside: where rounding would put x on a bound (there are few numbers between
1 and 1 + 1e-7, and an energy may well be infinite at the bound itself) it becomes the last number
before it.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.special import ndtri

from rsm_sampler import validation
from rsm_sampler.checked import checked

_FARTHEST = 1e18  # its square is a number in single precision, too
_LOG_2PI = math.log(2 * math.pi)

__all__ = ["Affine", "Bounds", "Coordinates", "MeanFree", "bounds_of", "coordinates_of"]


@runtime_checkable
class Coordinates(Protocol):
    """What stands between unconstrained coordinates u and the user's points x.

    Attributes:
        dim: Length of a point x.
        reduced: Length of u.
    """

    dim: int
    reduced: int

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The point, and the logarithm of the volume it takes."""
        ...

    def inverse(self, x: Tensor) -> Tensor:
        """The coordinates of a point, NaN where it has none."""
        ...

    def inside(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Points in the precision in which an energy sees them, still inside."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which :func:`coordinates_of` makes the same again."""
        ...


@checked
def coordinates_of(state: dict[str, Tensor]) -> "Bounds | MeanFree":
    """The coordinates whose ``state_dict`` this is.

    Arguments:
        state: Tensors.
    """
    if "particles" in state:
        return MeanFree(*state["particles"].tolist())
    low, high = state["low"], state["high"]
    return Bounds(low, high, len(low), logistic="normal" not in state)


@checked(skip=("given",))
def bounds_of(given: Any, dim: int) -> "Bounds":  # noqa: ANN401
    """Bounds in either of the two forms that are in use.

    * ``(low, high)``: each a number, or one number for each coordinate;
    * one ``(low, high)`` pair for each coordinate, as SciPy has them, with ``None`` for no bound.

    In two dimensions two pairs of numbers can be read in both ways. A tuple of two lists, arrays
    or tensors is ``(low, high)``. Anything else is taken in the only way in which each low bound
    lies below its high one, and refused if both ways are possible.

    Arguments:
        given: The bounds; None for none.
        dim: Number of coordinates.

    Raises:
        ValueError: If the bounds fit neither form, or both.

    Example:
        >>> bounds_of([(0.0, 1.0), (2.0, 3.0), (4.0, None)], 3).high
        tensor([1., 3., inf], dtype=torch.float64)
    """
    if given is None:
        return _bounded(-math.inf, math.inf, dim)
    parts = list(given) if isinstance(given, Sequence | np.ndarray | Tensor) else []
    if isinstance(given, str | bytes) or len(parts) not in {2, dim}:
        raise _no_bounds(given, dim)
    if len(parts) != dim or not all(_is_pair(part) for part in parts):
        if len(parts) != 2 or any(isinstance(part, str | bytes) for part in parts):
            raise _no_bounds(given, dim)
        return _bounded(parts[0], parts[1], dim)
    low = [-math.inf if part[0] is None else part[0] for part in parts]
    high = [math.inf if part[1] is None else part[1] for part in parts]
    lists = isinstance(given, tuple) and not any(isinstance(part, tuple) for part in parts)
    if dim != 2:
        return _bounded(low, high, dim)
    if lists or not _is_box(low, high):
        return _bounded(parts[0], parts[1], dim)
    if _is_box(parts[0], parts[1]):
        first, second = ([float(x) for x in part] for part in parts)
        raise ValueError(
            f"bounds must have one meaning, got {given}: for low {first} and high {second} write "
            f"({first}, {second}), a tuple of two lists; for one coordinate in {tuple(first)} and "
            f"the other in {tuple(second)} write ({[first[0], second[0]]}, "
            f"{[first[1], second[1]]})"
        )
    return _bounded(low, high, dim)


def _bounded(low: Any, high: Any, dim: int) -> "Bounds":  # noqa: ANN401
    """The bounds; an error names what the user has given, too."""
    try:
        return Bounds(low, high, dim)
    except (TypeError, ValueError) as error:
        words = str(error)
        if words.startswith(("bounds", "dim")):
            raise
        raise ValueError(f"bounds must have numbers for each coordinate: {words}") from None


def _is_pair(part: object) -> bool:
    """Whether this may be the two bounds of one coordinate."""
    sized = isinstance(part, Sequence | np.ndarray | Tensor) and not isinstance(part, str | bytes)
    if not sized or getattr(part, "ndim", 1) == 0:
        return False
    return len(part) == 2  # type: ignore[arg-type]


def _is_box(low: Any, high: Any) -> bool:  # noqa: ANN401
    """Whether every lower bound lies below its upper one; False for what is no numbers."""
    try:
        return all(float(a) < float(b) for a, b in zip(low, high, strict=True))
    except (TypeError, ValueError):
        return False


def _no_bounds(given: object, dim: int) -> ValueError:
    return ValueError(
        f"bounds must be (low, high), each a number or {dim} numbers, or a list of {dim} pairs "
        f"(low, high), got {validation.said(given)}"
    )


@checked(infinite=("low", "high"))
class Bounds:
    r"""One- and two-sided bounds of single coordinates, removed by a change of variable.

    Arguments:
        low: Lower bounds, a number or one for each coordinate; ``-inf`` for none.
        high: Upper bounds; ``inf`` for none.
        dim: Number of coordinates.
        logistic: Whether two-sided bounds are those of the logistic function instead of the normal
            distribution function: files that do not say which are of that kind.

    Attributes:
        low: Lower bounds in double precision, with shape (dim).
        high: Upper bounds likewise.
        active: Whether any coordinate is bounded.

    Raises:
        ValueError: If dim is below 1, a shape does not fit, a bound is NaN, or low is not below
            high.

    Example:
        >>> bounds = Bounds(0.0, 1.0, dim=2)
        >>> bounds.forward(torch.zeros(1, 2))[0]
        tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        low: float | Sequence[float] | Tensor,
        high: float | Sequence[float] | Tensor,
        dim: int,
        *,
        logistic: bool = False,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = self.reduced = dim
        self.logistic = logistic
        self.low, self.high = _bound("low", low, dim), _bound("high", high, dim)
        if not bool((self.low < self.high).all()):
            raise ValueError(
                "bounds must have low below high in every coordinate, got low "
                f"{self.low.tolist()} and high {self.high.tolist()}"
            )
        self.active = bool((self.low.isfinite() | self.high.isfinite()).any())
        self._like: dict[tuple[torch.dtype, torch.device], _Limits] = {}

    def forward(
        self, u: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch"]]:
        r"""The bounded point and the volume it takes.

        Arguments:
            u: Unbounded points, with shape :math:`(*, d)`.

        Returns:
            The points x, strictly inside the bounds, and :math:`\log|\det \partial x/\partial u|`,
            with shape :math:`(*)`.

        Raises:
            ValueError: If the precision of u cannot tell low from high.
        """
        if not self.active:
            return u, torch.zeros_like(u[..., 0])
        at = self._limits(u)
        log_up, log_down = logsigmoid(u), logsigmoid(-u)
        log_slope = torch.where(at.has_low, log_up, 0) + torch.where(at.has_high, log_down, 0)
        if self.logistic:
            tail = logsigmoid(-u.abs()).exp()
        else:
            tail = 0.5 * torch.special.erfc(u.abs() / math.sqrt(2.0))
            square = u.clamp(-_FARTHEST, _FARTHEST).square()
            log_slope = torch.where(at.two_sided, -0.5 * (square + _LOG_2PI), log_slope)
        # From the nearer bound, to keep the digits of a small distance.
        distance = at.width * tail
        nearer = torch.where(u < 0, at.low + distance, at.high - distance)
        one_sided = torch.where(at.has_low, at.low - log_down, at.high + log_up)
        x = torch.where(at.two_sided, nearer, torch.where(at.bounded, one_sided, u))
        x = x.clamp(at.first, at.last)
        return x, log_slope.sum(-1) + at.log_volume

    def inverse(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The unbounded point.

        Arguments:
            x: Points, with shape :math:`(*, d)`.

        Returns:
            The points u, NaN in the coordinates where x is on or outside the bounds.
        """
        if not self.active:
            return x
        at = self._limits(x)
        above, below = x - at.low, at.high - x
        if self.logistic:
            between = above.log() - below.log()
        else:
            share = above.minimum(below) / at.width
            between = torch.where(above < below, ndtri(share), -ndtri(share))
        u = torch.where(
            at.two_sided,
            between,
            torch.where(at.has_low, _inverse_softplus(above), -_inverse_softplus(below)),
        )
        inside = (~at.has_low | (above > 0)) & (~at.has_high | (below > 0))
        return torch.where(at.bounded, torch.where(inside, u, torch.nan), x)

    def inside(
        self, x: Float[Tensor, "*batch dim"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch dim"]:
        """Points in another precision, strictly inside the bounds there too.

        A point that double precision tells from a bound may be rounded onto it in single
        precision, where an energy may well be infinite.

        Arguments:
            x: Points, with shape :math:`(*, d)`.
            dtype: The precision.
        """
        x = x.to(dtype)
        if not self.active:
            return x
        at = self._limits(x)
        return x.clamp(at.first, at.last)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that make the same bounds again."""
        state = {"low": self.low, "high": self.high}
        if not self.logistic and bool((self.low.isfinite() & self.high.isfinite()).any()):
            state["normal"] = torch.tensor(True)
        return state

    def _limits(self, like: Tensor) -> "_Limits":
        key = (like.dtype, like.device)
        if key not in self._like:
            self._like[key] = _Limits(self.low, self.high, like)
        return self._like[key]


class _Limits:
    """Bounds in one precision, on one device; 0 stands for an infinite one."""

    def __init__(self, low: Tensor, high: Tensor, like: Tensor) -> None:
        has_low, has_high = low.isfinite(), high.isfinite()
        two_sided = has_low & has_high
        width = torch.where(two_sided, high - low, 1.0)
        near_low, near_high = low.to(like.dtype), high.to(like.dtype)
        first = torch.where(has_low, near_low.nextafter(near_high), near_low)
        last = torch.where(has_high, near_high.nextafter(near_low), near_high)
        if not bool(((near_low < near_high) & (first <= last)).all()):
            raise ValueError(
                f"bounds must be apart in {like.dtype}, got low {low.tolist()} and high "
                f"{high.tolist()}"
            )
        self.low = torch.where(has_low, low, 0.0).to(like)
        self.high = torch.where(has_high, high, 0.0).to(like)
        self.width = width.to(like)
        self.log_volume = width.log().sum().to(like)
        self.first, self.last = first.to(like.device), last.to(like.device)
        self.has_low, self.has_high = has_low.to(like.device), has_high.to(like.device)
        self.two_sided = two_sided.to(like.device)
        self.bounded = self.has_low | self.has_high


@checked
class MeanFree:
    r"""Particles without their centre of mass, in orthonormal coordinates.

    Energies of particles that only feel each other do not change when all of them move together,
    so they have a law on :math:`\sum_i x_i = 0` alone. With Helmert's matrix H, whose n - 1
    orthonormal rows are orthogonal to :math:`(1, \dots, 1)`,

    .. math:: x = H^\top u, \qquad u = H x,

    for each of the s coordinates of space: lengths, and so volumes, are those of the subspace, and
    isotropic noise of u is mean-free noise of x.

    Arguments:
        num_particles: Number n of particles, at least two.
        space_dim: Dimension s of the space they live in.

    Attributes:
        reduced: Number :math:`(n - 1) s` of coordinates u.
        dim: Number :math:`n s` of coordinates x.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> MeanFree(2, 1).forward(torch.tensor([[2.0]]))[0]
        tensor([[ 1.4142, -1.4142]])
    """

    def __init__(self, num_particles: int, space_dim: int) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, got {num_particles}")
        if space_dim < 1:
            raise ValueError(f"space_dim must be at least 1, got {space_dim}")
        self.num_particles, self.space_dim = num_particles, space_dim
        self.reduced, self.dim = (num_particles - 1) * space_dim, num_particles * space_dim
        k = torch.arange(1, num_particles, dtype=torch.float64).unsqueeze(-1)
        column = torch.arange(num_particles, dtype=torch.float64)
        rows = torch.where(column < k, 1.0, torch.where(column == k, -k, 0.0))
        self.basis = rows / (k * (k + 1)).sqrt()
        self._like: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def forward(
        self, u: Float[Tensor, "*batch reduced"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch"]]:
        """Particles around their centre of mass, and the logarithm of the volume, which is 0."""
        points = u.unflatten(-1, (self.num_particles - 1, self.space_dim))
        return (self._basis(u).mT @ points).flatten(-2), torch.zeros_like(u[..., 0])

    def inverse(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch reduced"]:
        """The coordinates of particles, wherever their centre of mass is."""
        points = x.unflatten(-1, (self.num_particles, self.space_dim))
        return (self._basis(x) @ points).flatten(-2)

    def centred(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The particles moved together, so that their centre of mass is the origin."""
        points = x.unflatten(-1, (self.num_particles, self.space_dim))
        return (points - points.mean(-2, keepdim=True)).flatten(-2)

    def inside(
        self, x: Float[Tensor, "*batch dim"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch dim"]:
        """Points in another precision; there are no bounds to stay within."""
        return x.to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The two numbers that make the same coordinates again."""
        return {"particles": torch.tensor([self.num_particles, self.space_dim])}

    def _basis(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._like:
            self._like[key] = self.basis.to(like)
        return self._like[key]


@checked
class Affine:
    r"""Location and scale, :math:`u = m + L z` with a lower triangular L.

    Arguments:
        loc: The location m, with shape (dim).
        scale_tril: The factor L, with shape (dim, dim) and a positive diagonal.

    Attributes:
        log_det: :math:`\log|\det L|`, a number.

    Raises:
        ValueError: If a shape does not fit, an entry is not finite, L has entries above its
            diagonal, or the diagonal is not positive.

    Example:
        >>> affine = Affine(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> affine.forward(torch.ones(1, 2))
        tensor([[3., 2.]])
    """

    def __init__(self, loc: Float[Tensor, " dim"], scale_tril: Float[Tensor, "dim dim"]) -> None:
        if loc.dim() != 1 or len(loc) < 1 or scale_tril.shape != (len(loc), len(loc)):
            raise ValueError(
                "loc and scale_tril must have shapes (dim,) and (dim, dim), got "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        if not bool(loc.isfinite().all()):
            raise ValueError(f"loc must be finite, got {loc.tolist()}")
        diagonal = scale_tril.diagonal()
        triangular = bool((scale_tril.triu(1) == 0).all()) and bool(scale_tril.isfinite().all())
        if not (triangular and bool((diagonal > 0).all())):
            raise ValueError(
                "scale_tril must be finite and lower triangular with a positive diagonal, got "
                f"diagonal {diagonal.tolist()}"
            )
        self.loc, self.scale_tril = loc.detach(), scale_tril.detach()
        self.dim = len(loc)
        self.log_det = float(self.scale_tril.double().diagonal().log().sum())
        self._like: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def identity(cls, dim: int) -> "Affine":
        """No change of coordinates.

        Arguments:
            dim: Number of coordinates.

        Returns:
            The map with m = 0 and L = 1.
        """
        return cls(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))

    def isotropic(self) -> "Affine":
        """The map about the origin that stretches all directions alike, by the same width."""
        spread = self.scale_tril.square().sum() + self.loc.square().sum()
        width = (spread / len(self.loc)).sqrt()
        return Affine(torch.zeros_like(self.loc), width * torch.eye(len(self.loc)).to(self.loc))

    def forward(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The point u of z, with z's shape, precision and device."""
        loc, scale_tril = self._map(z)
        return loc + z @ scale_tril.mT

    def inverse(self, u: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The point z of u, with u's shape, precision and device."""
        loc, scale_tril = self._map(u)
        flat = (u - loc).reshape(-1, len(loc))
        # One factor for all rows, z L^T = u - m, instead of a copy of it for each.
        z = torch.linalg.solve_triangular(scale_tril.mT, flat, upper=True, left=False)
        return z.reshape(u.shape)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that make the same map again: ``Affine(**state)``."""
        return {"loc": self.loc, "scale_tril": self.scale_tril}

    def _map(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._like:
            self._like[key] = (self.loc.to(like), self.scale_tril.to(like))
        return self._like[key]


def _bound(name: str, value: float | Sequence[float] | Tensor, dim: int) -> Tensor:
    double = torch.zeros((), dtype=torch.float64)
    tensor = validation.tensor(name, value, like=double).detach().to("cpu", torch.float64)
    if tensor.shape not in {(), (dim,)}:
        raise ValueError(
            f"{name} must be a number or {dim} numbers, got shape {tuple(tensor.shape)}"
        )
    if bool(tensor.isnan().any()):
        raise ValueError(f"{name} must not be NaN, got {tensor.tolist()}")
    return tensor.expand(dim).clone()


def _inverse_softplus(y: Tensor) -> Tensor:
    """log(e^y - 1), precise at both ends."""
    return torch.where(y > math.log(2), y + torch.log(-torch.expm1(-y)), torch.expm1(y).log())
