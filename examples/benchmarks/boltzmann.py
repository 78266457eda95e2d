r"""Hard energies: many dimensions, many modes, particles; and what plain chains do at equal cost.

    python examples/benchmarks/boltzmann.py                        # all that is not measured yet
    python examples/benchmarks/boltzmann.py --targets many-well-32 --methods rsm pt --seeds 0
    python examples/benchmarks/boltzmann_page.py                   # docs/boltzmann.md

Methods:
* ``rsm``: the trainer with its defaults, but that networks of particles are compiled and LJ55 is
  trained for longer (9,600 steps instead of 6,000, half of them with gradients); gradients by
  autograd at the points of the bank;
* ``rsm-values``: the same from energy values alone (``gradients="differences"``);
* ``rw``, ``hmc``, ``pt``: random-walk Metropolis, Hamiltonian Monte Carlo and parallel tempering
  with random-walk moves, with as many evaluations as ``rsm`` took;
* ``langevin``: annealed Langevin dynamics without a Metropolis test, with as many;
* ``ddpm-mcmc``: denoising score matching (9) on states of parallel tempering, with as many;
* ``ddpm-hmc``, of Lennard-Jones clusters: the same on those of ``hmc``, which mixes better there;
* ``ddpm-exact``: the same on 16,384 exact draws of the target, or of long chains where there are
  none. All three take the steps of the defaults, of particles twice those of ``rsm``, which
  gradients shorten; of LJ55, where ``rsm`` is trained for longer, as many as it takes;
* ``idem``, ``fab``: the peers of :mod:`rsm_sampler.baselines`, with as many. Their published
  settings spend hundreds to ten thousands of times more; here iDEM uses an estimate eight times
  and FAB an annealed point as often, so that a few thousand optimiser steps come out; for LJ55
  iDEM draws 250 points for a refill instead of 1,000, and its network is compiled.

Raw draws of the final model are measured, and apart from them reweighted ones and, of particles,
refined ones: ends of short Metropolis chains from raw draws, whose evaluations are counted apart.
Evaluations are those of the fit, warm start included; log Z takes 32,768 more (131,072 in 200
dimensions, fewer for particles). Every result is written to docs/results/boltzmann.json at once.
The targets are those of boltzmann_targets.py.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boltzmann_targets import TASKS, Task, reference
from results import load, store
from torch import Tensor

from rsm_sampler import EnergyDiffusionTrainer, EnergySampler, TrainerConfig
from rsm_sampler.baselines import (
    FABConfig,
    FlowSampler,
    IDEMConfig,
    ddpm,
    fab,
    idem,
    langevin,
)
from rsm_sampler.montecarlo.run import refine, run_mcmc
from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices
from rsm_sampler.target.coordinates import Bounds, Coordinates, MeanFree
from rsm_sampler.target.energy import MeteredEnergy

METHODS = (
    "rsm", "rsm-values", "rw", "hmc", "pt", "langevin", "ddpm-mcmc", "ddpm-hmc", "ddpm-exact",
    "idem", "fab",
)  # fmt: skip
CLUSTERS = {"lj13", "lj55"}
DIFFERENTIATING = {"hmc", "langevin", "ddpm-hmc", "idem", "fab"}  # they need autograd
IDEM = IDEMConfig(num_draws=64, batch_size=32, updates=8)
# Of many pairs a refill of 1,000 draws for 3,200 noisy points would take most of the time; the
# defaults refill for 25,600.
IDEM_OF_MANY = dataclasses.replace(IDEM, refill=250, compile=True)
FAB = FABConfig(levels=2, updates=8)


def fitted(
    task: Task, target: Any, method: str, seed: int, kept: Path | None
) -> tuple[EnergySampler | FlowSampler, dict]:
    """A trained sampler and what it took.

    If a folder is given, training that was interrupted goes on from a checkpoint in it.
    """
    # A plain function: the chains of another sampler are no use to one that knows its target.
    arguments = (target.energy, target.dim)
    given: dict[str, Any] = {"seed": seed, "particles": getattr(target, "particles", None)}
    started = time.perf_counter()
    curve: list[tuple[int, float]] = []
    config = TrainerConfig(**task.config)
    # With samples a fit makes all its steps, where gradients save half: as many for LJ55.
    steps = config.steps_per_cycle
    usual = dataclasses.replace(config, steps_per_cycle=None if steps is None else steps // 2)
    sampler: EnergySampler | FlowSampler
    if method in {"rsm", "rsm-values"}:
        gradients = {"gradients": "differences"} if method == "rsm-values" else {}
        trainer = EnergyDiffusionTrainer(*arguments, **given, **gradients, config=config)
        state = None if kept is None else kept / f"{target.name}-{method}-{seed}.trainer.pt"
        sampler = trainer.fit(
            progress=sys.stderr.isatty(),
            callback=lambda at: curve.append((at.step, at.loss)),
            checkpoint_path=state,
        )
        started = time.perf_counter() - trainer.seconds
    elif method == "ddpm-exact":
        samples = reference(target, 16_384, seed=seed).float()
        sampler = ddpm(*arguments, samples=samples, config=usual, **given)
    elif method == "ddpm-hmc":
        sizes = usual.sizes(target.dim, given["particles"])
        checks = sizes.max_cycles * sizes.check_draws
        found, _ = plain(task, target, "hmc", seed, 16_384, spared=checks)
        sampler = ddpm(*arguments, samples=found.samples.float(), config=usual, **given)
        sampler.counts = {"mcmc": found.evaluations, **sampler.counts}
    else:
        given |= {"evaluations": budget(target.name, seed), "scale": task.start}
        if method == "ddpm-mcmc":
            sampler = ddpm(*arguments, config=usual, **given)
        elif method == "idem":
            chosen = IDEM_OF_MANY if target.name == "lj55" else IDEM
            sampler = idem(*arguments, **given, config=chosen)
        else:
            sampler = fab(*arguments, **given, config=FAB)
    record = {
        "fit_seconds": time.perf_counter() - started,
        "evaluations": sum(sampler.counts.values()),
        "counts": sampler.counts,
        "curve": curve[:: math.ceil((len(curve) + 1) / 30)],
        "history": sampler.history[:: math.ceil((len(sampler.history) + 1) / 12)],
    }
    return sampler, record


def budget(name: str, seed: int) -> int:
    """Evaluations that `rsm` took with this seed."""
    records = load("boltzmann")
    if (key := f"{name} rsm/{seed}") not in records:
        raise SystemExit(f"measure rsm on {name} with seed {seed} first")
    return records[key]["evaluations"]


def inner(target: Any) -> tuple[Callable[[Tensor], Tensor], Coordinates]:
    """The energy where chains run, and its coordinates: particles have no place of their own."""
    particles = getattr(target, "particles", None)
    inside: Coordinates = Bounds(-math.inf, math.inf, target.dim)
    if particles is not None:
        inside = MeanFree(*particles)
    return lambda u: target.energy(inside.forward(u)[0]), inside


def plain(
    task: Task, target: Any, method: str, seed: int, n: int, *, spared: int = 0
) -> tuple[Any, float]:
    """Chains with the same number of evaluations but for those spared, and their seconds."""
    generator = torch.Generator().manual_seed(seed)
    evaluations, (energy, inside) = budget(target.name, seed) - spared, inner(target)
    chains = {"pt": 32, "hmc": 64}.get(method, 128)
    if hasattr(target, "scattered"):
        x_0 = inside.inverse(target.scattered(chains, generator=generator))
    else:
        shape = chains, inside.reduced
        x_0 = task.start * torch.randn(shape, dtype=torch.float64, generator=generator)
        x_0 = torch.where(energy(x_0).isfinite()[:, None], x_0, x_0 / 3)
    options: dict[str, Any] = {"method": method}
    if method == "pt":
        options = {
            "method": "parallel-tempering",
            "num_levels": max(12, int(3 * math.sqrt(inside.reduced))),
            "reference_loc": 0.0,
            "reference_scale": task.start,
        }
    started = time.perf_counter()
    steps = evaluations // (chains * options.get("num_levels", 21 if method == "hmc" else 1))
    kept = min(n, int(0.6 * steps) * chains)
    result = run_mcmc(
        energy,
        x_0,
        evaluations=evaluations,
        generator=generator,
        num_samples=kept,
        **options,
    )
    seconds = time.perf_counter() - started
    return dataclasses.replace(
        result,
        samples=inside.forward(result.samples)[0],
        chains=inside.forward(result.chains)[0],
    ), seconds


def annealed(
    task: Task, target: Any, seed: int, n: int, *, chains: int = 128
) -> tuple[Tensor, int, float]:
    """States of annealed Langevin chains (kept, chains, dim), evaluations and seconds."""
    steps = budget(target.name, seed) // (2 * chains) - 1
    keep = min(math.ceil(n / chains), steps // 2)
    energy, inside = inner(target)
    started = time.perf_counter()
    sampler = langevin(
        energy,
        inside.reduced,
        num_steps=steps,
        keep=keep,
        scale=task.start,
        detail=task.detail,
        seed=seed,
        dtype=torch.float64,
    )
    x = inside.forward(sampler.sample(keep * chains))[0].view(keep, chains, target.dim)
    return x, sum(sampler.counts.values()), time.perf_counter() - started


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


def measure(name: str, method: str, seed: int, kept: Path | None = None) -> dict[str, Any]:
    """One row; the trained sampler stays in that folder, if one is given, and so does training."""
    task = TASKS[name]
    target = task.make()
    target.name = name  # that of the results; targets of a family share theirs
    if method == "langevin":
        chains, evaluations, seconds = annealed(task, target, seed, task.n)
        return of_chains(task, target, chains, chains.flatten(0, 1), evaluations, seconds)
    if method in {"rw", "hmc", "pt"}:
        result, seconds = plain(task, target, method, seed, task.n)
        record = of_chains(
            task, target, result.chains, result.samples, result.evaluations, seconds
        )
        record |= error_of(result.log_z, target)
        record["log_z_se"] = result.log_z_se
        return record
    sampler, record = fitted(task, target, method, seed, kept)
    if kept is not None and isinstance(sampler, EnergySampler):
        sampler.save(kept / f"{name}-{method}-{seed}.pt")
    generator = torch.Generator().manual_seed(seed + 1000)
    started = time.perf_counter()
    x = sampler.sample(task.n, generator=generator)
    record["seconds_per_10k"] = 10_000 / task.n * (time.perf_counter() - started)
    if isinstance(sampler, EnergySampler):
        record["bank"] = of_bank(sampler, target)
    record["draws"] = task.n
    record["raw"] = task.measure(target, x)
    meter = MeteredEnergy(target.energy, target.dim)
    count = task.log_z_draws
    draws = sampler.weighted_draws(count, energy=meter, generator=generator)
    log_weight = draws.log_weight.double()
    record |= error_of(float(torch.logsumexp(log_weight, 0)) - math.log(count), target)
    record["ess"] = draws.ess / count
    record["log_z_se"] = math.sqrt(max(0.0, 1 / draws.ess - 1 / count))
    record["log_z_evaluations"] = meter.evaluations
    index = stratified_indices(cumulative_weight(draws.x, log_weight), task.n, generator)
    index = index[torch.randperm(task.n, generator=generator)]
    record["reweighted"] = task.measure(target, draws.x[index])
    if task.refine_steps:
        record["refined"] = refined(task, target, x, method, generator)
    if hasattr(target, "entropy") and isinstance(sampler, EnergySampler):
        # The entropy is known, so only the divergence is left to chance.
        x = reference(target, 2048)
        log_ratio = -target(x) - target.log_z - sampler.log_prob(x.float()).double()
        record["nll"] = target.entropy + float(log_ratio.mean())
        record["nll_se"] = float(log_ratio.std()) / math.sqrt(len(x))
    return record


def error_of(log_z: float | None, target: Any) -> dict[str, float | None]:
    """An estimate of log Z, and its error where the truth is known."""
    known = log_z is not None and target.log_z is not None
    return {"log_z": log_z, "log_z_error": log_z - target.log_z if known else None}


def of_bank(sampler: EnergySampler, target: Any) -> dict[str, Any]:
    """What the last bank of training says of log Z by itself: independent draws, no chains."""
    log_z, log_z_se = (sampler.search.get(key, math.nan) for key in ("log_z", "log_z_se"))
    known = math.isfinite(log_z_se)
    return {**error_of(log_z if known else None, target), "log_z_se": log_z_se if known else None}


def refined(
    task: Task, target: Any, x: Tensor, method: str, generator: torch.Generator
) -> dict[str, float]:
    """The figure after short Metropolis chains from raw draws, and what they cost."""
    energy, inside = inner(target)
    moved = refine(
        energy,
        inside.inverse(x.double()),
        steps=task.refine_steps,
        method=task.refine_by if task.differentiable and method != "rsm-values" else "rw",
        generator=generator,
    )
    return {
        **task.measure(target, inside.forward(moved.x)[0]),
        "draws": len(x),
        "evaluations": moved.evaluations,
        "steps": task.refine_steps,
        "energy drift": moved.energy_drift,
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--keep", type=Path, help="folder of checkpoints and trained samplers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    np.seterr(all="raise", under="ignore")
    for seed in arguments.seeds:
        for name in arguments.targets:
            for method in arguments.methods:
                key, task = f"{name} {method}/{seed}", TASKS[name]
                if seed >= task.seeds or (key in load("boltzmann") and not arguments.again):
                    continue
                if method in {*DIFFERENTIATING, "rsm-values"} and not task.differentiable:
                    continue
                if method == "ddpm-hmc" and name not in CLUSTERS:
                    continue
                record = measure(name, method, seed, arguments.keep)
                store("boltzmann", key, record)
                if arguments.keep is not None:
                    (arguments.keep / f"{name}-{method}-{seed}.trainer.pt").unlink(missing_ok=True)
                error = record["log_z_error"]
                print(
                    f"{key:34} raw {record['raw']} reweighted {record.get('reweighted')} "
                    f"refined {record.get('refined')} "
                    f"log Z {'-' if error is None else f'{error:+.4f}'} "
                    f"evaluations {record['evaluations']:,} fit {record['fit_seconds']:.0f} s "
                    f"10k draws {record['seconds_per_10k']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
