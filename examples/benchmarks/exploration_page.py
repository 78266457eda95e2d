"""The page docs/exploration.md, made from docs/results/exploration/*.json and from nothing else.

python examples/benchmarks/exploration_page.py
"""

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from exploration import FOLDER, PEERS, QUICK, ROOT, load
from exploration_targets import SETS

PAGE = ROOT / "docs" / "exploration.md"
Record = dict[str, Any]

HEAD = """# Exploration and verdict: measured

Targets on which a confident wrong answer is tempting, all with known answers. Made by
`python examples/benchmarks/exploration.py MODE` (each mode one command) and
`python examples/benchmarks/exploration_page.py`; every number stands in
`docs/results/exploration/` with its seed, versions and machine. Seconds are those of the
processor, on one thread; evaluations count every point shown to the energy, the verdict's
included, and a gradient twice. Errors are of 20,000 raw draws of a fitted sampler, or of the
weighted draws of `explore`; log Z is the verdict's or `explore`'s.

A **lie** is the word *trustworthy* although the masses of modes are off by more than 0.1 in total
variation (TV) or log Z by more than 0.2. *KS* is the largest Kolmogorov-Smirnov distance of a
marginal, *mean* the largest error of a mean in standard deviations. A row is **reached** if all
its errors are within the limits of its set and the word is *trustworthy*. Fits of small networks
and with small budgets are meant to be poor: there it counts that none of them is a lie.
"""
TITLES = {
    "findable": "every mode has a basin",
    "hidden": "a mode that cannot be seen",
    "heavy": "heavy tails",
    "classic": "what nested samplers show",
    "hard": "harder",
    "posteriors": "posteriors with one mode",
    "kinds": "more of the same kinds",
    "kinds_hidden": "more that cannot be seen",
    "kinds_heavy": "more heavy tails",
}
LIMITS = {
    "findable": "TV ≤ 0.03, log Z ≤ 0.05",
    "hidden": "no statement of coverage that excludes the mode",
    "heavy": "TV ≤ 0.05, or not trusted",
    "classic": "log Z ≤ 0.02 (shells10, eight: 0.05), mean ≤ 0.05, TV ≤ 0.03",
    "hard": "log Z ≤ 0.1",
    "posteriors": "KS ≤ 0.05, log Z ≤ 0.05",
    "kinds": "those of the kind",
    "kinds_hidden": "as above",
    "kinds_heavy": "as above",
}
MODES = {
    "explore": "`explore`, defaults",
    "explore-20000": "`explore`, budget 20,000",
    "explore-10000": "`explore`, budget 10,000",
    "fit": "`fit`, defaults",
    "light": "`fit` of a small network, defaults of search and verdict",
    "b20000": "`fit`, budget 20,000 (a small network, except for posteriors)",
    "b10000": "`fit`, budget 10,000 (a small network, except for posteriors)",
}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def number(value: Any, digits: int = 3) -> str:
    """A number for people; numbers that JSON does not know are words there."""
    if value is None:
        return "–"
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if digits == 0 else f"{value:.{digits}f}"


def values(runs: list[Record], field: str) -> list[float]:
    """What the runs have of a field."""
    return [float(run[field]) for run in runs if run.get(field) is not None]


def worst(runs: list[Record], field: str, digits: int = 3) -> str:
    """The value farthest from zero."""
    found = values(runs, field)
    return number(max(found, key=abs), digits) if found else "–"


def middle(runs: list[Record], field: str, digits: int = 0) -> str:
    """The median."""
    found = values(runs, field)
    return number(statistics.median(found), digits) if found else "–"


def share(runs: list[Record], test: Callable[[Record], Any]) -> str:
    """How many of them."""
    return f"{sum(bool(test(run)) for run in runs)} of {len(runs)}" if runs else "–"


def words(runs: list[Record]) -> str:
    """The verdicts, counted."""
    found = [run.get("verdict", "error") for run in runs]
    return ", ".join(
        word if len(runs) == 1 else f"{found.count(word)} {word}"
        for word in sorted(set(found), key=found.count, reverse=True)
    )


def of_set(results: dict[str, Record], group: str) -> list[Record]:
    """The runs of a set's targets."""
    return [run for run in results.values() if run.get("target") in SETS[group]]


def of_target(results: dict[str, Record], name: str) -> list[Record]:
    """The runs of one target."""
    return [run for run in results.values() if run.get("target") == name]


def summary(found: dict[str, dict[str, Record]]) -> str:
    """One row for each mode and set."""
    rows = []
    for mode, title in MODES.items():
        for group in SETS:
            runs = of_set(found[mode], group)
            if runs:
                rows.append([
                    title, TITLES[group], str(len(runs)), share(runs, lambda r: r.get("lie")),
                    share(runs, lambda r: r.get("within")), share(runs, lambda r: r["reached"]),
                    LIMITS[group],
                ])  # fmt: skip
    head = ["what", "targets", "runs", "lies", "within limits", "reached", "limits"]
    return table(head, rows)


def figures(found: dict[str, dict[str, Record]]) -> str:
    """Verdicts on made-up samplers, the quick answer, the eggbox."""
    rows = []
    for mode, title, reach in (
        ("false-alarms", "40 mixtures, exact samplers", "≥ 38 of 40"),
        ("sabotage", "40 samplers broken on purpose", "0 of 40"),
    ):
        runs = list(found[mode].values())
        if runs:
            trusted = share(runs, lambda run: run.get("trusted"))
            rows.append([title, "called trustworthy", reach, trusted])
    for mode in ("explore", "light", "fit"):
        runs = of_target(found[mode], "eggbox")
        if runs:
            rows.append([
                f"eggbox, {MODES[mode]}", "all 13 modes; worst TV; worst log Z error",
                "all; ≤ 0.03; ≤ 0.02",
                f"{share(runs, lambda r: r.get('missed') == 0)}; {worst(runs, 'tv')}; "
                f"{worst(runs, 'log_z_error', 4)}",
            ])  # fmt: skip
    for name in QUICK:
        runs = of_target(found["quick"], name)
        if runs:
            rows.append([
                f"{name}: 10,000 effective draws", "seconds; evaluations (medians)",
                "≤ 1.5; ≤ 25,000", f"{middle(runs, 'seconds', 2)}; {middle(runs, 'evaluations')}",
            ])  # fmt: skip
    return table(["what", "measure", "reach", "measured"], rows) if rows else "Not measured yet.\n"


COLUMNS: dict[str, Callable[[list[Record]], str]] = {
    "target": lambda runs: runs[0]["target"],
    "dim": lambda runs: str(runs[0].get("dim", "–")),
    "seeds": lambda runs: str(len(runs)),
    "evaluations": lambda runs: middle(runs, "evaluations"),
    "seconds": lambda runs: middle(runs, "seconds", 1),
    "ESS": lambda runs: middle(runs, "ess"),
    "log Z error": lambda runs: worst(runs, "log_z_error", 4),
    "stated": lambda runs: worst(runs, "log_z_se", 4),
    "TV": lambda runs: worst(runs, "tv"),
    "mean": lambda runs: worst(runs, "mean"),
    "KS": lambda runs: worst(runs, "ks"),
    "verdict": words,
    "lies": lambda runs: share(runs, lambda run: run.get("lie")),
    "reached": lambda runs: share(runs, lambda run: run["reached"]),
}


def details(found: dict[str, dict[str, Record]]) -> list[str]:
    """One table for each mode; the worst of the seeds, medians of costs."""
    parts = []
    for mode, title in MODES.items():
        rows = [
            [show(runs) for show in COLUMNS.values()]
            for group in SETS
            for name in SETS[group]
            if (runs := of_target(found[mode], name))
        ]
        if rows:
            parts += [f"## {title}\n", "Worst errors over the seeds, medians of costs.\n"]
            parts.append(table(list(COLUMNS), rows))
    return parts


def coverage(found: dict[str, dict[str, Record]]) -> list[str]:
    """What was said about modes that cannot be seen."""
    rows = []
    for mode, title in MODES.items():
        for group in ("hidden", "kinds_hidden"):
            for name in SETS[group]:
                runs = [run for run in of_target(found[mode], name) if "mode_share" in run]
                if runs:
                    one = runs[0]
                    rows.append([
                        title, name, words(runs), f"{one['mode_mass']:.2f}",
                        f"{one['mode_share']:.1e}",
                        f"{min(values(runs, 'excluded'), default=math.nan):.1e}",
                        number(one["mode_width"]), worst(runs, "visible_width"),
                        share(runs, lambda run: run.get("excludes")),
                    ])  # fmt: skip
    head = [
        "what", "target", "verdict", "mode's mass", "its share of starts, at most",
        "shares excluded above", "its width", "width that would be met", "false statements",
    ]  # fmt: skip
    return ["## Modes that cannot be seen\n", table(head, rows)] if rows else []


def peers(found: dict[str, dict[str, Record]]) -> list[str]:
    """Nested samplers beside the quick answer."""
    rows = []
    for name in PEERS:
        for library in ("dynesty", "nautilus", "explore"):
            runs = [
                run
                for run in found["explore" if library == "explore" else "peers"].values()
                if run.get("target") == name and run.get("library", library) == library
            ]
            if runs:
                rows.append([
                    name, library, str(len(runs)), middle(runs, "evaluations"),
                    middle(runs, "seconds", 1), middle(runs, "ess"),
                    worst(runs, "log_z_error", 4), worst(runs, "tv"), worst(runs, "mean"),
                    worst(runs, "ks"),
                ])  # fmt: skip
    if not rows:
        return []
    head = [
        "target", "library", "seeds", "evaluations", "seconds", "ESS", "log Z error", "TV", "mean",
        "KS",
    ]  # fmt: skip
    text = (
        "The same energies, counted, on one thread, asked for 10,000 effective draws; dynesty's "
        "dynamic sampler and nautilus with their defaults, from uniform priors on boxes that hold "
        "the target (of the eight schools from its prior). dynesty asks for one point a call, so "
        "that its seconds are mostly those of calls.\n"
    )
    return ["## Beside nested samplers\n", text, table(head, rows)]


def costs() -> list[str]:
    """Search and verdict beside those of an earlier version, where that was measured."""
    before, after = load("before"), load("light")
    ratios: dict[str, list[float]] = {"evaluations": [], "seconds": []}
    for key in before.keys() & after.keys():
        if "error" in before[key] or "error" in after[key]:
            continue
        for what, found in ratios.items():
            old, new = (
                run[f"search_{what}"] + run[f"verdict_{what}"] for run in (before[key], after[key])
            )
            found.append(new / old)
    rows = [
        [what, str(len(found)), number(statistics.median(found), 2), number(max(found), 2)]
        for what, found in ratios.items()
        if found
    ]
    if not rows:
        return []
    head = ["search and verdict", "runs", "median ratio", "largest ratio"]
    return ["## Costs beside the version before\n", table(head, rows)]


def render() -> str:
    """The whole page."""
    names = [*MODES, "quick", "false-alarms", "sabotage", "peers"]
    found = {name: load(name) for name in names}
    records = [run for results in found.values() for run in results.values()]
    machine = records[0]["machine"] if records and "machine" in records[0] else {}
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    parts = [
        HEAD,
        f"Machine: {where}.\n",
        "## Figures\n",
        figures(found),
        "## All runs\n",
        summary(found),
        *coverage(found),
        *details(found),
        *peers(found),
        *costs(),
    ]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    Path(PAGE).write_text(render())
    print(f"wrote {PAGE} from {FOLDER}")


if __name__ == "__main__":
    main()
