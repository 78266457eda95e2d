r"""Peers of the trainer: other ways from an energy to samples, over the same parts.

========================= ============================================= ====================
:func:`idem`              a denoiser fitted to gradients of the energy  gradients
:func:`fab`               a spline flow fitted to annealed samples      gradients
:func:`ddpm`              a denoiser fitted to samples, loss (9)        samples, or values
:func:`langevin`          annealed Langevin dynamics, or the naive one  gradients
========================= ============================================= ====================

Metropolis-adjusted Langevin, Hamiltonian Monte Carlo and parallel tempering are among the
methods of :func:`rsm_sampler.montecarlo.run.run_mcmc`.

Each function takes an energy and the dimension of a point, spends ``evaluations`` of the energy
and returns a :class:`Baseline`: an object with ``sample(n)``, with ``counts`` of evaluations by
purpose, and with the ``history`` of its training. All evaluations are counted by
:class:`~rsm_sampler.target.energy.MeteredEnergy`, one for a value and one more for its gradient;
an energy that is such a meter is counted on it.

    >>> def energy(x):
    ...     return x.square().sum(-1) / 2
    >>> sampler = langevin(energy, 2, num_steps=20, seed=0)
    >>> sampler.sample(5).shape, sampler.counts
    (torch.Size([5, 2]), {'mcmc': 210})
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rsm_sampler.baselines.annealed_langevin import ChainSampler, langevin
from rsm_sampler.baselines.denoising_diffusion import ddpm
from rsm_sampler.baselines.denoising_energy_matching import (
    IDEMConfig,
    IDEMSampler,
    idem,
    idem_score,
)
from rsm_sampler.baselines.flow_bootstrap import FABConfig, FlowSampler, fab, fab_loss

__all__ = [
    "Baseline",
    "ChainSampler",
    "FABConfig",
    "FlowSampler",
    "IDEMConfig",
    "IDEMSampler",
    "ddpm",
    "fab",
    "fab_loss",
    "idem",
    "idem_score",
    "langevin",
]


@runtime_checkable
class Baseline(Protocol):
    """What every function here returns.

    Attributes:
        counts: Energy evaluations so far, by purpose.
        history: Records of the training, oldest first; empty without any.
    """

    counts: dict[str, int]
    history: list[dict[str, float]]

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws, (n, dim), from the given generator or from one of its own."""
        ...
