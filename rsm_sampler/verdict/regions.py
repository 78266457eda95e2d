"""Regions over which masses of two sets of points are compared."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Regions", "cells_of", "clusters_of", "nearest"]

CELLS = 24  # regions must hold enough points for errors to be normal: 4096 / 24 is 170


@dataclass(frozen=True)
class Regions:
    """Nearest-centre cells, clusters of them, and the surroundings of basins.

    Attributes:
        loc: Where standard coordinates begin, (dim).
        tril: Their scale: standard coordinates z have :math:`u = loc + tril z`.
        cells: Centres of cells in standard coordinates, (cells, dim).
        members: Which cells each region holds, (cells, regions).
        basin_loc: Lowest points of basins, (basins, dim), in coordinates u.
        basin_tril: Cholesky factors of their covariances, (basins, dim, dim).
    """

    loc: Tensor
    tril: Tensor
    cells: Tensor
    members: Tensor
    basin_loc: Tensor
    basin_tril: Tensor

    def __len__(self) -> int:
        return self.members.shape[1] + len(self.basin_loc)

    def inside(self, u: Float[Tensor, "n dim"]) -> Float[Tensor, "n regions"]:
        """Which regions hold each point, as zeros and ones; the basins come last."""
        z = torch.linalg.solve_triangular(self.tril, (u - self.loc).mT, upper=False).mT
        inside = self.members[nearest(z, self.cells)]
        number = len(self.basin_loc)
        if number == 0:
            return inside
        owner = torch.nn.functional.one_hot(self.basin_of(u), number).to(inside)
        return torch.cat([inside, owner], -1)

    def basin_of(self, u: Float[Tensor, "n dim"]) -> Tensor:
        """The basin whose Gaussian law is densest at each point."""
        scores = []
        for loc, tril in zip(self.basin_loc, self.basin_tril, strict=True):
            z = torch.linalg.solve_triangular(tril, (u - loc).mT, upper=False)
            scores.append(-0.5 * z.square().sum(0) - tril.diagonal().log().sum())
        return torch.stack(scores, -1).argmax(-1)


def cells_of(
    points: Float[Tensor, "n dim"], generator: torch.Generator, most: int = CELLS
) -> Float[Tensor, "cells dim"]:
    """Centres of nearest-centre cells: k-means from starts that are far apart.

    Arguments:
        points: Points.
        generator: Source of randomness.
        most: Most cells.
    """
    centres = points[:1]
    for _ in range(min(most, len(points)) - 1):
        square = torch.cdist(points, centres).amin(-1).square()
        if not bool(square.sum() > 0):
            break
        pick = torch.multinomial(square / square.sum(), 1, generator=generator)
        centres = torch.cat([centres, points[pick]])
    for _ in range(10):
        member = torch.nn.functional.one_hot(nearest(points, centres), len(centres)).to(points)
        count = member.sum(0)
        centres = torch.where(
            count[:, None] > 0, (member.mT @ points) / count.clamp(min=1)[:, None], centres
        )
    return centres


def nearest(points: Float[Tensor, "n dim"], centres: Float[Tensor, "cells dim"]) -> Tensor:
    """The nearest centre of each point."""
    return torch.cat([torch.cdist(piece, centres).argmin(-1) for piece in points.split(16_384)])


def clusters_of(cells: Float[Tensor, "cells dim"]) -> Float[Tensor, "cells regions"]:
    """Which regions each cell belongs to: itself, and clusters of cells.

    The clusters are those of average linkage, down to the last two.
    """
    number = len(cells)
    apart = torch.cdist(cells, cells)
    clusters = list(torch.eye(number, dtype=cells.dtype, device=cells.device))
    regions = clusters.copy()
    while len(clusters) > 2:
        member = torch.stack(clusters)
        size = member.sum(-1)
        linkage = member @ apart @ member.mT / (size[:, None] * size)
        linkage.fill_diagonal_(torch.inf)
        i, j = sorted(divmod(int(linkage.argmin()), len(clusters)))
        second, first = clusters.pop(j), clusters.pop(i)
        clusters.append(first + second)
        regions.append(first + second)
    return torch.stack(regions, -1)
