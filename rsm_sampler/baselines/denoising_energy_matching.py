r"""iDEM: a denoiser is fitted to the gradient of a log-sum-exp, at points of its own making.

The noised law of a target :math:`e^{-E}` has the score

.. math:: \nabla \log p_\sigma(x_t) \approx S_K(x_t, \sigma)
          = \nabla_{x_t} \log \sum_{k=1}^K e^{-E(x_{0,k})}
          = -\sum_k \bar w_k \nabla E(x_{0,k}), \qquad
          x_{0,k} \sim \mathcal N(x_t, \sigma^2 I), \quad \bar w = \mathrm{softmax}(-E),

that is the reverse kernel (15) with the *gradient* target of
:func:`rsm_sampler.estimators.score_estimate`; reverse sampling score matching (14) has the value
target instead. An inner loop draws clean points from a replay buffer, makes them noisy,
:math:`x_t = x_0 + \sigma \epsilon`, and fits the denoiser to :math:`S_K`; an outer loop refills
the buffer with draws of the present model. The variance-exploding schedule is geometric:
:math:`\log \sigma` is uniform between its ends.
"""

import copy
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rsm_sampler.ancestral import Ancestral
from rsm_sampler.baselines.standard import StandardEnergy
from rsm_sampler.checked import checked
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.energy_sampler import ContextLike, EnergySampler, Method, WeightedDraws
from rsm_sampler.estimators import PosteriorEstimate, ScoreEstimate, score_estimate
from rsm_sampler.kernels import ReverseKernel
from rsm_sampler.losses import estimate_loss, noise_weight
from rsm_sampler.schedules import EDM, Geometric
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.transitions import forward_kernel, sigma_column

__all__ = ["IDEMConfig", "IDEMSampler", "idem", "idem_score"]


@checked
@dataclass(frozen=True, kw_only=True)
class IDEMConfig:
    """How iDEM trains; lengths are in units of the given ``scale``.

    Attributes:
        num_draws: Reverse samples K of a noisy point, two evaluations each.
        batch_size: Noisy points whose scores are estimated at once.
        updates: Optimiser steps for each such batch: one on the batch itself, the others on
            batches of before, as many as the buffer's points make up.
        inner_steps: Batches between two refills of the buffer.
        refill: Draws of the model that a refill adds.
        buffer_size: Most points of the buffer; the oldest go first.
        score_clip: Longest score of a noisy point, times the root of n for n particles, in units
            of 1/scale.
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.
        num_steps: Noise levels of the sampler.
        learning_rate: Peak learning rate of Adam; it falls to zero.
        width: Units per hidden layer; 128, and 64 for particles, if None.
        depth: Hidden layers; 3, and 4 rounds of messages for particles, if None.
        compile: Whether the network is compiled for training, as in
            :class:`~rsm_sampler.trainer_config.TrainerConfig`.
    """

    num_draws: int = 100
    batch_size: int = 256
    updates: int = 1
    inner_steps: int = 100
    refill: int = 1000
    buffer_size: int = 10_000
    score_clip: float = 20.0
    sigma_min: float = 0.01
    sigma_max: float = 2.0
    num_steps: int = 100
    learning_rate: float = 2e-3
    width: int | None = None
    depth: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_draws",
            "batch_size",
            "updates",
            "inner_steps",
            "refill",
            "buffer_size",
            "num_steps",
            "width",
            "depth",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("score_clip", "sigma_min", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_max must be finite and above sigma_min {self.sigma_min}, got "
                f"{self.sigma_max}"
            )


@checked
def idem_score(
    energy: Callable[..., Tensor],
    x_t: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    num_draws: int,
    *,
    score_clip: float = math.inf,
    generator: torch.Generator | None = None,
) -> ScoreEstimate:
    r"""The target of the regression, :math:`S_K`, cut to a length.

    Arguments:
        energy: The energy of clean points, differentiable by autograd; see
            :func:`~rsm_sampler.estimators.score_estimate`.
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        sigma: Their noise scales, positive, broadcastable to :math:`(*)`.
        num_draws: The number K of reverse samples of each.
        score_clip: Longest score; a longer one keeps its direction.
        generator: Source of randomness, on the device of x_t.

    Returns:
        The estimate, without gradient. Its bias is of order 1/K, and grows with the spread of the
        energies within a noise scale of :math:`x_t`.

    Raises:
        ValueError: If score_clip is not positive; and as
            :func:`~rsm_sampler.estimators.score_estimate`.

    References:
        | Iterated denoising energy matching for sampling from Boltzmann densities
        | (Akhound-Sadegh et al., 2024), section 3
        | https://arxiv.org/abs/2402.06121

    Example:
        >>> idem_score(lambda x: 3.0 * x.sum(-1), torch.zeros(2), 0.1, 8).score
        tensor([-3.0000, -3.0000])
    """
    if not score_clip > 0:
        raise ValueError(f"score_clip must be positive, got {score_clip}")
    found = score_estimate(
        energy, x_t, sigma, ReverseKernel(), num_draws, target="gradient", generator=generator
    )
    return ScoreEstimate(_clipped(found.score, score_clip), found.ess, found.log_mean_weight)


@checked(skip=("energy",), above={"scale": 0})
def idem(
    energy: Callable[..., Tensor] | MeteredEnergy,
    dim: int,
    *,
    evaluations: int,
    particles: tuple[int, int] | None = None,
    loc: float | Tensor = 0.0,
    scale: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    config: IDEMConfig | None = None,
    progress: bool | None = None,
) -> "IDEMSampler":
    r"""Iterated denoising energy matching.

    .. math:: \ell = \sigma^2 \Big\| \frac{D_\theta(x_t, \sigma) - x_t}{\sigma^2}
              - S_K(x_t, \sigma) \Big\|^2

    Arguments:
        energy: The energy of points (n, dim), differentiable by autograd on all of space.
        dim: Length of a point.
        evaluations: Most evaluations; a step takes 2 K of them for each noisy point.
        particles: ``(n, s)`` for n equal particles in s dimensions, as in
            :class:`~rsm_sampler.trainer.EnergyDiffusionTrainer`.
        loc: Where the target lies, a number or of shape (dim).
        scale: Its width, to a factor of two: the highest noise level is some times as wide.
        seed: Decides every random number.
        device: Where to train, ``"auto"`` for a GPU where there is one.
        dtype: Precision of network and points.
        config: Everything else.
        progress: Whether to show a progress bar; None to show it on a terminal.

    Returns:
        The sampler; ``counts`` has the evaluations, ``history`` a record for each refill: ``step``
        in batches, ``loss``, ``candidate_ess`` (mean share of the K samples) and ``evaluations``.

    Raises:
        EnergyError: If the energy cannot be differentiated, or is nowhere finite.
        TypeError: If the energy cannot be called.
        ValueError: If an argument is out of range, or evaluations do not cover one step.

    Note:
        The network is this package's preconditioned denoiser, not a score network, and draws are
        those of the reverse chain (8), whose noise is never scaled down, in fewer steps than the
        publication's Euler scheme. With ``updates`` = 1 no estimate is used twice, as published.

    References:
        | Iterated denoising energy matching for sampling from Boltzmann densities
        | (Akhound-Sadegh et al., 2024), algorithm 1
        | https://arxiv.org/abs/2402.06121

    Example:
        >>> sampler = idem(
        ...     lambda x: x.square().sum(-1) / 2, 1, evaluations=1000, seed=0, device="cpu",
        ...     config=IDEMConfig(num_draws=5, batch_size=10, width=8, refill=10),
        ... )
        >>> sampler.sample(5).shape, sampler.counts
        (torch.Size([5, 1]), {'training': 1000})
    """
    config = config or IDEMConfig()
    target = StandardEnergy(
        energy, dim, particles=particles, loc=loc, scale=scale, device=device, dtype=dtype
    )
    cost = 2 * config.batch_size * config.num_draws
    if evaluations < cost:
        raise ValueError(f"evaluations must be at least {cost} for one step, got {evaluations}")
    steps = evaluations // cost
    generator = torch.Generator(target.device).manual_seed(seed)
    architecture = _architecture(target, config)
    denoiser = Denoiser.build(architecture, torch.Generator().manual_seed(seed))
    denoiser.to(device=target.device, dtype=dtype)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    network: Any = torch.compile(denoiser) if config.compile else denoiser
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps * config.updates)
    schedule = Geometric(config.sigma_min, config.sigma_max)
    model = Ancestral(average, schedule.sigmas(config.num_steps), dim=target.dim)
    clip = config.score_clip * math.sqrt(target.particles[0] if target.particles else 1)
    buffer = torch.zeros(0, target.dim, device=target.device, dtype=dtype)
    store: deque[_Batch] = deque(maxlen=max(1, config.buffer_size // config.batch_size))
    history: list[dict[str, float]] = []
    disable = None if progress is None else not progress
    for step in tqdm(range(steps), desc="iDEM", unit="batch", disable=disable):
        if step % config.inner_steps == 0:
            fresh = model.sample(config.refill, generator=generator)
            buffer = torch.cat([buffer, fresh])[-config.buffer_size :]
        store.append(_evaluated(target, buffer, schedule, config, clip, generator))
        for update in range(config.updates):
            batch = store[_below(len(store), generator) if update else -1]
            loss = estimate_loss(
                network, batch.x_t, batch.sigma, batch.estimate, loss_weight=noise_weight
            ).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            annealing.step()
            done = step * config.updates + update + 1
            keep = min(0.998, done / (done + 10))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(denoiser.parameters()), 1 - keep
                )
        if (step + 1) % config.inner_steps == 0 or step + 1 == steps:
            target.meter.check(target.to_x(buffer))
            history.append(
                {
                    "step": float(step + 1),
                    "loss": float(loss.detach()),
                    "candidate_ess": float(store[-1].estimate.ess.mean()) / config.num_draws,
                    "evaluations": float(target.meter.evaluations),
                }
            )
    return IDEMSampler(
        average,
        target.affine,
        target.coordinates,
        EDM(config.sigma_min, config.sigma_max),
        config.num_steps,
        architecture,
        seed,
        target.meter.apart(),
        {},
        history,
        dict(target.meter.counts),
    )


def _architecture(target: StandardEnergy, config: IDEMConfig) -> dict[str, Any]:
    if target.particles is None:
        return {"dim": target.dim, "width": config.width or 128, "depth": config.depth or 3}
    num_particles, space_dim = target.particles
    return {
        "num_particles": num_particles,
        "space_dim": space_dim,
        "width": config.width or 64,
        "depth": config.depth or 4,
    }


@dataclass
class IDEMSampler(EnergySampler):
    """A sampler whose default is the reverse chain, in any dimension.

    Draws start from the noise of the highest level alone, which is not much wider than the
    target. The reverse chain forgets that; the probability-flow ODE does not, and its law comes
    out too narrow.
    """

    def sample(
        self,
        n: int,
        *,
        context: ContextLike = None,
        method: Method | None = None,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        chunk: int = 4096,
    ) -> Float[Tensor, "n dim"]:
        """Independent draws, of the chain if no method is named.

        See :meth:`~rsm_sampler.energy_sampler.EnergySampler.sample`.
        """
        return super().sample(
            n,
            context=context,
            method=method or "ancestral",
            num_steps=num_steps,
            generator=generator,
            chunk=chunk,
        )

    def weighted_draws(
        self,
        n: int,
        *,
        energy: Callable[..., Tensor] | None = None,
        context: ContextLike = None,
        paths: bool | None = None,
        num_steps: int | None = None,
        purpose: str = "diagnosis",
        generator: torch.Generator | None = None,
    ) -> WeightedDraws:
        """Weighted draws, of the chain's paths unless ``paths`` is False.

        See :meth:`~rsm_sampler.energy_sampler.EnergySampler.weighted_draws`.
        """
        return super().weighted_draws(
            n,
            energy=energy,
            context=context,
            paths=True if paths is None else paths,
            num_steps=self.num_steps if num_steps is None else num_steps,
            purpose=purpose,
            generator=generator,
        )


@dataclass(frozen=True)
class _Batch:
    """Noisy points (n, dim) with their noise scales (n) and what the denoiser is to say there."""

    x_t: Tensor
    sigma: Tensor
    estimate: PosteriorEstimate


def _evaluated(
    target: StandardEnergy,
    buffer: Tensor,
    schedule: Geometric,
    config: IDEMConfig,
    clip: float,
    generator: torch.Generator,
) -> _Batch:
    """Points of the buffer, made noisy, with their estimates."""
    like: dict[str, Any] = {"device": target.device, "generator": generator}
    index = torch.randint(len(buffer), (config.batch_size,), **like)
    sigma = schedule.sigma(torch.rand(config.batch_size, dtype=target.dtype, **like))
    x_t = forward_kernel(buffer[index], sigma, generator=generator)
    found = idem_score(target, x_t, sigma, config.num_draws, score_clip=clip, generator=generator)
    mean = x_t + sigma_column(sigma, x_t).square() * found.score
    return _Batch(x_t, sigma, PosteriorEstimate(mean, found.ess, found.log_mean_weight))


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), device=generator.device, generator=generator))


def _clipped(score: Tensor, longest: float) -> Tensor:
    length = torch.linalg.vector_norm(score, dim=-1, keepdim=True)
    return score * (longest / length.clamp(min=longest)) if longest < math.inf else score
