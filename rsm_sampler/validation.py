r"""Checks of what users pass: each names the argument, the rule and the value.

Every function takes the name of an argument and its value, and returns the value in the form that
the library works with, or raises

* ``TypeError`` if the value is of the wrong kind: a fraction where an integer is wanted, a text
  where a number is;
* ``ValueError`` if it is of the right kind and out of range.

The message reads ``<argument> must be <rule>, got <value>``. Numbers of NumPy count as numbers;
``True`` and ``False`` do not. NumPy arrays, lists and tuples of numbers are welcome wherever
tensors are. None of the checks looks at the entries of a tensor unless it is asked to: on a GPU
that would wait for the device.

:mod:`rsm_sampler.checked` applies these checks to whole signatures.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "callable_",
    "choice",
    "device",
    "flag",
    "generator",
    "integer",
    "number",
    "path",
    "said",
    "size",
    "tensor",
    "text",
]

_C = TypeVar("_C", bound=Callable[..., Any])
Kind = Literal["float", "int", "bool", "number", "any"]
_KINDS: dict[str, str] = {
    "float": "real numbers",
    "int": "integers",
    "bool": "truth values",
    "number": "real numbers",
    "any": "numbers",
}
_LONG = 120
_LARGEST = 2**63 - 1  # of 64 bits


def said(value: object) -> str:
    """A value as messages quote it: short, on one line, tensors by shape and dtype if large.

    Arguments:
        value: Anything.

    Example:
        >>> said(torch.zeros(100, 2)), said("1.5")
        ('a tensor of shape (100, 2) and dtype torch.float32', "'1.5'")
    """
    if isinstance(value, Tensor) and value.numel() > 8:
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, np.ndarray) and value.size > 8:
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    try:
        words = re.sub(r"\s+", " ", repr(value))
    except Exception:
        words = f"an object of type {type(value).__name__}"
    return words if len(words) <= _LONG else f"{words[: _LONG - 4]} ..."


def integer(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """An integer within limits.

    Arguments:
        name: Name of the argument.
        value: Its value: an integer of Python or NumPy, no truth value and no float.
        least: Least value allowed; that of 64 bits if None.
        most: Largest one, likewise.

    Raises:
        TypeError: If the value is no integer.
        ValueError: If it is out of range.

    Example:
        >>> integer("n", 0, least=1)
        Traceback (most recent call last):
            ...
        ValueError: n must be at least 1, got 0
    """
    if type(value) is not int:
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {said(value)}")
        value = int(value)
    if least is None:
        least = -_LARGEST - 1
    if most is None:
        most = _LARGEST
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value


def size(name: str, value: object, *, least: int = 1, width: int = 1) -> int:
    """A number of points that memory can hold.

    Arguments:
        name: Name of the argument.
        value: Number of points.
        least: Least value allowed.
        width: Numbers of double precision that each point takes.

    Raises:
        TypeError: If the value is no integer.
        ValueError: If it is too small, or the points would not fit into the machine's memory.

    Example:
        >>> size("n", 10**15)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: n must be at most ..., which is what memory holds, got 1000000000000000
    """
    value = integer(name, value, least=least)
    if value > 100_000:
        most = _memory() // (8 * max(1, width))
        if value > most:
            raise ValueError(
                f"{name} must be at most {most}, which is what memory holds, got {value}"
            )
    return value


def number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> float:
    """A real number within limits, never NaN.

    Arguments:
        name: Name of the argument.
        value: Its value: a number of Python or NumPy, no truth value, no complex number.
        least: Least value allowed.
        above: The value must lie above this.
        most: Largest value allowed.
        below: The value must lie below this.
        finite: Whether infinite values are refused.

    Raises:
        TypeError: If the value is no real number.
        ValueError: If it is NaN or out of range.

    Example:
        >>> number("scale", float("nan"), above=0)
        Traceback (most recent call last):
            ...
        ValueError: scale must be positive, got nan
    """
    if type(value) is not float and type(value) is not int:
        known = isinstance(value, int | float | np.integer | np.floating)
        if not known or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {said(value)}")
        value = value.item() if isinstance(value, np.generic) else value
    real: Any = value
    try:
        as_float = float(real)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {said(value)}") from None
    # NaN fails each of the comparisons.
    if above is not None and not real > above:
        rule = "positive" if above == 0 else f"above {above}"
        raise ValueError(f"{name} must be {rule}, got {value}")
    if least is not None and not real >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if below is not None and not real < below:
        raise ValueError(f"{name} must be below {below}, got {value}")
    if most is not None and not real <= most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    if as_float != as_float or (finite and math.isinf(as_float)):
        rule = "a finite number" if finite else "a number"
        raise ValueError(f"{name} must be {rule}, got {value}")
    return real


def flag(name: str, value: object) -> bool:
    """``True`` or ``False``.

    Arguments:
        name: Name of the argument.
        value: A truth value of Python or NumPy.

    Raises:
        TypeError: If the value is anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {said(value)}")
    return bool(value)


def text(name: str, value: object) -> str:
    """A string.

    Arguments:
        name: Name of the argument.
        value: Its value.

    Raises:
        TypeError: If the value is no string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {said(value)}")
    return value


def choice(name: str, value: object, options: Collection[Any]) -> Any:  # noqa: ANN401
    """One of several values.

    Arguments:
        name: Name of the argument.
        value: Its value.
        options: What is allowed.

    Raises:
        ValueError: If the value is none of them.

    Example:
        >>> choice("loss", "l2", ("l1",))
        Traceback (most recent call last):
            ...
        ValueError: loss must be one of ('l1',), got 'l2'
    """
    for option in options:
        if type(value) is type(option) and value == option:
            return option
    listed = tuple(options)
    words = f"{listed[0]!r} or {listed[1]!r}" if len(listed) == 2 else f"one of {listed}"
    raise ValueError(f"{name} must be {words}, got {said(value)}")


def path(name: str, value: object) -> Path:
    """The name of a file or folder.

    Arguments:
        name: Name of the argument.
        value: A string or an object with ``__fspath__``.

    Raises:
        TypeError: If the value is neither.
        ValueError: If the name is empty or has a null character.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {said(value)}")
    written = os.fspath(value)
    if not isinstance(written, str):
        raise TypeError(f"{name} must be a path, got {said(value)}")
    if not written or "\0" in written:
        raise ValueError(f"{name} must be the path of a file or folder, got {said(value)}")
    return Path(written)


def callable_(name: str, value: _C) -> _C:
    """A function, or an object that can be called.

    Arguments:
        name: Name of the argument.
        value: Its value.

    Raises:
        TypeError: If the value cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {said(value)}")
    return value


def generator(
    name: str, value: object, device: torch.device | None = None
) -> torch.Generator | None:
    """A source of random numbers, or None for PyTorch's own.

    Arguments:
        name: Name of the argument.
        value: Its value.
        device: Device on which it must draw, if known.

    Raises:
        TypeError: If the value is neither.
        ValueError: If it draws on another kind of device.
    """
    if value is None:
        return None
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {said(value)}")
    if device is not None and value.device.type != device.type:
        raise ValueError(f"{name} must be on device {device}, got one on {value.device}")
    return value


def device(name: str, value: object, *, auto: bool = True) -> str | torch.device:
    """A device of PyTorch that this machine has, or ``"auto"``.

    Arguments:
        name: Name of the argument.
        value: A device, or its name.
        auto: Whether ``"auto"`` is allowed.

    Raises:
        TypeError: If the value is neither a device nor a string.
        ValueError: If there is no such device.
    """
    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name} must be a torch.device or its name, got {said(value)}")
    if auto and value == "auto":
        return "auto"
    try:
        found = torch.device(value)
        here = found.type != "cuda" or (found.index or 0) < torch.cuda.device_count()
    except RuntimeError:
        here = False
    if not here:
        raise ValueError(f"{name} must be available on this machine, got {said(value)}")
    return value


def tensor(
    name: str,
    value: object,
    *,
    shape: str | None = None,
    kind: Kind = "number",
    finite: bool = False,
    sizes: dict[str, Any] | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """A tensor, made from NumPy arrays, lists and tuples where one of these is given.

    Arguments:
        name: Name of the argument.
        value: A tensor, an array, or nested lists of numbers.
        shape: Axes as jaxtyping writes them: ``"n dim"`` is a matrix, ``"*batch dim"`` has any
            axes before the last, ``"*#batch"`` such that they broadcast.
        kind: What the entries are. Integers become floats where floats are wanted; truth values
            are no numbers.
        finite: Whether infinite and NaN entries are refused.
        sizes: Lengths of axes known so far, by name; those that this tensor fixes are added.
        like: A tensor whose precision and device arrays and lists take. By default arrays keep
            theirs, and lists have PyTorch's default precision.

    Returns:
        The tensor.

    Raises:
        TypeError: If the value is no tensor, array, list or number.
        ValueError: If its entries are of another kind, its shape does not fit, or an entry is not
            finite although it must be.

    Example:
        >>> tensor("x", [[1, 2]], shape="n dim", kind="float")
        tensor([[1., 2.]])
        >>> tensor("x", [1, 2], shape="n dim")
        Traceback (most recent call last):
            ...
        ValueError: x must have shape (n, dim), got (2,)
    """
    made = value if isinstance(value, Tensor) else _made(name, value, kind, like)
    dtype = made.dtype
    if dtype.is_floating_point:
        fits = kind not in {"int", "bool"}
    elif dtype is torch.bool:
        fits = kind in {"bool", "any"}
    else:
        fits = kind != "bool" and not dtype.is_complex
        if kind == "float" and fits:
            made = made.to(torch.get_default_dtype() if like is None else like.dtype)
    if not fits:
        raise ValueError(f"{name} must have {_KINDS[kind]} as entries, got dtype {dtype}")
    if shape is not None:
        _check_shape(name, made, shape, {} if sizes is None else sizes)
    if finite and not bool(made.isfinite().all()):
        bad = made[~made.isfinite()][0].item()
        raise ValueError(f"{name} must be finite, got {bad} among its entries")
    return made


def _made(name: str, value: object, kind: Kind, like: Tensor | None) -> Tensor:
    """A tensor of what is none; truth values stay what they are and are judged by the caller."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        if len({v.shape for v in value}) > 1:
            raise ValueError(
                f"{name} must have rows of one shape, got {[tuple(v.shape) for v in value][:4]}"
            )
        return torch.stack(tuple(value))
    known = isinstance(value, np.ndarray | np.generic | list | tuple | int | float)
    if not known or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a tensor, a NumPy array or a list of numbers, got {said(value)}"
        )
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(
            f"{name} must be an array whose rows have one length, got {said(value)}"
        ) from None
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ValueError(
            f"{name} must have {_KINDS[kind]} as entries, got {said(value)} of dtype {array.dtype}"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if array.dtype.byteorder not in "=|":
        array = array.astype(array.dtype.newbyteorder("="))
    # A copy: NumPy's memory may be read-only, or change under the tensor.
    made = torch.from_numpy(np.array(array, order="C"))
    if like is not None:
        return made.to(like if made.dtype.is_floating_point else like.device)
    if made.dtype.is_floating_point and not isinstance(value, np.ndarray | np.generic):
        return made.to(torch.get_default_dtype())
    return made


def _check_shape(name: str, value: Tensor, axes: str, sizes: dict[str, Any]) -> None:
    """Compare a shape with its description, and remember what it fixes."""
    tokens, star = _axes(axes)
    shape = tuple(value.shape)
    before = dict(sizes)
    after = 0 if star is None else len(tokens) - star - 1
    long_enough = len(shape) == len(tokens) if star is None else len(shape) >= len(tokens) - 1
    if not long_enough:
        _refuse_shape(name, shape, tokens, before)
    if star is None:
        pairs: Iterable[tuple[str, int]] = zip(tokens, shape, strict=True)
    else:
        head = zip(tokens[:star], shape[:star], strict=True)
        tail = zip(tokens[star + 1 :], shape[len(shape) - after :], strict=True)
        pairs = [*head, *tail]
    for token, length in pairs:
        if not _axis_fits(token, length, sizes):
            _refuse_shape(name, shape, tokens, before)
    if star is not None and tokens[star] != "...":
        rest = shape[star : len(shape) - after]
        if not _axes_fit(tokens[star][1:], rest, sizes):
            _refuse_shape(name, shape, tokens, before)


@functools.cache
def _axes(axes: str) -> tuple[list[str], int | None]:
    """The axes of a shape one by one, and the place of the one that stands for any number."""
    tokens = axes.split()
    star = next((i for i, a in enumerate(tokens) if a.startswith("*") or a == "..."), None)
    return tokens, star


def _axis_fits(token: str, length: int, sizes: dict[str, Any]) -> bool:
    if token.isdigit():
        return length == int(token)
    if token.startswith("#"):
        if length == 1:
            return True
        token = token[1:]
    if not token.isidentifier() or token == "_":
        return True  # an expression, or an axis of any length
    return bool(sizes.setdefault(token, length) == length)


def _axes_fit(token: str, rest: tuple[int, ...], sizes: dict[str, Any]) -> bool:
    broadcasts = token.startswith("#")
    key = "*" + token.lstrip("#")
    known = sizes.get(key)
    if known is None:
        if not broadcasts:
            sizes[key] = rest
        return True
    if not broadcasts:
        return bool(known == rest)
    return len(rest) <= len(known) and all(
        a in (1, b) for a, b in zip(reversed(rest), reversed(known), strict=False)
    )


def _refuse_shape(
    name: str, shape: tuple[int, ...], tokens: list[str], sizes: dict[str, Any]
) -> None:
    """The error, with the lengths that were known before instead of their names."""
    words: list[str] = []
    broadcasts = False
    for token in tokens:
        key = token.replace("#", "")
        broadcasts = broadcasts or (token.startswith("*#") and key in sizes)
        if key.startswith("*") or key == "...":
            words += [str(n) for n in sizes[key]] if key in sizes else ["..."]
        else:
            words.append(str(sizes.get(key, key)))
    inside = f"{words[0]}," if len(words) == 1 and words[0] != "..." else ", ".join(words)
    if broadcasts:
        whose = f"the {tokens[0][2:]} shape" if len(tokens) == 1 else "shape"
        raise ValueError(f"{name} must broadcast to {whose} ({inside}), got {shape}")
    raise ValueError(f"{name} must have shape ({inside}), got {shape}")


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
