r"""Weighted samples of the target: what a search ends with and loss (13) trains on.

Independent draws :math:`x_i \sim q` of a known density have :math:`\log w_i = -E(x_i) -
\log q(x_i)`, and :math:`\log \frac1n \sum_i w_i` estimates log Z. Chains and given data have
equal weights, and no estimate of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rsm_sampler.montecarlo.densities import Density, density_from_state, weighted_moments
from rsm_sampler.montecarlo.weights import LogWeights

__all__ = ["Bank", "Evaluate"]

Evaluate = Callable[[Tensor, Tensor | None], Tensor]
"""Energy of points (n, dim) with contexts (n, context_dim) or None, in unbounded coordinates."""


_HEAVY = 0.5  # Pareto shape beyond which weights have no variance


@dataclass
class Bank:
    """Weighted samples of the target, by context.

    Attributes:
        points: Points, (rows, columns, dim); one row without contexts.
        log_weight: Importance log-weights, (rows, columns), up to a constant in each row.
        context: The context of each row, (rows, context_dim), or None.
        loc: Weighted mean of all points, (dim).
        scale_tril: Cholesky factor of their weighted covariance, (dim, dim).
        method: ``"bank"`` for independent draws with exact weights, ``"chains"`` for dependent
            draws of equal weight, ``"paths"`` for draws of a sampler resampled by the weights of
            their paths, ``"samples"`` for given data.
        log_z: Estimate of log Z (of the mean over contexts, with contexts).
        log_z_se: Its standard error; NaN for chains.
        ess: Effective sample size, summed over rows; for chains the size of the population.
        density: What the points were drawn from; None for chains.
        gradient: Gradients of the energy at the points, (rows, columns, dim), NaN where there is
            none; None for none at all.
    """

    points: Tensor
    log_weight: Tensor
    context: Tensor | None
    loc: Tensor
    scale_tril: Tensor
    method: str
    log_z: float
    log_z_se: float
    ess: float
    density: Density | None = None
    gradient: Tensor | None = None

    @classmethod
    def of_draws(
        cls, points: Tensor, log_weight: Tensor, context: Tensor | None, density: Density
    ) -> "Bank":
        """A bank of independent draws with exact weights; it works out the rest."""
        weights = LogWeights(log_weight)
        loc, scale_tril = weighted_moments(points, weights.normalised() / len(log_weight))
        # A heavy tail hides a part of Z that the spread of the weights seen does not show.
        hidden = 0.0
        row = LogWeights(log_weight[0])
        if context is None and row.pareto_shape() > _HEAVY:
            hidden = min(1.0, row.unseen())
        error = float(weights.log_mean_se().mean()) / math.sqrt(len(log_weight))
        return cls(
            points=points,
            log_weight=log_weight,
            context=context,
            loc=loc,
            scale_tril=scale_tril,
            method="bank",
            log_z=float(weights.log_mean().mean()),
            log_z_se=math.hypot(error, hidden),
            ess=float(weights.ess().sum()),
            density=density,
        )

    @classmethod
    def of_samples(
        cls,
        points: Tensor,
        *,
        method: str = "samples",
        log_z: float = math.nan,
        log_z_se: float = math.nan,
        ess: float | None = None,
    ) -> "Bank":
        """A bank of equally weighted points (n, dim)."""
        loc, scale_tril = weighted_moments(points, torch.full_like(points[:, 0], 1 / len(points)))
        return cls(
            points=points[None],
            log_weight=torch.zeros_like(points[None, :, 0]),
            context=None,
            loc=loc,
            scale_tril=scale_tril,
            method=method,
            log_z=log_z,
            log_z_se=log_z_se,
            ess=float(len(points)) if ess is None else ess,
        )

    def extended(self, n: int, evaluate: Evaluate, generator: torch.Generator) -> "Bank":
        """The bank with n more draws of the same density; without contexts only."""
        assert self.density is not None and self.context is None
        x = self.density.sample(n, generator)
        energy = evaluate(x, None).to(x.dtype)
        log_weight = torch.where(
            energy < torch.inf, -energy - self.density.log_prob(x), -torch.inf
        )
        return Bank.of_draws(
            torch.cat([self.points, x[None]], 1),
            torch.cat([self.log_weight, log_weight[None]], 1),
            None,
            self.density,
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same bank again."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        state["density"] = None if self.density is None else self.density.state()
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Bank":
        """The bank of :meth:`state`."""
        state = {"gradient": None, **state}
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()
        }
        if state["density"] is not None:
            moved["density"] = density_from_state(state["density"], device)
        return cls(**moved)
