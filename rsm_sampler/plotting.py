r"""Figures of samples, weights and training.

Every function draws into an ``ax`` and returns it, so that figures are put together as with any
other Matplotlib code; without an ``ax`` a new figure is opened. Matplotlib is imported when the
first of them is called, never by ``import rsm_sampler``.

Contours are those of the energy itself. A level of :math:`E_{\min} + k^2/2` is the k-sigma
ellipse of a normal law, so the default levels read as one to four standard deviations of the
deepest mode.

>>> import torch
>>> from matplotlib.figure import Figure
>>> def energy(x):
...     return x.square().sum(-1) / 2
>>> ax = Figure().subplots()
>>> ax = plot_samples(torch.randn(100, 2), ax=ax)
>>> ax = plot_energy(energy, (-3.0, 3.0), ax=ax)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.estimators import effective_sample_size

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

__all__ = [
    "new_figure",
    "plot_energy",
    "plot_marginal",
    "plot_panels",
    "plot_samples",
    "plot_training",
    "plot_weights",
    "save_figure",
]

Extent = tuple[Any, Any]
"""Low and high end of a box: numbers, or one number for each coordinate."""

_EXACT, _MODEL, _LINE = "0.25", "tab:blue", "tab:orange"
_PAPER_WHITE = 0.15  # the palest density shown differs from the background by this much


@checked(above={"size": 0})
def new_figure(
    rows: int = 1, columns: int = 1, *, size: float = 3.0
) -> "tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]":
    """A figure that no window holds on to, and its axes row by row.

    Arguments:
        rows: Number of rows.
        columns: Number of columns.
        size: Width and height of one of them, in inches.

    Returns:
        The figure, and ``rows * columns`` axes.

    Raises:
        ValueError: If there is no row or no column.

    Example:
        >>> figure, axes = new_figure(1, 2)
        >>> len(axes)
        2
    """
    from matplotlib.figure import Figure

    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@checked(least={"dpi": 1}, most={"dpi": 10_000})
def save_figure(ax: "matplotlib.axes.Axes", path: str | Path, *, dpi: int = 150) -> Path:
    """Write the figure that an ``ax`` belongs to; folders are made where they are missing.

    Arguments:
        ax: Any axes of the figure.
        path: The file; its ending decides the format.
        dpi: Dots per inch.

    Returns:
        The path.

    Raises:
        ValueError: If the ending names no known format.
    """
    if not hasattr(ax, "get_figure"):
        raise TypeError(f"ax must be axes of matplotlib, got {ax!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=dpi)
    return path


@checked
def plot_energy(
    energy: Callable[..., Tensor],
    extent: Extent,
    *,
    ax: "matplotlib.axes.Axes | None" = None,
    resolution: int = 200,
    levels: Sequence[float] = (0.5, 2.0, 4.5, 8.0),
    color: str = _EXACT,
) -> "matplotlib.axes.Axes":
    r"""Contour lines of an energy in the plane.

    Arguments:
        energy: The energy of points with shape (n, 2).
        extent: The box to draw.
        ax: Where to draw.
        resolution: Number of grid points along each side.
        levels: Heights above the lowest energy on the grid, increasing.
        color: Colour of the lines.

    Returns:
        The axes.

    Raises:
        ValueError: If the extent is no box of the plane, the resolution is below 2, or the energy
            is finite nowhere on the grid.
    """
    low, high = _box(extent, 2)
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, got {resolution}")
    sides = [torch.linspace(a, b, resolution) for a, b in zip(low, high, strict=True)]
    with torch.no_grad():
        value = energy(torch.cartesian_prod(*sides)).double().cpu()
    value = value.reshape(resolution, resolution)
    finite = value.isfinite()
    if not bool(finite.any()):
        raise ValueError(f"energy must be finite somewhere in the extent, got none in {extent}")
    height = torch.where(finite, value - value[finite].amin(), torch.inf).clamp(max=1e6)
    ax = _axes(ax)
    inside = [level for level in levels if float(height.amin()) < level < float(height.amax())]
    if inside:
        ax.contour(
            *(side.numpy() for side in sides),
            height.T.numpy(),
            levels=inside,
            colors=color,
            linewidths=0.7,
            alpha=0.8,
        )
    return _frame(ax, low, high)


@checked
def plot_samples(
    samples: Float[Tensor, "n dim"],
    *,
    ax: "matplotlib.axes.Axes | None" = None,
    kind: Literal["scatter", "density"] = "scatter",
    coordinates: tuple[int, int] = (0, 1),
    extent: Extent | None = None,
    energy: Callable[..., Tensor] | None = None,
    max_points: int = 4000,
    bins: int = 100,
    color: str = _MODEL,
) -> "matplotlib.axes.Axes":
    """Samples in the plane of two coordinates, as points or as a histogram.

    Arguments:
        samples: The samples.
        ax: Where to draw.
        kind: ``"scatter"`` for points, ``"density"`` for a two-dimensional histogram.
        coordinates: Which two coordinates.
        extent: The box to draw, of these two coordinates; the range of the samples if None.
        energy: The energy, for contour lines of the truth on top; in two dimensions only.
        max_points: At most so many points of a scatter are drawn, the first ones.
        bins: Number of cells along each side of a histogram.
        color: Colour of the points, or the darkest one of a histogram.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no finite samples, a coordinate does not exist, the kind is
            unknown, or an energy is given for samples that are not in the plane.
    """
    if kind not in {"scatter", "density"}:
        raise ValueError(f"kind must be 'scatter' or 'density', got {kind!r}")
    if samples.dim() != 2 or samples.shape[-1] < 2:
        raise ValueError(
            f"samples must have shape (n, dim) with dim at least 2, got {tuple(samples.shape)}"
        )
    for coordinate in coordinates:
        if not 0 <= coordinate < samples.shape[-1]:
            raise ValueError(
                f"coordinates must be from 0 to {samples.shape[-1] - 1}, got {coordinates}"
            )
    if energy is not None and (samples.shape[-1] != 2 or tuple(coordinates) != (0, 1)):
        raise ValueError(
            f"energy can only be drawn for samples in the plane, got {tuple(samples.shape)} and "
            f"coordinates {coordinates}"
        )
    pair = _finite(samples.detach())[:, list(coordinates)]
    low, high = _range(pair) if extent is None else _box(extent, 2)
    ax = _axes(ax)
    if kind == "scatter":
        shown = pair[:max_points].numpy()
        size, alpha = (2.0, 0.35) if len(shown) > 500 else (8.0, 0.6)
        ax.scatter(
            shown[:, 0],
            shown[:, 1],
            s=size,
            alpha=alpha,
            color=color,
            linewidths=0,
            rasterized=len(shown) > 500,
        )
    else:
        ax.hist2d(
            pair[:, 0].numpy(),
            pair[:, 1].numpy(),
            bins=bins,
            range=list(zip(low, high, strict=True)),
            cmap=_fade(color),
            cmin=1,
            rasterized=True,
        )
    if energy is not None:
        plot_energy(energy, (low, high), ax=ax)
    if samples.shape[-1] > 2:
        ax.set_xlabel(f"coordinate {coordinates[0]}")
        ax.set_ylabel(f"coordinate {coordinates[1]}")
    return _frame(ax, low, high)


@checked
def plot_marginal(
    samples: Float[Tensor, "n dim"],
    *,
    coordinate: int = 0,
    exact: Tensor | Callable[[Tensor], Tensor] | None = None,
    ax: "matplotlib.axes.Axes | None" = None,
    extent: tuple[float, float] | None = None,
    bins: int = 80,
    label: str = "samples",
) -> "matplotlib.axes.Axes":
    r"""Histogram of one coordinate against the exact law.

    Samples with NaN or infinity in them count in the total, and are missing in the figure.

    Arguments:
        samples: The samples.
        coordinate: Which coordinate.
        exact: The truth: exact samples with shape (m, dim), or the distribution function of that
            coordinate, from (k) to (k). Its masses of the *same bins* are drawn as a line, so that
            the two differ by nothing but sampling if the samples are right.
        ax: Where to draw.
        extent: The interval to draw; the range of the samples if None.
        bins: Number of bins.
        label: Name of the samples in the legend.

    Returns:
        The axes.

    Raises:
        ValueError: If the coordinate does not exist or there are no finite samples.
    """
    if isinstance(exact, Tensor) and exact.dim() < 1:
        raise ValueError(f"exact must be draws or a function, got {exact}")
    if samples.dim() != 2 or not 0 <= coordinate < samples.shape[-1]:
        raise ValueError(
            f"coordinate must be one of samples of shape (n, dim), got {coordinate} for "
            f"{tuple(samples.shape)}"
        )
    column = _finite(samples.detach())[:, coordinate]
    whole = len(column) / len(samples)  # less than one where rows are not finite
    low, high = _range(column[:, None]) if extent is None else _box(extent, 1)
    edges = torch.linspace(low[0], high[0], bins + 1, dtype=torch.float64)
    width = float(edges[1] - edges[0])
    ax = _axes(ax)
    ax.stairs(
        (whole * _shares(column, edges) / width).numpy(),
        edges.numpy(),
        fill=True,
        color=_MODEL,
        alpha=0.45,
        label=label,
    )
    if exact is not None:
        if isinstance(exact, Tensor):
            mass = _shares(_finite(exact)[:, coordinate], edges)
        else:
            mass = torch.as_tensor(exact(edges)).double().diff()
        ax.stairs((mass / width).numpy(), edges.numpy(), color=_EXACT, lw=1.2, label="exact")
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"coordinate {coordinate}")
    ax.set_ylabel("density")
    if exact is not None:
        ax.legend(frameon=False)
    return ax


@checked
def plot_weights(
    log_weight: Float[Tensor, " n"],
    *,
    ax: "matplotlib.axes.Axes | None" = None,
    bins: int = 80,
) -> "matplotlib.axes.Axes":
    r"""Histogram of importance weights, relative to their mean.

    Perfect samples have all their weight at 1. A tail to the right is what the sampler draws too
    rarely; weights that are all alike say nothing about modes it never visits. Weights below
    :math:`10^{-4}` are shown there.

    Arguments:
        log_weight: Log-weights up to a constant; :math:`-\infty` is a weight of zero.
        ax: Where to draw.
        bins: Number of bins.

    Returns:
        The axes, titled with the effective sample size.

    Raises:
        ValueError: If there are no weights, one is NaN or :math:`+\infty`, or all are zero.
    """
    log_weight = log_weight.detach().double().cpu()
    ess = float(effective_sample_size(log_weight))
    relative = (torch.log_softmax(log_weight, 0) + math.log(len(log_weight))) / math.log(10)
    finite = relative[relative.isfinite()]
    low = max(-4.0, min(-0.5, float(finite.amin())))
    high = max(0.5, float(finite.amax()))
    ax = _axes(ax)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = torch.histc(relative.clamp(low, high), bins, low, high)
    ax.stairs(counts.numpy(), (10**edges).numpy(), fill=True, color=_MODEL, alpha=0.6)
    ax.axvline(1.0, color=_EXACT, lw=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    # Powers of ten alone leave a narrow range without labels, Matplotlib's own choice crowds it.
    steps, every = ((1, 2, 5) if high - low < 2 else (1,)), (1 if high - low < 6 else 2)
    ticks = [step * 10.0**power for power in range(-8, 9, every) for step in steps]
    shown = [tick for tick in ticks if 10**low <= tick <= 10**high]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.set_xticks([], minor=True)
    ax.set_ylim(bottom=0.5)
    ax.set_xlabel("importance weight / mean")
    ax.set_ylabel("draws")
    ax.set_title(f"ESS {ess:.0f} of {len(log_weight)} ({ess / len(log_weight):.1%})")
    return ax


@checked(skip=("history",))
def plot_training(
    history: Sequence[Mapping[str, float]],
    *,
    key: str = "ess",
    against: Literal["step", "evaluations", "seconds"] = "step",
    target: float | None = None,
    ax: "matplotlib.axes.Axes | None" = None,
) -> "matplotlib.axes.Axes":
    """Records of a training over its course.

    Arguments:
        history: Records, as in ``sampler.history``, one for each check; or those of a
            :class:`~rsm_sampler.loggers.MemoryLogger`. Records without the key are left out.
        key: What to draw: ``"ess"`` (a share of the draws), ``"log_z"``, ``"loss"``.
        against: What to draw it against.
        target: A value to mark by a line: the wanted one, or the exact one.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: If no record has both values.
    """
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a sequence of records, got {history!r}")
    pairs = [
        (record[against], record[key])
        for record in history
        if against in record and math.isfinite(record.get(key, math.nan))
    ]
    if not pairs:
        raise ValueError(
            f"history must have records with {against!r} and a finite {key!r}, got "
            f"{len(history)} without"
        )
    ax = _axes(ax)
    ax.plot(*zip(*pairs, strict=True), marker="o" if len(pairs) < 30 else None, color=_MODEL)
    if target is not None:
        ax.axhline(target, color=_EXACT, lw=1, ls="--", label=f"{target:g}")
        ax.legend(frameon=False)
    ax.set_xlabel({"step": "steps", "evaluations": "energy evaluations"}.get(against, against))
    ax.set_ylabel({"ess": "ESS / draws", "log_z": "log Z"}.get(key, key))
    if key == "ess":
        ax.set_ylim(0, 1.03)
    ax.grid(alpha=0.25)
    return ax


@checked(above={"size": 0})
def plot_panels(
    panels: Mapping[str, Float[Tensor, "_ 2"]],
    *,
    extent: Extent,
    energy: Callable[..., Tensor] | None = None,
    kind: Literal["scatter", "density"] = "density",
    columns: int | None = None,
    size: float = 2.7,
    max_points: int = 4000,
) -> "list[matplotlib.axes.Axes]":
    """Sets of samples in the plane side by side, on one scale.

    Arguments:
        panels: The samples, by title.
        extent: The box that all panels show.
        energy: The energy, for contour lines of the truth in each panel.
        kind: As in :func:`plot_samples`.
        columns: Number of columns; all in one row if None.
        size: Width and height of a panel, in inches.
        max_points: As in :func:`plot_samples`.

    Returns:
        The axes of the panels, in their order, in a figure of their own.

    Raises:
        ValueError: If there are no panels.

    Example:
        >>> axes = plot_panels({"first": torch.randn(9, 2)}, extent=(-3, 3))
        >>> axes[0].get_title()
        'first'
    """
    if not panels:
        raise ValueError("panels must hold at least one set of samples, got none")
    columns = len(panels) if columns is None else columns
    rows = -(-len(panels) // columns)
    _, axes = new_figure(rows, columns, size=size)
    for i, (ax, (title, samples)) in enumerate(zip(axes, panels.items(), strict=False)):
        plot_samples(
            samples, ax=ax, kind=kind, extent=extent, energy=energy, max_points=max_points
        )
        ax.set_title(title, fontsize=10)
        if i % columns:
            ax.tick_params(labelleft=False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return axes[: len(panels)]


def _axes(ax: Any) -> "matplotlib.axes.Axes":  # noqa: ANN401
    if ax is not None:
        if not hasattr(ax, "get_figure"):
            raise TypeError(f"ax must be axes of matplotlib, got {ax!r}")
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _frame(
    ax: "matplotlib.axes.Axes", low: list[float], high: list[float]
) -> "matplotlib.axes.Axes":
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    spans = [b - a for a, b in zip(low, high, strict=True)]
    if max(spans) < 3 * min(spans):
        ax.set_aspect("equal")
    return ax


def _box(extent: Extent, dim: int) -> tuple[list[float], list[float]]:
    ends = [torch.as_tensor(end, dtype=torch.float64).detach().cpu() for end in extent]
    fits = len(ends) == 2 and all(end.shape in {(), (dim,)} for end in ends)
    if not fits or not bool((ends[0] < ends[1]).all() and (ends[1] - ends[0]).isfinite().all()):
        raise ValueError(
            f"extent must be (low, high) with low below high, numbers or {dim} each, got {extent}"
        )
    return ends[0].expand(dim).tolist(), ends[1].expand(dim).tolist()


def _range(points: Tensor) -> tuple[list[float], list[float]]:
    """The range of points with a margin; never empty."""
    low, high = points.amin(0), points.amax(0)
    margin = 0.05 * (high - low) + 1e-6 * (1 + high.abs())
    return (low - margin).tolist(), (high + margin).tolist()


def _finite(samples: Tensor) -> Tensor:
    samples = samples.detach().double().cpu()
    kept = samples[samples.isfinite().all(-1)]
    if len(kept) == 0:
        raise ValueError(f"samples must have a finite row, got none of {len(samples)}")
    return kept


def _shares(column: Tensor, edges: Tensor) -> Tensor:
    """Share of *all* values in each bin; those outside of the bins count in the total."""
    counts = torch.histogram(column.double().contiguous(), edges).hist
    return counts / len(column)


def _fade(color: str) -> Any:  # noqa: ANN401
    """A colour map from nearly white to the colour and on to a dark shade of it."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    full = to_rgb(color)
    pale = tuple(1 - _PAPER_WHITE * (1 - c) for c in full)
    dark = tuple(0.35 * c for c in full)
    return LinearSegmentedColormap.from_list("fade", [pale, full, dark])
