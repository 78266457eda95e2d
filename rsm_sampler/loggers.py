"""Loggers: where a run writes its numbers.

A :class:`Logger` receives named numbers at a step. Whatever has the two methods ``log`` and
``close`` is one. Three come with the library: :class:`JSONLinesLogger` (the default of long runs:
a text file that any tool reads), :class:`MemoryLogger` and :class:`TensorBoardLogger`.

A run that is resumed from a checkpoint repeats the steps after it. Given the step of the
checkpoint, a logger on disk drops what was written after that step, so that the log of a resumed
run is the log of a run that never stopped.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rsm_sampler.checked import checked

_HEAD = b'{"step": '


@runtime_checkable
class Logger(Protocol):
    """Anything that takes named numbers at a step."""

    def log(self, step: int, **values: float) -> None:
        """Take the values of one step.

        Arguments:
            step: The step they belong to.
            **values: Numbers by name. Names that are no identifiers go through a dict:
                ``logger.log(3, **{"critic/loss": 0.5})``.
        """

    def close(self) -> None:
        """Write what is still held back, and release the file."""


@checked(least={"step": 0}, skip=("values",))
class JSONLinesLogger:
    r"""Writes one line of JSON per call, at once.

    A line such as ``{"step": 3, "loss": 0.5}`` reaches the file before ``log`` returns. A line
    that a crash cut short is removed when the file is opened again.

    Arguments:
        path: The file, appended to where it exists. Missing folders are made.
        resume_step: The step of the checkpoint from which the run goes on: the first record of a
            later step and everything after it is dropped. ``None`` keeps all.

    Raises:
        ValueError: If the file exists and holds something else.

    Note:
        JSON has no infinity and no NaN: these are written as the strings ``"inf"``, ``"-inf"``
        and ``"nan"``, and :meth:`read` turns them back.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     logger = JSONLinesLogger(f"{folder}/log.jsonl")
        ...     logger.log(0, loss=1.5)
        ...     logger.log(1, loss=float("nan"))
        ...     logger.close()
        ...     JSONLinesLogger.read(f"{folder}/log.jsonl")
        [{'step': 0, 'loss': 1.5}, {'step': 1, 'loss': nan}]
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _mend(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, **values: float) -> None:
        """Append one record.

        Arguments:
            step: The step the values belong to.
            **values: Numbers by name.
        """
        record = {"step": int(step)} | {name: _to_json(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        self._file.close()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """All records of a file, also while a run still writes it.

        Arguments:
            path: The file to read.

        Returns:
            One dict per call of ``log``, in order, each with its ``step``. A last line that was
            cut short is left out.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If any other line is not a record; the message names it.
        """
        return [record for record, _ in _records(Path(path).expanduser())]


@checked(least={"step": 0}, skip=("values",))
class MemoryLogger:
    """Keeps all records in memory, for notebooks and tests.

    Attributes:
        records: One dict per call of ``log``, in order, each with its ``step``.

    Example:
        >>> logger = MemoryLogger()
        >>> logger.log(0, loss=1.5)
        >>> logger.log(10, loss=0.5, ess=0.9)
        >>> logger.column("loss")
        ([0, 10], [1.5, 0.5])
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def log(self, step: int, **values: float) -> None:
        """Keep one record.

        Arguments:
            step: The step the values belong to.
            **values: Numbers by name.
        """
        record = {name: float(value) for name, value in values.items()}
        self.records.append({"step": int(step)} | record)

    def close(self) -> None:
        """Nothing to release."""

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """One quantity over time.

        Arguments:
            name: The name it was logged under.

        Returns:
            The steps at which it was logged, and its values there.
        """
        found = [record for record in self.records if name in record]
        return [record["step"] for record in found], [record[name] for record in found]


@checked(least={"step": 0}, skip=("values",))
class TensorBoardLogger:
    """Writes TensorBoard event files. Needs the extra ``tensorboard``.

    Arguments:
        folder: Where the event files go, one folder per run.
        resume_step: The step of the checkpoint from which the run goes on: TensorBoard hides
            what was logged after it. ``None`` keeps all.

    Raises:
        ImportError: If TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger needs the extra 'tensorboard': "
                "pip install 'rsm-sampler[tensorboard]'"
            ) from error
        purge_step = None if resume_step is None else resume_step + 1
        path = str(Path(folder).expanduser())
        self._open: Callable[[], Any] = lambda: SummaryWriter(path, purge_step=purge_step)
        self._writer: Any = None

    def log(self, step: int, **values: float) -> None:
        """Write one scalar per value.

        Arguments:
            step: The step the values belong to.
            **values: Numbers by name; a slash in a name groups the charts.
        """
        if self._writer is None:  # not before: the folder is perhaps yet to be claimed by a run
            self._writer = self._open()
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Write what is still held back, and close the file."""
        if self._writer is not None:
            self._writer.close()


def _to_json(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _record(line: bytes) -> dict[str, Any]:
    """The record that a line holds. Raises ``ValueError`` if it holds something else."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("a record has a step")
    return {
        name: float(value) if isinstance(value, str) else value for name, value in record.items()
    }


def _records(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The records of a file, each with the position in bytes at which its line ends."""
    records = []
    end = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        end += len(line)
        try:
            records.append((_record(line), end))
        except ValueError as error:
            last = number == len(lines) and not line.endswith(b"\n")
            if last and line[: len(_HEAD)] == _HEAD[: len(line)]:
                break  # cut short
            raise ValueError(
                f"{path}, line {number}: expected a record like "
                f'{{"step": 0, "loss": 1.0}}, got {line[:60]!r}'
            ) from error
    return records


def _mend(path: Path, resume_step: int | None) -> None:
    """Cut a log after its last whole record, and before the first one later than a step."""
    end = 0
    for record, record_end in _records(path):
        if resume_step is not None and record["step"] > resume_step:
            break
        end = record_end
    with path.open("r+b") as file:
        file.truncate(end)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
