r"""Hard energies: many dimensions, many modes, particles; and what plain chains do at equal cost.

    python examples/benchmarks/boltzmann.py                        # all that is not measured yet
    python examples/benchmarks/boltzmann.py --targets many-well-32 --methods rsm pt --seeds 0
    python examples/benchmarks/boltzmann_page.py                   # docs/boltzmann.md

Methods:
* ``rsm``: the trainer with its defaults; gradients by autograd at the points of the bank;
* ``rsm-values``: the same from energy values alone (``gradients="differences"``);
* ``rw``, ``hmc``, ``pt``: random-walk Metropolis, Hamiltonian Monte Carlo and parallel tempering
  with random-walk moves, with as many evaluations as the dearer of these two took;
* ``langevin``: annealed Langevin dynamics without a Metropolis test, with as many;
* ``ddpm-mcmc``: denoising score matching (9) on states of parallel tempering, with as many;
* ``ddpm-exact``: the same on 16,384 exact draws of the target;
* ``idem``, ``fab``: the peers of :mod:`rsm_sampler.baselines`, with as many. Their published
  settings spend hundreds to ten thousands of times more; here iDEM uses an estimate eight times
  and FAB an annealed point as often, so that a few thousand optimiser steps come out.

Raw draws of the final model are measured, and apart from them reweighted ones. Evaluations are
those of the fit, warm start included; log Z takes 32,768 more. Every result is written to
docs/results/boltzmann.json at once.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from results import load, store
from scipy import stats
from torch import Tensor

import energies
from rsm_sampler import EnergyDiffusionTrainer, EnergySampler, metrics
from rsm_sampler.baselines import (
    FABConfig,
    FlowSampler,
    IDEMConfig,
    ddpm,
    fab,
    idem,
    langevin,
)
from rsm_sampler.energy import MeteredEnergy
from rsm_sampler.mcmc import run_mcmc
from rsm_sampler.resampling import cumulative_weight, stratified_indices

METHODS = (
    "rsm", "rsm-values", "rw", "hmc", "pt", "langevin", "ddpm-mcmc", "ddpm-exact", "idem", "fab"
)  # fmt: skip
LOG_Z_DRAWS = 32_768
IDEM = IDEMConfig(num_draws=64, batch_size=32, updates=8)
FAB = FABConfig(levels=2, updates=8)


@dataclass(frozen=True)
class Task:
    """A target, how it is measured, and where plain chains start.

    Attributes:
        make: The target.
        n: Draws that enter the measure.
        measure: Name and value of the figure, from draws and the target.
        slow: Observables (n, k) that plain chains are slow in.
        start: Standard deviation of the chains' starts, and the width the peers are given.
        detail: Scale of the finest structure, for Langevin steps.
    """

    make: Callable[[], Any]
    n: int
    measure: Callable[[Any, Tensor], dict[str, float]]
    slow: Callable[[Any, Tensor], Tensor]
    start: float = 3.0
    detail: float = 0.2


def worst_pair(target: Any, x: Tensor) -> dict[str, float]:
    """Largest error of the share of the deeper well over all pairs."""
    gap = target.wells(x).double().mean(0) - target.well_weights[1]
    return {"worst pair": float(gap.abs().max()), "mean pair": float(gap.mean())}


def mode_weights(target: Any, x: Tensor) -> dict[str, float]:
    """Total variation of the mode weights, and modes without a draw."""
    weight = target.responsibilities(x).double().mean(0)
    apart = 0.5 * float((weight - target.mode_weights).abs().sum())
    return {"TV": apart, "missing modes": int((weight < 0.5 / len(x)).sum())}


def funnel_ks(target: Any, x: Tensor) -> dict[str, float]:
    """Kolmogorov-Smirnov distance of the first coordinate."""
    return {"KS": float(stats.kstest(x[:, 0].double().numpy() / 3, "norm").statistic)}


def energy_w2(target: Any, x: Tensor) -> dict[str, float]:
    """Transport distance of the energies to those of fresh reference draws, rooted."""
    exact = target.sample(len(x), generator=torch.Generator().manual_seed(10**6))
    own, other = target(x.double()), target(exact.double())
    return {"energy W2": float(metrics.wasserstein2_1d(own, other)),
            "infinite energies": int((~own.isfinite()).sum())}  # fmt: skip


TASKS: dict[str, Task] = {
    "many-well-32": Task(
        lambda: energies.get("many-well-32"), 100_000, worst_pair, lambda t, x: t.wells(x)
    ),
    **{
        f"many-well-m5-{d}d": Task(
            lambda d=d: energies.SymmetricManyWell(d),  # type: ignore[misc]
            10_000,
            mode_weights,
            lambda t, x: (x[:, :5] > 0).double(),
        )
        for d in (5, 50, 100, 200)
    },
    "funnel": Task(
        lambda: energies.get("funnel"), 10_000, funnel_ks, lambda t, x: x[:, :1] / 3, start=3.0
    ),
    "gmm40-50d": Task(
        lambda: energies.get("gmm40-50d"),
        10_000,
        mode_weights,
        lambda t, x: t.responsibilities(x),
        start=25.0,
        detail=1.0,
    ),
    "dw4": Task(
        lambda: energies.get("dw4"), 1000, energy_w2, lambda t, x: t(x).unsqueeze(-1), start=2.0
    ),
}


def fitted(
    task: Task, target: Any, method: str, seed: int
) -> tuple[EnergySampler | FlowSampler, dict]:
    """A trained sampler and what it took."""
    # A plain function: the chains of another sampler are no use to one that knows its target.
    arguments = (target.energy, target.dim)
    given: dict[str, Any] = {"seed": seed, "particles": getattr(target, "particles", None)}
    started = time.perf_counter()
    sampler: EnergySampler | FlowSampler
    if method in {"rsm", "rsm-values"}:
        gradients = {"gradients": "differences"} if method == "rsm-values" else {}
        trainer = EnergyDiffusionTrainer(*arguments, **given, **gradients)
        sampler = trainer.fit(progress=sys.stderr.isatty())
    elif method == "ddpm-exact":
        generator = torch.Generator().manual_seed(seed)
        sampler = ddpm(*arguments, samples=target.sample(16_384, generator=generator), **given)
    else:
        given |= {"evaluations": budget(names()[id(task)], seed), "scale": task.start}
        if method == "ddpm-mcmc":
            sampler = ddpm(*arguments, **given)
        elif method == "idem":
            sampler = idem(*arguments, **given, config=IDEM)
        else:
            sampler = fab(*arguments, **given, config=FAB)
    record = {
        "fit_seconds": time.perf_counter() - started,
        "evaluations": sum(sampler.counts.values()),
        "counts": sampler.counts,
        "history": sampler.history,
    }
    return sampler, record


def budget(name: str, seed: int) -> int:
    """Evaluations of the trained samplers of this seed: the larger number."""
    records = load("boltzmann")
    spent = [
        records[key]["evaluations"]
        for key in (f"{name} rsm/{seed}", f"{name} rsm-values/{seed}")
        if key in records
    ]
    if not spent:
        raise SystemExit(f"measure rsm or rsm-values on {name} with seed {seed} first")
    return max(spent)


def plain(task: Task, target: Any, method: str, seed: int, n: int) -> tuple[Any, float]:
    """Chains with the same number of evaluations, and the seconds they took."""
    generator = torch.Generator().manual_seed(seed)
    evaluations = budget(names()[id(task)], seed)
    chains = {"pt": 32, "hmc": 64}.get(method, 128)
    x_0 = task.start * torch.randn(chains, target.dim, dtype=torch.float64, generator=generator)
    x_0 = torch.where(target(x_0).isfinite()[:, None], x_0, x_0 / 3)
    options: dict[str, Any] = {"method": method}
    if method == "pt":
        options = {
            "method": "parallel-tempering",
            "num_levels": max(12, int(3 * math.sqrt(target.dim))),
            "reference_loc": 0.0,
            "reference_scale": task.start,
        }
    started = time.perf_counter()
    steps = evaluations // (chains * options.get("num_levels", 21 if method == "hmc" else 1))
    kept = min(n, int(0.6 * steps) * chains)
    result = run_mcmc(
        target.energy,
        x_0,
        evaluations=evaluations,
        generator=generator,
        num_samples=kept,
        **options,
    )
    return result, time.perf_counter() - started


def annealed(
    task: Task, target: Any, seed: int, n: int, *, chains: int = 128
) -> tuple[Tensor, int, float]:
    """States of annealed Langevin chains (kept, chains, dim), evaluations and seconds."""
    steps = budget(names()[id(task)], seed) // (2 * chains) - 1
    keep = min(math.ceil(n / chains), steps // 2)
    started = time.perf_counter()
    sampler = langevin(
        target.energy,
        target.dim,
        num_steps=steps,
        keep=keep,
        scale=task.start,
        detail=task.detail,
        seed=seed,
        dtype=torch.float64,
    )
    x = sampler.sample(keep * chains).view(keep, chains, target.dim)
    return x, sum(sampler.counts.values()), time.perf_counter() - started


def names() -> dict[int, str]:
    """Tasks by identity."""
    return {id(task): name for name, task in TASKS.items()}


def independent_draws(values: Tensor) -> float:
    """What dependent chains (kept, chains, k) are worth, by the spread of their means."""
    within = values.flatten(0, 1).double().var(0)
    between = values.double().mean(0).var(0) / values.shape[1]
    return float((within / between.clamp(min=1e-300)).amin())


def of_chains(
    task: Task, target: Any, chains: Tensor, samples: Tensor, evaluations: int, seconds: float
) -> dict[str, Any]:
    """A row of chains (kept, chains, dim), of whose states those samples (n, dim) are measured."""
    samples = samples[-task.n :]
    seen = task.slow(target, chains.flatten(0, 1)).view(*chains.shape[:2], -1)
    worth = independent_draws(seen)
    return {
        "evaluations": evaluations,
        "fit_seconds": seconds,
        "raw": task.measure(target, samples),
        "draws": len(samples),
        "log_z_error": None,
        "log_z_se": None,
        "seconds_per_10k": 10_000 * seconds / max(worth, 1e-9),
        "independent": worth,
    }


def measure(name: str, method: str, seed: int) -> dict[str, Any]:
    """One row."""
    task = TASKS[name]
    target = task.make()
    if method == "langevin":
        chains, evaluations, seconds = annealed(task, target, seed, task.n)
        return of_chains(task, target, chains, chains.flatten(0, 1), evaluations, seconds)
    if method in {"rw", "hmc", "pt"}:
        result, seconds = plain(task, target, method, seed, task.n)
        record = of_chains(
            task, target, result.chains, result.samples, result.evaluations, seconds
        )
        record["log_z_error"] = None if result.log_z is None else result.log_z - target.log_z
        record["log_z_se"] = result.log_z_se
        return record
    sampler, record = fitted(task, target, method, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    started = time.perf_counter()
    x = sampler.sample(10_000, generator=generator)
    record["seconds_per_10k"] = time.perf_counter() - started
    if task.n > len(x):
        x = torch.cat([x, sampler.sample(task.n - len(x), generator=generator)])
    record["draws"] = task.n
    record["raw"] = task.measure(target, x[: task.n])
    meter = MeteredEnergy(target.energy, target.dim)
    draws = sampler.weighted_draws(LOG_Z_DRAWS, energy=meter, generator=generator)
    log_weight = draws.log_weight.double()
    log_z = float(torch.logsumexp(log_weight, 0)) - math.log(LOG_Z_DRAWS)
    record["ess"] = draws.ess / LOG_Z_DRAWS
    record["log_z_se"] = math.sqrt(max(0.0, 1 / draws.ess - 1 / LOG_Z_DRAWS))
    record["log_z_error"] = log_z - target.log_z
    record["log_z_evaluations"] = meter.evaluations
    index = stratified_indices(cumulative_weight(draws.x, log_weight), task.n, generator)
    index = index[torch.randperm(task.n, generator=generator)]
    record["reweighted"] = task.measure(target, draws.x[index])
    return record


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    np.seterr(all="raise", under="ignore")
    for seed in arguments.seeds:
        for name in arguments.targets:
            for method in arguments.methods:
                key = f"{name} {method}/{seed}"
                if key in load("boltzmann"):
                    continue
                record = measure(name, method, seed)
                store("boltzmann", key, record)
                error = record["log_z_error"]
                print(
                    f"{key:34} raw {record['raw']} reweighted {record.get('reweighted')} "
                    f"log Z {'-' if error is None else f'{error:+.4f}'} "
                    f"evaluations {record['evaluations']:,} fit {record['fit_seconds']:.0f} s "
                    f"10k draws {record['seconds_per_10k']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
