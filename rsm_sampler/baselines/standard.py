r"""An energy in the coordinates z of a network, with gradients that are counted.

Users' points are :math:`x = m + s B z`: a location m and a width s, given by the user, and B the
identity or, for particles, the isometry of :class:`~rsm_sampler.target.coordinates.MeanFree`.
Gradients follow by :math:`\nabla_z E = s B^\top \nabla_x E`.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.distributed import Team
from rsm_sampler.target.coordinates import Affine, Bounds, Coordinates, MeanFree
from rsm_sampler.target.energy import MeteredEnergy, metered, particles_of

__all__ = ["StandardEnergy", "location"]


@checked(skip=("energy",), above={"scale": 0})
class StandardEnergy:
    r"""The energy :math:`E(m + s B z)`, each call of which takes a gradient as well.

    Arguments:
        energy: The energy of points (n, dim), differentiable by autograd; or a meter around it.
        dim: Length of a point.
        particles: ``(n, s)`` for equal particles; the energy's own attribute if None.
        loc: Location m, a number or of shape (dim); not for particles.
        scale: Width s.
        device: Where to work, ``"auto"`` for a GPU where there is one.
        dtype: Precision.

    Attributes:
        meter: The counters.
        dim: Length of z.
        particles: ``(n, s)`` or None.
        affine: From z to unbounded coordinates.
        coordinates: From those to x.
        device: Where to work.
        dtype: Precision.

    Raises:
        TypeError: If the energy cannot be called.
        ValueError: If an argument is out of range; the message names it.

    Example:
        >>> target = StandardEnergy(lambda x: x.square().sum(-1) / 2, 1, scale=2.0, device="cpu")
        >>> z = torch.ones(1, 1, requires_grad=True)
        >>> torch.autograd.grad(target(z).sum(), z)[0], target.meter.evaluations
        (tensor([[4.]]), 2)
    """

    def __init__(
        self,
        energy: Callable[..., Tensor] | MeteredEnergy,
        dim: int,
        *,
        particles: tuple[int, int] | None = None,
        loc: float | Tensor = 0.0,
        scale: float = 1.0,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.meter = metered(energy, dim)
        particles = particles_of(self.meter.energy, particles)
        if particles is not None and particles[0] * particles[1] != dim:
            raise ValueError(f"particles must have n s equal to dim {dim}, got {particles}")
        self.coordinates: Coordinates = (
            Bounds(-math.inf, math.inf, dim) if particles is None else MeanFree(*particles)
        )
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self.device, self.dtype = Team(device).device, dtype
        self.particles, self.dim = particles, self.coordinates.reduced
        centre = location(loc, dim)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if particles is not None and bool((centre != 0).any()):
            raise ValueError(f"loc must be 0 for particles, got {loc}")
        if particles is not None:
            centre = centre[: self.dim]
        self.scale = float(scale)
        width = self.scale * torch.eye(self.dim, dtype=torch.float64)
        self.affine = Affine(centre.to(self.device), width.to(self.device))

    def to_x(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch x_dim"]:
        """The user's points."""
        return self.coordinates.forward(self.affine.forward(z))[0]

    def to_z(self, x: Float[Tensor, "*batch x_dim"]) -> Float[Tensor, "*batch dim"]:
        """The coordinates z of the user's points."""
        return self.affine.inverse(self.coordinates.inverse(x))

    def __call__(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Energies, (*batch), with a graph to their gradients; two evaluations each."""
        value, slope = self.meter.value_and_gradient(self.to_x(z.detach()))
        gradient = self.scale * self.coordinates.inverse(slope)
        # The graph ends here, in a plane with the energy's value and slope.
        return value.to(z) + ((z - z.detach()) * gradient).sum(-1)


@checked
def location(loc: float | Tensor, dim: int) -> Float[Tensor, " dim"]:
    """A location in double precision, from a number or a vector.

    Arguments:
        loc: The number or the vector.
        dim: Its length.

    Raises:
        ValueError: If the shape does not fit or a number is not finite.
    """
    found = torch.as_tensor(loc, dtype=torch.float64).detach().cpu()
    if found.dim() > 1 or found.numel() not in {1, dim} or not bool(found.isfinite().all()):
        raise ValueError(f"loc must be a finite number or {dim} of them, got {loc}")
    return found.expand(dim).clone()
