r"""Checkpoints: what a long run needs to go on as if it had never stopped.

A checkpoint is one file. It holds tensors and plain types alone (``None``, ``bool``, ``int``,
``float``, ``str``, lists, tuples and dicts of these), so that

* loading executes nothing: ``torch.load(weights_only=True)`` reads it, whoever wrote it;
* it can be read anywhere: no class has to be importable under the name it once had.

Around the payload stands a header: a magic string, the version of the file format, what kind of
object the payload describes (``"trainer"``, ``"sampler"``, ...), the version of that description,
and the version of the library. A reader therefore knows what it holds before it believes it.

Writing is atomic: the bytes go to a temporary file in the same folder and reach the disk before
the file takes its name. At every moment, a crash included, the name stands for the whole old
checkpoint or the whole new one.

Exact continuation also needs the state of every random generator: :func:`generator_state` and
:func:`restore_generator` carry it.
"""

import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsm_sampler.version import __version__

MAGIC = "rsm_sampler checkpoint"
FORMAT = 1

_PLAIN = (type(None), bool, int, float, str)


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
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
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
) -> dict[str, Any]:
    r"""Read the payload of a checkpoint. Nothing in the file is executed.

    Arguments:
        path: The file to read.
        kind: What the payload must describe, as given to :func:`save`.
        version: The newest version of that description that the caller understands; ``None``
            takes any.
        least: The oldest one. What lies between passes: :func:`read_header` tells which it is.
        map_location: The device on which tensors arrive.

    Returns:
        The payload, equal to what was saved.

    Raises:
        CheckpointError: If the file is missing, cut short, damaged or foreign, describes
            something else, or comes from a version of the library that is newer or too old.
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
        CheckpointError: If the state belongs to another kind of device: its numbers cannot be
            drawn here.
    """
    if state["device"] != generator.device.type:
        raise CheckpointError(
            f"the random state was taken on {state['device']}, but the generator draws on "
            f"{generator.device.type}: a run resumes exactly only on the kind of device it "
            "started on"
        )
    generator.set_state(state["state"].cpu())


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
        return value.clone() if value.untyped_storage().nbytes() > used else value
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
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}")
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load itself compares no checksums
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        contents = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage comes to light as errors of almost any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint: it is cut short, damaged or of another "
            f"kind ({reason})"
        ) from error
    if not isinstance(contents, dict) or contents.get("magic") != MAGIC:
        raise CheckpointError(f"{file} was not written by rsm_sampler")
    if contents["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has file format {contents['format']}, written by rsm_sampler "
            f"{contents['library']}; this version reads up to format {FORMAT}: please update "
            "rsm_sampler"
        )
    return contents


def _sync_folder(folder: Path) -> None:
    """Make the new name reach the disk, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
