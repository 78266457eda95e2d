"""Evaluation: whole episodes on environments of their own, with fixed seeds."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl.environments import Environments, EnvironmentSource, is_environment
from rsm_sampler.checked import checked

__all__ = ["Agent", "Evaluation", "check_fits", "checked_observation", "evaluate"]


@runtime_checkable
class Agent(Protocol):
    """Anything that acts: the agents here, those of stable-baselines3, a user's own.

    Attributes:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        low: Lower ends of the environment's actions.
        high: Upper ends.
    """

    observation_dim: int
    action_dim: int
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def predict(
        self, observation: ArrayLike, deterministic: bool = False
    ) -> tuple[NDArray[np.float32], None]:
        """Actions in the environment's units.

        Arguments:
            observation: One observation or a batch.
            deterministic: Whether to take the same action for the same observation.
        """


@dataclass(frozen=True)
class Evaluation:
    """Episodes of an agent.

    Attributes:
        returns: Sums of rewards, undiscounted, (episodes).
        lengths: Steps, (episodes).
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(self.returns.std(ddof=1)) if len(self.returns) > 1 else 0.0

    def __str__(self) -> str:
        """Mean and spread in words."""
        return (
            f"return {self.mean:.1f} ± {self.std:.1f} over {len(self.returns)} episodes of "
            f"{self.lengths.mean():.0f} steps"
        )


@checked
def evaluate(
    agent: Agent,
    env: EnvironmentSource,
    *,
    episodes: int = 20,
    seed: int = 10_000,
    deterministic: bool = True,
    video: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Returns of whole episodes.

    Episode i starts from ``seed + i``, in an environment of its own: the same agent gets the same
    returns every time.

    Arguments:
        agent: The agent.
        env: An id or a function that makes an environment. An environment itself runs one
            episode after the other.
        episodes: Number of episodes.
        seed: Seed of the first.
        deterministic: Whether the agent exploits.
        video: File to which the first episode is recorded (``.mp4`` or ``.gif``), by environments
            that are made here.

    Returns:
        The episodes.

    Raises:
        ValueError: If episodes is below 1 or the environment does not fit the agent.

    Note:
        Without ``deterministic`` the agent draws from its own generator of acting.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if video is not None:
        _record(agent, env, seed, deterministic, Path(video))
    copies = episodes if isinstance(env, str) or _is_maker(env) else 1
    environments = Environments(env, copies)
    check_fits(agent, environments)
    copies = environments.num_envs
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    for begin in range(0, episodes, copies):
        observation = environments.reset(seed=seed + begin)
        running = np.arange(copies) < episodes - begin
        counted = slice(begin, begin + int(running.sum()))
        part = slice(0, int(running.sum()))
        while running.any():
            action = np.zeros((copies, agent.action_dim), np.float32)
            action[running] = _unit_action(agent, observation[running], deterministic)
            step = environments.step(action)
            alive = running & step.valid
            returns[counted] += np.where(alive, step.reward, 0)[part]
            lengths[counted] += alive[part]
            running &= ~step.ended
            observation = step.observation
    if isinstance(env, str) or _is_maker(env):
        environments.close()
    return Evaluation(returns, lengths)


def _unit_action(
    agent: Agent, observation: NDArray[np.float32], deterministic: bool
) -> NDArray[np.float64]:
    action, _ = agent.predict(observation, deterministic)
    return 2 * (action - agent.low) / (agent.high - agent.low) - 1


@checked
def checked_observation(observation: ArrayLike, length: int) -> NDArray[np.float32]:
    """One observation or a batch, in single precision.

    Arguments:
        observation: What an agent was given.
        length: Length of an observation.

    Raises:
        ValueError: If it has another length.
    """
    checked = np.asarray(observation, np.float32)
    if checked.ndim not in (1, 2) or checked.shape[-1] != length:
        raise ValueError(f"observation must have length {length}, got shape {checked.shape}")
    return checked


@checked
def check_fits(agent: Agent | Environments, environments: Environments) -> None:
    """Refuse environments whose observations or actions are not the agent's.

    Arguments:
        agent: The agent, or the environments that it is made for.
        environments: The environments.

    Raises:
        ValueError: If a length differs.
    """
    for name in ("observation_dim", "action_dim"):
        have, want = getattr(environments, name), getattr(agent, name)
        if have != want:
            raise ValueError(
                f"env must have the agent's {name} {want}, got {have} in {environments.name}"
            )


def _is_maker(env: EnvironmentSource) -> bool:
    return callable(env) and not is_environment(env)


def _record(
    agent: Agent, env: EnvironmentSource, seed: int, deterministic: bool, path: Path
) -> None:
    if not isinstance(env, str):
        raise ValueError(f"env must be an id to record a video, got {env!r}")
    try:
        import imageio.v2 as imageio  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("a video needs: pip install 'rsm-sampler[video]'") from error
    environments = Environments(env, 1, render_mode="rgb_array")
    check_fits(agent, environments)
    observation = environments.reset(seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = environments.vector.metadata.get("render_fps", 30)
    options = {"fps": rate} if path.suffix != ".gif" else {"duration": 1000 / rate, "loop": 0}
    writer: Any
    with imageio.get_writer(path, **options) as writer:
        while True:
            frames = environments.vector.render()
            assert frames is not None
            writer.append_data(np.asarray(frames[0]))
            step = environments.step(
                _unit_action(agent, observation, deterministic).astype(np.float32)
            )
            observation = step.observation
            if step.ended[0]:
                break
    environments.close()
