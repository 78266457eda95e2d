"""Write docs/results_sdac.md and docs/results_dpmd.md, with their curves, from locomotion.py.

python examples/benchmarks/locomotion_pages.py
"""

import math
from collections import defaultdict

import numpy as np
from agents_page import machine, table
from results import FOLDER, load

from rsm_sampler.plotting import new_figure, save_figure

DOCS = FOLDER.parent
# Table 1 of the paper: best of 40 checkpoints of 10^6 steps on v4, mean and deviation of 5 seeds.
PUBLISHED = {
    "sdac": {
        "InvertedDoublePendulum-v5": "9360 ± 0",
        "Reacher-v5": "−3.37 ± 0.42",
        "Swimmer-v5": "119.1 ± 41.9",
        "HalfCheetah-v5": "12210 ± 964",
        "Hopper-v5": "2955 ± 370",
        "Walker2d-v5": "3995 ± 498",
    },
    "dpmd": {
        "InvertedDoublePendulum-v5": "9360 ± 0",
        "Reacher-v5": "−3.14 ± 0.10",
        "Swimmer-v5": "79.3 ± 52.5",
        "HalfCheetah-v5": "11924 ± 609",
        "Hopper-v5": "3275 ± 55",
        "Walker2d-v5": "4365 ± 266",
    },
}
NAMES = {"sdac": "SDAC", "dpmd": "DPMD", "sac": "SAC", "sb3": "SAC of stable-baselines3"}
COLOURS = {"sdac": "tab:blue", "dpmd": "tab:green", "sac": "tab:orange", "sb3": "0.35"}
AIMS = {
    "InvertedDoublePendulum-v5": "≥ 9300 within 50k steps, each seed",
    "Reacher-v5": "≥ −5 at 60k steps, mean",
    "Swimmer-v5": "≥ 100 at 100k steps, mean",
    "HalfCheetah-v5": "≥ 1.15 × SAC of stable-baselines3 at 60k steps, mean",
    "Hopper-v5": "≥ SAC of stable-baselines3 at 100k steps, mean",
    "Walker2d-v5": "≥ SAC of stable-baselines3 at 100k steps, mean",
}


def runs() -> dict[str, dict[str, dict[str, dict]]]:
    """Runs without changes by environment, agent and seed."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for key, record in load("locomotion").items():
        name, _, seed = key.rpartition("/")
        agent, env, *changes = name.split()
        if not changes:
            found[env][agent][seed] = record
    return found


def curves(agent: str, found: dict) -> None:
    """All seeds of the agent and of the yardsticks, thin, and their means, thick."""
    envs = [env for env in AIMS if agent in found.get(env, {})]
    columns = min(3, len(envs))
    figure, axes = new_figure(math.ceil(len(envs) / columns), columns, size=3.2)
    for ax, env in zip(axes, envs, strict=False):
        for other in ("sb3", "sac", agent):
            seeds = found[env].get(other, {})
            for record in seeds.values():
                steps, means = np.array(record["evaluations"]).T
                ax.plot(steps / 1000, means, color=COLOURS[other], lw=0.7, alpha=0.6)
            if seeds:
                full = [np.array(r["evaluations"]) for r in seeds.values()]
                short = min(len(each) for each in full)
                mean = np.mean([each[:short, 1] for each in full], 0)
                label = f"{NAMES[other]}, {len(seeds)} seed" + "s" * (len(seeds) > 1)
                ax.plot(full[0][:short, 0] / 1000, mean, color=COLOURS[other], lw=2, label=label)
        ax.set_title(env, fontsize=9)
        ax.set_xlabel("1000 environment steps")
        ax.legend(fontsize=6)
    for ax in axes[len(envs) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("return")
    (DOCS / "figures").mkdir(exist_ok=True)
    save_figure(figure, DOCS / "figures" / f"results_{agent}.png")


def spread(values: list[float]) -> str:
    """Mean, and sample standard deviation over seeds where there are several."""
    digits = 2 if abs(np.mean(values)) < 100 else 0
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def rows(agent: str, found: dict) -> list[list[str]]:
    """One row for each environment and agent: what its seeds reached."""
    lines = []
    for env, aim in AIMS.items():
        if agent not in found.get(env, {}):
            continue
        for other in (agent, "sac", "sb3"):
            seeds = found[env].get(other, {})
            if not seeds:
                continue
            records = list(seeds.values())
            steps = " ".join(f"{r['steps'] / 1000:g}k" for r in records)
            if not all(r["done"] for r in records):
                steps += " (unfinished)"
            lines.append(
                [
                    env if other == agent else "",
                    NAMES[other],
                    ", ".join(sorted(seeds)),
                    steps,
                    spread([r["last"] for r in records]),
                    ", ".join(
                        f"{r['last']:.{2 if abs(r['last']) < 100 else 0}f}" for r in records
                    ),
                    spread([r["best"] for r in records]),
                    f"{np.mean([r['seconds'] for r in records]) / 60:.0f}",
                    f"{max(r['resident_mb'] for r in records):.0f}",
                    PUBLISHED[agent][env] if other == agent else "",
                    aim if other == agent else "",
                ]
            )
    return lines


def ablations(agent: str) -> str:
    """Runs with one change beside those without, at the same step."""
    kept, lines = load("locomotion"), []
    cases: dict = defaultdict(dict)
    for key, record in kept.items():
        name, _, seed = key.rpartition("/")
        who, env, *changes = name.split()
        if who in (agent, "sb3") and changes:
            cases[who != agent, env, who, changes[0]][seed] = record
    for (_, env, who, change), seeds in sorted(cases.items()):
        at = min(record["steps"] for record in seeds.values())
        base = [kept.get(f"{who} {env}/{seed}", {}).get("evaluations", []) for seed in seeds]
        changed = [record["evaluations"] for record in seeds.values()]
        both = [
            [mean for curve in curves_ for step, mean in curve if step == at]
            for curves_ in (changed, base)
        ]
        texts = [spread(values) if values else "–" for values in both]
        where = [env, NAMES[who], f"`{change}`", ", ".join(sorted(seeds)), f"{at / 1000:g}k"]
        lines.append([*where, *texts])
    if not lines:
        return "None measured yet."
    return table(["environment", "agent", "change", "seeds", "step", "with it", "without"], lines)


def settings(agent: str, found: dict) -> str:
    """The configuration of each environment's runs."""
    lines = []
    for env in AIMS:
        records = list(found.get(env, {}).get(agent, {}).values())
        if records:
            config = ", ".join(f"`{k}={v}`" for k, v in records[0]["config"].items())
            lines.append(f"* {env}: {config}")
    return "\n".join(lines)


def page(agent: str, found: dict) -> str:
    """The page of an agent."""
    envs = [env for env in AIMS if agent in found.get(env, {})]
    some = next(iter(found[envs[0]][agent].values()))
    head = [
        "environment",
        "agent",
        "seeds",
        "steps",
        "last, mean ± std",
        "last of each seed",
        "best, mean ± std",
        "min per run",
        "resident MB",
        "paper, 10⁶ steps",
        "aim",
    ]
    return f"""# Results: {NAMES[agent]}

Written by `python examples/benchmarks/locomotion_pages.py` from `docs/results/locomotion.json`,
which `python examples/benchmarks/locomotion.py --agents {agent} sb3 --threads 1` measures:
seeds 0, 1 and 2, one environment, one update per step, 5,000 random steps before the first
update. Runs of the pendulum, Reacher and Swimmer stop after two evaluations in a row that reach
their aim.

![curves of all seeds](figures/results_{agent}.png)

Thin lines are seeds, thick ones their means, as far as the shortest run goes: means of runs that
stop at their aim end early. SAC is that of stable-baselines3 with its defaults (learning rates of
3e-4, targets that follow by 0.005, returns of one step, networks of two layers of 256) and was not
tuned for runs as short as these, as ours were (see Settings). What is neither in the table nor
among the changes below has not been run.

{table(head, rows(agent, found))}

A **return** is the sum of an episode's rewards, $R = \\sum_t r_t$, without discount. Each
evaluation is the mean $\\bar R$ of 20 episodes from the seeds 10000 to 10019, with the best action
instead of a draw. **Last** is the evaluation at the end of a run, **best** the highest of all its
evaluations, which is optimistic: the more evaluations, the higher. Means and sample standard
deviations are over seeds. "min per run" is wall time with one thread, evaluations included, while
another process used the second core; "resident MB" the largest memory of the process, which may
have done several runs one after the other.

Machine: {machine(some)}.

## Settings

{settings(agent, found)}

## One change at a time

Returns of the same evaluations, with the seeds named and, beside them, the same seeds without the
change (`locomotion.py --change`). One seed is an anecdote: seeds differ by hundreds, and on
Swimmer by whether they find the long stroke at all.

{ablations(agent)}

## What differs from the paper's protocol

The paper's numbers are of the v4 environments (HalfCheetah and Swimmer are the same in v5;
the pendulums and Hopper give their healthy reward only while healthy, and Reacher counts its
reward after the step), 10⁶ steps with an update for every fifth, five environments, and the best
of 40 checkpoints. What differs from its equations and from its public code is listed in
[Agents](agents.md).
"""


def main() -> None:
    """Write the pages of the agents that have runs."""
    found = runs()
    for agent in PUBLISHED:
        if any(agent in agents for agents in found.values()):
            curves(agent, found)
            (DOCS / f"results_{agent}.md").write_text(page(agent, found))
            print(DOCS / f"results_{agent}.md")


if __name__ == "__main__":
    main()
