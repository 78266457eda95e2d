r"""Checkpoints: what a long run needs to go on as if it had never stopped.

A checkpoint is one file. It holds tensors and plain types alone (``None``, ``bool``, ``int``,
``float``, ``str``, lists, tuples and dicts of these), so that

* loading executes nothing: ``torch.load(weights_only=True)`` reads it, whoever wrote it;
* it can be read anywhere: no class has to be importable under the name it once had.

Around the payload stands a header: a magic string, the version of the file format, what kind of
object the payload describes (``"trainer"``, ``"sampler"``, ...), the version of that description,
and the version of the library. A reader therefore knows what it holds before it believes it.

A file may be damaged, or made to do damage. What it holds is therefore checked before it is used:
its pickle may name tensors and nothing else, no entry is compressed, tensors take no more memory
than the file can fill (four times its size and 64 MiB), and the structure of the payload is that
of its kind (:mod:`rsm_sampler.schema`). Whatever is wrong is a :class:`CheckpointError` that names
the file.

Writing is atomic: the bytes go to a temporary file in the same folder and reach the disk before
the file takes its name. At every moment, a crash included, the name stands for the whole old
checkpoint or the whole new one. A writer that was killed leaves its temporary file, whose name
holds the number of the process: the next save or load of the same path removes it.

Exact continuation also needs the state of every random generator: :func:`generator_state` and
:func:`restore_generator` carry it.
"""

import contextlib
import hashlib
import os
import pickletools
import platform
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsm_sampler.version import __version__

MAGIC = "rsm_sampler checkpoint"
FORMAT = 1

_PLAIN = (type(None), bool, int, float, str)
# What the pickle within a file may name, besides torch's dtypes and kinds of storage.
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
}
_FREE = 64 << 20  # bytes that tensors may take beyond what the file holds
_DEEPEST = 200  # containers within one another
_MOST_BITS = 1 << 14  # of an integer


class CheckpointError(ValueError):
    """A file is not the checkpoint that was asked for, or a payload cannot become one."""


def save(
    path: str | os.PathLike[str], payload: dict[str, Any], *, kind: str, version: int
) -> None:
    r"""Write a checkpoint, atomically.

    Arguments:
        path: The file to write. Missing folders are made; an older file is replaced.
        payload: What to keep: tensors, ``None``, ``bool``, ``int``, ``float``, ``str``, and
            lists, tuples and dicts (with ``str`` or ``int`` keys) of these.
        kind: What the payload describes, e.g. ``"trainer"``.
        version: The version of that description, at least 1, to be raised with every change that
            an older reader would misunderstand.

    Raises:
        CheckpointError: If the payload holds anything else; the message names its key.
        ValueError: If ``version`` is below 1.

    Note:
        A view is saved without the rest of the storage it looks at, and a parameter as a tensor
        without gradient: two tensors that share memory no longer do after loading.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = f"{folder}/last.pt"
        ...     save(path, {"step": 3, "mean": torch.zeros(2)}, kind="demo", version=1)
        ...     load(path, kind="demo")
        {'step': 3, 'mean': tensor([0., 0.])}
    """
    if version < 1:
        raise ValueError(f"version must be at least 1, got {version}")
    if not isinstance(payload, dict):
        raise CheckpointError(f"payload must be a dict, got {type(payload).__name__}")
    contents = {
        "magic": MAGIC,
        "format": FORMAT,
        "kind": kind,
        "version": version,
        "library": __version__,
        "payload": _plain(payload, "payload"),
    }
    # A link stays a link: the file behind it is replaced.
    target = Path(path).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    token = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    try:
        with temporary.open("xb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def load(
    path: str | os.PathLike[str],
    *,
    kind: str,
    version: int | None = None,
    least: int = 1,
    map_location: str | torch.device = "cpu",
    schema: Callable[[Any, str], None] | None = None,
) -> dict[str, Any]:
    r"""Read the payload of a checkpoint. Nothing in the file is executed.

    Arguments:
        path: The file to read.
        kind: What the payload must describe, as given to :func:`save`.
        version: The newest version of that description that the caller understands; ``None``
            takes any.
        least: The oldest one. What lies between passes: :func:`read_header` tells which it is.
        map_location: The device on which tensors arrive.
        schema: What the payload must look like; see :mod:`rsm_sampler.schema`.

    Returns:
        The payload, equal to what was saved.

    Raises:
        CheckpointError: If the file is missing, cut short, damaged or foreign, describes
            something else, comes from a version of the library that is newer or too old, or its
            payload is not what the schema allows.
    """
    device = torch.device(map_location)
    contents = _read(path)
    if contents["kind"] != kind:
        raise CheckpointError(
            f"{os.fspath(path)} is a checkpoint of kind {contents['kind']!r}, expected {kind!r}"
        )
    if version is not None and contents["version"] > version:
        raise CheckpointError(
            f"{os.fspath(path)} has version {contents['version']} of kind {kind!r}, written by "
            f"rsm_sampler {contents['library']}; this one reads up to version {version}: please "
            "update rsm_sampler"
        )
    if contents["version"] < least:
        raise CheckpointError(
            f"{os.fspath(path)} has version {contents['version']} of kind {kind!r}, written by "
            f"rsm_sampler {contents['library']}; this one reads from version {least} on: please "
            "make it again"
        )
    if schema is not None:
        with named(path):
            schema(contents["payload"], "payload")
    return _moved(contents["payload"], device)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    r"""What a checkpoint says about itself.

    Arguments:
        path: The file to read.

    Returns:
        The entries ``format``, ``kind``, ``version`` and ``library`` (the version that wrote it).

    Raises:
        CheckpointError: If the file is missing, cut short, damaged or foreign, or comes from a
            newer version of the library.
    """
    contents = _read(path)
    return {name: contents[name] for name in ("format", "kind", "version", "library")}


def generator_state(generator: torch.Generator) -> dict[str, Any]:
    r"""The state of a random generator, ready for a checkpoint.

    Arguments:
        generator: A generator on any device.

    Returns:
        The kind of device it draws on and its state, a byte tensor.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> state = generator_state(generator)
        >>> first = torch.rand(3, generator=generator)
        >>> restore_generator(generator, state)
        >>> torch.equal(first, torch.rand(3, generator=generator))
        True
    """
    return {"device": generator.device.type, "state": generator.get_state()}


def restore_generator(generator: torch.Generator, state: dict[str, Any]) -> None:
    r"""Put a random generator into a state taken by :func:`generator_state`.

    Arguments:
        generator: The generator to change, in place.
        state: What :func:`generator_state` returned, on whatever device it has arrived.

    Raises:
        CheckpointError: If the state belongs to another kind of device, so that its numbers
            cannot be drawn here, or is none of a generator.
    """
    kept = state.get("state") if isinstance(state, dict) else None
    if not isinstance(kept, Tensor) or kept.dtype != torch.uint8 or "device" not in state:
        raise CheckpointError("the random state must have a device and a state of bytes")
    if state["device"] != generator.device.type:
        raise CheckpointError(
            f"the random state was taken on {state['device']}, but the generator draws on "
            f"{generator.device.type}: a run resumes exactly only on the kind of device it "
            "started on"
        )
    try:
        generator.set_state(kept.cpu())
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the random state must be one of a generator: {error}") from error


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    r"""Let a :class:`CheckpointError` of the block name the file it is about.

    Arguments:
        path: The file.

    Raises:
        CheckpointError: That of the block, with the file before its message.

    Example:
        >>> try:
        ...     with named("last.pt"):
        ...         raise CheckpointError("payload['step'] must be an integer, got 'three'")
        ... except CheckpointError as error:
        ...     str(error)
        "last.pt: payload['step'] must be an integer, got 'three'"
    """
    try:
        yield
    except CheckpointError as error:
        name = os.fspath(path)
        if name in str(error):
            raise
        raise CheckpointError(f"{name}: {error}") from error


def _plain(value: Any, key: str) -> Any:  # noqa: ANN401
    """A copy of ``value`` made of tensors and plain types; anything else is named by its key."""
    kind = type(value)  # a subclass would not survive: np.float64 is a float, IntEnum an int
    if kind in _PLAIN:
        return value
    if isinstance(value, dict):
        for name in value:
            if type(name) not in (str, int):
                raise CheckpointError(
                    f"{key} has the key {name!r}, a {type(name).__name__}; keys must be str or int"
                )
        return {name: _plain(entry, f"{key}[{name!r}]") for name, entry in value.items()}
    if kind in (list, tuple):
        return kind(_plain(entry, f"{key}[{i}]") for i, entry in enumerate(value))
    if kind in (Tensor, nn.Parameter) and value.layout is torch.strided:
        value = value.detach()
        used = value.numel() * value.element_size()
        # Neither the rest of its storage nor, of an expanded one, the promise of more than it.
        return value.clone() if value.untyped_storage().nbytes() != used else value
    raise CheckpointError(
        f"{key} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds dense tensors, "
        "None, bool, int, float, str, and lists, tuples and dicts of these"
    )


def _moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a checkpoint, after its header has been checked."""
    file = Path(path).expanduser()
    try:
        there, folder = file.is_file(), file.is_dir()
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {file}: {error.strerror}") from error
    if not there:
        hint = ", which is a folder" if folder else ""
        raise CheckpointError(f"no checkpoint at {file}{hint}")
    _remove_stale(file.resolve())
    try:
        entries = _inspect(file)
        contents = torch.load(file, map_location="cpu", weights_only=True)
        _check_plain(contents, entries, file.stat().st_size)
    except Exception as error:  # damage comes to light as errors of almost any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint: it is cut short, damaged or of another "
            f"kind ({reason})"
        ) from error
    if not isinstance(contents, dict) or contents.get("magic") != MAGIC:
        raise CheckpointError(f"{file} was not written by rsm_sampler")
    kinds = {"format": int, "kind": str, "version": int, "library": str, "payload": dict}
    for name, kind in kinds.items():
        value = contents.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 1 <= value < 2**31):
            raise CheckpointError(
                f"{file} must have a header with {name} of type {kind.__name__}"
                f"{', at least 1' if kind is int else ''}, got {type(value).__name__}"
            )
    if contents["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has file format {contents['format']}, written by rsm_sampler "
            f"{contents['library']}; this version reads up to format {FORMAT}: please update "
            "rsm_sampler"
        )
    return contents


def _inspect(file: Path) -> int:
    """Refuse an archive that unpacks to more than it is, or whose pickle names what is no tensor.

    Returns:
        Bytes of the pickle: no payload has more entries than that.
    """
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:  # torch.load itself compares no checksums
        found = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in found):
            raise zipfile.BadZipFile("compressed entries")
        if sum(entry.file_size for entry in found) > size:
            raise zipfile.BadZipFile("entries larger than the file")
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        pickles = [entry for entry in found if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} pickles instead of one")
        code = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(code):
        if operation.name in {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}:
            raise ValueError(f"objects by {operation.name}")
        if operation.name == "GLOBAL" and not _is_harmless(str(argument)):
            raise ValueError(f"objects by the name {argument!r}")
    return len(code)


def _is_harmless(name: str) -> bool:
    """Whether a pickle may name it: a part of tensors."""
    module, _, attribute = name.partition(" ")
    if module == "torch":
        storage = attribute.endswith("Storage") and attribute.isidentifier()
        return storage or isinstance(getattr(torch, attribute, None), torch.dtype)
    return name in _GLOBALS


def _check_plain(contents: object, most: int, size: int) -> None:
    """Refuse what :func:`save` does not write: other types, shared containers, stretched tensors.

    Arguments:
        contents: What was read.
        most: Most entries. Every one takes a byte of the file at least; a container that stands
            in many places does not, and might unfold to any size.
        size: Bytes of the file: expanded tensors stand for more than they hold, but not for far
            more than the file.
    """
    waiting, seen, left = [(contents, 0)], 0, 4 * size + _FREE
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > most or depth > _DEEPEST:
            raise ValueError("containers within one another")
        kind = type(value)
        if isinstance(value, Tensor):
            left -= value.numel() * value.element_size()
            if value.device.type == "meta" or value.layout is not torch.strided or left < 0:
                raise ValueError("tensors larger than their bytes, or of another layout")
        elif isinstance(value, dict):
            if not all(type(name) in (str, int) for name in value):
                raise ValueError("keys that are neither text nor integers")
            waiting += [(entry, depth + 1) for entry in value.values()]
        elif kind in (list, tuple):
            assert isinstance(value, list | tuple)
            waiting += [(entry, depth + 1) for entry in value]
        elif kind not in _PLAIN or (isinstance(value, int) and value.bit_length() > _MOST_BITS):
            raise ValueError(f"a value of type {kind.__name__}")


def _host() -> str:
    """This machine in a file's name: numbers of processes are those of one machine."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove_stale(target: Path) -> None:
    """Remove the temporary files for this path that no living process of this machine writes."""
    if os.name != "posix":  # elsewhere asking whether a process lives may end it
        return
    name = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)-[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as folder:
        for entry in folder:
            found = name.fullmatch(entry.name)
            if found and not _lives(int(found[1])):
                Path(entry.path).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's, or no number of a process
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name reach the disk, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
