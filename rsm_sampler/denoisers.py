r"""A network becomes a denoiser: bounded, preconditioned, with noise and score as views.

The denoiser :math:`D(x_t, \sigma) \approx \mathbb E[x_0 | x_t]` is the quantity that stays
bounded at every noise level: noise prediction divides by :math:`\sqrt{\bar\alpha}` to get there,
which at the last steps of a schedule amplifies any error ten thousand times. With targets of
scale :math:`\sigma_d` the network F sees inputs and learns outputs of order one,

.. math:: D(x, \sigma) = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}\, x
          + \frac{\sigma\,\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}\,
          F\Big(\frac{x}{\sqrt{\sigma^2 + \sigma_d^2}}, \log\frac{\sigma}{\sigma_d}\Big),

and :math:`F = 0` is exact for :math:`\mathcal N(0, \sigma_d^2 I)`. The same D gives, by
Tweedie's formula,

.. math:: \epsilon(x, \sigma) = \frac{x - D}{\sigma}, \qquad
          \nabla \log p_\sigma(x) = \frac{D - x}{\sigma^2}.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.kernels import sigma_column
from rsm_sampler.networks import shared_level

__all__ = ["Denoiser", "DenoiserFunction"]


class DenoiserFunction(Protocol):
    """Anything that maps (x_t, sigma) or (x_t, sigma, context) to E[x_0 | x_t]."""

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The denoised points, with the shape of x_t."""
        ...


class Denoiser(nn.Module):
    """Preconditioned denoiser around a network, in variance-exploding coordinates.

    Arguments:
        network: A function of scaled points ``(*batch, dim)``, log noise levels ``(*batch)`` and,
            where there are any, contexts ``(*batch, context_dim)``; see
            :mod:`rsm_sampler.networks`.
        sigma_data: Standard deviation of the clean data, per coordinate, in units of x.

    Raises:
        ValueError: If sigma_data is not positive.

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
        self, network: nn.Module | Callable[..., Tensor], sigma_data: float = 1.0
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.network = network
        self.sigma_data = sigma_data

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
        total = level.square() + self.sigma_data**2
        root = total.sqrt().unsqueeze(-1)
        keep = (self.sigma_data**2 / total).unsqueeze(-1)
        log_sigma = (level / self.sigma_data).log().expand(batch)
        scaled = x_t / root
        output = (
            self.network(scaled, log_sigma)
            if context is None
            else self.network(scaled, log_sigma, context)
        )
        return torch.addcmul(keep * x_t, level.unsqueeze(-1) * self.sigma_data / root, output)

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
