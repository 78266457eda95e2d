r"""FAB: a normalising flow is fitted to annealed samples of where it falls short.

A flow q is trained on the :math:`\alpha = 2` divergence :math:`\int p^2 / q` from a target
:math:`p \propto e^{-E}`, which is infinite as soon as q leaves out a mode. Its gradient is an
expectation under the law :math:`g \propto p^2 / q`, the one that estimates it with the least
variance:

.. math:: \nabla_\theta \log \int \frac{p^2}{q_\theta}
          = -\mathbb E_g\, \nabla_\theta \log q_\theta(x).

Annealed importance sampling brings draws of q to g, along
:math:`\pi_\beta \propto q^{1 - \beta} g^\beta = q^{1 - 2\beta} e^{-2\beta E}` in M steps of
Hamiltonian Monte Carlo, :math:`\beta_m = m / (M + 1)`; with one step it is at :math:`\beta = 1/2`,
which is p. Since :math:`\log \pi_\beta` is linear in :math:`\beta`, the weights are

.. math:: \log w = \frac{2}{M + 1} \sum_{m=1}^{M+1} \big(-E(x_m) - \log q(x_m)\big),

:math:`x_1` being the draw and :math:`x_{m+1}` where step m leads.

**The buffer** keeps :math:`x_{M+1}` with :math:`\log w` and :math:`\log q`, and gives points by
weight, many times. By then q has changed to :math:`q'`, and g with it: such a point enters the
loss with the factor :math:`q / q'`, and so does its weight in the buffer.

The flow is that of :mod:`rsm_sampler.baselines.spline_flow`, in the coordinates z of
:mod:`rsm_sampler.baselines.standard`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from rsm_sampler.baselines.spline_flow import SplineFlow
from rsm_sampler.baselines.standard import StandardEnergy
from rsm_sampler.energy_sampler import WeightedDraws
from rsm_sampler.estimators import effective_sample_size, normalise
from rsm_sampler.montecarlo.markov import HMC, GaussianPath
from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices
from rsm_sampler.target.energy import MeteredEnergy, metered

__all__ = ["AnnealedDraws", "FABConfig", "FlowSampler", "annealed_draws", "fab", "fab_loss"]

_CHUNK = 8192  # draws made at a time; bounds the memory


@dataclass(frozen=True, kw_only=True)
class FABConfig:
    """How FAB trains; lengths are in units of the given ``scale``.

    Attributes:
        batch_size: Points of an annealing pass, and of an optimiser step.
        levels: Laws M between q and g, each with one step of Hamiltonian Monte Carlo.
        num_leapfrog: Leapfrog steps of each.
        step_size: First length of a leapfrog step, tuned to an acceptance of 0.7 on the way.
        updates: Optimiser steps after each annealing pass.
        buffer_size: Most points of the buffer; the oldest go first.
        first_passes: Annealing passes before the first optimiser step.
        weight_clip: Largest factor q / q' of a point in the loss.
        gradient_clip: Longest gradient of the loss.
        learning_rate: Peak learning rate of Adam; it falls to zero.
        transforms: Couplings of the flow.
        bins: Bins of a spline.
        width: Units per hidden layer.
        depth: Hidden layers of a coupling.
    """

    batch_size: int = 256
    levels: int = 1
    num_leapfrog: int = 5
    step_size: float = 0.1
    updates: int = 4
    buffer_size: int = 16_384
    first_passes: int = 4
    weight_clip: float = 10.0
    gradient_clip: float = 100.0
    learning_rate: float = 1e-3
    transforms: int = 4
    bins: int = 8
    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "levels",
            "num_leapfrog",
            "updates",
            "first_passes",
            "transforms",
            "width",
            "depth",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("step_size", "weight_clip", "gradient_clip", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, got {self.bins}")
        if self.buffer_size < self.batch_size:
            raise ValueError(
                f"buffer_size must be at least batch_size {self.batch_size}, got "
                f"{self.buffer_size}"
            )


def fab_loss(
    log_prob: Float[Tensor, " n"],
    log_weight: Float[Tensor, " n"],
    *,
    self_normalised: bool = True,
) -> Float[Tensor, ""]:
    r"""A surrogate whose gradient is that of :math:`\log \int p^2 / q`.

    .. math:: S = -\sum_i \bar w_i \log q_\theta(x_i), \qquad \bar w = \mathrm{softmax}(\log w),

    with weights for :math:`g \propto p^2 / q` that carry no gradient.

    Arguments:
        log_prob: Log-densities of the flow at fixed points, with shape :math:`(n)`.
        log_weight: Log-weights of the points, with shape :math:`(n)`; :math:`-\infty` is a weight
            of zero.
        self_normalised: Whether the weights are divided by their sum. If not, by their number.

    Returns:
        The loss, a scalar. Its value is no divergence.

    Raises:
        ValueError: If the shapes differ.

    References:
        | Flow annealed importance sampling bootstrap (Midgley et al., 2023)
        | https://arxiv.org/abs/2208.01893

    Example:
        >>> fab_loss(torch.tensor([-1.0, -3.0]), torch.zeros(2))
        tensor(2.)
    """
    if log_prob.shape != log_weight.shape:
        raise ValueError(
            f"log_weight must have the shape {tuple(log_prob.shape)} of log_prob, got "
            f"{tuple(log_weight.shape)}"
        )
    log_weight = log_weight.detach()
    weight = normalise(log_weight) if self_normalised else log_weight.exp() / len(log_weight)
    return -torch.where(weight > 0, weight * log_prob, 0.0).sum()


@dataclass
class FlowSampler:
    """Independent draws of a flow, with their density.

    Attributes:
        flow: The flow, in coordinates z.
        target: From z to the user's points, and the energy.
        seed: Seed of the sampler's own generator.
        history: Records of the training.
        counts: Energy evaluations of the training, by purpose.
    """

    flow: SplineFlow
    target: StandardEnergy
    seed: int
    history: list[dict[str, float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.target.device).manual_seed(self.seed + 1)

    def sample(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Independent draws.

        Arguments:
            n: Number of draws.
            generator: Source of randomness; the sampler's own if None.

        Raises:
            ValueError: If n is negative.
        """
        return self.sample_with_log_prob(n, generator=generator)[0]

    def sample_with_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        """Independent draws with their log-densities.

        Arguments:
            n: Number of draws.
            generator: Source of randomness; the sampler's own if None.

        Raises:
            ValueError: If n is negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        pieces = []
        for i in range(0, max(1, n), _CHUNK):
            size = max(1, min(_CHUNK, n - i))  # zuko's transforms refuse an empty batch
            z, log_prob = self.flow.draw(size, generator=generator or self.generator)
            pieces.append((self.target.to_x(z), log_prob - self.target.affine.log_det))
        x, log_prob = map(torch.cat, zip(*pieces, strict=True))
        return x[:n], log_prob[:n]

    @torch.no_grad()
    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density at given points.

        Arguments:
            x: Points.
        """
        z = self.target.to_z(x.to(device=self.target.device, dtype=self.target.dtype))
        return self.flow.log_prob(z) - self.target.affine.log_det

    def weighted_draws(
        self,
        n: int,
        *,
        energy: Callable[..., Tensor] | None = None,
        purpose: str = "diagnosis",
        generator: torch.Generator | None = None,
    ) -> WeightedDraws:
        """Draws with exact importance weights.

        Arguments:
            n: Number of draws.
            energy: The energy, plain or on a meter; that of the training if None.
            purpose: The energy's account.
            generator: Source of randomness; the sampler's own if None.
        """
        x, log_prob = self.sample_with_log_prob(n, generator=generator)
        meter = self.target.meter if energy is None else metered(energy, x.shape[-1])
        value = meter(x, purpose=purpose)
        return WeightedDraws(x, -value - log_prob, value, log_prob)


def fab(
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
    config: FABConfig | None = None,
    progress: bool | None = None,
) -> FlowSampler:
    r"""Flow annealed importance sampling bootstrap, with a prioritised buffer.

    Arguments:
        energy: The energy of points (n, dim), differentiable by autograd on all of space.
        dim: Length of a point.
        evaluations: Most evaluations; a pass takes :math:`2 + 2 M L` for each of its points, with
            L leapfrog steps at each of M levels.
        particles: ``(n, s)`` for n equal particles in s dimensions: the flow is one of centred
            configurations, without any other symmetry.
        loc: Where the target lies, a number or of shape (dim).
        scale: Its width, to a factor of two: the flow starts near :math:`\mathcal N(m, s^2 I)`,
            and beyond five times the width it stays so.
        seed: Decides every random number.
        device: Where to train, ``"auto"`` for a GPU where there is one.
        dtype: Precision of flow and points.
        config: Everything else.
        progress: Whether to show a progress bar; None to show it on a terminal.

    Returns:
        The sampler; ``counts`` has the evaluations, ``history`` about a hundred records: ``step``
        in passes, ``loss``, ``ess`` (share, of the annealed weights for g), ``acceptance`` and
        ``evaluations``.

    Raises:
        EnergyError: If the energy cannot be differentiated, or is nowhere finite.
        ImportError: Without zuko, extra ``flows``.
        TypeError: If the energy cannot be called.
        ValueError: If an argument is out of range, or evaluations do not cover one pass.

    Note:
        The flow is a spline flow throughout, where the publication has affine couplings for some
        targets. Points leave the buffer with replacement, by stratified draws.

    References:
        | Flow annealed importance sampling bootstrap (Midgley et al., 2023), algorithm 1
        | https://arxiv.org/abs/2208.01893
    """
    config = config or FABConfig()
    target = StandardEnergy(
        energy, dim, particles=particles, loc=loc, scale=scale, device=device, dtype=dtype
    )
    cost = config.batch_size * (2 + 2 * config.levels * config.num_leapfrog)
    if evaluations < cost:
        raise ValueError(f"evaluations must be at least {cost} for one pass, got {evaluations}")
    passes = evaluations // cost
    first = min(config.first_passes, passes)
    generator = torch.Generator(target.device).manual_seed(seed)
    flow = SplineFlow(
        target.dim,
        transforms=config.transforms,
        bins=config.bins,
        width=config.width,
        depth=config.depth,
        seed=seed,
    ).to(device=target.device, dtype=dtype)
    optimiser = torch.optim.Adam(flow.parameters(), lr=config.learning_rate)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, (passes - first + 1) * config.updates
    )
    kernels = [HMC(config.step_size, config.num_leapfrog) for _ in range(config.levels)]
    buffer = _Buffer(config.buffer_size)
    history: list[dict[str, float]] = []
    every = max(1, passes // 100)
    disable = None if progress is None else not progress
    for step in tqdm(range(1, passes + 1), desc="FAB", unit="pass", disable=disable):
        found = annealed_draws(target, flow, kernels, config.batch_size, generator=generator)
        buffer.add(found)
        if step == first:  # before a first draw
            target.meter.check(target.to_x(found.z))
        loss = torch.tensor(math.nan)
        for _ in range(config.updates if step >= first else 0):
            index = buffer.draw(config.batch_size, generator)
            log_prob = flow.log_prob(buffer.z[index])
            factor = buffer.follow(index, log_prob.detach())
            factor = factor.clamp(max=math.log(config.weight_clip))
            surrogate = fab_loss(log_prob, factor, self_normalised=False)
            optimiser.zero_grad(set_to_none=True)
            surrogate.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), config.gradient_clip)
            optimiser.step()
            annealing.step()
            loss = surrogate.detach()
        if step % every == 0 or step == passes:
            target.meter.check(target.to_x(found.z))
            history.append(
                {
                    "step": float(step),
                    "loss": float(loss),
                    "ess": float(effective_sample_size(found.log_weight)) / config.batch_size,
                    "acceptance": found.acceptance,
                    "evaluations": float(target.meter.evaluations),
                }
            )
    return FlowSampler(
        flow.requires_grad_(False), target, seed, history, dict(target.meter.counts)
    )


@dataclass(frozen=True)
class AnnealedDraws:
    r"""Ends of annealing passes, in coordinates z.

    Attributes:
        z: Points, (n, dim).
        log_weight: Their log-weights for :math:`g \propto p^2 / q`, (n).
        log_prob: Log-densities of q there, (n).
        acceptance: Mean acceptance of the moves.
    """

    z: Tensor
    log_weight: Tensor
    log_prob: Tensor
    acceptance: float


class _ToSquareRatio(GaussianPath):
    r"""The path from q to :math:`p^2 / q`: :math:`\pi_\beta \propto q^{1 - \beta}g^\beta`."""

    def __init__(self, beta: float, flow: SplineFlow) -> None:
        self.share, self.flow = 2 * beta, flow
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def _flow_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._seen is None or self._seen[0] is not z:
            self._seen = (z, *self.flow.log_prob_and_slope(z))
        return self._seen[1:]

    def potential(
        self, x: Float[Tensor, "*batch dim"], energy: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """The energy on the path."""
        return self.share * energy - (1 - self.share) * self._flow_at(x)[0]

    def slope(
        self, x: Float[Tensor, "*batch dim"], gradient: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """Its gradient."""
        return self.share * gradient - (1 - self.share) * self._flow_at(x)[1]


@torch.no_grad()
def annealed_draws(
    target: StandardEnergy,
    flow: SplineFlow,
    kernels: list[HMC],
    n: int,
    *,
    generator: torch.Generator | None = None,
) -> AnnealedDraws:
    r"""Draws of q, annealed towards :math:`p^2 / q`, with their weights.

    Arguments:
        target: The energy in coordinates z.
        flow: The law q.
        kernels: The moves, one for each level; their step sizes are adapted.
        n: Number of draws.
        generator: Source of randomness.

    Returns:
        The ends; the mean of their weights estimates :math:`\int e^{-2E} / q`.

    References:
        | Annealed importance sampling (Neal, 2001)
        | https://arxiv.org/abs/physics/9803008
    """
    z, log_prob = flow.draw(n, generator=generator)
    state = kernels[0].start(target, z)
    for kernel in kernels[1:]:
        kernel.step_size = kernel.step_size.to(z)
    share = 1 / (len(kernels) + 1)
    log_weight = -2 * share * (state.energy + log_prob)
    acceptance = 0.0
    for level, kernel in enumerate(kernels, 1):
        state = dataclasses.replace(state, path=_ToSquareRatio(level * share, flow))
        state = kernel.step(state, generator)
        kernel.adapt(state, 0.1)
        log_prob = flow.log_prob(state.x)
        log_weight = log_weight - 2 * share * (state.energy + log_prob)
        assert state.acceptance is not None
        acceptance += float(state.acceptance.mean()) / len(kernels)
    log_weight = torch.where(log_weight.isnan(), -torch.inf, log_weight)
    return AnnealedDraws(state.x, log_weight, log_prob, acceptance)


class _Buffer:
    """Points with their weights for p^2/q and the log-density that q had when last looked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.z = self.log_weight = self.log_prob = torch.zeros(0)

    def add(self, found: AnnealedDraws) -> None:
        """Let the newest points in and the oldest out."""
        for name in ("z", "log_weight", "log_prob"):
            old, new = getattr(self, name), getattr(found, name)
            both = torch.cat([old, new]) if len(old) else new
            setattr(self, name, both[-self.size :].clone())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Indices by weight."""
        return stratified_indices(cumulative_weight(self.z, self.log_weight), n, generator)

    def follow(self, index: Tensor, log_prob: Tensor) -> Tensor:
        """The log of q / q' at some points, whose weights are brought up to date."""
        factor = self.log_prob[index] - log_prob
        self.log_weight[index] = self.log_weight[index] + factor
        self.log_prob[index] = log_prob
        return factor
