"""A script for torchrun: fits a small sampler and writes what came out.

python tests/parallel_fit.py OUTPUT LOSS
"""

import sys
from pathlib import Path

import torch

from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.proposals import GaussianProposal

torch.set_num_threads(1)
evaluated = calls = 0


def energy(x):
    global evaluated, calls
    evaluated, calls = evaluated + len(x), calls + 1
    return (x.square() - 4).square().sum(-1) / 8


def fit(output, loss):
    config = TrainerConfig(
        search_evaluations=6000, bank_size=4000, steps_per_cycle=60, max_cycles=1, batch_size=63,
        width=16, depth=2, check_draws=200, num_draws=16, learning_rate=1e-3,
    )  # fmt: skip
    more = {}
    if loss == "reverse-sampling":
        proposal = GaussianProposal(torch.zeros(2), 1.5)
        more = {"loss": loss, "proposal": proposal, "target": "mixed"}
    trainer = EnergyDiffusionTrainer(energy, 2, config=config, seed=4, device="cpu", **more)
    path = Path(output)
    fail = loss == "failing"

    def callback(progress):
        if fail:
            raise OverflowError("the callback's own")

    sampler = trainer.fit(progress=False, callback=callback, checkpoint_path=path / "run.pt")
    state = {
        "weights": dict(trainer.denoiser.state_dict()),
        "draws": sampler.sample(50),
        "evaluations": trainer.evaluations,
        "own": evaluated,
        "calls": calls,
        "history": trainer.history[-1]["log_z"],
        "loss": trainer.team.size,
    }
    torch.save(state, path / f"{trainer.team.rank}.pt")


if __name__ == "__main__":
    fit(*sys.argv[1:])
