r"""Networks that a denoiser preconditions.

A network sees the scaled noisy point and :math:`\log\sigma` and returns a vector of the same
length, of order one. :class:`MLP` is a residual perceptron of a few habits that were each
measured to matter on energies with fine structure:

* **Fourier features** of the point: sines and cosines of random projections next to the point
  itself, so that a thin ring is not a high-frequency function of smooth inputs;
* **the noise level scales and shifts every layer** (feature-wise modulation), because the wanted
  function changes its shape, not only its size, between high and low noise;
* **harmonics of every coordinate**, for many of them: wells along one coordinate of fifty are
  found at once where each coordinate has its own waves, as inputs and added to the output, and
  are hardly found among random projections of all fifty;
* **a last layer that starts at zero**, so that the untrained denoiser is the exact one of a
  standard normal target.

A sampler walks with one noise level for the whole batch. What depends on the level alone, two
fifths of the work at width 128, is then done once; :func:`shared_level` tells.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.checked import checked

__all__ = ["MLP", "embedded_level", "linear", "shared_level"]


@checked
def shared_level(level: Float[Tensor, "*batch"]) -> Float[Tensor, "*#batch"]:
    """Levels without the axes along which all points share one.

    Arguments:
        level: Levels, one for each point. Axes that were expanded (:meth:`torch.Tensor.expand`)
            are recognised without reading values.

    Returns:
        The levels with those axes of size one.

    Example:
        >>> shared_level(torch.tensor(2.0).expand(5)), shared_level(torch.ones(2))
        (tensor([2.]), tensor([1., 1.]))
    """
    if level.numel() == 0:
        return level
    return level[tuple(slice(None) if stride else slice(0, 1) for stride in level.stride())]


@checked
def embedded_level(log_sigma: Float[Tensor, "*batch"]) -> Float[Tensor, "*#batch 17"]:
    """Log noise levels, divided by 10, and eight harmonics of a wave of length 40.

    Arguments:
        log_sigma: Logarithms of noise levels; an axis along which all are one and the same
            expanded number has size one in the result.

    Example:
        >>> embedded_level(torch.zeros(3)).shape, embedded_level(torch.zeros(()).expand(3)).shape
        (torch.Size([3, 17]), torch.Size([1, 17]))
    """
    level = shared_level(log_sigma).unsqueeze(-1)
    numbers = torch.arange(1, 9, dtype=level.dtype, device=level.device)
    angle = level * (numbers * (math.pi / 20))
    return torch.cat([level / 10, angle.sin(), angle.cos()], -1)


@checked
class MLP(nn.Module):
    r"""Residual perceptron with Fourier features and a noise level in every layer.

    Layer i computes :math:`h \leftarrow h + \mathrm{silu}(W_i h \cdot (1 + a_i) + b_i)`, with
    :math:`a_i, b_i` linear in an embedding of the noise level; the first one has nothing to add
    to.

    Arguments:
        dim: Length of a point, and of the output.
        context_dim: Length of a context; None or 0 for none.
        width: Units of a hidden layer.
        depth: Number of hidden layers, at least 1.
        frequencies: Number of random projections; 0 for no Fourier features.
        bandwidth: Standard deviation of the projections' angular frequencies, for inputs of
            order one.
        harmonics: Number of waves of every coordinate, of angular frequencies 1, 1.4, 2, ...; they
            are inputs and, with amplitudes that depend on the noise level, added to the output.
        context_bandwidth: The same for contexts, on which the wanted function depends smoothly:
            low frequencies carry it beyond the contexts seen in training.
        generator: Source of the initial weights, on the CPU.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> network = MLP(2, width=8, depth=1)
        >>> network(torch.randn(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    projection: Tensor
    waves: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        width: int = 128,
        depth: int = 3,
        frequencies: int = 32,
        bandwidth: float = 2.0,
        harmonics: int = 0,
        context_bandwidth: float = 0.4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        context_dim = context_dim or 0
        for name, value in (
            ("context_dim", context_dim),
            ("frequencies", frequencies),
            ("harmonics", harmonics),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name, width_of_law in (
            ("bandwidth", bandwidth),
            ("context_bandwidth", context_bandwidth),
        ):
            if not width_of_law > 0:
                raise ValueError(f"{name} must be positive, got {width_of_law}")
        inputs = dim + context_dim
        self.dim, self.context_dim, self.depth = dim, context_dim, depth
        # Rows of projections shrink with the number of inputs: the phase keeps its spread.
        single = torch.float32  # whatever torch's default is
        projection = torch.randn(inputs, frequencies, dtype=single, generator=generator)
        projection[:dim] *= bandwidth
        projection[dim:] *= context_bandwidth
        self.register_buffer("projection", projection * math.sqrt(2 / (1 + inputs)))
        if context_dim:
            self.register_buffer("context_loc", torch.zeros(context_dim, dtype=single))
            self.register_buffer("context_scale", torch.ones(context_dim, dtype=single))
        self.harmonics = harmonics
        self.embedding = linear(17, 32, generator)
        self.modulation = linear(32, 2 * depth * width, generator)
        sizes = [inputs + 2 * (frequencies + dim * harmonics)] + [width] * (depth - 1)
        self.layers = nn.ModuleList(linear(size, width, generator) for size in sizes)
        self.output = linear(width, dim, generator)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if harmonics:
            number = torch.arange(harmonics, dtype=single)
            self.register_buffer("waves", 2.0 ** (0.5 * number))
            self.amplitudes = linear(32, 2 * dim * harmonics, generator)
            nn.init.zeros_(self.amplitudes.weight)
            nn.init.zeros_(self.amplitudes.bias)

    def forward(
        self,
        x: Float[Tensor, "*batch dim"],
        log_sigma: Float[Tensor, "*batch"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        r"""The output for scaled noisy points.

        Arguments:
            x: Scaled noisy points, with shape :math:`(*, d)`.
            log_sigma: Logarithms of their noise levels, with shape :math:`(*)`.
            context: A context for each, for a network that takes one.

        Returns:
            The output, with the shape of x.

        Raises:
            ValueError: If a context is missing, not wanted, or of another length.
        """
        given = 0 if context is None else context.shape[-1]
        if given != self.context_dim:
            raise ValueError(f"context must have length {self.context_dim}, got {given}")
        embedded = nn.functional.silu(self.embedding(embedded_level(log_sigma)))
        scales, shifts = self.modulation(embedded).chunk(2, -1)
        waves = None
        if self.harmonics:
            angle = (x.unsqueeze(-1) * self.waves).flatten(-2)
            waves = torch.cat([angle.sin(), angle.cos()], -1)
        if context is not None:
            x = torch.cat([x, (context - self.context_loc) / self.context_scale], -1)
        phase = x @ self.projection
        h = torch.cat([x, phase.sin(), phase.cos()], -1)
        if waves is not None:
            h = torch.cat([h, waves], -1)
        pieces = zip(
            self.layers,
            (1 + scales).chunk(self.depth, -1),
            shifts.chunk(self.depth, -1),
            strict=True,
        )
        for i, (layer, scale, shift) in enumerate(pieces):
            y = nn.functional.silu(torch.addcmul(shift, layer(h), scale))
            h = y if i == 0 else h + y
        if waves is None:
            return self.output(h)
        own = (self.amplitudes(embedded) * waves).unflatten(-1, (2, self.dim, self.harmonics))
        return self.output(h) + own.sum((-3, -1))

    def standardise_context(self, context: Float[Tensor, "n context_dim"]) -> None:
        """Give contexts mean 0 and standard deviation 1 before the first layer sees them.

        Arguments:
            context: Contexts as they will come. A coordinate that does not vary keeps its scale.
        """
        std = context.std(0) if len(context) > 1 else torch.zeros_like(context[0])
        self.context_loc.copy_(context.mean(0))
        self.context_scale.copy_(torch.where(std > 0, std, torch.ones_like(std)))


@checked
def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A single-precision linear layer with PyTorch's usual initial law.

    Arguments:
        inputs: Length of an input.
        outputs: Length of an output.
        generator: Source of the weights; torch's own if None.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)
    reach = 1 / math.sqrt(inputs)
    nn.init.uniform_(layer.weight, -reach, reach, generator=generator)
    nn.init.uniform_(layer.bias, -reach, reach, generator=generator)
    return layer
