r"""Networks that a denoiser preconditions.

A network sees the scaled noisy point and :math:`\log\sigma` and returns a vector of the same
length, of order one. :class:`MLP` is a residual perceptron of three habits that were each
measured to matter on energies with fine structure:

* **Fourier features** of the point: sines and cosines of random projections next to the point
  itself, so that a thin ring is not a high-frequency function of smooth inputs;
* **the noise level scales and shifts every layer** (feature-wise modulation), because the wanted
  function changes its shape, not only its size, between high and low noise;
* **a last layer that starts at zero**, so that the untrained denoiser is the exact one of a
  standard normal target.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""Residual perceptron with Fourier features and a noise level in every layer.

    Layer i computes :math:`h \leftarrow h + \mathrm{silu}(W_i h \cdot (1 + a_i) + b_i)`, with
    :math:`a_i, b_i` linear in an embedding of the noise level.

    Arguments:
        dim: Length of a point, and of the output.
        context_dim: Length of a context; None or 0 for none.
        width: Units of a hidden layer.
        depth: Number of hidden layers, at least 1.
        frequencies: Number of random projections; 0 for no Fourier features.
        bandwidth: Standard deviation of the projections' angular frequencies, for inputs of
            order one.
        generator: Source of the initial weights, on the CPU.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> network = MLP(2, width=8, depth=1)
        >>> network(torch.randn(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        width: int = 128,
        depth: int = 3,
        frequencies: int = 32,
        bandwidth: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if frequencies < 0:
            raise ValueError(f"frequencies must be at least 0, got {frequencies}")
        inputs = dim + (context_dim or 0)
        self.depth = depth
        # Rows of projections shrink with the number of inputs: the phase keeps its spread.
        projection = torch.randn(inputs, frequencies, generator=generator)
        self.register_buffer("projection", projection * bandwidth * math.sqrt(2 / (1 + inputs)))
        self.register_buffer("harmonics", torch.arange(1, 9) * (math.pi / 20))
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator
            seed = torch.randint(2**62, (), generator=generator)
            torch.default_generator.manual_seed(int(seed))
            self.embedding = nn.Linear(17, 32)
            self.modulation = nn.Linear(32, 2 * depth * width)
            sizes = [inputs + 2 * frequencies] + [width] * depth
            self.layers = nn.ModuleList(nn.Linear(sizes[i], width) for i in range(depth))
            self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        x: Float[Tensor, "*batch dim"],
        log_sigma: Float[Tensor, "*batch"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        """The output for scaled noisy points x at noise level exp(log_sigma)."""
        level = log_sigma.unsqueeze(-1)
        angle = level * self.harmonics
        embedded = torch.cat([level / 10, angle.sin(), angle.cos()], -1)
        embedded = nn.functional.silu(self.embedding(embedded))
        scales, shifts = self.modulation(embedded).chunk(2, -1)
        if context is not None:
            x = torch.cat([x, context], -1)
        phase = x @ self.projection
        h = torch.cat([x, phase.sin(), phase.cos()], -1)
        pieces = zip(
            self.layers, scales.chunk(self.depth, -1), shifts.chunk(self.depth, -1), strict=True
        )
        for i, (layer, scale, shift) in enumerate(pieces):
            y = nn.functional.silu(torch.addcmul(shift, layer(h), 1 + scale))
            h = y if i == 0 else h + y
        return self.output(h)
