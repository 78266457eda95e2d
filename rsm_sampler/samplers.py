r"""From a denoiser to samples: the loop that all samplers share, and annealed Langevin dynamics.

All samplers walk down a grid of noise levels :math:`\sigma_N > \dots > \sigma_1 > \sigma_0 = 0`
from :math:`x_N \sim \mathcal N(m, \sigma_N^2 I)`, :math:`m = D(0, \sigma_N)`. The noised law is
not centred at 0 but at the target's mean, which differs from context to context, and at the
highest level :math:`D(0, \sigma_N) = \mathbb E[x_0 | x_N = 0]` is nearly that. A start that
misses it by :math:`\delta` moves mass between modes, in proportion to :math:`\delta / \sigma_N`.
The samplers differ in one step, in variance-exploding coordinates and with
:math:`D = D(x_t, \sigma_t)`, :math:`r = \sigma_s / \sigma_t`:

========== ==================================================================================
ancestral  :math:`x_s = D + r^2 (x_t - D) + \sigma_s\sqrt{1 - r^2}\; z`, equation (8):
           :mod:`rsm_sampler.ancestral`
multistep  the same with D extrapolated to the middle of the step, second order:
           :mod:`rsm_sampler.ancestral`
DDIM       :math:`x_s = D + r\,(x_t - D)`, the same without noise: :mod:`rsm_sampler.flows`
Heun       the ODE :math:`dx/d\sigma = (x - D)/\sigma`, second order: :mod:`rsm_sampler.flows`
Langevin   :math:`x \leftarrow x + \tfrac{h^2}{2} \nabla\log p_\sigma(x) + h z` at each level,
           equation (18): here
========== ==================================================================================
"""

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rsm_sampler.checked import checked

__all__ = ["Langevin", "Sampler"]

_S = TypeVar("_S", bound="Sampler")


@checked
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
        check_draws(n, context)
        x, _ = self.start(n, context=context, generator=generator)
        steps = tqdm(self._steps(), disable=not progress, desc="sampling", leave=False)
        return self._walk(x, steps, context, generator)

    def _walk(
        self,
        x: Tensor,
        steps: Iterable[tuple[float, float]],
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """All the steps, one after the other."""
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


@checked
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
            x_t = x_t + h * noise_like(x_t, generator)
        return x_t


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers with the shape, type and device of x."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def check_draws(n: int, context: Tensor | None, chunk: int = 1) -> None:
    """Refuse a negative number of draws, no rows at a time, and contexts of another number."""
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if context is not None and len(context) != n:
        raise ValueError(f"context must have {n} rows, one for each draw, got {len(context)}")
