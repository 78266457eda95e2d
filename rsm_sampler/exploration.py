r"""The quick answer: weighted draws, log Z and the basins of an energy, without any training.

:func:`explore` finds the target (:mod:`rsm_sampler.bank.explorer`) and stops as soon as its draws
are worth as much as was asked for. What it finds is what
:class:`~rsm_sampler.trainer.EnergyDiffusionTrainer` would learn from: ``trainer.explore()`` is the
first part of ``trainer.fit()``.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.explorer import explore_problem
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.sources import BankSource
from rsm_sampler.checked import checked
from rsm_sampler.montecarlo.weights import LogWeights
from rsm_sampler.target.coordinates import Coordinates, bounds_of
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.gradients import GradientMethod
from rsm_sampler.target.problem import Problem
from rsm_sampler.verdict.coverage import Coverage
from rsm_sampler.verdict.diagnosis import NOISE

__all__ = ["Basin", "Exploration", "explore"]

_LEAST_BUDGET = 500
_SEARCH, _STARTS, _CHAINS = 120_000, 128, 250_000  # evaluations, starts, evaluations
_LEAST_EFFECTIVE = 400.0  # draws: means within a twentieth of a standard deviation
_LEAST_STARTS = 59  # exclude a basin that catches more than a twentieth of them, with 95 %


@dataclass(frozen=True)
class Basin:
    """A minimum of the energy, and the share of the law around it.

    Attributes:
        location: The minimum, in the user's coordinates, (dim).
        energy: The energy there in unbounded coordinates, in nats.
        mass: The share of the law that is nearest to it.
        mass_se: Its standard error; NaN for chains.
        starts: How many independent starts ended in it.
    """

    location: Tensor
    energy: float
    mass: float
    mass_se: float
    starts: int


@dataclass(frozen=True)
class Exploration:
    r"""Weighted draws of a target, and what was seen on the way; print it.

    Attributes:
        x: Draws in the user's coordinates, (n, dim), in double precision.
        log_weight: Their log-weights, (n); :math:`\log \frac1n \sum_i w_i` is log Z. Zeros for
            chains.
        log_z: Estimate of log Z.
        log_z_se: Its standard error; NaN for chains.
        ess: Effective sample size, in draws.
        basins: The basins, by mass.
        evaluations: Energy evaluations.
        counts: The same by purpose.
        method: ``"mixture"``, ``"kernels"`` or another source of independent draws, or
            ``"chains"``; ``"bank"`` for all points before an interrupt.
        coverage: What was searched, and what could still be missing.
        verdict: ``"trustworthy"``, ``"not trustworthy"`` or ``"cannot tell"``.
        reasons: What speaks against the draws, or was turned down.
        seconds: Time it took.
    """

    x: Tensor
    log_weight: Tensor
    log_z: float
    log_z_se: float
    ess: float
    basins: tuple[Basin, ...]
    evaluations: int
    counts: dict[str, int]
    method: str
    coverage: Coverage
    verdict: str
    reasons: tuple[str, ...]
    seconds: float

    @checked
    def resample(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Equally weighted draws, resampled by weight.

        Arguments:
            n: How many.
            generator: Source of randomness.
        """
        return self.x[LogWeights(self.log_weight).resampled(n, generator)]

    def __str__(self) -> str:
        lines = [
            f"verdict      {self.verdict}",
            f"draws        {len(self.x):,}, worth {self.ess:,.0f}, by {self.method}",
            f"log Z        {self.log_z:.4f} ± {self.log_z_se:.4f}"
            if math.isfinite(self.log_z_se)
            else f"log Z        about {self.log_z:.1f}, by chains",
            f"evaluations  {self.evaluations:,} in {self.seconds:.1f} s",
            f"basins       {len(self.basins)}",
        ]
        for basin in self.basins[:8]:
            place = ", ".join(f"{value:.4g}" for value in basin.location[:4].tolist())
            more = ", ..." if len(basin.location) > 4 else ""
            error = f" ± {basin.mass_se:.1%}" if math.isfinite(basin.mass_se) else ""
            lines.append(f"  {basin.mass:6.1%}{error}  at ({place}{more})")
        if len(self.basins) > 8:
            lines.append(f"  and {len(self.basins) - 8} more")
        lines.append(f"coverage     {self.coverage}")
        lines += [f"note         {reason}" for reason in self.reasons]
        return "\n".join(lines)


@checked(
    skip=("energy", "bounds"),
    least={"ess": 1, "budget": _LEAST_BUDGET},
    above={"seconds": 0, "scale": 0, "call_timeout": 0},
)
def explore(
    energy: Callable[..., Tensor],
    dim: int,
    *,
    bounds: tuple[Any, Any] | None = None,
    seed: int = 0,
    ess: float = 10_000,
    budget: int | None = None,
    seconds: float | None = None,
    gradients: GradientMethod = "auto",
    centre: Sequence[float] | Tensor | None = None,
    scale: float | None = None,
    sources: Sequence[BankSource] | None = None,
    dtype: torch.dtype = torch.float64,
    call_timeout: float | None = None,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> Exploration:
    r"""Weighted draws, log Z and the basins of :math:`p(x) \propto e^{-E(x)}`, without training.

    An interrupt from the keyboard ends it with the points so far.

    Arguments:
        energy: The energy: points (n, dim) to values (n). See :mod:`energies` for adapters.
        dim: Length of a point.
        bounds: As in :class:`~rsm_sampler.trainer.EnergyDiffusionTrainer`.
        seed: Decides every random number.
        ess: Effective draws that are enough.
        budget: Most energy evaluations; None for as many as are needed.
        seconds: Time after which no further phase of work is begun; a first bank is drawn in any
            case.
        gradients: Where gradients come from: ``"autograd"``, ``"differences"`` of values;
            ``"auto"`` takes autograd where it works. ``"none"`` is ``"differences"`` here.
        centre: Where to look first, within the bounds.
        scale: Width to look at, if known to an order of magnitude.
        sources: Ways to propose a law of draws, asked in this order
            (:mod:`rsm_sampler.bank.sources`).
        dtype: Precision of the points that the energy sees.
        call_timeout: Seconds that one evaluation may take; a point that takes longer has weight
            zero.
        device: Where points live.
        progress: Whether to show what is being done; None to show it on a terminal.

    Raises:
        EnergyError: If the energy cannot be sampled, and why.
        ValueError: If an argument does not fit; the message names it.

    Example:
        >>> def energy(x):
        ...     return ((x**2 - 4) ** 2).sum(-1) / 8
        >>> found = explore(energy, 2, ess=500, seed=0)
        >>> len(found.basins), found.verdict
        (4, 'trustworthy')
    """
    started = time.perf_counter()
    device = torch.device(device)
    meter = MeteredEnergy(energy, dim, budget=budget, dtype=dtype, call_timeout=call_timeout)
    coordinates = bounds_of(bounds, dim)
    problem = Problem(meter, coordinates, gradients=gradients)
    where = None
    if centre is not None:
        given = torch.as_tensor(centre, dtype=torch.float64)
        if given.shape == (dim,):
            where = coordinates.inverse(given)
        if where is None or not bool(where.isfinite().all()):
            raise ValueError(
                f"centre must be {dim} numbers within the bounds, got {given.tolist()}"
            )
    origin = torch.zeros(2, dim, dtype=torch.float64, device=device)
    plan = Plan.within(
        dim,
        evaluations=_SEARCH,
        bank=max(50_000, int(10 * ess)),
        chains=_CHAINS,
        ess=float(ess),
        starts=_STARTS,
        slope_cost=problem.slope_cost(origin),
        free=None if budget is None else max(256, budget - meter.evaluations),
    )
    bar = tqdm(disable=None if progress is None else not progress, bar_format="{desc} [{elapsed}]")
    try:
        found = explore_problem(
            problem,
            plan,
            torch.Generator(device).manual_seed(seed),
            centre=where,
            scale=scale,
            sources=sources,
            until=None if seconds is None else started + seconds,
            report=lambda text: bar.set_description_str(f"{meter.evaluations:,}: {text}"),
            keep=True,
        )
    finally:
        bar.close()
    return exploration_of(
        found.bank,
        found.record(coordinates),
        coordinates,
        meter,
        float(ess),
        seconds=time.perf_counter() - started,
    )


def exploration_of(
    bank: Bank,
    record: dict[str, Any],
    coordinates: Coordinates,
    meter: MeteredEnergy,
    wanted: float,
    *,
    seconds: float,
) -> Exploration:
    """What was found, in the user's coordinates and with a verdict.

    Arguments:
        bank: The weighted points.
        record: What was seen on the way (:meth:`rsm_sampler.bank.explorer.Found.record`).
        coordinates: From unbounded coordinates to the user's.
        meter: The energy.
        wanted: Effective draws that were asked for.
        seconds: Time it took.
    """
    basins = sorted(
        (
            Basin(
                torch.tensor(basin["x"], dtype=torch.float64),
                basin["energy"],
                basin["mass"],
                basin["mass_se"],
                basin["starts"],
            )
            for basin in record["basins"]
        ),
        key=lambda basin: -basin.mass if basin.mass == basin.mass else 0.0,
    )
    reasons = list(record["reasons"])
    located = record["starts"] - record["lost"]
    verdict = "trustworthy"
    if record.get("interrupted"):
        verdict = "cannot tell"
        reasons.append("interrupted: these are all points so far")
    elif bank.method == "chains":
        verdict = "cannot tell"
        reasons.append("chains: their draws are dependent, and they may have missed modes")
    elif bank.ess < min(wanted, _LEAST_EFFECTIVE):
        verdict = "cannot tell"
        reasons.append(f"only {bank.ess:.0f} effective draws within the budget")
    elif located < _LEAST_STARTS:
        verdict = "cannot tell"
        reasons.append(
            f"only {located} independent starts ended in a basin, of {record['starts']}; at least "
            f"{_LEAST_STARTS} are needed"
        )
    elif record["unexamined"]:
        verdict = "cannot tell"
        reasons.append(
            "many starts were alone in their basins, and too few further ones came to rest to "
            "tell whether there are more basins"
        )
    elif record.get("noise", 0.0) > NOISE:
        verdict = "cannot tell"
        reasons.append(
            "noise: the energy gives other values when the same points are asked again, with a "
            f"standard deviation of {record['noise']:.2g}; log Z and the draws are those of the "
            "mean of exp(-energy)"
        )
    elif record.get("refused"):
        verdict = "cannot tell"
        reasons.append("what the refused bank had missed, the next may have missed, too")
    return Exploration(
        x=coordinates.forward(bank.points[0])[0],
        log_weight=bank.log_weight[0],
        log_z=bank.log_z,
        log_z_se=bank.log_z_se,
        ess=bank.ess,
        basins=tuple(basins),
        evaluations=meter.evaluations,
        counts=dict(meter.counts),
        method=record["source"],
        coverage=Coverage(
            record["region"],
            record["starts"],
            record["lost"],
            len(basins),
            record["points"],
            record["density"],
            record["spread"],
            coordinates.dim,
        ),
        verdict=verdict,
        reasons=tuple(reasons),
        seconds=seconds,
    )
