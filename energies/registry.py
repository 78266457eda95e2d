"""Targets by name, so that a command line or a config file can ask for one.

Besides the names of :func:`names`, :func:`get` takes the import path of anything that a user
wrote, ``package.module:attribute``: an energy as it is, or a class or classmethod that makes one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

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
            or a classmethod is called to make the target, and so is any other if options are
            given; otherwise it is the energy itself.
        options: Arguments for the class or function that makes the target.

    Returns:
        The target, or the user's energy.

    Raises:
        ValueError: If the name is unknown, or the path leads to nothing or to something that is
            not callable.

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
    made = inspect.isclass(found) or (inspect.ismethod(found) and inspect.isclass(found.__self__))
    if made or options:
        found = found(**options)
    if not callable(found):
        raise ValueError(f"name must lead to a callable energy, got {path!r}: {found!r}")
    return found
