r"""The training loop of off-policy agents: one environment step, the updates it owes, and so on.

In each round the agent acts on the current observations, makes the updates that are due, and the
environments step; then the transitions enter the replay. Updates thus never see the transition of
their own round, and on a GPU they run while the environments step.

**A run folder** holds everything:

=================== ==========================================================================
``run.json``        agent, environment, seed, length, configuration, versions
``log.jsonl``       numbers, one line each ``log_every`` steps and for each evaluation
``checkpoint.pt``   the exact state of the run, but for the replay
``replay/``         the transitions, each written once
``last.pt``         the agent after the last evaluation or at the end, for :func:`rl.load`
``best.pt``         the agent of the best evaluation
=================== ==========================================================================

A run that was interrupted and resumed equals one that was not, bit for bit on a CPU with a fixed
number of threads, for environments whose state can be taken (MuJoCo, classic control, and those
with ``get_state`` and ``set_state``); others start new episodes, which is printed. After a
failure of an environment all start new episodes, since some may have stepped.
"""

import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm.auto import tqdm

from rl.config import AgentConfig
from rl.dacer import DACER
from rl.dipo import DIPO
from rl.dpmd import DPMD
from rl.environments import (
    EnvironmentFailure,
    Environments,
    EnvironmentSource,
    describe,
    is_environment,
)
from rl.evaluation import check_fits, evaluate
from rl.off_policy import OffPolicyAgent
from rl.qsm import QSM
from rl.qvpo import QVPO
from rl.replay import MultiStep, ReplayBuffer
from rl.sdac import SDAC
from rl.stable_baselines import FOREIGN, StableBaselinesAgent
from rl.stable_baselines import train as train_foreign
from rsm_sampler import checkpoint
from rsm_sampler.interrupts import deferred_interrupt
from rsm_sampler.loggers import JSONLinesLogger, Logger
from rsm_sampler.version import __version__

__all__ = ["AGENTS", "RunProgress", "load", "read_about", "resume", "train"]

AGENTS: dict[str, type[OffPolicyAgent]] = {
    kind.name: kind for kind in (SDAC, DPMD, QSM, DIPO, DACER, QVPO)
}
AnyAgent = OffPolicyAgent | StableBaselinesAgent
_LOG = logging.getLogger(__name__)
_KIND, _VERSION = "run", 1


@dataclass(frozen=True)
class RunProgress:
    """What a callback sees, after each evaluation.

    Attributes:
        step: Environment steps so far.
        mean: Mean return of the evaluation.
        agent: The agent.
    """

    step: int
    mean: float
    agent: AnyAgent


def train(
    agent: str,
    env: EnvironmentSource,
    *,
    total_steps: int,
    seed: int = 0,
    config: AgentConfig | str = "corrected",
    run_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str = "auto",
    eval_env: EnvironmentSource | None = None,
    eval_every: int | None = None,
    eval_episodes: int = 20,
    checkpoint_every: int | None = None,
    log_every: int = 1000,
    progress: bool | None = None,
    logger: Logger | None = None,
    callback: Callable[[RunProgress], bool | None] | None = None,
    **changes: Any,  # noqa: ANN401
) -> AnyAgent:
    """Train an agent; see the agent's own function for its configuration.

    Arguments:
        agent: Name of the agent: one of ours, or ``"sac"``, ``"td3"`` or ``"ppo"`` of
            stable-baselines3, whose configuration is that library's; see
            :mod:`rl.stable_baselines`.
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        seed: Decides everything.
        config: A configuration or the name of a preset.
        run_dir: Folder of the run, new or of this very run; None keeps nothing on disk.
        device: ``"auto"`` takes a GPU where there is one.
        eval_env: Environment of evaluations; ``env`` if None, where that is an id or a function.
        eval_every: Environment steps between evaluations; a twentieth of the run if None, 0 for
            none.
        eval_episodes: Episodes of an evaluation.
        checkpoint_every: Environment steps between checkpoints; a twentieth of the run if None.
        log_every: Environment steps between lines of the log.
        progress: Whether to show a progress bar; None to show it on a terminal.
        logger: Receives the numbers too.
        callback: Called after each evaluation; a true return value stops the run.
        **changes: Fields of the configuration that differ from the preset.

    Returns:
        The trained agent. After Ctrl-C, the agent as it is: the run can be resumed.

    Raises:
        ValueError: If an argument does not fit.
        EnvironmentFailure: If an environment raises or returns NaN; the run is saved before.
    """
    if agent in FOREIGN:
        if config != "corrected":
            raise ValueError(f"config of {agent!r} is set by its fields alone, got {config!r}")
        return train_foreign(
            agent,
            env,
            total_steps=total_steps,
            seed=seed,
            changes=changes,
            run_dir=run_dir,
            device=device,
            eval_env=eval_env,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            log_every=log_every,
            progress=progress,
            logger=logger,
            callback=None
            if callback is None
            else lambda step, mean, trained: callback(RunProgress(step, mean, trained)),
        )
    run = _Run(
        agent,
        env,
        total_steps=total_steps,
        seed=seed,
        config=config,
        run_dir=run_dir,
        device=device,
        eval_env=eval_env,
        eval_every=eval_every,
        eval_episodes=eval_episodes,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        changes=changes,
    )
    return run.go(progress=progress, logger=logger, callback=callback)


def resume(
    run_dir: str | os.PathLike[str],
    *,
    env: EnvironmentSource | None = None,
    eval_env: EnvironmentSource | None = None,
    total_steps: int | None = None,
    device: torch.device | str = "auto",
    progress: bool | None = None,
    logger: Logger | None = None,
    callback: Callable[[RunProgress], bool | None] | None = None,
) -> OffPolicyAgent:
    """Go on with an interrupted run.

    Arguments:
        run_dir: Its folder.
        env: The environment, where the run did not get it by id.
        eval_env: That of evaluations, where the run had another one and did not get it by id.
        total_steps: A new length.
        device: Where to train; ``"auto"`` is where the run was.
        progress: As in :func:`train`.
        logger: As in :func:`train`.
        callback: As in :func:`train`.

    Raises:
        CheckpointError: If the folder holds no run.
        ValueError: If an environment is needed that has no id, or the run is one of
            stable-baselines3, which begins anew instead: train it again.
    """
    about = read_about(Path(run_dir))
    if about["agent"] in FOREIGN:
        raise ValueError(f"run_dir must be of an agent that resumes, got one of {about['agent']}")
    for name, given, known in (("env", env, "by_id"), ("eval_env", eval_env, "eval_by_id")):
        if given is None and not about.get(known, True):  # older folders do not say
            raise ValueError(
                f"{name} must be given for a run on {about[name]}, which has no id, got None"
            )
    kind = AGENTS[about["agent"]].config_type
    run = _Run(
        about["agent"],
        about["env"] if env is None else env,
        total_steps=about["total_steps"] if total_steps is None else total_steps,
        seed=about["seed"],
        config=kind.from_saved(about["config"]),
        run_dir=run_dir,
        device=about.get("device", device) if device == "auto" else device,
        eval_env=about.get("eval_env") if eval_env is None else eval_env,
        eval_every=about["eval_every"],
        eval_episodes=about["eval_episodes"],
        checkpoint_every=about["checkpoint_every"],
        log_every=about["log_every"],
        changes={},
    )
    return run.go(progress=progress, logger=logger, callback=callback)


def load(path: str | os.PathLike[str], *, device: torch.device | str = "auto") -> AnyAgent:
    """The agent that was saved to a file. Nothing in it is executed.

    Arguments:
        path: What ``agent.save`` wrote, or ``best.pt`` or ``last.pt`` of a run.
        device: Where its networks go.

    Raises:
        CheckpointError: If the file holds no agent.
    """
    state = checkpoint.load(path, kind="agent", version=1)
    if state["agent"] in FOREIGN:
        return StableBaselinesAgent.from_state(state, device=device)
    if state["agent"] not in AGENTS:
        raise checkpoint.CheckpointError(
            f"{os.fspath(path)} must be one of the agents {sorted(AGENTS)}, got {state['agent']!r}"
        )
    return AGENTS[state["agent"]].from_state(state, device=device)


class _Run:
    """One run: its parts, its loop, its folder."""

    def __init__(
        self,
        agent: str,
        env: EnvironmentSource,
        *,
        total_steps: int,
        seed: int,
        config: AgentConfig | str,
        run_dir: str | os.PathLike[str] | None,
        device: torch.device | str,
        eval_env: EnvironmentSource | None,
        eval_every: int | None,
        eval_episodes: int,
        checkpoint_every: int | None,
        log_every: int,
        changes: dict[str, Any],
    ) -> None:
        if agent not in AGENTS:
            known = sorted([*AGENTS, *FOREIGN])
            raise ValueError(f"agent must be one of {known}, got {agent!r}")
        for name, value in (
            ("total_steps", total_steps),
            ("log_every", log_every),
            ("eval_episodes", eval_episodes),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        twentieth = max(1, total_steps // 20)
        self.eval_every = twentieth if eval_every is None else eval_every
        self.checkpoint_every = twentieth if checkpoint_every is None else checkpoint_every
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        kind = AGENTS[agent]
        if isinstance(config, str):
            config = kind.config_type.preset(config, **changes)
        elif changes:
            raise ValueError(f"config must be a preset's name to change {sorted(changes)} of it")
        if type(config) is not kind.config_type:
            raise ValueError(
                f"config must be a {kind.config_type.__name__} or the name of a preset, "
                f"got {config!r}"
            )
        if config.count_warmup and total_steps <= config.warmup_steps:
            raise ValueError(
                f"total_steps must be above warmup_steps {config.warmup_steps}, without which "
                f"there is no update, got {total_steps}"
            )
        self.config = config
        self.total_steps, self.log_every, self.eval_episodes = (
            total_steps,
            log_every,
            eval_episodes,
        )
        given = is_environment(env)
        copies = getattr(env, "num_envs", 1) if given else config.num_envs
        self.environments = Environments(env, copies)
        self.given_eval_env = eval_env
        if eval_env is not None:
            probe = Environments(eval_env)
            check_fits(self.environments, probe)
            if not is_environment(eval_env):
                probe.close()  # made here
        self.eval_env = (None if given else env) if eval_env is None else eval_env
        self.about = {
            "agent": agent,
            "env": describe(env),
            "by_id": isinstance(env, str),
            "seed": seed,
            "config": asdict(config),
        }
        environments = self.environments
        self.agent = kind(
            environments.observation_dim,
            environments.action_dim,
            config,
            seed=seed,
            device=device,
            low=environments.low,
            high=environments.high,
            env=describe(env),
        )
        self.folder = None if run_dir is None else Path(run_dir).expanduser()
        if self.folder is not None:
            self._claim(self.folder)
        sizes = (config.replay_size, environments.observation_dim, environments.action_dim)
        size = ReplayBuffer.size_in_bytes(*sizes)
        self.announcement = (
            f"replay: {config.replay_size:,} transitions, {size / 1e6:,.0f} MB on "
            f"{self.agent.device}"
        )
        _LOG.info(self.announcement)
        if self.agent.device.type == "cpu" and size > _free_memory():
            warnings.warn(
                f"{self.announcement}, more than the {_free_memory() / 1e6:,.0f} MB that are "
                "free: choose a smaller replay_size",
                ResourceWarning,
                stacklevel=4,
            )
        self.replay = ReplayBuffer(*sizes, device=self.agent.device)
        self.returns = MultiStep(config.n_step, config.discount, environments.num_envs)
        self.random = np.random.default_rng([seed, 0])
        self.seed = seed
        self.step, self.owed = 0, 0.0
        self.best: float | None = None
        self.evaluations: list[dict[str, float]] = []
        self.latest: dict[str, torch.Tensor] = {}
        self.recent: list[tuple[float, int]] = []
        self._since = (time.perf_counter(), 0, 0)
        self._saved_at = -1
        self.failed = False  # some environments may have stepped without us

    # ------------------------------------------------------------------ the loop

    def go(
        self,
        *,
        progress: bool | None,
        logger: Logger | None,
        callback: Callable[[RunProgress], bool | None] | None,
    ) -> OffPolicyAgent:
        """Run to the end, or to an interruption."""
        going_on = self._load()
        if not going_on:
            self.observation = self.environments.reset(seed=self.seed)
        loggers: list[Logger] = [] if logger is None else [logger]
        if self.folder is not None:
            resume_step = self.step if going_on else None
            loggers.append(JSONLinesLogger(self.folder / "log.jsonl", resume_step=resume_step))
        disable = None if progress is None else not progress
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=disable)
        bar.set_description(f"{self.agent.name} {self.about['env']}")
        bar.write(self.announcement) if not bar.disable else None
        if going_on and not self.environments.resumes_exactly:
            bar.write(f"{self.about['env']} starts new episodes: its state cannot be taken")
        warmup = self.config.warmup_steps
        end = self.total_steps + (0 if self.config.count_warmup else warmup)
        try:
            with deferred_interrupt() as interrupted:
                while self.step < end:
                    before = self.step
                    self._round(warmup)
                    bar.update(min(self.step, self.total_steps) - bar.n)
                    if self._due(before, self.log_every):
                        self._log(loggers, bar)
                    if self.eval_every and self._due(before, self.eval_every, end):
                        mean = self._evaluate(loggers, bar)
                        if callback is not None and callback(
                            RunProgress(self.step, mean, self.agent)
                        ):
                            break
                    if interrupted():
                        self._save()
                        raise KeyboardInterrupt
                    if self.checkpoint_every and self._due(before, self.checkpoint_every):
                        self._save()
            self._save()
            self._save_agent()
        except KeyboardInterrupt:
            # In the middle of a step, as after a second Ctrl-C, the last checkpoint stands.
            self.agent.interrupted = True
            where = f"go on with: rsm-rl resume {self.folder}" if self.folder else "nothing saved"
            tqdm.write(f"interrupted at step {self.step:,}; {where}")
        except EnvironmentFailure:
            self.failed = True
            self._save()
            raise
        except Exception:
            self._save()
            raise
        finally:
            self.agent.release()
            bar.close()
            for each in loggers:
                if each is not logger:
                    each.close()
        return self.agent

    def _round(self, warmup: int) -> None:
        environments, n = self.environments, self.environments.num_envs
        if self.step < warmup:
            shape = (n, environments.action_dim)
            action = self.random.uniform(-1, 1, shape).astype(np.float32)
        else:
            action = self.agent.act(self.observation)
            if len(self.replay) >= 1:
                self.owed += self.config.updates_per_step * n
        while self.owed >= 1:
            self.latest |= self.agent.update(self.replay)
            self.owed -= 1
        after = environments.step(action)
        closed = self.returns.add(self.observation, action, after)
        if closed is not None:
            self.replay.add(closed)
        if self.config.normalise_observations and after.valid.any():
            seen = torch.from_numpy(self.observation[after.valid])
            self.agent.moments.update(seen.to(self.agent.device))
        self.observation = after.observation
        self.step += n

    def _due(self, before: int, every: int, end: int | None = None) -> bool:
        return self.step // every > before // every or (end is not None and self.step >= end)

    def _log(self, loggers: list[Logger], bar: tqdm) -> None:
        now, updates = time.perf_counter(), self.agent.updates
        then, step, made = self._since
        self._since = (now, self.step, updates)
        values = {name: float(value) for name, value in self.latest.items()}
        self.recent = (self.recent + self.environments.finished)[-20:]
        self.environments.finished.clear()
        if self.recent:
            values["train_return"] = float(np.mean([r for r, _ in self.recent]))
            values["train_length"] = float(np.mean([n for _, n in self.recent]))
            bar.set_postfix(
                {"return": f"{values['train_return']:.1f}", "updates": updates}, refresh=False
            )
        seconds = max(now - then, 1e-9)
        values["env_steps_per_second"] = (self.step - step) / seconds
        values["updates_per_second"] = (updates - made) / seconds
        values["updates"] = updates
        for each in loggers:
            each.log(self.step, **values)

    def _evaluate(self, loggers: list[Logger], bar: tqdm) -> float:
        if self.eval_env is None:
            return float("nan")
        found = evaluate(self.agent, self.eval_env, episodes=self.eval_episodes)
        record = {
            "eval_mean": found.mean,
            "eval_std": found.std,
            "eval_length": float(found.lengths.mean()),
        }
        self.evaluations.append({"step": self.step, **record})
        if self.best is None or found.mean > self.best:
            self.best = found.mean
            if self.folder is not None:
                self.agent.save(self.folder / "best.pt")
        self._save_agent()
        for each in loggers:
            each.log(self.step, **record, eval_best=self.best)
        bar.write(f"step {self.step:,}: {found}") if not bar.disable else None
        return found.mean

    # ------------------------------------------------------------------ the folder

    def _claim(self, folder: Path) -> None:
        """Make the folder this run's, or make sure that it is."""
        versions = {
            "rsm_sampler": __version__,
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "python": platform.python_version(),
        }
        about = {
            **self.about,
            "device": self.agent.device.type,
            "total_steps": self.total_steps,
            "eval_env": None if self.given_eval_env is None else describe(self.given_eval_env),
            "eval_by_id": isinstance(self.given_eval_env, str | None),
            "eval_every": self.eval_every,
            "eval_episodes": self.eval_episodes,
            "checkpoint_every": self.checkpoint_every,
            "log_every": self.log_every,
            "versions": versions,
        }
        path = folder / "run.json"
        if path.exists():
            found = read_about(folder)
            for key, value in self.about.items():
                wanted, kept = json.loads(json.dumps(value)), found[key]
                if key == "config":  # fields that an older version did not know
                    kept = {**json.loads(json.dumps(asdict(type(self.config)()))), **kept}
                if kept != wanted:
                    raise ValueError(
                        f"run_dir must be new or hold this run, got {folder} with {key} "
                        f"{found[key]} instead of {value}"
                    )
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"run_dir must be new or hold this run, got {folder} with other files"
            )
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".run.json.tmp"
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        temporary.replace(path)

    def _save_agent(self) -> None:
        if self.folder is not None:
            self.agent.save(self.folder / "last.pt")

    def _save(self) -> None:
        if self.folder is None or self._saved_at == self.step:
            return
        self.replay.save_new(self.folder / "replay")
        state = {
            "about": self.about,
            "agent": self.agent.state(),
            "environments": None if self.failed else self.environments.state(),
            "observation": torch.from_numpy(self.observation.copy()),
            "transitions": self.replay.count,
            "open_returns": self.returns.state(),
            "step": self.step,
            "owed": self.owed,
            "best": self.best,
            "evaluations": self.evaluations,
            "recent": self.recent + self.environments.finished,
            "latest": {name: torch.as_tensor(value) for name, value in self.latest.items()},
            "random": _bits(self.random),
        }
        checkpoint.save(self.folder / "checkpoint.pt", state, kind=_KIND, version=_VERSION)
        self.replay.prune(self.folder / "replay")
        self._saved_at = self.step

    def _load(self) -> bool:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return False
        path = self.folder / "checkpoint.pt"
        state = checkpoint.load(path, kind=_KIND, version=_VERSION)
        self.agent.load_state(state["agent"])
        self.replay.load(self.folder / "replay", state["transitions"])
        self.step, self.owed, self.best = state["step"], state["owed"], state["best"]
        self.evaluations, self.recent = state["evaluations"], state["recent"]
        self.latest = state.get("latest", {})
        self.random = _from_bits(state["random"])
        self._saved_at = self.step
        self._since = (time.perf_counter(), self.step, self.agent.updates)
        if self.environments.resumes_exactly and state["environments"] is not None:
            self.environments.restore(state["environments"])
            self.observation = state["observation"].numpy()
            self.returns.load_state(state.get("open_returns", self.returns.state()))
        else:
            self.observation = self.environments.reset(seed=self.seed + self.step)
        return True


def read_about(folder: Path) -> dict[str, Any]:
    """What a run folder says about its run.

    Arguments:
        folder: The folder.

    Raises:
        CheckpointError: If it holds no run.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise checkpoint.CheckpointError(f"no run at {folder}: there is no run.json")
    try:
        about = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise checkpoint.CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(about, dict) or not {"agent", "env", "config", "total_steps"} <= set(about):
        raise checkpoint.CheckpointError(f"{path} must say what was run, got {str(about)[:80]}")
    return about


def _bits(generator: np.random.Generator) -> dict[str, Any]:
    state: Any = generator.bit_generator.state
    return {
        "state": {key: str(value) for key, value in state["state"].items()},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }


def _from_bits(state: dict[str, Any]) -> np.random.Generator:
    bits: Any = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {key: int(value) for key, value in state["state"].items()},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }
    return np.random.Generator(bits)


def _free_memory() -> float:
    try:  # with what the system would give back of its caches
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return float("inf")
