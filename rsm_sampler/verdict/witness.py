r"""A second estimate of the target, by other means than the sampler's.

The witness takes the energy in unbounded coordinates, and where the user said to look. It never
sees the sampler's bank, its affine map or its points, except to mark out the regions in which
masses are compared. It looks in three ways, one after the other, with random numbers of its own:

1. **Descents** from starts of a stated law (:mod:`rsm_sampler.verdict.descents`) give basins,
   their curvatures, and the statement of coverage.
2. **A tempered population** (sequential Monte Carlo) from a Student-t law about the basins.
3. **Importance sampling** by a mixture of Student-t laws: at each basin with 1, 3 and 10 times the
   width of its curvature, since a spike may sit in a slab; with the moments of clusters of the
   population; and two broad laws, one of them Cauchy's. Two rounds adapt shares, places and shapes
   by their weights (population Monte Carlo). In few dimensions kernels at the points found so far
   are added. Estimates use the last round alone, so that its weights are exact.

If that is inconclusive, the same again with twice the evaluations, then parallel tempering; all
together take at most nine times the evaluations of the first attempt.

What all three miss is missing here as well: agreement of sampler and witness shows that nothing
was found, in two searches, that the sampler lacks. The statement of coverage says what that means.

References:
    | Population Monte Carlo (Cappé et al., 2004)
    | https://doi.org/10.1198/106186004X12803

    | Adaptive importance sampling in general mixture classes (Cappé et al., 2008)
    | https://doi.org/10.1007/s11222-008-9059-x
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.densities import KernelDensity, StudentT
from rsm_sampler.montecarlo.population import next_beta
from rsm_sampler.montecarlo.run import run_mcmc
from rsm_sampler.montecarlo.weights import (
    cumulative_weight,
    pareto_shape,
    stratified_indices,
)
from rsm_sampler.target.coordinates import Bounds
from rsm_sampler.verdict.coverage import Coverage
from rsm_sampler.verdict.descents import LADDER, Basin, Ledger, find_basins
from rsm_sampler.verdict.landscape import Landscape
from rsm_sampler.verdict.regions import Regions, cells_of, clusters_of, nearest
from rsm_sampler.verdict.tempered import factor, moments, tempered_population

__all__ = ["BasinMass", "Witness", "find_witness"]

MASS_TOLERANCE = 0.015  # of a region: what a table of masses with two digits would not show
SIGNIFICANT = 4.0  # standard errors: two-sided 6e-5 for one comparison, 5e-3 for eighty
NOTABLE = 0.005  # mass from which a basin is compared by itself
_NAMED = 24  # basins compared by themselves, at most
_LEAST_ESS = 300  # effective points: a tenth of the mass then has an error of 0.017
_LOG_Z_SE = 0.04  # of log Z: a missing tenth of the mass, 0.105, is then 2.6 errors off
_MASS_SE = 0.025  # of a region's mass: a tenth in the wrong place is four errors off
_KNOWN = math.log(100.0)  # excess of a weight at which hundreds of points still go there
_EXCLUDED = 0.2  # share of starts: basins that catch more must have been excluded
_HEAVY = 0.7  # Pareto shape above which averages of weights are unreliable at any affordable n

_DESCENTS, _POPULATION = 0.28, 0.15  # shares of the evaluations; importance sampling has the rest
_DESCENTS_SMALL = 0.42  # the first of these with few evaluations: what is not found is not weighed
_ADAPTING = (0.12, 0.2)  # shares of what importance sampling has, for its adapting rounds
_ADAPTING_MORE = (0.1, 0.12, 0.18)  # the same of the second attempt
_WIDTHS = (1.0, 3.0, 10.0)  # of a basin's components, in units of its curvature's width
_WIDTH_SHARES = (0.5, 0.3, 0.2)
_NEGLIGIBLE = 14.0  # nats below the heaviest basin, by Laplace's approximation
_SERVED = 48  # basins that get components
_CLUSTERS, _CLUSTERS_MORE = 8, 12  # of the population that get components, in each attempt
_BASIN_FLOOR = 0.3  # share of all basins together that adaptation leaves, evenly
_BROAD, _CAUCHY = 0.07, 0.03  # shares of the two broad laws
_KERNELS, _KERNEL_SHARE, _KERNEL_DIM = 500, 0.45, 6  # kernels serve in few dimensions only
_TEMPERED = 0.05  # effective share of a round's points from which components are adapted
_SEVERAL = 20_000  # evaluations from which an inconclusive witness tries again


@dataclass(frozen=True)
class BasinMass:
    """A basin that the witness found, with its mass.

    Attributes:
        loc: Its lowest point, in the user's coordinates.
        energy: The energy there, in the user's coordinates.
        mass: Its mass by the witness's weights.
        mass_se: The standard error of it.
        log_z: Logarithm of its part of Z.
        ess: Effective number of points within it.
        share: Its share of the sampler's draws.
        starts: How many independent starts ended in it.
    """

    loc: list[float]
    energy: float
    mass: float
    mass_se: float
    log_z: float
    ess: float
    share: float
    starts: int


@dataclass(frozen=True)
class Witness:
    """A second estimate of the target.

    Attributes:
        method: ``"importance sampling"`` or ``"parallel tempering"``.
        evaluations: Energy evaluations it took, all attempts included.
        ess: Its effective sample size, in points.
        log_z: Its estimate of log Z.
        log_z_se: The standard error of it.
        masses: Its masses of the regions.
        masses_se: Their standard errors.
        pareto_k: Shape of the tail of its weights; NaN for parallel tempering.
        coverage: What was searched, and what could have been missed.
        regions: The regions.
        basins: The basins found that hold a notable mass, with it.
        points: Points of about equal weight, in unbounded coordinates, as it sees the target.
    """

    method: str
    evaluations: int
    ess: float
    log_z: float
    log_z_se: float
    masses: Tensor
    masses_se: Tensor
    pareto_k: float
    coverage: Coverage
    regions: Regions
    basins: list[BasinMass] = field(default_factory=list)
    points: Tensor = field(default_factory=lambda: torch.zeros(0, 1), repr=False)

    @property
    def conclusive(self) -> bool:
        """Whether it can confirm anything: a tenth of the mass in the wrong place would show."""
        return (
            self.ess >= _LEAST_ESS
            and self.log_z_se <= _LOG_Z_SE
            and float(self.masses_se.amax()) <= _MASS_SE
            and not self.pareto_k > _HEAVY
            and self.coverage.excluded <= _EXCLUDED
        )

    @property
    def resolution(self) -> float:
        """The smallest error of a region's mass that the comparison is sure to find."""
        return MASS_TOLERANCE + 2 * SIGNIFICANT * float(self.masses_se.amax())


def find_witness(
    landscape: Landscape,
    draws: Float[Tensor, "n dim"],
    evaluations: int,
    generator: torch.Generator,
    *,
    centre: Float[Tensor, " dim"] | None = None,
    scale: float | None = None,
) -> tuple[Witness, Float[Tensor, " regions"]]:
    """The witness, and the sampler's own masses of the same regions.

    Arguments:
        landscape: The energy in unbounded coordinates.
        draws: The sampler's draws there. They only mark out regions, and are counted in them.
        evaluations: Energy evaluations of the first attempt. If it is inconclusive, from 20,000
            on, a second one takes twice as many and parallel tempering six times as many.
        generator: Source of randomness, on the device of the draws.
        centre: Where the user said to look, in unbounded coordinates; 0 if None.
        scale: How wide; 1 if None.
    """
    if centre is None:
        centre = torch.zeros(landscape.dim, dtype=torch.float64, device=draws.device)
    search = _Search(landscape, draws.double(), centre.double(), scale or 1.0, generator)
    found = search.attempt(evaluations)
    if found.conclusive or evaluations < _SEVERAL:
        return found, search.shares(found)
    again = search.attempt(2 * evaluations, thorough=True)
    found = again if again.conclusive or again.log_z_se <= found.log_z_se else found
    if not found.conclusive and landscape.dim > 2:
        tempered = search.tempering(6 * evaluations, found)
        if tempered is not None and (tempered.conclusive or tempered.log_z_se < found.log_z_se):
            found = tempered
    found = _with_evaluations(found, landscape.evaluations)
    return found, search.shares(found)


def _with_evaluations(witness: Witness, evaluations: int) -> Witness:
    return Witness(**{**witness.__dict__, "evaluations": evaluations})


def _log_density(mixture: list[tuple[Any, float]], u: Tensor) -> Tensor:
    """Log-density of laws with shares."""
    terms = []
    for law, share in mixture:
        density = law.terms(u).logsumexp(-1) if isinstance(law, _Components) else law.log_prob(u)
        terms.append(density + math.log(share))
    return torch.stack(terms).logsumexp(0)


class _Components:
    """Student-t laws, some of which belong to basins."""

    def __init__(self, parts: Sequence[tuple[float, StudentT, int]]) -> None:
        weight, self.parts, self.basin = zip(*parts, strict=True)
        like = self.parts[0].loc
        self.weight = torch.tensor(weight, dtype=like.dtype, device=like.device)
        self.weight = self.weight / self.weight.sum()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws, component by component, their numbers proportional to the weights."""
        offset = torch.rand(
            (), dtype=torch.float64, device=self.weight.device, generator=generator
        )
        edges = (self.weight.double().cumsum(0) * n + offset).floor().long().tolist()
        edges[-1] = n
        pieces, low = [], 0
        for part, high in zip(self.parts, edges, strict=True):
            pieces.append(part.sample(max(0, min(high, n) - low), generator))
            low = max(low, min(high, n))
        return torch.cat(pieces)

    def terms(self, u: Tensor) -> Tensor:
        """Logarithms of the terms of the density, (n, components)."""
        return torch.stack([part.log_prob(u) for part in self.parts], -1) + self.weight.log()

    def adapted(self, u: Tensor, log_weight: Tensor) -> "_Components":
        """Shares, places and shapes anew from weighted points, where there are enough of them.

        The update of expectation maximisation for Student-t laws (Cappé et al., 2008).
        """
        dim = u.shape[1]
        weight = torch.softmax(log_weight, 0)
        terms = self.terms(u)
        joint = weight[:, None] * torch.softmax(terms, -1)
        share = joint.sum(0)
        enough = joint.square().sum(0).clamp(min=1e-300)
        worth = share.square() / enough
        parts = []
        for k, part in enumerate(self.parts):
            loc, tril = part.loc, part.scale_tril
            if worth[k] > 2 * dim + 5:
                z = torch.linalg.solve_triangular(tril, (u - loc).mT, upper=False)
                pull = joint[:, k] * (part.df + dim) / (part.df + z.square().sum(0))
                loc = (pull @ u) / pull.sum()
                centred = u - loc
                covariance = (pull[:, None] * centred).mT @ centred / share[k]
                shrink = dim / (dim + worth[k])
                covariance = (1 - shrink) * covariance + shrink * tril @ tril.mT
                tril = factor(covariance, tril)
            parts.append((float(share[k]), StudentT(loc, tril, part.df), self.basin[k]))
        basins = sorted({k for k in self.basin if k >= 0})
        floor = _BASIN_FLOOR / max(len(basins), 8)
        kept = []
        for b in basins:
            of = [part for part in parts if part[2] == b]
            total = sum(part[0] for part in of)
            best = max(of, key=lambda part: part[0])
            for part in of:
                lifted = part[0] + max(0.0, floor - total) * (part is best)
                kept.append((lifted, part[1], part[2]))
        kept += [part for part in parts if part[2] < 0]
        return _Components([part for part in kept if part[0] > 1e-4])


class _Search:
    def __init__(
        self,
        landscape: Landscape,
        draws: Tensor,
        centre: Tensor,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        self.landscape, self.draws = landscape, draws
        self.centre, self.scale, self.generator = centre, scale, generator
        self.ledger = Ledger()
        self.starts = self.lost = self.points = 0

    def attempt(self, evaluations: int, *, thorough: bool = False) -> Witness:
        """Descents, a population, and importance sampling by a mixture that learns."""
        begun = self.landscape.evaluations
        share = _DESCENTS if evaluations >= _SEVERAL else _DESCENTS_SMALL
        self.ledger = find_basins(
            self.landscape, self.centre, self.scale, int(share * evaluations), self.generator
        )
        self.starts += self.ledger.starts
        self.points += self.ledger.points
        basins = self.worthy()
        broad = self.broad(basins)
        visited = self.population(broad, int(_POPULATION * evaluations))
        clusters = _CLUSTERS_MORE if thorough else _CLUSTERS
        components = self.first(basins, visited, clusters)
        left = evaluations - (self.landscape.evaluations - begun)
        cauchy = StudentT(broad.loc, 1.5 * broad.scale_tril, 1.0)
        found = visited
        for share in _ADAPTING_MORE if thorough else _ADAPTING:
            number = max(int(share * left), 16)
            mixture = [(components, 1 - _BROAD - _CAUCHY), (broad, _BROAD), (cauchy, _CAUCHY)]
            u, log_weight = self.weighted(mixture, number)
            if not bool(log_weight.isfinite().any()):
                continue
            # As much of the weights as leaves enough effective points.
            work = -log_weight
            least = min(len(u) / 2, max(_TEMPERED * len(u), 4.0 * u.shape[1]))
            beta = next_beta(work, 0.0, least)
            components = components.adapted(
                u, torch.where(work < torch.inf, -beta * work, -torch.inf)
            )
            index = stratified_indices(cumulative_weight(u, log_weight), _KERNELS, self.generator)
            found = torch.cat([u[index], visited[:_KERNELS]])
        mixture = [(components, 1 - _BROAD - _CAUCHY), (broad, _BROAD), (cauchy, _CAUCHY)]
        if self.landscape.dim <= _KERNEL_DIM and len(found) > 8:
            kernels = self.kernels(found, broad)
            mixture[0] = (components, 1 - _BROAD - _CAUCHY - _KERNEL_SHARE)
            mixture.append((kernels, _KERNEL_SHARE))
        left = max(evaluations - (self.landscape.evaluations - begun), 64)
        u, log_weight = self.weighted(mixture, left)
        # Ends of starts that are in no basin are known all the same if points go there.
        ends, energies = self.ledger.unlisted, self.ledger.their_energies
        if len(ends):
            log_ratio = -energies - _log_density(mixture, ends)
            mean = float(torch.logsumexp(log_weight, 0)) - math.log(len(u))
            self.lost += int((energies.isinf() | (log_ratio > mean + _KNOWN)).sum())
        return self.summary(u, log_weight, basins, components, broad)

    def worthy(self) -> list[Basin]:
        """The basins that may hold mass."""
        basins = self.ledger.basins
        if not basins:
            return []
        best = basins[0].log_mass
        return [b for b in basins if b.log_mass > best - _NEGLIGIBLE][:_SERVED]

    def broad(self, basins: list[Basin]) -> StudentT:
        """A Student-t law about all basins, or about the lowest points seen."""
        dim = self.landscape.dim
        if basins:
            loc = torch.stack([basin.loc for basin in basins])
            size = torch.stack([basin.tril.norm(dim=-1) for basin in basins])
            middle = loc.mean(0)
            scale = ((loc - middle).square().mean(0) + size.square().amax(0)).sqrt()
        elif len(self.ledger.energies):
            energy = self.ledger.energies
            near = self.ledger.lowest[energy <= energy.amin() + 2 * dim + 10]
            middle, scale = near.mean(0), near.std(0, correction=0)
            scale = torch.where(scale > 0, scale, torch.full_like(scale, self.scale))
        else:
            middle, scale = self.centre, torch.full_like(self.centre, self.scale)
        # The uniform law on a box has a standard deviation of 1 in unbounded coordinates.
        scale = torch.where(self.landscape.two_sided, scale.clamp(min=1.2), 1.5 * scale)
        return StudentT(middle, scale.diag())

    def population(self, broad: StudentT, evaluations: int) -> Tensor:
        """Points of a tempered population, none if it cannot start."""
        size = max(16, min(256, evaluations // 40) // 2 * 2)
        if evaluations < 8 * size:
            return broad.loc[None][:0]
        return tempered_population(
            self.landscape.value,
            broad,
            size=size,
            evaluations=evaluations,
            generator=self.generator,
        )

    def first(self, basins: list[Basin], visited: Tensor, clusters: int) -> _Components:
        """Components at the basins and at clusters of the population."""
        parts: list[tuple[float, StudentT, int]] = []
        df = self.tail()
        if basins:
            log_mass = torch.tensor([basin.log_mass for basin in basins], dtype=torch.float64)
            chance = 0.5 / len(basins) + 0.5 * torch.softmax(log_mass, 0)
            for k, basin in enumerate(basins):
                for width, share in zip(_WIDTHS, _WIDTH_SHARES, strict=True):
                    law = StudentT(basin.loc, width * basin.tril, df)
                    parts.append((0.7 * float(chance[k]) * share, law, k))
        # Ends in none of the basins listed: of a target with more of them, or with valleys.
        ends = self.ledger.unlisted[self.ledger.their_energies.isfinite()]
        for points in (visited, ends):
            if len(points) < 16:
                continue
            label = nearest(points, cells_of(points, self.generator, clusters))
            for k in label.unique():
                members = points[label == k]
                distinct = members.unique(dim=0)
                if len(distinct) > 1:
                    weight = torch.full_like(distinct[:, 0], 1 / len(distinct))
                    loc, tril = moments(distinct, weight)
                    size = len(members) / len(points)
                    parts.append((0.3 * size, StudentT(loc, tril, df), -1))
        return _Components(parts or [(1.0, self.broad(basins), -1)])

    def tail(self) -> float:
        """Degrees of freedom: in many dimensions heavier tails hardly meet the target."""
        dim = self.landscape.dim
        return 5.0 if dim <= 10 else 10.0 if dim <= 20 else 20.0

    def kernels(self, found: Tensor, broad: StudentT) -> KernelDensity:
        distinct, copies = found.unique(dim=0, return_counts=True)
        weight = copies.to(found) / len(found)
        return KernelDensity(distinct, weight, broad, share=0.02, neighbours=8)

    def weighted(self, mixture: list[tuple[Any, float]], number: int) -> tuple[Tensor, Tensor]:
        """Points of a mixture, and their log-weights by its joint density."""
        numbers = [max(1, round(share * number)) for _, share in mixture]
        numbers[0] = max(1, number - sum(numbers[1:]))
        u = torch.cat(
            [law.sample(n, self.generator) for (law, _), n in zip(mixture, numbers, strict=True)]
        )
        log_weight = -self.landscape.value(u) - _log_density(
            [(law, n / len(u)) for (law, _), n in zip(mixture, numbers, strict=True)], u
        )
        return u, log_weight.nan_to_num(-math.inf, math.inf, -math.inf)

    def summary(
        self,
        u: Tensor,
        log_weight: Tensor,
        basins: list[Basin],
        components: _Components,
        broad: StudentT,
    ) -> Witness:
        """Estimates from the last round's weights."""
        weight = torch.softmax(log_weight, 0).nan_to_num(0.0)
        log_z = float(torch.logsumexp(log_weight, 0)) - math.log(len(u))
        ess, log_z_se, shape = 0.0, math.inf, math.inf
        points = u[:0]
        loc, tril = broad.loc, broad.scale_tril
        if bool(log_weight.isfinite().any()):
            ess = float(1 / weight.square().sum())
            log_z_se = math.sqrt(max(1 / ess - 1 / len(u), 0.0))
            shape = pareto_shape(log_weight[log_weight.isfinite()])
            index = stratified_indices(cumulative_weight(u, log_weight), 4096, self.generator)
            points = u[index]
            if ess > u.shape[1]:
                loc, tril = moments(u, weight)
        named = self.named(basins, components)
        regions = self.regions(points, loc, tril, named)
        inside = regions.inside(u)
        masses = weight @ inside
        # Delta method for a ratio of weighted means.
        se = (weight.square() @ (inside - masses).square()).sqrt()
        return Witness(
            "importance sampling",
            self.landscape.evaluations,
            ess,
            log_z,
            log_z_se,
            masses,
            se,
            shape,
            self.coverage(loc, tril, broad, round(_BROAD * len(u))),
            regions,
            self.masses_of(named, regions, inside, weight, masses, se, log_z),
            points,
        )

    def named(
        self, basins: list[Basin], components: _Components
    ) -> list[tuple[Basin, Tensor, Tensor]]:
        """The basins that get a region, with place and scale of their heaviest component."""
        best: dict[int, tuple[float, StudentT]] = {}
        for weight, part, k in zip(
            components.weight.tolist(), components.parts, components.basin, strict=True
        ):
            if k >= 0 and weight > best.get(k, (0.0, part))[0]:
                best[k] = (weight, part)
        order = sorted(best, key=lambda k: -best[k][0])[:_NAMED]
        return [(basins[k], best[k][1].loc, best[k][1].scale_tril) for k in order]

    def regions(
        self,
        points: Tensor,
        loc: Tensor,
        tril: Tensor,
        named: list[tuple[Basin, Tensor, Tensor]],
    ) -> Regions:
        both = torch.cat([self.draws[:4096], points])
        z = torch.linalg.solve_triangular(tril, (both - loc).mT, upper=False).mT
        cells = cells_of(z, self.generator)
        empty = self.draws.new_zeros
        dim = self.landscape.dim
        return Regions(
            loc,
            tril,
            cells,
            clusters_of(cells),
            torch.stack([m for _, m, _ in named]) if named else empty(0, dim),
            torch.stack([t for _, _, t in named]) if named else empty(0, dim, dim),
        )

    def shares(self, witness: Witness) -> Tensor:
        """The sampler's masses of the witness's regions."""
        return witness.regions.inside(self.draws).mean(0)

    def masses_of(
        self,
        named: list[tuple[Basin, Tensor, Tensor]],
        regions: Regions,
        inside: Tensor,
        weight: Tensor,
        masses: Tensor,
        se: Tensor,
        log_z: float,
    ) -> list[BasinMass]:
        if not named:
            return []
        first = len(regions) - len(named)
        share = regions.inside(self.draws)[:, first:].mean(0)
        found = []
        for k, (basin, _, _) in enumerate(named):
            mass = float(masses[first + k])
            if mass < NOTABLE:
                continue
            within = weight * inside[:, first + k]
            x, log_det = self.landscape.coordinates.forward(basin.loc[None])
            found.append(
                BasinMass(
                    x[0].tolist(),
                    basin.energy + float(log_det),
                    mass,
                    float(se[first + k]),
                    log_z + math.log(mass),
                    float(within.sum().square() / within.square().sum().clamp(min=1e-300)),
                    float(share[k]),
                    basin.starts,
                )
            )
        return sorted(found, key=lambda basin: -basin.mass)

    def coverage(self, loc: Tensor, tril: Tensor, broad: StudentT, number: int) -> Coverage:
        """The statement of what was searched; see the module on coverage.

        Points with a density are those starts that go in isotropic directions, or are uniform in
        the box, and the broad points of the last round.
        """
        dim, two_sided = self.landscape.dim, self.landscape.two_sided
        spread = float(tril.diagonal().log().mean().exp())
        starts, points, density = self.starts, 0, -math.inf
        low, high = (f"10^{power:.0f}" for power in LADDER)
        box = self.landscape.coordinates
        if isinstance(box, Bounds) and bool(two_sided.all()):
            region = (
                "searched the box, half of the starts uniformly, half from its corners inwards"
            )
            jacobian = box.forward(loc[None])[1]
            # Widths of the target and the volume of the box, both in the user's coordinates.
            spread *= math.exp(float(jacobian) / dim)
            density = -float((box.high - box.low).log().sum())
            points = (self.points + starts) // 2
        else:
            region = f"searched scales {low} to {high}" + (
                f" times {self.scale:.3g}" if self.scale != 1 else ""
            )
            region += " about the centre" + (
                ", and the box where coordinates are bounded" if bool(two_sided.any()) else ""
            )
            ladder = (LADDER[1] - LADDER[0]) * math.log(10)
            rim = float(((loc - self.centre).square().sum() + dim * spread**2).sqrt())
            if rim > 0 and math.isfinite(rim):
                log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
                density = -(math.log(ladder) + log_area + dim * math.log(rim))
                points = int(0.4 * (self.points + starts))
                # The rim of the target along its principal axes, seen from both sides.
                axes = math.sqrt(dim) * tril.mT
                at_rim = broad.log_prob(torch.cat([loc + axes, loc - axes])).mean()
                both = points * math.exp(density) + number * float(at_rim.exp())
                points += number
                density = math.log(max(both, 1e-300) / points)
        return Coverage(
            region, starts, self.lost, len(self.ledger.basins), points, density, spread, dim
        )

    def tempering(self, evaluations: int, found: Witness) -> Witness | None:
        """Parallel tempering from a normal law twice as wide as the target seems.

        None if no chain can start.
        """
        chains, levels = 48, 12
        points = found.points if len(found.points) else self.ledger.lowest
        if len(points) < 2:
            return None
        loc, scale = points.mean(0), points.std(0, correction=0)
        scale = 2.0 * torch.where(scale > 0, scale, torch.full_like(scale, self.scale))
        like: dict[str, Any] = {
            "dtype": loc.dtype, "device": loc.device, "generator": self.generator
        }  # fmt: skip
        start = loc + scale * torch.randn(chains, len(loc), **like)
        index = torch.randint(len(points), (chains,), generator=self.generator, device=loc.device)
        finite = self.landscape.value(start).isfinite()
        known = points[index]
        usable = self.landscape.value(known).isfinite()
        start = torch.where(finite[:, None], start, known)[finite | usable]
        if len(start) < 8:
            return None
        result = run_mcmc(
            self.landscape.value,
            start,
            evaluations=evaluations,
            generator=self.generator,
            num_levels=levels,
            reference_loc=loc,
            reference_scale=scale,
            num_samples=len(start) * 64,
        )
        assert result.log_z is not None and result.log_z_se is not None
        kept = result.chains  # (kept, chains, dim)
        flat = kept.reshape(-1, len(loc))
        weight = torch.full_like(flat[:, 0], 1 / len(flat))
        middle, tril = moments(flat, weight)
        old = found.regions
        cells = self.regions(
            flat[torch.randperm(len(flat), generator=self.generator, device=flat.device)[:4096]],
            middle,
            tril,
            [],
        )
        regions = Regions(middle, tril, cells.cells, cells.members, old.basin_loc, old.basin_tril)
        by_chain = regions.inside(flat).reshape(kept.shape[0], len(start), -1).mean(0)
        masses = by_chain.mean(0)
        se = by_chain.std(0) / math.sqrt(len(by_chain))
        # Independent chains: the spread of their masses tells how many draws they are worth.
        binomial = masses * (1 - masses)
        worth = (binomial.sum() / se.square().sum().clamp(min=1e-12)).clamp(max=len(flat))
        return Witness(
            "parallel tempering",
            self.landscape.evaluations,
            float(worth),
            float(result.log_z),
            float(result.log_z_se),
            masses,
            se,
            math.nan,
            found.coverage,
            regions,
            found.basins,
            flat,
        )
