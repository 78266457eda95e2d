"""What would help SDAC and DPMD where another agent is ahead of them: one change at a time.

    python examples/benchmarks/comparison_variants.py --jobs 2     # all that is not run yet
    python examples/benchmarks/comparison_variants.py --envs Reacher-v5 --agents sdac
    python examples/benchmarks/comparison_variants.py --report-only

Runs of :mod:`comparison`, but with the seed 100, which is not in its table, so that nothing that
is chosen here has seen the seeds it is judged by. SAC is trained with the same seed. Results go to
docs/results/comparison_variants.json, the page is docs/comparison_variants.md.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from comparison import AGENTS, EVERY, SHARED, STEPS, TASKS
from results import FOLDER, load, store

import rl
from rl.comparison import read
from rsm_sampler.checkpoint import CheckpointError

NAME, BASE, SEED = "comparison_variants", "base", 100
SETTINGS = {**SHARED, "sac": AGENTS["sac"][1]}
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "faster policy": {"policy_lr": 1e-3},
    "critics not normalised": {"critic_layer_norm": False},
    "faster policy, critics not normalised": {"policy_lr": 1e-3, "critic_layer_norm": False},
    "slower critics": {"critic_lr": 3e-4},
    "policy at every update": {"policy_period": 1},
}


def keep(folder: Path, variant: str) -> None:
    """Store what is finished in a folder of runs."""
    with suppress(CheckpointError):  # nothing is there yet
        found = read(folder, total_steps=STEPS)
        for agent, by_env in found.curves.items():
            for env, runs in by_env.items():
                key, curve = f"{agent} {env} {variant}", runs[SEED]
                if key not in load(NAME) and curve.steps[-1] >= STEPS:
                    settings = {**SETTINGS[agent], **VARIANTS[variant]}
                    store(NAME, key, {"returns": curve.returns, "settings": settings})


def report() -> None:
    """The page: a table for each task."""
    order = [f"{agent} {variant}" for agent in SETTINGS for variant in VARIANTS]
    lines = [
        "# What was tried where SDAC and DPMD are behind",
        "",
        "Written by `python examples/benchmarks/comparison_variants.py`: runs of "
        "[the comparison](comparison.md), one change at a time, with the seed "
        f"{SEED}, which is not in its table. Means of 20 episodes at the end of {STEPS:,} steps "
        "and over the last five evaluations, 5,000 steps from each other. It is one seed; its "
        "table shows what seeds differ by.",
        "",
        *(f"* {agent}: {_settings(changes)}" for agent, changes in SETTINGS.items()),
    ]
    for env in TASKS:
        rows = {}
        for key, record in load(NAME).items():
            agent, task, variant = key.split(" ", 2)
            if task == env:
                rows[f"{agent} {variant}"] = record["returns"]
        if rows:
            head = ["| agent | change | last | last five |", "|---|---|---|---|"]
            lines += ["", f"## {env}", "", *head]
        for key in sorted(rows, key=order.index):
            agent, variant = key.split(" ", 1)
            last, mean = rows[key][-1], sum(rows[key][-5:]) / 5
            digits = 0 if abs(last) >= 1000 else 1 if abs(last) >= 100 else 2
            change = _settings(VARIANTS[variant]) or "–"
            lines.append(f"| {agent} | {change} | {last:.{digits}f} | {mean:.{digits}f} |")
    (FOLDER.parent / f"{NAME}.md").write_text("\n".join(lines) + "\n")


def _settings(changes: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in changes.items())


def main() -> None:
    """Run what is missing, then write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--agents", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison_variants"))
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.jobs))  # as each run has
    for env in [] if arguments.report_only else arguments.envs:
        for variant in arguments.variants:
            agents = [
                agent
                for agent in arguments.agents
                if f"{agent} {env} {variant}" not in load(NAME)
                and (agent in SHARED or variant == BASE)
            ]
            if not agents:
                continue
            folder = arguments.runs / variant.replace(", ", "-").replace(" ", "_")
            rl.compare(
                [env],
                agents,
                total_steps=STEPS,
                out=folder,
                seeds=[SEED],
                jobs=arguments.jobs,
                changes={agent: {**SETTINGS[agent], **VARIANTS[variant]} for agent in agents},
                eval_every=EVERY,
            )
            keep(folder, variant)
    report()


if __name__ == "__main__":
    main()
