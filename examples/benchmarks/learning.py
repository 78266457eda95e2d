"""Do the agents learn? Pendulum-v1 and InvertedPendulum-v5, three seeds each.

    python examples/benchmarks/learning.py                         # all that is not measured yet
    python examples/benchmarks/learning.py --agents sdac --envs Pendulum-v1 --seeds 0

One update per environment step, the default configuration but for the few fields of ``SIZES``
(faster critics than the paper's, for short runs) and, of the agents beside SDAC and DPMD, half the
width and a hidden layer less, and 20 evaluation episodes every 1,000 steps on environments of
their own. SDAC's and DPMD's critics are plain. A run stops after two evaluations in a row that
reach the goal, or at its limit of steps; evaluations go to docs/results/learning.json. SAC, TD3
and PPO of stable-baselines3 are the yardsticks beside them. PPO and DPPO learn from each step for
a short while only: they have 300,000 steps and are evaluated every 10,000.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from results import load, store

import rl

# Steps within which a mean return is to be reached.
GOALS = {"Pendulum-v1": (15_000, -200.0), "InvertedPendulum-v5": (20_000, 1000.0)}
SIZES = {
    "width": 128,
    "warmup_steps": 1000,
    "updates_per_step": 1.0,
    "polyak": 0.02,
    "critic_lr": 1e-3,
}
PLAIN = {**SIZES, "critic_layer_norm": False}
SMALL = {**SIZES, "width": 64, "depth": 2}
AGENTS = {
    "sdac": {**PLAIN, "min_ess": 4.0},
    "dpmd": PLAIN,
    "qsm": SMALL,
    "dipo": SMALL,
    "dacer": SMALL,
    "qvpo": SMALL,
    "dppo": {"width": 64, "depth": 2},  # on-policy: no warm-up
    # Those of stable-baselines3, with its defaults but for a warm-up like ours.
    "sac": {"learning_starts": SIZES["warmup_steps"]},
    "td3": {"learning_starts": SIZES["warmup_steps"]},
    "ppo": {},
}
# On-policy agents on Pendulum-v1, where what is done shows within a second.
SHORT = {
    "ppo": {"gamma": 0.9, "learning_rate": 1e-3, "n_steps": 1024},
    "dppo": {"discount": 0.95},
}
EVERY = {"ppo": 10_000, "dppo": 10_000}  # steps between evaluations, if not 1,000


def run(agent: str, env: str, seed: int, folder: Path | None) -> dict | None:
    """One run, its evaluations and what it cost; None if it was interrupted."""
    limit, goal = GOALS[env]
    limit = 300_000 if agent in EVERY else limit
    evaluations: list[tuple[int, float]] = []
    before, clock = 0.0, None if folder is None else folder / "seconds"
    if folder is not None and clock is not None and clock.exists():  # it goes on
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        evaluations = [(e["step"], e["eval_mean"]) for e in lines if "eval_mean" in e]
        before = float(clock.read_text())

    def reached(progress: rl.RunProgress) -> bool:
        evaluations.append((progress.step, progress.mean))
        print(agent, env, seed, progress.step, round(progress.mean, 1), flush=True)
        return len(evaluations) > 1 and min(e[1] for e in evaluations[-2:]) >= goal

    started = time.perf_counter()
    trained = rl.train(
        agent,
        env,
        total_steps=limit,
        seed=seed,
        eval_every=EVERY.get(agent, 1000),
        eval_episodes=20,
        callback=reached,
        progress=False,
        run_dir=folder,
        **AGENTS[agent],
        **(SHORT.get(agent, {}) if env == "Pendulum-v1" else {}),
    )
    seconds = before + time.perf_counter() - started
    if clock is not None:
        clock.write_text(str(seconds))
    if trained.interrupted:
        return None
    first = next((step for step, mean in evaluations if mean >= goal), None)
    return {
        "reached_at": first,
        "last": evaluations[-1][1],
        "best": max(mean for _, mean in evaluations),
        "steps": evaluations[-1][0],
        "updates": trained.updates,
        "evaluations": evaluations,
        "seconds": seconds,
    }


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="*", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--envs", nargs="*", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, help="folder of runs, which go on if interrupted")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for env in arguments.envs:
        for seed in arguments.seeds:
            for agent in arguments.agents:
                key = f"{agent} {env}/{seed}"
                if key in load("learning"):
                    continue
                folder = arguments.runs and arguments.runs / f"{agent}-{env}-{seed}"
                record = run(agent, env, seed, folder)
                if record is None:
                    return
                store("learning", key, record)
    print(f"{'':32}{'goal reached at':>16}{'last':>10}{'best':>10}")
    for key, record in load("learning").items():
        print(
            f"{key:32}{record['reached_at'] or '-':>16}{record['last']:>10.1f}"
            f"{record['best']:>10.1f}"
        )


if __name__ == "__main__":
    main()
