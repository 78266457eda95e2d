r"""May I trust these samples? A verdict that can be wrong in neither direction.

What a sampler says of itself cannot show what it never saw: its effective sample size, its log Z
and short chains from its draws all look perfect when a mode is missing. So trust rests on an
**independent witness** (:mod:`rsm_sampler.verdict.witness`) that owes nothing to training. Six
questions, each with its error:

=================== ===============================================================================
effective sample    exact importance weights of n fresh draws; their share of equal weight
weight tail         shape of the generalised Pareto law of the largest weights, if the top
                    hundredth carries over 5 % of the total; above 0.7 averages are unreliable
log Z               the sampler's against the witness's
masses              the share of raw draws in each of up to 46 regions against the witness's: 24
                    nearest-centre cells over the draws of *both*, and the clusters that neighbours
                    among them form, so that an error of a whole mode shows however many cells
                    share it
drift               mean energy change of draws under a short exact chain
witness             its own effective size: an inconclusive witness is no confirmation
=================== ===============================================================================

A difference counts against the sampler if it exceeds a stated tolerance by more than 4 standard
errors, so a good sampler is blamed with probability below :math:`4 \cdot 10^{-3}` over all
questions together (46 regions and 3 more, two-sided normal tails of :math:`6 \cdot 10^{-5}` each;
regions overlap, and the tolerance comes on top, so it is less in practice). That holds for a
conclusive witness. The errors of one whose chains hardly mix are themselves too small; it confirms
nothing, and what it holds against the sampler is said as a possibility.

References:
    | Pareto smoothed importance sampling (Vehtari et al., 2024), section 2
    | https://arxiv.org/abs/1507.02646
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.montecarlo.run import refine
from rsm_sampler.target.coordinates import Affine, Coordinates
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.verdict.witness import MASS_TOLERANCE, SIGNIFICANT, Witness, find_witness

__all__ = ["Diagnosis", "Examinable", "diagnose", "pareto_shape"]

_LEAST_ESS = 0.8  # share of equally weighted draws, ODE weights
_LOG_Z_TOLERANCE = 0.03
_DRIFT_TOLERANCE = 0.1  # of the energies' standard deviation


@runtime_checkable
class _Draws(Protocol):
    """Draws with importance log-weights."""

    @property
    def x(self) -> Tensor: ...
    @property
    def log_weight(self) -> Tensor: ...
    @property
    def energy(self) -> Tensor: ...
    @property
    def log_prob(self) -> Tensor | None: ...


@runtime_checkable
class Examinable(Protocol):
    """What can be examined, such as an :class:`~rsm_sampler.energy_sampler.EnergySampler`."""

    coordinates: Coordinates
    affine: Affine
    search: dict[str, Any]
    draw_context: Callable[..., Tensor] | None

    @property
    def dim(self) -> int:
        """Length of a point."""
        ...

    @property
    def context_dim(self) -> int | None:
        """Length of a context, None without."""
        ...

    @property
    def device(self) -> torch.device:
        """Where draws are made."""
        ...

    def weighted_draws(
        self,
        n: int,
        *,
        energy: Callable[..., Tensor] | None = None,
        context: Any = None,  # noqa: ANN401
        generator: torch.Generator | None = None,
    ) -> _Draws:
        """Draws with exact importance weights."""
        ...


@checked(skip=("__init__",))
@dataclass(frozen=True)
class Diagnosis:
    """The verdict and what it rests on; print it.

    Attributes:
        trustworthy: Whether raw samples can be used as samples of the target.
        n: Number of draws examined.
        ess: Their effective sample size, in draws.
        log_z: The sampler's importance estimate of log Z.
        log_z_se: Its standard error.
        pareto_k: Shape of the weight tail.
        drift: Mean energy change under a short exact chain.
        drift_se: Its standard error.
        worst_cell: Largest difference of a region's mass to the witness.
        witness: The witness.
        evaluations: Energy evaluations of the diagnosis, the witness's included.
        findings: What speaks against the sampler.
        advice: What to try next.
        contexts: Number of contexts examined (this is the worst one), 0 without contexts.
    """

    trustworthy: bool
    n: int
    ess: float
    log_z: float
    log_z_se: float
    pareto_k: float
    drift: float
    drift_se: float
    worst_cell: float
    witness: Witness
    evaluations: int
    findings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    contexts: int = 0

    @property
    def verdict(self) -> str:
        """One word."""
        return "trustworthy" if self.trustworthy else "NOT trustworthy"

    def __str__(self) -> str:
        w = self.witness
        lines = [
            f"verdict       {self.verdict}"
            + (f" (worst of {self.contexts} contexts)" if self.contexts else ""),
            f"ESS           {self.ess:.0f} of n = {self.n} ({self.ess / self.n:.1%})",
            f"weight tail   Pareto k = {self.pareto_k:.2f} (reliable below 0.7)",
            f"log Z         {self.log_z:.4f} ± {self.log_z_se:.4f}",
            f"energy drift  {self.drift:+.3f} ± {self.drift_se:.3f} under a short exact chain",
            f"witness       {w.method}, {w.evaluations:,} evaluations, ESS {w.ess:.0f}"
            + ("" if w.conclusive else ", inconclusive"),
            f"  log Z       {w.log_z:.4f} ± {w.log_z_se:.4f}",
            f"  masses      differ by at most {self.worst_cell:.4f} over {len(w.masses)} regions",
            f"  resolution  finds errors of a region's mass above {w.resolution:.3f}",
            f"  searched    half of its points beyond {w.reach:.1f} widths of the samples' centre",
        ]
        lines += [f"against it    {finding}" for finding in self.findings]
        lines += [f"try           {advice}" for advice in self.advice]
        return "\n".join(lines)


@checked
def diagnose(
    sampler: Examinable,
    n: int = 8192,
    *,
    energy: MeteredEnergy,
    context: Float[Tensor, " context_dim"] | None = None,
    witness_evaluations: int | None = None,
    num_contexts: int = 8,
    seed: int = 0,
) -> Diagnosis:
    """Examine a sampler against an independent witness.

    Arguments:
        sampler: The sampler.
        n: Number of fresh draws.
        energy: Its energy. Evaluations are counted apart from any budget.
        context: The context to examine; for a conditional sampler without one, ``num_contexts``
            are drawn and the worst is reported.
        witness_evaluations: Energy evaluations of the witness. If None, 65,536, or a quarter of
            the training's budget where there was one (at least 2,000).
        num_contexts: See context.
        seed: Decides every random number.

    Raises:
        ValueError: If n is below 100, or a conditional sampler has neither context nor a way to
            draw one.
    """
    if n < 100:
        raise ValueError(f"n must be at least 100, got {n}")
    if sampler.context_dim is not None and context is None:
        if sampler.draw_context is None:
            raise ValueError("context must be given for a conditional sampler that was loaded")
        generator = torch.Generator(sampler.device).manual_seed(seed + 11)
        contexts = sampler.draw_context(num_contexts, generator)
        reports = [
            diagnose(
                sampler,
                max(100, n // 2),
                energy=energy,
                context=row,
                witness_evaluations=witness_evaluations,
                seed=seed + i,
            )
            for i, row in enumerate(contexts)
        ]
        worst = min(reports, key=lambda report: (report.trustworthy, report.ess / report.n))
        total = sum(report.evaluations for report in reports)
        return Diagnosis(**{**worst.__dict__, "contexts": num_contexts, "evaluations": total})
    return _Examination(sampler, n, energy, context, witness_evaluations, seed).report()


class _Examination:
    def __init__(
        self,
        sampler: Examinable,
        n: int,
        energy: MeteredEnergy,
        context: Tensor | None,
        witness_evaluations: int | None,
        seed: int,
    ) -> None:
        self.sampler, self.n, self.context = sampler, n, context
        budget = sampler.search.get("budget")
        self.energy = energy.apart()
        if budget is not None:
            self.n = min(n, max(100, budget // 10))
        if witness_evaluations is None:
            witness_evaluations = 65_536 if budget is None else max(2000, budget // 4)
        self.witness_evaluations = witness_evaluations
        self.generator = torch.Generator(sampler.device).manual_seed(seed + 104_729)

    def report(self) -> Diagnosis:
        draws = self.sampler.weighted_draws(
            self.n, energy=self.energy, context=self.context, generator=self.generator
        )
        log_weight = draws.log_weight.double().cpu()
        z = self._to_z(draws.x)
        finite = log_weight.isfinite()
        weight = torch.softmax(torch.where(finite, log_weight, -torch.inf), 0).nan_to_num(0.0)
        ess = float(1 / weight.square().sum()) if bool(weight.sum() > 0) else 0.0
        log_z = float(torch.logsumexp(log_weight[finite], 0)) - math.log(self.n)
        log_z_se = math.sqrt(max(self.n / max(ess, 1e-9) - 1, 0) / self.n)
        drift, drift_se, spread = self._drift(z, draws.energy.isfinite())
        witness, masses = find_witness(
            lambda y: self._energy_of_z(y, "witness"), z, self.witness_evaluations, self.generator
        )
        shape = pareto_shape(log_weight[finite])

        findings, advice = [], []
        share = ess / self.n
        enough = _LEAST_ESS if draws.log_prob is not None else 0.1
        if not share >= enough:
            findings.append(
                f"effective sample size {share:.1%} of n = {self.n}, below {enough:.0%}"
            )
            advice.append("train longer: trainer.fit(max_cycles=...), or a wider network")
        top = float(weight.sort().values[-max(1, self.n // 100) :].sum())
        if shape > 0.7 and top > 0.05:
            findings.append(
                f"heavy weight tail, Pareto k = {shape:.2f} above 0.7, and a "
                f"hundredth of the draws carries {top:.0%} of the weight"
            )
            advice.append("use sampler.weighted_draws(n).resample(m), or train longer")
        gap = abs(log_z - witness.log_z)
        error = math.hypot(log_z_se, witness.log_z_se)
        if not gap <= _LOG_Z_TOLERANCE + SIGNIFICANT * error:
            findings.append(f"log Z differs from the witness by {gap:.3f} (error {error:.3f})")
            advice.append(_MISSING if witness.conclusive else _PERHAPS)
        noise = (masses * (1 - masses) / self.n + witness.masses_se.square()).sqrt()
        difference = (masses - witness.masses).abs()
        if not bool((difference <= MASS_TOLERANCE + SIGNIFICANT * noise).all()):
            k = int((difference - SIGNIFICANT * noise).argmax())
            findings.append(
                f"a region holds {float(masses[k]):.3f} of the samples where the witness has "
                f"{float(witness.masses[k]):.3f} ± {float(witness.masses_se[k]):.3f}"
            )
            advice.append(_MISSING if witness.conclusive else _PERHAPS)
        if math.isnan(drift):
            findings.append("no draw has a finite energy")
        elif not abs(drift) <= _DRIFT_TOLERANCE * spread + SIGNIFICANT * drift_se:
            findings.append(
                f"energies drift by {drift:+.3f} ± {drift_se:.3f} under an exact chain"
            )
            advice.append(
                "train longer, or refine the samples by rsm_sampler.montecarlo.run.refine"
            )
        if not witness.conclusive:
            findings.append(
                f"the witness is inconclusive (ESS {witness.ess:.0f}, log Z error "
                f"{witness.log_z_se:.2f}): unvisited modes cannot be excluded"
            )
            advice.append(
                f"diagnose(witness_evaluations={4 * self.witness_evaluations}), or give the "
                "trainer centre and scale"
            )
        method = self.sampler.search.get("method")
        if method == "chains" and witness.method == "broad bank" and findings:
            advice.append("a larger budget: the search fell back to chains")
        return Diagnosis(
            trustworthy=not findings,
            n=self.n,
            ess=ess,
            log_z=log_z,
            log_z_se=log_z_se,
            pareto_k=shape,
            drift=drift,
            drift_se=drift_se,
            worst_cell=float(difference.amax()),
            witness=witness,
            evaluations=self.energy.evaluations,
            findings=findings,
            advice=list(dict.fromkeys(advice)),
        )

    # The exact chain and the witness work in coordinates z, where the target has width one.

    def _to_z(self, x: Tensor) -> Tensor:
        u = self.sampler.coordinates.inverse(x.double())
        return self.sampler.affine.inverse(u).nan_to_num(0.0)

    def _energy_of_z(self, z: Tensor, purpose: str) -> Tensor:
        x, log_det = self.sampler.coordinates.forward(self.sampler.affine.forward(z))
        context = None
        if self.context is not None:
            row = torch.as_tensor(self.context, dtype=torch.float64, device=z.device)
            context = row.expand(len(z), -1)
        x = self.sampler.coordinates.inside(x, self.energy.dtype)
        value = self.energy(x, context, purpose=purpose)
        return value - log_det - self.sampler.affine.log_det

    def _drift(self, z: Tensor, finite: Tensor) -> tuple[float, float, float]:
        """Energy drift of a short random walk, its standard error, the energies' spread.

        NaN if no draw has a finite energy, where no chain can start.
        """
        z = z[: min(len(z), 1024 if self.n >= 4096 else self.n // 4)]
        if not bool(finite[: len(z)].any()):
            return math.nan, math.nan, math.nan
        steps = 20 if self.n >= 4096 else 10
        result = refine(
            lambda y: self._energy_of_z(y, "diagnosis"),
            z,
            steps=steps,
            tuning_steps=steps,
            generator=self.generator,
        )
        spread = float(result.energy[result.energy.isfinite()].std(correction=0))
        return float(result.energy_drift), float(result.energy_drift_se), spread


_MISSING = (
    "modes are missing or weighted wrongly: a larger budget or search_evaluations, another seed, "
    "or centre and scale that cover all of the target"
)
_PERHAPS = (
    "modes may be missing or weighted wrongly, or the witness may not have found its way: compare "
    "again with more witness_evaluations"
)


@checked
def pareto_shape(log_weight: Float[Tensor, " n"]) -> float:
    r"""Shape k of the generalised Pareto law of the largest importance weights.

    Below 0.5 the weights have a variance; above 0.7 their averages are unreliable at any
    affordable n.

    Arguments:
        log_weight: Log-weights, (n), up to a constant.

    Returns:
        The estimate of Zhang and Stephens with the usual weak prior towards 0.5; ``inf`` for fewer
        than 25 weights.

    References:
        | A new and efficient estimation method for the generalized Pareto distribution
        | (Zhang and Stephens, 2009)
        | https://doi.org/10.1198/tech.2009.08017

    Example:
        >>> pareto_shape(torch.zeros(1000)) < 0.1
        True
    """
    if bool(log_weight.isnan().any()):
        raise ValueError("log_weight must not be NaN, got NaN among its entries")
    n = len(log_weight)
    tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    if tail < 5:
        return math.inf
    ordered = (log_weight.double() - log_weight.amax()).exp().sort().values
    excess = (ordered[-tail:] - ordered[-tail - 1]).clamp(min=0)
    if float(excess[-1]) <= 1e-12 or float(excess[(tail + 2) // 4 - 1]) <= 0:
        return 0.0
    grid = 30 + int(math.sqrt(tail))
    j = torch.arange(1, grid + 1, dtype=torch.float64)
    quartile = excess[(tail + 2) // 4 - 1]
    theta = 1 / excess[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(-1)
    profile = tail * ((-theta / k).log() - k - 1)
    weight = torch.softmax(profile.nan_to_num(-torch.inf), 0)
    best = float((weight * theta).sum())
    shape = float(torch.log1p(-best * excess).mean())
    return (tail * shape + 10 * 0.5) / (tail + 10)
