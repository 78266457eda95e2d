r"""What the diffusion-policy agents share: the chain, candidates, and exploration noise.

**Candidates.** An action is the best of M draws by :math:`\min_i Q_i` (16), with M set apart for
behaviour, target and evaluation. M = 1 is the policy itself.

**Evaluation** is a function of the observation alone: the M chains start from M fixed noises and
run without any (DDIM); the best end is taken.

**The tuned noise of the published code.** There the exploration noise has standard deviation
:math:`\nu \kappa`, and :math:`\kappa` follows Adam steps on :math:`\log \kappa` with gradient

.. math:: \hat H - H_{\rm target}, \qquad
          \hat H = \tfrac{d_a}{2} \log\big(2 \pi e\, (0.1 \kappa)^2\big) .

Since :math:`\hat H` depends on :math:`\kappa` alone, this is a decay that no data can change:
:func:`kappa_path` writes it down.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rl.config import AgentConfig
from rl.critics import Critic, best_candidate
from rl.off_policy import NextAction, OffPolicyAgent, _slow_copy
from rl.policies import ActionSource, ChainName, DiffusionPolicy
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.denoisers import Prediction
from rsm_sampler.schedules import (
    Cosine,
    DiscreteSchedule,
    Geometric,
    Linear,
    VariancePreserving,
)

__all__ = ["DiffusionAgent", "DiffusionConfig", "kappa_path"]

ScheduleName = Literal["cosine", "linear", "vp", "geometric"]

# Lowest and highest level of the geometric schedule: as sharp as actions need to be, and so high
# that a box of width 2 is hardly seen any more.
RANGE = 0.1, 5.0

# What the published code has in common for its two agents.
PUBLISHED: dict[str, Any] = {
    "reward_scale": 0.2,
    "warmup_steps": 30_000,
    "count_warmup": False,
    "policy_lr_final": 3e-5,
    "target_period": 2,
    "critic_layer_norm": False,
    "prediction": "noise",
    "start_scale": 0.5,
    "behaviour_candidates": 32,
    "target_candidates": 32,
    "evaluation_candidates": 32,
    "behaviour_from_average": True,
    "noise": 0.1,
    "kappa": 5.0,
    "cut_noise": False,
}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(AgentConfig):
    """What a diffusion policy adds to :class:`~rl.config.AgentConfig`.

    Attributes:
        num_steps: Steps T of the chain.
        schedule: ``"cosine"``, ``"linear"``, ``"vp"`` or ``"geometric"``, from 0.1 to 5.
        schedule_scale: Factor on its rates.
        prediction: What the network's output means; see :mod:`rsm_sampler.denoisers`.
        start_scale: Factor on the noise from which a chain starts (1/2 in published code).
        chain: ``"ancestral"``, the paper's, or ``"multistep"``, which follows the policy's law
            more closely where T is large; see :mod:`rsm_sampler.ancestral`.
        behaviour_candidates: M of acting.
        target_candidates: M of the action at the next state.
        evaluation_candidates: M of ``predict(deterministic=True)``.
        behaviour_from_average: Whether a slow copy of the policy acts.
        target_from_average: Whether slow copies of policy and critics draw and rank the target's
            actions.
        noise: Standard deviation of normal noise on acting and target actions.
        persistence: Correlation of the random numbers behind an action with those behind the one
            before it. Each action follows the policy's law as ever, but what is tried is kept up
            for about 1/(1 - persistence) steps, where single steps lead nowhere. Only with one
            behaviour candidate and the ancestral chain.
        kappa: Where the factor on this noise starts that published code tunes; None for none.
        kappa_entropy: The entropy per dimension that it is tuned to, in nats.
        kappa_lr: Adam's learning rate of log kappa.
        kappa_period: Updates between its steps.
        cut_noise: Whether noisy actions are cut to [-1, 1].
    """

    num_steps: int = 20
    schedule: ScheduleName = "cosine"
    schedule_scale: float = 1.0
    prediction: Prediction = "preconditioned"
    start_scale: float = 1.0
    chain: ChainName = "ancestral"
    behaviour_candidates: int = 1
    target_candidates: int = 1
    evaluation_candidates: int = 10
    behaviour_from_average: bool = False
    target_from_average: bool = False
    noise: float = 0.0
    persistence: float = 0.0
    kappa: float | None = None
    kappa_entropy: float = -0.9
    kappa_lr: float = 7e-3
    kappa_period: int = 250
    cut_noise: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        for name in (
            "num_steps",
            "behaviour_candidates",
            "target_candidates",
            "evaluation_candidates",
            "kappa_period",
        ):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be at least 0 and finite, got {self.noise}")
        if not 0 <= self.persistence < 1 or (
            self.persistence > 0 and (self.behaviour_candidates > 1 or self.chain != "ancestral")
        ):
            raise ValueError(
                "persistence must be in [0, 1), and 0 with several behaviour_candidates or "
                f"another chain than 'ancestral', got {self.persistence}"
            )
        for name in ("schedule_scale", "start_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.schedule in ("vp", "geometric") and self.schedule_scale != 1:
            raise ValueError(
                f"schedule_scale must be 1 for {self.schedule!r}, got {self.schedule_scale}"
            )
        if self.kappa is not None and not self.kappa > 0:
            raise ValueError(f"kappa must be positive or None, got {self.kappa}")
        for name, allowed in (
            ("schedule", ScheduleName),
            ("prediction", Prediction),
            ("chain", ChainName),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}"
                )
        self.make_schedule()  # it refuses rates that cannot be

    def make_schedule(self) -> DiscreteSchedule:
        """The T noise levels."""
        if self.schedule == "vp":
            return VariancePreserving(self.num_steps)
        if self.schedule == "geometric":
            return DiscreteSchedule.through(Geometric(*RANGE).sigmas(self.num_steps)[:-1].flip(0))
        kind = Cosine if self.schedule == "cosine" else Linear
        return kind(self.num_steps, scale=self.schedule_scale)


@lru_cache
def kappa_path(start: float, entropy: float, lr: float, steps: int) -> tuple[float, ...]:
    r"""Values of :math:`\kappa` after 0, 1, ..., steps Adam steps on its logarithm.

    Arguments:
        start: The first value.
        entropy: Target entropy per dimension, in nats.
        lr: Adam's learning rate.
        steps: Number of steps.

    Example:
        >>> round(kappa_path(5.0, -0.9, 7e-3, 2000)[-1], 3)
        0.984
    """
    log_kappa, first, second = math.log(start), 0.0, 0.0
    path = [start]
    for i in range(1, steps + 1):
        noise = 2 * (log_kappa + math.log(0.1))
        gradient = 0.5 * (math.log(2 * math.pi * math.e) + noise) - entropy
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = math.sqrt(second / (1 - 0.999**i)) + 1e-8
        log_kappa -= lr * first / (1 - 0.9**i) / root
        path.append(math.exp(log_kappa))
    return tuple(path)


class DiffusionAgent(OffPolicyAgent):
    """Base of the agents whose policy is a diffusion model."""

    policy: DiffusionPolicy

    def build_policy(self, generator: torch.Generator) -> nn.Module:
        """The policy, its slow copy where that one acts, and the fixed noises of evaluation."""
        config = self.config
        policy = self.make_policy(generator)
        self.average = (
            _slow_copy(policy).to(self.device) if config.behaviour_from_average else None
        )
        self.target_policy = (
            _slow_copy(policy).to(self.device) if config.target_from_average else None
        )
        self._starts = torch.randn(
            config.evaluation_candidates, self.action_dim, generator=generator
        ).to(self.device)
        self._noise = torch.full((), config.noise, device=self.device)
        self._kappa = torch.ones((), device=self.device)
        self._acting_noise: Tensor | None = None
        return policy

    def make_policy(self, generator: torch.Generator) -> nn.Module:
        """The policy alone."""
        config = self.config
        return DiffusionPolicy(
            self.observation_dim,
            self.action_dim,
            config.make_schedule(),
            prediction=config.prediction,
            start_scale=config.start_scale,
            chain=config.chain,
            width=config.width,
            depth=config.depth,
            generator=generator,
        )

    def extra_state(self) -> dict[str, Any]:
        """The fixed noises of evaluation, and the tuned one: it acts before an update sets it."""
        state = {"starts": self._starts, "noise": self._noise, "kappa": self._kappa}
        kept = self._acting_noise
        return state if kept is None else {**state, "acting_noise": kept}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back; agents saved by an older version have those of their seed."""
        if "starts" in state:
            self._starts = state["starts"].to(self.device)
            self._noise.copy_(state["noise"])
            self._kappa.copy_(state["kappa"])
        if "acting_noise" in state:
            self._acting_noise = state["acting_noise"].to(self.device)

    def slow_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Slow copies and what they follow."""
        copies = [copy for copy in (self.average, self.target_policy) if copy is not None]
        return [*super().slow_pairs(), *((copy, self.policy) for copy in copies)]

    def before_update(self, replay: ReplayBuffer) -> None:
        """The exploration noise of this update."""
        config = self.config
        if config.kappa is not None:
            kappa = self.kappa
            self._kappa.fill_(kappa)
            self._noise.fill_(config.noise * kappa)

    @property
    def kappa(self) -> float:
        """The factor on the noise, by the number of updates."""
        config = self.config
        if config.kappa is None:
            return 1.0
        steps = self.updates // config.kappa_period
        longest = max(1000, 1 << max(0, steps - 1).bit_length())
        return kappa_path(config.kappa, config.kappa_entropy, config.kappa_lr, longest)[steps]

    # ------------------------------------------------------------------ actions

    def explore(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The best of M draws, plus noise."""
        policy = self.policy if self.average is None else self.average
        if self.config.persistence > 0:
            return self._persistent(policy, observation)
        m = self.config.behaviour_candidates
        action = self._best_of(policy, observation, m, self.acting_generator)
        return self._perturbed(action, self.acting_generator)

    def _persistent(self, policy: DiffusionPolicy, observation: Tensor) -> Tensor:
        """A draw whose chain has random numbers that change slowly from call to call."""
        config = self.config
        shape = config.num_steps + 1, len(observation), self.action_dim
        fresh = torch.randn(shape, device=self.device, generator=self.acting_generator)
        kept = self._acting_noise
        if kept is None or kept.shape != fresh.shape:
            kept = self._acting_noise = fresh
        else:
            kept.mul_(config.persistence).add_(fresh, alpha=math.sqrt(1 - config.persistence**2))
        with torch.no_grad():
            action = policy.walk(observation, kept[:-1])
        action = action + self._noise * kept[-1]
        return action.clamp(-1.0, 1.0) if config.cut_noise else action

    @torch.no_grad()
    def exploit(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The best end of chains without noise, from fixed starts."""
        policy = self.policy if self.average is None else self.average
        return best_candidate(self.critic, observation, policy.flow(observation, self._starts))

    def next_action(self, batch: Batch, with_policy: bool) -> NextAction:
        """The best of M draws of the policy, plus noise; no entropy."""
        m, slow = self.config.target_candidates, self.target_policy
        policy, critic = (self.policy, self.critic) if slow is None else (slow, self.target_critic)
        states = self._states(batch)
        action = self._best_of(policy, states, m, self.generator, critic)
        noisy = self._perturbed(action, self.generator)
        return NextAction(noisy, without_noise=None if noisy is action else action)

    def _states(self, batch: Batch) -> Tensor:
        """The next states, or the state itself where none follows, for no policy acts there."""
        over = batch.terminated.unsqueeze(-1) > 0
        return torch.where(over, batch.observation, batch.next_observation)

    def _best_of(
        self,
        policy: ActionSource,
        observation: Tensor,
        m: int,
        generator: torch.Generator,
        critic: Critic | None = None,
    ) -> Tensor:
        candidates = policy.sample(observation, m, generator=generator)
        return best_candidate(self.critic if critic is None else critic, observation, candidates)

    def _perturbed(self, action: Tensor, generator: torch.Generator) -> Tensor:
        """Actions with exploration noise."""
        if self.config.noise == 0:
            return action
        noise = torch.randn(
            action.shape, dtype=action.dtype, device=action.device, generator=generator
        )
        action = action + self._noise * noise
        return action.clamp(-1.0, 1.0) if self.config.cut_noise else action

    def _levels_of(self, n: int) -> tuple[Tensor, Tensor]:
        """Random steps t in 1..T, (n), and their noise levels."""
        t = torch.randint(
            1, self.config.num_steps + 1, (n,), device=self.device, generator=self.generator
        )
        return t, self.policy.sigmas[t]

    def _modules(self) -> dict[str, nn.Module]:
        copies = {"average": self.average, "target_policy": self.target_policy}
        return super()._modules() | {k: copy for k, copy in copies.items() if copy is not None}
