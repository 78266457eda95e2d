"""How long an update takes, how long acting takes, and how much memory a run holds.

    python examples/benchmarks/update_speed.py              # this machine's CPU
    python examples/benchmarks/update_speed.py --critics    # what normalised layers cost
    python examples/benchmarks/update_speed.py --gpu        # HalfCheetah-v5 on a GPU, end to end
    python examples/benchmarks/update_speed.py --gpu --dry-run   # the same path, briefly, on a CPU

The rows are measured in turn, round after round, so that a machine that slows down slows all of
them; medians are printed, beside the time that the arithmetic alone takes at the rate of this
machine's matrix products in PyTorch (layers without gradients go another, faster way). "Identical
work" is the update of the code published with the paper (batch 256, T = 20, 3 x 256 Mish, 17-dim
observations, 6-dim actions, best of 32 at every target, 64 reverse draws) with its policy step in
every update; "default" is this library's default configuration, averaged over its policy period.
Results go to docs/results/update_speed.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import rl
from rsm_sampler import __version__

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "update_speed.json"
OBSERVATION, ACTION, BATCH, WIDTH = 17, 6, 256, 256
CHAIN = 2 * ((OBSERVATION + ACTION + 16) * WIDTH + 2 * WIDTH * WIDTH + WIDTH * ACTION)
CRITIC = 2 * ((OBSERVATION + ACTION) * WIDTH + 2 * WIDTH * WIDTH + WIDTH)


def random_replay(size: int = 20_000, device: str = "cpu") -> rl.ReplayBuffer:
    """Transitions of the right shape."""
    rng = torch.Generator().manual_seed(0)
    replay = rl.ReplayBuffer(size, OBSERVATION, ACTION, device=device)
    observation = torch.randn(size + 1, OBSERVATION, generator=rng)
    action = 2 * torch.rand(size, ACTION, generator=rng) - 1
    reward = torch.randn(size, generator=rng)
    ends = torch.zeros(size), torch.ones(size)
    replay.add(rl.Batch(observation[:-1], action, reward, observation[1:], *ends))
    return replay


def work(name: str, candidates: int, draws: int, share: float, states: int = BATCH) -> float:
    """Floating-point operations of an update's large parts, in units of 10^9."""
    target = BATCH * candidates * (20 * CHAIN + (2 * CRITIC if candidates > 1 else 0))
    policy = 0.0
    if name == "sdac":
        policy = states * draws * 2 * CRITIC + (target if candidates > 1 else 0)
    return (target + share * policy + 3 * BATCH * 2 * CRITIC) / 1e9


def matrix_rate() -> float:
    """Rate of a large matrix product, 10^9 operations per second."""
    x, w = torch.randn(8192, WIDTH), torch.randn(WIDTH, WIDTH)
    out = torch.empty(8192, WIDTH)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        torch.mm(x, w, out=out)
        times.append(time.perf_counter() - started)
    return 2 * 8192 * WIDTH * WIDTH / statistics.median(times) / 1e9


def timed(function: Callable[[], object], repeats: int) -> float:
    """Mean milliseconds of some calls in a row: a policy period and its multiples."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats * 1e3


def speed(rounds: int) -> dict:
    """All rows, in turn."""
    replay = random_replay()
    observation = np.random.default_rng(0).normal(size=(5, OBSERVATION)).astype(np.float32)
    rows: dict[str, tuple[Callable[[], object], int, float]] = {}
    kinds = {"dpmd": (rl.DPMD, rl.DPMDConfig), "sdac": (rl.SDAC, rl.SDACConfig)}
    for name, (kind, config) in kinds.items():
        published = kind(
            OBSERVATION, ACTION, config.preset("official", policy_period=1), device="cpu"
        )
        default = kind(OBSERVATION, ACTION, device="cpu")
        rows[f"{name} identical work"] = (
            lambda agent=published: agent.update(replay),
            1,
            work(name, 32, 64, 1.0),
        )
        rows[f"{name} default"] = (
            lambda agent=default: agent.update(replay),
            4,
            work(name, 1, 64, 0.5, states=128),
        )
        if name == "dpmd":
            rows["acting, 5 environments, best of 32"] = (
                lambda agent=published: agent.act(observation),
                10,
                5 * 32 * (20 * CHAIN + 2 * CRITIC) / 1e9,
            )
    found: dict[str, list[float]] = {name: [] for name in rows}
    rates = []
    for i in range(rounds + 1):  # the first one warms up
        rates.append(matrix_rate())
        for name, (function, repeats, _) in rows.items():
            value = timed(function, repeats)
            if i:
                found[name].append(value)
    rate = statistics.median(rates)
    return {
        "gflops": rate,
        "rows": {
            name: {
                "ms": statistics.median(values),
                "fastest": min(values),
                "slowest": max(values),
                "arithmetic_ms": rows[name][2] / rate * 1e3,
            }
            for name, values in found.items()
        },
    }


def critics(rounds: int) -> dict:
    """Default updates with critics' hidden layers normalised and without, in turn."""
    replay = random_replay()
    agents = {
        (name, normalised): kind(
            OBSERVATION, ACTION, config(critic_layer_norm=normalised), device="cpu"
        )
        for name, kind, config in (
            ("dpmd", rl.DPMD, rl.DPMDConfig),
            ("sdac", rl.SDAC, rl.SDACConfig),
        )
        for normalised in (True, False)
    }
    found: dict[tuple[str, bool], list[float]] = {key: [] for key in agents}
    for i in range(rounds + 1):  # the first one warms up
        for key, agent in agents.items():
            value = timed(lambda agent=agent: agent.update(replay), 4)
            if i:
                found[key].append(value)
    return {
        name: {
            "normalised_ms": statistics.median(found[name, True]),
            "plain_ms": statistics.median(found[name, False]),
        }
        for name in ("dpmd", "sdac")
    }


def resident_megabytes() -> float:
    """Memory of this process that is in use."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def memory() -> dict:
    """A training process whose replay of 10^6 HalfCheetah transitions is full."""
    environments = rl.Environments("HalfCheetah-v5", 5)
    sizes = (environments.observation_dim, environments.action_dim)
    agent = rl.SDAC(*sizes, device="cpu")
    replay = rl.ReplayBuffer(1_000_000, *sizes)
    observation = environments.reset(seed=0)
    part = 100_000
    for _ in range(10):
        replay.add(
            rl.Batch(
                torch.randn(part, sizes[0]),
                torch.rand(part, sizes[1]) * 2 - 1,
                torch.randn(part),
                torch.randn(part, sizes[0]),
                torch.zeros(part),
                torch.ones(part),
            )
        )
    for _ in range(20):
        step = environments.step(agent.act(observation))
        observation = step.observation
        agent.update(replay)
    return {"resident_mb": resident_megabytes(), "replay_mb": replay.nbytes / 1e6}


def end_to_end(device: str, updates: int, warmup: int) -> dict:
    """Updates per second with acting and stepping, HalfCheetah-v5, the published ratio of 0.2."""
    found = {}
    for name, kind in (("dpmd", rl.DPMD), ("sdac", rl.SDAC)):
        environments = rl.Environments("HalfCheetah-v5", 5)
        sizes = (environments.observation_dim, environments.action_dim)
        agent = kind(*sizes, device=device)
        cuda = agent.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        replay = rl.ReplayBuffer(1_000_000 if cuda else 10_000, *sizes, device=agent.device)
        observation = environments.reset(seed=0)
        returns = rl.MultiStep(1, 0.99, 5)
        started = time.perf_counter()
        for i in range(warmup + updates):
            if i == warmup:
                if cuda:
                    torch.cuda.synchronize()
                started = time.perf_counter()
            action = agent.act(observation)
            if i:
                agent.update(replay)
            step = environments.step(action)
            replay.add(returns.add(observation, action, step))
            observation = step.observation
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        found[name] = {"updates_per_second": updates / seconds, "updates": updates}
        if cuda:
            beyond = torch.cuda.max_memory_reserved() - replay.nbytes
            found[name]["mb_beyond_replay"] = beyond / 1e6
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--critics", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="the GPU's path, on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cpu"
    if arguments.gpu:
        device = "cpu" if arguments.dry_run else "cuda"
        count = (5, 2) if arguments.dry_run else (2000, 200)
        result: dict = {"gpu": end_to_end(device, *count)}
        for name, row in result["gpu"].items():
            print(name, {key: round(value, 1) for key, value in row.items()})
    elif arguments.critics:
        result = {"critics": critics(arguments.rounds)}
        for name, row in result["critics"].items():
            print(name, {key: round(value, 1) for key, value in row.items()})
    else:
        result = {"cpu": speed(arguments.rounds), "memory": memory()}
        print(f"matrix products: {result['cpu']['gflops']:.0f} GFLOP/s")
        print(f"{'':36}{'median':>10}{'fastest':>10}{'slowest':>10}{'arithmetic':>12}")
        for name, row in result["cpu"]["rows"].items():
            print(
                f"{name:36}{row['ms']:>7.1f} ms{row['fastest']:>10.1f}{row['slowest']:>10.1f}"
                f"{row['arithmetic_ms']:>12.1f}"
            )
        print(f"resident memory with 10^6 transitions: {result['memory']['resident_mb']:.0f} MB")
    if arguments.dry_run:
        return
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rsm_sampler": __version__,
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for key, value in result.items():
        kept[key] = {**value, "machine": machine}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
