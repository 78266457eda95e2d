r"""Figure 2 of the paper: the mixture (30), at the settings of its Table 3, over several seeds.

.. math:: p_0 = 0.8\, \mathcal N([3, 3], I) + 0.2\, \mathcal N([-3, -3], I), \; e^{Q/\lambda} = p_0

Reverse sampling score matching (14) from energies alone with :math:`h_t = \mathcal N(0, 4I)` and
:math:`h_t` uniform on :math:`[-6, 6]^2`, denoising score matching (9) on fresh exact samples, and
20 Langevin steps with the exact score. T = 20, rates linear from 0.001 to 0.999, learning rate
3e-4, batch 1024, two layers of 128 units, the ancestral sampler (8). What differs:

* The network is a preconditioned denoiser, not a noise prediction: with these rates
  :math:`\bar\alpha_T = 6 \cdot 10^{-11}`, and dividing by its root turns small errors of the first
  step into samples of magnitude 300 on a target of radius 3.
* The reverse kernel is multiplied by a normal law of scale 6 (with exact weights): the plain one
  (15) is :math:`10^5` wide at t = T and none of its K draws would hit the target.
* Units are SiLU instead of LeakyReLU, with Fourier features and a running mean of the weights.
* "300 epochs" is not a number of steps; here it is ``--steps``, 4,000 by default.

The chain of 20 steps has an error of its own, whatever the network learns. So the same chain under
the *exact* denoiser stands beside the others: that is their floor.

    python examples/paper/figure_2.py

A few minutes a seed on two CPU cores. Writes ``out/figure_2.png`` (the first seed) and
``out/figure_2.json`` (the weights of all seeds; true 0.80).
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import trange

from energies import GaussianMixture
from examples.demo import draw, langevin, mixing_weight
from rsm_sampler.ancestral import Ancestral
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.kernels import GaussianReferenceKernel
from rsm_sampler.losses import denoising_loss, reverse_sampling_loss
from rsm_sampler.networks import MLP
from rsm_sampler.proposals import GaussianProposal, Proposal, UniformProposal
from rsm_sampler.schedules import Linear

SCALE = 3.2  # root-mean-square coordinate of the target, for the preconditioning
BATCH, LEARNING_RATE, CANDIDATES = 1024, 3e-4, 64
PROPOSALS: dict[str, Proposal] = {
    "RSM, h_t = N(0, 4I)": GaussianProposal(
        torch.zeros(2), 2.0, coordinates="variance_preserving"
    ),
    "RSM, uniform h_t": UniformProposal(
        torch.full((2,), -6.0), torch.full((2,), 6.0), coordinates="variance_preserving"
    ),
}


def main() -> None:
    """All ways, all seeds."""
    parser = argparse.ArgumentParser(description="Figure 2 of the paper.")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder to write to")
    options = parser.parse_args()
    seeds, steps, n = options.seeds, options.steps, 20_000
    if options.smoke:
        seeds, steps, n = 1, 20, 1000
    target = GaussianMixture.paper()
    weights: dict[str, list[float]] = {}
    started = time.perf_counter()
    for seed in range(seeds):
        panels = {}
        for name, x in all_ways(target, n, seed, steps):
            panels[name] = x
            weights.setdefault(name, []).append(mixing_weight(target, x))
            print(f"seed {seed}  {name:<32}weight {weights[name][-1]:.3f}", flush=True)
        if seed == 0:
            shown = {name: x for name, x in panels.items() if "exact denoiser" not in name}
            figure = draw(target, shown, options.output / "figure_2.png")
    settings = {"steps": steps, "batch": BATCH, "candidates": CANDIDATES, "samples": n}
    seconds = time.perf_counter() - started
    report = {"true": 0.8, "weights": weights, "settings": settings, "seconds": seconds}
    (options.output / "figure_2.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{figure} and figure_2.json after {seconds:.0f} seconds")


def all_ways(
    target: GaussianMixture, n: int, seed: int, steps: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """A name and n samples of each way."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = Linear(20, beta_min=0.001, beta_max=0.999).sigmas().float()
    yield "exact samples", target.sample(n, generator=generator)
    exact = Ancestral(target.denoiser, sigmas, dim=2)
    yield "exact denoiser, the same chain", exact.sample(n, generator=generator)
    for name, proposal in PROPOSALS.items():
        denoiser = learn(target, sigmas, steps, generator, proposal)
        yield name, Ancestral(denoiser, sigmas, dim=2).sample(n, generator=generator)
    denoiser = learn(target, sigmas, steps, generator, None)
    samples = Ancestral(denoiser, sigmas, dim=2).sample(n, generator=generator)
    yield "DSM, given exact samples", samples
    yield "Langevin, 20 steps", langevin(target, n, generator)


def learn(
    target: GaussianMixture,
    sigmas: torch.Tensor,
    steps: int,
    generator: torch.Generator,
    proposal: Proposal | None,
) -> Denoiser:
    """A denoiser trained by (14) with noisy points from the proposal; by (9) without one."""
    denoiser = Denoiser(MLP(2, width=128, depth=2, generator=generator), sigma_data=SCALE)
    average = torch.optim.swa_utils.AveragedModel(
        denoiser, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=LEARNING_RATE)
    kernel = GaussianReferenceKernel(0.0, 6.0, antithetic=True)
    for _ in trange(steps, disable=None, leave=False):
        t = torch.randint(len(sigmas) - 1, (BATCH,), generator=generator)
        sigma = sigmas[t]  # the last entry, 0, is left out
        if proposal is None:
            x_0 = target.sample(BATCH, generator=generator)
            loss = denoising_loss(denoiser, x_0, sigma, generator=generator)
        else:
            x_t = proposal.draw(BATCH, sigma, generator=generator)
            loss = reverse_sampling_loss(
                denoiser, target, x_t, sigma, kernel, CANDIDATES, generator=generator
            )
        optimiser.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimiser.step()
        average.update_parameters(denoiser)
    return average.module.requires_grad_(False)


if __name__ == "__main__":
    main()
