r"""A nested sampler of another library as a referee.

The referee runs on the same counted energy, over a box: that of the bounds, or, where a coordinate
has none on both sides, one that reaches ten standard deviations of the witness's points beyond
the outermost of them. What lies outside that box it cannot see, and its report says which box it
was. With :math:`u(c)` the map from the unit cube to unbounded coordinates,

.. math:: Z = \int_{[0, 1]^d} e^{-E_u(u(c))} \left| \frac{\partial u}{\partial c} \right|
    \mathrm{d}c,

an evidence as nested samplers compute it, for a uniform prior on the cube.

References:
    | Nested sampling for general Bayesian computation (Skilling, 2006)
    | https://doi.org/10.1214/06-BA127

    | nautilus: boosting Bayesian importance nested sampling with deep learning (Lange, 2023)
    | https://doi.org/10.1093/mnras/stad2441

    | dynesty: a dynamic nested sampling package (Speagle, 2020)
    | https://doi.org/10.1093/mnras/staa278

    | UltraNest: a robust, general purpose Bayesian inference engine (Buchner, 2021)
    | https://doi.org/10.21105/joss.03001
"""

import importlib
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.verdict.landscape import Landscape

__all__ = ["Referee", "RefereeName", "find_referee", "library_of"]

RefereeName = Literal["nautilus", "dynesty", "ultranest"]

_BEYOND = 10.0  # standard deviations beyond the outermost point of the witness
_LEAST_LOG = -1e300  # stands for a density of zero: nested samplers take no infinity
_LEAST_ESS = 300  # effective points, as for the witness
_LOG_Z_SE = 0.15  # of log Z: what nested samplers reach with their usual settings
_PACKAGES = {"nautilus": "nautilus-sampler", "dynesty": "dynesty", "ultranest": "ultranest"}


@dataclass(frozen=True)
class Referee:
    """What a nested sampler found.

    Attributes:
        name: The library.
        region: The box it saw, in words.
        evaluations: Energy evaluations it took.
        log_z: Its estimate of log Z.
        log_z_se: The standard error that it states.
        points: Its points in unbounded coordinates, (n, dim).
        weight: Their weights, which sum to one.
    """

    name: str
    region: str
    evaluations: int
    log_z: float
    log_z_se: float
    points: Tensor
    weight: Tensor

    @property
    def ess(self) -> float:
        """Effective sample size, in points."""
        return float(1 / self.weight.square().sum())

    @property
    def conclusive(self) -> bool:
        """Whether it can confirm anything."""
        return self.ess >= _LEAST_ESS and self.log_z_se <= _LOG_Z_SE


def find_referee(
    name: RefereeName,
    landscape: Landscape,
    points: Float[Tensor, "n dim"],
    *,
    evaluations: int,
    seed: int,
) -> Referee:
    """Run a nested sampler on the energy.

    Arguments:
        name: The library.
        landscape: The energy in unbounded coordinates.
        points: Where the target was seen, which sets the box where there are no bounds.
        evaluations: Most evaluations; libraries look at it now and then, and may exceed it.
        seed: Decides its random numbers.

    Raises:
        ImportError: Without the library.
        ValueError: If the library is unknown, or the box has no point of finite energy.
    """
    runs: dict[str, Callable[..., tuple[float, float, np.ndarray, np.ndarray]]] = {
        "nautilus": _nautilus, "dynesty": _dynesty, "ultranest": _ultranest
    }  # fmt: skip
    library = library_of(name)
    cube = _Cube(landscape, points)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log_z, log_z_se, inside, log_weight = runs[name](library, cube, evaluations, seed)
    weight = torch.softmax(torch.as_tensor(log_weight, dtype=torch.float64), 0)
    u = cube.place(torch.as_tensor(inside, dtype=torch.float64).to(points.device))[0]
    return Referee(
        name,
        cube.region,
        landscape.evaluations,
        float(log_z),
        float(log_z_se),
        u,
        weight.to(points.device),
    )


def library_of(name: RefereeName) -> Any:  # noqa: ANN401
    """The library of a referee, imported.

    Arguments:
        name: The referee.

    Raises:
        ImportError: Without the library.
        ValueError: If there is no such referee.
    """
    if name not in get_args(RefereeName):
        raise ValueError(f"referee must be one of {list(get_args(RefereeName))}, got {name!r}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"referee={name!r} needs {_PACKAGES[name]}: pip install 'rsm-sampler[referee]'",
            name=name,
        ) from error


class _Cube:
    """The log-density on the unit cube."""

    def __init__(self, landscape: Landscape, points: Tensor) -> None:
        self.landscape, self.dim = landscape, landscape.dim
        self.two_sided = landscape.two_sided
        std = points.std(0, correction=0).clamp(min=1e-12)
        self.low = points.amin(0) - _BEYOND * std
        self.high = points.amax(0) + _BEYOND * std
        self.names = [f"u{i}" for i in range(self.dim)]
        if bool(self.two_sided.all()):
            self.region = "the box of the bounds"
        else:
            ends = (
                f"{low:.3g} to {high:.3g}"
                for low, high in zip(self.low.tolist()[:3], self.high.tolist()[:3], strict=True)
            )
            more = ", ..." if self.dim > 3 else ""
            self.region = "a box about what the witness found: " + ", ".join(ends) + more

    def place(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Unbounded coordinates, and the logarithm of the volume that they take."""
        c = c.clamp(1e-15, 1 - 1e-15)
        linear = self.low + (self.high - self.low) * c
        normal = torch.special.ndtri(c)
        u = torch.where(self.two_sided, normal, linear)
        volume = torch.where(
            self.two_sided,
            0.5 * (normal.square() + math.log(2 * math.pi)),
            (self.high - self.low).log().expand_as(c),
        )
        return u, volume.sum(-1)

    def __call__(self, c: np.ndarray) -> np.ndarray:
        """Log-densities of points of the cube, (n, dim)."""
        u, volume = self.place(torch.as_tensor(np.asarray(c)).double().to(self.low.device))
        value = volume - self.landscape.value(u)
        return value.clamp(min=_LEAST_LOG).nan_to_num(_LEAST_LOG).cpu().numpy()


def _nautilus(
    library: Any,  # noqa: ANN401
    cube: _Cube,
    evaluations: int,
    seed: int,
) -> tuple[float, float, np.ndarray, np.ndarray]:
    prior = library.Prior()
    for name in cube.names:
        prior.add_parameter(name, dist=(0.0, 1.0))
    sampler = library.Sampler(
        prior, cube, pass_dict=False, vectorized=True, seed=seed, n_live=1000, n_networks=1
    )
    sampler.run(n_eff=4000, n_like_max=evaluations, verbose=False)
    points, log_weight, _ = sampler.posterior()
    # Importance sampling: the error of log Z is that of the mean of independent weights.
    return sampler.log_z, 1 / math.sqrt(max(sampler.n_eff, 1.0)), points, log_weight


def _dynesty(
    library: Any,  # noqa: ANN401
    cube: _Cube,
    evaluations: int,
    seed: int,
) -> tuple[float, float, np.ndarray, np.ndarray]:
    sampler = library.NestedSampler(
        lambda c: float(cube(c[None])[0]),
        lambda c: c,
        cube.dim,
        nlive=max(500, 50 * cube.dim),
        rstate=np.random.default_rng(seed),
    )
    sampler.run_nested(maxcall=evaluations, dlogz=0.01, print_progress=False)
    result = sampler.results
    return result.logz[-1], result.logzerr[-1], result.samples, result.logwt


def _ultranest(
    library: Any,  # noqa: ANN401
    cube: _Cube,
    evaluations: int,
    seed: int,
) -> tuple[float, float, np.ndarray, np.ndarray]:
    # The library draws from NumPy's global state: it is put back afterwards.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        sampler = library.ReactiveNestedSampler(
            cube.names, cube, transform=lambda c: c, vectorized=True
        )
        sampler.logger.setLevel(logging.WARNING)
        result = sampler.run(max_ncalls=evaluations, show_status=False, viz_callback=False)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    points = result["weighted_samples"]
    with np.errstate(divide="ignore"):
        return result["logz"], result["logzerr"], points["points"], np.log(points["weights"])
