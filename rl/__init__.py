"""Diffusion-policy agents: the sampler with a learned Q-function in the energy's place.

>>> from rsm_sampler import rl
>>> agent = rl.train_sdac("Pendulum-v1", total_steps=300, warmup_steps=260, replay_size=1000,
...                       width=16, eval_every=0, progress=False)
>>> action, _ = agent.predict([1.0, 0.0, 0.0], deterministic=True)
>>> action.shape
(1,)

:func:`train_sdac`, :func:`train_dpmd`, :func:`train_qsm`, :func:`train_dipo`, :func:`train_dacer`,
:func:`train_qvpo` and :func:`train_dppo` train, :func:`evaluate` tells how well, ``agent.save``
and :func:`load` keep an agent, and :func:`resume` goes on with an interrupted run.
"""

import importlib.util
from typing import Any

if importlib.util.find_spec("gymnasium") is None:
    raise ImportError("rl needs gymnasium: pip install 'rsm-sampler[rl]'", name="gymnasium")

from rl.comparison import Comparison
from rl.config import AgentConfig
from rl.dacer import DACER, DACERConfig
from rl.dipo import DIPO, DIPOConfig
from rl.dpmd import DPMD, DPMDConfig
from rl.dppo import DPPO, DPPOConfig
from rl.environments import EnvironmentFailure, Environments, EnvironmentSource
from rl.evaluation import Agent, Evaluation, evaluate
from rl.grid import compare
from rl.off_policy import OffPolicyAgent
from rl.qsm import QSM, QSMConfig
from rl.qvpo import QVPO, QVPOConfig
from rl.replay import Batch, MultiStep, ReplayBuffer
from rl.run import AGENTS, RunProgress
from rl.sdac import SDAC, SDACConfig
from rl.stable_baselines import StableBaselinesAgent
from rl.training import load, resume, train, train_seeds
from rsm_sampler.checked import checked

__all__ = [
    "AGENTS",
    "DACER",
    "DIPO",
    "DPMD",
    "DPPO",
    "QSM",
    "QVPO",
    "SDAC",
    "Agent",
    "AgentConfig",
    "Batch",
    "Comparison",
    "DACERConfig",
    "DIPOConfig",
    "DPMDConfig",
    "DPPOConfig",
    "EnvironmentFailure",
    "EnvironmentSource",
    "Environments",
    "Evaluation",
    "MultiStep",
    "OffPolicyAgent",
    "QSMConfig",
    "QVPOConfig",
    "ReplayBuffer",
    "RunProgress",
    "SDACConfig",
    "StableBaselinesAgent",
    "compare",
    "evaluate",
    "load",
    "resume",
    "train",
    "train_dacer",
    "train_dipo",
    "train_dpmd",
    "train_dppo",
    "train_qsm",
    "train_qvpo",
    "train_sdac",
    "train_seeds",
]


@checked
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


@checked
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


@checked
def train_qsm(env: EnvironmentSource, *, total_steps: int, **options: Any) -> QSM:  # noqa: ANN401
    """Train Q-score matching.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`QSMConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("qsm", env, total_steps=total_steps, **options)
    assert isinstance(agent, QSM)
    return agent


@checked
def train_dipo(env: EnvironmentSource, *, total_steps: int, **options: Any) -> DIPO:  # noqa: ANN401
    """Train a diffusion policy on actions that are moved uphill in the replay.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`DIPOConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("dipo", env, total_steps=total_steps, **options)
    assert isinstance(agent, DIPO)
    return agent


@checked
def train_dacer(env: EnvironmentSource, *, total_steps: int, **options: Any) -> DACER:  # noqa: ANN401
    """Train diffusion actor-critic with entropy regulator, back through the chain.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`DACERConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("dacer", env, total_steps=total_steps, **options)
    assert isinstance(agent, DACER)
    return agent


@checked
def train_qvpo(env: EnvironmentSource, *, total_steps: int, **options: Any) -> QVPO:  # noqa: ANN401
    """Train Q-weighted variational policy optimisation.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`QVPOConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("qvpo", env, total_steps=total_steps, **options)
    assert isinstance(agent, QVPO)
    return agent


@checked
def train_dppo(env: EnvironmentSource, *, total_steps: int, **options: Any) -> DPPO:  # noqa: ANN401
    """Train diffusion policy policy optimisation, on-policy.

    Arguments:
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        **options: As for :func:`train`: ``seed``, ``run_dir``, ``config`` (a configuration or the
            name of a preset) and more, and fields of :class:`DPPOConfig`.

    Returns:
        The trained agent.

    Raises:
        ValueError: If an argument does not fit.
    """
    agent = train("dppo", env, total_steps=total_steps, **options)
    assert isinstance(agent, DPPO)
    return agent
