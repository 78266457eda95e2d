r"""Langevin dynamics without a Metropolis test: annealed, and naive.

Chains start from a reference, :math:`\mathcal N(m, s^2 I)`, and follow the path
:math:`E_\beta = \beta E + (1 - \beta) E_\mathrm{ref}` of
:class:`~rsm_sampler.montecarlo.markov.GaussianPath`:

.. math:: x \leftarrow x - \tfrac{h_\beta^2}{2} \nabla E_\beta(x) + h_\beta \xi, \qquad
          h_\beta = h \Big/ \sqrt{\frac{\beta}{l^2} + \frac{1 - \beta}{s^2}} .

Here l is the scale of the target's finest structure, so that the root is the largest curvature of
:math:`E_\beta` and steps of :math:`h < 2` are stable. A share of the steps is spent on
:math:`\beta = (k / n)^4` from 0 to 1, the rest at 1. With no share for it this is the naive
method, which starts from the reference and knows nothing else of it.

The chains are exact for no step size: see :class:`~rsm_sampler.montecarlo.markov.Langevin`. Nor do
they weigh modes that have come apart before :math:`\beta` is 1.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.baselines.standard import location
from rsm_sampler.checked import checked
from rsm_sampler.distributed import Team
from rsm_sampler.montecarlo.markov import GaussianPath, Langevin, normal_like
from rsm_sampler.target.energy import MeteredEnergy, metered

__all__ = ["ChainSampler", "langevin"]


@checked(skip=("__init__",))
@dataclass
class ChainSampler:
    """Chains that are run anew for every call, and counted.

    Attributes:
        energy: The energy with its counters.
        loc: Mean of the starts, (dim); decides precision and device.
        scale: Their standard deviation.
        detail: Scale of the target's finest structure.
        num_steps: Steps of a chain.
        annealed_steps: Those of them on the way to the target.
        step_size: Step length in units of the finest structure.
        keep: States kept of a chain.
        seed: Seed of the sampler's own generator.
        history: Empty: there is nothing to train.
    """

    energy: MeteredEnergy
    loc: Tensor
    scale: float
    detail: float
    num_steps: int
    annealed_steps: int
    step_size: float
    keep: int
    seed: int
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.loc.device).manual_seed(self.seed + 1)

    @property
    def counts(self) -> dict[str, int]:
        """Energy evaluations so far, by purpose: they are spent when samples are drawn."""
        return dict(self.energy.counts)

    def sample(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """The states of fresh chains, ``n / keep`` of them, all evaluations counted.

        Arguments:
            n: Number of states. Those of one chain, which lie ``n / keep`` rows apart, are
                dependent; different chains are not.
            generator: Source of randomness; the sampler's own if None.

        Raises:
            ValueError: If n is negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        generator = generator or self.generator
        start = self.loc.expand(-(-n // self.keep), -1)
        if n == 0:
            return start
        kernel = Langevin(self.step_size)
        state = kernel.start(self.energy, start + self.scale * normal_like(start, generator))
        scale = torch.full_like(self.loc[:1], self.scale)
        spacing = max(1, (self.num_steps - self.annealed_steps) // self.keep)
        kept = []
        for k in range(self.num_steps):
            share = min(1.0, (k + 1) / max(1, self.annealed_steps)) ** 4
            beta = torch.full_like(self.loc[:1], share)
            curvature = share / self.detail**2 + (1 - share) / self.scale**2
            kernel.step_size = (self.step_size / math.sqrt(curvature)) * torch.ones_like(beta)
            state = dataclasses.replace(state, path=GaussianPath(beta, self.loc, scale))
            state = kernel.step(state, generator)
            left = self.num_steps - 1 - k
            if left % spacing == 0 and left // spacing < self.keep:
                kept.append(state.x)
        self.energy.check(state.x)
        return torch.cat(kept)[-n:]


@checked(skip=("energy",), above={"scale": 0})
def langevin(
    energy: Callable[..., Tensor] | MeteredEnergy,
    dim: int,
    *,
    num_steps: int,
    annealing: float = 0.5,
    loc: float | Tensor = 0.0,
    scale: float = 1.0,
    detail: float | None = None,
    step_size: float = 0.5,
    keep: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> ChainSampler:
    r"""Unadjusted Langevin dynamics, annealed or naive.

    Arguments:
        energy: The energy of points (n, dim), differentiable by autograd on all of space.
        dim: Length of a point.
        num_steps: Steps of a chain, which costs :math:`2\,(\mathrm{num\_steps} + 1)` evaluations.
        annealing: Share of the steps on the way from the reference to the target, in [0, 1); with
            0 the dynamics are the naive ones.
        loc: Mean m of the reference, a number or of shape (dim).
        scale: Its standard deviation s; it should cover the target.
        detail: Scale l of the target's finest structure; the reference's if None.
        step_size: Step length h in units of l, below 2: the variance of a structure of scale l
            comes out too large by a factor of :math:`1 / (1 - h^2 / 4)`.
        keep: States kept of each chain, spread over the steps at the target.
        seed: Decides every random number.
        device: Where to work, ``"auto"`` for a GPU where there is one.
        dtype: Precision of the chains.

    Returns:
        The sampler. Nothing is evaluated before samples are drawn.

    Raises:
        TypeError: If the energy cannot be called.
        ValueError: If an argument is out of range.

    Note:
        On energies that grow faster than a parabola, chains of the naive method may run away. The
        annealed ones come in from afar while :math:`\beta` is small.

    References:
        Equation (18), along inverse temperatures instead of noise levels, of which an energy
        alone knows no score

        | Exponential convergence of Langevin distributions and their discrete approximations
        | (Roberts and Tweedie, 1996)
        | https://doi.org/10.2307/3318418

    Example:
        >>> sampler = langevin(lambda x: x.square().sum(-1) / 2, 3, num_steps=10, device="cpu")
        >>> sampler.sample(4).shape, sum(sampler.counts.values())
        (torch.Size([4, 3]), 88)
    """
    detail = scale if detail is None else detail
    for name, value in (("num_steps", num_steps), ("keep", keep)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, width in (("scale", scale), ("detail", detail)):
        if not 0 < width < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {width}")
    if not 0 <= annealing < 1:
        raise ValueError(f"annealing must be at least 0 and below 1, got {annealing}")
    if not 0 < step_size < 2:
        raise ValueError(f"step_size must be positive and below 2, got {step_size}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    annealed_steps = int(annealing * num_steps)
    if keep > num_steps - annealed_steps:
        raise ValueError(
            f"keep must be at most {num_steps - annealed_steps}, the steps at the target, got "
            f"{keep}"
        )
    meter = metered(energy, dim)
    where = location(loc, dim).to(device=Team(device).device, dtype=dtype)
    return ChainSampler(
        meter, where, scale, detail, num_steps, annealed_steps, step_size, keep, seed
    )
