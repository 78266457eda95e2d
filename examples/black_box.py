r"""An expensive black box: NumPy code for one point at a time, and 10,000 evaluations for all.

Two substances decay, and the sum of what is left is measured twelve times. The logarithms of the
two rates have a normal prior. Nothing says which substance is which, so the posterior has two
mirrored modes of equal weight: a fast and a slow rate, in either order. Search, training and
checks together stay within the budget; the verdict, whose witness must not know what training
saw, costs some thousand more. Beside it stands parallel tempering with as many evaluations.
Expected (a minute, two CPU cores):

    exact               slow rate first 0.501 (exact 0.500)   sorted means -0.682, 1.058
    learned             slow rate first 0.488 (exact 0.500)   sorted means -0.683, 1.056
    parallel tempering  slow rate first 0.510 (exact 0.500)   sorted means -0.684, 1.074
    evaluations         9,500 of 10,000: {'search': 9250, 'check': 250}
    floor of the share  0.004
    verdict       trustworthy

The floor is the standard error of as many exact draws; that of the 9,250 weighted points behind
the learned share is 0.011. The figure is ``out/black_box.png``.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import energies
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.montecarlo.run import run_mcmc
from rsm_sampler.plotting import plot_panels, save_figure

TIMES = np.linspace(0.25, 3.0, 12)
MEASURED = np.array(
    [1.361, 0.995, 0.825, 0.662, 0.532, 0.502, 0.487, 0.418, 0.291, 0.224, 0.222, 0.225]
)
SMOKE = TrainerConfig(steps_per_cycle=50, max_cycles=1, width=16, num_steps=8)
BUDGET = 10_000


def energy(theta):
    """Minus the log-posterior of one parameter vector, up to a constant."""
    with np.errstate(over="ignore"):  # the search looks far away first, where a rate overflows
        fitted = np.exp(-np.exp(theta[0]) * TIMES) + np.exp(-np.exp(theta[1]) * TIMES)
    return 0.5 * np.sum(((MEASURED - fitted) / 0.05) ** 2) + 0.5 * np.sum(theta**2)


smoke = "--smoke" in sys.argv
black_box = energies.from_numpy(energy, vectorized=False)
trainer = EnergyDiffusionTrainer(
    black_box, dim=2, budget=BUDGET, seed=0, config=SMOKE if smoke else None
)
sampler = trainer.fit()
n = 1000 if smoke else 20_000
target = energies.DecayPosterior()  # the same posterior, with everything known
generator = torch.Generator().manual_seed(1)
chains = run_mcmc(
    black_box,
    torch.randn(16, 2, generator=generator),  # from the prior
    evaluations=BUDGET,
    num_samples=500,
    generator=generator,
)
panels = {
    "exact": target.sample(n, generator=generator),
    "learned": sampler.sample(n),
    "parallel tempering": chains.samples,
}
for name, x in panels.items():
    first = float((x[:, 0] < x[:, 1]).double().mean())
    means = ", ".join(f"{v:.3f}" for v in x.sort(-1).values.mean(0).tolist())
    print(f"{name:<20}slow rate first {first:.3f} (exact 0.500)   sorted means {means}")
diagnosis = sampler.diagnose(200 if smoke else 8192)
print(f"evaluations         {trainer.evaluations:,} of {BUDGET:,}: {trainer.energy.counts}")
print(f"floor of the share  {(0.25 / n) ** 0.5:.3f}")
print(f"exact log Z         {target.log_z:.3f}")
print(diagnosis)  # its evaluations come on top

axes = plot_panels(panels, extent=(-1.8, 2.4), energy=target, kind="scatter")
print(save_figure(axes[0], Path("out/black_box.png")))
