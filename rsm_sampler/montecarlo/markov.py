r"""Markov kernels: one step of many chains at once.

Every kernel leaves :math:`e^{-U}` invariant, with :math:`U` the energy (or a tempered one): a
proposal :math:`x'` is accepted with probability :math:`\min(1, r)`.

* :class:`RandomWalk`: :math:`x' = x + h \xi`, :math:`r = e^{U(x) - U(x')}`. Needs values only.
* :class:`HMC`: :math:`L` leapfrog steps of length :math:`h` under a fresh momentum
  :math:`v \sim N(0, I)`, :math:`r = e^{H(x, v) - H(x', v')}` with :math:`H = U + v^2 / 2`.
* :class:`MALA`: the Langevin proposal :math:`x' = x - \tfrac{h^2}{2} \nabla U + h \xi` with its
  Metropolis-Hastings ratio, which is the same chain as HMC with one leapfrog step.
* :class:`Langevin`: that proposal without the test. It is not exact: see the class.

All step sizes :math:`h` are therefore lengths, in the units of :math:`x`. They are tuned in a
warm-up (target acceptance 0.234 in several dimensions or 0.44 in one for the random walk, 0.574
for MALA, 0.7 for HMC) and frozen afterwards, as exactness requires.

Evaluations are counted by :class:`rsm_sampler.target.energy.MeteredEnergy`: one for every energy
value at one point, one more where its gradient is taken as well. Energies of :math:`+\infty` are
never accepted; NaN and :math:`-\infty` are treated as :math:`+\infty` and counted.

References:
    | Optimal scaling for various Metropolis-Hastings algorithms (Roberts and Rosenthal, 2001)
    | https://doi.org/10.1214/ss/1015346320

    | MCMC using Hamiltonian dynamics (Neal, 2011)
    | https://arxiv.org/abs/1206.1901
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.target.energy import MeteredEnergy, metered

__all__ = [
    "HMC",
    "MALA",
    "ChainState",
    "GaussianPath",
    "Kernel",
    "Langevin",
    "RandomWalk",
    "normal_like",
    "uniform_like",
]

Energy = Callable[[Tensor], Tensor]


@checked
class GaussianPath:
    r"""A path of tempered energies from a Gaussian reference to a target.

    .. math:: E_\beta = \beta E + (1 - \beta) E_\mathrm{ref}, \qquad
        e^{-E_\mathrm{ref}} = N(\mu, \sigma^2 I)

    Arguments:
        beta: Inverse temperatures, broadcastable to the batch shape of the points.
        loc: Mean of the reference, broadcastable to :math:`(d)`.
        scale: Standard deviation of the reference, broadcastable to :math:`(d)`.
    """

    def __init__(
        self,
        beta: Float[Tensor, "*levels"],
        loc: Float[Tensor, "#dim"],
        scale: Float[Tensor, "#dim"],
    ) -> None:
        self.beta, self.loc, self.scale = beta, loc, scale

    def reference_energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Negative log-density of the normalised Gaussian."""
        squared = ((x - self.loc) / self.scale).square().sum(dim=-1)
        log_scale = self.scale.log().expand(x.shape[-1]).sum()
        return squared / 2 + log_scale + x.shape[-1] / 2 * math.log(2 * math.pi)

    def potential(
        self, x: Float[Tensor, "*batch dim"], energy: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """The tempered energy, from the plain one."""
        tempered = torch.where(self.beta > 0, self.beta * energy, 0.0)
        return tempered + (1 - self.beta) * self.reference_energy(x)

    def slope(
        self, x: Float[Tensor, "*batch dim"], gradient: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """Gradient of the tempered energy, from that of the plain one."""
        beta = self.beta[..., None]
        return beta * gradient + (1 - beta) * (x - self.loc) / self.scale**2


@dataclass(frozen=True)
class ChainState:
    """Where a batch of chains stands.

    Attributes:
        x: Points, one per chain (and level), with shape :math:`(*, d)`.
        energy: Their plain energies, with shape :math:`(*)`.
        gradient: Gradients of the plain energies, for the kernels that use them.
        target: The energy, with its counters.
        path: How the energy is tempered, or None if it is not.
        acceptance: Acceptance probabilities of the last move, with shape :math:`(*)`.
        swap_acceptance: Those of the exchanges of neighbouring levels, in parallel tempering.
        context: Contexts of the chains, with shape :math:`(*, d_c)`, for an energy that takes one.
        num_steps: Steps taken since the start.
    """

    x: Float[Tensor, "*batch dim"]
    energy: Float[Tensor, "*batch"]
    gradient: Float[Tensor, "*batch dim"] | None
    target: MeteredEnergy
    path: GaussianPath | None = None
    acceptance: Tensor | None = None
    swap_acceptance: Tensor | None = None
    num_steps: int = 0
    context: Float[Tensor, "*batch context_dim"] | None = None

    @property
    def potential(self) -> Float[Tensor, "*batch"]:
        """Energy of the law that the chains follow: tempered, if there is a path."""
        return self.energy if self.path is None else self.path.potential(self.x, self.energy)

    @property
    def slope(self) -> Float[Tensor, "*batch dim"]:
        """Gradient of :attr:`potential`."""
        assert self.gradient is not None
        return self.gradient if self.path is None else self.path.slope(self.x, self.gradient)

    def at(self, x: Float[Tensor, "*batch dim"]) -> "ChainState":
        """The same chains at other points, which are evaluated."""
        energy, gradient = _evaluated(self.target, x, self.gradient is not None, self.context)
        return dataclasses.replace(self, x=x, energy=energy, gradient=gradient)


@checked
class Kernel(ABC):
    """A Markov kernel for a batch of chains.

    ``step`` advances all chains at once and mutates nothing. ``adapt`` changes the step size from
    the acceptance of the last step: call it during a warm-up, never while samples are kept.

    Attributes:
        step_size: Length of a move, broadcastable to the batch shape.
        needs_gradient: Whether the energy must be differentiable.
        cost: Evaluations that one step costs per chain.
    """

    step_size: Tensor
    needs_gradient: bool = False
    cost: int = 1

    def __init__(self, step_size: float | Tensor) -> None:
        self.step_size = torch.as_tensor(step_size, dtype=torch.float64)
        if not bool((self.step_size > 0).all()):
            raise ValueError(f"step_size must be positive, got {step_size}")

    @property
    def start_cost(self) -> int:
        """Evaluations that the start costs per chain."""
        return 2 if self.needs_gradient else 1

    def start(
        self,
        energy: Energy | MeteredEnergy,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> ChainState:
        """Evaluates the initial points.

        Arguments:
            energy: Callable from points ``(n, dim)`` to energies ``(n,)``; wrap it in
                :class:`~rsm_sampler.target.energy.MeteredEnergy` beforehand to share counters and
                a budget.
            x: Initial points, one per chain.
            context: A context for each chain, for an energy that takes one.

        Returns:
            The state to call :meth:`step` on.
        """
        context_dim = None if context is None else context.shape[-1]
        target = metered(energy, x.shape[-1], context_dim=context_dim)
        self.step_size = self.step_size.to(x)
        value, gradient = _evaluated(target, x, self.needs_gradient, context)
        return ChainState(
            x=x.detach(), energy=value, gradient=gradient, target=target, context=context
        )

    @abstractmethod
    def step(self, state: ChainState, generator: torch.Generator | None = None) -> ChainState:
        """Advances every chain by one step.

        Arguments:
            state: Where the chains stand.
            generator: Source of all random numbers.

        Returns:
            Where they stand next.
        """

    def target_acceptance(self, dim: int) -> float | None:
        """Acceptance that :meth:`adapt` aims at, or None if there is nothing to adapt."""
        return None

    def adapt(self, state: ChainState, gain: float) -> None:
        """Moves the logarithm of the step size towards the target acceptance.

        Arguments:
            state: What :meth:`step` has just returned.
            gain: Change of the logarithm per unit of excess acceptance.
        """
        target = self.target_acceptance(state.x.shape[-1])
        if target is not None and state.acceptance is not None:
            excess = _mean_to(state.acceptance, self.step_size.shape) - target
            self.step_size = self.step_size * (gain * excess).exp().to(self.step_size)


@checked
class RandomWalk(Kernel):
    r"""Gaussian random walk with a Metropolis test; needs energy values only.

    .. math:: x' = x + h \xi, \qquad \xi \sim N(0, I)

    Arguments:
        step_size: Standard deviation :math:`h` of a move.

    Example:
        >>> kernel = RandomWalk(1.0)
        >>> state = kernel.start(lambda x: x.square().sum(-1) / 2, torch.zeros(5, 2))
        >>> state = kernel.step(state, torch.Generator().manual_seed(0))
        >>> state.x.shape, state.target.evaluations
        (torch.Size([5, 2]), 10)
    """

    def target_acceptance(self, dim: int) -> float:
        """0.44 in one dimension, 0.234 in more."""
        return 0.44 if dim == 1 else 0.234

    def step(self, state: ChainState, generator: torch.Generator | None = None) -> ChainState:
        """One move of every chain; see :meth:`Kernel.step`."""
        noise = normal_like(state.x, generator)
        proposal = state.at(state.x + self.step_size[..., None] * noise)
        return _metropolis(state, proposal, state.potential - proposal.potential, generator)


@checked
class HMC(Kernel):
    r"""Hamiltonian Monte Carlo with a unit mass matrix and full momentum refreshment.

    Arguments:
        step_size: Length :math:`h` of a leapfrog step.
        num_leapfrog: Number :math:`L` of leapfrog steps per move, each costing two evaluations.
        jitter: The step of each chain is multiplied by a uniform draw from
            :math:`[1 - j, 1 + j]` at every move, which keeps trajectories from closing on
            themselves.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs_gradient = True

    def __init__(
        self, step_size: float | Tensor, num_leapfrog: int = 10, *, jitter: float = 0.2
    ) -> None:
        super().__init__(step_size)
        if num_leapfrog < 1:
            raise ValueError(f"num_leapfrog must be at least 1, got {num_leapfrog}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {jitter}")
        self.num_leapfrog, self.jitter = num_leapfrog, jitter
        self.cost = 2 * num_leapfrog

    def target_acceptance(self, dim: int) -> float:
        """0.7, between the asymptotic optimum 0.65 and the common practice 0.8."""
        return 0.7

    def trajectory(
        self,
        state: ChainState,
        momentum: Float[Tensor, "*batch dim"],
        step_size: Float[Tensor, "..."] | None = None,
    ) -> tuple[ChainState, Float[Tensor, "*batch dim"]]:
        r"""Follows the Hamiltonian flow for :math:`L` leapfrog steps.

        .. math:: v \leftarrow v - \tfrac{h}{2} \nabla U(x), \quad x \leftarrow x + h v, \quad
            v \leftarrow v - \tfrac{h}{2} \nabla U(x)

        The map preserves volume, and following it again from the end with the momentum reversed
        leads back to the start, up to rounding.

        Arguments:
            state: Where the chains stand.
            momentum: Their momenta :math:`v`, with shape :math:`(*, d)`.
            step_size: Length of a step, broadcastable to :math:`(*)`; by default the kernel's.

        Returns:
            The state and the momenta at the end.
        """
        h = (self.step_size if step_size is None else step_size)[..., None]
        momentum = momentum - h / 2 * state.slope
        for i in range(self.num_leapfrog):
            state = state.at(state.x + h * momentum)
            momentum = momentum - (h if i + 1 < self.num_leapfrog else h / 2) * state.slope
        return state, momentum

    def step(self, state: ChainState, generator: torch.Generator | None = None) -> ChainState:
        """One trajectory of every chain; see :meth:`Kernel.step`."""
        momentum = normal_like(state.x, generator)
        h = self.step_size
        if self.jitter > 0:
            h = h * (1 + self.jitter * (2 * uniform_like(state.x[..., 0], generator) - 1))
        proposal, final = self.trajectory(state, momentum, h)
        kinetic = (momentum.square() - final.square()).sum(dim=-1) / 2
        log_ratio = state.potential - proposal.potential + kinetic
        return _metropolis(state, proposal, log_ratio, generator)


@checked
class MALA(HMC):
    r"""Metropolis-adjusted Langevin algorithm.

    .. math:: x' = x - \tfrac{h^2}{2} \nabla U(x) + h \xi, \qquad
        r = \frac{e^{-U(x')}\, N(x; x' - \tfrac{h^2}{2} \nabla U(x'), h^2 I)}
        {e^{-U(x)}\, N(x'; x - \tfrac{h^2}{2} \nabla U(x), h^2 I)}

    which is, identically, HMC with one leapfrog step of length :math:`h`.

    Arguments:
        step_size: Standard deviation :math:`h` of the noise; the time step is :math:`h^2 / 2`.
    """

    def __init__(self, step_size: float | Tensor) -> None:
        super().__init__(step_size, num_leapfrog=1, jitter=0.0)

    def target_acceptance(self, dim: int) -> float:
        """0.574, the asymptotic optimum."""
        return 0.574


@checked
class Langevin(Kernel):
    r"""Unadjusted Langevin: fast, but only close to the target.

    .. math:: x' = x - \tfrac{h^2}{2} \nabla U(x) + h \xi

    Its stationary law is off by an amount of first order in the time step :math:`h^2`: on a
    standard normal the variance is :math:`1 / (1 - h^2 / 4)` instead of 1. A move to an infinite
    or NaN energy is not made.

    Arguments:
        step_size: Standard deviation :math:`h` of the noise; the time step is :math:`h^2 / 2`.
    """

    needs_gradient = True
    cost = 2

    def step(self, state: ChainState, generator: torch.Generator | None = None) -> ChainState:
        """One move of every chain; see :meth:`Kernel.step`."""
        h = self.step_size[..., None]
        noise = normal_like(state.x, generator)
        proposal = state.at(state.x - h**2 / 2 * state.slope + h * noise)
        return _select(state, proposal, proposal.energy < math.inf)


def _metropolis(
    state: ChainState,
    proposal: ChainState,
    log_ratio: Tensor,
    generator: torch.Generator | None,
) -> ChainState:
    # inf - inf, from one forbidden point to another, is NaN: stay.
    probability = log_ratio.nan_to_num(-math.inf, math.inf, -math.inf).clamp_max(0).exp()
    accept = uniform_like(probability, generator) < probability
    return dataclasses.replace(_select(state, proposal, accept), acceptance=probability)


def _select(state: ChainState, proposal: ChainState, accept: Tensor) -> ChainState:
    gradient = None
    if state.gradient is not None and proposal.gradient is not None:
        gradient = torch.where(accept[..., None], proposal.gradient, state.gradient)
    return dataclasses.replace(
        state,
        x=torch.where(accept[..., None], proposal.x, state.x),
        energy=torch.where(accept, proposal.energy, state.energy),
        gradient=gradient,
        acceptance=accept.to(state.x.dtype),
        num_steps=state.num_steps + 1,
    )


@checked
def normal_like(
    x: Float[Tensor, "*shape"], generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Standard normal draws with the shape, precision and device of x."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


@checked
def uniform_like(
    x: Float[Tensor, "*shape"], generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Uniform draws with the shape, precision and device of x."""
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _mean_to(value: Tensor, shape: torch.Size) -> Tensor:
    """Mean over the leading axes that ``shape`` does not have."""
    extra = value.ndim - len(shape)
    return value.mean(dim=tuple(range(extra))) if extra else value


def _evaluated(
    target: MeteredEnergy, x: Tensor, gradient: bool, context: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if gradient:
        return target.value_and_gradient(x, context, purpose="mcmc")
    with torch.no_grad():
        return target(x, context, purpose="mcmc"), None
