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
from typing import Any

if importlib.util.find_spec("gymnasium") is None:
    raise ImportError("rl needs gymnasium: pip install 'rsm-sampler[rl]'", name="gymnasium")

from rl.config import AgentConfig
from rl.dpmd import DPMD, DPMDConfig
from rl.environments import EnvironmentFailure, Environments, EnvironmentSource
from rl.evaluation import Evaluation, evaluate
from rl.off_policy import OffPolicyAgent
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


def train_sdac(env: EnvironmentSource, *, total_steps: int, **options: Any) -> SDAC:  # noqa: ANN401
    """Train soft diffusion actor-critic.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`SDACConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("sdac", env, total_steps=total_steps, **options)
    assert isinstance(agent, SDAC)
    return agent


def train_dpmd(env: EnvironmentSource, *, total_steps: int, **options: Any) -> DPMD:  # noqa: ANN401
    """Train diffusion policy mirror descent.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`DPMDConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("dpmd", env, total_steps=total_steps, **options)
    assert isinstance(agent, DPMD)
    return agent


def train_sac(env: EnvironmentSource, *, total_steps: int, **options: Any) -> SAC:  # noqa: ANN401
    """Train soft actor-critic with a Gaussian policy.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`SACConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("sac", env, total_steps=total_steps, **options)
    assert isinstance(agent, SAC)
    return agent
