r"""From a problem to weighted points of its law, and a record of what was seen on the way.

1. **Survey.** Points uniform over the box, or at scales from :math:`10^{-4}` to :math:`10^5` about
   the centre.
2. **Bracket.** Rounds of a Student-t law with the moments of the points so far, weighted towards
   :math:`q^{1-\beta} e^{-\beta E}` with the largest :math:`\beta \le 1` that their effective size
   bears. It tells location and scale, and refuses energies that cannot be normalised.
3. **Basins.** Descents from independent starts, then from the lowest points of lines through the
   basins found. All enter the ledger; none is lost.
4. **Proposals.** Sources (:mod:`rsm_sampler.bank.sources`) propose laws, which fresh draws judge.
5. **Bank.** Draws of the best proposal until they are worth enough; with all points before them,
   they are weighted by the joint density of all laws. The bank is judged by its own weights.
6. **Chains.** Where no bank passes, a population walks to the target
   (:mod:`rsm_sampler.montecarlo.population`): equally weighted, dependent points.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.ledger import Ledger
from rsm_sampler.bank.missing import Lack, left_out
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.pool import Pool
from rsm_sampler.bank.sources import (
    BankSource,
    BasinMixture,
    Kernels,
    Proposal,
    Scene,
    components_of,
)
from rsm_sampler.bank.starts import LINE, OF_SURVEY, centre_minima, independent_starts, line_minima
from rsm_sampler.montecarlo.densities import Density, ScaleLadder, StudentT, weighted_moments
from rsm_sampler.montecarlo.descents import descend
from rsm_sampler.montecarlo.population import LEAST_EVALUATIONS, sequential_monte_carlo
from rsm_sampler.montecarlo.weights import LogWeights
from rsm_sampler.target.coordinates import Bounds, Coordinates, MeanFree
from rsm_sampler.target.energy import BudgetExceededError, EnergyError
from rsm_sampler.target.problem import Problem

__all__ = ["Found", "explore_problem"]

_LOWEST, _HIGHEST, _SCALES = 1e-4, 1e5, 64
_WIDER = math.sqrt(1.2)  # than the moments say, is the next broad law
_HINT = 100.0  # a stated width may be wrong by this factor
_SLOWER, _SLOW = 30.0, 2e-3  # times the usual time a point takes, and seconds: the survey stops
_AGAIN, _ROUNDING = 16, 0.01  # points that are asked again; a difference that may be rounding
_FINITE = 16  # points of finite energy: fewer, and the survey goes on
_ENOUGH = 10.0  # effective points for each dimension, whose covariance is taken as it is
_STRETCHED = 2048  # draws of a law that is stretched to see whether the energy holds them
_CENTRES = 2  # basins through which lines are scanned
_STARTS_OF_LINES = 64
_MORE = 4  # times as many starts, where some basins catch far fewer than others
_MANY, _CHEAP = 32, 0.8  # times as many, where so many of them need no descent
_PILOT = 8  # descents that tell what one costs: of more, those that the budget cuts short are lost
_LOWEST_ENDS = 4  # of descents of which none came to rest, whose curvatures are looked at
_FRESH = 8  # starts that have to come to rest, where they examine a bank
_STEPS = 200  # downhill
_LOWER = 1.0  # nats: a basin so far below all before is another place to look at
_FAR = 10.0  # times as far from its middle as the rim of the target: there modes may lie, too
_SPARE = 0.5  # share of effective points of a bank that, with a heavy tail, still beats chains
_PIECE, _FIRST = 32_768, 4096  # draws of a bank at a time, and at first: it may be a poor one
_LEAST = 256  # at least


@dataclass
class Found:
    """What exploring came to.

    Attributes:
        bank: The weighted points.
        ledger: The basins seen.
        proposal: The law of the bank, None for chains.
        points: Number of independent points with a density at which the energy was evaluated.
        density: Log-density of these points ten times as far out as the rim of the target.
        spread: Width of the target there: the geometric mean over directions. Both in the user's
            coordinates over a box, else in unbounded ones.
        region: What was searched, in words.
        reasons: Why proposals were turned down.
        unexamined: Whether there may be more basins, and too few fresh starts came to rest to
            tell.
        refused: Whether an earlier bank was turned down for its weights.
        noise: Standard deviation of an evaluation, in nats.
        interrupted: Whether an interrupt ended it.
    """

    bank: Bank
    ledger: Ledger
    proposal: Proposal | None
    points: int
    density: float
    spread: float
    region: str
    reasons: list[str]
    unexamined: bool = False
    refused: bool = False
    noise: float = 0.0
    interrupted: bool = False

    def record(self, coordinates: Coordinates) -> dict[str, Any]:
        """The same in plain values, places in the user's coordinates.

        Arguments:
            coordinates: From unbounded coordinates to the user's.
        """
        ledger = self.ledger
        return {
            "source": self.bank.method if self.proposal is None else self.proposal.source,
            "region": self.region,
            "points": self.points,
            "density": self.density,
            "spread": self.spread,
            "starts": ledger.starts,
            "lost": ledger.lost,
            "crowded": ledger.crowded,
            "unexamined": self.unexamined,
            "refused": self.refused,
            "noise": self.noise,
            "interrupted": self.interrupted,
            "basins": [
                {
                    "x": coordinates.forward(basin.x[None])[0][0].tolist(),
                    "energy": basin.energy,
                    "mass": basin.mass,
                    "mass_se": basin.mass_se,
                    "starts": basin.starts,
                    "others": basin.others,
                }
                for basin in ledger.valleys
            ],
            "reasons": list(self.reasons),
        }


def explore_problem(
    problem: Problem,
    plan: Plan,
    generator: torch.Generator,
    *,
    centre: Tensor | None = None,
    scale: float | None = None,
    sources: Sequence[BankSource] | None = None,
    until: float | None = None,
    report: Callable[[str], None] | None = None,
    keep: bool = False,
) -> Found:
    """Find the target, and weighted points of it.

    Arguments:
        problem: The problem, without contexts.
        plan: Thresholds and budgets.
        generator: Source of randomness.
        centre: Where to look first, in unbounded coordinates; the origin if None.
        scale: Width to look at, if known to an order of magnitude.
        sources: Ways to propose a law, in the order in which they are asked.
        until: Time (:func:`time.perf_counter`) after which no phase is begun.
        report: Called with the name of each phase.
        keep: Whether an interrupt from the keyboard ends with the points so far.

    Raises:
        EnergyError: If the energy is not finite anywhere, or keeps falling outward so that
            :math:`e^{-E}` cannot be normalised.
    """
    explorer = _Explorer(problem, plan, generator, centre, scale, sources, until, report)
    return explorer.run(keep=keep)


class _Explorer:
    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        generator: torch.Generator,
        centre: Tensor | None,
        scale: float | None,
        sources: Sequence[BankSource] | None,
        until: float | None,
        report: Callable[[str], None] | None,
    ) -> None:
        self.problem, self.plan, self.generator = problem, plan, generator
        self.report = report or (lambda text: None)
        self.sources, self.until = sources, until
        self.meter = problem.energy
        self.pool = Pool()
        self.ledger = Ledger(problem, limit=self.meter.evaluations + plan.evaluations)
        self.paths: list[tuple[Tensor, Tensor]] = []
        self.each = 0  # evaluations of a descent from an independent start
        self.unexamined = self.refused = False
        self.noise = self.foretold = 0.0
        self.spare: tuple[Proposal, Bank] | None = None  # a bank refused for its tail alone
        self.begun = self.meter.evaluations
        like: dict[str, Any] = {"dtype": torch.float64, "device": generator.device}
        loc = torch.zeros(problem.dim, **like) if centre is None else centre.to(**like)
        low, high = (_LOWEST, _HIGHEST) if scale is None else (scale / _HINT, scale * _HINT)
        self.high = high
        scales = torch.logspace(math.log10(low), math.log10(high), _SCALES, **like)
        self.ladder = ScaleLadder(kinds_of(problem, generator.device), loc, scales)
        self.hinted = centre is not None or scale is not None

    @property
    def spent(self) -> int:
        return self.meter.evaluations - self.begun

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.until is not None and time.perf_counter() > self.until

    def _values(self, x: Tensor) -> Tensor:
        return self.problem.potential(x)

    def run(self, *, keep: bool = False) -> Found:
        """All phases; if wanted, interrupted ones end with the points so far."""
        try:
            return self._phases()
        except KeyboardInterrupt:
            if not keep or not bool(self.pool.weights.usable):
                raise
        weights = self.pool.weights
        bank = Bank.of_draws(self.pool.x[None], weights.value[None], None, self.pool.law)
        self._masses(bank)
        return Found(
            bank, self.ledger, None, *self._resolution(bank), self._region(), [], interrupted=True
        )

    def _phases(self) -> Found:
        plan = self.plan
        self._survey()
        self._bracket()
        symmetric = isinstance(self.problem.coordinates, MeanFree)
        scene = Scene(
            self.problem, plan, self.pool, self.ledger, self.ladder, self.broad, self.generator,
            self.report, self.begun + plan.evaluations, self.paths,
        )  # fmt: skip
        if not symmetric:  # what turns freely has no isolated minima
            with contextlib.suppress(BudgetExceededError):  # what was found by then is entered
                self._basins(scene)
        sources = self._asked(symmetric)
        best, chosen, bank, reasons = None, None, None, list[str]()
        if not (
            self.ledger.crowded
            and self.ledger.basins
            and self._endless(components_of(scene), scene, reasons)
        ):
            best, chosen = self._best(sources, scene, 3 * plan.round)
        for _ in range(plan.waves):
            if best is None or chosen is None or (reasons and self.late):
                break
            if best.share >= plan.least:
                bank = self._bank(best, scene, reasons)
            else:
                reasons.append(
                    f"{best.share:.1%} of the draws of the {best.source} were effective"
                )
            if bank is not None:
                break
            room = plan.total - self.spent - self._reserve
            if room < plan.round:
                break
            scene.limit = self.meter.evaluations + min(plan.wave, room // 2)
            if best.share < plan.hopeless:
                if symmetric or not self._found_lower(scene):
                    break
                sources = self._asked(symmetric)
            else:
                if self._endless(best.law, scene, reasons):
                    break
                sources.remove(chosen)
                sources.append(chosen)
            best, chosen = self._best(sources, scene, None)
        if bank is None and self.spare is not None:
            best, bank = self.spare
            self.meter.check(self.problem.coordinates.forward(bank.points[0, -1024:])[0])
        if bank is None:
            best = None
            self._look_for_flat()
            bank = self._chains()
        self._masses(bank)
        return Found(
            bank, self.ledger, best, *self._resolution(bank), self._region(), reasons,
            self.unexamined, self.refused, self.noise,
        )  # fmt: skip

    def _asked(self, symmetric: bool) -> list[BankSource]:
        """The sources in the order in which they are asked."""
        if self.sources is not None:
            return list(self.sources)
        return [Kernels(thorough=True)] if symmetric else [BasinMixture(), Kernels()]

    def _found_lower(self, scene: Scene) -> bool:
        """Go on with starts until one ends below all so far: what was proposed is not there."""
        plan, begun = self.plan, self.spent
        lowest = min((basin.energy for basin in self.ledger.basins), default=math.inf)
        most = min(scene.left, int(plan.descents * plan.evaluations))
        while not self.late and self.spent - begun < most:
            with contextlib.suppress(BudgetExceededError):
                if not self._descend(scene, plan.batch, most - (self.spent - begun)):
                    break
            if any(basin.energy < lowest - _LOWER for basin in self.ledger.basins):
                return True
        return False

    def _best(
        self, sources: Sequence[BankSource], scene: Scene, cost: int | None
    ) -> tuple[Proposal | None, BankSource | None]:
        """The best proposal and its source.

        Sources are asked in order until the best would not save as many evaluations as a further
        one may cost, or, without a cost, until a proposal will do.
        """
        best, chosen, plan = None, None, self.plan
        for source in sources:
            proposal = self._proposed(source, scene)
            if proposal is not None and (best is None or proposal.share > best.share):
                best, chosen = proposal, source
            if best is not None and (
                best.share >= plan.least if cost is None else not plan.worth(best.share, cost)
            ):
                break
        return best, chosen

    def _proposed(self, source: BankSource, scene: Scene) -> Proposal | None:
        try:
            return source.propose(scene)
        except BudgetExceededError:
            return None

    # ---------------------------------------------------------------- location and scale

    def _survey(self) -> None:
        """Points at all scales, from the smallest to the largest, while calls stay quick."""
        self.report("survey")
        x, largest = self.ladder.sample_with_scale(self.plan.survey, self.generator)
        order = largest.argsort(stable=True)
        x, largest = x[order], largest[order]
        energies: list[Tensor] = []
        usual, done = math.inf, 0
        for piece in x.split(max(8, len(x) // 32)):
            started = time.perf_counter()
            energies.append(self._values(piece))
            each = (time.perf_counter() - started) / len(piece)
            done += len(piece)
            if each > _SLOWER * usual and each > _SLOW and done < len(x):
                self._keep_within(float(largest[done - 1]))
                break
            usual = min(usual, each)
        x, energy = x[:done], torch.cat(energies)
        if done < len(largest):  # only scales that were all looked at
            inside = largest[:done] <= self.ladder.scales[-1]
            x, energy = x[inside], energy[inside]
        while (
            int(energy.isfinite().sum()) < _FINITE
            and self.problem.reach is None
            and self.spent + len(largest) <= self.plan.evaluations // 4
            and not self.late
        ):
            more = self.ladder.sample(len(largest), self.generator)
            x, energy = torch.cat([x, more]), torch.cat([energy, self._values(more)])
        self.surveyed = len(x)
        self.pool.add(self.ladder, x, energy)
        self._lowest = float(energy.amin())
        self.meter.check(self.problem.coordinates.forward(x)[0])
        self._ask_again(x, energy)
        self._refuse_falling()

    def _ask_again(self, x: Tensor, energy: Tensor) -> None:
        """A few points once more, twice: noise, and values that depend on the other points.

        Raises:
            EnergyError: If an energy depends on what else is in the batch.
        """
        order = energy.argsort()[: max(_AGAIN, int(energy.isfinite().sum()) // 2)]
        chosen = order[:: max(1, len(order) // _AGAIN)]
        before, x = energy[chosen], x[chosen]
        first, second = (self._values(x) for _ in range(2))
        finite = before.isfinite() & first.isfinite() & second.isfinite()
        if not bool(finite.any()):
            return
        before, first, second = (y[finite] for y in (before, first, second))
        self.noise = float((first - second).square().mean().sqrt()) / math.sqrt(2)
        size = _ROUNDING * (1 + before.abs())
        other = (first - before).abs() > size
        if bool(((first - second).abs() < size).all()) and float(other.double().mean()) > 0.5:
            worst = int((first - before).abs().argmax())
            raise EnergyError(
                "energy must give each point a value of its own, whatever other points are in the "
                f"batch, got {float(before[worst]):.6g} and, in another batch, "
                f"{float(first[worst]):.6g} for the same one; is a sum or a mean without dim=-1 "
                "in it?"
            )

    def _keep_within(self, scale: float) -> None:
        """Evaluate nothing beyond a scale at which calls have become slow."""
        scales = self.ladder.scales
        scales = scales[scales < scale] if bool((scales < scale).any()) else scales[:1]
        self.ladder = ScaleLadder(self.ladder.kind, self.ladder.loc, scales)
        self.high = float(scales[-1])
        self.problem.reach = 4 * self.high + float(self.ladder.loc.abs().amax())

    def _refuse_falling(self) -> None:
        """Far beyond the survey energies are as low as any within it: they fall outward."""
        if self.ladder.boxed or self.problem.reach is not None:
            return
        rays, loc = max(16, min(64, self.plan.survey // 16)), self.ladder.loc
        ray = torch.randn(rays, len(loc), dtype=loc.dtype, device=loc.device,
                          generator=self.generator)  # fmt: skip
        ray = self.high * ray / ray.square().mean(-1, keepdim=True).sqrt()
        energy = self._values(torch.cat([loc + 30 * ray, loc + 100 * ray])).view(2, rays)
        low = (energy <= self._lowest).all(0)
        if float(low.double().mean()) > 0.2:
            raise EnergyError(unbounded(self.high, hinted=self.hinted))

    def _bracket(self) -> None:
        """A Student-t law of about the location and scale of the target."""
        plan, dim = self.plan, self.problem.dim
        n = plan.bracket
        few = min(0.1 * len(self.pool), max(24.0, 3.0 * dim))
        many = max(few, 0.08 * n)
        law, beta = self._fitted(few)
        best, stalled, settled = beta, 0, 0
        own = None
        for i in range(plan.bracket_rounds):
            if self.spent + n > plan.evaluations // 3:
                break
            self.report(f"bracket {i + 1}")
            x = law.sample(n, self.generator)
            own = (x, self.pool.add(law, x, self._values(x)), law)
            following, beta = self._fitted(many, shrunk=many < _ENOUGH * dim)
            settled += beta == 1.0
            stalled = 0 if beta > 1.1 * best else stalled + 1
            best = max(best, beta)
            law = following
            if settled == 2 or stalled == 3:
                break
        self.broad = law
        if own is not None and not self.ladder.boxed:
            x, weights, drawn_from = own
            beta = weights.largest_power(many)
            if beta > 0.05 and _stretch(x, weights.tempered(beta), drawn_from) > 0.65:
                self._refuse_flat(law, n, few)

    def _fitted(self, least: float, *, weights: LogWeights | None = None, x: Tensor | None = None,
                shrunk: bool = True) -> tuple[StudentT, float]:  # fmt: skip
        """Student-t with the weighted moments at the largest beta, and that beta."""
        weights = self.pool.weights if weights is None else weights
        x = self.pool.x if x is None else x
        beta = weights.largest_power(least)
        tempered = weights.tempered(beta)
        loc, tril = weighted_moments(x, tempered.normalised(), shrunk=shrunk)
        effective = float(tempered.ess())
        if shrunk and effective < len(loc) + 1:  # too few to have a width: their distance has one
            away = (loc - self.ladder.loc).norm() / math.sqrt(len(loc))
            apart = torch.where(self.ladder.kind == 2, 1.0, away) / math.sqrt(effective)
            tril = torch.linalg.cholesky(tril @ tril.mT + apart.square().diag())
        return StudentT(loc, tril * _WIDER), beta

    def _look_for_flat(self) -> None:
        """No law fits the target: see whether anything holds the points at all."""
        plan, n = self.plan, min(_STRETCHED, self.plan.evaluations // 24)
        if not self.ladder.boxed and plan.total - self.spent > 24 * n + self._reserve:
            least = max(24.0, _ENOUGH * self.problem.dim, 0.05 * n)
            law, _ = self._fitted(least, shrunk=False)
            self._refuse_flat(law, n, least)

    def _refuse_flat(self, law: StudentT, n: int, few: float) -> None:
        """Stretch the law again and again: does the energy hold the points back?

        Where it does not, log Z grows with the width; heavy tails widen too, with an end to log Z.
        A flat direction lies anywhere, and over many widths a small angle leads away from it: the
        moments are taken as they are.
        """
        start = float(torch.linalg.matrix_norm(law.scale_tril, 2))
        log_z: list[float] = []
        for _ in range(12):
            if self.spent + n > max(
                self.plan.evaluations, self.plan.total - self._reserve - 12 * n
            ):
                return
            wide = StudentT(law.loc, 3.0 * law.scale_tril)
            x = wide.sample(n, self.generator)
            weights = self.pool.add(wide, x, self._values(x))
            if not bool(weights.usable):
                return
            beta = weights.largest_power(few)
            # Where it is held the stretch is a ninth of a half; at a small beta all is wide.
            if beta < 0.05 or _stretch(x, weights.tempered(beta), wide) < 0.3:
                return
            log_z.append(float(weights.log_mean()))
            law, _ = self._fitted(few, weights=weights, x=x, shrunk=False)
            width = float(torch.linalg.matrix_norm(law.scale_tril, 2))
            if width > 1e4 * start and log_z[-1] - log_z[0] > 0.5 * math.log(width / start):
                raise EnergyError(unbounded(width, hinted=self.hinted))

    # ---------------------------------------------------------------- basins

    def _basins(self, scene: Scene) -> None:
        """Descents from independent starts, and from lines through what they found."""
        plan, before = self.plan, self.spent
        most = int(plan.descents * plan.evaluations)
        if most < 20 * self.problem.dim:  # not one basin could be looked at
            return
        self._descend(scene, _PILOT, most)
        self._descend(scene, max(1, plan.batch - _PILOT), most - (self.spent - before))
        if not self.ledger.crowded:
            each = int(plan.scans * plan.evaluations) // 2
            start = centre_minima(self.problem, self.ladder, each, self.generator)
            order = torch.randperm(len(start), generator=self.generator, device=start.device)
            self._entered(scene, start[order[: 2 * _STARTS_OF_LINES]], each, independent=False)
        while not self.ledger.crowded and self._scan(scene, int(plan.scans * plan.evaluations)):
            pass
        while not self.ledger.crowded and self.spent - before < most and not self.late:
            starts, n = self.ledger.starts, plan.batch
            if starts >= plan.starts * (_MORE if self.ledger.uneven else 1):
                if self.foretold < _CHEAP or starts >= _MANY * plan.starts:
                    break
                n = starts
            if not self._descend(scene, n, most - (self.spent - before)):
                break

    def _descend(self, scene: Scene, n: int, most: int) -> bool:
        self.report(f"descents from {self.ledger.starts + n} starts")
        start = independent_starts(n, self.ladder, self.broad, self.generator)
        return self._entered(scene, start, most, independent=True)

    def _entered(
        self, scene: Scene, start: Tensor, most: int, *, independent: bool, follow: bool = True
    ) -> bool:
        """Follow descents to the ledger; whether there was budget for it.

        Starts that the basins known foretell are followed no further.
        """
        width, problem = scene.width, self.problem
        cost = problem.slope_cost(self.pool.x[self.pool.energy.argmin()].expand(2, -1))
        each = max(8 * cost, self.each if independent else 0)  # a start that is cut short is lost
        room = max(0, most // each)
        if self.ledger.basins and len(start) <= most:
            energy = self._values(start)
            start, energy = start[energy.isfinite()], energy[energy.isfinite()]
            basin = self.ledger.foretold(start, energy)
            within = (basin < 0).cumsum(0) <= room
            start, basin = start[within], basin[within]
            if independent:
                self.ledger.credit(basin[basin >= 0])
                self.foretold = float((basin >= 0).double().mean()) if len(basin) else 0.0
            start = start[basin < 0]
            if len(start) == 0:
                return len(basin) > 0
        start = start[:room]
        if len(start) < 1:
            return False
        before = self.spent
        ends = descend(
            lambda u: problem.value_and_slope(u, width),
            start, width, steps=_STEPS, cost=cost, evaluations=most,
        )  # fmt: skip
        if independent:
            self.each = max(self.each, 3 * (self.spent - before) // (2 * len(start)))
        self.paths.append((ends.path, ends.path_energy))
        rested = ends.rested
        self.ledger.add(ends.x[rested], ends.energy[rested], width, independent=independent)
        if not self.ledger.basins and len(ends.x):  # too ill-conditioned for so many steps
            lowest = ends.energy.argsort()[:_LOWEST_ENDS]
            self.ledger.add(ends.x[lowest], ends.energy[lowest], width, independent=False)
        if independent:
            lost = int((~rested).sum())
            self.ledger.starts += lost
            self.ledger.lost += lost
        saddles, self.ledger.saddles = self.ledger.saddles, []
        if saddles:
            aside = torch.stack(saddles)
            if independent and not (
                follow and self._entered(scene, aside, most, independent=True, follow=False)
            ):
                self.ledger.starts += len(saddles)
                self.ledger.lost += len(saddles)
        leads, self.ledger.leads = self.ledger.leads, []
        if leads and follow:
            self._entered(
                scene, torch.cat(leads)[:_STARTS_OF_LINES], min(most, scene.left // 4),
                independent=False, follow=False,
            )  # fmt: skip
        return True

    def _scan(self, scene: Scene, most: int) -> bool:
        """Look along lines through a few of the lowest basins; whether that found another."""
        before = len(self.ledger.valleys)
        done = sum(basin.scanned for basin in self.ledger.basins)
        basins = sorted(self.ledger.valleys, key=lambda basin: basin.energy)
        basins = [basin for basin in basins if not basin.scanned][
            : _CENTRES if done < 2 * _CENTRES else 1
        ]
        if scene.left < 8 * LINE * len(basins):
            return False
        self.report(f"lines through {len(basins)} basins")
        for basin in basins:
            basin.scanned = True
            each = most // (4 * _CENTRES)
            start = line_minima(self.problem, basin, self.ledger.basins, each, self.generator)
            order = torch.randperm(len(start), generator=self.generator, device=start.device)
            self._entered(scene, start[order[:_STARTS_OF_LINES]], each, independent=False)
        return len(self.ledger.valleys) > before

    # ---------------------------------------------------------------- the bank

    def _bank(self, proposal: Proposal, scene: Scene, reasons: list[str]) -> Bank | None:
        """Draws until they are worth enough, judged by their own weights."""
        plan, law = self.plan, proposal.law
        x, energy = [], []
        pool = Pool()
        if proposal.drawn is not None:
            if proposal.drawn[0] is law:
                x, energy = [proposal.drawn[1]], [proposal.drawn[2]]
            else:
                pool.add(*proposal.drawn)
        log_weight = [-e - law.log_prob(y) for y, e in zip(x, energy, strict=True)]
        spent, most = 0, min(plan.bank, plan.total - self.spent - self._reserve)
        while spent < most and not (self.late and x):
            own = LogWeights(torch.cat(log_weight)) if log_weight else None
            share = proposal.share if own is None else own.share()
            effective = (0.0 if own is None else float(own.ess())) + (
                float(pool.weights.ess()) if len(pool) else 0.0
            )
            if effective >= plan.ess or (spent and share < plan.least / 2):
                break
            n = round(1.02 * (plan.ess - effective) / max(share, plan.least))
            n = min(most - spent, max(_LEAST, min(_PIECE, n, max(_FIRST, 2 * spent))))
            spent += n
            self.report(f"bank, {spent} points")
            x.append(law.sample(n, self.generator))
            energy.append(self._values(x[-1]))
            log_weight.append(-energy[-1] - law.log_prob(x[-1]))
        if x:
            pool.add(law, torch.cat(x), torch.cat(energy))
        weights = pool.weights
        shape = weights.pareto_shape()
        heavy = shape > plan.tail and weights.unseen() > plan.unseen
        if weights.share() < plan.least or heavy:
            self.refused = True
            if weights.share() >= _SPARE:
                points = (pool.x[None], weights.value[None], None, pool.law)
                self.spare = (proposal, Bank.of_draws(*points))
            lack: Lack | None = Lack(
                f"the bank was worth {weights.share():.1%} of its points, with a weight tail of "
                f"Pareto shape {shape:.2f}"
            )
        else:
            log_z = float(weights.log_mean())
            lack = self._missing(pool.law, weights.value.numel(), log_z, scene)
        if lack is not None:
            reasons.append(lack.reason)
            if x:  # what it met is for the next proposal to learn from
                self.pool.add(law, torch.cat(x), torch.cat(energy))
            return None
        self.meter.check(self.problem.coordinates.forward(pool.x[-1024:])[0])
        return Bank.of_draws(pool.x[None], weights.value[None], None, pool.law)

    def _endless(self, law: Density, scene: Scene, reasons: list[str]) -> bool:
        """Whether there are too many basins for any law that knows them one by one.

        Asked twice: what fresh starts have met the first time is known the second time.
        """
        n = int(self.plan.ess / self.plan.least)
        lack: Lack | None = None
        for _ in range(2):
            log_z = max(float(self.pool.weights.log_mean()), self.ledger.log_z)
            lack = self._missing(law, n, log_z, scene)
            if lack is None or not lack.endless:
                return False
        reasons += [lack.reason] if lack is not None else []
        return True

    def _missing(self, law: Density, n: int, log_z: float, scene: Scene) -> Lack | None:
        """What n draws of a law lack; after fresh starts, where there may be more basins."""
        plan, ledger = self.plan, self.ledger
        before = {id(basin): basin.starts for basin in ledger.basins}
        most = min(
            int(plan.descents * plan.evaluations) // 4, plan.total - self.spent - self._reserve
        )
        if ledger.alone > plan.alone * ledger.starts and not self.late:
            rested = ledger.starts - ledger.lost
            ledger.make_room(plan.batch // 2, self.meter.evaluations + max(0, most))
            with contextlib.suppress(BudgetExceededError):
                self._descend(scene, plan.batch // 2, most)
            self.unexamined = ledger.starts - ledger.lost - rested < _FRESH
        fresh = [basin.starts > before.get(id(basin), 0) for basin in ledger.basins]
        with contextlib.suppress(BudgetExceededError):
            return left_out(
                self.problem, ledger.basins, fresh, law, n, log_z, plan, self.pool,
                self.generator,
            )  # fmt: skip
        return None

    @property
    def _reserve(self) -> int:
        """Evaluations of a budget that are left to chains, should the bank not pass."""
        return 0 if self.meter.remaining is None else LEAST_EVALUATIONS

    def _chains(self) -> Bank:
        """A population that walks from the broad law to the target."""
        evaluations = self.plan.chains
        if self.meter.remaining is not None:
            evaluations = min(evaluations, max(0, self.plan.total - self.spent))
        if evaluations < LEAST_EVALUATIONS:  # all that there is, with whatever weights
            weights = self.pool.weights
            return Bank.of_draws(self.pool.x[None], weights.value[None], None, self.pool.law)
        size = max(16, min(512, evaluations // 256))
        visited = sequential_monte_carlo(
            self._values,
            self.broad,
            evaluations=evaluations,
            size=size,
            generator=self.generator,
            report=self.report,
        )
        self.meter.check(self.problem.coordinates.forward(visited.points)[0])
        return Bank.of_samples(visited.points, method="chains", log_z=visited.log_z)

    def _masses(self, bank: Bank) -> None:
        """The mass of each basin of the ledger: of the points that are nearest to it."""
        basins = self.ledger.basins
        if not basins or bank.context is not None:
            return
        weights = LogWeights(bank.log_weight[0])
        index = weights.resampled(min(20_000, len(bank.points[0])), self.generator)
        x = bank.points[0][index]
        distance = []
        for basin in basins:
            z = torch.linalg.solve(basin.factor, (x - basin.x).mT).mT
            log_det = float(torch.linalg.slogdet(basin.factor)[1])
            distance.append(0.5 * z.square().sum(-1) + log_det + basin.energy)
        nearest = torch.stack(distance, -1).argmin(-1)
        share = torch.nn.functional.one_hot(nearest, len(basins)).double().mean(0)
        effective = min(float(weights.ess()), float(len(x))) if bank.density else math.nan
        masses = dict.fromkeys(map(id, self.ledger.valleys), 0.0)
        for basin, mass in zip(basins, share.tolist(), strict=True):
            masses[id(basin.valley)] += mass
        for basin in self.ledger.valleys:
            mass = basin.mass = masses[id(basin)]
            basin.mass_se = math.sqrt(max(mass * (1 - mass), 1e-12) / effective)

    def _resolution(self, bank: Bank) -> tuple[int, float, float]:
        """Points with a density, its logarithm far out, and the target's width.

        These are the survey and the starts of its law.
        """
        dim, coordinates = self.problem.dim, self.problem.coordinates
        spread = float(bank.scale_tril.diagonal().log().mean().exp())
        points, starts = self.surveyed, self.ledger.starts
        if self.ladder.boxed and isinstance(coordinates, Bounds):
            spread *= math.exp(float(coordinates.forward(bank.loc[None])[1]) / dim)
            return (
                points + starts,
                -float((coordinates.high - coordinates.low).log().sum()),
                spread,
            )
        axes = _FAR * math.sqrt(self.problem.dim) * bank.scale_tril.mT
        rim = torch.cat([bank.loc + axes, bank.loc - axes])
        points += round(OF_SURVEY * starts)
        number = points * float(self.ladder.log_prob(rim).exp().mean())
        return points, math.log(max(number, 1e-300) / points), spread

    def _region(self) -> str:
        if self.ladder.boxed:
            return "searched the box of the bounds, uniformly"
        low, high = float(self.ladder.scales[0]), float(self.ladder.scales[-1])
        where = "the given centre" if self.hinted else "the origin"
        return f"searched scales from {low:.0e} to {high:.0e} about {where}"


def kinds_of(problem: Problem, device: torch.device) -> Tensor:
    """Which bounds each coordinate has; see :class:`ScaleLadder`."""
    coordinates = problem.coordinates
    if not isinstance(coordinates, Bounds):
        return torch.zeros(problem.dim, dtype=torch.long, device=device)
    low, high = coordinates.low.isfinite(), coordinates.high.isfinite()
    kind = torch.where(low & high, 2, torch.where(low, 1, torch.where(high, -1, 0)))
    return kind.to(device)


def _stretch(x: Tensor, weights: LogWeights, law: StudentT) -> float:
    """Largest ratio of weighted variance to the law's, over all directions.

    Where the moments have settled it is 1 / 1.2 over 5 / 3, a half. In a direction without
    restoring force the points only repeat the law's own width: it is 1 or more.
    """
    z = torch.linalg.solve_triangular(law.scale_tril, (x - law.loc).mT, upper=False).mT
    weight = weights.normalised()[:, None]
    centred = z - (weight * z).sum(0)
    covariance = (weight * centred).mT @ centred
    return float(torch.linalg.eigvalsh(covariance)[-1]) * (1 - 2 / law.df)


def unbounded(radius: float, *, hinted: bool = False) -> str:
    """What is wrong with an energy that is lowest at that distance.

    Arguments:
        radius: The distance from the centre.
        hinted: Whether a centre or a scale was given.
    """
    given = "; or is the target far from the given centre, or wider than 100 times the given scale"
    return (
        "energy must grow far from its minima, got one that is lowest at the rim of the search, "
        f"about {radius:.0e} from its centre: exp(-energy) cannot be normalised. Is it a "
        "log-probability, with the opposite sign (energies.from_log_prob), or does it need bounds"
        f"{given if hinted else ''}?"
    )
