r"""What a training run learns from: its bank of weighted points, from the search to the batches.

The bank is found by the search, or is given; one that chains made gets gradients of the energy;
one of independent draws grows when there is budget for it; one of chains gives way to draws of the
trained sampler. Batches are drawn from it by weight, in the coordinates z of the network, which
stay those of the first bank.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.conditional import conditional_bank
from rsm_sampler.bank.explorer import explore_problem
from rsm_sampler.bank.plan import FEW_DIMENSIONS, Plan
from rsm_sampler.bank.sources import BankSource
from rsm_sampler.energy_sampler import EnergySampler
from rsm_sampler.estimators import effective_sample_size
from rsm_sampler.montecarlo.population import LEAST_EVALUATIONS, next_beta
from rsm_sampler.montecarlo.run import run_mcmc
from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices
from rsm_sampler.target.contexts import Contexts
from rsm_sampler.target.coordinates import Affine, Coordinates, MeanFree
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.gradients import (
    GradientMethod,
    autograd_gradient,
    difference_gradient,
    differentiable,
    virial_holds,
)
from rsm_sampler.target.problem import Problem
from rsm_sampler.trainer_config import TrainerConfig

__all__ = ["Batch", "Supply"]

Report = Callable[[str], None]
_POINTS = 16_384  # of equal weight, in a renewed bank
_LEAST_EFFECTIVE = 3000  # draws that may renew a bank
_LEAST_HELPED = 512  # points with gradients
_HARDLY_DRAWN = 1e-3  # weight of a point, in equal shares
_NEARLY_NORMAL = 8.0  # times an inverse stiffness: squared noise up to which posteriors are so
_LEAST_OF_PARTICLES = 0.02  # of a bank's draws: chains of few particles do no better
_RELAXING, _WALKERS = 0.85, 64  # of the chains' evaluations for particles; their chains
_LEAPFROG, _MOVES = 10, 100  # steps of a move of theirs, unless there would be fewer moves


class Batch(NamedTuple):
    """Clean points with what the loss needs to know of them.

    Attributes:
        x_0: Points in coordinates z, (levels, points, dim).
        gradient: Gradients of the energy there, or None.
        stiffness: Their mean squares, infinite where there is no gradient, or None.
        context: Contexts, (levels, points, context_dim), or None.
    """

    x_0: Tensor
    gradient: Tensor | None
    stiffness: Tensor | None
    context: Tensor | None


class Supply:
    """The bank of one training run.

    Arguments:
        energy: The energy in the user's coordinates.
        coordinates: What lies between those and unbounded ones.
        config: The sizes.
        generator: Source of randomness.
        contexts: The law of contexts, if there are any.
        gradients: Where gradients come from.
        sources: Ways to propose a bank's law; the library's own if None.

    Attributes:
        problem: The energy in unbounded coordinates.
        seen: What the search saw, in plain values; empty before it, and with contexts.
        bank: The bank; None before there is one.
        affine: From z to unbounded coordinates.
        context: Contexts of the bank's rows, or None.
        radius: Distance from the origin, in z, of the farthest point that batches have; infinite
            with contexts, of which each has its own points, and for particles.
        jacobian_below: Noise up to which targets of particles have the Jacobian in them; 0 for
            others, to whom it gave nothing, and without gradients.
    """

    def __init__(
        self,
        energy: MeteredEnergy,
        coordinates: Coordinates,
        config: TrainerConfig,
        generator: torch.Generator,
        *,
        contexts: Contexts | None,
        gradients: GradientMethod,
        sources: Sequence[BankSource] | None = None,
    ) -> None:
        self.energy, self.coordinates, self.config = energy, coordinates, config
        self.generator, self.contexts, self.gradients = generator, contexts, gradients
        self.sources = sources
        self.problem = Problem(energy, coordinates, contexts=contexts, gradients=gradients)
        self.seen: dict[str, Any] = {}
        self.bank: Bank | None = None
        self.affine = Affine.identity(coordinates.reduced)
        self.context: Tensor | None = None
        self.radius = math.inf
        self.jacobian_below = 0.0

    @property
    def helped(self) -> bool:
        """Whether the bank has gradients."""
        return self.bank is not None and self.bank.gradient is not None

    def find(
        self,
        *,
        reserve: int,
        share: float,
        centre: Tensor | None,
        scale: float | None,
        report: Report,
    ) -> None:
        """The first bank, by the search.

        Arguments:
            reserve: Evaluations of the budget to leave for checks.
            share: Of the rest, what the search may use.
            centre: Where to look first.
            scale: Width to look at.
            report: Receives the name of each phase.
        """
        config, plan = self.config, self.plan(reserve=reserve, share=share)
        free = self._free(reserve, share)
        phase = lambda text: report(f"search: {text}")  # noqa: E731
        if self.contexts is not None:
            rows = min(config.bank_contexts, max(1, plan.bank // 128))
            bank = conditional_bank(
                self.problem, plan, rows, self.generator, centre=centre, scale=scale, report=phase
            )
            self.adopt(self._helped(bank, reserve, report))
            return
        if isinstance(self.coordinates, MeanFree):
            plan = dataclasses.replace(plan, least=_LEAST_OF_PARTICLES)
        relaxing = 0
        if isinstance(self.coordinates, MeanFree) and self.coordinates.reduced > FEW_DIMENSIONS:
            relaxing = int(_RELAXING * plan.chains)
            relaxing = relaxing if plan.chains - relaxing >= LEAST_EVALUATIONS else 0
            chains = plan.chains - relaxing
            plan = dataclasses.replace(plan, chains=chains, total=plan.total - relaxing)
        budget = self.energy.budget
        if free is not None:  # what is reserved for checks is out of reach
            self.energy.budget = self.energy.evaluations + max(free, 2 * LEAST_EVALUATIONS)
        try:
            found = explore_problem(
                self.problem,
                plan,
                self.generator,
                centre=centre,
                scale=scale,
                sources=self.sources,
                report=phase,
            )
        finally:
            self.energy.budget = budget
        self.seen, bank = found.record(self.coordinates), found.bank
        if self.energy.remaining is not None:
            relaxing = min(relaxing, self.energy.remaining - reserve)
        if relaxing > 0 and bank.method == "chains":
            report("search: particles come to rest")
            bank = self._relaxed(bank, relaxing)
        self.adopt(self._helped(bank, reserve, report))

    def plan(self, *, reserve: int, share: float) -> Plan:
        """What :meth:`find` will do, for the same arguments."""
        config = self.config
        return Plan.within(
            self.coordinates.reduced,
            evaluations=config.search_evaluations,
            bank=config.bank_size,
            chains=config.chain_evaluations,
            ess=config.bank_ess,
            starts=config.search_starts,
            slope_cost=self._slope_cost(),
            free=self._free(reserve, share),
        )

    def _free(self, reserve: int, share: float) -> int | None:
        """Evaluations of a budget that the search may use; None without one."""
        remaining = self.energy.remaining
        return None if remaining is None else int(share * max(256, remaining - reserve))

    def _slope_cost(self) -> int:
        """Evaluations of an energy with its gradient, tried at the origin."""
        if self.contexts is not None or isinstance(self.coordinates, MeanFree):
            return 1
        origin = torch.zeros(
            2, self.coordinates.reduced, dtype=torch.float64, device=self.generator.device
        )
        return self.problem.slope_cost(origin)

    def _relaxed(self, bank: Bank, evaluations: int) -> Bank:
        """What chains that move by themselves visit, begun where the population of a bank ended.

        Differences of two configurations, by which a population moves, say little to particles.
        Without gradients the chains are random walks. The bank stays where the evaluations are
        but a few steps.
        """
        start = bank.points[0][-2 * _WALKERS :]
        order = torch.randperm(len(start), generator=self.generator, device=start.device)
        start = start[order[:_WALKERS]]
        x = self.coordinates.inside(self.coordinates.forward(start[:2])[0], self.energy.dtype)
        works = self.gradients not in {"none", "differences"}
        works = works and differentiable(self.energy, x, "search")
        leapfrog = max(1, min(_LEAPFROG, evaluations // (2 * _WALKERS * _MOVES)))
        steps = evaluations // (_WALKERS * (2 * leapfrog if works else 1))
        if steps < 40:
            return bank
        before = self.energy.evaluations
        walked = run_mcmc(
            self.problem.potential,
            start,
            method="hmc" if works else "rw",
            num_leapfrog=leapfrog,
            evaluations=evaluations,
            num_samples=min(_POINTS, steps // 2 * len(start)),
            warm_up=0.4,
            generator=self.generator,
        )
        # The meter saw values; a gradient counts as one more.
        seen = self.energy.evaluations - before
        self.energy.counts["search"] += walked.evaluations - seen
        return Bank.of_samples(walked.samples, method="chains", log_z=bank.log_z)

    def adopt(self, bank: Bank) -> None:
        """Make a bank the source of batches."""
        self.bank = bank
        self.affine = self._affine(bank)
        points = self.affine.inverse(bank.points).float()
        self._points = points.reshape(-1, points.shape[-1])
        self._columns = points.shape[1]
        log_weight = bank.log_weight - torch.logsumexp(bank.log_weight, -1, keepdim=True)
        self._cumulative = cumulative_weight(self._points, log_weight.reshape(-1))
        self.context = None if bank.context is None else bank.context.float()
        if self.context is None and not isinstance(self.coordinates, MeanFree):
            drawn = log_weight.reshape(-1) >= math.log(_HARDLY_DRAWN / len(self._points))
            self.radius = float(self._points[drawn].norm(dim=-1).max())
        self._gradient: Tensor | None = None
        self.jacobian_below = 0.0
        if bank.gradient is None:
            return
        gradient = bank.gradient @ self.affine.scale_tril.to(bank.gradient)
        gradient = gradient.reshape(self._points.shape).float()
        known = ~gradient.isnan().any(-1, keepdim=True)
        weight = torch.softmax(log_weight.reshape(-1), 0).float().unsqueeze(-1) * known
        stiffness = (weight * gradient.nan_to_num().square()).sum(0) / weight.sum()
        if isinstance(self.coordinates, MeanFree):  # no direction is another than the rest
            stiffness = stiffness.mean().expand_as(stiffness)
            # Nor do stiff directions stay where they are: only the Jacobian knows them.
            self.jacobian_below = math.sqrt(_NEARLY_NORMAL / float(stiffness[0]))
        self._gradient = gradient.nan_to_num()
        self._stiffness = torch.where(known, stiffness, torch.inf)

    def batch(self, levels: int, points: int) -> Batch:
        """Clean points by weight, levels times points of them in no order."""
        n = levels * points
        index = stratified_indices(self._cumulative, n, self.generator)
        # Stratified draws come sorted; so do the noise levels. Shuffle one of them.
        order = torch.randperm(n, device=index.device, generator=self.generator)
        index = index[order].view(levels, points)
        gradient = stiffness = None
        if self._gradient is not None:
            gradient, stiffness = self._gradient[index], self._stiffness[index]
        context = None if self.context is None else self.context[index // self._columns]
        return Batch(self._points[index], gradient, stiffness, context)

    def enlarge(self, reserve: int, report: Report) -> bool:
        """With budget left that the bank could use, make it larger; whether it was."""
        bank, left = self.bank, self.energy.remaining
        if bank is None or bank.density is None or left is None or bank.context is not None:
            return False
        more = min(self.config.bank_size - bank.points.shape[1], left - reserve)
        if more < 0.5 * bank.points.shape[1]:
            return False
        report("search: larger bank")
        self.adopt(bank.extended(more, self.problem.potential, self.generator))
        return True

    def renew(self, sampler: EnergySampler, ess: float, reserve: int, report: Report) -> bool:
        r"""A bank of chains gives way to the sampler's draws, if they serve; whether it did.

        A step of mirror descent (13) from the law :math:`\pi` of the sampler to
        :math:`\pi (e^{-E} / \pi)^\beta`, with exact weights, those of paths. They are resampled
        away. Beta is 1, or in few dimensions less where too few draws would be left.

        Arguments:
            sampler: The sampler, its generator at a seed.
            ess: Share of the effective sample size at its check.
            reserve: Evaluations of the budget to leave.
            report: Receives the name of the phase.
        """
        bank, draws, points = self.bank, self.config.round_draws, _POINTS
        if bank is None or bank.method not in {"chains", "paths"}:
            return False
        few = self.coordinates.reduced <= FEW_DIMENSIONS
        if few:  # no gradients help: more points do
            draws, points = 2 * draws, 4 * points
        if self.energy.remaining is not None:
            draws = min(draws, (self.energy.remaining - reserve) // 2)
        # Paths of twice as many steps are worth several times what densities or a check say.
        if not ess * draws >= (0.1 if few else 1) * _LEAST_EFFECTIVE:
            return False
        report("renewed bank")
        found = sampler.weighted_draws(
            draws,
            energy=self.energy,
            paths=True,
            num_steps=8 * sampler.num_steps,
            purpose="rounds",
        )
        log_weight = found.log_weight.double()
        # In few dimensions a part of the step (13) does, as far as the weights bear it.
        beta = next_beta(-log_weight, 0.0, _LEAST_EFFECTIVE) if few else 1.0
        if beta < 0.5 or (beta == 1 and found.ess < _LEAST_EFFECTIVE):
            return False
        tilted = beta * log_weight
        index = stratified_indices(
            cumulative_weight(found.x, tilted), min(points, draws), self.generator
        )
        index = index[torch.randperm(len(index), generator=self.generator, device=index.device)]
        renewed = Bank.of_samples(
            self.coordinates.inverse(found.x[index].double()),
            method="paths",
            log_z=float(torch.logsumexp(log_weight, 0)) - math.log(draws),
            log_z_se=math.sqrt(max(0.0, 1 / found.ess - 1 / draws)),
            ess=float(effective_sample_size(tilted)),
        )
        renewed.loc, renewed.scale_tril = bank.loc, bank.scale_tril  # the network's coordinates
        # Gradients are of the target: they say nothing of a law between it and the sampler's.
        self.adopt(self._helped(renewed, reserve, report) if beta == 1 else renewed)
        return True

    def _helped(self, bank: Bank, reserve: int, report: Report) -> Bank:
        """The bank with gradients at its points, if it needs them and may have them."""
        method = self.gradients
        # In few dimensions a bank has points enough to do without.
        many = self.coordinates.reduced > FEW_DIMENSIONS or isinstance(self.coordinates, MeanFree)
        wanted = method != "none" and (many or method != "auto")
        if not wanted or bank.context is not None or bank.method == "samples":
            return bank
        report("gradients")
        affine = self._affine(bank)
        z = affine.inverse(bank.points[0])
        if bank.method == "bank" and len(z) > 2 * _POINTS:
            return bank  # draws without end: more than half of them would have no gradient
        # Chosen at random: were it by weight, or by anything else that depends on the point,
        # delta would not have mean zero among those that have a gradient.
        seen = torch.randperm(len(z), generator=self.generator, device=z.device)
        seen = seen[:_POINTS].sort().values

        def to_x(z: Tensor) -> tuple[Tensor, Tensor]:
            return self.coordinates.forward(affine.forward(z))

        left = self.energy.remaining
        if method == "auto":
            some = self.coordinates.inside(to_x(z[:2])[0], self.energy.dtype)
            works = differentiable(self.energy, some, "gradients")
            method = "autograd" if works else "differences"
            if left is None and not works:
                left = reserve + 2 * self.config.chain_evaluations
        count = len(seen) if method == "autograd" else min(len(seen), _POINTS // 4)
        if left is not None:
            cost = 2 if method == "autograd" else 2 * z.shape[-1]
            count = min(count, max(0, left - reserve) // (2 * cost))
        if count < min(len(seen), _LEAST_HELPED):
            return bank
        chosen = seen[torch.arange(count, device=z.device) * len(seen) // count]
        if method == "autograd":
            found = autograd_gradient(
                self.energy, to_x, z[chosen], purpose="gradients", inside=self.coordinates.inside
            )
        else:
            found = difference_gradient(
                lambda z: self.problem.potential(affine.forward(z), purpose="gradients"), z[chosen]
            )
        if not virial_holds(z[chosen], found, torch.softmax(bank.log_weight[0][chosen], 0)):
            return bank
        gradient = torch.full_like(bank.points[0], torch.nan)
        gradient[chosen] = torch.linalg.solve_triangular(
            affine.scale_tril.to(found), found, upper=False, left=False
        )
        return dataclasses.replace(bank, gradient=gradient[None])

    def _affine(self, bank: Bank) -> Affine:
        affine = Affine(bank.loc, bank.scale_tril)
        # What has no direction keeps none.
        return affine.isotropic() if isinstance(self.coordinates, MeanFree) else affine
