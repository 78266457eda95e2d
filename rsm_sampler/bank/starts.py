r"""Where descents start.

**Independent starts** are draws of a law that is stated and owes nothing to the basins known: over
a box they are uniform; elsewhere half have the scales of the survey, and half are draws of the
broad law, stretched from its location by a factor that is log-uniform from a quarter to 256. They
alone count for what could still be missing.

**Line scans** go from a basin along the coordinates, along diagonals of random signs, and along
the lines to the other basins, at distances in geometric progression. An energy with a neighbour
above it on both sides is a start. A basin that is narrower than another catches few independent
starts in many dimensions, but often lies on such a line: one coordinate apart, or in exchangeable
or mirrored coordinates.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.bank.ledger import Basin
from rsm_sampler.montecarlo.densities import ScaleLadder, StudentT
from rsm_sampler.target.problem import Problem

__all__ = ["independent_starts", "line_minima"]

_NEAREST, _FARTHEST = 0.25, 256.0
_DIAGONALS, _LINES = 8, 8
_ASIDE = 0.05  # widths of the basin
_FIRST, _RATIO, _PLACES = 0.5, 1.25, 36  # distances on a line, in widths of the basin
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
    near = broad.sample(n - n // 2, generator)
    u = torch.rand(len(near), 1, dtype=near.dtype, device=near.device, generator=generator)
    stretch = _NEAREST * (_FARTHEST / _NEAREST) ** u
    return torch.cat([ladder.sample(n // 2, generator), broad.loc + (near - broad.loc) * stretch])


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
    like: dict[str, Any] = {"dtype": basin.x.dtype, "device": basin.x.device}
    width = basin.factor.norm(dim=-1)
    diagonals = min(_DIAGONALS, 2 ** (len(width) - 1))
    signs = torch.rand(diagonals, len(width), generator=generator, **like) < 0.5
    signs[0] = False  # all coordinates alike
    directions = [torch.where(signs, -1.0, 1.0) * width]
    away = [other.x - basin.x for other in basins if other is not basin]
    away = [step for step in away if float((step / width).norm()) > 1][:_LINES]
    if away:  # lines reach from a sixteenth of the way to some hundred times beyond
        directions.append(torch.stack(away) / 8)
    directions.append(width.diag())
    direction = torch.cat(directions)[: max(1, most // LINE)]
    place = _FIRST * _RATIO ** torch.arange(_PLACES, **like)
    place = torch.cat([-place.flip(0), torch.zeros(1, **like), place])
    x = basin.x + place[None, :, None] * direction[:, None]
    energy = problem.potential(x.flatten(0, 1)).view(x.shape[:2])
    beyond = torch.full_like(energy[:, :1], torch.inf)
    before = torch.cat([beyond, energy[:, :-1]], 1)
    after = torch.cat([energy[:, 1:], beyond], 1)
    lowest = (energy < before) & (energy <= after) & energy.isfinite()
    lowest[:, _PLACES] = False
    x = x[lowest]
    # Off the line a little: on a line of symmetry no slope leads away from it.
    noise = torch.randn(x.shape, generator=generator, **like)
    return x + _ASIDE * noise @ basin.factor.mT
