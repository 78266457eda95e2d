r"""The command line of the agents: train, evaluate, resume, compare.

.. code-block:: console

    rsm-rl train sdac --env-id HalfCheetah-v5 --total-steps 1000000 --run-dir runs/hc
    rsm-rl evaluate runs/hc --video
    rsm-rl resume runs/hc
    rsm-rl compare --envs Pendulum-v1 Reacher-v5 --agents sdac dpmd --total-steps 50000

Results go to standard output, the progress bar and errors to standard error. The exit status is 0;
2 for an error; 130 if a run was interrupted (it is saved, and ``resume`` goes on with it).
"""

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from rl.environments import EnvironmentFailure
from rl.evaluation import evaluate as evaluate_agent
from rl.grid import compare as run_grid
from rl.run import AGENTS, read_about
from rl.training import load
from rl.training import resume as resume_run
from rl.training import train as train_agent
from rl.training import train_seeds as train_many
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.loggers import TensorBoardLogger

__all__ = ["compare", "evaluate", "main", "resume", "train"]

Run = Annotated[Path, arg(metavar="RUN")]
Changes = Annotated[
    tuple[str, ...],
    arg(name="set", metavar="NAME=VALUE...", help="fields of the configuration to change"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Arguments:
        arguments: What stands after ``rsm-rl``; that of the process if None.

    Returns:
        The exit status.
    """
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"train": train, "evaluate": evaluate, "resume": resume, "compare": compare},
            prog="rsm-rl",
            description="Diffusion-policy agents: " + ", ".join(sorted(AGENTS)) + ".",
            args=None if arguments is None else list(arguments),
        )
    except KeyboardInterrupt:
        return 130
    except (
        CheckpointError,
        EnvironmentFailure,
        ImportError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        sys.stderr.write(f"rsm-rl: {error}\n")
        return 2


def train(
    agent: Positional[Annotated[str, arg(metavar="AGENT")]],
    *,
    env_id: str,
    total_steps: int,
    seed: int = 0,
    seeds: int | None = None,
    preset: str = "corrected",
    run_dir: Path | None = None,
    device: str = "auto",
    eval_every: int | None = None,
    eval_episodes: int = 20,
    tensorboard: bool = False,
    changes: Changes = (),
) -> int:
    """Train an agent on an environment.

    Arguments:
        agent: Name of the agent.
        env_id: Gymnasium's id of the environment.
        total_steps: Environment steps.
        seed: Decides everything.
        seeds: Number of runs in this one process, with seeds from this seed on, each in a folder
            of its own within the run's; on a GPU their updates are one computation.
        preset: Configuration: corrected, official, icml2025 or, of DPMD, printed.
        run_dir: Folder of the run; runs/AGENT-ENV-SEED if left out.
        device: Where to train; auto takes a GPU where there is one.
        eval_every: Environment steps between evaluations.
        eval_episodes: Episodes of an evaluation.
        tensorboard: Whether to write the log for TensorBoard too, into the run's folder.
        changes: Fields of the configuration to change.
    """
    name = f"{agent}-{env_id}" + (f"-{seed}" if seeds is None else "")
    folder = Path("runs", name) if run_dir is None else run_dir
    options: dict[str, Any] = {
        "total_steps": total_steps,
        "config": preset,
        "run_dir": folder,
        "device": device,
        "eval_every": eval_every,
        "eval_episodes": eval_episodes,
        "logger": TensorBoardLogger(folder / "tensorboard") if tensorboard else None,
        **dict(_change(text) for text in changes),
    }
    if seeds is not None:
        agents = train_many(agent, env_id, seeds=range(seed, seed + seeds), **options)
        statuses = [_report(folder / f"seed-{each.seed}", each.interrupted) for each in agents]
        return max(statuses)
    trained = train_agent(agent, env_id, seed=seed, **options)
    return _report(folder, trained.interrupted)


def resume(
    run: Positional[Run],
    *,
    total_steps: int | None = None,
    device: str = "auto",
    tensorboard: bool = False,
) -> int:
    """Go on with an interrupted run.

    Arguments:
        run: Folder of the run.
        total_steps: A new length.
        device: Where to train; auto is where the run was.
        tensorboard: Whether to write the log for TensorBoard too, into the run's folder.
    """
    logger = TensorBoardLogger(run / "tensorboard") if tensorboard else None
    trained = resume_run(run, total_steps=total_steps, device=device, logger=logger)
    return _report(run, trained.interrupted)


def evaluate(
    run: Positional[Run],
    *,
    env_id: str | None = None,
    episodes: int = 20,
    seed: int = 10_000,
    best: bool = False,
    video: bool = False,
) -> int:
    """Evaluate the agent of a run, or of a file.

    Arguments:
        run: Folder of a run, or file of an agent.
        env_id: The environment, if not the one it was trained on.
        episodes: Number of episodes.
        seed: Seed of the first.
        best: Whether to take the run's best agent instead of its last.
        video: Whether to record the first episode, beside the agent.
    """
    path = run / ("best.pt" if best else "last.pt") if run.is_dir() else run
    if run.is_dir():
        read_about(run)
    agent = load(path)
    name = agent.env if env_id is None else env_id
    film = path.with_suffix(".mp4") if video else None
    found = evaluate_agent(agent, name, episodes=episodes, seed=seed, video=film)
    sys.stdout.write(f"{agent.name} on {name}: {found}\n")
    if film is not None:
        sys.stdout.write(f"{film}\n")
    return 0


def compare(
    *,
    envs: tuple[str, ...],
    agents: tuple[str, ...],
    total_steps: int,
    seeds: int = 5,
    out: Path = Path("comparison"),
    jobs: int = 1,
    ray: str | None = None,
    preset: str = "corrected",
    device: str = "auto",
    eval_every: int | None = None,
    eval_episodes: int = 20,
    changes: Changes = (),
) -> int:
    """Train agents on environments with several seeds, and compare them.

    Arguments:
        envs: Gymnasium's ids of the environments.
        agents: Names of the agents.
        total_steps: Environment steps of each run.
        seeds: Number of seeds.
        out: Folder of runs and report; what it holds already is not run again.
        jobs: Runs at a time, each in a process of its own.
        ray: Address of a Ray cluster to run on; local for one on this machine.
        preset: Configuration of our agents.
        device: Where to train; auto takes a GPU where there is one.
        eval_every: Environment steps between evaluations.
        eval_episodes: Episodes of an evaluation.
        changes: Fields of the configurations to change, of all agents (NAME=VALUE) or of one
            (AGENT.NAME=VALUE).
    """
    shared: dict[str, Any] = {}
    single: dict[str, dict[str, Any]] = {}
    for name, value in map(_change, changes):
        agent, of_one, field = name.rpartition(".")
        (single.setdefault(agent, {}) if of_one else shared)[field] = value
    run_grid(
        envs,
        agents,
        total_steps=total_steps,
        out=out,
        seeds=seeds,
        jobs=jobs,
        ray=ray,
        config=preset,
        device=device,
        eval_every=eval_every,
        eval_episodes=eval_episodes,
        changes=single,
        **shared,
    )
    sys.stdout.write(f"{(out / 'report.md').read_text()}\n{out / 'report.md'}\n")
    return 0


def _report(folder: Path, interrupted: bool) -> int:
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    means = [line["eval_mean"] for line in lines if "eval_mean" in line]
    for name, choose in (("last", lambda found: found[-1]), ("best", max)):
        if (folder / f"{name}.pt").exists():
            value = f"  return {choose(means):.1f}" if means else ""
            sys.stdout.write(f"{folder / name}.pt{value}\n")
    return 130 if interrupted else 0


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"set must be NAME=VALUE, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name.replace("-", "_"), words[value.lower()]
    try:
        return name.replace("-", "_"), ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name.replace("-", "_"), value
