r"""DIPO: move stored actions uphill in Q, and fit the diffusion model to where they get.

Every transition of the replay has a second action :math:`a^+`, at first the one that was taken.
A policy step takes some of them, moves each by G steps of Adam on the pessimistic value,

.. math:: a^+ \leftarrow \mathrm{clip}\big(a^+ + \eta\, \mathrm{Adam}(\nabla_a \min_i Q_i(s, a^+)),
          -1, 1\big),

writes them back, and takes a step on the core's :func:`~rsm_sampler.losses.denoising_loss` (9) of
the moved actions,

.. math:: \ell = \lambda(\sigma)\, \| D_\theta(a^+ + \sigma \epsilon, \sigma, s) - a^+ \|^2 .

Each visit of a state thus begins where the last one ended, and the second actions of a replay
flow towards the maxima of Q while their number keeps every maximum that one of them began below.
Critics learn from the first actions, which stay what they were. :class:`SecondActions` holds the
others; they are part of a run's checkpoint.

Since such a policy only sharpens, it acts with a little noise.

Note:
    The presets ``"official"`` and ``"icml2025"`` follow the published codes: nothing is written
    back (there, by an assignment to a copy), so that each visit begins at the action of the replay
    again and makes 20 or 30 steps; the gradient of the whole batch is shortened before Adam, which
    is blind to its length but for rare jumps; the critic's target takes its action from slow
    copies; a single chain acts, without noise. Not reproduced: the first code's zero value at time
    limits, its Adam with :math:`\varepsilon = 10^{-5}`, and the ReLU of the second.

References:
    | Policy representation via diffusion probability model for reinforcement learning
    | (Yang et al., 2023)
    | https://arxiv.org/abs/2305.13122
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.critics import Critic, frozen
from rl.diffusion_agent import PUBLISHED, DiffusionAgent, DiffusionConfig
from rl.off_policy import Alone, NextAction
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.losses import denoising_loss, noise_weight
from rsm_sampler.target.gradients import value_and_gradient

__all__ = ["DIPO", "DIPOConfig", "SecondActions", "ascend"]


@dataclass(frozen=True, kw_only=True)
class DIPOConfig(DiffusionConfig):
    """Configuration of :class:`DIPO`.

    Attributes:
        policy_states: States of a policy step, drawn apart from the critics' batch.
        action_steps: Steps G of the ascent.
        action_lr: Adam's learning rate of actions, within the box [-1, 1].
        action_clip: Norm per dimension of an action to which the gradient of all actions together
            is shortened before Adam; None for not.
        write_back: Whether moved actions are kept.
    """

    num_steps: int = 10
    noise: float = 0.1
    policy_states: int = 128
    action_steps: int = 5
    action_lr: float = 0.03
    action_clip: float | None = None
    write_back: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        for name in ("policy_states", "action_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.action_lr < math.inf:
            raise ValueError(f"action_lr must be positive and finite, got {self.action_lr}")
        if self.action_clip is not None and not self.action_clip > 0:
            raise ValueError(f"action_clip must be positive or None, got {self.action_clip}")

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        published = {
            "num_steps": 100,
            "prediction": "noise",
            "target_from_average": True,
            "evaluation_candidates": 1,
            "noise": 0.0,
            "policy_states": 256,
            "write_back": False,
        }
        shared = ("count_warmup", "warmup_steps", "policy_lr_final", "start_scale")
        return {
            "corrected": {},
            "official": {
                **published,
                "action_steps": 20,
                "action_clip": 0.1,
                "gradient_clip": 2.0,
                "warmup_steps": 10_000,
                "policy_period": 1,
                "num_envs": 1,
                "updates_per_step": 1.0,
            },
            "icml2025": {
                **{name: PUBLISHED[name] for name in shared},
                **published,
                "schedule": "linear",
                "schedule_scale": 0.3,
                "action_steps": 30,
                "action_clip": 0.16,
                "target_period": 2,
            },
        }


class SecondActions:
    """Actions beside those of a replay, one for each transition, that may change.

    Arguments:
        replay: The replay.

    Example:
        >>> replay = ReplayBuffer(4, 1, 1)
        >>> one = torch.ones(3)
        >>> replay.add(Batch(*[one[:, None] if i in (0, 1, 3) else one for i in range(6)]))
        >>> second = SecondActions(replay)
        >>> second.follow()
        >>> second.put(torch.tensor([1]), torch.tensor([[0.5]]))
        >>> second.actions[:3, 0], replay.all().action[:, 0]
        (tensor([1.0000, 0.5000, 1.0000]), tensor([1., 1., 1.]))
    """

    def __init__(self, replay: ReplayBuffer) -> None:
        self.replay = replay
        self.actions = torch.zeros_like(replay.actions)
        self.count = 0

    def follow(self) -> None:
        """Take in the transitions that the replay was given since the last call."""
        replay = self.replay
        begin = max(self.count, replay.count - replay.capacity)
        if begin < replay.count:
            places = torch.arange(begin, replay.count, device=self.actions.device)
            places %= replay.capacity
            self.actions[places] = replay.actions[places].clamp(-1.0, 1.0)
        self.count = replay.count

    def put(self, places: Int[Tensor, " n"], action: Float[Tensor, "n act"]) -> None:
        """Replace some actions.

        Arguments:
            places: Their places in the replay's ring. What stands twice must get one action.
            action: The new ones.
        """
        self.actions[places] = action

    def state(self) -> dict[str, Any]:
        """The actions in use, and the number of transitions they belong to."""
        return {"actions": self.actions[: self.count], "count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state`, if it can belong to transitions of this replay."""
        count, capacity = state["count"], self.replay.capacity
        if count > self.replay.count or len(state["actions"]) != min(count, capacity):
            return
        self.actions[: len(state["actions"])] = state["actions"].to(self.actions)
        self.count = state["count"]


def ascend(
    critic: Critic,
    observation: Float[Tensor, "n obs"],
    action: Float[Tensor, "n act"],
    *,
    steps: int,
    lr: float,
    clip: float | None = None,
) -> Float[Tensor, "n act"]:
    """Actions moved uphill in the smallest value by Adam, each on its own, within the box.

    Arguments:
        critic: Whose values rise.
        observation: Observations.
        action: Where to begin, within [-1, 1].
        steps: Number of steps.
        lr: Adam's learning rate.
        clip: Norm per dimension to which the gradient of all actions together is shortened; None
            for not.
    """
    x = action.detach()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    with frozen(critic):
        for i in range(1, steps + 1):
            _, gradient = value_and_gradient(partial(critic.minimum, observation), x)
            if clip is not None:
                gradient = gradient * (clip * x.shape[-1] / (gradient.norm() + 1e-6)).clamp(max=1)
            first = torch.lerp(gradient, first, 0.9)
            second = torch.lerp(gradient.square(), second, 0.999)
            root = (second / (1 - 0.999**i)).sqrt() + 1e-8
            x = (x + lr / (1 - 0.9**i) * first / root).clamp(-1.0, 1.0)
    return x


class DIPO(DiffusionAgent):
    """The agent; see :mod:`rl.dipo` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "dipo"
    config_type = DIPOConfig
    stackable = True

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        self._second: SecondActions | None = None
        self._kept: dict[str, Any] | None = None

    def before_update(self, replay: ReplayBuffer) -> None:
        """Second actions for what is new in the replay; see the base class."""
        super().before_update(replay)
        if self._second is None or self._second.replay is not replay:
            self._captured.clear()  # graphs know the second actions by their address
            self._second = SecondActions(replay)
            kept, self._kept = self._kept, None
            if kept is not None:
                self._second.load_state(kept)
        self._second.follow()

    def policy_batch(self, batch: Batch, runner: Alone) -> tuple[Batch, dict[str, Tensor]]:
        """Other transitions of the replay, whose second actions have been moved uphill."""
        found = runner.each(self, "visit")
        assert found is not None
        places, *columns = found
        moved, metrics = runner.call(self._uphill, Batch(*columns))
        if self.config.write_back:
            runner.each(self, "keep", places, moved.action)
        return moved, metrics

    def visit(self) -> tuple[Tensor, ...]:
        """Places of some transitions, and the transitions with their second actions."""
        second = self._second
        assert second is not None
        places = second.replay.places(self.config.policy_states, generator=self.generator)
        return places, *second.replay.at(places)._replace(action=second.actions[places])

    def keep(self, places: Int[Tensor, " n"], action: Float[Tensor, "n act"]) -> None:
        """Replace second actions; see :meth:`SecondActions.put`."""
        assert self._second is not None
        self._second.put(places, action)

    def _uphill(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        config: DIPOConfig = self.config
        batch = self.standardised(batch)
        moved = ascend(
            self.critic,
            batch.observation,
            batch.action,
            steps=config.action_steps,
            lr=config.action_lr,
            clip=config.action_clip,
        )
        step = (moved - batch.action).norm(dim=-1).mean()
        return batch._replace(action=moved), {"action_step": step}

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising (9) of actions that have been moved uphill."""
        _, sigma = self._levels_of(len(batch.action))
        loss = denoising_loss(
            self.policy.denoiser,
            batch.action,
            sigma,
            context=batch.observation,
            loss_weight=noise_weight if self.config.prediction == "noise" else None,
            generator=self.generator,
        )
        return loss.mean(), {}

    def release(self) -> None:
        """Let go of the replay; the second actions stay for it."""
        super().release()
        if self._second is not None:
            self._kept = self._second.state()
        self._second = None

    def state(self, *, training: bool = True) -> dict[str, Any]:
        """As the base class, with the second actions where training goes on."""
        state = super().state(training=training)
        kept = self._kept if self._second is None else self._second.state()
        if training and kept is not None:
            state["second_actions"] = kept
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state`."""
        super().load_state(state)
        self._second = None
        self._kept = state.get("second_actions")
