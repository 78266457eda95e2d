"""Figure 4 of the paper: DPMD on Ant with 10, 20 and 30 steps, and with three noise schedules.

    python examples/paper/figure_4.py --smoke
    python examples/paper/figure_4.py --total-steps 50000 --seeds 3

The paper finds 10 and 20 steps alike and 30 worse, the linear and the cosine schedule alike and
the variance-preserving one worse, after a million environment steps on Ant-v4; here it is Ant-v5.
The cosine schedule and a scale of 1 hold where nothing else is said, whatever the preset.
Runs in ``out/figure_4/runs`` go on where they stopped. Writes ``out/figure_4/figure_4.png``.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import rl
from rsm_sampler.loggers import JSONLinesLogger
from rsm_sampler.plotting import new_figure, save_figure

PANELS: dict[str, dict[str, dict[str, Any]]] = {
    "steps of the chain": {f"T = {n}": {"num_steps": n} for n in (10, 20, 30)},
    "noise schedule, T = 20": {
        name: {"num_steps": 20, "schedule": name} for name in ("linear", "cosine", "vp")
    },
}
TINY = {"width": 16, "depth": 1, "batch_size": 16, "warmup_steps": 40, "replay_size": 200}


def main() -> None:
    """Train what is missing, draw."""
    parser = argparse.ArgumentParser(description="Figure 4 of the paper.")
    parser.add_argument("--smoke", action="store_true", help="seconds, tiny networks")
    parser.add_argument("--env", default="Ant-v5")
    parser.add_argument("--total-steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="corrected")
    parser.add_argument("--output", type=Path, default=Path("out/figure_4"))
    options = parser.parse_args()
    small: dict[str, Any] = {}
    evaluations = 2 if options.smoke else 40
    if options.smoke:
        options.total_steps, options.seeds = 100, 1
        small = {**TINY, "eval_episodes": 1}
    _, axes = new_figure(1, 2)
    for ax, (title, variants) in zip(axes, PANELS.items(), strict=True):
        for i, (label, changes) in enumerate(variants.items()):
            curves = []
            for seed in range(options.seeds):
                steps = changes["num_steps"]
                name = f"{steps}-{changes.get('schedule', 'cosine')}-{seed}"
                folder = options.output / "runs" / name
                rl.train_dpmd(
                    options.env,
                    total_steps=options.total_steps,
                    seed=seed,
                    config=options.preset,
                    run_dir=folder,
                    eval_every=max(1, options.total_steps // evaluations),
                    **{"schedule": "cosine", "schedule_scale": 1.0, **changes},
                    **small,
                )
                lines = JSONLinesLogger.read(folder / "log.jsonl")
                curves.append([(e["step"], e["eval_mean"]) for e in lines if "eval_mean" in e])
            shared = np.array([curve[: min(map(len, curves))] for curve in curves], float)
            at, returns = shared[0, :, 0] / 1000, shared[..., 1]
            mean, spread = returns.mean(0), returns.std(0, ddof=1 if len(curves) > 1 else 0)
            ax.plot(at, mean, color=f"C{i}", label=label)
            ax.fill_between(at, mean - spread, mean + spread, color=f"C{i}", alpha=0.2, lw=0)
            print(f"{title}: {label}: last {mean[-1]:.0f} ± {spread[-1]:.0f}", flush=True)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("1000 environment steps")
        ax.legend(fontsize=7)
    axes[0].set_ylabel(f"return on {options.env}")
    print(save_figure(axes[0], options.output / "figure_4.png"))


if __name__ == "__main__":
    main()
