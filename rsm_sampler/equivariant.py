r"""A network for particles: what turns, mirrors or renumbers them does so to its output.

Points are mean-free configurations in orthonormal coordinates
(:class:`~rsm_sampler.transforms.MeanFree`); the network lifts them to n particles, lets every
pair exchange messages, and returns a mean-free displacement in the same coordinates. With
messages that depend on distances and on the noise level alone,

.. math::

    m_{ij} &= \phi_e\big(h_i + h_j,\; d_{ij};\; \log\sigma\big) = m_{ji}, \\
    x_i &\leftarrow x_i + \sum_{j} \frac{x_i - x_j}{1 + d_{ij}}\, \phi_x(m_{ij}), \\
    h_i &\leftarrow h_i + \phi_h\big(h_i,\; \tfrac1{\sqrt n} \sum_{j} m_{ij}\big),

where the noise level scales and shifts both layers of :math:`\phi_e`. For any rotation or
reflection R, permutation P and the network's output F

.. math:: F(P x R) = P\, F(x)\, R .

Messages are symmetric, so each pair is worked on once, not twice.

References:
    | E(n) equivariant graph neural networks (Satorras et al., 2021)
    | https://arxiv.org/abs/2102.09844
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.networks import embedded_level, linear
from rsm_sampler.transforms import MeanFree

__all__ = ["EGNN"]

_REACH = 8.0  # of the radial functions, in units of the scaled points
_CACHED = 160_000  # numbers in the messages of a piece, on a CPU: they stay in its second cache


class EGNN(nn.Module):
    r"""Equivariant graph network of particles, with the interface of a denoiser's network.

    Arguments:
        num_particles: Number n of particles, at least two.
        space_dim: Dimension s of their space.
        width: Length of a particle's features and of a message.
        depth: Number of rounds of messages, at least 1.
        radial: Number of radial functions of a distance.
        generator: Source of the initial weights, on the CPU.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> network = EGNN(4, 2, width=8, depth=1)
        >>> network(torch.randn(5, 6), torch.zeros(5)).shape
        torch.Size([5, 6])
    """

    pairs: Tensor
    centres: Tensor

    def __init__(
        self,
        num_particles: int,
        space_dim: int,
        *,
        width: int = 64,
        depth: int = 4,
        radial: int = 24,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("radial", radial)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.inside = MeanFree(num_particles, space_dim)
        self.num_particles, self.space_dim, self.dim = (
            num_particles,
            space_dim,
            self.inside.reduced,
        )
        self.register_buffer("pairs", torch.triu_indices(num_particles, num_particles, 1))
        self.register_buffer("centres", torch.linspace(0, _REACH, radial))
        self.embedding = linear(17, width, generator)
        self.rounds = nn.ModuleList(
            _Messages(width, radial, generator, last=i == depth - 1) for i in range(depth)
        )

    def forward(
        self, x: Float[Tensor, "*batch dim"], log_sigma: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch dim"]:
        r"""The output for scaled noisy configurations.

        Arguments:
            x: Scaled noisy configurations in mean-free coordinates, with shape :math:`(*, d)`.
            log_sigma: Logarithms of their noise levels, with shape :math:`(*)`.

        Returns:
            The output, with the shape of x.
        """
        level = nn.functional.silu(self.embedding(embedded_level(log_sigma))).unsqueeze(-2)
        each = self.pairs.shape[1] * level.shape[-1] * math.prod(x.shape[1:-1])
        piece = max(1, _CACHED // max(1, each))
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dim() < 2 or len(x) <= piece:
            return self._displaced(x, level)
        levels = level.split(piece) if len(level) == len(x) else itertools.repeat(level)
        pairs = zip(x.split(piece), levels, strict=False)
        return torch.cat([self._displaced(*pair) for pair in pairs])

    def _displaced(self, x: Tensor, level: Tensor) -> Tensor:
        flat, _ = self.inside.forward(x)
        points = flat.unflatten(-1, (self.num_particles, self.space_dim))
        features = level.expand(*x.shape[:-1], self.num_particles, -1)
        moved = points
        for messages in self.rounds:
            moved, features = messages(moved, features, level, self.pairs, self.centres)
        return self.inside.inverse((moved - points).flatten(-2))


class _Messages(nn.Module):
    """One round: messages of all pairs, then particles and, but in the last, features move."""

    def __init__(
        self, width: int, radial: int, generator: torch.Generator | None, *, last: bool
    ) -> None:
        super().__init__()
        self.of_particle = linear(width, width, generator)
        self.of_level = linear(width, 4 * width, generator)
        self.of_distance = linear(radial + 1, width, generator)
        self.message = linear(width, width, generator)
        self.step = linear(width, 1, generator)
        nn.init.zeros_(self.step.weight)
        nn.init.zeros_(self.step.bias)
        self.last = last
        if not last:
            self.feature = linear(2 * width, width, generator)
            self.output = linear(width, width, generator)

    def forward(
        self, points: Tensor, features: Tensor, level: Tensor, pairs: Tensor, centres: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, second = pairs
        n = points.shape[-2]
        gap = points.index_select(-2, first) - points.index_select(-2, second)
        distance = (gap.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        width = centres[1] - centres[0] if len(centres) > 1 else 1.0
        bumps = torch.exp(-0.5 * ((distance - centres) / width).square())
        radial = torch.cat([bumps, distance / _REACH], -1)
        own = self.of_particle(features)
        scale, shift, scale_2, shift_2 = self.of_level(level).chunk(4, -1)
        hidden = own.index_select(-2, first) + own.index_select(-2, second)
        hidden = torch.addcmul(shift, hidden + self.of_distance(radial), 1 + scale)
        hidden = self.message(nn.functional.silu(hidden))
        message = nn.functional.silu(torch.addcmul(shift_2, hidden, 1 + scale_2))
        push = gap * (self.step(message) / (1 + distance))
        points = points.index_add(-2, first, push).index_add(-2, second, push, alpha=-1)
        if self.last:
            return points, features
        gathered = torch.zeros_like(features)
        gathered = gathered.index_add(-2, first, message).index_add(-2, second, message)
        both = torch.cat([features, gathered / math.sqrt(n)], -1)
        return points, features + self.output(nn.functional.silu(self.feature(both)))
