r"""Figure 5 of the paper: two moons (32), from the energy and from data, against exact samples.

.. math::
    \log p(z) = -\frac12 \Big( \frac{\|z\| - 2}{0.2} \Big)^2
    + \log \big( e^{-\frac12 ((z_1 - 2) / 0.3)^2} + e^{-\frac12 ((z_1 + 2) / 0.3)^2} \big)

Three learners see the target in three ways: reverse sampling score matching (14) with a uniform
h_t, and the trainer's default (13) on an importance-weighted bank, have its energy alone; the
diffusion model (DDPM, loss 9) is given 100,000 exact samples. Each panel has the total variation
to the exact masses of 100 x 100 cells beside what as many exact samples score on average, the
floor. (The paper's iDEM and FAB panels are not among them.)

    python examples/paper/figure_5.py

Writes ``out/figure_5.png`` and ``out/figure_5.json``; some minutes on two CPU cores.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from energies import TwoMoons
from examples.demo import SMOKE
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.metrics import grid_total_variation, total_variation_floor
from rsm_sampler.plotting import plot_panels, save_figure
from rsm_sampler.proposals import UniformProposal


def main() -> None:
    """Learn three times, measure, draw."""
    parser = argparse.ArgumentParser(description="Figure 5 of the paper.")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--cycles", type=int, default=2, help="most training cycles")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder to write to")
    options = parser.parse_args()
    target = TwoMoons()
    n = 2000 if options.smoke else 100_000
    config = SMOKE if options.smoke else TrainerConfig(max_cycles=options.cycles)
    generator = torch.Generator().manual_seed(options.seed)
    side = torch.full((2,), 3.0)
    box = UniformProposal(-side, side, coordinates="variance_preserving")
    ways: dict[str, dict] = {
        "RSM from the energy, (14)": {
            "loss": "reverse-sampling",
            "proposal": box,
            # Narrow moons at every noise level: half the noisy points, as many candidates.
            "config": replace(config, batch_size=min(512, config.batch_size)),
        },
        "default from the energy, (13)": {"config": config},
        "DDPM given data, (9)": {
            "config": config,
            "samples": target.sample(n, generator=generator),
        },
    }
    edges = [torch.linspace(float(a), float(b), 101) for a, b in zip(*target.extent, strict=True)]
    masses = target.cell_masses(*edges)
    floor = float(total_variation_floor(masses, n))
    panels = {"exact samples": target.sample(n, generator=generator)}
    report: dict = {"samples": n, "floor": floor, "ways": {}}
    for name, way in ways.items():
        trainer = EnergyDiffusionTrainer(target, target.dim, seed=options.seed, **way)
        sampler = trainer.fit()
        panels[name] = sampler.sample(n)
        report["ways"][name] = {
            "ess": trainer.history[-1]["ess"],
            "log_z": trainer.history[-1]["log_z"],
            "exact_log_z": target.log_z,
            "evaluations": trainer.evaluations,
            "seconds": trainer.seconds,
        }
    titled = {}
    for name, x in panels.items():
        tv = float(grid_total_variation(x, masses, edges))
        report["ways"].setdefault(name, {})["tv"] = tv
        titled[f"{name}\nTV {tv:.4f} (floor {floor:.4f})"] = x
        print(f"{name:<32}TV {tv:.4f}  (floor {floor:.4f})")
    axes = plot_panels(titled, extent=target.extent, size=3.0)
    figure = save_figure(axes[0], options.output / "figure_5.png")
    (options.output / "figure_5.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{figure} and figure_5.json")


if __name__ == "__main__":
    main()
