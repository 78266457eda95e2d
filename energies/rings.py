r"""Concentric rings.

.. math:: \log p(x) = -100 \min_k (\|x\| - r_k)^2, \qquad r = (1, 3, 5)

Every ring is a Gaussian in the radius with standard deviation :math:`1 / \sqrt{200} = 0.0707`, cut
half-way to its neighbours. In polar coordinates the angle is uniform and the radius has density
:math:`\propto 2 \pi \rho\, p(\rho)`, so that normaliser, ring weights and exact draws are a matter
of one variable. Wider rings are heavier: the weights are close to 1/9, 3/9 and 5/9.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from energies.quadrature import InverseCDF
from energies.target import Target
from rsm_sampler.checked import checked

__all__ = ["Rings"]


@checked
class Rings(Target):
    r"""Concentric rings in the plane.

    The modes are circles: `modes` is ``None``, while `mode_weights` and :meth:`responsibilities`
    have one entry per ring.

    Arguments:
        radii: Radii of the rings, positive and increasing.
        sharpness: Factor of the squared distance to the nearest ring.

    Raises:
        ValueError: If `radii` are not positive and increasing, or `sharpness` is not positive.

    References:
        | Path Integral Sampler (Zhang and Chen, 2022)
        | https://arxiv.org/abs/2111.15141

    Example:
        >>> target = Rings()
        >>> target(torch.tensor([[3.0, 0.0], [2.0, 0.0]]))
        tensor([  0., 100.])
        >>> target.mode_weights
        tensor([0.1111, 0.3333, 0.5556], dtype=torch.float64)
    """

    def __init__(self, radii: Sequence[float] = (1.0, 3.0, 5.0), sharpness: float = 100.0) -> None:
        radii = tuple(float(r) for r in radii)
        if (
            not radii
            or not all(a < b for a, b in itertools.pairwise((0.0, *radii)))
            or math.isinf(radii[-1])
        ):
            raise ValueError(f"radii must be positive and increasing, got {radii}")
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        self.radii = radii
        self.sharpness = float(sharpness)
        std = 1 / math.sqrt(2 * sharpness)
        # panels end where the nearest ring changes, so that no panel holds the kink
        outer = radii[-1] + 8 * std
        cuts = [
            max(0.0, radii[0] - 12 * std),
            *((a + b) / 2 for a, b in itertools.pairwise(radii)),
            outer,
        ]
        self._tables = [
            InverseCDF(self._log_radial, low, high, panels=2048)
            for low, high in itertools.pairwise(cuts)
        ]
        log_masses = torch.tensor([table.log_mass for table in self._tables], dtype=torch.float64)
        high = torch.full((2,), radii[-1] + 5 * std, dtype=torch.float64)
        super().__init__(
            dim=2,
            name="rings",
            extent=(-high, high),
            log_z=float(log_masses.logsumexp(0)),
            mode_weights=log_masses.softmax(0),
        )

    def _distances(self, radius: Tensor) -> Tensor:
        return torch.stack([(radius - r).abs() for r in self.radii], -1)

    def _log_radial(self, radius: Tensor) -> Tensor:
        return (2 * math.pi * radius).log() - self.sharpness * self._distances(radius).amin(
            -1
        ) ** 2

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Squared distance to the nearest ring, times `sharpness`."""
        return self.sharpness * self._distances(torch.linalg.vector_norm(x, dim=-1)).amin(-1) ** 2

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch rings"]:
        r"""One for the nearest ring and zero for the others, with shape :math:`(*, k)`."""
        self._check(x)
        nearest = self._distances(torch.linalg.vector_norm(x, dim=-1)).argmin(-1)
        return torch.nn.functional.one_hot(nearest, len(self.radii)).to(x.dtype)

    def radial_cdf(self, radius: Tensor) -> Tensor:
        r"""Probability of the disc with each `radius`, float64, with the shape of `radius`."""
        assert self.mode_weights is not None
        return sum(
            (
                w * table.cdf(radius)
                for w, table in zip(self.mode_weights.tolist(), self._tables, strict=True)
            ),
            start=torch.zeros((), dtype=torch.float64, device=radius.device),
        )

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        assert self.mode_weights is not None
        u = torch.rand(3, n, dtype=torch.float64, generator=generator, device=device)
        ring = torch.searchsorted(
            self.mode_weights.cumsum(0).to(device), u[0].contiguous(), right=True
        )
        ring = ring.clamp_max(len(self.radii) - 1)
        radius = torch.stack([table(u[1]) for table in self._tables]).gather(0, ring[None])[0]
        angle = 2 * math.pi * u[2]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
