r"""DPMD, diffusion policy mirror descent: tilt the policy by :math:`e^{Q/\lambda}`.

The next policy is the solution (2) of mirror descent,

.. math:: \pi_{\rm MD}(a | s) = \pi_{\rm old}(a | s)\, e^{Q(s, a)/\lambda} / Z(s),

fitted by the core's :func:`~rsm_sampler.losses.mirror_descent_loss` (13): denoising of the old
policy's own actions, weighted by :math:`e^{Q/\lambda}`.

By default some of the next states get N = 16 actions, of which the critic's target takes one: one
chain serves both. Weights are normalised within each state,
:math:`w_i = N\, \mathrm{softmax}_i\, Q(s, a_i)/\lambda`, so that they compare actions and not
states; and the divergence comes for free,

.. math:: D_{\rm KL}(\pi_{\rm MD} \| \pi_{\rm old}) \approx
          \log N + \sum_i \tfrac{w_i}{N} \log \tfrac{w_i}{N},

by which :math:`\lambda` is tuned to ``target_kl``, whatever the reward's scale.

With ``draws_per_state`` = 1, the algorithm as printed (preset ``"printed"``), the actions are
those of the critic's target and their values are standardised by running moments,
:math:`\tilde Q = (Q_{\min} - \mu_Q)/\sigma_Q` within :math:`\pm` ``clip``; :math:`\lambda` then
follows its rule from ``temperature`` to ``temperature_final``. States differ in value far more
than the actions of one state, so most of this weight goes to good states.

No policy ever acts in a terminal state: where one follows, the action is drawn at the state before
it. (The critic's target has no use for an action there.)

Note:
    The preset ``"official"`` follows the published code where that differs from the equations:
    values are standardised as :math:`Q - \mu_Q/\sigma_Q` (a slip of precedence, so that nearly all
    weights are the same), the temperature is the tuned :math:`\kappa`, critics take two Adam steps
    with each gradient, the action is a noisy best-of-32 that may leave the box, and terminal
    states take part.

References:
    | Efficient Online Reinforcement Learning for Diffusion Policy (Ma et al., 2025), algorithm 1
    | https://arxiv.org/abs/2502.00361
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rl.diffusion_agent import PUBLISHED, DiffusionAgent, DiffusionConfig
from rl.off_policy import NextAction, _slow_copy
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.losses import mirror_descent_loss, noise_weight

__all__ = ["DPMD", "DPMDConfig"]

Standardise = Literal["moments", "published", "none"]


@dataclass(frozen=True, kw_only=True)
class DPMDConfig(DiffusionConfig):
    """Configuration of :class:`DPMD`.

    Attributes:
        draws_per_state: Actions N of the old policy for each state.
        policy_states: States of a policy step with N > 1, the first next states of the batch.
        old_policy_period: Policy steps between copies of the policy into the old one; 0 for the
            policy itself. Only with N > 1.
        temperature: Lambda at the start, in units of standardised values (N = 1 with moments) or
            of scaled reward.
        temperature_final: What it tends to, by the paper's rule.
        temperature_rate: Share of the way in each policy step.
        temperature_lr: Rate of log lambda towards the target divergence.
        target_kl: With N > 1, the divergence in nats to which lambda is tuned; None for the
            paper's rule.
        standardise: With N = 1: by running ``"moments"``, as ``"published"``, or ``"none"``.
        moments_rate: Rate of the running moments.
        clip: Standardised values are cut to plus or minus this.
        temperature_is_kappa: Whether lambda is the tuned kappa, as published.
        terminal_states: Whether actions are drawn at terminal states too, as published.
        noise: As in the base class; by default a little, since a tilted policy only narrows.
        critic_layer_norm: As in the base class; on by default.
    """

    draws_per_state: int = 16
    policy_states: int = 16
    old_policy_period: int = 0
    temperature: float = 1.0
    temperature_final: float = 0.3
    temperature_rate: float = 3e-4
    temperature_lr: float = 0.01
    target_kl: float | None = 1.0
    standardise: Standardise = "moments"
    moments_rate: float = 1e-3
    clip: float = 3.0
    temperature_is_kappa: bool = False
    terminal_states: bool = False
    noise: float = 0.1
    critic_layer_norm: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        for name in ("draws_per_state", "policy_states"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.old_policy_period < 0:
            raise ValueError(f"old_policy_period must be at least 0, got {self.old_policy_period}")
        for name in ("temperature", "temperature_final", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("temperature_rate", "temperature_lr", "moments_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.standardise not in get_args(Standardise):
            raise ValueError(
                f"standardise must be one of {get_args(Standardise)}, got {self.standardise!r}"
            )
        if self.target_kl is not None and (self.draws_per_state < 2 or not self.target_kl > 0):
            raise ValueError(
                "target_kl must be positive, with draws_per_state above 1, got "
                f"{self.target_kl} with {self.draws_per_state}"
            )
        if self.target_kl is not None and self.target_kl >= math.log(self.draws_per_state):
            raise ValueError(
                "target_kl must be below log(draws_per_state) = "
                f"{math.log(self.draws_per_state):.2f}, got {self.target_kl}"
            )
        if self.temperature_is_kappa and self.kappa is None:
            raise ValueError("kappa must be given for temperature_is_kappa, got None")
        if self.draws_per_state > 1 and self.policy_states > self.batch_size:
            raise ValueError(
                f"policy_states must be at most batch_size {self.batch_size}, "
                f"got {self.policy_states}"
            )

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        official = {
            **PUBLISHED,
            "critic_steps": 2,
            "draws_per_state": 1,
            "target_kl": None,
            "standardise": "published",
            "temperature_is_kappa": True,
            "terminal_states": True,
        }
        return {
            "corrected": {},
            "printed": {
                "critic_layer_norm": False,
                "draws_per_state": 1,
                "target_kl": None,
                "temperature": 1.0,
                "temperature_final": 0.3,
            },
            "official": {**official, "schedule": "linear", "schedule_scale": 0.8},
            "icml2025": {**official, "kappa_entropy": -1.5},
        }


class DPMD(DiffusionAgent):
    """The agent; see :mod:`rl.dpmd` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "dpmd"
    config_type = DPMDConfig
    stackable = True

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        config: DPMDConfig = self.config
        self._log_temperature = torch.full(
            (), math.log(config.temperature), dtype=torch.float64, device=self.device
        )
        self._value_mean = torch.zeros((), device=self.device)
        self._value_std = torch.ones((), device=self.device)
        frozen = config.draws_per_state > 1 and config.old_policy_period > 0
        self.old_policy = _slow_copy(self.policy) if frozen else None

    @property
    def temperature(self) -> float:
        """Lambda."""
        return float(self._log_temperature.exp())

    def before_update(self, replay: ReplayBuffer) -> None:
        """Exploration noise, the old policy, and the temperature that is tied to the noise."""
        super().before_update(replay)
        config: DPMDConfig = self.config
        if config.temperature_is_kappa:
            self._log_temperature.fill_(math.log(self.kappa))
        steps = self.updates // config.policy_period
        on_step = (self.updates + 1) % config.policy_period == 0
        if self.old_policy is not None and on_step and steps % config.old_policy_period == 0:
            self.freeze()

    def freeze(self) -> None:
        """Make the policy the old one."""
        if self.old_policy is not None:
            self.old_policy.load_state_dict(self.policy.state_dict())

    def next_action(self, batch: Batch, with_policy: bool) -> NextAction:
        """Actions at the next states; before a policy step, several at the first of them."""
        config: DPMDConfig = self.config
        observation = self._states(batch)
        if config.draws_per_state == 1 or not with_policy:
            return super().next_action(batch, with_policy)
        n, more = config.policy_states, config.draws_per_state
        if self.old_policy is not None or config.target_candidates > 1:
            source = self.policy if self.old_policy is None else self.old_policy
            draws = source.sample(observation[:n], more, generator=self.generator)
            draws = self._perturbed(draws, self.generator)
            return super().next_action(batch, with_policy)._replace(draws=draws)
        again = observation[:n].repeat_interleave(more - 1, 0)
        both = torch.cat([observation, again])
        clean = self.policy.sample(both, 1, generator=self.generator)[:, 0]
        action = self._perturbed(clean, self.generator)
        first, rest = action[: len(observation)], action[len(observation) :]
        draws = torch.cat([first[:n].unsqueeze(1), rest.view(n, more - 1, -1)], 1)
        without_noise = None if action is clean else clean[: len(observation)]
        return NextAction(first, draws=draws, without_noise=without_noise)

    def _states(self, batch: Batch) -> Tensor:
        """Where actions are drawn; as published, terminal states too."""
        return batch.next_observation if self.config.terminal_states else super()._states(batch)

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (13) at the next states, with one action each or with N."""
        if drawn.draws is None:
            return self._loss_of_target_actions(batch, drawn.action)
        return self._loss_of_draws(batch, drawn.draws)

    def _loss_of_target_actions(
        self, batch: Batch, action: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config: DPMDConfig = self.config
        observation, n = self._states(batch), len(action)
        with torch.no_grad():
            value = self.critic.minimum(observation, action)
            spread = self._value_std + 1e-6
            if config.standardise == "moments":
                standard = ((value - self._value_mean) / spread).clamp(-config.clip, config.clip)
            elif config.standardise == "published":
                standard = (value - self._value_mean / spread).clamp(-config.clip, config.clip)
            else:
                standard = value
            log_weight = standard * self._log_temperature.neg().exp().to(standard.dtype)
            for moment, now in ((self._value_mean, value.mean()), (self._value_std, value.std())):
                moment += config.moments_rate * (now.to(moment.dtype) - moment)
        _, sigma = self._levels_of(n)
        loss = self._loss(action, sigma, log_weight, observation)
        weight = torch.softmax(log_weight, 0)
        ess = 1 / weight.square().sum() / n
        return loss, {"q_weight_ess": ess, "kl_to_old": _divergence(weight, n)}

    def _loss_of_draws(self, batch: Batch, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config: DPMDConfig = self.config
        states, draws, _ = action.shape
        observation = self._states(batch)[:states]
        with torch.no_grad():
            value = self.critic.minimum(observation.unsqueeze(1), action)
            weight = torch.softmax(value * self._log_temperature.neg().exp().to(value.dtype), -1)
            divergence = _divergence(weight, draws).mean()
            ess = (1 / weight.square().sum(-1)).mean() / draws
            if config.target_kl is not None:
                excess = (divergence / config.target_kl).clamp(min=1e-6).log().clamp(-1.0, 1.0)
                self._log_temperature += config.temperature_lr * excess
        flat = action.reshape(-1, self.action_dim)
        _, sigma = self._levels_of(len(flat))
        context = observation.repeat_interleave(draws, 0)
        loss = self._loss(flat, sigma, weight.reshape(-1).log(), context)
        return loss, {"q_weight_ess": ess, "kl_to_old": divergence}

    def _loss(
        self, action: Tensor, sigma: Tensor, log_weight: Tensor, observation: Tensor
    ) -> Tensor:
        config = self.config
        return mirror_descent_loss(
            self.policy.denoiser,
            action,
            sigma,
            log_weight,
            self_normalised=(config.standardise, config.prediction) != ("published", "noise"),
            context=observation,
            loss_weight=noise_weight if config.prediction == "noise" else None,
            generator=self.generator,
        ).mean()

    @torch.no_grad()
    def after_policy_step(self, batch: Batch, drawn: NextAction) -> dict[str, Tensor]:
        """A step of the temperature towards its final value."""
        config: DPMDConfig = self.config
        if not config.temperature_is_kappa and config.target_kl is None:
            temperature = self._log_temperature.exp()
            gap = temperature - config.temperature_final
            self._log_temperature.copy_((temperature - config.temperature_rate * gap).log())
        return {"temperature": self._log_temperature.exp()}

    def extra_state(self) -> dict[str, Any]:
        """Temperature and moments."""
        return {
            **super().extra_state(),
            "log_temperature": self._log_temperature,
            "value_mean": self._value_mean,
            "value_std": self._value_std,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back temperature and moments."""
        super().load_extra_state(state)
        self._log_temperature.copy_(state["log_temperature"])
        self._value_mean.copy_(state["value_mean"])
        self._value_std.copy_(state["value_std"])

    def _modules(self) -> dict[str, nn.Module]:
        modules = super()._modules()
        return modules if self.old_policy is None else {**modules, "old_policy": self.old_policy}


def _divergence(weight: Tensor, n: int) -> Tensor:
    """KL divergence of normalised weights from equal ones, in nats."""
    return math.log(n) + torch.xlogy(weight, weight).sum(-1)
