r"""A network for particles: what turns, mirrors or renumbers them does so to its output.

Points are mean-free configurations in orthonormal coordinates
(:class:`~rsm_sampler.target.coordinates.MeanFree`); the network lifts them to n particles, lets
every pair exchange messages, and returns a mean-free displacement in the same coordinates. A
particle has features :math:`h_i` and K vectors :math:`v_i^k`, and sees the others along
:math:`r_{ij} = (x_i - x_j) / (1 + d_{ij})`. With :math:`\hat v = v / \sqrt{1 + |v|^2}`,

.. math::

    m_{ij} &= \phi_e\big(h_i + h_j,\; d_{ij},\; (\hat v_i^k - \hat v_j^k) \cdot r_{ij},\;
              \hat v_i^k \cdot \hat v_j^k;\; \log\sigma\big) = m_{ji}, \\
    v_i^k &\leftarrow v_i^k + \sum_j r_{ij}\, \phi_v^k(m_{ij}), \qquad
              w_i^k = \sum_l A_{kl}\, v_i^l, \\
    (f, g) &= \phi_h\big(h_i,\; \tfrac1{\sqrt n} \sum_j m_{ij},\;
              w_i^k \cdot \hat v_i^k\big), \\
    h_i &\leftarrow h_i + f, \qquad v_i^k \leftarrow v_i^k + \hat g_k\, w_i^k,

where the noise level scales and shifts both layers of :math:`\phi_e`. Features begin with the
distance from the centre of mass and vectors with the direction to it; the displacement is a sum
of the last vectors, bounded, weighted by the last features. For any rotation or reflection R,
permutation P and the network's output F

.. math:: F(P x R) = P\, F(x)\, R .

Angles between three particles are so known from the first round on. A network that knows distances
alone has to move its particles to find out about angles, and of four that were trained on the
cluster of 13 Lennard-Jones atoms two never did. One factor of every product is bounded: otherwise
each round squares the one before: gradients of a few configurations of 55 atoms were hundreds of
times as long as usual, and training ended in NaN after 250 steps. Messages are symmetric, so each
pair is worked on once, not twice.

References:
    | E(n) equivariant graph neural networks (Satorras et al., 2021)
    | https://arxiv.org/abs/2102.09844
    | Using multiple vector channels improves E(n)-equivariant graph neural networks
    | (Levy et al., 2023)
    | https://arxiv.org/abs/2309.03139
    | Equivariant message passing for the prediction of tensorial properties and molecular spectra
    | (Schütt et al., 2021), for products of vectors as features
    | https://arxiv.org/abs/2102.03150
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.checked import checked
from rsm_sampler.networks import embedded_level, linear
from rsm_sampler.target.coordinates import MeanFree

__all__ = ["EGNN"]

_REACH = 8.0  # of the radial functions, in units of the scaled points
_CACHED = 160_000  # numbers in the messages of a piece, on a CPU: they stay in its second cache


@checked
class EGNN(nn.Module):
    r"""Equivariant graph network of particles, with the interface of a denoiser's network.

    Arguments:
        num_particles: Number n of particles, at least two.
        space_dim: Dimension s of their space.
        width: Length of a particle's features and of a message.
        depth: Number of rounds of messages, at least 1.
        radial: Number of radial functions of a distance.
        vectors: Number K of vectors of a particle.
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
        vectors: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("width", width),
            ("depth", depth),
            ("radial", radial),
            ("vectors", vectors),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.inside = MeanFree(num_particles, space_dim)
        self.num_particles, self.space_dim, self.dim = (
            num_particles,
            space_dim,
            self.inside.reduced,
        )
        self.register_buffer("pairs", torch.triu_indices(num_particles, num_particles, 1))
        self.register_buffer("centres", torch.linspace(0, _REACH, radial, dtype=torch.float32))
        self.embedding = linear(17, width, generator)
        self.of_radius = linear(radial + 1, width, generator)
        self.direction = linear(width, vectors, generator)
        self.rounds = nn.ModuleList(
            _Messages(width, radial, vectors, generator) for _ in range(depth)
        )
        self.feature = linear(width, width, generator)
        self.share = linear(width, vectors, generator)
        nn.init.zeros_(self.share.weight)
        nn.init.zeros_(self.share.bias)

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
        first, second = self.pairs
        gap = points.index_select(-2, first) - points.index_select(-2, second)
        distance, radius = _length(gap), _length(points)
        bumps, between = self._radial(distance), (gap / (1 + distance)).unsqueeze(-1)
        features = level + self.of_radius(self._radial(radius))
        vectors = (points / (1 + radius)).unsqueeze(-1) * self.direction(level).unsqueeze(-2)
        for messages in self.rounds:
            features, vectors = messages(features, vectors, bumps, between, level, self.pairs)
        share = self.share(nn.functional.silu(self.feature(features)))
        return self.inside.inverse((share.unsqueeze(-2) * _bounded(vectors)).sum(-1).flatten(-2))

    def _radial(self, distance: Tensor) -> Tensor:
        width = self.centres[1] - self.centres[0] if len(self.centres) > 1 else 1.0
        bumps = torch.exp(-0.5 * ((distance - self.centres) / width).square())
        return torch.cat([bumps, distance / _REACH], -1)


class _Messages(nn.Module):
    """One round: messages of all pairs, then vectors and features change.

    Features are (*, n, width), vectors (*, n, s, K), and of each pair there are radial functions,
    (*, pairs, radial + 1), and what lies between its particles, r above, (*, pairs, s, 1).
    """

    def __init__(
        self, width: int, radial: int, vectors: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.of_particle = linear(width, width, generator)
        self.of_level = linear(width, 4 * width, generator)
        self.of_distance = linear(radial + 1, width, generator)
        self.of_products = linear(2 * vectors, width, generator)
        self.message = linear(width, width, generator)
        self.push = linear(width, vectors, generator)
        # A bias would be a direction of its own.
        self.mix = nn.Parameter(linear(vectors, vectors, generator).weight.detach())
        self.feature = linear(2 * width + vectors, width, generator)
        self.output = linear(width, width + vectors, generator)

    def forward(
        self,
        features: Tensor,
        vectors: Tensor,
        bumps: Tensor,
        between: Tensor,
        level: Tensor,
        pairs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first, second = pairs
        own = self.of_particle(features)
        bounded = _bounded(vectors)
        one, other = bounded.index_select(-3, first), bounded.index_select(-3, second)
        products = torch.cat([((one - other) * between).sum(-2), (one * other).sum(-2)], -1)
        scale, shift, scale_2, shift_2 = self.of_level(level).chunk(4, -1)
        hidden = own.index_select(-2, first) + own.index_select(-2, second)
        hidden = hidden + self.of_distance(bumps) + self.of_products(products)
        hidden = torch.addcmul(shift, hidden, 1 + scale)
        hidden = self.message(nn.functional.silu(hidden))
        message = nn.functional.silu(torch.addcmul(shift_2, hidden, 1 + scale_2))
        push = between * self.push(message).unsqueeze(-2)
        vectors = vectors.index_add(-3, first, push).index_add(-3, second, push, alpha=-1)
        gathered = torch.zeros_like(features)
        gathered = gathered.index_add(-2, first, message).index_add(-2, second, message)
        gathered = gathered / math.sqrt(features.shape[-2])
        mixed = nn.functional.linear(vectors, self.mix)
        seen = torch.cat([features, gathered, (mixed * _bounded(vectors)).sum(-2)], -1)
        change = self.output(nn.functional.silu(self.feature(seen)))
        moved, gain = change.tensor_split((features.shape[-1],), -1)
        gain = gain * (1 + gain.square()).rsqrt()
        return features + moved, vectors + gain.unsqueeze(-2) * mixed


def _length(vector: Tensor) -> Tensor:
    """Length along the last axis, which stays; with a gradient at zero."""
    return (vector.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def _bounded(vector: Tensor) -> Tensor:
    """Vectors, along the last axis but one, made shorter than one."""
    return vector * (1 + vector.square().sum(-2, keepdim=True)).rsqrt()
