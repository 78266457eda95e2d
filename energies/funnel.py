r"""Neal's funnel: one coordinate sets the width of all others, over many orders of magnitude.

.. math::
    x_1 \sim \mathcal N(0, s^2), \qquad
    x_i | x_1 \sim \mathcal N(0, e^{x_1}) \quad (i = 2, \dots, d)

The energy below is minus the normalised log-density, so :math:`\log Z = 0`. With :math:`s = 3` the
widths run from :math:`e^{-7}` to :math:`e^{7}` within the box that holds all but :math:`10^{-6}`
of the mass.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from energies.target import Target
from rsm_sampler.checked import checked

__all__ = ["Funnel"]


@checked
class Funnel(Target):
    r"""Neal's funnel, with exact draws and :math:`\log Z = 0`.

    The density is highest far down the neck, where there is no mass, so that no modes are listed.

    Arguments:
        dim: Number of coordinates, at least two.
        scale: Standard deviation :math:`s` of the first coordinate.

    Raises:
        ValueError: If `dim` is below two or `scale` is not positive.

    References:
        | Slice Sampling, section 8 (Neal, 2003)
        | https://doi.org/10.1214/aos/1056562461

    Example:
        >>> target = Funnel()
        >>> target.dim, target.log_z
        (10, 0.0)
    """

    def __init__(self, dim: int = 10, scale: float = 3.0) -> None:
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.scale = float(scale)
        probability = 1e-6 / dim
        reach = torch.full((dim,), self._quantile(probability), dtype=torch.float64)
        reach[0] = -scale * float(
            torch.special.ndtri(torch.tensor(probability / 2, dtype=torch.float64))
        )
        super().__init__(dim=dim, name="funnel", extent=(-reach, reach), log_z=0.0)

    def _quantile(self, probability: float) -> float:
        """Where both tails of a later coordinate hold `probability`, by bisection."""
        z = torch.linspace(-10, 10, 2001, dtype=torch.float64)
        weight = (-0.5 * z**2).softmax(0)
        low, high = 0.0, 5 * self.scale + 10.0
        for _ in range(60):
            middle = (low + high) / 2
            tails = 2 * torch.special.ndtr(-math.exp(middle) * (-0.5 * self.scale * z).exp())
            low, high = (middle, high) if float(weight @ tails) > probability else (low, middle)
        return math.exp(high)

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Minus the normalised log-density."""
        first, others = x[..., 0], x[..., 1:]
        count = self.dim - 1
        neck = 0.5 * (first / self.scale) ** 2 + math.log(self.scale)
        # e^{-x_1/2} is squared with the coordinate, which overflows later than e^{-x_1}
        body = (
            0.5 * ((others * (-0.5 * first).exp().unsqueeze(-1)) ** 2).sum(-1)
            + 0.5 * count * first
        )
        return neck + body + 0.5 * self.dim * math.log(2 * math.pi)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        noise = torch.randn(n, self.dim, dtype=torch.float64, generator=generator, device=device)
        first = self.scale * noise[:, :1]
        return torch.cat([first, (first / 2).exp() * noise[:, 1:]], -1)
