r"""Posteriors of everyday models, with reference answers in references/*.json.

    python examples/benchmarks/exploration_posteriors.py            # data and references anew
    python examples/benchmarks/exploration_posteriors.py --check    # then the check by nautilus

Energies are :math:`E(\theta) = -\log p(\theta) - \log p(y | \theta)` with normalised densities, so
that :math:`\log Z` is the evidence. A reference file holds the data, 199 quantiles of every
marginal and :math:`\log Z` with its error, by importance sampling from a multivariate Student law
in unbounded coordinates: fitted to the normal law at the optimum next to the true parameters, then
twice to its own weighted draws. That there is no other mode is checked by a nested sampler, which
searches the whole prior; its :math:`\log Z` is stored beside.
"""

import argparse
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize, special, stats
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "references"
LEVELS = np.arange(1, 200) / 200
INF = math.inf


@dataclass(frozen=True)
class Prior:
    """A normalised prior of one parameter, for torch and for nested samplers.

    Attributes:
        family: "exponential" (a: mean), "normal" (a: mean, b: standard deviation) or "uniform"
            (from a to b).
        a: First number of the family.
        b: Second number.
    """

    family: str
    a: float
    b: float = 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval on which it is positive."""
        ends = {"exponential": (0.0, INF), "normal": (-INF, INF), "uniform": (self.a, self.b)}
        return ends[self.family]

    def energy(self, x: Tensor) -> Tensor:
        """Minus the log-density within the bounds, infinite beyond."""
        if self.family == "normal":
            return (
                0.5 * ((x - self.a) / self.b) ** 2 + math.log(self.b) + 0.5 * math.log(2 * math.pi)
            )
        low, high = self.bounds
        inside = (x >= low) & (x <= high)
        value = x / self.a + math.log(self.a) if self.family == "exponential" else 0 * x
        if self.family == "uniform":
            value = value + math.log(high - low)
        return torch.where(inside, value, torch.inf)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Inverse distribution function."""
        if self.family == "exponential":
            return -self.a * np.log1p(-u)
        if self.family == "normal":
            return self.a + self.b * special.ndtri(u)
        return self.a + (self.b - self.a) * u


def _normal_energy(residual: Tensor, sigma: Tensor | float) -> Tensor:
    """Minus log-likelihood of independent normal residuals (n, data)."""
    sigma = torch.as_tensor(sigma, dtype=residual.dtype)
    constant = residual.shape[-1] * 0.5 * math.log(2 * math.pi)
    scaled = residual / sigma[..., None]
    return 0.5 * scaled.square().sum(-1) + residual.shape[-1] * sigma.log() + constant


class Posterior(ABC):
    """A model with priors and data; call it for energies.

    Attributes:
        name: Name of the target and of its reference file.
        parameters: Name and prior of every parameter.
        truth: Parameters that the data were made with.
        orders: By how many relabellings the energy does not change.
    """

    name: str
    parameters: dict[str, Prior]
    truth: tuple[float, ...]
    orders = 1

    def __init__(self, data: list[list[float]] | None = None) -> None:
        self.data = torch.tensor(data or self.make_data(), dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.parameters)

    @property
    def bounds(self) -> tuple[list[float], list[float]] | None:
        """Lower and upper bounds, infinite where there is none; None if there is none at all."""
        ends = [prior.bounds for prior in self.parameters.values()]
        low, high = [a for a, _ in ends], [b for _, b in ends]
        return None if all(map(math.isinf, [*low, *high])) else (low, high)

    @abstractmethod
    def make_data(self) -> list[list[float]]:
        """Data of the true parameters: rows of times and of observations."""

    @abstractmethod
    def misfit(self, x: Tensor) -> Tensor:
        """Minus log-likelihood of points (n, dim)."""

    def prior_energy(self, x: Tensor) -> Tensor:
        """Minus log-prior of points (n, dim)."""
        priors = enumerate(self.parameters.values())
        return torch.stack([prior.energy(x[..., i]) for i, prior in priors]).sum(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Minus log of prior times likelihood; infinite where the model has no finite value."""
        value = self.prior_energy(x) + self.misfit(x)
        return torch.where(value.isnan(), torch.inf, value)

    def transform(self, u: np.ndarray) -> np.ndarray:
        """From the unit cube to the prior."""
        priors = enumerate(self.parameters.values())
        return np.stack([prior.quantile(u[..., i]) for i, prior in priors], -1)


class Epidemic(Posterior):
    r"""An outbreak: :math:`\dot s = -\beta s i, \dot i = \beta s i - \gamma i`, log-normal errors.

    Runge-Kutta of fourth order, 48 steps of a quarter of a day; a population of 1,000.
    """

    name = "epidemic"
    parameters = {  # noqa: RUF012
        "contact rate": Prior("exponential", 2.0),
        "recovery rate": Prior("exponential", 1.0),
        "first cases": Prior("exponential", 5.0),
        "error": Prior("exponential", 0.5),
    }
    truth = (1.7, 0.45, 3.0, 0.15)
    population, step = 1000.0, 0.25

    def curve(self, x: Tensor) -> Tensor:
        """Numbers of infected on days 1 to 12, with shape (n, 12)."""
        beta, gamma = x[..., 0], x[..., 1]
        i = x[..., 2] / self.population
        s = 1 - i

        def slope(s: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
            new = beta * s * i
            return -new, new - gamma * i

        days, h = [], self.step
        for k in range(1, 49):
            a = slope(s, i)
            b = slope(s + h / 2 * a[0], i + h / 2 * a[1])
            c = slope(s + h / 2 * b[0], i + h / 2 * b[1])
            d = slope(s + h * c[0], i + h * c[1])
            s = s + h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
            i = i + h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
            if k % 4 == 0:
                days.append(i)
        return self.population * torch.stack(days, -1)

    def make_data(self) -> list[list[float]]:
        """Days, and reported infected."""
        curve = self.curve(torch.tensor([self.truth], dtype=torch.float64))[0].numpy()
        noise = np.random.default_rng(1).standard_normal(12)
        return [list(range(1, 13)), np.round(curve * np.exp(0.15 * noise), 1).tolist()]

    def misfit(self, x: Tensor) -> Tensor:
        """Normal errors of logarithms, where the curve is positive."""
        observed = self.data[1].log()
        return _normal_energy(self.curve(x).log() - observed, x[..., 3]) + observed.sum()


class Orbit(Posterior):
    r"""Radial velocities of a star with one planet.

    .. math:: v = v_0 + K (\cos(\nu + \omega) + e \cos \omega)

    with the true anomaly of Kepler's equation, solved by ten steps of Newton's method. Errors of
    4 m/s are known.
    """

    name = "orbit"
    parameters = {  # noqa: RUF012
        "log10 period / d": Prior("uniform", 0.0, 4.0),
        "semi-amplitude / (m/s)": Prior("exponential", 30.0),
        "eccentricity": Prior("uniform", 0.0, 0.95),
        "argument / rad": Prior("uniform", 0.0, 2 * math.pi),
        "mean anomaly / rad": Prior("uniform", 0.0, 2 * math.pi),
        "velocity / (m/s)": Prior("normal", 0.0, 50.0),
    }
    truth = (1.92, 28.0, 0.35, 2.6, 3.4, 12.0)
    error = 4.0

    def curve(self, x: Tensor, times: Tensor) -> Tensor:
        """Velocities at the times (data), with shape (n, data)."""
        log_period, amplitude, e, omega, phase, velocity = x[..., None].unbind(-2)
        mean = torch.remainder(phase + 2 * math.pi * times / 10**log_period, 2 * math.pi)
        anomaly = mean + e * torch.where(mean < math.pi, 0.85, -0.85)
        for _ in range(10):
            error = anomaly - e * anomaly.sin() - mean
            anomaly = anomaly - error / (1 - e * anomaly.cos())
        nu = 2 * torch.atan2(
            (1 + e).sqrt() * (anomaly / 2).sin(), (1 - e).sqrt() * (anomaly / 2).cos()
        )
        return velocity + amplitude * ((nu + omega).cos() + e * omega.cos())

    def make_data(self) -> list[list[float]]:
        """Times in days, and velocities."""
        generator = np.random.default_rng(2)
        times = np.round(np.sort(generator.uniform(0, 300, 28)), 2)
        truth = torch.tensor([self.truth], dtype=torch.float64)
        curve = self.curve(truth, torch.as_tensor(times))[0].numpy()
        noise = self.error * generator.standard_normal(28)
        return [times.tolist(), np.round(curve + noise, 2).tolist()]

    def misfit(self, x: Tensor) -> Tensor:
        """Normal errors."""
        return _normal_energy(self.curve(x, self.data[0]) - self.data[1], self.error)


class LightCurve(Posterior):
    r"""A supernova's flux: :math:`A e^{-(t - t_0)/\tau_f} / (1 + e^{-(t - t_0)/\tau_r}) + B`."""

    name = "light-curve"
    parameters = {  # noqa: RUF012
        "amplitude": Prior("exponential", 100.0),
        "time / d": Prior("normal", 0.0, 20.0),
        "fall / d": Prior("exponential", 30.0),
        "rise / d": Prior("exponential", 10.0),
        "background": Prior("normal", 0.0, 10.0),
        "error": Prior("exponential", 5.0),
    }
    truth = (80.0, -6.0, 24.0, 4.0, 3.0, 4.0)

    def curve(self, x: Tensor, times: Tensor) -> Tensor:
        """Fluxes at the times (data), with shape (n, data)."""
        amplitude, centre, fall, rise, background, _ = x[..., None].unbind(-2)
        since = times - centre
        shape = -since / fall - torch.nn.functional.softplus(-since / rise)
        return amplitude * shape.exp() + background

    def make_data(self) -> list[list[float]]:
        """Times in days, and fluxes."""
        generator = np.random.default_rng(3)
        times = np.round(np.sort(generator.uniform(-30, 80, 36)), 1)
        truth = torch.tensor([self.truth], dtype=torch.float64)
        curve = self.curve(truth, torch.as_tensor(times))[0].numpy()
        noise = self.truth[-1] * generator.standard_normal(36)
        return [times.tolist(), np.round(curve + noise, 1).tolist()]

    def misfit(self, x: Tensor) -> Tensor:
        """Normal errors of unknown size."""
        return _normal_energy(self.curve(x, self.data[0]) - self.data[1], x[..., 5])


class Labels(Posterior):
    """Means, log-widths and log-odds of three normal components: six equal labellings.

    The prior of the weights is Dirichlet's with shape 2, in the coordinates log(w_k / w_3).
    """

    name = "labels"
    parameters = {  # noqa: RUF012
        **{f"mean {k}": Prior("normal", 0.0, 6.0) for k in (1, 2, 3)},
        **{f"log width {k}": Prior("normal", 0.0, 0.5) for k in (1, 2, 3)},
        "log odds 1": Prior("uniform", -INF, INF),
        "log odds 2": Prior("uniform", -INF, INF),
    }
    truth = (-6.0, 0.5, 6.0, 0.0, -0.3, 0.2, 0.1, 0.4)
    orders = 6

    def make_data(self) -> list[list[float]]:
        """Sixty numbers."""
        generator = np.random.default_rng(4)
        label = generator.permutation(np.repeat([0, 1, 2], (18, 26, 16)))
        mean, width = np.array(self.truth[:3]), np.exp(self.truth[3:6])
        draws = mean[label] + width[label] * generator.standard_normal(60)
        return [np.round(draws, 2).tolist()]

    def _log_weight(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., 6:], torch.zeros_like(x[..., :1])], -1).log_softmax(-1)

    def prior_energy(self, x: Tensor) -> Tensor:
        """Normal laws, and Dirichlet's with the Jacobian of the log-odds."""
        normal = sum(
            prior.energy(x[..., i]) for i, prior in enumerate(list(self.parameters.values())[:6])
        )
        return normal - 2 * self._log_weight(x).sum(-1) - math.lgamma(6)

    def misfit(self, x: Tensor) -> Tensor:
        """Minus log-likelihood of a mixture."""
        width = x[..., None, 3:6]
        z = (self.data[0][:, None] - x[..., None, :3]) * (-width).exp()
        parts = self._log_weight(x)[..., None, :] - 0.5 * z * z - width
        return -(parts.logsumexp(-1) - 0.5 * math.log(2 * math.pi)).sum(-1)

    def transform(self, u: np.ndarray) -> np.ndarray:
        """From the unit cube to the prior, means in ascending order: one labelling of six."""
        priors = enumerate(list(self.parameters.values())[:6])
        normal = [prior.quantile(u[:, i]) for i, prior in priors]
        x = np.stack(normal, -1)
        x[:, :3] = np.sort(x[:, :3], -1)
        # Dirichlet by breaking a stick.
        first = special.betaincinv(2, 4, u[:, 6])
        second = (1 - first) * special.betaincinv(2, 2, u[:, 7])
        third = 1 - first - second
        odds = np.log(np.stack([first, second], -1) / third[:, None])
        return np.concatenate([x, odds], -1)


MODELS: dict[str, type[Posterior]] = {
    model.name: model for model in (Epidemic, Orbit, LightCurve, Labels)
}


def load(name: str) -> tuple[Posterior, dict[str, Any]]:
    """A posterior with its stored data, and its reference."""
    reference = json.loads((FOLDER / f"{name}.json").read_text())
    return MODELS[name](reference["data"]), reference


# ------------------------------------------------------------------ references


def _open(x: np.ndarray, priors: list[Prior]) -> np.ndarray:
    """Unbounded coordinates."""
    columns = []
    for i, prior in enumerate(priors):
        low, high = prior.bounds
        if math.isinf(low):
            columns.append(x[:, i])
        elif math.isinf(high):
            columns.append(np.log(x[:, i] - low))
        else:
            columns.append(np.log((x[:, i] - low) / (high - x[:, i])))
    return np.stack(columns, -1)


def _close(z: np.ndarray, priors: list[Prior]) -> tuple[np.ndarray, np.ndarray]:
    """Back to parameters, and the log of the Jacobian."""
    columns, log_jacobian = [], np.zeros(len(z))
    for i, prior in enumerate(priors):
        low, high = prior.bounds
        if math.isinf(low):
            columns.append(z[:, i])
        elif math.isinf(high):
            columns.append(low + np.exp(z[:, i]))
            log_jacobian += z[:, i]
        else:
            share = 1 / (1 + np.exp(-z[:, i]))
            columns.append(low + (high - low) * share)
            log_jacobian += np.log(high - low) + np.log(share) + np.log1p(-share)
    return np.stack(columns, -1), log_jacobian


def around_truth(posterior: Posterior, n: int = 20_000, seed: int = 0) -> np.ndarray:
    """Draws of the normal law at the optimum next to the true parameters, shape (n, dim)."""
    priors = list(posterior.parameters.values())

    def energy(z: np.ndarray) -> float:
        x, log_jacobian = _close(z[None], priors)
        with torch.no_grad():
            value = float(posterior(torch.as_tensor(x))[0]) - log_jacobian[0]
        return value if math.isfinite(value) else 1e10

    start = _open(np.array([posterior.truth]), priors)[0]
    best = optimize.minimize(energy, start, method="Nelder-Mead", options={"maxiter": 4000}).x
    step = 1e-4
    unit = step * np.eye(len(best))
    hessian = [
        [
            energy(best + a + b)
            - energy(best + a - b)
            - energy(best - a + b)
            + energy(best - a - b)
            for a in unit
        ]
        for b in unit
    ]
    covariance = np.linalg.inv(np.array(hessian) / (4 * step**2))
    generator = np.random.default_rng(seed)
    return _close(generator.multivariate_normal(best, covariance, n), priors)[0]


def nested(posterior: Posterior, seed: int = 0, live: int = 2000) -> dict[str, Any]:
    """What nautilus says of log Z, by ellipsoids alone, after it searched the whole prior."""
    import nautilus

    def log_likelihood(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            value = -posterior.misfit(torch.as_tensor(x)).numpy()
        return np.where(np.isfinite(value), value, -1e100)

    sampler = nautilus.Sampler(
        posterior.transform, log_likelihood, n_dim=posterior.dim, n_live=live, vectorized=True,
        n_networks=0, pass_dict=False, seed=seed,
    )  # fmt: skip
    sampler.run(n_eff=5000, discard_exploration=True, verbose=False)
    return {"nested_log_z": float(sampler.log_z), "nested_evaluations": int(sampler.n_like)}


def importance(
    posterior: Posterior, draws: np.ndarray, n: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted draws, with shapes (n, dim) and (n), from a law fitted to given ones."""
    generator = np.random.default_rng(seed)
    priors = list(posterior.parameters.values())
    z, weight = _open(draws, priors), np.ones(len(draws))
    for size in (n // 8, n // 4, n):
        share = weight / weight.sum()
        mean = share @ z
        covariance = 1.15 * (z - mean).T @ (share[:, None] * (z - mean))
        law = stats.multivariate_t(mean, covariance, df=8)
        z = law.rvs(size, random_state=generator)
        x, log_jacobian = _close(z, priors)
        with torch.no_grad():
            pieces = [posterior(torch.as_tensor(piece)).numpy() for piece in np.array_split(x, 50)]
        log_weight = log_jacobian - np.concatenate(pieces) - law.logpdf(z)
        if posterior.orders > 1:  # one labelling
            log_weight[~(np.diff(x[:, :3]) > 0).all(1)] = -INF
        weight = np.exp(log_weight - log_weight.max())
    return x, log_weight


def make(name: str, n: int = 1_000_000) -> dict[str, Any]:
    """Data and reference of one model."""
    posterior = MODELS[name]()
    x, log_weight = importance(posterior, around_truth(posterior), n)
    top = log_weight.max()
    weight = np.exp(log_weight - top)
    ess = weight.sum() ** 2 / (weight**2).sum()
    orders = math.log(posterior.orders)
    quantiles = []
    for i in range(posterior.dim):
        order = np.argsort(x[:, i])
        cumulated = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
        quantiles.append(np.interp(LEVELS, cumulated, x[order, i]).tolist())
    return {
        "data": posterior.data.tolist(),
        "parameters": list(posterior.parameters),
        "truth": list(posterior.truth),
        "log_z": float(top + math.log(weight.mean()) + orders),
        "log_z_se": float(math.sqrt((n / ess - 1) / n)),
        "ess": float(ess),
        "n": n,
        "quantiles": quantiles,
    }


def main() -> None:
    """Write the reference files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--check", action="store_true", help="only add what nautilus says")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        if arguments.check:
            posterior, reference = load(name)
            # Labels are put in order by sorting the prior's means: its evidence is the whole's.
            reference.update(nested(posterior))
        else:
            reference = make(name)
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(sorted(reference.items()))).replace("], [", "],\n[")
        (FOLDER / f"{name}.json").write_text(text + "\n")
        shown = {key: value for key, value in reference.items() if isinstance(value, float)}
        print(name, shown, flush=True)


if __name__ == "__main__":
    main()
