r"""The paper's mixture, learned from its energy alone (``make demo``).

The target is :math:`0.8\,\mathcal N([3, 3], I) + 0.2\,\mathcal N([-3, -3], I)`. The trainer sees
nothing but energy values. A table compares what it learned with the truth, each number beside its
floor, and ``out/demo.png`` shows, in the manner of the paper's Figure 2 and on one scale:

* exact samples;
* reverse sampling score matching (14) with noisy points from a Gaussian h_t;
* the same with a uniform h_t;
* denoising score matching (9), which is given 20,000 exact samples;
* 20 steps of Langevin dynamics with the exact score from N(0, 4I), one step size.

Both h_t are laws of the paper's variable, in units of the target's width, which the trainer finds
by itself. Expected: all three trained panels within 0.02 of the true weight 0.80, Langevin
near 0.5, because nothing crosses between the modes in 20 steps. The numbers are in
``out/demo.json``. About a minute and a half on two CPU cores.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from energies import GaussianMixture
from rsm_sampler import EnergyDiffusionTrainer, EnergySampler, TrainerConfig
from rsm_sampler.metrics import mode_weights, wasserstein2
from rsm_sampler.montecarlo.run import run_mcmc
from rsm_sampler.plotting import plot_panels, save_figure
from rsm_sampler.proposals import GaussianProposal, UniformProposal

TRUE_WEIGHT = 0.8
# A panel needs less than the table does.
PANEL = TrainerConfig(
    search_evaluations=20_000,
    bank_size=40_000,
    steps_per_cycle=800,
    max_cycles=1,
    batch_size=512,
    num_draws=128,
    check_draws=512,
)
SMOKE = TrainerConfig(
    search_evaluations=4000,
    bank_size=4000,
    steps_per_cycle=20,
    max_cycles=1,
    batch_size=64,
    num_draws=8,
    width=16,
    num_steps=8,
    check_draws=64,
)


def main() -> None:
    """Fit, measure, print, draw."""
    parser = argparse.ArgumentParser(description="Learn the paper's mixture from its energy.")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder to write to")
    options = parser.parse_args()
    started = time.perf_counter()
    target = GaussianMixture.paper()

    print("Learning 0.8 N([3, 3], I) + 0.2 N([-3, -3], I) from its energy alone.")
    trainer = EnergyDiffusionTrainer(
        target, target.dim, seed=options.seed, config=SMOKE if options.smoke else None
    )
    sampler = trainer.fit()
    numbers = measure(target, sampler, trainer.seconds, smoke=options.smoke)
    print("\n" + table(numbers) + "\n")

    print("Other ways to the same law, for the figure:")
    n = 2000 if options.smoke else 20_000
    panels: dict[str, torch.Tensor] = {}
    for name, x in other_ways(target, n, options.seed, smoke=options.smoke):
        panels[name] = x
        print(f"  {name:<26}weight {mixing_weight(target, x):.3f}", flush=True)
    figure = draw(target, panels, options.output / "demo.png")
    numbers["panels"] = {name: mixing_weight(target, x) for name, x in panels.items()}
    numbers["seconds"]["all"] = time.perf_counter() - started
    (options.output / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"{figure} and demo.json after {numbers['seconds']['all']:.0f} seconds")


def mixing_weight(target: GaussianMixture, x: torch.Tensor) -> float:
    """Share of the samples in the mode at [3, 3]."""
    return float(mode_weights(target.responsibilities(x.double()))[0])


def measure(
    target: GaussianMixture, sampler: EnergySampler, seconds: float, *, smoke: bool
) -> dict:
    """Everything in the table, as plain numbers."""
    started = time.perf_counter()
    x = sampler.sample(5000 if smoke else 100_000).double()
    share = target.responsibilities(x)
    member = share.argmax(-1)
    modes = [
        {
            "mean": x[member == k].mean(0).tolist(),
            "std": x[member == k].std(0).tolist(),
            "exact_mean": target.loc[k].tolist(),
        }
        for k in range(2)
    ]
    drawn = time.perf_counter() - started
    size, draws, pairs = (200, 2, 2) if smoke else (2000, 5, 10)
    generator = torch.Generator().manual_seed(1)

    def exact() -> torch.Tensor:
        return stratified(target, target.sample(2 * size, generator=generator), size)

    def learned() -> torch.Tensor:
        return stratified(target, sampler.sample(2 * size, generator=generator), size)

    w2 = torch.stack([wasserstein2(learned(), exact()) for _ in range(draws)])
    floor = torch.stack([wasserstein2(exact(), exact()) for _ in range(pairs)])
    started = time.perf_counter()
    diagnosis = sampler.diagnose(*([512] if smoke else []))
    witness = diagnosis.witness.evaluations
    return {
        "weight": float(mode_weights(share)[0]),
        "draws": len(x),
        "modes": modes,
        "w2": {"n": size, "mean": float(w2.mean()), "se": standard_error(w2), "draws": draws},
        "w2_floor": {"mean": float(floor.mean()), "se": standard_error(floor), "pairs": pairs},
        "ess": {"value": diagnosis.ess, "n": diagnosis.n},
        "log_z": {"value": diagnosis.log_z, "se": diagnosis.log_z_se, "exact": 0.0},
        "evaluations": {
            "search": sampler.counts.get("search", 0),
            "training": sampler.counts.get("training", 0),
            "check": sampler.counts.get("check", 0),
            "diagnosis": diagnosis.evaluations - witness,
            "witness": witness,
        },
        "seconds": {
            "fit": seconds,
            "sampling": drawn,
            "diagnosis": time.perf_counter() - started,
        },
        "verdict": diagnosis.verdict,
        "diagnosis": str(diagnosis),
    }


def stratified(target: GaussianMixture, x: torch.Tensor, n: int) -> torch.Tensor:
    """Of many samples n, 80 % of them from the heavier mode.

    What a share off by chance would add to the distance is taken out: the table has it apart. A
    mode with too few samples for its share is filled up with the other's, and pays for it.
    """
    first = target.responsibilities(x)[:, 0] > 0.5
    heavy = round(TRUE_WEIGHT * n)
    chosen = [x[first][:heavy], x[~first][: n - heavy]]
    spare = [x[first][heavy:], x[~first][n - heavy :]]
    return torch.cat(chosen + spare)[:n]


def standard_error(values: torch.Tensor) -> float:
    """Of the mean."""
    return float(values.std() / len(values) ** 0.5)


def other_ways(
    target: GaussianMixture, n: int, seed: int, *, smoke: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The panels one by one: a name and n samples."""
    generator = torch.Generator().manual_seed(seed + 1000)
    paper = "variance_preserving"  # h_t is the law of the paper's noisy variable
    side = torch.full((2,), 3.0)
    ways: dict[str, dict] = {
        "RSM, Gaussian h_t": {
            "loss": "reverse-sampling",
            "proposal": GaussianProposal(torch.zeros(2), 1.5, coordinates=paper),
        },
        "RSM, uniform h_t": {
            "loss": "reverse-sampling",
            "proposal": UniformProposal(-side, side, coordinates=paper),
        },
        "DSM, given exact samples": {"samples": target.sample(20_000, generator=generator)},
    }
    yield "exact samples", target.sample(n, generator=generator)
    for name, way in ways.items():
        config = SMOKE if smoke else PANEL
        trainer = EnergyDiffusionTrainer(target, target.dim, seed=seed, config=config, **way)
        yield name, trainer.fit().sample(n)
    yield "Langevin, 20 steps", langevin(target, n, generator)


def langevin(target: GaussianMixture, n: int, generator: torch.Generator) -> torch.Tensor:
    """Where n chains from N(0, 4I) are after 20 steps with the exact score."""
    starts = 2 * torch.randn(n, 2, generator=generator)
    # Two evaluations a step, value and gradient, and two for the start.
    return run_mcmc(
        target,
        starts,
        method="langevin",
        step_size=0.5,
        evaluations=2 * n * (20 + 1),
        warm_up=0.0,
        generator=generator,
    ).samples


def draw(target: GaussianMixture, panels: dict[str, torch.Tensor], path: Path) -> Path:
    """The figure: panels titled with their weights."""
    titled = {
        f"{name.replace('h_t', '$h_t$')}\nweight {mixing_weight(target, x):.3f} (true 0.80)": x
        for name, x in panels.items()
    }
    axes = plot_panels(titled, extent=(-7.0, 7.0), energy=target)
    return save_figure(axes[0], path)


def table(numbers: dict) -> str:
    """The measurements as text."""
    w2, floor = numbers["w2"], numbers["w2_floor"]
    counts, log_z, ess = numbers["evaluations"], numbers["log_z"], numbers["ess"]

    def pair(values: list[float]) -> str:
        return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"

    rows = [
        ("", "learned", "exact, or floor"),
        ("mixing weight", f"{numbers['weight']:.4f}", f"{TRUE_WEIGHT:.4f}"),
    ]
    for k, mode in enumerate(numbers["modes"]):
        rows.append((f"mean of mode {k + 1}", pair(mode["mean"]), pair(mode["exact_mean"])))
        rows.append((f"std of mode {k + 1}", pair(mode["std"]), pair([1.0, 1.0])))
    rows += [
        (
            f"W2, n = {w2['n']}",
            f"{w2['mean']:.4f} ± {w2['se']:.4f}",
            f"{floor['mean']:.4f} ± {floor['se']:.4f} (exact pairs)",
        ),
        ("ESS", f"{ess['value']:.0f} of {ess['n']}", f"{ess['n']}"),
        ("log Z", f"{log_z['value']:.4f} ± {log_z['se']:.4f}", f"{log_z['exact']:.4f}"),
        (
            "energy evaluations",
            f"search {counts['search']:,}, training {counts['training']:,}, "
            f"check {counts['check']:,}",
            "",
        ),
        (
            "  apart from these",
            f"diagnosis {counts['diagnosis']:,}, witness {counts['witness']:,}",
            "",
        ),
        (
            "seconds",
            ", ".join(f"{name} {value:.1f}" for name, value in numbers["seconds"].items()),
            "",
        ),
        ("verdict", numbers["verdict"], ""),
    ]
    wide = max(len(row[1]) for row in rows if row[2]) + 2
    return "\n".join(f"{a:<20}{b:<{wide}}{c}".rstrip() for a, b, c in rows)


if __name__ == "__main__":
    main()
