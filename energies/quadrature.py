r"""Integrals and exact draws in one, two and three dimensions.

A target with a known answer needs three numbers that rarely have a closed form: its normaliser,
the probability of a cell, and independent draws. In low dimension all three follow from
Gauss-Legendre quadrature.

* :class:`InverseCDF` integrates a density of one variable panel by panel. The panel masses are
  exact to rounding; inside a panel the density is taken to be linear, so that the CDF has the
  closed-form inverse

  .. math:: s = \frac{u (p_0 + p_1)}{p_0 + \sqrt{p_0^2 + u (p_1^2 - p_0^2)}}

  for a fraction :math:`u` of the panel's mass and end values :math:`p_0, p_1`. With thousands of
  panels the CDF of the draws is off by less than :math:`10^{-7}`.
* :func:`integrate_cells` integrates over the cells of a grid, and splits each cell until the
  halves agree with the whole, so that a ring much thinner than a cell is not stepped over.
* :class:`GridRejection` draws from a smooth density in the plane: a cell from the histogram of
  upper bounds, a uniform point in it, accepted with probability density over bound. The draws are
  exact.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = ["GridRejection", "InverseCDF", "integrate_cells"]

_CHUNK = 1 << 18


def _rule(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on the unit interval, with shape (order)."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@checked
class InverseCDF:
    r"""Tabulated distribution of one variable, from its unnormalised log-density.

    Arguments:
        log_density: Takes a float64 tensor with shape :math:`(*)` and returns the log-density, up
            to a constant, with the same shape.
        low: Lower end of the interval, which should hold all of the mass that matters.
        high: Upper end of the interval.
        panels: Number of panels of equal width.
        order: Number of quadrature nodes in a panel.

    Raises:
        ValueError: If `high` does not exceed `low`, or no finite positive mass lies between.

    Example:
        >>> normal = InverseCDF(lambda x: -0.5 * x**2, -9.0, 9.0)
        >>> round(normal.log_mass, 6)  # log of sqrt(2 pi)
        0.918939
        >>> normal.cdf(torch.tensor(0.0))
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        *,
        panels: int = 8192,
        order: int = 8,
    ) -> None:
        if not high > low:
            raise ValueError(f"high must exceed low, got {high} and {low}")
        self.edges = torch.linspace(low, high, panels + 1, dtype=torch.float64)
        nodes, weights = _rule(order)
        width = (high - low) / panels
        values = log_density(self.edges[:-1, None] + width * nodes)
        top = values.max()
        if not math.isfinite(float(top)):
            raise ValueError(f"log_density must have a finite maximum, got {float(top)}")
        mass = width * ((values - top).exp() @ weights)
        total = mass.sum()
        self.log_mass = float(top + total.log())
        self.masses = mass / total
        self.cumulative = torch.cat([mass.new_zeros(1), self.masses.cumsum(0)])
        self.cumulative /= self.cumulative[-1].clone()
        self.heights = (log_density(self.edges) - top).exp()

    def __call__(self, u: Tensor) -> Tensor:
        r"""Quantiles of probabilities `u`, float64, with the shape and device of `u`."""
        cumulative, edges = self.cumulative.to(u.device), self.edges.to(u.device)
        masses, heights = self.masses.to(u.device), self.heights.to(u.device)
        u = u.to(torch.float64)
        panel = (torch.searchsorted(cumulative, u.contiguous(), right=True) - 1).clamp(
            0, len(masses) - 1
        )
        part = ((u - cumulative[panel]) / masses[panel].clamp_min(1e-300)).clamp(0, 1)
        left, right = heights[panel], heights[panel + 1]
        root = (left**2 + part * (right**2 - left**2)).clamp_min(0).sqrt()
        flat = left + right == 0
        step = torch.where(flat, part, part * (left + right) / (left + root).clamp_min(1e-300))
        return edges[panel] + step.clamp(0, 1) * (edges[1] - edges[0])

    def cdf(self, x: Tensor) -> Tensor:
        """Probability below `x`, float64, with the shape and device of `x`."""
        cumulative, edges = self.cumulative.to(x.device), self.edges.to(x.device)
        masses, heights = self.masses.to(x.device), self.heights.to(x.device)
        x = x.to(torch.float64)
        position = ((x - edges[0]) / (edges[1] - edges[0])).clamp(0, len(masses))
        panel = position.long().clamp(0, len(masses) - 1)
        step = position - panel
        left, right = heights[panel], heights[panel + 1]
        area = (left + right) / 2
        part = torch.where(
            area == 0, step, (left * step + (right - left) * step**2 / 2) / area.clamp_min(1e-300)
        )
        return cumulative[panel] + part * masses[panel]


def _pieces(edges: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cut every interval into equal pieces no wider than `width`: lows, widths and owners."""
    spans = edges[1:] - edges[:-1]
    counts = torch.ceil(spans / width).clamp_min(1).long()
    owner = torch.repeat_interleave(torch.arange(len(spans)), counts)
    rank = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    step = (spans / counts)[owner]
    return edges[:-1][owner] + rank * step, step, owner


@checked
def integrate_cells(
    density: Callable[[Tensor], Tensor],
    edges: Sequence[Tensor],
    *,
    resolution: Sequence[float],
    tolerance: float = 1e-8,
    order: int = 8,
    max_boxes: int = 1 << 16,
) -> Tensor:
    r"""Integrals of a density over the cells of a rectangular grid, by adaptive quadrature.

    Every cell is cut into boxes no wider than `resolution`. A box is integrated with a product
    Gauss-Legendre rule, as a whole and in halves; where the two differ by more than the box's
    share of `tolerance`, its halves are treated likewise.

    Arguments:
        density: Takes float64 points with shape :math:`(n, d)` and returns densities with shape
            :math:`(n)`.
        edges: One float64 tensor of increasing cell edges per dimension.
        resolution: Largest width of a box before any refinement, per dimension. A feature much
            narrower than a tenth of it may be missed.
        tolerance: Bound on the total error estimate, in units of mass.
        order: Number of quadrature nodes per dimension.
        max_boxes: Number of boxes in one generation beyond which refinement stops, with a warning.
            Only a jump of the density, or a tolerance below rounding, leads there.

    Returns:
        The masses, float64, with shape :math:`(n_1, \dots, n_d)`, one less than the numbers of
        edges.

    Example:
        >>> edges = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
        >>> integrate_cells(lambda x: x[:, 0] ** 2, [edges], resolution=[1.0])
        tensor([0.3333, 8.6667], dtype=torch.float64)
    """
    dim = len(edges)
    shape = [len(e) - 1 for e in edges]
    lows, steps, owners = zip(*map(_pieces, edges, resolution), strict=True)
    low = torch.cartesian_prod(*lows).reshape(-1, dim)
    step = torch.cartesian_prod(*steps).reshape(-1, dim)
    index = torch.cartesian_prod(*owners).reshape(-1, dim)
    owner = torch.zeros(len(low), dtype=torch.long)
    for axis in range(dim):
        owner = owner * shape[axis] + index[:, axis]

    line, weights = _rule(order)
    nodes = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    weight = torch.cartesian_prod(*[weights] * dim).reshape(-1, dim).prod(-1)
    corners = torch.tensor(list(itertools.product((0.0, 0.5), repeat=dim)), dtype=torch.float64)

    def integrate(low: Tensor, step: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(low), max(1, _CHUNK // len(nodes))):
            block = slice(start, start + max(1, _CHUNK // len(nodes)))
            points = low[block, None] + step[block, None] * nodes
            values = density(points.reshape(-1, dim)).reshape(-1, len(nodes))
            parts.append(step[block].prod(-1) * (values @ weight))
        return torch.cat(parts) if parts else low.new_zeros(0)

    result = torch.zeros(math.prod(shape), dtype=torch.float64)
    area = math.prod(float(e[-1] - e[0]) for e in edges)
    whole = integrate(low, step)
    while len(low):
        child_low = (low[:, None] + corners * step[:, None]).reshape(-1, dim)
        child_step = (step / 2).repeat_interleave(len(corners), 0)
        children = integrate(child_low, child_step)
        halves = children.reshape(-1, len(corners)).sum(-1)
        error = (halves - whole).abs()
        done = error <= tolerance * step.prod(-1) / area
        left = float(error[~done].sum())
        full = int((~done).sum()) * len(corners) > max_boxes
        if full and left > tolerance:
            warnings.warn(
                f"cell masses are only good to {left:.1e}, asked for {tolerance:.1e}", stacklevel=3
            )
        if full or not left > tolerance:
            done = torch.ones_like(done)
        result.index_add_(0, owner[done], halves[done])
        again = (~done).repeat_interleave(len(corners))
        low, step, whole = child_low[again], child_step[again], children[again]
        owner = owner.repeat_interleave(len(corners))[again]
    return result.reshape(shape)


@checked
class GridRejection:
    r"""Exact draws from a smooth density in the plane, from a histogram of upper bounds.

    The bound of a cell is the largest density at its corners and centre, times `slack`. This holds
    wherever the log-density, within a cell, is monotone along both axes or curves by less than
    :math:`8 \log` `slack` over the cell's width squared.

    Arguments:
        energy: Takes float64 points with shape :math:`(n, 2)`, returns minus the log-density up
            to a constant.
        low: Lower corner of the box, two numbers. The box should hold all of the mass that
            matters.
        high: Upper corner of the box.
        cells: Number of cells per axis.
        slack: Safety factor of the bounds.
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        low: Sequence[float],
        high: Sequence[float],
        *,
        cells: int = 512,
        slack: float = 1.05,
    ) -> None:
        self.energy = energy
        grid = [
            torch.linspace(a, b, 2 * cells + 1, dtype=torch.float64)
            for a, b in zip(low, high, strict=True)
        ]
        points = torch.cartesian_prod(*grid)
        values = -energy(points).reshape(2 * cells + 1, 2 * cells + 1)
        bound = torch.stack(
            [
                values[:-1:2, :-1:2],
                values[2::2, :-1:2],
                values[:-1:2, 2::2],
                values[2::2, 2::2],
                values[1::2, 1::2],
            ]
        ).amax(0)
        self.cells = cells
        self.low = torch.stack([g[0] for g in grid])
        self.width = torch.stack([g[2] - g[0] for g in grid])
        self.log_bound = bound.flatten() + math.log(slack)
        mass = (self.log_bound - self.log_bound.max()).exp()
        self.cumulative = mass.cumsum(0) / mass.sum()

    def __call__(
        self, n: int, *, generator: torch.Generator | None, device: torch.device
    ) -> Tensor:
        """Draw `n` independent points, float64, with shape (n, 2), on `device`."""
        cumulative, bound = self.cumulative.to(device), self.log_bound.to(device)
        low, width = self.low.to(device), self.width.to(device)
        parts: list[Tensor] = []
        missing = n
        while missing > 0:
            trials = int(1.2 * missing) + 16
            u = torch.rand(trials, 4, dtype=torch.float64, generator=generator, device=device)
            cell = torch.searchsorted(cumulative, u[:, 0].contiguous(), right=True).clamp_max(
                len(bound) - 1
            )
            corner = torch.stack([cell // self.cells, cell % self.cells], -1)
            points = low + width * (corner + u[:, 1:3])
            accepted = points[u[:, 3].log() < -self.energy(points) - bound[cell]]
            parts.append(accepted[:missing])
            missing -= len(parts[-1])
        return torch.cat(parts) if parts else torch.empty(0, 2, dtype=torch.float64, device=device)
