"""Figure 3 of the paper: returns over environment steps, with bands of one standard deviation.

    python examples/paper/figure_3.py --smoke
    python examples/paper/figure_3.py --envs Reacher HalfCheetah --agents sdac dpmd sac \
        --total-steps 50000 --seeds 3

The runs are those of ``table_1.py``, in the same folder, so that neither makes them twice. Dotted
lines are the paper's means of the best checkpoints. Writes ``out/table_1/figure_3.png``.
"""

import math

import numpy as np

from examples.paper.published import TABLE_1
from examples.paper.table_1 import parsed, trained
from rsm_sampler.plotting import new_figure, save_figure


def main() -> None:
    """Train what is missing, draw."""
    options = parsed("Figure 3 of the paper.", "table_1")
    panels = [
        (env, comparison) for comparison in trained(options).values() for env in comparison.envs
    ]
    columns = min(4, len(panels))
    _, axes = new_figure(math.ceil(len(panels) / columns), columns)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax, (env, comparison) in zip(axes, panels, strict=False):
        for i, (agent, by_env) in enumerate(comparison.curves.items()):
            runs = list(by_env.get(env, {}).values())
            if not runs:
                continue
            steps = np.array(min((run.steps for run in runs), key=len)) / 1000
            returns = np.array([run.returns[: len(steps)] for run in runs])
            mean, spread = returns.mean(0), returns.std(0, ddof=1 if len(runs) > 1 else 0)
            ax.plot(steps, mean, color=f"C{i}", label=agent)
            ax.fill_between(steps, mean - spread, mean + spread, color=f"C{i}", alpha=0.2, lw=0)
            published = TABLE_1[env.removesuffix("-v5")].get(agent)
            if published is not None:
                ax.axhline(published[0], color=f"C{i}", lw=0.7, ls=":")
        ax.set_title(env, fontsize=9)
        ax.set_xlabel("1000 environment steps")
    axes[0].set_ylabel("return")
    axes[0].legend(fontsize=6)
    print(save_figure(axes[0], options.output / "figure_3.png"))


if __name__ == "__main__":
    main()
