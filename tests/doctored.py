"""Files that are not what they say: every change of one thing in a good one."""

import contextlib
import copy
import math
import random
import resource
import signal
import zipfile

import torch

from rsm_sampler import CheckpointError

LIMIT = 5  # seconds of a load
MEMORY = 400 << 20  # bytes that all loads of a test may add to the process


class Late(BaseException):
    """A load that takes too long."""


@contextlib.contextmanager
def in_time(seconds=LIMIT):
    def stop(number, frame):
        raise Late(f"a load takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak():
    """Most memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def places(value, path=()):
    """Paths of all entries of a payload; of long lists the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from places(entry, (*path, name))
    elif isinstance(value, list | tuple) and value:
        for index in sorted({0, len(value) - 1}):
            yield from places(value[index], (*path, index))


def others(value):
    """What might stand in the place of a value: of another type, size or sign."""
    yield from (None, "text", [], {}, [[[1]]], {"a": {"b": [None]}}, torch.zeros(3))
    if isinstance(value, bool):
        yield from (not value, 2, math.nan)
    elif isinstance(value, int):
        yield from (-1, 0, 10**8, 10**19, -(10**19), 10**400, True, 1.5, math.nan)
    elif isinstance(value, float):
        yield from (-value, 0.0, math.nan, math.inf, -math.inf, 10**400, False, 1e300)
    elif isinstance(value, str):
        yield from ("", "x" * 10_000, 3, "\0")
    elif isinstance(value, dict):
        yield from ({**value, "unknown": 1}, {1: 2}, list(value))
    elif isinstance(value, list | tuple):
        yield from (
            [*value, *value],
            list(value)[:-1],
            [None] * len(value),
            dict(enumerate(value)),
        )
    elif isinstance(value, torch.Tensor):
        yield value.double().reshape(-1)
        yield value.unsqueeze(0)
        yield torch.cat([value.reshape(1, -1)] * 2)
        yield value[..., None].expand(*value.shape, 3)
        yield value.to(torch.int32 if value.is_floating_point() else torch.float32)
        yield value.to(torch.complex64)
        yield torch.zeros(())
        yield torch.empty(0)
        if value.is_floating_point():
            yield torch.full_like(value, math.nan)
            yield torch.full_like(value, math.inf)
            yield -value


def put(payload, path, value):
    """A copy of a payload with something else at one place."""
    if not path:
        return value
    name, *rest = path
    if isinstance(payload, tuple):
        return tuple(put(list(payload), path, value))
    changed = copy.copy(payload)
    changed[name] = put(payload[name], rest, value)
    return changed


def without(payload, path):
    """A copy of a payload without one entry."""
    *above, name = path
    inner = payload
    for step in above:
        inner = inner[step]
    inner = dict(inner) if isinstance(inner, dict) else list(inner)
    del inner[name]
    return put(payload, above, inner)


def payloads(payload, seed=0):
    """Names and payloads, each with one change, in a random order of places."""
    rng = random.Random(seed)
    found = list(places(payload))
    rng.shuffle(found)
    for path in found:
        name = ".".join(map(str, path))
        yield f"{name} deleted", without(payload, path)
        inner = payload
        for step in path:
            inner = inner[step]
        for value in rng.sample(list(others(inner)), 2):
            yield f"{name} {str(value)[:30]!r}", put(payload, path, value)


def headers(contents):
    """The same for everything around the payload."""
    for name in ("magic", "format", "kind", "version", "library", "payload"):
        yield f"header: {name} deleted", {k: v for k, v in contents.items() if k != name}
        for value in (None, "text", -1, 0, 10**9, 10**400, 1.5, math.nan, True, [1], {"a": 1}):
            yield f"header: {name} {str(value)[:20]!r}", {**contents, name: value}


def nested():
    """Payloads that unfold to more than the file holds, or to no end."""
    deep, wide, round_ = [], [0], []
    for _ in range(300):
        deep = [deep]
    for _ in range(60):
        wide = [wide, wide]
    round_.append(round_)
    zero = torch.zeros(1)
    return {
        "deep": deep,
        "wide": wide,
        "round": round_,
        "stretched": zero.expand(10**12),
        "meta": torch.empty(10**12, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "set": {1, 2},
        "bytes": bytearray(5),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "size": torch.Size([1]),
        "parameter": torch.nn.Parameter(zero),
        "complex": 1j,
    }


def spoil(path, rng):
    """Names and contents of files that are cut, flipped, empty, packed, or something else."""
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999):
        yield f"cut at {share}", content[: int(share * len(content))]
    for _ in range(40):
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 20])):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield "flipped bits", bytes(flipped)
    for _ in range(20):
        # The records themselves, with a checksum that fits.
        yield "flipped bits of the pickle", repacked(path, rng)
    yield "packed", repacked(path, rng, flips=0, compression=zipfile.ZIP_DEFLATED)
    yield "a bomb", repacked(path, rng, flips=0, extra=bytes(200 << 20))
    yield "appended", content + b"more"
    yield "twice", content + content
    yield "text", b"not a checkpoint"
    yield "zeros", bytes(5000)


def repacked(path, rng, *, flips=1, compression=zipfile.ZIP_STORED, extra=None):
    """The archive written anew, its pickle changed."""
    target = path.with_name("repacked")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            data = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                for _ in range(flips):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            new.writestr(entry.filename, bytes(data))
        if extra is not None:
            new.writestr("archive/data/bomb", extra, zipfile.ZIP_DEFLATED)
    content = target.read_bytes()
    target.unlink()
    return content


def write(path, contents, payload=None):
    """Write a file as ``checkpoint.save`` does, but without its checks."""
    torch.save(contents if payload is None else {**contents, "payload": payload}, path)


def contents_of(path):
    return torch.load(path, weights_only=True)


def judge(name, path, load, use):
    """What is wrong with how a doctored file is taken; None if nothing is."""
    try:
        with in_time():
            loaded = load(path)
    except CheckpointError as error:
        return None if path.name in str(error) else f"{name}: the file is not named: {error}"
    except Late as error:
        return f"{name}: {error}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {str(error)[:200]}"
    try:
        with in_time(30):
            use(loaded)
    except (Exception, Late) as error:
        return f"{name}: loads, but then {type(error).__name__}: {str(error)[:200]}"
    return None


def failures(path, load, use, *, share=1.0, per_kind=None):
    """Try all doctored forms of a file, or a random share of each kind.

    Arguments:
        path: A good file; it is overwritten.
        load: Loads it.
        use: Raises if what was loaded is not right.
        share: Share of the forms that are tried.

    Returns:
        What went wrong, and how many forms were tried.
    """
    rng, good, contents = random.Random(1), path.read_bytes(), contents_of(path)
    tried, wrong = 0, []

    def examine(name):
        nonlocal tried
        tried += 1
        if problem := judge(name, path, load, use):
            wrong.append(problem)

    for name, content in spoil(path, rng):
        if rng.random() < share:
            path.write_bytes(content)
            examine(name)
            path.write_bytes(good)
    for name, changed in headers(contents):
        if rng.random() < share:
            write(path, changed)
            examine(name)
    for name, value in nested().items():
        write(path, contents, {**contents["payload"], "unknown": value})
        examine(f"nested: {name}")
        first = next(iter(contents["payload"]))
        write(path, contents, {**contents["payload"], first: value})
        examine(f"nested in {first}: {name}")
    for name, payload in payloads(contents["payload"]):
        if rng.random() < share:
            write(path, contents, payload)
            examine(name)
    path.write_bytes(good)
    use(load(path))
    return wrong, tried
