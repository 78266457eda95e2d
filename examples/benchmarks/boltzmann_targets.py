"""The targets of boltzmann.py: how each is made, what is measured, and against what.

Where there are no exact draws, the reference is the end of long Metropolis-adjusted chains from
independent starts, made once for each seed and kept in the system's folder of temporary files.
"""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor

import energies
from energies.chains import long_chains
from rsm_sampler import metrics

__all__ = ["TASKS", "Task", "reference"]

Measure = Callable[[Any, Tensor], dict[str, float]]
_SEED = 10**6  # of reference draws


@dataclass(frozen=True)
class Task:
    """A target, how it is measured, and where plain chains start.

    Attributes:
        make: The target.
        n: Draws that enter the measure.
        figure: Name of what is measured.
        measure: It, and what else is worth a look, by name, from the target and draws.
        slow: Observables (n, k) that plain chains are slow in.
        start: Standard deviation of the chains' starts, and the width the peers are given.
        detail: Scale of the finest structure, for Langevin steps.
        differentiable: Whether autograd knows the energy's gradients.
        seeds: Number of seeds.
        floor: What a perfect sampler scores.
        reach: What is to be reached.
        reach_log_z: Likewise, of the error of log Z.
        config: What the trainer's configuration has instead of its defaults.
        log_z_draws: Draws whose weights give log Z and the reweighted figure.
        refine_steps: Steps of the Metropolis chains that refine raw draws; 0 where the figure is
            one that short chains cannot move, such as the weights of modes.
        refine_by: Their moves, where the energy has gradients.
    """

    make: Callable[[], Any]
    n: int
    figure: str
    measure: Measure
    slow: Callable[[Any, Tensor], Tensor]
    start: float = 3.0
    detail: float = 0.2
    differentiable: bool = True
    seeds: int = 5
    floor: float = 0.0
    reach: float = math.nan
    reach_log_z: float = math.nan
    config: dict[str, Any] = field(default_factory=dict)
    log_z_draws: int = 32_768
    refine_steps: int = 0
    refine_by: Literal["mala", "hmc"] = "mala"


# ---------------------------------------------------------------------- references


def reference(target: Any, n: int, *, seed: int = _SEED) -> Tensor:
    """Draws of the target, (n, dim), float64: exact ones, or ends of long chains."""
    generator = torch.Generator().manual_seed(seed)
    try:
        return target.sample(n, generator=generator, dtype=torch.float64)
    except NotImplementedError:
        pass
    path = Path(tempfile.gettempdir()) / f"rsm_sampler_{target.name}_{n}_{seed}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    found = target.reference(n, generator=generator)
    partial = path.with_suffix(f".{os.getpid()}")  # several processes may be at it
    torch.save(found, partial)
    partial.replace(path)
    return found


class HareLynx:
    """The posterior of hares and lynxes: a simulator in NumPy, without gradients."""

    name, dim, log_z = "hare-lynx", 8, None

    def __init__(self) -> None:
        self.energy = energies.from_numpy(energies.hare_lynx_energy)

    def __call__(self, x: Tensor) -> Tensor:
        """The energy."""
        return self.energy(x)

    def sample(self, *_: Any, **__: Any) -> Tensor:
        """Refused, as by targets without exact draws."""
        raise NotImplementedError(f"{self.name} has no exact sampler")

    def reference(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Ends of long random walks about the published estimates."""
        start = torch.tensor([0.55, 0.028, 0.80, 0.024, 33.9, 5.9, 0.25, 0.25]).double().log()
        start = start + 0.05 * torch.randn(2000, 8, dtype=torch.float64, generator=generator)
        return long_chains(
            self.energy, start, n, burn_in=3000, thinning=100, method="rw", generator=generator
        )


# ------------------------------------------------------------------------ measures


def worst_pair(target: Any, x: Tensor) -> dict[str, float]:
    """Largest error of the share of the deeper well over all pairs."""
    gap = target.wells(x).double().mean(0) - target.well_weights[1]
    return {"worst pair": float(gap.abs().max()), "mean pair": float(gap.mean())}


def mode_weights(target: Any, x: Tensor) -> dict[str, float]:
    """Total variation of the mode weights, and modes without a draw."""
    weight = target.responsibilities(x).double().mean(0)
    apart = 0.5 * float((weight - target.mode_weights).abs().sum())
    return {"TV": apart, "missing modes": int((weight < 0.5 / len(x)).sum())}


def funnel_ks(target: Any, x: Tensor) -> dict[str, float]:
    """Kolmogorov-Smirnov distance of the first coordinate."""
    return {"KS": float(stats.kstest(x[:, 0].double().numpy() / 3, "norm").statistic)}


def energy_w2(target: Any, x: Tensor) -> dict[str, float]:
    """Transport distance of the energies to those of reference draws, rooted; mean and virial."""
    own, other = target(x.double()), target(reference(target, len(x)))
    virial = target.virial(x.double())
    return {
        "energy W2": float(metrics.wasserstein2_1d(own, other)),
        "mean energy": float(own.mean()),
        "virial": float(virial.mean()),
        "infinite energies": int((~own.isfinite()).sum()),
    }


def moments(target: Any, x: Tensor) -> dict[str, float]:
    """Worst error of a mean, in standard deviations, and of a standard deviation, relative."""
    exact = reference(target, 100_000)
    std = exact.std(0)
    return {
        "worst mean": float(((x.double().mean(0) - exact.mean(0)) / std).abs().max()),
        "worst std": float((x.double().std(0) / std).log().abs().max()),
    }


def _symmetric(dim: int) -> Task:
    return Task(
        lambda: energies.SymmetricManyWell(dim),
        10_000,
        "TV",
        mode_weights,
        lambda _, x: (x[:, :5] > 0).double(),
        floor=0.022,
        reach=0.05,
        reach_log_z=0.05,
        # Paths of more dimensions are worth less each.
        log_z_draws=131_072 if dim == 200 else 32_768,
    )


def _cluster(name: str, n: int, floor: float, reach: float, **options: Any) -> Task:
    return Task(
        lambda: energies.get(name),
        n,
        "energy W2",
        energy_w2,
        lambda target, x: target(x).unsqueeze(-1),
        floor=floor,
        reach=reach,
        **options,
    )


def _posterior(make: Callable[[], Any], floor: float, **options: Any) -> Task:
    return Task(
        make,
        10_000,
        "worst mean",
        moments,
        lambda _, x: x.double(),
        floor=floor,
        reach=0.1,
        **options,
    )


# No path of many particles is worth much.
PAIRS: dict[str, Any] = {
    "config": {"compile": True},
    "log_z_draws": 1024,
    "detail": 0.02,
    "refine_steps": 300,
}
# Of 1,485 pairs; longer than by default.
MORE_PAIRS: dict[str, Any] = {
    **PAIRS,
    "config": {"compile": True, "steps_per_cycle": 9600},
    "log_z_draws": 64,
    "refine_steps": 50,
    "refine_by": "hmc",
}

TASKS: dict[str, Task] = {
    "many-well-32": Task(
        lambda: energies.get("many-well-32"),
        100_000,
        "worst pair",
        worst_pair,
        lambda target, x: target.wells(x),
        floor=0.003,
        reach=0.02,
        reach_log_z=0.1,
    ),
    **{f"many-well-m5-{dim}d": _symmetric(dim) for dim in (5, 50, 100, 200)},
    "funnel": Task(
        lambda: energies.get("funnel"),
        10_000,
        "KS",
        funnel_ks,
        lambda _, x: x[:, :1] / 3,
        floor=0.009,
        reach=0.03,
        reach_log_z=0.05,
    ),
    "gmm40-50d": Task(
        lambda: energies.get("gmm40-50d"),
        10_000,
        "TV",
        mode_weights,
        lambda target, x: target.responsibilities(x),
        start=25.0,
        detail=1.0,
        floor=0.025,
        reach=0.10,
    ),
    # Densities of the flow are dear where a network has many pairs.
    "dw4": _cluster(
        "dw4",
        1000,
        0.14,
        0.20,
        seeds=3,
        start=2.0,
        refine_steps=100,
        log_z_draws=4096,
        config={"compile": True},
    ),
    "lj13": _cluster("lj13", 2000, 0.44, 2.0, seeds=3, start=1.0, **PAIRS),
    "lj55": _cluster("lj55", 400, 1.6, 28.0, seeds=1, start=1.7, **MORE_PAIRS),
    # The worst of d means over n draws is off by about sqrt(2 log(2 d) (1 / n + 1 / m)), with
    # m what the reference is worth: 12,000 of 100,000 draws where it is a random walk.
    "breast-cancer": _posterior(lambda: energies.get("breast-cancer"), 0.029, start=1.0),
    "hare-lynx": _posterior(HareLynx, 0.032, start=1.0, differentiable=False),
}
