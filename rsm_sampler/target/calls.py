"""Calls of a user's energy, and what they may do without harm.

An energy gets tensors of its own, in one precision, contiguous and without a graph. It may work
in place on them, keep them, and change them later; it may turn gradients off, set another default
precision, and return values that require a gradient. None of that reaches the library.

A call may be bounded in time. On POSIX systems, in the main thread, an alarm
(``signal.setitimer``) raises an exception within the energy. Python runs the handlers of signals
between its own instructions: a function of a C extension that takes long returns first. An energy
that catches every ``BaseException``, or sets an alarm of its own, is not bounded.
"""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.target.batches import (
    BatchSize,
    available_memory,
    peak_memory,
    resident_memory,
)

__all__ = ["Calls", "with_gradient"]

_SECONDS = 1.0  # of a call, where points can be divided
_NOTICEABLE = 0.05  # seconds of a call beside which looking at the memory costs nothing
_FORGETTING = 0.9  # of what the mean time per point has in it, with every call


class EnergyError(ValueError):
    """An energy returned what no energy can return, or cannot be called as it has to be."""


class _TimeUp(BaseException):
    """Raised by the alarm; no ``except Exception`` of an energy catches it."""


class Calls:
    """A user's energy: called safely, with as many points at once as time and memory allow.

    Arguments:
        energy: The energy.
        dtype: Precision of the points and contexts that it sees.
        timeout: Seconds of one call; None for no limit.
        whole: Whether to call it with all points at once and without a limit of time, because it
            sees to both by itself.

    Attributes:
        seconds: Time spent in the energy.
    """

    def __init__(
        self,
        energy: Callable[..., Tensor],
        dtype: torch.dtype = torch.float64,
        timeout: float | None = None,
        whole: bool = False,
    ) -> None:
        self.energy, self.dtype, self.timeout, self.whole = energy, dtype, timeout, whole
        workers = getattr(energy, "workers", 0)
        least = 4 * workers if isinstance(workers, int) else 1
        most = _SECONDS if timeout is None else min(_SECONDS, timeout / 4)
        # Gradients take more time and memory than values.
        self._sizes = {False: BatchSize(most, least), True: BatchSize(most, least)}
        self.seconds = 0.0
        self._recent = [0.0, 0.0]  # seconds and points
        self._last = 0.0

    @property
    def seconds_per_point(self) -> float:
        """Mean time of a point over the last calls; NaN before the first."""
        seconds, points = self._recent
        return seconds / points if points else math.nan

    def __call__(
        self,
        points: Float[Tensor, "n dim"],
        *contexts: Float[Tensor, "n context_dim"],
        gradient: bool = False,
        before: Callable[[int], None] | None = None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n dim"] | None, int]:
        """Energies in double precision, without a graph.

        Arguments:
            points: The points.
            contexts: A context for each, or nothing.
            gradient: Whether to differentiate as well.
            before: Called with the number of points done before every further call of the energy.

        Returns:
            The energies; their gradients, in the precision that the energy sees, or None where
            it returned values without a graph; and the number of points whose time was up, which
            have energy +inf.

        Raises:
            EnergyError: If the energy returns another shape, or no floating-point tensor, or does
                not take points in the wanted precision.
        """
        n = len(points)
        if n == 0:
            empty = torch.zeros(0, dtype=torch.float64, device=points.device)
            return empty, points.detach().to(self.dtype) if gradient else None, 0
        size = self._sizes[gradient]
        values: list[Tensor] = []
        slopes: list[Tensor | None] = []
        late = done = 0
        while done < n:
            if done and before is not None:
                before(done)
            count = n if self.whole else size.next(n - done)
            part = [points, *contexts]
            if count < n:
                part = [tensor[done : done + count] for tensor in part]
            found = self._measured(part, gradient, size)
            if found is None:
                continue  # with fewer points
            value, slope, missed = found
            values.append(value)
            slopes.append(slope)
            late, done = late + missed, done + count
        if len(values) == 1:
            return values[0], slopes[0], late
        whole = [slope for slope in slopes if slope is not None]
        joined = torch.cat(whole) if len(whole) == len(slopes) else None
        return torch.cat(values), joined, late

    def _measured(
        self, part: list[Tensor], gradient: bool, size: BatchSize
    ) -> tuple[Tensor, Tensor | None, int] | None:
        """One call, from which the size of the next is learned; None if memory was short."""
        n = len(part[0])
        watch = not self.whole and part[0].device.type == "cpu"
        watch = watch and 2 * n > size.size and (not size.settled or self._last > _NOTICEABLE)
        resident = resident_memory() if watch else None
        free = None if resident is None else available_memory()
        peak = 0 if resident is None else peak_memory()
        started = time.perf_counter()
        try:
            found = self._bounded(part, gradient)
        except (MemoryError, RuntimeError) as error:
            if n == 1 or self.whole or not _short_of_memory(error):
                raise
            found, short = None, True  # what the error's frames hold is free from here on
        else:
            short = False
        took = time.perf_counter() - started
        if short:
            size.halve(n)
            return None
        if found is None:
            return self._one_by_one(part, gradient, size)
        self._last = took
        self._count(n, took)
        if not self.whole:
            if resident is not None:
                highest = peak_memory()
                size.learn_memory(n, max(0, highest - resident), highest > peak, free)
            size.learn(n, took)
        return *found, 0

    def _one_by_one(
        self, part: list[Tensor], gradient: bool, size: BatchSize
    ) -> tuple[Tensor, Tensor | None, int]:
        """The points of a call whose time was up, each with the whole of that time."""
        n = len(part[0])
        size.run_out(n)
        value = torch.full((n,), torch.inf, dtype=torch.float64, device=part[0].device)
        slope = torch.zeros_like(part[0], dtype=self.dtype) if gradient else None
        late = 0
        for i in range(n):
            started = time.perf_counter()
            found = self._bounded([tensor[i : i + 1] for tensor in part], gradient)
            self._count(1, time.perf_counter() - started)
            if found is None:
                late += 1
                continue
            value[i] = found[0][0]
            if found[1] is None:
                slope = None
            elif slope is not None:
                slope[i] = found[1][0]
        return value, slope, late

    def _count(self, points: int, seconds: float) -> None:
        self.seconds += seconds
        self._recent = [
            _FORGETTING * self._recent[0] + seconds,
            _FORGETTING * self._recent[1] + points,
        ]

    def _bounded(self, part: list[Tensor], gradient: bool) -> tuple[Tensor, Tensor | None] | None:
        """One call; None if its time was up."""
        if self.timeout is None or self.whole:
            return self._called(part, gradient)
        if not hasattr(signal, "setitimer") or (
            threading.current_thread() is not threading.main_thread()
        ):
            warnings.warn(
                "call_timeout has no effect here: only the main thread of a POSIX system can "
                "interrupt an energy",
                RuntimeWarning,
                stacklevel=2,
            )
            self.timeout = None
            return self._called(part, gradient)
        armed, left, interval = True, 0.0, 0.0

        def ring(*_: Any) -> None:  # noqa: ANN401
            if armed:
                raise _TimeUp

        started = time.monotonic()
        handler = signal.signal(signal.SIGALRM, ring)
        try:
            try:
                left, interval = signal.setitimer(signal.ITIMER_REAL, self.timeout)
                return self._called(part, gradient)
            finally:
                armed = False
        except _TimeUp:
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left:  # somebody else's alarm, put off until now
                rest = left - (time.monotonic() - started)
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, rest), interval)

    def _called(self, part: list[Tensor], gradient: bool) -> tuple[Tensor, Tensor | None]:
        """One call, with tensors of its own, after which torch's settings are as before."""
        default = torch.get_default_dtype()
        device = part[0].device
        try:
            with torch.enable_grad():
                points, *contexts = (self._own(tensor) for tensor in part)
                if not gradient:
                    value = well_formed(self.energy(points, *contexts), part[0])
                    return value.detach().to(device, torch.float64, copy=True), None
                leaf = points.requires_grad_()
                # A leaf that requires a gradient cannot be changed in place; its copy can.
                value = well_formed(self.energy(leaf.clone(), *contexts), part[0])
                slope = None
                if value.requires_grad:
                    one = torch.ones_like(
                        value
                    )  # a sum would need the setting that the energy left
                    (slope,) = torch.autograd.grad(value, leaf, one, allow_unused=True)
                return value.detach().to(device, torch.float64, copy=True), slope
        except RuntimeError as error:
            explained = _explained(error, self.dtype)
            if explained is None:
                raise
            raise explained from error
        finally:
            if torch.get_default_dtype() is not default:
                torch.set_default_dtype(default)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)


def _short_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return any(words in said for words in ("out of memory", "not enough memory", "can't allocate"))


def _explained(error: RuntimeError, dtype: torch.dtype) -> EnergyError | None:
    """An error of PyTorch in words that name what to do, if its cause is known."""
    said = str(error)
    if "dtype" in said and ("double" in said.lower() or "float" in said.lower()):
        other = torch.float32 if dtype is torch.float64 else torch.float64
        return EnergyError(
            f"energy must take points in {dtype}, got the error '{said}'; convert its own tensors "
            f"to that precision, or give dtype={other}"
        )
    if "inplace operation" in said or "in-place operation" in said:
        return EnergyError(
            "energy must not change in place what its gradient needs, got the error "
            f"'{said.splitlines()[0]}'; work on a copy of x, or do without gradients of it"
        )
    return None


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


def with_gradient(
    x: Float[Tensor, "*batch dim"],
    value: Float[Tensor, "*batch"],
    gradient: Float[Tensor, "*batch dim"],
) -> Float[Tensor, "*batch"]:
    """Known values that carry known gradients to the points.

    Arguments:
        x: The points, which require a gradient.
        value: The values.
        gradient: Their gradients.

    Example:
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> value = with_gradient(x, torch.zeros(1), torch.full((1, 2), 3.0))
        >>> torch.autograd.grad(value.sum(), x)[0]
        tensor([[3., 3.]])
    """
    found: Tensor = _WithGradient.apply(x, value, gradient)
    return found


class _WithGradient(torch.autograd.Function):
    """Known values (*batch) with known gradients (*batch, dim)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient).unsqueeze(-1) * gradient, None, None
