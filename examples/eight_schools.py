"""A NumPyro model, sampled from its log-density alone, and looked at with ArviZ.

    pip install -c constraints.txt -e '.[numpyro,arviz]'
    python examples/eight_schools.py

Eight schools gave extra coaching; each measured its effect with a known error (Rubin, 1981). How
much do the effects differ? The spread tau of the effects is barely known, and where it is small
all effects are one: a funnel. So the model speaks of each school's deviation in units of tau, as
one does for chains too. The draws are independent, and come with the model's evidence. Expected
(a few minutes, one CPU core):

    verdict       trustworthy
    ESS           7906 of n = 8192 (96.5%)
    log Z         -31.3139 ± 0.0021
                mean     sd
    mean       4.441  3.308
    tau        3.553  3.117
    effect[0]  6.318  5.581

With effects drawn about their mean instead (the funnel) the verdict is "NOT trustworthy", with an
effective sample of 5 %. The figure is ``out/eight_schools.png``.
"""

import sys

import arviz
import numpy as np
import numpyro
from numpyro import distributions as dist

import energies
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.plotting import new_figure, save_figure

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SMOKE = TrainerConfig(
    search_evaluations=6000, bank_size=4000, steps_per_cycle=50, max_cycles=1, width=16
)


def model(effects: np.ndarray, errors: np.ndarray) -> None:
    """Effects vary about their mean by tau."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(effects)):
        deviation = numpyro.sample("deviation", dist.Normal(0, 1))
        effect = numpyro.deterministic("effect", mean + tau * deviation)
        numpyro.sample("measured", dist.Normal(effect, errors), obs=effects)


smoke = "--smoke" in sys.argv
energy = energies.from_numpyro(model, EFFECTS, ERRORS)
trainer = EnergyDiffusionTrainer(energy, energy.dim, seed=0, config=SMOKE if smoke else None)
sampler = trainer.fit()
print(sampler.diagnose(200 if smoke else 8192))
draws = sampler.weighted_draws(200 if smoke else 8192)
data = draws.to_arviz(energy.constrain, resampled=100 if smoke else 4000)
print(arviz.summary(data, var_names=["mean", "tau", "effect"], kind="stats"))

effect, tau = data.posterior["effect"].values[0], data.posterior["tau"].values[0]
figure, (left, right) = new_figure(1, 2)
left.scatter(effect[:, 0], tau, s=2, alpha=0.4)
left.set(xlabel="effect of the first school", ylabel="tau", yscale="log")
low, middle, high = np.quantile(effect, [0.05, 0.5, 0.95], axis=0)
place = np.arange(len(EFFECTS))
right.errorbar(place - 0.1, EFFECTS, 1.64 * ERRORS, fmt="o", color="0.6", label="measured, 90 %")
right.errorbar(
    place + 0.1, middle, [middle - low, high - middle], fmt="o", label="posterior, 90 %"
)
right.set(xlabel="school", ylabel="effect")
right.legend(fontsize=8)
print(save_figure(figure, "out/eight_schools.png"))
