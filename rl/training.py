r"""The training loop of off-policy agents: one environment step, the updates it owes, and so on.

In each round the agent acts on the current observations, makes the updates that are due, and the
environments step; then the transitions enter the replay. Updates thus never see the transition of
their own round, and on a GPU they run while the environments step.

Several runs that differ in their seeds share the loop, round by round. What a run is, and what its
folder holds, stands in :mod:`rl.run`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from rl.base import BaseAgent
from rl.config import AgentConfig
from rl.environments import EnvironmentSource, is_environment
from rl.lockstep import Lockstep
from rl.run import AGENTS, RUN_OPTIONS, AnyAgent, Run, RunProgress, check_folder, read_about
from rl.stable_baselines import FOREIGN, StableBaselinesAgent
from rl.stable_baselines import train as train_foreign
from rsm_sampler import checkpoint
from rsm_sampler.checked import checked
from rsm_sampler.interrupts import deferred_interrupt, terminable
from rsm_sampler.loggers import Logger
from rsm_sampler.schema import anything, record, shown, text

__all__ = ["load", "resume", "train", "train_seeds"]


@checked
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
        The trained agent. After Ctrl-C, the agent as it is: the run can be resumed. After SIGTERM
        a run with a folder is saved in the same way, and the process ends with status 143.

    Raises:
        SystemExit: After SIGTERM, with a folder.
        ValueError: If an argument does not fit.
        DivergedError: If the agent's actions are not finite; the last checkpoint stands.
        EnvironmentFailure: If an environment raises or returns NaN; the run is saved before.
    """
    if "seeds" in changes:
        raise ValueError(f"seeds must go to rl.train_seeds, got {changes['seeds']}")
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
    run = Run(
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
    _go([run], progress=progress, loggers=[logger], callback=callback)
    return run.agent


@checked
def train_seeds(
    agent: str,
    env: EnvironmentSource,
    *,
    seeds: int | Sequence[int],
    total_steps: int,
    batched: bool | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    logger: Logger | None = None,
    callback: Callable[[RunProgress], bool | None] | None = None,
    **options: Any,  # noqa: ANN401
) -> list[BaseAgent]:
    """Train an agent with several seeds in one process.

    The runs are those of :func:`train` with each seed, with environments, replay, random numbers
    and folder of their own, and each can be resumed by itself.

    Arguments:
        agent: Name of one of our agents.
        env: An id, or a function that makes an environment.
        seeds: The seeds, or how many: 0, 1, ...
        total_steps: Environment steps of each run.
        batched: Whether the updates of all are one computation (see :mod:`rl.lockstep`), or are
            made one after the other; None takes the first on a GPU, for agents that can.
        run_dir: Folder of the runs, which are in its folders ``seed-0`` and so on; or the folder
            of each, where ``{seed}`` in its name stands for the seed.
        progress: As in :func:`train`.
        logger: Receives the numbers of all, under ``seed-0/`` and so on.
        callback: Called after each evaluation of each run; all stop once those of all runs have
            returned a true value.
        **options: As for :func:`train`, for all runs; ``eval_env`` must not be an environment.

    Returns:
        The trained agents, in the order of the seeds.

    Raises:
        ValueError: If an argument does not fit.
        DivergedError: If an agent's actions are not finite; its last checkpoint stands.
        EnvironmentFailure: If an environment raises or returns NaN; all runs are saved before.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be at least one, all different, got {seeds}")
    if agent in FOREIGN:
        raise ValueError(f"agent must be one of {sorted(AGENTS)} for several seeds, got {agent!r}")
    for name, source in (("env", env), ("eval_env", options.get("eval_env"))):
        if source is not None and is_environment(source):
            raise ValueError(f"{name} must be an id or a function for several seeds, got {source}")
    shared = {name: options.pop(name) for name in RUN_OPTIONS if name in options}
    runs = [
        Run(
            agent,
            env,
            total_steps=total_steps,
            seed=seed,
            run_dir=None if run_dir is None else _folder(run_dir, seed),
            changes=options,
            **shared,
        )
        for seed in chosen
    ]
    first = runs[0].agent
    if batched and not first.stackable:
        raise ValueError(f"batched must be False or None for the agent {agent!r}, got True")
    if batched is None:
        batched = first.stackable and first.device.type == "cuda"
    loggers = [None if logger is None else _Named(logger, f"seed-{seed}/") for seed in chosen]
    _go(runs, progress=progress, loggers=loggers, callback=callback, batched=batched)
    return [run.agent for run in runs]


@checked
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
) -> BaseAgent:
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
        CheckpointError: If the folder holds no run, or files that do not fit together.
        ValueError: If an environment is needed that has no id, or the run is one of
            stable-baselines3, which begins anew instead: train it again.
    """
    about = read_about(Path(run_dir).expanduser())
    if about["agent"] in FOREIGN:
        raise ValueError(f"run_dir must be of an agent that resumes, got one of {about['agent']}")
    for name, given, known in (("env", env, "by_id"), ("eval_env", eval_env, "eval_by_id")):
        if given is None and not about.get(known, True):  # older folders do not say
            raise ValueError(
                f"{name} must be given for a run on {about[name]}, which has no id, got None"
            )
    _, config, most_bytes = check_folder(Path(run_dir).expanduser())
    given = about["env"] if env is None else env
    given_eval = about.get("eval_env") if eval_env is None else eval_env
    with checkpoint.named(Path(run_dir, "run.json")), _known(env, eval_env):
        run = Run(
            about["agent"],
            given,
            total_steps=about["total_steps"] if total_steps is None else total_steps,
            seed=about["seed"],
            config=config,
            most_bytes=most_bytes,
            run_dir=run_dir,
            device=about.get("device", device) if device == "auto" else device,
            eval_env=given_eval,
            eval_every=about["eval_every"],
            eval_episodes=about["eval_episodes"],
            checkpoint_every=about["checkpoint_every"],
            log_every=about["log_every"],
            changes={},
        )
    _go([run], progress=progress, loggers=[logger], callback=callback)
    return run.agent


@checked
def load(path: str | os.PathLike[str], *, device: torch.device | str = "auto") -> AnyAgent:
    """The agent that was saved to a file. Nothing in it is executed.

    Arguments:
        path: What ``agent.save`` wrote, or ``best.pt`` or ``last.pt`` of a run.
        device: Where its networks go.

    Raises:
        CheckpointError: If the file holds no agent.
    """
    named_agent = record({"agent": text()}, others=anything)
    state = checkpoint.load(path, kind="agent", version=1, schema=named_agent)
    if state["agent"] not in (*FOREIGN, *AGENTS):
        raise checkpoint.CheckpointError(
            f"{os.fspath(path)} must be one of the agents {sorted(AGENTS)}, got "
            f"{shown(state['agent'])}"
        )
    with checkpoint.named(path):
        if state["agent"] in FOREIGN:
            return StableBaselinesAgent.from_state(state, device=device)
        return AGENTS[state["agent"]].from_state(state, device=device)


@contextlib.contextmanager
def _known(*given: EnvironmentSource | None) -> Iterator[None]:
    """Name the file where it, and not the caller, names an environment that is not known."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("env must be a registered id") and None in given:
            raise checkpoint.CheckpointError(str(error)) from error
        raise


def _go(
    runs: list[Run],
    *,
    progress: bool | None,
    loggers: Sequence[Logger | None],
    callback: Callable[[RunProgress], bool | None] | None,
    batched: bool = False,
) -> None:
    """Run to the end, or to an interruption.

    Runs with a folder are saved when SIGTERM comes, which then ends the process.
    """
    with terminable(runs[0].folder is not None):
        _go_on(runs, progress=progress, loggers=loggers, callback=callback, batched=batched)


def _go_on(
    runs: list[Run],
    *,
    progress: bool | None,
    loggers: Sequence[Logger | None],
    callback: Callable[[RunProgress], bool | None] | None,
    batched: bool,
) -> None:
    """The same, as long as the process lives."""
    going_on = [
        run.open(logger, share=len(runs)) for run, logger in zip(runs, loggers, strict=True)
    ]
    first, many = runs[0], len(runs) > 1
    bar = tqdm(
        total=first.total_steps,
        initial=min(run.step for run in runs),
        unit="step",
        disable=None if progress is None else not progress,
    )
    title = f"{first.agent.name} {first.about['env']}"
    bar.set_description(f"{title}, {len(runs)} seeds" if many else title)

    def write(text: str) -> None:
        if not bar.disable:
            bar.write(text)

    def saying(run: Run) -> Callable[[str], None]:
        return (lambda text: write(f"seed {run.seed}, {text}")) if many else write

    write(f"{len(runs)} runs, each with {first.announcement}" if many else first.announcement)
    if any(going_on) and not first.environments.resumes_exactly:
        write(f"{first.about['env']} starts new episodes: its state cannot be taken")
    together: Lockstep | None = None
    stopping: set[int] = set()
    try:
        with deferred_interrupt() as interrupted:
            while (
                len(stopping) < len(runs) and (step := min(run.step for run in runs)) < first.end
            ):
                # After a failure of an environment, runs that are behind catch up first.
                due = [run for run in runs if run.step == step]
                if batched and together is None and len(due) == len(runs) and _alike(runs):
                    together = Lockstep([run.agent for run in runs])
                _round(due, together)
                bar.update(min(due[0].step, first.total_steps) - bar.n)
                for run in due:
                    if run.after_round(step, callback, saying(run)):
                        stopping.add(run.seed)
                logged = first.step // first.log_every > step // first.log_every
                returns = [run.train_return for run in runs] if logged else []
                if returns := [each for each in returns if each is not None]:
                    shown = {"return": f"{np.mean(returns):.1f}", "updates": first.agent.updates}
                    bar.set_postfix(shown, refresh=False)
                if interrupted():
                    for run in runs:
                        run.save()
                    raise KeyboardInterrupt
        for run in runs:
            run.save()
            run.save_agent()
    except KeyboardInterrupt:
        # In the middle of a step, as after a second Ctrl-C, the last checkpoint stands.
        for run in runs:
            run.agent.interrupted = True
        where = "nothing saved"
        if first.folder is not None:
            where = f"go on with: rsm-rl resume {first.folder}"
            where += ", and so on, or with the same call" if many else ""
        tqdm.write(f"interrupted at step {first.step:,}; {where}")
    except Exception:
        for run in runs:
            if not run.diverged:
                run.save()
        raise
    finally:
        bar.close()
        for run in runs:
            run.close()


def _round(runs: list[Run], together: Lockstep | None) -> None:
    """A step of the environments of some runs, and the updates that go with it."""
    if runs[0].warming_up:
        actions = [run.random_action() for run in runs]
    elif together is not None:
        actions = list(together.act(np.stack([run.observation for run in runs])))
    else:
        actions = [run.agent.act(run.observation) for run in runs]
    ready = [run for run in runs if not run.warming_up and len(run.replay) >= 1]
    if together is None or len(ready) == len(runs):
        for run in ready:
            run.owe()
    while due := [run for run in runs if run.owed >= 1]:
        if together is not None:
            found = together.update([run.replay for run in due])
        else:
            found = [run.agent.update(run.replay) for run in due]
        for run, numbers in zip(due, found, strict=True):
            run.latest |= numbers
            run.owed -= 1
    for run, action in zip(runs, actions, strict=True):
        run.take(action)


def _alike(runs: list[Run]) -> bool:
    """Whether all have made, and owe, as many updates."""
    return len({(run.agent.updates, run.owed) for run in runs}) == 1


def _folder(run_dir: str | os.PathLike[str], seed: int) -> Path:
    """The folder of one of several runs."""
    name = os.fspath(run_dir)
    return Path(
        name.replace("{seed}", str(seed)) if "{seed}" in name else Path(name, f"seed-{seed}")
    )


class _Named:
    """A logger that puts a word before the names."""

    def __init__(self, logger: Logger, word: str) -> None:
        self.logger, self.word = logger, word

    def log(self, step: int, **values: float) -> None:
        self.logger.log(step, **{self.word + name: value for name, value in values.items()})

    def close(self) -> None:
        """Nothing: the logger is the caller's."""
