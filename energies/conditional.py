r"""A conditional energy with a known answer for every context.

Prior: a Gaussian mixture :math:`p(x) = \sum_k \pi_k \mathcal N(\mu_k, \Sigma_k)`.
Observation: :math:`c = A x + b + e` with :math:`e \sim \mathcal N(0, R)`. The energy is that of
the posterior, known up to the evidence:

.. math:: E(x, c) = -\log p(x) - \log \mathcal N(c; A x + b, R), \qquad Z(c) = p(c) .

Each component is updated as in a Kalman filter, with :math:`S_k = A \Sigma_k A^\top + R` and
:math:`G_k = \Sigma_k A^\top S_k^{-1}`:

.. math::
    p(x | c) &= \sum_k \pi_k(c)\,
    \mathcal N \big( \mu_k + G_k (c - A \mu_k - b),\; (I - G_k A) \Sigma_k \big), \\
    \pi_k(c) &\propto \pi_k\, \mathcal N(c; A \mu_k + b, S_k).

Weights and means move with the context and the covariances do not, so that scores and denoisers of
a whole batch of contexts cost one eigendecomposition per component, done once. How many modes are
alive depends on the context: an amortised sampler must get the split right, and not only the
places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from energies.gaussian_mixture import GaussianMixture, _denoise, _log_parts, _score, _widen
from energies.target import Constants
from rsm_sampler.checked import checked

__all__ = ["ConditionalMixture"]


@checked
class ConditionalMixture:
    r"""Posterior of a Gaussian-mixture prior under a linear observation, as :math:`E(x, c)`.

    Arguments:
        prior: Law of :math:`x`.
        matrix: Observation matrix :math:`A`, with shape :math:`(d_c, d)`.
        noise_std: Standard deviation of the observation noise, a number or one per observed
            coordinate.
        offset: Offset :math:`b`, with shape :math:`(d_c)`; zero if left out.
        name: Name for reports.

    Raises:
        ValueError: If shapes do not match or `noise_std` is not positive.

    Example:
        >>> task = ConditionalMixture.plane()
        >>> c = torch.tensor([0.0, 4.0])[:, None]  # two observations of the first coordinate
        >>> task(torch.zeros(2, 2), c).shape
        torch.Size([2])
        >>> [round(w, 3) for w in task.posterior(c[1]).mode_weights.tolist() if w > 0.001]
        [0.5, 0.4, 0.1]
    """

    def __init__(
        self,
        prior: GaussianMixture,
        matrix: Tensor,
        noise_std: float | Sequence[float] | Tensor,
        *,
        offset: Tensor | None = None,
        name: str = "conditional-mixture",
    ) -> None:
        matrix = torch.as_tensor(matrix, device="cpu").detach().to(torch.float64)
        if matrix.ndim != 2 or matrix.shape[0] < 1 or matrix.shape[1] != prior.dim:
            raise ValueError(
                f"matrix must have shape (context_dim, {prior.dim}), got {tuple(matrix.shape)}"
            )
        rows = len(matrix)
        std = torch.as_tensor(noise_std, dtype=torch.float64, device="cpu").detach()
        if std.shape not in ((), (rows,)) or not bool((std > 0).all()):
            raise ValueError(
                f"noise_std must be positive, one number or {rows}, got {std.tolist()}"
            )
        if offset is None:
            offset = torch.zeros(rows)
        shift = torch.as_tensor(offset, device="cpu").detach().to(torch.float64)
        if shift.shape != (rows,):
            raise ValueError(f"offset must have shape ({rows},), got {tuple(shift.shape)}")
        self.prior = prior
        self.dim = prior.dim
        self.context_dim = rows
        self.name = name
        self.matrix = matrix
        self.offset = shift
        self.noise_std = std.expand(rows).clone()

        covariance = prior.covariances
        seen = matrix @ covariance @ matrix.T + torch.diag(self.noise_std**2)
        gain = torch.linalg.solve(seen, matrix @ covariance).mT
        # Joseph's form stays symmetric positive definite where I - G A would round it away
        rest = torch.eye(prior.dim, dtype=torch.float64) - gain @ matrix
        after = rest @ covariance @ rest.mT + gain @ torch.diag(self.noise_std**2) @ gain.mT
        self.posterior_covariances = (after + after.mT) / 2
        variance, rotation = torch.linalg.eigh(self.posterior_covariances)
        seen_variance, seen_rotation = torch.linalg.eigh((seen + seen.mT) / 2)
        self._constants = Constants(
            matrix=matrix,
            offset=shift,
            std=self.noise_std,
            loc=prior.loc,
            gain=gain,
            variance=variance,
            rotation=rotation,
            log_weight=prior.weights.log(),
            seen_loc=prior.loc @ matrix.T + shift,
            seen_variance=seen_variance,
            seen_rotation=seen_rotation,
        )

    @classmethod
    def line(cls, noise_std: float = 1.5) -> ConditionalMixture:
        r"""One coordinate, three modes, observed with noise that leaves two of them alive."""
        prior = GaussianMixture(
            torch.tensor([[-3.0], [0.0], [3.0]]),
            torch.tensor([0.4, 0.6, 0.5]),
            weights=[0.3, 0.5, 0.2],
        )
        return cls(prior, torch.ones(1, 1), noise_std, name="conditional-line")

    @classmethod
    def plane(cls, noise_std: float = 0.7) -> ConditionalMixture:
        r"""Nine modes on a square grid of spacing four, observed in the first coordinate alone.

        The context picks a column, or two neighbouring ones; the weights within a column differ
        from each other and from column to column.
        """
        grid = GaussianMixture.grid(9, spacing=4.0, std=0.5)
        weights = [0.06, 0.14, 0.20, 0.05, 0.15, 0.10, 0.15, 0.12, 0.03]
        prior = GaussianMixture(grid.loc, 0.5, weights=weights)
        return cls(prior, torch.tensor([[1.0, 0.0]]), noise_std, name="conditional-plane")

    def __repr__(self) -> str:
        sizes = f"dim={self.dim}, context_dim={self.context_dim}"
        return f"{type(self).__name__}(name={self.name!r}, {sizes})"

    def _check(self, x: Tensor | None, context: Tensor) -> None:
        if x is not None and (x.ndim < 1 or x.shape[-1] != self.dim):
            raise ValueError(f"x must have shape (*, {self.dim}), got {tuple(x.shape)}")
        if context.ndim < 1 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"context must have shape (*, {self.context_dim}), got {tuple(context.shape)}"
            )

    def __call__(
        self, x: Float[Tensor, "*batch dim"], context: Float[Tensor, "*#batch context_dim"]
    ) -> Float[Tensor, "*batch"]:
        r"""Energy :math:`E(x, c)` of the posterior.

        Arguments:
            x: Points with shape :math:`(*, d)`.
            context: Observations with shape :math:`(*, d_c)`, broadcast against the batch of `x`.

        Returns:
            The energies, with shape :math:`(*)`.
        """
        self._check(x, context)
        matrix, offset, std = self._constants.like(x, "matrix", "offset", "std")
        misfit = (context - x @ matrix.T - offset) / std
        noise = (
            0.5 * (misfit**2).sum(-1)
            + std.log().sum()
            + 0.5 * self.context_dim * math.log(2 * math.pi)
        )
        return self.prior.energy(x) + noise

    def _evidence_parts(self, context: Tensor) -> Tensor:
        loc, variance, rotation, log_weight = self._constants.like(
            context, "seen_loc", "seen_variance", "seen_rotation", "log_weight"
        )
        return _log_parts(context, loc, variance, rotation, log_weight)

    def _posterior_parts(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loc, gain, seen_loc, variance, rotation = self._constants.like(
            context, "loc", "gain", "seen_loc", "variance", "rotation"
        )
        mean = loc + torch.einsum("kij,...kj->...ki", gain, context.unsqueeze(-2) - seen_loc)
        return mean, variance, rotation, self._evidence_parts(context).log_softmax(-1)

    def log_z(self, context: Float[Tensor, "*batch context_dim"]) -> Float[Tensor, "*batch"]:
        r"""Log-evidence :math:`\log p(c) = \log \int e^{-E(x, c)} dx`, with shape :math:`(*)`."""
        self._check(None, context)
        return self._evidence_parts(context).logsumexp(-1)

    def log_prob(
        self,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*#batch context_dim"],
        sigma: Float[Tensor, "*#batch"] | float = 0.0,
    ) -> Float[Tensor, "*batch"]:
        r"""Log-density of :math:`x_0 + \sigma \epsilon` with :math:`x_0` from the posterior.

        Arguments:
            x: Points with shape :math:`(*, d)`.
            context: Observations with shape :math:`(*, d_c)`, broadcast against the batch of `x`.
            sigma: Noise level, a number or a tensor that broadcasts to :math:`(*)`.
        """
        self._check(x, context)
        loc, variance, rotation, log_weight = self._posterior_parts(context)
        return _log_parts(
            x, loc, variance + _widen(sigma, x) ** 2, rotation, log_weight
        ).logsumexp(-1)

    def score(
        self,
        x: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*#batch context_dim"],
        sigma: Float[Tensor, "*#batch"] | float = 0.0,
    ) -> Float[Tensor, "*batch dim"]:
        r"""Score of the noised posterior, with shape :math:`(*, d)`; arguments as `log_prob`."""
        self._check(x, context)
        loc, variance, rotation, log_weight = self._posterior_parts(context)
        return _score(x, loc, variance + _widen(sigma, x) ** 2, rotation, log_weight)

    def denoiser(
        self,
        x: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        context: Float[Tensor, "*#batch context_dim"],
    ) -> Float[Tensor, "*batch dim"]:
        r"""Mean of :math:`x_0` given the noisy :math:`x` and the context, shape :math:`(*, d)`."""
        self._check(x, context)
        return _denoise(x, _widen(sigma, x), *self._posterior_parts(context))

    def posterior(self, context: Float[Tensor, " context_dim"]) -> GaussianMixture:
        r"""Exact posterior of one context: draws, CDFs, cell masses, and the noised laws.

        Arguments:
            context: One observation, with shape :math:`(d_c)`.

        Returns:
            The posterior, normalised: its `log_z` is 0 while that of the energy is :meth:`log_z`.
            All components are kept, those of vanishing weight included.

        Raises:
            ValueError: If `context` is not a single observation.
        """
        if context.shape != (self.context_dim,):
            raise ValueError(
                f"context must have shape ({self.context_dim},), got {tuple(context.shape)}"
            )
        mean, _, _, log_weight = self._posterior_parts(context.detach().to("cpu", torch.float64))
        weights = log_weight.exp().clamp_min(1e-300)
        name = f"{self.name}-posterior"
        diagonal = self.posterior_covariances.diagonal(dim1=-2, dim2=-1)
        if torch.equal(torch.diag_embed(diagonal), self.posterior_covariances):
            return GaussianMixture(mean, diagonal.sqrt(), weights=weights, name=name)
        return GaussianMixture(
            mean, covariance=self.posterior_covariances, weights=weights, name=name
        )

    def sample_context(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "n context_dim"]:
        r"""Observations drawn from the evidence :math:`p(c)`, with shape :math:`(n, d_c)`."""
        return self.sample_joint(n, generator, dtype=dtype, device=device)[1]

    def sample_joint(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n context_dim"]]:
        r"""Pairs of a prior draw and its observation; :math:`x` is a posterior draw for :math:`c`.

        Arguments:
            n: Number of pairs.
            generator: Source of randomness.
            dtype: Type of the result.
            device: Device of the result.

        Returns:
            The points with shape :math:`(n, d)` and the contexts with shape :math:`(n, d_c)`.
        """
        where = torch.device(device) if generator is None else generator.device
        x = self.prior.sample(n, generator=generator, dtype=torch.float64, device=where)
        noise = torch.randn(
            n, self.context_dim, dtype=torch.float64, generator=generator, device=where
        )
        matrix, offset, std = self._constants.like(x, "matrix", "offset", "std")
        context = x @ matrix.T + offset + std * noise
        return x.to(device=device, dtype=dtype), context.to(device=device, dtype=dtype)

    def sample(
        self,
        context: Float[Tensor, "*batch context_dim"],
        sample_shape: int | Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*shape dim"]:
        r"""Exact posterior draws for a batch of contexts.

        Arguments:
            context: Observations with shape :math:`(*, d_c)`.
            sample_shape: Shape of the draws for each context, or their number.
            generator: Source of randomness.

        Returns:
            The draws, with shape `sample_shape` :math:`+ (*, d)`, in the dtype and on the device
            of `context`.
        """
        self._check(None, context)
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        where = context.device if generator is None else generator.device
        with torch.no_grad():
            mean, variance, rotation, log_weight = self._posterior_parts(
                context.to(where, torch.float64)
            )
            full = (*shape, *context.shape[:-1])
            u = torch.rand(*full, 1, dtype=torch.float64, generator=generator, device=where)
            noise = torch.randn(
                *full, self.dim, dtype=torch.float64, generator=generator, device=where
            )
            component = (u > log_weight.exp().cumsum(-1)).sum(-1).clamp_max(mean.shape[-2] - 1)
            index = component[..., None, None].expand(*full, 1, self.dim)
            centre = mean.expand(*full, *mean.shape[-2:]).gather(-2, index).squeeze(-2)
            step = torch.einsum(
                "...ij,...j->...i", rotation[component], variance.sqrt()[component] * noise
            )
        return (centre + step).to(context)
