r"""Adapting a mixture to weighted points: population Monte Carlo.

Expectation and maximisation over points :math:`x_i` of weights :math:`w_i` (sum one), with
:math:`r_{ik} = w_i\, a_k t_k(x_i) / \sum_l a_l t_l(x_i)`:

.. math:: a_k = \sum_i r_{ik}, \quad m_k = \sum_i r_{ik} x_i / a_k, \quad
    S_k = \sum_i r_{ik} (x_i - m_k)(x_i - m_k)^\top / a_k.

What few points say is mixed with what the component was before. From
:math:`n_k = a_k^2 / \sum_i r_{ik}^2` effective points the means and covariances of a component
with shape matrix :math:`L L^\top` have expected squared errors of about

.. math:: \frac{\operatorname{tr} C_k}{n_k}, \qquad
    \frac{\operatorname{tr} C_k^2 + (\operatorname{tr} C_k)^2}{n_k}, \qquad
    C_k = L^{-1} S_k L^{-\top},

and the trust in either is the share of its squared distance to the former value that this does not
explain: one minus the ratio, at least 0. Trust in a covariance is at most
:math:`n_k / (n_k + 2 d)`, for it may be singular.

References:
    | A well-conditioned estimator for large-dimensional covariance matrices
    | (Ledoit and Wolf, 2004)
    | https://doi.org/10.1016/S0047-259X(03)00096-4

    | Adaptive importance sampling in general mixture classes (Cappé et al., 2008)
    | https://doi.org/10.1007/s11222-008-9059-x
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsm_sampler.montecarlo.densities import Density, Mixture

__all__ = [
    "allocated", "cholesky", "extended", "local_share", "lower_root", "refitted", "split",
    "tails"
]  # fmt: skip

_LEAST_SHARE = 0.02  # of a component, in equal shares: it stays in sight
_DROPPED = 1e-3  # likewise: it is given up
_NEARBY = 1e-5  # responsibility below which a point says nothing of a component
_APART = 0.5  # of its standard deviation, each half of a split component moves


def tails(dim: int) -> float:
    """Degrees of freedom of components: fewer would waste draws in many dimensions.

    Arguments:
        dim: Length of a point.
    """
    return float(max(5, 4 * dim))


def cholesky(covariance: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """Cholesky factors, with a relative jitter of 1e-10 on the diagonal."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300)
    return torch.linalg.cholesky(covariance + 1e-10 * diagonal.diag_embed())


def lower_root(root: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """The lower triangular root of the covariance that has a root.

    By a QR decomposition: the covariance itself would hold only half of the digits.

    Arguments:
        root: A with A A^T the covariance.
    """
    upper = torch.linalg.qr(root.mT).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (sign[..., None] * upper).mT


def refitted(
    mixture: Mixture,
    x: Float[Tensor, "n dim"],
    weight: Float[Tensor, " n"],
    *,
    steps: int = 4,
    broad: Density | None = None,
) -> Mixture:
    """The mixture after steps of expectation and maximisation.

    Arguments:
        mixture: The mixture to start from.
        x: Points.
        weight: Their weights, of sum one.
        steps: Number of steps.
        broad: A new defensive component; the old one if None.
    """
    dim = x.shape[-1]
    broad = mixture.broad if broad is None else broad
    for _ in range(steps):
        _, terms = mixture.log_probs(x)
        own = torch.softmax(terms, -1)
        share = weight @ own
        kept = (share > _DROPPED / len(share)).nonzero()[:, 0]
        loc, tril = [], []
        for k in kept.tolist():
            near = (own[:, k] > _NEARBY).nonzero()[:, 0]
            r = weight[near] * own[near, k]
            total = r.sum().clamp(min=1e-300)
            effective = total.square() / r.square().sum().clamp(min=1e-300)
            r = r / total
            before = mixture.scale_tril[k]
            z = torch.linalg.solve_triangular(
                before, (x[near] - mixture.loc[k]).mT, upper=False
            ).mT
            shift = r @ z
            gap = z - shift
            covariance = (r[:, None] * gap).mT @ gap
            trace = covariance.trace()
            trust = _unexplained(trace / effective, shift.square().sum())
            loc.append(mixture.loc[k] + before @ (trust * shift))
            # About the mean that is taken.
            rest = (1 - trust) * shift
            covariance = covariance + rest[:, None] * rest
            trace, square = covariance.trace(), covariance.square().sum()
            identity = torch.eye(dim, dtype=x.dtype, device=x.device)
            away = (covariance - identity).square().sum()
            trust = _unexplained((square + trace.square()) / effective, away)
            trust = trust.minimum(effective / (effective + 2 * dim))
            shape = torch.lerp(identity, covariance, trust)
            tril.append(before @ shape @ before.mT)
        share = share[kept].clamp(min=_LEAST_SHARE / len(kept))
        mixture = Mixture(
            share / share.sum(),
            torch.stack(loc),
            cholesky(torch.stack(tril)),
            broad,
            mixture.df,
            share=mixture.share,
        )
    return mixture


def _unexplained(error: Tensor, square: Tensor) -> Tensor:
    """Share of a squared distance that an expected squared error does not explain."""
    return (1 - error / square.clamp(min=1e-300)).clamp(min=0.0)


def split(mixture: Mixture, most: int, poor: Bool[Tensor, " parts"]) -> Mixture:
    """Poor components of more than a quarter of an equal share in two, along their longest axes.

    Mean and covariance of the pair are those of the component.

    Arguments:
        mixture: The mixture.
        most: Most components of the result.
        poor: Which components may be split.
    """
    number = len(mixture.loc)
    order = mixture.weight.argsort(descending=True)
    order = order[poor[order] & (mixture.weight[order] > 0.25 / number)][: max(0, most - number)]
    if len(order) == 0:
        return mixture
    covariance = mixture.scale_tril @ mixture.scale_tril.mT
    value, vector = torch.linalg.eigh(covariance[order])
    step = _APART * vector[..., -1] * value[:, -1:].sqrt()
    covariance[order] -= step[:, :, None] * step[:, None, :]
    loc, weight = mixture.loc.clone(), mixture.weight.clone()
    loc[order] -= step
    weight[order] /= 2
    tril = cholesky(covariance)
    return Mixture(
        torch.cat([weight, weight[order]]),
        torch.cat([loc, loc[order] + 2 * step]),
        torch.cat([tril, tril[order]]),
        mixture.broad,
        mixture.df,
        share=mixture.share,
    )


def extended(
    mixture: Mixture, loc: Float[Tensor, "k dim"], scale_tril: Float[Tensor, "k dim dim"],
    share: float,
) -> Mixture:  # fmt: skip
    """The mixture with more components, which have a share together.

    Arguments:
        mixture: The mixture.
        loc: Their locations.
        scale_tril: Cholesky factors of their shapes.
        share: Their share of the result.
    """
    new = torch.full_like(loc[:, 0], share / len(loc))
    return Mixture(
        torch.cat([(1 - share) * mixture.weight, new]),
        torch.cat([mixture.loc, loc]),
        torch.cat([mixture.scale_tril, scale_tril]),
        mixture.broad,
        mixture.df,
        share=mixture.share,
    )


def allocated(
    mixture: Mixture,
    x: Float[Tensor, "n dim"],
    energy: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
) -> Mixture:
    r"""The mixture with shares that make the variance of its weights small.

    The variance of weights :math:`v = p / q` is least where :math:`\int p^2 t_k / q^2` is the same
    for all components. A step towards it, from points of weights :math:`w_i` (sum one), is

    .. math:: a_k \leftarrow \sqrt{a_k \textstyle\sum_i w_i v_i r_{ik}}

    up to a factor, with the weights :math:`v_i` that the points have under the mixture, truncated
    at :math:`\sqrt n` times their mean, and the shares
    :math:`r_{ik} = (1 - \delta) a_k t_k(x_i) / q(x_i)` of its components in the density.

    Arguments:
        mixture: The mixture.
        x: Points.
        energy: Their energies.
        weight: Their weights.

    References:
        | Optimal mixture weights in multiple importance sampling (He and Owen, 2014)
        | https://arxiv.org/abs/1411.3954
    """
    log_q, terms = mixture.log_probs(x)
    own = (terms - log_q[:, None]).exp()  # what the broad law reaches is none of theirs
    log_v = -energy - log_q
    v = (log_v - log_v.amax()).exp()
    mean = 1 / (weight @ (1 / v.clamp(min=1e-300)))  # of draws of the mixture
    v = v.clamp(max=float(mean) * math.sqrt(len(x)))
    share = (mixture.weight * ((weight * v) @ own)).sqrt().clamp(min=1e-300)
    share = (share / share.sum()).clamp(min=_LEAST_SHARE / len(share))
    return Mixture(
        share / share.sum(), mixture.loc, mixture.scale_tril, mixture.broad, mixture.df,
        share=mixture.share,
    )  # fmt: skip


def local_share(
    mixture: Mixture, x: Float[Tensor, "n dim"], energy: Float[Tensor, " n"]
) -> Float[Tensor, " parts"]:
    r"""Share of effective draws within each component, of draws of the mixture.

    .. math:: \frac{(\sum_i r_{ik} v_i)^2}{\sum_i r_{ik} \, \sum_i r_{ik} v_i^2}

    with the weights :math:`v_i = e^{-E(x_i)} / q(x_i)` and responsibilities :math:`r_{ik}`.

    Arguments:
        mixture: The mixture.
        x: Draws of it.
        energy: Their energies.
    """
    log_q, terms = mixture.log_probs(x)
    own = torch.softmax(terms, -1)
    log_v = torch.where(energy < torch.inf, -energy - log_q, -torch.inf)
    v = (log_v - log_v.amax()).exp().nan_to_num(0.0)
    square = (v @ own).square()
    return square / (own.sum(0) * (v.square() @ own)).clamp(min=1e-300)
