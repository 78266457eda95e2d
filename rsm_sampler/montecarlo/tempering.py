r"""Parallel tempering: chains that exchange places between a Gaussian and the target.

A ladder of :math:`K + 1` levels runs between a normalised Gaussian reference and the target,

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

References:
    | Non-reversible parallel tempering: a scalable highly parallel MCMC scheme (Syed et al., 2022)
    | https://arxiv.org/abs/1905.02939

    | Simulating ratios of normalizing constants via a simple identity (Meng and Wong, 1996)
    | https://www.jstor.org/stable/24306045
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rsm_sampler.checked import checked
from rsm_sampler.montecarlo.markov import (
    ChainState,
    Energy,
    GaussianPath,
    Kernel,
    RandomWalk,
    normal_like,
    uniform_like,
)
from rsm_sampler.target.energy import MeteredEnergy

__all__ = ["LadderStatistics", "ParallelTempering"]


@checked
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

    def start(
        self,
        energy: Energy | MeteredEnergy,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*batch context_dim"] | None = None,
    ) -> ChainState:
        r"""Places the ladders and evaluates their points.

        Arguments:
            energy: As in :meth:`Kernel.start`.
            x: One point per chain, with shape :math:`(n, d)`, at which all its levels start; or
                one per level, with shape :math:`(n, K + 1, d)`.
            context: None; ladders take no contexts.

        Returns:
            The state to call :meth:`step` on.
        """
        if context is not None:
            raise ValueError(f"context must be None, got shape {tuple(context.shape)}")
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
        reference = self.loc + self.scale * normal_like(state.x[:, :1], generator)
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
        swap = (uniform_like(probability, generator) < probability) & (
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


@checked
class LadderStatistics:
    """Running sums for log Z, per chain, so that chains give the standard errors.

    Arguments:
        kernel: The kernel, with a ladder that is frozen from now on.
        num_chains: Number of chains.
    """

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
        """Takes in the states after one step."""
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
    def swap_acceptance(self) -> Float[Tensor, "k"]:
        """Mean acceptance probability of the exchange of each pair of neighbours."""
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


def _levels(state: ChainState, which: slice, path: GaussianPath | None) -> ChainState:
    return dataclasses.replace(
        state,
        x=state.x[:, which],
        energy=state.energy[:, which],
        gradient=None if state.gradient is None else state.gradient[:, which],
        path=path,
    )


def _check_ladder(beta: Tensor) -> None:
    rising = beta.ndim == 1 and len(beta) >= 2 and bool((beta.diff() > 0).all())
    if not (rising and beta[0] == 0 and beta[-1] == 1):
        raise ValueError(f"inverse_temperatures must increase from 0 to 1, got {beta.tolist()}")
