r"""Every basin of the energy that any phase of exploration has seen.

A basin is a minimum with the curvature there. An end x of a descent belongs to it if it lies
within three widths of the minimum and its energy is what the curvature says,

.. math:: q = \tfrac12 (x - m)^\top H (x - m) \le \tfrac92, \qquad |E(x) - E(m) - q| \le 1.

How many *independent*
starts ended in each basin says what could still be missing
(:mod:`rsm_sampler.verdict.coverage`); starts that were chosen with what is known do not count.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsm_sampler.target.gradients import difference_hessian
from rsm_sampler.target.problem import Problem

__all__ = ["Basin", "Ledger"]

_WITHIN = 4.5  # nats above the minimum: three widths
_SLACK = 1.0  # nats that a descent may have left
_FORETOLD = 0.01  # of the rise over a minimum: so well curvatures foretell an energy far away
_WIDEST = 4.0  # widths of a basin, in units of the broad law's
_SMALL, _STEP = 1e-3, 0.1  # differences of slopes: of the broad law's widths, then of the basin's
_STEEP, _SHRUNK, _SHRINKS = 3.0, 0.1, 10  # times the rise that slopes say; factor, times
_HIGHEST = 10.0  # nats of rise over which differences of values are taken
_NEWTON = 10
_FAR_WIDER = 100.0  # than that, if the energy rises there as the curvature says
_LOW, _BENT, _HIGH = 0.2, 2.0, 8.0  # nats at a width, a half if the curvature foretells all
_HALVINGS = 12
_NEIGHBOURS = 2  # minima that may share a valley with a new one
_BETWEEN = (0.1592, 0.3679, 0.618, 0.8409)  # of the way there: in a lattice not all are minima
_ASIDE = 0.05  # of the broad law's widths, from a saddle
_STEEPEST = 1e24  # curvature, in inverse squares of the widest
_RARE = 0.4  # of an equal share of the starts
_MOST = 256  # basins with a curvature, at first
_FEW = 64  # of them, from where on only separate minima in quadratic wells are held
_ALONE = 0.6  # of the starts: of 64 starts in as many equal basins 37 % are alone


@dataclass
class Basin:
    """One basin.

    Attributes:
        x: Its minimum, in unbounded coordinates, (dim).
        energy: The energy there, in nats.
        factor: A root of the inverse curvature there, (dim, dim).
        starts: Independent starts that ended in it.
        others: Other starts that did: of line scans, of populations.
        mass: Estimate of its share of the target; NaN before there is one.
        mass_se: Its standard error.
        scanned: Whether lines through it were looked along.
        bent: Whether the energy is not quadratic there: it rises by far more than the curvature
            says, along a valley that bends.
        beside: Another minimum of the same valley, in which its starts and its mass are counted;
            None if it is the first of its own.
    """

    x: Tensor
    energy: float
    factor: Tensor
    starts: int = 0
    others: int = 0
    mass: float = float("nan")
    mass_se: float = float("nan")
    scanned: bool = False
    bent: bool = False
    beside: "Basin | None" = None

    @property
    def valley(self) -> "Basin":
        """The first minimum of its valley."""
        return self if self.beside is None else self.beside


class Ledger:
    """The basins of a problem, found so far.

    Arguments:
        problem: The problem.
        limit: Evaluations of the meter from which on no further basin is looked at; None for no
            limit.

    Attributes:
        basins: The basins, in the order in which they were found.
        starts: Independent starts of finite energy so far.
        lost: Of these, how many came to rest in no basin.
        leads: Points near a minimum that lie below it: a narrower basin is beside or within it.
        saddles: Points beside saddles, from where ends that came to rest there go downhill. They
            are not counted yet.
        most: Basins that can be held.
        full: Whether there are more: the minima form a continuum, or are too many to find.
    """

    def __init__(self, problem: Problem, limit: int | None = None) -> None:
        self.problem, self.limit, self.most = problem, limit, _MOST
        self.basins: list[Basin] = []
        self.starts = self.lost = 0
        self.leads: list[Tensor] = []
        self.saddles: list[Tensor] = []
        self.full = False

    @property
    def valleys(self) -> list[Basin]:
        """The first minimum of each valley."""
        return [basin for basin in self.basins if basin.beside is None]

    @property
    def alone(self) -> int:
        """Basins in which a single independent start ended."""
        return sum(basin.starts == 1 for basin in self.basins)

    @property
    def uneven(self) -> bool:
        """Whether a basin caught far fewer starts than others: there may be rarer ones."""
        valleys = self.valleys
        least = _RARE * self.starts / max(1, len(valleys))
        return any(basin.starts < least for basin in valleys)

    @property
    def crowded(self) -> bool:
        """Whether there are too many basins to find: most starts found one of their own.

        The share of starts that are alone in theirs estimates the chance that one more finds
        another (Good, 1953, https://doi.org/10.1093/biomet/40.3-4.237).
        """
        return self.full or self.strewn

    @property
    def strewn(self) -> bool:
        """Whether most starts were alone in their basins, or in none."""
        return self.starts > 0 and self.alone + self.lost > _ALONE * self.starts

    @property
    def log_z(self) -> float:
        """Logarithm of the sum of all basins' masses, by Laplace's method; -inf without any."""
        if not self.basins:
            return -math.inf
        half = 0.5 * self.problem.dim * math.log(2 * math.pi)
        return half + float(
            torch.stack(
                [torch.linalg.slogdet(basin.factor)[1] - basin.energy for basin in self.basins]
            ).logsumexp(0)
        )

    def add(
        self,
        x: Float[Tensor, "n dim"],
        energy: Float[Tensor, " n"],
        width: Float[Tensor, " dim"],
        *,
        independent: bool,
    ) -> int:
        """Enter ends of descents.

        Arguments:
            x: Ends that came to rest.
            energy: Their energies.
            width: The order of magnitude of the law's widths.
            independent: Whether they started independently of what was known.

        Returns:
            How many new basins there are.
        """
        before, beyond = len(self.basins), 0
        free = energy.argsort()
        free = self._taken(self.basins, x, energy, free, independent)
        while len(free):
            if self._beyond(x[free[0]]):
                self.lost += int(independent) * len(free)
                break
            beside = self._beside(x[free[0]], float(energy[free[0]]))
            most = self.most if beside is None and not self.strewn else min(_FEW, self.most)
            new, held = None, len(self.basins) < most
            if held:
                new = self._basin(x[free[0]], float(energy[free[0]]), width)
                if new is None:
                    beyond += 1
                    free = free[1:]
                    continue
                held = not new.bent or len(self.basins) < _FEW
            if new is None or not held:
                self.full |= beside is None
                if beside is not None:
                    self._count(beside, 1, independent)
                elif independent:
                    self.lost += 1
                free = free[1:]
                continue
            new.beside = beside
            self.basins.append(new)
            # The first belongs to it, wherever Newton's steps have led.
            self._count(new, 1, independent)
            free = self._taken([new], x, energy, free[1:], independent)
        if independent:
            self.starts += len(x) - beyond
        return len(self.basins) - before

    def foretold(
        self, x: Float[Tensor, "n dim"], energy: Float[Tensor, " n"]
    ) -> Int[Tensor, " n"]:
        """The basin of each point whose energy is what the curvatures say, else -1.

        There the energy is quadratic about a minimum that is known, and a descent would end in it.

        Arguments:
            x: Points.
            energy: Their energies.
        """
        if not self.basins:
            return torch.full_like(energy, -1, dtype=torch.long)
        square = self._squares(self.basins, x)
        lowest = energy.new_tensor([basin.energy for basin in self.basins])[:, None]
        model, nearest = (lowest + square).min(0)
        rise = square.gather(0, nearest[None])[0]
        close = (energy - model).abs() <= _SLACK + _FORETOLD * rise
        return torch.where(close, nearest, -1)

    def credit(self, index: Int[Tensor, " n"]) -> None:
        """Count independent starts.

        Arguments:
            index: The basin of each.
        """
        for k, number in zip(*(y.tolist() for y in index.unique(return_counts=True)), strict=True):
            self._count(self.basins[k], number, True)
        self.starts += len(index)

    def make_room(self, number: int, limit: int) -> None:
        """Have room for further basins.

        Arguments:
            number: Basins.
            limit: Evaluations of the meter up to which they may be looked at.
        """
        self.most = max(self.most, len(self.basins) + number)
        self.limit = None if self.limit is None else max(self.limit, limit)

    def _taken(
        self, basins: list[Basin], x: Tensor, energy: Tensor, free: Tensor, independent: bool
    ) -> Tensor:
        """What is left of the free ends when each basin in turn has taken its own."""
        if len(free) == 0 or not basins:
            return free
        rise = energy[free] - energy.new_tensor([basin.energy for basin in basins])[:, None]
        square = self._squares(basins, x[free])
        same = (square <= _WITHIN) & ((rise - square).abs() <= _SLACK)
        taken = same.any(0)
        first = same.int().argmax(0)
        for k in first[taken].unique().tolist():
            basin, own = basins[k], free[taken & (first == k)]
            lowest = own[energy[own].argmin()]
            if float(energy[lowest]) < basin.energy:
                basin.x, basin.energy = x[lowest].clone(), float(energy[lowest])
            self._count(basin, len(own), independent)
        return free[~taken]

    @staticmethod
    def _count(basin: Basin, number: int, independent: bool) -> None:
        """Count starts that ended in a basin."""
        if independent:
            basin.valley.starts += number
        else:
            basin.valley.others += number

    def _beside(self, x: Tensor, energy: float) -> Basin | None:
        """The valley of a point at rest: that of a minimum as low, with no barrier on the way.

        A point between two valleys shows that they are one.
        """
        low = [basin for basin in self.basins if abs(basin.energy - energy) <= _SLACK]
        if not low:
            return None
        valley = None
        distance = self._squares(low, x[None])[:, 0]
        for k in distance.argsort()[:_NEIGHBOURS].tolist():
            between = torch.lerp(x, low[k].x, x.new_tensor(_BETWEEN)[:, None])
            rim = max(energy, low[k].energy) + _SLACK
            if float(self.problem.potential(between).amax()) > rim:
                continue
            other = low[k].valley
            if valley is None:
                valley = other
            elif other is not valley:
                self._unite(valley, other)
        return valley

    def _unite(self, valley: Basin, other: Basin) -> None:
        """Make another valley a part of one."""
        for basin in self.basins:
            if basin.valley is other:
                basin.beside = valley
        valley.starts, valley.others = valley.starts + other.starts, valley.others + other.others
        other.starts = other.others = 0

    @staticmethod
    def _squares(basins: list[Basin], x: Tensor) -> Tensor:
        """What the curvature of each basin says of the rise of points, (basins, n), in nats."""
        loc = torch.stack([basin.x for basin in basins])
        factor = torch.stack([basin.factor for basin in basins])
        z = torch.linalg.solve(factor, (x - loc[:, None]).mT)
        return 0.5 * z.square().sum(-2)

    def _beyond(self, x: Tensor) -> bool:
        """Whether looking at one more basin would go beyond the limit."""
        if self.limit is None:
            return False
        most = 2 * self.curvature_cost(x) + _NEIGHBOURS * len(_BETWEEN)
        most += _NEWTON * (2 + self.problem.slope_cost(x.expand(2, -1)))
        return self.problem.energy.evaluations + most > self.limit

    def _basin(self, x: Tensor, energy: float, width: Tensor) -> Basin | None:
        """The basin of a point at rest, by Newton's method and the curvature; None at a saddle."""
        problem = self.problem
        factor, lowest, _, aside = self._along(x, (_SMALL * width).diag(), width, energy)
        if lowest < -1:
            self._saddle(x, aside)
            return None
        for _ in range(_NEWTON):
            _, slope = problem.value_and_slope(x[None], width)
            step = factor @ (factor.mT @ slope[0])
            length = float(torch.linalg.solve(factor, step).norm())
            if not length > 1e-3:
                break
            trials = x - step / x.new_tensor([1.0, max(1.0, length)])[:, None]
            lower, best = problem.potential(trials).min(0)  # a whole step, or one of a width
            if not float(lower) < energy:
                break
            x, energy = trials[best], float(lower)
        wider, lowest, below, aside = self._along(
            x, _STEP * factor, width, energy, _FAR_WIDER * _WIDEST
        )
        if len(below):  # what lies beside it is no part of its shape
            self.leads.append(below)
            return Basin(x, energy, factor)
        if lowest < -1:
            self._saddle(x, aside)
            return None
        held, bent = self._held(x, energy, wider, width)
        return Basin(x, energy, held, bent=bent)

    def _saddle(self, x: Tensor, aside: Tensor) -> None:
        """Nothing stays at a saddle: to one side of it, then to the other."""
        self.saddles.append(x + (-1) ** len(self.saddles) * aside)

    def curvature_cost(self, x: Float[Tensor, " dim"]) -> int:
        """Evaluations of a curvature.

        Arguments:
            x: A point of finite energy.
        """
        dim = self.problem.dim
        if self.problem.slope_by(x.expand(2, -1)) == "autograd":
            return 4 * dim
        return dim * (dim + 3) + 1

    def factor(
        self, x: Float[Tensor, " dim"], width: Float[Tensor, " dim"]
    ) -> Float[Tensor, "dim dim"]:
        """A root of the inverse curvature at any point, no direction of it wider than 4 widths.

        Arguments:
            x: The point.
            width: The order of magnitude of the law's widths.
        """
        axes = self._along(x, (_SMALL * width).diag(), width)[0]
        return self._along(x, _STEP * axes, width)[0]

    def _held(
        self, x: Tensor, energy: float, factor: Tensor, width: Tensor
    ) -> tuple[Tensor, bool]:
        """The root with columns as long as the energy bears out, and whether it was another one.

        One that is wider than a few widths of the broad law is kept if the energy rises at its end
        as the curvature says. Columns are halved until it rises by no more than eight nats: a
        valley that bends is flat at its bottom, and yet not wide.
        """
        factor, bent = factor.clone(), False
        column = torch.arange(len(x), device=x.device)
        wide = (factor / width[:, None]).norm(dim=0) / _WIDEST
        for _ in range(_HALVINGS):
            steps = factor[:, column].mT
            ahead, behind = self.problem.potential(torch.cat([x + steps, x - steps])).view(2, -1)
            rise = 0.5 * (ahead + behind) - energy
            bent |= bool(((rise > _BENT) & rise.isfinite()).any())
            flat = (wide[column] > 1) & ~(rise > _LOW)
            factor[:, column[flat]] /= wide[column[flat]]
            high = ((rise > _HIGH) & rise.isfinite()) | flat
            wide[column[flat]] = 1.0
            column = column[high]
            if len(column) == 0:
                break
            factor[:, column[~flat[high]]] *= 0.5
        return factor, bent

    def _along(
        self,
        x: Tensor,
        axes: Tensor,
        width: Tensor,
        energy: float = torch.inf,
        widest: float = _WIDEST,
    ) -> tuple[Tensor, float, Tensor, Tensor]:
        """A root of the inverse curvature, from differences of slopes along the columns of axes.

        Columns along which the energy rises by far more than the slopes at their ends say are
        shortened: they leave a basin that is narrower than they are long.
        No direction is wider than a few widths of the broad law: where the energy is flat, or
        falls, the curvature says nothing. The lowest curvature comes with it, in units of the
        one of that width, the ends that lie more than a nat below the energy, and a step in the
        direction of the lowest curvature.
        """
        problem, left = self.problem, _SHRINKS
        while True:
            steps = axes.mT
            ends = torch.cat([x + steps, x - steps])
            # Rows: change of the slope along each axis; in units of the axes.
            autograd = problem.slope_by(ends) == "autograd"
            if autograd:
                value, slope = problem.value_and_slope(ends, width)
            else:
                value = problem.potential(ends)
            known = value.isfinite().view(2, -1).all(0)
            rise = value.view(2, -1).mean(0) - energy
            if autograd:
                ahead, behind = slope.view(2, *steps.shape)
                hessian = 0.5 * (ahead - behind) @ axes
                high = rise > _SLACK + _STEEP * 0.5 * hessian.diagonal().clamp(min=0.0)
            else:
                high = rise > _HIGHEST
            high &= known & rise.isfinite()
            if left == 0 or not bool(high.any()):
                break
            shorter = _SHRUNK if autograd else rise.clamp(min=1.0).rsqrt()
            axes, left = torch.where(high, shorter * axes, axes), left - 1
        if not autograd:  # differences of values are fewer than those of differences
            origin = torch.zeros_like(x)[None]
            hessian = difference_hessian(
                lambda c: problem.potential(x + c @ steps), origin, step=torch.ones_like(origin)
            )[0]
        hessian = torch.where(known[:, None] & known, hessian, 0.0)
        hessian = 0.5 * (hessian + hessian.mT)
        # In units of the axes: there it is about the identity, and no digits are lost.
        curvature, vectors = torch.linalg.eigh(hessian.nan_to_num(0.0, 0.0, 0.0))
        direction = (axes / width[:, None]) @ vectors
        least = (direction.square().sum(0) / widest**2).clamp(min=1e-300)
        relative = curvature / least
        direction = direction * (relative.clamp(1.0, _STEEPEST) * least).rsqrt()
        left, size, _ = torch.linalg.svd(direction)  # of several, each of the widest
        below = ends[value < energy - _SLACK]
        factor = width[:, None] * (left * size.clamp(max=widest))
        lowest = int(relative.argmin())
        lower = direction[:, lowest] / direction[:, lowest].norm().clamp(min=1e-300)
        return factor, float(relative[lowest]), below, _ASIDE * width * lower
