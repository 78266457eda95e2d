r"""Replay: the last transitions, preallocated on the device that trains.

A transition is :math:`(s, a, r, s', d, m)` with d the *termination* flag alone: values are
bootstrapped through a time limit. It covers m environment steps, usually one: with returns of
several steps (:class:`MultiStep`), :math:`r = \sum_{k<m} \gamma^k r_{t+k}` and
:math:`s' = s_{t+m}`. Sampling takes no decision on the host, so that it can be part of a captured
graph.

Checkpoints write only what is new. Everything ever added has a running number; a folder holds
files of consecutive numbers, and those whose transitions have all been overwritten are removed.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl.environments import Transition
from rsm_sampler import checkpoint
from rsm_sampler.checked import checked
from rsm_sampler.schema import items, record, tensor

__all__ = ["Batch", "MultiStep", "ReplayBuffer"]

_KIND, _VERSION = "replay", 1
_ROWS = record({"rows": items(tensor(dtypes=(torch.float32,)))})
_Open = tuple[NDArray[np.float32], NDArray[np.float32], float, int]


class Batch(NamedTuple):
    """Transitions: (n, observation_dim), (n, action_dim), (n), (n, observation_dim), (n), (n).

    Attributes:
        observation: Where the action was taken.
        action: What was done, within [-1, 1].
        reward: The reward, or the discounted sum of several.
        next_observation: Where that led.
        terminated: 1 where no value follows, else 0.
        span: Environment steps from one observation to the next one.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor
    span: Tensor


@checked
class MultiStep:
    r"""Transitions of up to n steps, from the single steps of some environments.

    A transition begins with every step and closes after n steps, or with its episode: those that
    are then still open are shorter, :math:`m < n`.

    Arguments:
        n: Steps of a transition.
        discount: The factor :math:`\gamma` within a return.
        num_envs: Environments that step together.

    Note:
        The actions after the first one are those that were taken then and not the present
        policy's; returns are not corrected for that.
    """

    def __init__(self, n: int, discount: float, num_envs: int) -> None:
        self.n, self.discount = n, discount
        self._open: list[list[_Open]] = [[] for _ in range(num_envs)]

    def add(
        self,
        observation: NDArray[np.float32],
        action: NDArray[np.float32],
        step: Transition,
    ) -> Batch | None:
        """Take in a step of all environments.

        Arguments:
            observation: Where they were, (num_envs, observation_dim).
            action: What was done, (num_envs, action_dim).
            step: What came of it.

        Returns:
            The transitions that close with it, or None where none does.
        """
        closed = []
        for i in np.flatnonzero(step.valid):
            begun = [*self._open[i], (observation[i].copy(), action[i].copy(), 0.0, 0)]
            self._open[i] = []
            for s, a, r, m in begun:
                r, m = r + self.discount**m * float(step.reward[i]), m + 1
                if m == self.n or step.ended[i]:
                    closed.append((s, a, r, step.next_observation[i], step.terminated[i], m))
                else:
                    self._open[i].append((s, a, r, m))
        if not closed:
            return None
        columns = (np.asarray(column, np.float32) for column in zip(*closed, strict=True))
        return Batch(*(torch.from_numpy(column) for column in columns))

    def state(self) -> list[list[list[Any]]]:
        """What is open."""
        return [
            [[torch.from_numpy(s), torch.from_numpy(a), r, m] for s, a, r, m in each]
            for each in self._open
        ]

    def load_state(self, state: list[list[list[Any]]]) -> None:
        """Take back :meth:`state`."""
        self._open = [[(s.numpy(), a.numpy(), r, m) for s, a, r, m in each] for each in state]


@checked
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
        (172.0, 0)
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
        lengths = (observation_dim, action_dim, 0, observation_dim, 0, 0)
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
        return 4 * capacity * (2 * observation_dim + action_dim + 3)

    @property
    def nbytes(self) -> int:
        """Memory of the full buffer."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows)

    @property
    def actions(self) -> Tensor:
        """The actions by their place in the ring, (capacity, action_dim)."""
        return self._rows[1]

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
        return self.at(self.places(n, generator=generator))

    def places(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Places in the ring of transitions drawn uniformly, with replacement, (n).

        Arguments:
            n: Number of transitions.
            generator: Source of randomness, on the buffer's device.
        """
        device = self._size.device
        uniform = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
        return (uniform * self._size).long()

    def at(self, places: Tensor) -> Batch:
        """The transitions at some places of the ring.

        Arguments:
            places: Numbers of the transitions, modulo ``capacity``, (n).
        """
        return Batch(*(rows[places] for rows in self._rows))

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
        wanted, later = oldest, []
        for path, begin, end in sorted(_files(Path(folder)), key=lambda entry: entry[1]):
            if begin >= count:
                later.append(path)
                continue
            if begin <= wanted < end:
                loaded = checkpoint.load(path, kind=_KIND, version=_VERSION, schema=_ROWS)
                with checkpoint.named(path):
                    rows = self._checked(loaded["rows"], end - begin)
                if len(rows) == len(self._rows) - 1:  # older files do not say: single steps
                    rows = [*rows, torch.ones_like(rows[-1])]
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
        for path in later:  # only once all is there that they are later than
            path.unlink()

    def _checked(self, rows: list[Tensor], count: int) -> list[Tensor]:
        """The columns of a file, if they are those of so many transitions of this buffer."""
        if not len(self._rows) - 1 <= len(rows) <= len(self._rows):
            raise checkpoint.CheckpointError(
                f"payload['rows'] must be {len(self._rows)} columns, got {len(rows)}"
            )
        for i, column in enumerate(rows):
            shape = (count, *self._rows[i].shape[1:])
            tensor(*shape, dtypes=(torch.float32,))(column, f"payload['rows'][{i}]")
        return list(rows)

    def bytes_on_disk(self, folder: str | os.PathLike[str]) -> int:
        """Size of the files in a folder."""
        return sum(path.stat().st_size for path, _, _ in _files(Path(folder)))


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    found = []
    for path in folder.glob("*.pt"):
        if match := re.fullmatch(r"(\d{12})-(\d{12})\.pt", path.name):
            found.append((path, int(match[1]), int(match[2])))
    return found
