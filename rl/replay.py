r"""Replay: the last transitions, preallocated on the device that trains.

A transition is :math:`(s, a, r, s', d)` with d the *termination* flag alone: values are
bootstrapped through a time limit. Sampling takes no decision on the host, so that it can be part
of a captured graph.

Checkpoints write only what is new. Everything ever added has a running number; a folder holds
files of consecutive numbers, and those whose transitions have all been overwritten are removed.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rsm_sampler import checkpoint

__all__ = ["Batch", "ReplayBuffer"]

_KIND, _VERSION = "replay", 1


class Batch(NamedTuple):
    """Transitions: (n, observation_dim), (n, action_dim), (n), (n, observation_dim), (n)."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor


class ReplayBuffer:
    """A ring of transitions.

    Arguments:
        capacity: Number of transitions that are kept.
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        device: Where they are kept.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> buffer = ReplayBuffer(1_000_000, 17, 6)
        >>> buffer.nbytes / 1e6, len(buffer)
        (168.0, 0)
    """

    def __init__(
        self,
        capacity: int,
        observation_dim: int,
        action_dim: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {
            "capacity": capacity,
            "observation_dim": observation_dim,
            "action_dim": action_dim,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.capacity = capacity
        lengths = (observation_dim, action_dim, 0, observation_dim, 0)
        self._rows = [
            torch.empty((capacity, n) if n else (capacity,), device=device) for n in lengths
        ]
        self.count = 0
        # What sampling reads, on the device: no host in between.
        self._size = torch.zeros((), dtype=torch.float64, device=device)
        self._saved = 0

    @staticmethod
    def size_in_bytes(capacity: int, observation_dim: int, action_dim: int) -> int:
        """Memory that a buffer takes once it is full."""
        return 4 * capacity * (2 * observation_dim + action_dim + 2)

    @property
    def nbytes(self) -> int:
        """Memory of the full buffer."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows)

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def add(self, batch: Batch) -> None:
        """Append transitions; the oldest ones make room.

        Arguments:
            batch: At most ``capacity`` transitions, on any device.

        Raises:
            ValueError: If there are more.
        """
        n = len(batch.action)
        if n > self.capacity:
            raise ValueError(f"batch must have at most {self.capacity} transitions, got {n}")
        begin = self.count % self.capacity
        first = min(n, self.capacity - begin)
        for rows, new in zip(self._rows, batch, strict=True):
            rows[begin : begin + first].copy_(new[:first])
            if first < n:
                rows[: n - first].copy_(new[first:])
        self.count += n
        self._size.fill_(len(self))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Batch:
        """Transitions drawn uniformly, with replacement.

        Arguments:
            n: Number of transitions.
            generator: Source of randomness, on the buffer's device.
        """
        device = self._size.device
        uniform = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
        index = (uniform * self._size).long()
        return Batch(*(rows[index] for rows in self._rows))

    def all(self) -> Batch:
        """Everything, the oldest first."""
        order = torch.arange(self.count - len(self), self.count) % self.capacity
        return Batch(*(rows[order.to(rows.device)] for rows in self._rows))

    def save_new(self, folder: str | os.PathLike[str]) -> None:
        """Write what was added since the last call.

        Arguments:
            folder: One folder for one buffer.
        """
        folder = Path(folder)
        oldest = self.count - len(self)
        begin = max(self._saved, oldest)
        if begin < self.count:
            numbers = torch.arange(begin, self.count) % self.capacity
            rows = [rows[numbers.to(rows.device)].cpu() for rows in self._rows]
            path = folder / f"{begin:012d}-{self.count:012d}.pt"
            checkpoint.save(path, {"rows": rows}, kind=_KIND, version=_VERSION)
        self._saved = self.count

    def prune(self, folder: str | os.PathLike[str]) -> None:
        """Remove the files whose transitions have all been overwritten.

        Arguments:
            folder: Where :meth:`save_new` wrote. Not before the checkpoint that no longer needs
                them has been written.
        """
        for path, _, end in _files(Path(folder)):
            if end <= self.count - len(self):
                path.unlink(missing_ok=True)

    def load(self, folder: str | os.PathLike[str], count: int) -> None:
        """Become the buffer that had ``count`` transitions added when it was written.

        Arguments:
            folder: Where :meth:`save_new` wrote. Files of later transitions are removed.
            count: Transitions added until then.

        Raises:
            CheckpointError: If a transition is missing.
        """
        oldest = max(0, count - self.capacity)
        wanted = oldest
        for path, begin, end in sorted(_files(Path(folder)), key=lambda entry: entry[1]):
            if begin >= count:
                path.unlink()
                continue
            if begin <= wanted < end:
                rows = checkpoint.load(path, kind=_KIND, version=_VERSION)["rows"]
                self.count = wanted
                self.add(Batch(*(r[wanted - begin : min(end, count) - begin] for r in rows)))
                wanted = self.count
        if wanted != count:
            raise checkpoint.CheckpointError(
                f"{folder} must hold the transitions {oldest} to {count}, "
                f"but number {wanted} is missing"
            )
        self.count = self._saved = count
        self._size.fill_(len(self))

    def bytes_on_disk(self, folder: str | os.PathLike[str]) -> int:
        """Size of the files in a folder."""
        return sum(path.stat().st_size for path, _, _ in _files(Path(folder)))


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    found = []
    for path in folder.glob("*.pt"):
        if match := re.fullmatch(r"(\d{12})-(\d{12})\.pt", path.name):
            found.append((path, int(match[1]), int(match[2])))
    return found
