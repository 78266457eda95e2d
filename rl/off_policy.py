r"""What all off-policy agents share: critics, their target, acting, the order of an update.

One update takes a batch of transitions :math:`(s, a, r, s', d, m)` and

1. draws :math:`a' \sim \pi(\cdot | s')` and moves the critics towards
   :math:`y = c_r r + \gamma^m (1 - d) \min_i \bar Q_i(s', a')` (28), m = 1 but for ``n_step``;
2. every ``policy_period`` updates takes a step on the agent's policy loss;
3. moves the slow copies, :math:`\bar\theta \leftarrow \bar\theta + \tau (\theta - \bar\theta)`.

An agent adds its policy network and the loss. Nothing in an update reads a value back to the
host: on a GPU it is captured as a graph.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl.base import BaseAgent, set_lr
from rl.critics import Critic
from rl.graphs import Captured
from rl.replay import Batch, ReplayBuffer

__all__ = ["Alone", "NextAction", "OffPolicyAgent"]


class NextAction(NamedTuple):
    """What an agent draws at the next states.

    Attributes:
        action: Actions for the critic's target, (n, action_dim).
        entropy_cost: What their values lose to entropy, (n) or a number.
        draws: Several actions of some of these states for the policy's loss, (states, draws,
            action_dim); None where that loss needs none.
        without_noise: The actions before noise was added to them; None where none was.
    """

    action: Tensor
    entropy_cost: Tensor | float = 0.0
    draws: Tensor | None = None
    without_noise: Tensor | None = None

    @property
    def of_policy(self) -> Tensor:
        """The actions as the policy drew them, (n, action_dim)."""
        return self.action if self.without_noise is None else self.without_noise


class Alone:
    """How one agent's update runs: its own losses, its own parameters."""

    def call(self, part: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
        """A part of an update.

        Arguments:
            part: A method of the agent.
            *arguments: Tensors, in tuples and dictionaries.
        """
        return part(*arguments)

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """The parameters of one of the agent's networks."""
        return list(module.parameters())

    def each(
        self, agent: "OffPolicyAgent", method: str, *arguments: Tensor
    ) -> tuple[Tensor, ...] | None:
        """What an agent does with what it keeps to itself.

        Arguments:
            agent: The agent.
            method: Name of its method, which returns tensors or None.
            *arguments: Its arguments.
        """
        return getattr(agent, method)(*arguments)

    def clip(self, parameters: list[Tensor], limit: float) -> None:
        """Shorten a gradient that is longer than a limit."""
        nn.utils.clip_grad_norm_(parameters, limit)


class OffPolicyAgent(BaseAgent):
    """Base of the off-policy agents; for the arguments see :class:`~rl.base.BaseAgent`."""

    critic: Critic

    def build(self, weights: torch.Generator) -> None:
        """Critics, their slow copies, and the policy."""
        config = self.config
        kind = self.critic_type()
        self.critic = kind(
            self.observation_dim,
            self.action_dim,
            width=config.width if config.critic_width is None else config.critic_width,
            depth=config.depth if config.critic_depth is None else config.critic_depth,
            layer_norm=config.critic_layer_norm,
            activation=config.critic_activation,
            generator=weights,
        ).to(self.device)
        self.target_critic = _slow_copy(self.critic)
        self.policy = self.build_policy(weights).to(self.device)
        self.critic_optimiser = self.adam(self.critic.parameters(), config.critic_lr)
        self.policy_optimiser = self.adam(self.policy.parameters(), config.policy_lr)

    # ------------------------------------------------------------------ what an agent adds

    @abstractmethod
    def build_policy(self, generator: torch.Generator) -> nn.Module:
        """The policy's network."""

    def critic_type(self) -> type[Critic]:
        """The kind of critics."""
        return Critic

    @abstractmethod
    def next_action(self, batch: Batch, with_policy: bool) -> NextAction:
        """Actions at the next states.

        Arguments:
            batch: Transitions with standardised observations.
            with_policy: Whether a policy step follows.
        """

    @abstractmethod
    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a policy step, and numbers worth a log line.

        Arguments:
            batch: What :meth:`policy_batch` returned.
            drawn: What was drawn at the next states.
        """

    def policy_batch(self, batch: Batch, runner: Alone) -> tuple[Batch, dict[str, Tensor]]:
        """What a policy step learns from, and numbers for a log: by default the critics' batch.

        Arguments:
            batch: Transitions with standardised observations.
            runner: How parts of an update are evaluated.
        """
        return batch, {}

    def critic_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, Tensor]:
        """The loss (28) of a critic step, and all members' values of the batch, (members, n).

        Arguments:
            batch: Transitions with standardised observations.
            drawn: What was drawn at the next states.
        """
        config = self.config
        with torch.no_grad():
            future = self.target_critic.minimum(batch.next_observation, drawn.action)
            alive = config.discount**batch.span * (1 - batch.terminated)
            target = config.reward_scale * batch.reward + alive * (future - drawn.entropy_cost)
        values = self.critic.values(batch.observation, batch.action)
        return (values - target).square().mean(-1).sum(), values

    def after_policy_step(self, batch: Batch, drawn: NextAction) -> dict[str, Tensor]:
        """What is tuned after a policy step, a temperature for example."""
        return {}

    def before_update(self, replay: ReplayBuffer) -> None:
        """Host-side schedules, written to tensors of the device.

        Arguments:
            replay: The replay.
        """

    def after_update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """What is done now and then, outside of what a graph captures; numbers for a log.

        Arguments:
            replay: The replay.
        """
        return {}

    def slow_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Slow copies and what they follow."""
        return [(self.target_critic, self.critic)]

    # ------------------------------------------------------------------ updating

    def update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """One update on a batch from the replay.

        Returns:
            Numbers for a log, as tensors without axes: reading them makes the host wait.
        """
        with_policy, with_target = self.begin_update(replay)
        key = (id(replay), with_policy, with_target)
        if key not in self._captured:
            self._captured[key] = Captured(
                partial(self._update, replay, with_policy, with_target),
                self.device,
                [self.generator],
            )
        self.updates += 1
        return {**self._captured[key](), **self.after_update(replay)}

    def begin_update(self, replay: ReplayBuffer) -> tuple[bool, bool]:
        """The host's part: schedules and learning rate.

        Arguments:
            replay: The replay.

        Returns:
            Whether this update takes a step of the policy, and one of the slow copies.
        """
        config = self.config
        self.before_update(replay)
        with_policy = (self.updates + 1) % config.policy_period == 0
        if with_policy:
            set_lr(self.policy_optimiser, self.policy_lr)
        return with_policy, (self.updates + 1) % config.target_period == 0

    @property
    def policy_lr(self) -> float:
        """The policy's learning rate, by the number of updates."""
        config = self.config
        step = self.updates // config.policy_period - config.policy_lr_hold
        fraction = min(1.0, max(0.0, step / config.policy_lr_decay))
        final = config.policy_lr if config.policy_lr_final is None else config.policy_lr_final
        return config.policy_lr + fraction * (final - config.policy_lr)

    def _update(
        self, replay: ReplayBuffer, with_policy: bool, with_target: bool
    ) -> dict[str, Tensor]:
        batch = replay.sample(self.config.batch_size, generator=self.generator)
        return self.learn(batch, with_policy, with_target, Alone())

    def learn(
        self, batch: Batch, with_policy: bool, with_target: bool, runner: "Alone"
    ) -> dict[str, Tensor]:
        """The device's part of an update.

        Arguments:
            batch: Transitions with raw observations.
            with_policy: Whether to take a step of the policy.
            with_target: Whether to take one of the slow copies.
            runner: How losses are evaluated, and where parameters are; see
                :mod:`rl.lockstep` for many agents at once.

        Returns:
            Numbers for a log.
        """
        config = self.config
        batch, drawn, loss, metrics = runner.call(partial(self._critic_part, with_policy), batch)
        self._step(loss, self.critic_optimiser, runner)
        if with_policy:
            learned, more = self.policy_batch(batch, runner)
            loss, others = runner.call(self._policy_part, learned, drawn)
            self._step(loss, self.policy_optimiser, runner)
            metrics = metrics | more | others | runner.call(self._tuning_part, batch, drawn)
        for _ in range(config.critic_steps - 1):
            self.critic_optimiser.step()
        if with_target:
            with torch.no_grad():
                for slow, fast in self.slow_pairs():
                    torch._foreach_lerp_(
                        runner.parameters(slow), runner.parameters(fast), config.polyak
                    )
        return metrics

    def _critic_part(
        self, with_policy: bool, batch: Batch
    ) -> tuple[Batch, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Standardised transitions, what was drawn, the critic's loss and numbers for a log."""
        batch = self.standardised(batch)
        with torch.no_grad():
            drawn = self.next_action(batch, with_policy)
        loss, values = self.critic_loss(batch, drawn)
        detached = values.detach()
        metrics = {
            "critic_loss": loss.detach(),
            "value": detached.mean(),
            "value_gap": (detached[0] - detached[-1]).abs().mean(),
            "share_at_bounds": (drawn.action.abs() > 0.999).float().mean(),
        }
        kept = {name: x for name, x in drawn._asdict().items() if isinstance(x, Tensor)}
        return batch, kept, loss, metrics

    def standardised(self, batch: Batch) -> Batch:
        """Transitions with standardised observations, of raw ones."""
        return batch._replace(
            observation=self._standardised(batch.observation),
            next_observation=self._standardised(batch.next_observation),
        )

    def _policy_part(
        self, batch: Batch, drawn: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.policy_loss(batch, NextAction(**drawn))
        return loss, {"policy_loss": loss.detach(), **metrics}

    def _tuning_part(self, batch: Batch, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.after_policy_step(batch, NextAction(**drawn))

    def _step(self, loss: Tensor, optimiser: torch.optim.Optimizer, runner: "Alone") -> None:
        """A step down the loss, with the gradient cut to ``gradient_clip``."""
        parameters = optimiser.param_groups[0]["params"]
        optimiser.zero_grad()
        loss.sum().backward(inputs=parameters)
        if self.config.gradient_clip is not None:
            runner.clip(parameters, self.config.gradient_clip)
        optimiser.step()

    # ------------------------------------------------------------------ saving

    def _modules(self) -> dict[str, nn.Module]:
        modules = super()._modules()
        return {"critic": modules.pop("critic"), "target_critic": self.target_critic, **modules}


def _slow_copy(module: nn.Module) -> Any:  # noqa: ANN401
    slow = copy.deepcopy(module)
    slow.requires_grad_(False)
    return slow
