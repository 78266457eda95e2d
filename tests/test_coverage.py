"""The statement of coverage, against simulated starts."""

import math

import pytest
import torch
from scipy import stats

from rsm_sampler.verdict.coverage import Coverage


def test_a_basin_of_exactly_the_excluded_share_is_missed_in_one_search_of_twenty():
    """False alarm below 1e-6; detects a rate of 0.056 instead of 0.05."""
    starts, searches = 375, 100_000
    share = Coverage("a box", starts).excluded
    assert share == pytest.approx(0.008, abs=1e-4)
    rng = torch.Generator().manual_seed(0)
    chance = torch.full((searches,), share, dtype=torch.float64)
    hits = torch.binomial(torch.full_like(chance, starts), chance, generator=rng)
    low, high = stats.binom(searches, 0.05).interval(1 - 1e-6)
    assert low <= int((hits == 0).sum()) <= high


@pytest.mark.parametrize("unknown", [1, 5, 40])
def test_starts_of_unknown_end_weaken_the_statement(unknown):
    """The share excluded would show more unknown ends in 19 searches of 20."""
    coverage = Coverage("a box", 200, unknown)
    assert coverage.excluded > Coverage("a box", 200).excluded
    law = stats.binom(200, coverage.excluded)
    assert law.cdf(unknown) == pytest.approx(0.05, abs=1e-9)
    assert f"{unknown} of them in basins not followed up" in str(coverage)


@pytest.mark.parametrize("coverage", [Coverage("a box", 0), Coverage("a box", 7, unknown=7)])
def test_without_known_ends_nothing_is_excluded(coverage):
    assert coverage.excluded == 1.0


def test_no_start_says_so():
    assert str(Coverage("a box", 0)) == "a box: no start was followed, nothing is excluded"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("starts", "unknown", "message"),
    [(-1, 0, "starts must be at least 0, got -1"), (3, 4, "between 0 and starts = 3, got 4")],
)
def test_impossible_numbers_are_refused(starts, unknown, message):
    with pytest.raises(ValueError, match=message):
        Coverage("a box", starts, unknown)


@pytest.mark.bad_input
@pytest.mark.parametrize("mass", [0.0, 1.0, -0.1, math.nan])
def test_a_mass_is_a_share(mass):
    with pytest.raises(ValueError, match="mass must be between 0 and 1"):
        Coverage("a box", 100).width(mass)


@pytest.mark.parametrize("mass", [0.02, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_mode_of_the_stated_width_is_met_by_one_of_the_points_in_19_searches_of_20(dim, mass):
    """Uniform points in a cube, a Gaussian mode in a Gaussian rest; false alarm below 1e-6.

    The mode lies where the rest has its full density, for which the radius is exact: a point
    counts if the mode's density exceeds that of the rest's middle.
    """
    points, half, spread, searches = 20_000, 3.0, 1.0, 1000
    coverage = Coverage(
        "a box", 10, points=points, density=-dim * math.log(2 * half), spread=spread, dim=dim
    )
    width = coverage.width(mass)
    assert 0 < width < spread
    rng = torch.Generator().manual_seed(1)
    missed = 0
    for _ in range(searches):
        x = half * (2 * torch.rand(points, dim, dtype=torch.float64, generator=rng) - 1)
        log_mode = math.log(mass) - dim * math.log(width) - 0.5 * (x / width).square().sum(-1)
        log_rest = math.log(1 - mass) - dim * math.log(spread)
        missed += not bool((log_mode > log_rest).any())
    low, high = stats.binom(searches, 0.05).interval(1 - 1e-6)
    assert low <= missed <= high


def test_narrower_and_lighter_modes_are_harder_to_meet():
    def coverage(points):
        return Coverage("a box", 10, points=points, density=-3.0, spread=1.0, dim=2)

    widths = [coverage(points).width(0.5) for points in (100, 1000, 10_000)]
    assert widths[0] > widths[1] > widths[2]
    assert coverage(1000).width(0.1) > coverage(1000).width(0.5)
    thin = Coverage("a box", 10, points=10, density=-20.0, spread=1.0, dim=8)
    assert thin.width(0.5) == math.inf
    assert Coverage("a box", 10).width(0.5) == math.inf


def test_the_sentence_can_be_quoted():
    text = str(Coverage("searched the box", 375, basins=3, points=4000, density=-4.0, spread=1.0,
                        dim=2))  # fmt: skip
    for part in (
        "searched the box; 375 independent starts ended in 3 basins",
        "a basin that catches more than 0.8 % of starts would have been seen with 95 %",
        "a mode of half the mass without a basin, narrower than about 0.031",
    ):
        assert part in text, text
