r"""From a denoiser to samples, and to the density of the very process that made them.

All samplers walk down a grid of noise levels :math:`\sigma_N > \dots > \sigma_1 > \sigma_0 = 0`
from :math:`x_N \sim \mathcal N(0, \sigma_N^2 I)`. They differ in one step, in variance-exploding
coordinates and with :math:`D = D(x_t, \sigma_t)`, :math:`r = \sigma_s / \sigma_t`:

================== ==========================================================================
:class:`Ancestral` :math:`x_s = D + r^2 (x_t - D) + \sigma_s\sqrt{1 - r^2}\; z`, equation (8)
:class:`DDIM`      :math:`x_s = D + r\,(x_t - D)`, the same without noise
:class:`Heun`      the ODE :math:`dx/d\sigma = (x - D)/\sigma`, second order
:class:`Langevin`  :math:`x \leftarrow x + \tfrac{h^2}{2} \nabla\log p_\sigma(x) + h z` at each
                   level, equation (18)
================== ==========================================================================

**Densities.** Importance weights are only as right as the density in them. :class:`DDIM` and
:class:`Heun` are smooth maps of their start, so their draws have a density that is known without
any discretisation error: each step multiplies the Jacobian, which is computed exactly with one
forward-mode derivative per coordinate,

.. math:: \log q(x_0) = \log \mathcal N(x_N; 0, \sigma_N^2 I)
          - \sum_k \log \Big| \det \frac{\partial x_{k-1}}{\partial x_k} \Big| .

:class:`Ancestral` draws have no tractable density, but the whole path has: with the forward
kernel as the extended target, :math:`\log w = -E(x_0) + \sum_k \log q(x_k | x_{k-1})
- \log p(x_N) - \sum_k \log p_\theta(x_{k-1} | x_k)` is an exact importance weight
(:meth:`Ancestral.sample_with_path_weight`).

The density *at a given point* needs the map backwards: :meth:`Heun.log_prob` integrates the
probability-flow ODE with the exact divergence, and estimates its own error by doubling the steps.
It serves for reading and plotting; weights never use it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rsm_sampler.kernels import posterior

__all__ = ["DDIM", "Ancestral", "Heun", "Langevin", "Sampler"]


class Sampler(ABC):
    """The loop shared by all samplers; a subclass adds one step.

    Arguments:
        denoiser: A function (x_t, sigma) -> E[x_0 | x_t], called with sigma of the batch shape,
            and with a context where one is given to :meth:`sample`.
        sigmas: Decreasing noise levels that end with 0, from
            :meth:`rsm_sampler.schedules.Schedule.sigmas`.
        dim: Length of a point.

    Raises:
        ValueError: If the levels do not decrease to 0, or dim is below 1.
    """

    def __init__(
        self, denoiser: Callable[..., Tensor], sigmas: Float[Tensor, " levels"], *, dim: int
    ) -> None:
        if sigmas.dim() != 1 or len(sigmas) < 2 or float(sigmas[-1]) != 0:
            raise ValueError(
                f"sigmas must be at least two levels that end with 0, got {sigmas.tolist()}"
            )
        if not bool((sigmas[1:] < sigmas[:-1]).all()):
            raise ValueError(f"sigmas must decrease, got {sigmas.tolist()}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.denoiser = denoiser
        self.sigmas = sigmas
        self.levels: list[float] = sigmas.double().tolist()
        self.dim = dim

    @abstractmethod
    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """One step from noise level sigma_t down to sigma_s."""

    def start(self, n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "n dim"]:
        """n draws of pure noise at the highest level."""
        device, dtype = self._place()
        noise = torch.randn(n, self.dim, dtype=dtype, device=device, generator=generator)
        return noise * self.levels[0]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "n dim"]:
        """n independent draws.

        Arguments:
            n: Number of draws.
            context: A context for each.
            generator: Source of randomness, on the denoiser's device.
            progress: Whether to show a progress bar over the noise levels.

        Raises:
            ValueError: If n is below 0 or the contexts are not n.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        if context is not None and len(context) != n:
            raise ValueError(f"context must have {n} rows, one for each draw, got {len(context)}")
        x = self.start(n, generator=generator)
        pairs = list(zip(self.levels[:-1], self.levels[1:], strict=True))
        for sigma_t, sigma_s in tqdm(pairs, disable=not progress, desc="sampling", leave=False):
            x = self.step(x, sigma_t, sigma_s, context, generator)
        return x

    def _denoise(self, x: Tensor, sigma: float, context: Tensor | None) -> Tensor:
        level = torch.full(x.shape[:-1], sigma, dtype=x.dtype, device=x.device)
        return self.denoiser(x, level) if context is None else self.denoiser(x, level, context)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        parameters = getattr(self.denoiser, "parameters", None)
        first = next(iter(parameters()), None) if callable(parameters) else None
        like = self.sigmas if first is None else first
        return like.device, like.dtype


class Ancestral(Sampler):
    r"""The stochastic sampler (8), with path weights.

    Example:
        >>> def exact(x_t, sigma):  # a standard normal target
        ...     return x_t / (1 + sigma.square()).unsqueeze(-1)
        >>> Ancestral(exact, torch.tensor([10.0, 1.0, 0.0]), dim=2).sample(5).shape
        torch.Size([5, 2])
    """

    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """A draw of the posterior kernel around the denoised point."""
        denoised = self._denoise(x_t, sigma_t, context)
        mean, std = posterior(x_t, denoised, sigma_t, sigma_s)
        return mean if sigma_s == 0 else mean + std * _noise_like(x_t, generator)

    @torch.no_grad()
    def sample_with_path_weight(
        self,
        n: int,
        energy: Callable[..., Tensor],
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        r"""Draws with their exact path log-weights, whose mean weight estimates Z.

        Arguments:
            n: Number of draws.
            energy: The energy, called once on all draws (and contexts).
            context: A context for each draw.
            generator: Source of randomness.

        Returns:
            The draws, (n, dim), and their log-weights, (n).

        Note:
            The last step of (8) has no noise, and a path through it no density. Here it is drawn
            from :math:`\mathcal N(D, \sigma_1^2 I)`, the forward kernel's own width.
        """
        x = self.start(n, generator=generator)
        log_weight = 0.5 * (x / self.levels[0]).square().sum(-1)
        log_weight = log_weight + self.dim * math.log(self.levels[0])
        for sigma_t, sigma_s in zip(self.levels[:-1], self.levels[1:], strict=True):
            mean, _ = posterior(x, self._denoise(x, sigma_t, context), sigma_t, sigma_s)
            width = sigma_s * math.sqrt(1 - (sigma_s / sigma_t) ** 2) if sigma_s else sigma_t
            noise = _noise_like(x, generator)
            new = mean + width * noise
            forward_var = sigma_t**2 - sigma_s**2
            log_weight = log_weight + 0.5 * noise.square().sum(-1) + self.dim * math.log(width)
            log_weight = log_weight - 0.5 * (x - new).square().sum(-1) / forward_var
            log_weight = log_weight - 0.5 * self.dim * math.log(forward_var)
            x = new
        # Every forward Gaussian but one is paired with a reverse one; the start's constant is left.
        log_weight = log_weight + 0.5 * self.dim * math.log(2 * math.pi)
        value = energy(x) if context is None else energy(x, context)
        return x, log_weight - value


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

        Arguments:
            n: Number of draws.
            context: A context for each draw.
            generator: Source of randomness.
            chunk: Draws that are worked on at a time; bounds the memory.

        Returns:
            The draws, (n, dim), and their log-densities, (n), free of discretisation error.
        """
        start = self.start(n, generator=generator)
        points, densities = [], []
        for i in range(0, n, chunk):
            piece = None if context is None else context[i : i + chunk]
            x, log_prob = self._push(start[i : i + chunk], piece)
            points.append(x)
            densities.append(log_prob)
        if not points:
            return start, start.new_zeros(0)
        return torch.cat(points), torch.cat(densities)

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_prob = -0.5 * (x / self.levels[0]).square().sum(-1)
        log_prob = log_prob - self.dim * math.log(self.levels[0] * math.sqrt(2 * math.pi))
        basis = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        for sigma_t, sigma_s in zip(self.levels[:-1], self.levels[1:], strict=True):

            def move(y: Tensor, t: float = sigma_t, s: float = sigma_s) -> Tensor:
                return self.step(y, t, s, context)

            x, jacobian = _value_and_jacobian(move, x, basis)
            log_prob = log_prob - torch.linalg.slogdet(jacobian).logabsdet
        return x, log_prob


class DDIM(_Flow):
    r"""The deterministic sampler of first order.

    References:
        | Denoising diffusion implicit models (Song et al., 2021), equation (12) without noise
        | https://arxiv.org/abs/2010.02502
    """

    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Keep the predicted noise, shrink it to the new level."""
        denoised = self._denoise(x_t, sigma_t, context)
        return denoised + (sigma_s / sigma_t) * (x_t - denoised)


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
        """An Euler step, and the correction by the slope at its end."""
        slope = (x_t - self._denoise(x_t, sigma_t, context)) / sigma_t
        x_s = x_t + (sigma_s - sigma_t) * slope
        if sigma_s == 0:
            return x_s
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

        .. math:: \log p(x_0) = \log \mathcal N(x_N; 0, \sigma_N^2 I)
                  + \int_{\sigma_1}^{\sigma_N} \nabla \cdot \frac{x - D}{\sigma}\, d\sigma,

        with the exact divergence (one forward-mode derivative per coordinate), by Heun's method
        over the sampler's levels and over every second one of them. The first step, from 0 to
        the lowest level, is an Euler step of the map, not of the integral.

        Arguments:
            x: Points, with shape (n, dim).
            context: A context for each point.
            chunk: Points that are worked on at a time.

        Returns:
            The log-density, (n), and an estimate of its discretisation error, (n): the
            difference to the grid with half the steps, divided by 3 for second order.
        """
        fine, coarse = self.levels[:-1], self.levels[:-1][::2]
        if coarse[-1] != fine[-1]:
            coarse = [*coarse, fine[-1]]
        values, errors = [], []
        for i in range(0, len(x), chunk):
            piece = None if context is None else context[i : i + chunk]
            value = self._pull(x[i : i + chunk], piece, fine[::-1])
            rough = self._pull(x[i : i + chunk], piece, coarse[::-1])
            values.append(value)
            errors.append((value - rough).abs() / 3)
        if not values:
            return x.new_zeros(0), x.new_zeros(0)
        return torch.cat(values), torch.cat(errors)

    def _pull(self, x: Tensor, context: Tensor | None, rising: list[float]) -> Tensor:
        basis = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        first = rising[0]
        # The last step of the sampler maps y to D(y): invert it by fixed-point iteration.
        y = x
        for _ in range(8):
            y = y + (x - self._denoise(y, first, context))
        _, jacobian = _value_and_jacobian(lambda v: self._denoise(v, first, context), y, basis)
        log_prob = -torch.linalg.slogdet(jacobian).logabsdet
        slope, divergence = self._field(y, first, context, basis)
        for low, high in zip(rising[:-1], rising[1:], strict=True):
            ahead = y + (high - low) * slope
            ahead_slope, _ = self._field(ahead, high, context, basis)
            y = y + (high - low) * 0.5 * (slope + ahead_slope)
            # The divergence is integrated in log sigma, where it is smooth.
            slope, new_divergence = self._field(y, high, context, basis)
            log_prob = log_prob + math.log(high / low) * 0.5 * (
                low * divergence + high * new_divergence
            )
            divergence = new_divergence
        top = rising[-1]
        log_prob = log_prob - 0.5 * (y / top).square().sum(-1)
        return log_prob - self.dim * math.log(top * math.sqrt(2 * math.pi))

    def _field(
        self, x: Tensor, sigma: float, context: Tensor | None, basis: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Slope (x - D) / sigma and its divergence."""
        denoised, jacobian = _value_and_jacobian(
            lambda v: self._denoise(v, sigma, context), x, basis
        )
        trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (x - denoised) / sigma, (self.dim - trace) / sigma


class Langevin(Sampler):
    r"""Annealed Langevin dynamics: a few steps with the score of every noise level.

    .. math:: x \leftarrow x + \tfrac{h^2}{2}\, \nabla \log p_\sigma(x) + h z, \qquad
              h = \text{step\_size} \cdot \sigma\,\sigma_d / \sqrt{\sigma^2 + \sigma_d^2}

    at each level. The levels exchange no mass between separate modes once these no longer overlap:
    mode weights come out wrong with few steps, which is what the other samplers are for.

    Arguments:
        denoiser: As for every sampler.
        sigmas: As for every sampler; the last level, 0, is left out.
        dim: Length of a point.
        steps_per_level: Langevin steps at each level.
        step_size: Step length, in units of the noised law's own scale.
        sigma_data: Scale of the clean law.

    References:
        Equation (18)
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        sigmas: Float[Tensor, " levels"],
        *,
        dim: int,
        steps_per_level: int = 1,
        step_size: float = 0.5,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__(denoiser, sigmas, dim=dim)
        if steps_per_level < 1:
            raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
        if not step_size > 0:
            raise ValueError(f"step_size must be positive, got {step_size}")
        self.steps_per_level, self.step_size, self.sigma_data = (
            steps_per_level,
            step_size,
            sigma_data,
        )

    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """The Langevin steps at level sigma_t."""
        h = self.step_size * sigma_t * self.sigma_data / math.hypot(sigma_t, self.sigma_data)
        for _ in range(self.steps_per_level):
            score = (self._denoise(x_t, sigma_t, context) - x_t) / sigma_t**2
            x_t = x_t + 0.5 * h**2 * score + h * _noise_like(x_t, generator)
        return x_t


def _value_and_jacobian(
    function: Callable[[Tensor], Tensor], x: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor]:
    """f(x), (n, dim), and df/dx, (n, dim, dim), in one pass of forward-mode derivatives."""

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (x,), (direction.expand_as(x),))

    value, columns = torch.func.vmap(along, out_dims=(None, 0))(basis)
    return value, columns.permute(1, 2, 0)


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
