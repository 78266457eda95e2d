r"""Worker processes that evaluate a function on portions of a batch, and outlive nobody.

Python's own pool of processes is broken for good when one of them dies, and does not say which
task it died of. Here every worker has a pipe of its own and works on one portion at a time, so
that a portion whose worker died (its code crashed, or the system ran out of memory) is known: it
is tried once more in a new worker, and then refused with the exit code.

A worker ends with the process that started it, however that one ends: the kernel is asked to kill
it (``PR_SET_PDEATHSIG``, on Linux), and a thread waits for the end of the parent's own pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

__all__ = ["StartError", "WorkerError", "Workers"]

_T = TypeVar("_T")
_PR_SET_PDEATHSIG = 1
_TRIES = 2
_GRACE = 5.0  # seconds that a worker has to end by itself


class WorkerError(RuntimeError):
    """A portion of work ended two workers.

    Attributes:
        portion: Its index.
        code: Exit code of the last of them: negative for a signal, None if it is not known.
    """

    def __init__(self, portion: int, code: int | None) -> None:
        super().__init__(f"portion {portion} ended {_TRIES} workers, the last with {code}")
        self.portion, self.code = portion, code


class StartError(RuntimeError):
    """A worker ended before it was ready.

    Attributes:
        code: Its exit code.
    """

    def __init__(self, code: int | None) -> None:
        super().__init__(f"a worker ended with {code} before it was ready")
        self.code = code


class _Worker:
    """One process, its pipe, and what it works on."""

    def __init__(self, context: BaseContext, main: Callable[[Any], Any], setup: Any) -> None:  # noqa: ANN401
        ours, theirs = context.Pipe()
        self.pipe: Connection[Any, Any] = ours
        arguments = (main, theirs, os.getpid(), setup)
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_live, args=arguments
        )
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: int | None = None  # the number of the portion sent last, while it is at work

    def send(self, task: int, portion: Any) -> bool:  # noqa: ANN401
        """Whether the worker could be given a portion: it may have died meanwhile."""
        try:
            self.pipe.send((task, portion))
        except (BrokenPipeError, ConnectionError):
            return False
        except BaseException:  # half a message: the pipe is of no use any more
            self.kill()
            raise
        self.task = task
        return True

    def end(self) -> int | None:
        """Close the pipe, which ends an idle worker; its exit code."""
        self.pipe.close()
        self.process.join(_GRACE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(_GRACE)
        return self.process.exitcode

    def kill(self) -> None:
        """End the worker whatever it does."""
        self.process.kill()
        self.end()


class Workers(Generic[_T]):
    """Processes that apply one function to portions of work.

    They start when they are first needed, and end with :meth:`close`, with this object, or with
    the process.

    Arguments:
        count: Most processes.
        main: Makes the function, in the worker: called with ``setup``. At the top of a module.
        setup: What it is made from.
        start_method: ``"spawn"``, ``"forkserver"`` or ``"fork"``.
    """

    def __init__(
        self,
        count: int,
        main: Callable[[Any], Callable[[Any], _T]],
        setup: Any,  # noqa: ANN401
        *,
        start_method: str,
    ) -> None:
        self.count, self.main, self.setup = count, main, setup
        self._context = multiprocessing.get_context(start_method)
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._sent = 0
        # Before Python waits for its child processes, and in this process alone.
        self._end = Finalize(self, _end_all, (self._all,), exitpriority=10)

    def map(
        self, portions: Sequence[Any], *, look: Callable[[_T], None] | None = None
    ) -> list[_T]:
        """The function of each portion, in their order.

        Arguments:
            portions: What can be sent to another process.
            look: Called with every answer as it comes; what it raises ends the call, and later
                answers are dropped.

        Raises:
            StartError: If a worker ends before it has begun.
            WorkerError: If a portion ends two workers.
        """
        with self._lock:
            return self._map(portions, look)

    def close(self) -> None:
        """End the processes."""
        self._end()

    def _map(self, portions: Sequence[Any], look: Callable[[_T], None] | None) -> list[_T]:
        waiting, found = deque(range(len(portions))), dict[int, _T]()
        tries, first = [0] * len(portions), self._sent
        self._sent += len(portions)  # answers to earlier calls have lower numbers
        while len(found) < len(portions):
            self._hand_out(portions, waiting, first)
            # Its end closes a worker's pipe; where siblings hold a copy, its sentinel tells.
            watched: dict[Any, _Worker] = {}
            for worker in self._all:
                watched |= {worker.pipe: worker, worker.process.sentinel: worker}
            for worker in {watched[event] for event in wait(list(watched))}:
                task = worker.task
                known = len(found)
                alive = self._hear(worker, first, found)
                if look is not None and len(found) > known and task is not None:
                    look(found[task - first])
                if alive:
                    continue
                self._all.remove(worker)
                code = worker.end()
                if not worker.ready:
                    raise StartError(code)
                if task is not None and task >= first and task - first not in found:
                    portion = task - first
                    tries[portion] += 1
                    if tries[portion] == _TRIES:
                        raise WorkerError(portion, code)
                    waiting.appendleft(portion)
        return [found[i] for i in range(len(portions))]

    def _hand_out(self, portions: Sequence[Any], waiting: deque[int], first: int) -> None:
        """Give waiting portions to workers that are ready, and start workers for the others."""
        for worker in self._all:
            idle = worker.ready and worker.task is None
            # One that died while it was idle is found in the next round.
            if waiting and idle and worker.send(first + waiting[0], portions[waiting[0]]):
                waiting.popleft()
        coming = sum(not worker.ready for worker in self._all)
        while coming < len(waiting) and len(self._all) < self.count:
            self._all.append(_Worker(self._context, self.main, self.setup))
            coming += 1

    def _hear(self, worker: _Worker, first: int, found: dict[int, _T]) -> bool:
        """Take in what a worker has to say; whether it still lives."""
        try:
            while worker.pipe.poll():
                task, answer = worker.pipe.recv()
                if task is None:
                    worker.ready = True
                    if answer is not None:
                        raise answer
                    continue
                worker.task = None
                if task >= first:
                    found[task - first] = answer
        except (EOFError, ConnectionError):
            return False
        return worker.process.exitcode is None


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.task is None and worker.ready:
            worker.pipe.close()
        else:
            worker.process.kill()
    for worker in workers:
        worker.end()
    workers.clear()


def _live(
    main: Callable[[Any], Callable[[Any], Any]],
    pipe: Connection[Any, Any],
    parent: int,
    setup: Any,  # noqa: ANN401
) -> None:
    """What a worker does, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    try:
        function = main(setup)
    except Exception as error:
        pipe.send((None, RuntimeError(f"a worker process cannot start: {error!r}")))
        return
    pipe.send((None, None))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task, portion = pipe.recv()
            pipe.send((task, function(portion)))


def _die_with(parent: int) -> None:
    """End this process when the one that started it ends."""
    known = multiprocessing.parent_process()
    direct = os.getppid() == parent  # and not the server of "forkserver", which outlives nobody
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))

    def watch() -> None:
        while known is not None and known.is_alive():
            known.join(1.0)
            if direct and os.getppid() != parent:
                break
        os._exit(1)

    if known is not None:
        threading.Thread(target=watch, daemon=True).start()
