r"""Double well and many-well, two families that share a name.

:class:`ManyWell`: coordinates come in pairs :math:`(a, b)`, each with the energy

.. math:: E(a, b) = -\tfrac12 a - 6 a^2 + a^4 + \tfrac12 b^2

a tilted double well beside a Gaussian. One pair is the double well in the plane; sixteen pairs are
the 32-dimensional many-well with :math:`2^{16}` modes of unequal weight. All knowledge is that of
one variable: :math:`\int e^{a/2 + 6 a^2 - a^4} da = 11784.50927`, hence

.. math::
    \log Z = \frac{d}{2} \left( \log 11784.50927 + \tfrac12 \log 2 \pi \right)
    = 164.70 \quad (d = 32),

the wells are the outer roots of :math:`4 a^3 - 12 a - \tfrac12 = 0`, and draws follow from the
inverse CDF of :math:`a`.

:class:`SymmetricManyWell`: m coordinates in double wells that are deep and alike, the others
normal,

.. math:: E(x) = \sum_{i \le m} (x_i^2 - \delta)^2 + \tfrac12 \sum_{i > m} x_i^2 ,

with :math:`2^m` modes of equal weight at :math:`\pm\sqrt\delta` behind barriers of height
:math:`\delta^2`.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from energies.quadrature import InverseCDF
from energies.target import Target
from rsm_sampler.checked import checked

__all__ = ["ManyWell", "SymmetricManyWell"]

_MAX_LISTED_PAIRS = 10


def _well_energy(a: Tensor) -> Tensor:
    square = a**2
    return -0.5 * a + square * (square - 6)


@checked
class ManyWell(Target):
    r"""Independent pairs of a tilted double well and a standard normal variable.

    The even coordinates 0, 2, ... are the double wells. Modes are listed for up to ten pairs (1024
    modes); beyond that `modes` and `mode_weights` are ``None``, and :meth:`wells` with
    `well_weights` tell the same per pair.

    Arguments:
        dim: Number of coordinates, even: 2 is the double well, 32 the usual many-well.

    Attributes:
        wells_at: Positions of the left and the right minimum of a double well, with shape (2).
        well_weights: Share of the mass left and right of the barrier, with shape (2).

    Raises:
        ValueError: If `dim` is not a positive even number.

    References:
        | Flow Annealed Importance Sampling Bootstrap (Midgley et al., 2023)
        | https://arxiv.org/abs/2208.01893

    Example:
        >>> target = ManyWell(32)
        >>> round(target.log_z, 2)
        164.7
        >>> target.well_weights
        tensor([0.1557, 0.8443], dtype=torch.float64)
    """

    def __init__(self, dim: int = 32) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be a positive even number, got {dim}")
        pairs = dim // 2
        left, barrier, right = sorted(np.roots([4.0, 0.0, -12.0, -0.5]).real.tolist())
        self.barrier: float = barrier
        self.wells_at = torch.tensor([left, right], dtype=torch.float64)
        self._table = InverseCDF(lambda a: -_well_energy(a), -4.5, 4.5)
        # each side on its own panels: the share is exact, not read off the table
        sides = [
            InverseCDF(lambda a: -_well_energy(a), *ends, panels=1024).log_mass
            for ends in ((-4.5, barrier), (barrier, 4.5))
        ]
        self.well_weights = torch.tensor(sides, dtype=torch.float64).softmax(0)
        modes = weights = None
        if pairs <= _MAX_LISTED_PAIRS:
            signs = torch.tensor(list(itertools.product((0, 1), repeat=pairs)))
            modes = torch.zeros(len(signs), dim, dtype=torch.float64)
            modes[:, 0::2] = self.wells_at[signs]
            weights = self.well_weights[signs].prod(-1)
        tail = 1e-6 / dim
        reach = torch.empty(2, dim, dtype=torch.float64)
        reach[:, 0::2] = self._table(torch.tensor([tail / 2, 1 - tail / 2], dtype=torch.float64))[
            :, None
        ]
        normal = float(torch.special.ndtri(torch.tensor(tail / 2, dtype=torch.float64)))
        reach[:, 1::2] = torch.tensor([[normal], [-normal]], dtype=torch.float64)
        super().__init__(
            dim=dim,
            name="double-well" if dim == 2 else f"many-well-{dim}",
            extent=(reach[0], reach[1]),
            log_z=pairs * (self._table.log_mass + 0.5 * math.log(2 * math.pi)),
            modes=modes,
            mode_weights=weights,
        )

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Sum of the pairs' energies."""
        return (_well_energy(x[..., 0::2]) + 0.5 * x[..., 1::2] ** 2).sum(-1)

    def wells(self, x: Float[Tensor, "*batch dim"]) -> Bool[Tensor, "*batch pairs"]:
        r"""Whether each pair sits in its right well, with shape :math:`(*, d / 2)`."""
        self._check(x)
        return x[..., 0::2] > self.barrier

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        r"""One for the mode on the same side of every barrier, with shape :math:`(*, 2^{d/2})`.

        Raises:
            ValueError: If there are more than ten pairs.
        """
        right = self.wells(x)
        if self.modes is None:
            raise ValueError(
                f"{self.name} has {2 ** (self.dim // 2)} modes; use wells(x) with well_weights"
            )
        place = 2 ** torch.arange(right.shape[-1] - 1, -1, -1, device=x.device)
        return torch.nn.functional.one_hot((right * place).sum(-1), len(self.modes)).to(x.dtype)

    def well_cdf(self, a: Tensor) -> Tensor:
        """CDF of a double-well coordinate, float64, with the shape of `a`."""
        return self._table.cdf(a)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        u = torch.rand(n, self.dim // 2, dtype=torch.float64, generator=generator, device=device)
        noise = torch.randn(
            n, self.dim // 2, dtype=torch.float64, generator=generator, device=device
        )
        return torch.stack([self._table(u), noise], -1).flatten(-2)


@checked
class SymmetricManyWell(Target):
    r"""m equal double wells among normal coordinates.

    Arguments:
        dim: Number d of coordinates.
        wells: Number m of double wells, the first coordinates; at most ten, so that the modes can
            be listed.
        separation: The square :math:`\delta` of the wells' distance from the origin.

    Raises:
        ValueError: If a number is out of range.

    References:
        | Trust region constrained measure transport in path space (Blessing et al., 2025)
        | https://arxiv.org/abs/2508.12511

    Example:
        >>> target = SymmetricManyWell(50)
        >>> len(target.modes), round(target.log_z, 3)
        (32, 40.811)
    """

    def __init__(self, dim: int = 5, *, wells: int = 5, separation: float = 4.0) -> None:
        if not 1 <= wells <= min(dim, _MAX_LISTED_PAIRS):
            raise ValueError(
                f"wells must be from 1 to min(dim, {_MAX_LISTED_PAIRS}), got {wells} for dim {dim}"
            )
        if not (separation > 0 and math.isfinite(separation)):
            raise ValueError(f"separation must be positive and finite, got {separation}")
        self.num_wells, self.separation = wells, float(separation)
        centre = math.sqrt(separation)
        end = math.sqrt(separation + 6.0)  # where the energy is 36
        self._table = InverseCDF(lambda a: -self._well(a), -end, end)
        modes = torch.zeros(2**wells, dim, dtype=torch.float64)
        modes[:, :wells] = centre * torch.tensor(
            list(itertools.product((-1.0, 1.0), repeat=wells)), dtype=torch.float64
        )
        tail = torch.tensor(1 - 0.5e-6 / dim, dtype=torch.float64)
        reach = torch.full((dim,), float(torch.special.ndtri(tail)), dtype=torch.float64)
        reach[:wells] = self._table(tail)
        super().__init__(
            dim=dim,
            name=f"many-well-m{wells}" + ("" if dim == wells else f"-{dim}d"),
            extent=(-reach, reach),
            log_z=wells * self._table.log_mass + 0.5 * (dim - wells) * math.log(2 * math.pi),
            modes=modes,
            mode_weights=torch.full((2**wells,), 2.0**-wells, dtype=torch.float64),
        )

    def _well(self, a: Tensor) -> Tensor:
        return (a.square() - self.separation).square()

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """The double wells and the normal coordinates."""
        m = self.num_wells
        return self._well(x[..., :m]).sum(-1) + 0.5 * x[..., m:].square().sum(-1)

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        r"""One for the mode on the same side of every barrier, with shape :math:`(*, 2^m)`."""
        self._check(x)
        right = x[..., : self.num_wells] > 0
        place = 2 ** torch.arange(self.num_wells - 1, -1, -1, device=x.device)
        return torch.nn.functional.one_hot((right * place).sum(-1), 2**self.num_wells).to(x.dtype)

    def well_cdf(self, a: Tensor) -> Tensor:
        """CDF of a double-well coordinate, float64, with the shape of `a`."""
        return self._table.cdf(a)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        u = torch.rand(n, self.num_wells, dtype=torch.float64, generator=generator, device=device)
        noise = torch.randn(
            n, self.dim - self.num_wells, dtype=torch.float64, generator=generator, device=device
        )
        return torch.cat([self._table(u), noise], -1)
