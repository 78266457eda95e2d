"""Diffusion-policy agents: the sampler with a learned Q-function in the energy's place.

>>> from rsm_sampler import rl
>>> agent = rl.train_sdac("Pendulum-v1", total_steps=300, warmup_steps=260, replay_size=1000,
...                       width=16, eval_every=0, progress=False)
>>> action, _ = agent.predict([1.0, 0.0, 0.0], deterministic=True)
>>> action.shape
(1,)

:func:`train_sdac` and :func:`train_dpmd` train, :func:`evaluate` tells how well, ``agent.save``
and :func:`load` keep an agent, and :func:`resume` goes on with an interrupted run.
"""

import importlib.util
import os
from typing import Any

if importlib.util.find_spec("gymnasium") is None:
    raise ImportError("rl needs gymnasium: pip install 'rsm-sampler[rl]'", name="gymnasium")

from rl.dpmd import DPMD, DPMDConfig
from rl.environments import EnvironmentFailure, Environments, EnvironmentSource
from rl.evaluation import Evaluation, evaluate
from rl.off_policy import AgentConfig, OffPolicyAgent
from rl.replay import Batch, ReplayBuffer
from rl.sac import SAC, SACConfig
from rl.sdac import SDAC, SDACConfig
from rl.training import AGENTS, RunProgress, load, resume, train

__all__ = [
    "AGENTS",
    "DPMD",
    "SAC",
    "SDAC",
    "AgentConfig",
    "Batch",
    "DPMDConfig",
    "EnvironmentFailure",
    "EnvironmentSource",
    "Environments",
    "Evaluation",
    "OffPolicyAgent",
    "ReplayBuffer",
    "RunProgress",
    "SACConfig",
    "SDACConfig",
    "evaluate",
    "load",
    "resume",
    "train",
    "train_dpmd",
    "train_sac",
    "train_sdac",
]


def train_sdac(
    env: EnvironmentSource,
    *,
    total_steps: int,
    seed: int = 0,
    config: SDACConfig | str = "corrected",
    run_dir: str | os.PathLike[str] | None = None,
    **options: Any,  # noqa: ANN401
) -> SDAC:
    """Train soft diffusion actor-critic.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        seed: Decides everything.
        config: An :class:`SDACConfig` or the name of a preset: ``"corrected"``, ``"official"`` or
            ``"icml2025"``.
        run_dir: Folder for log, checkpoints and agents; it makes the run resumable.
        **options: As for :func:`train`, and fields of the configuration.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train(
        "sdac",
        env,
        total_steps=total_steps,
        seed=seed,
        config=config,
        run_dir=run_dir,
        **options,
    )
    assert isinstance(agent, SDAC)
    return agent


def train_dpmd(
    env: EnvironmentSource,
    *,
    total_steps: int,
    seed: int = 0,
    config: DPMDConfig | str = "corrected",
    run_dir: str | os.PathLike[str] | None = None,
    **options: Any,  # noqa: ANN401
) -> DPMD:
    """Train diffusion policy mirror descent; arguments as for :func:`train_sdac`.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        seed: Decides everything.
        config: A :class:`DPMDConfig` or the name of a preset.
        run_dir: Folder for log, checkpoints and agents.
        **options: As for :func:`train`, and fields of the configuration.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train(
        "dpmd",
        env,
        total_steps=total_steps,
        seed=seed,
        config=config,
        run_dir=run_dir,
        **options,
    )
    assert isinstance(agent, DPMD)
    return agent


def train_sac(
    env: EnvironmentSource,
    *,
    total_steps: int,
    seed: int = 0,
    config: SACConfig | str = "corrected",
    run_dir: str | os.PathLike[str] | None = None,
    **options: Any,  # noqa: ANN401
) -> SAC:
    """Train soft actor-critic with a Gaussian policy; arguments as for :func:`train_sdac`.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        seed: Decides everything.
        config: An :class:`SACConfig` or the name of a preset.
        run_dir: Folder for log, checkpoints and agents.
        **options: As for :func:`train`, and fields of the configuration.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train(
        "sac",
        env,
        total_steps=total_steps,
        seed=seed,
        config=config,
        run_dir=run_dir,
        **options,
    )
    assert isinstance(agent, SAC)
    return agent
