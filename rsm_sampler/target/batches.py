"""How many points one call of an energy gets: as many as time and memory allow.

A vectorised likelihood of 2,000 data needs 16 kB a point for every intermediate array: 250,000
points in one call would take many gigabytes. So calls start small, 16 points, and grow fourfold
while a call stays below about a second and a quarter of the available memory, up to 65,536 points;
a cheap energy gets there with its seventh call. Sizes are powers of two.

Time is that of the last call, less what does not grow with the number of points (the start of an
external program, say): where a call of fewer points took as long, smaller calls would gain
nothing. Memory is the growth of the process's peak during a call; below an earlier peak it cannot
be seen, and then the size grows more carefully. What is available is the least of the machine's
memory, the limits of the process (``ulimit -v``) and those of its control groups (containers).
Where none of that is known, only the cap holds. Work on a GPU is limited by the cap and, after an
allocation has failed, by half of that size.

The values of an energy that treats its points row by row do not depend on any of this. Products of
matrices with fewer than 16 rows may round differently, so larger calls are not cut below that.
"""

import functools
import sys
from pathlib import Path

__all__ = ["BatchSize", "available_memory", "peak_memory", "resident_memory"]

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_FIRST, _MOST = 16, 65_536
_UNLIMITED = 1 << 60  # bytes; control groups write "no limit" as a number of that size


class BatchSize:
    """The number of points of the next call, learned from those before.

    Arguments:
        seconds: What a call should take at most.
        least: Points that time alone never goes below, for energies that work on several points
            at once in processes of their own.

    Attributes:
        size: The number of points.
    """

    def __init__(self, seconds: float, least: int = 1) -> None:
        self.seconds = seconds
        self.least = max(1, least)
        self.size = max(_FIRST, _power_of_two(self.least))
        self._cap = _MOST  # what an allocation that failed has left of it
        self._fits = _MOST  # what the memory of a point allows
        # Points and seconds of the last call, and of the last one of quite another size.
        self._last: tuple[int, float] | None = None
        self._other: tuple[int, float] | None = None
        self._bytes = 0.0  # a point, as far as it was seen

    @property
    def settled(self) -> bool:
        """Whether the largest size is reached, so that memory needs no more looking after."""
        return self.size == self._cap

    def next(self, remaining: int) -> int:
        """Points of the next call, of those that remain to be evaluated."""
        if remaining <= self.size:
            return remaining
        if self.size >= _FIRST and remaining < self.size + _FIRST:
            return remaining if self.size == _FIRST else remaining - _FIRST
        return self.size

    def learn(self, points: int, seconds: float) -> None:
        """Take the time of a call into account.

        Arguments:
            points: Its points.
            seconds: What it took.
        """
        full = 2 * points > self.size
        if not full and seconds <= 2 * self.seconds:
            return
        if self._last is not None and not 0.5 < self._last[0] / points < 2:
            self._other = self._last
        self._last = points, seconds
        each = seconds / points
        if self._other is not None:
            number, other = self._other
            if points < number and seconds > 1.5 * other:
                self._other = None  # the energy is no longer what it was
            elif points != number:
                each = min(each, max(0.0, (seconds - other) / (points - number)))
        if each * points > 2 * self.seconds:
            wanted = _power_of_two(self.seconds / each)
            self.size = min(self.size, max(wanted, _power_of_two(self.least)))
        elif full:
            grown = self.size
            while grown < 4 * self.size and 2 * grown * each <= self.seconds:
                grown *= 2
            self.size = min(grown, self._cap, self._fits)

    def learn_memory(self, points: int, used: int, seen: bool, free: int | None) -> None:
        """Take the memory of a call into account, before :meth:`learn`.

        Arguments:
            points: Its points.
            used: Growth of the peak over what was resident before, in bytes.
            seen: Whether that peak was reached in this call; otherwise ``used`` is an upper bound.
            free: Memory that was available before it, in bytes; None if unknown.
        """
        if free is None:
            return
        each = used / points
        self._bytes = each if seen else min(each, self._bytes)
        self._fits = _MOST
        if self._bytes > 0:
            self._fits = _power_of_two(free / 4 / self._bytes)
        elif 16 * used > free:  # four times as much might be too much
            self._fits = 2 * self.size
        self.size = min(self.size, self._fits)

    def run_out(self, points: int) -> None:
        """A call of so many points was given up: the next ones have fewer."""
        self.least = max(1, self.least // 4)
        self.size = min(self.size, _power_of_two(points / 4))

    def halve(self, points: int) -> None:
        """A call of so many points found no memory: never again as many."""
        self.size = self._cap = _power_of_two(points / 2)


def _power_of_two(number: float) -> int:
    """The largest one that is not above, at least 1 and at most the cap."""
    return 1 << max(0, int(min(number, _MOST)).bit_length() - 1)


def resident_memory() -> int | None:
    """Memory of this process that is in use, in bytes; None where the system does not say."""
    found = _statm()
    return None if found is None else found[1]


def peak_memory() -> int:
    """The most memory that this process has had in use, in bytes; 0 where unknown."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory() -> int | None:
    """Memory that this process can still get, in bytes; None where the system does not say."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
                break
    except (OSError, ValueError):
        pass
    statm = _statm()
    if resource is not None and statm is not None:
        for limit, used in ((resource.RLIMIT_AS, statm[0]), (resource.RLIMIT_DATA, statm[2])):
            soft, _ = resource.getrlimit(limit)
            if soft != resource.RLIM_INFINITY:
                found.append(soft - used)
    found += [left for left in map(_left_in_group, _groups()) if left is not None]
    return max(0, min(found)) if found else None


def _statm() -> tuple[int, int, int] | None:
    """Address space, resident memory and data of this process, in bytes."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return None
    page = resource.getpagesize() if resource is not None else 4096
    return int(fields[0]) * page, int(fields[1]) * page, int(fields[5]) * page


@functools.cache
def _groups() -> tuple[tuple[Path, Path], ...]:
    """Files with limit and use of the control groups of this process, from both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    found = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's: the root of what is mounted is ours.
        folder = root / inside.lstrip("/")
        for place in dict.fromkeys((folder, *folder.parents)):
            limit, use = (place / name for name in names)
            if place.is_relative_to(root) and limit.exists() and use.exists():
                found.append((limit, use))
    return tuple(found)


def _left_in_group(files: tuple[Path, Path]) -> int | None:
    limit, use = files
    try:
        text = limit.read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED:
            return None
        return int(text) - int(use.read_text()) + _reclaimable(limit.parent)
    except (OSError, ValueError):
        return None


def _reclaimable(group: Path) -> int:
    """File cache of a group that the system would give up first, in bytes."""
    for line in (group / "memory.stat").read_text().splitlines():
        name, _, number = line.partition(" ")
        if name in {"inactive_file", "total_inactive_file"}:
            return int(number)
    return 0
