r"""Descents into the basins of an energy: L-BFGS for many points at once.

Every point has its own history of steps and changes of slope and stops by itself. A step may end
above the last energy, but not above the largest of the last few (a non-monotone line search); one
that does is tried again at a quarter of its length.

References:
    | On the limited memory BFGS method for large scale optimization (Liu and Nocedal, 1989)
    | https://doi.org/10.1007/BF01589116

    | A nonmonotone line search technique for Newton's method (Grippo et al., 1986)
    | https://doi.org/10.1137/0723046
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Descent", "descend"]

ValueAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Energies (n) and gradients (n, dim) of points (n, dim)."""

_MEMORY = 5  # energies that a step may not exceed
_PAIRS = 8  # of steps and changes of slope, from which a curvature is learned
_FIRST_STEP = 0.01  # length of the first step, in units of the widths
_LEVEL = 10.0  # times the tolerance: change of energy that the slope at the end still foretells
_HELD = 4  # steps that were cut short and changed nothing, one after the other: held by a wall
_ROUNDING = 1e-8  # change of slope, in units of the slope, that may be rounding
_LONGEST = 100.0  # times the last step, is a step
_LONGER = 2.0  # factor where the last step met no convexity
_SHORTER, _SHORTEST = 0.25, 1e-5  # factor after a rejected step; where a point is stuck


@dataclass(frozen=True)
class Descent:
    """Where descents ended.

    Attributes:
        x: Ends, (n, dim), in the order of the starts of finite energy.
        energy: Their energies, (n), in nats.
        start: Index of the start of each, (n).
        rested: Whether a step changed the energy by less than the tolerance, or none was possible
            (at a wall), before the steps were used up, (n).
        path: Points on the way, in the order of the steps, (m, dim).
        path_energy: Their energies, (m).
    """

    x: Float[Tensor, "n dim"]
    energy: Float[Tensor, " n"]
    start: Tensor
    rested: Bool[Tensor, " n"]
    path: Float[Tensor, "m dim"]
    path_energy: Float[Tensor, " m"]


def descend(
    value_and_slope: ValueAndSlope,
    start: Float[Tensor, "n dim"],
    width: Float[Tensor, " dim"],
    *,
    steps: int = 100,
    tolerance: float = 1e-3,
    cost: int = 2,
    evaluations: int | None = None,
) -> Descent:
    """Go downhill from every start of finite energy.

    Arguments:
        value_and_slope: Energies and gradients.
        start: Starts.
        width: Unit of length in every coordinate: the order of magnitude of the law's widths.
        steps: Most steps.
        tolerance: Change of energy in a step, in nats, at which a point has come to rest.
        cost: Evaluations of a call for one point.
        evaluations: Most evaluations; None for no limit.

    Returns:
        The ends of those that started at a finite energy.
    """
    energy, slope = value_and_slope(start)
    index = energy.isfinite().nonzero()[:, 0]
    x, energy, slope = start[index].clone(), energy[index], slope[index] * width
    spent = cost * len(start)
    rested = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    active = torch.arange(len(x), device=x.device)
    before = energy.expand(_MEMORY, -1).clone()
    shorter = torch.ones_like(energy)
    taken, held = torch.zeros_like(active), torch.zeros_like(active)
    history, changes = (x.new_zeros((_PAIRS, *x.shape)) for _ in range(2))
    final = energy.clone()
    path, path_energy = [x.clone()], [energy]
    for i in range(steps):
        if len(active) == 0 or (
            evaluations is not None and spent + cost * len(active) > evaluations
        ):
            break
        step = shorter[:, None] * quasi_newton(slope, history, changes)
        trial = x[active] + step * width
        trial_energy, trial_slope = value_and_slope(trial)
        spent += cost * len(active)
        trial_slope = trial_slope * width
        down = (trial_energy <= before.amax(0)) & trial_energy.isfinite()
        taken = taken + down
        change = (trial_energy - before[(i - 1) % _MEMORY]).abs()
        whole = shorter == 1  # a step that was cut short says nothing
        along = (trial_slope * step).sum(-1).abs()  # across a valley energies may be equal
        level = (change < tolerance) & (along < _LEVEL * tolerance)
        level &= ((trial_slope - slope) * step).sum(-1) >= 0  # in a concave tail all is level
        held = torch.where(down, (held + 1) * (level & ~whole), held)
        still = (down & whole & level & (taken > 2)) | (shorter < _SHORTEST) | (held >= _HELD)
        x[active] = torch.where(down[:, None], trial, x[active])
        energy = torch.where(down, trial_energy, energy)
        final[active] = energy
        path.append(trial[down])
        path_energy.append(trial_energy[down])
        rested[active[still]] = True
        new_slope = torch.where(down[:, None], trial_slope, slope)
        shorter = torch.where(down, 1.0, _SHORTER * shorter)
        # A rejected step leaves no pair: of length zero it is passed over.
        history = torch.cat([history[1:], torch.where(down[:, None], step, 0.0)[None]])
        changes = torch.cat([changes[1:], (new_slope - slope)[None]])
        before[i % _MEMORY] = energy
        on = ~still
        active, slope, energy, before = active[on], new_slope[on], energy[on], before[:, on]
        shorter, taken, held = shorter[on], taken[on], held[on]
        history, changes = history[:, on], changes[:, on]
    return Descent(x, final, index, rested, torch.cat(path), torch.cat(path_energy))


def quasi_newton(
    slope: Float[Tensor, "n dim"],
    steps: Float[Tensor, "pairs n dim"],
    changes: Float[Tensor, "pairs n dim"],
) -> Float[Tensor, "n dim"]:
    """Directions of L-BFGS (two-loop recursion) from the last steps and changes of slope.

    Arguments:
        slope: Gradients.
        steps: Steps, the latest last; those of length zero are passed over.
        changes: The changes of slope that they brought.
    """
    curvature = (steps * changes).sum(-1, keepdim=True)
    steepness = slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    length = steps.norm(dim=-1, keepdim=True)
    convex = curvature > _ROUNDING * length * steepness
    rho = torch.where(convex, 1 / curvature, 0.0)  # no convexity, no pair
    direction, kept = -slope, []
    for i in reversed(range(len(steps))):
        a = rho[i] * (steps[i] * direction).sum(-1, keepdim=True)
        direction = direction - a * changes[i]
        kept.append(a)
    # Without a pair the first step is short, whatever the slope; where none was convex they grow.
    scale = _FIRST_STEP / steepness
    for i in range(len(steps)):
        square = changes[i].square().sum(-1, keepdim=True)
        longer = scale.maximum(_LONGER * length[i] / steepness)
        scale = torch.where(convex[i], curvature[i] / square, longer)
    direction = scale * direction
    for i, a in enumerate(reversed(kept)):
        b = rho[i] * (changes[i] * direction).sum(-1, keepdim=True)
        direction = direction + (a - b) * steps[i]
    last = torch.zeros_like(steepness)
    for each in length:
        last = torch.where(each > 0, each, last)
    most = torch.where(last > 0, _LONGEST * last, torch.inf)
    return direction * (most / direction.norm(dim=-1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
