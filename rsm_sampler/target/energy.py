r"""What the library asks of an energy, and the meter every evaluation passes through.

An energy is any callable ``energy(x)`` with ``x`` of shape ``(n, dim)`` and values of shape
``(n,)``, or ``energy(x, context)`` with contexts of shape ``(n, context_dim)``. Low energy is
likely: :math:`p(x) \propto \exp(-E(x))`. Other things become energies in the package
:mod:`energies`: NumPy functions, log-probabilities, objects of :mod:`torch.distributions`.

:class:`MeteredEnergy` wraps it. Whatever the precision of the points that come in, the energy sees
them in double precision (or in single, if asked), and its values come back in double precision:
log-likelihoods of :math:`10^8` keep their digits. :mod:`rsm_sampler.target.calls` says what an
energy may do with its arguments, :mod:`rsm_sampler.target.batches` how many points it gets at a
time.

The meter counts single points, by purpose, so that search, training and diagnosis can be accounted
for apart; it refuses to go beyond a budget or a deadline; and it looks after values that are no
numbers. A NaN or :math:`+\infty` is a point of weight zero: regions where a model breaks down are
common and harmless. A :math:`-\infty` would be a point of infinite density; it is given weight
zero as well, so that no weight becomes NaN. All three are counted on the device, without a
synchronisation, and looked at when a phase of work ends, by :meth:`MeteredEnergy.check`: a
:math:`-\infty`, or nothing but points of weight zero, is an error that names the region.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.target.calls import Calls, EnergyError, well_formed, with_gradient

__all__ = [
    "BudgetExceededError",
    "Energy",
    "EnergyError",
    "MeteredEnergy",
    "metered",
    "particles_of",
    "well_formed",
]


_HUGE = torch.finfo(torch.float32).max  # squares of energies must not overflow


class Energy(Protocol):
    """A function of points (n, dim), and of contexts (n, context_dim) where there are any."""

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The energies, (n,)."""
        ...


class BudgetExceededError(RuntimeError):
    """A call would evaluate more points than the budget allows, or comes after the deadline."""


@checked(skip=("energy", "check"))
class MeteredEnergy:
    r"""An energy that is counted, checked, and kept within a budget.

    Arguments:
        energy: A callable as described above.
        dim: Dimension of a point.
        context_dim: Dimension of a context; None if the energy takes none.
        budget: The largest number of evaluations, in single points; None for no limit.
        dtype: Precision of the points and contexts that the energy sees, ``torch.float64`` or
            ``torch.float32``.
        call_timeout: Seconds that one call of the energy may take; None for no limit. A call of
            several points that takes longer is made again point by point, and a point that takes
            longer has weight zero. In the main thread of a POSIX system only, and not within a
            function of a C extension, which returns first; see :mod:`rsm_sampler.target.calls`.

    Attributes:
        counts: Evaluations so far, by purpose. A value is one evaluation, a gradient one more.
        deadline: Value of :func:`time.monotonic` from which on nothing is evaluated; None for
            none.
        timeouts: Points so far that took longer than ``call_timeout``.

    Raises:
        TypeError: If energy cannot be called.
        ValueError: If dim, context_dim or budget is below 1, dtype is another one, call_timeout
            is not positive, or the energy has a ``dim`` of its own and it is another one.

    Example:
        >>> energy = MeteredEnergy(lambda x: x.square().sum(-1) / 2, dim=2)
        >>> energy(torch.ones(3, 2), purpose="search")
        tensor([1., 1., 1.], dtype=torch.float64)
        >>> energy.counts
        {'search': 3}
    """

    batched = True  # it divides its points itself, also within another meter

    def __init__(
        self,
        energy: Callable[..., Tensor],
        dim: int,
        *,
        context_dim: int | None = None,
        budget: int | None = None,
        dtype: torch.dtype = torch.float64,
        call_timeout: float | None = None,
    ) -> None:
        for name, value in (("dim", dim), ("context_dim", context_dim), ("budget", budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in {torch.float64, torch.float32}:
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        if call_timeout is not None and not call_timeout > 0:
            raise ValueError(f"call_timeout must be positive, got {call_timeout}")
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
        self.deadline: float | None = None
        self.counts: dict[str, int] = {}
        self.timeouts = 0
        self._calls = Calls(
            energy, dtype, call_timeout, whole=getattr(energy, "batched", False) is True
        )
        # Numbers of NaN, +inf and -inf over all points so far, kept on the device.
        self._tally: Tensor | None = None
        self._points = 0
        # The same when `check` last looked.
        self._old_tally, self._old_points, self._old_timeouts = [0, 0, 0], 0, 0

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the points that the energy sees."""
        return self._calls.dtype

    @property
    def call_timeout(self) -> float | None:
        """Seconds that one call of the energy may take."""
        return self._calls.timeout

    @property
    def seconds(self) -> float:
        """Time spent in the energy, all meters of :meth:`apart` together."""
        return self._calls.seconds

    @property
    def seconds_per_point(self) -> float:
        """Mean time that the energy took for a point in the last calls; NaN before the first.

        On a GPU, the time to start the work there.
        """
        return self._calls.seconds_per_point

    def apart(self) -> "MeteredEnergy":
        """A meter of the same energy with counts of its own and without budget and deadline."""
        other = MeteredEnergy(
            self.energy,
            self.dim,
            context_dim=self.context_dim,
            dtype=self.dtype,
            call_timeout=self.call_timeout,
        )
        other._calls = self._calls  # which knows how many points suit the energy
        return other

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
        """Energies of points; NaN and -inf come back as +inf, and so does what is beyond 3e38.

        Arguments:
            x: Points, with any batch shape and in any precision; the energy sees them as
                (n, dim), fewer at a time where there are many.
            context: A context for each point, for an energy that takes one.
            purpose: The account in :attr:`counts`.

        Returns:
            The energies, with the batch shape, in double precision and on the device of x. If x
            requires a gradient and autograd can differentiate the energy, they carry it, and
            every point counts twice.

        Raises:
            BudgetExceededError: If the budget does not cover these points, or the deadline has
                passed; then none is evaluated. If the deadline passes on the way, the points
                evaluated until then are counted, and lost.
            EnergyError: If the energy returns another shape or no floating-point tensor, or does
                not take points in the precision of this meter.
            ValueError: If x or context has another length than announced.
        """
        graph = x.requires_grad and torch.is_grad_enabled()
        value, gradient = self._evaluated(x, context, graph, purpose)
        if gradient is None:
            if graph:  # asked for, but not to be had
                self.counts[purpose] -= len(value)
            return value.reshape(x.shape[:-1])
        return with_gradient(x, value.reshape(x.shape[:-1]), gradient)

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
            The energies in double precision, :math:`+\infty` also where a finite energy has a
            gradient that is not finite; and the gradients, with the shape and precision of x, zero
            where the energy is infinite.

        Raises:
            BudgetExceededError: If the budget does not cover twice these points.
            EnergyError: As in a plain call, or if autograd cannot differentiate the energy.
            ValueError: As in a plain call.
        """
        value, gradient = self._evaluated(x, context, True, purpose)
        if gradient is None:
            raise EnergyError(
                "energy must be differentiable by autograd where gradients are used, got "
                "values without a graph"
            )
        return value.reshape(x.shape[:-1]), gradient

    def repeatability(
        self,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> float:
        """How much the energy differs from itself: the same points asked twice.

        The points are counted under ``"probe"``, twice each.

        Arguments:
            x: Points.
            context: A context for each point, for an energy that takes one.

        Returns:
            The largest absolute difference, in nats; 0 for an energy without noise. A difference
            below :math:`10^{-6} (1 + |E|)` counts as 0, being rounding; one between a finite and
            an infinite energy is infinite.
        """
        first, second = (self(x.detach(), context, purpose="probe") for _ in range(2))
        difference = torch.where(first == second, 0.0, (first - second).abs())
        smaller = torch.minimum(first.abs(), second.abs())
        difference = torch.where(difference < 1e-6 * (1 + smaller), 0.0, difference)
        return float(difference.amax()) if difference.numel() else 0.0

    def check(self, x: Float[Tensor, "*batch dim"]) -> float:
        """Look at what came back since the last check; the host waits for the device here.

        Arguments:
            x: Points of that phase of work, for the message.

        Returns:
            The share of points of weight zero: the energy was NaN or +inf. Points that took too
            long are among them; a warning says how many.

        Raises:
            EnergyError: If no energy was finite (the message names the region of x), or one was
                -inf, which is infinitely likely.
        """
        tally = self._read_tally()
        nan, plus, minus = (new - old for new, old in zip(tally, self._old_tally, strict=True))
        seen = self._points - self._old_points
        late = self.timeouts - self._old_timeouts
        self._old_tally, self._old_points = tally, self._points
        self._old_timeouts = self.timeouts
        if minus:
            raise EnergyError(
                f"energy must be above -inf, got -inf at {minus} of {seen} points; a point of "
                "infinite density cannot be sampled (a log-probability with its sign flipped?)"
            )
        if seen and nan + plus == seen:
            low, high = (v.tolist() for v in x.reshape(-1, x.shape[-1]).aminmax(dim=0))
            slow = f"; {late} took longer than call_timeout={self.call_timeout} s" if late else ""
            raise EnergyError(
                f"energy must be finite somewhere, got NaN or inf at all {seen} points, drawn "
                f"between {_short(low)} and {_short(high)}; give bounds, or place and width, of a "
                f"region where it is finite{slow}"
            )
        if late:
            warnings.warn(
                f"{late} of {seen} points have weight zero because they took longer than "
                f"call_timeout={self.call_timeout} s",
                RuntimeWarning,
                stacklevel=2,
            )
        return (nan + plus) / seen if seen else 0.0

    def _evaluated(
        self, x: Tensor, context: Tensor | None, graph: bool, purpose: str
    ) -> tuple[Tensor, Tensor | None]:
        """Energies (n) and gradients with the shape of x, if wanted and possible; counted."""
        cost = 2 if graph else 1
        arguments = self._admitted(x, context, cost, purpose)
        n = len(arguments[0])

        def before(done: int) -> None:
            if self._late():
                self.counts[purpose] -= cost * (n - done)
                self._refuse(n - done)

        value, gradient, late = self._calls(
            *arguments, gradient=graph, before=None if self.deadline is None else before
        )
        self.timeouts += late
        self._points += n
        if not _all_usable(value, gradient):
            value, gradient = self._weighed(value, gradient)
        return value, None if gradient is None else gradient.to(x.dtype).reshape(x.shape)

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
        if self.deadline is not None and self._late():
            self._refuse(x.shape[:-1].numel())
        self.counts[purpose] = self.counts.get(purpose, 0) + evaluations
        points = x.detach().reshape(-1, self.dim)
        return (points,) if context is None else (points, context.reshape(-1, context.shape[-1]))

    def _late(self) -> bool:
        """Whether the deadline has passed, for one process of several if for any."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        agreed = getattr(self.energy, "agreed", None)
        return bool(agreed(late)) if callable(agreed) else late

    def _refuse(self, points: int) -> None:
        assert self.deadline is not None
        past = time.monotonic() - self.deadline
        raise BudgetExceededError(
            f"deadline must not have passed, got {points} points to evaluate {past:.1f} s after it"
        )

    def _weighed(self, value: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Energies and gradients where some points have weight zero, which are counted."""
        if gradient is not None:
            steep = value.isfinite() & ~gradient.isfinite().all(-1)
            value = value.masked_fill(steep, torch.nan)
        nan, plus, minus = value.isnan(), value > _HUGE, value < -_HUGE
        tally = torch.stack([nan.sum(), plus.sum(), minus.sum()])
        # Work that moves to another device waits for the old one once.
        self._tally = tally if self._tally is None else tally + self._tally.to(tally.device)
        bad = nan | plus | minus
        value = value.masked_fill(bad, torch.inf)
        return value, None if gradient is None else gradient.masked_fill(bad[:, None], 0.0)

    def _read_tally(self) -> list[int]:
        return [0, 0, 0] if self._tally is None else self._tally.tolist()


@checked(skip=("energy",))
def metered(
    energy: Callable[..., Tensor] | MeteredEnergy,
    dim: int,
    *,
    context_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> MeteredEnergy:
    """The energy with counters: the given one's own, or fresh ones.

    Arguments:
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``.
        dim: Dimension of a point.
        context_dim: Dimension of a context; None if the energy takes none.
        dtype: Precision of the points that it sees, unless it is metered already.

    Example:
        >>> target = metered(lambda x: x.square().sum(-1), 2)
        >>> metered(target, 2) is target
        True
    """
    if isinstance(energy, MeteredEnergy):
        return energy
    return MeteredEnergy(energy, dim, context_dim=context_dim, dtype=dtype)


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


def _all_usable(value: Tensor, gradient: Tensor | None) -> bool:
    """Whether there is nothing to count and replace; on the host only, where asking is free."""
    if value.device.type != "cpu":
        return False
    # NumPy takes a fifth of the time for a few points, of which chains ask very often. A NaN
    # is the least and the largest.
    values = value.numpy()
    if not len(values):
        return True
    if not (values.min() >= -_HUGE and values.max() <= _HUGE):
        return False
    if gradient is None:
        return True
    slopes = gradient.numpy()
    return bool(slopes.min() > -math.inf and slopes.max() < math.inf)


def _short(values: list[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:3])
    return f"({shown}{', ...' if len(values) > 3 else ''})"
