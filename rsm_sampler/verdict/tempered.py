r"""A small tempered population: sequential Monte Carlo from a broad law to the target.

Particles go along :math:`q^{1 - \beta} e^{-\beta E}` from the broad law q at :math:`\beta = 0` to
the target at :math:`\beta = 1`, each step of :math:`\beta` as long as it leaves half of them
effective. Metropolis moves follow, half of the population at a time: random walks with the
population's covariance, and differences of two particles of the other half, among them at full
length, which jump from mode to mode.

References:
    | Sequential Monte Carlo samplers (Del Moral et al., 2006)
    | https://doi.org/10.1111/j.1467-9868.2006.00553.x

    | A Markov chain Monte Carlo version of the genetic algorithm differential evolution
    | (ter Braak, 2006)
    | https://doi.org/10.1007/s11222-006-8769-1
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.densities import StudentT
from rsm_sampler.montecarlo.population import next_beta
from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices

__all__ = ["factor", "moments", "tempered_population"]

_KEPT = 0.5  # effective share of the particles after a step of beta
_WALK, _JUMP = 0.4, 0.1  # shares of the moves; the rest are shortened differences
_ACCEPTED = 0.25  # of the random walks: the usual compromise in several dimensions
_SWEEPS = 3  # after each step of beta, at least
_LATE = 0.3  # share of the evaluations that is left for beta = 1


def tempered_population(
    value: Callable[[Tensor], Tensor],
    broad: StudentT,
    *,
    size: int,
    evaluations: int,
    generator: torch.Generator,
) -> Float[Tensor, "n dim"]:
    """Points that a population visits at the target, in random order.

    Arguments:
        value: Energies (n) of points (n, dim).
        broad: The law that it starts from.
        size: Number of particles, even.
        evaluations: Most evaluations.
        generator: Source of randomness.

    Returns:
        The points; none if no particle has a finite energy.
    """
    x = broad.sample(size, generator)
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
    energy, log_q = value(x), broad.log_prob(x)
    sweeps = evaluations // size - 1
    late, every = int(_LATE * sweeps), max(_SWEEPS, min(2 * x.shape[1], sweeps // 30))
    beta, length, kept = 0.0, 2.38 / math.sqrt(x.shape[1]), []
    if not bool(energy.isfinite().any()):
        return x[:0]
    while sweeps > 0:
        if beta < 1:
            work = energy + log_q
            new = 1.0 if sweeps <= late + every else next_beta(work, beta, _KEPT * size)
            log_weight = torch.where(energy < torch.inf, -(new - beta) * work, -torch.inf)
            index = stratified_indices(cumulative_weight(x, log_weight), size, generator)
            # Copies lie side by side: spread them over both halves.
            index = index[torch.randperm(size, generator=generator, device=x.device)]
            x, energy, log_q, beta = x[index], energy[index], log_q[index], new
        weight = torch.full_like(energy, 1 / size)
        tril = moments(x, weight)[1]
        for _ in range(min(sweeps, every)):
            sweeps -= 1
            rates = []
            for moved in (slice(0, size // 2), slice(size // 2, size)):
                other = x[size // 2 :] if moved.start == 0 else x[: size // 2]
                trial, walk = _proposed(x[moved], other, tril, length, like)
                its_energy, its_log_q = value(trial), broad.log_prob(trial)
                gain = (1 - beta) * (its_log_q - log_q[moved])
                gain = gain - beta * (its_energy - energy[moved])
                accept = torch.rand(len(trial), **like).log() < gain
                x[moved] = torch.where(accept[:, None], trial, x[moved])
                energy[moved] = torch.where(accept, its_energy, energy[moved])
                log_q[moved] = torch.where(accept, its_log_q, log_q[moved])
                rates.append(accept[walk].double().mean().nan_to_num(_ACCEPTED))
            rate = float(sum(rates)) / 2
            length = min(10.0, max(1e-3, length * math.exp(rate - _ACCEPTED)))
            if beta == 1:
                kept.append(x.clone())
    points = torch.cat(kept[len(kept) // 4 :] or [x])
    return points[torch.randperm(len(points), generator=generator, device=x.device)]


def _proposed(
    x: Tensor, other: Tensor, tril: Tensor, length: float, like: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Trial points, and which of them are random walks."""
    n, dim = x.shape
    kind = torch.rand(n, 1, **like)
    shrunk = 10 ** -torch.rand(n, 1, **like)
    noise = torch.randn(n, dim, **like) @ tril.mT
    first = torch.randint(len(other), (n,), generator=like["generator"], device=x.device)
    second = torch.randint(len(other) - 1, (n,), generator=like["generator"], device=x.device)
    second = second + (second >= first)
    short = 2.38 / math.sqrt(2 * dim) * shrunk
    factor_ = torch.where(kind < _WALK + _JUMP, torch.ones_like(short), short)
    jump = factor_ * (other[first] - other[second]) + 1e-3 * noise
    return x + torch.where(kind < _WALK, length * shrunk * noise, jump), kind[:, 0] < _WALK


def moments(
    points: Float[Tensor, "n dim"], weight: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Weighted mean and Cholesky factor of the covariance, shrunk where points are few.

    Arguments:
        points: Points.
        weight: Their weights, which sum to one.
    """
    dim = points.shape[1]
    loc = weight @ points
    centred = points - loc
    covariance = (weight[:, None] * centred).mT @ centred
    worth = float(1 / weight.square().sum())
    diagonal = covariance.diagonal().clamp(min=1e-300)
    shrink = dim / (dim + worth)
    covariance = (1 - shrink) * covariance + shrink * diagonal.diag()
    return loc, factor(covariance, diagonal.sqrt().diag())


def factor(
    covariance: Float[Tensor, "dim dim"], otherwise: Float[Tensor, "dim dim"]
) -> Float[Tensor, "dim dim"]:
    """Cholesky factor of a matrix that may be singular to rounding; else another one.

    Arguments:
        covariance: The matrix.
        otherwise: The factor to use if it has none.
    """
    jitter = 1e-10 * covariance.diagonal().diag()
    found, info = torch.linalg.cholesky_ex(covariance + jitter)
    return found if int(info) == 0 and bool(found.isfinite().all()) else otherwise
