"""A NumPyro model, sampled by its log-density alone, and looked at with ArviZ.

    pip install 'rsm-sampler[numpyro,arviz]'
    python examples/eight_schools.py            # out/eight_schools.png

Eight schools gave extra coaching; each measured its effect with a known error. How much do the
effects differ from one another? The spread tau of the effects is barely known, and where it is
small all effects are one: a funnel, which chains explore slowly. Here the posterior's draws are
independent, and come with the evidence of the model.
"""

import argparse
from pathlib import Path

import arviz
import numpy as np
import numpyro
import torch
from numpyro import distributions as dist

from energies import from_numpyro
from rsm_sampler import EnergyDiffusionTrainer
from rsm_sampler.plotting import new_figure, save_figure

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # Rubin (1981)
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effects: np.ndarray, errors: np.ndarray) -> None:
    """Effects vary about their mean by tau."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(effects)):
        effect = numpyro.sample("effect", dist.Normal(mean, tau))
        numpyro.sample("measured", dist.Normal(effect, errors), obs=effects)


def main() -> None:
    """Fit, diagnose, export, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    energy = from_numpyro(model, EFFECTS, ERRORS)
    sampler = EnergyDiffusionTrainer(energy, energy.dim, seed=0).fit()
    print(sampler.diagnose())
    data = sampler.weighted_draws(8192).to_arviz(energy.constrain, resampled=4000)
    print(arviz.summary(data, kind="stats"))

    posterior = data.posterior
    figure, (left, right) = new_figure(1, 2)
    left.scatter(
        posterior["effect"].values[0, :, 0], np.log(posterior["tau"].values[0]), s=2, alpha=0.4
    )
    left.set_xlabel("effect of the first school")
    left.set_ylabel("log tau")
    low, middle, high = np.quantile(posterior["effect"].values[0], [0.05, 0.5, 0.95], axis=0)
    place = np.arange(len(EFFECTS))
    right.errorbar(place - 0.1, EFFECTS, 1.64 * ERRORS, fmt="o", color="0.6", label="measured")
    right.errorbar(
        place + 0.1, middle, [middle - low, high - middle], fmt="o", label="posterior, 90 %"
    )
    right.set_xlabel("school")
    right.legend(fontsize=8)
    save_figure(figure, arguments.out / "eight_schools.png")
    print(arguments.out / "eight_schools.png")


if __name__ == "__main__":
    main()
