r"""Samplers without noise: smooth maps from a normal start, whose draws have a density.

**Densities.** Importance weights are only as right as the density in them. Each step of
:class:`DDIM` and :class:`Heun` multiplies the Jacobian, which autograd computes exactly, with one
backward pass for each coordinate (rows of a batch do not mix, so a pass serves all of them):

.. math:: \log q(x_0) = \log \mathcal N(x_N; m, \sigma_N^2 I)
          - \sum_k \log \Big| \det \frac{\partial x_{k-1}}{\partial x_k} \Big| ,

free of discretisation error: it is the density of the steps as they are taken.

The density *at a given point* needs the map backwards: :meth:`Heun.log_prob` integrates the
probability-flow ODE with the exact divergence, and estimates its own error by doubling the steps.
It serves for reading and plotting; weights never use it.
"""

import itertools
import math
from abc import ABC
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.samplers import Sampler, check_draws

__all__ = ["DDIM", "Heun"]


class _Flow(Sampler, ABC):
    """A deterministic sampler: a smooth map from noise to samples, with an exact density."""

    @torch.no_grad()
    def sample_with_log_prob(
        self,
        n: int,
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
        chunk: int = 4096,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        """Draws with the exact log-density of the map that made them.

        The draws are those of :meth:`Sampler.sample` with the same generator.

        Arguments:
            n: Number of draws.
            context: A context for each draw.
            generator: Source of randomness.
            chunk: Draws that are worked on at a time; bounds the memory.

        Returns:
            The draws, (n, dim), and their log-densities, (n), free of discretisation error.

        Raises:
            ValueError: If n is below 0, chunk is below 1, the contexts are not n, or autograd
                cannot differentiate the denoiser.

        Note:
            The density is exact where the map is one-to-one, as that of the ODE is. Steps so
            coarse that they fold space reach some points twice, and count them once.
        """
        check_draws(n, context, chunk)
        start, noise = self.start(n, context=context, generator=generator)
        before = _normal_log_prob(noise) - self.dim * math.log(self._start_std)
        pieces = [
            self._push(*x, None if context is None else context[i * chunk : (i + 1) * chunk])
            for i, x in enumerate(zip(start.split(chunk), before.split(chunk), strict=True))
        ]
        return torch.cat([x for x, _ in pieces]), torch.cat([log_prob for _, log_prob in pieces])

    def _push(self, x: Tensor, log_prob: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        for sigma_t, sigma_s in self._steps():

            def move(y: Tensor, t: float = sigma_t, s: float = sigma_s) -> Tensor:
                return self.step(y, t, s, context)

            x, jacobian = _value_and_jacobian(move, x)
            log_prob = log_prob - torch.linalg.slogdet(jacobian).logabsdet
        return x, log_prob


@checked
class DDIM(_Flow):
    r"""The deterministic sampler of first order.

    .. math:: x_s = D + \frac{\sigma_s}{\sigma_t} (x_t - D)

    References:
        | Denoising diffusion implicit models (Song et al., 2021), equation (12) without noise
        | https://arxiv.org/abs/2010.02502

    Example:
        >>> def exact(x_t, sigma):  # a standard normal target
        ...     return x_t / (1 + sigma.square()).unsqueeze(-1)
        >>> sampler = DDIM(exact, torch.tensor([10.0, 1.0, 0.0]), dim=2)
        >>> x, log_prob = sampler.sample_with_log_prob(5)
        >>> x.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Keep the predicted noise, shrink it to the new level; see :meth:`Sampler.step`."""
        return torch.lerp(self._denoise(x_t, sigma_t, context), x_t, sigma_s / sigma_t)


@checked
class Heun(_Flow):
    r"""The probability-flow ODE :math:`dx/d\sigma = (x - D)/\sigma` by Heun's method.

    Two denoiser calls a step, one at the last, which ends at :math:`\sigma = 0`.

    References:
        | Elucidating the design space of diffusion-based generative models
        | (Karras et al., 2022), algorithm 1
        | https://arxiv.org/abs/2206.00364

    Example:
        >>> def exact(x_t, sigma):  # a standard normal target
        ...     return x_t / (1 + sigma.square()).unsqueeze(-1)
        >>> from rsm_sampler.schedules import EDM
        >>> sampler = Heun(exact, EDM(0.01, 20.0).sigmas(40), dim=2)
        >>> log_prob, error = sampler.log_prob(torch.zeros(1, 2, dtype=torch.float64))
        >>> bool((log_prob + math.log(2 * math.pi)).abs() < 0.01), bool(error < 0.01)
        (True, True)
    """

    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """An Euler step, corrected by the slope at its end; see :meth:`Sampler.step`."""
        denoised = self._denoise(x_t, sigma_t, context)
        if sigma_s == 0:
            return denoised
        slope = (x_t - denoised) / sigma_t
        x_s = x_t + (sigma_s - sigma_t) * slope
        end = (x_s - self._denoise(x_s, sigma_s, context)) / sigma_s
        return x_t + (sigma_s - sigma_t) * 0.5 * (slope + end)

    @torch.no_grad()
    def log_prob(
        self,
        x: Float[Tensor, "n dim"],
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        chunk: int = 4096,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        r"""Log-density at given points by the probability-flow ODE, with an error estimate.

        .. math:: \log p(x_0) = \log \mathcal N(x_N; m, \sigma_N^2 I)
                  + \int_0^{\sigma_N} \nabla \cdot \frac{x - D}{\sigma}\, d\sigma,

        with the exact divergence, by Heun's method from 0 up the sampler's levels, and again
        over every second one of those above twice the lowest; the two are extrapolated to step
        zero (Richardson, for an error of second order). At :math:`\sigma = 0` the slope
        :math:`-\sigma \nabla \log p_\sigma` and its divergence are 0, and the denoiser is not
        asked.

        Arguments:
            x: Points, with shape (n, dim).
            context: A context for each point.
            chunk: Points that are worked on at a time; bounds the memory.

        Returns:
            The log-density, (n), and an estimate of its discretisation error, (n): the
            difference to the grid with half the steps, divided by 3 for second order, which is
            also the step of the extrapolation and so more than what is left; NaN for a single
            step. It knows nothing of the step from the highest noised law to a Gaussian,
            nor of the denoiser's own error.

        Raises:
            ValueError: If the contexts are not n, chunk is below 1, or autograd cannot
                differentiate the denoiser.

        Note:
            This is the density of the ODE. That of :meth:`sample_with_log_prob` belongs to the
            sampler's finite steps, and differs by their error.
        """
        check_draws(len(x), context, chunk)
        fine = self.levels[::-1]
        # The first step, from 0, may be the largest error: the coarse one is twice as long.
        above = [level for level in fine if level >= 2 * fine[1]]
        coarse = [0.0, *above[:-1:2], fine[-1]]
        values, errors = [], []
        for i, piece in enumerate(x.split(chunk)):
            beside = None if context is None else context[i * chunk : (i + 1) * chunk]
            value, rough = (self._pull(piece, beside, grid) for grid in (fine, coarse))
            step = (value - rough) / (3 if len(fine) > 2 else math.nan)
            values.append(value + step.nan_to_num(0.0))
            errors.append(step.abs())
        return torch.cat(values), torch.cat(errors)

    def _pull(self, y: Tensor, context: Tensor | None, rising: list[float]) -> Tensor:
        zero = torch.zeros_like(y[:, 0])
        log_prob, stretch, slope = zero, zero, torch.zeros_like(y)
        for low, high in itertools.pairwise(rising):

            def denoise(v: Tensor, level: float = high) -> Tensor:
                return self._denoise(v, level, context)

            ahead = y + (high - low) * slope
            y = y + (high - low) * 0.5 * (slope + (ahead - denoise(ahead)) / high)
            denoised, jacobian = _value_and_jacobian(denoise, y)
            slope = (y - denoised) / high
            # Sigma times the divergence is smooth in log sigma, and integrated there; but from 0,
            # where it is 0, the divergence itself in sigma.
            new = self.dim - jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
            width = math.log(high / low) if low > 0 else 1.0
            log_prob = log_prob + 0.5 * width * (stretch + new)
            stretch = new
        noise = (y - self._centre(y, context)) / self._start_std
        return log_prob + _normal_log_prob(noise) - self.dim * math.log(self._start_std)


def _value_and_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), (n, dim), and df/dx, (n, dim, dim), of a function that acts on every row alone."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        if not value.requires_grad:
            raise ValueError(
                "denoiser must be differentiable by autograd for a density, got an output "
                "without a graph"
            )
        columns = value.unbind(-1)
        # The rows of the batch do not mix: the gradient of a sum over them is that of each.
        rows = [
            torch.autograd.grad(column.sum(), x, retain_graph=i + 1 < len(columns))[0]
            for i, column in enumerate(columns)
        ]
    return value.detach(), torch.stack(rows, -2)


def _normal_log_prob(noise: Tensor) -> Tensor:
    return -0.5 * noise.square().sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]
