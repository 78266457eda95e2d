r"""Gaussian mixtures fitted to many small sets of points at once, and their entropies.

Expectation and maximisation for b sets of n points in d dimensions, each with its own mixture of
k components of full covariance,

.. math:: r_{ij} \propto w_j\, \mathcal N(x_i; m_j, S_j), \qquad
          w_j = \tfrac1n \sum_i r_{ij}, \quad
          m_j = \frac{\sum_i r_{ij} x_i}{\sum_i r_{ij}}, \quad
          S_j = \frac{\sum_i r_{ij} (x_i - m_j)(x_i - m_j)^T}{\sum_i r_{ij}} + \rho I,

a fixed number of times, on the device of the points, without reading anything back.

Two numbers stand for the entropy of the law that the points are from, which has no formula for a
mixture. :meth:`GaussianMixtures.component_entropy` is the upper bound
:math:`-\sum_j w_j \log w_j + \sum_j w_j H(\mathcal N_j)`, too large by up to :math:`\log k` where
components lie on each other. :meth:`GaussianMixtures.cross_entropy` is the mean of
:math:`-\log p` over points: over those of the fit it is too small by half the number of parameters
for each point, over others too large by as much, if the law is a mixture of this kind.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = ["GaussianMixtures", "fit_mixtures"]


@dataclass(frozen=True)
class GaussianMixtures:
    """Mixtures, one for each of b sets of points.

    Attributes:
        weight: Probabilities of the components, (b, k).
        mean: Their means, (b, k, d).
        factor: Lower Cholesky factors of their covariances, (b, k, d, d).
    """

    weight: Float[Tensor, "b k"]
    mean: Float[Tensor, "b k d"]
    factor: Float[Tensor, "b k d d"]

    def log_joint(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n k"]:
        """Log-densities of points and components together."""
        offset = (x.unsqueeze(1) - self.mean.unsqueeze(2)).mT  # (b, k, d, n)
        solved = torch.linalg.solve_triangular(self.factor, offset, upper=False)
        square = solved.square().sum(-2)
        volume = self._log_volume.unsqueeze(-1) + 0.5 * x.shape[-1] * math.log(2 * math.pi)
        return (self.weight.log().unsqueeze(-1) - 0.5 * square - volume).mT

    def component_entropy(self) -> Float[Tensor, " b"]:
        """The upper bound by the components' entropies, in nats."""
        one = self._log_volume + 0.5 * self.mean.shape[-1] * math.log(2 * math.pi * math.e)
        return (self.weight * one).sum(-1) - torch.xlogy(self.weight, self.weight).sum(-1)

    def cross_entropy(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        """The mean of minus the log-density over points, in nats."""
        return -self.log_joint(x).logsumexp(-1).mean(-1)

    @property
    def _log_volume(self) -> Tensor:
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@checked
@torch.no_grad()
def fit_mixtures(
    x: Float[Tensor, "b n d"],
    components: int,
    *,
    iterations: int = 30,
    ridge: float = 1e-6,
    generator: torch.Generator | None = None,
) -> GaussianMixtures:
    """Mixtures fitted by expectation and maximisation.

    Arguments:
        x: Sets of points, (b, n, d).
        components: Number k of components of each mixture, at most n.
        iterations: How often the two steps are made.
        ridge: What is added to the variances.
        generator: Source of randomness, on the device of the points: their first means are points
            drawn at random.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> mixtures = fit_mixtures(torch.randn(5, 100, 2, generator=rng), 3, generator=rng)
        >>> mixtures.component_entropy().shape
        torch.Size([5])
    """
    b, n, d = x.shape
    if not 1 <= components <= n:
        raise ValueError(f"components must be from 1 to the {n} points, got {components}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    order = torch.rand((b, n), dtype=x.dtype, device=x.device, generator=generator).argsort(-1)
    first = order[:, :components].unsqueeze(-1).expand(-1, -1, d)
    weight = x.new_full((b, components), 1 / components)
    mean, eye = x.gather(1, first), torch.eye(d, dtype=x.dtype, device=x.device)
    centred = x - x.mean(1, keepdim=True)
    whole = centred.mT @ centred / n + ridge * eye
    factor = torch.linalg.cholesky_ex(whole)[0].unsqueeze(1).expand(-1, components, -1, -1)
    found = GaussianMixtures(weight, mean, factor)
    for _ in range(iterations):
        share = found.log_joint(x).softmax(-1).mT  # (b, k, n)
        total = share.sum(-1) + 1e-8
        mean = (share @ x) / total.unsqueeze(-1)
        offset = x.unsqueeze(1) - mean.unsqueeze(2)
        weighted = share.unsqueeze(-1) * offset
        covariance = weighted.mT @ offset / total[..., None, None] + ridge * eye
        factor = torch.linalg.cholesky_ex(covariance)[0]
        found = GaussianMixtures(total / total.sum(-1, keepdim=True), mean, factor)
    return found
