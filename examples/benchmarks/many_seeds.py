"""What the updates of five seeds cost, together and one after the other, in updates of one seed.

    python examples/benchmarks/many_seeds.py --threads 1
    python examples/benchmarks/many_seeds.py --device cuda

Each row is an agent of HalfCheetah's sizes (17 observations, 6 actions, batch 256). The three ways
are measured in turn, round after round; medians are printed. Results go to
docs/results/many_seeds.json.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch
from results import store
from update_speed import ACTION, OBSERVATION, random_replay

import rl
from rl.lockstep import Lockstep

SEEDS = 5
SHORT: dict[str, Any] = {"depth": 2, "num_steps": 5, "policy_period": 1}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmd, 2 x 64": ("dpmd", {**SHORT, "width": 64}),
    "dpmd, 2 x 128": ("dpmd", {**SHORT, "width": 128}),
    "dpmd, 2 x 256": ("dpmd", {**SHORT, "width": 256}),
    "dpmd, default": ("dpmd", {"policy_period": 1}),
    "sdac, 2 x 64": ("sdac", {**SHORT, "width": 64, "num_draws": 32, "policy_states": 64}),
    "sdac, 2 x 128": ("sdac", {**SHORT, "width": 128, "num_draws": 32, "policy_states": 64}),
    "sdac, 2 x 256": ("sdac", {**SHORT, "width": 256, "num_draws": 32, "policy_states": 64}),
    "sdac, default": ("sdac", {"policy_period": 1}),
    "qvpo, 2 x 64": ("qvpo", {**SHORT, "width": 64}),
    "qvpo, default": ("qvpo", {"policy_period": 1}),
}


def measured(name: str, device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of an update of one seed, and of five together and in turn."""
    agent, changes = ROWS[name]
    kind = rl.AGENTS[agent]
    config = kind.config_type.preset("corrected", **changes)

    def made(n: int) -> list[rl.OffPolicyAgent]:
        return [kind(OBSERVATION, ACTION, config, seed=i, device=device) for i in range(n)]

    replays = [random_replay(device=device) for _ in range(SEEDS)]
    one, apart, together = made(1)[0], made(SEEDS), Lockstep(made(SEEDS))
    ways = {
        "one": lambda: one.update(replays[0]),
        "in turn": lambda: [a.update(r) for a, r in zip(apart, replays, strict=True)],
        "together": lambda: together.update(replays),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds + 5):  # the first ones warm up, and capture graphs
        for way, update in ways.items():
            started = time.perf_counter()
            update()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 5:
                found[way].append((time.perf_counter() - started) * 1e3)
    return {way: statistics.median(values) for way, values in found.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'':16}{'one, ms':>10}{'in turn':>10}{'together':>10}  in updates of one seed")
    for name in ROWS:
        row = measured(name, arguments.device, arguments.rounds)
        store("many_seeds", f"{arguments.device} {name}", {**row, "threads": arguments.threads})
        one = row["one"]
        print(
            f"{name:16}{one:>10.1f}{row['in turn'] / one:>10.2f}{row['together'] / one:>10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
