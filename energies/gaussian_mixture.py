r"""Gaussian mixtures, the targets that stay exact under noise.

Let :math:`p(x) = \sum_k \pi_k \mathcal N(x; \mu_k, \Sigma_k)` and
:math:`x_t = x_0 + \sigma \epsilon`. Then

.. math:: p_\sigma(x_t) = \sum_k \pi_k \mathcal N(x_t; \mu_k, \Sigma_k + \sigma^2 I)

at every noise level. With the eigenvectors :math:`Q_k` and eigenvalues :math:`\lambda_k` of
:math:`\Sigma_k`, the coordinates :math:`y_k = Q_k^\top (x_t - \mu_k)` and the posterior
probability of a component :math:`r_k = \pi_k \mathcal N_k / p_\sigma`,

.. math::
    \nabla \log p_\sigma(x_t) = -\sum_k r_k Q_k \frac{y_k}{\lambda_k + \sigma^2}, \qquad
    E[x_0 | x_t] = \sum_k r_k \left( \mu_k + Q_k \frac{\lambda_k y_k}{\lambda_k + \sigma^2} \right)

The second is written without the difference :math:`x_t + \sigma^2 \nabla \log p_\sigma(x_t)`,
which would lose all digits at large :math:`\sigma`. One eigendecomposition serves every
:math:`\sigma`; diagonal covariances need none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from energies.target import Constants, Target
from rsm_sampler.checked import checked

__all__ = ["GaussianMixture"]

_LOG_2PI = math.log(2 * math.pi)


def _centred(x: Tensor, loc: Tensor, rotation: Tensor | None) -> Tensor:
    """Coordinates of points along each component's axes, with shape (*batch, m, dim)."""
    y = x.unsqueeze(-2) - loc
    return y if rotation is None else torch.einsum("kij,...ki->...kj", rotation, y)


def _rotate(y: Tensor, rotation: Tensor | None) -> Tensor:
    """Back from a component's axes to the coordinates of space."""
    return y if rotation is None else torch.einsum("kij,...kj->...ki", rotation, y)


def _widen(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Noise levels as a tensor (..., 1, 1) beside components and coordinates."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma[..., None, None]


def _log_parts(
    x: Tensor, loc: Tensor, variance: Tensor, rotation: Tensor | None, log_weight: Tensor
) -> Tensor:
    """Log of weight times density of every component, with shape (*batch, m)."""
    dim = x.shape[-1]
    if (
        rotation is None and dim <= 8
    ):  # a sum over coordinates is faster than a reduction over a short axis
        square: Tensor | float = 0.0
        for i in range(dim):
            square = square + (x[..., i, None] - loc[..., i]) ** 2 / variance[..., i]
    else:
        square = (_centred(x, loc, rotation) ** 2 / variance).sum(-1)
    return log_weight - 0.5 * (square + variance.log().sum(-1) + dim * _LOG_2PI)


def _score(
    x: Tensor, loc: Tensor, variance: Tensor, rotation: Tensor | None, log_weight: Tensor
) -> Tensor:
    share = _log_parts(x, loc, variance, rotation, log_weight).softmax(-1)
    pull = _rotate(_centred(x, loc, rotation) / variance, rotation)
    return -(share.unsqueeze(-1) * pull).sum(-2)


def _denoise(
    x: Tensor,
    sigma: Tensor,
    loc: Tensor,
    variance: Tensor,
    rotation: Tensor | None,
    log_weight: Tensor,
) -> Tensor:
    wide = variance + sigma**2
    share = _log_parts(x, loc, wide, rotation, log_weight).softmax(-1)
    mean = loc + _rotate(variance / wide * _centred(x, loc, rotation), rotation)
    return (share.unsqueeze(-1) * mean).sum(-2)


@checked
class GaussianMixture(Target):
    r"""Mixture of Gaussians, normalised, with its noised laws.

    .. math:: E(x) = -\log \sum_k \pi_k \mathcal N(x; \mu_k, \Sigma_k), \qquad \log Z = 0

    Arguments:
        loc: Means :math:`\mu_k`, with shape :math:`(m, d)`.
        scale: Standard deviations: a number, one per component :math:`(m)`, or one per component
            and coordinate :math:`(m, d)`. Give either this or `covariance`.
        covariance: Covariances :math:`\Sigma_k`, with shape :math:`(m, d, d)`, or :math:`(d, d)`
            shared by all.
        weights: Weights :math:`\pi_k > 0` with shape :math:`(m)`, rescaled to add to one; equal if
            left out.
        name: Name for reports.

    Raises:
        ValueError: If shapes do not match, a weight or scale is not positive, or a covariance is
            not symmetric positive definite.

    Example:
        >>> target = GaussianMixture.paper()
        >>> x = torch.tensor([[3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
        >>> target.log_prob(x)
        tensor([ -2.0610, -10.8379], dtype=torch.float64)
        >>> target.denoiser(x, 100.0)  # at high noise, nearly the mean 0.8 * 3 - 0.2 * 3
        tensor([[1.8036, 1.8036],
                [1.7998, 1.7998]], dtype=torch.float64)
    """

    def __init__(
        self,
        loc: Float[Tensor, "modes dim"],
        scale: float | Tensor | None = None,
        *,
        covariance: Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
        name: str = "gaussian-mixture",
    ) -> None:
        loc = torch.as_tensor(loc, device="cpu").detach().to(torch.float64)
        if loc.ndim != 2 or 0 in loc.shape or not bool(loc.isfinite().all()):
            raise ValueError(
                f"loc must be finite with shape (modes, dim), got shape {tuple(loc.shape)}"
            )
        modes, dim = loc.shape
        if weights is None:
            weights = torch.ones(modes)
        weight = torch.as_tensor(weights, device="cpu").detach().to(torch.float64)
        if weight.shape != (modes,) or not bool(((weight > 0) & weight.isfinite()).all()):
            raise ValueError(f"weights must be {modes} positive numbers, got {weight.tolist()}")
        if (scale is None) == (covariance is None):
            raise ValueError("give either scale or covariance, and not both")
        if covariance is None:
            variance, rotation = self._from_scale(scale, modes, dim), None
        else:
            variance, rotation = self._from_covariance(covariance, modes, dim)
        self.loc = loc
        self.weights = weight / weight.sum()
        self.variance = variance
        self.rotation = rotation
        tensors = {"loc": loc, "variance": variance, "log_weight": self.weights.log()}
        if rotation is not None:
            tensors["rotation"] = rotation
        self._constants = Constants(**tensors)
        # each of the 2 d tails of every component may hold 1e-6 / (2 d)
        tail = -float(torch.special.ndtri(torch.tensor(1e-6 / (2 * dim), dtype=torch.float64)))
        spread = tail * self._marginal_variance().sqrt()
        super().__init__(
            dim=dim,
            name=name,
            extent=((loc - spread).amin(0), (loc + spread).amax(0)),
            log_z=0.0,
            modes=loc.clone(),
            mode_weights=self.weights.clone(),
        )

    @staticmethod
    def _from_scale(scale: float | Tensor | None, modes: int, dim: int) -> Tensor:
        std = torch.as_tensor(scale, device="cpu").detach().to(torch.float64)
        if std.ndim == 1 and len(std) == modes:
            std = std[:, None]
        elif std.ndim != 0 and std.shape != (modes, dim):
            raise ValueError(
                f"scale must have shape (), ({modes},) or ({modes}, {dim}), got {tuple(std.shape)}"
            )
        if not bool(((std > 0) & std.isfinite()).all()):
            raise ValueError(f"scale must be positive, got {std.tolist()}")
        return (std**2).expand(modes, dim).clone()

    @staticmethod
    def _from_covariance(covariance: Tensor, modes: int, dim: int) -> tuple[Tensor, Tensor]:
        matrix = torch.as_tensor(covariance, device="cpu").detach().to(torch.float64)
        if matrix.shape not in ((dim, dim), (modes, dim, dim)):
            raise ValueError(
                f"covariance must have shape ({dim}, {dim}) or ({modes}, {dim}, {dim}),"
                f" got {tuple(matrix.shape)}"
            )
        matrix = matrix.expand(modes, dim, dim)
        if not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-12):
            raise ValueError("covariance must be symmetric")
        variance, rotation = torch.linalg.eigh((matrix + matrix.mT) / 2)
        if not bool((variance > 0).all()):
            raise ValueError(
                "covariance must be positive definite, got a smallest eigenvalue"
                f" {float(variance.min()):.3g}"
            )
        return variance, rotation

    # -- ready-made mixtures ---------------------------------------------------------------------

    @classmethod
    def paper(cls) -> GaussianMixture:
        r"""Two unequal Gaussians, :math:`0.8 \mathcal N([3, 3], I) + 0.2 \mathcal N([-3, -3], I)`.

        References:
            | Efficient Online Reinforcement Learning for Diffusion Policy (Ma et al., 2025), (30)
            | https://arxiv.org/abs/2502.00361
        """
        return cls(
            torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), 1.0, weights=[0.8, 0.2], name="paper-mixture"
        )

    @classmethod
    def gmm40(cls, dim: int = 2, *, std: float = math.log1p(math.e)) -> GaussianMixture:
        r"""Forty equal isotropic Gaussians, their means uniform on :math:`[-40, 40]^d`.

        In the plane, with the standard deviation softplus(1) = 1.3133, the entropy is 6.858 nats,
        and two of the means are 1.18 apart.

        Arguments:
            dim: Number of coordinates. Published tables in 50 dimensions have means of another
                generator and a standard deviation of 1.
            std: Standard deviation of each mode.

        Note:
            The log-density is left unclipped; public versions set it to minus infinity below a
            threshold.

        References:
            | Flow Annealed Importance Sampling Bootstrap (Midgley et al., 2023)
            | https://arxiv.org/abs/2208.01893
        """
        generator = torch.Generator().manual_seed(0)
        loc = (torch.rand(40, dim, generator=generator, dtype=torch.float32) - 0.5) * 2 * 40
        return cls(loc, std, name="gmm40" if dim == 2 else f"gmm40-{dim}d")

    @classmethod
    def grid(
        cls, modes: int = 9, *, spacing: float = 5.0, std: float = math.sqrt(0.3), dim: int = 2
    ) -> GaussianMixture:
        r"""Equal isotropic Gaussians on a square grid around the origin.

        Arguments:
            modes: Number of modes, a `dim`-th power.
            spacing: Distance of neighbours.
            std: Standard deviation of each mode. The default makes the nine-mode grid of path
                integral samplers.
            dim: Number of coordinates.

        Returns:
            The mixture.

        Raises:
            ValueError: If `modes` is not a `dim`-th power, or `spacing` is not positive.
        """
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        side = round(modes ** (1 / dim)) if modes > 0 else 0
        if side < 1 or side**dim != modes:
            raise ValueError(
                f"modes must be a whole number to the power of dim = {dim}, got {modes}"
            )
        if not spacing > 0:
            raise ValueError(f"spacing must be positive, got {spacing}")
        line = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
        return cls(torch.cartesian_prod(*[line] * dim).reshape(-1, dim), std, name=f"grid{modes}")

    @classmethod
    def random(
        cls,
        dim: int,
        modes: int,
        *,
        min_separation: float = 6.0,
        min_weight: float = 0.05,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> GaussianMixture:
        r"""Random means and weights, every mode apart from the others and heavy enough to matter.

        Means are uniform in a centred cube that is widened until they fit, each at least
        `min_separation` from the ones before it. Weights are `min_weight` plus a uniform share of
        the rest.

        Arguments:
            dim: Number of coordinates.
            modes: Number of modes.
            min_separation: Smallest distance of two means.
            min_weight: Smallest weight, at most one over `modes`.
            std: Standard deviation of each mode.
            generator: Source of randomness, on the CPU.

        Returns:
            The mixture.

        Raises:
            ValueError: If `modes` or `dim` is below one, `min_separation` is negative, or
                `min_weight` does not fit.
        """
        if dim < 1 or modes < 1:
            raise ValueError(f"dim and modes must be at least 1, got {dim} and {modes}")
        if not min_separation >= 0:
            raise ValueError(f"min_separation must not be negative, got {min_separation}")
        if not 0 <= min_weight <= 1 / modes:
            raise ValueError(
                f"min_weight must lie in [0, 1 / modes] = [0, {1 / modes:.4g}], got {min_weight}"
            )
        half = max(min_separation, std) * modes ** (1 / dim) / 2
        loc = torch.empty(0, dim, dtype=torch.float64)
        while len(loc) < modes:
            place = (2 * torch.rand(1, dim, generator=generator, dtype=torch.float64) - 1) * half
            if bool((torch.linalg.vector_norm(loc - place, dim=-1) >= min_separation).all()):
                loc = torch.cat([loc, place])
            else:
                half *= 1.02
        share = (
            -torch.rand(modes, generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
        )
        weights = min_weight + (1 - modes * min_weight) * share / share.sum()
        return cls(
            loc, std, weights=weights.clamp_min(1e-300), name=f"random-mixture-{modes}x{dim}d"
        )

    # -- the law and its noised versions ---------------------------------------------------------

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        loc, variance, log_weight = self._constants.like(x, "loc", "variance", "log_weight")
        rotation = None if self.rotation is None else self._constants.like(x, "rotation")[0]
        return loc, variance, rotation, log_weight

    def _marginal_variance(self) -> Tensor:
        """Variance of every coordinate in every component, with shape (m, dim)."""
        if self.rotation is None:
            return self.variance
        return torch.einsum("kij,kj->ki", self.rotation**2, self.variance)

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Minus the log-density."""
        return -_log_parts(x, *self._parts(x)).logsumexp(-1)

    def log_prob(
        self, x: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float = 0.0
    ) -> Float[Tensor, "*batch"]:
        r"""Log-density of the law of :math:`x_0 + \sigma \epsilon`.

        Arguments:
            x: Points with shape :math:`(*, d)`, in variance-exploding coordinates.
            sigma: Noise level, a number or a tensor that broadcasts to :math:`(*)`.

        Returns:
            The log-densities :math:`\log p_\sigma(x)`, with shape :math:`(*)`.
        """
        self._check(x)
        loc, variance, rotation, log_weight = self._parts(x)
        return _log_parts(
            x, loc, variance + _widen(sigma, x) ** 2, rotation, log_weight
        ).logsumexp(-1)

    def score(
        self, x: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float = 0.0
    ) -> Float[Tensor, "*batch dim"]:
        r"""Score :math:`\nabla \log p_\sigma(x)`, with shape :math:`(*, d)`."""
        self._check(x)
        loc, variance, rotation, log_weight = self._parts(x)
        return _score(x, loc, variance + _widen(sigma, x) ** 2, rotation, log_weight)

    def denoiser(
        self,
        x: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float = 0.0,
        context: Tensor | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        r"""Mean of :math:`x_0` given the noisy :math:`x`: the exact denoiser.

        By Tweedie's formula it is :math:`x + \sigma^2` times the score.

        Arguments:
            x: Points with shape :math:`(*, d)`, in variance-exploding coordinates.
            sigma: Noise level, a number or a tensor that broadcasts to :math:`(*)`.
            context: Ignored; samplers pass one to every denoiser.

        Returns:
            The posterior means :math:`E[x_0 | x]`, with shape :math:`(*, d)`.
        """
        self._check(x)
        return _denoise(x, _widen(sigma, x), *self._parts(x))

    def responsibilities(
        self, x: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float = 0.0
    ) -> Float[Tensor, "*batch modes"]:
        r"""Posterior probability of components, shape :math:`(*, m)`; arguments as `log_prob`."""
        self._check(x)
        loc, variance, rotation, log_weight = self._parts(x)
        return _log_parts(x, loc, variance + _widen(sigma, x) ** 2, rotation, log_weight).softmax(
            -1
        )

    def noised(self, sigma: float) -> GaussianMixture:
        r"""The law of :math:`x_0 + \sigma \epsilon` as a target of its own."""
        if not (sigma >= 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma must be finite and not negative, got {sigma}")
        return GaussianMixture(
            self.loc,
            covariance=self.covariances + sigma**2 * torch.eye(self.dim, dtype=torch.float64),
            weights=self.weights,
            name=self.name,
        )

    @property
    def covariances(self) -> Float[Tensor, "modes dim dim"]:
        r"""Covariances of the components, float64, with shape :math:`(m, d, d)`."""
        if self.rotation is None:
            return torch.diag_embed(self.variance)
        return torch.einsum("kij,kj,klj->kil", self.rotation, self.variance, self.rotation)

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        r"""Mean of the mixture, float64, with shape :math:`(d)`."""
        return self.weights @ self.loc

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        r"""Covariance of the mixture, float64, with shape :math:`(d, d)`."""
        apart = self.loc - self.mean
        return torch.einsum(
            "k,kij->ij", self.weights, self.covariances + apart[:, :, None] * apart[:, None, :]
        )

    def marginal_cdf(
        self, x: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float = 0.0
    ) -> Float[Tensor, "*batch dim"]:
        r"""CDF of every coordinate, with shape :math:`(*, d)`; arguments as `log_prob`."""
        self._check(x)
        loc, weights = self.loc.to(x), self.weights.to(x)
        std = (self._marginal_variance().to(x) + _widen(sigma, x) ** 2).sqrt()
        return (weights[:, None] * torch.special.ndtr((x.unsqueeze(-2) - loc) / std)).sum(-2)

    def cell_masses(
        self,
        edges_x: Float[Tensor, " nx"],
        edges_y: Float[Tensor, " ny"] | None = None,
        *,
        tolerance: float = 1e-8,
    ) -> Float[Tensor, "*cells"]:
        """Cell probabilities, in closed form unless a covariance is full."""
        if self.rotation is not None and self.dim > 1:
            return super().cell_masses(edges_x, edges_y, tolerance=tolerance)
        edges = self._edges(edges_x, edges_y)
        std = self._marginal_variance().sqrt()
        slabs = []
        for i, e in enumerate(edges):
            z = (e - self.loc[:, i, None]) / std[:, i, None]
            # reflect intervals on the right, so that a far tail is not a difference of ones
            left, right = z[:, :-1], z[:, 1:]
            flip = left > 0
            slabs.append(
                torch.special.ndtr(torch.where(flip, -left, right))
                - torch.special.ndtr(torch.where(flip, -right, left))
            )
        if len(slabs) == 1:
            return self.weights @ slabs[0]
        return torch.einsum("k,ki,kj->ij", self.weights, *slabs)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        u = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
        noise = torch.randn(n, self.dim, dtype=torch.float64, generator=generator, device=device)
        cumulative = self.weights.cumsum(0).to(device)
        component = torch.searchsorted(cumulative, u, right=True).clamp_max(len(self.loc) - 1)
        step = self.variance.sqrt().to(device)[component] * noise
        if self.rotation is not None:
            step = torch.einsum("nij,nj->ni", self.rotation.to(device)[component], step)
        return self.loc.to(device)[component] + step
