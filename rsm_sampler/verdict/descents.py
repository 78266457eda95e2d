r"""Basins of an energy, found by descents from starts that owe nothing to a sampler.

**The law of the starts.** With a centre c and a scale s, which the user may have given (0 and 1 if
not), in unbounded coordinates

.. math:: u = c + s \, 10^a v, \qquad a \sim \mathcal U(-4, 5),

and directions v of four kinds, since modes of posteriors often lie along coordinates: normal
vectors (40 %), random signs (20 %), one coordinate (20 %), all coordinates alike (20 %). Where
coordinates are bounded on both sides, half of the starts are uniform over the box in these, and
half on a ladder of :math:`a \in (-1, 3/2)` in logit coordinates, which reaches the corners.

**After these** more starts are sent out, which are not counted as independent: on a star of all
coordinate axes and the diagonal about the heaviest basins, about all basins found so far on a
ladder of scales of their own widths, where coordinates of two basins cross, and from those of some
thousand broad points whose energy is below what the basins found so far explain.

Each start goes downhill by L-BFGS, all of them at once. Two ends lie in one basin if the quadratic
form of the curvature at the lower one joins them, or if the energy half-way is not higher.

References:
    | On the limited memory BFGS method for large scale optimization (Liu and Nocedal, 1989)
    | https://doi.org/10.1007/BF01589116
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.target.gradients import difference_hessian
from rsm_sampler.verdict.landscape import Landscape

__all__ = ["Basin", "Ledger", "descend", "draw_starts", "find_basins"]

LADDER = (-4.0, 5.0)  # powers of ten in which starts spread, about the centre
_LOGIT_LADDER = (-1.0, 1.5)  # likewise in logit coordinates: 10^1.5 is 1e-14 from a bound
_ABOUT = (-1.5, 2.5)  # likewise about a basin, in its widths
_KINDS = (0.4, 0.6, 0.8)  # shares of the directions, cumulated
_BLUR = 0.05  # of a direction that is not a normal vector, so that none is hit exactly

_MEMORY = 8  # pairs of L-BFGS
_WATCHED = 5  # energies that a step may not exceed
_LONGEST = 60  # steps of a descent: at rest after 5 to 40 of them where the energy is smooth
_RUNGS = 8  # of the ladder on each ray of a star
_STARS = 4  # basins about which a star is drawn
_QUIET = 3  # rounds without a new basin, after which no more starts are sent out
_AT_REST = 3e-3  # nats that a further step would gain
_STUCK = 1e-7  # of the first step: there a descent that no step improves ends

_JOINED = 1.0  # nats between ends of one basin
_NEAR = 60.0  # nats of the quadratic form within which a point half-way is asked
_MOST = 64  # basins of which curvatures are computed: more are no task for a mixture
_HIGH = (20.0, 7.0)  # nats above the lowest, and per dimension: the bottom of a basin higher than
# that has no mass unless it is a thousand times as wide in every coordinate
_PICKED = 64  # broad points followed downhill
_FREE, _TOO_HIGH = -1, -2  # labels of ends that no basin has
_UNEXPLAINED = 3.0  # nats below what the basins found explain


@dataclass(frozen=True)
class Basin:
    """A basin of the energy.

    Attributes:
        loc: Its lowest point, in unbounded coordinates, (dim).
        energy: The energy there.
        tril: Cholesky factor of the inverse curvature, (dim, dim).
        log_mass: Its mass by Laplace's approximation, up to the target's constant.
        starts: How many independent starts ended in it.
        ends: How many of all starts did.
    """

    loc: Tensor
    energy: float
    tril: Tensor
    log_mass: float
    starts: int
    ends: int


@dataclass
class Ledger:
    """What the descents found.

    Attributes:
        basins: The basins, the heaviest first.
        starts: Number of independent starts of the stated law.
        lost: How many of them ended in basins beyond those listed.
        points: Number of broad points with a density.
        evaluations: Energy evaluations spent.
        lowest: The end points of all descents, for what the basins do not describe.
        energies: Their energies.
    """

    basins: list[Basin] = field(default_factory=list)
    starts: int = 0
    lost: int = 0
    points: int = 0
    evaluations: int = 0
    lowest: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    energies: Tensor = field(default_factory=lambda: torch.zeros(0))


def draw_starts(
    n: int,
    centre: Float[Tensor, " dim"],
    scale: float,
    two_sided: Float[Tensor, " dim"] | Tensor,
    generator: torch.Generator,
) -> Float[Tensor, "n dim"]:
    """Independent starts of the law in the module's docstring.

    Arguments:
        n: How many.
        centre: The centre, in unbounded coordinates.
        scale: The scale.
        two_sided: Which coordinates are bounded on both sides, (dim).
        generator: Source of randomness.
    """
    like: dict[str, Any] = {
        "dtype": centre.dtype, "device": centre.device, "generator": generator
    }  # fmt: skip
    v = _directions(n, len(centre), like)
    power = torch.rand(n, 1, **like)
    free = LADDER[0] + (LADDER[1] - LADDER[0]) * power
    boxed = _LOGIT_LADDER[0] + (_LOGIT_LADDER[1] - _LOGIT_LADDER[0]) * power
    u = centre + torch.where(two_sided, 10**boxed * v, scale * 10**free * v)
    uniform = torch.rand(n, len(centre), **like).clamp(1e-15, 1 - 1e-15)
    inside = torch.rand(n, 1, **like) < 0.5
    return torch.where(two_sided & inside, torch.logit(uniform), u)


def _directions(n: int, dim: int, like: dict[str, Any]) -> Tensor:
    normal = torch.randn(n, dim, **like)
    kind = torch.rand(n, 1, **like)
    sign = normal.sign()
    one = torch.nn.functional.one_hot(
        torch.randint(dim, (n,), generator=like["generator"], device=normal.device), dim
    ).to(normal)
    length = 1 + 0.3 * torch.randn(n, 1, **like)
    blur = _BLUR * torch.randn(n, dim, **like)
    special = torch.where(
        kind < _KINDS[1], sign, torch.where(kind < _KINDS[2], one * sign, sign[:, :1])
    )
    return torch.where(kind < _KINDS[0], normal, length * special + blur)


def descend(
    landscape: Landscape,
    start: Float[Tensor, "n dim"],
    length: Float[Tensor, " n"],
    steps: int = _LONGEST,
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Downhill by L-BFGS from many starts at once; each ends by itself.

    Arguments:
        landscape: The energy.
        start: Where descents begin.
        length: About how long each one's first step is.
        steps: Most steps.

    Returns:
        Where they ended, the energies there (infinite for a start of infinite energy), and a
        width for each: the square root of the last inverse curvature seen.
    """
    x = start.clone()
    width = length.clone()
    energy, slope = landscape.value_and_slope(x, 0.01 * length[:, None])
    active = energy.isfinite().nonzero()[:, 0]
    slope, first = slope[active], length[active].clone()
    before = energy[active].expand(_WATCHED, -1).clone()
    shorter = torch.ones_like(first)
    pairs, changes = (x.new_zeros((_MEMORY, len(active), x.shape[1])) for _ in range(2))
    for i in range(steps):
        if len(active) == 0:
            break
        step, gamma = _quasi_newton(slope, pairs, changes, first)
        gain = -0.5 * (step * slope).sum(-1)
        step = shorter[:, None] * step
        still = (gain < _AT_REST) & gamma.isfinite() | (shorter < _STUCK)
        width[active] = torch.where(gamma.isfinite(), gamma.sqrt(), width[active])
        if bool(still.any()):
            active, slope, first, shorter, step = (
                t[~still] for t in (active, slope, first, shorter, step)
            )
            before, pairs, changes = before[:, ~still], pairs[:, ~still], changes[:, ~still]
            if len(active) == 0:
                break
        reach = step.norm(dim=-1, keepdim=True) / math.sqrt(step.shape[1])
        trial = x[active] + step
        trial_energy, trial_slope = landscape.value_and_slope(trial, 0.05 * reach)
        down = (trial_energy <= before.amax(0)) & trial_energy.isfinite()
        change = trial_slope - slope
        bent = (step * change).sum(-1) > 1e-12 * step.norm(dim=-1) * change.norm(dim=-1)
        kept = (down & bent)[:, None]
        x[active] = torch.where(down[:, None], trial, x[active])
        energy[active] = torch.where(down, trial_energy, energy[active])
        slope = torch.where(down[:, None], trial_slope, slope)
        # Where the energy bends away, steps grow until it does not.
        first = torch.where(down & ~bent, 3 * first, first)
        shorter = torch.where(down, (4 * shorter).clamp(max=1.0), 0.25 * shorter)
        # A row of zeros is passed over. Only rows that learned something move on.
        moved = torch.cat([pairs[1:], step[None]]), torch.cat([changes[1:], change[None]])
        pairs = torch.where(kept, moved[0], pairs)
        changes = torch.where(kept, moved[1], changes)
        before[i % _WATCHED] = energy[active]
    return x, energy, width


def _quasi_newton(
    slope: Tensor, pairs: Tensor, changes: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """The step of L-BFGS for each row, and the inverse curvature that it began from.

    Rows without a pair go down the gradient by their first length, and have no curvature.
    """
    dot = (pairs * changes).sum(-1)
    inverse = torch.where(dot > 0, 1 / dot.clamp(min=1e-300), 0.0)
    direction, coefficients = slope.clone(), []
    for k in reversed(range(len(pairs))):
        a = inverse[k] * (pairs[k] * direction).sum(-1)
        direction = direction - a[:, None] * changes[k]
        coefficients.append(a)
    gamma = dot[-1] / changes[-1].square().sum(-1).clamp(min=1e-300)
    known = dot[-1] > 0
    direction = torch.where(known[:, None], gamma[:, None] * direction, direction)
    for k, a in zip(range(len(pairs)), reversed(coefficients), strict=True):
        b = inverse[k] * (changes[k] * direction).sum(-1)
        direction = direction + (a - b)[:, None] * pairs[k]
    plain = first[:, None] * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    step = -torch.where(known[:, None], direction, plain)
    return step, torch.where(known, gamma, torch.inf)


def find_basins(
    landscape: Landscape,
    centre: Float[Tensor, " dim"],
    scale: float,
    evaluations: int,
    generator: torch.Generator,
) -> Ledger:
    """Look for basins by descents.

    A third of the evaluations goes to independent starts, a sixth to broad points, the rest to
    starts about the basins found and to curvatures.

    Arguments:
        landscape: The energy.
        centre: Where the user said to look, in unbounded coordinates.
        scale: How wide.
        evaluations: About how many evaluations; a batch of descents may exceed it.
        generator: Source of randomness.
    """
    search = _Search(landscape, centre, scale, generator, evaluations // 4)
    begun = landscape.evaluations

    def left(share: float) -> int:
        return int(share * evaluations) - (landscape.evaluations - begun)

    batch = search.affordable(left(1 / 3), 64)
    while batch > 0:
        search.independent(batch)
        batch = search.affordable(left(1 / 3), 256)
    for k in range(_STARS):
        if k < len(search.basins):
            search.star(k, search.affordable(left(0.6), 4096))
    quiet = 0
    while search.basins and quiet < _QUIET:
        known = len(search.basins)
        number = search.affordable(left(0.8), 96)
        if number < 1:
            break
        search.about(number)
        quiet = quiet + 1 if len(search.basins) == known else 0
    search.broad(min(evaluations // 6, 8192))
    return search.ledger(landscape.evaluations - begun)


class _Search:
    def __init__(
        self,
        landscape: Landscape,
        centre: Tensor,
        scale: float,
        generator: torch.Generator,
        for_curvatures: int,
    ) -> None:
        self.landscape, self.centre, self.scale = landscape, centre, scale
        self.generator = generator
        self.like: dict[str, Any] = {
            "dtype": centre.dtype, "device": centre.device, "generator": generator
        }  # fmt: skip
        self.basins: list[_Found] = []
        self.starts = self.lost = self.points = 0
        self.descents, self.spent = 0, 0
        self.for_curvatures = for_curvatures  # evaluations left for them
        self.ends: list[tuple[Tensor, Tensor]] = []

    def affordable(self, evaluations: int, most: int) -> int:
        """How many descents that many evaluations pay for."""
        cost = 20 * self.landscape.slope_cost()
        if self.descents:
            cost = max(1, self.spent // self.descents)
        return min(most, evaluations // cost)

    def independent(self, number: int) -> None:
        two_sided = self.landscape.two_sided
        start = draw_starts(number, self.centre, self.scale, two_sided, self.generator)
        length = 0.1 * (start - self.centre).norm(dim=-1).clamp(min=1e-4 * self.scale)
        self.starts += number
        self._follow(start, length, independent=True)

    def star(self, rank: int, most: int) -> None:
        """Starts on rays from one of the heaviest basins, evenly over a ladder of its widths."""
        basin = sorted(self.basins, key=lambda basin: -basin.log_mass)[rank]
        dim = len(basin.loc)
        eye = torch.eye(dim, dtype=basin.loc.dtype, device=basin.loc.device)
        axis = torch.cat([eye, torch.ones_like(eye[:1])] if dim > 1 else [eye])
        axis = torch.cat([axis, -axis])
        rung = torch.arange(_RUNGS, dtype=eye.dtype, device=eye.device)
        rung = rung + torch.rand(len(axis), 1, **self.like)
        power = _ABOUT[0] + (_ABOUT[1] - _ABOUT[0]) * rung / _RUNGS
        jump = (10**power)[..., None] * axis[:, None] * basin.tril.norm(dim=-1)
        jump = jump.reshape(-1, dim)
        if len(jump) > most:
            order = torch.randperm(len(jump), generator=self.generator, device=jump.device)
            jump = jump[order[:most]]
        if len(jump):
            self._follow(basin.loc + jump, 0.1 * jump.norm(dim=-1), independent=False)

    def about(self, number: int) -> None:
        """Starts about the basins found, and where coordinates of two of them cross."""
        loc = torch.stack([basin.loc for basin in self.basins])
        size = torch.stack([basin.tril.norm(dim=-1) for basin in self.basins])
        # Basins of little mass attract half of the interest only.
        order = torch.tensor([basin.log_mass for basin in self.basins], dtype=loc.dtype)
        chance = 0.5 / len(loc) + 0.5 * torch.softmax(order.to(loc), 0)
        pick = torch.multinomial(chance, number, replacement=True, generator=self.generator)
        v = _directions(number, loc.shape[1], self.like)
        power = _ABOUT[0] + (_ABOUT[1] - _ABOUT[0]) * torch.rand(number, 1, **self.like)
        jump = 10**power * v * size[pick]
        start = loc[pick] + jump
        length = 0.1 * jump.norm(dim=-1)
        if len(loc) > 1:
            other = torch.randint(len(loc), (number,), generator=self.generator, device=loc.device)
            mask = torch.rand(start.shape, **self.like) < 0.5
            crossed = torch.where(mask, loc[pick], loc[other])
            apart = (loc[pick] - loc[other]).norm(dim=-1)
            quarter = (torch.rand(number, 1, **self.like) < 0.25) & (apart > 0)[:, None]
            crossed = crossed + 0.1 * size[pick] * torch.randn(start.shape, **self.like)
            start = torch.where(quarter, crossed, start)
            length = torch.where(quarter[:, 0], 0.1 * size[pick].norm(dim=-1), length)
        self._follow(start, length, independent=False)

    def broad(self, number: int) -> None:
        """Broad points, and descents from some whose energy no basin found so far explains."""
        if number < 1:
            return
        two_sided = self.landscape.two_sided
        u = draw_starts(number, self.centre, self.scale, two_sided, self.generator)
        energy = self.landscape.value(u)
        self.points += number
        unexplained = energy.isfinite() & (energy < self._explained(u) - _UNEXPLAINED)
        index = unexplained.nonzero()[:, 0]
        if len(index) == 0:
            return
        half = _PICKED // 2
        lowest = index[energy[index].argsort()[:half]]
        shuffled = torch.randperm(len(index), generator=self.generator, device=u.device)
        index = torch.cat([lowest, index[shuffled[:half]]]).unique()
        length = 0.1 * (u[index] - self.centre).norm(dim=-1).clamp(min=1e-4 * self.scale)
        self._follow(u[index], length, independent=False)

    def _explained(self, u: Tensor) -> Tensor:
        """The lowest of the quadratic forms of the basins found, (n)."""
        lowest = torch.full_like(u[:, 0], math.inf)
        for basin in self.basins:
            lowest = torch.minimum(lowest, basin.energy + basin.quadratic(u))
        return lowest

    def _follow(self, start: Tensor, length: Tensor, *, independent: bool) -> None:
        before = self.landscape.evaluations
        x, energy, width = descend(self.landscape, start, length)
        self.descents += len(start)
        self.spent += self.landscape.evaluations - before
        finite = energy.isfinite()
        x, energy, width = x[finite], energy[finite], width[finite]
        self.ends.append((x, energy))
        label = self._labelled(x, energy)
        if len(x) == 0:
            return
        free = (label == _FREE).nonzero()[:, 0]
        bottom = min([float(energy.amin())] + [basin.energy for basin in self.basins])
        high = bottom + _HIGH[0] + _HIGH[1] * self.landscape.dim
        label[free[energy[free] > high]] = _TOO_HIGH
        free = (label == _FREE).nonzero()[:, 0]
        while len(free) and len(self.basins) < _MOST and self.for_curvatures > 0:
            lowest = free[energy[free].argmin()]
            before = self.landscape.evaluations
            basin = self._described(x[lowest], float(energy[lowest]), width[lowest])
            self.for_curvatures -= self.landscape.evaluations - before
            self.basins.append(basin)
            label[free] = torch.where(
                self._belongs(x[free], energy[free], basin), len(self.basins) - 1, _FREE
            )
            label[lowest] = len(self.basins) - 1
            free = (label == _FREE).nonzero()[:, 0]
        for k, basin in enumerate(self.basins):
            number = int((label == k).sum())
            basin.ends += number
            basin.starts += number if independent else 0
        if independent:
            self.lost += int((label == _FREE).sum())

    def _labelled(self, x: Tensor, energy: Tensor) -> Tensor:
        label = torch.full((len(x),), _FREE, dtype=torch.long, device=x.device)
        for k, basin in enumerate(self.basins):
            free = (label == _FREE).nonzero()[:, 0]
            if len(free) == 0:
                break
            # A lower end is another basin's, or this one had not been followed to its bottom.
            inside = self._belongs(x[free], energy[free], basin)
            label[free[inside]] = k
        return label

    def _belongs(self, x: Tensor, energy: Tensor, basin: "_Found") -> Tensor:
        """Which ends lie in a basin: joined by its quadratic form, or by a point half-way."""
        form = basin.quadratic(x)
        level = (energy - basin.energy).abs() < _JOINED
        inside = (form < _JOINED) & level
        ask = ((form < _NEAR) & (energy > basin.energy - _JOINED) & ~inside).nonzero()[:, 0]
        if len(ask):
            half_way = self.landscape.value(0.5 * (x[ask] + basin.loc))
            top = torch.minimum(energy[ask], 0.5 * (energy[ask] + basin.energy) + _JOINED)
            inside[ask] = half_way <= torch.maximum(
                top.clamp(max=basin.energy + 3 * _JOINED), half_way.new_tensor(basin.energy)
            )
        return inside

    def _described(self, loc: Tensor, energy: float, width: Tensor) -> "_Found":
        tril = self._inverse_curvature(loc, energy, float(width))
        log_det = float(tril.diagonal().log().sum())
        return _Found(loc, energy, tril, -energy + log_det)

    def _inverse_curvature(self, loc: Tensor, energy: float, width: float) -> Tensor:
        """Cholesky factor of the inverse of the curvature, its eigenvalues made positive."""
        dim = len(loc)
        eye = torch.eye(dim, dtype=loc.dtype, device=loc.device)
        size = torch.full_like(loc, max(width, 1e-12))
        # Lengths over which the energy rises by about one half, by coordinate.
        for _ in range(8):
            ends = self.landscape.value(torch.cat([loc + size.diag(), loc - size.diag()]))
            rise = (0.5 * (ends[:dim] + ends[dim:]) - energy).nan_to_num(1e6, 1e6, -1e6)
            right = (rise > 0.1) & (rise < 2.0)
            if bool(right.all()):
                break
            factor = (0.5 / rise.clamp(min=1e-3)).sqrt().clamp(0.05, 20.0)
            size = torch.where(right, size, size * factor).clamp(1e-12, 1e12)
        h = 0.5 * size
        if self.landscape.differentiable:
            points = torch.cat([loc + h.diag(), loc - h.diag()])
            _, slope = self.landscape.value_and_slope(points, h.mean().expand(2 * dim, 1))
            scaled = (slope[:dim] - slope[dim:]) / 2 * size / h[:, None] * size[:, None]
        else:
            hessian = difference_hessian(self.landscape.value, loc[None], step=h[None])[0]
            scaled = hessian * size * size[:, None]
        scaled = 0.5 * (scaled + scaled.mT).nan_to_num(0.0, 0.0, 0.0)
        value, vector = torch.linalg.eigh(scaled)
        value = torch.where(value > 1e-4, value, value.abs().clamp(min=0.05)).clamp(max=1e4)
        root = size[:, None] * vector * value.rsqrt()
        covariance = root @ root.mT
        jitter = 1e-10 * covariance.diagonal().diag()
        factor, info = torch.linalg.cholesky_ex(covariance + jitter)
        return factor if int(info) == 0 else (size[:, None] * eye)

    def ledger(self, evaluations: int) -> Ledger:
        basins = sorted(self.basins, key=lambda basin: -basin.log_mass)
        x = [end for end, _ in self.ends] or [self.centre[None][:0]]
        energy = [value for _, value in self.ends] or [self.centre[:0]]
        return Ledger(
            [Basin(b.loc, b.energy, b.tril, b.log_mass, b.starts, b.ends) for b in basins],
            self.starts,
            self.lost,
            self.points,
            evaluations,
            torch.cat(x),
            torch.cat(energy),
        )


@dataclass
class _Found:
    loc: Tensor
    energy: float
    tril: Tensor
    log_mass: float
    starts: int = 0
    ends: int = 0

    def quadratic(self, u: Tensor) -> Tensor:
        """Half the squared distance in the metric of the curvature, (n)."""
        z = torch.linalg.solve_triangular(self.tril, (u - self.loc).mT, upper=False)
        return 0.5 * z.square().sum(0)
