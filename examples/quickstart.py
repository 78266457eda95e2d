r"""Four wells: from an energy to samples, log Z and a verdict.

.. math:: E(x) = \tfrac18 \sum_{i=1}^2 (x_i^2 - 4)^2

By symmetry every quadrant holds a quarter of the mass, and log Z is twice that of one coordinate,
a sum over a fine line. Expected (half a minute, two CPU cores):

    shares of the wells 0.2523 0.2497 0.2489 0.2491 (0.25 ± 0.0014)
    exact log Z   2.0748
    verdict       trustworthy
    ESS           8131 of n = 8192 (99.3%)
    log Z         2.0758 ± 0.0010

and the details of the verdict. The figure is ``out/quickstart.png``: samples with contours of the
energy, the first coordinate against its exact law, and the importance weights.
"""

import sys
from pathlib import Path

import torch

from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.plotting import (
    new_figure,
    plot_marginal,
    plot_samples,
    plot_weights,
    save_figure,
)

SMOKE = TrainerConfig(
    search_evaluations=4000,
    bank_size=4000,
    steps_per_cycle=50,
    max_cycles=1,
    width=16,
    check_draws=64,
    num_steps=8,
)


def energy(x):
    """Points (n, 2) to values (n)."""
    return ((x**2 - 4) ** 2).sum(-1) / 8


smoke = "--smoke" in sys.argv
trainer = EnergyDiffusionTrainer(energy, dim=2, seed=0, config=SMOKE if smoke else None)
sampler = trainer.fit()
x = sampler.sample(1000 if smoke else 100_000)
line = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
one = -energy(line[:, None])  # minus the energy of one coordinate
exact_log_z = 2 * float(torch.logsumexp(one, 0) + (line[1] - line[0]).log())
below = torch.softmax(one, 0).cumsum(0)  # its distribution function
quadrant = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
shares = torch.bincount(quadrant, minlength=4) / len(x)
noise = (0.25 * 0.75 / len(x)) ** 0.5
print("shares of the wells", *(f"{share:.4f}" for share in shares), f"(0.25 ± {noise:.4f})")
print(f"exact log Z   {exact_log_z:.4f}")
diagnosis = sampler.diagnose(512 if smoke else 8192)
print(diagnosis)

_, axes = new_figure(1, 3)
plot_samples(x, energy=energy, extent=(-4, 4), ax=axes[0])
plot_marginal(x, exact=lambda e: below[torch.searchsorted(line, e).clamp(max=10_000)], ax=axes[1])
plot_weights(sampler.weighted_draws(512 if smoke else 4096).log_weight, ax=axes[2])
print(save_figure(axes[0], Path("out/quickstart.png")))
