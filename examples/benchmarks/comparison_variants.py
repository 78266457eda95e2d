"""What would help SDAC and DPMD where another agent is ahead of them: other settings.

    python examples/benchmarks/comparison_variants.py --jobs 2     # all that is not run yet
    python examples/benchmarks/comparison_variants.py --envs Reacher-v5 --agents sdac --seeds 101
    python examples/benchmarks/comparison_variants.py --trained runs/comparison
    python examples/benchmarks/comparison_variants.py --report-only

Runs of :mod:`comparison`, but with seeds that are not in its table, 100 if not named otherwise, so
that nothing that is chosen here has seen the seeds it is judged by. SAC is trained with the same
seed. With ``--trained`` the table's own agents, from its folder of runs, are asked instead: what
their critics promise and what follows, and how SDAC and DPMD do by other choices among draws.
Results go to docs/results/comparison_variants.json, the page is docs/comparison_variants.md.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from comparison import AGENTS, CHOSEN, EVERY, NOISY, PLAIN, SHARED, SHARPER, STEADY, STEPS, TASKS
from results import FOLDER, load, store
from torch import Tensor

import rl
from rl.comparison import read, steps_done
from rsm_sampler.box_kernel import AnchoredKernel
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.estimators import posterior_estimate
from rsm_sampler.transitions import forward_kernel

NAME, BASE = "comparison_variants", "base"
SETTINGS = {**SHARED, "sac": AGENTS["sac"][1]}
# The policy's rate falls, as in the published code, over most of the 4,500 steps that it makes.
FALLING = {"policy_lr_final": 3e-5, "policy_lr_hold": 1000, "policy_lr_decay": 3500}
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "faster policy": {"policy_lr": 1e-3},
    "critics not normalised": {"critic_layer_norm": False},
    "faster policy, critics not normalised": PLAIN,
    "sharper": SHARPER,
    "sharper, critics normalised": {**SHARPER, "critic_layer_norm": True},
    "sharper, policy at every update": {**SHARPER, "policy_lr": 3e-4, "policy_period": 1},
    "policy at every update": {"policy_period": 1},
    "noise": NOISY,
    "steady": STEADY,
    "steady, floor of 6.5, no noise": {**STEADY, "min_ess": 6.5, "noise": 0.0},
    "steady, floor of 6.5, no noise, best of 4": {
        **STEADY,
        "min_ess": 6.5,
        "noise": 0.0,
        "behaviour_candidates": 4,
        "target_candidates": 4,
    },
    "steady, floor by entropy": {**STEADY, "min_ess": None},
    "steady, geometric": {**STEADY, "schedule": "geometric"},
    "chosen": CHOSEN,
    "chosen, no noise": {**CHOSEN, "noise": 0.0},
    "chosen, policy at every update": {**CHOSEN, "policy_period": 1},
    "sharper, floor of 8": {**SHARPER, "min_ess": 8.0},
    "geometric": {"schedule": "geometric"},
    "more draws": {**PLAIN, "num_draws": 128},
    "falling": FALLING,
    "faster policy, falling": {"policy_lr": 1e-3, **FALLING},
    "faster policy, falling, critics not normalised": {
        "policy_lr": 1e-3,
        **FALLING,
        "critic_layer_norm": False,
    },
}

READING = (
    "**What was taken from it.** In the table SDAC has plain critics, a policy as fast as they "
    "are, half of its candidates about the clean action, noise on its actions, a slow copy of "
    "its policy that acts, geometric noise levels, and a floor of candidates that follows from "
    "its target entropy. The first three carry it on HalfCheetah, where noise helps too; what "
    "the others are for is Pendulum. DPMD keeps cosine levels, with which it goes further on "
    "Reacher, normalised critics and its slower policy: on HalfCheetah it ends at a third of its "
    "return without normalised critics, at half of it with a faster policy.\n\n"
    "**What is lost on Pendulum** is one or two of the twenty starts, in some evaluations. From "
    "there full torque all the way leads upright in one swing, and the least bit less makes it "
    "two; one such start costs the mean as much as agents differ by. Two causes were found and "
    "taken away. The last of five cosine levels hides what is nearer than 0.34, and the chain "
    "ends at the mean of that ([few steps](agents.md)): where values are flat, half a torque is "
    "the best of ten draws though critics ask for all of it. And an entropy that is measured "
    "along so few levels, and of actions with noise besides, never came down to its target: the "
    "temperature fell until 2 of 32 candidates counted, and the policy could fail outright. What "
    "stays is a boundary, between states from which one swing suffices and those from which it "
    "does not, that moves with each step of a fast policy: a start is lost in one evaluation and "
    "won in the next. With the noise that SDAC and DPMD act with, and whose values their critics "
    "learn, nobody gets up at once from the hardest start, SAC neither (below): its own noise is "
    "cut where its policy saturates. To take two swings is right for the policy with noise, "
    "wrong for the one without that is evaluated; yet without any noise as much is lost. The "
    "critics know better than ten draws: by the best of 64 (below; the paper takes 32) the "
    "table's agents do as well as SAC. Plain critics with the slower policy, of SDAC and of DPMD "
    "alike, do so too, and are far behind on HalfCheetah. Rates that fall towards the end, as in "
    "the published code, a policy that learns at every update, and normalised critics did not "
    "keep what had been reached either, before the levels were changed.\n\n"
    "**What is lost on Reacher** is distance, not effort: SAC keeps the finger closest to its "
    "aim, SDAC comes next (below). Candidates that are tried about its actions and ranked by its "
    "critics reach no closer, and the policy is near what it is regressed on, so it is the "
    "critics that are less sharp there."
)
HARDEST = 10_004  # seed of a start of the evaluations
NOISES = 0.0, 0.05, 0.1  # standard deviations on Pendulum's action within [-1, 1]
PARTS = "reward_dist", "reward_ctrl"  # of Reacher's reward
MEASURED = "distance", "noise", "ess"  # of a policy and its aim
DRAWS = 64  # of the same chain, from fixed starts, of which a choice makes one action
ABOUT = 8  # actions about each of the first ten draws
REPEATS = 16  # of what a policy is regressed on, to tell its mean from its noise


def best(q: Tensor) -> Tensor:
    """Weight 1 for the first draw that has the highest value, else 0."""
    return torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).to(q.dtype)


# Which draws, and their weights by their values; those from number 64 are about the first ten.
CHOICES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "best of 10": (slice(10), best),  # what the table has
    "best of 64": (slice(DRAWS), best),
    "best of 10 and 80 about them": ([*range(10), *range(DRAWS, DRAWS + 10 * ABOUT)], best),
    "mean of 64": (slice(DRAWS), lambda q: torch.full_like(q, 1 / q.shape[1])),
    "mean of the best 16 of 64": (
        slice(DRAWS),
        lambda q: (q >= q.topk(16).values[:, -1:]) / 16,
    ),
    "weights exp(Q / 0.1 s)": (
        slice(DRAWS),
        lambda q: (q / (0.1 * q.std(1, keepdim=True) + 1e-9)).softmax(1),
    ),
    "weights exp(Q / s)": (
        slice(DRAWS),
        lambda q: (q / (q.std(1, keepdim=True) + 1e-9)).softmax(1),
    ),
}


def choosing(agent: Any, which: Any, weigh: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Actions that are weighted means of fixed draws, weighted by their values."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(DRAWS, agent.action_dim, generator=generator)
    starts[: len(agent._starts)] = agent._starts
    steps = 0.2 * torch.randn(10, ABOUT, agent.action_dim, generator=generator)
    policy = agent.policy if agent.average is None else agent.average

    @torch.no_grad()
    def exploit(observation: Tensor) -> Tensor:
        draws = policy.flow(observation, starts)
        about = (draws[:, :10].unsqueeze(2) + steps).clamp(-1.0, 1.0).flatten(1, 2)
        draws = torch.cat([draws, about], 1)[:, which]
        weights = weigh(agent.critic.minimum(observation.unsqueeze(1), draws))
        return (weights.unsqueeze(-1) * draws).sum(1)

    return exploit


def evaluate_choices(runs: Path, env: str, name: str) -> None:
    """Returns of the table's agents, last of their runs, by each choice among draws."""
    for folder, agent in finished(runs, env, name):
        returns = {}
        for label, (which, weigh) in CHOICES.items():
            agent.exploit = choosing(agent, which, weigh)
            returns[label] = rl.evaluate(agent, env).mean
        store(NAME, f"choices: {folder}", {"returns": returns})


def evaluate_values(runs: Path, env: str, name: str) -> None:
    """What critics promise of drawn actions in first halves of episodes, and what follows."""
    for folder, agent in finished(runs, env, name):
        environments = rl.Environments(env, 10)
        observation, promised, rewards = environments.reset(seed=20_000), [], []
        ended = np.zeros(10, dtype=bool)
        while not ended.any():
            action, _ = agent.predict(observation)
            unit = 2 * (action - agent.low) / (agent.high - agent.low) - 1
            given = torch.from_numpy(observation), torch.from_numpy(unit).float()
            with torch.no_grad():
                if isinstance(agent, rl.StableBaselinesAgent):
                    q = torch.cat(agent.policy.critic(*given), 1).amin(1)
                else:
                    q = agent.critic.minimum(*given)
            step = environments.step(unit)
            observation, ended = step.observation, step.ended
            promised.append(q.numpy())
            rewards.append(step.reward)
        environments.close()
        outcome, outcomes = np.zeros(10), []
        for reward in reversed(rewards):
            outcome = reward + 0.99 * outcome
            outcomes.append(outcome)
        half = len(rewards) // 2
        means = np.mean(promised[:half]), np.mean(outcomes[: -half - 1 : -1])
        record = dict(zip(("promised", "outcome"), map(float, means), strict=True))
        store(NAME, f"values: {folder}", record)


def finished(runs: Path, env: str, name: str) -> Iterator[tuple[str, Any]]:
    """Names of the folders of an agent's finished runs, and the agents as they ended."""
    for folder in sorted((runs / "runs").glob(f"{name}-{env}-*/")):
        if steps_done(folder) >= STEPS:
            yield folder.name, rl.load(folder / "last.pt", device="cpu")


def episodes(
    agent: Any,
    env: str,
    starts: Sequence[int],
    noise: float = 0.0,
) -> Iterator[list[tuple[Any, ...]]]:
    """Steps of episodes from these starts, with noise on actions, until one of them ends."""
    rng = np.random.default_rng(0)
    environments = [gym.make(env) for _ in starts]
    half = (agent.high - agent.low) / 2
    resets = zip(environments, starts, strict=True)
    observation = np.stack([one.reset(seed=start)[0] for one, start in resets])
    while True:
        action, _ = agent.predict(observation.astype(np.float32), deterministic=True)
        action = action + noise * half * rng.standard_normal(action.shape)
        action = action.clip(agent.low, agent.high)
        steps = [one.step(a) for one, a in zip(environments, action, strict=True)]
        observation = np.stack([step[0] for step in steps])
        yield steps
        if any(step[2] or step[3] for step in steps):
            break
    for one in environments:
        one.close()


def evaluate_noise(runs: Path, name: str) -> None:
    """Mean returns from the start of Pendulum that most lose, with noise on actions."""
    for folder, agent in finished(runs, "Pendulum-v1", name):
        returns = {
            f"{std}": sum(
                float(np.mean([step[1] for step in steps]))
                for steps in episodes(agent, "Pendulum-v1", [HARDEST] * 20, std)
            )
            for std in NOISES
        }
        store(NAME, f"noise: {folder}", {"returns": returns})


def evaluate_reaching(runs: Path, name: str) -> None:
    """Of which parts the return of Reacher is, and how close the finger stays at the end."""
    for folder, agent in finished(runs, "Reacher-v5", name):
        parts = np.array(
            [
                np.mean([[step[4][part] for part in PARTS] for step in steps], 0)
                for steps in episodes(agent, "Reacher-v5", range(10_000, 10_100))
            ]
        )
        distance, control = parts.sum(0).tolist()
        record = {"distance": distance, "control": control, "end": -parts[-20:, 0].mean().item()}
        store(NAME, f"reaching: {folder}", record)


def evaluate_following(runs: Path, env: str) -> None:
    """How far SDAC's policy is from what it is regressed on, at the states that it comes to."""
    for folder, agent in finished(runs, env, "sdac"):
        walked = [
            np.stack([step[0] for step in steps])
            for steps in episodes(agent, env, range(10_000, 10_020))
        ]
        observation = torch.from_numpy(np.concatenate(walked[::5])).float()
        policy = agent.policy if agent.average is None else agent.average
        draw = torch.Generator().manual_seed(0)
        clean = policy.sample(observation, 1, generator=draw).squeeze(1).clamp(-1.0, 1.0)
        t = torch.randint(1, agent.config.num_steps + 1, (len(clean),), generator=draw)
        sigma = agent.policy.sigmas[t]
        x_t = forward_kernel(clean, sigma, generator=draw)
        kernel = AnchoredKernel(clean, -1.0, 1.0, share=agent.config.anchor_share)

        def energy(
            action: Tensor, agent: Any = agent, observation: Tensor = observation
        ) -> Tensor:  # bound now: the loop goes on
            return -agent.critic.minimum(observation.unsqueeze(1), action) / agent.temperature

        with torch.no_grad():
            estimates = [
                posterior_estimate(
                    energy, x_t, sigma, kernel, agent.config.num_draws, generator=draw
                )
                for _ in range(REPEATS)
            ]
            found = policy.denoiser(x_t, sigma, observation)
        aims = torch.stack([estimate.mean for estimate in estimates])
        record = {
            "distance": (found - aims.mean(0)).square().mean().sqrt().item(),
            "noise": aims.var(0).mean().sqrt().item(),
            "ess": torch.stack([estimate.ess for estimate in estimates]).mean().item(),
        }
        store(NAME, f"following: {folder}", record)


def keep(folder: Path, variant: str) -> None:
    """Store what is finished in a folder of runs."""
    with suppress(CheckpointError):  # nothing is there yet
        found = read(folder, total_steps=STEPS)
        for agent, by_env in found.curves.items():
            for env, runs in by_env.items():
                for seed, curve in runs.items():
                    key = f"{agent} {env} {variant}/{seed}"
                    if key not in load(NAME) and curve.steps[-1] >= STEPS:
                        settings = {**SETTINGS[agent], **VARIANTS[variant]}
                        store(NAME, key, {"returns": curve.returns, "settings": settings})


def report() -> None:
    """The page: a table for each task."""
    found = load(NAME)
    trained = {key: record for key, record in found.items() if ": " not in key}
    order = [f"{agent} {variant}" for agent in SETTINGS for variant in VARIANTS]
    lines = [
        "# What was tried where SDAC and DPMD are behind",
        "",
        "Written by `python examples/benchmarks/comparison_variants.py`: runs of "
        "[the comparison](comparison.md) with other settings and with seeds that are not in its "
        f"table. Means of 20 episodes at the end of {STEPS:,} steps and over the last five "
        "evaluations, 5,000 steps from each other, of each seed; the comparison shows what seeds "
        "differ by.",
        "",
        READING,
        "",
        *(f"* {agent}: {_settings(changes)}" for agent, changes in SETTINGS.items()),
    ]
    for env in TASKS:
        rows: dict[str, dict[int, list[float]]] = {}
        for key, record in trained.items():
            agent, task, named = key.split(" ", 2)
            variant, seed = named.split("/")
            if task == env:
                rows.setdefault(f"{agent} {variant}", {})[int(seed)] = record["returns"]
        if rows:
            head = ["| agent | change | seeds | last | last five |", "|---|---|---|---|---|"]
            lines += ["", f"## {env}", "", *head]
        for key in sorted(rows, key=order.index):
            agent, variant = key.split(" ", 1)
            runs = [rows[key][seed] for seed in sorted(rows[key])]
            cells = [
                agent,
                _settings(VARIANTS[variant]) or "–",
                ", ".join(map(str, sorted(rows[key]))),
                ", ".join(_number(returns[-1]) for returns in runs),
                ", ".join(_number(sum(returns[-5:]) / 5) for returns in runs),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    chosen = _asked(found, "choices")
    if chosen:
        lines += [
            "",
            "## Other choices among draws",
            "",
            "The table's own agents as they ended, evaluated by another choice among their draws: "
            "means over seeds of 20 episodes. s is the standard deviation of Q over a state's "
            "draws; actions about a draw have normal steps of 0.2.",
            "",
            "| agent | task | seeds | " + " | ".join(CHOICES) + " |",
            "|---" * (3 + len(CHOICES)) + "|",
        ]
    for (agent, env), found_by in chosen.items():
        returns = [record["returns"] for record in found_by]
        means = [sum(run[label] for run in returns) / len(returns) for label in CHOICES]
        shown = " | ".join(_number(mean) for mean in means)
        lines.append(f"| {agent} | {env} | {len(found_by)} | {shown} |")
    lines += _noise_lines(found) + _following_lines(found)
    lines += _reaching_lines(found) + _values_lines(found)
    (FOLDER.parent / f"{NAME}.md").write_text("\n".join(lines) + "\n")


def _noise_lines(found: dict[str, Any]) -> list[str]:
    asked = _asked(found, "noise")
    if not asked:
        return []
    rows = [
        [agent, *(", ".join(f"{run['returns'][f'{std}']:.0f}" for run in by) for std in NOISES)]
        for (agent, _), by in asked.items()
    ]
    return [
        "",
        "## The start of Pendulum that most lose",
        "",
        "The table's own agents as they ended, from the start of the evaluations at which one "
        "swing barely suffices: returns of each seed, with normal noise of this standard "
        "deviation on actions in [-1, 1], cut there; means of 20 episodes. One swing gets -120 "
        "to -130, two get about -235.",
        "",
        f"| agent | {' | '.join(f'noise {std:g}' if std else 'no noise' for std in NOISES)} |",
        "|---" * (1 + len(NOISES)) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _following_lines(found: dict[str, Any]) -> list[str]:
    asked = _asked(found, "following")
    if not asked:
        return []
    rows = [
        [env, *(", ".join(f"{run[part]:.2g}" for run in by) for part in MEASURED)]
        for (_, env), by in asked.items()
    ]
    return [
        "",
        "## How far SDAC's policy is from its aim",
        "",
        "The table's own agents as they ended, at states of 20 episodes: root mean squares of "
        "the distance from what the denoiser returns to the mean of the estimates that it is "
        "regressed on, and of the noise of one of those, both per dimension of the action; and "
        "their mean effective number of candidates; each seed.",
        "",
        "| task | distance | noise | candidates |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _reaching_lines(found: dict[str, Any]) -> list[str]:
    asked = _asked(found, "reaching")
    if not asked:
        return []
    rows = [
        [
            agent,
            *(", ".join(f"{run[part]:.2f}" for run in by) for part in ("distance", "control")),
            ", ".join(f"{1000 * run['end']:.0f}" for run in by),
        ]
        for (agent, _), by in asked.items()
    ]
    return [
        "",
        "## What Reacher's return is made of",
        "",
        "The table's own agents as they ended, each seed, means of 100 episodes: what distance "
        "and what effort cost, and the distance over the last 20 of 50 steps.",
        "",
        "| agent | distance | effort | distance at the end, mm |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _values_lines(found: dict[str, Any]) -> list[str]:
    asked: dict[str, dict[str, list[str]]] = {}
    for (agent, env), by in _asked(found, "values").items():
        shown = [f"{run['promised']:.0f} for {run['outcome']:.0f}" for run in by]
        asked.setdefault(agent, {})[env] = shown
    if not asked:
        return []
    envs = [env for env in TASKS if any(env in by for by in asked.values())]
    return [
        "",
        "## What critics promise",
        "",
        "The table's own agents as they ended: the mean of the smaller Q over the states of the "
        "first halves of ten episodes of drawn actions, and the mean return that followed to the "
        "episode's end, discounted by 0.99; each seed.",
        "",
        f"| agent | {' | '.join(envs)} |",
        "|---" * (1 + len(envs)) + "|",
        *(
            f"| {agent} | {' | '.join(', '.join(by.get(env, [])) for env in envs)} |"
            for agent, by in asked.items()
        ),
    ]


def _asked(found: dict[str, Any], what: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What was asked of the table's agents: records of all seeds by agent and environment."""
    asked: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, record in found.items():
        if key.startswith(f"{what}: "):
            agent, rest = key.partition(": ")[2].split("-", 1)
            asked.setdefault((agent, rest.rsplit("-", 1)[0]), []).append(record)
    return asked


def _number(value: float) -> str:
    return f"{value:.{0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2}f}"


def _settings(changes: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in changes.items())


def main() -> None:
    """Run what is missing, then write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--agents", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[100])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison_variants"))
    parser.add_argument("--trained", type=Path, help="folder of the table's runs")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.jobs))  # as each run has
    if arguments.trained is not None:
        for env in arguments.envs:
            for name in [name for name in arguments.agents if name in SHARED]:
                evaluate_choices(arguments.trained, env, name)
            if "sdac" in arguments.agents:
                evaluate_following(arguments.trained, env)
        for env in {*arguments.envs} & {"Pendulum-v1", "HalfCheetah-v5"}:  # they end in time alone
            for name in [name for name in AGENTS if name not in ("ppo", "dppo")]:
                evaluate_values(arguments.trained, env, name)
        if "Pendulum-v1" in arguments.envs:
            for name in AGENTS:
                evaluate_noise(arguments.trained, name)
        if "Reacher-v5" in arguments.envs:
            for name in AGENTS:
                evaluate_reaching(arguments.trained, name)
    train = not (arguments.report_only or arguments.trained)
    grid = itertools.product(arguments.seeds, arguments.variants, arguments.envs)
    for seed, variant, env in grid if train else []:
        agents = [
            agent
            for agent in arguments.agents
            if f"{agent} {env} {variant}/{seed}" not in load(NAME)
            and (agent in SHARED or variant == BASE)
        ]
        if agents:
            folder = arguments.runs / variant.replace(", ", "-").replace(" ", "_")
            rl.compare(
                [env],
                agents,
                total_steps=STEPS,
                out=folder,
                seeds=[seed],
                jobs=arguments.jobs,
                changes={agent: {**SETTINGS[agent], **VARIANTS[variant]} for agent in agents},
                eval_every=EVERY,
            )
            keep(folder, variant)
    report()


if __name__ == "__main__":
    main()
