r"""One run: agent, environments, replay and folder, and what one round does to them.

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

import contextlib
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from rl.base import BaseAgent, check_sizes
from rl.config import AgentConfig
from rl.dacer import DACER
from rl.dipo import DIPO
from rl.dpmd import DPMD
from rl.dppo import DPPO
from rl.environments import (
    EnvironmentFailure,
    Environments,
    EnvironmentSource,
    describe,
    is_environment,
)
from rl.evaluation import check_fits, evaluate
from rl.qsm import QSM
from rl.qvpo import QVPO
from rl.replay import MultiStep, ReplayBuffer
from rl.sdac import SDAC
from rl.stable_baselines import FOREIGN, StableBaselinesAgent
from rsm_sampler import DivergedError, checkpoint
from rsm_sampler.loggers import JSONLinesLogger, Logger
from rsm_sampler.schema import (
    anything,
    bounded,
    entries,
    flag,
    held,
    integer,
    items,
    number,
    optional,
    plain,
    record,
    shown,
    tensor,
    text,
    understood,
)
from rsm_sampler.version import __version__

__all__ = [
    "AGENTS",
    "RUN_OPTIONS",
    "AnyAgent",
    "Run",
    "RunProgress",
    "check_folder",
    "read_about",
    "uncounted_steps",
]

AGENTS: dict[str, type[BaseAgent]] = {
    kind.name: kind for kind in (SDAC, DPMD, QSM, DIPO, DACER, QVPO, DPPO)
}
AnyAgent = BaseAgent | StableBaselinesAgent
# What of the arguments of rl.train is no field of a configuration, and concerns a run alone.
RUN_OPTIONS = (
    "config",
    "device",
    "eval_env",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "log_every",
)
_LOG = logging.getLogger(__name__)
_KIND, _VERSION = "run", 1
_DECIDING = {"agent": text(), "env": text(), "config": entries(plain)}
_ABOUT = record(
    {**_DECIDING, "total_steps": integer(1)},
    {
        "by_id": flag(),
        "seed": integer(0, 2**63),
        "device": text(),
        "eval_env": optional(text()),
        "eval_by_id": flag(),
        "eval_every": integer(),
        "eval_episodes": integer(1),
        "checkpoint_every": integer(),
        "log_every": integer(1),
    },
    others=plain,
)
_NEEDED = ("seed", "eval_every", "eval_episodes", "checkpoint_every", "log_every")
_NUMBER = number(finite=False, nan=True)
_RUN = record(
    {
        "about": record(_DECIDING, {"by_id": flag(), "seed": integer(0, 2**63)}, others=plain),
        "agent": entries(anything),  # the agent's own
        "environments": optional(entries(anything)),  # theirs
        "observation": tensor(None, None, dtypes=(torch.float32,)),
        "transitions": integer(),
        "step": integer(),
        "owed": number(least=0.0),
        "best": optional(_NUMBER),
        "evaluations": items(entries(_NUMBER)),
        "recent": items(items(_NUMBER, length=2)),
        "random": record(
            {
                "state": record({"state": text(), "inc": text()}),
                "has_uint32": integer(0, 1),
                "uinteger": integer(0, 2**32 - 1),
            }
        ),
    },
    {
        "seconds": number(least=0.0),
        "latest": entries(tensor(finite=False)),
        "open_returns": items(items(items(anything, length=4))),
    },
)
# What run.json may ask for before there is a checkpoint to compare it with.
_MOST = {"num_envs": 4096, "depth": 1000, "critic_depth": 1000, "num_steps": 10_000}
_MOST_BYTES = 128 << 20


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


class Run:
    """One run: its parts, its rounds, its folder. For the arguments see :func:`rl.train`.

    ``most_bytes`` bounds the agent of a run whose configuration comes from a file; see
    :func:`rsm_sampler.schema.bounded`.
    """

    def __init__(
        self,
        agent: str,
        env: EnvironmentSource,
        *,
        total_steps: int,
        seed: int,
        run_dir: str | os.PathLike[str] | None,
        changes: dict[str, Any],
        config: AgentConfig | str = "corrected",
        device: torch.device | str = "auto",
        eval_env: EnvironmentSource | None = None,
        eval_every: int | None = None,
        eval_episodes: int = 20,
        checkpoint_every: int | None = None,
        log_every: int = 1000,
        most_bytes: int | None = None,
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
        self.given_env = given = is_environment(env)
        copies = getattr(env, "num_envs", 1) if given else config.num_envs
        self.environments = Environments(env, copies)
        self.given_eval_env = eval_env
        if eval_env is not None:
            probe = Environments(eval_env)
            check_fits(self.environments, probe)
            if not is_environment(eval_env):
                probe.close()  # made here
        self.eval_env = (None if given else env) if eval_env is None else eval_env
        self.about: dict[str, Any] = {
            "agent": agent,
            "env": describe(env),
            "by_id": isinstance(env, str),
            "seed": seed,
            "config": asdict(config),
        }
        environments = self.environments
        with contextlib.nullcontext() if most_bytes is None else bounded(most_bytes):
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
        self._opened, self._spent, self._share = time.perf_counter(), 0.0, 1
        self._saved_at = -1
        self.failed = False  # some environments may have stepped without us
        self.diverged = False
        self._loggers: list[Logger] = []
        self._log_file: JSONLinesLogger | None = None

    # ------------------------------------------------------------------ a round

    def open(self, logger: Logger | None, *, share: int = 1) -> bool:
        """Begin, or take up what was interrupted.

        Arguments:
            logger: Receives the numbers besides the folder's own log.
            share: Number of runs that are trained together, each of which takes its share of the
                time.

        Returns:
            Whether the run goes on.
        """
        going_on = self._load()
        self._opened, self._share = time.perf_counter(), share
        if not going_on:
            self.observation = self.environments.reset(seed=self._seeds(self.seed))
        self._loggers = [] if logger is None else [logger]
        if self.folder is not None:
            resume_step = self.step if going_on else None
            self._log_file = JSONLinesLogger(self.folder / "log.jsonl", resume_step=resume_step)
            self._loggers.append(self._log_file)
        return going_on

    def close(self) -> None:
        """Let go of graphs and of the log."""
        self.agent.release()
        if self._log_file is not None:
            self._log_file.close()

    @property
    def end(self) -> int:
        """Environment steps of the whole run."""
        return self.total_steps + uncounted_steps(self.about["config"])

    @property
    def seconds(self) -> float:
        """Wall time of what has been done, evaluations and earlier sittings included."""
        return self._spent + (time.perf_counter() - self._opened) / self._share

    @property
    def warming_up(self) -> bool:
        """Whether actions are still drawn at random."""
        return self.step < self.config.warmup_steps

    @property
    def train_return(self) -> float | None:
        """Mean return of the last episodes of training, where any has ended."""
        return float(np.mean([r for r, _ in self.recent])) if self.recent else None

    def random_action(self) -> NDArray[np.float32]:
        """An action of the first steps for each environment."""
        shape = self.environments.num_envs, self.environments.action_dim
        return self.random.uniform(-1, 1, shape).astype(np.float32)

    def owe(self) -> None:
        """Count the updates that a round owes."""
        self.owed += self.config.updates_per_step * self.environments.num_envs

    def take(self, action: NDArray[np.float32]) -> None:
        """Step the environments, and keep what came of it.

        Arguments:
            action: Actions within or about [-1, 1], (num_envs, action_dim).

        Raises:
            DivergedError: If an action is not finite.
            EnvironmentFailure: If an environment raises or returns NaN.
        """
        bad = ~np.isfinite(action).all(-1)
        if bad.any():
            self.diverged = True
            raise DivergedError(
                f"{self.agent.name} must give finite actions, got {action[bad][0].tolist()} at "
                f"step {self.step} after {self.agent.updates} updates: training has diverged; "
                "lower learning rates may help, and the last checkpoint stands"
            )
        try:
            after = self.environments.step(action)
        except EnvironmentFailure:
            self.failed = True
            raise
        self.agent.observe(after)
        closed = self.returns.add(self.observation, action, after)
        if closed is not None:
            self.replay.add(closed)
        if self.config.normalise_observations and after.valid.any():
            seen = torch.from_numpy(self.observation[after.valid])
            self.agent.moments.update(seen.to(self.agent.device))
        self.observation = after.observation
        self.step += self.environments.num_envs

    def after_round(
        self,
        before: int,
        callback: Callable[[RunProgress], bool | None] | None,
        write: Callable[[str], None],
    ) -> bool:
        """Log, evaluate and save where that is due.

        Arguments:
            before: Environment steps before the round.
            callback: Called after an evaluation.
            write: Where the evaluation is told.

        Returns:
            Whether the callback wants the run to stop.
        """
        if self._due(before, self.log_every):
            self._log()
        stop = False
        if self.eval_every and self._due(before, self.eval_every, self.end):
            mean = self._evaluate(write)
            if callback is not None:
                stop = bool(callback(RunProgress(self.step, mean, self.agent)))
        if self.checkpoint_every and self._due(before, self.checkpoint_every):
            self.save()
        return stop

    def _due(self, before: int, every: int, end: int | None = None) -> bool:
        return self.step // every > before // every or (end is not None and self.step >= end)

    def _log(self) -> None:
        now, updates = time.perf_counter(), self.agent.updates
        then, step, made = self._since
        self._since = (now, self.step, updates)
        values = {name: float(value) for name, value in self.latest.items()}
        self.recent = (self.recent + self.environments.finished)[-20:]
        self.environments.finished.clear()
        if self.train_return is not None:
            values["train_return"] = self.train_return
            values["train_length"] = float(np.mean([n for _, n in self.recent]))
        seconds = max(now - then, 1e-9)
        values["env_steps_per_second"] = (self.step - step) / seconds
        values["updates_per_second"] = (updates - made) / seconds
        values["updates"] = updates
        for each in self._loggers:
            each.log(self.step, **values)

    def _evaluate(self, write: Callable[[str], None]) -> float:
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
        self.save_agent()
        spent = {"updates": float(self.agent.updates), "seconds": self.seconds}
        for each in self._loggers:
            each.log(self.step, **record, eval_best=self.best, **spent)
        write(f"step {self.step:,}: {found}")
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
                wanted: Any = json.loads(json.dumps(value))
                kept: Any = found.get(key)
                if key == "config":  # fields that an older version did not know
                    kept = {**json.loads(json.dumps(asdict(type(self.config)()))), **kept}
                if kept != wanted:
                    raise ValueError(
                        f"run_dir must be new or hold this run, got {folder} with {key} "
                        f"{found.get(key)} instead of {value}"
                    )
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"run_dir must be new or hold this run, got {folder} with other files"
            )
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".run.json.tmp"
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        temporary.replace(path)

    def save_agent(self) -> None:
        """Write ``last.pt``."""
        if self.folder is not None:
            self.agent.save(self.folder / "last.pt")

    def save(self) -> None:
        """Write the exact state of the run."""
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
            "seconds": self.seconds,
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
        state = checkpoint.load(path, kind=_KIND, version=_VERSION, schema=_RUN)
        with checkpoint.named(path), understood("a run"):
            self._take(state)
        self.replay.load(self.folder / "replay", state["transitions"])
        return True

    def _take(self, state: dict[str, Any]) -> None:
        """Become the run of a checkpoint, but for the replay."""
        environments = self.environments
        shape = environments.num_envs, environments.observation_dim
        tensor(*shape, dtypes=(torch.float32,))(state["observation"], "payload['observation']")
        most = 1 + self.config.updates_per_step * environments.num_envs
        if state["owed"] > most:
            raise checkpoint.CheckpointError(
                f"payload['owed'] must be at most {most} updates, got {state['owed']}"
            )
        random = _from_bits(state["random"])
        open_returns = state.get("open_returns", self.returns.state())
        self._check_returns(open_returns)
        self.agent.load_state(state["agent"])
        self.step, self.owed, self.best = state["step"], state["owed"], state["best"]
        self.evaluations = state["evaluations"]
        self.recent = [(float(r), int(n)) for r, n in state["recent"]]
        self.latest = state.get("latest", {})
        self.random = random
        self._saved_at, self._spent = self.step, state.get("seconds", 0.0)
        self._since = (time.perf_counter(), self.step, self.agent.updates)
        if environments.resumes_exactly and state["environments"] is not None:
            environments.restore(state["environments"])
            self.observation = state["observation"].numpy()
            self.returns.load_state(open_returns)
        else:
            seeds = self._seeds(self.seed + self.step)
            self.observation = environments.reset(seed=seeds)

    def _check_returns(self, state: list[Any]) -> None:
        """Refuse open returns of other environments."""
        environments, key = self.environments, "payload['open_returns']"
        items(anything, length=environments.num_envs)(state, key)
        float32 = (torch.float32,)
        schemas = (
            tensor(environments.observation_dim, dtypes=float32),
            tensor(environments.action_dim, dtypes=float32),
            number(),
            integer(0, self.config.n_step),
        )
        for each in state:
            for entry in each:
                for schema, value in zip(schemas, entry, strict=True):
                    schema(value, key)

    def _seeds(self, seed: int) -> int | list[int]:
        """Of the copies of the environment: runs with neighbouring seeds have none in common."""
        if self.given_env:  # a vector environment of others may know numbers alone
            return seed
        others = (np.random.SeedSequence([seed, i]) for i in range(1, self.environments.num_envs))
        return [seed, *(int(each.generate_state(1)[0]) for each in others)]


def uncounted_steps(config: Mapping[str, Any]) -> int:
    """Random steps that a run makes before those that its length counts.

    Arguments:
        config: What ``run.json`` says of its configuration.
    """
    return 0 if config.get("count_warmup", True) else int(config["warmup_steps"])


def read_about(folder: Path) -> dict[str, Any]:
    """What a run folder says about its run.

    Arguments:
        folder: The folder.

    Raises:
        CheckpointError: If it holds no run.
    """
    path = folder / "run.json"
    try:
        if not path.is_file():
            raise checkpoint.CheckpointError(f"no run at {folder}: there is no run.json")
        about = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError) as error:
        if isinstance(error, checkpoint.CheckpointError):
            raise
        raise checkpoint.CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(about, dict) or not {"agent", "env", "config", "total_steps"} <= set(about):
        raise checkpoint.CheckpointError(f"{path} must say what was run, got {shown(about)}")
    with checkpoint.named(path):
        _ABOUT(about, "it")
    return about


def check_folder(folder: Path) -> tuple[dict[str, Any], AgentConfig, int]:
    """What a run's folder says of a run that is to go on, if its files agree.

    Arguments:
        folder: The folder.

    Returns:
        What ``run.json`` says, the configuration, and how many bytes the agent's tensors have in
        the checkpoint; where there is no checkpoint yet, how many they may have.

    Raises:
        CheckpointError: If it holds no run, or one of which nothing could be made.
    """
    about, path = read_about(folder), folder / "run.json"
    with checkpoint.named(path):
        for name in _NEEDED:
            if name not in about:
                raise checkpoint.CheckpointError(f"it must have the key {name!r}, got {[*about]}")
        if about["agent"] not in AGENTS:
            raise checkpoint.CheckpointError(
                f"agent must be one of {sorted(AGENTS)}, got {shown(about['agent'])}"
            )
        with understood("a run"), bounded(0):
            config = AGENTS[about["agent"]].config_type.from_saved(about["config"])
            torch.device(about.get("device", "cpu"))
        if config.replay_size > _all_memory() / ReplayBuffer.size_in_bytes(1, 1, 1):
            raise checkpoint.CheckpointError(
                f"replay_size must fit into this machine's memory, got {config.replay_size}"
            )
        kept = folder / "checkpoint.pt"
        if not kept.exists():
            for name, most in _MOST.items():
                if (value := getattr(config, name, None)) is not None and value > most:
                    raise checkpoint.CheckpointError(f"{name} must be at most {most}, got {value}")
            return about, config, _MOST_BYTES
    state = checkpoint.load(kept, kind=_KIND, version=_VERSION, schema=_RUN)
    with checkpoint.named(path):
        # An older version did not know all fields, in neither of the files.
        default = asdict(type(config)())
        ours = {"config": json.loads(json.dumps(asdict(config)))}
        theirs = {"config": json.loads(json.dumps({**default, **state["about"]["config"]}))}
        for name in ("agent", "seed"):
            ours[name], theirs[name] = about[name], state["about"].get(name, about[name])
        for name, value in ours.items():
            if theirs[name] != value:
                raise checkpoint.CheckpointError(
                    f"{name} must be that of checkpoint.pt, {shown(theirs[name])}, got "
                    f"{shown(value)}"
                )
        if config.num_envs != len(state["observation"]) and about.get("by_id", True):
            raise checkpoint.CheckpointError(
                f"num_envs must be {len(state['observation'])}, as checkpoint.pt has, got "
                f"{config.num_envs}"
            )
    with checkpoint.named(kept):
        check_sizes(state["agent"], config)
    return about, config, held(state["agent"])


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


def _all_memory() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


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
