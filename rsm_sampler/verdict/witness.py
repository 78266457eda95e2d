r"""An estimate of the target that owes nothing to training.

What a sampler never saw it cannot report. The witness looks for itself: importance sampling from
a **broad bank** of points, around the sampler's draws but also far beyond their reach, and around
the ends of Metropolis chains that cooled down from far outside; or **parallel tempering**, from a
reference twice as wide as the target, where the bank's points are too few to say anything. It
estimates log Z and the masses of regions: 24 nearest-centre cells over the points of both, and the
clusters that neighbours among them form.

Everything happens in coordinates z, in which the target has about width one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.densities import KernelDensity, StudentT
from rsm_sampler.montecarlo.run import run_mcmc
from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices

__all__ = ["Witness", "find_witness"]

MASS_TOLERANCE = 0.015  # of a region
SIGNIFICANT = 4.0  # standard errors
_CELLS = 24


@dataclass(frozen=True)
class Witness:
    """An estimate of the target that owes nothing to the training.

    Attributes:
        method: ``"broad bank"`` or ``"parallel tempering"``.
        evaluations: Energy evaluations it took.
        ess: Its effective sample size.
        log_z: Its estimate of log Z.
        log_z_se: The standard error of it.
        masses: Its masses of the regions: cells, and clusters of cells.
        masses_se: Their standard errors.
        reach: Radius within which half of its points lie, in widths of the sampler's target.
    """

    method: str
    evaluations: int
    ess: float
    log_z: float
    log_z_se: float
    masses: Tensor
    masses_se: Tensor
    reach: float

    @property
    def conclusive(self) -> bool:
        """Whether it can confirm anything: a tenth of the mass in the wrong place would show."""
        return self.ess >= 300 and self.log_z_se <= 0.04 and float(self.masses_se.amax()) <= 0.02

    @property
    def resolution(self) -> float:
        """The smallest error of a region's mass that the comparison is sure to find."""
        return MASS_TOLERANCE + 2 * SIGNIFICANT * float(self.masses_se.amax())


def find_witness(
    energy: Callable[[Tensor], Tensor],
    z: Float[Tensor, "n dim"],
    evaluations: int,
    generator: torch.Generator,
) -> tuple[Witness, Float[Tensor, " regions"]]:
    """The witness, and the sampler's own masses of the same regions.

    Arguments:
        energy: Energy of points (n, dim) in these coordinates.
        z: The sampler's draws.
        evaluations: Energy evaluations of the broad bank; parallel tempering gets eight times as
            many, in three dimensions or more and from 20,000 on.
        generator: Source of randomness, on the device of z.
    """
    search = _Search(energy, evaluations, generator)
    found = search.broad_bank(z)
    if found[0].conclusive or evaluations < 20_000 or z.shape[-1] < 3:
        return found
    return search.tempering(z) or found


class _Search:
    def __init__(
        self, energy: Callable[[Tensor], Tensor], evaluations: int, generator: torch.Generator
    ) -> None:
        self.energy, self.evaluations, self.generator = energy, evaluations, generator

    def broad_bank(self, z: Tensor) -> tuple[Witness, Tensor]:
        """Importance sampling from kernels around the draws and two wide laws.

        Where there are enough evaluations for it, a quarter of them goes to scouts first. Chains
        that cool down from far outside end in modes, whether or not the draws know them; a first
        round weighs what they found. Estimates use the last round alone.
        """
        evaluations, scouts = self.evaluations, 0
        centres = z[:800]
        if evaluations >= 10_000:
            scouts = evaluations // 8
            found = self._descents(z.shape[-1], z, scouts)
            points, log_weight = self._round(torch.cat([z[:500], found]), scouts, neighbours=3)
            centres = torch.cat([z[:500], found])
            if bool(log_weight.isfinite().any()):
                cumulative = cumulative_weight(points, log_weight)
                index = stratified_indices(cumulative, 500, self.generator)
                centres = torch.cat([z[:500], points[index]])
        points, log_weight = self._round(centres, evaluations - 2 * scouts)
        weight = torch.softmax(log_weight, 0).nan_to_num(0.0)
        log_z = float(torch.logsumexp(log_weight, 0)) - math.log(len(points))
        ess, log_z_se = 0.0, math.inf
        if bool(log_weight.isfinite().any()):
            ess = float(1 / weight.square().sum())
            log_z_se = math.sqrt(max(1 / ess - 1 / len(points), 0.0))
            index = stratified_indices(cumulative_weight(points, log_weight), 4096, self.generator)
            cells = _cells(torch.cat([z[:4096], points[index]]), self.generator)
        else:
            cells = z[:1]
        regions = _regions(cells)
        inside = regions[_nearest(points, cells)]
        masses = weight @ inside
        # Delta method for a ratio of weighted means.
        se = (weight.square() @ (inside - masses).square()).sqrt()
        reach = float(points.square().sum(-1).sqrt().median())
        witness = Witness(
            "broad bank",
            evaluations,
            ess,
            log_z,
            log_z_se,
            masses,
            se,
            reach,
        )
        return witness, regions[_nearest(z, cells)].mean(0)

    def _descents(self, dim: int, like: Tensor, evaluations: int) -> Tensor:
        """Ends of Metropolis chains that start far outside and cool down to temperature 1."""
        steps = 32
        number = evaluations // steps
        eye = torch.eye(dim, dtype=like.dtype, device=like.device)
        x = StudentT(torch.zeros_like(eye[0]), 4.0 * eye).sample(number, self.generator)
        energy = self.energy(x)
        for k in range(1, steps):
            beta = 0.02 ** (1 - k / (steps - 1))
            size = torch.rand(number, 1, dtype=x.dtype, device=x.device, generator=self.generator)
            noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)
            trial = x + 10 ** (0.4 - 1.6 * size) * noise
            trial_energy = self.energy(trial)
            u = torch.rand(number, dtype=x.dtype, device=x.device, generator=self.generator)
            # Infinite before and after: no move.
            accept = u.log() < beta * (energy - trial_energy)
            x = torch.where(accept[:, None], trial, x)
            energy = torch.where(accept, trial_energy, energy)
        return x[energy.isfinite()]

    def _round(self, centres: Tensor, size: int, neighbours: int = 8) -> tuple[Tensor, Tensor]:
        """Points around the centres and far beyond them, with their log-weights.

        The proposal has kernels at the centres, which follow any shape in few dimensions; heavy
        tailed laws with the moments of clusters of centres, which serve in more; two wide laws.
        """
        dim = centres.shape[-1]
        eye = torch.eye(dim, dtype=centres.dtype, device=centres.device)
        origin = torch.zeros(dim, dtype=centres.dtype, device=centres.device)
        distinct, copies = centres.unique(dim=0, return_counts=True)
        kernels = KernelDensity(
            distinct,
            copies.to(centres) / len(centres),
            StudentT(origin, 1.3 * eye),
            share=0.6,
            neighbours=neighbours,
        )
        parts: list[KernelDensity | StudentT] = [kernels, StudentT(origin, 4.0 * eye)]
        numbers = [size - size // 8 - size // 4, size // 8]
        label = _nearest(centres, _cells(centres, self.generator, 8))
        for k in label.unique():
            members = centres[label == k]
            numbers.append(size // 4 * len(members) // len(centres))
            centred = members - members.mean(0)
            covariance = centred.mT @ centred / len(members)
            diagonal = covariance.diagonal().clamp(min=1e-4).diag()
            few = dim / (dim + len(members))
            covariance = (1 - few) * covariance + few * diagonal + 1e-6 * diagonal
            parts.append(StudentT(members.mean(0), 1.2 * torch.linalg.cholesky(covariance)))
        pairs = list(zip(parts, numbers, strict=True))
        points = torch.cat([part.sample(number, self.generator) for part, number in pairs])
        log_q = torch.stack([part.log_prob(points) + math.log(max(number, 1e-300) / len(points))
                             for part, number in pairs]).logsumexp(0)  # fmt: skip
        return points, -self.energy(points) - log_q

    def tempering(self, z: Tensor) -> tuple[Witness, Tensor] | None:
        """Parallel tempering from a reference twice as wide as the target.

        None if neither the reference nor the draws have a point of finite energy to start from.
        """
        chains, levels = 48, 12
        evaluations = 8 * self.evaluations
        like: dict[str, Any] = {"dtype": z.dtype, "device": z.device, "generator": self.generator}
        start = 2.0 * torch.randn(chains, z.shape[-1], **like)
        finite = self.energy(start).isfinite()
        if not bool(finite.all()):
            known = z[:4096]
            known = known[self.energy(known).isfinite()]
            if len(known) == 0:
                return None
            drawn = known[torch.arange(len(start), device=z.device) % len(known)]
            start = torch.where(finite[:, None], start, drawn)
        result = run_mcmc(
            self.energy,
            start,
            evaluations=evaluations,
            generator=self.generator,
            num_levels=levels,
            reference_loc=0.0,
            reference_scale=2.0,
            num_samples=chains * 64,
        )
        assert result.log_z is not None and result.log_z_se is not None
        kept = result.chains  # (kept, chains, dim)
        flat = kept.reshape(-1, z.shape[-1])
        cells = _cells(torch.cat([z[:4096], flat]), self.generator)
        regions = _regions(cells)
        by_chain = regions[_nearest(flat, cells)].double()
        by_chain = by_chain.reshape(kept.shape[0], -1, len(regions.mT)).mean(0)
        masses = by_chain.mean(0)
        se = by_chain.std(0) / math.sqrt(len(by_chain))
        # Independent chains: the spread of their masses tells how many draws they are worth.
        binomial = masses * (1 - masses)
        worth = (binomial.sum() / se.square().sum().clamp(min=1e-12)).clamp(max=len(flat))
        reach = float(start.square().sum(-1).sqrt().median())
        witness = Witness(
            "parallel tempering",
            result.evaluations,
            float(worth),
            float(result.log_z),
            float(result.log_z_se),
            masses,
            se,
            reach,
        )
        return witness, regions[_nearest(z, cells)].mean(0)


def _cells(points: Tensor, generator: torch.Generator, most: int = _CELLS) -> Tensor:
    """Centres of nearest-centre cells: k-means from starts that are far apart."""
    centres = points[:1]
    for _ in range(min(most, len(points)) - 1):
        square = torch.cdist(points, centres).amin(-1).square()
        if not bool(square.sum() > 0):
            break
        pick = torch.multinomial(square / square.sum(), 1, generator=generator)
        centres = torch.cat([centres, points[pick]])
    for _ in range(10):
        member = torch.nn.functional.one_hot(_nearest(points, centres), len(centres)).to(points)
        count = member.sum(0)
        centres = torch.where(
            count[:, None] > 0, (member.mT @ points) / count.clamp(min=1)[:, None], centres
        )
    return centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([torch.cdist(piece, centres).argmin(-1) for piece in points.split(16_384)])


def _regions(cells: Tensor) -> Tensor:
    """Which regions each cell belongs to, (cells, regions): itself, and clusters of cells.

    The clusters are those of average linkage, down to the last two.
    """
    number = len(cells)
    apart = torch.cdist(cells, cells)
    clusters = list(torch.eye(number, dtype=cells.dtype, device=cells.device))
    regions = clusters.copy()
    while len(clusters) > 2:
        member = torch.stack(clusters)
        size = member.sum(-1)
        linkage = member @ apart @ member.mT / (size[:, None] * size)
        linkage.fill_diagonal_(torch.inf)
        i, j = sorted(divmod(int(linkage.argmin()), len(clusters)))
        second, first = clusters.pop(j), clusters.pop(i)
        clusters.append(first + second)
        regions.append(first + second)
    return torch.stack(regions, -1)
