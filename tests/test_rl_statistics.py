import numpy as np
import pytest

from rl.statistics import (
    interquartile_mean,
    normalised,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)


def runs(seed, *sizes, shift=0.0):
    rng = np.random.default_rng(seed)
    return {str(i): shift + rng.normal(size=n) for i, n in enumerate(sizes)}


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side():
    scores = {"a": [8.0, -1e9, 3.0], "b": [5.0, 1e9, 4.0, 6.0, 2.0]}
    assert interquartile_mean(scores) == pytest.approx((3 + 4 + 5 + 6) / 4)


def test_profiles_count_runs_above_a_threshold_and_tasks_alike():
    scores = {"a": [0.0, 1.0, 2.0, 3.0], "b": [1.5]}
    thresholds = np.array([-1.0, 1.0, 1.6, 5.0])
    expected = [1.0, (2 / 4 + 1) / 2, (2 / 4 + 0) / 2, 0.0]
    np.testing.assert_allclose(performance_profile(scores, thresholds), expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_probability_of_improvement_counts_pairs(seed):
    rng = np.random.default_rng(seed)
    x = {t: rng.integers(0, 4, n).astype(float) for t, n in (("a", 5), ("b", 3))}
    y = {t: rng.integers(0, 4, n).astype(float) for t, n in (("b", 4), ("a", 2))}
    by_task = [
        np.mean([(a > b) + 0.5 * (a == b) for a in x[task] for b in y[task]]) for task in "ab"
    ]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(by_task))
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)


def test_scores_of_the_reference_are_0_and_1():
    found = normalised({"a": [-100.0, 0.0, 100.0]}, {"a": -100.0}, {"a": 100.0})
    np.testing.assert_allclose(found["a"], [0, 0.5, 1])


def test_a_bootstrap_covers_as_often_as_it_should():
    """Six tasks of five runs, intervals of 90 %, 100 repetitions: 79 to 97 of them cover.

    Coverage of such percentile intervals is at least 0.86 (theirs are too short by
    sqrt(4/5) in each task); 78 or fewer at 0.86, 98 or more at 0.9, have a probability of 2 %
    and 0.2 %; the seed is fixed. An interval half as long would cover 60.
    """
    inside = 0
    for i in range(100):
        found = stratified_bootstrap(
            interquartile_mean, runs(i, *[5] * 6), draws=200, level=0.9, seed=i
        )
        assert found.low <= found.value <= found.high
        inside += found.low <= 0 <= found.high
    assert 79 <= inside <= 97


def test_runs_are_drawn_within_their_task():
    """Two tasks far apart: were they mixed, the interval would reach from one to the other."""
    scores = {"a": [0.0, 0.0, 0.0], "b": [10.0, 10.0, 10.0]}
    found = stratified_bootstrap(
        lambda s: float(np.mean([np.mean(r) for r in s.values()])), scores
    )
    assert (found.low, found.value, found.high) == (5, 5, 5)


def test_an_agent_that_is_better_everywhere_is_found_so():
    found = stratified_bootstrap(
        probability_of_improvement, runs(0, 5, 3, shift=9.0), runs(1, 5, 4), draws=100
    )
    assert (found.low, found.high) == (1, 1)
    assert str(found) == "1.00 [1.00, 1.00]"


def test_the_same_seed_gives_the_same_interval():
    scores = runs(0, 5, 5)
    first, again, other = (
        stratified_bootstrap(interquartile_mean, scores, draws=50, seed=s) for s in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interquartile_mean({}), "scores must have a task at least, got none"),
        (
            lambda: interquartile_mean({"a": [np.nan]}),
            r"scores must be finite .* got \[nan\] of 'a'",
        ),
        (lambda: interquartile_mean({"a": []}), "one for each run"),
        (lambda: normalised({"a": [1.0]}, {}, {"a": 1.0}), "low must have the task 'a'"),
        (lambda: normalised({"a": [1.0]}, {"a": 1.0}, {"a": 1.0}), "high must differ from low"),
        (
            lambda: probability_of_improvement({"a": [1.0]}, {"b": [1.0]}),
            r"others must have the tasks \['a'\], got \['b'\]",
        ),
        (
            lambda: stratified_bootstrap(interquartile_mean, {"a": [1.0]}, draws=0),
            "draws must be at least 1, got 0",
        ),
        (
            lambda: stratified_bootstrap(interquartile_mean, {"a": [1.0]}, level=1.0),
            "level must be between 0 and 1, got 1.0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
