r"""Sample any energy with diffusion models trained by reweighted score matching.

Given an energy :math:`E(x)` and nothing else, the library trains a diffusion model whose samples
follow :math:`p(x) \propto \exp(-E(x))`, and tells how far these samples can be trusted.

Two more packages build on this one: :mod:`energies` holds targets with known answers and adapters
for other kinds of energies, :mod:`rl` holds agents. ``from rsm_sampler import energies, rl`` gives
the very modules that ``import energies, rl`` gives. They are loaded when first asked for, never by
``import rsm_sampler`` itself.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.energy_sampler import EnergySampler
from rsm_sampler.exploration import Exploration, explore
from rsm_sampler.loggers import JSONLinesLogger, Logger, MemoryLogger, TensorBoardLogger
from rsm_sampler.target.energy import BudgetExceededError, EnergyError
from rsm_sampler.trainer import DivergedError, EnergyDiffusionTrainer, Progress
from rsm_sampler.trainer_config import TrainerConfig
from rsm_sampler.verdict.diagnosis import Diagnosis
from rsm_sampler.version import __version__

if TYPE_CHECKING:
    import energies as energies
    import rl as rl

__all__ = [
    "BudgetExceededError",
    "CheckpointError",
    "Diagnosis",
    "DivergedError",
    "EnergyDiffusionTrainer",
    "EnergyError",
    "EnergySampler",
    "Exploration",
    "JSONLinesLogger",
    "Logger",
    "MemoryLogger",
    "Progress",
    "TensorBoardLogger",
    "TrainerConfig",
    "__version__",
    "explore",
]

_ROOMS = ("energies", "rl")


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return _room(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


def _room(name: str) -> ModuleType:
    """The package ``name`` installed beside this one, under that one name.

    ``energies`` and ``rl`` are common names for folders, and the first one on ``sys.path`` wins.
    A package that stands anywhere but beside this one is somebody else's: it is not run.

    Raises:
        ImportError: If Python finds no package of that name, or finds a foreign one.
    """
    own = Path(__file__).resolve().parent.with_name(name)
    module = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if module is None else module.__spec__
    found = _location(spec) or getattr(module, "__file__", None)
    if found is None and module is None:
        raise ImportError(
            f"rsm_sampler.{name} needs the package {name!r}, which should stand at {own} but does "
            "not; please install rsm-sampler again",
            name=name,
        )
    if found is None or Path(found).resolve().parent != own:
        raise ImportError(
            f"rsm_sampler.{name} needs the package {name!r} at {own}, but Python finds another "
            f"{name!r} first: {found or module!r}; rename that one, or start Python where it does "
            "not come first on sys.path",
            name=name,
            path=found,
        )
    return importlib.import_module(name)


def _location(spec: ModuleSpec | None) -> str | None:
    """The file that a spec loads, or the folder where it has no file."""
    if spec is None:
        return None
    if spec.has_location:
        return spec.origin
    return next(iter(spec.submodule_search_locations or ()), None)
