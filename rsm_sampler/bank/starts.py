r"""Where descents start.

**Independent starts** are draws of a law that is stated and owes nothing to the basins known: over
a box they are uniform; elsewhere a quarter have the scales of the survey, and the others are draws
of the broad law, stretched from its location by a factor that is log-uniform: from a quarter to 16
for half of all starts, where modes of like width lie, and to 256 for a quarter. They alone count
for what could still be missing.

**Line scans** go from a basin along the coordinates, along diagonals of random signs, and along
the lines to the other basins, at distances in geometric progression. An energy with a neighbour
above it on both sides is a start. A basin that is narrower than another catches few independent
starts in many dimensions, but often lies on such a line: one coordinate apart, or in exchangeable
or mirrored coordinates. The axes and diagonals through the centre are looked along likewise.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.bank.ledger import Basin
from rsm_sampler.montecarlo.densities import ScaleLadder, StudentT
from rsm_sampler.target.problem import Problem

__all__ = ["OF_SURVEY", "centre_minima", "independent_starts", "line_minima"]

OF_SURVEY, _OF_NEAR = 0.25, 0.5  # shares of the starts: the first is drawn from the survey's law
_NEAR_BY, _ANYWHERE = (0.25, 16.0), (0.25, 256.0)  # factors of the broad law's distance
_DIAGONALS, _LINES = 8, 8
_ASIDE = 0.05  # widths of the basin
_FIRST, _RATIO, _PLACES = 0.5, 1.25, 36  # distances on a line, in widths of the basin
_NEAR, _DECADES, _FROM_CENTRE = 0.01, 52, 64  # from the centre: up to 900; diagonals there
LINE = 2 * _PLACES + 1  # evaluations of a line


def independent_starts(
    n: int, ladder: ScaleLadder, broad: StudentT, generator: torch.Generator
) -> Float[Tensor, "n dim"]:
    """Draws of the law of starts.

    Arguments:
        n: How many.
        ladder: The law of the survey.
        broad: A law of about the location and scale of what was found.
        generator: Source of randomness.
    """
    if ladder.boxed:
        return ladder.sample(n, generator)
    few, many = round(OF_SURVEY * n), round(_OF_NEAR * n)
    drawn = broad.sample(n - few, generator)
    u = torch.rand(len(drawn), 1, dtype=drawn.dtype, device=drawn.device, generator=generator)
    near = _NEAR_BY[0] * (_NEAR_BY[1] / _NEAR_BY[0]) ** u[:many]
    anywhere = _ANYWHERE[0] * (_ANYWHERE[1] / _ANYWHERE[0]) ** u[many:]
    stretched = broad.loc + (drawn - broad.loc) * torch.cat([near, anywhere])
    start = torch.cat([ladder.sample(few, generator), stretched])
    order = torch.randperm(n, generator=generator, device=start.device)
    return start[order]  # the first of them have the same law


def line_minima(
    problem: Problem, basin: Basin, basins: list[Basin], most: int, generator: torch.Generator
) -> Float[Tensor, "n dim"]:
    """Lowest points of lines through a basin, but the basin itself.

    Arguments:
        problem: The problem.
        basin: The basin.
        basins: All basins.
        most: Most evaluations; further lines are left out.
        generator: Source of randomness.
    """
    width = basin.factor.norm(dim=-1)
    directions = [_signs(len(width), _DIAGONALS, generator) * width]
    away = [other.x - basin.x for other in basins if other is not basin]
    away = [step for step in away if float((step / width).norm()) > 1][:_LINES]
    if away:  # lines reach from a sixteenth of the way to some hundred times beyond
        directions.append(torch.stack(away) / 8)
    directions.append(width.diag())
    x = _lowest(problem, basin.x, torch.cat(directions), _FIRST, _PLACES, most)
    # Off the line a little: on a line of symmetry no slope leads away from it.
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return x + _ASIDE * noise @ basin.factor.mT


def centre_minima(
    problem: Problem, ladder: ScaleLadder, most: int, generator: torch.Generator
) -> Float[Tensor, "n dim"]:
    """Lowest points of the axes and diagonals through the centre of the survey.

    Arguments:
        problem: The problem.
        ladder: The law of the survey.
        most: Most evaluations; further lines are left out.
        generator: Source of randomness.
    """
    unit = torch.ones_like(ladder.loc)
    direction = torch.cat([unit.diag(), _signs(len(unit), _FROM_CENTRE, generator)])
    return _lowest(problem, ladder.loc, direction, _NEAR, _DECADES, most)


def _signs(dim: int, most: int, generator: torch.Generator) -> Tensor:
    """Diagonals, (n, dim): all of them if they are few, else (1, ..., 1) and random ones."""
    kinds = 2 ** (dim - 1) if dim < 31 else most + 1
    if kinds <= most:
        bits = torch.arange(kinds, device=generator.device)[:, None]
        bits = bits // 2 ** torch.arange(dim, device=generator.device) % 2
    else:
        bits = torch.randint(2, (most, dim), generator=generator, device=generator.device)
        bits[0] = 0
    return 1.0 - 2.0 * bits.double()


def _lowest(
    problem: Problem, centre: Tensor, direction: Tensor, first: float, places: int, most: int
) -> Tensor:
    """Points with a higher neighbour on both sides, on lines through a centre, but the centre."""
    direction = direction[: most // (2 * places + 1)]
    if len(direction) == 0:
        return direction
    place = first * _RATIO ** torch.arange(places, dtype=centre.dtype, device=centre.device)
    place = torch.cat([-place.flip(0), torch.zeros_like(place[:1]), place])
    x = centre + place[None, :, None] * direction[:, None]
    energy = problem.potential(x.flatten(0, 1)).view(x.shape[:2])
    beyond = torch.full_like(energy[:, :1], torch.inf)
    before = torch.cat([beyond, energy[:, :-1]], 1)
    after = torch.cat([energy[:, 1:], beyond], 1)
    lowest = (energy < before) & (energy <= after) & energy.isfinite()
    lowest[:, places] = False
    return x[lowest]
