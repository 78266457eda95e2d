r"""Sequential Monte Carlo: a population that walks from a known law to the target.

Importance weights of a single proposal are useless beyond a dozen dimensions. A population of
particles is brought there in small steps instead, along :math:`q^{1-\beta} e^{-\beta E}` from
:math:`\beta = 0`, where the particles are draws of the reference q, to :math:`\beta = 1`. Each
step in :math:`\beta` is as long as the weights
:math:`e^{-\Delta\beta (E + \log q)}` allow, which are resampled away and multiply to an estimate
of Z; Metropolis moves that leave the law invariant follow. They need energy values only, and
learn their shape from the particles: one half of the population is moved at a time, by

* a random walk with the population's covariance, in steps of very different lengths;
* **differences** of two particles of the other half, in a few coordinates, shortened;
* the same at full length: jumps from well to well;
* **dilations** of coordinates about their middle, while another one, that is seen to be their
  scale, moves by a difference;
* **exchange** of some coordinates between two particles, which leaves every coordinate's own
  law alone and shuffles how they go together.

Coordinates that have not yet moved by their own width are chosen more often. At
:math:`\beta = 1` the population goes on, and what it visits is kept.

References:
    | Sequential Monte Carlo samplers (Del Moral et al., 2006)
    | https://doi.org/10.1111/j.1467-9868.2006.00553.x

    | Accelerating Markov chain Monte Carlo simulation by differential evolution with
    | self-adaptive randomized subspace sampling (Vrugt et al., 2009)
    | https://doi.org/10.1515/IJNSNS.2009.10.3.273

    | Real-parameter evolutionary Monte Carlo (Liang and Wong, 2001)
    | https://doi.org/10.1198/016214501753168325
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_sampler.montecarlo.densities import StudentT, weighted_moments
from rsm_sampler.montecarlo.weights import LogWeights, cumulative_weight, stratified_indices

__all__ = ["Visited", "next_beta", "sequential_monte_carlo"]

_LEAST_SIZE, _LEAST_MOVES = 16, 8
LEAST_EVALUATIONS = _LEAST_SIZE * _LEAST_MOVES
_WALK, _JUMP = 0.1, 0.4  # shares of the moves by differences; the rest are short ones
_EXCHANGE, _DILATE = 0.2, 0.2  # shares of the other moves
_SCALING = 0.2  # least correlation of a coordinate with the log size of another, to be its scale
_KEPT_ESS = 0.6  # of the population, in a step of beta


@dataclass(frozen=True)
class Visited:
    """What the population visited at beta = 1.

    Attributes:
        points: Points, (n, dim), one snapshot of the population after the other.
        energy: Their energies, (n).
        log_z: Estimate of log Z.
        stages: Steps of beta.
        acceptance: Share of accepted moves since beta = 1.
    """

    points: Tensor
    energy: Tensor
    log_z: float
    stages: int
    acceptance: float


def sequential_monte_carlo(
    evaluate: Callable[[Tensor], Tensor],
    reference: StudentT,
    *,
    evaluations: int,
    size: int,
    generator: torch.Generator,
    keep: int = 16_384,
    report: Callable[[str], None] | None = None,
) -> Visited:
    r"""Bring a population from the reference to the target.

    Arguments:
        evaluate: Energies (n) of points (n, dim).
        reference: The law at :math:`\beta = 0`.
        evaluations: Energy evaluations; more than half of them at :math:`\beta < 1` if the way is
            long, never more than three quarters.
        size: Number of particles, made even.
        generator: Source of randomness.
        keep: About as many points are kept of those visited at :math:`\beta = 1`.
        report: Called with the name of each phase.

    Raises:
        ValueError: If there are fewer than 16 particles or 8 evaluations for each.
    """
    size -= size % 2
    if size < _LEAST_SIZE or evaluations < _LEAST_MOVES * size:
        raise ValueError(
            f"size must be at least {_LEAST_SIZE} particles with {_LEAST_MOVES} evaluations each, "
            f"got {size} particles and {evaluations} evaluations"
        )
    population = _Population(evaluate, reference, size, generator)
    dim = len(reference.loc)
    sweeps = max(2, min(4 * dim, evaluations // (size * 40)))  # of a stage
    left = evaluations // size - 1
    late = left // 4
    while population.beta < 1:
        population.advance(now=left - sweeps < late)
        if report is not None:
            report(f"chains, beta {population.beta:.2g}")
        if population.beta < 1:
            for _ in range(min(sweeps, max(0, left - late))):
                population.sweep()
                left -= 1
    snapshots, accepted = [], []
    every = max(1, left * size // keep)
    for i in range(left):
        accepted.append(population.sweep())
        if (left - 1 - i) % every == 0 and i >= left // 5:
            snapshots.append((population.x.clone(), population.energy.clone()))
    if not snapshots:
        snapshots.append((population.x, population.energy))
    points, energies = zip(*snapshots, strict=True)
    return Visited(
        torch.cat(points),
        torch.cat(energies),
        population.log_z,
        population.stages,
        sum(accepted) / max(1, len(accepted)),
    )


class _Population:
    """Particles with what the moves need to know of them."""

    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        reference: StudentT,
        size: int,
        generator: torch.Generator,
    ) -> None:
        self.evaluate, self.reference, self.generator = evaluate, reference, generator
        self.x = reference.sample(size, generator)
        self.like: dict[str, Any] = {
            "dtype": self.x.dtype, "device": self.x.device, "generator": generator
        }  # fmt: skip
        self.energy, self.log_q = self._values(self.x)
        self.beta, self.log_z, self.stages = 0.0, 0.0, 0
        self.walk = self.short = 1.0
        self._settle()

    def _values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.evaluate(x).to(x.dtype), self.reference.log_prob(x)

    def _settle(self) -> None:
        """Moments of the population, and where each particle stands: the moves start anew."""
        weight = torch.full_like(self.energy, 1 / len(self.x))
        self.scale_tril = weighted_moments(self.x, weight)[1]
        self.start = self.x.clone()

    def advance(self, *, now: bool) -> None:
        """The longest step of beta that the weights allow, or the last one now; resample."""
        work = self.energy + self.log_q
        beta = 1.0 if now else next_beta(work, self.beta, _KEPT_ESS * len(work))
        log_weight = -(beta - self.beta) * work
        log_weight = torch.where(self.energy < torch.inf, log_weight, -torch.inf)
        self.log_z += float(torch.logsumexp(log_weight, 0)) - math.log(len(work))
        index = stratified_indices(
            cumulative_weight(self.x, log_weight), len(work), self.generator
        )
        # Copies of one particle lie side by side: spread them over both halves.
        index = index[torch.randperm(len(index), generator=self.generator, device=index.device)]
        self.x, self.energy, self.log_q = self.x[index], self.energy[index], self.log_q[index]
        self.beta, self.stages = beta, self.stages + 1
        self._settle()

    def _log_density(self, energy: Tensor, log_q: Tensor) -> Tensor:
        return (1 - self.beta) * log_q - self.beta * energy

    def sweep(self) -> float:
        """One move of every particle; returns the share of accepted ones."""
        kind = float(torch.rand((), **self.like))
        if kind < _EXCHANGE:
            return self._exchange()
        move = self._dilations if kind < _EXCHANGE + _DILATE else self._differences
        half = len(self.x) // 2
        rates = []
        for moved in (slice(0, half), slice(half, 2 * half)):
            other = self.x[half:] if moved.start == 0 else self.x[:half]
            rates.append(move(moved, other))
        return sum(rates) / 2

    def _differences(self, moved: slice, other: Tensor) -> float:
        x = self.x[moved]
        n, dim = x.shape
        kind = torch.rand(n, 1, **self.like)
        length = self.walk * 10 ** (0.5 - 1.5 * torch.rand(n, 1, **self.like))
        walk = length * (torch.randn(n, dim, **self.like) @ self.scale_tril.mT)
        first = torch.randint(n, (n,), generator=self.generator, device=x.device)
        second = torch.randint(n - 1, (n,), generator=self.generator, device=x.device)
        second = second + (second >= first)
        chosen, number = self._some_coordinates(n, dim)
        short = self.short * 2.38 / (2 * number).sqrt()
        short = short * 10 ** -torch.rand(n, 1, **self.like)
        jump = kind < _WALK + _JUMP
        jitter = 1e-3 * self.scale_tril.diagonal() * torch.randn(n, dim, **self.like)
        difference = torch.where(jump, 1.0, short) * (other[first] - other[second]) + jitter
        trial = x + torch.where(kind < _WALK, walk, chosen * difference)
        accept = self._decided(moved, trial, torch.zeros_like(x[:, 0]))
        kind = kind.squeeze(-1)
        self.walk = _adapted(self.walk, accept[kind < _WALK], 0.25)
        self.short = _adapted(self.short, accept[kind >= _WALK + _JUMP], 0.35)
        return float(accept.double().mean())

    def _dilations(self, moved: slice, other: Tensor) -> float:
        """One coordinate moves by a difference, and those whose scale it is are dilated with it.

        Coordinate j is the scale of k as far as, in the other half, log |x_k - m_k| grows with
        x_j; it is chosen the more often, the clearer it is that of any.
        """
        x = self.x[moved]
        n, dim = x.shape
        middle = other.quantile(0.5, 0)  # of narrow necks, too
        width = other.std(0, correction=0).clamp(min=1e-300)
        standard = (other - middle) / width
        size = standard.abs().clamp(min=1e-9).log()
        size = size - size.mean(0)
        slope = standard.mT @ size / n  # (j, k), in units of the width of x_j
        known = slope.abs() / size.std(0, correction=0).clamp(min=1e-9)
        known = known.nan_to_num(0.0, 0.0, 0.0).clamp(max=1e3)
        known.fill_diagonal_(0.0)
        slope = torch.where(known > _SCALING, slope, 0.0)
        one = torch.multinomial(
            0.05 + known.amax(1).square(), n, replacement=True, generator=self.generator
        )
        first = torch.randint(n, (n,), generator=self.generator, device=x.device)
        length = 1.7 * 10 ** -torch.rand(n, 1, **self.like)
        difference = torch.nn.functional.one_hot(one, dim).to(x)
        difference = length * difference * (other[first] - other[first.roll(1)])
        log_factor = slope[one] * (difference / width).sum(-1, keepdim=True)
        trial = middle + log_factor.exp() * (x - middle) + difference
        accept = self._decided(moved, trial, log_factor.sum(-1))
        return float(accept.double().mean())

    def _decided(self, moved: slice, trial: Tensor, log_volume: Tensor) -> Tensor:
        """Metropolis's rule, for a map that changes volumes by that much; who was accepted."""
        energy, log_q = self._values(trial)
        gain = log_volume + self._log_density(energy, log_q)
        gain = gain - self._log_density(self.energy[moved], self.log_q[moved])
        accept = torch.rand(len(trial), **self.like).log() < gain
        self.x[moved] = torch.where(accept[:, None], trial, self.x[moved])
        self.energy[moved] = torch.where(accept, energy, self.energy[moved])
        self.log_q[moved] = torch.where(accept, log_q, self.log_q[moved])
        return accept

    def _some_coordinates(self, n: int, dim: int) -> tuple[Tensor, Tensor]:
        """Masks (n, dim) of a few coordinates each, mostly one, and how many they are, (n, 1)."""
        number = torch.exp(torch.rand(n, 1, **self.like) ** 3 * math.log(dim)).floor()
        gone = (self.x - self.start).square().mean(0) / self.scale_tril.square().sum(-1)
        # Two independent draws are two variances apart.
        chance = 0.2 + (1 - 0.5 * gone).clamp(min=0)
        key = chance.log() - torch.rand(n, dim, **self.like).log().neg().log()
        if dim == 1:
            return torch.ones_like(key), number
        order = key.argsort(-1, descending=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(dim, device=order.device).expand_as(order)
        )
        return (rank < number).to(key.dtype), number

    def _exchange(self) -> float:
        """Particles of one half exchange some coordinates with those of the other."""
        n, dim = len(self.x) // 2, self.x.shape[1]
        order = torch.randperm(2 * n, generator=self.generator, device=self.x.device)
        first, second = order[:n], order[n:]
        share = torch.rand(n, 1, **self.like)
        number = torch.exp(share * math.log(max(2.0, dim / 2)))
        mask = torch.rand(n, dim, **self.like) * dim < number
        a, b = self.x[first], self.x[second]
        trial = torch.cat([torch.where(mask, b, a), torch.where(mask, a, b)])
        energy, log_q = self._values(trial)
        index = torch.cat([first, second])
        gain = self._log_density(energy, log_q) - self._log_density(
            self.energy[index], self.log_q[index]
        )
        accept = torch.rand(n, **self.like).log() < gain[:n] + gain[n:]
        index, taken = index[accept.repeat(2)], accept.repeat(2)
        self.x[index], self.energy[index] = trial[taken], energy[taken]
        self.log_q[index] = log_q[taken]
        return float(accept.double().mean())


def _adapted(scale: float, accepted: Tensor, wanted: float) -> float:
    if len(accepted) == 0:
        return scale
    return min(4.0, max(1e-4, scale * math.exp(0.3 * (float(accepted.double().mean()) - wanted))))


def next_beta(work: Tensor, beta: float, least: float) -> float:
    """The largest beta up to 1 whose step leaves the points that effective sample size.

    Arguments:
        work: Energy plus log-density of what the points were drawn from, (n), in nats; infinite
            where a point has no weight.
        beta: The present one.
        least: Effective sample size to keep, in points.
    """
    whole = LogWeights(torch.where(work < torch.inf, -(1.0 - beta) * work, -torch.inf))
    step = (1.0 - beta) * whole.largest_power(least)
    return 1.0 if beta + step >= 1.0 else max(beta + step, beta * 1.000001, 1e-12)
