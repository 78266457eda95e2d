r"""How far samples may be trusted: a verdict of three words, and what it rests on.

What a sampler says of itself cannot show what it never saw: its effective sample size, its log Z
and short chains from its draws all look perfect when a mode is missing. So they are compared with
a second estimate, the witness (:mod:`rsm_sampler.verdict.witness`), which looks by other means.

=================== ===============================================================================
effective sample    exact importance weights of n fresh draws; their share of equal weight
weight tail         shape of the generalised Pareto law of the largest weights, if the top
                    hundredth carries over 5 % of the total; above 0.7 averages are unreliable
log Z               the sampler's against the witness's
masses              the share of raw draws in each of up to 70 regions against the witness's: 24
                    nearest-centre cells over the points of both, the clusters that neighbours
                    among them form, and the surroundings of up to 24 basins of the witness
basins              a basin that holds over 1 % of the mass must hold draws
drift               mean energy change of draws under a short exact chain
noise, rounding     whether the energy itself is exact enough for any of this
witness             its own effective size, its errors and the tail of its weights
referee             log Z and masses by a nested sampler of another library, where asked for
=================== ===============================================================================

**The words.** *trustworthy*: nothing speaks against the samples, and the witness is conclusive.
*not trustworthy*: something conclusive speaks against them. *cannot tell*: neither; the witness is
inconclusive, or sees less than the sampler does, the draws are too few, or the energy is not exact
enough. "Trustworthy" does not say that nothing is missing: a narrow mode without a basin may
escape the sampler and the witness alike. What could have been missed is in the statement of
coverage, which belongs to every report.

A difference counts if it exceeds a stated tolerance by more than 4 standard errors. So a sampler
that is exact is blamed with probability below :math:`5 \cdot 10^{-3}` over all questions together
(70 regions and a few more, two-sided normal tails of :math:`6 \cdot 10^{-5}` each; regions
overlap, and the tolerance comes on top, so it is less in practice), as far as the witness's stated
errors are right. Those of an inconclusive one are not, so it neither confirms nor blames, except
for basins without draws, whose parts of Z are estimated by themselves.

References:
    | Pareto smoothed importance sampling (Vehtari et al., 2024), section 2
    | https://arxiv.org/abs/1507.02646
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.run import refine
from rsm_sampler.montecarlo.weights import pareto_shape
from rsm_sampler.target.coordinates import Affine, Coordinates
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.verdict.coverage import Coverage
from rsm_sampler.verdict.landscape import Landscape
from rsm_sampler.verdict.referee import Referee, RefereeName, find_referee, library_of
from rsm_sampler.verdict.witness import MASS_TOLERANCE, SIGNIFICANT, Witness, find_witness

__all__ = ["Diagnosis", "Examinable", "Finding", "Verdict", "diagnose", "pareto_shape"]

Verdict = Literal["trustworthy", "not trustworthy", "cannot tell"]

_LEAST_ESS = 0.8  # share of equally weighted draws: averages then err by 12 % more than exact ones
_LEAST_PATH_ESS = 0.1  # the same by path weights, which vary more than the draws err
_HEAVY = 0.7  # Pareto shape above which averages of weights are unreliable at any affordable n
_HEAVY_SHARE = 0.05  # of the weight on a hundredth of the draws: less cannot matter
_LOG_Z_TOLERANCE = 0.03  # 3 % of Z: the steps of an ODE sampler alone err by about 0.005
_DRIFT_TOLERANCE = 0.1  # of the energies' standard deviation: less moves no mean by a tenth of one
NOISE = 0.1  # nats between repeated evaluations: costs 1 % of the effective size
_ROUNDING = 0.3  # nats between neighbouring values: an error of 0.09 nats each
_BLURRED = 0.02  # standard deviations of a coordinate between neighbouring values
_BASIN = 0.01  # mass above which a basin without draws counts
_EXAMINED = 8192  # draws
_FEW_DRAWS = 554  # draws: with fewer an error of 0.1 of a mode's mass may not show
_BASIN_ESS = 30  # effective points of the witness in a basin, for its mass to be known
_REFEREE_LOG_Z = 0.1  # nested samplers' discretisation and optimistic errors of log Z
_ROW_ESS = 10  # effective points of the bank in the median context
_WITNESS = 65_536  # evaluations of the witness's first attempt
_MOST = 9  # times that, if it is inconclusive
_REFEREE = 1_000_000  # evaluations of a referee, at most
_REPEATED = 256  # draws whose energies are asked for again

_logger = logging.getLogger(__name__)


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
    """What can be examined, such as an :class:`~rsm_sampler.energy_sampler.EnergySampler`.

    Its ``search`` may say what the verdict makes use of, as plain values: ``budget``; ``centre``
    and ``scale``, where the user said to look; ``stopped``, why training ended (``"rule"``,
    ``"cycles"``, ``"budget"``); ``context_ess``, effective points of the bank for each context.
    """

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


@dataclass(frozen=True)
class Finding:
    """One test of the verdict that did not pass.

    Attributes:
        test: Its name.
        value: What was found.
        tolerance: What is tolerated, in the same units.
        error: The standard error of the value; 0 where it has none.
        text: What was found, in words.
        advice: What to try; may be empty.
        conclusive: Whether it speaks against the samples. If not, it only keeps the verdict from
            being "trustworthy".
    """

    test: str
    value: float
    tolerance: float
    error: float
    text: str
    advice: str = ""
    conclusive: bool = True

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Diagnosis:
    r"""The verdict and what it rests on; print it.

    Attributes:
        verdict: ``"trustworthy"``, ``"not trustworthy"`` or ``"cannot tell"``; see the module.
        n: Number of draws examined.
        ess: Their effective sample size, in draws.
        log_z: The sampler's importance estimate of log Z.
        log_z_se: Its standard error, too small where the weights have no variance.
        pareto_k: Shape of the weight tail.
        drift: Mean energy change under a short exact chain.
        drift_se: Its standard error.
        noise: Root-mean-square difference of repeated evaluations over :math:`\sqrt 2`, in nats.
        worst_cell: Largest difference of a region's mass to the witness.
        witness: The witness.
        evaluations: Energy evaluations of the diagnosis, those of witness and referee included.
        planned: The most that it could have taken, as stated before.
        seconds: Wall time.
        failed: The tests that did not pass.
        referee: The referee, if one was asked for.
        contexts: Number of contexts examined (this is the worst one), 0 without contexts.
    """

    verdict: Verdict
    n: int
    ess: float
    log_z: float
    log_z_se: float
    pareto_k: float
    drift: float
    drift_se: float
    noise: float
    worst_cell: float
    witness: Witness
    evaluations: int
    planned: int
    seconds: float
    failed: list[Finding] = field(default_factory=list)
    referee: Referee | None = None
    contexts: int = 0

    @property
    def trustworthy(self) -> bool:
        """Whether the word is "trustworthy"."""
        return self.verdict == "trustworthy"

    @property
    def coverage(self) -> Coverage:
        """What was searched, and what could have been missed."""
        return self.witness.coverage

    @property
    def findings(self) -> list[str]:
        """What speaks against the samples, or against a verdict."""
        return [finding.text for finding in self.failed]

    @property
    def advice(self) -> list[str]:
        """What to try next, each thing once."""
        return list(dict.fromkeys(f.advice for f in self.failed if f.advice))

    def __str__(self) -> str:
        w = self.witness
        lines = [
            f"verdict       {self.verdict}"
            + (f" (worst of {self.contexts} contexts)" if self.contexts else ""),
            f"ESS           {self.ess:.0f} of n = {self.n} ({self.ess / self.n:.1%})",
            f"weight tail   Pareto k = {self.pareto_k:.2f}"
            + (
                ", of weights that are nearly equal"
                if self.pareto_k > _HEAVY
                and not any(finding.test == "weight tail" for finding in self.failed)
                else f" (reliable below {_HEAVY})"
            ),
            f"log Z         {self.log_z:.4f} ± {self.log_z_se:.4f}",
            f"energy drift  {self.drift:+.3f} ± {self.drift_se:.3f} under a short exact chain",
            f"witness       {w.method}, {w.evaluations:,} evaluations, ESS {w.ess:.0f}"
            + ("" if w.conclusive else ", inconclusive"),
            f"  log Z       {w.log_z:.4f} ± {w.log_z_se:.4f}",
            f"  masses      differ by at most {self.worst_cell:.4f} over {len(w.masses)} regions",
            f"  resolution  finds errors of a region's mass above {w.resolution:.3f}",
        ]
        if self.referee is not None:
            r = self.referee
            lines += [
                f"referee       {r.name}, {r.evaluations:,} evaluations, ESS {r.ess:.0f}"
                + ("" if r.conclusive else ", inconclusive"),
                f"  log Z       {r.log_z:.4f} ± {r.log_z_se:.4f}, over {r.region}",
            ]
        lines += [
            f"coverage      {self.coverage}",
            f"cost          {self.evaluations:,} evaluations (planned at most {self.planned:,})",
        ]
        for finding in self.failed:
            head = "against it    " if finding.conclusive else "unclear       "
            lines.append(head + finding.text)
        lines += [f"try           {advice}" for advice in self.advice]
        return "\n".join(lines)


def diagnose(
    sampler: Examinable,
    n: int | None = None,
    *,
    energy: MeteredEnergy,
    context: Float[Tensor, " context_dim"] | None = None,
    witness_evaluations: int | None = None,
    effort: float = 1.0,
    referee: RefereeName | None = None,
    num_contexts: int = 8,
    seed: int = 0,
) -> Diagnosis:
    """Examine a sampler against a witness, and if asked for against a referee.

    The cost is logged before the work begins, at level INFO, and stands in the report. By default
    it is about 65,000 evaluations for the witness and five times n for the rest; an inconclusive
    witness takes up to nine times its share.

    Arguments:
        sampler: The sampler.
        n: Number of fresh draws. If None, 8,192, or a tenth of the training's budget where that is
            less (at least 100).
        energy: Its energy. Evaluations are counted apart from any budget.
        context: The context to examine; for a conditional sampler without one, ``num_contexts``
            are drawn and the worst is reported.
        witness_evaluations: Energy evaluations of the witness. If None, 65,536, or a quarter of
            the training's budget where there was one (at least 2,000).
        effort: Factor of the witness's evaluations: 2 doubles them.
        referee: A nested sampler to run as well, on up to a million evaluations: ``"nautilus"``,
            ``"dynesty"`` or ``"ultranest"`` (extra ``referee``).
        num_contexts: See context.
        seed: Decides every random number.

    Raises:
        ImportError: If the referee's library is missing.
        ValueError: If n is below 100, effort is not positive, the referee is unknown, or a
            conditional sampler has neither context nor a way to draw one.
    """
    budget = sampler.search.get("budget")
    if n is None:
        n = _EXAMINED if budget is None else min(_EXAMINED, max(100, budget // 10))
    if n < 100:
        raise ValueError(f"n must be at least 100, got {n}")
    if referee is not None:
        library_of(referee)
    if not (0 < effort < math.inf):
        raise ValueError(f"effort must be positive and finite, got {effort}")
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
                effort=effort,
                referee=referee,
                seed=seed + i,
            )
            for i, row in enumerate(contexts)
        ]
        worst = min(reports, key=lambda report: (_RANK[report.verdict], report.ess / report.n))
        return replace(
            worst,
            contexts=num_contexts,
            evaluations=sum(report.evaluations for report in reports),
            planned=sum(report.planned for report in reports),
            seconds=sum(report.seconds for report in reports),
        )
    return _Examination(
        sampler, n, energy, context, witness_evaluations, effort, referee, seed
    ).report()


_RANK = {"not trustworthy": 0, "cannot tell": 1, "trustworthy": 2}


class _Examination:
    def __init__(
        self,
        sampler: Examinable,
        n: int,
        energy: MeteredEnergy,
        context: Tensor | None,
        witness_evaluations: int | None,
        effort: float,
        referee: RefereeName | None,
        seed: int,
    ) -> None:
        self.sampler, self.n, self.context, self.seed = sampler, n, context, seed
        self.asked, self.begun = referee, time.monotonic()
        budget = sampler.search.get("budget")
        self.energy = MeteredEnergy(energy.energy, sampler.dim, context_dim=sampler.context_dim)
        if witness_evaluations is None:
            witness_evaluations = _WITNESS if budget is None else max(2000, budget // 4)
        self.witness_evaluations = max(100, int(effort * witness_evaluations))
        self.generator = torch.Generator(sampler.device).manual_seed(seed + 104_729)
        # The witness has random numbers of its own.
        self.its_generator = torch.Generator(sampler.device).manual_seed(seed + 15_485_863)
        self.failed: list[Finding] = []
        self.planned = (
            _MOST * self.witness_evaluations
            + 2 * self.n
            + (0 if referee is None else _REFEREE)
            + 45 * self._chains
        )
        _logger.info(
            "verdict: %d evaluations for the witness, up to %d in all",
            self.witness_evaluations,
            self.planned,
        )

    @property
    def _chains(self) -> int:
        return 1024 if self.n >= 4096 else self.n // 4

    def report(self) -> Diagnosis:
        draws = self.sampler.weighted_draws(
            self.n, energy=self.energy, context=self.context, generator=self.generator
        )
        log_weight = draws.log_weight.double().cpu()
        u = self.sampler.coordinates.inverse(draws.x.double()).nan_to_num(0.0, 0.0, 0.0)
        finite = log_weight.isfinite()
        weight = torch.softmax(torch.where(finite, log_weight, -torch.inf), 0).nan_to_num(0.0)
        ess = float(1 / weight.square().sum()) if bool(weight.sum() > 0) else 0.0
        log_z = float(torch.logsumexp(log_weight[finite], 0)) - math.log(self.n)
        log_z_se = math.sqrt(max(self.n / max(ess, 1e-9) - 1, 0) / self.n)
        shape = pareto_shape(log_weight[finite])
        drift, drift_se, spread = self._drift(u, draws.energy.isfinite())
        noise = self._noise(draws)
        exact = self._exact(draws, noise)
        witness, masses = find_witness(
            self._landscape("witness"),
            u,
            self.witness_evaluations,
            self.its_generator,
            centre=self._centre(),
            scale=self.sampler.search.get("scale"),
        )

        self._weights(ess, shape, weight, exact=exact, paths=draws.log_prob is None)
        self._of_energies(drift, drift_se, spread, exact=exact)
        blames = witness.conclusive and self._z(log_z, log_z_se, witness)
        difference = self._masses(masses, witness, blames)
        self._basins(witness, log_z)
        referee = self._referee(witness, log_z, log_z_se, u)
        self._confirmed(witness, referee)
        return Diagnosis(
            verdict=self._word(),
            n=self.n,
            ess=ess,
            log_z=log_z,
            log_z_se=log_z_se,
            pareto_k=shape,
            drift=drift,
            drift_se=drift_se,
            noise=noise,
            worst_cell=difference,
            witness=witness,
            evaluations=self.energy.evaluations,
            planned=max(self.planned, self.energy.evaluations),
            seconds=time.monotonic() - self.begun,
            failed=self.failed,
            referee=referee,
        )

    def _word(self) -> Verdict:
        if any(finding.conclusive for finding in self.failed):
            return "not trustworthy"
        return "cannot tell" if self.failed else "trustworthy"

    def _fail(
        self,
        test: str,
        value: float,
        tolerance: float,
        text: str,
        advice: str = "",
        *,
        error: float = 0.0,
        conclusive: bool = True,
    ) -> None:
        self.failed.append(Finding(test, value, tolerance, error, text, advice, conclusive))

    # ------------------------------------------------------------------ the sampler's own weights

    def _weights(
        self, ess: float, shape: float, weight: Tensor, *, exact: bool, paths: bool
    ) -> None:
        share, enough = ess / self.n, _LEAST_PATH_ESS if paths else _LEAST_ESS
        if not share >= enough:
            self._fail(
                "effective sample size",
                share,
                enough,
                f"effective sample size {share:.1%} of n = {self.n}, below {enough:.0%}"
                + (", by path weights" if paths else ""),
                self._more_training() if exact else "",
                # Low path weights do not show that the draws are bad, unless next to none is left.
                conclusive=exact and (not paths or ess < 2),
            )
        top = float(weight.sort().values[-max(1, self.n // 100) :].sum())
        if shape > _HEAVY and top > _HEAVY_SHARE:
            self._fail(
                "weight tail",
                shape,
                _HEAVY,
                f"heavy weight tail, Pareto k = {shape:.2f} above {_HEAVY}, and a hundredth of "
                f"the draws carries {top:.0%} of the weight",
                "heavy tails: the weights have no finite variance "
                f"(Pareto k = {shape:.2f}), the target's tails outrun the sampler's; transform "
                "heavy-tailed coordinates, or bound them",
                conclusive=exact,
            )
        if self.n < _FEW_DRAWS:
            self._fail(
                "number of draws",
                self.n,
                _FEW_DRAWS,
                f"only {self.n} draws were examined: an error of 0.1 of a mass may not show",
                f"diagnose(n={_EXAMINED})",
                conclusive=False,
            )
        rows = self.sampler.search.get("context_ess")
        if rows is not None and len(rows):
            median = float(torch.as_tensor(rows, dtype=torch.float64).median())
            if median < _ROW_ESS:
                self._fail(
                    "bank",
                    median,
                    _ROW_ESS,
                    f"the bank was worth {median:.1f} effective points in the median context",
                    "a larger budget or search_evaluations, or fewer contexts",
                    conclusive=False,
                )

    def _more_training(self) -> str:
        """What leads somewhere depends on why training ended."""
        stopped = self.sampler.search.get("stopped")
        if stopped == "rule":
            return (
                "training stopped by its own rule: a wider network (TrainerConfig(width=...)) or "
                "another seed"
            )
        if stopped == "budget":
            return "a larger budget: trainer.fit(budget=...)"
        if stopped == "cycles":
            return "train longer: trainer.fit(max_cycles=...)"
        return "train longer if training did not stop by itself, or a wider network"

    def _of_energies(self, drift: float, drift_se: float, spread: float, *, exact: bool) -> None:
        if math.isnan(drift):
            self._fail(
                "drift",
                drift,
                _DRIFT_TOLERANCE,
                "no draw has a finite energy",
                "check the energy at trainer.sample(10), bounds, centre and scale",
            )
        elif not abs(drift) <= _DRIFT_TOLERANCE * spread + SIGNIFICANT * drift_se:
            self._fail(
                "drift",
                drift,
                _DRIFT_TOLERANCE * spread,
                f"energies drift by {drift:+.3f} ± {drift_se:.3f} under an exact chain",
                "refine the samples by sampler.refine(x), and report them as refined",
                error=drift_se,
                conclusive=exact,
            )

    def _drift(self, u: Tensor, finite: Tensor) -> tuple[float, float, float]:
        """Energy drift of a short random walk, its standard error, the energies' spread.

        NaN if no draw has a finite energy, where no chain can start. Walks are in coordinates z,
        in which the sampler's law is about one wide.
        """
        affine = self.sampler.affine
        z = affine.inverse(u)[: min(self.n, self._chains)]
        if not bool(finite[: len(z)].any()):
            return math.nan, math.nan, math.nan
        landscape = self._landscape("diagnosis")
        steps = 20 if self.n >= 4096 else 10
        result = refine(
            lambda points: landscape.value(affine.forward(points)),
            z,
            steps=steps,
            tuning_steps=steps,
            generator=self.generator,
        )
        spread = float(result.energy[result.energy.isfinite()].std(correction=0))
        return float(result.energy_drift), float(result.energy_drift_se), spread

    # ------------------------------------------------------------------ the energy itself

    def _noise(self, draws: _Draws) -> float:
        """Standard deviation of an evaluation, from the same points asked twice."""
        index = draws.energy.isfinite().nonzero()[:_REPEATED, 0]
        if len(index) == 0:
            return 0.0
        x = draws.x[index]
        first, second = (
            self.energy(x, self._contexts(len(x)), purpose="diagnosis").double() for _ in range(2)
        )
        both = first.isfinite() & second.isfinite()
        if not bool(both.any()):
            return math.inf
        return float((first - second)[both].square().mean().sqrt()) / math.sqrt(2)

    def _exact(self, draws: _Draws, noise: float) -> bool:
        """Whether the energy is exact enough for its weights to say anything of the sampler."""
        energy = draws.energy[draws.energy.isfinite()]
        if len(energy) == 0:
            return True
        values = energy.double()
        single = bool((values == values.float().double()).all())
        step = float(values.abs().median()) * 2.0 ** (-23 if single else -52)
        before = len(self.failed)
        if step > _ROUNDING:
            self._fail(
                "rounding",
                step,
                _ROUNDING,
                f"rounding: energies of about {float(values.median()):.3g} come in steps of "
                f"{step:.2g}, and those of the draws spread by {float(values.std()):.2g}",
                "rounding: subtract a constant from the energy, or compute it in double precision",
                conclusive=False,
            )
        elif noise > NOISE:
            self._fail(
                "noise",
                noise,
                NOISE,
                "noise: the energy gives other values when the same points are asked again, with "
                f"a standard deviation of {noise:.2g}",
                "noise: fix the random numbers within the energy, or average it over repeats",
                conclusive=False,
            )
        if draws.x.dtype == torch.float32:
            x = draws.x.double()
            std = x.std(0).clamp(min=1e-300)
            blur, i = (x.abs().median(0).values * 2.0**-23 / std).max(0)
            if float(blur) > _BLURRED:
                self._fail(
                    "rounding",
                    float(blur),
                    _BLURRED,
                    f"rounding: coordinate {int(i)} comes in steps of {float(blur):.2g} of its "
                    "standard deviation",
                    "rounding: subtract a constant from that coordinate",
                    conclusive=False,
                )
        return len(self.failed) == before

    # ------------------------------------------------------------------ against the witness

    def _z(self, log_z: float, log_z_se: float, witness: Witness) -> bool:
        """Compare log Z; returns whether the witness sees no less than the sampler does."""
        gap = witness.log_z - log_z
        error = math.hypot(log_z_se, witness.log_z_se)
        if abs(gap) <= _LOG_Z_TOLERANCE + SIGNIFICANT * error:
            return True
        less = gap < 0
        self._fail(
            "log Z",
            abs(gap),
            _LOG_Z_TOLERANCE,
            f"log Z differs from the witness by {abs(gap):.3f} (error {error:.3f}): the "
            + ("witness" if less else "sampler")
            + f" misses {-math.expm1(-abs(gap)):.0%} of the mass",
            (
                "the witness sees less than the sampler: diagnose(effort=2), a referee, or centre "
                "and scale that cover all of the target"
            )
            if less
            else _MISSING,
            error=error,
            conclusive=not less,
        )
        return not less

    def _masses(self, masses: Tensor, witness: Witness, blames: bool) -> float:
        noise = (masses * (1 - masses) / self.n + witness.masses_se.square()).sqrt()
        difference = (masses - witness.masses).abs()
        beyond = difference - SIGNIFICANT * noise
        k = int(beyond.argmax())
        if witness.conclusive and not float(beyond[k]) <= MASS_TOLERANCE:
            self._fail(
                "masses",
                float(difference[k]),
                MASS_TOLERANCE,
                f"a region holds {float(masses[k]):.3f} of the samples where the witness has "
                f"{float(witness.masses[k]):.3f} ± {float(witness.masses_se[k]):.3f}",
                _MISSING,
                error=float(noise[k]),
                conclusive=blames,
            )
        return float(difference.amax())

    def _basins(self, witness: Witness, log_z: float) -> None:
        """A basin without draws counts whatever else the witness knows.

        Its mass is taken of the larger of both estimates of Z: the witness may have missed what
        the sampler has.
        """
        for basin in witness.basins:
            total = witness.log_z
            if math.isfinite(log_z):
                total = max(total, _log_add(log_z, basin.log_z))
            mass = math.exp(basin.log_z - total)
            error = mass * basin.mass_se / basin.mass
            least = mass - SIGNIFICANT * error
            if basin.ess < _BASIN_ESS or least <= _BASIN or basin.share > 0.1 * least:
                continue
            place = ", ".join(f"{v:.3g}" for v in basin.loc[:4])
            self._fail(
                "basins",
                basin.share,
                mass,
                f"a basin at x = ({place}{', ...' if len(basin.loc) > 4 else ''}), energy "
                f"{basin.energy:.4g}, holds {mass:.3f} ± {error:.3f} by the witness, "
                f"{basin.share:.3f} of the samples",
                _MISSING,
                error=error,
            )

    def _confirmed(self, witness: Witness, referee: Referee | None) -> None:
        if witness.conclusive or (referee is not None and referee.conclusive):
            return
        heavy = witness.pareto_k > _HEAVY
        self._fail(
            "witness",
            witness.ess,
            0.0,
            f"the witness is inconclusive (ESS {witness.ess:.0f}, log Z error "
            f"{witness.log_z_se:.2f}, largest error of a mass "
            f"{float(witness.masses_se.amax()):.3f}"
            + (f", heavy tails with Pareto k = {witness.pareto_k:.2f}" if heavy else "")
            + "): unvisited modes cannot be excluded",
            f"diagnose(witness_evaluations={4 * self.witness_evaluations}), a referee, or give "
            "the trainer centre and scale",
            conclusive=False,
        )

    # ------------------------------------------------------------------ against the referee

    def _referee(
        self, witness: Witness, log_z: float, log_z_se: float, u: Tensor
    ) -> Referee | None:
        if self.asked is None:
            return None
        points = torch.cat([u, witness.points.to(u)])
        referee = find_referee(
            self.asked,
            self._landscape("referee"),
            points,
            evaluations=_REFEREE,
            seed=self.seed + 1,
        )
        gap = referee.log_z - log_z
        error = math.hypot(log_z_se, referee.log_z_se)
        if not abs(gap) <= _REFEREE_LOG_Z + SIGNIFICANT * error:
            self._fail(
                "referee",
                abs(gap),
                _REFEREE_LOG_Z,
                f"log Z differs from {referee.name} by {abs(gap):.3f} (error {error:.3f}): "
                + ("the sampler" if gap > 0 else referee.name)
                + f" misses {-math.expm1(-abs(gap)):.0%} of the mass",
                _MISSING if gap > 0 else "another referee, or diagnose(effort=4)",
                error=error,
                # Neither sees what it has missed: the one that sees less blames nobody.
                conclusive=gap > 0 and referee.conclusive,
            )
        ours = witness.regions.inside(u).mean(0)
        theirs = referee.weight @ witness.regions.inside(referee.points)
        noise = (ours * (1 - ours) / self.n + theirs * (1 - theirs) / referee.ess).sqrt()
        difference = (ours - theirs).abs()
        beyond = difference - SIGNIFICANT * noise
        k = int(beyond.argmax())
        if not float(beyond[k]) <= 2 * MASS_TOLERANCE:
            self._fail(
                "referee",
                float(difference[k]),
                2 * MASS_TOLERANCE,
                f"a region holds {float(ours[k]):.3f} of the samples where {referee.name} has "
                f"{float(theirs[k]):.3f}",
                _MISSING,
                error=float(noise[k]),
                # A witness that agrees with the sampler stands against the referee.
                conclusive=referee.conclusive and gap > -_REFEREE_LOG_Z and not witness.conclusive,
            )
        return referee

    # ------------------------------------------------------------------ coordinates

    def _landscape(self, purpose: str) -> Landscape:
        return Landscape(
            self.energy,
            self.sampler.coordinates,
            context=self.context,
            purpose=purpose,
            device=self.sampler.device,
        )

    def _centre(self) -> Tensor | None:
        """Where the user said to look, in unbounded coordinates."""
        centre = self.sampler.search.get("centre")
        if centre is None:
            return None
        x = torch.as_tensor(centre, dtype=torch.float64, device=self.sampler.device)
        return self.sampler.coordinates.inverse(x.expand(self.sampler.dim)).nan_to_num(0.0)

    def _contexts(self, n: int) -> Tensor | None:
        if self.context is None:
            return None
        row = torch.as_tensor(self.context, dtype=torch.float32, device=self.sampler.device)
        return row.expand(n, -1)


_MISSING = (
    "modes are missing or weighted wrongly: a larger budget or search_evaluations, another seed, "
    "or centre and scale that cover all of the target"
)


def _log_add(a: float, b: float) -> float:
    high = max(a, b)
    return high + math.log(math.exp(a - high) + math.exp(b - high))
