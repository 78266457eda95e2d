r"""DDPM: a denoiser fitted to samples of the target, exact ones or those of chains.

Denoising score matching (9) needs samples. :func:`ddpm` is given them, or lets parallel tempering
make them; either way :class:`~rsm_sampler.trainer.EnergyDiffusionTrainer` trains on them, so that
network, schedule and length of training are those of the sampler it is compared with.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.baselines.standard import location
from rsm_sampler.checked import checked
from rsm_sampler.energy_sampler import EnergySampler
from rsm_sampler.montecarlo.run import run_mcmc
from rsm_sampler.target.energy import MeteredEnergy, metered, particles_of
from rsm_sampler.trainer import EnergyDiffusionTrainer
from rsm_sampler.trainer_config import TrainerConfig

__all__ = ["ddpm"]


@checked(skip=("energy",), above={"scale": 0})
def ddpm(
    energy: Callable[..., Tensor] | MeteredEnergy,
    dim: int,
    *,
    samples: Float[Tensor, "n dim"] | None = None,
    evaluations: int | None = None,
    num_samples: int = 16_384,
    num_chains: int = 32,
    particles: tuple[int, int] | None = None,
    loc: float | Tensor = 0.0,
    scale: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "auto",
    config: TrainerConfig | None = None,
    progress: bool | None = None,
) -> EnergySampler:
    r"""Denoising score matching (9) on samples.

    .. math:: \ell = \lambda(\sigma)\, \| D_\theta(x_0 + \sigma \epsilon, \sigma) - x_0 \|^2

    Arguments:
        energy: The energy of points (n, dim); for the chains and the checks of the training, in
            which the sampler's effective sample size decides when to stop.
        dim: Length of a point.
        samples: Samples of the target, (n, dim).
        evaluations: Without samples: most evaluations, of chains and checks together. The chains
            are those of parallel tempering from :math:`\mathcal N(m, s^2 I)`, with values alone.
        num_samples: States to keep of the chains; fewer where these are too short.
        num_chains: Number of ladders.
        particles: As in :class:`~rsm_sampler.trainer.EnergyDiffusionTrainer`.
        loc: Mean m of the chains' reference, a number or of shape (dim).
        scale: Its standard deviation s, which should cover the target.
        seed: Decides every random number.
        device: Where to train, ``"auto"`` for a GPU where there is one. Chains and training are
            in the precision of the trainer, double and single.
        config: The trainer's.
        progress: Whether to show a progress bar; None to show it on a terminal.

    Returns:
        The sampler; ``counts`` has the evaluations of the chains as ``mcmc`` and those of the
        checks as ``check``.

    Raises:
        TypeError: If the energy cannot be called.
        ValueError: If not exactly one of samples and evaluations is given, or an argument is out
            of range.

    References:
        Equation (9)

        | Denoising diffusion probabilistic models (Ho et al., 2020)
        | https://arxiv.org/abs/2006.11239

    Example:
        >>> sampler = ddpm(
        ...     lambda x: x.square().sum(-1) / 2, 1, samples=torch.randn(500, 1), seed=0,
        ...     config=TrainerConfig(steps_per_cycle=20, max_cycles=1, width=8, check_draws=64),
        ... )
        >>> sampler.sample(5).shape, sampler.counts
        (torch.Size([5, 1]), {'check': 64})
    """
    if (samples is None) == (evaluations is None):
        raise ValueError(
            "samples or evaluations must be given, one of them, got "
            f"{'no ' if samples is None else ''}samples and evaluations={evaluations}"
        )
    config, meter = config or TrainerConfig(), metered(energy, dim)
    centre = location(loc, dim)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    for name, value in (("num_samples", num_samples), ("num_chains", num_chains)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if samples is None:
        assert evaluations is not None
        sizes = config.sizes(dim, particles_of(meter.energy, particles))
        checks = sizes.max_cycles * sizes.check_draws
        samples = _tempered(
            meter, centre, scale, evaluations - checks, num_samples, num_chains, seed
        )
    trainer = EnergyDiffusionTrainer(
        meter.energy,
        dim,
        particles=particles,
        seed=seed,
        device=device,
        samples=samples.float(),
        config=config,
    )
    sampler = trainer.fit(progress=progress)
    for purpose, spent in trainer.energy.counts.items():
        meter.counts[purpose] = meter.counts.get(purpose, 0) + spent
    sampler.counts = dict(meter.counts)
    return sampler


def _tempered(
    meter: MeteredEnergy,
    loc: Tensor,
    scale: float,
    evaluations: int,
    num_samples: int,
    num_chains: int,
    seed: int,
) -> Tensor:
    """States of parallel tempering."""
    generator = torch.Generator().manual_seed(seed)
    levels = max(12, int(3 * math.sqrt(len(loc))))
    steps = evaluations // (num_chains * levels) - 1
    if steps < 2:
        raise ValueError(
            f"evaluations must be at least {3 * num_chains * levels} beside those of the checks, "
            f"got {evaluations}"
        )
    noise = torch.randn(num_chains, len(loc), dtype=loc.dtype, generator=generator)
    return run_mcmc(
        meter,
        loc + scale * noise,
        evaluations=evaluations,
        generator=generator,
        num_levels=levels,
        reference_loc=loc,
        reference_scale=scale,
        num_samples=min(num_samples, int(0.6 * steps) * num_chains),
    ).samples
