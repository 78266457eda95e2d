r"""Plain Markov chain Monte Carlo: the baseline at equal evaluations, and exact refinement.

A learned sampler has to be compared with what ordinary chains do with the **same number of energy
evaluations**, so the budget here is counted exactly: one for every energy value at one point, one
more where its gradient is taken as well. :func:`run_mcmc` spends a budget and never exceeds it.
:func:`refine` moves given samples by a short exact chain and reports whether their energies drift.

The kernels are those of :mod:`rsm_sampler.montecarlo.markov` and
:mod:`rsm_sampler.montecarlo.tempering`. What can be tuned (step sizes, ladder) is tuned in a
warm-up, no state of which is kept, and frozen afterwards.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.montecarlo.markov import (
    HMC,
    MALA,
    ChainState,
    Energy,
    GaussianPath,
    Kernel,
    Langevin,
    RandomWalk,
)
from rsm_sampler.montecarlo.tempering import LadderStatistics, ParallelTempering
from rsm_sampler.target.energy import MeteredEnergy, metered

__all__ = [
    "HMC",
    "MALA",
    "ChainState",
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

Move = Literal["rw", "mala", "hmc"]


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


@checked(least={"num_leapfrog": 1})
def run_mcmc(
    energy: Energy | MeteredEnergy,
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
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``, low where likely. A
            :class:`~rsm_sampler.target.energy.MeteredEnergy` counts what is spent here as well.
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

    target = metered(energy, dim)
    evaluations_before, failures_before = target.evaluations, target.failures
    state = kernel.start(target, x_0)
    num_infinite = int((~state.energy.isfinite()).sum())
    if num_infinite:
        raise ValueError(
            f"x_0 must have finite energies, got {num_infinite} of {state.energy.numel()} "
            "infinite or NaN"
        )
    state = _warm_up(kernel, state, num_warm_up, adapt_ladder, generator)
    ladder = LadderStatistics(kernel, n) if isinstance(kernel, ParallelTempering) else None
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
        evaluations=target.evaluations - evaluations_before,
        num_warm_up=num_warm_up,
        num_steps=num_steps,
        acceptance=acceptance.item() / num_steps,
        num_bad=target.failures - failures_before,
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


@checked(least={"num_leapfrog": 1})
def refine(
    energy: Energy | MeteredEnergy,
    x: Float[Tensor, "n dim"],
    *,
    steps: int,
    context: Float[Tensor, "n context_dim"] | None = None,
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
        energy: Callable from points ``(n, dim)`` to energies ``(n,)``, as in :func:`run_mcmc`.
        x: Samples, with shape :math:`(n, d)`. Those of infinite energy may come in; they stay
            until a finite one is proposed.
        steps: Steps of every chain.
        context: A context for each sample, for an energy of points and contexts.
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
    target = metered(
        energy, x.shape[-1], context_dim=None if context is None else context.shape[-1]
    )
    evaluations_before, failures_before = target.evaluations, target.failures
    state = kernel.start(target, x, context)
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
            context=None if context is None else context[finite],
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
        num_bad=target.failures - failures_before,
        evaluations=target.evaluations - evaluations_before,
    )


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


def _check_points(name: str, x: Tensor) -> None:
    if x.ndim != 2 or len(x) < 1 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point points of shape (n, dim), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    num_bad = int((~x.isfinite().all(dim=-1)).sum())
    if num_bad:
        raise ValueError(f"{name} must be finite, got {num_bad} bad points of {len(x)}")
