r"""Weighted points of a conditional energy: a row of points for each of many contexts.

One broad Student-t law, then rounds of a kernel density, weighted towards the target over all rows
together; every row of points belongs to one context, and weights are normalised in each row.

References:
    | Adaptive multiple importance sampling (Cornuet et al., 2012)
    | https://doi.org/10.1111/j.1467-9469.2011.00756.x
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.explorer import unbounded
from rsm_sampler.bank.plan import Plan
from rsm_sampler.montecarlo.densities import (
    TAIL,
    Density,
    KernelDensity,
    StudentT,
    weighted_moments,
)
from rsm_sampler.montecarlo.weights import LogWeights
from rsm_sampler.target.energy import EnergyError
from rsm_sampler.target.problem import Problem

__all__ = ["conditional_bank"]

_MISSED = 0.1  # share of contexts that may have no point of finite energy in the bank
_LOWEST, _HIGHEST, _SCALES = 1e-4, 1e5, 64
_ROUNDS = 4  # of kernels


def conditional_bank(
    problem: Problem,
    plan: Plan,
    rows: int,
    generator: torch.Generator,
    *,
    centre: Tensor | None = None,
    scale: float | None = None,
    report: Callable[[str], None] | None = None,
) -> Bank:
    """Weighted points for many contexts.

    Arguments:
        problem: The problem, with contexts.
        plan: Thresholds and budgets.
        rows: Number of contexts in the bank.
        generator: Source of randomness.
        centre: Where to look first, in unbounded coordinates; the origin if None.
        scale: Width to look at, if known to an order of magnitude.
        report: Called with the name of each phase.

    Raises:
        EnergyError: If the energy is not finite anywhere, keeps falling outward, or is finite at
            no point for a tenth of the contexts.
    """
    finder = _Conditional(problem, generator, report)
    stage = max(64, min(4096, plan.evaluations // 12))
    proposal, found, beta = finder.bracket(stage, plan.evaluations, centre, scale)
    left = max(0, plan.evaluations - finder.spent)
    rounds = min(_ROUNDS, left // 128)  # a budget of a few hundred allows fewer
    share = min(32_768, left // max(1, rounds))
    return finder.bank(finder.kernels(proposal, found, beta, rounds, share), plan.bank, rows)


@dataclass
class _Weighted:
    """Points (rows, columns, dim) with energies and log proposal densities (rows, columns)."""

    x: Tensor
    energy: Tensor
    log_proposal: Tensor

    @property
    def weights(self) -> LogWeights:
        """The weights, one row for each context; zero where the energy is infinite."""
        value = -(self.energy + self.log_proposal)
        return LogWeights(torch.where(self.energy < torch.inf, value, -torch.inf))

    def ess(self, beta: float) -> float:
        """Effective sample size over all rows; rows without a finite energy count nothing."""
        return float(self.weights.tempered(beta).ess().sum())

    def power(self, least: float) -> float:
        """The largest beta at which the effective sample size over all rows is that."""
        return self.weights.largest_power(least)

    def normalised(self, beta: float) -> Tensor:
        weight = self.weights.tempered(beta).normalised()
        return weight / weight.sum()


class _Conditional:
    def __init__(
        self,
        problem: Problem,
        generator: torch.Generator,
        report: Callable[[str], None] | None,
    ) -> None:
        assert problem.contexts is not None
        self.problem, self.dim, self.generator = problem, problem.dim, generator
        self.contexts, self.report = problem.contexts, report
        self.spent = 0

    def _note(self, text: str) -> None:
        if self.report is not None:
            self.report(text)

    def _evaluated(
        self, x: Tensor, log_proposal: Tensor, rows: int, *, checked: bool = True
    ) -> tuple[_Weighted, Tensor]:
        """Evaluate n = rows * columns points, row by row with a context each.

        Points that may all have weight zero are not checked by themselves, but with those to come.
        """
        columns = len(x) // rows
        context = self.contexts.scattered(rows, self.generator)
        # The broad draws come last: deal the points out so that every row has its share.
        order = torch.arange(rows * columns, device=x.device).view(columns, rows).mT
        x, log_proposal = x[order.reshape(-1)], log_proposal[order.reshape(-1)]
        energy = self.problem.potential(x, context.repeat_interleave(columns, 0))
        self.spent += len(x)
        if checked:
            self.problem.energy.check(self.problem.coordinates.forward(x)[0])
        shape = (rows, columns)
        return (
            _Weighted(x.view(*shape, -1), energy.view(shape), log_proposal.view(shape)),
            context,
        )

    def _rows(self, n: int) -> int:
        return max(1, min(32, n // 64))

    def bracket(
        self, stage: int, evaluations: int, centre: Tensor | None, scale: float | None
    ) -> tuple[StudentT, _Weighted, float]:
        """Stage 1: a Student-t proposal, the last weighted points, and the beta they bear."""
        self._note("bracket")
        like: dict[str, Any] = {"dtype": torch.float64, "device": self.generator.device}
        loc = torch.zeros(self.dim, **like) if centre is None else centre.to(**like)
        low, high = (_LOWEST, _HIGHEST) if scale is None else (scale / 100, scale * 100)
        scales = torch.logspace(math.log10(low), math.log10(high), _SCALES, **like)
        rows = self._rows(stage)
        stage -= stage % rows
        z = torch.randn(stage, self.dim, generator=self.generator, **like)
        pick = torch.arange(stage, device=z.device) % _SCALES
        if rows > 1:
            pick = pick[torch.randperm(stage, generator=self.generator, device=z.device)]
        x = loc + scales[pick, None] * z
        square = (x - loc).square().sum(-1, keepdim=True)
        log_scale = scales.log()
        log_q = (
            torch.logsumexp(-0.5 * square / scales.square() - self.dim * log_scale, -1)
            - math.log(_SCALES)
            - 0.5 * self.dim * math.log(2 * math.pi)
        )
        found, _ = self._evaluated(x, log_q, rows)
        few = min(0.1 * stage, max(24.0, 3.0 * self.dim))
        many = max(few, 0.08 * stage)
        beta = found.power(few)
        self._refuse_falling(found, loc, high, max(16, min(64, stage // 16)))
        proposal = self._fit(found, beta)
        best, stalled, at_one, drawn_from = beta, 0, 0, proposal
        while self.spent + stage <= evaluations // 2 and at_one < 2 and stalled < 5:
            x, drawn_from = proposal.sample(stage, self.generator), proposal
            found, _ = self._evaluated(x, proposal.log_prob(x), rows)
            beta = found.power(many)
            at_one += beta == 1.0
            stalled = 0 if beta > 1.1 * best else stalled + 1
            best = max(best, beta)
            if at_one == 2 or stalled == 5:
                break  # the proposal stays the one these points were drawn from
            proposal = self._fit(found, beta)
        if beta > 0.05 and self._stretch(found, beta, drawn_from) > 0.65:
            self._refuse_flat(proposal, stage, evaluations)
        if found.ess(1.0) >= few:
            beta = 1.0
        return proposal, found, beta

    def _refuse_falling(self, found: _Weighted, loc: Tensor, high: float, rays: int) -> None:
        """Far beyond the bracket energies are as low as any within it: they fall outward."""
        ray = torch.randn(rays, self.dim, dtype=loc.dtype, device=loc.device,
                          generator=self.generator)  # fmt: skip
        ray = high * ray / ray.square().mean(-1, keepdim=True).sqrt()
        x = torch.cat([loc + 30 * ray, loc + 100 * ray])
        found_there, _ = self._evaluated(x, torch.zeros_like(x[:, 0]), 1, checked=False)
        energy = found_there.energy.view(2, rays)
        low = (energy <= found.energy.amin()).all(0)
        if float(low.double().mean()) > 0.2:
            raise EnergyError(unbounded(high))

    def _stretch(self, found: _Weighted, beta: float, proposal: StudentT) -> float:
        """Largest ratio of weighted variance to the proposal's, over all directions.

        Where the moments have settled it is 1 / 1.2 over 5 / 3, a half. In a direction without
        restoring force the points only repeat the proposal's own width: it is 1 or more.
        """
        z = torch.linalg.solve_triangular(
            proposal.scale_tril, (found.x.reshape(-1, self.dim) - proposal.loc).mT, upper=False
        ).mT
        weight = found.normalised(beta).reshape(-1, 1)
        centred = z - (weight * z).sum(0)
        covariance = (weight * centred).mT @ centred
        return float(torch.linalg.eigvalsh(covariance)[-1]) * (1 - 2 / TAIL)

    def _refuse_flat(self, proposal: StudentT, stage: int, evaluations: int) -> None:
        """Stretch the proposal again and again: does the energy hold the points back?

        Where it does not, log Z grows with the width; heavy tails widen too, with an end to log Z.
        A flat direction lies anywhere, and over many widths a small angle leads away from it: the
        moments are taken as they are.
        """
        rows = self._rows(stage)
        few = min(0.1 * stage, max(24.0, 3.0 * self.dim))
        start = float(torch.linalg.matrix_norm(proposal.scale_tril, 2))
        log_z: list[float] = []
        for _ in range(12):
            if self.spent + stage > evaluations:
                return
            wide = StudentT(proposal.loc, 3.0 * proposal.scale_tril)
            x = wide.sample(stage, self.generator)
            found, _ = self._evaluated(x, wide.log_prob(x), rows)
            beta = found.power(few)
            # Where it is held the stretch is a ninth of a half; at a small beta all is wide.
            if beta < 0.05 or self._stretch(found, beta, wide) < 0.3:
                return
            log_z.append(float(torch.logsumexp(found.weights.value.reshape(-1), 0)))
            proposal = self._fit(found, beta, shrunk=False)
            width = float(torch.linalg.matrix_norm(proposal.scale_tril, 2))
            if width > 1e4 * start and log_z[-1] - log_z[0] > 0.5 * math.log(width / start):
                raise EnergyError(unbounded(width))

    def _fit(self, found: _Weighted, beta: float, *, shrunk: bool = True) -> StudentT:
        """Student-t with the weighted moments, shrunk to a diagonal where there are few points."""
        loc, scale_tril = weighted_moments(found.x, found.normalised(beta), shrunk=shrunk)
        return StudentT(loc, scale_tril * math.sqrt(1.2))

    def density(
        self,
        found: _Weighted,
        beta: float,
        broad: StudentT,
        *,
        share: float = 0.1,
        most: int = 1000,
    ) -> KernelDensity:
        """Kernels around points resampled by their weights at beta."""
        weight = found.normalised(beta).reshape(-1)
        count = int(min(most, max(16, 1.5 * float(1 / weight.square().sum()))))
        points = found.x.reshape(-1, self.dim)
        index = LogWeights(weight.log()).resampled(count, self.generator)
        chosen, copies = index.unique(return_counts=True)
        return KernelDensity(points[chosen], copies.to(weight) / count, broad, share=share)

    def kernels(
        self, proposal: StudentT, found: _Weighted, beta: float, rounds: int, points: int
    ) -> KernelDensity:
        """Stage 2: rounds of kernels around resampled points.

        Like the bracket they go on towards beta = 1 as far as the points allow: kernels follow
        shapes that no single law fits.
        """
        rows = self._rows(points)
        size = points - points % rows
        for i in range(rounds):
            self._note(f"kernels {i + 1}/{rounds}")
            density = self.density(found, beta, proposal, share=0.3 if i == 0 else 0.1)
            x = density.sample(size, self.generator)
            found, _ = self._evaluated(x, density.log_prob(x), rows)
            beta = found.power(min(0.1 * size, max(32.0, 4.0 * self.dim)))
            proposal = self._fit(found, beta)
        wide = StudentT(proposal.loc, proposal.scale_tril * 1.2)
        return self.density(found, beta, wide, most=1500)

    def bank(self, density: Density, size: int, rows: int) -> Bank:
        """Stage 3: the bank."""
        self._note("bank")
        size -= size % rows
        x = density.sample(size, self.generator)
        if rows > 1:
            x = x[torch.randperm(size, generator=self.generator, device=x.device)]
        found, context = self._evaluated(x, density.log_prob(x), rows)
        log_weight = found.weights.value
        # A narrow law of some context may have been missed by all of its points.
        known = log_weight.amax(-1) > -torch.inf
        missed = int((~known).sum())
        if missed > _MISSED * len(known):
            raise EnergyError(
                f"energy must be finite somewhere for every context, got NaN or inf at all "
                f"{log_weight.shape[1]} points for {missed} of {len(known)} contexts, such as "
                f"{context[~known][0].tolist()}; a larger budget, or centre and scale, may help"
            )
        return Bank.of_draws(found.x[known], log_weight[known], context[known], density)
