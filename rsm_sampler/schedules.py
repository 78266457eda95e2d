r"""Noise schedules: how much noise there is at time t.

The forward process of a diffusion model keeps a share :math:`\bar\alpha_t` of the signal's power,

.. math:: x^{\mathrm{VP}}_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon,
          \qquad \epsilon \sim \mathcal N(0, I).

Divided by :math:`\sqrt{\bar\alpha_t}` the same process reads

.. math:: x_t = x_0 + \sigma_t\, \epsilon, \qquad
          \sigma_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t},

and these *variance-exploding* coordinates are the ones used throughout this package. The noise
scale :math:`\sigma` stays precise at both ends, where :math:`\bar\alpha` does not: a signal
power of :math:`6 \cdot 10^{-11}` is :math:`\sigma = 1.2 \cdot 10^5`, and one of
:math:`1 - 10^{-10}`, which single precision rounds to 1, is :math:`\sigma = 10^{-5}`.

A schedule is a strictly increasing function :math:`t \mapsto \sigma_t` on ``[0, t_max]`` with
its inverse. The discrete ones are defined by T rates :math:`\beta_t`. With the cumulative rate

.. math:: H_t = -\log \bar\alpha_t = -\sum_{l \le t} \log(1 - \beta_l), \qquad
          \sigma_t^2 = e^{H_t} - 1,

they extend to real t by letting H grow linearly within a step (a constant rate of noise), so
that a sampler may ask for any number of steps. The continuous ones run over
:math:`t \in [0, 1]`, from :math:`\sigma_{\min}` to :math:`\sigma_{\max}`.

Times are handled alike everywhere: a number is checked against ``[0, t_max]``; a tensor is
clamped to it, so that no value needs to be read back from a device. Everything is computed in
double precision and returned with the precision of the argument (double for numbers and integer
tensors).
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = [
    "EDM",
    "Cosine",
    "DiscreteSchedule",
    "Geometric",
    "Linear",
    "Schedule",
    "VariancePreserving",
]


@checked
class Schedule(ABC):
    """The noise scale as a strictly increasing function of time.

    A subclass gives :attr:`t_max`, :meth:`sigma_of` and :meth:`time_of`, and :meth:`sigmas`.
    """

    @property
    @abstractmethod
    def t_max(self) -> float:
        """The last time, at which the noise is largest."""

    @abstractmethod
    def sigma_of(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Noise scale at double-precision times within ``[0, t_max]``."""

    @abstractmethod
    def time_of(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Time of double-precision noise scales, clamped to ``[0, t_max]``."""

    @abstractmethod
    def sigmas(self, num_steps: int | None = None) -> Float[Tensor, " steps"]:
        """Decreasing noise scales of a sampler, the last one exactly 0."""

    def sigma(self, t: Shaped[Tensor, "*shape"] | float | int) -> Float[Tensor, "*shape"]:
        r"""Noise scale :math:`\sigma_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}`, in units of x.

        Arguments:
            t: Times in ``[0, t_max]``, of any shape. Tensors are clamped to that range.

        Returns:
            The noise scale, with the shape of t; double precision unless t is a floating tensor.

        Raises:
            ValueError: If t is a number outside of ``[0, t_max]``.

        Example:
            >>> round(Geometric(sigma_min=0.1, sigma_max=10.0).sigma(0.5).item(), 12)
            1.0
        """
        time, dtype = _as_double(t, "t", 0.0, self.t_max)
        return self.sigma_of(time).to(dtype)

    def alpha_bar(self, t: Shaped[Tensor, "*shape"] | float | int) -> Float[Tensor, "*shape"]:
        r"""Share of the signal's power that is left, :math:`\bar\alpha_t = 1 / (1 + \sigma_t^2)`.

        Arguments:
            t: Times in ``[0, t_max]``, of any shape. Tensors are clamped to that range.

        Returns:
            A value in (0, 1], with the shape of t; double precision unless t is a floating tensor.

        Raises:
            ValueError: If t is a number outside of ``[0, t_max]``.

        Example:
            >>> round(Cosine(20).alpha_bar(10).item(), 6)
            0.493844
        """
        time, dtype = _as_double(t, "t", 0.0, self.t_max)
        return self.sigma_of(time).square().add(1.0).reciprocal().to(dtype)

    def time(self, sigma: Shaped[Tensor, "*shape"] | float | int) -> Float[Tensor, "*shape"]:
        r"""Time at which the noise scale is sigma, the inverse of :meth:`sigma`.

        Arguments:
            sigma: Noise scales, of any shape. Tensors beyond the schedule's range give its ends.

        Returns:
            The time, with the shape of sigma; not an integer in general, for discrete schedules
            too.

        Raises:
            ValueError: If sigma is a number outside of the schedule's range.

        Example:
            >>> round(Cosine(20).time(Cosine(20).sigma(7)).item(), 12)
            7.0
        """
        if isinstance(sigma, Tensor):
            low, high = 0.0, math.inf
        else:
            low, high = self.sigma(0.0).item(), self.sigma(self.t_max).item()
        value, dtype = _as_double(sigma, "sigma", low, high)
        return self.time_of(value).to(dtype)


@checked
class DiscreteSchedule(Schedule):
    r"""A schedule given by T rates, :math:`\bar\alpha_t = \prod_{l \le t} (1 - \beta_l)`.

    Times are 0, 1, ..., T with no noise at all at 0; between two of them :math:`\log \bar\alpha`
    is linear. :class:`Linear`, :class:`Cosine` and :class:`VariancePreserving` differ from it in
    their constructor only.

    Arguments:
        betas: The rates :math:`\beta_1, \dots, \beta_T`, with shape :math:`(T)`, each within (0,
            1).

    Raises:
        ValueError: If betas is not a vector of at least one rate, or a rate lies outside of (0,
            1).

    References:
        Equation (6) of Efficient Online Reinforcement Learning for Diffusion Policy (Ma et al.,
        2025)

    Example:
        >>> DiscreteSchedule(torch.tensor([0.5, 0.5])).sigmas().square().round(decimals=9)
        tensor([3., 1., 0.], dtype=torch.float64)
    """

    def __init__(self, betas: Shaped[Tensor, " steps"]) -> None:
        betas = torch.as_tensor(betas).detach().to(device="cpu", dtype=torch.float64)
        if betas.ndim != 1 or betas.numel() == 0:
            raise ValueError(f"betas must have shape (num_steps,), got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            low, high = betas.min().item(), betas.max().item()
            raise ValueError(f"betas must lie within (0, 1), got values from {low:g} to {high:g}")
        self.betas = betas.clone()
        rate = torch.zeros(len(betas) + 1, dtype=torch.float64)
        rate[1:] = -torch.log1p(-betas).cumsum(0)
        self._cumulative_rate = {rate.device: rate}

    @staticmethod
    def through(sigmas: Shaped[Tensor, " steps"]) -> "DiscreteSchedule":
        r"""The schedule of T given noise levels.

        .. math:: \beta_t = 1 - \frac{1 + \sigma_{t-1}^2}{1 + \sigma_t^2}, \qquad \sigma_0 = 0

        Arguments:
            sigmas: The levels, rising, positive, finite, with shape :math:`(T)`.

        Raises:
            ValueError: If they are not.

        Example:
            >>> DiscreteSchedule.through(torch.tensor([0.1, 1.0])).sigmas()
            tensor([1.0000, 0.1000, 0.0000], dtype=torch.float64)
        """
        levels = torch.as_tensor(sigmas).detach().to(device="cpu", dtype=torch.float64)
        if levels.ndim != 1 or levels.numel() == 0:
            raise ValueError(f"sigmas must have shape (num_steps,), got {tuple(levels.shape)}")
        rate = torch.cat([torch.zeros(1, dtype=torch.float64), levels.square().log1p()]).diff()
        if not bool((rate > 0).all() & rate.isfinite().all()):
            raise ValueError(f"sigmas must rise from above 0 and be finite, got {levels.tolist()}")
        return DiscreteSchedule(-torch.expm1(-rate))

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return len(self.betas)

    @property
    def t_max(self) -> float:
        """The last time, T."""
        return float(self.num_steps)

    def sigma_of(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Noise scale at double-precision times within ``[0, T]``."""
        rate = self._rate_on(t.device)
        step = t.floor().clamp(max=self.num_steps - 1).long()
        return torch.lerp(rate[step], rate[step + 1], t - step).expm1().sqrt()

    def time_of(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Time of double-precision noise scales, clamped to ``[0, T]``."""
        rate = self._rate_on(sigma.device)
        value = sigma.square().log1p()
        step = torch.searchsorted(rate, value.contiguous(), right=True) - 1
        step = step.clamp(0, self.num_steps - 1)
        fraction = (value - rate[step]) / (rate[step + 1] - rate[step])
        return step + fraction.clamp(0.0, 1.0)

    def sigmas(self, num_steps: int | None = None) -> Float[Tensor, " steps"]:
        r"""Noise scales at equally spaced times from T to 0.

        Arguments:
            num_steps: The number of steps of the sampler; every time of the schedule if None.

        Returns:
            Decreasing noise scales, with shape :math:`(\mathrm{num\_steps} + 1)`, the last one
            exactly 0.

        Raises:
            ValueError: If num_steps is less than 1.

        Example:
            >>> Linear(20).sigmas(4).shape
            torch.Size([5])
        """
        num_steps = _checked_steps(self.num_steps if num_steps is None else num_steps)
        steps = torch.arange(num_steps, -1, -1, dtype=torch.float64)
        return self.sigma_of(steps * self.num_steps / num_steps)

    def _rate_on(self, device: torch.device) -> Tensor:
        """The cumulative rate H, copied once to every device that asks for it."""
        if device not in self._cumulative_rate:
            self._cumulative_rate[device] = self._cumulative_rate[self.betas.device].to(device)
        return self._cumulative_rate[device]

    def __repr__(self) -> str:
        """Name and number of steps."""
        return f"{type(self).__name__}(num_steps={self.num_steps})"


@checked
class Linear(DiscreteSchedule):
    r"""Rates equally spaced from beta_min to beta_max, times scale.

    Arguments:
        num_steps: The number of steps T.
        beta_min: First rate, before scaling.
        beta_max: Last rate, before scaling.
        scale: Factor on every rate.

    Raises:
        ValueError: If num_steps is less than 1, beta_min is not below beta_max, or a rate leaves
            (0, 1).

    Example:
        >>> round(Linear(20, scale=0.8).alpha_bar(10).item(), 6)
        0.109435
    """

    def __init__(
        self,
        num_steps: int,
        *,
        beta_min: float = 1e-4,
        beta_max: float = 0.999,
        scale: float = 1.0,
    ) -> None:
        _checked_steps(num_steps)
        _check_order("beta_min", beta_min, "beta_max", beta_max)
        _check_positive("scale", scale)
        super().__init__(
            torch.linspace(beta_min, beta_max, num_steps, dtype=torch.float64) * scale
        )


@checked
class Cosine(DiscreteSchedule):
    r"""Signal power that falls like a squared cosine.

    .. math:: \beta_t = \min\Big(1 - \frac{f_t}{f_{t-1}}, \beta_{\max}\Big), \qquad
              f_t = \cos^2\Big(\frac{t/T + s}{1 + s}\,\frac{\pi}{2}\Big)

    Arguments:
        num_steps: The number of steps T.
        offset: The shift s, which keeps the first rates away from 0.
        beta_max: Largest rate, before scaling.
        scale: Factor on every rate.

    Raises:
        ValueError: If num_steps is less than 1, offset is negative, or a rate leaves (0, 1).

    References:
        | Improved denoising diffusion probabilistic models (Nichol and Dhariwal, 2021), (17)
        | https://arxiv.org/abs/2102.09672

    Example:
        >>> round(Cosine(20).alpha_bar(15).item(), 6)
        0.144272
    """

    def __init__(
        self,
        num_steps: int,
        *,
        offset: float = 0.008,
        beta_max: float = 0.999,
        scale: float = 1.0,
    ) -> None:
        _checked_steps(num_steps)
        if not offset >= 0:
            raise ValueError(f"offset must be at least 0, got {offset}")
        _check_positive("scale", scale)
        t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        power = torch.cos((t + offset) / (1 + offset) * (math.pi / 2)).square()
        super().__init__((1 - power[1:] / power[:-1]).clamp(max=beta_max) * scale)


@checked
class VariancePreserving(DiscreteSchedule):
    r"""The variance-preserving diffusion with a linear rate, taken in T exact steps.

    .. math:: \beta_t = 1 - \exp\Big(-\frac{b_{\min}}{T}
              - \frac{(b_{\max} - b_{\min})(2t - 1)}{2T^2}\Big)

    Arguments:
        num_steps: The number of steps T.
        beta_min: Rate at the start, :math:`b_{\min}`, per unit of time (the process takes unit
            time).
        beta_max: Rate at the end, :math:`b_{\max}`.

    Raises:
        ValueError: If num_steps is less than 1 or ``0 < beta_min < beta_max`` does not hold.

    References:
        | Score-based generative modeling through stochastic differential equations
        | (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456

    Example:
        >>> round(VariancePreserving(20).alpha_bar(20).item(), 8)
        0.00640933
    """

    def __init__(self, num_steps: int, *, beta_min: float = 0.1, beta_max: float = 10.0) -> None:
        _checked_steps(num_steps)
        _check_positive("beta_min", beta_min)
        _check_order("beta_min", beta_min, "beta_max", beta_max)
        t = torch.arange(1, num_steps + 1, dtype=torch.float64)
        rate = beta_min / num_steps + (beta_max - beta_min) * (2 * t - 1) / (2 * num_steps**2)
        super().__init__(-torch.expm1(-rate))


class _Continuous(Schedule, ABC):
    """Schedules on ``[0, 1]`` between a smallest and a largest noise scale."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        _check_positive("sigma_min", sigma_min)
        _check_order("sigma_min", sigma_min, "sigma_max", sigma_max)
        if math.isinf(sigma_max):
            raise ValueError(f"sigma_max must be finite, got {sigma_max}")
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)

    @property
    def t_max(self) -> float:
        """The last time, 1."""
        return 1.0

    def sigmas(self, num_steps: int | None = None) -> Float[Tensor, " steps"]:
        r"""Noise scales at equally spaced times from sigma_max to sigma_min, and then 0.

        Arguments:
            num_steps: The number of steps of the sampler. It must be given: a continuous
                schedule has no steps of its own.

        Returns:
            Decreasing noise scales, with shape :math:`(\mathrm{num\_steps} + 1)`, the last one
            exactly 0.

        Raises:
            ValueError: If num_steps is None or less than 1.

        Example:
            >>> Geometric(sigma_min=0.1, sigma_max=10.0).sigmas(3)
            tensor([10.0000,  1.0000,  0.1000,  0.0000], dtype=torch.float64)
        """
        if num_steps is None:
            raise ValueError("num_steps must be given for a continuous schedule, got None")
        _checked_steps(num_steps)
        grid = torch.zeros(num_steps + 1, dtype=torch.float64)
        grid[:-1] = self.sigma_of(torch.linspace(1.0, 0.0, num_steps, dtype=torch.float64))
        return grid

    def __repr__(self) -> str:
        """Name and noise range."""
        return f"{type(self).__name__}(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g})"


@checked
class Geometric(_Continuous):
    r"""Geometric progression of noise scales, :math:`\sigma_{\min}^{1-t}\, \sigma_{\max}^{t}`.

    Arguments:
        sigma_min: Noise scale at time 0, in units of x; small against the finest detail of the
            target.
        sigma_max: Noise scale at time 1, in units of x; large against the target's width.

    Raises:
        ValueError: If ``0 < sigma_min < sigma_max < inf`` does not hold.

    References:
        | Score-based generative modeling through stochastic differential equations
        | (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456

    Example:
        >>> Geometric(sigma_min=0.01, sigma_max=100.0)
        Geometric(sigma_min=0.01, sigma_max=100)
    """

    def sigma_of(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Noise scale at double-precision times within ``[0, 1]``."""
        ratio = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(t * ratio)
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def time_of(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Time of double-precision noise scales, clamped to ``[0, 1]``."""
        ratio = math.log(self.sigma_max / self.sigma_min)
        return (torch.log(sigma / self.sigma_min) / ratio).clamp(0.0, 1.0)


@checked
class EDM(_Continuous):
    r"""Noise scales whose root of order rho is linear in time.

    .. math:: \sigma_t = \big(\sigma_{\min}^{1/\rho}
              + t\,(\sigma_{\max}^{1/\rho} - \sigma_{\min}^{1/\rho})\big)^\rho

    Arguments:
        sigma_min: Noise scale at time 0, in units of x; small against the finest detail of the
            target.
        sigma_max: Noise scale at time 1, in units of x; large against the target's width.
        rho: Curvature: 1 is linear in sigma; the larger, the more steps at small noise.

    Raises:
        ValueError: If ``0 < sigma_min < sigma_max < inf`` or ``rho > 0`` does not hold.

    References:
        | Elucidating the design space of diffusion-based generative models
        | (Karras et al., 2022), equation (5)
        | https://arxiv.org/abs/2206.00364

    Example:
        >>> EDM(0.002, 80.0).sigmas(18)[:2].round(decimals=3)
        tensor([80.0000, 57.5860], dtype=torch.float64)
    """

    def __init__(self, sigma_min: float, sigma_max: float, rho: float = 7.0) -> None:
        super().__init__(sigma_min, sigma_max)
        _check_positive("rho", rho)
        self.rho = float(rho)

    def sigma_of(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Noise scale at double-precision times within ``[0, 1]``."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + t * (high - low)).pow(self.rho).clamp(self.sigma_min, self.sigma_max)

    def time_of(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Time of double-precision noise scales, clamped to ``[0, 1]``."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((sigma.pow(1 / self.rho) - low) / (high - low)).clamp(0.0, 1.0)


def _as_double(
    value: Tensor | float | int, name: str, low: float, high: float
) -> tuple[Tensor, torch.dtype]:
    """The argument in double precision within ``[low, high]``, and the precision of the answer."""
    if isinstance(value, Tensor):
        dtype = value.dtype if value.is_floating_point() else torch.float64
        return value.to(torch.float64).clamp(low, high), dtype
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return torch.tensor(float(value), dtype=torch.float64), torch.float64


def _checked_steps(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return num_steps


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if not low < high:
        raise ValueError(f"{low_name} must be less than {high_name}, got {low} and {high}")
