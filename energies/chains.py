"""Reference samples where no exact ones are to be had: long chains from many starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.montecarlo.run import run_mcmc

__all__ = ["long_chains"]


@checked(finite=("start",))
def long_chains(
    energy: Callable[[Tensor], Tensor],
    start: Float[Tensor, "chains dim"],
    n: int,
    *,
    burn_in: int,
    thinning: int,
    method: Literal["mala", "rw", "hmc"] = "mala",
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n dim"]:
    """The last states of every chain, ``thinning`` steps apart, after at least ``burn_in`` steps.

    They are as good as the chains are long: let two halves of the chains agree on what matters.

    Kernels with gradients can stay for ever where the energy is steep, at a step size that suits
    the bulk of the target. So the chains first make half as many random-walk steps, which come
    down from there.

    Arguments:
        energy: The energy, of points (n, dim).
        start: One point for each chain.
        n: Number of samples.
        burn_in: Least number of steps before the first sample; they tune the step size.
        thinning: Steps between two samples of a chain.
        method: Kernel of the chains, see :func:`rsm_sampler.montecarlo.run.run_mcmc`.
        step_size: Where the step size starts.
        generator: Source of randomness.

    Returns:
        The samples, chain after chain.
    """
    chains, dim = start.shape
    if method != "rw" and burn_in > 1:
        start = run_mcmc(
            energy,
            start,
            method="rw",
            evaluations=chains * (burn_in // 2 + 1),
            warm_up=0.5,
            step_size=step_size,
            generator=generator,
        ).samples
    each = math.ceil(n / chains)
    steps = burn_in + each * thinning
    cost = {"rw": 1, "mala": 2, "hmc": 20}[method]
    found = run_mcmc(
        energy,
        start,
        method=method,
        evaluations=cost * chains * steps + 2 * chains,
        num_samples=chains * each,
        warm_up=burn_in / steps,
        step_size=step_size,
        generator=generator,
    )
    return found.chains.transpose(0, 1).reshape(-1, dim)[:n]
