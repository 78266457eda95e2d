"""The energy as the witness sees it: in unbounded coordinates, counted, with gradients.

Nothing of a sampler enters: neither its points, nor its affine map, nor its bank.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.target.coordinates import Bounds, Coordinates
from rsm_sampler.target.energy import EnergyError, MeteredEnergy
from rsm_sampler.target.gradients import autograd_value_and_gradient
from rsm_sampler.target.problem import Problem

__all__ = ["Landscape"]


class Landscape:
    r"""Energies :math:`E_u(u) = E(b(u)) - \log|\det b'(u)|` in unbounded coordinates u.

    Arguments:
        energy: The energy in the user's coordinates, with its counter.
        coordinates: The map b.
        context: The context of all points, if the energy takes one.
        purpose: The energy's account.
        device: Where points live.

    Attributes:
        dim: Number of unbounded coordinates.
        two_sided: Which coordinates are bounded on both sides, (dim).
        differentiable: Whether autograd gives gradients; None until it was tried.
    """

    def __init__(
        self,
        energy: MeteredEnergy,
        coordinates: Coordinates,
        *,
        context: Float[Tensor, " context_dim"] | None = None,
        purpose: str = "witness",
        device: torch.device | None = None,
    ) -> None:
        self.energy, self.coordinates, self.purpose = energy, coordinates, purpose
        self._problem = Problem(energy, coordinates)
        self.device = torch.device("cpu") if device is None else device
        self.context = context
        self.dim = coordinates.reduced
        self.two_sided = torch.zeros(self.dim, dtype=torch.bool, device=self.device)
        if isinstance(coordinates, Bounds):
            both = coordinates.low.isfinite() & coordinates.high.isfinite()
            self.two_sided = both.to(self.device)
        self.differentiable: bool | None = None
        self._before = energy.evaluations

    @property
    def evaluations(self) -> int:
        """Evaluations so far by this object, in single points."""
        return self.energy.evaluations - self._before

    def value(self, u: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Energies in double precision; infinite where the energy is not finite.

        Arguments:
            u: Points.
        """
        if len(u) == 0:
            return u.new_zeros(0)
        return self._problem.potential(u, self._contexts(len(u)), purpose=self.purpose)

    def slope_cost(self) -> int:
        """Evaluations that a value with its gradient costs."""
        return 2 if self.differentiable else 2 * self.dim + 1

    def value_and_slope(
        self, u: Float[Tensor, "n dim"], step: Float[Tensor, "n 1"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n dim"]]:
        """Energies and their gradients, by autograd or by central differences.

        Arguments:
            u: Points.
            step: Length of the differences at each point, where autograd does not work.

        Returns:
            The energies, and the gradients: zero where the energy is infinite, and where a
            difference meets an infinite energy.
        """
        if self.differentiable is None:
            self._try(u)
        if self.differentiable:
            return self._by_autograd(u)
        n, dim = u.shape
        offsets = step[:, None] * torch.eye(dim, dtype=u.dtype, device=u.device)
        around = torch.cat([u[:, None], u[:, None] + offsets, u[:, None] - offsets], 1)
        values = self.value(around.reshape(-1, dim)).view(n, 2 * dim + 1)
        value, ahead, behind = torch.split(values, [1, dim, dim], -1)
        slope = ((ahead - behind) / (2 * step)).nan_to_num(0.0, 0.0, 0.0)
        return value[:, 0], slope

    def _try(self, u: Tensor) -> None:
        try:
            self._by_autograd(u[:2])
        except (EnergyError, RuntimeError, TypeError, ValueError):
            self.differentiable = False
        else:
            self.differentiable = True

    def _by_autograd(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = autograd_value_and_gradient(
            self.energy, self.coordinates.forward, u, context=self._contexts(len(u)),
            purpose=self.purpose, inside=self.coordinates.inside,
        )  # fmt: skip
        gradient = torch.where(value.isfinite()[:, None], gradient, 0.0)
        return value, gradient.nan_to_num(0.0, 0.0, 0.0)

    def _contexts(self, n: int) -> Tensor | None:
        if self.context is None:
            return None
        row = torch.as_tensor(self.context, dtype=torch.float32, device=self.device)
        return row.expand(n, -1)
