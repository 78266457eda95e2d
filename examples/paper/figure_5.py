r"""Figure 5 of the paper: two moons (32), learned in five ways, against exact samples.

.. math::
    \log p(z) = -\frac12 \Big( \frac{\|z\| - 2}{0.2} \Big)^2
    + \log \big( e^{-\frac12 ((z_1 - 2) / 0.3)^2} + e^{-\frac12 ((z_1 + 2) / 0.3)^2} \big)

What each way is given differs:

* RSM, twice, sees energy values alone: reverse sampling score matching (14) with a uniform h_t,
  and the trainer's default (13) on an importance-weighted bank;
* DDPM, loss (9), is given 100,000 exact samples;
* iDEM and FAB see the energy with its gradients, iDEM fits a denoiser and FAB a spline flow.

Each panel has the total variation to the exact masses of 100 x 100 cells beside what as many exact
samples score on average, the floor.

    python examples/paper/figure_5.py

Writes ``out/figure_5.png`` and, with the energy evaluations and seconds of each training,
``out/figure_5.json``; five to ten minutes on a CPU core. FAB needs ``zuko``, extra ``flows``.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from energies import TwoMoons
from examples.demo import SMOKE
from rsm_sampler import EnergyDiffusionTrainer, EnergySampler, TrainerConfig
from rsm_sampler.baselines import FABConfig, FlowSampler, IDEMConfig, ddpm, fab, idem
from rsm_sampler.metrics import grid_total_variation, total_variation_floor
from rsm_sampler.plotting import plot_panels, save_figure
from rsm_sampler.proposals import UniformProposal

WIDTH = 1.5  # of the target, root mean square; the trainer of RSM finds it by itself


@dataclass(frozen=True)
class Sizes:
    """How long everything takes."""

    trainer: TrainerConfig
    idem: IDEMConfig
    idem_evaluations: int
    fab: FABConfig
    fab_evaluations: int
    samples: int
    weighted: int


FULL = Sizes(
    trainer=TrainerConfig(),
    idem=IDEMConfig(updates=8),
    idem_evaluations=50_000_000,
    fab=FABConfig(updates=8, learning_rate=2e-3),
    fab_evaluations=1_000_000,
    samples=100_000,
    weighted=8192,
)
TINY = Sizes(
    trainer=SMOKE,
    idem=IDEMConfig(num_draws=8, batch_size=32, refill=64, width=16, num_steps=8),
    idem_evaluations=5000,
    fab=FABConfig(batch_size=32, updates=1, transforms=1, width=16),
    fab_evaluations=4000,
    samples=2000,
    weighted=256,
)


def main() -> None:
    """Learn five times, measure, draw."""
    parser = argparse.ArgumentParser(description="Figure 5 of the paper.")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--cycles", type=int, default=2, help="most training cycles of RSM, DDPM")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder to write to")
    options = parser.parse_args()
    target = TwoMoons()
    full = replace(FULL, trainer=TrainerConfig(max_cycles=options.cycles))
    sizes = TINY if options.smoke else full
    n = sizes.samples
    edges = [torch.linspace(float(a), float(b), 101) for a, b in zip(*target.extent, strict=True)]
    masses = target.cell_masses(*edges)
    floor = float(total_variation_floor(masses, n))
    exact = target.sample(n, generator=torch.Generator().manual_seed(options.seed))
    report: dict = {"samples": n, "floor": floor, "exact_log_z": target.log_z, "ways": {}}
    panels = {}
    for name, way in {"exact samples": None, **ways(target, sizes, options.seed)}.items():
        x, record = (exact, {}) if way is None else learned(way, sizes, options.seed)
        tv = float(grid_total_variation(x, masses, edges))
        spent = f"  {record['evaluations']:,} evaluations" if record else ""
        report["ways"][name] = {"tv": tv, **record}
        panels[f"{name}\nTV {tv:.4f} (floor {floor:.4f})"] = x
        print(f"{name:<32}TV {tv:.4f}  (floor {floor:.4f}){spent}", flush=True)
    axes = plot_panels(panels, extent=target.extent, columns=3, size=3.0)
    figure = save_figure(axes[0], options.output / "figure_5.png")
    (options.output / "figure_5.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{figure} and figure_5.json")


def ways(
    target: TwoMoons, sizes: Sizes, seed: int
) -> dict[str, Callable[[], EnergySampler | FlowSampler]]:
    """What trains each sampler."""
    side = torch.full((2,), 3.0)
    given = {"seed": seed}
    gradients = {"scale": WIDTH, **given}

    def reverse_sampling() -> EnergySampler:
        # Narrow moons at every noise level: half the noisy points, as many candidates.
        config = replace(sizes.trainer, batch_size=min(512, sizes.trainer.sizes(2).batch_size))
        box = UniformProposal(-side, side, coordinates="variance_preserving")
        return EnergyDiffusionTrainer(
            target, 2, loss="reverse-sampling", proposal=box, config=config, **given
        ).fit()

    def data() -> EnergySampler:
        samples = target.sample(sizes.samples, generator=torch.Generator().manual_seed(seed + 1))
        return ddpm(target, 2, samples=samples, config=sizes.trainer, **given)

    return {
        "RSM, uniform h_t, (14)": reverse_sampling,
        "RSM, default, (13)": lambda: EnergyDiffusionTrainer(
            target, 2, config=sizes.trainer, **given
        ).fit(),
        "DDPM, given samples, (9)": data,
        "iDEM, with gradients": lambda: idem(
            target, 2, evaluations=sizes.idem_evaluations, config=sizes.idem, **gradients
        ),
        "FAB, with gradients": lambda: fab(
            target, 2, evaluations=sizes.fab_evaluations, config=sizes.fab, **gradients
        ),
    }


def learned(
    way: Callable[[], EnergySampler | FlowSampler], sizes: Sizes, seed: int
) -> tuple[torch.Tensor, dict]:
    """Samples of one way, and what it took."""
    started = time.perf_counter()
    sampler = way()
    seconds = time.perf_counter() - started
    generator = torch.Generator().manual_seed(seed + 2)
    draws = sampler.weighted_draws(sizes.weighted, generator=generator)
    total = torch.logsumexp(draws.log_weight.double(), 0)
    record = {
        "ess": draws.ess / sizes.weighted,
        "log_z": float(total) - math.log(sizes.weighted),
        "evaluations": sum(sampler.counts.values()),
        "seconds": seconds,
    }
    return sampler.sample(sizes.samples, generator=generator), record


if __name__ == "__main__":
    main()
