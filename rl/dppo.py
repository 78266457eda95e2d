r"""DPPO, diffusion policy policy optimisation: PPO on the steps of the chain.

An environment step holds T decisions. Decision i = 0, ..., T - 1 sees the observation and the
noisy action :math:`x_i` at level :math:`\sigma_i` and draws the next one,

.. math:: x_{i+1} \sim \mathcal N\big(\mu_\theta(x_i, s),\, \tau_i^2 I\big), \qquad
          \mu_\theta = D_\theta + \tfrac{\sigma_{i+1}^2}{\sigma_i^2} (x_i - D_\theta),

the core's reverse step (8), but with a least width,
:math:`\tau_i = \max\big(\tau_i^{(8)},\, \tau_{\min} \sqrt{1 + \sigma_{i+1}^2}\big)`, the second
in units of variance-preserving coordinates: so the last decision, without noise in (8), has a
density too. Its outcome is the action, which the environment's box cuts; only it earns a reward.
With :math:`\rho_i = \pi_\theta(x_{i+1} | x_i, s) / \pi_{\rm old}(x_{i+1} | x_i, s)` a policy step
descends

.. math:: \mathbb E \max\big(-\hat A_i \rho_i,\;
          -\hat A_i\, \mathrm{clip}(\rho_i, 1 - c_i, 1 + c_i)\big), \qquad
          \hat A_i = \gamma_d^{\,T-1-i}\, \hat A,

where :math:`\hat A` is the generalised advantage estimate of the environment step, standardised
over the rollout and cut to its quantiles. The critic is a value of states, fitted to
:math:`\hat A + V_{\rm old}` before standardising.

The agent keeps its rollouts itself: :meth:`DPPO.act` remembers its chains, :meth:`DPPO.observe`
what came of them, and :meth:`DPPO.update` does nothing until a rollout is complete.

Note:
    ``"official"`` has the numbers of the public code for training from scratch. There
    :math:`\rho` is made of the *mean* over action dimensions of log-densities within [-5, 2], the
    geometric mean of what the equations say, so that its clip means another thing in every
    dimension; by default the density of the whole action is taken. The public code's observations
    are standardised by statistics of a data set, which training from scratch does not have: here
    running moments are used. Values after a time limit are those of the last state of the episode
    and not, as there, of the first one of the next. The configuration of the comparison of 2025 is
    not public: ``"icml2025"`` is ``"official"`` with the five environments and the rollouts of
    4096 steps that are known of it.

References:
    | Diffusion policy policy optimization (Ren et al., 2025)
    | https://arxiv.org/abs/2409.00588
    | High-dimensional continuous control using generalized advantage estimation
    | (Schulman et al., 2016)
    | https://arxiv.org/abs/1506.02438
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.base import BaseAgent, RunningMoments
from rl.diffusion_agent import DiffusionConfig
from rl.environments import Transition
from rl.policies import DiffusionPolicy, inward_cut
from rl.replay import ReplayBuffer
from rsm_sampler.checked import checked
from rsm_sampler.ensemble import EnsembleMLP

__all__ = ["DPPO", "DPPOConfig", "advantages", "clip_range"]

Ratio = Literal["joint", "mean"]

# What other agents' losses ask for and this one has no use for.
_UNUSED = (
    "updates_per_step",
    "warmup_steps",
    "n_step",
    "reward_scale",
    "critic_steps",
    "policy_lr_final",
    "policy_period",
    "polyak",
    "target_period",
    "chain",
    "behaviour_candidates",
    "target_candidates",
    "evaluation_candidates",
    "behaviour_from_average",
    "target_from_average",
    "noise",
    "persistence",
    "kappa",
)


@dataclass(frozen=True, kw_only=True)
class DPPOConfig(DiffusionConfig):
    """Configuration of :class:`DPPO`.

    Fields of the base classes that concern a replay, slow copies or several candidates must be
    left as they are.

    Attributes:
        rollout_steps: Environment steps of a rollout, of all environments together.
        epochs: How often each decision of a rollout is learned from.
        batch_size: Decisions of a gradient step.
        gae: The factor of generalised advantage estimation, lambda.
        denoising_discount: The factor gamma_d between decisions.
        ratio: Whether densities are those of the ``"joint"`` action, or the ``"mean"`` over its
            dimensions of their logarithms, as published.
        clip: The clip c of the last decision.
        clip_base: The clip of the first; None for the same. Between, it grows exponentially.
        target_kl: A rollout is left when the divergence from the old policy, in nats, exceeds it.
        min_std: The least standard deviation of a decision, in units of actions.
        noise_clip: Cut of the noise, in standard deviations.
        quantile: Advantages are cut to this quantile and its mirror.
        scale_rewards: Whether rewards are divided by the running standard deviation of returns.
    """

    num_envs: int = 8
    updates_per_step: float = 1.0
    warmup_steps: int = 0
    replay_size: int = 10_000
    normalise_observations: bool = True
    batch_size: int = 2048
    critic_lr: float = 1e-3
    gradient_clip: float | None = 1.0
    num_steps: int = 10
    rollout_steps: int = 2048
    epochs: int = 10
    gae: float = 0.95
    denoising_discount: float = 1.0
    ratio: Ratio = "joint"
    clip: float = 0.1
    clip_base: float | None = None
    target_kl: float = 0.1
    min_std: float = 0.1
    noise_clip: float = 3.0
    quantile: float = 0.05
    scale_rewards: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        for field in fields(self):
            if field.name in _UNUSED and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} must be left at {field.default} for DPPO, which has no use for "
                    f"it, got {getattr(self, field.name)}"
                )
        for name in ("rollout_steps", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gae", "denoising_discount"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("clip", "clip_base", "target_kl", "min_std", "noise_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.quantile < 0.5:
            raise ValueError(f"quantile must be in [0, 0.5), got {self.quantile}")
        if self.ratio not in get_args(Ratio):
            raise ValueError(f"ratio must be one of {get_args(Ratio)}, got {self.ratio!r}")

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        official = {
            "prediction": "noise",
            "num_envs": 10,
            "rollout_steps": 10_000,
            "batch_size": 5000,
            "policy_lr": 1e-4,
            "gradient_clip": None,
            "width": 512,
            "critic_width": 256,
            "ratio": "mean",
            "target_kl": 1.0,
        }
        return {
            "corrected": {},
            "official": official,
            "icml2025": {**official, "num_envs": 5, "rollout_steps": 4096},
        }


@checked
def clip_range(config: DPPOConfig) -> Float[Tensor, " steps"]:
    r"""The clips of all decisions, the noisiest first.

    .. math:: c_i = c_{\rm base} + (c - c_{\rm base}) \frac{e^{3u} - 1}{e^3 - 1}, \qquad
              u = \frac{i}{T - 1}

    Arguments:
        config: Gives T, c and the base.

    Example:
        >>> clip_range(DPPOConfig(num_steps=3, clip=0.2, clip_base=0.1))
        tensor([0.1000, 0.1182, 0.2000])
    """
    base = config.clip if config.clip_base is None else config.clip_base
    u = torch.linspace(0, 1, config.num_steps) if config.num_steps > 1 else torch.ones(1)
    return base + (config.clip - base) * torch.expm1(3 * u) / math.expm1(3)


@checked
def advantages(
    reward: Float[Tensor, "steps envs"],
    value: Float[Tensor, "steps envs"],
    next_value: Float[Tensor, "steps envs"],
    terminated: Float[Tensor, "steps envs"],
    ended: Float[Tensor, "steps envs"],
    *,
    discount: float,
    gae: float,
) -> Float[Tensor, "steps envs"]:
    r"""Generalised advantage estimates.

    .. math:: \hat A_k = \delta_k + \gamma \lambda (1 - e_k) \hat A_{k+1}, \qquad
              \delta_k = r_k + \gamma (1 - d_k) V(s'_k) - V(s_k)

    with e = 1 where an episode ends and d = 1 where no value follows.

    Arguments:
        reward: Rewards r.
        value: Values of the states.
        next_value: Values of what followed, the last state of an episode included.
        terminated: Flags d.
        ended: Flags e.
        discount: The factor gamma.
        gae: The factor lambda.

    Example:
        >>> one, nil = torch.ones(3, 1), torch.zeros(3, 1)
        >>> advantages(one, nil, nil, nil, nil, discount=0.5, gae=1.0).T
        tensor([[1.7500, 1.5000, 1.0000]])
    """
    delta = reward + discount * (1 - terminated) * next_value - value
    found, ahead = torch.empty_like(delta), torch.zeros_like(delta[0])
    for k in reversed(range(len(delta))):
        ahead = delta[k] + discount * gae * (1 - ended[k]) * ahead
        found[k] = ahead
    return found


class _Row(NamedTuple):
    """One step of all environments: what was seen, drawn and returned."""

    observation: Tensor  # standardised, (envs, obs)
    chain: Tensor  # (T + 1, envs, act)
    log_prob: Tensor  # (T, envs)
    reward: Tensor  # scaled, (envs)
    next_observation: Tensor
    terminated: Tensor
    ended: Tensor
    valid: Tensor


class DPPO(BaseAgent):
    """The agent; see :mod:`rl.dppo` and :class:`~rl.base.BaseAgent`."""

    name = "dppo"
    config_type = DPPOConfig

    def build(self, weights: torch.Generator) -> None:
        """A diffusion policy, a value of states, and what scales rewards."""
        config: DPPOConfig = self.config
        self.policy = DiffusionPolicy(
            self.observation_dim,
            self.action_dim,
            config.make_schedule(),
            prediction=config.prediction,
            start_scale=config.start_scale,
            width=config.width,
            depth=config.depth,
            generator=weights,
        ).to(self.device)
        self.critic = EnsembleMLP(
            [self.observation_dim],
            1,
            width=config.width if config.critic_width is None else config.critic_width,
            depth=config.depth if config.critic_depth is None else config.critic_depth,
            layer_norm=config.critic_layer_norm,
            activation=config.critic_activation,
            generator=weights,
        ).to(self.device)
        self.policy_optimiser = self.adam(self.policy.parameters(), config.policy_lr)
        self.critic_optimiser = self.adam(self.critic.parameters(), config.critic_lr)
        self.return_moments = RunningMoments(1).to(self.device)
        levels = self.policy.sigmas.flip(0)  # highest first, the last one 0
        above, below = levels[:-1], levels[1:]
        self._levels = self.policy.schedule.sigmas()[:-1].tolist()
        ratio = below / above
        posterior = ratio * ((above - below) * (above + below)).sqrt()
        floor = config.min_std * torch.hypot(below, torch.ones_like(below))
        # Level, share of x_i in the mean, and width of each decision, (T).
        self._decisions = above, ratio.square(), torch.maximum(posterior, floor)
        self._clips = clip_range(config).to(self.device)
        self._start = torch.randn(1, self.action_dim, generator=weights).to(self.device)
        self._rows: list[_Row] = []
        self._return = torch.zeros(config.num_envs, device=self.device)
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ acting

    @torch.no_grad()
    def act(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Actions of the policy, whose chains are remembered until :meth:`observe`."""
        seen = self._standard(observation)
        chain, log_prob = self._draw(seen, self.acting_generator)
        self._pending = seen, chain, log_prob
        return chain[-1].clamp(-1.0, 1.0).cpu().numpy()

    @torch.no_grad()
    def explore(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """Actions of the policy."""
        return self._draw(observation, self.acting_generator)[0][-1].clamp(-1.0, 1.0)

    @torch.no_grad()
    def exploit(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The end of the chain of means, from a fixed start."""
        x, means = self._first(self._start.expand(len(observation), -1)), self._bound(observation)
        for i in range(self.config.num_steps):
            x = means(x, i)
        return x.clamp(-1.0, 1.0)

    def observe(self, step: Transition) -> None:
        """Put what came of the last actions to their chains."""
        if self._pending is None:  # it was not this agent that acted
            return
        observation, chain, log_prob = self._pending
        self._pending = None

        def tensor(x: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.asarray(x, np.float32)).to(self.device)

        reward, ended, valid = tensor(step.reward), tensor(step.ended), tensor(step.valid)
        if self.config.scale_rewards:
            if len(self._return) != len(reward):
                self._return = torch.zeros_like(reward)
            self._return.mul_(self.config.discount).add_(reward)
            self.return_moments.update(self._return.unsqueeze(-1))
            reward = reward / (self.return_moments.variance.float() + 1e-8).sqrt()
            self._return.mul_(1 - ended)
        after = self._standard(step.next_observation)
        self._rows.append(
            _Row(
                observation, chain, log_prob, reward, after, tensor(step.terminated), ended, valid
            )
        )

    # ------------------------------------------------------------------ decisions

    def _first(self, noise: Tensor) -> Tensor:
        return self._decisions[0][0] * self.config.start_scale * noise

    def _mean(self, x: Tensor, i: Tensor | int, observation: Tensor) -> Tensor:
        """The means of decisions i, one number or one for each row."""
        level, keep, _ = (part[i].expand(x.shape[:-1]) for part in self._decisions)
        denoised = inward_cut(self.policy.denoiser(x, level, observation))
        return torch.lerp(denoised, x, keep.unsqueeze(-1))

    def _bound(self, observation: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The means of decisions at some observations, without gradients."""
        denoise = self.policy.bind(observation)

        def mean(x: Tensor, i: int) -> Tensor:
            return torch.lerp(denoise(x, self._levels[i]), x, self._decisions[1][i])

        return mean

    def _log_prob(self, x: Tensor, mean: Tensor, i: Tensor | int) -> Tensor:
        """Log-densities of the outcomes x of decisions i."""
        std = self._decisions[2][i].expand(x.shape[:-1]).unsqueeze(-1)
        each = -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return each.clamp(-5.0, 2.0).mean(-1) if self.config.ratio == "mean" else each.sum(-1)

    def _draw(self, observation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Chains (T + 1, n, act) and the log-densities of their decisions (T, n)."""
        config: DPPOConfig = self.config
        shape = config.num_steps + 1, len(observation), self.action_dim
        noise = torch.randn(shape, device=self.device, generator=generator)
        noise = noise.clamp(-config.noise_clip, config.noise_clip)
        chain, log_probs, means = [self._first(noise[0])], [], self._bound(observation)
        for i in range(config.num_steps):
            mean = means(chain[-1], i)
            chain.append(mean + self._decisions[2][i] * noise[i + 1])
            log_probs.append(self._log_prob(chain[-1], mean, i))
        return torch.stack(chain), torch.stack(log_probs)

    # ------------------------------------------------------------------ learning

    def update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """Learn from a rollout where one is complete; the replay is not looked at."""
        held = len(self._rows) * (len(self._rows[0].reward) if self._rows else 0)
        if held < self.config.rollout_steps:
            return {}
        rollout = _Row(*(torch.stack(parts) for parts in zip(*self._rows, strict=True)))
        self._rows = []
        return self.learn(rollout)

    def learn(self, rollout: _Row) -> dict[str, Tensor]:
        """Epochs of gradient steps on the decisions of a rollout.

        Arguments:
            rollout: Rows along a first axis.

        Returns:
            Numbers for a log.
        """
        config: DPPOConfig = self.config
        with torch.no_grad():
            value = self._value(rollout.observation)
            advantage = advantages(
                rollout.reward,
                value,
                self._value(rollout.next_observation),
                rollout.terminated,
                rollout.ended,
                discount=config.discount,
                gae=config.gae,
            )
            target = advantage + value
            used = rollout.valid.flatten() > 0
            good = _standardised(advantage.flatten()[used], config.quantile)
        observation = rollout.observation.flatten(0, 1)[used]
        chain = rollout.chain.transpose(1, 2).flatten(0, 1)[used]  # (rows, T + 1, act)
        old = rollout.log_prob.transpose(1, 2).flatten(0, 1)[used]
        target = target.flatten()[used]
        numbers: dict[str, list[Tensor]] = {}
        for _ in range(config.epochs):
            n = len(observation) * config.num_steps
            order = torch.randperm(n, device=self.device, generator=self.generator)
            for places in order.split(config.batch_size):
                row, i = places // config.num_steps, places % config.num_steps
                loss, found = self.policy_loss(
                    observation[row], chain[row, i], chain[row, i + 1], i, old[row, i], good[row]
                )
                if found["kl_to_old"] > config.target_kl:
                    break  # and with it the rollout: the next epochs would stop here too
                self._step(loss, self.policy_optimiser)
                error = (self._value(observation[row]) - target[row]).square().mean()
                self._step(error, self.critic_optimiser)
                self.updates += 1
                found = {"policy_loss": loss.detach(), "critic_loss": error.detach(), **found}
                for name, number in found.items():
                    numbers.setdefault(name, []).append(number)
            else:
                continue
            break
        return {name: torch.stack(each).mean() for name, each in numbers.items()}

    def policy_loss(
        self,
        observation: Float[Tensor, "n obs"],
        before: Float[Tensor, "n act"],
        after: Float[Tensor, "n act"],
        i: Tensor,
        old: Float[Tensor, " n"],
        advantage: Float[Tensor, " n"],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped loss of some decisions, and numbers for a log.

        Arguments:
            observation: Standardised observations.
            before: Noisy actions that the decisions saw.
            after: What they drew.
            i: Their numbers, the noisiest 0, (n).
            old: Log-densities under the policy that drew.
            advantage: Advantages of their environment steps.
        """
        config: DPPOConfig = self.config
        log_ratio = self._log_prob(after, self._mean(before, i, observation), i) - old
        ratio = log_ratio.exp()
        weight = config.denoising_discount ** (config.num_steps - 1 - i) * advantage
        clip = self._clips[i]
        cut = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
        loss = torch.maximum(-weight * ratio, -weight * cut).mean()
        with torch.no_grad():
            divergence = (ratio - 1 - log_ratio).mean()
            outside = ((ratio - 1).abs() > clip).float().mean()
        return loss, {"kl_to_old": divergence, "clipped": outside}

    def _value(self, observation: Tensor) -> Tensor:
        return self.critic(observation)[0, ..., 0]

    def _step(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        loss.backward()
        if self.config.gradient_clip is not None:
            parameters = optimiser.param_groups[0]["params"]
            nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        optimiser.step()

    # ------------------------------------------------------------------ saving

    def extra_state(self) -> dict[str, Any]:
        """The start of evaluation's chain."""
        return {"start": self._start}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._start = state["start"].to(self.device)

    def state(self, *, training: bool = True) -> dict[str, Any]:
        """As the base class, with the rollout so far where training goes on."""
        state = super().state(training=training)
        if training:
            state["rollout"] = [row._asdict() for row in self._rows]
            state["returns"] = self._return
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state`."""
        super().load_state(state)
        self._pending = None
        rows = state.get("rollout", [])
        self._rows = [_Row(**{name: x.to(self.device) for name, x in row.items()}) for row in rows]
        if "returns" in state:
            self._return = state["returns"].to(self.device)

    def _modules(self) -> dict[str, nn.Module]:
        return {**super()._modules(), "return_moments": self.return_moments}


def _standardised(advantage: Tensor, quantile: float) -> Tensor:
    """Advantages of mean 0 and variance 1, cut to their quantiles."""
    good = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    if quantile == 0:
        return good
    ends = torch.quantile(good, good.new_tensor([quantile, 1 - quantile]))
    return good.clamp(ends[0], ends[1])
