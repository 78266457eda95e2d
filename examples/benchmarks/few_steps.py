"""How well few steps of a chain draw a law on the box, with its exact denoiser.

    python examples/benchmarks/few_steps.py     # seconds

The law has density proportional to exp(a / scale) on [-1, 1], as a policy at a bound of its
actions. What lies behind a noisy action is then a normal law that is cut at the bounds, whose mean
is known. The chain is the ancestral one, of which 4,000 actions are drawn; "exact" are as many
draws of the law itself, its floor.
"""

import math

import numpy as np
import torch
from results import store
from scipy import stats
from torch import Tensor

from rsm_sampler.ancestral import Ancestral
from rsm_sampler.schedules import Cosine, DiscreteSchedule, Geometric

DRAWS = 4000
SCALES = 0.1, 0.3, 1.0
SCHEDULES = {
    "cosine, 5": Cosine(5),
    "cosine, 10": Cosine(10),
    "cosine, 20": Cosine(20),
    "geometric, 5": DiscreteSchedule.through(Geometric(0.1, 5.0).sigmas(5)[:-1].flip(0)),
    "geometric, 10": DiscreteSchedule.through(Geometric(0.1, 5.0).sigmas(10)[:-1].flip(0)),
}


class Tilted:
    """The exact denoiser of the law proportional to exp(a / scale) on [-1, 1]."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The mean of the law that is cut at the bounds."""
        std = sigma.unsqueeze(-1).to(x).numpy()
        mean = x.numpy() + std**2 / self.scale
        low, high = (-1 - mean) / std, (1 - mean) / std
        with np.errstate(invalid="ignore"):  # of the skewness, which is not asked for
            return torch.from_numpy(mean + std * stats.truncnorm.mean(low, high)).to(x)


def main() -> None:
    """Print and store a row for each law and schedule."""
    print(f"{'scale':>5} {'levels':14} {'mean':>6} {'std':>6} {'q90':>6} {'W1':>6}")
    for scale in SCALES:
        generator = torch.Generator().manual_seed(0)
        u = torch.rand(100 * DRAWS, generator=generator, dtype=torch.float64)
        exact = (1 + scale * torch.log(u + (1 - u) * math.exp(-2 / scale))).numpy()
        found = {"exact": exact[:DRAWS]}
        for name, schedule in SCHEDULES.items():
            chain = Ancestral(Tilted(scale), schedule.sigmas(), dim=1, centred=False)
            found[name] = chain.sample(DRAWS, generator=generator)[:, 0].double().numpy()
        for name, draws in found.items():
            row = {
                "mean": float(draws.mean()),
                "std": float(draws.std()),
                "q90": float(np.quantile(draws, 0.9)),
                "W1": float(stats.wasserstein_distance(draws, exact[DRAWS:])),
            }
            store("few_steps", f"{scale:g} {name}", row)
            print(f"{scale:5g} {name:14}", *(f"{value:6.3f}" for value in row.values()))


if __name__ == "__main__":
    main()
