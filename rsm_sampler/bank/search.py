r"""Where is the target, and how wide? From energy values alone.

Nothing is known of the target but its energy: it may sit at :math:`10^3` with width
:math:`10^{-2}`. The search goes from coarse to fine, by importance sampling with densities that
are known exactly at every step:

1. **Bracket.** Points at scales from :math:`10^{-4}` to :math:`10^5` around the given centre, of
   known density q. They are weighted towards :math:`q^{1-\beta} e^{-\beta E}`, with the largest
   :math:`\beta \le 1` that leaves a sufficient effective sample size. Their weighted mean and
   covariance make the next q, a Student-t; repeated until :math:`\beta = 1` or no more progress.
2. **Kernels.** In up to a dozen dimensions, the weighted points are resampled and become the
   centres of a kernel density, each with the shape of its neighbourhood, mixed with a tenth of
   the broad Student-t, which guards against what the kernels missed. Four rounds.
3. **Bank.** Many draws of the last proposal with :math:`\log w = -E(x) - \log q(x)`: weighted
   samples of the target, an estimate of log Z, and the training data of loss (13).
4. **Basins.** In more dimensions, or where kernels fail, a mixture with a component for each basin
   of the energy is tried for the bank (:mod:`rsm_sampler.montecarlo.basins`).
5. **Chains.** Where no bank would be worth its evaluations, a population walks from the last
   Student-t to the target (:mod:`rsm_sampler.montecarlo.population`). It gives equally weighted,
   dependent samples.

With contexts every row of points belongs to one context, and weights are normalised in each row.

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

from rsm_sampler.bank.bank import Bank, Evaluate
from rsm_sampler.estimators import effective_sample_size
from rsm_sampler.montecarlo.basins import Slope, mixture_of_basins
from rsm_sampler.montecarlo.densities import (
    TAIL,
    Density,
    KernelDensity,
    Mixture,
    StudentT,
    weighted_moments,
)
from rsm_sampler.montecarlo.population import sequential_monte_carlo
from rsm_sampler.montecarlo.resampling import cumulative_weight, stratified_indices
from rsm_sampler.target.energy import EnergyError

__all__ = ["FEW_DIMENSIONS", "search"]

FEW_DIMENSIONS = 12
"""In so many kernels around single points make a bank; in more they do not."""

_MISSED = 0.1  # share of contexts that may have no point of finite energy in the bank
_LOWEST, _HIGHEST, _SCALES = 1e-4, 1e5, 64
_ROUNDS = 4  # of kernels


def search(
    evaluate: Evaluate,
    dim: int,
    *,
    evaluations: int,
    bank_size: int,
    chain_evaluations: int | None = None,
    basin_evaluations: int | None = None,
    slope: Slope | None = None,
    slope_cost: int = 0,
    generator: torch.Generator,
    draw_context: Callable[[int], Tensor] | None = None,
    rows: int = 1,
    centre: Tensor | None = None,
    scale: float | None = None,
    check: Callable[[Tensor], float] | None = None,
    report: Callable[[str], None] | None = None,
) -> Bank:
    r"""Find the target and return weighted samples of it.

    Arguments:
        evaluate: The energy in unbounded coordinates.
        dim: Length of a point.
        evaluations: Most energy evaluations before the bank.
        bank_size: Energy evaluations of the bank itself.
        chain_evaluations: Energy evaluations of chains, where they take the bank's place. What is
            left of both numbers above if None.
        basin_evaluations: Most evaluations of the search for basins; a third as many as chains
            take if None.
        slope: Gradients of the energy; basins are looked for with them.
        slope_cost: Evaluations that a gradient costs.
        generator: Source of randomness.
        draw_context: Draws that many contexts; None without contexts.
        rows: Number of contexts in the bank.
        centre: Where to look first, (dim); the origin if None.
        scale: Width to look at, if known to an order of magnitude: the bracket then spans
            :math:`10^{\pm 2}` of it.
        check: Called with the points after each phase; raises if their energies were unusable.
        report: Called with the name of each phase.

    Returns:
        The bank.

    Raises:
        EnergyError: If the energy is not finite anywhere, or keeps falling outward so that
            :math:`e^{-E}` cannot be normalised.
    """
    finder = _Finder(evaluate, dim, generator, draw_context, check, report)
    stage = max(64, min(4096, evaluations // 12))
    proposal, found, beta = finder.bracket(stage, evaluations, centre, scale)
    enough = max(24.0, 4.0 * dim)
    if dim <= FEW_DIMENSIONS:
        left = max(0, evaluations - finder.spent)
        rounds = min(_ROUNDS, left // 128)  # a budget of a few hundred allows fewer
        kernels, tried = finder.kernels(
            proposal, found, beta, rounds, min(32_768, left // max(1, rounds))
        )
        # The last round tells what a bank would be worth, before anything is spent on it.
        share = float(tried.ess(1.0)) / tried.energy.numel()
        if share * bank_size >= max(enough, 0.02 * bank_size) or draw_context is not None:
            return finder.bank(kernels, bank_size, rows)
    if draw_context is not None:
        return finder.bank(finder.density(found, beta, proposal, share=0.3), bank_size, rows)
    left = chain_evaluations or evaluations - finder.spent + bank_size
    if slope is not None:
        before = finder.spent
        mixture = finder.basins(proposal, slope, slope_cost, basin_evaluations or left // 3)
        if mixture is not None:
            return finder.bank(mixture, min(bank_size, left // 2), rows)
        if chain_evaluations is None:
            left -= finder.spent - before
    return finder.chains(proposal, left)


@dataclass
class _Weighted:
    """Points (rows, columns, dim) with energies and log proposal densities (rows, columns)."""

    x: Tensor
    energy: Tensor
    log_proposal: Tensor

    def log_weight(self, beta: float) -> Tensor:
        """Towards q^(1-beta) exp(-beta E)."""
        return -beta * (self.energy + self.log_proposal)

    def ess(self, beta: float) -> Tensor:
        """Effective sample size over all rows; rows without a finite energy count nothing."""
        log_weight = self.log_weight(beta)
        usable = log_weight.amax(-1) > -torch.inf
        if not bool(usable.any()):
            return torch.zeros((), dtype=log_weight.dtype)
        return effective_sample_size(log_weight[usable]).sum()

    def normalised(self, beta: float) -> Tensor:
        weight = torch.softmax(self.log_weight(beta), -1).nan_to_num(0.0)
        return weight / weight.sum()


class _Finder:
    def __init__(
        self,
        evaluate: Evaluate,
        dim: int,
        generator: torch.Generator,
        draw_context: Callable[[int], Tensor] | None,
        check: Callable[[Tensor], float] | None,
        report: Callable[[str], None] | None,
    ) -> None:
        self.evaluate, self.dim, self.generator = evaluate, dim, generator
        self.draw_context = draw_context
        self.check, self.report = check, report
        self.spent = 0

    def _note(self, text: str) -> None:
        if self.report is not None:
            self.report(text)

    def _evaluated(
        self, x: Tensor, log_proposal: Tensor, rows: int, *, checked: bool = True
    ) -> tuple[_Weighted, Tensor | None]:
        """Evaluate n = rows * columns points, row by row with a context each.

        Points that may all have weight zero are not checked by themselves, but with those to come.
        """
        columns = len(x) // rows
        context = None
        if self.draw_context is not None:
            context = self.draw_context(rows)
            # The broad draws come last: deal the points out so that every row has its share.
            order = torch.arange(rows * columns, device=x.device).view(columns, rows).mT
            x, log_proposal = x[order.reshape(-1)], log_proposal[order.reshape(-1)]
            repeated = context.repeat_interleave(columns, 0)
        else:
            repeated = None
        energy = self.evaluate(x, repeated).to(x.dtype)
        self.spent += len(x)
        if self.check is not None and checked:
            self.check(x)
        shape = (rows, columns)
        return (
            _Weighted(x.view(*shape, -1), energy.view(shape), log_proposal.view(shape)),
            context,
        )

    def _rows(self, n: int) -> int:
        return 1 if self.draw_context is None else max(1, min(32, n // 64))

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
        beta = _largest_beta(found, few)
        self._refuse_falling(found, loc, high, max(16, min(64, stage // 16)))
        proposal = self._fit(found, beta)
        best, stalled, at_one, drawn_from = beta, 0, 0, proposal
        while self.spent + stage <= evaluations // 2 and at_one < 2 and stalled < 5:
            x, drawn_from = proposal.sample(stage, self.generator), proposal
            found, _ = self._evaluated(x, proposal.log_prob(x), rows)
            beta = _largest_beta(found, many)
            at_one += beta == 1.0
            stalled = 0 if beta > 1.1 * best else stalled + 1
            best = max(best, beta)
            if at_one == 2 or stalled == 5:
                break  # the proposal stays the one these points were drawn from
            proposal = self._fit(found, beta)
        if beta > 0.05 and self._stretch(found, beta, drawn_from) > 0.65:
            self._refuse_flat(proposal, stage, evaluations)
        if float(found.ess(1.0)) >= few:
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
            raise EnergyError(_unbounded(high))

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
            beta = _largest_beta(found, few)
            # Where it is held the stretch is a ninth of a half; at a small beta all is wide.
            if beta < 0.05 or self._stretch(found, beta, wide) < 0.3:
                return
            log_z.append(float(torch.logsumexp(found.log_weight(1.0).reshape(-1), 0)))
            proposal = self._fit(found, beta, shrunk=False)
            width = float(torch.linalg.matrix_norm(proposal.scale_tril, 2))
            if width > 1e4 * start and log_z[-1] - log_z[0] > 0.5 * math.log(width / start):
                raise EnergyError(_unbounded(width))

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
        cumulative = cumulative_weight(points, weight.log())
        index = stratified_indices(cumulative, count, self.generator)
        chosen, copies = index.unique(return_counts=True)
        return KernelDensity(points[chosen], copies.to(weight) / count, broad, share=share)

    def kernels(
        self, proposal: StudentT, found: _Weighted, beta: float, rounds: int, share: int
    ) -> tuple[KernelDensity, _Weighted]:
        """Stage 2: rounds of kernels around resampled points, and the points of the last one.

        Like the bracket they go on towards beta = 1 as far as the points allow: kernels follow
        shapes that no single law fits.
        """
        rows = self._rows(share)
        size = share - share % rows
        for i in range(rounds):
            self._note(f"kernels {i + 1}/{rounds}")
            density = self.density(found, beta, proposal, share=0.3 if i == 0 else 0.1)
            x = density.sample(size, self.generator)
            found, _ = self._evaluated(x, density.log_prob(x), rows)
            beta = _largest_beta(found, min(0.1 * size, max(32.0, 4.0 * self.dim)))
            proposal = self._fit(found, beta)
        wide = StudentT(proposal.loc, proposal.scale_tril * 1.2)
        return self.density(found, beta, wide, most=1500), found

    def bank(self, density: Density, size: int, rows: int) -> Bank:
        """Stage 3: the bank."""
        self._note("bank")
        size -= size % rows
        x = density.sample(size, self.generator)
        if rows > 1:
            x = x[torch.randperm(size, generator=self.generator, device=x.device)]
        found, context = self._evaluated(x, density.log_prob(x), rows)
        log_weight = found.log_weight(1.0)
        if context is None:
            return Bank.of_draws(found.x, log_weight, None, density)
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

    def basins(
        self,
        proposal: StudentT,
        slope: Slope,
        slope_cost: int,
        evaluations: int,
    ) -> Mixture | None:
        """Stage 4: a mixture over the basins of the energy, if it is worth a bank."""
        self._note("basins")
        tried = 2048
        mixture, spent = mixture_of_basins(
            lambda x: self.evaluate(x, None),
            slope,
            slope_cost,
            proposal,
            evaluations - tried,
            self.generator,
        )
        self.spent += spent
        if mixture is None:
            return None
        x = mixture.sample(tried, self.generator)
        found, _ = self._evaluated(x, mixture.log_prob(x), 1)
        # In few dimensions chains do better than a mixture that only half fits.
        least = 0.1 if self.dim <= FEW_DIMENSIONS else 0.02
        return mixture if float(found.ess(1.0)) >= least * tried else None

    def chains(self, proposal: StudentT, evaluations: int) -> Bank:
        """Stage 5: a population that walks from the proposal to the target."""
        size = max(16, min(512, evaluations // 256))
        visited = sequential_monte_carlo(
            lambda x: self.evaluate(x, None),
            proposal,
            evaluations=evaluations,
            size=size,
            generator=self.generator,
            report=self.report,
        )
        self.spent += evaluations
        if self.check is not None:
            self.check(visited.points)
        return Bank.of_samples(visited.points, method="chains", log_z=visited.log_z)


def _largest_beta(found: _Weighted, least: float) -> float:
    """The largest inverse temperature at which the effective sample size is at least that."""
    if float(found.ess(1.0)) >= least:
        return 1.0
    low, high = -40.0, 0.0  # log beta
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high) if float(found.ess(math.exp(middle))) >= least else (low, middle)
        )
    return math.exp(low)


def _unbounded(radius: float) -> str:
    return (
        f"energy must grow far from its minima, got one that is lowest at the rim of the search "
        f"(|x| about {radius:.0e}): exp(-energy) cannot be normalised. Is it a log-probability, "
        "with the opposite sign (energies.from_log_prob), or does it need bounds?"
    )
