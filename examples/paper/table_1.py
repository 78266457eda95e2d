"""Table 1 of the paper: ten agents on ten MuJoCo tasks, here by whatever budget there is.

    python examples/paper/table_1.py --smoke
    python examples/paper/table_1.py --envs Reacher HalfCheetah --agents sdac dpmd sac \
        --total-steps 50000 --seeds 3

The paper trains for a million environment steps (five of Humanoid), five environments at a time
and an update every fifth step, with 5 seeds, on the v4 tasks; its entries are the means of each
seed's best checkpoint. Here the tasks are v5, which differ in rewards and observations, and the
last checkpoint stands beside the best. The agents of stable-baselines3 have that library's
defaults, SAC and TD3 with an update every fifth step.

Runs that are there are not made again. Writes ``out/table_1/report.md`` with curves and intervals
(of Humanoid ``out/table_1/Humanoid/report.md``), and prints the table with the paper's numbers in
brackets.
"""

import argparse
from pathlib import Path
from typing import Any

import rl
from examples.paper.published import TABLE_1
from rl.stable_baselines import FOREIGN

OURS = [name for name in TABLE_1["HalfCheetah"] if name not in FOREIGN]
TINY: dict[str, Any] = {
    "warmup_steps": 40,
    "replay_size": 200,
    "policy_states": 8,
    "width": 16,
    "depth": 1,
    "batch_size": 16,
}


def parsed(what: str, name: str) -> argparse.Namespace:
    """The options that the table and the figure share.

    Arguments:
        what: Description of the program.
        name: Its folder in ``out``.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--smoke", action="store_true", help="seconds, on one task")
    parser.add_argument("--envs", nargs="*", choices=list(TABLE_1), default=list(TABLE_1))
    parser.add_argument(
        "--agents", nargs="*", choices=list(TABLE_1["HalfCheetah"]), default=[*FOREIGN, *OURS]
    )
    parser.add_argument("--total-steps", type=int, default=1_000_000, help="of Humanoid, 5 times")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="corrected", help="of our agents")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("out") / name)
    options = parser.parse_args()
    if options.smoke:
        options.envs, options.seeds, options.total_steps = ["InvertedPendulum"], 1, 100
        options.agents = [name for name in options.agents if name in ("dpmd", "sac")]
    return options


def trained(options: argparse.Namespace) -> dict[str, rl.Comparison]:
    """Make the runs that are missing; all runs, those of Humanoid apart.

    Arguments:
        options: What :func:`parsed` returned.
    """
    found = {}
    for part, factor in (("", 1), ("Humanoid", 5)):
        tasks = [name for name in options.envs if (name == "Humanoid") == bool(part)]
        if not tasks or not options.agents:
            continue
        found[part or "others"] = rl.compare(
            [f"{name}-v5" for name in tasks],
            options.agents,
            total_steps=factor * options.total_steps,
            out=options.output / part,
            seeds=options.seeds,
            jobs=options.jobs,
            config=options.preset,
            eval_every=max(1, factor * options.total_steps // (2 if options.smoke else 40)),
            eval_episodes=2 if options.smoke else 20,
            changes={a: TINY if a in OURS else {"learning_starts": 40} for a in options.agents}
            if options.smoke
            else None,
        )
    return found


def main() -> None:
    """Train, print."""
    options = parsed("Table 1 of the paper.", "table_1")
    found = trained(options)
    for comparison in found.values():
        print(f"\n{comparison.total_steps:,} steps: last | best of each seed (paper's best)")
        for agent, by_env in comparison.curves.items():
            for env, runs in by_env.items():
                last, best = (comparison.scores(agent, w)[env] for w in ("last", "best"))
                known = TABLE_1[env.removesuffix("-v5")].get(agent)
                paper = "not legible" if known is None else "{:g} ± {:g}".format(*known)
                print(
                    f"{agent:6}{env:28}{last.mean():>10.1f}{best.mean():>10.1f}"
                    f"   ({paper}), {len(runs)} seed{'s' if len(runs) > 1 else ''}"
                )
    for part in found:
        print(options.output / ("" if part == "others" else part) / "report.md")


if __name__ == "__main__":
    main()
