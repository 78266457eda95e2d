"""How far exploration, samplers and their verdicts can be trusted; the targets' answers are known.

    python examples/benchmarks/exploration.py explore             # the quick answer, all targets
    python examples/benchmarks/exploration.py fit light b20000    # fits; all that is not there yet
    python examples/benchmarks/exploration.py explore --sets kinds --seeds 0 1 2 --jobs 2
    python examples/benchmarks/exploration.py fit --targets spike eggbox --seeds 0 --again
    python examples/benchmarks/exploration_page.py                # docs/exploration.md

Modes:
* ``explore``: :func:`rsm_sampler.explore` with its defaults, ``explore-20000`` and
  ``explore-10000`` with a budget of so many evaluations; ``quick``: the same on four targets in
  the plane, asked for 10,000 effective draws;
* ``fit``: the trainer with its defaults, 20,000 raw draws, the verdict; ``light``: the same with a
  small network and few steps, so that search, witness and verdict are those of the defaults at a
  fraction of the time; ``b20000`` and ``b10000``: fits with a budget of so many evaluations, of
  the small network except for posteriors;
* ``false-alarms``: 40 random mixtures, each examined with a sampler that has the exact denoiser;
  ``sabotage``: 40 samplers broken on purpose (a mode removed, weights off, undertrained);
* ``peers``: dynesty and nautilus, asked for 10,000 effective draws of the same counted energies.

A **lie** is the word "trustworthy" although masses are off by more than 0.1 in total variation or
log Z by more than 0.2. Of a hidden mode that is not found the word may be "trustworthy"; then the
statement of coverage is false if it excludes the mode: its largest share of starts, over round
normal laws of any width, or its width at its mass.

Each result goes to docs/results/exploration/<mode>.json at once, with versions and machine, and is
not measured again. Times are seconds of the processor on one thread.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import exploration_targets as targets
import numpy as np
import torch
from exploration_targets import Case, get
from results import machine
from torch import Tensor

import energies
import rsm_sampler
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig, metrics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "results" / "exploration"
Record = dict[str, Any]
TARGET_MODES = (
    "explore", "explore-20000", "explore-10000", "quick", "fit", "light", "b20000", "b10000"
)  # fmt: skip
MODES = (*TARGET_MODES, "false-alarms", "sabotage", "peers")
QUICK = ("paper", "gmm40", "moons", "rings")
PEERS = ("gmm40", "eggbox", "spike", "rosen4", "shells2", "eight")
MOST_TV, MOST_LOG_Z = 0.1, 0.2  # beyond these "trustworthy" is a lie


# ------------------------------------------------------------------ measuring


class Counted:
    """An energy that counts on its own account, and times itself."""

    def __init__(self, energy: Callable[[Tensor], Tensor]) -> None:
        self.energy, self.points, self.calls, self.largest = energy, 0, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        """Energies of points (n, dim)."""
        self.points, self.calls = self.points + len(x), self.calls + 1
        self.largest = max(self.largest, len(x))
        return self.energy(x)


def coverage_record(case: Case, answer: Any) -> Record:
    """What a statement of coverage says, and whether it excludes a mode that is there."""
    coverage = getattr(answer, "coverage", None)
    if coverage is None:
        return {}
    record: Record = {"coverage": str(coverage)}
    excluded = getattr(coverage, "excluded", None)
    if excluded is not None:
        record["excluded"] = float(excluded)
    if case.hidden is not None:
        mode = case.hidden
        centre = torch.zeros(case.dim, dtype=torch.float64)
        share = max(mode.share_of_normal(centre, s) for s in np.geomspace(1e-3, 1e3, 200))
        record.update(mode_share=share, mode_width=mode.width, mode_mass=mode.mass)
        if excluded is not None:
            record["excludes"] = bool(share > excluded)
        if hasattr(coverage, "width"):
            record["visible_width"] = float(coverage.width(mode.mass))
            wide = bool(mode.width > record["visible_width"])
            record["excludes"] = wide or record.get("excludes", False)
    return record


def judged(case: Case, record: Record) -> Record:
    """The record with what it means: a lie, limits reached, a false statement of coverage."""
    trusted = record["verdict"].lower() == "trustworthy"
    errors = {**record, "log_z": abs(record["log_z_error"])}
    wrong = record.get("tv", 0.0) > MOST_TV or not errors["log_z"] <= MOST_LOG_Z
    most = {field: value for field, value in vars(case.limits).items() if value is not None}
    record["beyond"] = [k for k, v in most.items() if k in errors and not errors[k] <= v]
    record["within"] = not record["beyond"]
    if case.hidden is None:
        record["lie"] = trusted and wrong
        record["reached"] = record["within"] and trusted
        if case.heavy:
            record["reached"] = record["within"] or not trusted
    else:
        found = record.get("tv", 1.0) <= MOST_TV
        record["lie"] = not found and bool(record.get("excludes", False))
        record["reached"] = found or not record.get("excludes", trusted)
    return record


def explored(case: Case, seed: int, **options: Any) -> Record:
    """The quick answer."""
    energy = Counted(case.energy)
    started, wall = time.process_time(), time.perf_counter()
    result = rsm_sampler.explore(energy, case.dim, seed=seed, **case.options, **options)
    record: Record = {
        "seconds": time.process_time() - started,
        "wall": time.perf_counter() - wall,
        "evaluations": int(result.evaluations),
        "points": energy.points,
        "largest_batch": energy.largest,
        "counts": dict(result.counts),
        "method": str(result.method),
        "n": len(result.x),
        "log_z_error": float(result.log_z) - case.log_z,
        "log_z_se": float(result.log_z_se),
        "stated_ess": float(result.ess),
        "basins": len(result.basins),
        "verdict": str(result.verdict),
        "reasons": list(getattr(result, "reasons", ())),
        "starts": result.coverage.starts - result.coverage.unknown,
    }
    record.update(case.score(result.x.detach(), result.log_weight.detach()))
    record.update(coverage_record(case, result))
    record["basin_masses"] = sorted(
        (round(float(b.mass), 4) for b in result.basins), reverse=True
    )[:40]
    return record


def light(dim: int) -> TrainerConfig:
    """A small network and few steps: search, witness and verdict are those of the defaults."""
    few = dim <= 12
    return TrainerConfig(
        steps_per_cycle=700 if few else 900,
        max_cycles=1 if few else 2,
        width=64,
        depth=3,
        batch_size=512,
    )


def fitted(case: Case, seed: int, **options: Any) -> Record:
    """A fit, 20,000 raw draws and the verdict; the search is measured apart."""
    energy = Counted(case.energy)
    started, wall = time.process_time(), time.perf_counter()
    trainer = EnergyDiffusionTrainer(energy, case.dim, seed=seed, **case.options, **options)
    record: Record = {}
    if hasattr(trainer, "explore"):
        trainer.explore()
    else:
        trainer._search(lambda _: None)
    record.update(
        search_seconds=time.process_time() - started, search_evaluations=int(trainer.evaluations)
    )
    bank = trainer.bank
    if bank is not None:
        record.update(
            bank_ess=float(bank.ess), bank_n=int(bank.log_weight.numel()),
            method=str(bank.method), bank_log_z_error=float(bank.log_z) - case.log_z,
        )  # fmt: skip
    sampler = trainer.fit(progress=False)
    record.update(
        fit_seconds=time.process_time() - started, fit_evaluations=int(trainer.evaluations),
        steps=int(trainer.step),
    )  # fmt: skip
    x = sampler.sample(20_000, generator=torch.Generator().manual_seed(12))
    record.update(case.score(x))
    again = time.process_time()
    report = sampler.diagnose()
    record.update(
        verdict_seconds=time.process_time() - again,
        verdict_evaluations=int(report.evaluations),
        seconds=time.process_time() - started,
        wall=time.perf_counter() - wall,
        points=energy.points,
        largest_batch=energy.largest,
        evaluations=int(trainer.evaluations) + int(report.evaluations),
        counts=dict(trainer.energy.counts),
        verdict=str(report.verdict),
        trustworthy=bool(report.trustworthy),
        log_z_error=float(report.log_z) - case.log_z,
        log_z_se=float(report.log_z_se),
        ess_share=report.ess / report.n,
        witness=str(report.witness.method),
        witness_log_z_error=float(report.witness.log_z) - case.log_z,
        findings=list(report.findings),
        advice=list(report.advice),
    )
    record.update(coverage_record(case, report))
    return record


def of_target(mode: str, name: str, seed: int) -> Record:
    """One result of one target."""
    case = get(name)
    head: Record = {"target": name, "set": targets.group_of(name), "dim": case.dim}
    options: Record = {}
    budget = "".join(filter(str.isdigit, mode))
    if budget:
        options["budget"] = int(budget)
    if mode == "quick" or mode.startswith("explore"):
        return judged(case, {**head, **explored(case, seed, **options)})
    if mode == "light" or (budget and head["set"] != "posteriors"):
        options["config"] = light(case.dim)
    record = fitted(case, seed, **options)
    return judged(case, {**head, **record})


# ------------------------------------------------------------------ verdicts on made-up samplers


def random_mixture(seed: int) -> energies.GaussianMixture:
    """2 to 6 separate modes in 2 to 10 dimensions, each with axes and widths of its own."""
    generator = torch.Generator().manual_seed(4000 + seed)
    dim, modes = 2 + seed % 9, 2 + (seed // 9) % 5
    plain = energies.GaussianMixture.random(
        dim, modes, min_separation=6.0, min_weight=0.06, generator=generator
    )
    factor = torch.linalg.qr(
        torch.randn(modes, dim, dim, dtype=torch.float64, generator=generator)
    )[0]
    width = 0.4 + 0.9 * torch.rand(modes, 1, dim, dtype=torch.float64, generator=generator)
    covariance = (factor * width.square()) @ factor.mT
    return energies.GaussianMixture(
        plain.loc, covariance=(covariance + covariance.mT) / 2, weights=plain.weights
    )


def exact_sampler(target: Any, law: Any = None) -> Any:
    """The tests' sampler that is exact for a law and is shown the energy of a target."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.exact_sampler import exact_sampler as make

    return make(target, law, num_steps=32)


def examined(sampler: Any, target: Any, seed: int) -> Record:
    """The verdict beside the truth."""
    started = time.process_time()
    report = sampler.diagnose(energy=target, seed=seed)
    seconds = time.process_time() - started
    share = target.responsibilities(sampler.sample(20_000).double()).double()
    return {
        "dim": target.dim,
        "modes": len(target.loc),
        "verdict": str(report.verdict),
        "trusted": str(report.verdict).lower() == "trustworthy",
        "tv": float(metrics.mode_weight_total_variation(share, target.mode_weights)),
        "log_z_error": float(report.log_z - target.log_z),
        "ess_share": report.ess / report.n,
        "evaluations": int(report.evaluations),
        "seconds": seconds,
        "witness": str(report.witness.method),
        "findings": list(report.findings),
    }


def false_alarm(seed: int) -> Record:
    """A sampler as good as can be."""
    target = random_mixture(seed)
    return examined(exact_sampler(target), target, seed)


def sabotaged(seed: int) -> Record:
    """A sampler that is broken on purpose."""
    target = random_mixture(seed)
    what = ("mode removed", "weights off", "undertrained")[seed % 3]
    weights = target.weights.clone()
    if what == "undertrained":
        config = TrainerConfig(
            steps_per_cycle=100, max_cycles=1, width=64, depth=3, batch_size=256
        )
        trainer = EnergyDiffusionTrainer(target, target.dim, seed=seed, config=config)
        sampler = trainer.fit(progress=False)
    else:
        keep = torch.ones(len(weights), dtype=torch.bool)
        if what == "mode removed":
            keep[seed % len(weights)] = False
        else:
            most, least = weights.argmax(), weights.argmin()
            weights[most] -= 0.12
            weights[least] += 0.12
        law = energies.GaussianMixture(
            target.loc[keep],
            covariance=target.covariances[keep],
            weights=weights[keep] / weights[keep].sum(),
        )
        sampler = exact_sampler(target, law)
    return {"what": what, **examined(sampler, target, seed)}


# ------------------------------------------------------------------ peers


class Peer:
    """A target as nested samplers want it: a prior from the unit cube and a log-likelihood."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if case.transform is not None:
            assert case.misfit is not None
            self.energy, self.offset = Counted(case.misfit), 0.0
            self.transform = case.transform
        else:
            assert case.box is not None
            low, high = (end.numpy() for end in case.box)
            self.energy = Counted(case.energy)
            self.offset = float(np.log(high - low).sum())
            self.transform = lambda u: low + (high - low) * u

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        """Values of points (n, dim), large and negative instead of infinite."""
        with torch.no_grad():
            value = -self.energy(torch.as_tensor(np.atleast_2d(x))).numpy()
        return np.where(np.isfinite(value), value, -1e100)


def of_dynesty(peer: Peer, seed: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Draws, their log-weights, log Z and its error, by the dynamic sampler's defaults."""
    import dynesty

    sampler = dynesty.DynamicNestedSampler(
        lambda x: float(peer.log_likelihood(x)[0]),
        lambda u: peer.transform(u[None])[0],
        peer.case.dim,
        rstate=np.random.default_rng(seed),
    )
    sampler.run_nested(n_effective=10_000, print_progress=False)
    found = sampler.results
    return found.samples, found.logwt, float(found.logz[-1]), float(found.logzerr[-1])


def of_nautilus(peer: Peer, seed: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The same by nautilus."""
    import nautilus

    sampler = nautilus.Sampler(
        peer.transform, peer.log_likelihood, n_dim=peer.case.dim, vectorized=True,
        pass_dict=False, seed=seed,
    )  # fmt: skip
    sampler.run(n_eff=10_000, discard_exploration=True, verbose=False)
    x, log_weight, _ = sampler.posterior()
    return x, log_weight, float(sampler.log_z), 1 / math.sqrt(float(sampler.n_eff))


def of_peer(name: str, library: str, seed: int) -> Record:
    """One run of a peer."""
    case, run = get(name), {"dynesty": of_dynesty, "nautilus": of_nautilus}[library]
    peer = Peer(case)
    started = time.process_time()
    x, log_weight, log_z, log_z_se = run(peer, seed)
    seconds = time.process_time() - started
    return {
        "target": name,
        "library": library,
        "seconds": seconds,
        "evaluations": peer.energy.points,
        "calls": peer.energy.calls,
        "log_z_error": log_z + peer.offset - case.log_z,
        "log_z_se": log_z_se,
        **case.score(torch.as_tensor(x), torch.as_tensor(log_weight)),
    }


# ------------------------------------------------------------------ runs and results


def load(store: str) -> dict[str, Record]:
    """All results of a mode so far."""
    path = FOLDER / f"{store}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(store: str, key: str, record: Record) -> None:
    """Add one result; several processes may do so."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{store}.json"
    with Path(tempfile.gettempdir(), f"rsm_sampler_exploration_{store}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = {**load(store), key: record}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        temporary.replace(path)


def plain(value: Any) -> Any:
    """Numbers with six digits, and none that JSON does not know."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def measure(mode: str, key: str) -> Record:
    """The result of a key: target/seed, library/target/seed, or a number."""
    *names, number = key.split("/")
    seed = int(number)
    if mode == "peers":
        return of_peer(names[1], names[0], seed)
    if mode in {"false-alarms", "sabotage"}:
        return (false_alarm if mode == "false-alarms" else sabotaged)(seed)
    return of_target(mode, names[0], seed)


def run(mode: str, key: str, store: str) -> None:
    """Measure one result, print it and keep it; an error is a result, too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            record = measure(mode, key)
        except Exception as error:
            traceback.print_exc(limit=-6)
            record = {"error": f"{type(error).__name__}: {error}"[:500]}
            if mode in TARGET_MODES:
                name = key.split("/")[0]
                record.update(target=name, set=targets.group_of(name))
                record.update(lie=False, within=False, reached=False)
    if caught:
        record["warnings"] = sorted({str(one.message)[:120] for one in caught})[:5]
    record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record["machine"] = {**machine(), "processor": platform.machine()}
    keep(store, key, plain(record))
    shown = {k: v for k, v in plain(record).items() if k not in {"machine", "coverage"}}
    print(json.dumps({"mode": mode, "key": key, **shown}), flush=True)


def keys(mode: str, names: list[str], seeds: list[int]) -> list[str]:
    """All keys of a mode."""
    if mode in {"false-alarms", "sabotage"}:
        return [str(number) for number in range(40)]
    if mode == "peers":
        chosen = [name for name in names if name in PEERS] or list(PEERS)
        return [
            f"{library}/{name}/{seed}"
            for name in chosen
            for library in ("dynesty", "nautilus")
            for seed in seeds
        ]
    chosen = [name for name in names if name in QUICK] or QUICK if mode == "quick" else names
    return [f"{name}/{seed}" for name in chosen for seed in seeds]


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="+", choices=MODES)
    parser.add_argument("--targets", nargs="*", default=[], choices=list(targets.MAKERS))
    parser.add_argument("--sets", nargs="*", default=[], choices=list(targets.SETS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--keys", nargs="*", help="these results only")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, help="seconds after which a run is given up")
    parser.add_argument("--store", help="name of the file of results, the mode's by default")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--smoke", action="store_true", help="one small target, kept nowhere")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(arguments.targets)
    for group in arguments.sets:
        names += [name for name in targets.SETS[group] if name not in names]
    names = names or list(targets.MAKERS)
    if arguments.smoke:
        for mode in arguments.modes:
            key = {"false-alarms": "0", "sabotage": "0", "peers": "nautilus/shells2/0"}
            print(json.dumps(plain(measure(mode, key.get(mode, "paper/0")))), flush=True)
        return
    for mode in arguments.modes:
        store = arguments.store or mode
        wanted = arguments.keys or keys(mode, names, arguments.seeds)
        missing = [key for key in wanted if arguments.again or key not in load(store)]
        if arguments.jobs == 1 and arguments.limit is None:
            for key in missing:
                run(mode, key, store)
            continue

        def apart(key: str, mode: str = mode, store: str = store) -> None:
            command = [sys.executable, __file__, mode, "--keys", key, "--store", store, "--again"]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            try:
                subprocess.run(command, env=one_thread, timeout=arguments.limit, check=False)
            except subprocess.TimeoutExpired:
                late = {"error": f"given up after {arguments.limit:g} s", "lie": False}
                late |= {"within": False, "reached": False, "target": key.split("/")[0]}
                keep(store, key, late)
                print(json.dumps({"mode": mode, "key": key, **late}), flush=True)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(apart, missing))


if __name__ == "__main__":
    main()
