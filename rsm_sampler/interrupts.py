"""Ctrl-C and SIGTERM between two steps, never in the middle of one.

A long run that is stopped within an optimiser's step has moved half of its parameters: what it
then saves is the state of no run. So the signal is noted, and the loop asks at the end of each
step. A second one interrupts at once, as usual.

Schedulers and container hosts end a process by SIGTERM, some time before they kill it. Within
:func:`terminable` it acts as Ctrl-C does, so that what Ctrl-C would save is saved, and then ends
the process with the status 143 (128 + 15) by which a shell knows the signal.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["TERMINATED", "deferred_interrupt", "terminable"]

TERMINATED = 128 + int(signal.SIGTERM)
"""Exit status of a process that SIGTERM ended."""


class _OnTerm:
    """What SIGTERM does within :func:`terminable`: it interrupts, now or after the step."""

    def __init__(self) -> None:
        self.came = False
        self.deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first, self.came = not self.came, True
        if not (self.deferred and first):
            raise KeyboardInterrupt


@contextlib.contextmanager
def terminable(wanted: bool = True) -> Iterator[None]:
    """Let a SIGTERM within the block interrupt it as Ctrl-C does, and then end the process.

    The handler that was in place is there again afterwards. Outside of the main thread, and where
    another handler than the system's own is in place, nothing is changed.

    Arguments:
        wanted: Whether to do so at all, e.g. whether there is something to save.

    Raises:
        SystemExit: With :data:`TERMINATED`, at the end of the block or when the
            KeyboardInterrupt leaves it, if SIGTERM came.

    Example:
        >>> with terminable():
        ...     try:
        ...         signal.raise_signal(signal.SIGTERM)
        ...     except KeyboardInterrupt:
        ...         pass  # and save
        Traceback (most recent call last):
            ...
        SystemExit: 143
    """
    own = threading.current_thread() is threading.main_thread()
    found = signal.getsignal(signal.SIGTERM) if own and wanted else None
    within = isinstance(found, _OnTerm)  # another block, of the same process
    if found is not signal.SIG_DFL and not within:
        yield
        return
    handler = found if isinstance(found, _OnTerm) else _OnTerm()
    if not within:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except KeyboardInterrupt:
        if not handler.came:
            raise
    finally:
        if not within:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if handler.came:
        raise SystemExit(TERMINATED)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C, and within :func:`terminable` the first SIGTERM.

    Yields:
        A function that tells whether one has come. Outside of the main thread, and where another
        handler than Python's own is in place, nothing is changed and it never tells so.

    Example:
        >>> with deferred_interrupt() as interrupted:
        ...     for step in range(3):
        ...         if interrupted():
        ...             break
        >>> step
        2
    """
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            signal.default_int_handler(number, frame)
        seen = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    term = signal.getsignal(signal.SIGTERM)
    handler = term if isinstance(term, _OnTerm) else None
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if mine:
        signal.signal(signal.SIGINT, note)
    if handler is not None:
        handler.deferred = True
    try:
        yield lambda: seen or (handler is not None and handler.came)
    finally:
        if handler is not None:
            handler.deferred = False
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
