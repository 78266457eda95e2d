r"""The reverse chain (8), in first and second order, and the exact weight of its paths.

Draws of the chain have no tractable density, but the whole path has: with the forward kernel as
the extended target,

.. math:: \log w = -E(x_0) + \sum_k \log q(x_k | x_{k-1})
          - \log p(x_N) - \sum_k \log p_\theta(x_{k-1} | x_k)

is an exact importance weight (:meth:`Ancestral.sample_with_path_weight`), whatever the denoiser.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.flows import Heun
from rsm_sampler.samplers import Sampler, check_draws, noise_like

__all__ = ["Ancestral", "Multistep"]


@checked
class Ancestral(Sampler):
    r"""The stochastic sampler (8), with path weights.

    The step draws from :func:`rsm_sampler.transitions.posterior` with the denoised point for the
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
        return torch.add(mean, noise_like(x_t, generator), alpha=std)

    @torch.no_grad()
    def sample_with_path_weight(
        self,
        n: int,
        energy: Callable[..., Tensor],
        *,
        context: Float[Tensor, "n context_dim"] | None = None,
        generator: torch.Generator | None = None,
        pilot: int = 256,
        chunk: int = 8192,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        r"""Draws with their exact path log-weights, whose mean weight estimates Z.

        The steps of (8) draw :math:`x_s` as if D were the clean point itself. The true law of
        :math:`x_s` given :math:`x_t` is wider, by :math:`(1 - r^2)^2\,\mathrm{Var}(x_0 | x_t)`,
        and importance weights suffer from every step that is too narrow. So the kernels here have
        the variance

        .. math:: \sigma_s^2 (1 - r^2) + (1 - r^2)^2\, m_t, \qquad
                  m_t = \mathbb E (x_0 - D(x_t, \sigma_t))^2,

        with :math:`m_t` measured for every coordinate beforehand, on a few draws of :class:`Heun`
        that are thrown away.

        Arguments:
            n: Number of draws.
            energy: The energy, called once on all draws (and contexts).
            context: A context for each draw.
            generator: Source of randomness.
            pilot: Number of the draws that measure :math:`m_t`, at most n. With 0 the variances
                are those of (8), but for the last step, which has none: a path through it would
                have no density. It then gets :math:`\sigma_1^2`.
            chunk: Draws worked on at a time; bounds the memory and suits the cache.

        Returns:
            The draws, (n, dim), and their log-weights, (n).

        Raises:
            ValueError: If n or pilot is below 0 or the contexts are not n.

        Note:
            These draws do not follow the law of :meth:`Sampler.sample`, whose last step has no
            noise, but that of the wider kernels.
        """
        check_draws(n, context)
        if pilot < 0:
            raise ValueError(f"pilot must be at least 0, got {pilot}")
        variances = self._posterior_variances(min(pilot, n), context, generator)
        pieces = []
        for i in range(0, max(1, n), chunk):
            part = None if context is None else context[i : i + chunk]
            pieces.append(self._paths(min(chunk, n - i), variances, part, generator))
        x, log_weight = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        value = energy(x) if context is None else energy(x, context)
        return x, log_weight - value

    def _paths(
        self,
        n: int,
        variances: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Ends of paths, and the log-weights of the paths without the energy."""
        x, noise = self.start(n, context=context, generator=generator)
        log_weight = 0.5 * noise.square().sum(-1)
        constant = torch.full_like(log_weight[:1], self.dim * math.log(self._start_std))
        for (sigma_t, sigma_s), variance in zip(self._steps(), variances.to(x), strict=True):
            mean, std = self._kernel(x, sigma_t, sigma_s, context)
            width = (std**2 + (1 - (sigma_s / sigma_t) ** 2) ** 2 * variance).sqrt()
            noise = noise_like(x, generator)
            new = mean + width * noise
            spread = math.sqrt((sigma_t - sigma_s) * (sigma_t + sigma_s))
            ahead = ((x - new) / spread).square().sum(-1)
            log_weight = log_weight + 0.5 * (noise.square().sum(-1) - ahead)
            constant = constant + (width / spread).log().sum()
            x = new
        # Every forward Gaussian is paired with a reverse one; the start's constant is left.
        return x, log_weight + constant + 0.5 * self.dim * math.log(2 * math.pi)

    def _posterior_variances(
        self, pilot: int, context: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Mean variance of each clean coordinate given a point, (levels, dim), highest first."""
        levels = torch.tensor(self.levels[:-1], dtype=torch.float64)
        if context is not None:
            context = context[:: max(1, len(context) // max(1, pilot))][:pilot]
            pilot = len(context)
        if pilot == 0:
            last = torch.arange(len(levels)) == len(levels) - 1
            return (last * levels.square()).unsqueeze(-1).expand(-1, self.dim)
        # With few levels the flow is much nearer to the law than the chain.
        flow = Heun(self.denoiser, self.sigmas, dim=self.dim)
        x_0 = flow.sample(pilot, context=context, generator=generator)
        measured = []
        for sigma in self.levels[:-1]:
            x_t = x_0 + sigma * noise_like(x_0, generator)
            measured.append((x_0 - self._denoise(x_t, sigma, context)).square().mean(0))
        # A degenerate law has none, and a path no density.
        found = torch.stack(measured)
        return torch.maximum(found, 1e-6 * levels.square().unsqueeze(-1).to(found))

    def _kernel(
        self, x_t: Tensor, sigma_t: float, sigma_s: float, context: Tensor | None
    ) -> tuple[Tensor, float]:
        ratio = sigma_s / sigma_t
        mean = torch.lerp(self._denoise(x_t, sigma_t, context), x_t, ratio**2)
        return mean, ratio * math.sqrt((sigma_t - sigma_s) * (sigma_t + sigma_s))


@checked
class Multistep(Ancestral):
    r"""The reverse chain with the denoised point extrapolated along it, second order in the step.

    A step of (8) holds D fixed at its value at the beginning, and its draws come out too narrow,
    by an error of first order. The call of the step before tells how D moves: with
    :math:`h = \log(\sigma_t / \sigma_s)` and :math:`D', h'` of the step before,

    .. math:: x_s = \tilde D + r^2 (x_t - \tilde D) + \sigma_s \sqrt{1 - r^2}\; z, \qquad
              \tilde D = D + \frac{h}{2 h'} (D - D') .

    The first and the last step are those of (8), and there are no more calls of the denoiser. On
    two wells of width 0.08 at :math:`\pm 0.4` with 400 cosine levels the total variation to the
    law falls from 0.025 to its floor of 0.005; with 20 levels, where neither resolves the wells,
    it does not fall.

    :meth:`step` and :meth:`sample_with_path_weight` are those of :class:`Ancestral`.

    References:
        | DPM-Solver++ (Lu et al., 2022), SDE-DPM-Solver++(2M)
        | https://arxiv.org/abs/2211.01095

    Example:
        >>> def exact(x_t, sigma):  # a standard normal target
        ...     return x_t / (1 + sigma.square()).unsqueeze(-1)
        >>> Multistep(exact, torch.tensor([10.0, 1.0, 0.0]), dim=2).sample(5).shape
        torch.Size([5, 2])
    """

    def _walk(
        self,
        x: Tensor,
        steps: Iterable[tuple[float, float]],
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        before, before_h = None, 1.0
        for sigma_t, sigma_s in steps:
            denoised = self._denoise(x, sigma_t, context)
            if sigma_s == 0:
                return denoised
            h, ratio = math.log(sigma_t / sigma_s), sigma_s / sigma_t
            ahead = denoised
            if before is not None:
                ahead = torch.lerp(before, denoised, 1 + 0.5 * h / before_h)
            std = ratio * math.sqrt((sigma_t - sigma_s) * (sigma_t + sigma_s))
            x = torch.lerp(ahead, x, ratio**2).add_(noise_like(x, generator), alpha=std)
            before, before_h = denoised, h
        return x
