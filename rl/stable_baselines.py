r"""SAC, TD3 and PPO of stable-baselines3, behind the same training, evaluation and logs.

They are the yardstick, so they are the library's own and not written again: :func:`rl.train`
takes them by the names ``"sac"``, ``"td3"`` and ``"ppo"``, with the arguments of their classes as
fields to change, and everything else is that library's default:

    rl.train("sac", "HalfCheetah-v5", total_steps=60_000, learning_starts=5000)

Two fields are not: ``action_noise`` may be a number, the standard deviation of Gaussian noise on
actions in [-1, 1], and is 0.1 for TD3, which explores by nothing else; ``normalise=True``
standardises observations and scales rewards (the library's ``VecNormalize``), as is usual with
PPO.

A run folder looks like that of any other agent but for checkpoints: a run that was interrupted
begins anew. Agents are saved as numbers alone, so that loading one executes nothing. Classes in
``policy_kwargs`` must be of ``torch.nn`` or ``torch.optim``, or their names.

Note:
    Its SAC begins to learn after 100 random steps unless ``learning_starts`` says otherwise; the
    other agents here take 5,000. The library seeds the random numbers of the whole process.

References:
    | Stable-Baselines3: Reliable Reinforcement Learning Implementations (Raffin et al., 2021)
    | https://github.com/DLR-RM/stable-baselines3
"""

import contextlib
import copy
import importlib.util
import inspect
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from rl.environments import EnvironmentSource, describe
from rl.evaluation import checked_observation, evaluate
from rsm_sampler import checkpoint
from rsm_sampler.checked import checked
from rsm_sampler.interrupts import terminable
from rsm_sampler.loggers import JSONLinesLogger, Logger
from rsm_sampler.schema import (
    anything,
    bounded,
    entries,
    fits,
    held,
    integer,
    number,
    optional,
    plain,
    record,
    tensor,
    text,
    understood,
)

__all__ = ["FOREIGN", "StableBaselinesAgent", "configuration", "train"]

FOREIGN = ("ppo", "sac", "td3")
_KIND, _VERSION = "agent", 1
_STATE = record(
    {
        "agent": text(FOREIGN),
        "observation_dim": integer(1, 2**31),
        "low": tensor(None, dtypes=(torch.float32, torch.float64)),
        "high": tensor(None, dtypes=(torch.float32, torch.float64)),
        "seed": integer(-(2**63), 2**63),
        "env": text(),
        "policy_kwargs": entries(plain),
        "modules": record({"policy": entries(tensor())}),
    },
    {"moments": optional(entries(anything))},
)
_EPSILON, _CLIP = 1e-8, 10.0  # of standardised observations; the library's defaults
_PLAIN = bool | int | float | str | None
_SET_HERE = {"policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model"}
# Fields that are not the library's arguments, or whose default is not.
_OWN: dict[str, dict[str, Any]] = {
    "ppo": {"normalise": False},
    "sac": {"normalise": False},
    "td3": {"normalise": False, "action_noise": 0.1},
}


@checked
class StableBaselinesAgent:
    """A policy of stable-baselines3, to act with.

    Arguments:
        name: ``"sac"``, ``"td3"`` or ``"ppo"``.
        policy: The library's policy object.
        low: Lower ends of the environment's actions.
        high: Upper ends.
        seed: The seed of its training.
        env: Name of the environment, for messages.
        policy_kwargs: What the policy was made with, besides spaces; classes by name.
        moments: The library's running moments of observations that the policy is given
            standardised; None if it is given them as they are.

    Attributes:
        updates: Number of gradient steps so far.
        interrupted: Whether Ctrl-C ended the training.
    """

    def __init__(
        self,
        name: str,
        policy: Any,  # noqa: ANN401
        *,
        low: ArrayLike,
        high: ArrayLike,
        seed: int = 0,
        env: str = "",
        policy_kwargs: dict[str, Any] | None = None,
        moments: Any = None,  # noqa: ANN401
    ) -> None:
        self.name, self.policy, self.seed, self.env = name, policy, seed, env
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.observation_dim = policy.observation_space.shape[0]
        self.action_dim = len(self.low)
        self.policy_kwargs, self.moments = policy_kwargs or {}, moments
        self.interrupted, self.updates = False, 0

    def predict(
        self, observation: ArrayLike, deterministic: bool = False
    ) -> tuple[NDArray[np.float32], None]:
        """Actions in the environment's units.

        Arguments:
            observation: One observation or a batch.
            deterministic: Whether to take the policy's mean.

        Raises:
            ValueError: If the observation has another length.
        """
        observation = checked_observation(observation, self.observation_dim)
        if self.moments is not None:
            centred = observation - self.moments.mean
            scaled = centred / np.sqrt(self.moments.var + _EPSILON)
            observation = scaled.clip(-_CLIP, _CLIP).astype(np.float32)
        action, _ = self.policy.predict(observation, deterministic=deterministic)
        return np.asarray(action, np.float32), None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what acting needs: the policy's parameters, and moments of observations."""
        known = self.moments
        state = {
            "agent": self.name,
            "observation_dim": self.observation_dim,
            "low": torch.from_numpy(self.low),
            "high": torch.from_numpy(self.high),
            "seed": self.seed,
            "env": self.env,
            "policy_kwargs": self.policy_kwargs,
            "moments": None
            if known is None
            else {
                "mean": torch.from_numpy(known.mean),
                "var": torch.from_numpy(known.var),
                "count": float(known.count),
            },
            "modules": {"policy": {k: v.cpu() for k, v in self.policy.state_dict().items()}},
        }
        checkpoint.save(path, state, kind=_KIND, version=_VERSION)

    @classmethod
    def from_state(
        cls, state: dict[str, Any], *, device: torch.device | str = "auto"
    ) -> "StableBaselinesAgent":
        """The agent that :meth:`save` wrote.

        Arguments:
            state: What the file holds.
            device: Where the network goes.

        Raises:
            CheckpointError: If that is none of an agent; nothing larger than it is allocated.
        """
        _STATE(state, "payload")
        n, low, high = state["observation_dim"], state["low"].numpy(), state["high"].numpy()
        tensors, algorithm = state["modules"]["policy"], _algorithm(state["agent"])
        if not any(each.dim() == 2 and each.shape[1] == n for each in tensors.values()):
            raise checkpoint.CheckpointError(
                f"payload['observation_dim'] must be what the policy takes, got {n}"
            )
        if low.shape != high.shape or not len(low) or not (low < high).all():
            raise checkpoint.CheckpointError("payload must have ends of actions, low below high")
        with understood("an agent of stable-baselines3"), bounded(held(state)), _silence():
            policy = algorithm.policy_aliases["MlpPolicy"](
                gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float32),
                gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32)),
                lambda _: 0.0,
                **_with_classes(state["policy_kwargs"]),
            )
        fits(policy, "the agent's policy_kwargs")(tensors, "payload['modules']['policy']")
        policy.load_state_dict(tensors)
        policy.set_training_mode(False)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        moments = None
        if (known := state.get("moments")) is not None:
            from stable_baselines3.common.running_mean_std import RunningMeanStd

            moment = tensor(n, dtypes=(torch.float64,))
            schema = {"mean": moment, "var": moment, "count": number(least=0.0)}
            record(schema)(known, "payload['moments']")
            if not bool((known["var"] >= 0).all()):
                raise checkpoint.CheckpointError("payload['moments']['var'] must be at least 0")
            moments = RunningMeanStd(shape=(n,))
            moments.mean, moments.var = known["mean"].numpy(), known["var"].numpy()
            moments.count = known["count"]
        return cls(
            state["agent"],
            policy.to(device),
            low=low,
            high=high,
            seed=state["seed"],
            env=state["env"],
            policy_kwargs=state["policy_kwargs"],
            moments=moments,
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings of layers without units: what such a file says is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@checked
def configuration(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What decides a run: the arguments of the library's class, defaults included.

    Arguments:
        name: ``"sac"``, ``"td3"`` or ``"ppo"``.
        changes: Arguments that differ from the defaults.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If there is no such argument, or a class that a saved agent could not name.
    """
    kind = _algorithm(name)
    parameters = inspect.signature(kind.__init__).parameters
    fields = {
        field: parameter.default
        for field, parameter in parameters.items()
        if field not in _SET_HERE and isinstance(parameter.default, _PLAIN)
    }
    own = _OWN[name]
    for field in changes:
        if field not in own and (field not in parameters or field in _SET_HERE):
            raise ValueError(
                f"config of {name!r} must have arguments of {kind.__name__}, got {field!r}"
            )
    found = {**fields, **own, **changes}
    if found.get("policy_kwargs"):
        found["policy_kwargs"] = _with_names(found["policy_kwargs"])
    return found


@checked
def train(
    name: str,
    env: EnvironmentSource,
    *,
    total_steps: int,
    seed: int = 0,
    changes: dict[str, Any],
    run_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str = "auto",
    eval_env: EnvironmentSource | None = None,
    eval_every: int | None = None,
    eval_episodes: int = 20,
    log_every: int = 1000,
    progress: bool | None = None,
    logger: Logger | None = None,
    callback: Callable[[int, float, StableBaselinesAgent], bool | None] | None = None,
) -> StableBaselinesAgent:
    """Train one of the library's agents; arguments as for :func:`rl.train`.

    Arguments:
        name: ``"sac"``, ``"td3"`` or ``"ppo"``.
        env: An id, a function that makes an environment, or an environment.
        total_steps: Environment steps.
        seed: Decides everything.
        changes: Arguments of the library's class that differ from its defaults.
        run_dir: Folder of the run; an unfinished run in it begins anew.
        device: Where to train.
        eval_env: Environment of evaluations; ``env`` if None, where that is an id or a function.
        eval_every: Environment steps between evaluations; a twentieth of the run if None, 0 for
            none.
        eval_episodes: Episodes of an evaluation.
        log_every: Environment steps between lines of the log.
        progress: Whether to show a progress bar; None to show it on a terminal.
        logger: Receives the numbers too.
        callback: Called after each evaluation with step, mean return and agent; a true return
            value stops the run.

    Returns:
        The trained agent. After Ctrl-C, the agent as it is.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If an argument does not fit.
    """
    config = configuration(name, changes)
    for field, value in (("total_steps", total_steps), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"{field} must be at least 1, got {value}")
    every = max(1, total_steps // 20) if eval_every is None else eval_every
    made = gymnasium.make(env) if isinstance(env, str) else env() if callable(env) else env
    if not isinstance(made, gymnasium.Env):
        raise ValueError(f"env must be one environment for {name!r}, got {type(made).__name__}")
    space = made.action_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"env must have a box of actions for {name!r}, got {space}")
    given = not isinstance(env, str) and not callable(env)
    tried = (None if given else env) if eval_env is None else eval_env
    folder = None if run_dir is None else Path(run_dir).expanduser()
    about = {
        "agent": name,
        "env": describe(env),
        "by_id": isinstance(env, str),
        "seed": seed,
        "config": json.loads(json.dumps(config, default=str)),
        "total_steps": total_steps,
        "eval_every": every,
    }
    loggers: list[Logger] = [] if logger is None else [logger]
    if folder is not None:
        _claim(folder, about)
        loggers.append(JSONLinesLogger(folder / "log.jsonl", resume_step=-1))
    from stable_baselines3.common.callbacks import BaseCallback

    model, moments = _model(name, made, config, seed, device)
    kwargs = config.get("policy_kwargs") or {}
    if getattr(model, "use_sde", False):  # the policy has other parameters then
        kwargs = {**kwargs, "use_sde": True}
    agent = StableBaselinesAgent(
        name,
        model.policy,
        low=space.low,
        high=space.high,
        seed=seed,
        env=describe(env),
        policy_kwargs=kwargs,
        moments=moments,
    )
    started = time.perf_counter()
    disable = None if progress is None else not progress
    bar = tqdm(total=total_steps, unit="step", disable=disable, desc=f"{name} {describe(env)}")
    best = -math.inf

    class Watch(BaseCallback):
        """Logs and evaluates where they are due."""

        def __init__(self) -> None:
            super().__init__()
            self.then = time.perf_counter(), 0

        def _on_step(self) -> bool:
            step = self.num_timesteps
            bar.update(min(step, total_steps) - bar.n)
            if step % log_every == 0:
                self._log(step)
            due = every and (step % every == 0 or step >= total_steps)
            stop = bool(due and self._evaluate(step))
            return not stop and step < total_steps  # PPO would complete its last rollout

        def _log(self, step: int) -> None:
            (then, before), now = self.then, time.perf_counter()
            self.then = now, step
            values = {
                "env_steps_per_second": (step - before) / max(now - then, 1e-9),
                "updates": float(_gradient_steps(model)),
            }
            if model.ep_info_buffer:
                values["train_return"] = float(np.mean([e["r"] for e in model.ep_info_buffer]))
            for each in loggers:
                each.log(step, **values)

        def _evaluate(self, step: int) -> bool:
            nonlocal best
            if tried is None:
                return False
            training = model.policy.training
            model.policy.set_training_mode(False)
            found = evaluate(agent, tried, episodes=eval_episodes)
            model.policy.set_training_mode(training)
            if folder is not None and found.mean > best:
                agent.save(folder / "best.pt")
            best = max(best, found.mean)
            if folder is not None:
                agent.save(folder / "last.pt")
            record = {
                "eval_mean": found.mean,
                "eval_std": found.std,
                "eval_best": best,
                "updates": float(_gradient_steps(model)),
                "seconds": time.perf_counter() - started,
            }
            for each in loggers:
                each.log(step, **record)
            return callback is not None and bool(callback(step, found.mean, agent))

    with terminable(folder is not None):
        try:
            model.learn(total_steps, callback=Watch())
        except KeyboardInterrupt:
            agent.interrupted = True
            tqdm.write(f"interrupted at step {model.num_timesteps:,}")
        finally:
            bar.close()
            for each in loggers:
                if each is not logger:
                    each.close()
        agent.updates = _gradient_steps(model)
        model.policy.set_training_mode(False)
        if folder is not None:
            agent.save(folder / "last.pt")
    return agent


def _model(
    name: str, env: gymnasium.Env, config: dict[str, Any], seed: int, device: torch.device | str
) -> tuple[Any, Any]:
    """The library's algorithm, and its moments of observations if it standardises them."""
    given: dict[str, Any] = copy.deepcopy(config)  # the library writes into what it is given
    noise, space = given.get("action_noise"), env.action_space
    if isinstance(noise, int | float):
        from stable_baselines3.common.noise import NormalActionNoise

        size = np.full(space.shape or (1,), float(noise))
        given["action_noise"] = NormalActionNoise(np.zeros_like(size), size)
    if given.get("policy_kwargs"):
        given["policy_kwargs"] = _with_classes(given["policy_kwargs"])
    source: Any = env
    if given.pop("normalise"):
        from stable_baselines3.common.monitor import Monitor
        from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

        source = VecNormalize(
            DummyVecEnv([lambda: Monitor(env)]),
            gamma=given["gamma"],
            epsilon=_EPSILON,
            clip_obs=_CLIP,
        )
    model = _algorithm(name)("MlpPolicy", source, seed=seed, device=device, verbose=0, **given)
    if given.get("tensorboard_log") is None:  # or the library leaves a folder for every run
        from stable_baselines3.common.logger import Logger as Silent

        model.set_logger(Silent(folder=None, output_formats=[]))
    return model, None if source is env else source.obs_rms


def _gradient_steps(model: Any) -> int:  # noqa: ANN401
    """Steps of the optimiser so far: PPO counts its epochs instead."""
    made = int(model._n_updates)
    if not hasattr(model, "n_epochs"):
        return made
    return made * math.ceil(model.n_steps * model.n_envs / model.batch_size)


def _with_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Classes by their names, which a file can hold."""
    found = {}
    for key, value in kwargs.items():
        if isinstance(value, type):
            if value is not _torch_class(value.__name__):
                raise ValueError(
                    "policy_kwargs must have classes of torch.nn or torch.optim, which a saved "
                    f"agent can name, got {key}={value!r}"
                )
            value = value.__name__
        found[key] = _with_names(value) if isinstance(value, dict) else value
    try:
        json.dumps(found)
    except TypeError as error:
        raise ValueError(
            f"policy_kwargs must hold numbers, texts, lists and dictionaries, got {kwargs}"
        ) from error
    return found


def _with_classes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The classes that :func:`_with_names` named."""
    return {
        key: _torch_class(value) if key.endswith(("_class", "_fn")) else value
        for key, value in kwargs.items()
    }


def _torch_class(name: str) -> type | None:
    found = getattr(torch.nn, name, None) or getattr(torch.optim, name, None)
    return found if isinstance(found, type) else None


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder this run's, or make sure that it is."""
    path = folder / "run.json"
    if path.exists():
        kept = json.loads(path.read_text())
        for key in ("agent", "env", "seed", "config"):
            if kept.get(key) != about[key]:
                raise ValueError(
                    f"run_dir must be new or hold this run, got {folder} with {key} "
                    f"{kept.get(key)} instead of {about[key]}"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"run_dir must be new or hold this run, got {folder} with other files")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".run.json.tmp"
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    temporary.replace(path)


def _algorithm(name: str) -> Any:  # noqa: ANN401
    if importlib.util.find_spec("stable_baselines3") is None:
        raise ImportError(
            f"the agent {name!r} needs: pip install 'rsm-sampler[sb3]'", name="stable_baselines3"
        )
    import stable_baselines3

    return {
        "ppo": stable_baselines3.PPO,
        "sac": stable_baselines3.SAC,
        "td3": stable_baselines3.TD3,
    }[name]
