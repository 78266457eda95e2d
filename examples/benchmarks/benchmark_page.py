"""The page docs/benchmarks.md, made from docs/results/core.json and from nothing else."""

import operator
from collections.abc import Callable
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
exact mean and spread, which the trainer has to find out by itself.
"""


def _runs(results: dict[str, Record], row: str) -> Runs:
    return [record for key, record in results.items() if key.rsplit("/", 1)[0] == row]


def _range(runs: Runs, get: Callable[[Record], float], digits: int = 3) -> str:
    values = [get(run) for run in runs]
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} – {high}"


def _reached(ok: list[bool]) -> str:
    return f"{sum(ok)} of {len(ok)}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, rows)])


def render(results: dict[str, Record]) -> str:
    """The whole page."""
    floor = results.get("w2 floor/0", {}).get("w2", float("nan"))
    one = next(iter(results.values()), {}).get("machine", {})
    machine = (
        f"Machine: {one.get('cores')} shared cores ({one.get('processor')}), Python "
        f"{one.get('python')}, torch {one.get('torch')}. Other fit times: one thread, "
        "beside other work."
    )
    parts = [HEAD.format(machine=machine), "## Figures\n"]
    rows: list[list[str]] = []

    def add(
        target: str,
        row: str,
        what: str,
        reach: str,
        get: Callable[[Record], float],
        good: Callable[[float], bool],
        digits: int = 3,
        beside: Callable[[Runs], str] | None = None,
    ) -> None:
        runs = [run for run in _runs(results, row) if get(run) is not None]
        if runs:
            rows.append(
                [
                    target,
                    what,
                    reach,
                    _range(runs, get, digits),
                    _reached([good(get(run)) for run in runs]),
                    beside(runs) if beside else "",
                ]
            )

    def other(name: str, digits: int = 3) -> Callable[[Runs], str]:
        def beside(runs: Runs) -> str:
            shown = []
            for method, title in (("rw", "random walk"), ("parallel-tempering", "tempering")):
                known = [run for run in runs if f"{method} {name}" in run]
                if known:
                    values = _range(known, operator.itemgetter(f"{method} {name}"), digits)
                    shown.append(f"{title} {values}")
            return "; ".join(shown)

        return beside

    for title, row in (
        ("paper's mixture", "mixture"),
        ("mixture × 0.01", "mixture x0.01"),
        ("mixture × 100", "mixture x100"),
        ("mixture moved by 50 std", "mixture moved"),
    ):
        add(
            title,
            row,
            "mixing weight (0.8)",
            "± 0.01",
            lambda r: r["weight"],
            lambda v: abs(v - 0.8) <= 0.01,
            4,
            other("weight", 4),
        )
        add(
            title,
            row,
            "means, worst error",
            "≤ 0.05",
            lambda r: r["mean_error"],
            lambda v: v <= 0.05,
        )
        add(
            title,
            row,
            "stds, worst error",
            "≤ 0.05",
            lambda r: r["std_error"],
            lambda v: v <= 0.05,
        )
        add(
            title,
            row,
            f"W2 / floor {floor:.4f}",
            "≤ 1.10",
            lambda r: r["w2"] / floor,
            lambda v: v <= 1.10,
        )
        add(
            title, row, "log Z error", "≤ 0.01", lambda r: r["log_z_error"], lambda v: v <= 0.01, 4
        )
    add(
        "paper's mixture",
        "mixture fit time",
        "fit, seconds (2 threads, nothing else running)",
        "≤ 30",
        lambda r: r["fit_seconds"],
        lambda v: v <= 30,
        1,
    )
    for base in ("moons", "rings"):
        name = {"moons": "two moons", "rings": "rings"}[base]
        for title, row in (
            (name, base),
            (f"{name} × 0.01", f"{base} x0.01"),
            (f"{name} × 100", f"{base} x100"),
            (f"{name} moved by 50 std", f"{base} moved"),
        ):
            add(
                title,
                row,
                "TV / sampling floor",
                "≤ 1.5",
                lambda r: r["tv_ratio"],
                lambda v: v <= 1.5,
                3,
                other("tv_ratio"),
            )
            add(
                title,
                row,
                "log Z error",
                "≤ 0.01",
                lambda r: r["log_z_error"],
                lambda v: v <= 0.01,
                4,
            )
    for title, row in (
        ("GMM-40", "gmm40"),
        ("GMM-40 × 0.01", "gmm40 x0.01"),
        ("GMM-40 × 100", "gmm40 x100"),
        ("GMM-40 moved by 50 std", "gmm40 moved"),
    ):
        add(title, row, "KL(exact ‖ model)", "≤ 0.04", lambda r: r["kl"], lambda v: v <= 0.04, 4)
        add(
            title, row, "log Z error", "≤ 0.01", lambda r: r["log_z_error"], lambda v: v <= 0.01, 4
        )
        add(
            title,
            row,
            "mode-weight TV",
            "≤ 0.03",
            lambda r: r["mode_tv"],
            lambda v: v <= 0.03,
            4,
            other("mode_tv", 4),
        )
        add(
            title,
            row,
            "energy evaluations",
            "≤ 10⁶",
            lambda r: r["evaluations"],
            lambda v: v <= 1e6,
            0,
        )
        add(title, row, "fit, seconds", "≤ 480", lambda r: r["fit_seconds"], lambda v: v <= 480, 0)
    for title, row in (
        ("black box, mixture", "black box mixture"),
        ("black box, decay", "black box decay"),
    ):
        add(
            title,
            row,
            "mixing weight error at 10⁴ evaluations",
            "≤ 0.03",
            lambda r: r["weight_error"],
            lambda v: v <= 0.03,
            4,
            other("weight_error", 4),
        )
    add(
        "conditional mixture",
        "conditional",
        "TV, worst of 64 contexts",
        "≤ 0.05",
        lambda r: r["tv_worst"],
        lambda v: v <= 0.05,
        4,
        lambda runs: f"floor {_range(runs, lambda r: r['tv_floor'], 4)}",
    )
    for title, row, reach in (
        ("20 good samplers", "verdict good", "≥ 19 of 20"),
        ("20 broken samplers", "verdict broken", "≤ 1 of 20"),
    ):
        runs = _runs(results, row)
        if runs:
            trusted = [run["trusted"] for run in runs]
            mode_tv = _range(runs, lambda r: r["mode_tv"])
            rows.append(
                [
                    title,
                    "called trustworthy",
                    reach,
                    f"{sum(trusted)} of {len(trusted)}",
                    "",
                    f"mode-weight TV {mode_tv}",
                ]
            )
    parts.append(
        _table(["target", "measure", "reach", "measured", "reached", "beside it"], rows) + "\n"
    )
    hard = []
    for row, title in (
        ("funnel", "funnel, 10-D"),
        ("many-well-32", "many-well, 32-D"),
        ("gmm-100d", "mixture of 4, 100-D"),
    ):
        for run in _runs(results, row):
            hard.append(
                [
                    title,
                    "yes" if run["finite"] else "NO",
                    "trustworthy" if run["trusted"] else "not trustworthy",
                    "yes" if run["deserves"] else "no",
                    f"{run['ks_energy']:.3f}",
                    f"{run['ks_marginal']:.3f}",
                    f"{run['log_z_error']:.3f}",
                    f"{run['ess']:.3f}",
                    f"{run['evaluations']:,}",
                    f"{run['fit_seconds']:.0f}",
                    "; ".join(run["findings"]),
                ]
            )
    if hard:
        parts.append("## Hard targets: is the verdict right?\n")
        parts.append(
            "A sampler deserves trust here if the Kolmogorov-Smirnov distance of its energies, "
            "and of every coordinate, to exact samples is at most 0.05 (20,000 draws).\n"
        )
        parts.append(
            _table(
                [
                    "target",
                    "finite",
                    "verdict",
                    "deserves trust",
                    "KS energy",
                    "KS coordinates",
                    "log Z error",
                    "ESS share",
                    "evaluations",
                    "seconds",
                    "findings",
                ],
                hard,
            )
            + "\n"
        )
    return "\n".join(parts)
