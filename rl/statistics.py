r"""Statistics of few runs on several tasks: what a comparison of agents may claim.

Five seeds on a handful of tasks say little about a mean, since one run that failed decides it.
What is reported instead is computed from all runs of all tasks together, with intervals from a
bootstrap that draws runs anew within each task (a *stratified* one: tasks are not a sample).

Scores are given as a mapping from a task's name to the scores of its runs, one number each; tasks
may have different numbers of runs. To put tasks together, scores are first normalised to those of
a reference, :math:`(x - x_{\rm low}) / (x_{\rm high} - x_{\rm low})`.

References:
    | Deep Reinforcement Learning at the Edge of the Statistical Precipice (Agarwal et al., 2021)
    | https://arxiv.org/abs/2108.13264
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from rsm_sampler.checked import checked

__all__ = [
    "Estimate",
    "interquartile_mean",
    "mean_of_tasks",
    "normalised",
    "performance_profile",
    "probability_of_improvement",
    "stratified_bootstrap",
]

Scores = Mapping[str, ArrayLike]
_Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The number, of the runs as they are.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As ``0.97 [0.91, 1.02]``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@checked
def normalised(scores: Scores, low: Mapping[str, float], high: Mapping[str, float]) -> _Arrays:
    r"""Scores in units of a reference, :math:`(x - x_{\rm low})/(x_{\rm high} - x_{\rm low})`.

    Arguments:
        scores: Runs of each task.
        low: What counts as 0, the return of random actions for example.
        high: What counts as 1.

    Raises:
        ValueError: If a task has no reference, or one without extent.

    Example:
        >>> normalised({"a": [5.0, 10.0]}, {"a": 0.0}, {"a": 10.0})
        {'a': array([0.5, 1. ])}
    """
    found = {}
    for task, runs in _checked("scores", scores).items():
        for name, given in (("low", low), ("high", high)):
            if task not in given:
                raise ValueError(f"{name} must have the task {task!r}, got {sorted(given)}")
        extent = high[task] - low[task]
        if not np.isfinite(extent) or extent == 0:
            raise ValueError(
                f"high must differ from low, both finite, got {low[task]} and {high[task]} "
                f"of {task!r}"
            )
        found[task] = (runs - low[task]) / extent
    return found


@checked
def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of all runs of all tasks.

    Arguments:
        scores: Runs of each task, normalised.

    Example:
        >>> interquartile_mean({"a": [0.0, 1.0, 2.0, 99.0]})
        1.5
    """
    # scipy.stats, which has this too, takes a third of the time that rl takes to be imported.
    runs = np.sort(np.concatenate(list(_checked("scores", scores).values())))
    left_out = len(runs) // 4
    return float(runs[left_out : len(runs) - left_out].mean())


@checked
def mean_of_tasks(scores: Scores) -> float:
    """Mean over tasks of the mean of each one's runs.

    Arguments:
        scores: Runs of each task, normalised.

    Note:
        Of a few tasks the interquartile mean can leave one out altogether: a quarter of all runs
        is one task in four, the hardest one if its scores are the lowest.

    Example:
        >>> mean_of_tasks({"a": [0.0, 1.0], "b": [2.0]})
        1.25
    """
    return float(np.mean([runs.mean() for runs in _checked("scores", scores).values()]))


@checked
def performance_profile(
    scores: Scores, thresholds: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    r"""Share of runs above each of some thresholds, the mean over tasks.

    Arguments:
        scores: Runs of each task, normalised.
        thresholds: Where to look.

    Example:
        >>> performance_profile({"a": [0.0, 1.0], "b": [2.0]}, np.array([0.5, 1.5]))
        array([0.75, 0.5 ])
    """
    found = _checked("scores", scores)
    return np.mean([(runs[:, None] > thresholds).mean(0) for runs in found.values()], axis=0)


@checked
def probability_of_improvement(scores: Scores, others: Scores) -> float:
    r"""How likely a run is better than another agent's run of the same task, the mean over tasks.

    .. math:: \frac 1M \sum_m \Big[ P(X_m > Y_m) + \tfrac 12 P(X_m = Y_m) \Big],

    the statistic of Mann and Whitney for each task.

    Arguments:
        scores: Runs of each task.
        others: Runs of the same tasks by the other agent.

    Raises:
        ValueError: If the tasks are not the same.

    Example:
        >>> probability_of_improvement({"a": [1.0, 3.0]}, {"a": [2.0, 3.0]})
        0.375
    """
    mine, theirs = _checked("scores", scores), _checked("others", others)
    if set(mine) != set(theirs):
        raise ValueError(f"others must have the tasks {sorted(mine)}, got {sorted(theirs)}")
    signs = [np.sign(mine[task][:, None] - theirs[task]).mean() for task in mine]
    return float(0.5 + 0.5 * np.mean(signs))


@checked
def stratified_bootstrap(
    statistic: Callable[..., float],
    *scores: Scores,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A statistic with the interval between percentiles of its bootstrap.

    Runs are drawn with replacement within each task and each agent.

    Arguments:
        statistic: A function of one mapping or more, such as :func:`interquartile_mean` or
            :func:`probability_of_improvement`.
        *scores: What it is a function of.
        draws: Number of bootstrap samples.
        level: Probability of the interval.
        seed: Decides the draws.

    Raises:
        ValueError: If an argument does not fit.

    Note:
        With few runs a percentile interval is too short. Of the interquartile mean of normal
        scores, at 95 %, it covers the truth in 74 of 100 cases with three runs of one task, in 92
        with five; the probability that one of two equal agents is better, in 81 with three runs
        of each on one task, in 90 with five.

    Example:
        >>> str(stratified_bootstrap(interquartile_mean, {"a": [1.0, 1.0, 1.0]}))
        '1.00 [1.00, 1.00]'
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    arrays = [_checked("scores", each) for each in scores]
    values = [
        statistic(
            *({task: rng.choice(runs, len(runs)) for task, runs in a.items()} for a in arrays)
        )
        for _ in range(draws)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(statistic(*arrays), float(low), float(high))


def _checked(name: str, scores: Scores) -> _Arrays:
    if not scores:
        raise ValueError(f"{name} must have a task at least, got none")
    arrays = {task: np.asarray(runs, np.float64) for task, runs in scores.items()}
    for task, runs in arrays.items():
        if runs.ndim != 1 or not len(runs) or not np.isfinite(runs).all():
            raise ValueError(
                f"{name} must be finite numbers, one for each run, got {runs} of {task!r}"
            )
    return arrays
