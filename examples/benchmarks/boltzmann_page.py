"""Write docs/boltzmann.md and its figure from the results of boltzmann.py.

python examples/benchmarks/boltzmann_page.py
"""

import math
from collections import defaultdict

import matplotlib.pyplot as plt
from boltzmann import METHODS
from boltzmann_targets import TASKS
from results import FOLDER, load

_NEVER = 1e7  # seconds
_HUGE = 1e6
_PLAIN = ("rw", "hmc", "pt", "langevin")
_PEERS = ("ddpm-mcmc", "ddpm-hmc", "idem", "fab")  # as ddpm-exact, but from the energy
_OFF = 30  # times the aim: drawn as arrows at the upper end
_UNFINISHED = "lj55"  # whose run is a shorter one
DOCS = FOLDER.parent
FIGURE = DOCS / "figures" / "boltzmann.png"


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
        return plain(mean, digits)
    return f"{plain(mean, digits)} ({plain(min(values), digits)}–{plain(max(values), digits)})"


def plain(value: float, digits: int) -> str:
    """A number without more digits than it is worth."""
    return f"{value:.{digits}f}" if value < _HUGE else f"{value:.0e}"


def at_aim(name: str, record: dict) -> bool:
    """Whether raw draws are as good as they are to be, and no mode is missing."""
    raw, task = record["raw"], TASKS[name]
    return raw[task.figure] <= task.reach and raw.get("missing modes", 0) == 0


def best(name: str, found: dict[str, list[dict]], methods: tuple[str, ...]) -> tuple[float, str]:
    """Least mean figure of those methods, and whose it is."""
    figure = TASKS[name].figure
    means = [
        (sum(record["raw"][figure] for record in found[method]) / len(found[method]), method)
        for method in methods
        if found[method]
    ]
    return min(means, default=(math.inf, ""))


def worst_log_z(records: list[dict]) -> str:
    """Largest error of log Z over seeds, and that of the bank in brackets."""
    errors = [r["log_z_error"] for r in records if r["log_z_error"] is not None]
    banks = [r["bank"]["log_z_error"] for r in records if "bank" in r]
    if not errors:
        return "–"
    known = [abs(error) for error in banks if error is not None]
    beside = f" ({max(known):.4f})" if len(known) == len(records) else ""
    return f"{max(map(abs, errors)):.4f}{beside}"


def mean_evaluations(records: list[dict]) -> str:
    """Of a fit, warm start included."""
    return f"{sum(r['evaluations'] for r in records) / len(records):,.0f}" if records else "–"


def overview(found: dict[str, dict[str, list[dict]]]) -> str:
    """One row a target: raw draws against the aim, and the best of the others."""

    def shown(name: str, methods: tuple[str, ...]) -> str:
        value, method = best(name, found[name], methods)
        return f"{plain(value, 3)} `{method}`" if method else "–"

    lines = [
        ["target", "figure", "perfect", "aim", "`rsm`", "seeds at the aim", "log Z, worst error",
         "plain chains, best", "peers, best", "evaluations", "by values alone",
         "their evaluations"],
    ]  # fmt: skip
    lines.append(["---"] * len(lines[0]))
    for name, task in TASKS.items():
        records = found[name]["rsm"]
        if records:
            values = [record["raw"][task.figure] for record in records]
            alone = found[name]["rsm-values"]
            lines.append(
                [
                    f"[{name}](#{name})",
                    task.figure,
                    str(task.floor),
                    str(task.reach),
                    spread(values),
                    f"{sum(at_aim(name, record) for record in records)} of {len(records)}",
                    worst_log_z(records),
                    shown(name, _PLAIN),
                    shown(name, _PEERS),
                    mean_evaluations(records),
                    spread([record["raw"][task.figure] for record in alone])
                    if task.differentiable
                    else "as `rsm`",
                    mean_evaluations(alone),
                ]
            )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    nearer = [
        f"{name} (`{method}`)"
        for name in TASKS
        for value, method in [best(name, found[name], _PLAIN + _PEERS)]
        if found[name]["rsm"] and value < best(name, found[name], ("rsm",))[0]
    ]
    return f"{table}\n\nAnother method comes nearer than `rsm` on: {', '.join(nearer) or 'none'}."


def section(name: str, methods: dict[str, list[dict]]) -> str:
    """The table of one target."""
    task = TASKS[name]
    figure, all_records = task.figure, [r for records in methods.values() for r in records]
    optional = [kind for kind in ("refined", "nll") if any(kind in r for r in all_records)]
    head = ["method", "seeds", f"{figure}, raw", "reweighted", *optional, "error of log Z",
            "its bank's", "evaluations", "fit, s", "10,000 more draws, s"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for method in METHODS:
        records = methods.get(method)
        if not records:
            continue
        again = [r["reweighted"][figure] for r in records if "reweighted" in r]
        more = {
            "refined": [r["refined"][figure] for r in records if "refined" in r],
            "nll": [r["nll"] for r in records if "nll" in r],
        }
        lines.append(
            [
                f"`{method}`",
                str(len(records)),
                spread([r["raw"][figure] for r in records]),
                spread(again),
                *(spread(more[kind]) for kind in optional),
                spread([r["log_z_error"] for r in records], 4),
                spread([r["bank"]["log_z_error"] for r in records if "bank" in r], 4),
                mean_evaluations(records),
                f"{sum(r['fit_seconds'] for r in records) / len(records):.0f}",
                "chains never mix"
                if max(r["seconds_per_10k"] for r in records) > _NEVER
                else spread([r["seconds_per_10k"] for r in records], 1),
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    aims = f"{figure}: a perfect sampler {task.floor}, aim {task.reach}"
    if not math.isnan(task.reach_log_z):
        aims += f"; log Z: aim {task.reach_log_z}"
    if "nll" in optional:
        aims += f"; nll, on exact draws: no law has less than {TASKS[name].make().entropy:.3f}"
    costs = {r["refined"]["evaluations"] for r in all_records if "refined" in r}
    if costs:
        moves = {"mala": "Langevin", "hmc": "Hamiltonian"}[task.refine_by]
        aims += (
            f"; refined by {task.refine_steps} {moves} moves, {max(costs):,} further evaluations"
        )
    return f"## {name}\n\n{table}\n\n{aims}; {task.n:,} draws."


def two_moons() -> str:
    """The paper's figure of two moons, if it has been drawn."""
    report = load("figure_5")
    if not report:
        return ""
    lines = [
        f"| {name} | {way['tv']:.4f} | {way['log_z']:+.4f} | {way['ess']:.3f} | "
        f"{way['evaluations']:,} | {way['seconds']:.0f} |"
        for name, way in report["ways"].items()
        if "evaluations" in way
    ]
    return f"""## Two moons, five ways

The paper's Figure 5, by `python examples/paper/figure_5.py` (seed 0, one thread beside other
work). Total variation of {report["samples"]:,} draws to the exact masses of 100 × 100 cells; as
many exact ones score {report["floor"]:.4f} on average. log Z is by the weights of 8,192 draws; the
truth is {report["exact_log_z"]:+.4f}.

![Samples of each](figures/figure_5.png)

| | total variation | log Z | effective share | evaluations | seconds |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}"""


def draw(found: dict[str, dict[str, list[dict]]]) -> None:
    """Every seed's figure, raw, over the floor."""
    names = [name for name in TASKS if name in found]
    curves = [r["curve"] for r in found[_UNFINISHED]["rsm"] if r.get("curve")]
    panels = len(names) + bool(curves)
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    size = (2.8 * columns, 3.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[panels:]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        task, kind = TASKS[name], TASKS[name].figure
        methods = [m for m in METHODS if m in found[name]]
        for i, method in enumerate(methods):
            values = [record["raw"][kind] for record in found[name][method]]
            colour = "C0" if method.startswith("rsm") else "0.4" if method in _PLAIN else "C1"
            top = _OFF * task.reach
            seen = [v for v in values if v <= top]
            ax.plot([i] * len(seen), seen, "o", color=colour, alpha=0.7)
            off = len(values) - len(seen)
            ax.plot([i] * off, [top] * off, "^", color=colour, alpha=0.7)
        ax.axhline(task.floor, color="0.7", linewidth=1)
        ax.axhline(task.reach, color="C2", linewidth=1, linestyle="--")
        ax.set_yscale("log")
        ax.set_xticks(range(len(methods)), methods, rotation=60, ha="right")
        ax.set_title(f"{name}\n{kind}", fontsize=9)
    for curve in curves:
        ax = axes.flat[panels - 1]
        ax.plot(*zip(*curve, strict=True), color="C0")
        ax.set_yscale("log")
        ax.set_title(f"{_UNFINISHED}\nloss by optimiser steps", fontsize=9)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Write the page."""
    found = grouped()
    sections = [section(name, found[name]) for name in TASKS if name in found]
    if not sections:
        raise SystemExit("nothing measured yet: run boltzmann.py first")
    sections += [moons] if (moons := two_moons()) else []
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
value; log Z of a trained sampler takes 32,768 more (in 200 dimensions 131,072, DW4 4,096, LJ13
1,024, LJ55 64), by the weights of its paths (up to 16 dimensions: by its density). Beside it
stands what the draws of the last bank of training say of log Z by themselves, where they are
independent: a mixture's, or those of the sampler of an earlier cycle. Plain chains and peers have
the evaluations of `rsm` with the same seed; `rsm-values`, without gradients, takes what it takes.
Of hare-lynx, whose energy has no gradients, `rsm` is by values alone, and the methods that need
them are left out. The chains' 10,000 further independent draws are counted by the spread of the
chains' means in the coordinates that they are slow in; such a count cannot see what all chains
miss.

![Figures of all seeds](figures/boltzmann.png)

*Dots: seeds, `rsm` blue, other trained samplers orange, plain chains grey; arrows: more than
thirty times the aim. Grey line: a perfect sampler. Green line: the aim. Last panel: the training
loss of LJ55.*

## Methods and figures

| method | |
| --- | --- |
| `rsm` | the trainer with its defaults; networks of particles are compiled, and LJ55 is \
trained for 9,600 steps instead of 6,000 (half of them, with gradients) |
| `rsm-values` | the same from energy values alone |
| `rw`, `hmc`, `pt` | random-walk Metropolis, Hamiltonian Monte Carlo, parallel tempering with \
random-walk moves |
| `langevin` | annealed Langevin dynamics without a Metropolis test |
| `ddpm-mcmc`, `ddpm-hmc`, `ddpm-exact` | denoising score matching (9) on states of parallel \
tempering; of Lennard-Jones clusters, on those of `hmc`, which mixes better there; on 16,384 \
exact draws, or draws of long chains where there are no exact ones |
| `idem`, `fab` | the peers of {{py:mod}}`rsm_sampler.baselines`, with settings for as few \
evaluations |

| figure | |
| --- | --- |
| worst pair | largest error of the deeper well's share, over the pairs of the many-well |
| TV | total variation of the modes' shares |
| KS | Kolmogorov-Smirnov distance of the funnel's first coordinate to its law |
| energy W2 | root of the squared Wasserstein distance between energies of draws and of \
reference draws |
| worst mean | largest error of a coordinate's mean, in the posterior's standard deviations |
| nll | mean of −log density at exact draws |

## All targets

Raw draws of `rsm`, its mean over seeds and the range; of the others the best mean of any method at
the same number of evaluations. *Perfect* is what exact draws score. A seed that misses a mode is
not at the aim. Of log Z the worst seed's error by the model's own weights and, in brackets, by the
bank of its training, which is what the trainer reports. *By values alone*: `rsm-values`, seed 0.

{overview(found)}

{(chr(10) * 2).join(sections)}

Machines: {"; ".join(sorted(machines))}. Times were taken beside other work, and on machines of
which some are half as fast as others: they tell orders of magnitude.
"""
    (DOCS / "boltzmann.md").write_text(page)


if __name__ == "__main__":
    main()
