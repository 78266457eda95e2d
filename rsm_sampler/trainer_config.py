"""What decides a training run but the energy: one frozen object, checked when it is made."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.bank.plan import FEW_DIMENSIONS
from rsm_sampler.energy_sampler import EXACT_DENSITY

__all__ = ["Sizes", "TrainerConfig"]

_PAIRS = 24_000  # of particles, in a batch or a check


@dataclass(frozen=True)
class Sizes:
    """What a :class:`TrainerConfig` may leave open, chosen: its attributes of the same names."""

    steps_per_cycle: int
    max_cycles: int
    batch_size: int
    check_draws: int
    width: int
    depth: int
    harmonics: int


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train; what is None the trainer chooses by dimension and symmetry.

    Attributes:
        search_evaluations: Energy evaluations of the search before the bank, without a budget.
        bank_size: Most energy evaluations of the bank, without a budget.
        bank_ess: Effective points of the bank that are enough.
        search_starts: Most independent starts of the search for basins.
        chain_evaluations: Energy evaluations of the chains that take the bank's place in high
            dimensions, without a budget. Before, looking for basins takes a third as many; by
            values alone and beyond twelve dimensions d / 5 times as much, at most twenty times.
        round_draws: Draws, and energy evaluations, of a round of mirror descent.
        bank_contexts: Number of contexts in the bank of a conditional energy: half of them as they
            are drawn, half the most scattered of 32 times as many draws.
        steps_per_cycle: Optimiser steps of the first cycle; each later one has half as many again.
            With gradients at the points of the bank half of that does, and beyond sixteen
            dimensions but for particles or with contexts. If None 4,000, and 6,000 for particles
            beyond sixteen dimensions.
        max_cycles: Most cycles; 3, and 1 for particles beyond sixteen dimensions, if None.
        max_epochs: Most passes over the bank, counted by its effective size; more would learn its
            points by heart.
        batch_size: Noisy points per step. If None 1,024; of particles fewer where these have more
            than 24,000 pairs, but at least 32.
        learning_rate: Peak learning rate of Adam; it falls to zero over each cycle.
        target_ess: Share of equally weighted draws at which training has converged. With contexts
            the least of 64 is judged, and at most two fifths of that loss is allowed: a share e
            bounds the total variation by half the root of 1/e - 1, 0.06 for 0.985, 0.04 for 0.994.
        check_draws: Draws (and energy evaluations) of a check. If None 8,192; of particles 1,024,
            and fewer where they have more than 24,000 pairs, but at least 16.
        sigma_min: Lowest noise level, in units of the target's width.
        sigma_max: Highest noise level, in the same units.
        num_steps: Noise levels of the sampler.
        width: Units per hidden layer; 128, 192 beyond twelve dimensions, and 64 for particles, if
            None.
        depth: Hidden layers; 3, and 4 rounds of messages for particles, if None.
        frequencies: Fourier features.
        bandwidth: Their bandwidth.
        harmonics: Waves of every coordinate; none up to twelve dimensions and 4 beyond, if None.
        num_draws: K of loss (14).
        reference_scale: Scale of the Gaussian reference of loss (14)'s kernel, in the target's
            widths.
        compile: Whether the network is compiled for training (:func:`torch.compile`): steps of
            particles take half the time, but the first one a minute. It needs a C++ compiler.
    """

    search_evaluations: int = 120_000
    bank_size: int = 250_000
    bank_ess: float = 100_000.0
    search_starts: int = 384
    chain_evaluations: int = 1_000_000
    round_draws: int = 65_536
    bank_contexts: int = 1024
    steps_per_cycle: int | None = None
    max_cycles: int | None = None
    max_epochs: int = 1000
    batch_size: int | None = None
    learning_rate: float = 4e-3
    target_ess: float = 0.985
    check_draws: int | None = None
    sigma_min: float = 0.004
    sigma_max: float = 20.0
    num_steps: int = 40
    width: int | None = None
    depth: int | None = None
    frequencies: int = 32
    bandwidth: float = 2.0
    harmonics: int | None = None
    num_draws: int = 128
    reference_scale: float = 2.5
    compile: bool = False

    def __post_init__(self) -> None:
        for name in (
            "search_evaluations",
            "bank_size",
            "bank_ess",
            "search_starts",
            "chain_evaluations",
            "round_draws",
            "bank_contexts",
            "steps_per_cycle",
            "max_cycles",
            "max_epochs",
            "batch_size",
            "check_draws",
            "num_steps",
            "width",
            "depth",
            "num_draws",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "sigma_min", "reference_scale", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.sigma_max > self.sigma_min:
            raise ValueError(
                f"sigma_max must be above sigma_min {self.sigma_min}, got {self.sigma_max}"
            )
        if not 0 < self.target_ess <= 1:
            raise ValueError(f"target_ess must be in (0, 1], got {self.target_ess}")

    def sizes(self, dim: int, particles: tuple[int, int] | None = None) -> Sizes:
        """The sizes, those left open chosen.

        A step of particles works on all pairs of them: where these are many a smaller batch for
        more steps learns more in the same time, where they are few it does not.

        Arguments:
            dim: Length of a point.
            particles: ``(n, s)`` for n particles in s dimensions.

        Returns:
            Those of this configuration, and for each that is None the trainer's choice.
        """
        few = dim <= FEW_DIMENSIONS
        steps, cycles, batch, check = 4000, 3, 1024, 8192
        width, depth, harmonics = (128 if few else 192), 3, (0 if few else 4)
        if particles is not None:
            n, s = particles
            width, depth = 64, 4
            worth = 2 ** int(math.log2(max(1.0, 2 * _PAIRS / max(1, n * (n - 1)))))
            batch, check = min(1024, max(32, worth)), min(1024, max(16, worth))
            if (n - 1) * s > EXACT_DENSITY:
                steps, cycles = 6000, 1
        return Sizes(
            steps_per_cycle=self.steps_per_cycle or steps,
            max_cycles=self.max_cycles or cycles,
            batch_size=self.batch_size or batch,
            check_draws=self.check_draws or check,
            width=self.width or width,
            depth=self.depth or depth,
            harmonics=harmonics if self.harmonics is None else self.harmonics,
        )

    def noise_levels(self, size: int = 512) -> Float[Tensor, " size"]:
        r"""Quantiles of the training law of log sigma.

        The divergence between model and target gathers
        :math:`\mathbb E\|\Delta F\|^2 / (1 + \sigma^2)` per unit of log sigma, where F is the
        network's output, so levels above the target's width matter less and are drawn less often.

        Arguments:
            size: Number of quantiles.
        """
        grid = torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), 4096)
        density = 0.1 + (1 + grid.exp().square()).rsqrt()
        mass = torch.cat([torch.zeros(1), (0.5 * (density[1:] + density[:-1])).cumsum(0)])
        place = torch.searchsorted(mass / mass[-1], torch.linspace(0, 1, size)).clamp(max=4095)
        return grid[place]
