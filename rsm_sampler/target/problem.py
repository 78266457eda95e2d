r"""What the user brings, seen once from unbounded coordinates.

A :class:`Problem` holds the counted energy, what lies between its coordinates and unbounded ones,
the contexts, and where gradients come from. Its :meth:`~Problem.potential` is the only place where
an energy is pulled back,

.. math:: E_u(u) = E(x(u)) - \log\left|\det \partial x / \partial u\right|,

in double precision. Autograd is tried once, when a gradient is first asked for.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.target.contexts import Contexts
from rsm_sampler.target.coordinates import Coordinates
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.gradients import (
    GradientMethod,
    autograd_value_and_gradient,
    difference_gradient,
    differentiable,
)

__all__ = ["Problem"]

_FINE = 1e-3  # step of differences, in units of the width that the caller states


class Problem:
    """The energy in unbounded coordinates, with its gradient.

    Arguments:
        energy: The energy in the user's coordinates, on its meter.
        coordinates: From unbounded coordinates u to the user's x.
        contexts: The law of contexts of a conditional energy, or None.
        gradients: ``"autograd"``, ``"differences"``, ``"none"``, or ``"auto"``: autograd where it
            works, else differences.
        reach: Largest absolute value of an unbounded coordinate that is evaluated; beyond it the
            energy is taken for infinite. None for no limit.

    Attributes:
        dim: Length of u.
    """

    def __init__(
        self,
        energy: MeteredEnergy,
        coordinates: Coordinates,
        *,
        contexts: Contexts | None = None,
        gradients: GradientMethod = "auto",
        reach: float | None = None,
    ) -> None:
        self.energy, self.coordinates, self.contexts = energy, coordinates, contexts
        self.gradients, self.reach = gradients, reach
        self.dim = coordinates.reduced
        self._slope: Literal["autograd", "differences"] | None = None

    def potential(
        self,
        u: Float[Tensor, "n dim"],
        context: Float[Tensor, "n context_dim"] | None = None,
        *,
        purpose: str = "search",
    ) -> Float[Tensor, " n"]:
        """The energy of unbounded points, in nats; infinite beyond the reach.

        Arguments:
            u: Points.
            context: Contexts, for a conditional energy.
            purpose: The account of the meter.
        """
        u = u.double()
        if self.reach is not None:
            within = (u.abs() <= self.reach).all(-1)
            if not bool(within.all()):
                value = torch.full_like(u[:, 0], torch.inf)
                if bool(within.any()):
                    inner = None if context is None else context[within]
                    value[within] = self._pulled_back(u[within], inner, purpose)
                return value
        return self._pulled_back(u, context, purpose)

    def _pulled_back(self, u: Tensor, context: Tensor | None, purpose: str) -> Tensor:
        x, log_det = self.coordinates.forward(u)
        x = self.coordinates.inside(x, self.energy.dtype)
        return self.energy(x, context, purpose=purpose).double() - log_det

    def slope_by(self, u: Float[Tensor, "n dim"]) -> Literal["autograd", "differences"]:
        """Where gradients come from; tried on two of the points when first asked.

        Arguments:
            u: Points of finite energy.

        Raises:
            EnergyError: If autograd was asked for and cannot differentiate the energy.
        """
        if self._slope is None:
            x = self.coordinates.forward(u[:2].double())[0]
            if self.gradients == "autograd":
                self.energy.value_and_gradient(x, purpose="search")
            works = self.gradients == "autograd" or (
                self.gradients == "auto" and differentiable(self.energy, x, "search")
            )
            self._slope = "autograd" if works else "differences"
        return self._slope

    def slope_cost(self, u: Float[Tensor, "n dim"]) -> int:
        """Evaluations that a value with its gradient costs.

        Arguments:
            u: Points of finite energy.
        """
        return 2 if self.slope_by(u) == "autograd" else 1 + 2 * self.dim

    def value_and_slope(
        self, u: Float[Tensor, "n dim"], width: Float[Tensor, " dim"], *, purpose: str = "search"
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n dim"]]:
        """Energies and their gradients; gradients are 0 where they are not finite.

        Arguments:
            u: Points.
            width: Widths of the law in the coordinates; differences take a thousandth of them.
            purpose: The account of the meter.
        """
        if self.slope_by(u) == "autograd":
            value, slope = autograd_value_and_gradient(
                self.energy,
                self.coordinates.forward,
                u.double(),
                purpose=purpose,
                inside=self.coordinates.inside,
            )
        else:
            value = self.potential(u, purpose=purpose)
            slope = difference_gradient(self._evaluator(purpose), u.double(), step=_FINE * width)
        slope = torch.where(value.isfinite()[:, None], slope, 0.0).nan_to_num(0.0, 0.0, 0.0)
        return value, slope

    def _evaluator(self, purpose: str) -> Callable[[Tensor], Tensor]:
        return lambda u: self.potential(u, purpose=purpose)
