"""Write docs/boltzmann.md and its figure from the results of boltzmann.py.

python examples/benchmarks/boltzmann_page.py
"""

import math
from collections import defaultdict

import matplotlib.pyplot as plt
from boltzmann import METHODS, TASKS
from results import FOLDER, load

DOCS = FOLDER.parent
FIGURE = DOCS / "figures" / "boltzmann.png"
# The figure of a target: its name, a perfect sampler's value, and what is to be reached.
FIGURES = {
    "many-well-32": ("worst pair", 0.003, 0.02, 0.1),
    **{f"many-well-m5-{d}d": ("TV", 0.022, 0.05, 0.05) for d in (5, 50, 100, 200)},
    "funnel": ("KS", 0.009, 0.03, 0.05),
    "gmm40-50d": ("TV", 0.025, 0.10, math.nan),
    "dw4": ("energy W2", 0.14, 0.20, math.nan),
}


def grouped() -> dict[str, dict[str, list[dict]]]:
    """Records by target and method, seeds in order."""
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for key, record in load("boltzmann").items():
        name, method = key.partition("/")[0].split()
        found[name][method].append(record)
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Mean of absolute values, and their range where there are several."""
    values = [abs(v) for v in values if v is not None]
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def section(name: str, methods: dict[str, list[dict]]) -> str:
    """The table of one target."""
    figure, floor, wanted, log_z = FIGURES[name]
    head = ["method", "seeds", f"{figure}, raw", "reweighted", "error of log Z", "evaluations",
            "fit, s", "10,000 more draws, s"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for method in METHODS:
        records = methods.get(method)
        if not records:
            continue
        again = [r["reweighted"][figure] for r in records if "reweighted" in r]
        lines.append(
            [
                f"`{method}`",
                str(len(records)),
                spread([r["raw"][figure] for r in records]),
                spread(again),
                spread([r["log_z_error"] for r in records]),
                f"{sum(r['evaluations'] for r in records) / len(records):,.0f}",
                f"{sum(r['fit_seconds'] for r in records) / len(records):.0f}",
                spread([r["seconds_per_10k"] for r in records], 1),
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    aims = f"{figure}: a perfect sampler {floor}, aim {wanted}"
    if not math.isnan(log_z):
        aims += f"; log Z: aim {log_z}"
    return f"## {name}\n\n{table}\n\n{aims}; {TASKS[name].n:,} draws."


def draw(found: dict[str, dict[str, list[dict]]]) -> None:
    """Every seed's figure, raw, over the floor."""
    names = [name for name in FIGURES if name in found]
    figure, axes = plt.subplots(
        1, len(names), figsize=(2.6 * len(names), 3.2), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        kind, floor, wanted, _ = FIGURES[name]
        methods = [m for m in METHODS if m in found[name]]
        for i, method in enumerate(methods):
            values = [record["raw"][kind] for record in found[name][method]]
            colour = "C0" if method.startswith("rsm") else "0.4"
            ax.plot([i] * len(values), values, "o", color=colour, alpha=0.7)
        ax.axhline(floor, color="0.7", linewidth=1)
        ax.axhline(wanted, color="C2", linewidth=1, linestyle="--")
        ax.set_yscale("log")
        ax.set_xticks(range(len(methods)), methods, rotation=60, ha="right")
        ax.set_title(f"{name}\n{kind}", fontsize=9)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Write the page."""
    found = grouped()
    sections = [section(name, found[name]) for name in FIGURES if name in found]
    if not sections:
        raise SystemExit("nothing measured yet: run boltzmann.py first")
    draw(found)
    machines = {
        ", ".join(f"{k} {v}" for k, v in record["machine"].items())
        for methods in found.values()
        for records in methods.values()
        for record in records
    }
    page = f"""# Hard energies

Made by `python examples/benchmarks/boltzmann_page.py` from the results of `python
examples/benchmarks/boltzmann.py`, whose module page says what each method is. Means of absolute
values over seeds, with the range; raw draws of the final model, and reweighted ones apart.
Evaluations are those of the fit, warm start included, a gradient counting as one more than its
value; log Z of a trained sampler takes 32,768 more, by the weights of its paths (up to 16
dimensions: by its density). Plain chains have the evaluations of the trained samplers. Their
10,000 further independent draws are counted by the spread of the chains' means in the
coordinates that they are slow in; such a count cannot see what all chains miss.

![Figures of all seeds](figures/boltzmann.png)

*Dots: seeds, trained samplers blue. Grey line: a perfect sampler. Green line: the aim.*

{(chr(10) * 2).join(sections)}

Machines: {"; ".join(sorted(machines))}. Times were taken beside other work.
"""
    (DOCS / "boltzmann.md").write_text(page)


if __name__ == "__main__":
    main()
