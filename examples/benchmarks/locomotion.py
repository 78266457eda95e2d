r"""Do the agents learn real tasks, and as fast as SAC? Curves of short runs, three seeds each.

    pip install stable-baselines3                                # for the rows "sb3"
    python examples/benchmarks/locomotion.py                     # all that is not measured yet
    python examples/benchmarks/locomotion.py --agents dpmd sb3 --envs HalfCheetah-v5 --seeds 0
    python examples/benchmarks/locomotion.py --agents sdac --envs HalfCheetah-v5 --seeds 0 \
        --steps 30000 --change truncated=False                   # an ablation, of shorter runs

One environment and one update per step; the configurations stand below. The yardstick is
stable-baselines3's SAC with its own defaults, but with 5,000 random steps before the first update
(its default is 100), as ours have: steps and updates are the same. All are evaluated in the same
way: 20 episodes from fixed seeds, best action. Every evaluation is written to
docs/results/locomotion.json at once; a run that was interrupted goes on from its folder under
--runs. Runs with a goal stop after two evaluations in a row that reach it.
"""

import argparse
import math
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from results import load, store

import rl

SHORT: dict[str, Any] = {
    "num_envs": 1,
    "updates_per_step": 1.0,
    "depth": 2,
    "critic_layer_norm": True,
    "critic_lr": 1e-3,
    "polyak": 0.02,
}
CHAIN: dict[str, Any] = {"num_steps": 5}
SIZES: dict[str, dict[str, Any]] = {
    "dpmd": {**SHORT, **CHAIN, "policy_states": 32},
    "sdac": {
        **SHORT,
        **CHAIN,
        "num_draws": 32,
        "proposal": "next",
        "anchor_share": 0.5,
        "min_ess": 4.0,
    },
}
SMALL: dict[str, dict[str, Any]] = {  # half as wide, for the smaller tasks
    "dpmd": {**SIZES["dpmd"], "width": 128, "policy_states": 16},
    "sdac": {**SIZES["sdac"], "width": 128, "policy_states": 64},
}
SHARP = {**SMALL, "sdac": {**SMALL["sdac"], "min_ess": 2.0}}  # where actions must be precise
# SDAC's policy lags behind fast critics at the usual rate.
QUICK = {**SIZES, "sdac": {**SHARP["sdac"], "policy_lr": 1e-3}}


@dataclass(frozen=True)
class Task:
    """Length of a run, the goal at which it may stop, and what the environment asks for."""

    steps: int
    every: int
    goal: float = math.inf
    discount: float = 0.99
    n_step: int = 1  # of ours; stable-baselines3's SAC has its default of one
    sizes: dict[str, dict[str, Any]] = field(default_factory=lambda: SMALL)


TASKS = {
    "InvertedDoublePendulum-v5": Task(50_000, 2500, goal=9300),
    "Reacher-v5": Task(60_000, 5000, goal=-5, discount=0.95),
    "Swimmer-v5": Task(100_000, 10_000, goal=100, discount=0.998, n_step=10),
    "HalfCheetah-v5": Task(60_000, 5000, sizes=QUICK),
    "Hopper-v5": Task(100_000, 10_000, n_step=5, sizes=SHARP),
    "Walker2d-v5": Task(100_000, 10_000, n_step=3, sizes=SIZES),
}


class Record:
    """The evaluations of a run so far, stored as they come.

    Arguments:
        key: Its name among the results.
        task: What is run.
        file: Where results go.
        again: Whether the run begins anew, whatever is stored.
        share: Its share in the time that passes.
    """

    def __init__(
        self,
        key: str,
        task: Task,
        file: str = "locomotion",
        *,
        again: bool = False,
        share: float = 1.0,
    ) -> None:
        self.key, self.task, self.file, self.share = key, task, file, share
        self.kept: dict[str, Any] = {"evaluations": [], "seconds": 0.0}
        if not again:
            self.kept = load(file).get(key, self.kept)
        self.before, self.started = self.kept["seconds"], time.perf_counter()

    def add(self, step: int, mean: float, config: dict[str, Any], *, done: bool = False) -> bool:
        """Store an evaluation; whether the goal is reached."""
        known = [e for e in self.kept["evaluations"] if e[0] < step]
        evaluations = [*known, (step, mean)]
        lasting = [m for _, m in evaluations[-2:]]
        reached = len(lasting) > 1 and min(lasting) >= self.task.goal
        self.kept = {
            "evaluations": evaluations,
            "last": mean,
            "best": max(m for _, m in evaluations),
            "steps": step,
            "done": done or reached or step >= self.task.steps,
            "seconds": self.before + self.share * (time.perf_counter() - self.started),
            "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "config": config,
        }
        store(self.file, self.key, self.kept)
        print(self.key, step, round(mean, 1), f"{self.kept['seconds']:.0f} s", flush=True)
        return reached


def ours(
    agent: str,
    env: str,
    seeds: Sequence[int],
    task: Task,
    folder: Path,
    changes: dict[str, Any],
    *,
    label: str = "",
    preset: str = "corrected",
    file: str = "locomotion",
) -> None:
    """Runs of one of our agents, or the rest of them; those of several seeds are one process."""
    label = label or ",".join(f"{k}={v}" for k, v in changes.items())
    name = " ".join(part for part in (agent, env, label) if part)
    seeds = [seed for seed in seeds if not load(file).get(f"{name}/{seed}", {}).get("done")]
    if not seeds:
        return
    run_dir = str(folder / f"{name.replace('/', ' ').replace(' ', '-')}-{{seed}}")
    records = {
        seed: Record(
            f"{name}/{seed}",
            task,
            file,
            again=not Path(run_dir.format(seed=seed)).exists(),  # begun elsewhere, if at all
            share=1 / len(seeds),
        )
        for seed in seeds
    }
    config = {**task.sizes[agent], "discount": task.discount, "n_step": task.n_step, **changes}
    rl.train_seeds(
        agent,
        env,
        seeds=seeds,
        batched=len(seeds) > 1,
        total_steps=task.steps,
        config=preset,
        run_dir=run_dir,
        eval_every=task.every,
        checkpoint_every=task.every,
        progress=False,
        callback=lambda at: records[at.agent.seed].add(at.step, at.mean, config),
        **config,
    )


class Foreign:
    """What rl.evaluate needs to know of an agent, around one of stable-baselines3."""

    def __init__(self, model: Any, env: gymnasium.Env) -> None:
        self.model = model
        space: Any = env.action_space
        self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
        self.action_dim, self.observation_dim = len(self.low), env.observation_space.shape[0]

    def predict(self, observation: np.ndarray, deterministic: bool = True) -> tuple:
        """As the model's."""
        return self.model.predict(observation, deterministic=deterministic)


def foreign(env: str, seed: int, task: Task) -> None:
    """A run of stable-baselines3's SAC, from the beginning."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    key = f"sb3 {env}/{seed}"
    if load("locomotion").get(key, {}).get("done"):
        return
    record = Record(key, task, again=True)
    made = gymnasium.make(env)
    config = {"discount": task.discount, "learning_starts": 5000}

    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % task.every:
                return True
            mean = rl.evaluate(Foreign(self.model, made), env, episodes=20).mean
            return not record.add(self.num_timesteps, mean, config)

    model = SAC(
        "MlpPolicy", made, seed=seed, gamma=task.discount, learning_starts=5000, device="cpu"
    )
    model.learn(task.steps, callback=Evaluate())


def parsed(text: str) -> Any:
    """A number or a truth value where it is one, else the text."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="*", default=["dpmd", "sdac", "sb3"])
    parser.add_argument("--envs", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="length of the runs, if not the task's")
    parser.add_argument("--change", nargs="*", default=[], help="field=value, for an ablation")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folders of the runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = (change.partition("=") for change in arguments.change)
    changes = {name: parsed(value) for name, _, value in pairs}
    for env in arguments.envs:
        task = TASKS[env]
        task = replace(task, steps=arguments.steps or task.steps)
        for seed in arguments.seeds:
            for agent in arguments.agents:
                if agent == "sb3":
                    foreign(env, seed, task)
                else:
                    ours(agent, env, [seed], task, arguments.runs, changes)
    print(f"{'':60}{'steps':>9}{'last':>10}{'best':>10}{'s':>8}")
    for key, record in load("locomotion").items():
        print(
            f"{key:60}{record['steps']:>9,}{record['last']:>10.1f}{record['best']:>10.1f}"
            f"{record['seconds']:>8.0f}"
        )


if __name__ == "__main__":
    main()
