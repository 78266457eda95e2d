r"""Basins of an energy, found by descents from starts that owe nothing to a sampler.

**The law of the starts.** With a centre c and a scale s, which the user may have given (0 and 1 if
not), in unbounded coordinates

.. math:: u = c + s \, 10^a v, \qquad a \sim \mathcal U(-4, 5),

and directions v of four kinds, since modes of posteriors often lie along coordinates: normal
vectors (40 %), random signs (20 %), one coordinate (20 %), all coordinates alike (20 %). Where
coordinates are bounded on both sides, half of the starts are uniform over the box in these, and
half on a ladder of :math:`a \in (-1, 9/10)` in unbounded coordinates, which reaches the corners.

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
_BOXED_LADDER = (-1.0, 0.9)  # likewise between two bounds: 10^0.9 is 1e-15 from one of them
_ABOUT = (-1.5, 2.5)  # likewise about a basin, in its widths
_SHELLS = (0.3, 2.0)  # likewise, in all directions alike
_KINDS = (0.4, 0.6, 0.8)  # shares of the directions, cumulated
_BLUR = 0.05  # of a direction that is not a normal vector, so that none is hit exactly

_MEMORY = 8  # pairs of L-BFGS
_WATCHED = 5  # energies that a step may not exceed
_LONGEST = 60  # steps of a descent: at rest after 5 to 40 of them where the energy is smooth
_RUNGS = 16  # of the ladder on each ray of a star: a factor of 1.8 from one to the next
_STARS = 4  # basins about which a star is drawn
_QUIET = 3  # rounds without a new basin, after which no more starts are sent out
_AT_REST = 3e-3  # nats that a further step would gain
_STUCK = 1e-7  # of the first step: there a descent that no step improves ends

_JOINED = 1.0  # nats between ends of one basin
_NEAR = 60.0  # nats of the quadratic form within which a point half-way is asked
_MOST = 64  # basins of which curvatures are computed: more are no task for a mixture
_HIGH = (20.0, 7.0)  # nats above the lowest, and per dimension: the bottom of a basin higher than
# that has no mass unless it is a thousand times as wide in every coordinate
_SCREENED = 256  # starts about basins in a round, most of which one evaluation dismisses
_PICKED = 96  # of those that are not dismissed followed downhill in a round, at most
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
        points: Number of broad points with a density.
        evaluations: Energy evaluations spent.
        lowest: The end points of all descents, for what the basins do not describe.
        energies: Their energies.
        unlisted: Where those of them ended that are in none of the basins, (n, dim).
        their_energies: The energies there, (n); infinite for those that had not come to rest.
    """

    basins: list[Basin] = field(default_factory=list)
    starts: int = 0
    points: int = 0
    evaluations: int = 0
    lowest: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    energies: Tensor = field(default_factory=lambda: torch.zeros(0))
    unlisted: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    their_energies: Tensor = field(default_factory=lambda: torch.zeros(0))


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
    boxed = _BOXED_LADDER[0] + (_BOXED_LADDER[1] - _BOXED_LADDER[0]) * power
    u = centre + torch.where(two_sided, 10**boxed * v, scale * 10**free * v)
    uniform = torch.rand(n, len(centre), **like).clamp(1e-15, 1 - 1e-15)
    inside = torch.rand(n, 1, **like) < 0.5
    return torch.where(two_sided & inside, torch.special.ndtri(uniform), u)


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
    evaluations: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Downhill by L-BFGS from many starts at once; each ends by itself.

    Arguments:
        landscape: The energy.
        start: Where descents begin.
        length: About how long each one's first step is.
        steps: Most steps.
        evaluations: No step begins after so many.

    Returns:
        Where they ended, (n, dim); the energies there, (n), infinite for a start of infinite
        energy; a width for each, (n), the square root of the last inverse curvature seen; and
        whether it came to rest, at a bottom or a wall, (n).
    """
    x, begun = start.clone(), landscape.evaluations
    width = length.clone()
    ended = torch.ones_like(width, dtype=torch.bool)
    energy, slope = landscape.value_and_slope(x, 0.01 * length[:, None])
    active = energy.isfinite().nonzero()[:, 0]
    slope, first = slope[active], length[active].clone()
    before = energy[active].expand(_WATCHED, -1).clone()
    shorter = torch.ones_like(first)
    pairs, changes = (x.new_zeros((_MEMORY, len(active), x.shape[1])) for _ in range(2))
    for i in range(steps):
        if len(active) == 0 or landscape.evaluations - begun > evaluations:
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
    ended[active] = False
    return x, energy, width, ended


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

    A third of the evaluations goes to independent starts, the rest to starts about the basins
    found, to broad points, and to curvatures.

    Arguments:
        landscape: The energy.
        centre: Where the user said to look, in unbounded coordinates.
        scale: How wide.
        evaluations: About how many evaluations; a batch of descents may exceed it.
        generator: Source of randomness.
    """
    search = _Search(landscape, centre, scale, generator, evaluations)
    begun = landscape.evaluations

    def left(share: float) -> int:
        return int(share * evaluations) - (landscape.evaluations - begun)

    batch = search.affordable(left(1 / 3), 64)
    while batch > 0:
        search.independent(batch)
        batch = search.affordable(left(1 / 3), 256)
    for k in range(_STARS):
        if k < len(search.basins) and left(0.6) > 0:
            search.star(k, left(0.6) // 2)
    if search.basins:
        search.shells(int(0.7 * left(0.85)))
    quiet = 0
    while search.basins and quiet < _QUIET and left(0.9) > 0:
        known = len(search.basins)
        search.about(min(_SCREENED, left(0.9) // 2))
        quiet = quiet + 1 if len(search.basins) == known else 0
    search.broad(max(0, min(left(0.97), evaluations // 6)))
    return search.ledger(landscape.evaluations - begun)


class _Search:
    def __init__(
        self,
        landscape: Landscape,
        centre: Tensor,
        scale: float,
        generator: torch.Generator,
        evaluations: int,
    ) -> None:
        self.landscape, self.centre, self.scale = landscape, centre, scale
        self.generator = generator
        self.like: dict[str, Any] = {
            "dtype": centre.dtype, "device": centre.device, "generator": generator
        }  # fmt: skip
        self.basins: list[_Found] = []
        self.starts = self.points = 0
        self.unlisted: list[tuple[Tensor, Tensor]] = []
        self.descents, self.spent = 0, 0
        self.for_curvatures = evaluations // 4  # evaluations left for them
        self.for_slow = evaluations // 8  # likewise, for descents that take long
        self.end = landscape.evaluations + evaluations  # no descent goes on beyond it
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
        self._screened(basin.loc + jump, 0.1 * jump.norm(dim=-1))

    def shells(self, number: int) -> None:
        """Points in all directions about the basins found, at distances of 2 to 100 widths.

        In many dimensions a narrower mode is seen from a small part of all directions only, so
        that these are many.
        """
        pick = torch.randint(
            len(self.basins),
            (max(0, number),),
            generator=self.generator,
            device=self.like["device"],
        )
        for k in pick.unique().tolist():
            basin, n = self.basins[k], int((pick == k).sum())
            v = torch.randn(n, len(basin.loc), **self.like)
            v = v / v.norm(dim=-1, keepdim=True)
            power = _SHELLS[0] + (_SHELLS[1] - _SHELLS[0]) * torch.rand(n, 1, **self.like)
            jump = 10**power * (v @ basin.tril.mT)
            self._screened(basin.loc + jump, 0.1 * jump.norm(dim=-1))

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
        self._screened(start, length)

    def _screened(self, start: Tensor, length: Tensor) -> None:
        """Descents from those starts whose energy no basin found so far explains.

        Where it does, one evaluation was enough. Of many others the lowest half, and some at
        random, as far as evaluations last.
        """
        if len(start) == 0:
            return
        energy = self.landscape.value(start)
        index = energy.isfinite() & (energy < self._explained(start) - _UNEXPLAINED)
        chosen = index.nonzero()[:, 0]
        most = self.affordable((self.end - self.landscape.evaluations) // 2, _PICKED)
        if len(chosen) > most:
            lowest = chosen[energy[chosen].argsort()[: most // 2]]
            shuffled = torch.randperm(len(chosen), generator=self.generator, device=start.device)
            chosen = torch.cat([lowest, chosen[shuffled[: most - most // 2]]]).unique()
        if len(chosen):
            self._follow(start[chosen], length[chosen], independent=False)

    def broad(self, number: int) -> None:
        """Broad points, and descents from some whose energy no basin found so far explains."""
        if number < 1:
            return
        two_sided = self.landscape.two_sided
        u = draw_starts(number, self.centre, self.scale, two_sided, self.generator)
        self.points += number
        self._screened(u, 0.1 * (u - self.centre).norm(dim=-1).clamp(min=1e-4 * self.scale))

    def _explained(self, u: Tensor) -> Tensor:
        """The lowest of the quadratic forms of the basins found, (n)."""
        lowest = torch.full_like(u[:, 0], math.inf)
        for basin in self.basins:
            lowest = torch.minimum(lowest, basin.energy + basin.quadratic(u))
        return lowest

    def _follow(self, start: Tensor, length: Tensor, *, independent: bool) -> None:
        before = self.landscape.evaluations
        left = self.end - before
        x, energy, width, ended = descend(self.landscape, start, length, evaluations=left)
        self.descents += len(start)
        self.spent += self.landscape.evaluations - before
        kept = energy.isfinite()
        if not independent and self.landscape.evaluations >= self.end:
            kept &= ended  # the others were cut short, and are not counted
        x, energy, width, ended = x[kept], energy[kept], width[kept], ended[kept]
        self.ends.append((x, energy))
        if len(x) == 0:
            return
        label = self._labelled(x, energy)
        free = (label == _FREE).nonzero()[:, 0]
        bottom = min([float(energy.amin())] + [basin.energy for basin in self.basins])
        high = bottom + _HIGH[0] + _HIGH[1] * self.landscape.dim
        label[free[(energy[free] > high) & ended[free]]] = _TOO_HIGH
        free = (label == _FREE).nonzero()[:, 0]
        while len(free) and len(self.basins) < _MOST:
            if float(energy[free].amin()) > high:
                break
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
            free = (label == _FREE).nonzero()[:, 0]
            self._trace(x[free], energy[free], width[free], ended[free], high)

    def _trace(self, x: Tensor, energy: Tensor, width: Tensor, ended: Tensor, high: float) -> None:
        """Follow independent starts that take long to their ends, to know what is there.

        They make no basins: far down in a valley without a bottom each would be one.
        """
        slow = (~ended & (energy > high)).nonzero()[:, 0]
        if len(slow) and self.for_slow > 0:
            begun = self.landscape.evaluations
            x[slow], energy[slow], width[slow], ended[slow] = descend(
                self.landscape, x[slow], width[slow], 3 * _LONGEST, evaluations=self.for_slow
            )
            self.for_slow -= self.landscape.evaluations - begun
        label = self._labelled(x, energy)
        for k, basin in enumerate(self.basins):
            number = int((label == k).sum())
            basin.ends += number
            basin.starts += number
        free = (label == _FREE) & ~(ended & (energy > high))
        resting = torch.where(ended[free] | (energy[free] <= high), energy[free], torch.inf)
        self.unlisted.append((x[free], resting))

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
        if len(ask) and self.landscape.evaluations < self.end:
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
        if self.for_curvatures < 6 * dim:  # the width of the descent's last step has to do
            return size.diag()
        # Lengths over which the energy rises by about one half, by coordinate.
        for _ in range(8):
            ends = self.landscape.value(torch.cat([loc + size.diag(), loc - size.diag()]))
            # Of both sides the steeper: on a slope, too, a width is where the energy changes.
            rise = torch.maximum((ends[:dim] - energy).abs(), (ends[dim:] - energy).abs())
            rise = rise.nan_to_num(1e6, 1e6, 1e6)
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
            self.points,
            evaluations,
            torch.cat(x),
            torch.cat(energy),
            torch.cat([end for end, _ in self.unlisted] or [self.centre[None][:0]]),
            torch.cat([value for _, value in self.unlisted] or [self.centre[:0]]),
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
