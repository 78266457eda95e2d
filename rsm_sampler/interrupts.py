"""Ctrl-C between two steps, never in the middle of one.

A long run that is stopped within an optimiser's step has moved half of its parameters: what it
then saves is the state of no run. So the signal is noted, and the loop asks at the end of each
step. A second Ctrl-C interrupts at once, as usual.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["deferred_interrupt"]


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C.

    Yields:
        A function that tells whether it has come. Outside of the main thread, and where another
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

    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
