r"""QVPO, Q-weighted variational policy optimisation: fit the best of one's own actions.

The objective :math:`\mathbb E_{a \sim \pi_{\rm old}}[w(s, a) \log p_\theta(a | s)]` with weights
:math:`w \ge 0` made of Q is replaced by its variational bound, weighted denoising: the core's
:func:`~rsm_sampler.losses.mirror_descent_loss` (13) with other weights than :math:`e^{Q/\lambda}`.
For each state of a policy step

1. the policy draws N actions :math:`a_i`; the best one, :math:`a^*`, is kept;
2. its weight is what it is worth beyond the mean,

   .. math:: w = \max\Big(Q_{\min}(s, a^*) - \tfrac1N \sum_i Q_{\min}(s, a_i),\, 0\Big);

3. U uniform actions of the box get the weight :math:`c\, w / U` each, so that the policy keeps
   some width: c is the share of the uniform law in what is fitted, and falls linearly from
   ``uniform_share`` to ``uniform_share_final``.

The loss is the mean of :math:`w\, \lambda(\sigma)\, \|D_\theta(a + \sigma\epsilon, \sigma, s) -
a\|^2` over both. By default the weights are divided by their mean over the batch: the step then
does not grow with the spread of Q, and the reward's scale does not matter.

Note:
    The presets follow the published codes, whose uniform actions have the weight :math:`c\, w`
    each (``uniform_share`` is then U times their c), and whose weights are not normalised.
    ``"icml2025"`` is a comparison with three slips, of which two are reproduced: weights are
    :math:`Q_{\min}\, \mathbf 1[Q_{\min} > 1]`, so that tasks of negative return teach nothing, and
    the states of the uniform actions are the observations' single numbers, shuffled. Weights are
    detached here, which they are not there: their gradient, through the sampling chains, pushes
    the value of the chosen action down. The first code's zero value at time limits is not
    reproduced either, nor are the ReLU of the second and its decay in environment steps: c falls
    with the number of updates.

References:
    | Diffusion-based reinforcement learning via Q-weighted variational policy optimization
    | (Ding et al., 2024)
    | https://arxiv.org/abs/2405.16173
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rl.diffusion_agent import PUBLISHED, DiffusionAgent, DiffusionConfig
from rl.off_policy import NextAction
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.losses import mirror_descent_loss, noise_weight

__all__ = ["QVPO", "QVPOConfig"]

Weighting = Literal["advantage", "value"]


@dataclass(frozen=True, kw_only=True)
class QVPOConfig(DiffusionConfig):
    """Configuration of :class:`QVPO`.

    Attributes:
        draws_per_state: Actions N of the policy, of which the best one is fitted.
        policy_states: States of a policy step, the first of the batch.
        weighting: The ``"advantage"`` of the best action over the mean of all, or its ``"value"``
            where that is above 1.
        normalise: Whether the weights are divided by their mean over the batch.
        uniform_actions: Uniform actions U of each state; 0 for none.
        uniform_share: Weight c of all of them together, in units of the best action's.
        uniform_share_final: Where c ends.
        uniform_share_updates: Updates over which it falls.
        shuffled_states: Whether the states of uniform actions are made of shuffled numbers, a
            slip.
    """

    num_steps: int = 10
    noise: float = 0.1
    draws_per_state: int = 16
    policy_states: int = 32
    weighting: Weighting = "advantage"
    normalise: bool = True
    uniform_actions: int = 2
    uniform_share: float = 0.1
    uniform_share_final: float = 0.02
    uniform_share_updates: int = 100_000
    shuffled_states: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        for name in ("draws_per_state", "uniform_share_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.policy_states <= self.batch_size:
            raise ValueError(
                f"policy_states must be from 1 to batch_size {self.batch_size}, "
                f"got {self.policy_states}"
            )
        if self.weighting not in get_args(Weighting):
            raise ValueError(
                f"weighting must be one of {get_args(Weighting)}, got {self.weighting!r}"
            )
        if self.weighting == "advantage" and self.draws_per_state < 2:
            raise ValueError(
                "draws_per_state must be at least 2 for the weighting 'advantage', "
                f"got {self.draws_per_state}"
            )
        if self.uniform_actions < 0:
            raise ValueError(f"uniform_actions must be at least 0, got {self.uniform_actions}")
        for name in ("uniform_share", "uniform_share_final"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}"
                )

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        published = {
            "num_steps": 20,
            "prediction": "noise",
            "noise": 0.0,
            "evaluation_candidates": 32,
            "policy_states": 256,
            "normalise": False,
            "uniform_actions": 10,
            "uniform_share": 0.2,
            "uniform_share_final": 0.02,
        }
        shared = ("count_warmup", "warmup_steps", "policy_lr_final", "start_scale", "reward_scale")
        return {
            "corrected": {},
            "official": {
                **published,
                "policy_lr": 1e-4,
                "gradient_clip": 2.0,
                "target_from_average": True,
                "behaviour_candidates": 4,
                "target_candidates": 4,
                "draws_per_state": 64,
                "uniform_share_updates": 1_000_000,
                "policy_period": 1,
                "num_envs": 1,
                "updates_per_step": 1.0,
            },
            "icml2025": {
                **{name: PUBLISHED[name] for name in shared},
                **published,
                "schedule": "linear",
                "schedule_scale": 0.3,
                "target_period": 2,
                "behaviour_candidates": 32,
                "target_candidates": 32,
                "draws_per_state": 32,
                "weighting": "value",
                "uniform_share_updates": 200_000,
                "shuffled_states": True,
            },
        }


class QVPO(DiffusionAgent):
    """The agent; see :mod:`rl.qvpo` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "qvpo"
    config_type = QVPOConfig
    stackable = True

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        self._share = torch.full((), float(self.config.uniform_share), device=self.device)

    def before_update(self, replay: ReplayBuffer) -> None:
        """The share of the uniform law."""
        super().before_update(replay)
        config: QVPOConfig = self.config
        done = min(1.0, self.updates / config.uniform_share_updates)
        fall = config.uniform_share_final - config.uniform_share
        self._share.fill_(config.uniform_share + done * fall)

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted denoising of the best actions and of uniform ones, at the batch's states."""
        config: QVPOConfig = self.config
        observation = batch.observation[: config.policy_states]
        best, weight = self._best(observation)
        action, context, weights = best, observation, weight
        if config.uniform_actions > 0:
            uniform, states = self._uniform(observation)
            share = (self._share / config.uniform_actions).to(weight.dtype)
            action = torch.cat([best, uniform])
            context = torch.cat([observation, states])
            weights = torch.cat([weight, share * weight.repeat(config.uniform_actions)])
        _, sigma = self._levels_of(len(action))
        loss = mirror_descent_loss(
            self.policy.denoiser,
            action,
            sigma,
            weights.log(),
            self_normalised=config.normalise,
            context=context,
            loss_weight=noise_weight if config.prediction == "noise" else None,
            generator=self.generator,
        )
        share_used = (weight > 0).to(weight.dtype).mean()
        return loss.mean(), {"q_weight": weight.mean(), "q_weight_positive": share_used}

    @torch.no_grad()
    def _best(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """The best of N draws at each state, and its weight."""
        config: QVPOConfig = self.config
        draws = self.policy.sample(observation, config.draws_per_state, generator=self.generator)
        values = self.critic.minimum(observation.unsqueeze(1), draws)
        value, place = values.max(1)
        index = place.view(-1, 1, 1).expand(-1, 1, self.action_dim)
        if config.weighting == "advantage":
            weight = (value - values.mean(1)).clamp(min=0)
        else:
            weight = torch.where(value > 1, value, torch.zeros_like(value))
        return draws.gather(1, index).squeeze(1), weight

    def _uniform(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform actions and the states they are fitted at, all states U times in a row."""
        config: QVPOConfig = self.config
        states = observation.repeat(config.uniform_actions, 1)
        options: dict[str, Any] = {
            "dtype": observation.dtype,
            "device": observation.device,
            "generator": self.generator,
        }
        action = 2 * torch.rand(len(states), self.action_dim, **options) - 1
        if config.shuffled_states:
            order = torch.rand(states.numel(), **options).argsort()
            states = states.flatten()[order].view_as(states)
        return action, states
