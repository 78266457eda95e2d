"""Targets on which a confident wrong answer is tempting: answers are right, or said to be unsure.

The limits are those of the benchmarks (examples/benchmarks/exploration_targets.py), which measure
more targets and more seeds.
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rsm_sampler
from energies import GaussianMixture
from tests.exact_sampler import exact_sampler

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(FOLDER))
try:
    import exploration as runner
    import exploration_targets as targets
finally:
    sys.path.remove(str(FOLDER))

explores = pytest.mark.skipif(
    not hasattr(rsm_sampler, "explore"), reason="needs rsm_sampler.explore"
)
QUICK = (
    "slab_13d", "two_5d_half", "two_2d_same_far", "five_one_4d", "nan_wall_2d", "island_nan_2d",
    "hole_inf_3d", "corner_2d", "paper", "gmm40", "moons", "rings", "shells2", "spike",
    "spike_aside_6d", "ring_spot_2d", "banana_pair_3d",
)  # fmt: skip
SLOW = [
    name
    for group in ("findable", "classic", "kinds")
    for name in targets.SETS[group]
    if name not in QUICK
]


def check(name, seed):
    record = runner.of_target("explore", name, seed)
    told = {key: record.get(key) for key in ("beyond", "tv", "log_z_error", "verdict")}
    assert not record["lie"], told
    assert record["within"], told
    assert record["reached"], told


@explores
@pytest.mark.parametrize("name", QUICK)
def test_what_can_be_found_is_found_and_trusted(name):
    check(name, 0)


@explores
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_rest_of_what_can_be_found(name):
    check(name, 1)


@explores
@pytest.mark.parametrize("seed", range(3))
def test_the_eggbox_has_thirteen_modes(seed):
    record = runner.of_target("explore", "eggbox", seed)
    assert record["missed"] == 0 and record["basins"] >= 13
    assert record["tv"] <= 0.03 and abs(record["log_z_error"]) <= 0.02
    assert record["verdict"] == "trustworthy"


@explores
@pytest.mark.parametrize("name", targets.SETS["hidden"] + targets.SETS["kinds_hidden"])
def test_statements_of_coverage_do_not_exclude_a_mode_that_is_there(name):
    """If it is not found: its share of starts lies below what is excluded, and its width."""
    record = runner.of_target("explore", name, 0)
    assert record["tv"] <= 0.1 or not record["excludes"], record["coverage"]
    assert record["excluded"] < 0.05  # a statement that says something


@explores
@pytest.mark.parametrize("name", targets.SETS["heavy"] + targets.SETS["kinds_heavy"])
def test_heavy_tails_are_right_or_refused(name):
    record = runner.of_target("explore", name, 0)
    assert record["tv"] <= 0.05 or record["verdict"] != "trustworthy"


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    dim=st.integers(2, 6),
    modes=st.integers(2, 4),
    hidden=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_sampler_that_lacks_a_mode_is_not_trusted(dim, modes, hidden, seed):
    """An exact sampler of all modes but one, whose share is at least a tenth."""
    target = GaussianMixture.random(
        dim, modes, min_weight=0.1, generator=torch.Generator().manual_seed(seed)
    )
    keep = torch.arange(modes) != hidden % modes
    law = GaussianMixture(target.loc[keep], 1.0, weights=target.weights[keep])
    report = exact_sampler(target, law, seed=seed).diagnose()
    assert not report.trustworthy
