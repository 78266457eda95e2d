"""The page docs/benchmarks.md, made from docs/results/core.json and from nothing else."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Runs = list[Record]

HEAD = """# Benchmarks of the core

Made by `python examples/benchmarks/core.py`; every number stands in `docs/results/core.json` with
its seed, versions and machine. One default configuration, energy values only, the final model,
raw samples (neither reweighted nor refined). A range is the smallest and largest over the seeds
measured; "reached" counts them. {machine}

"Random walk" and "tempering" are Metropolis chains (512 of them) and parallel tempering (64
chains, 12 levels) at the same number of energy evaluations. They start from a normal law with the
exact mean and spread, which the trainer has to find out by itself. A "sampling floor" is what as
many exact draws score: 200,000 of the sampler and of random walks, of tempering those it keeps.
"""


@dataclass(frozen=True)
class Figure:
    """A measure, and how far from its aim it may be.

    Attributes:
        what: Its name.
        field: Where a record has it.
        most: The largest distance from the aim.
        aim: What it should be.
        digits: Digits shown.
        beside: A field that stands beside it, and what it is called; of chains too.
    """

    what: str
    field: str
    most: float
    aim: float = 0.0
    digits: int = 3
    beside: tuple[tuple[str, str], ...] = ()

    def row(self, target: str, runs: Runs) -> list[str]:
        """Its line in the table."""
        values = [run[self.field] for run in runs]
        reach = f"{'± ' if self.aim else '≤ '}{self.most:,.12g}"
        shown = []
        for field, title in self.beside:
            known = [run for run in runs if field in run]
            if known:
                shown.append(f"{title} {_range(known, field, self.digits)}")
        reached = [abs(value - self.aim) <= self.most for value in values]
        return [
            target,
            self.what,
            reach,
            _range(runs, self.field, self.digits),
            f"{sum(reached)} of {len(reached)}",
            "; ".join(shown),
        ]


def _chains(field: str) -> tuple[tuple[str, str], ...]:
    return (f"rw {field}", "random walk"), (f"parallel-tempering {field}", "tempering")


LOG_Z = Figure("log Z error", "log_z_error", 0.01, digits=4)
MIXTURE = [
    Figure("mixing weight (0.8)", "weight", 0.01, 0.8, 4, _chains("weight")),
    Figure("means, worst error", "mean_error", 0.05),
    Figure("stds, worst error", "std_error", 0.05),
    Figure("W2 / floor", "w2_ratio", 1.10, digits=4, beside=(("w2_floor", "floor"),)),
    LOG_Z,
]
GRID = [Figure("TV / sampling floor", "tv_ratio", 1.5, beside=_chains("tv_ratio")), LOG_Z]
GMM40 = [
    Figure("KL(exact ‖ model)", "kl", 0.04, digits=4),
    LOG_Z,
    Figure("mode-weight TV", "mode_tv", 0.03, digits=4, beside=_chains("mode_tv")),
    Figure("energy evaluations", "evaluations", 1e6, digits=0),
    Figure("fit, seconds", "fit_seconds", 480, digits=0),
]
ALONE = [Figure("fit, seconds (2 threads, nothing else running)", "fit_seconds", 30, digits=1)]
BLACK_BOX = [
    Figure(
        "mixing weight error at 10⁴ evaluations",
        "weight_error",
        0.03,
        digits=4,
        beside=_chains("weight_error"),
    )
]
CONDITIONAL = [
    Figure("TV, worst of 64 contexts", "tv_worst", 0.05, digits=4, beside=(("tv_floor", "floor"),))
]
CHANGES = {"": "", " x0.01": " × 0.01", " x100": " × 100", " moved": " moved by 50 std"}


def _moved(title: str, row: str, figures: list[Figure]) -> list[tuple[str, str, list[Figure]]]:
    return [(title + shown, row + change, figures) for change, shown in CHANGES.items()]


TARGETS = [
    *_moved("paper's mixture", "mixture", MIXTURE),
    ("paper's mixture", "mixture fit time", ALONE),
    *_moved("two moons", "moons", GRID),
    *_moved("rings", "rings", GRID),
    *_moved("GMM-40", "gmm40", GMM40),
    ("black box, mixture", "black box mixture", BLACK_BOX),
    ("black box, decay", "black box decay", BLACK_BOX),
    ("conditional mixture", "conditional", CONDITIONAL),
]
VERDICTS = [
    ("20 good samplers", "verdict good", "≥ 19 of 20"),
    ("20 broken samplers", "verdict broken", "≤ 1 of 20"),
]
HARD = [
    ("funnel, 10-D", "funnel"),
    ("many-well, 32-D", "many-well-32"),
    ("mixture of 4, 100-D", "gmm-100d"),
]
HARD_COLUMNS: dict[str, Callable[[Record], str]] = {
    "finite": lambda run: "yes" if run["finite"] else "NO",
    "verdict": lambda run: "trustworthy" if run["trusted"] else "not trustworthy",
    "deserves trust": lambda run: "yes" if run["deserves"] else "no",
    "KS energy": lambda run: f"{run['ks_energy']:.3f}",
    "KS coordinates": lambda run: f"{run['ks_marginal']:.3f}",
    "log Z error": lambda run: (
        f"{run['log_z_error']:.{'3f' if run['log_z_error'] < 1e4 else '1e'}}"
    ),
    "ESS share": lambda run: f"{run['ess']:.3f}",
    "evaluations": lambda run: f"{run['evaluations']:,}",
    "seconds": lambda run: f"{run['fit_seconds']:.0f}",
    "findings": lambda run: "; ".join(run["findings"]),
}


def _runs(results: dict[str, Record], row: str) -> Runs:
    floor = results.get("w2 floor/0", {}).get("w2", float("nan"))
    found = [dict(record) for key, record in results.items() if key.rsplit("/", 1)[0] == row]
    for run in found:
        if "w2" in run:
            run.update(w2_floor=floor, w2_ratio=run["w2"] / floor)
    return found


def _range(runs: Runs, field: str, digits: int = 3) -> str:
    values = list(map(operator.itemgetter(field), runs))
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return low if low == high else f"{low} – {high}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, rows)]) + "\n"


def render(results: dict[str, Record]) -> str:
    """The whole page."""
    one = next(iter(results.values()), {}).get("machine", {})
    machine = (
        f"Machine: {one.get('cores')} shared cores ({one.get('processor')}), Python "
        f"{one.get('python')}, torch {one.get('torch')}. Fit times, unless it says otherwise: "
        "one thread, beside other work."
    )
    rows = [
        figure.row(title, runs)
        for title, row, figures in TARGETS
        for figure in figures
        if (runs := _runs(results, row))
    ]
    for title, row, reach in VERDICTS:
        if runs := _runs(results, row):
            trusted = f"{sum(run['trusted'] for run in runs)} of {len(runs)}"
            beside = f"mode-weight TV {_range(runs, 'mode_tv')}"
            rows.append([title, "called trustworthy", reach, trusted, "", beside])
    header = ["target", "measure", "reach", "measured", "reached", "beside it"]
    parts = [HEAD.format(machine=machine), "## Figures\n", _table(header, rows)]
    hard = [
        [title, *(show(run) for show in HARD_COLUMNS.values())]
        for title, row in HARD
        for run in _runs(results, row)
    ]
    if hard:
        parts += [
            "## Hard targets: is the verdict right?\n",
            "A sampler deserves trust here if the Kolmogorov-Smirnov distance of its energies, "
            "and of every coordinate, to exact samples is at most 0.05 (20,000 draws).\n",
            _table(["target", *HARD_COLUMNS], hard),
        ]
    return "\n".join(parts)
