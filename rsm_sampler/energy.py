r"""What the library asks of an energy, and the meter every evaluation passes through.

An energy is any callable ``energy(x)`` with ``x`` of shape ``(n, dim)`` and values of shape
``(n,)``, or ``energy(x, context)`` with contexts of shape ``(n, context_dim)``. Low energy is
likely: :math:`p(x) \propto \exp(-E(x))`. Other things become energies in the package
:mod:`energies`: NumPy functions, log-probabilities, objects of :mod:`torch.distributions`.

:class:`MeteredEnergy` wraps it. It counts single points, by purpose, so that search, training and
diagnosis can be accounted for apart; it refuses to go beyond a budget; and it looks after values
that are no numbers. A NaN or :math:`+\infty` is a point of weight zero: regions where a model
breaks down are common and harmless. They are counted on the device, without a synchronisation,
and looked at when a phase of work ends, by :meth:`MeteredEnergy.check`: if nothing but such
values came back, that is an error that names the region.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BudgetExceededError", "Energy", "EnergyError", "MeteredEnergy"]


class Energy(Protocol):
    """A function of points (n, dim), and of contexts (n, context_dim) where there are any."""

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The energies, (n,)."""
        ...


class EnergyError(ValueError):
    """An energy returned what no energy can return."""


class BudgetExceededError(RuntimeError):
    """A call would evaluate more points than the budget allows."""


class MeteredEnergy:
    """An energy that is counted, checked, and kept within a budget.

    Arguments:
        energy: A callable as described above.
        dim: Dimension of a point.
        context_dim: Dimension of a context; None if the energy takes none.
        budget: The largest number of evaluations, in single points; None for no limit.

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
        self._bad: Tensor | None = None
        self._minus: Tensor | None = None
        self._seen = 0
        self._shape_checked = False

    @property
    def evaluations(self) -> int:
        """Points evaluated so far, over all purposes."""
        return sum(self.counts.values())

    @property
    def remaining(self) -> int | None:
        """Points left in the budget; None without one."""
        return None if self.budget is None else max(0, self.budget - self.evaluations)

    def __call__(
        self,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
        *,
        purpose: str = "training",
    ) -> Float[Tensor, "*batch"]:
        """Evaluate points; NaN comes back as +inf.

        Raises:
            BudgetExceededError: If the budget does not cover these points; none is evaluated.
            EnergyError: If the energy returns another shape or no floating-point tensor.
        """
        batch, points = x.shape[:-1], x.reshape(-1, x.shape[-1])
        number = len(points)
        if self.remaining is not None and number > self.remaining:
            raise BudgetExceededError(
                f"budget must cover {number} more evaluations, got {self.remaining} left of "
                f"{self.budget}"
            )
        if context is None:
            value = self.energy(points)
        else:
            value = self.energy(points, context.reshape(-1, context.shape[-1]))
        self.counts[purpose] = self.counts.get(purpose, 0) + number
        value = self._checked(value, points)
        bad = value.isnan()
        value = torch.where(bad, torch.inf, value)
        self._seen += number
        infinite = (value.detach() == torch.inf).sum()
        minus = (value.detach() == -torch.inf).sum()
        self._bad = infinite if self._bad is None else self._bad + infinite
        self._minus = minus if self._minus is None else self._minus + minus
        return value.to(x.dtype).reshape(batch)

    def check(self, x: Float[Tensor, "n dim"]) -> float:
        """Look at what came back since the last check; x are points of that phase.

        Returns:
            The share of points whose energy was NaN or +inf.

        Raises:
            EnergyError: If no energy was finite (the message names the region of x), or one was
                -inf, which is infinitely likely.
        """
        if self._bad is None or self._minus is None or self._seen == 0:
            return 0.0
        bad, minus, seen = int(self._bad), int(self._minus), self._seen
        self._bad, self._minus, self._seen = None, None, 0
        if minus:
            raise EnergyError(
                f"energy must be above -inf, got -inf at {minus} of {seen} points; a point of "
                "infinite density cannot be sampled (a log-probability with its sign flipped?)"
            )
        if bad == seen:
            low, high = x.amin(0).tolist(), x.amax(0).tolist()
            raise EnergyError(
                f"energy must be finite somewhere, got NaN or inf at all {seen} points, drawn "
                f"between {_short(low)} and {_short(high)}; give bounds, or loc and scale, of a "
                "region where it is finite"
            )
        return bad / seen

    def _checked(self, value: Tensor, points: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise EnergyError(
                f"energy must return a torch tensor, got {type(value).__name__}; wrap NumPy "
                "functions with energies.from_numpy"
            )
        if value.shape != points.shape[:1]:
            raise EnergyError(
                f"energy must return one value per point, shape {tuple(points.shape[:1])} for "
                f"points of shape {tuple(points.shape)}, got {tuple(value.shape)}"
            )
        if not value.is_floating_point():
            raise EnergyError(f"energy must return floating-point values, got {value.dtype}")
        return value


def _short(values: list[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:3])
    return f"({shown}{', ...' if len(values) > 3 else ''})"
