r"""Runs of several agents on several environments side by side: tables, intervals, curves.

A folder of runs (made by :func:`rl.grid.compare`, or by hand: its ``runs/`` holds run folders of
:mod:`rl.run`) is read by :func:`read`; :func:`write_report` writes

=================== ==========================================================================
``scores.json``     the return of every run at every evaluation
``report.md``       last and best, means, interquartile means and probabilities of improvement
                    with their intervals, by task and over tasks, wall time and memory
``curves.png``      return over steps, all seeds and their mean
``profiles.png``    share of runs above a normalised return
=================== ==========================================================================

Returns of different tasks are put together after normalisation: 0 is what random actions get, 1
the best agent's mean of last returns, or a ``reference`` that is given.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rl.environments import Environments
from rl.run import read_about, uncounted_steps
from rl.statistics import (
    interquartile_mean,
    mean_of_tasks,
    normalised,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from rsm_sampler.checked import checked
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.loggers import JSONLinesLogger
from rsm_sampler.plotting import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["Comparison", "Curve", "read", "steps_done", "write_report"]


@dataclass(frozen=True)
class Curve:
    """A run's evaluations and what they took.

    Attributes:
        steps: Environment steps, (checkpoints).
        returns: Mean returns, (checkpoints).
        seconds: Wall time of training, evaluations included.
        resident_mb: Largest memory of its process.
        updates: Steps of the optimiser.
    """

    steps: list[int]
    returns: list[float]
    seconds: float
    resident_mb: float
    updates: float = math.nan


@checked(skip=("__init__",))
@dataclass(frozen=True)
class Comparison:
    """The runs of a grid.

    Attributes:
        curves: By agent, by environment, by seed.
        random: What random actions get, by environment.
        total_steps: Length of the runs.
    """

    curves: dict[str, dict[str, dict[int, Curve]]]
    random: dict[str, float]
    total_steps: int

    @property
    def envs(self) -> list[str]:
        """Environments, of any agent."""
        return sorted({env for by_env in self.curves.values() for env in by_env})

    def scores(self, agent: str, which: str = "last") -> dict[str, NDArray[np.float64]]:
        """Return of each run of an agent, by environment.

        Arguments:
            agent: Name of the agent.
            which: ``"last"`` or ``"best"``.

        Raises:
            ValueError: If it is neither.
        """
        if which not in ("last", "best"):
            raise ValueError(f"which must be 'last' or 'best', got {which!r}")
        return {
            env: np.array(
                [
                    curve.returns[-1] if which == "last" else max(curve.returns)
                    for _, curve in sorted(runs.items())
                ],
                np.float64,
            )
            for env, runs in self.curves[agent].items()
        }


@checked
def read(folder: str | os.PathLike[str], *, total_steps: int | None = None) -> Comparison:
    """The runs of a grid as they are, finished or not.

    Arguments:
        folder: Folder of the grid.
        total_steps: Length of the runs; that of the longest if None. Evaluations after it, of
            runs that were longer, do not count.

    Raises:
        CheckpointError: If there is no run with an evaluation.
    """
    folder = Path(folder).expanduser()
    curves: dict[str, dict[str, dict[int, Curve]]] = {}
    longest = 0
    for path in sorted((folder / "runs").glob("*/run.json")):
        about = read_about(path.parent)
        curve = _curve(path.parent, total_steps)
        if curve.returns:
            by_env = curves.setdefault(about["agent"], {})
            by_env.setdefault(about["env"], {})[about["seed"]] = curve
            longest = max(longest, curve.steps[-1])
    if not curves:
        raise CheckpointError(f"no runs at {folder / 'runs'}")
    envs = sorted({env for by_env in curves.values() for env in by_env})
    random = _random_returns(folder / "random.json", envs)
    return Comparison(curves, random, longest if total_steps is None else total_steps)


@checked
def steps_done(folder: str | os.PathLike[str]) -> int:
    """Step of a run's last evaluation, 0 before the first; of those that its length counts.

    Arguments:
        folder: Folder of the run, which need not exist.
    """
    return max(_curve(Path(folder), None).steps, default=0)


@checked
def write_report(
    found: Comparison,
    out: str | os.PathLike[str],
    *,
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Write scores, tables and figures.

    Arguments:
        found: The runs.
        out: The folder.
        reference: The return that counts as 1, by environment; the best agent's where none is
            given.

    Returns:
        The report, ``report.md``.
    """
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    envs = found.envs
    high = {**_best_means(found), **(reference or {})}
    groups = {tuple(agents): envs for agents, envs in _comparable(found, high) if envs}
    units = {
        agents: {
            agent: normalised({env: found.scores(agent)[env] for env in envs}, found.random, high)
            for agent in agents
        }
        for agents, envs in groups.items()
    }
    lines = [
        f"# {', '.join(found.curves)} at {found.total_steps:,} steps",
        "",
        "![curves](curves.png)",
        "",
        "Mean ± sample standard deviation over seeds of the return at the last evaluation; below "
        "it that of each seed's best evaluation, which chance makes larger.",
        "",
        *_table(_returns(found, envs)),
        "",
        *_cost_lines(found),
    ]
    lines += _each_task(found, high)
    for group in units.values():
        lines += _over_tasks(group, found, high)
    if units:
        lines += ["", "![profiles](profiles.png)"]
        _draw_profiles(found, list(units.values()), out / "profiles.png")
    _draw_curves(found, out / "curves.png")
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------------- tables


def _returns(found: Comparison, envs: Sequence[str]) -> list[list[str]]:
    rows = [["environment", *found.curves]]
    for env in envs:
        for which in ("last", "best"):
            cells = [
                _spread(found.scores(agent, which)[env]) if env in by_env else "–"
                for agent, by_env in found.curves.items()
            ]
            rows.append([env if which == "last" else "best of each seed", *cells])
    return rows


def _cost_lines(found: Comparison) -> list[str]:
    rows = [["agent", "runs", "finished", "updates per step", "minutes of a run", "resident MB"]]
    for agent, by_env in found.curves.items():
        runs = [curve for by_seed in by_env.values() for curve in by_seed.values()]
        minutes = np.array([curve.seconds for curve in runs]) / 60
        rate = sum(curve.updates for curve in runs) / sum(curve.steps[-1] for curve in runs)
        memory = max(curve.resident_mb for curve in runs)
        done = sum(curve.steps[-1] >= found.total_steps for curve in runs)
        largest = "–" if math.isnan(memory) else f"{memory:.0f}"
        made = "–" if math.isnan(rate) else f"{rate:.2f}"
        rows.append([agent, str(len(runs)), str(done), made, _spread(minutes), largest])
    return _table(rows)


def _comparable(found: Comparison, high: Mapping[str, float]) -> list[tuple[list[str], list[str]]]:
    """Agents with the tasks that all of them have, so that like is compared with like.

    Those that have all tasks on all, and all agents on what they have in common.
    """
    envs = [env for env in found.envs if high[env] > found.random[env]]
    whole = [agent for agent, by_env in found.curves.items() if set(envs) <= set(by_env)]
    common = [env for env in envs if all(env in by for by in found.curves.values())]
    groups = [(list(found.curves), common)]
    return [(whole, envs), *groups] if 1 < len(whole) < len(found.curves) else groups


def _each_task(found: Comparison, high: Mapping[str, float]) -> list[str]:
    """By task: the share of the best agent's return, and how likely a run is better than its."""
    rows = [["environment", *found.curves]]
    for env in found.envs:
        runs = {
            agent: found.scores(agent)[env]
            for agent, by_env in found.curves.items()
            if env in by_env
        }
        best = max(runs, key=lambda agent: runs[agent].mean())
        cells = []
        for agent in found.curves:
            cell = "–"
            if agent in runs and high[env] > found.random[env]:
                own, best_own = {env: runs[agent]}, {env: runs[best]}
                cell = f"{normalised(own, found.random, high)[env].mean():.2f}"
                if agent == best:
                    cell = f"**{cell}**"
                else:
                    better = stratified_bootstrap(probability_of_improvement, own, best_own)
                    cell += f"; {better}"
            cells.append(cell)
        rows.append([env, *cells])
    return [
        "",
        "Each task: mean of last returns, 0 being that of random actions and 1 the reference (the "
        "best agent's mean, unless another was given); after it the probability that a run is "
        "better than one of the best agent, in bold, with its interval. Few runs make intervals "
        "too short: of two equal agents with three runs each one in five leaves out 0.5, with "
        "five runs one in ten.",
        "",
        *_table(rows),
    ]


def _over_tasks(
    units: dict[str, dict[str, NDArray[np.float64]]], found: Comparison, high: Mapping[str, float]
) -> list[str]:
    means = {agent: stratified_bootstrap(mean_of_tasks, runs) for agent, runs in units.items()}
    best = max(means, key=lambda agent: means[agent].value)
    rows = [["agent", "mean", "interquartile mean", f"P(better than {best})"]]
    for agent, runs in units.items():
        middle = stratified_bootstrap(interquartile_mean, runs)
        better = stratified_bootstrap(probability_of_improvement, runs, units[best])
        last = "–" if agent == best else str(better)
        rows.append([agent, str(means[agent]), str(middle), last])
    envs = list(units[best])
    scale = ", ".join(f"{env} {found.random[env]:.1f} and {high[env]:.1f}" for env in envs)
    return [
        "",
        f"Over {len(envs)} task{'s' if len(envs) > 1 else ''}, of last returns, with intervals of "
        "95 % (stratified bootstrap of runs). Of few tasks the interquartile mean, of the middle "
        "half of all runs, can leave the hardest one out. Returns that count as 0 and 1: "
        f"{scale}.",
        "",
        *_table(rows),
    ]


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def _spread(values: NDArray[np.float64]) -> str:
    if not np.isfinite(values).all():
        return "–"
    digits = 0 if abs(values.mean()) >= 100 else 1 if abs(values.mean()) >= 10 else 2
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def _best_means(found: Comparison) -> dict[str, float]:
    """The best agent's mean of last returns, by environment."""
    return {
        env: max(
            float(found.scores(agent)[env].mean())
            for agent, by_env in found.curves.items()
            if env in by_env
        )
        for env in found.envs
    }


# ---------------------------------------------------------------------- figures


def _draw_curves(found: Comparison, path: Path) -> None:
    envs = found.envs
    columns = 2 if len(envs) == 4 else min(len(envs), 3)
    figure, axes = new_figure(math.ceil(len(envs) / columns), columns)
    means: dict[str, Line2D] = {}
    for ax, env in zip(axes, envs, strict=False):
        for i, (agent, by_env) in enumerate(found.curves.items()):
            runs = list(by_env.get(env, {}).values())
            for run in runs:
                ax.plot(np.array(run.steps) / 1000, run.returns, color=f"C{i}", lw=0.7, alpha=0.5)
            if runs:
                shared = min((run.steps for run in runs), key=len)
                mean = np.mean([run.returns[: len(shared)] for run in runs], axis=0)
                (means[agent],) = ax.plot(np.array(shared) / 1000, mean, color=f"C{i}", lw=2)
        ax.axhline(found.random[env], color="0.6", lw=0.8, ls=":")
        ax.set_title(env, fontsize=9)
        ax.set_xlabel("1000 environment steps")
    for ax in axes[len(envs) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("return (dotted: random actions)")
    _one_legend(figure, [(means[agent], _seeds(agent, found)) for agent in found.curves])
    save_figure(axes[0], path)


def _draw_profiles(
    found: Comparison, groups: Sequence[dict[str, dict[str, NDArray[np.float64]]]], path: Path
) -> None:
    color = {agent: f"C{i}" for i, agent in enumerate(found.curves)}
    figure, axes = new_figure(1, len(groups))
    drawn: dict[str, Line2D] = {}
    for ax, units in zip(axes, groups, strict=True):
        top = max(float(runs.max()) for by_env in units.values() for runs in by_env.values())
        thresholds = np.linspace(0, max(1.0, top) * 1.05, 200)
        for agent, runs in units.items():
            share = performance_profile(runs, thresholds)
            (drawn[agent],) = ax.plot(thresholds, share, color=color[agent])
        # Without their versions, a line each: long names would leave the figure.
        envs = [env.rsplit("-v", 1)[0] for env in next(iter(units.values()))]
        ax.set_title("\n".join(envs), fontsize=9)
        ax.set_xlabel("normalised return")
    axes[0].set_ylabel("share of runs above it")
    _one_legend(figure, [(line, agent) for agent, line in drawn.items()])
    save_figure(axes[0], path)


def _one_legend(figure: "Figure", lines: Sequence[tuple["Line2D", str]]) -> None:
    """Beside all panels, where it hides no curve."""
    figure.set_figwidth(figure.get_figwidth() + 1.2)
    figure.legend(*zip(*lines, strict=True), loc="outside right upper", fontsize=8)


def _seeds(agent: str, found: Comparison) -> str:
    """Name and number of seeds, or its range where tasks differ."""
    numbers = {len(runs) for runs in found.curves[agent].values()}
    few, many = min(numbers), max(numbers)
    span = str(few) if few == many else f"{few} to {many}"
    return f"{agent}, {span} seed{'s' if many > 1 else ''}"


# ---------------------------------------------------------------------- reading


def _curve(folder: Path, total_steps: int | None) -> Curve:
    log, cost = folder / "log.jsonl", folder / "cost.json"
    lines = JSONLinesLogger.read(log) if log.exists() else []
    before = uncounted_steps(read_about(folder)["config"]) if lines else 0
    found = {int(line["step"]) - before: line for line in lines if "eval_mean" in line}
    found = {step: line for step, line in found.items() if step > 0}
    if total_steps is not None:
        # Several environments step together and may end a little later.
        end = min((step for step in found if step >= total_steps), default=total_steps)
        found = {step: line for step, line in found.items() if step <= end}
    last = found[max(found)] if found else {}
    taken = json.loads(cost.read_text()) if cost.exists() else {}
    steps = sorted(found)
    return Curve(
        steps,
        [float(found[step]["eval_mean"]) for step in steps],
        last.get("seconds", math.nan),
        taken.get("resident_mb", math.nan),
        last.get("updates", math.nan),
    )


def _random_returns(path: Path, envs: Sequence[str], episodes: int = 20) -> dict[str, float]:
    """Mean return of uniformly random actions; kept in a file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    for env in envs:
        if env in known:
            continue
        environments = Environments(env, 1)
        rng, returns = np.random.default_rng(0), []
        for i in range(episodes):
            environments.reset(seed=10_000 + i)
            environments.finished.clear()
            while not environments.finished:
                action = rng.uniform(-1, 1, (1, environments.action_dim))
                environments.step(action.astype(np.float32))
            returns.append(environments.finished[0][0])
        environments.close()
        known[env] = float(np.mean(returns))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    temporary.replace(path)
    return {env: known[env] for env in envs}
