r"""Targets on which a confident wrong answer is tempting, with their right values.

``get(name)`` makes one; ``SETS`` names groups of them:

* ``findable``: every mode has a basin that descents from a broad start can enter;
* ``hidden``: one mode is so narrow that no method can see it. :class:`Hidden` says from which ball
  around it a descent would reach it, and so what share of any law of starts catches it;
* ``heavy``: tails of Student's laws;
* ``classic``: what nested samplers show, and ``hard``: Rosenbrock's function in 8 dimensions and
  the funnel;
* ``posteriors``: models of three fields with one mode each;
* ``kinds``: more of all these kinds, with other positions, widths, weights and dimensions;
* ``kinds_hidden``, ``kinds_heavy``: likewise.

Every mixture is written as components with normalised densities :math:`p_k`, so that with a shift
:math:`c` the energy is :math:`E = c - \log \sum_k w_k p_k`, :math:`\log Z = -c`, the share of a
point that belongs to mode k is :math:`w_k p_k / \sum_j w_j p_j`, and exact draws take a component
first. Everything is in double precision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import exploration_posteriors
import numpy as np
import torch
from scipy import stats
from torch import Generator, Tensor

import energies

LOG_2PI = math.log(2 * math.pi)
SHIFT = 7.3  # no log Z is 0 by accident
INF = math.inf


# ------------------------------------------------------------------ a target and its right values


@dataclass(frozen=True)
class Limits:
    """How far an answer may be off.

    Attributes:
        log_z: Error of log Z.
        tv: Total variation of the modes' masses.
        mean: Largest error of a coordinate's mean, in standard deviations.
        ks: Largest Kolmogorov-Smirnov distance of a marginal.
    """

    log_z: float | None = None
    tv: float | None = None
    mean: float | None = None
    ks: float | None = None


@dataclass(frozen=True)
class Hidden:
    """A mode without a basin to speak of.

    Attributes:
        centre: Where it is, with shape (dim).
        width: Its standard deviation.
        mass: Its share of the whole.
        radius: Descents from within this distance of the centre end in it.
    """

    centre: Tensor
    width: float
    mass: float
    radius: float

    def share_of_normal(self, loc: Tensor, scale: float) -> float:
        """Share of starts, drawn from a round normal law, that lie within the radius."""
        distance = float((self.centre - loc).square().sum()) / scale**2
        return float(stats.ncx2.cdf((self.radius / scale) ** 2, len(self.centre), distance))

    def share_of_box(self, low: Tensor, high: Tensor) -> float:
        """Largest share of starts, uniform on a box, that lie within the radius."""
        dim = len(self.centre)
        log_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
        log_box = float((high - low).log().sum())
        inside = bool(((self.centre > low) & (self.centre < high)).all())
        return min(1.0, inside * math.exp(log_ball + dim * math.log(self.radius) - log_box))


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A target with its right values.

    Attributes:
        name: Its name.
        energy: Energies of points, (n, dim) to (n), in the precision of the points.
        dim: Number of coordinates.
        log_z: Log of the integral of exp(-energy).
        log_z_se: Standard error of that, 0 where it is exact.
        limits: How far an answer may be off.
        bounds: What a user would give as bounds.
        shares: Share of each point that belongs to every mode or region, (n, dim) to (n, k).
        masses: Right masses of these, with shape (k).
        draw: Exact draws, or None.
        quantiles: Quantiles of the marginals at LEVELS, with shape (dim, levels), where there are
            no exact draws.
        hidden: The mode that cannot be seen, if there is one.
        heavy: Whether an honest refusal is right, too.
        box: Lower and upper corner of a box for peers that need one.
        transform: A prior for peers, from the unit cube, where there is no box.
        misfit: Minus log-likelihood that goes with it.
        scored: Coordinates whose marginals are compared; all if None.
    """

    name: str
    energy: Callable[[Tensor], Tensor]
    dim: int
    log_z: float
    limits: Limits
    log_z_se: float = 0.0
    bounds: tuple[Any, Any] | None = None
    shares: Callable[[Tensor], Tensor] | None = None
    masses: Tensor | None = None
    draw: Callable[[int, Generator], Tensor] | None = None
    quantiles: Tensor | None = None
    hidden: Hidden | None = None
    heavy: bool = False
    box: tuple[Tensor, Tensor] | None = None
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    misfit: Callable[[Tensor], Tensor] | None = None
    scored: list[int] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What a user tells beside energy and dimension."""
        return {} if self.bounds is None else {"bounds": self.bounds}

    @lru_cache(maxsize=1)  # noqa: B019
    def exact(self, n: int = 100_000) -> Tensor | None:
        """The same exact draws at every call, with shape (n, dim)."""
        return None if self.draw is None else self.draw(n, torch.Generator().manual_seed(12345))

    def score(self, x: Tensor, log_weight: Tensor | None = None) -> dict[str, float]:
        """Errors of draws (n, dim), weighted or not."""
        x = x.double()
        if log_weight is None:
            log_weight = torch.zeros(len(x), dtype=torch.float64)
        keep = x.isfinite().all(-1) & (log_weight > -INF)
        x, weight = x[keep], log_weight[keep].double().softmax(0)
        out = {"lost": float(len(keep) - int(keep.sum())), "ess": float(1 / weight.square().sum())}
        if self.shares is not None and self.masses is not None:
            got = weight @ self.shares(x)
            out["tv"] = float(0.5 * (got - self.masses).abs().sum())
            out["missed"] = float((got < 0.05 * self.masses).sum())
        columns = self.scored if self.scored is not None else list(range(self.dim))
        exact = self.exact()
        if exact is not None:
            if not self.heavy:
                mean, std = exact[:, columns].mean(0), exact[:, columns].std(0)
                got_mean = weight @ x[:, columns]
                got_std = (weight @ (x[:, columns] - got_mean).square()).sqrt()
                out["mean"] = float(((got_mean - mean) / std).abs().max())
                out["std"] = float((got_std / std - 1).abs().max())
            out["ks"] = max(_distance(x[:, i], weight, exact[:, i]) for i in columns)
            out["ks_energy"] = _distance(self.energy(x), weight, self.energy(exact))
        elif self.quantiles is not None:
            levels = torch.as_tensor(exploration_posteriors.LEVELS)
            out["ks"] = max(
                float((_cdf(x[:, i], weight, q.contiguous()) - levels).abs().max())
                for i, q in enumerate(self.quantiles)
            )
        return out


def _cdf(x: Tensor, weight: Tensor, at: Tensor) -> Tensor:
    """Weighted share of values up to each of some points."""
    order = x.argsort()
    total = torch.cat([weight.new_zeros(1), weight[order].cumsum(0)])
    return total[torch.searchsorted(x[order].contiguous(), at.contiguous(), right=True)]


def _distance(x: Tensor, weight: Tensor, exact: Tensor) -> float:
    """Kolmogorov-Smirnov distance of weighted values to equally weighted ones."""
    signed = torch.cat([weight, torch.full_like(exact, -1 / len(exact))])
    value, order = torch.cat([x, exact]).sort()
    last = torch.cat([value.diff() > 1e-9, value.new_ones(1, dtype=torch.bool)])  # of equal ones
    return float(signed[order].cumsum(0)[last].abs().max())


# ------------------------------------------------------------------ components


class Normal:
    """Normal law, round with one standard deviation or with a Cholesky factor."""

    def __init__(self, loc: Tensor, scale: float | Tensor) -> None:
        self.loc, self.dim = loc, len(loc)
        self.scale = None if isinstance(scale, Tensor) else float(scale)
        if self.scale is None:
            assert isinstance(scale, Tensor)
            self.tril = scale
            self.inverse = torch.linalg.inv(scale).T.contiguous()
            log_volume = float(scale.diagonal().log().sum())
        else:
            log_volume = self.dim * math.log(self.scale)
        self.constant = -log_volume - self.dim / 2 * LOG_2PI

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim)."""
        z = x - self.loc
        z = z @ self.inverse if self.scale is None else z / self.scale
        return self.constant - 0.5 * z.square().sum(-1)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.loc + (z @ self.tril.T if self.scale is None else self.scale * z)


class Student:
    """Round Student law."""

    def __init__(self, loc: Tensor, scale: float, freedom: float) -> None:
        self.loc, self.scale, self.freedom, self.dim = loc, scale, freedom, len(loc)
        self.constant = (
            math.lgamma((freedom + self.dim) / 2)
            - math.lgamma(freedom / 2)
            - self.dim / 2 * math.log(freedom * math.pi)
            - self.dim * math.log(scale)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim)."""
        q = ((x - self.loc) / self.scale).square().sum(-1)
        return self.constant - (self.freedom + self.dim) / 2 * torch.log1p(q / self.freedom)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        half = torch.full((n, 1), self.freedom / 2, dtype=torch.float64)
        gamma = torch._standard_gamma(half, generator=generator)
        return self.loc + self.scale * z / (2 * gamma / self.freedom).sqrt()


class Box:
    """Uniform law on a cube."""

    def __init__(self, low: float, high: float, dim: int) -> None:
        self.low, self.high, self.dim = low, high, dim

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim)."""
        inside = ((x >= self.low) & (x <= self.high)).all(-1)
        return torch.where(inside, -self.dim * math.log(self.high - self.low), -INF)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        u = torch.rand(n, self.dim, generator=generator, dtype=torch.float64)
        return self.low + (self.high - self.low) * u


class Corner:
    """Exponential decay of every coordinate away from the upper corner of a cube."""

    def __init__(self, low: float, high: float, dim: int, rate: float) -> None:
        self.low, self.high, self.dim, self.rate = low, high, dim, rate
        self.gone = -math.expm1(-rate * (high - low))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim) within the cube."""
        return self.dim * math.log(self.rate / self.gone) - self.rate * (self.high - x).sum(-1)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        u = torch.rand(n, self.dim, generator=generator, dtype=torch.float64)
        return self.high + torch.log1p(-self.gone * u) / self.rate


class Radial:
    """A centred round normal law kept to radii in an interval."""

    def __init__(self, dim: int, scale: float, low: float, high: float) -> None:
        self.dim, self.scale, self.low, self.high = dim, scale, low, high
        self.ends = [float(stats.chi2.cdf((r / scale) ** 2, dim)) for r in (low, high)]
        self.normal = Normal(torch.zeros(dim, dtype=torch.float64), scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim)."""
        square = x.square().sum(-1)
        inside = (square >= self.low**2) & (square <= self.high**2)
        value = self.normal.log_prob(x) - math.log(self.ends[1] - self.ends[0])
        return torch.where(inside, value, -INF)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        level = self.ends[0] + (self.ends[1] - self.ends[0]) * u
        radius = self.scale * torch.as_tensor(stats.chi2.ppf(level.numpy(), self.dim)).sqrt()
        return radius[:, None] * _directions(n, self.dim, generator)


class Shell:
    r"""Normalised :math:`\exp(-(\|x - c\| - r)^2 / 2 w^2)`."""

    def __init__(self, centre: Tensor, radius: float, width: float) -> None:
        self.centre, self.radius, self.width, self.dim = centre, radius, width, len(centre)
        low, high = max(0.0, radius - 10 * width), radius + 10 * width
        self.grid = torch.linspace(low, high, 200_001, dtype=torch.float64)
        sphere = math.log(2) + self.dim / 2 * math.log(math.pi) - math.lgamma(self.dim / 2)
        log_density = sphere + (self.dim - 1) * self.grid.log() - self._drop(self.grid)
        density = log_density.exp()
        self.cdf = torch.cumulative_trapezoid(density, self.grid)
        self.log_mass = float(self.cdf[-1].log())
        self.cdf = torch.cat([self.cdf.new_zeros(1), self.cdf / self.cdf[-1]])

    def _drop(self, r: Tensor) -> Tensor:
        return 0.5 * ((r - self.radius) / self.width).square()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim)."""
        r = ((x - self.centre).square().sum(-1) + 1e-300).sqrt()
        return -self._drop(r) - self.log_mass

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        radius = torch.as_tensor(np.interp(u.numpy(), self.cdf.numpy(), self.grid.numpy()))
        return self.centre + radius[:, None] * _directions(n, self.dim, generator)


class Banana:
    r"""Normal :math:`x_1` of scale s, :math:`x_2 \sim N(b (x_1^2 - s^2), w^2)`, rest standard."""

    def __init__(self, centre: Tensor, scale: float, bend: float, width: float) -> None:
        self.centre, self.scale, self.bend, self.width = centre, scale, bend, width
        self.dim = len(centre)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points (n, dim)."""
        y = x - self.centre
        first = y[:, 0] / self.scale
        second = (y[:, 1] - self.bend * (y[:, 0].square() - self.scale**2)) / self.width
        square = first.square() + second.square() + y[:, 2:].square().sum(-1)
        return -0.5 * (square + self.dim * LOG_2PI) - math.log(self.scale * self.width)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        first = self.scale * z[:, 0]
        second = self.bend * (first.square() - self.scale**2) + self.width * z[:, 1]
        return self.centre + torch.cat([first[:, None], second[:, None], z[:, 2:]], -1)


def _directions(n: int, dim: int, generator: Generator) -> Tensor:
    z = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return z / z.norm(dim=-1, keepdim=True)


class Mixture:
    """Components with weights: energy, shares and draws."""

    def __init__(self, weights: Sequence[float], parts: Sequence[Any], shift: float) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.parts, self.shift = list(parts), shift

    def joint(self, x: Tensor) -> Tensor:
        """Log of weight times density, with shape (n, k)."""
        x = x.double()
        parts = [part.log_prob(x) for part in self.parts]
        return torch.stack(parts, -1) + self.weights.log()

    def energy(self, x: Tensor) -> Tensor:
        """Shift less the log-density."""
        return (self.shift - self.joint(x).logsumexp(-1)).to(x.dtype)

    def shares(self, x: Tensor) -> Tensor:
        """Posterior probabilities of the components, with shape (n, k)."""
        return self.joint(x).softmax(-1).nan_to_num(0.0)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws with shape (n, dim)."""
        label = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x = self.parts[0].draw(n, generator)
        for k, part in enumerate(self.parts[1:], 1):
            x = torch.where((label == k)[:, None], part.draw(n, generator), x)
        return x


# ------------------------------------------------------------------ making cases

FINDABLE = Limits(log_z=0.05, tv=0.03)
HIDDEN = Limits()
HEAVY = Limits(tv=0.05)
CLASSIC = Limits(log_z=0.02, tv=0.03, mean=0.05)
WIDE = Limits(log_z=0.05, tv=0.03, mean=0.05)
HARD = Limits(log_z=0.1)
POSTERIOR = Limits(log_z=0.05, ks=0.05)
Maker = Callable[[], Case]
MAKERS: dict[str, Maker] = {}
SETS: dict[str, list[str]] = {}


def ones(dim: int, a: float = 1.0) -> Tensor:
    """A point on the diagonal."""
    return torch.full((dim,), float(a), dtype=torch.float64)


def axis(i: int, dim: int, a: float) -> Tensor:
    """A point on an axis."""
    point = ones(dim, 0)
    point[i] = a
    return point


def point(*numbers: float) -> Tensor:
    """A point."""
    return torch.tensor(numbers, dtype=torch.float64)


def add(group: str, name: str, make: Callable[[str], Case]) -> None:
    """Register a target."""
    assert name not in MAKERS, name
    MAKERS[name] = lambda: make(name)
    SETS.setdefault(group, []).append(name)


def of_mixture(
    weights: Sequence[float],
    parts: Callable[[], Sequence[Any]],
    limits: Limits = FINDABLE,
    *,
    shift: float = SHIFT,
    **options: Any,
) -> Callable[[str], Case]:
    """A case made of normalised components."""

    def make(name: str) -> Case:
        law = Mixture(weights, parts(), shift)
        return Case(
            name=name,
            energy=law.energy,
            dim=law.parts[0].dim,
            log_z=-shift,
            limits=limits,
            shares=law.shares,
            masses=law.weights,
            draw=law.draw,
            **options,
        )

    return make


def normals(
    *parts: tuple[float, Tensor, float | Tensor], limits: Limits = FINDABLE, **options: Any
) -> Callable[[str], Case]:
    """A case made of normal laws: weight, mean, standard deviation or Cholesky factor."""
    return of_mixture(
        [part[0] for part in parts],
        lambda: [Normal(loc, scale) for _, loc, scale in parts],
        limits,
        **options,
    )


def hidden(make: Callable[[str], Case], centre: Tensor, width: float) -> Callable[[str], Case]:
    """The same with what there is to say about its last component, which nobody can see.

    The radius of its basin is where the energy, followed from its centre towards the origin, stops
    rising by more than 1e-6 a width.
    """

    def marked(name: str) -> Case:
        case = make(name)
        assert case.masses is not None
        steps = torch.linspace(0, 100 * width, 20_001, dtype=torch.float64)
        inwards = -centre / centre.norm()
        energy = case.energy(centre + steps[:, None] * inwards)
        slope = energy.diff() / steps.diff() * width
        flat = (slope < 1e-6)[1:].nonzero()
        radius = float(steps[int(flat[0]) + 1]) if len(flat) else float(steps[-1])
        mode = Hidden(centre, width, float(case.masses[-1]), radius)
        return Case(**{**case.__dict__, "hidden": mode, "limits": HIDDEN})

    return marked


def walled(make: Callable[[str], Case], half: float, value: float) -> Callable[[str], Case]:
    """The same where a slab across the first coordinate has no finite energy."""

    def cut(name: str) -> Case:
        case = make(name)
        inner, draw = case.energy, case.draw
        assert draw is not None and case.masses is not None

        def energy(x: Tensor) -> Tensor:
            return torch.where(x[:, 0].abs() < half, value, inner(x))

        def outside(n: int, generator: Generator) -> Tensor:
            x = draw(n + 1000, generator)
            return x[x[:, 0].abs() >= half][:n]

        law = inner.__self__  # type: ignore[attr-defined]
        kept = torch.tensor(
            [
                1
                - stats.norm.cdf(half, float(part.loc[0]), part.scale)
                + stats.norm.cdf(-half, float(part.loc[0]), part.scale)
                for part in law.parts
            ],
            dtype=torch.float64,
        )
        mass = law.weights * kept
        changes = {
            "energy": energy,
            "draw": outside,
            "masses": mass / mass.sum(),
            "log_z": case.log_z + float(mass.sum().log()),
        }
        return Case(**{**case.__dict__, **changes})

    return cut


def island(
    dim: int,
    value: float,
    *,
    weights: tuple[float, float] = (0.35, 0.65),
    scales: tuple[float, float] = (0.2, 4.0),
    radii: tuple[float, float] = (1.0, 4.0),
) -> Callable[[str], Case]:
    """A mode in a ball, within a ring without finite energy, within a wide law."""

    def make(name: str) -> Case:
        inside, outside = (
            Radial(dim, scales[0], 0.0, radii[0]), Radial(dim, scales[1], radii[1], INF)
        )  # fmt: skip
        case = of_mixture(weights, lambda: [inside, outside])(name)
        inner = case.energy

        def energy(x: Tensor) -> Tensor:
            result = inner(x)
            return torch.where(result.isinf(), value, result)

        return Case(**{**case.__dict__, "energy": energy})

    return make


def students(
    dim: int, centres: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float],
    freedom: float, shift: float = SHIFT,
) -> Callable[[str], Case]:  # fmt: skip
    """Student laws; regions are the modes within, and all that lies beyond, the nine tenths."""

    def make(name: str) -> Case:
        law = Mixture(
            weights, [Student(c, s, freedom) for c, s in zip(centres, scales, strict=True)], shift
        )
        reference = law.draw(1_000_000, torch.Generator().manual_seed(1))
        cut = float(np.quantile(reference.norm(dim=-1).numpy(), 0.9))

        def shares(x: Tensor) -> Tensor:
            far = (x.double().norm(dim=-1, keepdim=True) > cut).double()
            return torch.cat([law.shares(x) * (1 - far), far], -1)

        masses = shares(law.draw(1_000_000, torch.Generator().manual_seed(2))).mean(0)
        return Case(
            name=name,
            energy=law.energy,
            dim=dim,
            log_z=-shift,
            limits=HEAVY,
            shares=shares,
            masses=masses,
            draw=law.draw,
            heavy=True,
        )

    return make


def corner(
    dim: int, rate: float, low: float = 0.0, high: float = 1.0, weight: float = 0.5
) -> Callable[[str], Case]:
    """A box with a share of its mass in one corner."""
    return of_mixture(
        [1 - weight, weight],
        lambda: [Box(low, high, dim), Corner(low, high, dim, rate)],
        bounds=(low, high),
    )


def funnel(dim: int, limits: Limits, shift: float) -> Callable[[str], Case]:
    """Neal's funnel, width e^{v/2} with v of standard deviation 3; masses are deciles of v."""

    def make(name: str) -> Case:
        edges = 3 * torch.special.ndtri(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))

        def energy(x: Tensor) -> Tensor:
            y = x.double()
            v = y[:, 0]
            narrow = 0.5 * y[:, 1:].square().sum(-1) * (-v).exp() + (dim - 1) * v / 2
            return (shift + v * v / 18 + math.log(3) + dim / 2 * LOG_2PI + narrow).to(x.dtype)

        def draw(n: int, generator: Generator) -> Tensor:
            z = torch.randn(n, dim, generator=generator, dtype=torch.float64)
            v = 3 * z[:, :1]
            return torch.cat([v, (v / 2).exp() * z[:, 1:]], -1)

        def shares(x: Tensor) -> Tensor:
            decile = torch.bucketize(x[:, 0].double().contiguous(), edges)
            return torch.nn.functional.one_hot(decile, 10).double()

        return Case(
            name=name, energy=energy, dim=dim, log_z=-shift, limits=limits, shares=shares,
            masses=ones(10, 0.1), draw=draw, scored=[0],
            box=(
                torch.cat([point(-15.0), ones(dim - 1, -1000.0)]),
                torch.cat([point(15.0), ones(dim - 1, 1000.0)]),
            ),
        )  # fmt: skip

    return make


# ------------------------------------------------------------------ honesty

add("findable", "iso_20d", normals(
    (0.5, ones(20, 0), 1.0), (0.25, ones(20, 8), 0.5), (0.25, ones(20, -15), 1.5)
))  # fmt: skip
add("findable", "dup2_30d", normals((0.8, ones(30, 0), 1.0), (0.2, axis(0, 30, 7), 0.7)))
add("findable", "slab_13d", normals((0.5, ones(13, 0), 1.0), (0.5, axis(0, 13, 0.2), 0.1)))
add("findable", "slab_8d", normals((0.5, ones(8, 0), 1.0), (0.5, axis(0, 8, 0.2), 0.02)))
add("findable", "five_one_4d", normals(
    (0.17, axis(0, 4, 3), 0.5), (0.17, axis(0, 4, -3), 0.5), (0.17, axis(1, 4, 3), 0.5),
    (0.17, axis(1, 4, -3), 0.5), (0.17, axis(2, 4, 3), 0.5), (0.15, ones(4, 40), 0.1),
))  # fmt: skip
add("findable", "wide_low_12d", normals((0.4, ones(12, 0), 1.0), (0.6, ones(12, 6), 4.0)))
add("findable", "two_8d", normals((0.75, axis(0, 8, -8), 1.0), (0.25, axis(0, 8, 8), 0.3)))
add("findable", "two_5d_half", normals((0.75, axis(0, 5, -8), 1.0), (0.25, axis(0, 5, 8), 0.5)))
add("findable", "two_2d_same_far", normals((0.6, ones(2, 0), 1.0), (0.4, point(60, 80), 1.0)))
add("findable", "tri_12d", normals(
    (0.5, ones(12, 0), 1.0), (0.3, ones(12, 5), 0.5), (0.2, ones(12, -6), 0.4)
))  # fmt: skip
add("findable", "nan_wall_2d", walled(
    normals((0.5, axis(0, 2, -6), 1.0), (0.5, axis(0, 2, 6), 1.0)), 2.5, math.nan
))  # fmt: skip
add("findable", "nan_wall_uneven_5d", walled(
    normals((0.75, axis(0, 5, -8), 1.0), (0.25, axis(0, 5, 8), 0.3)), 4.0, math.nan
))  # fmt: skip
add("findable", "island_nan_2d", island(2, math.nan))
add("findable", "hole_inf_3d", island(3, INF))
add("findable", "hole_inf_14d", island(14, INF))
add("findable", "corner_2d", corner(2, 1000.0))
add("findable", "corner_14d", corner(14, 30.0))
add("hidden", "golf_3d", hidden(
    normals((0.6, ones(3, 0), 1.0), (0.4, ones(3, 1.7), 0.001)), ones(3, 1.7), 0.001
))  # fmt: skip
add("hidden", "far_tiny_2d", hidden(
    normals((0.7, ones(2, 0), 1.0), (0.3, point(8, 7), 0.02)), point(8, 7), 0.02
))  # fmt: skip
add("hidden", "broad60_6d", hidden(
    normals((0.6, ones(6, 0), 20.0), (0.4, ones(6, 15), 0.2)), ones(6, 15), 0.2
))  # fmt: skip
add("hidden", "plateau_4d", hidden(
    of_mixture([0.6, 0.4], lambda: [Box(-10, 10, 4), Normal(ones(4, 6), 0.05)]), ones(4, 6), 0.05
))  # fmt: skip
add("heavy", "cauchy_1d", students(1, [ones(1, -50), ones(1, 50)], [1, 10], [0.5, 0.5], 1))
add("heavy", "cauchy_5d", students(5, [ones(5, -20), ones(5, 20)], [1, 3], [0.5, 0.5], 1))
add("findable", "funnel_shifted_10d", funnel(10, HARD, SHIFT))


# ------------------------------------------------------------------ what nested samplers show


def of_library(
    key: str, low: float, high: float, limits: Limits = CLASSIC
) -> Callable[[str], Case]:
    """A target of the package energies."""

    def make(name: str) -> Case:
        target: Any = energies.get(key)
        known = target.mode_weights is not None
        return Case(
            name=name, energy=target, dim=target.dim, log_z=target.log_z, limits=limits,
            shares=target.responsibilities if known else None, masses=target.mode_weights,
            draw=lambda n, g: target.sample(n, generator=g, dtype=torch.float64),
            box=(ones(target.dim, low), ones(target.dim, high)),
        )  # fmt: skip

    return make


def eggbox(
    modes: Tensor, half: Sequence[float], energy: Callable[[Tensor], Tensor], cells: int,
    box: tuple[Tensor, Tensor],
) -> Callable[[str], Case]:  # fmt: skip
    """Equal narrow modes at given points; `half` holds one of them, and the quadrature."""

    def make(name: str) -> Case:
        dim = len(half)
        nodes = [torch.linspace(-h, h, cells, dtype=torch.float64) for h in half]
        grid = torch.stack(torch.meshgrid(*nodes, indexing="ij"), -1).reshape(-1, dim)
        volume = sum(math.log(2 * h / (cells - 1)) for h in half)
        log_one = float((-energy(grid + modes[0])).logsumexp(0)) + volume
        lowest, width = energy(modes[:1]), torch.tensor(half, dtype=torch.float64)

        def draw(n: int, generator: Generator) -> Tensor:
            pieces: list[Tensor] = []
            while sum(map(len, pieces)) < n:
                u = torch.rand(500_000, dim + 1, generator=generator, dtype=torch.float64)
                offset = width * (2 * u[:, :dim] - 1)
                accepted = u[:, dim].log() < lowest - energy(offset + modes[0])
                pieces.append(offset[accepted])
            mode = torch.randint(len(modes), (n,), generator=generator)
            return torch.cat(pieces)[:n] + modes[mode]

        def shares(x: Tensor) -> Tensor:
            nearest = torch.cdist(x.double(), modes).argmin(-1)
            return torch.nn.functional.one_hot(nearest, len(modes)).double()

        return Case(
            name=name, energy=energy, dim=dim, log_z=log_one + math.log(len(modes)),
            limits=CLASSIC, bounds=(box[0].tolist(), box[1].tolist()), shares=shares,
            masses=ones(len(modes), 1 / len(modes)), draw=draw, box=box,
        )  # fmt: skip

    return make


def _eggbox_energy(x: Tensor) -> Tensor:
    return -((2 + (x[:, 0] / 2).cos() * (x[:, 1] / 2).cos()) ** 5)


def _eggs_energy(x: Tensor) -> Tensor:
    hump = (0.5 + 0.5 * (2 * math.pi * x[:, :2]).cos()).prod(-1) * (-0.5 * x[:, 2].square()).exp()
    return -((1 + hump) ** 5)


def shells(
    dim: int, limits: Limits, centres: tuple[float, float] = (-3.5, 3.5),
    radii: tuple[float, float] = (2.0, 2.0), width: float = 0.1, *, equal_height: bool = True,
) -> Callable[[str], Case]:  # fmt: skip
    """Two Gaussian shells with normal laws of the radius; masses follow from their heights."""

    def make(name: str) -> Case:
        parts = [Shell(axis(0, dim, c), r, width) for c, r in zip(centres, radii, strict=True)]
        masses = torch.tensor([part.log_mass for part in parts], dtype=torch.float64)
        masses = masses - 0.5 * LOG_2PI - math.log(width)
        log_z = float(masses.logsumexp(0))
        case = of_mixture(
            masses.softmax(0).tolist(), lambda: parts, limits, shift=-log_z,
            box=(ones(dim, -6.5), ones(dim, 6.5)),
        )(name)  # fmt: skip
        return case

    return make


def rosenbrock(dim: int, limits: Limits) -> Callable[[str], Case]:
    r"""Rosenbrock's function, :math:`\sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2`.

    The law is a Markov chain. With :math:`g_d = 1` and
    :math:`g_i(x) = e^{-(1 - x)^2} \int e^{-100 (y - x^2)^2} g_{i+1}(y) dy`,
    :math:`\log Z = \log \int g_1`; :math:`x_1` has the density :math:`g_1`, and each next one,
    given the one before, a normal law about its square, times :math:`g`. Integrals over a normal
    law are those of Gauss and Hermite.
    """

    def make(name: str) -> Case:
        grid = np.linspace(-8, 12, 80_001)
        nodes, weights = np.polynomial.hermite.hermgauss(64)
        own = np.exp(-((1 - grid) ** 2))
        tables = [own * math.sqrt(math.pi / 100)]
        for _ in range(dim - 2):
            after = np.interp((grid[:, None] ** 2 + nodes / 10).clip(-8, 12), grid, tables[0])
            tables.insert(0, own * (after @ weights) / 10)
        log_z = math.log(np.trapezoid(tables[0], grid))

        def draw(n: int, generator: Generator) -> Tensor:
            u = torch.rand(dim, n, generator=generator, dtype=torch.float64).numpy()
            cumulated = np.cumsum(tables[0])
            columns = [np.interp(u[0], cumulated / cumulated[-1], grid)]
            offset = np.linspace(-0.45, 0.45, 151)
            pull = np.exp(-100 * offset**2)
            for i in range(1, dim - 1):
                column = np.empty(n)
                for rows in np.array_split(np.arange(n), max(1, n // 20_000)):
                    y = columns[-1][rows, None] ** 2 + offset
                    c = np.cumsum(pull * np.interp(y, grid, tables[i]), -1)
                    goal = u[i, rows] * c[:, -1]
                    k = (c < goal[:, None]).sum(-1).clip(1, len(offset) - 1)
                    at = np.arange(len(rows))
                    part = (goal - c[at, k - 1]) / (c[at, k] - c[at, k - 1])
                    # A cell's mass lies about its node.
                    column[rows] = y[at, k] + (part - 0.5) * (offset[1] - offset[0])
                columns.append(column)
            z = torch.special.ndtri(torch.as_tensor(u[-1])).numpy()
            columns.append(columns[-1] ** 2 + z / math.sqrt(200))
            return torch.as_tensor(np.stack(columns, -1))

        def energy(x: Tensor) -> Tensor:
            a, b = x[:, :-1], x[:, 1:]
            return (100 * (b - a * a).square() + (1 - a).square()).sum(-1)

        low, high = torch.full((dim,), -4.0), torch.full((dim,), 8.0)
        low, high = low.double(), high.double()
        if dim == 4:
            high = point(5, 6, 8, 40)
        high[-1] = 40
        return Case(
            name=name, energy=energy, dim=dim, log_z=log_z, limits=limits, draw=draw,
            box=(low, high),
        )  # fmt: skip

    return make


def log_gamma(plain: int, limits: Limits = CLASSIC) -> Callable[[str], Case]:
    """Two modes in a log-gamma coordinate, two in a normal one, `plain` more of either kind."""

    def make(name: str) -> Case:
        dim, s = 2 + 2 * plain, 1 / 30

        def gamma(z: Tensor) -> Tensor:
            return z - z.clamp(max=300.0).exp() - math.log(s)

        def normal(z: Tensor) -> Tensor:
            return -0.5 * (z.square() + LOG_2PI) - math.log(s)

        def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.double()
            z = (x[:, :2, None] - point(1, 2) / 3) / s
            return gamma(z[:, 0]) - math.log(2), normal(z[:, 1]) - math.log(2)

        def energy(x: Tensor) -> Tensor:
            first, second = pairs(x)
            z = (x.double()[:, 2:] - 2 / 3) / s
            rest = gamma(z[:, :plain]).sum(-1) + normal(z[:, plain:]).sum(-1)
            return -(first.logsumexp(-1) + second.logsumexp(-1) + rest).to(x.dtype)

        def shares(x: Tensor) -> Tensor:
            first, second = (part.softmax(-1) for part in pairs(x))
            return (first[:, :, None] * second[:, None, :]).reshape(-1, 4)

        def draw(n: int, generator: Generator) -> Tensor:
            u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
            centre = torch.where(u < 0.5, 1 / 3, 2 / 3)
            one = torch.ones(n, 1 + plain, dtype=torch.float64)
            g = torch._standard_gamma(one, generator=generator).log()
            z = torch.randn(n, 1 + plain, generator=generator, dtype=torch.float64)
            return torch.cat(
                [centre[:, :1] + s * g[:, :1], centre[:, 1:] + s * z[:, :1],
                 2 / 3 + s * g[:, 1:], 2 / 3 + s * z[:, 1:]], -1,
            )  # fmt: skip

        return Case(
            name=name, energy=energy, dim=dim, log_z=0.0, limits=limits, shares=shares,
            masses=ones(4, 0.25), draw=draw, box=(ones(dim, 0), ones(dim, 1)),
        )  # fmt: skip

    return make


def eight_schools(name: str) -> Case:
    """The eight schools, centred: mean, log of the spread, eight effects."""
    effect = point(28, 8, -3, 7, -1, 1, 18, 12)
    error = point(15, 10, 16, 11, 9, 11, 10, 18)
    constant = float(error.log().sum()) + 4 * LOG_2PI

    def hyper(mu: Tensor, log_tau: Tensor) -> Tensor:
        """Log-prior of both, that of the spread half-Cauchy of scale 5, with its Jacobian."""
        spread = math.log(2 / (math.pi * 5)) + log_tau
        spread = spread - torch.nn.functional.softplus(2 * log_tau - 2 * math.log(5))
        return spread - 0.5 * (mu / 5).square() - math.log(5) - 0.5 * LOG_2PI

    def misfit(x: Tensor) -> Tensor:
        return 0.5 * ((effect - x[:, 2:]) / error).square().sum(-1) + constant

    def energy(x: Tensor) -> Tensor:
        mu, log_tau = x[:, 0].double(), x[:, 1].double()
        z = (x[:, 2:].double() - mu[:, None]) * (-log_tau)[:, None].exp()
        prior = hyper(mu, log_tau) - 0.5 * z.square().sum(-1) - 8 * log_tau - 4 * LOG_2PI
        return (misfit(x.double()) - prior).to(x.dtype)

    mu = torch.linspace(-25, 30, 1101, dtype=torch.float64)
    log_tau = torch.linspace(-16, 7.5, 2351, dtype=torch.float64)
    first, second = torch.meshgrid(mu, log_tau, indexing="ij")
    log_density = hyper(first, second)
    for y, s in zip(effect, error, strict=True):
        variance = s * s + (2 * second).exp()
        log_density -= 0.5 * ((y - first).square() / variance + variance.log() + LOG_2PI)
    cell = float((mu[1] - mu[0]) * (log_tau[1] - log_tau[0]))
    log_z = float(log_density.flatten().logsumexp(0)) + math.log(cell)
    cumulated = log_density.flatten().softmax(0).cumsum(0)

    def draw(n: int, generator: Generator) -> Tensor:
        u = torch.rand(3, n, generator=generator, dtype=torch.float64)
        k = torch.searchsorted(cumulated, u[0]).clamp(max=len(cumulated) - 1)
        a = mu[k // len(log_tau)] + (u[1] - 0.5) * (mu[1] - mu[0])
        b = log_tau[k % len(log_tau)] + (u[2] - 0.5) * (log_tau[1] - log_tau[0])
        v = (2 * b).exp()[:, None]
        precision = 1 / v + 1 / error.square()
        mean = (a[:, None] / v + effect / error.square()) / precision
        z = torch.randn(n, 8, generator=generator, dtype=torch.float64)
        return torch.cat([a[:, None], b[:, None], mean + z / precision.sqrt()], -1)

    def transform(u: np.ndarray) -> np.ndarray:
        u = np.clip(u, 1e-15, 1 - 1e-15)
        z = torch.special.ndtri(torch.as_tensor(u)).numpy()
        centre, tau = 5 * z[:, :1], 5 * np.tan(0.5 * math.pi * u[:, 1:2])
        return np.concatenate([centre, np.log(tau), centre + tau * z[:, 2:]], -1)

    return Case(
        name=name, energy=energy, dim=10, log_z=log_z, limits=WIDE, draw=draw,
        transform=transform, misfit=misfit,
    )  # fmt: skip


def many_well(name: str) -> Case:
    """Sixteen double wells; the regions are the right wells, one pair of coordinates each."""
    target: Any = energies.get("many-well-32")

    def shares(x: Tensor) -> Tensor:
        return (x[:, 0::2] > target.barrier).double() / 16

    return Case(
        name=name, energy=target, dim=32, log_z=target.log_z, limits=Limits(log_z=0.1),
        shares=shares, masses=ones(16, float(target.well_weights[1]) / 16),
        draw=lambda n, g: target.sample(n, generator=g, dtype=torch.float64),
        box=(ones(32, -5.5), ones(32, 5.5)),
    )  # fmt: skip


def _turned(generator: np.random.Generator, dim: int) -> Tensor:
    """Cholesky factor of a covariance with random axes and widths of 0.4 to 1.2."""
    rotation, _ = np.linalg.qr(generator.standard_normal((dim, dim)))
    widths = generator.uniform(0.4, 1.2, dim)
    return torch.linalg.cholesky(torch.as_tensor((rotation * widths**2) @ rotation.T))


def turned_mixture(
    seed: int, dim: int, half: float, weights: Sequence[float], limits: Limits = CLASSIC
) -> Callable[[str], Case]:
    """Correlated normal laws at random places of a cube."""

    def make(name: str) -> Case:
        generator = np.random.default_rng(seed)
        loc = torch.as_tensor(generator.uniform(-half, half, (len(weights), dim)))
        parts = [Normal(place, _turned(generator, dim)) for place in loc]
        box = (ones(dim, -half - 7), ones(dim, half + 7))
        return of_mixture(weights, lambda: parts, limits, shift=0.0, box=box)(name)

    return make


_EGG = 2 * math.pi * torch.tensor(
    [(i, j) for i in range(-2, 3) for j in range(-2, 3) if (i + j) % 2 == 0], dtype=torch.float64
)  # fmt: skip
_EGGS = torch.tensor([(i, j, 0) for i in range(5) for j in range(5)], dtype=torch.float64)

add("classic", "paper", of_library("paper-mixture", -10, 10))
add("classic", "gmm40", of_library("gmm40", -50, 50))
add("classic", "moons", of_library("two-moons", -5, 5))
add("classic", "rings", of_library("rings", -8, 8))
add("classic", "eggbox", eggbox(
    _EGG, (0.8, 0.8), _eggbox_energy, 1601, (ones(2, -5 * math.pi), ones(2, 5 * math.pi))
))  # fmt: skip
add("classic", "shells2", shells(2, CLASSIC))
add("classic", "shells10", shells(10, WIDE))
add("classic", "rosen4", rosenbrock(4, CLASSIC))
add("classic", "mix8", turned_mixture(8, 8, 5.0, [0.35, 0.25, 0.2, 0.1, 0.06, 0.04]))
add("classic", "loggamma", log_gamma(4))
add("classic", "spike", normals(
    (0.6, ones(10, 0.1), 0.1), (0.4, ones(10, 0), 1.0), limits=CLASSIC, shift=0.0,
    box=(ones(10, -7), ones(10, 7)),
))  # fmt: skip
add("classic", "eight", eight_schools)
add("hard", "rosen8", rosenbrock(8, HARD))
add("hard", "funnel", funnel(10, HARD, 0.0))
add("hard", "mw32", many_well)


# ------------------------------------------------------------------ posteriors


def posterior(name: str) -> Case:
    """A model of exploration_posteriors with its stored reference."""
    model, reference = exploration_posteriors.load(name)
    regions: dict[str, Any] = {}
    if model.orders == 6:

        def shares(x: Tensor) -> Tensor:
            order = x[:, :3].argsort(-1)
            label = 2 * order[:, 0] + (order[:, 1] > order[:, 2]).long()
            return torch.nn.functional.one_hot(label, 6).double()

        regions = {"shares": shares, "masses": ones(6, 1 / 6)}
    quantiles = torch.tensor(reference["quantiles"], dtype=torch.float64)
    limits = POSTERIOR
    if regions:  # the reference is of one labelling
        quantiles, limits = None, FINDABLE
    return Case(
        name=name, energy=model, dim=model.dim, log_z=reference["log_z"],
        log_z_se=reference["log_z_se"], limits=limits, bounds=model.bounds,
        quantiles=quantiles, transform=model.transform, misfit=model.misfit, **regions,
    )  # fmt: skip


for _name in ("epidemic", "orbit", "light-curve"):
    add("posteriors", _name, posterior)
add("kinds", "labels", posterior)


# ------------------------------------------------------------------ more of the same kinds


def _signs(seed: int, dim: int, modes: int, a: float) -> list[Tensor]:
    """Corners of a cube with random, different signs."""
    generator = np.random.default_rng(seed)
    codes = generator.choice(2**dim, modes, replace=False)
    return [
        a * torch.tensor([1.0 if c >> i & 1 else -1.0 for i in range(dim)]).double() for c in codes
    ]


def _direction(seed: int, dim: int, length: float) -> Tensor:
    """A random point at a distance of the origin."""
    z = torch.as_tensor(np.random.default_rng(seed).standard_normal(dim))
    return length * z / z.norm()


def _chain_factor(dim: int, correlation: float, scale: float) -> Tensor:
    """Cholesky factor of correlations that decay along the coordinates."""
    k = torch.arange(dim, dtype=torch.float64)
    return torch.linalg.cholesky(scale**2 * correlation ** (k[:, None] - k).abs())


def _turned_factor(dim: int, low: float, high: float) -> Tensor:
    """Cholesky factor of widths in geometric progression along random axes."""
    q = np.linalg.qr(np.random.default_rng(dim).standard_normal((dim, dim)))[0]
    root = torch.as_tensor(q) * torch.logspace(math.log10(low), math.log10(high), dim).double()
    return torch.linalg.cholesky(root @ root.mT)


def scattered(
    number: int, dim: int, half: float, low: float, high: float
) -> Callable[[str], Case]:
    """Equal normal laws, their centres uniform in a cube, their widths between two ends."""
    uniform = np.random.default_rng(number)
    centre = torch.as_tensor(uniform.uniform(-half, half, (number, dim)))
    width = uniform.uniform(low, high, number)
    parts = zip(centre, width, strict=True)
    return normals(*((1 / number, c, float(w)) for c, w in parts))


_FOUR = _signs(5, 6, 4, 6.0)
add("kinds", "spike_aside_10d", normals(
    (0.45, ones(10, 0), 1.0), (0.55, _direction(6, 10, 0.5), 0.1), shift=-3.1
))  # fmt: skip
add("kinds", "spike_aside_6d", normals(
    (0.7, ones(6, 2), 2.0), (0.3, ones(6, 2) + _direction(7, 6, 0.25), 0.05), shift=11.0
))  # fmt: skip
add("kinds", "signs_6d", normals(
    (0.4, _FOUR[0], 0.5), (0.3, _FOUR[1], 0.8), (0.2, _FOUR[2], 1.0), (0.1, _FOUR[3], 1.2),
    shift=2.2,
))  # fmt: skip
add("kinds", "eggs25_3d", eggbox(
    _EGGS, (0.15, 0.15, 0.7), _eggs_energy, 161, (point(-0.5, -0.5, -6), point(4.5, 4.5, 6))
))  # fmt: skip
add("kinds", "ring_spot_2d", of_mixture(
    [0.7, 0.3], lambda: [Shell(point(3, -2), 4.0, 0.1), Normal(point(3.6, -1.5), 0.2)], shift=-5.0
))  # fmt: skip
add("kinds", "correlated_pair_10d", normals(
    (0.65, ones(10, 3), _chain_factor(10, 0.9, 1.0)),
    (0.35, ones(10, -3), _chain_factor(10, -0.8, 0.6)), shift=4.4,
))  # fmt: skip
add("kinds", "banana_pair_3d", of_mixture(
    [0.6, 0.4],
    lambda: [Banana(point(0, -6, 0), 2.0, 0.4, 0.5), Banana(point(0, 8, 3), 1.5, -0.5, 0.4)],
    shift=6.5,
))  # fmt: skip
add("kinds", "far_cluster_3d", normals(
    (0.3, point(2, 0, 0), 0.4), (0.3, point(-2, 1, 0), 0.4), (0.2, point(0, -2, 1), 0.5),
    (0.2, point(25, -30, 20), 0.3), shift=1.7,
))  # fmt: skip
add("kinds", "iso_15d", normals(
    (0.55, ones(15, 1), 1.0), (0.3, ones(15, -7), 0.6), (0.15, _direction(8, 15, 25), 1.2)
))  # fmt: skip
add("kinds", "dup_18d", normals((0.7, ones(18, 0), 1.0), (0.3, axis(3, 18, -6), 0.8)))
add("kinds", "dup3_24d", normals(
    (0.5, ones(24, 0), 0.7), (0.3, axis(0, 24, 5), 0.6), (0.2, axis(1, 24, 5), 0.5), shift=20.0
))  # fmt: skip
add("kinds", "wide_low_9d", normals((0.3, ones(9, -1), 0.5), (0.7, ones(9, 4), 3.0), shift=0.6))
add("kinds", "two_7d", normals((0.35, ones(7, -4), 0.4), (0.65, ones(7, 3), 1.1), shift=-8.8))
add("kinds", "nan_wall_3d", walled(
    normals((0.7, axis(0, 3, -7), 1.0), (0.3, axis(0, 3, 6), 0.5)), 3.0, math.nan
))  # fmt: skip
add("kinds", "island_inf_6d", island(
    6, INF, weights=(0.5, 0.5), scales=(0.3, 3.0), radii=(1.5, 4.5)
))  # fmt: skip
add("kinds", "corner_6d", corner(6, 40.0, -2.0, 3.0, 0.6))
add("kinds", "shells_4d", shells(4, CLASSIC, (-4.0, 3.0), (2.0, 1.5), 0.15))
add("kinds", "loggamma_6d", log_gamma(2))
add("kinds", "rosen6", rosenbrock(6, HARD))
add("kinds", "turned_6d", turned_mixture(9, 6, 6.0, [0.4, 0.3, 0.15, 0.1, 0.05]))
add("kinds", "aside_4d", normals((0.5, ones(4, 0), 1.0), (0.5, _direction(3, 4, 12), 0.5)))
add("kinds", "aside_8d", normals((0.6, ones(8, 1), 1.0), (0.4, _direction(4, 8, 14), 0.7)))
add("kinds", "nested_3d", normals(
    (0.3, ones(3, 4), 0.01), (0.3, ones(3, 4), 1.0), (0.4, ones(3, 4), 100.0)
))  # fmt: skip
add("kinds", "thin_spike_5d", normals((0.5, ones(5, 3), 1.0), (0.5, ones(5, 3), 1e-4)))
add("kinds", "many_5d", scattered(30, 5, 20.0, 0.8, 1.2))
add("kinds", "many_3d", scattered(80, 3, 20.0, 0.7, 1.2))
add("kinds", "stretched_30d", normals(
    (0.6, _direction(1, 30, 100), _turned_factor(30, 1e-2, 1e2)),
    (0.4, -_direction(1, 30, 100), _turned_factor(30, 1e-2, 1e2)),
))  # fmt: skip
add("kinds_hidden", "pin_4d", hidden(
    normals((0.5, ones(4, 1), 1.0), (0.5, ones(4, -0.6), 0.002)), ones(4, -0.6), 0.002
))  # fmt: skip
add("kinds_hidden", "plateau_3d", hidden(
    of_mixture([0.7, 0.3], lambda: [Box(-20, 20, 3), Normal(ones(3, -9), 0.05)]), ones(3, -9), 0.05
))  # fmt: skip
add("kinds_heavy", "student_pair_3d", students(
    3, [point(-6, 0, 0), point(6, 3, 0)], [1.0, 0.5], [0.6, 0.4], 3.0
))  # fmt: skip
add("kinds_heavy", "student_pair_2d", students(
    2, [point(0, 0), point(30, 10)], [2.0, 0.5], [0.5, 0.5], 1.5
))  # fmt: skip


@lru_cache(maxsize=4)
def get(name: str) -> Case:
    """The target of that name."""
    return MAKERS[name]()


def group_of(name: str) -> str:
    """Its set."""
    return next(group for group, members in SETS.items() if name in members)
