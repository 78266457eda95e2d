r"""From a denoiser to samples, and to the density of the very process that made them.

All samplers walk down a grid of noise levels :math:`\sigma_N > \dots > \sigma_1 > \sigma_0 = 0`
from :math:`x_N \sim \mathcal N(m, \sigma_N^2 I)`, :math:`m = D(0, \sigma_N)`. The noised law is
not centred at 0 but at the target's mean, which differs from context to context, and at the
highest level :math:`D(0, \sigma_N) = \mathbb E[x_0 | x_N = 0]` is nearly that. A start that
misses it by :math:`\delta` moves mass between modes, in proportion to :math:`\delta / \sigma_N`.
The samplers differ in one step, in variance-exploding coordinates and with
:math:`D = D(x_t, \sigma_t)`, :math:`r = \sigma_s / \sigma_t`:

================== ==========================================================================
:class:`Ancestral` :math:`x_s = D + r^2 (x_t - D) + \sigma_s\sqrt{1 - r^2}\; z`, equation (8)
:class:`DDIM`      :math:`x_s = D + r\,(x_t - D)`, the same without noise
:class:`Heun`      the ODE :math:`dx/d\sigma = (x - D)/\sigma`, second order
:class:`Langevin`  :math:`x \leftarrow x + \tfrac{h^2}{2} \nabla\log p_\sigma(x) + h z` at each
                   level, equation (18)
================== ==========================================================================

**Densities.** Importance weights are only as right as the density in them. :class:`DDIM` and
:class:`Heun` are smooth maps of their start, so their draws have a density that is known without
any discretisation error. Each step multiplies the Jacobian, which autograd computes exactly, with
one backward pass for each coordinate (rows of a batch do not mix, so a pass serves all of them):

.. math:: \log q(x_0) = \log \mathcal N(x_N; m, \sigma_N^2 I)
          - \sum_k \log \Big| \det \frac{\partial x_{k-1}}{\partial x_k} \Big| .

:class:`Ancestral` draws have no tractable density, but the whole path has: with the forward
kernel as the extended target, :math:`\log w = -E(x_0) + \sum_k \log q(x_k | x_{k-1})
- \log p(x_N) - \sum_k \log p_\theta(x_{k-1} | x_k)` is an exact importance weight
(:meth:`Ancestral.sample_with_path_weight`), whatever the denoiser.

The density *at a given point* needs the map backwards: :meth:`Heun.log_prob` integrates the
probability-flow ODE with the exact divergence, and estimates its own error by doubling the steps.
It serves for reading and plotting; weights never use it.
"""

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["DDIM", "Ancestral", "Heun", "Langevin", "Sampler"]

_S = TypeVar("_S", bound="Sampler")


class Sampler(ABC):
    r"""The loop shared by all samplers; a subclass adds one step.

    Arguments:
        denoiser: A function (x_t, sigma) -> E[x_0 | x_t], called with sigma of the batch shape
            (one level, expanded), and with a context where one is given to :meth:`sample`.
            Samples have the precision and device of its first parameter, or of the sigmas where
            it has none. One with a true attribute ``by_number`` gets the level as a number.
        sigmas: Decreasing noise levels that end with 0, from
            :meth:`rsm_sampler.schedules.Schedule.sigmas`.
        dim: Length of a point.
        centred: Whether to start around :math:`D(0, \sigma_N)`, at the price of one more call of
            the denoiser. Needless where the highest level is hundreds of times the target's scale.
        start_scale: Factor on the noise of the start. Other values than 1 are for comparison with
            published code, which starts with half the noise; the law is then not the denoiser's.

    Attributes:
        levels: The noise levels as numbers.

    Raises:
        ValueError: If the levels are not finite or do not decrease to 0, or dim is below 1.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        sigmas: Float[Tensor, " levels"],
        *,
        dim: int,
        centred: bool = True,
        start_scale: float = 1.0,
    ) -> None:
        if sigmas.dim() != 1 or len(sigmas) < 2 or float(sigmas[-1]) != 0:
            raise ValueError(
                f"sigmas must be at least two levels that end with 0, got {sigmas.tolist()}"
            )
        if not bool((sigmas[1:] < sigmas[:-1]).all()) or not math.isfinite(sigmas[0]):
            raise ValueError(f"sigmas must be finite and decrease, got {sigmas.tolist()}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 < start_scale < math.inf:
            raise ValueError(f"start_scale must be positive and finite, got {start_scale}")
        self.denoiser = denoiser
        self.sigmas = sigmas
        self.levels: list[float] = sigmas.double().tolist()
        self.dim = dim
        self.centred, self.start_scale = centred, start_scale
        self._by_number = bool(getattr(denoiser, "by_number", False))

    def around(self: _S, denoiser: Callable[..., Tensor]) -> _S:
        """The same sampler with another denoiser, without the checks of a new one.

        Arguments:
            denoiser: As for a new sampler.
        """
        other = copy.copy(self)
        other.denoiser = denoiser
        other._by_number = bool(getattr(denoiser, "by_number", False))
        return other

    @abstractmethod
    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """One step from noise level sigma_t down to sigma_s.

        Arguments:
            x_t: Points at level sigma_t, with shape (n, dim).
            sigma_t: Their noise level, positive.
            sigma_s: The next one, at least 0 and below sigma_t.
            context: A context for each point.
            generator: Source of randomness, for the samplers that need any.

        Returns:
            Points at level sigma_s.
        """

    @torch.no_grad()
    def start(
        self,
        n: int,
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        r"""Draws of the law at the highest level, :math:`\mathcal N(m, \sigma_N^2 I)`.

        Arguments:
            n: Number of draws.
            context: A context for each.
            generator: Source of randomness, on the denoiser's device.

        Returns:
            The draws, (n, dim), and the standard normal noise in them, (n, dim).
        """
        parameters = getattr(self.denoiser, "parameters", None)
        first = next(iter(parameters()), None) if callable(parameters) else None
        like = self.sigmas if first is None else first
        noise = torch.randn(n, self.dim, dtype=like.dtype, device=like.device, generator=generator)
        return self._centre(noise, context) + self._start_std * noise, noise

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "n dim"]:
        """Independent draws.

        Arguments:
            n: Number of draws.
            context: A context for each.
            generator: Source of randomness, on the denoiser's device.
            progress: Whether to show a progress bar over the noise levels.

        Returns:
            The draws, (n, dim).

        Raises:
            ValueError: If n is below 0 or the contexts are not n.
        """
        _check(n, context)
        x, _ = self.start(n, context=context, generator=generator)
        steps = tqdm(self._steps(), disable=not progress, desc="sampling", leave=False)
        for sigma_t, sigma_s in steps:
            x = self.step(x, sigma_t, sigma_s, context, generator)
        return x

    def _steps(self) -> list[tuple[float, float]]:
        return list(itertools.pairwise(self.levels))

    @property
    def _start_std(self) -> float:
        return self.start_scale * self.levels[0]

    def _centre(self, x: Tensor, context: Tensor | None) -> Tensor | float:
        """The mean m of the start, for each point or, without a context, for all."""
        if not self.centred:
            return 0.0
        zero = torch.zeros_like(x if context is not None else x[:1])
        return self._denoise(zero, self.levels[0], context)

    def _denoise(self, x: Tensor, sigma: float, context: Tensor | None) -> Tensor:
        if self._by_number:
            return self.denoiser(x, sigma) if context is None else self.denoiser(x, sigma, context)
        level = torch.full((1,), sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
        return self.denoiser(x, level) if context is None else self.denoiser(x, level, context)


class Ancestral(Sampler):
    r"""The stochastic sampler (8), with path weights.

    The step draws from :func:`rsm_sampler.kernels.posterior` with the denoised point for the
    clean one.

    References:
        Equation (8), in variance-exploding coordinates

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
        """A draw of the posterior kernel around the denoised point; see :meth:`Sampler.step`."""
        mean, std = self._kernel(x_t, sigma_t, sigma_s, context)
        if sigma_s == 0:
            return mean
        return torch.add(mean, _noise_like(x_t, generator), alpha=std)

    @torch.no_grad()
    def sample_with_path_weight(
        self,
        n: int,
        energy: Callable[..., Tensor],
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
        pilot: int = 256,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        r"""Draws with their exact path log-weights, whose mean weight estimates Z.

        The steps of (8) draw :math:`x_s` as if D were the clean point itself. The true law of
        :math:`x_s` given :math:`x_t` is wider, by :math:`(1 - r^2)^2\,\mathrm{Var}(x_0 | x_t)`,
        and importance weights suffer from every step that is too narrow. So the kernels here have
        the variance

        .. math:: \sigma_s^2 (1 - r^2) + (1 - r^2)^2\, m_t, \qquad
                  m_t = \tfrac1d\, \mathbb E |x_0 - D(x_t, \sigma_t)|^2,

        with :math:`m_t` measured beforehand on a few draws of :class:`Heun` that are thrown away.

        Arguments:
            n: Number of draws.
            energy: The energy, called once on all draws (and contexts).
            context: A context for each draw.
            generator: Source of randomness.
            pilot: Number of the draws that measure :math:`m_t`. With 0 the variances are those of
                (8), but for the last step, which has none: a path through it would have no
                density. It then gets :math:`\sigma_1^2`.

        Returns:
            The draws, (n, dim), and their log-weights, (n).

        Raises:
            ValueError: If n or pilot is below 0 or the contexts are not n.

        Note:
            These draws do not follow the law of :meth:`Sampler.sample`, whose last step has no
            noise, but that of the wider kernels.
        """
        _check(n, context)
        if pilot < 0:
            raise ValueError(f"pilot must be at least 0, got {pilot}")
        variances = self._posterior_variances(pilot, context, generator)
        x, noise = self.start(n, context=context, generator=generator)
        log_weight = 0.5 * noise.square().sum(-1)
        constant = self.dim * math.log(self._start_std)
        for (sigma_t, sigma_s), variance in zip(self._steps(), variances, strict=True):
            mean, std = self._kernel(x, sigma_t, sigma_s, context)
            width = math.hypot(std, (1 - (sigma_s / sigma_t) ** 2) * math.sqrt(variance))
            noise = _noise_like(x, generator)
            new = mean + width * noise
            spread = math.sqrt((sigma_t - sigma_s) * (sigma_t + sigma_s))
            ahead = ((x - new) / spread).square().sum(-1)
            log_weight = log_weight + 0.5 * (noise.square().sum(-1) - ahead)
            constant += self.dim * math.log(width / spread)
            x = new
        # Every forward Gaussian is paired with a reverse one; the start's constant is left.
        constant += 0.5 * self.dim * math.log(2 * math.pi)
        value = energy(x) if context is None else energy(x, context)
        return x, log_weight + constant - value

    def _posterior_variances(
        self, pilot: int, context: Tensor | None, generator: torch.Generator | None
    ) -> list[float]:
        """Mean variance of a clean coordinate given a point at each level, from the highest."""
        if context is not None:
            context = context[:: max(1, len(context) // max(1, pilot))][:pilot]
            pilot = len(context)
        if pilot == 0:
            return [0.0] * (len(self.levels) - 2) + [self.levels[-2] ** 2]
        # With few levels the flow is much nearer to the law than the chain.
        flow = Heun(self.denoiser, self.sigmas, dim=self.dim)
        x_0 = flow.sample(pilot, context=context, generator=generator)
        measured = []
        for sigma in self.levels[:-1]:
            x_t = x_0 + sigma * _noise_like(x_0, generator)
            measured.append((x_0 - self._denoise(x_t, sigma, context)).square().mean())
        found = torch.stack(measured).tolist()
        # A degenerate law has none, and a path no density.
        return [max(m, 1e-6 * t**2) for m, t in zip(found, self.levels[:-1], strict=True)]

    def _kernel(
        self, x_t: Tensor, sigma_t: float, sigma_s: float, context: Tensor | None
    ) -> tuple[Tensor, float]:
        ratio = sigma_s / sigma_t
        mean = torch.lerp(self._denoise(x_t, sigma_t, context), x_t, ratio**2)
        return mean, ratio * math.sqrt((sigma_t - sigma_s) * (sigma_t + sigma_s))


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
        _check(n, context, chunk)
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
        _check(len(x), context, chunk)
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


class Langevin(Sampler):
    r"""Annealed Langevin dynamics: a few steps with the score of every noise level.

    .. math:: x \leftarrow x + \tfrac{h^2}{2}\, \nabla \log p_\sigma(x) + h z, \qquad
              h = \text{step\_size} \cdot \sqrt{\sigma^2 + \sigma_d^2}

    at each level but 0, so that the draws follow the law of the lowest level. Where
    :math:`\sigma_d` is at most the scale of the finest structure of the clean law, the curvature
    of :math:`-\log p_\sigma` is at most :math:`1 / (\sigma^2 + \sigma_d^2)`, and the steps are
    stable for step sizes below 2. The default 0 is always safe; on a single Gaussian of scale 1,
    50 levels of five steps then leave a variance of 1.10.

    The levels exchange no mass between separate modes once these no longer overlap: mode weights
    come out wrong with few steps, which is what the other samplers are for.

    Arguments:
        denoiser: As for every sampler.
        sigmas: As for every sampler; the last level, 0, is left out.
        dim: Length of a point.
        steps_per_level: Langevin steps at each level.
        step_size: Step length, in units of the finest scale of the noised law. On that scale the
            stationary variance is too large by a factor of 1 / (1 - step_size**2 / 4).
        sigma_data: Scale of the finest structure of the clean law, in units of x; 0 if unknown.
        centred: As for every sampler.
        start_scale: As for every sampler.

    Raises:
        ValueError: As for every sampler, or if an argument is out of range.

    References:
        Equation (18)
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        sigmas: Float[Tensor, " levels"],
        *,
        dim: int,
        steps_per_level: int = 5,
        step_size: float = 1.0,
        sigma_data: float = 0.0,
        centred: bool = True,
        start_scale: float = 1.0,
    ) -> None:
        super().__init__(denoiser, sigmas, dim=dim, centred=centred, start_scale=start_scale)
        if steps_per_level < 1:
            raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size must be positive and below 2, got {step_size}")
        if not sigma_data >= 0:
            raise ValueError(f"sigma_data must be at least 0, got {sigma_data}")
        self.steps_per_level, self.step_size = steps_per_level, step_size
        self.sigma_data = sigma_data

    def step(
        self,
        x_t: Float[Tensor, "n dim"],
        sigma_t: float,
        sigma_s: float,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """The Langevin steps at level sigma_t; see :meth:`Sampler.step`."""
        h = self.step_size * math.hypot(sigma_t, self.sigma_data)
        pull = 0.5 * (h / sigma_t) ** 2  # h^2 / 2 times the score (D - x) / sigma^2
        for _ in range(self.steps_per_level):
            x_t = torch.lerp(x_t, self._denoise(x_t, sigma_t, context), pull)
            x_t = x_t + h * _noise_like(x_t, generator)
        return x_t


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


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def _check(n: int, context: Tensor | None, chunk: int = 1) -> None:
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if context is not None and len(context) != n:
        raise ValueError(f"context must have {n} rows, one for each draw, got {len(context)}")
