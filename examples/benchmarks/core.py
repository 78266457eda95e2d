"""The figures of the core library: how right, at what cost, beside plain MCMC.

    python examples/benchmarks/core.py                       # all that is not in the results yet
    python examples/benchmarks/core.py --rows mixture moons  # some rows
    python examples/benchmarks/core.py --table               # only write the page from the results

Every measurement is one (row, seed) pair. It is written to ``docs/results/core.json`` as soon as
it is there, and not measured again; ``docs/benchmarks.md`` is made from that file. One default
configuration serves all rows, energy values only; the final model is measured, raw. The same
number of energy evaluations is given to random-walk Metropolis and to parallel tempering.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

import energies
from rsm_sampler import EnergyDiffusionTrainer, EnergySampler, TrainerConfig, __version__, metrics
from rsm_sampler.montecarlo.run import run_mcmc

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "core.json"
PAGE = ROOT / "docs" / "benchmarks.md"
Record = dict[str, Any]


def fitted(
    target: Any, seed: int, *, config: TrainerConfig | None = None, **options: Any
) -> tuple[EnergySampler, Record]:
    """Fit with the default configuration; the cost of it."""
    started = time.perf_counter()
    trainer = EnergyDiffusionTrainer(target, target.dim, seed=seed, config=config, **options)
    sampler = trainer.fit(progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    last = sampler.history[-1]
    return sampler, {
        "fit_seconds": seconds,
        "evaluations": trainer.evaluations,
        "steps": trainer.step,
        "ess": last["ess"],
        "log_z_error": abs(last["log_z"] - (getattr(target, "log_z", None) or 0.0)),
    }


def importance_log_z(sampler: EnergySampler, exact: float, n: int = 16_384) -> Record:
    """Estimate log Z from fresh draws with the exact density of the process that made them."""
    draws = sampler.weighted_draws(n)
    log_weight = draws.log_weight.double()
    estimate = float(torch.logsumexp(log_weight, 0)) - math.log(n)
    return {
        "ess": draws.ess / n,
        "log_z_error": abs(estimate - exact),
        "log_z_se": math.sqrt(max(n / draws.ess - 1, 0) / n),
    }


def plain_chains(target: Any, evaluations: int, n: int, seed: int) -> dict[str, Tensor]:
    """Random-walk Metropolis and parallel tempering at the same number of evaluations.

    They are given what the trainer has to find out: they start from a normal law with the mean and
    spread of exact samples.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = target.sample(4096, generator=generator)
    loc, scale = exact.mean(0), exact.std()
    samples = {}
    for method, chains, cost in (("rw", 512, 1), ("parallel-tempering", 64, 12)):
        start = loc + scale * torch.randn(chains, target.dim, generator=generator)
        result = run_mcmc(
            target,
            start.double(),
            method=method,
            evaluations=evaluations,
            num_samples=min(n, int(0.6 * evaluations / cost)),
            generator=generator,
            reference_loc=loc.double() if chains == 64 else None,
            reference_scale=float(scale) if chains == 64 else None,
        )
        samples[method] = result.samples
    return samples


# ------------------------------------------------------------------ rows


def stratified_w2(target: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> float:
    """W2 of 1600 + 400 points of the two modes: the split is measured apart."""

    def pick(points: Tensor) -> Tensor:
        mode = target.responsibilities(points.double()).argmax(-1)
        pieces = []
        for k, count in enumerate((1600, 400)):
            members = points[mode == k]
            order = torch.randperm(len(members), generator=generator)[:count]
            pieces.append(members[order])
        return torch.cat(pieces)

    return float(metrics.wasserstein2(pick(x), pick(y)))


def w2_floor(target: Any, pairs: int) -> float:
    """Mean W2 of exact pairs."""
    generator = torch.Generator().manual_seed(12345)
    values = [
        stratified_w2(
            target,
            target.sample(4000, generator=generator),
            target.sample(4000, generator=generator),
            generator,
        )
        for _ in range(pairs)
    ]
    return float(np.mean(values))


def mixture_record(base: Any, shift: float, scale: float, seed: int, pairs: int = 50) -> Record:
    """The paper's mixture, in any coordinates; lengths are reported in its own."""
    target = base.affine(shift, scale)
    sampler, record = fitted(target, seed)
    record.update(importance_log_z(sampler, target.log_z))
    x = (sampler.sample(100_000) - shift) / scale
    record.update(split(base, x))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(pairs):
        mine = (sampler.sample(4000) - shift) / scale
        values.append(stratified_w2(base, mine, base.sample(4000, generator=generator), generator))
    record["w2"] = float(np.mean(values))
    return record


def split(base: Any, x: Tensor) -> Record:
    """Mixing weight, and the largest error of component means and standard deviations."""
    share = base.responsibilities(x.double())
    record: Record = {"weight": float(share[:, 0].mean())}
    worst_mean = worst_std = 0.0
    for k in range(2):
        weight = share[:, k : k + 1] / share[:, k].sum()
        mean = (weight * x).sum(0)
        std = (weight * (x - mean).square()).sum(0).sqrt()
        worst_mean = max(worst_mean, float((mean - base.modes[k]).abs().amax()))
        worst_std = max(worst_std, float((std - 1).abs().amax()))
    return {**record, "mean_error": worst_mean, "std_error": worst_std}


def row_mixture(seed: int) -> Record:
    """The paper's mixture."""
    base = energies.get("paper-mixture")
    record = mixture_record(base, 0.0, 1.0, seed)
    chains = plain_chains(base, record["evaluations"], 100_000, seed)
    for name, x in chains.items():
        record[f"{name} weight"] = split(base, x.float())["weight"]
    return record


def row_fit_time(seed: int) -> Record:
    """How long the paper's mixture takes, with nothing else on the machine."""
    return fitted(energies.get("paper-mixture"), seed)[1]


def row_w2_floor(seed: int) -> Record:
    """The floor of W2, 200 exact pairs."""
    return {"w2": w2_floor(energies.get("paper-mixture"), 200)}


def grid_record(base: Any, shift: float, scale: float, seed: int) -> Record:
    """Total variation to the exact cell masses, over its sampling floor."""
    target = base.affine(shift, scale)
    sampler, record = fitted(target, seed)
    record.update(importance_log_z(sampler, target.log_z))
    x = (sampler.sample(200_000) - shift) / scale
    record.update(grid_distance(base, x))
    return record


def grid_distance(base: Any, x: Tensor) -> Record:
    """TV on 100 x 100 cells over the target's extent; the floor is that of as many exact draws."""
    low, high = base.extent
    edges = [torch.linspace(float(low[i]), float(high[i]), 101).double() for i in range(2)]
    cells = base.cell_masses(*edges)
    distance = float(metrics.grid_total_variation(x.double(), cells, edges))
    floor = float(metrics.total_variation_floor(cells, len(x)))
    return {"tv": distance, "tv_floor": floor, "tv_ratio": distance / floor}


def grid_row(name: str) -> Callable[[int], Record]:
    """A row for one target."""

    def row(seed: int) -> Record:
        base = energies.get(name)
        record = grid_record(base, 0.0, 1.0, seed)
        for method, x in plain_chains(base, record["evaluations"], 200_000, seed).items():
            record[f"{method} tv_ratio"] = grid_distance(base, x)["tv_ratio"]
        return record

    return row


def gmm40_record(shift: float, scale: float, seed: int, exact: int = 100_000) -> Record:
    """GMM-40: divergence on exact points, mode weights."""
    base = energies.get("gmm40")
    target = base.affine(shift, scale)
    sampler, record = fitted(target, seed)
    record.update(importance_log_z(sampler, target.log_z))
    generator = torch.Generator().manual_seed(10_000 + seed)
    x = (sampler.sample(100_000) - shift) / scale
    record["mode_tv"] = float(
        metrics.mode_weight_total_variation(base.responsibilities(x.double()), base.mode_weights)
    )
    points = base.sample(exact, generator=generator, dtype=torch.float64)
    log_q = sampler.log_prob((shift + scale * points).float())
    log_q = log_q.double() + 2 * math.log(scale)
    estimate = metrics.kl_paired(base.log_prob(points), log_q)
    record["kl"], record["kl_se"] = float(estimate.value), float(estimate.standard_error)
    return record


def row_gmm40(seed: int) -> Record:
    """GMM-40."""
    base = energies.get("gmm40")
    record = gmm40_record(0.0, 1.0, seed)
    for method, x in plain_chains(base, record["evaluations"], 100_000, seed).items():
        record[f"{method} mode_tv"] = float(
            metrics.mode_weight_total_variation(
                base.responsibilities(x.double()), base.mode_weights
            )
        )
    return record


def numpy_mixture(x: np.ndarray) -> float:
    """The paper's mixture, one point at a time, without gradients."""
    first = math.log(0.8) - 0.5 * float(((x - 3.0) ** 2).sum())
    second = math.log(0.2) - 0.5 * float(((x + 3.0) ** 2).sum())
    return math.log(2 * math.pi) - float(np.logaddexp(first, second))


def black_box_row(name: str) -> Callable[[int], Record]:
    """10,000 evaluations of a NumPy function, search and checks included."""

    def row(seed: int) -> Record:
        target = energies.get(name)
        function = numpy_mixture if name == "paper-mixture" else energies.decay_energy
        energy = energies.from_numpy(function, vectorized=False)
        started = time.perf_counter()
        trainer = EnergyDiffusionTrainer(energy, 2, seed=seed, budget=10_000)
        sampler = trainer.fit(progress=False)
        seconds = time.perf_counter() - started
        x = sampler.sample(100_000)
        weight = float(target.responsibilities(x.double())[:, 0].mean())
        record = {
            "weight": weight,
            "weight_error": abs(weight - float(target.mode_weights[0])),
            "evaluations": trainer.evaluations,
            "fit_seconds": seconds,
            "verdict": sampler.diagnose().trustworthy,
        }
        for method, y in plain_chains(target, 10_000, 4096, seed).items():
            record[f"{method} weight_error"] = abs(
                float(target.responsibilities(y)[:, 0].mean()) - float(target.mode_weights[0])
            )
        return record

    return row


def moved_row(name: str, change: str) -> Callable[[int], Record]:
    """A 2-D target scaled or moved."""

    def row(seed: int) -> Record:
        base = energies.get(name)
        std = float(base.sample(20_000, generator=torch.Generator().manual_seed(0)).std())
        shift, scale = {"x0.01": (0.0, 0.01), "x100": (0.0, 100.0), "moved": (50 * std, 1.0)}[
            change
        ]
        if name == "paper-mixture":
            return mixture_record(base, shift, scale, seed, pairs=10)
        if name == "gmm40":
            return gmm40_record(shift, scale, seed, exact=20_000)
        return grid_record(base, shift, scale, seed)

    return row


def row_conditional(seed: int) -> Record:
    """Conditional mixture: the worst of 64 contexts, 100,000 draws each, 100 bins."""
    task = energies.get("conditional-line")
    started = time.perf_counter()
    trainer = EnergyDiffusionTrainer(
        task, task.dim, context_dim=task.context_dim, context=task.sample_context, seed=seed
    )
    sampler = trainer.fit(progress=False)
    record: Record = {
        "fit_seconds": time.perf_counter() - started,
        "evaluations": trainer.evaluations,
    }
    contexts = task.sample_context(64, torch.Generator().manual_seed(seed + 1))
    edges = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    worst, floor = 0.0, 0.0
    for context in contexts:
        x = sampler.sample(100_000, context=context, num_steps=24)
        cells = task.posterior(context).cell_masses(edges)
        distance = float(metrics.grid_total_variation(x.double(), cells, [edges]))
        if distance > worst:
            worst, floor = distance, float(metrics.total_variation_floor(cells, len(x)))
    return {**record, "tv_worst": worst, "tv_floor": floor}


def verdict_row(kind: str) -> Callable[[int], Record]:
    """One random mixture: a good sampler, or one that is broken on purpose."""

    def row(seed: int) -> Record:
        generator = torch.Generator().manual_seed(1000 + seed)
        modes = 2 + seed % 4
        target = energies.GaussianMixture.random(
            2, modes, min_separation=6.0, min_weight=0.05, generator=generator
        )
        trained, config, what = target, TrainerConfig(), "good"
        if kind == "broken":
            what = ("mode removed", "weights off", "undertrained")[seed % 3]
            weights = target.mode_weights.clone()
            if what == "mode removed":
                keep = torch.arange(modes) != seed % modes
                trained = energies.GaussianMixture(
                    target.loc[keep], 1.0, weights=weights[keep] / weights[keep].sum()
                )
            elif what == "weights off":
                largest, smallest = int(weights.argmax()), int(weights.argmin())
                weights[largest] -= 0.12
                weights[smallest] += 0.12
                trained = energies.GaussianMixture(target.loc, 1.0, weights=weights)
            else:
                config = TrainerConfig(steps_per_cycle=100, max_cycles=1)
        sampler, record = fitted(trained, seed, config=config)
        report = sampler.diagnose(energy=target)
        x = sampler.sample(50_000).double()
        mode_tv = metrics.mode_weight_total_variation(
            target.responsibilities(x), target.mode_weights
        )
        return {
            "what": what,
            "trusted": report.trustworthy,
            "mode_tv": float(mode_tv),
            "ess": report.ess / report.n,
            "findings": report.findings,
            "fit_seconds": record["fit_seconds"],
        }

    return row


def hard_row(name: str) -> Callable[[int], Record]:
    """A hard target: does it run to the end, and is the verdict right?"""

    def row(seed: int) -> Record:
        if name == "gmm-100d":
            generator = torch.Generator().manual_seed(3)
            target: Any = energies.GaussianMixture.random(100, 4, generator=generator)
        else:
            target = energies.get(name)
        sampler, record = fitted(target, seed)
        report = sampler.diagnose()
        n = 20_000
        x = sampler.sample(n)
        exact = target.sample(2 * n, generator=torch.Generator().manual_seed(seed))
        value, truth = target(x).double(), target(exact).double()
        # What the verdict is judged by: energies, and mode weights or the widest coordinate.
        distance = float(metrics.ks_per_coordinate(value[:, None], truth[:, None]).amax())
        marginal = float(metrics.ks_per_coordinate(x.double(), exact.double()).amax())
        return {
            "finite": bool(x.isfinite().all()),
            "trusted": report.trustworthy,
            "ks_energy": distance,
            "ks_marginal": marginal,
            "deserves": distance <= 0.05 and marginal <= 0.05,
            "log_z_error": abs(report.log_z - target.log_z),
            "ess": report.ess / report.n,
            "findings": report.findings,
            "fit_seconds": record["fit_seconds"],
            "evaluations": record["evaluations"],
        }

    return row


GRIDS = {"moons": "two-moons", "rings": "rings"}
SHAPES = {"mixture": "paper-mixture", **GRIDS, "gmm40": "gmm40"}
ROWS: dict[str, tuple[Callable[[int], Record], int]] = {
    "w2 floor": (row_w2_floor, 1),
    "mixture": (row_mixture, 5),
    "mixture fit time": (row_fit_time, 5),
    **{row: (grid_row(name), 5) for row, name in GRIDS.items()},
    "gmm40": (row_gmm40, 5),
    "black box mixture": (black_box_row("paper-mixture"), 5),
    "black box decay": (black_box_row("decay"), 5),
    "conditional": (row_conditional, 5),
    "verdict good": (verdict_row("good"), 20),
    "verdict broken": (verdict_row("broken"), 20),
    **{name: (hard_row(name), 1) for name in ("funnel", "many-well-32", "gmm-100d")},
    **{
        f"{row} {change}": (moved_row(name, change), 5)
        for row, name in SHAPES.items()
        for change in ("x0.01", "x100", "moved")
    },
}


# ------------------------------------------------------------------ results and page


def machine() -> Record:
    """Where the numbers come from."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "rsm_sampler": __version__,
    }


def load() -> dict[str, Record]:
    """All results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def store(key: str, record: Record) -> None:
    """Add one result; several processes may do so."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with Path(tempfile.gettempdir(), "rsm_sampler_core.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = load()
        results[key] = {**record, "machine": machine()}
        text = json.dumps(dict(sorted(results.items())), indent=1)
        temporary = RESULTS.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(RESULTS)


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", help="some seeds only")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in [] if arguments.table else arguments.rows:
        row, seeds = ROWS[name]
        for seed in range(seeds) if arguments.seeds is None else arguments.seeds:
            key = f"{name}/{seed}"
            if seed >= seeds or key in load():
                continue
            started = time.perf_counter()
            record = row(seed)
            record["row_seconds"] = time.perf_counter() - started
            store(key, record)
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
            sys.stdout.write(f"{key}: {shown}\n")
            sys.stdout.flush()
    PAGE.write_text(page(load()))


def page(results: dict[str, Record]) -> str:
    """The page of docs/."""
    from benchmark_page import render

    return render(results)


if __name__ == "__main__":
    main()
