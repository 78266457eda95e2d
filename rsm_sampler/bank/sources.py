r"""Sources of a bank: each proposes a law to draw from, and is judged by fresh draws of it.

A :class:`BankSource` looks at the :class:`Scene`, what exploration has found so far, and returns a
:class:`Proposal`: a density with the share of effective points among fresh draws of it.
Exploration asks its sources in turn and takes the proposal with the most effective draws per
evaluation. All points that a source evaluates enter the pool, whoever is chosen.

* :class:`BasinMixture`: Student-t components at all basins of the ledger, several scales at each
  (a narrow peak may stand on a wide one that has no minimum of its own), adapted by the weights of
  all points so far, split where they do not fit. Where minima do not describe the target (funnels,
  curved valleys), points on the way down join, with the curvature there.
* :class:`Kernels`: a kernel density of the pool's points, which follows any shape in few
  dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.bank.ledger import Ledger
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.pool import Pool
from rsm_sampler.montecarlo.densities import (
    Density,
    Joint,
    KernelDensity,
    Mixture,
    ScaleLadder,
    StudentT,
    weighted_moments,
)
from rsm_sampler.montecarlo.mixtures import (
    allocated,
    extended,
    local_share,
    lower_root,
    refitted,
    split,
    tails,
)
from rsm_sampler.montecarlo.weights import LogWeights
from rsm_sampler.target.problem import Problem

__all__ = ["BankSource", "BasinMixture", "Kernels", "Proposal", "Scene"]

_SCALES = 8  # at a basin, each twice the one before: up to 128 widths
_FITTED = 32_768  # points of a fit, at most
_ON_PATHS = 96  # points on the way down with a curvature
_NEGLIGIBLE = 1e-3  # of an equal share: such points are left out
_DOWNHILL = 0.15  # share of the defensive law that holds them; two thirds are theirs
_HEAVIEST = 8  # points of large weight that become components, in a round
_HEAVY = 0.01  # of the total weight, for that
_KERNEL_ROUNDS = 4
_DEFENSIVE = 2.0  # degrees of freedom of the defensive law
_LAST = 3  # rounds whose laws make the proposal
_FITTING = 0.5  # share of effective draws within a component that need not be split
_REMEMBERED = 5  # laws whose draws a fit looks at


@dataclass
class Scene:
    """What exploration has found so far.

    Attributes:
        problem: The problem.
        plan: Thresholds and budgets.
        pool: All points evaluated.
        ledger: All basins seen.
        ladder: The law of the survey.
        broad: A law of about the location and scale of what was found.
        generator: Source of randomness.
        report: Receives what is being done.
        paths: Points on the ways down, (n, dim), and their energies, (n).
        downhill: Components at some of them, where minima do not describe the target.
        limit: Evaluations of the meter at which exploration has to end.
    """

    problem: Problem
    plan: Plan
    pool: Pool
    ledger: Ledger
    ladder: ScaleLadder
    broad: StudentT
    generator: torch.Generator
    report: Callable[[str], None]
    limit: int
    paths: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    downhill: Mixture | None = None

    @property
    def width(self) -> Tensor:
        """Widths of the broad law in the coordinates."""
        return self.broad.scale_tril.norm(dim=-1)

    @property
    def left(self) -> int:
        """Evaluations left for exploration."""
        return max(0, self.limit - self.problem.energy.evaluations)

    @property
    def defence(self) -> Density:
        """The defensive law of proposals: the box, or heavy tails about the broad law.

        Components on the ways down are a part of it: a fit gives up what few draws have reached,
        the end of a neck.
        """
        law: Density = self.ladder
        if not self.ladder.boxed:
            law = StudentT(self.broad.loc, self.broad.scale_tril, _DEFENSIVE)
        return law if self.downhill is None else Joint([law, self.downhill], [1, 2])

    def draw(self, law: Density, n: int) -> LogWeights:
        """Draw from a law into the pool; the draws' own weights."""
        x = law.sample(n, self.generator)
        return self.pool.add(law, x, self.problem.potential(x))


@dataclass(frozen=True)
class Proposal:
    """A law to draw from.

    Attributes:
        source: Name of the source.
        law: Its density.
        share: Share of effective points among fresh draws.
        drawn: Draws that the law owes nothing to, with their energies and their own law.
    """

    source: str
    law: Density
    share: float
    drawn: tuple[Density, Tensor, Tensor] | None = None


@runtime_checkable
class BankSource(Protocol):
    """A way to propose a law.

    Attributes:
        name: Its name, for reports.
    """

    name: str

    def propose(self, scene: Scene) -> Proposal | None:
        """A proposal after adaptation within the scene's budget; None if there is none."""
        ...


def components_of(scene: Scene) -> Mixture:
    """Several scales at each basin, and the broad law."""
    loc, tril, weight = [scene.broad.loc], [scene.broad.scale_tril], [0.2]
    basins, dim = scene.ledger.basins, len(scene.broad.loc)
    largest = float(scene.broad.scale_tril.diagonal().log().mean())
    for basin in basins:
        own = lower_root(basin.factor)
        size = float(own.diagonal().log().mean())
        number = 1
        while number < _SCALES and (
            number < 3 or size + (number - 1) * math.log(2) < largest + math.log(2)
        ):
            number += 1
        if number * len(basins) > 4 * scene.plan.components:
            number = max(1, 4 * scene.plan.components // len(basins))
        for j in range(number):
            loc.append(basin.x)
            tril.append(2.0**j * own)
            weight.append(1.0 if number == 1 else 0.5 if j == 0 else 0.5 / (number - 1))
    share = torch.tensor(weight, dtype=torch.float64, device=scene.broad.loc.device)
    return Mixture(
        share / share.sum(),
        torch.stack(loc),
        torch.stack(tril),
        scene.defence,
        tails(dim),
    )


class BasinMixture:
    """Student-t components at all basins, adapted by the weights (see the module)."""

    name = "mixture"

    def __init__(self) -> None:
        self._mixture: Mixture | None = None  # where the last call ended

    def propose(self, scene: Scene) -> Proposal | None:
        """Rounds of draws and fits, until the share of effective draws no longer grows.

        Called again it goes on from where it ended, with all that the pool has by then.
        """
        plan = scene.plan
        n = plan.round
        rounds: list[tuple[float, Mixture, Tensor, Tensor]] = []
        if self._mixture is None:
            mixture = components_of(scene)
        else:
            mixture = self._adapted(scene, self._mixture, grow=True, paths=False)
            n = 4 * n
        for i in range(plan.rounds):
            n = min(n, scene.left)
            if n < 16:
                break
            scene.pool.trim(_REMEMBERED)
            share = scene.draw(mixture, n).share()
            rounds.append((share, mixture, scene.pool.x[-n:], scene.pool.energy[-n:]))
            scene.report(f"mixture of {len(mixture.loc)}, round {i + 1}: {share:.2f}")
            best = max(each[0] for each in rounds)
            n = min(16_384, round(1.4 * n))
            if not plan.worth(rounds[-1][0], n) or (i >= 3 and best < plan.hopeless):
                break
            if i >= 3 and best > 0.5 and max(each[0] for each in rounds[-2:]) < 0.95 * best:
                break  # components that fit single draws lower it
            mixture = self._adapted(scene, mixture, grow=i > 0, paths=i == 1 and best < plan.poor)
        if not rounds:
            return None
        self._mixture = rounds[-1][1]
        best = max(range(len(rounds)), key=lambda i: rounds[i][0])
        share, law, x, energy = rounds[best]
        last = rounds[-_LAST:]
        if len(last) < _LAST or (share > 0.5 and min(each[0] for each in last) > 0.5 * share):
            return Proposal(self.name, law, share, (law, x, energy))
        # Single draws of large weight make shares jump: several laws cover what one misses.
        last = [each for each in last if each[0] > 0.5 * share] or [rounds[best]]
        joint = Joint([each[1] for each in last], [1] * len(last))
        _, law, x, energy = last[-1]
        return Proposal(
            self.name, joint, sum(each[0] for each in last) / len(last), (law, x, energy)
        )

    def _adapted(self, scene: Scene, mixture: Mixture, *, grow: bool, paths: bool) -> Mixture:
        """The mixture after a fit to all points so far, as far as their weights bear it."""
        dim, weights = scene.problem.dim, scene.pool.weights
        if not bool(weights.usable):
            return mixture
        if paths and scene.downhill is None:
            scene.downhill = self._on_paths(scene)
            if scene.downhill is not None:  # nothing was drawn there yet that a fit could rely on
                old, new = mixture, scene.downhill
                wide = Mixture(
                    old.weight, old.loc, old.scale_tril, scene.defence, old.df, share=_DOWNHILL
                )
                return extended(wide, new.loc, new.scale_tril, share=0.5)
        beta = weights.largest_power(max(64.0, 10.0 * dim))
        tempered = weights.tempered(beta)
        heavy = self._heaviest(scene, mixture, weights)
        if heavy is not None:
            mixture = extended(mixture, *heavy, share=0.1)
        if grow:
            x, energy = scene.pool.x[-scene.pool.counts[-1] :], scene.pool.energy
            local = local_share(mixture, x, energy[-len(x) :])
            mixture = split(mixture, scene.plan.components, local < _FITTING)
        most = min(_FITTED, max(8192, 40 * dim * len(mixture.loc)))
        index = tempered.resampled(min(most, 2 * len(scene.pool)), scene.generator)
        index, copies = index.unique(return_counts=True)
        weight = copies.double() / copies.sum()
        x, energy = scene.pool.x[index], scene.pool.energy[index]
        mixture = refitted(mixture, x, weight, broad=scene.defence)
        return allocated(mixture, x, energy, weight) if beta == 1.0 else mixture

    def _heaviest(
        self, scene: Scene, mixture: Mixture, weights: LogWeights
    ) -> tuple[Tensor, Tensor] | None:
        """Components at points that carry far too much of the weight: the law misses them."""
        weight = weights.normalised()
        heavy = (weight > _HEAVY).nonzero()[:, 0]
        if len(heavy) == 0:
            return None
        cost = 2 * scene.ledger.curvature_cost(scene.pool.x[int(heavy[0])])
        most = min(_HEAVIEST, max(0, scene.left) // (4 * cost))
        heavy = heavy[weight[heavy].argsort(descending=True)][:most]
        room = 2 * scene.plan.components - len(mixture.loc)
        if not 0 < len(heavy) <= room:
            return None
        return self._curved(scene, scene.pool.x[heavy])

    def _on_paths(self, scene: Scene) -> Mixture | None:
        """Components at points on the way down, by the mass that the curvature there suggests."""
        if not scene.paths:
            return None
        x = torch.cat([points for points, _ in scene.paths])
        energy = torch.cat([energies for _, energies in scene.paths])
        cost = 2 * scene.ledger.curvature_cost(x[int(energy.argmin())])
        number = min(_ON_PATHS, scene.left // (4 * cost))
        low = (energy <= energy.quantile(0.9)).nonzero()[:, 0] if len(x) else energy.long()
        if number < 8 or len(low) < number:
            return None
        low = low[energy[low].argsort()]
        place = torch.arange(number, device=x.device) * len(low) // number
        x, energy = x[low[place]], energy[low[place]]
        loc, tril = self._curved(scene, x)
        mass = LogWeights(tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - energy)
        weight = mass.tempered(mass.largest_power(0.5 * number)).normalised()
        kept = weight > _NEGLIGIBLE / number
        weight = weight[kept] / weight[kept].sum()
        df = tails(scene.problem.dim)
        return Mixture(weight, loc[kept], tril[kept], scene.defence, df, share=0.0)

    def _curved(self, scene: Scene, x: Float[Tensor, "k dim"]) -> tuple[Tensor, Tensor]:
        factor = torch.stack([scene.ledger.factor(point, scene.width) for point in x])
        return x, lower_root(factor)


class Kernels:
    """A kernel density of the pool's points, by weight (see the module).

    Arguments:
        thorough: Whether to go on where few draws are effective: in the place of all other
            sources.
    """

    name = "kernels"

    def __init__(self, *, thorough: bool = False) -> None:
        self.thorough = thorough

    def propose(self, scene: Scene) -> Proposal | None:
        """Rounds, while the share of effective draws grows by a tenth; a small one first."""
        plan, best = scene.plan, None
        known = any(isinstance(law, Mixture) for law in scene.pool.laws)
        if scene.ledger.basins and not known:  # points in every basin that was seen
            n = min(max(plan.round, 16 * len(scene.ledger.basins)), scene.left // 2)
            if n > 0:
                scene.draw(components_of(scene), n)
        for i in range(_KERNEL_ROUNDS):
            n = plan.round // 2 if i == 0 else plan.round
            if self.thorough:
                n = max(n, min(_FITTED, scene.left // _KERNEL_ROUNDS))
            n = min(n, scene.left)
            weights = scene.pool.weights
            if n < 64 or float(weights.ess()) < 4:
                break
            law = self._density(scene, weights)
            share = scene.draw(law, n).share()
            x, energy = scene.pool.x[-n:], scene.pool.energy[-n:]
            scene.report(f"kernels, round {i + 1}: {share:.2f}")
            if share < plan.least and scene.ledger.basins and not self.thorough:
                scene.pool.forget()  # its density costs more than its draws tell a mixture
                break
            if best is not None and share < 1.1 * best.share and not self.thorough:
                break
            if best is None or share > best.share:
                best = Proposal(self.name, law, share, (law, x, energy))
            if not plan.worth(share, 2 * plan.round):
                break
            if share < plan.least and not self.thorough:
                break
        return best

    def _density(self, scene: Scene, weights: LogWeights) -> KernelDensity:
        dim = scene.problem.dim
        tempered = weights.tempered(weights.largest_power(max(32.0, 4.0 * dim)))
        count = int(min(scene.plan.kernels, max(16, 1.5 * float(tempered.ess()))))
        index = tempered.resampled(count, scene.generator)
        chosen, copies = index.unique(return_counts=True)
        loc, tril = weighted_moments(scene.pool.x, tempered.normalised())
        broad = StudentT(loc, 1.3 * tril)
        return KernelDensity(scene.pool.x[chosen], copies.double() / count, broad)
