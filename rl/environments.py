r"""Environments: Gymnasium's vector API, made plain for off-policy agents.

:class:`Environments` steps n copies and answers the three questions that published code gets
wrong most often:

* **What was the last observation of an episode?** The real one, not the first of the next
  episode, in each of Gymnasium's autoreset modes.
* **Did the episode end, or was it cut?** *Terminated* states have no future; at a time limit the
  value goes on.
* **Is this a transition at all?** In next-step mode the step after an end only resets.

Actions are in :math:`[-1, 1]`, whatever the environment's own bounds are.

State and random numbers of MuJoCo and classic-control environments can be taken and put back
(:meth:`Environments.state`), so that an interrupted run goes on bit for bit.
"""

import contextlib
import difflib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from rsm_sampler.checked import checked
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.schema import (
    Schema,
    anything,
    entries,
    flag,
    integer,
    items,
    number,
    optional,
    record,
    tensor,
    text,
)

__all__ = ["EnvironmentFailure", "EnvironmentSource", "Environments", "Transition", "describe"]

EnvironmentSource = str | Callable[[], gym.Env] | gym.Env | VectorEnv
"""An id, a function that makes an environment, or an environment, single or vector."""

_LOG = logging.getLogger(__name__)


class EnvironmentFailure(RuntimeError):
    """An environment raised or returned something that is not finite."""


@dataclass(frozen=True)
class Transition:
    """What one step of n environments did.

    Attributes:
        observation: Where the next step starts, (n, observation_dim).
        next_observation: Where this step led to, the end of an episode included.
        reward: Rewards, (n).
        terminated: Whether the state reached has no future, (n).
        ended: Whether the episode is over, by termination or by time limit, (n).
        valid: Whether it was a step and no mere reset, (n).
    """

    observation: NDArray[np.float32]
    next_observation: NDArray[np.float32]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    ended: NDArray[np.bool_]
    valid: NDArray[np.bool_]


@checked
class Environments:
    """Copies of an environment that step together.

    Arguments:
        source: An id, a function that makes one environment, one environment, or a vector
            environment in any autoreset mode.
        num_envs: Number of copies; an environment that is given as such is used alone.
        render_mode: Passed on where the environment is made here.

    Raises:
        ValueError: If there is no such id, a space is not supported, or num_envs does not fit.

    Attributes:
        num_envs: Number of copies.
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        name: The id, where there is one.
        resumes_exactly: Whether :meth:`state` holds everything.
    """

    def __init__(
        self, source: EnvironmentSource, num_envs: int = 1, *, render_mode: str | None = None
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        with quiet():
            self.vector = _make(source, num_envs, render_mode)
        self.num_envs = self.vector.num_envs
        self.name = describe(source)
        _check_spaces(self.vector.single_observation_space, self.vector.single_action_space)
        space = self.vector.single_action_space
        assert isinstance(space, Box) and isinstance(self.vector.single_observation_space, Box)
        self.observation_dim = self.vector.single_observation_space.shape[0]
        self.action_dim = space.shape[0]
        self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
        self._dtype = space.dtype
        mode = self.vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.autoreset_mode = AutoresetMode(mode)
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self.finished: list[tuple[float, int]] = []
        self.steps = 0
        self.resumes_exactly = isinstance(self.vector, SyncVectorEnv) and all(
            _kind(env) is not None for env in self.vector.envs
        )

    def reset(self, seed: int | Sequence[int] | None = None) -> NDArray[np.float32]:
        """Start new episodes.

        Arguments:
            seed: Decides their random numbers: one for each copy, or a number of which copy i
                gets ``seed + i``.

        Returns:
            The first observations, (n, observation_dim).
        """
        with quiet():
            given: Any = list(seed) if isinstance(seed, Sequence) else seed
            observation, _ = self.vector.reset(seed=given)
        self._over[:] = False
        self._returns[:], self._lengths[:] = 0, 0
        self.finished.clear()
        return self._finite("observation", observation)

    def step(self, action: NDArray[np.float32]) -> Transition:
        """One step of every copy.

        Arguments:
            action: Actions in [-1, 1], (n, action_dim). Beyond that they are not cut here.

        Raises:
            EnvironmentFailure: If an environment raises, or an observation or reward is not
                finite; the message names the step and, of numbers, the copy.
        """
        scaled = self.low + 0.5 * (np.asarray(action, np.float64) + 1) * (self.high - self.low)
        try:
            after, reward, terminated, truncated, info = self.vector.step(
                scaled.astype(self._dtype)
            )
        except Exception as error:
            raise EnvironmentFailure(
                f"{self.name} raised at step {self.steps} of its {self.num_envs} copies: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.steps += 1
        after = self._finite("observation", after)
        reward = self._finite("reward", reward)
        ended, valid = terminated | truncated, np.ones(self.num_envs, dtype=bool)
        real = after
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            real = after.copy()
            for i in np.flatnonzero(ended):
                real[i] = info["final_obs"][i]
            self._finite("observation", real)
        elif self.autoreset_mode is AutoresetMode.NEXT_STEP:
            valid = ~self._over
            ended, terminated = ended & valid, terminated & valid
            self._over = ended.copy()
        elif self.autoreset_mode is AutoresetMode.DISABLED and ended.any():
            real = after
            after, _ = self.vector.reset(options={"reset_mask": ended})
            after = self._finite("observation", after)
        self._returns += np.where(valid, reward, 0)
        self._lengths += valid
        for i in np.flatnonzero(ended):
            self.finished.append((float(self._returns[i]), int(self._lengths[i])))
            self._returns[i], self._lengths[i] = 0, 0
        return Transition(after, real, reward, terminated, ended, valid)

    def close(self) -> None:
        """Close them."""
        self.vector.close()

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, in tensors and plain types.

        The states of environments other than MuJoCo and classic control are missing
        (``resumes_exactly`` is false): they are reset when the run goes on.
        """
        state: dict[str, Any] = {
            "over": torch.from_numpy(self._over.copy()),
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            "steps": self.steps,
            "copies": None,
        }
        if self.resumes_exactly:
            assert isinstance(self.vector, SyncVectorEnv)
            state["copies"] = [_state_of(env) for env in self.vector.envs]
            state["autoreset"] = torch.from_numpy(
                np.array(getattr(self.vector, "_autoreset_envs", self._over), dtype=bool)
            )
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken, for environments that resume exactly.

        Arguments:
            state: What :meth:`state` returned.

        Raises:
            CheckpointError: If it is not one of as many copies of this environment.
        """
        _states(self.num_envs)(state, "payload['environments']")
        if state["copies"] is None or not self.resumes_exactly:
            return
        if "autoreset" not in state:
            raise CheckpointError("payload['environments'] must have the key 'autoreset'")
        assert isinstance(self.vector, SyncVectorEnv)
        with quiet():
            self.vector.reset()
        for env, kept in zip(self.vector.envs, state["copies"], strict=True):
            _restore(env, kept)
        if hasattr(self.vector, "_autoreset_envs"):
            self.vector._autoreset_envs = state["autoreset"].numpy().copy()
        self._over = state["over"].numpy().copy()
        self._returns = state["returns"].numpy().copy()
        self._lengths = state["lengths"].numpy().copy()
        self.steps = state["steps"]
        self.finished.clear()

    def _finite(self, what: str, values: Any) -> NDArray[np.float32]:  # noqa: ANN401
        values = np.array(values, dtype=np.float32)  # a copy: environments may write to theirs
        bad = ~np.isfinite(values)
        if bad.any():
            copy = int(np.argwhere(bad)[0, 0])
            raise EnvironmentFailure(
                f"{self.name} returned {what} {values[copy].tolist()} at step {self.steps}, "
                f"copy {copy}"
            )
        return values


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn MuJoCo's and Gymnasium's deprecation notes into log records of level DEBUG."""
    try:
        import mujoco

        before = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: _LOG.debug("mujoco: %s", message))
    except ImportError:
        mujoco, before = None, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*out of date.*")
            warnings.filterwarnings("ignore", message=".*[Oo]verriding environment.*")
            yield
    finally:
        if mujoco is not None:
            mujoco.set_mju_user_warning(before)


def is_environment(source: object) -> bool:
    """Whether it is an environment itself and nothing that makes one, such as its class."""
    return isinstance(source, gym.Env | VectorEnv)


@checked
def describe(source: EnvironmentSource) -> str:
    """A name for an environment, for run folders and messages."""
    if isinstance(source, str):
        return source
    spec = getattr(source, "spec", None)
    return spec.id if spec is not None else getattr(source, "__name__", type(source).__name__)


def _make(source: EnvironmentSource, num_envs: int, render_mode: str | None) -> VectorEnv:
    if isinstance(source, VectorEnv):
        if num_envs not in (1, source.num_envs):
            raise ValueError(f"num_envs must be {source.num_envs}, as given, got {num_envs}")
        return source
    if isinstance(source, gym.Env):
        if num_envs != 1:
            raise ValueError(
                f"num_envs must be 1 for a single environment, got {num_envs}: "
                "give its id or a function that makes it"
            )
        given = source
        makers: list[Callable[[], gym.Env]] = [lambda: given]
    elif isinstance(source, str):
        makers = [lambda: _by_id(source, render_mode)] * num_envs
    elif callable(source):
        makers = [source] * num_envs
    else:
        raise ValueError(
            "env must be an id, a function that makes an environment, or an environment, "
            f"got {source!r}"
        )
    # The spaces are checked before SyncVectorEnv allocates arrays for them.
    first = makers[0]()
    _check_spaces(first.observation_space, first.action_space)
    ready = [lambda: first, *makers[1:]]
    return SyncVectorEnv(ready, autoreset_mode=AutoresetMode.SAME_STEP)


def _by_id(name: str, render_mode: str | None) -> gym.Env:
    options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        return gym.make(name, **options)
    except gym.error.Error as error:
        known = [spec for spec in gym.registry if "/" not in spec]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; nearest known: {', '.join(near)}" if near else ""
        raise ValueError(
            f"env must be a registered id, got {name!r}{hint} ({str(error).splitlines()[0]})"
        ) from error


def _check_spaces(observation: gym.Space, action: gym.Space) -> None:
    if not isinstance(observation, Box) or len(observation.shape) != 1:
        raise ValueError(
            "env must have a Box of one axis as observation space (no dictionaries, images or "
            f"discrete states), got {observation}"
        )
    if not isinstance(action, Box) or len(action.shape) != 1:
        raise ValueError(
            f"env must have a Box of one axis as action space (continuous actions), got {action}"
        )
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise ValueError(
            f"env must have a bounded action space, got {action}: wrap it with "
            "gymnasium.wrappers.RescaleAction or a space of your own"
        )
    if not (action.low < action.high).all():
        raise ValueError(f"env must have an action space with low < high, got {action}")


# ------------------------------------------------------------------ states


def _kind(env: gym.Env) -> str | None:
    """What knows how to take the state of an environment, None if nothing does."""
    inner = env.unwrapped
    for layer in _layers(env):
        name = type(layer).__name__
        if layer is not inner and name not in _STATELESS and name != "TimeLimit":
            return None
    module = type(inner).__module__
    if module.startswith("gymnasium.envs.mujoco") and hasattr(inner, "data"):
        return "mujoco"
    if module.startswith("gymnasium.envs.classic_control"):
        return "classic"
    if hasattr(inner, "get_state") and hasattr(inner, "set_state"):
        return "own"
    return None


_PARTS = {
    "mujoco": {"data", "time"},
    "classic": {"state", "as_tuple", "dtype"},
    "own": {"own"},
}
_COPY = record(
    {
        "kind": text(tuple(_PARTS)),
        "generator": optional(
            record(
                {
                    # Of NumPy's generators; names of other attributes would be called.
                    "name": text(("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")),
                    "state": entries(text()),
                    "has_uint32": integer(0, 1),
                    "uinteger": integer(0, 2**32 - 1),
                    "seed": text(),
                }
            )
        ),
        "elapsed": optional(integer()),
    },
    {
        "data": entries(tensor(nan=True)),  # MuJoCo leaves some of it uninitialised
        "time": number(),
        "state": optional(tensor(None, dtypes=(torch.float64,))),
        "as_tuple": flag(),
        "dtype": optional(text(("float32", "float64"))),
        "steps_beyond_terminated": optional(number()),
        "last_u": optional(number()),
        "own": anything,  # the environment's own matter
    },
)


def _states(count: int) -> Schema:
    """Allows what :meth:`Environments.state` returns for so many copies."""
    return record(
        {
            "over": tensor(count, dtypes=(torch.bool,)),
            "returns": tensor(count, dtypes=(torch.float64,)),
            "lengths": tensor(count, dtypes=(torch.int64,)),
            "steps": integer(),
            "copies": optional(items(_COPY, length=count)),
        },
        {"autoreset": tensor(count, dtypes=(torch.bool,))},
    )


_STATELESS = {"OrderEnforcing", "PassiveEnvChecker", "RescaleAction", "ClipAction"}


def _layers(env: gym.Env) -> Iterator[Any]:
    layer: Any = env
    while True:
        yield layer
        if layer is layer.unwrapped:
            return
        layer = layer.env


def _state_of(env: gym.Env) -> dict[str, Any]:
    inner: Any = env.unwrapped
    kind = _kind(env)
    state: dict[str, Any] = {"kind": kind, "generator": _generator_state(inner)}
    state["elapsed"] = next(
        (layer._elapsed_steps for layer in _layers(env) if type(layer).__name__ == "TimeLimit"),
        None,
    )
    if kind == "mujoco":
        # Derived quantities too: rewards read positions that lag behind the coordinates.
        state["data"] = {
            name: torch.from_numpy(np.array(value)) for name, value in _arrays(inner.data).items()
        }
        state["time"] = float(inner.data.time)
    elif kind == "classic":
        value = getattr(inner, "state", None)
        state["state"] = None if value is None else torch.from_numpy(np.array(value, np.float64))
        state["as_tuple"] = isinstance(value, tuple)
        state["dtype"] = None if value is None else str(np.asarray(value).dtype)
        for name in ("steps_beyond_terminated", "last_u"):
            if hasattr(inner, name):
                value = getattr(inner, name)
                state[name] = None if value is None else float(value)
    else:
        state["own"] = inner.get_state()
    return state


def _restore(env: gym.Env, state: dict[str, Any]) -> None:
    inner: Any = env.unwrapped
    if state["kind"] != _kind(env) or not _PARTS[state["kind"]] <= set(state):
        raise CheckpointError(
            f"payload['environments'] must be of environments of kind {_kind(env)}, with "
            f"{sorted(_PARTS[state['kind']])}, got one of kind {state['kind']} with {[*state]}"
        )
    _restore_generator(inner, state["generator"])
    for layer in _layers(env):
        if type(layer).__name__ == "TimeLimit":
            layer._elapsed_steps = state["elapsed"]
    if state["kind"] == "mujoco":
        arrays = _arrays(inner.data)
        for name, value in state["data"].items():
            if name in arrays and arrays[name].shape == tuple(value.shape):
                arrays[name][...] = value.numpy()
        inner.data.time = state["time"]
    elif state["kind"] == "classic":
        if state["state"] is not None:
            value = state["state"].numpy().astype(state["dtype"])
            if value.shape != np.shape(inner.state):
                raise CheckpointError(
                    f"payload['environments'] must have states of shape {np.shape(inner.state)}, "
                    f"got {value.shape}"
                )
            inner.state = tuple(value.tolist()) if state["as_tuple"] else value
        for name in ("steps_beyond_terminated", "last_u"):
            if name in state:
                value = state[name]
                whole = name == "steps_beyond_terminated" and value is not None
                setattr(inner, name, int(value) if whole else value)
    else:
        inner.set_state(state["own"])


def _arrays(data: Any) -> dict[str, NDArray]:  # noqa: ANN401
    """The arrays of MuJoCo's data whose size the model fixes; contacts are found anew."""
    found = {}
    for name in dir(data):
        if name.startswith(("_", "efc_", "efm_", "iefc_", "map_", "island", "plugin")):
            continue
        value = getattr(data, name, None)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.flags.writeable:
            found[name] = value
    return found


def _generator_state(env: Any) -> dict[str, Any] | None:  # noqa: ANN401
    generator = env._np_random
    if generator is None:
        return None
    state = generator.bit_generator.state
    return {
        "name": state["bit_generator"],
        # 128-bit integers, as text
        "state": {key: str(value) for key, value in state["state"].items()},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
        "seed": str(env._np_random_seed),
    }


def _restore_generator(env: Any, state: dict[str, Any] | None) -> None:  # noqa: ANN401
    if state is None:
        return
    bits = getattr(np.random, state["name"])()
    bits.state = {
        "bit_generator": state["name"],
        "state": {key: int(value) for key, value in state["state"].items()},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }
    env._np_random = np.random.Generator(bits)
    with contextlib.suppress(ValueError):
        env._np_random_seed = int(state["seed"])
