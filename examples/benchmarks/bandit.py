"""Does a policy's law come out right? Bandits on a box with a known Q.

    python examples/benchmarks/bandit.py                    # all that is not measured yet
    python examples/benchmarks/bandit.py --dims 1 --widths 0.2

There is one state, and Q / lambda is the logarithm of two unequal wells (0.7 and 0.3) of width
sigma at +0.4 and -0.4 in every coordinate, on the box [-1, 1]^d.

SDAC trains on loss (14) with its own replay, which its policy fills, and with candidates that walk
towards the wells (:mod:`rsm_sampler.annealing`). Its marginals are compared with those of the same
chain under the exact denoiser at T = 20 (the discretisation is then the same on both sides), and
with exp(Q / lambda) itself at T = 400, with the chain of second order: that of first order
misses wells of 0.08 by a total variation of 0.025 there, with the exact denoiser too.

DPMD takes five mirror steps from its own samples, the first from a normal law of standard
deviation 0.4 cut to the box: each by a fifth of Q / lambda, or by as much as changes the policy by
0.3 nats (1 is the agent's default). Each iterate is compared with the exact step from its actual
predecessor (samples of the predecessor, weighted), and the last with the exact law of all five
steps: the drift of resampling. T = 200, second order.

Marginals are over 50 bins, n = 10^5; the total variation of the worst coordinate is reported,
beside its floor, what as many exact draws give. Results go to docs/results/bandit.json.
"""

import argparse
import math
import os
import time

import torch
from results import load, store
from torch import Tensor

import rl
from rl.off_policy import NextAction
from rsm_sampler.metrics import total_variation_floor

PLACE, SHARES = 0.4, (0.7, 0.3)
START = 0.4  # standard deviation of DPMD's first policy
# Of SDAC, by dimension, width and, where it differs, T: states of a step, steps, candidates,
# their stages and moves.
EFFORT = {
    (1, 0.5): (512, 4000, 64, 0, 1),
    (1, 0.2): (256, 4000, 64, 4, 2),
    (1, 0.08): (256, 4000, 64, 5, 2),
    (2, 0.5): (512, 4000, 64, 0, 1),
    (2, 0.2): (256, 4000, 64, 6, 2),
    (2, 0.08): (256, 4000, 96, 8, 3),
    (6, 0.5): (64, 4000, 128, 6, 2),
    (6, 0.2): (64, 4000, 128, 12, 4),
    (6, 0.08): (64, 2500, 128, 20, 6),
    (6, 0.08, 400): (64, 10_000, 128, 20, 6),
}
EDGES = torch.linspace(-1, 1, 51, dtype=torch.float64)


class Wells:
    """Two wells: values, exact denoiser, exact marginal."""

    def __init__(self, dim: int, width: float, power: float = 1.0) -> None:
        self.dim, self.width = dim, width
        self.loc = PLACE * torch.tensor([1.0, -1.0], dtype=torch.float64)
        self.log_share = torch.tensor(SHARES, dtype=torch.float64).log()
        self.power = power

    def log_density(self, a: Tensor) -> Tensor:
        """Q / lambda."""
        a = a.double()
        one = torch.ones(self.dim, dtype=torch.float64)
        square, along = (a * a + PLACE**2) @ one, 2 * PLACE * (a @ one)
        first, second = self.log_share.tolist()
        scale = 0.5 / self.width**2
        return torch.logaddexp(first - scale * (square - along), second - scale * (square + along))

    def minimum(self, observation: Tensor, a: Tensor) -> Tensor:
        """What the agent takes for its critic."""
        return (self.power * self.log_density(a)).to(a.dtype)

    def denoiser(self, x: Tensor, sigma: float) -> Tensor:
        """E[a | x] on the box, exactly."""
        x = x.double().unsqueeze(-1)
        variance = 1 / (1 / self.width**2 + 1 / sigma**2)
        centre = variance * (self.loc / self.width**2 + x / sigma**2)
        std = math.sqrt(variance)
        low, high = (-1 - centre) / std, (1 - centre) / std
        flip = low > 0  # to the lower tail, where log_ndtr is precise
        low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        log_mass = log_high + torch.log1p(-torch.exp(log_low - log_high))
        log_pdf = 0.5 * math.log(2 * math.pi)
        edge = torch.exp(-0.5 * low**2 - log_pdf - log_mass) - torch.exp(
            -0.5 * high**2 - log_pdf - log_mass
        )
        mean = centre + torch.where(flip, -std, std) * edge
        total = self.width**2 + sigma**2
        log_weight = self.log_share + (log_mass - (x - self.loc).square() / 2 / total).sum(-2)
        return (torch.softmax(log_weight, -1).unsqueeze(-2) * mean).sum(-1)

    def marginals(self) -> Tensor:
        """Bin masses of each coordinate, (dim, 50)."""
        cdf = torch.special.ndtr((EDGES.unsqueeze(-1) - self.loc) / self.width)
        mass = cdf[-1] - cdf[0]
        weight = self.log_share.exp() * mass ** (self.dim - 1)
        cells = (cdf.diff(dim=0) * weight).sum(-1)
        return (cells / cells.sum()).expand(self.dim, -1)

    def tilted_marginals(self, power: float) -> Tensor:
        """The same of START exp(power Q / lambda), by importance sampling from wider wells."""
        wide = Wells(self.dim, self.width / math.sqrt(power))
        wide.log_share = torch.full_like(wide.log_share, 0.5).log()
        generator = torch.Generator().manual_seed(0)
        well = (torch.rand((1_000_000, 1), generator=generator) < 0.5).double()
        a = torch.randn((len(well), self.dim), generator=generator, dtype=torch.float64)
        a = PLACE * (2 * well - 1) + wide.width * a
        a = a[(a.abs() <= 1).all(-1)]
        log_start = -0.5 * a.square().sum(-1) / START**2
        log_weight = power * self.log_density(a) + log_start - wide.log_density(a)
        return histogram(a, torch.softmax(log_weight, 0))


def histogram(a: Tensor, weight: Tensor | None = None) -> Tensor:
    """Bin masses of every coordinate, (dim, 50)."""
    index = torch.bucketize(a.double().contiguous(), EDGES[1:-1], right=True)
    weight = torch.ones(len(a), dtype=torch.float64) if weight is None else weight.double()
    rows = [torch.bincount(column, weight, minlength=50) for column in index.T]
    return torch.stack(rows) / weight.sum()


def worst(p: Tensor, q: Tensor) -> float:
    """Total variation of the worst coordinate."""
    return float(0.5 * (p - q).abs().sum(-1).max())


def draw(policy: rl.policies.DiffusionPolicy, n: int, generator: torch.Generator) -> Tensor:
    """Actions of the only state."""
    rows = -(-n // 1000)
    actions = policy.sample(torch.zeros(rows, 1), -(-n // rows), generator=generator)
    return actions.flatten(0, 1)[:n]


def optimise(agent: rl.OffPolicyAgent, loss: Tensor, fraction: float) -> None:
    """A step with a learning rate that falls to nothing."""
    for group in agent.policy_optimiser.param_groups:
        group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * fraction)) + 1e-6
    agent.policy_optimiser.zero_grad()
    loss.backward()
    agent.policy_optimiser.step()


def batch_of(action: Tensor) -> rl.Batch:
    """Transitions of the only state."""
    zero = torch.zeros(len(action))
    return rl.Batch(zero[:, None], action, zero, zero[:, None], zero, zero + 1)


def sdac(dim: int, width: float, num_steps: int, seed: int) -> dict:
    """Train, and compare."""
    started = time.perf_counter()
    target, generator = Wells(dim, width), torch.Generator().manual_seed(seed + 100)
    states, steps, draws, stages, moves = EFFORT.get((dim, width, num_steps), EFFORT[dim, width])
    config = rl.SDACConfig(
        num_steps=num_steps,
        chain="ancestral" if num_steps <= 20 else "multistep",
        width=256 if num_steps <= 20 else 128,  # long chains take long
        temperature=1.0,
        temperature_rule="fixed",
        batch_size=states,
        policy_states=states,
        num_draws=draws,
        anneal_stages=stages,
        anneal_moves=moves,
    )
    agent = rl.SDAC(1, dim, config, seed=seed, device="cpu")
    agent.critic = target
    replay = rl.ReplayBuffer(20_000, 1, dim)
    replay.add(batch_of(2 * torch.rand(2000, dim, generator=generator) - 1))
    for i in range(steps):
        if i % 20 == 19:
            replay.add(batch_of(draw(agent.policy, 512, agent.generator)))
        batch = replay.sample(config.batch_size, generator=agent.generator)
        loss, _ = agent.policy_loss(batch, NextAction(batch.action))
        optimise(agent, loss, i / steps)
    n = 100_000
    mine = histogram(draw(agent.policy, n, generator))
    record = {"seconds": time.perf_counter() - started}
    exact = target.marginals()
    record["floor"] = float(total_variation_floor(exact[0], n))
    record["tv_law"] = worst(mine, exact)
    if num_steps <= 20:
        chain = agent.policy._chain.around(_ExactPolicy(target))
        reference = torch.cat([chain.sample(n, generator=generator) for _ in range(4)])
        record["tv_chain"] = worst(mine, histogram(reference))
        record["tv_chain_law"] = worst(histogram(reference), exact)
    return record


class _ExactPolicy:
    by_number = True

    def __init__(self, target: Wells) -> None:
        self.target = target

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        parts = [self.target.denoiser(part, sigma) for part in x.split(20_000)]
        return torch.cat(parts).to(x.dtype).clamp(-1, 1)


def mirror_power(log_density: Tensor, most: float = 0.2, nats: float = 0.3) -> float:
    """The power of the step: at most a fifth, and at most so far from the predecessor."""

    def divergence(power: float) -> float:
        weight = torch.softmax(power * log_density, 0)
        return math.log(len(weight)) + float(torch.xlogy(weight, weight).sum())

    low, high = 0.0, most
    if divergence(most) <= nats:
        return most
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if divergence(middle) <= nats else (low, middle)
    return low


def dpmd(dim: int, width: float, num_steps: int, seed: int) -> dict:
    """Five mirror steps, each against the exact one from its actual predecessor."""
    started = time.perf_counter()
    target, steps, rounds, states = Wells(dim, width), 1000, 5, 8
    # The first fits from nothing; a fifth of the narrowest wells leaves a cusp between them.
    first = 12_000 if (dim, width) == (1, 0.08) else 4000
    generator = torch.Generator().manual_seed(seed + 100)
    config = rl.DPMDConfig(
        num_steps=num_steps,
        chain="multistep",
        width=128,
        draws_per_state=256,
        policy_states=states,
        batch_size=256,
        old_policy_period=10**9,
        target_kl=None,
        temperature=1.0,
        temperature_final=1.0,
        noise=0.0,
    )
    agent = rl.DPMD(1, dim, config, seed=seed, device="cpu")
    agent.critic = target
    n, found, floors, powers = 100_000, [], [], []
    previous = START * torch.randn(2 * n, dim, generator=generator)
    previous = previous[(previous.abs() <= 1).all(-1)][:n]
    for turn in range(rounds):
        value = target.log_density(previous)
        target.power = mirror_power(value)
        powers.append(target.power)
        more = steps if turn else first
        for i in range(more):
            index = torch.randint(n, (states * 256,), generator=generator)
            draws = previous[index].view(states, 256, dim)
            loss, _ = agent.policy_loss(
                batch_of(draws[:, 0]), NextAction(draws[:, 0], draws=draws)
            )
            optimise(agent, loss, i / more)
        weight = torch.softmax(target.power * value, 0)
        wanted = histogram(previous, weight)
        # What as many exact draws would give, compared with as noisy a reference.
        variance = wanted * (1 - wanted) * (float(weight.square().sum()) + 1 / n)
        floors.append(float(0.5 * (2 / math.pi * variance).sqrt().sum(-1).max()))
        previous = draw(agent.policy, n, generator)
        found.append(worst(histogram(previous), wanted))
    exact = target.tilted_marginals(sum(powers))
    return {
        "seconds": time.perf_counter() - started,
        "powers": powers,
        "tv_steps": found,
        "tv_worst_step": max(found),
        "floor_worst_step": max(floors),
        "tv_after_five": worst(histogram(previous), exact),
        "floor": float(total_variation_floor(exact[0], n)),
    }


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="*", default=[1, 2, 6])
    parser.add_argument("--widths", type=float, nargs="*", default=[0.5, 0.2, 0.08])
    parser.add_argument("--agents", nargs="*", default=["sdac", "dpmd"])
    parser.add_argument("--num-steps", type=int, nargs="*", help="T; two for SDAC, one for DPMD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for agent in arguments.agents:
        for dim in arguments.dims:
            for width in arguments.widths:
                usual = [20, 400] if agent == "sdac" else [200]
                for num_steps in arguments.num_steps or usual:
                    key = f"{agent} d={dim} sigma={width} T={num_steps}/{arguments.seed}"
                    if key in load("bandit"):
                        continue
                    measure = sdac if agent == "sdac" else dpmd
                    record = measure(dim, width, num_steps, arguments.seed)
                    store("bandit", key, record)
                    short = {
                        k: round(v, 4) if isinstance(v, float) else v
                        for k, v in record.items()
                        if k != "machine"
                    }
                    print(key, short, flush=True)


if __name__ == "__main__":
    main()
