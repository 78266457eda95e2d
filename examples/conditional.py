r"""One sampler for every observation: a conditional energy :math:`E(x, c)`.

The prior is a grid of nine unequal modes, and c is a noisy look at the first coordinate. The
posterior of each c is known, and which of its modes are alive depends on c. One network learns
all of them at once, from energies of contexts drawn at random; then any c is one call. Expected
(a minute, two CPU cores):

    c = -4.0   modes alive 3   TV 0.0063   floor 0.0038
    c = -2.0   modes alive 6   TV 0.0404   floor 0.0061
    c =  0.5   modes alive 3   TV 0.0282   floor 0.0039
    c =  4.0   modes alive 3   TV 0.0085   floor 0.0037
    one training, 386,176 evaluations, any number of contexts

TV is the total variation of the mode weights, the floor what as many exact draws score on
average. The figure is ``out/conditional.png``: exact draws above, learned ones below.
"""

import sys
from pathlib import Path

import torch

from energies import ConditionalMixture
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.metrics import mode_weight_total_variation, total_variation_floor
from rsm_sampler.plotting import plot_panels, save_figure

SMOKE = TrainerConfig(
    search_evaluations=8000,
    bank_size=16_000,
    bank_contexts=64,
    steps_per_cycle=50,
    max_cycles=1,
    width=16,
    check_draws=64,
    num_steps=8,
)

smoke = "--smoke" in sys.argv
task = ConditionalMixture.plane()
trainer = EnergyDiffusionTrainer(
    task,
    dim=2,
    context_dim=1,
    context=task.sample_context,
    seed=0,
    config=SMOKE if smoke else TrainerConfig(max_cycles=2),
)
sampler = trainer.fit()
n = 1000 if smoke else 20_000
generator = torch.Generator().manual_seed(1)
exact, learned = {}, {}
for c in (-4.0, -2.0, 0.5, 4.0):
    context = torch.tensor([c])
    posterior = task.posterior(context)
    exact[f"exact, c = {c:g}"] = posterior.sample(n, generator=generator)
    learned[f"learned, c = {c:g}"] = x = sampler.sample(n, context=context)
    share = posterior.responsibilities(x.double())
    tv = float(mode_weight_total_variation(share, posterior.mode_weights))
    floor = float(total_variation_floor(posterior.mode_weights, n))
    alive = int((posterior.mode_weights > 0.01).sum())
    print(f"c = {c:4.1f}   modes alive {alive}   TV {tv:.4f}   floor {floor:.4f}")
print(f"one training, {trainer.evaluations:,} evaluations, any number of contexts")

axes = plot_panels(exact | learned, extent=(-6.5, 6.5), columns=4, size=2.3)
print(save_figure(axes[0], Path("out/conditional.png")))
