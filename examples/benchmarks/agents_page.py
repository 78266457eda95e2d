"""Write docs/agent_benchmarks.md from the results of update_speed.py, bandit.py and learning.py.

python examples/benchmarks/agents_page.py
"""

from results import FOLDER, load

DOCS = FOLDER.parent
# Published JAX code on two CPU cores, and what is to be reached; milliseconds.
SPEED = {
    "dpmd identical work": (542, 400),
    "sdac identical work": (1344, 850),
    "acting, 5 environments, best of 32": (17, 11),
    "dpmd default": (None, 25),
    "sdac default": (None, 60),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def machine(record: dict) -> str:
    """Where a number comes from."""
    return ", ".join(f"{key} {value}" for key, value in record["machine"].items())


def speed() -> str:
    """Milliseconds of updates."""
    found = load("update_speed")
    if "cpu" not in found:
        return "Not measured yet."
    rows = []
    for name, (published, wanted) in SPEED.items():
        row = found["cpu"]["rows"][name]
        rows.append(
            [
                name,
                f"{row['ms']:.1f}",
                f"{row['fastest']:.1f} to {row['slowest']:.1f}",
                f"{row['arithmetic_ms']:.0f}",
                "–" if published is None else str(published),
                f"≤ {wanted}",
            ]
        )
    head = ["ms", "median", "range", "arithmetic alone", "published JAX code", "aim"]
    resident = found["memory"]["resident_mb"]
    dearer = " and ".join(
        f"{row['normalised_ms'] / row['plain_ms']:.2f} ({name.upper()})"
        for name, row in found["critics"].items()
        if name != "machine"
    )
    return (
        f"{table(head, rows)}\n\n"
        f"Matrix products on that machine: {found['cpu']['gflops']:.0f} GFLOP/s. Resident memory "
        f"of a training process with a full replay of 10⁶ HalfCheetah transitions "
        f"({found['memory']['replay_mb']:.0f} MB): {resident:.0f} MB (aim: at most 1,200).\n"
        f"Machine: {machine(found['cpu'])}.\n\n"
        "Both defaults were measured with plain critics. By default their hidden layers are now "
        f"normalised, with which the same updates take {dearer} times as long, side by side "
        "(`update_speed.py --critics`)."
    )


def gpu() -> str:
    """Updates per second on a GPU."""
    found = load("update_speed").get("gpu")
    if found is None:
        return (
            "The path of a GPU, `python examples/benchmarks/update_speed.py --gpu`, has only been "
            "run dry, on a CPU (`--dry-run`): its speed and memory have not been measured."
        )
    rows = [
        [name, f"{row['updates_per_second']:.0f}", f"{row['mb_beyond_replay']:.0f}"]
        for name, row in found.items()
        if name != "machine"
    ]
    return table(["agent", "updates/s", "MB beyond the replay"], rows) + f"\n\n{machine(found)}."


def bandit() -> str:
    """Total variations: SDAC by dimension and width, DPMD step by step."""
    found = load("bandit")
    by_case: dict[tuple[str, str, str], dict] = {}
    for key, record in found.items():
        agent, dim, width, num_steps = key.partition("/")[0].split()
        by_case[agent, f"{dim} {width}", num_steps] = record
    cases = sorted({case for _, case, _ in by_case})

    def cell(record: dict | None, field: str) -> str:
        return "–" if record is None or field not in record else f"{record[field]:.4f}"

    sdac, dpmd = [], []
    for case in cases:
        short, long = (by_case.get(("sdac", case, f"T={t}")) for t in (20, 400))
        if short or long:
            floor = cell(short or long, "floor")
            law = cell(short, "tv_chain_law")
            sdac.append([case, cell(short, "tv_chain"), cell(long, "tv_law"), floor, law])
        for num_steps in ("T=200", "T=400"):
            record = by_case.get(("dpmd", case, num_steps))
            if record is not None:
                steps = ", ".join(f"{tv:.4f}" for tv in record["tv_steps"])
                fields = ("tv_worst_step", "floor_worst_step", "tv_after_five")
                shares = f"{sum(record['powers']):.2f}"
                dpmd.append([case, num_steps, steps, *(cell(record, f) for f in fields), shares])
    head = [
        "SDAC",
        "T = 20: to the exact chain (aim 0.02)",
        "T = 400: to the law (aim 0.03)",
        "floor",
        "for comparison, the exact chain of T = 20 to the law",
    ]
    mirror = [
        "DPMD",
        "",
        "each step",
        "worst (aim 0.03)",
        "its floor",
        "after five, to the exact law",
        "share of Q / λ taken",
    ]
    return table(head, sdac) + "\n\n" + table(mirror, dpmd)


def learning() -> str:
    """Where each run reached its goal."""
    found = load("learning")
    if not found:
        return "Not measured yet."
    rows = []
    for key, record in found.items():
        name, _, seed = key.partition("/")
        agent, env = name.split()
        reached = record["reached_at"]
        rows.append(
            [
                env,
                agent,
                seed,
                "–" if reached is None else f"{reached:,}",
                f"{record['last']:.1f}",
                f"{record['best']:.1f}",
                f"{record['seconds']:.0f}",
            ]
        )
    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    head = ["environment", "agent", "seed", "goal reached at step", "last", "best", "s"]
    return table(head, rows)


def main() -> None:
    """Write the page."""
    text = f"""# Agents: measured

Written by `python examples/benchmarks/agents_page.py` from `docs/results/`.

## Speed

`python examples/benchmarks/update_speed.py`. "Identical work" is the update of the published code:
batch 256, $T = 20$, 3 × 256 Mish, 17-dim observations, 6-dim actions, best of 32 at every target,
64 reverse draws. Its K network calls on equal inputs are one here, with the same gradient. Rows
are measured in turn. The published code's numbers were taken beforehand on two cores whose matrix
products run at 175 to 195 GFLOP/s.

{speed()}

{gpu()}

## The law of a policy

`python examples/benchmarks/bandit.py`: one state, $Q/\\lambda$ the logarithm of two unequal wells
(0.7 and 0.3) of width sigma at ±0.4 in every coordinate of the box $[-1, 1]^d$. Total variation of
the worst coordinate, 50 bins, $n = 10^5$; floors are what exact draws give. With $T = 20$ even the
exact denoiser's chain is off the law, so SDAC is compared with that chain; with $T = 400$, and the
chain of second order (`chain="multistep"`), with the law itself: of first order, the exact
denoiser's chain of 400 steps misses the narrowest wells by 0.025. DPMD's steps, with $T = 200$ and
the chain of second order, start from a normal law of standard deviation 0.4, and each is compared
with the exact step from the samples that it was taken from. Seed 0, one thread; each row's seconds
and settings are in `docs/results/bandit.json` and the script.

{bandit()}

## Learning

`python examples/benchmarks/learning.py`: one update per step, 20 evaluation episodes every 1,000
steps; the goals are −200 within 15,000 steps of Pendulum-v1 and 1,000 within 20,000 steps of
InvertedPendulum-v5. A run stops after two evaluations in a row that reach its goal; "last" is its
last evaluation. PPO and DPPO, which learn from each step for a short while only, have 300,000
steps and are evaluated every 10,000. These are settings for short runs, not the defaults: critics
with a learning rate of 0.001 and targets that follow by 0.02, 1,000 random steps, for SDAC and
DPMD critics without normalised layers and networks of three hidden layers of 128 units, SDAC's
weights worth four candidates at least; QSM, DIPO, DACER, QVPO and DPPO have two layers of 64. PPO
and DPPO have lower discounts on Pendulum-v1 (and PPO shorter rollouts and a larger rate). SAC, TD3
and PPO are those of stable-baselines3.

{learning()}
"""
    (DOCS / "agent_benchmarks.md").write_text(text)
    print(DOCS / "agent_benchmarks.md")


if __name__ == "__main__":
    main()
