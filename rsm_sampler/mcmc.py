r"""Plain Markov chain Monte Carlo: the baseline at equal evaluations, and exact refinement.

A learned sampler has to be compared with what ordinary chains do with the **same number of energy
evaluations**, so the budget here is counted exactly: one for every energy value at one point, one
more where its gradient is taken as well. :func:`run_mcmc` spends a budget and never exceeds it.

Every kernel leaves :math:`e^{-U}` invariant, with :math:`U` the energy (or a tempered one, below):
a proposal :math:`x'` is accepted with probability :math:`\min(1, r)`.

* :class:`RandomWalk`: :math:`x' = x + h \xi`, :math:`r = e^{U(x) - U(x')}`. Needs values only.
* :class:`HMC`: :math:`L` leapfrog steps of length :math:`h` under a fresh momentum
  :math:`v \sim N(0, I)`, :math:`r = e^{H(x, v) - H(x', v')}` with :math:`H = U + v^2 / 2`.
* :class:`MALA`: the Langevin proposal :math:`x' = x - \tfrac{h^2}{2} \nabla U + h \xi` with its
  Metropolis-Hastings ratio, which is the same chain as HMC with one leapfrog step.
* :class:`Langevin`: that proposal without the test. It is not exact: see the class.

All step sizes :math:`h` are therefore lengths, in the units of :math:`x`. They are tuned in a
warm-up (target acceptance 0.234 in several dimensions or 0.44 in one for the random walk, 0.574
for MALA, 0.7 for HMC) and frozen afterwards, as exactness requires.

**Parallel tempering** runs a ladder of :math:`K + 1` levels between a normalised Gaussian
reference and the target,

.. math:: E_\beta(x) = \beta E(x) + (1 - \beta) E_\mathrm{ref}(x), \qquad
    e^{-E_\mathrm{ref}} = N(\mu, \sigma^2 I), \qquad 0 = \beta_0 < \dots < \beta_K = 1,

moves every level, draws level 0 afresh from the reference, and exchanges neighbours
:math:`k, k + 1` with probability :math:`\min(1, e^{(\beta_{k+1} - \beta_k)(V_{k+1} - V_k)})`,
:math:`V = E - E_\mathrm{ref}`, all even pairs in one sweep and all odd ones in the next (the
non-reversible scheme, whose round trips do not slow down as levels are added). Since
:math:`Z_0 = 1`, the ladder also gives

.. math:: \log Z = -\int_0^1 \langle V \rangle_\beta \,\mathrm{d}\beta
    = \sum_k \log \frac{Z_{k+1}}{Z_k}, \qquad
    \frac{Z_{k+1}}{Z_k} = e^{c_k}
    \frac{\langle \varsigma(-w_k - c_k) \rangle_k}{\langle \varsigma(w_k + c_k) \rangle_{k+1}},
    \quad w_k = (\beta_{k+1} - \beta_k) V,

thermodynamic integration on the left and bridge sampling on the right, with :math:`\varsigma` the
logistic function. The bridge is consistent for every constant :math:`c_k` and best at
:math:`c_k = \log(Z_{k+1}/Z_k)`, which the warm-up finds; its terms are bounded, so hard walls
(:math:`E = +\infty`) are harmless. Its bias is only that of the chains; the integral has a
discretisation error besides.

Energies of :math:`+\infty` are never accepted. NaN and :math:`-\infty` are treated as
:math:`+\infty` and counted.

References:
    | Optimal scaling for various Metropolis-Hastings algorithms (Roberts and Rosenthal, 2001)
    | https://doi.org/10.1214/ss/1015346320

    | MCMC using Hamiltonian dynamics (Neal, 2011)
    | https://arxiv.org/abs/1206.1901

    | Non-reversible parallel tempering: a scalable highly parallel MCMC scheme (Syed et al., 2022)
    | https://arxiv.org/abs/1905.02939

    | Simulating ratios of normalizing constants via a simple identity (Meng and Wong, 1996)
    | https://www.jstor.org/stable/24306045
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "HMC",
    "MALA",
    "ChainState",
    "CountedEnergy",
    "GaussianPath",
    "Kernel",
    "Langevin",
    "MCMCResult",
    "ParallelTempering",
    "RandomWalk",
    "RefineResult",
    "refine",
    "run_mcmc",
]

Energy = Callable[[Tensor], Tensor]
Move = Literal["rw", "mala", "hmc"]


class CountedEnergy:
    """An energy that counts its evaluations and tames its failures.

    Arguments:
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``.

    Attributes:
        evaluations: Points evaluated so far, a gradient counting as one further each.
    """

    def __init__(self, energy: Energy) -> None:
        self._energy = energy
        self._num_bad: Tensor | None = None
        self.evaluations = 0

    @property
    def num_bad(self) -> int:
        """Number of NaN or negatively infinite energies, or NaN gradients, met so far."""
        return 0 if self._num_bad is None else int(self._num_bad)

    def __call__(
        self, x: Float[Tensor, "*batch dim"], gradient: bool = False
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"] | None]:
        r"""Energies, and gradients if asked for.

        Arguments:
            x: Points, with shape :math:`(*, d)`.
            gradient: Whether to differentiate the energy by autograd.

        Returns:
            Energies, with shape :math:`(*)`, where NaN and :math:`-\\infty` have become
            :math:`+\\infty`; and gradients, with shape :math:`(*, d)`, zero where the energy is
            infinite, or None.

        Raises:
            ValueError: If the energies have the wrong shape or cannot be differentiated.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        slope = None
        if gradient:
            with torch.enable_grad():
                flat = flat.clone().requires_grad_()
                value = self._check(self._energy(flat), flat)
                if not value.requires_grad:
                    raise ValueError(
                        "energy must be differentiable by autograd for this kernel, got a value "
                        "without a graph; the random walk needs no gradient"
                    )
                (slope,) = torch.autograd.grad(value.sum(), flat)
            value = value.detach()
        else:
            with torch.no_grad():
                value = self._check(self._energy(flat), flat)
        self.evaluations += len(flat) * (2 if gradient else 1)
        bad = value.isnan() | value.isneginf()
        if slope is not None:
            bad = bad | (value.isfinite() & ~slope.isfinite().all(dim=-1))
        self._num_bad = bad.sum() if self._num_bad is None else self._num_bad + bad.sum()
        value = value.masked_fill(bad, math.inf)
        if slope is not None:
            slope = slope.masked_fill(value.isposinf()[:, None], 0.0).view_as(x)
        return value.to(x.dtype).reshape(x.shape[:-1]), slope

    @staticmethod
    def _check(value: Tensor, flat: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != flat.shape[:-1]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"energy must map points of shape {tuple(flat.shape)} to values of shape "
                f"{tuple(flat.shape[:-1])}, got {shape}"
            )
        return value


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
        num_steps: Steps taken since the start.
    """

    x: Float[Tensor, "*batch dim"]
    energy: Float[Tensor, "*batch"]
    gradient: Float[Tensor, "*batch dim"] | None
    target: CountedEnergy
    path: GaussianPath | None = None
    acceptance: Tensor | None = None
    swap_acceptance: Tensor | None = None
    num_steps: int = 0

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
        energy, gradient = self.target(x, self.gradient is not None)
        return dataclasses.replace(self, x=x, energy=energy, gradient=gradient)


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

    def start(self, energy: Energy | CountedEnergy, x: Float[Tensor, "*batch dim"]) -> ChainState:
        """Evaluates the initial points.

        Arguments:
            energy: Callable from points ``(n, dim)`` to energies ``(n,)``; wrap it in
                :class:`CountedEnergy` beforehand to share counters.
            x: Initial points, one per chain.

        Returns:
            The state to call :meth:`step` on.
        """
        target = energy if isinstance(energy, CountedEnergy) else CountedEnergy(energy)
        self.step_size = self.step_size.to(x)
        value, gradient = target(x, self.needs_gradient)
        return ChainState(x=x.detach(), energy=value, gradient=gradient, target=target)

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
            self.step_size = self.step_size * (gain * excess).exp()


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
        noise = _normal_like(state.x, generator)
        proposal = state.at(state.x + self.step_size[..., None] * noise)
        return _metropolis(state, proposal, state.potential - proposal.potential, generator)


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
        momentum = _normal_like(state.x, generator)
        h = self.step_size
        if self.jitter > 0:
            h = h * (1 + self.jitter * (2 * _uniform_like(state.energy, generator) - 1))
        proposal, final = self.trajectory(state, momentum, h)
        kinetic = (momentum.square() - final.square()).sum(dim=-1) / 2
        log_ratio = state.potential - proposal.potential + kinetic
        return _metropolis(state, proposal, log_ratio, generator)


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
        noise = _normal_like(state.x, generator)
        proposal = state.at(state.x - h**2 / 2 * state.slope + h * noise)
        return _select(state, proposal, proposal.energy < math.inf)


class ParallelTempering(Kernel):
    r"""Replica exchange from a Gaussian reference to the target (non-reversible even-odd swaps).

    The states hold :math:`(n, K + 1, d)` points: every chain is a whole ladder, the last level of
    which follows the target, and different chains are independent. Level 0 is drawn afresh from
    the reference at every step.

    Arguments:
        inverse_temperatures: The :math:`\beta_k`, increasing from 0 to 1, with shape
            :math:`(K + 1)`.
        loc: Mean of the reference, a number or with shape :math:`(d)`.
        scale: Standard deviation of the reference, likewise. The reference should cover the
            target.
        move: Kernel for the levels above the reference; by default a random walk.

    Raises:
        ValueError: If the ladder does not increase from 0 to 1 or the scale is not positive.

    Example:
        >>> kernel = ParallelTempering(torch.linspace(0, 1, 4), loc=0.0, scale=2.0)
        >>> state = kernel.start(lambda x: x.square().sum(-1) / 2, torch.zeros(5, 2))
        >>> kernel.step(state, torch.Generator().manual_seed(0)).x.shape
        torch.Size([5, 4, 2])
    """

    def __init__(
        self,
        inverse_temperatures: Float[Tensor, "levels"],
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        move: Kernel | None = None,
    ) -> None:
        beta = torch.as_tensor(inverse_temperatures, dtype=torch.float64)
        _check_ladder(beta)
        loc, scale = (torch.as_tensor(v, dtype=torch.float64) for v in (loc, scale))
        if not bool((scale > 0).all()):
            raise ValueError(f"scale must be positive, got {scale.tolist()}")
        if move is None:
            move = RandomWalk(scale.max())
        if isinstance(move, ParallelTempering):
            raise ValueError("move must be a kernel for single chains, got ParallelTempering")
        self.beta, self.loc, self.scale, self.move = beta, loc, scale, move
        self.needs_gradient = move.needs_gradient
        # Estimates of log Z_{k+1} / Z_k, the constants of the bridge.
        self.log_ratio = torch.zeros(len(beta) - 1, dtype=torch.float64)

    # One step size per level above the reference.
    @property
    def step_size(self) -> Tensor:
        """Step sizes of the levels above the reference, with shape :math:`(K)`."""
        return self.move.step_size

    @step_size.setter
    def step_size(self, value: Tensor) -> None:
        self.move.step_size = value

    @property
    def num_levels(self) -> int:
        """Number of levels, the reference included."""
        return len(self.beta)

    @property
    def cost(self) -> int:  # type: ignore[override]
        """Evaluations per step and chain: one move per level, and the draw of level 0."""
        return (self.num_levels - 1) * self.move.cost + self.move.start_cost

    @property
    def start_cost(self) -> int:
        """Evaluations of the start per chain: one point per level."""
        return self.num_levels * self.move.start_cost

    def start(self, energy: Energy | CountedEnergy, x: Float[Tensor, "*batch dim"]) -> ChainState:
        r"""Places the ladders and evaluates their points.

        Arguments:
            energy: As in :meth:`Kernel.start`.
            x: One point per chain, with shape :math:`(n, d)`, at which all its levels start; or
                one per level, with shape :math:`(n, K + 1, d)`.

        Returns:
            The state to call :meth:`step` on.
        """
        self.beta, self.loc, self.scale = (v.to(x) for v in (self.beta, self.loc, self.scale))
        self.loc, self.scale = self.loc.reshape(-1), self.scale.reshape(-1)
        self.log_ratio = self.log_ratio.to(x.device)
        if x.ndim == 2:
            x = x[:, None].expand(-1, self.num_levels, -1).contiguous()
        if x.ndim != 3 or x.shape[1] != self.num_levels:
            raise ValueError(
                f"x must have shape (n, dim) or (n, {self.num_levels}, dim), got {tuple(x.shape)}"
            )
        state = super().start(energy, x)
        self.step_size = self.step_size.expand(self.num_levels - 1).clone()
        return dataclasses.replace(state, path=self.path())

    def path(self, first: int = 0) -> GaussianPath:
        """The tempering path of the levels from ``first`` up."""
        return GaussianPath(self.beta[first:], self.loc, self.scale)

    def step(self, state: ChainState, generator: torch.Generator | None = None) -> ChainState:
        """Moves every level, then exchanges neighbours; see :meth:`Kernel.step`."""
        reference = self.loc + self.scale * _normal_like(state.x[:, :1], generator)
        bottom = _levels(state, slice(0, 1), None).at(reference)
        top = self.move.step(_levels(state, slice(1, None), self.path(1)), generator)
        x = torch.cat((bottom.x, top.x), dim=1)
        energy = torch.cat((bottom.energy, top.energy), dim=1)
        gradient = None
        if bottom.gradient is not None and top.gradient is not None:
            gradient = torch.cat((bottom.gradient, top.gradient), dim=1)

        # An infinite energy sits only at level 0, or at a start: its excess is infinite, so that
        # the exponent is -inf (stay) or, for a start to be left, +inf; inf - inf stays too.
        excess = energy - self.path().reference_energy(x)
        exponent = self.beta.diff() * (excess[:, 1:] - excess[:, :-1])
        probability = exponent.nan_to_num(-math.inf, math.inf, -math.inf).clamp_max(0).exp()
        pair = torch.arange(self.num_levels - 1, device=x.device)
        swap = (_uniform_like(probability, generator) < probability) & (
            pair % 2 == state.num_steps % 2
        )
        ones = swap.long()
        source = torch.arange(self.num_levels, device=x.device) + (
            torch.nn.functional.pad(ones, (0, 1)) - torch.nn.functional.pad(ones, (1, 0))
        )
        return dataclasses.replace(
            state,
            x=x.take_along_dim(source[..., None], dim=1),
            energy=energy.take_along_dim(source, dim=1),
            gradient=None if gradient is None else gradient.take_along_dim(source[..., None], 1),
            path=self.path(),
            acceptance=top.acceptance,
            swap_acceptance=probability,
            num_steps=state.num_steps + 1,
        )

    def works(self, state: ChainState) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
        r"""The :math:`w_k` at level :math:`k` and at level :math:`k + 1`, in float64."""
        excess = self.excess(state).double()
        delta = self.beta.double().diff()
        return delta * excess[:, :-1], delta * excess[:, 1:]

    def excess(self, state: ChainState) -> Float[Tensor, "n levels"]:
        r""":math:`V = E - E_\mathrm{ref}` at every level."""
        return state.energy - self.path().reference_energy(state.x)

    def adapt(self, state: ChainState, gain: float) -> None:
        r"""Tunes the step size of every level, and the constants of the bridge.

        The constants follow the stochastic approximation of the self-consistency

        .. math:: \langle \varsigma(-w_k - c_k) \rangle_k =
            \langle \varsigma(w_k + c_k) \rangle_{k+1}

        with both sides averaged over chains.
        """
        self.move.adapt(state, gain)
        lower, upper = self.works(state)
        up = torch.sigmoid(-lower - self.log_ratio).mean(dim=0)
        down = torch.sigmoid(upper + self.log_ratio).mean(dim=0)
        self.log_ratio = self.log_ratio + 2 * gain * (up - down)

    def adapt_ladder(self, state: ChainState, rejection: Float[Tensor, "k"]) -> ChainState:
        r"""Moves the inner levels so that all neighbours exchange equally often.

        The summed rejection rates, as a function of :math:`\beta`, are interpolated linearly and
        cut into equal parts (Syed et al., 2022, section 5). Step sizes and bridge constants
        follow.

        Arguments:
            state: Where the chains stand.
            rejection: Mean rejection rate of each pair of neighbours, with shape :math:`(K)`.

        Returns:
            The same points on the new ladder.
        """
        beta = self.beta.double().cpu().numpy()
        barrier = np.append(0.0, np.cumsum(np.maximum(rejection.double().cpu().numpy(), 1e-3)))
        goal = np.linspace(0.0, barrier[-1], len(beta))
        new = np.interp(goal, barrier, beta)
        new[0], new[-1] = 0.0, 1.0
        place = np.interp(goal, barrier, np.arange(len(beta)))
        free = np.append(0.0, np.cumsum(self.log_ratio.cpu().numpy()))
        step = np.log(self.step_size.double().cpu().numpy())
        self.beta = torch.as_tensor(new).to(self.beta)
        self.log_ratio = torch.as_tensor(np.diff(np.interp(place, np.arange(len(beta)), free))).to(
            self.log_ratio
        )
        self.step_size = torch.as_tensor(
            np.exp(np.interp(place[1:], np.arange(1, len(beta)), step))
        ).to(self.step_size)
        return dataclasses.replace(state, path=self.path())


# --- one call ---------------------------------------------------------------------------


@dataclass(frozen=True)
class MCMCResult:
    r"""What a budget of evaluations bought.

    Attributes:
        samples: Kept states, with shape :math:`(n, d)`, oldest first. States of one chain are
            dependent; different chains are not.
        energy: Their energies, with shape :math:`(n)`.
        chains: The same states by step and chain, with shape :math:`(s, c, d)`; the last row is
            the final state of every chain.
        evaluations: Evaluations spent, warm-up included; never above the budget.
        num_warm_up: Steps of every chain in which things were tuned, none of them kept.
        num_steps: Steps of every chain after that.
        acceptance: Mean acceptance probability of the moves at the target, after the warm-up.
        num_bad: Number of NaN or negatively infinite energies met and refused.
        step_size: The frozen step size; in parallel tempering one per level above the reference.
        log_z: Bridge estimate of :math:`\log \int e^{-E}`, in parallel tempering only.
        log_z_se: Its jackknife standard error over chains; NaN for a single chain. Chains that all
            miss the same mode, or are all too short to forget their start, agree on a wrong value:
            check with twice the budget.
        log_z_ti: Thermodynamic integration with the corrected trapezoidal rule. NaN if the
            reference meets infinite energies.
        log_z_ti_se: Its standard error, which does not include the discretisation error.
        inverse_temperatures: The ladder that was used.
        swap_acceptance: Mean acceptance probability of the exchange of each pair of neighbours.
    """

    samples: Float[Tensor, "n dim"]
    energy: Float[Tensor, "n"]
    chains: Float[Tensor, "kept chains dim"]
    evaluations: int
    num_warm_up: int
    num_steps: int
    acceptance: float
    num_bad: int
    step_size: Tensor
    log_z: float | None = None
    log_z_se: float | None = None
    log_z_ti: float | None = None
    log_z_ti_se: float | None = None
    inverse_temperatures: Tensor | None = None
    swap_acceptance: Tensor | None = None


def run_mcmc(
    energy: Energy,
    x_0: Float[Tensor, "chains dim"],
    *,
    method: Literal["parallel-tempering", "rw", "mala", "hmc", "langevin"] = "parallel-tempering",
    evaluations: int,
    generator: torch.Generator | None = None,
    num_samples: int | None = None,
    warm_up: float = 0.3,
    step_size: float | None = None,
    num_leapfrog: int = 10,
    num_levels: int = 12,
    inverse_temperatures: Float[Tensor, "levels"] | None = None,
    adapt_ladder: bool = True,
    reference_loc: float | Tensor | None = None,
    reference_scale: float | Tensor | None = None,
    move: Move = "rw",
) -> MCMCResult:
    r"""Spends a budget of energy evaluations on plain Markov chains.

    All chains advance together, one per row of ``x_0``. With a fixed budget many chains are short
    ones: for parallel tempering, which costs ``num_levels`` evaluations per step and chain, some
    tens of rows and ``num_samples`` of what is needed are a fair use of the budget.

    Arguments:
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``, low where likely.
        x_0: Initial points of finite energy, with shape :math:`(c, d)`.
        method: ``"parallel-tempering"`` or ``"rw"`` (values only), ``"mala"``, ``"hmc"`` or
            ``"langevin"`` (autograd gradients; the last one is biased and needs a ``step_size``).
        evaluations: The budget: energies of single points, each gradient counting as one more.
        generator: Source of all random numbers.
        num_samples: Number of states to keep, spread evenly over the steps after the warm-up and
            ending with the last; by default the final state of every chain.
        warm_up: Share of the steps for tuning, in [0, 1). Step sizes and ladder are frozen after
            it.
        step_size: Initial step size, a length. By default from the spread of ``x_0``, or of the
            reference.
        num_leapfrog: Leapfrog steps per move, for HMC.
        num_levels: Length of the ladder, reference and target included.
        inverse_temperatures: Initial ladder, instead of :math:`\beta_k = (k / K)^4`.
        adapt_ladder: Whether the first half of the warm-up equalises the exchange rates.
        reference_loc: Mean of the Gaussian reference; by default the mean of ``x_0``.
        reference_scale: Its standard deviation; by default the root-mean-square spread of ``x_0``.
            It should cover the target: too narrow a reference makes for slow exploration.
        move: Kernel of the tempered levels: ``"rw"``, ``"mala"`` or ``"hmc"``.

    Returns:
        Samples, counts and, for parallel tempering, estimates of :math:`\log Z`.

    Raises:
        ValueError: If an argument is out of range, if an initial energy is not finite, if the
            energy has the wrong shape, or if the budget does not reach one step.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x_0 = 3 * torch.randn(50, 2, generator=generator)
        >>> result = run_mcmc(
        ...     lambda x: x.square().sum(-1) / 2, x_0, evaluations=50_000, generator=generator
        ... )
        >>> result.samples.shape, result.evaluations <= 50_000
        (torch.Size([50, 2]), True)
        >>> abs(result.log_z - math.log(2 * math.pi)) < 0.3
        True
    """
    _check_points("x_0", x_0)
    if not 0 <= warm_up < 1:
        raise ValueError(f"warm_up must be at least 0 and below 1, got {warm_up}")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    n, dim = x_0.shape
    spread = x_0.double().var(dim=0, correction=0).mean().sqrt().item()
    kernel: Kernel
    if method == "parallel-tempering":
        if inverse_temperatures is None:
            if num_levels < 2:
                raise ValueError(f"num_levels must be at least 2, got {num_levels}")
            inverse_temperatures = torch.linspace(0, 1, num_levels, dtype=x_0.dtype) ** 4
        if reference_scale is None:
            if not spread > 0:
                raise ValueError(
                    f"reference_scale must be given when x_0 has no spread, got {n} equal points"
                )
            reference_scale = spread
        length = float(torch.as_tensor(reference_scale).double().square().mean().sqrt())
        kernel = ParallelTempering(
            inverse_temperatures,
            loc=x_0.mean(dim=0) if reference_loc is None else reference_loc,
            scale=reference_scale,
            move=_kernel(move, step_size, num_leapfrog, length, dim),
        )
    elif method == "langevin":
        if step_size is None:
            raise ValueError(
                "step_size must be given for method 'langevin', which has no acceptance to tune it"
            )
        kernel = Langevin(step_size)
    else:
        kernel = _kernel(method, step_size, num_leapfrog, spread or 1.0, dim)

    total = (evaluations - n * kernel.start_cost) // (n * kernel.cost)
    if total < 1:
        raise ValueError(
            f"evaluations must be at least {n * (kernel.start_cost + kernel.cost)} for one step "
            f"of {n} chains, got {evaluations}"
        )
    num_warm_up = int(warm_up * total)
    num_steps = total - num_warm_up
    kept = 1 if num_samples is None else math.ceil(num_samples / n)
    if kept > num_steps:
        raise ValueError(
            f"num_samples must be at most {n * num_steps} ({num_steps} steps of {n} chains after "
            f"the warm-up), got {num_samples}"
        )

    target = CountedEnergy(energy)
    state = kernel.start(target, x_0)
    num_infinite = int((~state.energy.isfinite()).sum())
    if num_infinite:
        raise ValueError(
            f"x_0 must have finite energies, got {num_infinite} of {state.energy.numel()} "
            "infinite or NaN"
        )
    state = _warm_up(kernel, state, num_warm_up, adapt_ladder, generator)
    ladder = _LadderStatistics(kernel, n) if isinstance(kernel, ParallelTempering) else None
    acceptance = torch.zeros((), dtype=torch.float64, device=x_0.device)
    points, energies = [], []
    spacing = num_steps // kept
    for i in range(num_steps):
        state = kernel.step(state, generator)
        assert state.acceptance is not None
        if ladder is None:
            acceptance += state.acceptance.mean()
        else:
            acceptance += state.acceptance[:, -1].mean()
            ladder.update(state)
        if (num_steps - 1 - i) % spacing == 0 and (num_steps - 1 - i) // spacing < kept:
            points.append(state.x if ladder is None else state.x[:, -1])
            energies.append(state.energy if ladder is None else state.energy[:, -1])
    chains = torch.stack(points)
    wanted = n if num_samples is None else num_samples
    log_z = log_z_se = log_z_ti = log_z_ti_se = None
    if ladder is not None:
        log_z, log_z_se = ladder.bridge()
        log_z_ti, log_z_ti_se = ladder.integral()
    return MCMCResult(
        samples=chains.reshape(-1, dim)[-wanted:],
        energy=torch.cat(energies)[-wanted:],
        chains=chains,
        evaluations=target.evaluations,
        num_warm_up=num_warm_up,
        num_steps=num_steps,
        acceptance=acceptance.item() / num_steps,
        num_bad=target.num_bad,
        step_size=kernel.step_size,
        log_z=log_z,
        log_z_se=log_z_se,
        log_z_ti=log_z_ti,
        log_z_ti_se=log_z_ti_se,
        inverse_temperatures=None if ladder is None else ladder.kernel.beta,
        swap_acceptance=None if ladder is None else ladder.swap_acceptance,
    )


@dataclass(frozen=True)
class RefineResult:
    r"""Samples after a short exact chain, and how far their energies moved.

    Attributes:
        x: The moved samples, with shape :math:`(n, d)`, row by row those that came in.
        energy: Their energies, with shape :math:`(n)`.
        energy_drift: Mean change of the energy, over the samples that came in with a finite one.
        energy_drift_se: Its standard error, the chains being independent; NaN below two samples.
        acceptance: Mean acceptance probability.
        step_size: The step size, fixed throughout the chain.
        num_infinite: Samples that came in with an infinite or NaN energy.
        num_bad: Number of NaN or negatively infinite energies met and refused.
        evaluations: Evaluations spent, tuning included.
    """

    x: Float[Tensor, "n dim"]
    energy: Float[Tensor, "n"]
    energy_drift: float
    energy_drift_se: float
    acceptance: float
    step_size: Tensor
    num_infinite: int
    num_bad: int
    evaluations: int


def refine(
    energy: Energy,
    x: Float[Tensor, "n dim"],
    *,
    steps: int,
    method: Move = "rw",
    step_size: float | None = None,
    num_leapfrog: int = 10,
    tuning_steps: int = 100,
    generator: torch.Generator | None = None,
) -> RefineResult:
    r"""Runs a short Metropolis chain from every sample, and reports the energy drift.

    The chains leave the target invariant. So if the samples are exact, the mean energy does not
    change except by chance, whatever the number of steps; a drift of many standard errors says
    that they are not. The converse fails: weights of separated modes are beyond the reach of short
    chains.

    Arguments:
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``.
        x: Samples, with shape :math:`(n, d)`. Those of infinite energy may come in; they stay
            until a finite one is proposed.
        steps: Steps of every chain.
        method: ``"rw"`` (values only), ``"mala"`` or ``"hmc"``.
        step_size: The step size. By default it is tuned on a copy of the chains that is thrown
            away.
        num_leapfrog: Leapfrog steps per move, for HMC.
        tuning_steps: Steps of that copy; they count as evaluations.
        generator: Source of all random numbers.

    Returns:
        The moved samples, the drift and the counts.

    Raises:
        ValueError: If an argument is out of range or no sample has a finite energy.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = 2 * torch.randn(500, 2, generator=generator)  # too wide by a factor of two
        >>> result = refine(lambda x: x.square().sum(-1) / 2, x, steps=20, generator=generator)
        >>> result.energy_drift < -5 * result.energy_drift_se
        True
    """
    _check_points("x", x)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if tuning_steps < 1:
        raise ValueError(f"tuning_steps must be at least 1, got {tuning_steps}")
    spread = x.double().var(dim=0, correction=0).mean().sqrt().item()
    kernel = _kernel(method, step_size, num_leapfrog, spread or 1.0, x.shape[-1])
    target = CountedEnergy(energy)
    state = kernel.start(target, x)
    finite = state.energy.isfinite()
    num_finite = int(finite.sum())
    if num_finite == 0:
        raise ValueError(f"x must have a sample of finite energy, got none of {len(x)}")
    initial = state.energy
    if step_size is None:
        copy = dataclasses.replace(
            state,
            x=state.x[finite],
            energy=state.energy[finite],
            gradient=None if state.gradient is None else state.gradient[finite],
        )
        _warm_up(kernel, copy, tuning_steps, False, generator)
    acceptance = torch.zeros((), dtype=torch.float64, device=x.device)
    for _ in range(steps):
        state = kernel.step(state, generator)
        assert state.acceptance is not None
        acceptance += state.acceptance.mean()
    change = (state.energy[finite].double() - initial[finite].double()).cpu()
    se = change.std().item() / math.sqrt(num_finite) if num_finite > 1 else math.nan
    return RefineResult(
        x=state.x,
        energy=state.energy,
        energy_drift=change.mean().item(),
        energy_drift_se=se,
        acceptance=acceptance.item() / steps,
        step_size=kernel.step_size,
        num_infinite=len(x) - num_finite,
        num_bad=target.num_bad,
        evaluations=target.evaluations,
    )


# --- inner workings ---------------------------------------------------------------------


class _LadderStatistics:
    """Running sums for log Z, per chain, so that chains give the standard errors."""

    def __init__(self, kernel: ParallelTempering, num_chains: int) -> None:
        self.kernel, self.count = kernel, 0
        pairs = (num_chains, kernel.num_levels - 1)
        levels = (num_chains, kernel.num_levels)
        device = kernel.beta.device
        self._up = torch.full(pairs, -math.inf, dtype=torch.float64, device=device)
        self._down = self._up.clone()
        self._first = torch.zeros(levels, dtype=torch.float64, device=device)
        self._second = self._first.clone()
        self._swaps = torch.zeros(pairs[1:], dtype=torch.float64, device=device)

    def update(self, state: ChainState) -> None:
        assert state.swap_acceptance is not None
        self.count += 1
        lower, upper = self.kernel.works(state)
        c = self.kernel.log_ratio
        self._up = torch.logaddexp(self._up, logsigmoid(-lower - c))
        self._down = torch.logaddexp(self._down, logsigmoid(upper + c))
        excess = self.kernel.excess(state).double()
        self._first += excess
        self._second += excess.square()
        self._swaps += state.swap_acceptance.mean(dim=0)

    @property
    def swap_acceptance(self) -> Tensor:
        return self._swaps / self.count

    def bridge(self) -> tuple[float, float]:
        """Log Z by bridge sampling, and its jackknife error over chains."""

        def estimate(up: Tensor, down: Tensor) -> Tensor:
            # Both sides hold the same number of terms, which cancels.
            ratio = self.kernel.log_ratio + (up.log() + up_max) - (down.log() + down_max)
            return ratio.sum(dim=-1)

        up_max, down_max = (v.amax(dim=0).nan_to_num(neginf=0.0) for v in (self._up, self._down))
        return _jackknife(estimate, (self._up - up_max).exp(), (self._down - down_max).exp())

    def integral(self) -> tuple[float, float]:
        """Log Z by thermodynamic integration, and its jackknife error over chains.

        The trapezoidal rule with its end correction uses the exact slope of the integrand,
        d<V>/dbeta = -Var(V), and is of fourth order in the spacing.
        """
        width = self.kernel.beta.double().diff()
        num_chains = len(self._first)

        def estimate(first: Tensor, second: Tensor) -> Tensor:
            terms = self.count * (num_chains if first.ndim == 1 else num_chains - 1)
            mean = first / terms
            variance = second / terms - mean.square()
            pieces = width * (mean[..., 1:] + mean[..., :-1]) / 2
            correction = width.square() / 12 * variance.diff(dim=-1)
            return -(pieces + correction).sum(dim=-1)

        value, error = _jackknife(estimate, self._first, self._second)
        return (value, error) if math.isfinite(value) else (math.nan, math.nan)


def _jackknife(estimate: Callable[..., Tensor], *sums: Tensor) -> tuple[float, float]:
    """Estimate from sums over chains (axis 0), and its leave-one-chain-out standard error."""
    totals = [s.sum(dim=0) for s in sums]
    value, n = estimate(*totals).item(), len(sums[0])
    if n < 2:
        return value, math.nan
    parts = estimate(*(t - s for t, s in zip(totals, sums, strict=True)))
    error = math.sqrt((n - 1) / n * (parts - parts.mean()).square().sum().item())
    # NaN: a single chain carried the whole estimate.
    return value, math.inf if math.isnan(error) else error


def _warm_up(
    kernel: Kernel,
    state: ChainState,
    num_steps: int,
    adapt_ladder: bool,
    generator: torch.Generator | None,
) -> ChainState:
    """Tunes the kernel in place: eight rounds for the ladder, then the rest for the step sizes.

    The gain falls as a power 0.6 of the step, and what is frozen is the mean of the second half.
    """
    tempering = kernel if isinstance(kernel, ParallelTempering) else None
    rounds = [num_steps // 16] * 8 if tempering is not None and adapt_ladder else []
    for length in rounds:
        if tempering is None or length == 0:
            continue
        rejection = torch.zeros_like(tempering.log_ratio)
        for i in range(length):
            state = kernel.step(state, generator)
            kernel.adapt(state, (1 + i / 10) ** -0.6)
            assert state.swap_acceptance is not None
            rejection += 1 - state.swap_acceptance.mean(dim=0)
        state = tempering.adapt_ladder(state, rejection / length)
    length = num_steps - sum(rounds)
    if length == 0:
        return state
    first = length // 2
    log_step = torch.zeros_like(kernel.step_size, dtype=torch.float64)
    log_ratio = None if tempering is None else torch.zeros_like(tempering.log_ratio)
    for i in range(length):
        state = kernel.step(state, generator)
        kernel.adapt(state, (1 + i / 10) ** -0.6)
        if i >= first:
            log_step += kernel.step_size.double().log()
            if tempering is not None and log_ratio is not None:
                log_ratio += tempering.log_ratio
    kernel.step_size = (log_step / (length - first)).exp().to(kernel.step_size)
    if tempering is not None and log_ratio is not None:
        tempering.log_ratio = log_ratio / (length - first)
    return state


def _kernel(
    method: str, step_size: float | None, num_leapfrog: int, spread: float, dim: int
) -> Kernel:
    if method == "rw":
        return RandomWalk(2.4 * spread / math.sqrt(dim) if step_size is None else step_size)
    if method == "mala":
        return MALA(spread * dim ** (-1 / 6) if step_size is None else step_size)
    if method == "hmc":
        return HMC(spread * dim**-0.25 / 2 if step_size is None else step_size, num_leapfrog)
    raise ValueError(
        "method must be 'parallel-tempering' (not as a move or a refinement), 'rw', 'mala', 'hmc' "
        f"or 'langevin' (likewise not), got {method!r}"
    )


def _metropolis(
    state: ChainState,
    proposal: ChainState,
    log_ratio: Tensor,
    generator: torch.Generator | None,
) -> ChainState:
    # inf - inf, from one forbidden point to another, is NaN: stay.
    probability = log_ratio.nan_to_num(-math.inf, math.inf, -math.inf).clamp_max(0).exp()
    accept = _uniform_like(probability, generator) < probability
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


def _levels(state: ChainState, which: slice, path: GaussianPath | None) -> ChainState:
    return dataclasses.replace(
        state,
        x=state.x[:, which],
        energy=state.energy[:, which],
        gradient=None if state.gradient is None else state.gradient[:, which],
        path=path,
    )


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _mean_to(value: Tensor, shape: torch.Size) -> Tensor:
    """Mean over the leading axes that ``shape`` does not have."""
    extra = value.ndim - len(shape)
    return value.mean(dim=tuple(range(extra))) if extra else value


def _check_points(name: str, x: Tensor) -> None:
    if x.ndim != 2 or len(x) < 1 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point points of shape (n, dim), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    num_bad = int((~x.isfinite().all(dim=-1)).sum())
    if num_bad:
        raise ValueError(f"{name} must be finite, got {num_bad} bad points of {len(x)}")


def _check_ladder(beta: Tensor) -> None:
    rising = beta.ndim == 1 and len(beta) >= 2 and bool((beta.diff() > 0).all())
    if not (rising and beta[0] == 0 and beta[-1] == 1):
        raise ValueError(f"inverse_temperatures must increase from 0 to 1, got {beta.tolist()}")
