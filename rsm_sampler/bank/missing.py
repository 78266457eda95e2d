r"""What a bank leaves out although descents have met it.

About a minimum m with a root A of the inverse curvature lie

.. math:: k = n\, q(m)\, (2 \pi)^{d/2} |\det A|

of n draws of a law q, and by Laplace's method the share
:math:`s = e^{-E(m)} (2 \pi)^{d/2} |\det A| / Z` of the target. Where k is small, draws of a
Student-t law t there measure the mass that the law q cannot represent,

.. math:: \int \Bigl(\frac{e^{-E(x)}}Z - r\, q(x)\Bigr)_+ dx, \qquad r = n\, s_0 / k_0,

since of a share :math:`s_0` there are fewer than :math:`k_0` draws where :math:`p > r q`. Draws of
earlier laws measure the same anywhere.

Where many starts were alone in their basins there are more basins than were met. With
:math:`f_1` basins that one start met and :math:`f_2` that two did, at least about
:math:`f_1 (f_1 - 1) / (2 (f_2 + 1))` are unmet; fresh starts tell what mass such a basin has that
is not in the bank: the mean of theirs but the largest, over the mass with all of them.

References:
    | Nonparametric estimation of the number of classes in a population (Chao, 1984)
    | https://www.jstor.org/stable/4615964
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rsm_sampler.bank.ledger import Basin
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.pool import Pool
from rsm_sampler.montecarlo.densities import Density, Mixture
from rsm_sampler.montecarlo.mixtures import lower_root, tails
from rsm_sampler.target.problem import Problem

__all__ = ["Lack", "left_out"]

_FEW = 10.0  # draws in a basin that represent it
_MEASURED, _DRAWS = 16, 64  # basins that are measured at a time, and draws of each
_NEGLIGIBLE = 1e-6  # of the target, by Laplace's method: such basins are left alone
_SURE = 3.0  # standard errors
_RARE = 20.0  # times rarer than in the target are points that a small bank lacks, too
_ENDLESS = 0.5  # of the mass in basins that no start has met: no law will know them one by one


@dataclass(frozen=True)
class Lack:
    """What a bank leaves out.

    Attributes:
        reason: The same in words.
        endless: Whether there are too many basins for any law that knows them one by one.
    """

    reason: str
    endless: bool = False


def left_out(
    problem: Problem,
    basins: Sequence[Basin],
    fresh: Sequence[bool],
    law: Density,
    n: int,
    log_z: float,
    plan: Plan,
    pool: Pool,
    generator: torch.Generator,
) -> Lack | None:
    """Say what a bank lacks, if it lacks something.

    Arguments:
        problem: The problem.
        basins: All basins seen.
        fresh: Which of them starts have met since the law was made.
        law: The law of the bank.
        n: Number of its draws.
        log_z: Estimate of log Z from them.
        plan: Thresholds.
        pool: Draws of earlier laws; receives those that measure basins.
        generator: Source of randomness.

    Returns:
        A reason to turn the bank down, or None.

    Raises:
        BudgetExceededError: If the budget does not hold the draws.
    """
    seen = _seen_before(pool, law, n, log_z, plan)
    if seen > plan.basin:
        return Lack(f"{seen:.1%} of the mass, or more, was met by earlier draws, and not by these")
    if not basins:
        return None
    dim = problem.dim
    loc = torch.stack([basin.x for basin in basins])
    tril = torch.stack([lower_root(basin.factor) for basin in basins])
    energy = loc.new_tensor([basin.energy for basin in basins])
    volume = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dim * math.log(2 * math.pi)
    share = (volume - energy - log_z).clamp(max=0.0).exp()
    draws = n * (law.log_prob(loc) + volume).exp()
    thin = (draws < _FEW) & (share > _NEGLIGIBLE)
    thin = thin.nonzero()[:, 0]
    thin = thin[share[thin].argsort(descending=True)][:_MEASURED]
    missing = torch.where(draws < 1, share, 0.0)
    error = torch.zeros_like(missing)
    if len(thin):
        weight = torch.full_like(share[thin], 1 / len(thin))
        about = Mixture(weight, loc[thin], tril[thin], law, tails(dim), share=0.0)
        x = about.sample(_DRAWS * len(thin), generator)
        value = problem.potential(x)
        pool.add(about, x, value)
        log_t, terms = about.log_probs(x)
        ratio = n * plan.basin / _FEW
        excess = (-value - log_z - log_t).exp() - ratio * (law.log_prob(x) - log_t).exp()
        each = (terms - log_t[:, None]).exp() * excess.clamp(min=0.0)[:, None]
        missing[thin] = each.mean(0)
        error[thin] = each.std(0) / math.sqrt(len(x))
    once, twice = (sum(basin.starts == k for basin in basins) for k in (1, 2))
    unmet = once * (once - 1) / (2 * (twice + 1))
    met = missing[torch.tensor(fresh, device=missing.device)]
    of_fresh = 0.0
    if len(met) > 1:  # without the largest: a single one of much mass is no sign of others like it
        of_fresh = float((met.sum() - met.amax()) / (len(met) - 1) / (1 + met.sum()))
    if unmet * of_fresh > plan.unmet:
        return Lack(
            f"some {unmet:.0f} basins were met by no start; by those of {sum(fresh)} further "
            f"starts they have {unmet * of_fresh:.0%} of the mass of the draws",
            endless=unmet * of_fresh > _ENDLESS,
        )
    sure = missing - _SURE * error
    worst = int(sure.argmax())
    if len(thin) and float(sure[worst]) > plan.basin:
        return Lack(
            f"a basin with {float(missing[worst]):.1%} of the mass was not among the draws"
        )
    return None


def _seen_before(pool: Pool, law: Density, n: int, log_z: float, plan: Plan) -> float:
    """The mass that n draws of a law lack, by the draws of earlier laws: a lower bound."""
    if len(pool) < 2:
        return 0.0
    log_weight = pool.weights.value - log_z
    heavy = (log_weight > math.log(_NEGLIGIBLE)).nonzero()[:, 0]
    if len(heavy) == 0:
        return 0.0
    log_p = -pool.energy[heavy] - log_z
    ratio = max(_RARE, n * plan.basin)  # where p > r q such a share has less than one draw
    covered = ratio * (law.log_prob(pool.x[heavy]) - log_p).exp()
    excess = torch.zeros_like(log_weight)
    excess[heavy] = log_weight[heavy].exp() * (1 - covered).clamp(min=0.0)
    error = float(excess.std()) / math.sqrt(len(excess))
    return float(excess.mean()) - _SURE * error
