r"""A small inference problem, as users bring them: NumPy code, one parameter vector at a time.

Two substances decay, and the sum of what is left is measured at twelve times:

.. math::
    y_i = e^{-k_1 t_i} + e^{-k_2 t_i} + 0.05\, \epsilon_i , \qquad
    \theta = (\log k_1, \log k_2) \sim \mathcal N(0, I) .

Nothing says which substance is which, so the posterior has two mirrored modes of equal weight
across the line :math:`\theta_1 = \theta_2`: a fast and a slow rate, in either order.
:func:`decay_energy` is the black box, :class:`DecayPosterior` the same energy in PyTorch with its
normaliser, moments and cell masses by quadrature.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from energies.quadrature import GridRejection
from energies.target import Constants, Target
from rsm_sampler.checked import checked

__all__ = ["DecayPosterior", "decay_energy"]

NOISE = 0.05
TIMES = np.linspace(0.25, 3.0, 12)
MEASURED = np.array(
    # rates 0.5 and 3.0 and numpy.random.default_rng(0), rounded
    [1.361, 0.995, 0.825, 0.662, 0.532, 0.502, 0.487, 0.418, 0.291, 0.224, 0.222, 0.225]
)


@checked
def decay_energy(theta: npt.NDArray[np.float64]) -> float:
    r"""Minus the log of likelihood times prior, without their constants, at one point.

    Arguments:
        theta: Logarithms of the two rates, with shape (2).

    Returns:
        The energy; plus infinity is never reached, every rate is possible.

    Example:
        >>> decay_energy(np.array([0.0, 0.0])) > decay_energy(np.log([0.5, 3.0]))
        True
    """
    with np.errstate(over="ignore"):  # a rate of inf leaves nothing of its substance
        fitted = np.exp(-np.exp(theta[0]) * TIMES) + np.exp(-np.exp(theta[1]) * TIMES)
    return float(0.5 * np.sum(((MEASURED - fitted) / NOISE) ** 2) + 0.5 * np.sum(theta**2))


@checked
class DecayPosterior(Target):
    r"""Posterior of two decay rates, bimodal by symmetry, with everything known by quadrature.

    Attributes:
        mean: Posterior mean of the parameters, with shape (2): both entries are equal by symmetry.
        covariance: Posterior covariance, with shape (2, 2).

    Example:
        >>> target = DecayPosterior()
        >>> theta = np.log([0.5, 3.0])
        >>> bool(np.isclose(float(target(torch.from_numpy(theta))), decay_energy(theta)))
        True
    """

    def __init__(self) -> None:
        self._constants = Constants(
            times=torch.from_numpy(TIMES), measured=torch.from_numpy(MEASURED)
        )
        peak, mode = self._find_mode()
        # panels of width 0.125 with eight nodes: the posterior is smooth on that scale
        nodes, weights = np.polynomial.legendre.leggauss(8)
        line = (
            torch.arange(-4.0, 4.0, 0.125)[:, None] + torch.from_numpy(0.0625 * (nodes + 1))
        ).flatten()
        weight = torch.from_numpy(0.0625 * weights).repeat(64)
        grid = torch.cartesian_prod(line, line)
        mass = (peak - self.energy(grid)).exp() * torch.outer(weight, weight).flatten()
        zeroth = float(mass.sum())
        mean = float(mass @ grid[:, 0]) / zeroth
        variance = float(mass @ grid[:, 0] ** 2) / zeroth
        mixed = float(mass @ (grid[:, 0] * grid[:, 1])) / zeroth
        self.mean = torch.tensor([mean, mean], dtype=torch.float64)
        self.covariance = (
            torch.tensor([[variance, mixed], [mixed, variance]], dtype=torch.float64) - mean**2
        )
        super().__init__(
            dim=2,
            name="decay",
            extent=(
                torch.full((2,), -1.8, dtype=torch.float64),
                torch.full((2,), 2.6, dtype=torch.float64),
            ),
            log_z=math.log(zeroth) - peak,
            modes=torch.stack([mode, mode.flip(0)]),
            mode_weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        )
        self._sampler: GridRejection | None = None

    def _find_mode(self) -> tuple[float, Tensor]:
        """Lowest energy and its place with the slow rate first, by Newton steps from a grid."""
        line = torch.linspace(-2.0, 2.5, 91, dtype=torch.float64)
        points = torch.cartesian_prod(line, line)
        x = points[(self.energy(points) + 1e9 * (points[:, 0] > points[:, 1])).argmin()]
        for _ in range(12):
            gradient = torch.autograd.functional.jacobian(self.energy, x)
            hessian = torch.autograd.functional.hessian(self.energy, x)
            x = x - torch.linalg.solve(hessian, gradient)
        return float(self.energy(x)), x

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """The energy of :func:`decay_energy`, for a batch."""
        times, measured = self._constants.like(x, "times", "measured")
        fitted = (-x.exp().unsqueeze(-1) * times).exp().sum(-2)
        return 0.5 * (((measured - fitted) / NOISE) ** 2).sum(-1) + 0.5 * (x**2).sum(-1)

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        r"""One for the mode in the same order of rates, with shape :math:`(*, 2)`."""
        self._check(x)
        slow_first = x[..., 0] < x[..., 1]
        return torch.stack([slow_first, ~slow_first], -1).to(x.dtype)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self._sampler is None:
            self._sampler = GridRejection(self.energy, (-2.5, -2.5), (4.0, 4.0), cells=320)
        return self._sampler(n, generator=generator, device=device)
