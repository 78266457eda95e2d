"""Do the agents learn? Pendulum-v1 and InvertedPendulum-v5, three seeds each.

    python examples/benchmarks/learning.py                         # all that is not measured yet
    python examples/benchmarks/learning.py --agents sdac --envs Pendulum-v1 --seeds 0

One update per environment step, the default configuration but for the few fields of ``SIZES``
(faster critics than the paper's, for short runs), and 20 evaluation episodes every 1,000 steps on
environments of their own. A run stops after two evaluations in a row that reach the goal, or at
its limit of steps; each writes its evaluations to docs/results/learning.json. The Gaussian SAC of
this library is the yardstick beside them.
"""

import argparse
import os
import time

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


def run(agent: str, env: str, seed: int) -> dict:
    """One run, its evaluations and what it cost."""
    limit, goal = GOALS[env]
    evaluations: list[tuple[int, float]] = []

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
        eval_every=1000,
        eval_episodes=20,
        callback=reached,
        progress=False,
        **SIZES,
    )
    first = next((step for step, mean in evaluations if mean >= goal), None)
    return {
        "reached_at": first,
        "last": evaluations[-1][1],
        "best": max(mean for _, mean in evaluations),
        "steps": evaluations[-1][0],
        "updates": trained.updates,
        "evaluations": evaluations,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="*", default=["sdac", "dpmd", "sac"])
    parser.add_argument("--envs", nargs="*", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for env in arguments.envs:
        for seed in arguments.seeds:
            for agent in arguments.agents:
                key = f"{agent} {env}/{seed}"
                if key not in load("learning"):
                    store("learning", key, run(agent, env, seed))
    print(f"{'':32}{'goal reached at':>16}{'last':>10}{'best':>10}")
    for key, record in load("learning").items():
        print(
            f"{key:32}{record['reached_at'] or '-':>16}{record['last']:>10.1f}"
            f"{record['best']:>10.1f}"
        )


if __name__ == "__main__":
    main()
