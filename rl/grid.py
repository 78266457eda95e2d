r"""A grid of runs: agents by environments by seeds.

:func:`compare` trains what is missing, each run in a folder of its own under ``runs/``, so that a
grid that was killed goes on where it was, and then writes the report of :mod:`rl.comparison`.
Before it starts it says what it will cost, from a few updates that it counts and times.
"""

import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from rl.comparison import Comparison, read, steps_done, write_report
from rl.config import AgentConfig
from rl.dppo import DPPOConfig
from rl.environments import Environments
from rl.replay import Batch, ReplayBuffer
from rl.run import AGENTS, RUN_OPTIONS, AnyAgent, RunProgress, read_about
from rl.stable_baselines import FOREIGN, configuration
from rl.stable_baselines import train as train_foreign
from rl.training import train, train_seeds
from rsm_sampler.checked import checked
from rsm_sampler.loggers import MemoryLogger

__all__ = ["Cost", "compare", "estimate_cost"]

_UPDATES = 20  # that a cost is estimated from
_WARMUP = 5  # updates of each kind before timing: a GPU captures the fourth as a graph
# Of agents of stable-baselines3 that learn from a replay: what the others do by default.
_PACE = {"train_freq": 5, "gradient_steps": 1, "learning_starts": 5000}


@dataclass(frozen=True)
class Cost:
    """What training an agent on an environment takes.

    Attributes:
        gflop: Floating-point operations of the networks for an environment step, in 10⁹.
        seconds: Time for an environment step, with the updates it owes, on this machine.
    """

    gflop: float
    seconds: float


class _Run(NamedTuple):
    agent: str
    env: str
    seed: int
    folder: Path


@checked
def compare(
    envs: Sequence[str],
    agents: Sequence[str],
    *,
    total_steps: int,
    out: str | os.PathLike[str],
    seeds: int | Sequence[int] = 5,
    jobs: int = 1,
    batched: bool | None = None,
    ray: str | None = None,
    reference: Mapping[str, float] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,  # noqa: ANN401
) -> Comparison:
    """Train every agent on every environment with every seed, and write the report.

    Arguments:
        envs: Ids of environments.
        agents: Names of agents.
        total_steps: Environment steps of each run.
        out: Folder of the grid, new or of an earlier call: what is there is not run again.
        seeds: The first so many seeds, or the seeds.
        jobs: Processes at a time; they share the machine's cores.
        batched: Whether the seeds of an agent on an environment are one process and one batched
            computation, for agents that can (:mod:`rl.lockstep`); None for where there is a GPU.
            Each run is then said to have taken its share of the time.
        ray: Address of a Ray cluster to run on, ``"local"`` for one on this machine; its nodes
            must share the folder. None runs processes here.
        reference: The return that counts as 1, by environment; the best agent's if None.
        changes: Fields of the configurations of single agents, by agent, besides those in
            ``options``.
        say: Receives lines of progress; they go to standard error if None.
        **options: As for :func:`~rl.training.train`, for all runs; a preset is that of our
            agents.

    Returns:
        The curves.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If Ray is asked for and not installed.
        OSError: On Windows, whose processes can neither be locked nor measured the same way.
        RuntimeError: If runs failed; the others are kept, and so is the report on them.

    Note:
        SAC and TD3 make an update every fifth step after 5,000 random ones here, as the other
        agents do, unless ``changes`` says otherwise; the report says how many each agent made.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    for name, given in (("envs", envs), ("agents", agents), ("seeds", chosen)):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{name} must be different ones, at least one, got {given}")
    known = {*AGENTS, *FOREIGN}
    if set(agents) - known:
        raise ValueError(f"agents must be among {sorted(known)}, got {list(agents)}")
    if set(changes or {}) - set(agents):
        raise ValueError(f"changes must be of {list(agents)}, got {list(changes or {})}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if options.get("eval_every") == 0:
        raise ValueError("eval_every must be at least 1, since a comparison needs returns, got 0")
    if reference is not None and set(reference) != set(envs):
        raise ValueError(f"reference must have {sorted(envs)}, got {sorted(reference)}")
    if os.name == "nt":
        raise OSError("rl.compare must run on Linux or macOS, got Windows")
    say = _to_standard_error if say is None else say
    out = Path(out).expanduser()
    runs = [
        _Run(agent, env, seed, out / "runs" / f"{agent}-{env}-{seed}")
        for seed, env, agent in itertools.product(chosen, envs, agents)
    ]
    each = {agent: _options(agent, options, (changes or {}).get(agent, {})) for agent in agents}
    configs = {
        agent: _configuration(
            agent,
            given.get("config", "corrected"),
            {name: value for name, value in given.items() if name not in RUN_OPTIONS},
        )
        for agent, given in each.items()
    }
    pending = [run for run in runs if steps_done(run.folder) < total_steps]
    for run in runs:
        if run not in pending:
            _check_same(run, configs[run.agent])
    say(f"{len(runs)} runs of {total_steps:,} steps, {len(runs) - len(pending)} of them done")
    if pending:
        _announce(pending, configs, total_steps, jobs, say)
    failures = []
    run_all = _on_ray(ray) if ray is not None else _in_processes
    done = 0
    for task, error in run_all(_tasks(pending, batched, options), total_steps, jobs, each):
        for run in task:
            done += 1
            name = run.folder.name
            say(f"[{done}/{len(pending)}] {name}{f' failed: {error}' if error else ''}")
            failures += [f"{name}: {error}"] if error else []
    failed = f"{len(failures)} of {len(runs)} runs failed: " + "; ".join(failures)
    if len(failures) == len(runs):
        raise RuntimeError(failed)
    found = read(out, total_steps=total_steps)
    write_report(found, out, reference=reference)
    if failures:
        raise RuntimeError(failed)
    return found


@checked
def estimate_cost(
    agent: str,
    env: str,
    *,
    config: AgentConfig | str = "corrected",
    updates: int = _UPDATES,
    **changes: Any,  # noqa: ANN401
) -> Cost:
    """Count and time a few updates and actions.

    Arguments:
        agent: Name of the agent.
        env: Id of the environment.
        config: A configuration or the name of a preset.
        updates: Updates that are timed.
        **changes: Fields of the configuration that differ from the preset.

    Raises:
        ValueError: If an argument does not fit.
    """
    return _cost(agent, env, _configuration(agent, config, changes), updates)


# ---------------------------------------------------------------------- cost


def _cost(agent: str, env: str, config: AgentConfig | dict[str, Any], updates: int) -> Cost:
    if isinstance(config, dict):
        if "learning_starts" in config:  # random steps cost nothing
            pace = config["train_freq"]  # a number, or a pair with a unit
            every = updates * (pace if isinstance(pace, int) else pace[0])
            config = {**config, "learning_starts": every}
        else:  # rollouts of some minibatches cost as much by step as those of many
            every = min(config["n_steps"], 4 * config["batch_size"])
            config = {**config, "n_steps": every}
        return _cost_of_runs(partial(train_foreign, agent, env, changes=config), every)
    kind = AGENTS[agent]
    if isinstance(config, DPPOConfig):
        one_batch = config.num_envs * math.ceil(
            config.batch_size / config.num_steps / config.num_envs
        )
        config = replace(config, rollout_steps=min(config.rollout_steps, one_batch))
        return _cost_of_runs(partial(train, agent, env, config=config), config.rollout_steps)
    environments = Environments(env, config.num_envs)
    sizes = (environments.observation_dim, environments.action_dim)
    made = kind(*sizes, config, device="auto")
    replay = ReplayBuffer(max(1000, config.batch_size), *sizes, device=made.device)
    observation = environments.reset(seed=0)
    _fill(replay, environments, observation)
    # Counted first: what a GPU has captured as a graph is not seen by the counter any more.
    with FlopCounterMode(display=False, custom_mapping=_linear_flops()) as counter:
        made.act(observation)
    per_step = counter.get_total_flops() / config.num_envs
    with FlopCounterMode(display=False, custom_mapping=_linear_flops()) as counter:
        for _ in range(config.policy_period):
            made.update(replay)
    per_update = counter.get_total_flops() / config.policy_period
    for _ in range(_WARMUP * config.policy_period):
        made.update(replay)
        made.act(observation)
    started = time.perf_counter()
    for _ in range(updates):
        made.update(replay)
    if made.device.type == "cuda":
        torch.cuda.synchronize()
    update = (time.perf_counter() - started) / updates
    started = time.perf_counter()
    for _ in range(updates):
        environments.step(made.act(observation))
    step = (time.perf_counter() - started) / updates / config.num_envs
    environments.close()
    rate = config.updates_per_step
    return Cost((per_step + rate * per_update) / 1e9, step + rate * update)


# ---------------------------------------------------------------------- running


_Task = tuple[_Run, ...]  # runs that one process trains together: they differ in their seeds


def _tasks(pending: list[_Run], batched: bool | None, options: dict[str, Any]) -> list[_Task]:
    """What goes to one process each."""
    if batched is None:
        device = options.get("device", "auto")
        batched = torch.cuda.is_available() if device == "auto" else "cuda" in str(device)
    groups: dict[tuple[str, str, int], list[_Run]] = {}
    for run in pending:
        together = batched and run.agent in AGENTS and AGENTS[run.agent].stackable
        groups.setdefault((run.agent, run.env, -1 if together else run.seed), []).append(run)
    return [tuple(group) for group in groups.values()]


def _train(
    task: _Task, total_steps: int, threads: int, options: dict[str, Any], caller: int | None = None
) -> None:
    """Some runs, or the rest of them, in a process of its own.

    It ends at the next evaluation if the process that asked for it is gone. Where two grids want
    the same run, the second waits for the first, and finds it done.
    """
    import fcntl

    with ExitStack() as held:
        for run in task:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(run.folder.with_name(f"{run.folder.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        left = tuple(run for run in task if steps_done(run.folder) < total_steps)
        if left:
            _train_locked(left, total_steps, threads, options, caller)


def _train_locked(
    task: _Task, total_steps: int, threads: int, options: dict[str, Any], caller: int | None
) -> None:
    import resource

    torch.set_num_threads(threads)
    cost = {run.seed: run.folder / "cost.json" for run in task}
    before = {
        seed: json.loads(path.read_text())["resident_mb"] if path.exists() else 0.0
        for seed, path in cost.items()
    }

    def keep(progress: RunProgress) -> None:
        path = cost[progress.agent.seed]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        record = {"resident_mb": max(peak, before[progress.agent.seed])}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(path)
        if caller is not None and not _alive(caller):
            os._exit(1)  # checkpoints are whole at any time, and nobody waits for more

    first = task[0]
    shared = {"total_steps": total_steps, "progress": False, "callback": keep, **options}
    if len(task) > 1:
        agents: Sequence[AnyAgent] = train_seeds(
            first.agent,
            first.env,
            seeds=[run.seed for run in task],
            batched=True,
            run_dir=first.folder.with_name(f"{first.agent}-{first.env}-{{seed}}"),
            **shared,
        )
    else:
        agents = [train(first.agent, first.env, seed=first.seed, run_dir=first.folder, **shared)]
    if any(agent.interrupted for agent in agents):
        raise KeyboardInterrupt


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


_Outcome = tuple[_Task, str | None]


def _in_processes(
    tasks: list[_Task], total_steps: int, jobs: int, options: dict[str, dict[str, Any]]
) -> Iterator[_Outcome]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if not tasks:
        return
    # A fresh process for each run: its peak of memory is its own. Where the system can, they are
    # forked from one that has loaded this module and done nothing else.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])

    def alone(task: _Task) -> None:
        # In a pool of its own: a pool with a process that was killed ends all others with it.
        given = total_steps, threads, options[task[0].agent]
        with ProcessPoolExecutor(1, context) as pool:
            pool.submit(_train, task, *given, os.getpid()).result()

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(alone, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], _error(future.exception())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _on_ray(address: str) -> Callable[..., Iterator[_Outcome]]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("a Ray cluster needs: pip install 'rsm-sampler[ray]'") from error

    def run_all(
        tasks: list[_Task], total_steps: int, jobs: int, options: dict[str, dict[str, Any]]
    ) -> Iterator[_Outcome]:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        own = not ray.is_initialized()
        if own:
            ray.init(
                None if address == "local" else address,
                num_cpus=jobs * threads if address == "local" else None,
                include_dashboard=False,
                log_to_driver=False,
            )
        remote = ray.remote(num_cpus=threads, max_calls=1)(_train)
        try:
            waiting = {
                remote.remote(task, total_steps, threads, options[task[0].agent]): task
                for task in tasks
            }
            while waiting:
                (ready,), _ = ray.wait(list(waiting))
                error = None
                try:
                    ray.get(ready)
                except ray.exceptions.RayError as failure:
                    error = str(failure).strip().splitlines()[-1]
                yield waiting.pop(ready), error
        finally:
            if own:
                ray.shutdown()

    return run_all


def _to_standard_error(text: str) -> None:
    sys.stderr.write(text + "\n")


def _error(error: BaseException | None) -> str | None:
    if isinstance(error, KeyboardInterrupt):
        raise error
    return None if error is None else f"{type(error).__name__}: {error}"


def _options(agent: str, shared: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What an agent's runs are given."""
    if agent not in FOREIGN:
        return {**shared, **own}
    shared = {name: value for name, value in shared.items() if name != "config"}
    pace = {} if agent == "ppo" else _PACE
    return {**pace, **shared, **own}


def _configuration(
    agent: str, config: AgentConfig | str, changes: dict[str, Any]
) -> AgentConfig | dict[str, Any]:
    if agent in FOREIGN:
        return configuration(agent, changes)
    kind = AGENTS[agent].config_type
    return kind.preset(config, **changes) if isinstance(config, str) else config


def _cost_of_runs(run: Callable[..., Any], every: int) -> Cost:
    """As :func:`estimate_cost`, by the third part of runs that end soon.

    Arguments:
        run: Trains, given ``total_steps`` and more.
        every: Steps of a part: a rollout, whose epochs may fall into the next, or some updates,
            none of which are in the first.
    """
    options: dict[str, Any] = {"total_steps": 3 * every, "eval_every": 0, "progress": False}
    counts: list[int] = []

    class Marks(MemoryLogger):
        """Reads the counter at the end of each part."""

        def log(self, step: int, **values: float) -> None:
            super().log(step, **values)
            counts.append(counter.get_total_flops())

    with FlopCounterMode(display=False, custom_mapping=_linear_flops()) as counter:
        run(**options, logger=Marks(), log_every=every)
    log = MemoryLogger()
    run(**options, logger=log, log_every=every)
    rate = log.records[-1]["env_steps_per_second"]
    return Cost((counts[-1] - counts[-2]) / every / 1e9, 1 / rate)


def _check_same(run: _Run, config: AgentConfig | dict[str, Any]) -> None:
    """Refuse a finished run of another configuration; one that goes on is checked by train."""
    kept = read_about(run.folder)["config"]
    wanted = config if isinstance(config, dict) else asdict(config)
    for name, value in json.loads(json.dumps(wanted, default=str)).items():
        if kept.get(name, value) != value:
            raise ValueError(
                f"out must hold runs of this configuration, got {run.folder} with {name} "
                f"{kept[name]} instead of {value}"
            )


def _announce(
    pending: Iterable[_Run],
    configs: Mapping[str, AgentConfig | dict[str, Any]],
    total_steps: int,
    jobs: int,
    say: Callable[[str], None],
) -> None:
    """The cost of what is to be run, before it starts."""
    costs: dict[tuple[str, str], Cost] = {}
    gflop = seconds = 0.0
    for run in pending:
        pair = run.agent, run.env
        if pair not in costs:
            costs[pair] = _cost(*pair, configs[run.agent], _UPDATES)
        left = total_steps - steps_done(run.folder)
        gflop += left * costs[pair].gflop
        seconds += left * costs[pair].seconds
    say(
        f"about {gflop:,.0f} GFLOP and {seconds / 3600 / jobs:.1f} hours with {jobs} "
        f"process{'es' if jobs > 1 else ''} at a time, evaluations not counted"
    )


def _linear_flops() -> dict[Any, Any]:
    """Operations that the counter does not know: oneDNN's linear layer, where there is one."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return {}

    def flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:  # noqa: ANN401
        return 2 * math.prod(x) * weight[0]

    return {operator: flops}


def _fill(replay: ReplayBuffer, environments: Environments, observation: NDArray) -> None:
    rng, n = torch.Generator().manual_seed(0), replay.capacity
    states = torch.from_numpy(observation)[torch.randint(len(observation), (n,), generator=rng)]
    states = states + 0.01 * torch.randn(states.shape, generator=rng)
    action = 2 * torch.rand(n, environments.action_dim, generator=rng) - 1
    reward, ends = torch.randn(n, generator=rng), (torch.zeros(n), torch.ones(n))
    replay.add(Batch(states, action, reward, states, *ends))
