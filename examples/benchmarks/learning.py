"""Do the agents learn? Pendulum-v1 and InvertedPendulum-v5, three seeds each.

    python examples/benchmarks/learning.py                         # all that is not measured yet
    python examples/benchmarks/learning.py --agents sdac --envs Pendulum-v1 --seeds 0

One update per environment step, the default configuration but for the few fields of ``SIZES``
(faster critics than the paper's, for short runs) and, of the agents beside SDAC and DPMD, half the
width and a hidden layer less, and 20 evaluation episodes every 1,000 steps on environments of
their own. SDAC's and DPMD's critics are plain. A run stops after two evaluations in a row that
reach the goal, or at its limit of steps; evaluations go to docs/results/learning.json. SAC, TD3
and PPO of stable-baselines3 are the yardsticks beside them. PPO and DPPO learn from each step for
a short while only: they have 300,000 steps and are evaluated every 10,000. Seconds are those of
training and evaluations, of all sittings of a run that was interrupted.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from results import load, store

import rl
from rsm_sampler.loggers import JSONLinesLogger

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


def run(agent: str, env: str, seed: int, folder: Path) -> dict | None:
    """One run, its evaluations and what it cost; None if it was interrupted."""
    limit, goal = GOALS[env]
    limit = 300_000 if agent in EVERY else limit

    def logged() -> list[dict]:
        lines = JSONLinesLogger.read(folder / "log.jsonl")
        return [line for line in lines if "eval_mean" in line]

    def reached(progress: rl.RunProgress) -> bool:
        print(agent, env, seed, progress.step, round(progress.mean, 1), flush=True)
        found = [line["eval_mean"] for line in logged()]
        return len(found) > 1 and min(found[-2:]) >= goal

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
    if trained.interrupted:
        return None
    lines = logged()
    evaluations = [(line["step"], line["eval_mean"]) for line in lines]
    first = next((step for step, mean in evaluations if mean >= goal), None)
    return {
        "reached_at": first,
        "last": evaluations[-1][1],
        "best": max(mean for _, mean in evaluations),
        "steps": evaluations[-1][0],
        "updates": trained.updates,
        "evaluations": evaluations,
        "seconds": lines[-1]["seconds"],
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
                with tempfile.TemporaryDirectory() as passing:
                    folder = Path(arguments.runs or passing) / f"{agent}-{env}-{seed}"
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
