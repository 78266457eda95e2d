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
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from rl.config import AgentConfig
from rl.critics import Critic
from rl.graphs import Captured
from rl.replay import Batch, ReplayBuffer
from rsm_sampler import checkpoint

__all__ = ["Alone", "NextAction", "OffPolicyAgent", "RunningMoments", "set_lr"]

_KIND, _VERSION = "agent", 1
# Copies that only training needs, and what they are copies of.
_COPIES = {"target_critic": "critic", "old_policy": "policy", "target_policy": "policy"}
_LARGE_BLOCK = 31 << 20  # bytes; glibc follows up to 32 MiB
_A = TypeVar("_A", bound="OffPolicyAgent")


class NextAction(NamedTuple):
    """What an agent draws at the next states.

    Attributes:
        action: Actions for the critic's target, (n, action_dim).
        entropy_cost: What their values lose to entropy, (n) or a number.
        draws: Several actions of some of these states for the policy's loss, (states, draws,
            action_dim); None where that loss needs none.
    """

    action: Tensor
    entropy_cost: Tensor | float = 0.0
    draws: Tensor | None = None


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

    def clip(self, parameters: list[Tensor], limit: float) -> None:
        """Shorten a gradient that is longer than a limit."""
        nn.utils.clip_grad_norm_(parameters, limit)


class RunningMoments(nn.Module):
    """Mean and variance of all observations so far, to standardise them.

    Arguments:
        dim: Length of an observation.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Float[Tensor, "n dim"]) -> None:
        """Take in more observations."""
        x, n = x.double(), len(x)
        total = self.count + n
        shift = x.mean(0) - self.mean
        between = shift.square() * (self.count * n / total)
        spread = self.variance * self.count + x.var(0, correction=0) * n + between
        self.mean.add_(shift * (n / total))
        self.variance.copy_(spread / total)
        self.count.copy_(total)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Observations in standard deviations from the mean, within 10."""
        y = (x - self.mean) / (self.variance + 1e-8).sqrt()
        return y.to(x.dtype).clamp(-10.0, 10.0)


class OffPolicyAgent(ABC):
    """Base of the agents.

    Arguments:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        config: The agent's configuration; its default if None.
        seed: Decides initial weights and every random number.
        device: ``"auto"`` takes a GPU where there is one.
        low: Lower ends of the environment's actions, for :meth:`predict`; -1 if None.
        high: Upper ends; 1 if None.
        env: Name of the environment, for messages.

    Raises:
        ValueError: If an argument does not fit.

    Attributes:
        updates: Number of updates so far.
        interrupted: Whether Ctrl-C ended the training.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[AgentConfig]]
    # Whether torch.vmap maps an update's parts over agents; see rl.lockstep.
    stackable: ClassVar[bool] = False

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        config: AgentConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "auto",
        low: ArrayLike | None = None,
        high: ArrayLike | None = None,
        env: str = "",
    ) -> None:
        config = self.config_type() if config is None else config
        if type(config) is not self.config_type:
            raise ValueError(
                f"config must be a {self.config_type.__name__}, got {type(config).__name__}"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.config: Any = config
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.seed, self.env, self.updates = seed, env, 0
        self.interrupted = False
        one = np.ones(action_dim)
        self.low = -one if low is None else np.asarray(low, np.float64)
        self.high = one if high is None else np.asarray(high, np.float64)
        weights = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed + 1)
        self.acting_generator = torch.Generator(self.device).manual_seed(seed + 2)
        self.moments = RunningMoments(observation_dim).to(self.device)
        kind = self.critic_type()
        self.critic = kind(
            observation_dim,
            action_dim,
            width=config.width if config.critic_width is None else config.critic_width,
            depth=config.depth if config.critic_depth is None else config.critic_depth,
            layer_norm=config.critic_layer_norm,
            generator=weights,
        ).to(self.device)
        self.target_critic = _slow_copy(self.critic)
        self.policy = self.build_policy(weights).to(self.device)
        self.critic_optimiser = self.adam(self.critic.parameters(), config.critic_lr)
        self.policy_optimiser = self.adam(self.policy.parameters(), config.policy_lr)
        if self.device.type == "cpu":
            # The C library gives blocks above a threshold back to the system when they are freed,
            # and every layer would fault its pages in anew, at twice the cost of its arithmetic.
            # Freeing one large block (it is never written to) raises the threshold to its size.
            torch.empty(_LARGE_BLOCK, dtype=torch.uint8)
        self._captured: dict[tuple[Any, ...], Captured] = {}
        self._inputs: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ what an agent adds

    @abstractmethod
    def build_policy(self, generator: torch.Generator) -> nn.Module:
        """The policy's network."""

    def critic_type(self) -> type[Critic]:
        """The kind of critics."""
        return Critic

    @abstractmethod
    def explore(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """Actions to act with, for standardised observations, from ``acting_generator``."""

    @abstractmethod
    def exploit(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The same action for the same standardised observation, every time."""

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
            batch: Transitions with standardised observations.
            drawn: What was drawn at the next states.
        """

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

    def before_update(self) -> None:  # noqa: B027
        """Host-side schedules, written to tensors of the device."""

    def extra_state(self) -> dict[str, Any]:
        """Tensors and plain values besides networks, optimisers and generators."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back :meth:`extra_state`."""

    def slow_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Slow copies and what they follow."""
        return [(self.target_critic, self.critic)]

    # ------------------------------------------------------------------ acting

    @torch.no_grad()
    def act(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Exploring actions within or about [-1, 1], for a batch of raw observations."""
        key = ("act", len(observation))
        if key not in self._captured:
            buffer = torch.empty(observation.shape, device=self.device)
            self._inputs[len(observation)] = buffer
            self._captured[key] = Captured(
                lambda: self.explore(self._standardised(buffer)),
                self.device,
                [self.acting_generator],
            )
        self._inputs[len(observation)].copy_(torch.from_numpy(observation))
        return self._captured[key]().cpu().numpy()

    @torch.no_grad()
    def predict(
        self, observation: ArrayLike, deterministic: bool = False
    ) -> tuple[NDArray[np.float32], None]:
        """Actions in the environment's units.

        Arguments:
            observation: One observation or a batch.
            deterministic: Whether to exploit: the same action for the same observation.

        Returns:
            The action or actions, within the environment's bounds, and None (for the state that
            recurrent policies have in other libraries).

        Raises:
            ValueError: If the observation has another length.
        """
        observation = np.asarray(observation, np.float32)
        if observation.ndim not in (1, 2) or observation.shape[-1] != self.observation_dim:
            raise ValueError(
                f"observation must have length {self.observation_dim}, got shape "
                f"{observation.shape}"
            )
        standard = self._standard(np.atleast_2d(observation))
        action = (self.exploit if deterministic else self.explore)(standard)
        unit = action.clamp(-1.0, 1.0).cpu().numpy().astype(np.float64)
        scaled = self.low + 0.5 * (unit + 1) * (self.high - self.low)
        return scaled.reshape(*observation.shape[:-1], -1).astype(np.float32), None

    def _standard(self, observation: NDArray[np.float32]) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(observation, np.float32)).to(self.device)
        return self._standardised(x)

    def _standardised(self, x: Tensor) -> Tensor:
        return self.moments(x) if self.config.normalise_observations else x

    # ------------------------------------------------------------------ updating

    def update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """One update on a batch from the replay.

        Returns:
            Numbers for a log, as tensors without axes: reading them makes the host wait.
        """
        with_policy, with_target = self.begin_update()
        key = (id(replay), with_policy, with_target)
        if key not in self._captured:
            self._captured[key] = Captured(
                partial(self._update, replay, with_policy, with_target),
                self.device,
                [self.generator],
            )
        self.updates += 1
        return self._captured[key]()

    def begin_update(self) -> tuple[bool, bool]:
        """The host's part: schedules and learning rate.

        Returns:
            Whether this update takes a step of the policy, and one of the slow copies.
        """
        config = self.config
        self.before_update()
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

    def release(self) -> None:
        """Let go of the replay and of captured graphs; a later update makes them anew."""
        self._captured.clear()
        self._inputs.clear()

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
            loss, more = runner.call(self._policy_part, batch, drawn)
            self._step(loss, self.policy_optimiser, runner)
            metrics = metrics | more | runner.call(self._tuning_part, batch, drawn)
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
        batch = batch._replace(
            observation=self._standardised(batch.observation),
            next_observation=self._standardised(batch.next_observation),
        )
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

    def adam(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
        """An optimiser of parameters on the agent's device.

        Arguments:
            parameters: The parameters.
            lr: Learning rate; graphs read it on the device.
        """
        cuda = self.device.type == "cuda"
        rate = torch.tensor(lr, device=self.device) if cuda else lr
        return torch.optim.Adam(parameters, lr=rate, fused=True, capturable=cuda)

    # ------------------------------------------------------------------ saving

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what acting needs, without optimisers, slow copies that do not act, and replay."""
        checkpoint.save(path, self.state(training=False), kind=_KIND, version=_VERSION)

    def state(self, *, training: bool = True) -> dict[str, Any]:
        """Tensors and plain values.

        Arguments:
            training: Whether to include what only an exact continuation needs.
        """
        state: dict[str, Any] = {
            "agent": self.name,
            "config": asdict(self.config),
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "low": torch.from_numpy(self.low.copy()),
            "high": torch.from_numpy(self.high.copy()),
            "seed": self.seed,
            "env": self.env,
            "updates": self.updates,
            "modules": {
                name: dict(module.state_dict())
                for name, module in self._modules().items()
                if training or name not in _COPIES
            },
            "extra": self.extra_state(),
        }
        if training:
            state["optimisers"] = [o.state_dict() for o in self._optimisers()]
            state["generators"] = [
                checkpoint.generator_state(g) for g in (self.generator, self.acting_generator)
            ]
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state`.

        Raises:
            CheckpointError: If it is that of another agent or another configuration.
        """
        mine = {
            "agent": self.name,
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            **asdict(self.config),
        }
        # What an older version did not know yet has its default.
        kept = {**asdict(self.config_type()), **state["config"], **state}
        for key, value in mine.items():
            if kept[key] != value:
                raise checkpoint.CheckpointError(
                    f"checkpoint must be of an agent with {key} {value}, got {kept[key]}"
                )
        modules = state["modules"]
        for name, module in self._modules().items():
            module.load_state_dict(modules[name if name in modules else _COPIES[name]])
        self.updates, self.seed = state["updates"], state["seed"]
        self.load_extra_state(state["extra"])
        if "optimisers" in state:
            for optimiser, kept in zip(self._optimisers(), state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
                for group in optimiser.param_groups:
                    if isinstance(group["lr"], Tensor):  # graphs read it on the device
                        group["lr"] = group["lr"].to(self.device)
            for generator, kept in zip(
                (self.generator, self.acting_generator), state["generators"], strict=True
            ):
                checkpoint.restore_generator(generator, kept)

    @classmethod
    def from_state(
        cls: type[_A], state: dict[str, Any], *, device: torch.device | str = "auto"
    ) -> _A:
        """The agent that :meth:`state` describes."""
        agent = cls(
            state["observation_dim"],
            state["action_dim"],
            cls.config_type.from_saved(state["config"]),
            seed=state["seed"],
            device=device,
            low=state["low"].numpy(),
            high=state["high"].numpy(),
            env=state["env"],
        )
        agent.load_state(state)
        return agent

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "critic": self.critic,
            "target_critic": self.target_critic,
            "policy": self.policy,
            "moments": self.moments,
        }

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.critic_optimiser, self.policy_optimiser]


def _slow_copy(module: nn.Module) -> Any:  # noqa: ANN401
    slow = copy.deepcopy(module)
    slow.requires_grad_(False)
    return slow


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Change the learning rate, on the device where a graph reads it.

    Arguments:
        optimiser: The optimiser.
        lr: Its new learning rate.
    """
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
