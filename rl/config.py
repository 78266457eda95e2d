"""What every off-policy agent is told: frozen, checked, with presets."""

import dataclasses
import math
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from rsm_sampler import checkpoint, validation
from rsm_sampler.ensemble import Activation

__all__ = ["AgentConfig"]

_C = TypeVar("_C", bound="AgentConfig")


# Fields that say how much is kept in memory.
_KEPT = frozenset(
    {
        "num_envs",
        "replay_size",
        "batch_size",
        "width",
        "depth",
        "critic_width",
        "critic_depth",
        "num_steps",
        "num_draws",
        "behaviour_candidates",
        "target_candidates",
        "evaluation_candidates",
        "policy_states",
        "rollout_steps",
        "entropy_states",
        "entropy_draws",
        "draws_per_state",
        "uniform_actions",
    }
)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What every off-policy agent needs; its own config adds to it.

    Attributes:
        num_envs: Environments that step together.
        updates_per_step: Updates for each environment step; 0.2 is one for each step of five
            environments.
        warmup_steps: Environment steps with uniformly random actions, before any update.
        count_warmup: Whether these count as part of a run's total.
        replay_size: Transitions that are kept.
        batch_size: Transitions of an update.
        discount: The factor gamma.
        n_step: Rewards that a return sums before the critic's value follows. More than one lets
            values spread faster and their errors pile up less, at the price that the actions
            between are not the present policy's.
        reward_scale: Factor on rewards. Temperatures are in units of scaled reward.
        normalise_observations: Whether to standardise observations by running moments.
        critic_lr: Adam's learning rate of the critics.
        critic_steps: Adam steps with each critic gradient (2 in published DPMD code).
        policy_lr: Adam's learning rate of the policy.
        policy_lr_final: Where it ends; None for where it starts.
        policy_lr_hold: Policy steps before it begins to fall.
        policy_lr_decay: Policy steps over which it falls, linearly.
        policy_period: Updates for each policy step.
        polyak: Rate tau of the slow copies.
        target_period: Updates for each step of the slow copies.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        critic_width: Units of a critic's hidden layer; ``width`` if None.
        critic_depth: Number of a critic's hidden layers; ``depth`` if None.
        critic_layer_norm: Whether the critics' hidden layers are normalised.
        critic_activation: Nonlinearity of the critics' hidden layers: ``"mish"``, the paper's, or
            ``"relu"``.
        gradient_clip: Norm to which the gradient of a network is shortened, policy and critics
            apart; None for none.
    """

    num_envs: int = 5
    updates_per_step: float = 0.2
    warmup_steps: int = 5000
    count_warmup: bool = True
    replay_size: int = 1_000_000
    batch_size: int = 256
    discount: float = 0.99
    n_step: int = 1
    reward_scale: float = 1.0
    normalise_observations: bool = False
    critic_lr: float = 3e-4
    critic_steps: int = 1
    policy_lr: float = 3e-4
    policy_lr_final: float | None = None
    policy_lr_hold: int = 25_000
    policy_lr_decay: int = 50_000
    policy_period: int = 2
    polyak: float = 0.005
    target_period: int = 1
    width: int = 256
    depth: int = 3
    critic_width: int | None = None
    critic_depth: int | None = None
    critic_layer_norm: bool = False
    critic_activation: Activation = "mish"
    gradient_clip: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: With the name, the rule and the value.
        """
        self._check_types()
        for name in (
            "num_envs",
            "replay_size",
            "batch_size",
            "n_step",
            "critic_steps",
            "policy_period",
            "policy_lr_decay",
            "target_period",
            "width",
            "depth",
        ):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("critic_width", "critic_depth"):
            value = getattr(self, name)
            if not (value is None or value >= 1):
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        for name in ("updates_per_step", "reward_scale", "critic_lr", "policy_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.critic_activation not in get_args(Activation):
            raise ValueError(
                f"critic_activation must be one of {get_args(Activation)}, "
                f"got {self.critic_activation!r}"
            )
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive or None, got {self.gradient_clip}")
        for name in ("warmup_steps", "policy_lr_hold", "policy_lr_final"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must be in [0, 1), got {self.discount}")
        if not 0 < self.polyak <= 1:
            raise ValueError(f"polyak must be in (0, 1], got {self.polyak}")
        if self.replay_size < self.batch_size:
            raise ValueError(
                f"replay_size must be at least batch_size {self.batch_size}, "
                f"got {self.replay_size}"
            )

    def _check_types(self) -> None:
        """Refuse a text where a number is wanted, and a fraction where a whole one is."""
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), hints[field.name]
            allowed = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
            if get_origin(wanted) is Literal or (value is None and type(None) in allowed):
                continue  # a word is refused by value, with what is allowed
            try:
                if float in allowed:
                    validation.number(field.name, value, finite=False)
                elif int in allowed and field.name in _KEPT:
                    validation.size(field.name, value, least=0)
                elif int in allowed:
                    validation.integer(field.name, value)
                elif bool in allowed:
                    validation.flag(field.name, value)
            except TypeError as error:
                raise ValueError(str(error)) from None

    @classmethod
    def preset(cls: type[_C], name: str = "corrected", **changes: Any) -> _C:  # noqa: ANN401
        """A named configuration.

        Arguments:
            name: ``"corrected"`` is the default.
            **changes: Fields that differ from it.

        Raises:
            ValueError: If there is no preset or field of that name.
        """
        validation.text("name", name)
        presets = cls._presets()
        if name not in presets:
            raise ValueError(f"preset must be one of {sorted(presets)}, got {name!r}")
        fields = {field.name for field in dataclasses.fields(cls)}
        for field in changes:
            if field not in fields:
                raise ValueError(f"config must have fields of {cls.__name__}, got {field!r}")
        return cls(**{**presets[name], **changes})

    @classmethod
    def from_saved(cls: type[_C], fields: dict[str, Any]) -> _C:
        """The configuration that a checkpoint or a run's folder holds.

        Arguments:
            fields: Its fields; those that are missing have their defaults.

        Raises:
            CheckpointError: If this version does not know a field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise checkpoint.CheckpointError(
                    f"checkpoint must have fields of {cls.__name__}, got {name!r}: "
                    "it is of another version"
                )
        return cls(**fields)

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        return {"corrected": {}}
