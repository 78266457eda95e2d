r"""Student's t: tails that a Gaussian proposal underestimates.

Independent coordinates, or one multivariate law with :math:`\delta = (x - m) / s`:

.. math::
    E_{\rm ind}(x) = \frac{\nu + 1}{2} \sum_i \log \left( 1 + \frac{\delta_i^2}{\nu} \right),
    \qquad E_{\rm mult}(x) = \frac{\nu + d}{2} \log \left( 1 + \frac{\|\delta\|^2}{\nu} \right)

with the normalisers

.. math::
    \log Z_{\rm mult} = \log \Gamma \left( \tfrac{\nu}{2} \right) - \log \Gamma \left( \tfrac{\nu +
    d}{2} \right) + \tfrac{d}{2} \log (\nu \pi) + d \log s

and :math:`d` times its one-dimensional value for independent coordinates. Draws are exact: with
two uniforms, :math:`\sqrt{\nu (u^{-2/\nu} - 1)} \cos(2 \pi v)` follows Student's t, and the
coordinates of the multivariate law follow one after the other, because :math:`x_{j+1}` given the
first :math:`j` is a Student's t with :math:`\nu + j` degrees of freedom and scale
:math:`\sqrt{(\nu + \|\delta_{1..j}\|^2) / (\nu + j)}`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from energies.target import Target
from rsm_sampler.checked import checked

__all__ = ["StudentT"]


@checked
class StudentT(Target):
    r"""Student's t in any dimension; the moments of order `df` and above do not exist.

    Arguments:
        dim: Number of coordinates.
        df: Degrees of freedom :math:`\nu`.
        loc: Centre :math:`m`, the same for all coordinates.
        scale: Scale :math:`s`, the same for all coordinates.
        independent: Whether the coordinates are independent. Otherwise the law depends on the
            distance to the centre alone.

    Raises:
        ValueError: If `dim` is below one, or `df` or `scale` is not positive.

    References:
        | Polar generation of random variates with the t-distribution (Bailey, 1994)
        | https://doi.org/10.1090/S0025-5718-1994-1219702-8

    Example:
        >>> target = StudentT(dim=2, df=1.0, independent=True)  # two Cauchy variables
        >>> round(target.log_z, 6)  # 2 log(pi)
        2.28946
    """

    def __init__(
        self,
        dim: int = 2,
        df: float = 3.0,
        *,
        loc: float = 0.0,
        scale: float = 1.0,
        independent: bool = False,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not (df > 0 and math.isfinite(df)):
            raise ValueError(f"df must be positive and finite, got {df}")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.df = float(df)
        self.loc = float(loc)
        self.scale = float(scale)
        self.independent = independent
        centre = torch.full((dim,), self.loc, dtype=torch.float64)
        reach = self.scale * self._tail_bound(1e-6 / dim)
        super().__init__(
            dim=dim,
            name="student-t",
            extent=(centre - reach, centre + reach),
            log_z=dim * self._log_norm(1) if independent else self._log_norm(dim),
            modes=centre[None],
            mode_weights=torch.ones(1, dtype=torch.float64),
        )

    def _log_norm(self, dim: int) -> float:
        half = self.df / 2
        gammas = math.lgamma(half) - math.lgamma(half + dim / 2)
        return gammas + dim / 2 * math.log(self.df * math.pi) + dim * math.log(self.scale)

    def _tail_bound(self, probability: float) -> float:
        """Number of scales beyond which a coordinate lies with less than `probability`.

        From (1 + t^2 / df) > t^2 / df; close for few degrees of freedom, generous for many.
        """
        log_height = -self._log_norm(1) + math.log(self.scale)
        log_bound = (
            math.log(2) + log_height + (self.df + 1) / 2 * math.log(self.df) - math.log(self.df)
        )
        return math.exp((log_bound - math.log(probability)) / self.df)

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Energy in the file's first formula, without the normaliser."""
        square = ((x - self.loc) / self.scale) ** 2 / self.df
        if self.independent:
            return (self.df + 1) / 2 * square.log1p().sum(-1)
        return (self.df + self.dim) / 2 * square.sum(-1).log1p()

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        u = torch.rand(2, n, self.dim, dtype=torch.float64, generator=generator, device=device)
        columns: list[Tensor] = []
        square = torch.zeros(n, dtype=torch.float64, device=device)
        for j in range(self.dim):
            df = self.df if self.independent else self.df + j
            # 1 - u lies in (0, 1]; expm1 keeps the digits near the centre
            radius = (df * torch.expm1(-2 / df * torch.log1p(-u[0, :, j]))).sqrt()
            t = radius * (2 * math.pi * u[1, :, j]).cos()
            if not self.independent:
                t = t * ((self.df + square) / df).sqrt()
                square = square + t**2
            columns.append(t)
        return self.loc + self.scale * torch.stack(columns, -1)
