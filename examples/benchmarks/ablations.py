r"""Which choice matters? Short runs of the agents on HalfCheetah, one change at a time.

    python examples/benchmarks/ablations.py --threads 1           # all that is not measured yet
    python examples/benchmarks/ablations.py --experiments proposal --seeds 0
    python examples/benchmarks/ablations.py --agents dpmd --seeds 1 2 --together
    python examples/benchmarks/ablations_page.py                  # docs/ablations.md

20,000 steps with one environment and one update per step, networks of two layers of 128; every
other number is that of :mod:`locomotion`. The clipped kernel is tried on Ant as well, where the
published SDAC failed. Results go to docs/results/ablations.json after every evaluation; a run that
was interrupted goes on from its folder under --runs. The updates of several seeds of DPMD are
cheaper together, and equal those of single runs up to rounding; time is then shared out.
"""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from locomotion import Task, ours

CHEETAH, ANT = "HalfCheetah-v5", "Ant-v5"
TASK = Task(20_000, 5000)


@dataclass(frozen=True)
class Variant:
    """An agent and what is changed of it; the label names it in the results."""

    agent: str
    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    preset: str = "corrected"
    env: str = CHEETAH

    def key(self, seed: int) -> str:
        """Its name among the results."""
        return f"{self.agent} {self.env} {self.label}/{seed}"


@dataclass(frozen=True)
class Experiment:
    """A question and the variants that answer it, the one that is taken first."""

    question: str
    variants: tuple[Variant, ...]


DPMD, SDAC = Variant("dpmd", "base"), Variant("sdac", "base")
FREE = Variant("sdac", "truncated", {"anchor_share": 0.0})  # proposal "next", no anchors
# The published rules, with as many random steps as the others and the best of 8, not of 32.
OLD = {
    "warmup_steps": 5000,
    "count_warmup": True,
    "behaviour_candidates": 8,
    "target_candidates": 8,
    "evaluation_candidates": 10,
}
EXPERIMENTS = {
    "weights": Experiment(
        "What do the weights of DPMD do, and what did the precedence slip do to them?",
        (
            DPMD,
            Variant("dpmd", "no-weights", {"target_kl": None, "temperature": 1e9}),
            Variant("dpmd", "one-draw", preset="printed"),
            Variant("dpmd", "slip", OLD, "icml2025"),
            Variant("dpmd", "slip-mended", {**OLD, "standardise": "moments"}, "icml2025"),
        ),
    ),
    "draws": Experiment(
        "Candidates of SDAC from the kernel within the box, or cut to it?",
        (
            SDAC,
            FREE,
            Variant("sdac", "clipped", {"anchor_share": 0.0, "truncated": False}),
            Variant("sdac", "truncated", {"anchor_share": 0.0}, env=ANT),
            Variant("sdac", "clipped", {"anchor_share": 0.0, "truncated": False}, env=ANT),
        ),
    ),
    "proposal": Experiment(
        "Which noisy actions does SDAC meet? The law h_t of equation (14).",
        (
            FREE,
            *(
                Variant("sdac", f"h={name}", {"anchor_share": 0.0, "proposal": name})
                for name in ("replay", "uniform", "policy", "noised-policy")
            ),
        ),
    ),
    "steps": Experiment(
        "How many steps T does the chain need?",
        (
            DPMD,
            Variant("dpmd", "T=10", {"num_steps": 10}),
            Variant("dpmd", "T=20", {"num_steps": 20}),
            SDAC,
            Variant("sdac", "T=10", {"num_steps": 10}),
            Variant("sdac", "T=20", {"num_steps": 20}),
        ),
    ),
    "start": Experiment(
        "Chains from a normal start, or from half of it?",
        (DPMD, Variant("dpmd", "start=0.5", {"start_scale": 0.5})),
    ),
    "normalisation": Experiment(
        "Critics with layer normalisation, or without?",
        (
            DPMD,
            Variant("dpmd", "plain", {"critic_layer_norm": False}),
            SDAC,
            Variant("sdac", "plain", {"critic_layer_norm": False}),
        ),
    ),
    "rates": Experiment(
        "Critics at the usual learning rate of 3e-4, slow copies at the usual rate of 0.005?",
        (
            DPMD,
            Variant("dpmd", "critic_lr=3e-4", {"critic_lr": 3e-4}),
            Variant("dpmd", "polyak=0.005", {"polyak": 0.005}),
            Variant("dpmd", "both", {"critic_lr": 3e-4, "polyak": 0.005}),
            SDAC,
            Variant("sdac", "both", {"critic_lr": 3e-4, "polyak": 0.005}),
        ),
    ),
    "returns": Experiment(
        "Returns of one step, or of three?",
        (
            DPMD,
            Variant("dpmd", "n_step=3", {"n_step": 3}),
            SDAC,
            Variant("sdac", "n_step=3", {"n_step": 3}),
        ),
    ),
    "sharpness": Experiment(
        "How few candidates may SDAC's weights be worth? The floor of its temperature.",
        (
            SDAC,
            Variant("sdac", "min_ess=2", {"min_ess": 2.0}),
            Variant("sdac", "min_ess=1.5", {"min_ess": 1.5}),
            Variant("sdac", "K=64", {"num_draws": 64, "policy_states": 32}),
        ),
    ),
    "acting": Experiment(
        "How greedy to act: a draw of the policy, or the best of a few? And the critic's target?",
        (
            DPMD,
            Variant("dpmd", "acts-best-of-8", {"behaviour_candidates": 8}),
            Variant("dpmd", "both-best-of-4", {"behaviour_candidates": 4, "target_candidates": 4}),
            SDAC,
            Variant("sdac", "acts-best-of-8", {"behaviour_candidates": 8}),
            Variant("sdac", "both-best-of-4", {"behaviour_candidates": 4, "target_candidates": 4}),
            Variant("sdac", "truncated", {"anchor_share": 0.0}, env=ANT),
            Variant("sdac", "greedy", {"behaviour_candidates": 8, "min_ess": 2.0}, env=ANT),
        ),
    ),
    "period": Experiment(
        "A policy step for every second update, or for each?",
        (
            DPMD,
            Variant("dpmd", "every-update", {"policy_period": 1}),
            SDAC,
            Variant("sdac", "every-update", {"policy_period": 1}),
            Variant("sdac", "min_ess=2", {"min_ess": 2.0}),
            Variant("sdac", "sharp-every-update", {"policy_period": 1, "min_ess": 2.0}),
            Variant("sdac", "sharp-fast", {"policy_lr": 1e-3, "min_ess": 2.0}),
        ),
    ),
    "target": Experiment(
        "One action for the critic's target, or the best of 32?",
        (DPMD, Variant("dpmd", "best-of-32", {"target_candidates": 32})),
    ),
}


def variants(names: list[str]) -> list[Variant]:
    """Those of some experiments, each once."""
    found = {v.key(0): v for name in names for v in EXPERIMENTS[name].variants}
    return list(found.values())


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--experiments", nargs="*", default=list(EXPERIMENTS), choices=list(EXPERIMENTS)
    )
    parser.add_argument("--labels", nargs="*", help="only these variants")
    parser.add_argument("--agents", nargs="*", default=["dpmd", "sdac"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--together", action="store_true", help="the seeds of one in one process")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folders of the runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    groups = [arguments.seeds] if arguments.together else [[seed] for seed in arguments.seeds]
    for seeds in groups:
        for each in variants(arguments.experiments):
            if arguments.labels is not None and each.label not in arguments.labels:
                continue
            if each.agent in arguments.agents:
                ours(
                    each.agent,
                    each.env,
                    seeds,
                    TASK,
                    arguments.runs,
                    each.changes,
                    label=each.label,
                    preset=each.preset,
                    file="ablations",
                )


if __name__ == "__main__":
    main()
