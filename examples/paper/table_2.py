"""Table 2 of the paper: memory and time of the agents' training, on sizes of HalfCheetah.

    python examples/paper/table_2.py --smoke
    python examples/paper/table_2.py --updates 2000

The paper's columns are megabytes of the GPU and minutes for 200,000 updates with their million
environment steps, on an RTX 4090. Here each agent makes some updates with acting and stepping,
five environments and one update a round, in a process of its own: minutes are their mean time
times 200,000. Megabytes are of the GPU where there is one, else of the process. DPPO is on-policy;
it is timed on the rollouts of as many environment steps.

Presets: ``corrected`` is what this library trains by default, ``icml2025`` does the work of the
published code. Writes ``out/table_2.json`` and ``out/table_2.png``.
"""

import argparse
import json
import math
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import rl
from examples.paper.published import TABLE_2
from rsm_sampler.plotting import new_figure, save_figure

ENV, ROUND = "HalfCheetah-v5", 5  # environment steps of a round, and of an update
WHOLE = 200_000


def measured(agent: str, preset: str, updates: int, threads: int, tiny: bool) -> dict[str, float]:
    """Megabytes and minutes of one agent, in a fresh process."""
    torch.set_num_threads(threads)
    config: Any = rl.AGENTS[agent].config_type.preset(preset)
    changes: dict[str, Any] = {"num_envs": ROUND}
    if agent == "dppo":
        changes["rollout_steps"] = min(config.rollout_steps, updates * ROUND // 2)
    else:
        changes |= {"updates_per_step": 1 / ROUND, "warmup_steps": 500, "count_warmup": False}
    if tiny:
        changes |= {"width": 16, "depth": 1, "batch_size": 64}
    warmup = 0 if agent == "dppo" else 500
    clock: list[tuple[int, float]] = []

    class Watch:
        """Notes when the log comes by."""

        def log(self, step: int, **values: float) -> None:
            clock.append((step, time.perf_counter()))

        def close(self) -> None:
            """Nothing to write."""

    tenth = max(1, updates // 10) * ROUND
    trained = rl.train(
        agent,
        ENV,
        total_steps=updates * ROUND,
        config=preset,
        eval_every=0,
        progress=False,
        logger=Watch(),
        log_every=tenth,
        **changes,
    )
    # The first part warms up, and captures graphs.
    began = next(entry for entry in clock if entry[0] >= warmup + tenth)
    steps, seconds = clock[-1][0] - began[0], clock[-1][1] - began[1]
    cuda = trained.device.type == "cuda"
    used = (
        torch.cuda.max_memory_reserved()
        if cuda
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"mb": used / 1e6, "minutes": seconds / steps * ROUND * WHOLE / 60}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description="Table 2 of the paper.")
    parser.add_argument("--smoke", action="store_true", help="two agents, tiny networks")
    parser.add_argument("--agents", nargs="*", default=list(TABLE_2), choices=list(TABLE_2))
    parser.add_argument("--presets", nargs="*", default=["corrected", "icml2025"])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.smoke:
        options.agents, options.presets, options.updates = ["dpmd", "dppo"], ["corrected"], 60
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':8}{'preset':12}{'MB':>8}{'minutes':>10}   paper (RTX 4090): MB, minutes")
    context = multiprocessing.get_context("spawn")
    for agent in options.agents:
        for preset in options.presets:
            with ProcessPoolExecutor(1, context) as pool:
                arguments = agent, preset, options.updates, options.threads, options.smoke
                row = pool.submit(measured, *arguments).result()
            found.setdefault(agent, {})[preset] = row
            memory, minutes = TABLE_2[agent]
            print(
                f"{agent:8}{preset:12}{row['mb']:>8.0f}{row['minutes']:>10.2f}"
                f"   {memory:g}, {minutes:g}",
                flush=True,
            )
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {"device": device, "updates": options.updates, "agents": found}
    (options.output / "table_2.json").write_text(json.dumps(record, indent=1) + "\n")
    _, (ax,) = new_figure()
    for i, preset in enumerate(options.presets):
        minutes = [found[agent][preset]["minutes"] for agent in options.agents]
        shift = 0.3 * (i - 0.5 * (len(options.presets) - 1))
        places = [k + shift for k in range(len(minutes))]
        ax.bar(places, minutes, 0.3, label=f"{preset}, here on {device}")
    published = [TABLE_2[agent][1] for agent in options.agents]
    ax.plot(range(len(published)), published, "k_", ms=18, label="paper, RTX 4090")
    ax.set_xticks(range(len(published)), options.agents)
    ax.set_yscale("log" if max(minutes) > 10 * min(published) else "linear")
    ax.set_ylabel(f"minutes for {WHOLE:,} updates")
    ax.set_ylim(top=1.5 * max(math.ceil(m) for m in [*minutes, *published]))
    ax.legend(fontsize=7)
    print(save_figure(ax, options.output / "table_2.png"))


if __name__ == "__main__":
    main()
