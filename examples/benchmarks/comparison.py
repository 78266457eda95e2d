"""All agents side by side after equally many steps: one table, an update every fifth step.

    python examples/benchmarks/comparison.py --jobs 2      # hours; it goes on where it stopped
    python examples/benchmarks/comparison.py --envs Pendulum-v1 --agents sdac sac --jobs 2
    python examples/benchmarks/comparison.py --cost        # minutes, on a machine that rests
    python examples/benchmarks/comparison.py --report-only

50,000 steps and an update every fifth, after 5,000 random steps that count, as in the paper but
shorter: five environments at a time, SAC and TD3 of stable-baselines3 one. Networks of two layers
of 128, and, for so few updates, faster critics than the paper's. SAC and TD3 have the same widths,
rates of critics and averaging, a policy as fast as the critics (1e-3), and critics without
normalised layers, which their library does not have. So has SDAC, half of whose candidates are
about the clean action besides, as in [its own results](results_sdac.md), whose actions have noise,
of whose policy a slow copy acts, both as in the published code, and whose five noise levels are
geometric: for this seeds that are not in the table spoke ([what was
tried](comparison_variants.md)); settings before these had been given up after seed 2 of this table
failed on Pendulum-v1. Our other agents keep the policy's default rate (3e-4), normalised
critics and cosine levels; for DPMD the same seeds spoke for that, the rest were not tried
otherwise. SAC and TD3 are evaluated by their mean action, ours by the best of ten. PPO
and DPPO, which learn from rollouts, have their defaults, DPPO with the same widths, PPO
observations that are standardised and rewards that are scaled, as DPPO has. Five seeds for SDAC,
DPMD and SAC, three for the rest; QVPO, DIPO and DPPO on two tasks. Every evaluation is 20
episodes, every 5,000 steps. The minutes of a run are of machines of different speed, which did
other work at times; "Cost" below is measured side by side.

Runs are in ``--runs``; the returns of finished ones at every evaluation go to
docs/results/comparison.json, and are not made again, the report of all to docs/comparison.md with
its figures.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, load, store

import rl
from rl.comparison import Comparison, Curve, read, write_report
from rsm_sampler.checkpoint import CheckpointError

TASKS = ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5", "HalfCheetah-v5"]
STEPS, EVERY = 50_000, 5000
# The task that costs are of, steps of each run, of which the first are random, and runs.
TIMED, TIMED_STEPS, RANDOM_STEPS, TIMES = "HalfCheetah-v5", 8000, 6000, 3
ON_POLICY = "ppo", "dppo"  # they learn in bursts, after rollouts
SIZES: dict[str, Any] = {
    "width": 128,
    "depth": 2,
    "num_steps": 5,
    "critic_layer_norm": True,
    "critic_lr": 1e-3,
    "polyak": 0.02,
}
# Of stable-baselines3; an update every fifth step is what rl.compare gives them anyway.
YARDSTICK: dict[str, Any] = {
    "learning_rate": 1e-3,
    "tau": 0.02,
    "policy_kwargs": {"net_arch": [128, 128]},
}
# Before the choice of :mod:`comparison_variants`, and what it chose.
SHARED = {
    "sdac": {**SIZES, "num_draws": 32, "policy_states": 64, "min_ess": 2.0},
    "dpmd": SIZES,
}
PLAIN = {"policy_lr": 1e-3, "critic_layer_norm": False}
SHARPER = {**PLAIN, "proposal": "next", "anchor_share": 0.5}
NOISY = {**SHARPER, "noise": 0.1}
STEADY = {**NOISY, "behaviour_from_average": True}
CHOSEN = {**STEADY, "schedule": "geometric", "min_ess": None}
# Seeds, and what is changed of the defaults.
AGENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sdac": (5, {**SHARED["sdac"], **CHOSEN}),
    "dpmd": (5, SHARED["dpmd"]),
    "sac": (5, YARDSTICK),
    "qsm": (3, SIZES),
    "dacer": (3, SIZES),
    "td3": (3, YARDSTICK),
    "ppo": (3, {"normalise": True}),
    "qvpo": (3, SIZES),
    "dipo": (3, SIZES),
    "dppo": (3, {"width": 128, "depth": 2, "num_steps": 5}),
}
SOME = {name: ["Pendulum-v1", "HalfCheetah-v5"] for name in ("qvpo", "dipo", "dppo")}


def stored() -> dict[str, dict]:
    """Finished runs by ``agent env/seed``, with the present settings."""
    found = {key: record for key, record in load("comparison").items() if key != "random"}
    return {
        key: record
        for key, record in found.items()
        if record["settings"] == AGENTS[key.split()[0]][1]
    }


def keep(found: Comparison) -> None:
    """Store what is finished and not yet stored."""
    before = stored()
    for agent, by_env in found.curves.items():
        for env, runs in by_env.items():
            for seed, curve in runs.items():
                key = f"{agent} {env}/{seed}"
                if key not in before and curve.steps[-1] >= STEPS:
                    store("comparison", key, {**asdict(curve), "settings": AGENTS[agent][1]})
    store("comparison", "random", {**load("comparison").get("random", {}), **found.random})


def say(line: str, runs: Path) -> None:
    """Show a line of progress, which also comes whenever a run is finished, and store that."""
    print(line, file=sys.stderr, flush=True)
    if line.startswith("["):
        keep_all(runs)


def keep_all(runs: Path) -> None:
    """Store what is finished in a folder of runs."""
    with suppress(CheckpointError):  # nothing is there yet
        keep(read(runs, total_steps=STEPS))


def missing(
    seed: int, envs: Sequence[str], agents: Sequence[str]
) -> dict[tuple[str, ...], list[str]]:
    """Agents that have not been trained with this seed, by the tasks that they lack."""
    found: dict[tuple[str, ...], list[str]] = {}
    done = stored()
    for agent in agents:
        lacking = tuple(
            env
            for env in envs
            if env in SOME.get(agent, TASKS)
            and seed < AGENTS[agent][0]
            and f"{agent} {env}/{seed}" not in done
        )
        if lacking:
            found.setdefault(lacking, []).append(agent)
    return found


def measure_cost() -> None:
    """Steps in a second of off-policy agents while they learn, one thread, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in AGENTS if name not in ON_POLICY}
    with tempfile.TemporaryDirectory() as folder:
        for repeat, name in itertools.product(range(TIMES), rates):
            out = Path(folder) / f"{repeat}"
            rl.compare(
                [TIMED],
                [name],
                total_steps=TIMED_STEPS,
                out=out,
                seeds=[0],
                jobs=os.cpu_count() or 1,  # one run alone, which has one thread
                changes={name: AGENTS[name][1]},
                eval_every=TIMED_STEPS,
            )
            log = out / "runs" / f"{name}-{TIMED}-0" / "log.jsonl"
            records = [json.loads(line) for line in log.read_text().splitlines()]
            learning = [
                record["env_steps_per_second"]
                for record in records
                if record["step"] > RANDOM_STEPS and "env_steps_per_second" in record
            ]
            rates[name].append(statistics.median(learning))
    for name, found in rates.items():
        store("comparison_cost", name, {"steps_per_second": found})


def cost_lines() -> list[str]:
    """The table of costs, where they were measured."""
    found = load("comparison_cost")
    if not found:
        return []
    minutes = {
        name: sorted(STEPS / 60 / rate for rate in found[name]["steps_per_second"])
        for name in AGENTS
        if name in found
    }
    return [
        "",
        "## Cost",
        "",
        f"Minutes of {STEPS:,} steps on {TIMED} with one thread, evaluations not counted: steps "
        f"{RANDOM_STEPS:,} to {TIMED_STEPS:,} of three runs, one agent after the other and one "
        "run at a time; the median and the range. PPO and DPPO learn in bursts, after rollouts, "
        "and are not timed here.",
        "",
        f"| {' | '.join(minutes)} |",
        "|---" * len(minutes) + "|",
        "| "
        + " | ".join(f"{m[len(m) // 2]:.1f} ({m[0]:.1f} to {m[-1]:.1f})" for m in minutes.values())
        + " |",
    ]


def report() -> None:
    """Tables and figures of what is stored."""
    curves: dict[str, dict[str, dict[int, Curve]]] = {name: {} for name in AGENTS}
    for key, record in stored().items():
        name, seed = key.split("/")
        agent, env = name.split()
        curve = Curve(**{k: v for k, v in record.items() if k not in ("machine", "settings")})
        curves[agent].setdefault(env, {})[int(seed)] = curve
    random = {env: value for env, value in load("comparison")["random"].items() if env in TASKS}
    found = Comparison({agent: by for agent, by in curves.items() if by}, random, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        text = write_report(found, folder).read_text()
        for name in ("curves", "profiles"):
            drawn = Path(folder) / f"{name}.png"
            if drawn.exists():
                copy = FOLDER.parent / "figures" / f"comparison_{name}.png"
                copy.write_bytes(drawn.read_bytes())
            text = text.replace(f"({name}.png)", f"(figures/comparison_{name}.png)")
    title, _, rest = text.partition("\n")
    machines = {
        ", ".join(f"{name} {value}" for name, value in record["machine"].items())
        for record in stored().values()
    }
    lacking: dict[str, list[int]] = {}
    for seed in range(max(seeds for seeds, _ in AGENTS.values())):
        for envs, agents in missing(seed, TASKS, list(AGENTS)).items():
            for run in (f"{agent} on {env}" for env in envs for agent in agents):
                lacking.setdefault(run, []).append(seed)
    gaps = [f"{run} (seeds {', '.join(map(str, seeds))})" for run, seeds in lacking.items()]
    settings = "\n".join(
        f"* {name}: {seeds} seeds"
        + (f" on {', '.join(SOME[name])}" if name in SOME else "")
        + "".join(f", `{key}={value}`" for key, value in changes.items())
        for name, (seeds, changes) in AGENTS.items()
    )
    assert __doc__ is not None
    said = __doc__.split("\n\n")[2].replace("\n", " ")
    page = [
        "# All agents side by side",
        "",
        "Written by `python examples/benchmarks/comparison.py`.",
        "",
        said,
        "",
        f"Here: {title.removeprefix('# ')}. Machine: {' or '.join(sorted(machines))}.",
        *(["", f"**Not run yet**: {'; '.join(gaps)}."] if gaps else []),
        "",
        rest.strip("\n"),
        *cost_lines(),
        "",
        "## Settings",
        "",
        settings,
        "",
    ]
    (FOLDER.parent / "comparison.md").write_text("\n".join(page))


def main() -> None:
    """Run what is missing, then write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--agents", nargs="*", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--cost", action="store_true", help="measure what agents cost")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost:
        measure_cost()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.jobs))  # as each run has
    failed = []
    for seed in [] if arguments.report_only or arguments.cost else arguments.seeds:
        for envs, agents in missing(seed, arguments.envs, arguments.agents).items():
            try:
                rl.compare(
                    envs,
                    agents,
                    total_steps=STEPS,
                    out=arguments.runs,
                    seeds=[seed],
                    jobs=arguments.jobs,
                    changes={agent: AGENTS[agent][1] for agent in agents},
                    say=lambda line: say(line, arguments.runs),
                    eval_every=EVERY,
                )
            except RuntimeError as error:  # of some runs; the page says which are not there
                failed.append(str(error))
            keep_all(arguments.runs)
    report()
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
