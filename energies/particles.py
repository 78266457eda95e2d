r"""Particles that only feel each other: double-well and Lennard-Jones clusters.

The energy of n particles in s dimensions is a sum over pairs, perhaps with a harmonic tether to
the centre of mass,

.. math:: E(x) = \sum_{i < j} e(\| x_i - x_j \|) + \frac k2 \sum_i \| x_i - \bar x \|^2 ,

and does not change when all particles move together. Its law therefore lives on the subspace
:math:`\sum_i x_i = 0` of dimension :math:`(n - 1) s`; draws lie in it, and :math:`\log Z` refers
to orthonormal coordinates of it, those of :class:`~rsm_sampler.target.coordinates.MeanFree`.

**The double-well cluster is solved exactly.** With particle 1 at the origin the others have radii
and angles. Expanded in Fourier series of the angle between two of them, the angular integrals of
a ring of three pairs leave one sum, and with Gauss-Legendre nodes :math:`r_a` of weight
:math:`\omega_a` for the radii

.. math:: \int e^{-E} dx_2\, dx_3\, dx_4 = (2 \pi)^3 \sum_{k = -\infty}^{\infty}
    \operatorname{tr} A_k^3, \qquad
    (A_k)_{ab} = \sqrt{u_a u_b}\, \frac1{2\pi} \int_0^{2\pi} e^{-e(d_{ab}(\theta))}
    \cos k \theta \, d\theta,

with :math:`u_a = \omega_a r_a e^{-e(r_a)}` and :math:`d_{ab}(\theta)` the distance of two points
at radii a and b. Its derivatives with respect to an inverse temperature give the mean and the
variance of the energy. Exact draws come from rejection.

**The virial theorem** checks any samples: :math:`\mathbb E[x \cdot \nabla E] = (n - 1) s`.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from energies.chains import long_chains
from energies.quadrature import InverseCDF
from energies.target import Target
from rsm_sampler.checked import checked
from rsm_sampler.target.coordinates import MeanFree

__all__ = ["DoubleWellCluster", "LennardJones", "ParticleTarget"]


@checked
class ParticleTarget(Target):
    """An energy of particles that depends on their distances alone.

    A subclass implements :meth:`pair_energy`.

    Arguments:
        num_particles: Number n of particles, at least two.
        space_dim: Dimension s of the space they live in.
        name: Name for reports.
        reach: All coordinates of centred particles are below it, but for a mass of 1e-6.
        tether: Stiffness k of the tether to the centre of mass.
        log_z: Log-normaliser on the mean-free subspace, or None if unknown.

    Attributes:
        coordinates: Orthonormal coordinates of the subspace where the law lives.
        particles: Both numbers; a trainer that is given the energy knows its symmetries by them.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_particles: int,
        space_dim: int,
        *,
        name: str,
        reach: float,
        tether: float = 0.0,
        log_z: float | None = None,
    ) -> None:
        self.coordinates = MeanFree(num_particles, space_dim)
        self.num_particles, self.space_dim, self.tether = num_particles, space_dim, tether
        self.particles = (num_particles, space_dim)
        high = torch.full((num_particles * space_dim,), float(reach), dtype=torch.float64)
        super().__init__(
            dim=num_particles * space_dim, name=name, extent=(-high, high), log_z=log_z
        )
        self._pairs = torch.triu_indices(num_particles, num_particles, 1)

    def pair_energy(self, square: Float[Tensor, "*batch pairs"]) -> Float[Tensor, "*batch pairs"]:
        """Energy of each pair, from its squared distance."""
        raise NotImplementedError

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Sum over the pairs, and the tether."""
        points = x.unflatten(-1, (self.num_particles, self.space_dim))
        first, second = self._pairs.to(x.device)
        gap = points.index_select(-2, first) - points.index_select(-2, second)
        energy = self.pair_energy(gap.square().sum(-1)).sum(-1)
        if self.tether:
            centred = points - points.mean(-2, keepdim=True)
            energy = energy + 0.5 * self.tether * centred.square().sum((-2, -1))
        return energy

    def distances(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch pairs"]:
        """Distances of all pairs of particles."""
        self._check(x)
        points = x.unflatten(-1, (self.num_particles, self.space_dim))
        first, second = self._pairs.to(x.device)
        gap = points.index_select(-2, first) - points.index_select(-2, second)
        return torch.linalg.vector_norm(gap, dim=-1)

    def virial(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""The virial :math:`x \cdot \nabla E`, of mean :math:`(n - 1) s` under the exact law."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(point).sum(), point)
        centred = self.coordinates.centred(x)
        return (centred * gradient).sum(-1)

    def reference(
        self,
        n: int,
        *,
        chains: int = 400,
        burn_in: int = 400,
        thinning: int = 20,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Samples of long Hamiltonian chains from independent random starts.

        They are as good as the chains are long. Check them by :meth:`virial`, and by what two
        halves of the chains say of anything that matters.

        Arguments:
            n: Number of samples; the last states of every chain, ``thinning`` steps apart.
            chains: Number of chains.
            burn_in: Least number of moves of each chain before the first sample, which tune the
                step size. A move is ten leapfrog steps, 20 evaluations.
            thinning: Moves between two samples of a chain.
            generator: Source of randomness.

        Returns:
            The samples, float64, chain after chain.
        """
        inside = self.coordinates
        found = long_chains(
            lambda y: self.energy(inside.forward(y)[0]),
            inside.inverse(self.scattered(chains, generator=generator)),
            n,
            burn_in=burn_in,
            thinning=thinning,
            method="hmc",
            step_size=0.01,
            generator=generator,
        )
        return inside.forward(found)[0]

    def scattered(
        self, n: int, *, spacing: float = 1.3, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Random places of a cubic lattice, shaken: starts where no two particles overlap.

        Arguments:
            n: Number of configurations.
            spacing: Distance of neighbouring places.
            generator: Source of randomness.

        Returns:
            The configurations, float64, centred.
        """
        side = math.ceil((1.5 * self.num_particles) ** (1 / self.space_dim))
        axis = spacing * torch.arange(side, dtype=torch.float64)
        places = torch.cartesian_prod(*[axis] * self.space_dim).reshape(-1, self.space_dim)
        order = torch.rand(n, len(places), dtype=torch.float64, generator=generator).argsort(-1)
        points = places[order[:, : self.num_particles]]
        noise = torch.randn(points.shape, dtype=torch.float64, generator=generator)
        return self.coordinates.centred((points + 0.08 * spacing * noise).flatten(1))

    def affine(self, *_: object, **__: object) -> NoReturn:
        """Refused: a change of single coordinates would not be one of particles."""
        raise ValueError(f"{self.name} has no other units, got a call of affine")


def _double_well(square: Tensor) -> Tensor:
    shifted = (square.clamp_min(1e-12).sqrt() - 4.0).square()
    return shifted * (0.9 * shifted - 4.0)


@checked
class DoubleWellCluster(ParticleTarget):
    r"""Four particles in the plane whose pairs like two distances (DW4).

    .. math:: e(d) = -4\, (d - 4)^2 + 0.9\, (d - 4)^4

    with minima at :math:`d = 4 \pm 1.49`, at a temperature of 1.

    Attributes:
        mean_energy: Mean of the energy under the exact law, by quadrature.
        std_energy: Its standard deviation.
        entropy: Entropy on the mean-free subspace, in nats: the least negative log-likelihood
            that any model can have.

    Note:
        Papers write the sum over ordered pairs with a factor 1/(2 tau): the same energy. The data
        that most of them evaluate on are not exact draws: a third of the training rows are copies
        of others, and the virial is 5.5 instead of 6.

    References:
        | Equivariant flows: exact likelihood generative learning for symmetric densities
        | (Koehler et al., 2020)
        | https://arxiv.org/abs/2006.02425

    Example:
        >>> target = DoubleWellCluster()
        >>> round(target.log_z, 4), round(target.mean_energy, 3), round(target.entropy, 3)
        (29.6672, -22.542, 7.126)
    """

    _LOWEST = -40 / 9  # of a pair: b^2 / (4 c)

    def __init__(self) -> None:
        step = 1e-3
        low, middle, high = (self._log_z(beta) for beta in (1 - step, 1.0, 1 + step))
        self.mean_energy = (low - high) / (2 * step)
        self.std_energy = math.sqrt(low - 2 * middle + high) / step
        self.entropy = middle + self.mean_energy
        super().__init__(4, 2, name="dw4", reach=6.0, log_z=middle)
        self._radius = InverseCDF(
            lambda r: r.clamp_min(1e-300).log() - _double_well(r.square()), 0.0, 8.5
        )

    @classmethod
    def _log_z(cls, beta: float, nodes: int = 80, angles: int = 192) -> float:
        """Log-normaliser at an inverse temperature; see the module."""
        x, weight = np.polynomial.legendre.leggauss(nodes)
        r, weight = 4.25 * (x + 1), 4.25 * weight
        theta = 2 * np.pi * np.arange(angles) / angles
        square = np.add.outer(r**2, r**2)[..., None]
        square = square - 2 * np.multiply.outer(np.multiply.outer(r, r), np.cos(theta))

        def boltzmann(squares: np.ndarray) -> np.ndarray:
            energy = _double_well(torch.from_numpy(squares)).numpy()
            return np.exp(-beta * (energy - cls._LOWEST))

        root = np.sqrt(weight * r * boltzmann(r**2))
        waves = np.fft.rfft(boltzmann(square), axis=-1).real / angles
        matrices = np.moveaxis(waves * np.multiply.outer(root, root)[..., None], -1, 0)
        trace = np.einsum("kab,kba->k", matrices @ matrices, matrices)
        total = (2 * np.pi) ** 3 * (2 * trace.sum() - trace[0])  # k and -k alike
        # n^(s/2) = 4: from three free particles to orthonormal coordinates
        return float(np.log(total)) - 6 * beta * cls._LOWEST - math.log(4)

    def pair_energy(self, square: Float[Tensor, "*batch pairs"]) -> Float[Tensor, "*batch pairs"]:
        """The double well in the distance."""
        return _double_well(square)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Radii about particle 1 from their own law; the other three pairs accept (0.22 %)."""
        parts: list[Tensor] = []
        missing = n
        while missing > 0:
            trials = min(1 << 19, 500 * missing + 1000)
            u = torch.rand(trials, 7, dtype=torch.float64, generator=generator, device=device)
            radius, angle = self._radius(u[:, :3]), 2 * math.pi * u[:, 3:6]
            others = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
            gap = others[:, [0, 0, 1]] - others[:, [1, 2, 2]]
            rest = _double_well(gap.square().sum(-1)).sum(-1)
            accepted = others[u[:, 6].log() < 3 * self._LOWEST - rest][:missing]
            missing -= len(accepted)
            parts.append(torch.cat([torch.zeros_like(accepted[:, :1]), accepted], 1))
        points = torch.cat(parts) if parts else torch.zeros(0, 4, 2, dtype=torch.float64)
        return (points - points.mean(1, keepdim=True)).flatten(1).to(device)


@checked
class LennardJones(ParticleTarget):
    r"""A Lennard-Jones droplet, tethered to its centre of mass (LJ13, LJ55).

    .. math:: e(d) = 2\, (d^{-12} - 2 d^{-6}), \qquad d^2 = \| x_i - x_j \|^2 + 10^{-6},

    with a tether of stiffness 1, at a temperature of 1. In units of the depth of a pair that is a
    temperature of a half: a liquid. There is no exact sampler; see
    :meth:`ParticleTarget.reference`.

    Arguments:
        num_particles: Number of particles.
        strength: Factor on the pair energy; 1 for half of it, the convention of other papers.

    Note:
        Papers print the sum over ordered or unordered pairs. The virial theorem tells which one
        fits their data: it is that over ordered pairs, written here as a factor of 2.

    References:
        | Iterated denoising energy matching for sampling from Boltzmann densities
        | (Akhound-Sadegh et al., 2024)
        | https://arxiv.org/abs/2402.06121

    Example:
        >>> target = LennardJones(13)
        >>> target.dim, target.coordinates.reduced
        (39, 36)
    """

    def __init__(self, num_particles: int = 13, *, strength: float = 2.0) -> None:
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength must be positive and finite, got {strength}")
        self.strength = float(strength)
        super().__init__(
            num_particles, 3, name=f"lj{num_particles}", reach=4.0 + 2 * num_particles ** (1 / 3),
            tether=1.0,
        )  # fmt: skip

    def pair_energy(self, square: Float[Tensor, "*batch pairs"]) -> Float[Tensor, "*batch pairs"]:
        """The Lennard-Jones energy."""
        sixth = (square + 1e-6).reciprocal() ** 3
        return self.strength * sixth * (sixth - 2)
