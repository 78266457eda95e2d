"""Does a second process pay? Evaluations per second of one training, in one and two processes.

python examples/benchmarks/parallel.py

The energy is a Python loop over points of about 1 ms each, as a simulator would be; the same
training runs alone and under torchrun with two processes, one thread each, in turn. The best of
three is kept of both: what disturbs a timing makes it longer.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
from results import store

from energies import from_numpy
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig


def simulator(x: np.ndarray) -> float:
    """A double well that takes its time."""
    a, b = float(x[0]), float(x[1])
    steps = 20_000
    energy = 0.0
    for _ in range(steps):
        energy += ((a * a - 4) ** 2 + (b * b - 4) ** 2) / (8 * steps)
    return energy


def train() -> None:
    """A short training; the leader prints evaluations and seconds."""
    torch.set_num_threads(1)
    config = TrainerConfig(
        search_evaluations=8000, bank_size=8000, steps_per_cycle=100, max_cycles=1, width=32
    )
    energy = from_numpy(simulator, vectorized=False)
    trainer = EnergyDiffusionTrainer(energy, 2, config=config, seed=0, device="cpu")
    started = time.perf_counter()
    trainer.fit(progress=False)
    seconds = time.perf_counter() - started
    if trainer.team.leads:
        log_z = trainer.history[-1]["log_z"]
        print(json.dumps({"rate": trainer.evaluations / seconds, "log_z": log_z}))


def run(processes: int) -> dict:
    """The training in so many processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--train"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="what each process does")
    if parser.parse_args().train:
        train()
        return
    found = [(run(1), run(2)) for _ in range(3)]
    one, two = (max(pair[i]["rate"] for pair in found) for i in range(2))
    record = {"one": one, "two": two, "ratio": two / one, "log_z": found[0][0]["log_z"]}
    record["log_z_two"] = found[0][1]["log_z"]
    store("parallel", "two processes", record)
    print(f"{one:.0f} evaluations/s in one process, {two:.0f} in two: {two / one:.2f} times")
    print(f"log Z {record['log_z']:.6f} and {record['log_z_two']:.6f}")


if __name__ == "__main__":
    main()
