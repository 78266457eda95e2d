r"""What the library asks of an energy, and the meter every evaluation passes through.

An energy is any callable ``energy(x)`` with ``x`` of shape ``(n, dim)`` and values of shape
``(n,)``, or ``energy(x, context)`` with contexts of shape ``(n, context_dim)``. Low energy is
likely: :math:`p(x) \propto \exp(-E(x))`. Other things become energies in the package
:mod:`energies`: NumPy functions, log-probabilities, objects of :mod:`torch.distributions`.

:class:`MeteredEnergy` wraps it. It counts single points, by purpose, so that search, training and
diagnosis can be accounted for apart; it refuses to go beyond a budget; and it looks after values
that are no numbers. A NaN or :math:`+\infty` is a point of weight zero: regions where a model
breaks down are common and harmless. A :math:`-\infty` would be a point of infinite density; it is
given weight zero as well, so that no weight becomes NaN. All three are counted on the device,
without a synchronisation, and looked at when a phase of work ends, by
:meth:`MeteredEnergy.check`: a :math:`-\infty`, or nothing but points of weight zero, is an error
that names the region.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = [
    "BudgetExceededError",
    "Energy",
    "EnergyError",
    "MeteredEnergy",
    "metered",
    "particles_of",
    "well_formed",
]


class Energy(Protocol):
    """A function of points (n, dim), and of contexts (n, context_dim) where there are any."""

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The energies, (n,)."""
        ...


class EnergyError(ValueError):
    """An energy returned what no energy can return."""


class BudgetExceededError(RuntimeError):
    """A call would evaluate more points than the budget allows."""


@checked(skip=("energy", "check"))
class MeteredEnergy:
    r"""An energy that is counted, checked, and kept within a budget.

    Arguments:
        energy: A callable as described above.
        dim: Dimension of a point.
        context_dim: Dimension of a context; None if the energy takes none.
        budget: The largest number of evaluations, in single points; None for no limit.

    Attributes:
        counts: Evaluations so far, by purpose. A value is one evaluation, a gradient one more.

    Raises:
        TypeError: If energy cannot be called.
        ValueError: If dim, context_dim or budget is below 1, or the energy has a ``dim`` of its
            own and it is another one.

    Example:
        >>> energy = MeteredEnergy(lambda x: x.square().sum(-1) / 2, dim=2)
        >>> energy(torch.ones(3, 2), purpose="search")
        tensor([1., 1., 1.])
        >>> energy.counts
        {'search': 3}
    """

    def __init__(
        self,
        energy: Callable[..., Tensor],
        dim: int,
        *,
        context_dim: int | None = None,
        budget: int | None = None,
    ) -> None:
        for name, value in (("dim", dim), ("context_dim", context_dim), ("budget", budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not callable(energy):
            raise TypeError(
                f"energy must be a callable, got {type(energy).__name__}; for an object of "
                "torch.distributions there is energies.from_distribution"
            )
        known = getattr(energy, "dim", None)
        if isinstance(known, int) and known != dim:
            raise ValueError(f"dim must be the energy's own dimension {known}, got {dim}")
        self.energy = energy
        self.dim = dim
        self.context_dim = context_dim
        self.budget = budget
        self.counts: dict[str, int] = {}
        # Numbers of NaN, +inf and -inf over all points so far, kept on the device.
        self._tally: Tensor | None = None
        self._points = 0
        # The same when `check` last looked.
        self._old_tally, self._old_points = [0, 0, 0], 0

    @property
    def evaluations(self) -> int:
        """Evaluations so far, over all purposes."""
        return sum(self.counts.values())

    @property
    def remaining(self) -> int | None:
        """Evaluations left in the budget; None without one."""
        return None if self.budget is None else max(0, self.budget - self.evaluations)

    @property
    def failures(self) -> int:
        """Points so far whose energy was NaN or -inf, or finite with a gradient that was not."""
        nan, _, minus = self._read_tally()
        return nan + minus

    def __call__(
        self,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
        *,
        purpose: str = "training",
    ) -> Float[Tensor, "*batch"]:
        """Energies of points; NaN and -inf come back as +inf.

        Arguments:
            x: Points, with any batch shape; the energy sees them as (n, dim).
            context: A context for each point, for an energy that takes one.
            purpose: The account in :attr:`counts`.

        Returns:
            The energies, with the batch shape, the precision and the device of x.

        Raises:
            BudgetExceededError: If the budget does not cover these points; none is evaluated.
            EnergyError: If the energy returns another shape or no floating-point tensor.
            ValueError: If x or context has another length than announced.
        """
        arguments = self._admitted(x, context, 1, purpose)
        value, bad = self._examined(self.energy(*arguments), x)
        return torch.where(bad, torch.inf, value).reshape(x.shape[:-1])

    def value_and_gradient(
        self,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
        *,
        purpose: str = "training",
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        r"""Energies and their gradients by autograd, both without a graph.

        Arguments:
            x: As in a plain call.
            context: As in a plain call.
            purpose: The account in :attr:`counts`, which grows by two for every point.

        Returns:
            The energies, :math:`+\infty` also where a finite energy has a gradient that is not
            finite; and the gradients, with the shape of x, zero where the energy is infinite.

        Raises:
            BudgetExceededError: If the budget does not cover twice these points.
            EnergyError: As in a plain call, or if autograd cannot differentiate the energy.
            ValueError: As in a plain call.
        """
        points, *rest = self._admitted(x.detach(), context, 2, purpose)
        with torch.enable_grad():
            points = points.clone().requires_grad_()
            value = well_formed(self.energy(points, *rest), points)
            if not value.requires_grad:
                raise EnergyError(
                    "energy must be differentiable by autograd where gradients are used, got "
                    "values without a graph"
                )
            (gradient,) = torch.autograd.grad(value.sum(), points)
        value = value.detach()
        steep = value.isfinite() & ~gradient.isfinite().all(-1)
        value, bad = self._examined(value.masked_fill(steep, torch.nan), x)
        value = value.masked_fill(bad, torch.inf)
        gradient = gradient.masked_fill((value == torch.inf)[:, None], 0.0)
        return value.reshape(x.shape[:-1]), gradient.reshape(x.shape)

    def check(self, x: Float[Tensor, "*batch dim"]) -> float:
        """Look at what came back since the last check; the host waits for the device here.

        Arguments:
            x: Points of that phase of work, for the message.

        Returns:
            The share of points of weight zero: the energy was NaN or +inf.

        Raises:
            EnergyError: If no energy was finite (the message names the region of x), or one was
                -inf, which is infinitely likely.
        """
        tally = self._read_tally()
        nan, plus, minus = (new - old for new, old in zip(tally, self._old_tally, strict=True))
        seen = self._points - self._old_points
        self._old_tally, self._old_points = tally, self._points
        if minus:
            raise EnergyError(
                f"energy must be above -inf, got -inf at {minus} of {seen} points; a point of "
                "infinite density cannot be sampled (a log-probability with its sign flipped?)"
            )
        if seen and nan + plus == seen:
            low, high = (v.tolist() for v in x.reshape(-1, x.shape[-1]).aminmax(dim=0))
            raise EnergyError(
                f"energy must be finite somewhere, got NaN or inf at all {seen} points, drawn "
                f"between {_short(low)} and {_short(high)}; give bounds, or place and width, of a "
                "region where it is finite"
            )
        return (nan + plus) / seen if seen else 0.0

    def _admitted(
        self, x: Tensor, context: Tensor | None, cost: int, purpose: str
    ) -> tuple[Tensor, ...]:
        """The energy's arguments, flat, after the checks at the door; counts them."""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x must have shape (..., {self.dim}), got {tuple(x.shape)}")
        wanted = None if self.context_dim is None else (*x.shape[:-1], self.context_dim)
        if (None if context is None else tuple(context.shape)) != wanted:
            rule = "None" if wanted is None else f"of shape {wanted}"
            got = None if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(f"context must be {rule}, got {got}")
        evaluations = cost * x.shape[:-1].numel()
        if self.remaining is not None and evaluations > self.remaining:
            raise BudgetExceededError(
                f"budget must cover {evaluations} more evaluations, got {self.remaining} left of "
                f"{self.budget}"
            )
        self.counts[purpose] = self.counts.get(purpose, 0) + evaluations
        points = x.reshape(-1, self.dim)
        return (points,) if context is None else (points, context.reshape(-1, context.shape[-1]))

    def _examined(self, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values in the precision and on the device of x, and which are NaN or -inf."""
        value = well_formed(value, x).to(x)
        plain = value.detach()
        nan, minus = plain.isnan(), plain.isneginf()
        tally = torch.stack([nan.sum(), plain.isposinf().sum(), minus.sum()])
        # Work that moves to another device waits for the old one once.
        self._tally = tally if self._tally is None else tally + self._tally.to(tally.device)
        self._points += len(value)
        return value, nan | minus

    def _read_tally(self) -> list[int]:
        return [0, 0, 0] if self._tally is None else self._tally.tolist()


@checked(skip=("energy",))
def metered(
    energy: Callable[..., Tensor] | MeteredEnergy, dim: int, *, context_dim: int | None = None
) -> MeteredEnergy:
    """The energy with counters: the given one's own, or fresh ones.

    Arguments:
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``.
        dim: Dimension of a point.
        context_dim: Dimension of a context; None if the energy takes none.

    Example:
        >>> target = metered(lambda x: x.square().sum(-1), 2)
        >>> metered(target, 2) is target
        True
    """
    if isinstance(energy, MeteredEnergy):
        return energy
    return MeteredEnergy(energy, dim, context_dim=context_dim)


@checked(skip=("energy",))
def particles_of(
    energy: Callable[..., Tensor], given: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The particles ``(n, s)`` of an energy: those given, or its own attribute ``particles``.

    Arguments:
        energy: The energy.
        given: What the user said.
    """
    known = getattr(energy, "particles", None)
    return known if given is None and isinstance(known, tuple) else given


@checked(skip=("value",))
def well_formed(value: Tensor, points: Float[Tensor, "*batch dim"]) -> Float[Tensor, " n"]:
    """What an energy returned, if it is one number for each point.

    Arguments:
        value: What it returned.
        points: What it was given, n points in all.

    Raises:
        EnergyError: If it is another shape, or no floating-point tensor.
    """
    if not isinstance(value, Tensor):
        raise EnergyError(
            f"energy must return a torch tensor, got {type(value).__name__}; wrap NumPy "
            "functions with energies.from_numpy"
        )
    shape = (points.shape[:-1].numel(),)
    if value.shape != shape:
        raise EnergyError(
            f"energy must return one value per point, shape {shape} for points of shape "
            f"{(*shape, points.shape[-1])}, got {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        raise EnergyError(f"energy must return floating-point values, got {value.dtype}")
    return value


def _short(values: list[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:3])
    return f"({shown}{', ...' if len(values) > 3 else ''})"
