r"""A mixture with one component for each basin of the energy, adapted by its own weights.

Where a target has few modes, each roughly an ellipsoid, importance sampling works in hundreds of
dimensions: draws are independent and their weights exact, however far apart the modes are. That
is more than any population of chains can promise, so it is tried first. A basin that no descent
ends in is missing, and the weights do not show it.

1. **Scouts** start far and wide and go downhill by L-BFGS. A narrow basin beside a wide one is
   not seen from afar. Later ones start between the basins found so far, and where coordinates of
   two of them cross; the last ones also beyond them.
2. **Basins.** Scouts belong together if the energy half-way between them is not above the lower
   of the two. If most scouts are alone, there are too many modes for this: it ends here.
3. **Components.** The curvature at the bottom of each basin gives it a covariance and a share
   (Laplace's approximation), or walks within it do, shrunk to what all basins share: whichever
   draws better.
4. **Adaptation.** Draws of the mixture are weighted towards the target, as far as the weights
   allow, and give each component its share, mean and covariance anew, while that helps: in
   hundreds of dimensions the curvature may know the covariance better than thousands of draws.

References:
    | Adaptive importance sampling in general mixture classes (Cappé et al., 2008)
    | https://doi.org/10.1007/s11222-008-9059-x

    | On the limited memory BFGS method for large scale optimization (Liu and Nocedal, 1989)
    | https://doi.org/10.1007/BF01589116
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsm_sampler.montecarlo.densities import Mixture, StudentT
from rsm_sampler.montecarlo.population import next_beta
from rsm_sampler.target.gradients import difference_hessian

__all__ = ["Slope", "mixture_of_basins"]

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Gradients (n, dim) of an energy at points (n, dim), and its second derivatives along the
coordinates if they come with them; from a Cholesky factor (dim, dim) of about the law's scale."""

_TAIL = 20.0  # degrees of freedom: in many dimensions heavier tails hardly meet the target
_FIRST, _MORE, _ALL, _FEWEST = 96, 232, 1024, 16  # scouts
_SEEN = 8  # of them in the rarest basin, for no more to be sent
_ROUNDS = 6
_SNAPSHOTS = 12  # of the walks within basins
_SLACK = 1.0  # nats that a descent may have left
_DESCENT = 100  # steps downhill, at most
_MEMORY = 5  # energies that a step may not exceed
_PAIRS = 8  # of steps and changes of slope, from which a curvature is learned
_AT_REST = 1e-3  # nats in a step
_SMALL = 1e-3  # differences of gradients, in units of the broad law's widths
_WIDEST = 4.0  # standard deviations of a component, in those units
_NEWTON = 20  # steps
_STEP = 0.3  # of a basin's width along a coordinate, for differences of differences
_LATER = 0.8  # of the effective draws of an earlier mixture, for a later one to be preferred
_HOPELESS = 0.1  # likewise, for adaptation to end
_ALONE = 0.6  # of the scouts: more have too many basins to find
_NEAREST, _FARTHEST = 0.25, 256.0  # where scouts start, in units of what the bracket found
_STRETCHED = 16.0  # where the last ones do, in units of the spread of the basins found


def mixture_of_basins(
    evaluate: Callable[[Tensor], Tensor],
    slope: Slope,
    slope_cost: int,
    broad: StudentT,
    evaluations: int,
    generator: torch.Generator,
) -> tuple[Mixture | None, int]:
    """The adapted mixture, or None where there are too many basins; and evaluations spent.

    Arguments:
        evaluate: Energies (n) of points (n, dim).
        slope: Its gradients.
        slope_cost: Evaluations that a gradient costs.
        broad: A law that covers the target; it stays a part of the mixture.
        evaluations: Most evaluations.
        generator: Source of randomness.
    """
    finder = _Basins(evaluate, slope, slope_cost, broad, generator)
    dim = len(broad.loc)
    cost = _DESCENT * (1 + slope_cost)
    first = min(_FIRST, evaluations // (2 * cost))
    if first < _FEWEST:
        return None, 0
    x, energy = finder.scouts(finder.anywhere(first))
    if len(x) < _FEWEST:  # far away the energy is infinite nearly everywhere
        return None, finder.spent
    label = finder.basins(x, energy)
    number = int(label.amax()) + 1
    if crowded(label):
        return None, finder.spent
    each = finder.spent / first
    while number > 1 and (len(x) < _ALL or int(label.bincount().amin()) < _SEEN):
        # The spread of those found tells where to look for more, and grows with them.
        more = min(_MORE, int((evaluations // 2 - finder.spent) / each))
        if more < 1:
            break
        half = more // 2 if len(x) < _ALL else 0
        farthest = 1.0 if len(x) < _ALL else _STRETCHED
        start = (
            finder.between(x, label, more - half, farthest),
            finder.crossed(x, energy, label, half),
        )
        again, its_energy = finder.scouts(torch.cat(start))
        x, energy = torch.cat([x, again]), torch.cat([energy, its_energy])
        label = finder.basins(x, energy)
    number = int(label.amax()) + 1
    size = min(16_384, evaluations // (3 * _ROUNDS))
    if size < 16 * dim:
        return None, finder.spent
    begun = []
    free = evaluations - finder.spent - _ROUNDS * size
    if finder.cost_of_curvature(number) <= free:
        begun.append(finder.curved(x, energy, label))
        free = evaluations - finder.spent - (_ROUNDS + 1) * size
    # Walks take what adaptation leaves: those of a few scouts for each basin will do.
    steps = max(200, 6 * dim)
    if free // steps >= 2 * number:
        chosen = _spread(label, free // steps)
        begun.append(finder.components(x[chosen], energy[chosen], label[chosen], steps))
    if not begun:
        return None, finder.spent
    found = [(*finder.adapted(mixture, size), mixture) for mixture in begun]
    mixture, worth, best = max(found, key=lambda each: each[1])
    for _ in range(_ROUNDS - 1):
        later, effective = finder.adapted(mixture, size)
        if effective >= _LATER * worth:
            best, worth = mixture, effective
        elif effective < _HOPELESS * worth:
            break
        mixture = later
    return best, finder.spent


class _Basins:
    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        slope: Slope,
        slope_cost: int,
        broad: StudentT,
        generator: torch.Generator,
    ) -> None:
        self._energy, self._gradient, self.slope_cost = evaluate, slope, slope_cost
        self.broad, self.generator = broad, generator
        self.by_values = False  # whether curvatures come with the slopes
        self.width = broad.scale_tril.norm(dim=-1)
        self.spent = 0

    def _slope(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.spent += self.slope_cost * len(x)
        slope, curvature = self._gradient(x, self.broad.scale_tril)
        self.by_values = curvature is not None
        if curvature is not None:
            curvature = curvature.to(x.dtype).nan_to_num()
        return slope.to(x.dtype).nan_to_num(), curvature

    def evaluate(self, x: Tensor) -> Tensor:
        self.spent += len(x)
        return self._energy(x).to(x.dtype)

    def _walk(self, x: Tensor, energy: Tensor, steps: int) -> Tensor:
        """Snapshots (kept, n, dim) of Metropolis walks, each with a step length of its own."""
        like: dict[str, Any] = {
            "dtype": x.dtype, "device": x.device, "generator": self.generator
        }  # fmt: skip
        length = torch.full_like(x[:, :1], 0.2 / math.sqrt(x.shape[-1]))
        kept = []
        for i in range(steps):
            trial = x + length * (torch.randn(x.shape, **like) @ self.broad.scale_tril.mT)
            trial_energy = self.evaluate(trial)
            accept = torch.rand(len(x), **like).log() < energy - trial_energy
            x = torch.where(accept[:, None], trial, x)
            energy = torch.where(accept, trial_energy, energy)
            gain = max(0.1, 1 / (1 + i) ** 0.6)
            length = length * torch.exp(gain * (accept[:, None].to(x.dtype) - 0.25))
            if (steps - 1 - i) % max(1, steps // _SNAPSHOTS) == 0 and i >= steps // 3:
                kept.append(x)
        return torch.stack(kept)

    def anywhere(self, number: int) -> Tensor:
        """Points near and far: the bracket may have closed in on a part of the modes already."""
        x = self.broad.sample(number, self.generator)
        u = torch.rand(number, 1, dtype=x.dtype, device=x.device, generator=self.generator)
        return self.broad.loc + (x - self.broad.loc) * _NEAREST * (_FARTHEST / _NEAREST) ** u

    def between(self, x: Tensor, label: Tensor, number: int, farthest: float) -> Tensor:
        """Points spread as the basins found so far are, or up to so many times as far.

        From nearer only those in the middle would be found, from far off only the outer ones: in
        many dimensions nearly all are, and those at the rim are rarely the nearest to points
        between the others.
        """
        rest = torch.stack([x[label == k][0] for k in range(int(label.amax()) + 1)])
        # Coordinate by coordinate: the basins not found yet lie in no span of the others.
        scale = (rest.var(0, correction=0) + self.broad.scale_tril.square().sum(-1)).sqrt()
        start = StudentT(rest.mean(0), scale.diag(), _TAIL)
        points = start.sample(number, self.generator)
        if farthest == 1:
            return points
        u = torch.rand(number, 1, dtype=x.dtype, device=x.device, generator=self.generator)
        return torch.lerp(start.loc, points, farthest**u)

    def crossed(self, x: Tensor, energy: Tensor, label: Tensor, number: int) -> Tensor:
        """Some coordinates of one basin's bottom, the rest of another's.

        Where wells in several coordinates are independent, that is the bottom of a third basin.
        """
        inside = torch.nn.functional.one_hot(label).mT.bool()
        rest = x[torch.where(inside, energy, torch.inf).argmin(-1)]
        first, second = torch.randint(
            len(rest), (2, number), generator=self.generator, device=x.device
        )
        mask = torch.rand(number, x.shape[1], generator=self.generator, device=x.device) < 0.5
        return torch.where(mask, rest[first], rest[second])

    def scouts(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of descents from given points: those that came to rest, if there are enough.

        Steps of L-BFGS, each scout stops by itself: in the broad law's metric, or, where second
        derivatives come with the gradients, begun from these.
        """
        x, energy = start, self.evaluate(start)
        x, energy = x[energy.isfinite()], energy[energy.isfinite()]
        if len(x) == 0:
            return x, energy
        rested = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        active = torch.arange(len(x), device=x.device)
        slope, curvature = self._slope(x)
        tril = self.broad.scale_tril if curvature is None else self.width.diag()
        slope = slope @ tril
        before = energy.expand(_MEMORY, -1).clone()
        shorter = torch.ones_like(energy)
        steps, changes = (x.new_zeros((_PAIRS, *x.shape)) for _ in range(2))
        for i in range(_DESCENT):
            if len(active) == 0:
                break
            stiffness = None
            if curvature is not None:
                stiffness = (curvature.abs() * self.width.square()).clamp(min=_WIDEST**-2)
            step = shorter[:, None] * _quasi_newton(slope, steps, changes, stiffness)
            trial = x[active] + step @ tril.mT
            trial_energy = self.evaluate(trial)
            # They are fast because they may climb now and then: below one of the last few.
            down = (trial_energy <= before.amax(0)) & trial_energy.isfinite()
            still = down & ((trial_energy - before[(i - 1) % _MEMORY]).abs() < _AT_REST)
            x[active] = torch.where(down[:, None], trial, x[active])
            energy[active] = torch.where(down, trial_energy, energy[active])
            rested[active[still]] = True
            # By differences slopes are dear: only where they are needed.
            asked = torch.ones_like(down) if curvature is None else down & ~still
            new_slope = slope.clone()
            if bool(asked.any()):
                found, found_curvature = self._slope(trial[asked])
                new_slope[asked] = torch.where(down[asked, None], found @ tril, slope[asked])
                if curvature is not None and found_curvature is not None:
                    curvature[asked] = found_curvature
            if curvature is not None:
                curvature = curvature[~still]
            shorter = torch.where(down, 1.0, 0.25 * shorter)
            # A rejected step leaves no pair: of length zero it is passed over.
            steps = torch.cat([steps[1:], torch.where(down[:, None], step, 0.0)[None]])
            changes = torch.cat([changes[1:], (new_slope - slope)[None]])
            before[i % _MEMORY] = energy[active]
            active, slope, before = active[~still], new_slope[~still], before[:, ~still]
            shorter, steps, changes = shorter[~still], steps[:, ~still], changes[:, ~still]
        if int(rested.sum()) >= _FEWEST:
            x, energy = x[rested], energy[rested]
        return x, energy

    def basins(self, x: Tensor, energy: Tensor) -> Tensor:
        """The basin of each point: no barrier half-way to its lowest member."""
        label = torch.full((len(x),), -1, dtype=torch.long, device=x.device)
        number = 0
        while bool((label < 0).any()):
            free = (label < 0).nonzero()[:, 0]
            centre = free[energy[free].argmin()]
            half_way = self.evaluate(0.5 * (x[free] + x[centre]))
            same = half_way <= energy[centre] + _SLACK  # and the centre is the lowest
            same |= free == centre
            label[free[same]] = number
            number += 1
        return label

    def curved(self, x: Tensor, energy: Tensor, label: Tensor) -> Mixture:
        """One component for each basin, from the curvature at its lowest point."""
        number = int(label.amax()) + 1
        inside = torch.nn.functional.one_hot(label, number).mT.bool()
        lowest, index = torch.where(inside, energy, torch.inf).min(-1)
        factor = self._factor(x[index])
        loc, lowest = self._newton(x[index], lowest, factor)
        if not self.by_values:
            factor = self._factor(loc)
        covariance = factor @ factor.mT
        jitter = 1e-12 * covariance.diagonal(dim1=-2, dim2=-1).diag_embed()
        tril = torch.linalg.cholesky(covariance + jitter)
        volume = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        share = torch.softmax(volume - lowest, 0).clamp(min=0.1 / number)
        return Mixture(share / share.sum(), loc, tril, self.broad, _TAIL)

    def cost_of_curvature(self, number: int) -> int:
        """Evaluations that components of so many basins take, by their curvature."""
        dim, steps = len(self.width), _NEWTON * self.slope_cost
        if self.by_values:
            return number * (dim * (dim + 1) + 2 * self.slope_cost + steps)
        return number * (4 * dim * self.slope_cost + 2 * steps)

    def _factor(self, loc: Tensor) -> Tensor:
        """A root of the inverse curvature at points (K, dim)."""
        if self.by_values:
            return self._factor_by_values(loc)
        tril = self.broad.scale_tril
        steps = _SMALL * tril.mT  # along the broad law's axes
        ahead, behind = (
            self._slope((loc[:, None] + sign * steps).flatten(0, 1))[0].view(-1, *steps.shape)
            for sign in (1, -1)
        )
        hessian = (ahead - behind) @ tril / (2 * _SMALL)
        curvature, axes = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
        return tril @ (axes * curvature.clamp(min=_WIDEST**-2).rsqrt()[:, None])

    def _factor_by_values(self, loc: Tensor) -> Tensor:
        _, curvature = self._slope(loc)
        assert curvature is not None
        width = curvature.clamp(min=(_WIDEST * self.width) ** -2).rsqrt()
        hessian = difference_hessian(self.evaluate, loc, step=_STEP * width).nan_to_num()
        curvature, axes = torch.linalg.eigh(width[:, :, None] * hessian * width[:, None])
        return width[:, :, None] * axes * curvature.clamp(min=_WIDEST**-2).rsqrt()[:, None]

    def _newton(self, x: Tensor, energy: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the way down, with one curvature: descents are slow in a poor metric."""
        for _ in range(_NEWTON):
            slope = (factor.mT @ self._slope(x)[0][..., None])[..., 0]
            length = slope.norm(dim=-1, keepdim=True).clamp(min=1.0)  # no step beyond the basin
            trial = x - (factor @ (slope / length)[..., None])[..., 0]
            trial_energy = self.evaluate(trial)
            down = trial_energy < energy
            x = torch.where(down[:, None], trial, x)
            energy = torch.where(down, trial_energy, energy)
        return x, energy

    def components(self, x: Tensor, energy: Tensor, label: Tensor, steps: int) -> Mixture:
        """One component for each basin, from walks of its members."""
        points = self._walk(x, energy, steps)
        member = torch.nn.functional.one_hot(label, int(label.amax()) + 1).to(x.dtype)  # (n, K)
        weight = member.expand(len(points), -1, -1).flatten(0, 1)
        flat = points.flatten(0, 1)
        # Few walks tell little of where the middle is: it is drawn towards where they started.
        count = weight.sum(0)[:, None] / 4  # of snapshots, which depend on each other
        rest = member.mT @ x / member.sum(0)[:, None]
        mean = weight.mT @ flat / weight.sum(0)[:, None]
        loc = torch.lerp(rest, mean, count / (count + x.shape[-1]))
        return self._fitted(flat, weight / weight.sum(), loc=loc)

    def _fitted(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        loc: Tensor | None = None,
        before: Mixture | None = None,
    ) -> Mixture:
        """Components from points with a weight for each component, (n, K), of total one."""
        share = weight.sum(0)
        own = weight / share.clamp(min=1e-300)
        loc = own.mT @ x if loc is None else loc
        dim = x.shape[-1]
        worth = 1 / own.square().sum(0).clamp(min=1e-300)  # effective points of each
        covariance = torch.stack([
            (own[:, k : k + 1] * (x - loc[k])).mT @ (x - loc[k]) for k in range(len(loc))
        ])  # fmt: skip
        counted = worth.clamp(min=0) * (share > 0)
        pooled = (counted[:, None, None] * covariance).sum(0) / counted.sum()
        diagonal = pooled.diagonal().clamp(min=1e-300)
        few = dim / (dim + counted.sum())
        pooled = (1 - few) * pooled + few * diagonal.diag()
        trust = (counted / (counted + 4 * dim))[:, None, None]
        covariance = trust * covariance + (1 - trust) * pooled
        if before is not None:  # a component that hardly any point speaks for stays what it was
            poor = worth < 2 * math.sqrt(dim)
            loc = torch.where(poor[:, None], before.loc, loc)
            covariance = torch.where(
                poor[:, None, None], before.scale_tril @ before.scale_tril.mT, covariance
            )
        jitter = 1e-9 * diagonal.diag()
        least = 0.1 / len(share)
        share = share.clamp(min=least)
        return Mixture(
            share / share.sum(), loc, torch.linalg.cholesky(covariance + jitter), self.broad, _TAIL
        )

    def adapted(self, mixture: Mixture, size: int) -> tuple[Mixture, float]:
        """The mixture after draws of its own, weighted towards the target; and their worth."""
        x = mixture.sample(size, self.generator)
        log_q, of_components = mixture.log_probs(x)
        energy = self.evaluate(x)
        work = torch.where(energy.isfinite(), energy + log_q, torch.inf)
        if not bool(work.isfinite().any()):
            return mixture, 0.0
        effective = 1 / torch.softmax(-work, 0).square().sum()
        beta = next_beta(work, 0.0, 0.2 * size)
        weight = torch.softmax(-beta * work, 0)
        by_component = weight[:, None] * torch.softmax(of_components, -1)
        return self._fitted(x, by_component, before=mixture), float(effective)


def _quasi_newton(
    slope: Tensor, steps: Tensor, changes: Tensor, stiffness: Tensor | None = None
) -> Tensor:
    """Directions (n, dim) of L-BFGS from the last steps and changes of slope, (pairs, n, dim).

    The curvature that the pairs say nothing of is the given one (n, dim) along the coordinates,
    or the last pair's in all directions.
    """
    curvature = (steps * changes).sum(-1, keepdim=True)
    rho = torch.where(curvature > 0, 1 / curvature, 0.0)  # no convexity, no pair
    direction, kept = -slope, []
    for i in reversed(range(len(steps))):
        a = rho[i] * (steps[i] * direction).sum(-1, keepdim=True)
        direction = direction - a * changes[i]
        kept.append(a)
    # Without a pair the first step is short, whatever the slope.
    scale = 0.01 / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    for i in range(len(steps)):
        square = changes[i].square().sum(-1, keepdim=True)
        scale = torch.where(curvature[i] > 0, curvature[i] / square, scale)
    direction = scale * direction if stiffness is None else direction / stiffness
    for i, a in enumerate(reversed(kept)):
        b = rho[i] * (changes[i] * direction).sum(-1, keepdim=True)
        direction = direction + (a - b) * steps[i]
    return direction


def crowded(label: Tensor) -> bool:
    """Whether there are too many basins to find, by those in which the first scouts, (n), ended.

    The share of scouts that are alone in theirs estimates the chance that one more finds another.

    References:
        | The population frequencies of species (Good, 1953)
        | https://doi.org/10.1093/biomet/40.3-4.237
    """
    return int((label.bincount() == 1).sum()) > _ALONE * len(label)


def _spread(label: Tensor, number: int) -> Tensor:
    """At most so many indices, of all labels as equally as they can be had."""
    member = torch.nn.functional.one_hot(label).cumsum(0).gather(1, label[:, None])[:, 0]
    return member.argsort(stable=True)[:number]
