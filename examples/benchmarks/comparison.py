"""All agents side by side at equal cost: one table, two cores, an update every fifth step.

    python examples/benchmarks/comparison.py --jobs 2      # hours; it goes on where it stopped
    python examples/benchmarks/comparison.py --envs Pendulum-v1 --agents sdac sac --jobs 2
    python examples/benchmarks/comparison.py --report-only

50,000 steps of five environments with one update a round, 5,000 random steps included, as in the
paper but shorter; networks of two layers of 128, and, for so few updates, faster critics than the
paper's. SAC and TD3 of stable-baselines3 make an update every fifth step too, PPO has its default;
their networks and learning rates are that library's. Five seeds for SDAC, DPMD and SAC, three for
the rest; QVPO, DIPO and DPPO on two tasks. Every evaluation is 20 episodes, every 5,000 steps.

Runs are in ``--runs``; the report goes to docs/comparison.md with its figures, the scores of every
run at every evaluation to docs/results/comparison.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from results import FOLDER, machine

import rl
from rl.comparison import read, write_report

TASKS = ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5", "HalfCheetah-v5"]
STEPS, EVERY = 50_000, 5000
SIZES: dict[str, Any] = {
    "width": 128,
    "depth": 2,
    "num_steps": 5,
    "critic_layer_norm": True,
    "critic_lr": 1e-3,
    "polyak": 0.02,
}
FIFTH = {"train_freq": 5, "gradient_steps": 1, "learning_starts": 5000}
# Seeds, and what is changed of the defaults.
AGENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sdac": (5, {**SIZES, "num_draws": 32, "policy_states": 64}),
    "dpmd": (5, SIZES),
    "sac": (5, FIFTH),
    "qsm": (3, SIZES),
    "dacer": (3, SIZES),
    "td3": (3, FIFTH),
    "ppo": (3, {}),
    "qvpo": (3, SIZES),
    "dipo": (3, SIZES),
    "dppo": (3, {"width": 128, "depth": 2, "num_steps": 5}),
}
SOME = {name: ["Pendulum-v1", "HalfCheetah-v5"] for name in ("qvpo", "dipo", "dppo")}


def report(runs: Path) -> None:
    """Tables, figures and scores from the runs that are there."""
    found = read(runs, total_steps=STEPS)
    text = write_report(found, runs).read_text()
    for name in ("curves", "profiles"):
        drawn = runs / f"{name}.png"
        if drawn.exists():
            (FOLDER.parent / "figures" / f"comparison_{name}.png").write_bytes(drawn.read_bytes())
        text = text.replace(f"({name}.png)", f"(figures/comparison_{name}.png)")
    title, _, rest = text.partition("\n")
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
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
        f"Here: {title.removeprefix('# ')}. Machine: {where}.",
        rest.strip("\n"),
        "",
        "## Settings",
        "",
        settings,
        "",
    ]
    (FOLDER.parent / "comparison.md").write_text("\n".join(page))
    scores = json.loads((runs / "scores.json").read_text())
    (FOLDER / "comparison.json").write_text(json.dumps(scores) + "\n")


def main() -> None:
    """Run what is missing, then write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--agents", nargs="*", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    for seed in [] if arguments.report_only else arguments.seeds:
        for agent in arguments.agents:
            seeds, changes = AGENTS[agent]
            envs = [env for env in arguments.envs if env in SOME.get(agent, TASKS)]
            if seed < seeds and envs:
                rl.compare(
                    envs,
                    [agent],
                    total_steps=STEPS,
                    out=arguments.runs,
                    seeds=[seed],
                    jobs=arguments.jobs,
                    eval_every=EVERY,
                    **changes,
                )
    report(arguments.runs)


if __name__ == "__main__":
    main()
