r"""Bayesian logistic regression: the posterior of a classifier's weights.

With standardised features :math:`z_i \in \mathbb R^{d - 1}`, a one in front of them for the
intercept, labels :math:`y_i \in \{0, 1\}` and a normal prior,

.. math:: E(w) = \sum_i \log \big(1 + e^{-(2 y_i - 1)\, w \cdot (1, z_i)}\big)
    + \frac{\|w\|^2}{2 \tau^2} + d \log(\tau \sqrt{2 \pi}) ,

normalised as likelihood times prior: :math:`\log Z` is the log-evidence.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from energies.chains import long_chains
from energies.target import Constants, Target
from rsm_sampler.checked import checked

__all__ = ["LogisticRegression"]


@checked(finite=("features",))
class LogisticRegression(Target):
    """Posterior of the weights of a logistic regression.

    Arguments:
        features: Features, with shape (n, d - 1); they are standardised here.
        labels: Labels, 0 or 1, with shape (n).
        prior_std: Standard deviation of the prior of every weight, the intercept's included.
        name: Name for reports.

    Attributes:
        mode: The most likely weights, with shape (d).
        covariance: Inverse of the energy's Hessian there, with shape (d, d).
        log_z_laplace: Laplace's approximation of log Z, from both.

    Raises:
        ValueError: If shapes do not fit, or a label is neither 0 nor 1.
    """

    def __init__(
        self,
        features: Float[Tensor, "n k"],
        labels: Float[Tensor, " n"],
        *,
        prior_std: float = 1.0,
        name: str = "logistic-regression",
    ) -> None:
        features = torch.as_tensor(features, dtype=torch.float64)
        labels = torch.as_tensor(labels, dtype=torch.float64)
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) < 2:
            raise ValueError(
                "features and labels must have shapes (n, k) and (n), n at least 2, got "
                f"{tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(f"labels must be 0 or 1, got {labels.unique().tolist()[:5]}")
        if not (prior_std > 0 and math.isfinite(prior_std)):
            raise ValueError(f"prior_std must be positive and finite, got {prior_std}")
        self.prior_std = float(prior_std)
        spread = features.std(0, correction=0)
        standard = (features - features.mean(0)) / torch.where(spread > 0, spread, 1.0)
        rows = torch.cat([torch.ones(len(labels), 1, dtype=torch.float64), standard], 1)
        self._constants = Constants(signed=(2 * labels - 1).unsqueeze(-1) * rows)
        dim = rows.shape[1]
        self.mode, hessian = self._newton(dim)
        self.covariance = torch.linalg.inv(hessian)
        half = 0.5 * dim * math.log(2 * math.pi) - 0.5 * float(torch.logdet(hessian))
        self.log_z_laplace = half - float(self.energy(self.mode))
        reach = 8 * self.covariance.diagonal().sqrt()
        super().__init__(dim=dim, name=name, extent=(self.mode - reach, self.mode + reach))

    @classmethod
    def breast_cancer(cls, *, prior_std: float = 1.0) -> LogisticRegression:
        """569 tumours, benign or not, by 30 features: a posterior in 31 dimensions.

        The data ship with scikit-learn.

        Note:
            A published version of this target leaves out the prior; without it the classes can
            nearly be separated, and weights run far out.

        Raises:
            ImportError: Without scikit-learn.

        References:
            | Nuclear feature extraction for breast tumor diagnosis (Street et al., 1993)
            | https://doi.org/10.1117/12.148698
        """
        try:
            from sklearn.datasets import load_breast_cancer
        except ImportError as error:
            raise ImportError(
                "breast_cancer needs scikit-learn: pip install 'rsm-sampler[data]'", name="sklearn"
            ) from error
        features, labels = load_breast_cancer(return_X_y=True)
        return cls(
            torch.from_numpy(features),
            torch.from_numpy(labels).double(),
            prior_std=prior_std,
            name="breast-cancer",
        )

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Minus the log of likelihood times prior."""
        (signed,) = self._constants.like(x, "signed")
        misfit = torch.nn.functional.softplus(-(x @ signed.mT)).sum(-1)
        prior = 0.5 * x.square().sum(-1) / self.prior_std**2
        return misfit + prior + x.shape[-1] * math.log(self.prior_std * math.sqrt(2 * math.pi))

    def _newton(self, dim: int) -> tuple[Tensor, Tensor]:
        """Mode and Hessian of a strictly convex energy."""
        (signed,) = self._constants.like(torch.zeros(1, dtype=torch.float64), "signed")
        precision = torch.eye(dim, dtype=torch.float64) / self.prior_std**2

        def at(w: Tensor) -> tuple[Tensor, Tensor]:
            p = torch.sigmoid(-(signed @ w))
            gradient = precision @ w - signed.mT @ p
            return gradient, precision + signed.mT @ ((p * (1 - p)).unsqueeze(-1) * signed)

        w = torch.zeros(dim, dtype=torch.float64)
        for _ in range(100):
            gradient, hessian = at(w)
            step, size = torch.linalg.solve(hessian, gradient), 1.0
            while self.energy(w - size * step) > self.energy(w) and size > 1e-8:
                size /= 2
            w = w - size * step
            if float(gradient.abs().max()) < 1e-11:
                break
        return w, at(w)[1]

    def reference(
        self,
        n: int,
        *,
        chains: int = 200,
        burn_in: int = 1000,
        thinning: int = 50,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Samples of long Metropolis-adjusted Langevin chains, in whitened coordinates.

        Arguments:
            n: Number of samples.
            chains: Number of chains; they start from twice the width of Laplace's approximation.
            burn_in: Least number of steps before the first sample.
            thinning: Steps between two samples of a chain.
            generator: Source of randomness.

        Returns:
            The samples, float64, chain after chain.
        """
        factor = torch.linalg.cholesky(self.covariance)
        found = long_chains(
            lambda z: self.energy(self.mode + z @ factor.mT),
            2 * torch.randn(chains, self.dim, dtype=torch.float64, generator=generator),
            n,
            burn_in=burn_in,
            thinning=thinning,
            step_size=0.5,
            generator=generator,
        )
        return self.mode + found @ factor.mT
