r"""A network becomes a denoiser: bounded, preconditioned, with noise and score as views.

The denoiser :math:`D(x_t, \sigma) \approx \mathbb E[x_0 | x_t]` is the quantity that stays
bounded at every noise level: noise prediction divides by :math:`\sqrt{\bar\alpha}` to get there,
which at the last steps of a schedule amplifies any error ten thousand times. With targets of
scale :math:`\sigma_d` the network F sees inputs and learns outputs of order one,

.. math:: D(x, \sigma) = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}\, x
          + \frac{\sigma\,\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}\,
          F\Big(\frac{x}{\sqrt{\sigma^2 + \sigma_d^2}}, \log\frac{\sigma}{\sigma_d}\Big),

and :math:`F = 0` is exact for :math:`\mathcal N(0, \sigma_d^2 I)`. For comparison with published
agents the network may instead predict the noise from the paper's variable
:math:`\sqrt{\bar\alpha}\, x`,

.. math:: D(x, \sigma) = x - \sigma\, F\Big(\frac{x}{\sqrt{1 + \sigma^2}}, \log\sigma\Big).

A posterior mean lies in the convex hull of the clean points. Where these are known to lie within
a radius R, the denoiser of a sampler is told, and what a network makes up beyond them is cut,

.. math:: D \leftarrow D \min\Big(1, \frac{\max(R,\, a \|x\|)}{\|D\|}\Big), \qquad
          a = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2},

so that no chain runs away: every point outside of R is drawn back. (With noise prediction a = 1:
none is moved farther out.)

The same D gives, by Tweedie's formula,

.. math:: \epsilon(x, \sigma) = \frac{x - D}{\sigma}, \qquad
          \nabla \log p_\sigma(x) = \frac{D - x}{\sigma^2}.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.checked import checked
from rsm_sampler.equivariant import EGNN
from rsm_sampler.networks import MLP, shared_level
from rsm_sampler.transitions import sigma_column

__all__ = ["Denoiser", "DenoiserFunction", "Prediction"]

Prediction = Literal["preconditioned", "noise"]
"""What a network's output means, the first or the second formula above."""


class DenoiserFunction(Protocol):
    """Anything that maps (x_t, sigma) or (x_t, sigma, context) to E[x_0 | x_t]."""

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The denoised points, with the shape of x_t."""
        ...


@checked
class Denoiser(nn.Module):
    """Preconditioned denoiser around a network, in variance-exploding coordinates.

    Arguments:
        network: A function of scaled points ``(*batch, dim)``, log noise levels ``(*batch)`` and,
            where there are any, contexts ``(*batch, context_dim)``; see
            :mod:`rsm_sampler.networks`.
        sigma_data: Standard deviation of the clean data, per coordinate, in units of x.
        prediction: What the network's output means.
        radius: Distance from the origin within which the clean points lie; infinite if it is not
            known, and while a network is trained.

    Raises:
        ValueError: If sigma_data or the radius is not positive, or the prediction is unknown.

    References:
        | Elucidating the design space of diffusion-based generative models
        | (Karras et al., 2022), equation (7)
        | https://arxiv.org/abs/2206.00364

    Example:
        >>> denoiser = Denoiser(lambda x, log_sigma: torch.zeros_like(x))
        >>> denoiser(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0]))
        tensor([[1., 0.]])
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        sigma_data: float = 1.0,
        prediction: Prediction = "preconditioned",
        radius: float = math.inf,
    ) -> None:
        super().__init__()
        for name, value in (("sigma_data", sigma_data), ("radius", radius)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if prediction not in get_args(Prediction):
            raise ValueError(
                f"prediction must be one of {get_args(Prediction)}, got {prediction!r}"
            )
        self.network = network
        self.sigma_data = sigma_data
        self.prediction = prediction
        self.radius = radius

    @classmethod
    def build(
        cls, architecture: dict[str, Any], generator: torch.Generator | None = None
    ) -> "Denoiser":
        """A denoiser whose network is described by plain values, as checkpoints hold them.

        Arguments:
            architecture: Arguments of :class:`~rsm_sampler.networks.MLP`, or of
                :class:`~rsm_sampler.equivariant.EGNN` where ``num_particles`` is among them.
            generator: Source of the initial weights, on the CPU.

        Returns:
            The denoiser, for data of unit scale.
        """
        kind = EGNN if "num_particles" in architecture else MLP
        return cls(kind(**architecture, generator=generator))

    def coefficients(
        self, sigma: Float[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        r"""The numbers a, b, c of :math:`D = a\,x + b\,F(c\,x, \cdot)` at some noise levels.

        Arguments:
            sigma: Noise levels, positive, of any shape.
        """
        if self.prediction == "noise":
            return torch.ones_like(sigma), -sigma, (1 + sigma.square()).rsqrt()
        total = sigma.square() + self.sigma_data**2
        root = total.sqrt()
        return self.sigma_data**2 / total, sigma * self.sigma_data / root, 1 / root

    def forward(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        r"""The posterior mean of the clean point.

        Arguments:
            x_t: Noisy points, with shape :math:`(*, d)`.
            sigma: Noise levels, positive, broadcastable to :math:`(*)`. A level that the whole
                batch shares (a number, or an expanded tensor) is cheaper than one for each point.
            context: A context for each point, for a network that takes one.

        Returns:
            The denoised points :math:`D(x_t, \sigma)`, with the shape of x_t.

        Raises:
            ValueError: If sigma does not broadcast to the batch shape, or is a number that is not
                positive.
        """
        if not isinstance(sigma, Tensor) and not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        batch = x_t.shape[:-1]
        level = shared_level(sigma_column(sigma, x_t).squeeze(-1).expand(batch))
        keep, gain, shrink = (c.unsqueeze(-1) for c in self.coefficients(level))
        unit = 1.0 if self.prediction == "noise" else self.sigma_data
        log_sigma = (level.log() - math.log(unit)).expand(batch)
        scaled = x_t * shrink
        output = (
            self.network(scaled, log_sigma)
            if context is None
            else self.network(scaled, log_sigma, context)
        )
        denoised = torch.addcmul(keep * x_t, gain, output)
        if math.isinf(self.radius):
            return denoised
        length = torch.linalg.vector_norm(x_t, dim=-1, keepdim=True)
        most = (keep * length).clamp(min=self.radius)
        length = torch.linalg.vector_norm(denoised, dim=-1, keepdim=True)
        return denoised * (most / torch.maximum(length, most))

    def noise(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        r"""The expected standard normal noise in x_t, :math:`(x_t - D) / \sigma`.

        Arguments:
            x_t: As in a plain call.
            sigma: As in a plain call.
            context: As in a plain call.

        Returns:
            The noise, with the shape of x_t.
        """
        return (x_t - self(x_t, sigma, context)) / sigma_column(sigma, x_t)

    def score(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        r"""The score of the noised law at x_t, :math:`(D - x_t) / \sigma^2`, in units of 1/x.

        Arguments:
            x_t: As in a plain call.
            sigma: As in a plain call.
            context: As in a plain call.

        Returns:
            The score, with the shape of x_t.
        """
        return (self(x_t, sigma, context) - x_t) / sigma_column(sigma, x_t).square()
