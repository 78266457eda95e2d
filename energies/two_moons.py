r"""Two moons: a ring cut open on both sides.

.. math::
    \log p(z) = -\frac12 \left( \frac{\|z\| - 2}{0.2} \right)^2
    + \log \left( e^{-\frac12 ((z_1 - 2) / 0.3)^2} + e^{-\frac12 ((z_1 + 2) / 0.3)^2} \right)

The sum makes it an equal mixture of a right and a left moon, mirror images of each other. The
normaliser is an integral over radius and angle; the angular integrand is smooth and periodic, so
that the trapezoidal rule converges geometrically. Draws come from
:class:`~energies.quadrature.GridRejection` and are exact.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from energies.quadrature import GridRejection, InverseCDF
from energies.target import Target
from rsm_sampler.checked import checked

__all__ = ["TwoMoons"]

_RADIUS, _WIDTH, _CUT = 2.0, 0.2, 0.3


@checked
class TwoMoons(Target):
    r"""Two moons in the plane, facing each other, with equal weight.

    References:
        | Efficient Online Reinforcement Learning for Diffusion Policy (Ma et al., 2025), (32)
        | https://arxiv.org/abs/2502.00361
        | Variational Inference with Normalizing Flows, table 1 (Rezende and Mohamed, 2015)
        | https://arxiv.org/abs/1505.05770

    Example:
        >>> target = TwoMoons()
        >>> round(target.log_z, 6)
        0.804214
        >>> target(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))  # a mode, and the gap
        tensor([ 0.0000, 21.5291])
    """

    def __init__(self) -> None:
        angle = torch.arange(1024, dtype=torch.float64) * (2 * math.pi / 1024)

        def radial(r: Tensor) -> Tensor:
            z = torch.stack([r[..., None] * angle.cos(), r[..., None] * angle.sin()], -1)
            return (-self.energy(z)).logsumexp(-1) + math.log(2 * math.pi / 1024) + r.log()

        reach = 8 * _WIDTH
        radius = InverseCDF(radial, _RADIUS - reach, _RADIUS + reach, panels=256)
        # a moon ends sideways where radius and cut are both five deviations out
        high = torch.tensor([_RADIUS + 5 * _WIDTH, _RADIUS + 5 * _WIDTH], dtype=torch.float64)
        super().__init__(
            dim=2,
            name="two-moons",
            extent=(-high, high),
            log_z=radius.log_mass,
            modes=torch.tensor([[_RADIUS, 0.0], [-_RADIUS, 0.0]], dtype=torch.float64),
            mode_weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        )
        self._sampler: GridRejection | None = None

    @staticmethod
    def _sides(x: Tensor) -> Tensor:
        """Log-density of the cut on the right and on the left, with shape (*batch, 2)."""
        return -0.5 * (torch.stack([x[..., 0] - _RADIUS, x[..., 0] + _RADIUS], -1) / _CUT) ** 2

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Minus the logarithm in the file's first formula."""
        radius = torch.linalg.vector_norm(x, dim=-1)
        return 0.5 * ((radius - _RADIUS) / _WIDTH) ** 2 - self._sides(x).logsumexp(-1)

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        r"""Posterior probability of the right and the left moon, with shape :math:`(*, 2)`."""
        self._check(x)
        return self._sides(x).softmax(-1)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self._sampler is None:
            reach = _RADIUS + 7.5 * _WIDTH
            self._sampler = GridRejection(self.energy, [-reach] * 2, [reach] * 2)
        return self._sampler(n, generator=generator, device=device)
