r"""Public signatures that check what they are given.

:func:`checked` reads the annotations of a function, or of the public methods of a class, once,
and checks every argument against its own before the body runs: ``n: int`` refuses ``1.5``,
``x: Float[Tensor, "n dim"]`` refuses a vector and takes a NumPy array, ``loss: Literal["a", "b"]``
refuses ``"c"``. Axes that share a name must share a length, also with the object's attribute of
that name: with ``self.dim == 2``, an argument of shape ``"n dim"`` has two columns. Ranges that an
annotation cannot tell are given to the decorator, except for names that mean the same
everywhere: ``n`` points are at least none and no more than memory holds, a ``std`` is positive.

A check costs about a microsecond and never waits for a GPU, except for the tensors named in
``finite``.
"""

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rsm_sampler import validation

__all__ = ["checked"]

_T = TypeVar("_T")
_Scope = dict[str, Any]
_Rule = Callable[[str, Any, _Scope], Any]
_ARRAY_LIKE = npt.ArrayLike
# What the library's names for counts mean: the least value, and no more than memory holds.
_COUNTS: dict[str, int] = {
    **dict.fromkeys(
        ("n", "pilot", "seeds", "frequencies", "harmonics", "context_dim", "sample_shape"), 0
    ),
    **dict.fromkeys(
        ("dim", "observation_dim", "action_dim", "num_particles", "space_dim", "size", "width"), 1
    ),
    **dict.fromkeys(
        ("depth", "members", "outputs", "bins", "transforms", "modes", "panels", "cells"), 1
    ),
    **dict.fromkeys(
        ("chains", "num_chains", "num_draws", "num_samples", "num_envs", "num_steps"), 1
    ),
    **dict.fromkeys(
        ("candidates", "components", "batch_size", "buffer_size", "bank_size", "capacity"), 1
    ),
    **dict.fromkeys(("round_draws", "check_draws", "bank_contexts", "order"), 1),
    **dict.fromkeys(("num_projections", "resolution", "radial", "vectors", "rows", "columns"), 1),
    **dict.fromkeys(
        ("num_contexts", "episodes", "jobs", "inputs", "resampled", "draws", "keep"), 1
    ),
}
# Counts of what is done again and again: any patience is allowed.
_LEAST: dict[str, int] = {
    **dict.fromkeys(("burn_in", "workers"), 0),
    **dict.fromkeys(("thinning", "chunk", "iterations", "updates", "steps_per_cycle"), 1),
    **dict.fromkeys(("max_cycles", "max_epochs", "evaluations", "max_boxes", "max_points"), 1),
    **dict.fromkeys(("witness_evaluations", "total_steps"), 1),
}
_ABOVE: dict[str, float] = dict.fromkeys(
    ("std", "noise_std", "prior_std", "spacing", "tolerance", "step_size", "learning_rate"), 0
)
_LIKE = "\0like"  # key of the tensor whose precision arrays and lists take


@overload
def checked(thing: _T) -> _T: ...


@overload
def checked(
    *,
    least: Mapping[str, float] = ...,
    above: Mapping[str, float] = ...,
    most: Mapping[str, float] = ...,
    below: Mapping[str, float] = ...,
    sizes: Collection[str] = ...,
    finite: Collection[str] = ...,
    infinite: Collection[str] = ...,
    skip: Collection[str] = ...,
) -> Callable[[_T], _T]: ...


def checked(
    thing: Any = None,
    *,
    least: Mapping[str, float] = types.MappingProxyType({}),
    above: Mapping[str, float] = types.MappingProxyType({}),
    most: Mapping[str, float] = types.MappingProxyType({}),
    below: Mapping[str, float] = types.MappingProxyType({}),
    sizes: Collection[str] = (),
    finite: Collection[str] = (),
    infinite: Collection[str] = (),
    skip: Collection[str] = (),
) -> Any:
    """A function or class whose public signatures check their arguments.

    Arguments:
        thing: The function, or the class: its ``__init__``, ``__call__`` and every method
            without a leading underscore that the class defines itself.
        least: Least values of numbers, by the arguments' names.
        above: What numbers must lie above.
        most: Largest values of numbers.
        below: What numbers must lie below.
        sizes: Names of integers that count points: at least one, and no more than memory holds.
        finite: Names of tensors whose entries must be finite.
        infinite: Names of numbers that may be infinite. A default that is infinite says it too.
        skip: Names of arguments and methods that are left alone.

    Returns:
        The same function or class, with the same signature.

    Example:
        >>> @checked(least={"n": 1})
        ... def doubled(n: int) -> int:
        ...     return 2 * n
        >>> doubled(1.5)
        Traceback (most recent call last):
            ...
        TypeError: n must be an integer, got 1.5
    """
    limits = _Limits(least, above, most, below, sizes, finite, infinite, skip)
    if thing is None:
        return functools.partial(_applied, limits=limits)
    return _applied(thing, limits)


class _Limits(typing.NamedTuple):
    least: Mapping[str, float]
    above: Mapping[str, float]
    most: Mapping[str, float]
    below: Mapping[str, float]
    sizes: Collection[str]
    finite: Collection[str]
    infinite: Collection[str]
    skip: Collection[str]

    def of(self, name: str) -> dict[str, float]:
        """The limits of one number."""
        given = zip(("least", "above", "most", "below"), self[:4], strict=True)
        found = {key: values[name] for key, values in given if name in values}
        if name in _ABOVE and not found:
            found["above"] = _ABOVE[name]
        return found


def _applied(thing: Any, limits: _Limits) -> Any:  # noqa: ANN401
    if not inspect.isclass(thing):
        return _wrapped(thing, limits, method=False)
    for name, member in list(vars(thing).items()):
        if name in limits.skip or (name.startswith("_") and name not in {"__init__", "__call__"}):
            continue
        if isinstance(member, classmethod | staticmethod):
            bound = isinstance(member, classmethod)
            inner = _wrapped(member.__func__, limits, method=bound)
            setattr(thing, name, type(member)(inner))
        elif inspect.isfunction(member):
            setattr(thing, name, _wrapped(member, limits, method=True))
    return thing


def _wrapped(function: Callable[..., Any], limits: _Limits, *, method: bool) -> Callable[..., Any]:
    door = _Door(function, limits, method=method)
    compiling = torch.compiler.is_compiling

    def call(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        if compiling():
            return function(*arguments, **options)
        arguments, options = door(arguments, options)
        return function(*arguments, **options)

    # With the globals of the function's own module: doctest takes functions with others for
    # foreign ones and does not run their examples.
    raw = inspect.unwrap(call)  # the run-time check of types may have wrapped it
    own = types.FunctionType(
        raw.__code__, function.__globals__, function.__name__, None, raw.__closure__
    )
    return functools.update_wrapper(own, function)


class _Door:
    """The rules of one signature, read at the first call: later names may be defined by then."""

    def __init__(self, function: Callable[..., Any], limits: _Limits, *, method: bool) -> None:
        self.function, self.limits, self.method = function, limits, method
        self.ready = False

    def __call__(
        self, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.ready:
            self._read()
        owner = arguments[0] if self.method and arguments else None
        scope: _Scope = _Sizes(owner, self.axes, arguments, options) if self.shaped else {}
        first = int(self.method)
        checked_arguments: list[Any] | None = None
        for i in range(first, len(arguments)):
            name, rule = self.places[i] if i < len(self.places) else self.rest
            if rule is not None:
                value = rule(name, arguments[i], scope)
                if value is not arguments[i]:
                    checked_arguments = checked_arguments or list(arguments)
                    checked_arguments[i] = value
        for name, given in options.items():
            rule = self.rules.get(name, self.other)
            if rule is not None:
                value = rule(name, given, scope)
                if value is not given:
                    options[name] = value
        return tuple(checked_arguments) if checked_arguments else arguments, options

    def _read(self) -> None:
        hints = _hints(self.function)
        self.places: list[tuple[str, _Rule | None]] = []
        self.rest: tuple[str, _Rule | None] = ("", None)
        self.rules: dict[str, _Rule | None] = {}
        self.other: _Rule | None = None
        for parameter in inspect.signature(self.function).parameters.values():
            name = parameter.name
            rule = None
            if name in hints and name not in self.limits.skip:
                rule = _rule(hints[name], self._named(parameter))
            if rule is not None and parameter.default is None:
                rule = _or_none(rule)
            if parameter.kind is parameter.VAR_POSITIONAL:
                self.rest = (name, rule)
            elif parameter.kind is parameter.VAR_KEYWORD:
                self.other = rule
            else:
                self.rules[name] = rule
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    self.places.append((name, rule))
        rules = [*self.rules.values(), self.rest[1], self.other]
        self.axes = {axis for rule in rules for axis in getattr(rule, "axes", ())}
        self.shaped = any(rule is not None and getattr(rule, "shaped", True) for rule in rules)
        self.ready = True

    def _named(self, parameter: inspect.Parameter) -> "_Named":
        name, limits = parameter.name, self.limits
        open_ended = isinstance(parameter.default, float) and not abs(parameter.default) < float(
            "inf"
        )
        return _Named(
            limits.of(name),
            name if name in _COUNTS or name in _LEAST or name in limits.sizes else "",
            name in limits.finite,
            not (open_ended or name in limits.infinite),
        )


class _Named(typing.NamedTuple):
    """What the decorator says of one argument."""

    limits: dict[str, float]
    counted: str  # the name of a count, or nothing
    finite: bool
    bounded: bool


class _Sizes(dict[str, Any]):
    """Lengths of named axes: those of the object's attributes, then those that tensors fix."""

    def __init__(
        self,
        owner: object,
        axes: Collection[str],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.owner = owner
        self.given = arguments, options
        if owner is not None:
            for axis in axes:
                length = getattr(owner, axis, None)
                if type(length) is int:
                    self[axis] = length

    def like(self) -> Tensor | None:
        """The first tensor of the call with real entries, or of the module that is called."""
        if _LIKE not in self:
            arguments, options = self.given
            found = (v for v in (*arguments, *options.values()) if isinstance(v, Tensor))
            like = next((v for v in found if v.dtype.is_floating_point), None)
            if like is None and isinstance(self.owner, torch.nn.Module):
                like = next(self.owner.parameters(), None)
            self[_LIKE] = like
        return self[_LIKE]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations; those whose names exist for type checkers alone are left out."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        found = {}
        for name, hint in function.__annotations__.items():
            try:
                scope = {"hint": hint}
                stub = types.FunctionType(compile("0", "", "eval"), function.__globals__)
                stub.__annotations__ = scope
                found[name] = typing.get_type_hints(stub, include_extras=True)["hint"]
            except NameError:
                continue
        return found


def _rule(hint: Any, named: _Named) -> _Rule | None:  # noqa: ANN401
    """How an argument with this annotation is checked; None for anything goes."""
    if hint is Any or hint is object or isinstance(hint, TypeVar):
        return None
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _rule(parts[0], named)
    if hint == _ARRAY_LIKE:
        return _described(_array, "an array of numbers")
    if origin in (Union, types.UnionType):
        return _union(parts, named)
    if origin is Literal:
        return _described(
            lambda name, value, _: validation.choice(name, value, parts), f"one of {parts}"
        )
    simple = _simple(hint, named)
    if simple is not None:
        return simple
    if hasattr(hint, "dim_str") and hasattr(hint, "array_type"):
        return _jaxtyped(hint, named)
    if origin is not None:
        return _generic(origin, parts, named)
    if hint is None or hint is type(None):
        return _instance(type(None))
    if not inspect.isclass(hint):
        return None
    if getattr(hint, "_is_protocol", False):
        return _protocol(hint)
    return _instance(hint)


def _simple(hint: Any, named: _Named) -> _Rule | None:  # noqa: ANN401
    """Rules of numbers, strings and the types of PyTorch."""
    limits: Any = named.limits
    if hint is int:
        return _described(_integer(named), "an integer")
    if hint is float:
        finite = named.bounded
        return _described(
            lambda name, value, _: validation.number(name, value, finite=finite, **limits),
            "a number",
        )
    if hint is bool:
        return _described(lambda name, value, _: validation.flag(name, value), "True or False")
    if hint is str:
        return _described(lambda name, value, _: validation.text(name, value), "a string")
    if hint is torch.device:
        return _described(lambda name, value, _: validation.device(name, value), "a device")
    if hint is torch.Generator:
        return _described(
            lambda name, value, _: validation.generator(name, value), "a torch.Generator"
        )
    if hint is Tensor:
        return _tensor(None, "any", named)
    if hint is Path:
        return _described(lambda name, value, _: validation.path(name, value), "a path")
    if hint in (Callable, collections.abc.Callable):
        return _described(lambda name, value, _: validation.callable_(name, value), "callable")
    return None


def _described(
    rule: Callable[[str, Any, _Scope], Any],
    words: str,
    *,
    shaped: bool = False,
    axes: Collection[str] = (),
) -> _Rule:
    """A rule with its words for messages, and the axes of tensors that it compares."""
    rule.words, rule.shaped, rule.axes = words, shaped, axes  # type: ignore[attr-defined]
    return rule


def _axes(shape: str) -> set[str]:
    return {axis for token in shape.split() if (axis := token.lstrip("#")).isidentifier()}


def _around(rule: Callable[[str, Any, _Scope], Any], words: str, inner: Sequence[Any]) -> _Rule:
    """A rule that hands on to others."""
    return _described(
        rule,
        words,
        shaped=any(getattr(part, "shaped", False) for part in inner),
        axes={axis for part in inner for axis in getattr(part, "axes", ())},
    )


def _integer(named: _Named) -> Callable[[str, Any, _Scope], Any]:
    limits: Any = {key: value for key, value in named.limits.items() if key in {"least", "most"}}
    if not named.counted or named.counted in _LEAST:
        if named.counted:
            limits = {"least": _LEAST[named.counted], **limits}
        return lambda name, value, _: validation.integer(name, value, **limits)
    least = int(limits.get("least", _COUNTS.get(named.counted, 1)))
    if "most" in limits:
        most = limits["most"]
        return lambda name, value, _: validation.integer(name, value, least=least, most=most)
    return lambda name, value, _: validation.size(name, value, least=least)


def _array(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
    validation.tensor(name, value.detach() if isinstance(value, Tensor) else value, kind="any")
    return value.numpy(force=True) if isinstance(value, Tensor) else value


def _tensor(shape: str | None, kind: validation.Kind, named: _Named) -> _Rule:
    finite = named.finite

    def rule(name: str, value: Any, scope: _Scope) -> Tensor:  # noqa: ANN401
        like = None
        if not isinstance(value, Tensor) and isinstance(scope, _Sizes):
            like = scope.like()
        return validation.tensor(
            name, value, shape=shape, kind=kind, finite=finite, sizes=scope, like=like
        )

    words = "a tensor" if shape is None else f"a tensor of shape ({', '.join(shape.split())})"
    return _described(rule, words, shaped=True, axes=_axes(shape or ""))


def _jaxtyped(hint: Any, named: _Named) -> _Rule | None:  # noqa: ANN401
    family = hint.dtype.__name__ if hasattr(hint.dtype, "__name__") else "Shaped"
    kinds: dict[str, validation.Kind] = {
        "Float": "float",
        "Int": "int",
        "Bool": "bool",
        "Real": "number",
    }
    kind = kinds.get(family, "number")
    if hint.array_type is Tensor:
        return _tensor(hint.dim_str, kind, named)
    if hint.array_type is np.ndarray:
        shape = hint.dim_str

        def array(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
            given = value.detach() if isinstance(value, Tensor) else value
            made = validation.tensor(name, given, shape=shape, kind=kind, sizes=scope)
            return value if isinstance(value, np.ndarray) else made.numpy(force=True)

        return _described(array, "an array", shaped=True, axes=_axes(shape))
    return None


def _generic(origin: Any, parts: tuple[Any, ...], named: _Named) -> _Rule | None:  # noqa: ANN401
    """Containers and callables."""
    if origin is collections.abc.Callable:
        return _simple(Callable, named)
    if origin is np.ndarray:
        return _described(_array, "an array of numbers")
    if not inspect.isclass(origin):
        return None
    if issubclass(origin, os.PathLike):
        return _described(lambda name, value, _: validation.path(name, value), "a path")
    if issubclass(origin, tuple) and (len(parts) < 2 or parts[-1] is not Ellipsis):
        return _fixed_tuple([_rule(part, named) for part in parts])
    if issubclass(origin, Mapping):
        inner = _rule(parts[1], named) if len(parts) == 2 else None
        return _mapping(origin, inner)
    if issubclass(origin, Sequence):
        return _sequence(origin, _rule(parts[0], named) if parts else None)
    return _instance(origin)


def _sequence(origin: Any, inner: _Rule | None) -> _Rule:  # noqa: ANN401
    def rule(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        given = value
        if isinstance(value, np.ndarray | Tensor) and value.ndim > 0:
            given = value.tolist() if value.ndim == 1 else list(value)
        if isinstance(given, str | bytes) or not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a sequence, got {validation.said(value)}")
        if inner is not None:
            found = [inner(f"{name}[{i}]", item, scope) for i, item in enumerate(given)]
            if any(new is not old for new, old in zip(found, given, strict=True)):
                given = found
        if not isinstance(given, origin):
            given = origin(given) if origin in (list, tuple) else given
        return given

    return _around(rule, "a sequence", [inner])


def _fixed_tuple(inner: list[_Rule | None]) -> _Rule:
    def rule(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        if isinstance(value, np.ndarray | Tensor) and value.ndim == 1:
            value = tuple(value.tolist())
        if not isinstance(value, tuple | list):
            raise TypeError(
                f"{name} must be a tuple of {len(inner)} values, got {validation.said(value)}"
            )
        if len(value) != len(inner):
            raise ValueError(
                f"{name} must be a tuple of {len(inner)} values, got {validation.said(value)}"
            )
        items = zip(inner, value, strict=True)
        found = tuple(
            item if part is None else part(f"{name}[{i}]", item, scope)
            for i, (part, item) in enumerate(items)
        )
        same = isinstance(value, tuple) and all(
            new is old for new, old in zip(found, value, strict=True)
        )
        return value if same else found

    return _around(rule, f"a tuple of {len(inner)} values", inner)


def _mapping(origin: Any, inner: _Rule | None) -> _Rule:  # noqa: ANN401
    def rule(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        if not isinstance(value, origin):
            raise TypeError(f"{name} must be a dictionary, got {validation.said(value)}")
        if inner is None:
            return value
        found = {key: inner(f"{name}[{key!r}]", item, scope) for key, item in value.items()}
        return found if any(found[key] is not value[key] for key in found) else value

    return _around(rule, "a dictionary", [inner])


def _union(parts: tuple[Any, ...], named: _Named) -> _Rule | None:
    kinds = [part for part in parts if part is not type(None)]
    if str in kinds and any(_is_path(part) for part in kinds):
        kinds = [part for part in kinds if part is not str]
    if torch.device in kinds:
        kinds = [part for part in kinds if part is not str]
    if float in kinds and int in kinds:
        kinds.remove(int)
    rules = [_rule(part, named) for part in kinds]
    if any(rule is None for rule in rules):
        return None
    known = [rule for rule in rules if rule is not None]
    if type(None) in parts and len(known) == 1:
        return _or_none(known[0])
    allowed_none = type(None) in parts
    numeric = [rule for part, rule in zip(kinds, known, strict=True) if part in (float, int)]
    words = " or ".join(getattr(rule, "words", "") for rule in known)
    words += " or None" if allowed_none else ""

    def rule(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        if value is None and allowed_none:
            return value
        if numeric and isinstance(value, int | float | np.number):
            return numeric[0](name, value, scope)
        refused: list[str] = []
        for part in known:
            try:
                return part(name, value, scope)
            except ValueError as error:
                refused.append(str(error))
            except TypeError:
                continue
        if refused:
            raise ValueError(_joined(f"{name} must have shape ", refused))
        raise TypeError(f"{name} must be {words}, got {validation.said(value)}")

    return _around(rule, words, known)


def _joined(start: str, refused: list[str]) -> str:
    """One message of several: the shapes that are allowed, or else the first."""
    shapes = [words for words in refused if words.startswith(start)]
    if len(shapes) < 2:
        return refused[0]
    allowed = [words[len(start) :].rpartition(", got ")[0] for words in shapes]
    return f"{start}{' or '.join(allowed)}, got {shapes[0].rpartition(', got ')[2]}"


def _is_path(hint: Any) -> bool:  # noqa: ANN401
    kind = get_origin(hint) or hint
    return inspect.isclass(kind) and issubclass(kind, os.PathLike)


def _or_none(rule: _Rule) -> _Rule:
    def optional(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        return value if value is None else rule(name, value, scope)

    words = f"{getattr(rule, 'words', '')} or None"
    return _around(optional, words, [rule])


def _instance(kind: type) -> _Rule:
    words = "None" if kind is type(None) else f"of type {kind.__name__}"

    def rule(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {words}, got {validation.said(value)}")
        return value

    return _described(rule, words)


def _protocol(kind: type) -> _Rule | None:
    """What has the methods and attributes that a protocol lists."""
    members = {
        member
        for base in kind.__mro__
        if getattr(base, "_is_protocol", False) and base is not typing.Protocol
        for member in (*vars(base), *inspect.get_annotations(base))
        if not member.startswith("_") or member == "__call__"
    }

    def rule(name: str, value: Any, scope: _Scope) -> Any:  # noqa: ANN401
        lacks = sorted(member for member in members if not hasattr(value, member))
        if lacks:
            raise TypeError(
                f"{name} must have {', '.join(lacks)} as a {kind.__name__} has, got "
                f"{validation.said(value)}"
            )
        return value

    return _described(rule, f"a {kind.__name__}")
