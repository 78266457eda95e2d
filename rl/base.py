"""What all agents share: acting, saving, observations in standard deviations, optimisers."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from rl.config import AgentConfig
from rl.environments import Transition
from rl.evaluation import checked_observation
from rl.graphs import Captured
from rl.replay import ReplayBuffer
from rsm_sampler import checkpoint
from rsm_sampler.checked import checked
from rsm_sampler.schema import (
    GENERATOR,
    anything,
    bounded,
    entries,
    fits,
    held,
    integer,
    items,
    optimised,
    plain,
    record,
    shown,
    tensor,
    text,
    understood,
)

__all__ = ["BaseAgent", "RunningMoments", "check_sizes", "set_lr"]

_KIND, _VERSION = "agent", 1
_AGENT = record(
    {
        "agent": text(),
        "config": entries(plain),
        "observation_dim": integer(1, 2**31),
        "action_dim": integer(1, 2**31),
        "low": tensor(None, dtypes=(torch.float64,)),
        "high": tensor(None, dtypes=(torch.float64,)),
        "seed": integer(-(2**63), 2**63),
        "env": text(),
        "updates": integer(),
        "modules": entries(entries(tensor())),
        "extra": entries(tensor()),
    },
    {"optimisers": items(anything), "generators": items(GENERATOR, length=2)},
    others=anything,  # what single agents add
)
# Copies that only training needs, and what they are copies of.
_COPIES = {"target_critic": "critic", "old_policy": "policy", "target_policy": "policy"}
_LARGE_BLOCK = 31 << 20  # bytes; glibc follows up to 32 MiB
_A = TypeVar("_A", bound="BaseAgent")


@checked
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
        self.dim = dim
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


@checked
class BaseAgent(ABC):
    """Base of all agents.

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
    critic: Any
    policy: Any
    critic_optimiser: torch.optim.Optimizer
    policy_optimiser: torch.optim.Optimizer

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
        self.build(weights)
        if self.device.type == "cpu":
            # The C library gives blocks above a threshold back to the system when they are freed,
            # and every layer would fault its pages in anew, at twice the cost of its arithmetic.
            # Freeing one large block (it is never written to) raises the threshold to its size.
            torch.empty(_LARGE_BLOCK, dtype=torch.uint8)
        self._captured: dict[tuple[Any, ...], Captured] = {}
        self._inputs: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ what an agent adds

    @abstractmethod
    def build(self, weights: torch.Generator) -> None:
        """Make ``critic``, ``policy``, ``critic_optimiser`` and ``policy_optimiser``.

        Arguments:
            weights: Source of the initial weights, on the CPU.
        """

    @abstractmethod
    def explore(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """Actions to act with, for standardised observations, from ``acting_generator``."""

    @abstractmethod
    def exploit(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The same action for the same standardised observation, every time."""

    @abstractmethod
    def update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """What is due after a step of the environments.

        Arguments:
            replay: The transitions so far.

        Returns:
            Numbers for a log, as tensors without axes: reading them makes the host wait.
        """

    def observe(self, step: Transition) -> None:  # noqa: B027
        """What came of the last actions of :meth:`act`, for agents that learn from nothing else.

        Arguments:
            step: What the environments returned.
        """

    def extra_state(self) -> dict[str, Any]:
        """Tensors and plain values besides networks, optimisers and generators."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back :meth:`extra_state`."""

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
        observation = checked_observation(observation, self.observation_dim)
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

    def release(self) -> None:
        """Let go of the replay and of captured graphs; a later update makes them anew."""
        self._captured.clear()
        self._inputs.clear()

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
            CheckpointError: If it is that of another agent or another configuration, or none of
                an agent; the message names the key.
        """
        _AGENT(state, "payload")
        with understood("an agent"):
            self._check(state)
            self._load(state)

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse the state of another agent, before anything of this one changes."""
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
                found = kept[key][:80] if isinstance(kept[key], str) else shown(kept[key])
                raise checkpoint.CheckpointError(
                    f"checkpoint must be of an agent with {key} {value}, got {found}"
                )
        modules, own = state["modules"], self._modules()
        if not set(modules) <= {*own, *_COPIES}:
            raise checkpoint.CheckpointError(
                f"payload['modules'] must be of {sorted(own)}, got {sorted(modules)}"
            )
        for name, module in own.items():
            found = name if name in modules else _COPIES.get(name, name)
            if found not in modules:
                raise checkpoint.CheckpointError(
                    f"payload['modules'] must have {name!r}, got {sorted(modules)}"
                )
            fits(module, "the agent's configuration")(
                modules[found], f"payload['modules'][{found!r}]"
            )
            moments = modules[found] if isinstance(module, RunningMoments) else {}
            if any(bool((moments[key] < 0).any()) for key in ("variance", "count") if moments):
                raise checkpoint.CheckpointError(
                    f"payload['modules'][{found!r}] must have a variance and a count of at least 0"
                )
        for name, wanted in self.extra_state().items():
            found = state["extra"].get(name)
            if found is not None and found.shape != wanted.shape:
                raise checkpoint.CheckpointError(
                    f"payload['extra'][{name!r}] must have shape {tuple(wanted.shape)}, got "
                    f"{shown(found)}"
                )
        if ("optimisers" in state) != ("generators" in state):
            raise checkpoint.CheckpointError(
                "payload must have optimisers and generators, or none"
            )
        if "optimisers" in state:
            own_optimisers = self._optimisers()
            items(anything, length=len(own_optimisers))(
                state["optimisers"], "payload['optimisers']"
            )
            for i, optimiser in enumerate(own_optimisers):
                optimised(optimiser)(state["optimisers"][i], f"payload['optimisers'][{i}]")
            for kept_state in state["generators"]:
                checkpoint.restore_generator(torch.Generator(self.device), kept_state)

    def _load(self, state: dict[str, Any]) -> None:
        """Take back a state that has been checked."""
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
        """The agent that :meth:`state` describes.

        Arguments:
            state: What :meth:`state` returned.
            device: Where its networks go.

        Raises:
            CheckpointError: If it is none of an agent; nothing larger than it is allocated.
        """
        if device != "auto":
            torch.empty(0, device=device)  # whether there is such a device
        _AGENT(state, "payload")
        with understood("an agent"):
            with bounded(0):
                config = cls.config_type.from_saved(state["config"])
            check_sizes(state, config)
            with bounded(held(state)):
                agent = cls(
                    state["observation_dim"],
                    state["action_dim"],
                    config,
                    seed=state["seed"],
                    device=device,
                    low=state["low"].numpy(),
                    high=state["high"].numpy(),
                    env=state["env"],
                )
        agent.load_state(state)
        return agent

    def _modules(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "policy": self.policy, "moments": self.moments}

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.critic_optimiser, self.policy_optimiser]


def check_sizes(state: dict[str, Any], config: AgentConfig) -> None:
    """Refuse sizes that the tensors of an agent do not have, before anything is made of them.

    Arguments:
        state: The agent's state.
        config: The configuration that it names.

    Raises:
        CheckpointError: If a size is out of proportion.
    """
    _AGENT(state, "payload")
    low, high, modules = state["low"], state["high"], state["modules"]
    if low.shape != high.shape or len(low) != state["action_dim"] or not bool((low < high).all()):
        raise checkpoint.CheckpointError(
            f"payload must have action_dim {state['action_dim']} ends low below high, got "
            f"{shown(low)} and {shown(high)}"
        )
    known = modules.get("moments", {}).get("mean")
    if known is None or known.shape != (state["observation_dim"],):
        raise checkpoint.CheckpointError(
            f"payload['modules']['moments']['mean'] must have shape ({state['observation_dim']},),"
            f" got {shown(known)}"
        )
    tensors = [tensor for module in modules.values() for tensor in module.values()]
    longest = max([1000, *(tensor.numel() for tensor in tensors)])
    most = {"depth": len(tensors), "critic_depth": len(tensors), "num_steps": longest}
    for name, limit in most.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > limit:
            raise checkpoint.CheckpointError(
                f"payload['config'][{name!r}] must be at most {limit}, as the tensors say, got "
                f"{shown(value)}"
            )


@checked
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
