"""Figures: what is drawn is what was given, and bad input is refused."""

import math
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from energies import GaussianMixture
from rsm_sampler import plotting
from rsm_sampler.plotting import (
    new_figure,
    plot_energy,
    plot_marginal,
    plot_panels,
    plot_samples,
    plot_training,
    plot_weights,
    save_figure,
)

TARGET = GaussianMixture.paper()
SAMPLES = TARGET.sample(6000, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ax():
    return new_figure()[1][0]


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def stairs(ax):
    """Values and edges of the steps drawn, in order."""
    return [(patch.get_data().values, patch.get_data().edges) for patch in ax.patches]


def test_importing_it_loads_no_matplotlib():
    code = "import sys, rsm_sampler.plotting; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    "draw",
    [
        lambda **k: plot_energy(TARGET, (-7, 7), **k),
        lambda **k: plot_samples(SAMPLES, **k),
        lambda **k: plot_samples(SAMPLES, kind="density", energy=TARGET, **k),
        lambda **k: plot_marginal(SAMPLES, exact=SAMPLES, **k),
        lambda **k: plot_weights(torch.randn(500), **k),
        lambda **k: plot_training([{"step": 1.0, "ess": 0.5}], target=0.9, **k),
    ],
)
def test_every_function_takes_and_returns_axes(draw, ax):
    assert draw(ax=ax) is ax
    assert ax.has_data()
    alone = draw()
    assert alone is not ax and alone.has_data()


def test_contours_lie_where_the_energy_says(ax):
    plot_energy(lambda x: x.square().sum(-1) / 2, (-4.0, 4.0), ax=ax, levels=(2.0,))
    path = ax.collections[0].get_paths()[0]
    radius = (path.vertices**2).sum(-1) ** 0.5
    assert abs(radius - 2).max() < 0.02


def test_contours_keep_x_and_y_apart(ax):
    plot_energy(lambda x: x[:, 0].square() / 2 + 8 * x[:, 1].square(), (-3, 3), ax=ax, levels=[2])
    vertices = ax.collections[0].get_paths()[0].vertices
    assert vertices[:, 0].max() == pytest.approx(2.0, abs=0.02)
    assert vertices[:, 1].max() == pytest.approx(0.5, abs=0.02)


def test_an_infinite_region_is_no_obstacle(ax):
    def energy(x):
        return torch.where(x[:, 0] > 0, x.square().sum(-1) / 2, torch.inf)

    plot_energy(energy, (-3, 3), ax=ax)
    assert ax.has_data()


def test_the_density_counts_samples_in_their_cells(ax):
    x = torch.tensor([[0.5, 2.5]]).repeat(7, 1)
    plot_samples(x, kind="density", extent=(0.0, 3.0), bins=3, ax=ax)
    counts = ax.collections[0].get_array().reshape(3, 3)  # rows are y
    assert counts[2, 0] == 7
    assert counts.count() == 1


def test_a_scatter_shows_at_most_so_many_points(ax):
    plot_samples(SAMPLES, max_points=123, ax=ax)
    assert len(ax.collections[0].get_offsets()) == 123


def test_higher_dimensions_show_two_coordinates(ax):
    x = torch.arange(12.0).reshape(3, 4)
    plot_samples(x, coordinates=(3, 1), ax=ax)
    assert ax.collections[0].get_offsets().tolist() == x[:, [3, 1]].tolist()
    assert ax.get_xlabel() == "coordinate 3"


def test_samples_that_are_not_finite_are_left_out(ax):
    x = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf]])
    plot_samples(x, ax=ax)
    assert len(ax.collections[0].get_offsets()) == 1


def test_a_marginal_is_a_density_beside_the_exact_one(ax):
    plot_marginal(
        SAMPLES,
        coordinate=1,
        exact=lambda e: TARGET.marginal_cdf(e[:, None].expand(-1, 2))[:, 1],
        extent=(-9.0, 9.0),
        bins=60,
        ax=ax,
    )
    (drawn, edges), (exact, same) = stairs(ax)
    width = edges[1] - edges[0]
    assert (edges == same).all()
    assert drawn.sum() * width == pytest.approx(1.0)
    assert exact.sum() * width == pytest.approx(1.0)
    # A bin's share is off by at most 5 standard errors of a binomial with p below 0.11.
    assert abs(drawn - exact).max() * width < 5 * (0.11 * 0.89 / len(SAMPLES)) ** 0.5


def test_what_lies_outside_of_a_marginal_still_counts(ax):
    plot_marginal(torch.tensor([[0.5], [0.5], [9.0], [9.0]]), extent=(0.0, 1.0), bins=1, ax=ax)
    assert stairs(ax)[0][0].tolist() == [0.5]


def test_samples_that_are_not_finite_are_missing_in_a_marginal(ax):
    samples = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    samples[:250] = torch.nan
    plot_marginal(samples, ax=ax)
    ((density, edges),) = stairs(ax)
    assert float((density * (edges[1:] - edges[:-1])).sum()) == pytest.approx(0.75)


@pytest.mark.parametrize("least", [-50.0, -math.inf])
def test_the_smallest_weights_are_shown_at_the_left_end(ax, least):
    """However small: they are most of the draws."""
    plot_weights(torch.cat([torch.zeros(100), torch.full((900,), least)]), ax=ax)
    ((counts, _),) = stairs(ax)
    assert counts.sum() == 1000 and counts[0] == 900


def test_weights_are_relative_to_their_mean(ax):
    log_weight = torch.tensor([0.0, 0.0, 0.0, -torch.inf]) + 1234.0
    plot_weights(log_weight, ax=ax)
    counts, edges = stairs(ax)[0]
    least, place = counts.nonzero()[0]
    assert least == 0 and counts[0] == 1  # a weight of zero is shown at the left end
    assert counts[place] == 3 and edges[place] <= 4 / 3 <= edges[place + 1]
    assert ax.get_title() == "ESS 3 of 4 (75.0%)"


def test_a_training_curve_has_the_finite_records(ax):
    history = [
        {"step": 1.0, "ess": float("nan")},
        {"step": 2.0, "ess": 0.5},
        {"step": 3.0, "loss": 1.0},
        {"step": 4.0, "ess": 0.75},
    ]
    plot_training(history, ax=ax)
    assert ax.lines[0].get_xydata().tolist() == [[2.0, 0.5], [4.0, 0.75]]


def test_panels_share_their_scale_and_keep_their_order():
    axes = plot_panels({"a": SAMPLES, "b": SAMPLES[:50], "c": SAMPLES}, extent=(-7, 7), columns=2)
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    assert {ax.get_xlim() for ax in axes} == {(-7.0, 7.0)}


def test_saving_makes_the_folder(ax, tmp_path):
    path = save_figure(plot_samples(SAMPLES, ax=ax), tmp_path / "new" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_all_public_functions_are_listed():
    public = {name for name in vars(plotting) if name.startswith(("plot_", "new_", "save_"))}
    assert public == set(plotting.__all__)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: new_figure(0, 1), "rows must be at least 1, got 0"),
        (lambda: plot_energy(TARGET, (1, -1)), "extent must be .*low below high"),
        (lambda: plot_energy(TARGET, (-1, 1), resolution=1), "resolution must be at least 2"),
        (
            lambda: plot_energy(lambda x: x[:, 0] * torch.nan, (-1, 1)),
            "energy must be finite somewhere in the extent",
        ),
        (lambda: plot_samples(SAMPLES[:, :1]), "dim at least 2"),
        (lambda: plot_samples(SAMPLES, coordinates=(0, 2)), "coordinates must be from 0 to 1"),
        (lambda: plot_samples(SAMPLES[:0]), "samples must have a finite row, got none of 0"),
        (lambda: plot_samples(torch.randn(9, 3), energy=TARGET), "samples in the plane"),
        (lambda: plot_marginal(SAMPLES, coordinate=2), "coordinate must be one of"),
        (lambda: plot_training([{"step": 1.0}]), "history must have records"),
        (lambda: plot_panels({}, extent=(-1, 1)), "panels must hold at least one"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.bad_input
def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be 'scatter' or 'density', got 'hexbin'"):
        plot_samples(SAMPLES, kind="hexbin")
