"""Targets by name, so that a command line or a config file can ask for one.

Besides the names of :func:`names`, :func:`get` takes the import path of an energy that a user
wrote, ``package.module:attribute``: a function written in Python or an object that can be called,
or a class or classmethod that makes such an object.

A path that leads to anything else is refused, and nothing is called that cannot be an energy:
``os:system`` is a path too. Python's own library and functions built into C hold no energies. What
knows its dimension is tried on two points.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from energies.conditional import ConditionalMixture
from energies.decay import DecayPosterior
from energies.funnel import Funnel
from energies.gaussian_mixture import GaussianMixture
from energies.logistic import LogisticRegression
from energies.many_well import ManyWell, SymmetricManyWell
from energies.particles import DoubleWellCluster, LennardJones
from energies.rings import Rings
from energies.student_t import StudentT
from energies.two_moons import TwoMoons
from rsm_sampler.checked import checked

__all__ = ["get", "names"]


def _many_well(dim: int = 32) -> ManyWell:
    return ManyWell(dim)


def _double_well() -> ManyWell:
    return ManyWell(2)


def _gmm40_50d() -> GaussianMixture:
    return GaussianMixture.gmm40(50, std=1.0)


def _lj55() -> LennardJones:
    return LennardJones(55)


_TARGETS: dict[str, Callable[..., Any]] = {
    "breast-cancer": LogisticRegression.breast_cancer,
    "conditional-line": ConditionalMixture.line,
    "conditional-plane": ConditionalMixture.plane,
    "decay": DecayPosterior,
    "double-well": _double_well,
    "dw4": DoubleWellCluster,
    "funnel": Funnel,
    "gmm40": GaussianMixture.gmm40,
    "gmm40-50d": _gmm40_50d,
    "grid9": GaussianMixture.grid,
    "lj13": LennardJones,
    "lj55": _lj55,
    "many-well-32": _many_well,
    "many-well-m5": SymmetricManyWell,
    "paper-mixture": GaussianMixture.paper,
    "rings": Rings,
    "student-t": StudentT,
    "two-moons": TwoMoons,
}


def names() -> tuple[str, ...]:
    """Names that :func:`get` knows, in alphabetical order.

    Example:
        >>> "gmm40" in names()
        True
    """
    return tuple(sorted(_TARGETS))


@checked
def get(name: str, **options: Any) -> Any:  # noqa: ANN401
    """Target of that name, or whatever an import path leads to.

    Arguments:
        name: One of :func:`names`, or ``package.module:attribute``. An attribute that is a class
            of energies (its objects can be called with points) or a classmethod of one is called
            to make the target, and so is a function if options are given; otherwise it is the
            energy itself.
        options: Arguments for the class or function that makes the target.

    Returns:
        The target, or the user's energy. One that has a ``dim`` has been called with two points,
        in double precision and, should that fail, in single.

    Raises:
        ValueError: If the name is unknown, or the path leads to nothing, to something that is no
            energy (a module, a built-in function, a class whose objects cannot be called, ...),
            or to something that does not return one value for each of two points.

    Example:
        >>> get("gmm40")
        GaussianMixture(name='gmm40', dim=2, log_z=0.0000)
        >>> get("energies:StudentT", dim=3).dim
        3
        >>> get("energies:decay_energy").__name__
        'decay_energy'
    """
    if ":" in name:
        return _load(name, options)
    if name not in _TARGETS:
        close = difflib.get_close_matches(name, _TARGETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"name must be an import path 'package.module:attribute' or one of"
            f" {', '.join(names())}, got {name!r}{hint}"
        )
    return _TARGETS[name](**options)


def _load(path: str, options: dict[str, Any]) -> Any:  # noqa: ANN401
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"name must look like 'package.module:attribute', got {path!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"name must start with a module that can be imported, got {path!r}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"name must lead to an attribute, got {path!r}: {found!r} has no {part!r}"
            )
        found = getattr(found, part)
    maker = found.__self__ if inspect.ismethod(found) else found
    if inspect.isclass(maker):
        if not _makes_energies(maker):
            raise _no_energy(
                path,
                f"{_kind(found)}, whose objects cannot be called with points; give an instance",
            )
        found = _made(path, found, options)
    elif options:
        _refuse_others(path, found)
        found = _made(path, found, options)
    _refuse_others(path, found)
    _try(path, found)
    return found


def _made(path: str, maker: Callable[..., Any], options: dict[str, Any]) -> Any:  # noqa: ANN401
    """What a class or function makes of the options."""
    try:
        return maker(**options)
    except TypeError as error:
        raise ValueError(
            f"options must be the arguments of what name leads to, got {options} for {path!r}: "
            f"{error}"
        ) from error


def _makes_energies(kind: type) -> bool:
    """Whether objects of a class can be called, by a method that is written in Python."""
    if _of_python(kind) or inspect.isabstract(kind):
        return False
    called = next((vars(c)["__call__"] for c in kind.__mro__ if "__call__" in vars(c)), None)
    return isinstance(called, types.FunctionType) or issubclass(kind, torch.nn.Module)


def _refuse_others(path: str, found: object) -> None:
    """Refuse what cannot be an energy, or make one, without calling it."""
    inner: Any = found
    while isinstance(inner, functools.partial) or hasattr(inner, "cache_info"):
        inner = inner.func if isinstance(inner, functools.partial) else inner.__wrapped__
    built_in = (
        types.BuiltinFunctionType,
        types.MethodDescriptorType,
        types.MethodWrapperType,
        types.WrapperDescriptorType,
        types.ClassMethodDescriptorType,
        np.ufunc,
    )
    if inspect.ismodule(inner) or not callable(inner):
        raise _no_energy(path, _kind(inner))
    if inspect.isclass(inner):
        raise _no_energy(path, f"{_kind(inner)}; give an instance")
    if isinstance(inner, built_in) or _of_python(inner):
        raise _no_energy(path, _kind(inner))


def _of_python(found: object) -> bool:
    """Whether it, or the class that it is an object of, is of Python's own library."""
    for each in (found, type(found)):
        module = getattr(each, "__module__", None)
        root = str(module).partition(".")[0]
        own = isinstance(each, types.FunctionType | types.MethodType | type)
        if own and each not in (types.FunctionType, types.MethodType, type):
            return root in sys.stdlib_module_names and root != "__main__"
    return False


def _kind(found: object) -> str:
    """What it is, for a message."""
    name = getattr(found, "__qualname__", None) or getattr(found, "__name__", None)
    if inspect.ismodule(found):
        return f"the module {found.__name__}"
    if inspect.isclass(found):
        return f"the class {name}"
    if inspect.isroutine(found):
        built_in = "built-in " if not inspect.isfunction(found) else ""
        origin = getattr(found, "__module__", None)
        return f"the {built_in}function {name} of {origin}"
    value = f" {found!r:.40}" if isinstance(found, int | float | str) else ""
    return f"a value{value} of type {type(found).__name__}"


def _no_energy(path: str, what: str) -> ValueError:
    return ValueError(
        "name must lead to a callable energy, a function written in Python or an object that is "
        f"called with points, got {path!r}, which is {what}"
    )


def _try(path: str, energy: Callable[..., Any]) -> None:
    """Call an energy that knows its dimension with two points."""
    dim, context_dim = getattr(energy, "dim", None), getattr(energy, "context_dim", None)
    if type(dim) is not int or not 1 <= dim <= 1_000_000:
        return
    sizes = [dim, context_dim] if type(context_dim) is int and context_dim > 0 else [dim]
    rule = f"name must lead to an energy that returns values of shape (2,) for points (2, {dim})"
    problem: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        ramps = [torch.linspace(-0.5, 0.5, 2 * n, dtype=dtype).reshape(2, n) for n in sizes]
        try:
            with torch.no_grad():
                value = energy(*ramps)
        except Exception as error:
            problem = problem or error
            continue
        if isinstance(value, Tensor) and value.shape == (2,) and not value.is_complex():
            return
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{rule}, got {path!r}, which returned {shape}")
    assert problem is not None
    lines = str(problem).splitlines() or [""]
    raise ValueError(
        f"{rule}, got {path!r}, which raised {type(problem).__name__}: {lines[0]}"
    ) from problem
