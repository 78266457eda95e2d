r"""Adapters: a user's own density as an energy.

The library knows one thing about a target, a callable ``energy(x)`` on tensors with low values
where points are likely. What people have is a NumPy function, perhaps for one point at a time and
slow; a log-density of the opposite sign; or a `torch.distributions` object. Each adapter changes
the form and nothing else: a NaN stays a NaN (it is for the caller to notice), :math:`+\infty`
stays a point of weight zero, and an exception of the user's function arrives with its own type and
traceback, and with a note that names the point.

Worker processes (:mod:`energies.workers`). Each worker receives the function once, when it starts;
a call only ships points and values. Points whose worker dies are tried once more in a new one. The
default start method is ``spawn``, which is safe beside PyTorch's threads. As always with spawned
processes, a script that uses it protects its entry with ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, VonMises, constraints

from energies.target import Target
from energies.workers import StartError, WorkerError, Workers
from rsm_sampler.checked import checked
from rsm_sampler.target.energy import EnergyError

__all__ = [
    "DistributionTarget",
    "LogProbEnergy",
    "NumpyEnergy",
    "from_distribution",
    "from_log_prob",
    "from_numpy",
]

_Array = npt.NDArray[np.float64]


class _Failure:
    """An exception on its way from a worker to the caller."""

    def __init__(self, error: Exception, trace: str | None = None) -> None:
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:  # an exception class that cannot be rebuilt would break the whole pool
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
            self.error.__notes__ = getattr(error, "__notes__", [])
        self.trace = trace


def _evaluate(
    fn: Callable[..., Any], vectorized: bool, offset: int, arrays: Sequence[_Array]
) -> _Array:
    """Values of `fn` on the rows of points (and contexts), with notes on what went wrong."""
    count = len(arrays[0])
    if vectorized:
        try:
            found = fn(*arrays)
        except Exception as error:
            error.add_note(
                f"raised by the energy function on points {offset} to {offset + count - 1}"
            )
            raise
        values = _numbers(found, "an array of energies, one for each point")
        if values.shape != (count,):
            raise ValueError(
                f"fn must return shape ({count},) for points of shape {arrays[0].shape},"
                f" got {values.shape}"
                " (for a function of one point, pass vectorized=False)"
            )
    else:
        rows = []
        for i, row in enumerate(zip(*arrays, strict=True)):
            try:
                found = fn(*row)
            except Exception as error:
                error.add_note(
                    f"raised by the energy function at point {offset + i}: {_describe(row)}"
                )
                raise
            value = _numbers(found, "one number for one point")
            if value.size != 1:
                raise ValueError(
                    f"fn must return one number for one point, got shape {value.shape}"
                )
            rows.append(value.reshape(()))
        values = np.stack(rows) if rows else np.empty(0)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"fn must return real numbers, got dtype {values.dtype}")
    return values.astype(np.float64)


def _numbers(found: object, wanted: str) -> np.ndarray:
    """What a function returned, as an array; blobs, dictionaries and None are refused."""
    if isinstance(found, tuple):
        kinds = ", ".join(type(part).__name__ for part in found)
        raise ValueError(
            f"fn must return {wanted}, and nothing beside it, got a tuple ({kinds}); return its "
            "first part alone"
        )
    if found is None or isinstance(found, dict | str | bytes):
        raise ValueError(
            f"fn must return {wanted}, got {type(found).__name__}; a point of weight zero has "
            "the energy inf"
        )
    return np.asarray(found)


def _describe(row: Sequence[_Array]) -> str:
    return ", ".join(
        f"{name} = {value.tolist()}" for name, value in zip(("x", "context"), row, strict=False)
    )


def _worker(
    setup: tuple[bytes, bool],
) -> Callable[[tuple[int, Sequence[_Array]]], _Array | _Failure]:
    """What a worker process does with a portion: the index of its first point, and arrays."""
    fn, vectorized = pickle.loads(setup[0]), setup[1]

    def run(portion: tuple[int, Sequence[_Array]]) -> _Array | _Failure:
        try:
            return _evaluate(fn, vectorized, *portion)
        except Exception as error:
            return _Failure(error, traceback.format_exc())

    return run


def _raise_failure(answer: _Array | _Failure) -> None:
    if isinstance(answer, _Failure):
        answer.error.add_note(f"in a worker process:\n{answer.trace}")
        raise answer.error


def _region(points: _Array) -> str:
    """Where points are, for a message: the range of each coordinate, of eight at most."""
    low, high = points.min(0), points.max(0)
    ranges = [f"x[{i}] in [{low[i]:g}, {high[i]:g}]" for i in range(min(8, len(low)))]
    return ", ".join(ranges) + (", ..." if len(low) > 8 else "")


def _ending(code: int | None) -> str:
    """How a process ended, for a message."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "an unknown signal"
    memory = ", as the system does when memory is short" if name == "SIGKILL" else ""
    return f"exit code {code}: killed by {name}{memory}"


@checked
class NumpyEnergy:
    r"""A NumPy function as an energy; see :func:`from_numpy`.

    Values carry no gradient. With workers, the processes start at the first call and end with
    :meth:`close`, at the end of a ``with`` block, or with the object. A copy that travels to
    another process starts its own.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        vectorized: bool = True,
        workers: int = 0,
        context: bool = False,
        start_method: str = "spawn",
    ) -> None:
        if not callable(fn):
            raise ValueError(f"fn must be callable, got {fn!r}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if start_method not in multiprocessing.get_all_start_methods():
            methods = ", ".join(multiprocessing.get_all_start_methods())
            raise ValueError(f"start_method must be one of {methods}, got {start_method!r}")
        self._payload = b""
        if workers:
            try:
                self._payload = pickle.dumps(fn)
            except Exception as error:
                raise ValueError(
                    f"fn must be picklable when workers > 0, got {fn!r} ({error}). Define it at"
                    " the top level of a module, not as a lambda or inside a function"
                ) from error
        self.fn = fn
        self.vectorized = vectorized
        self.workers = workers
        self.context = context
        self.start_method = start_method
        self._pool: Workers[_Array | _Failure] | None = None
        self._owner = 0
        self._closed = False

    def __repr__(self) -> str:
        options = f"vectorized={self.vectorized}, workers={self.workers}"
        return f"{type(self).__name__}({self.fn!r}, {options})"

    def __call__(
        self, x: Float[Tensor, "*batch dim"], context: Tensor | None = None
    ) -> Float[Tensor, "*batch"]:
        r"""Energies of points with shape :math:`(*, d)`, in the dtype and on the device of `x`."""
        if self.context and context is None:
            raise ValueError("context must be given, since the energy was made with context=True")
        if not self.context and context is not None:
            raise ValueError(
                "context must be left out, since the energy was made with context=False"
            )
        if self._closed:
            raise RuntimeError("the energy is closed, its worker processes have ended")
        batch = x.shape[:-1]
        tensors = [x] if context is None else [x, context.expand(*batch, context.shape[-1])]
        arrays = [
            # A copy: the function may work in place.
            t.detach().to("cpu", torch.float64, copy=True).reshape(-1, t.shape[-1]).numpy()
            for t in tensors
        ]
        if not len(arrays[0]):
            return x.new_empty(batch)
        values = (
            self._distribute(arrays)
            if self.workers
            else _evaluate(self.fn, self.vectorized, 0, arrays)
        )
        return torch.from_numpy(values).reshape(batch).to(dtype=x.dtype, device=x.device)

    def _distribute(self, arrays: list[_Array]) -> _Array:
        pool = self._open()
        count = len(arrays[0])
        # one point may take longer than another: smaller portions even it out
        portions = min(count, self.workers if self.vectorized else 4 * self.workers)
        bounds = [count * i // portions for i in range(portions + 1)]
        pieces = [(i, [a[i:j] for a in arrays]) for i, j in itertools.pairwise(bounds)]
        try:
            results = pool.map(pieces, look=_raise_failure)
        except StartError as error:
            raise RuntimeError(
                f"a worker process could not start ({_ending(error.code)}): a script needs"
                ' `if __name__ == "__main__":`, and fn must live in a module that can be imported'
            ) from error
        except WorkerError as error:
            offset, (x, *_) = pieces[error.portion]
            raise EnergyError(
                f"fn must return values, but ended two worker processes ({_ending(error.code)}) "
                f"at points {offset} to {offset + len(x) - 1} of {count}, in {_region(x)}"
            ) from error
        return np.concatenate([result for result in results if not isinstance(result, _Failure)])

    def _open(self) -> Workers[_Array | _Failure]:
        if (
            self._pool is None or self._owner != os.getpid()
        ):  # a forked child cannot use its parent's pool
            self._pool = Workers(
                self.workers,
                _worker,
                (self._payload, self.vectorized),
                start_method=self.start_method,
            )
            self._owner = os.getpid()
        return self._pool

    def close(self) -> None:
        """End the worker processes; the energy cannot be called again."""
        self._closed = True
        pool, self._pool = self._pool, None
        if pool is not None and self._owner == os.getpid():
            pool.close()

    def __enter__(self) -> NumpyEnergy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_owner": 0}


@checked
def from_numpy(
    fn: Callable[..., Any],
    *,
    vectorized: bool = True,
    workers: int = 0,
    context: bool = False,
    start_method: str = "spawn",
) -> NumpyEnergy:
    r"""Energy from a NumPy function, of a batch or of one point, optionally in parallel processes.

    The function sees float64 arrays. It returns energies, that is minus the log-density up to a
    constant; :math:`+\infty` is a point of weight zero.

    Arguments:
        fn: Takes points with shape :math:`(n, d)` and returns values with shape :math:`(n)`; with
            `vectorized` off, takes one point with shape :math:`(d)` and returns a number. With
            `context` on, a second argument of shape :math:`(n, d_c)` or :math:`(d_c)`.
        vectorized: Whether `fn` takes a batch of points.
        workers: Number of worker processes; 0 evaluates in this one. Pays off where a point takes
            a millisecond or more.
        context: Whether `fn` takes a context.
        start_method: How workers start: ``"spawn"``, ``"forkserver"`` or ``"fork"``. The last is
            fastest and can hang in a process that runs threads.

    Returns:
        The energy, a callable from tensors to tensors. With workers, also a context manager.

    Raises:
        ValueError: If `fn` is not callable, or cannot be pickled although there are workers.
        EnergyError: When called, if `fn` ends the worker process that evaluates it (a crash, or
            no memory) and does so again in a new one.

    Example:
        >>> energy = from_numpy(lambda x: 0.5 * (x**2).sum(-1))
        >>> energy(torch.tensor([[3.0, 4.0]]))
        tensor([12.5000])
        >>> from energies import decay_energy  # NumPy code for one point
        >>> energy = from_numpy(decay_energy, vectorized=False)
        >>> energy(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3])
    """
    return NumpyEnergy(
        fn, vectorized=vectorized, workers=workers, context=context, start_method=start_method
    )


@checked
class LogProbEnergy:
    """Minus a log-density; see :func:`from_log_prob`."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        if not callable(fn):
            raise ValueError(f"fn must be callable, got {fn!r}")
        self.fn = fn

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fn!r})"

    def __call__(
        self, x: Float[Tensor, "*batch dim"], *context: Tensor
    ) -> Float[Tensor, "*batch"]:
        r"""Energies of points with shape :math:`(*, d)`, with the gradient of `fn`."""
        log_density = self.fn(x, *context)
        if not isinstance(log_density, Tensor):
            raise ValueError(f"fn must return a tensor, got {type(log_density).__name__}")
        if log_density.shape != x.shape[:-1]:
            raise ValueError(
                f"fn must return shape {tuple(x.shape[:-1])} for points of shape {tuple(x.shape)},"
                f" got {tuple(log_density.shape)}"
            )
        return -log_density


@checked
def from_log_prob(fn: Callable[..., Tensor]) -> LogProbEnergy:
    r"""Energy from a log-density: turns the sign, and checks the shape.

    Arguments:
        fn: Takes points with shape :math:`(*, d)` (and a context, if the energy is called with
            one) and returns log-densities with shape :math:`(*)`, up to a constant.

    Returns:
        The energy; its gradients are those of `fn`.

    Raises:
        ValueError: If `fn` is not callable; when called, if `fn` returns another shape.

    Example:
        >>> energy = from_log_prob(lambda x: -x.abs().sum(-1))
        >>> energy(torch.tensor([1.0, -2.0]))
        tensor(3.)
    """
    return LogProbEnergy(fn)


@checked
class DistributionTarget(Target):
    r"""A `torch.distributions` object as a target; see :func:`from_distribution`.

    The box in `extent` is estimated from 20,000 draws and widened by a quarter.
    """

    def __init__(self, distribution: Distribution, *, name: str | None = None) -> None:
        if not isinstance(distribution, Distribution):
            raise ValueError(
                f"distribution must be a torch Distribution, got {type(distribution).__name__}"
            )
        event = tuple(distribution.event_shape)
        batch = tuple(distribution.batch_shape)
        if batch:
            raise ValueError(
                f"distribution must have an empty batch shape, got {batch};"
                " torch.distributions.Independent turns a batch into coordinates"
            )
        if len(event) > 1:
            raise ValueError(f"distribution must have event shape () or (dim,), got {event}")
        try:
            self._support = distribution.support
        except NotImplementedError:
            self._support = None
        if isinstance(distribution, VonMises):  # whose density repeats itself on the whole line
            self._support = constraints.interval(-math.pi, math.pi)
        if self._support is not None and self._support.is_discrete:
            raise ValueError(f"distribution must be continuous, got {distribution}")
        self.distribution = distribution
        self._scalar = not event
        self.dim = event[0] if event else 1
        draws = self._draw(20_000, torch.Generator().manual_seed(0), torch.device("cpu"))
        low, high = draws.amin(0).cpu(), draws.amax(0).cpu()
        margin = (high - low) / 4
        super().__init__(
            dim=self.dim,
            name=type(distribution).__name__.lower() if name is None else name,
            extent=(low - margin, high + margin),
            log_z=0.0,
        )

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""Minus the log-density; :math:`+\infty` outside of the support, NaN where `x` is."""
        flat = x.reshape(-1, self.dim)
        values = flat.squeeze(-1) if self._scalar else flat
        if self._support is None:
            return -self.distribution.log_prob(values).to(x.dtype).reshape(x.shape[:-1])
        # a distribution may refuse points outside of its support, or give them a density
        inside = self._support.check(values)
        nan = flat.isnan().any(-1)
        energy = torch.full_like(flat[:, 0], torch.inf).masked_fill(nan, torch.nan)
        inside = inside & ~nan
        if bool(inside.any()):
            found = -self.distribution.log_prob(values[inside]).to(x.dtype)
        else:  # some distributions refuse an empty batch
            found = flat[inside].sum(-1)
        return energy.index_put((inside,), found).reshape(x.shape[:-1])

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        # torch.distributions know the global generator only: lend it a seed, then restore it
        draws: Tensor
        if generator is None:
            draws = self.distribution.sample((n,))
        else:
            seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
            with torch.random.fork_rng():
                torch.manual_seed(int(seed))
                draws = self.distribution.sample((n,))
        return draws.reshape(n, self.dim).to(torch.float64)


@checked
def from_distribution(
    distribution: Distribution, *, name: str | None = None
) -> DistributionTarget:
    r"""Target from a `torch.distributions` object with exact draws, :math:`\log Z = 0`.

    Outside of the support the energy is :math:`+\infty`, not an error, whether or not the
    distribution validates its arguments.

    Arguments:
        distribution: A continuous distribution with an empty batch shape, and event shape
            :math:`(d)` or, for one coordinate, :math:`()`.
        name: Name for reports; that of the distribution's class if left out.

    Returns:
        The target.

    Raises:
        ValueError: If the distribution is discrete, or its shapes are others.

    Example:
        >>> target = from_distribution(torch.distributions.Exponential(1.0))
        >>> target(torch.tensor([[2.0], [-1.0]]))
        tensor([2., inf])
    """
    return DistributionTarget(distribution, name=name)
