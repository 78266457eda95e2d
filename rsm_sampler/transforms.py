r"""The coordinates in which the diffusion runs.

Users' coordinates x may be bounded, far from the origin, and stretched. The diffusion model
works on :math:`z \in \mathbb R^d` with mean about 0 and covariance about the identity:

.. math:: u = m + L z, \qquad x = b(u),

with :math:`m, L` found by the search (:mod:`rsm_sampler.search`) and :math:`b` applied to each
coordinate:

==================== ============================== ===========================================
bounds               :math:`b(u)`                   :math:`\log b'(u)`
==================== ============================== ===========================================
none                 :math:`u`                      0
:math:`x > l`        :math:`l + \log(1 + e^u)`      :math:`\log \mathrm{sig}(u)`
:math:`x < h`        :math:`h - \log(1 + e^{-u})`   :math:`\log \mathrm{sig}(-u)`
:math:`l < x < h`    :math:`l + (h-l)\,\mathrm{sig}(u)`  :math:`\log (h-l) + \log\mathrm{sig}(u)
                                                    + \log\mathrm{sig}(-u)`
==================== ============================== ===========================================

A density follows its coordinates: :math:`E_u(u) = E(b(u)) - \sum_i \log b'(u_i)`, and
:math:`\log p(x) = \log p(z) - \log|\det L| - \sum_i \log b'(u_i)`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Affine", "Bounds"]


class Bounds:
    r"""One- and two-sided bounds of single coordinates, removed by a change of variable.

    Arguments:
        low: Lower bounds, a number or one for each coordinate; ``-inf`` for none.
        high: Upper bounds; ``inf`` for none.
        dim: Number of coordinates.

    Raises:
        ValueError: If a shape does not fit, a bound is NaN, or low is not below high.

    Example:
        >>> bounds = Bounds(0.0, 1.0, dim=2)
        >>> bounds.forward(torch.zeros(1, 2))[0]
        tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        low: float | Sequence[float] | Tensor,
        high: float | Sequence[float] | Tensor,
        dim: int,
    ) -> None:
        self.low, self.high = _bound("low", low, dim), _bound("high", high, dim)
        if not bool((self.low < self.high).all()):
            raise ValueError(
                "bounds must have low below high in every coordinate, got low "
                f"{self.low.tolist()} and high {self.high.tolist()}"
            )

    @property
    def active(self) -> bool:
        """Whether any coordinate is bounded."""
        return bool(self.low.isfinite().any() or self.high.isfinite().any())

    def forward(
        self, u: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch"]]:
        """The bounded point x and log|det dx/du|."""
        if not self.active:
            return u, torch.zeros_like(u[..., 0])
        low, high = self.low.to(u), self.high.to(u)
        has_low, has_high = low.isfinite(), high.isfinite()
        low_or_0, high_or_0 = torch.where(has_low, low, 0), torch.where(has_high, high, 0)
        width = torch.where(has_low & has_high, high_or_0 - low_or_0, 1)
        sigmoid = torch.nn.functional.logsigmoid
        softplus = torch.nn.functional.softplus
        x = torch.where(
            has_low & has_high,
            torch.where(
                u < 0, low_or_0 + width * torch.sigmoid(u), high_or_0 - width * torch.sigmoid(-u)
            ),
            torch.where(
                has_low,
                low_or_0 + softplus(u),
                torch.where(has_high, high_or_0 - softplus(-u), u),
            ),
        )
        log_det = torch.where(has_low, sigmoid(u), 0) + torch.where(has_high, sigmoid(-u), 0)
        return x, (log_det + width.log()).sum(-1)

    def inverse(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The unbounded point u; NaN for x on or outside the bounds."""
        if not self.active:
            return x
        low, high = self.low.to(x), self.high.to(x)
        above, below = x - low, high - x
        two = low.isfinite() & high.isfinite()
        outside = (above <= 0) | (below <= 0)
        u = torch.where(
            two,
            above.log() - below.log(),
            torch.where(
                low.isfinite(),
                _inverse_softplus(above),
                torch.where(high.isfinite(), -_inverse_softplus(below), x),
            ),
        )
        return torch.where(outside, torch.nan, u)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that make the same bounds again."""
        return {"low": self.low, "high": self.high}


class Affine:
    r"""Location and scale, :math:`u = m + L z` with a lower triangular L.

    Arguments:
        loc: The location m, with shape (dim).
        scale_tril: The factor L, with shape (dim, dim) and a positive diagonal.
    """

    def __init__(self, loc: Float[Tensor, " dim"], scale_tril: Float[Tensor, "dim dim"]) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        self.log_det = float(scale_tril.double().diagonal().log().sum())

    @classmethod
    def identity(cls, dim: int) -> "Affine":
        """No change of coordinates."""
        return cls(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))

    def forward(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """u of z, with z's dtype and device."""
        return self.loc.to(z) + z @ self.scale_tril.to(z).mT

    def inverse(self, u: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """z of u."""
        shifted = (u - self.loc.to(u)).unsqueeze(-1)
        factor = self.scale_tril.to(u)
        return torch.linalg.solve_triangular(factor, shifted, upper=False).squeeze(-1)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that make the same map again."""
        return {"loc": self.loc, "scale_tril": self.scale_tril}


def _bound(name: str, value: float | Sequence[float] | Tensor, dim: int) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if tensor.dim() > 1 or tensor.numel() not in {1, dim}:
        raise ValueError(
            f"{name} must be a number or {dim} numbers, got shape {tuple(tensor.shape)}"
        )
    if bool(tensor.isnan().any()):
        raise ValueError(f"{name} must not be NaN, got {tensor.tolist()}")
    return tensor.expand(dim).clone()


def _inverse_softplus(y: Tensor) -> Tensor:
    """log(e^y - 1), precise at both ends."""
    return torch.where(y > math.log(2), y + torch.log(-torch.expm1(-y)), torch.expm1(y).log())
