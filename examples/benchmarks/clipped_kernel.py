"""Why did the published SDAC fail on Ant? Its candidates leave the box of actions.

python examples/benchmarks/clipped_kernel.py    # docs/results/clipped_kernel.json

The published code draws candidates from the Gaussian reverse kernel, cuts them to [-1, 1] for the
critic alone, and regresses on the uncut ones. At high noise almost every candidate lies outside:
what the critic then ranks are corners of the box, and what is learned from lies beyond them.

One state, Q / lambda the logarithm of a normal law of width 0.3 about 0.2 in every coordinate, on
the box in 3 (Hopper), 6 (HalfCheetah), 8 (Ant) and 17 dimensions (Humanoid). SDAC is trained with
K = 64 candidates, the noised replay action and T = 20, once with each kernel and nothing else
changed, for 2,000 steps of 64 states. Reported: the share of candidates outside the box; the total
variation of the worst marginal (50 bins, n = 20,000) to the same chain under the exact denoiser;
mean and standard deviation of the actions beside those of that chain; and the share of actions
with a coordinate at a bound.
"""

import argparse
import os
import time

import torch
from bandit import Wells, _ExactPolicy, batch_of, draw, histogram, optimise, worst
from results import load, store

import rl
from rl.off_policy import NextAction

DIMS = (3, 6, 8, 17)
WIDTH, PLACE, STEPS, N = 0.3, 0.2, 2000, 20_000


def normal(dim: int) -> Wells:
    """One well, not two."""
    law = Wells(dim, WIDTH)
    law.loc = torch.tensor([PLACE, PLACE], dtype=torch.float64)
    law.log_share = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    return law


class Normal:
    """The critic: the logarithm of a normal law."""

    def __init__(self) -> None:
        self.outside, self.calls = 0.0, 0

    def minimum(self, observation: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Q / lambda."""
        self.outside += float((a.abs() >= 1 - 1e-6).any(-1).float().mean())
        self.calls += 1
        return -0.5 * ((a - PLACE) / WIDTH).square().sum(-1)


def measure(dim: int, truncated: bool, seed: int) -> dict:
    """Train with one of the kernels, and compare."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed + 100)
    config = rl.SDACConfig(
        temperature=1.0,
        temperature_rule="fixed",
        batch_size=64,
        policy_states=64,
        num_draws=64,
        truncated=truncated,
        width=128,
    )
    agent = rl.SDAC(1, dim, config, seed=seed, device="cpu")
    agent.critic = critic = Normal()
    replay = rl.ReplayBuffer(20_000, 1, dim)
    replay.add(batch_of(2 * torch.rand(2000, dim, generator=generator) - 1))
    ess = 0.0
    for i in range(STEPS):
        if i % 20 == 19:
            replay.add(batch_of(draw(agent.policy, 512, agent.generator)))
        batch = replay.sample(config.batch_size, generator=agent.generator)
        loss, metrics = agent.policy_loss(batch, NextAction(batch.action))
        ess += float(metrics["q_weight_ess"]) / STEPS
        optimise(agent, loss, i / STEPS)
    actions = draw(agent.policy, N, generator)
    chain = agent.policy._chain.around(_ExactPolicy(normal(dim)))
    exact = torch.cat([chain.sample(N, generator=generator) for _ in range(2)])
    return {
        "seconds": time.perf_counter() - started,
        "outside": critic.outside / critic.calls,
        "ess": ess,
        "tv_chain": worst(histogram(actions), histogram(exact)),
        "mean": float(actions.mean()),
        "std": float(actions.std(0).mean()),
        "mean_chain": float(exact.mean()),
        "std_chain": float(exact.std(0).mean()),
        "at_bounds": float((actions.abs() > 0.99).any(-1).float().mean()),
        "at_bounds_chain": float((exact.abs() > 0.99).any(-1).float().mean()),
    }


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dim in DIMS:
        for truncated in (True, False):
            key = f"d={dim} {'truncated' if truncated else 'clipped'}/{arguments.seed}"
            if key not in load("clipped_kernel"):
                store("clipped_kernel", key, measure(dim, truncated, arguments.seed))
    for key, record in load("clipped_kernel").items():
        print(key, {k: round(v, 3) for k, v in record.items() if k != "machine"})


if __name__ == "__main__":
    main()
