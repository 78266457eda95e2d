"""Every threshold of exploration and every share of its budget, each with its reason."""

from dataclasses import dataclass, fields

__all__ = ["FEW_DIMENSIONS", "Plan"]

FEW_DIMENSIONS = 12
"""In so many, points take the place of gradients in the loss, and a plain network will do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an exploration will do; print it.

    Made once, by :meth:`of`, from the dimension and the budget. The numbers below are most
    evaluations, unless they say otherwise.

    Attributes:
        dim: Unbounded coordinates.
        evaluations: Of exploration, before the bank: all of the following together.
        survey: Points at all scales, or uniform over the box.
        bracket: Points of each round that fits a single broad law to what was found.
        bracket_rounds: Of those rounds.
        descents: Share of the evaluations that descents from independent starts may take.
        batch: Independent starts at a time.
        starts: Independent starts in all: with none of them in an unknown basin, one that catches
            more than 3 / starts of them is excluded with 95 % confidence.
        scans: Share of the evaluations for energies along lines through the basins.
        round: Points of the first round that adapts a proposal.
        rounds: Of those rounds.
        components: Of a mixture.
        kernels: Of a kernel density.
        best: Share of effective draws that adaptation may reach: a round that costs more than
            it would then save is not taken (:meth:`worth`).
        poor: Share below which the paths of the descents are searched for components: the
            minima alone do not describe the target.
        hopeless: Share below which, after three rounds, adaptation ends.
        least: Share of effective points that a bank of independent draws must have. Below it the
            errors of its averages are not to be relied on, and chains take its place.
        tail: Pareto shape of its weights, at most, unless
        unseen: no more than this share of the total lies beyond the largest weight, by that law.
        basin: Share of the target that a basin has which must be in the bank.
        alone: Share of starts that are alone in their basins, beyond which fresh starts examine
            the bank: it estimates the chance that one more finds another basin.
        unmet: Estimated mass of basins that no start has met, over that of the bank, at most.
        waves: Times that a proposal is adapted anew because its bank did not pass, and once.
        wave: Evaluations of exploration that each of these adds.
        bank: Points of the bank.
        ess: Effective points at which the bank is large enough.
        chains: Of a population, where no bank would be worth its evaluations.
        total: All of that, but for chains without a budget: nothing goes beyond.
    """

    dim: int
    evaluations: int
    survey: int
    bracket: int
    bracket_rounds: int = 8
    descents: float = 0.35
    batch: int = 64
    starts: int
    scans: float = 0.1
    round: int
    rounds: int = 8
    components: int = 64
    kernels: int = 1000
    best: float = 0.8
    poor: float = 0.3
    hopeless: float = 0.003
    least: float = 0.1
    tail: float = 0.7
    unseen: float = 0.01
    basin: float = 0.005
    alone: float = 0.05
    unmet: float = 0.02
    waves: int
    wave: int
    bank: int
    ess: float
    chains: int
    total: int

    @classmethod
    def within(
        cls,
        dim: int,
        *,
        evaluations: int,
        bank: int,
        chains: int,
        ess: float,
        starts: int,
        slope_cost: int,
        free: int | None = None,
    ) -> "Plan":
        """The plan of a budget.

        Where gradients are differences of more than a few values, exploration may take as many
        times the evaluations, at most twenty times.

        Arguments:
            dim: Unbounded coordinates.
            evaluations: Most evaluations before the bank.
            bank: Most evaluations of the bank.
            chains: Most evaluations of chains.
            ess: Effective points that are enough.
            starts: Most independent starts.
            slope_cost: Evaluations of an energy with its gradient.
            free: Evaluations left of a budget; None without one.
        """
        evaluations = int(evaluations * min(20.0, max(1.0, slope_cost / 10)))
        waves, wave = 3, evaluations // 2
        if free is not None:
            evaluations = min(evaluations, int(0.45 * free))
            wave = min(wave, max(1, free // 8))
            bank = min(bank, free - evaluations)
            chains = min(chains, max(1, free - evaluations))
        few = min(1.0, ess / 20_000)  # a small answer is not worth a large preparation
        return cls(
            dim=dim,
            evaluations=evaluations,
            survey=max(64, min(int(max(512, 2048 * few)), evaluations // 12)),
            bracket=max(48, min(int(max(256, 1024 * few)), evaluations // 24)),
            batch=max(8, min(64, evaluations // 400)),
            starts=starts,
            waves=waves,
            wave=wave,
            round=max(256, min(int(max(2048 * few, 100 * dim)), evaluations // 12)),
            bank=bank,
            ess=ess,
            chains=chains,
            total=evaluations + bank + waves * wave if free is None else free,
        )

    def worth(self, share: float, evaluations: int) -> bool:
        """Whether a better proposal could save more than the evaluations.

        Arguments:
            share: Share of effective draws of the present one.
            evaluations: What looking for a better one costs.
        """
        return self.ess * (1 / max(share, 1e-12) - 1 / self.best) > evaluations

    def __str__(self) -> str:
        return "\n".join(f"{field.name:16s} {getattr(self, field.name)}" for field in fields(self))
