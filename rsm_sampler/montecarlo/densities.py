r"""Proposal densities of the search: what can be drawn from, and evaluated exactly.

Importance sampling is only as right as the density in its weights. Two laws serve: one broad
Student-t with the moments of what was found so far, and a mixture of small Student-t kernels,
each with the shape of its neighbourhood, over a share of the broad one. Polynomial tails keep
weights bounded where the target is wider than what was found.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Density",
    "KernelDensity",
    "Mixture",
    "StudentT",
    "density_from_state",
    "weighted_moments",
]

TAIL = 5.0  # degrees of freedom of the broad proposals


class StudentT:
    r"""Multivariate Student-t law, the broad proposal: tails no target here outruns quickly.

    Arguments:
        loc: Location, (dim).
        scale_tril: Cholesky factor of the shape matrix, (dim, dim).
        df: Degrees of freedom.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, df: float = TAIL) -> None:
        self.loc, self.scale_tril, self.df = loc, scale_tril, df

    def sample(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n dim"]:
        """Draw n points."""
        dim = len(self.loc)
        noise = torch.randn(
            n, dim, dtype=self.loc.dtype, device=self.loc.device, generator=generator
        )
        stretch = _stretch(n, self.df, noise, generator)
        return self.loc + (noise @ self.scale_tril.mT) * stretch

    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density."""
        dim = len(self.loc)
        z = torch.linalg.solve_triangular(self.scale_tril, (x - self.loc).mT, upper=False)
        half, constant = _student_constants(dim, self.df)
        log_det = self.scale_tril.diagonal().log().sum()
        return constant - log_det - half * torch.log1p(z.square().sum(0) / self.df)


def _student_constants(dim: int, df: float) -> tuple[float, float]:
    """Exponent and log normaliser of the Student-t law, for a unit shape matrix."""
    half = (df + dim) / 2
    return half, math.lgamma(half) - math.lgamma(df / 2) - 0.5 * dim * math.log(df * math.pi)


def _stretch(n: int, df: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """What turns normal draws into Student-t ones, (n, 1); df is a whole number here."""
    normal = torch.randn(n, int(df), dtype=like.dtype, device=like.device, generator=generator)
    return (df / normal.square().sum(-1, keepdim=True)).sqrt()


class KernelDensity:
    r"""Student-t kernels, each with the shape of its neighbourhood, mixed with a broad law.

    .. math:: q(x) = (1 - \delta) \sum_i a_i\, t_5(x; c_i, H_i)
              + \delta\, q_{\rm broad}(x)

    :math:`H_i` is :math:`(d + 2)/2` times the mean outer product of the differences to the k
    nearest neighbours, shrunk by :math:`d/(d + k)` towards a multiple of the identity in the
    broad law's metric. The tails reach where the neighbours do not.

    Arguments:
        centres: The M distinct centres, (M, dim).
        weight: Their shares :math:`a_i`, (M), summing to 1.
        broad: The broad law.
        share: Its share, :math:`\delta`.
        neighbours: k.
    """

    def __init__(
        self,
        centres: Tensor,
        weight: Tensor,
        broad: StudentT,
        *,
        share: float = 0.1,
        neighbours: int = 12,
    ) -> None:
        self.weight, self.broad, self.share = weight, broad, share
        self.white = self._whiten(centres)
        number, dim = centres.shape
        identity = torch.eye(dim, dtype=centres.dtype, device=centres.device)
        k = min(neighbours, number - 1)
        if k == 0:
            self.tril = identity.expand(number, dim, dim).clone()
            return
        distance = torch.cdist(self.white, self.white, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.topk(k + 1, largest=False).indices[:, 1:]
        gap = self.white[nearest] - self.white.unsqueeze(1)
        outer = gap.mT @ gap * ((dim + 2) / (2 * k))
        mean = outer.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        mean = torch.where(mean > 0, mean, 1.0)  # copies of one point have no neighbourhood
        shrink = dim / (dim + k)
        self.tril = torch.linalg.cholesky((1 - shrink) * outer + shrink * mean * identity)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same density again."""
        broad = self.broad
        return {
            "white": self.white,
            "weight": self.weight,
            "tril": self.tril,
            "loc": broad.loc,
            "scale_tril": broad.scale_tril,
            "df": broad.df,
            "share": self.share,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "KernelDensity":
        """The density of :meth:`state`."""
        density = cls.__new__(cls)
        density.broad = StudentT(
            state["loc"].to(device), state["scale_tril"].to(device), state["df"]
        )
        density.share = state["share"]
        density.white, density.weight, density.tril = (
            state[key].to(device) for key in ("white", "weight", "tril")
        )
        return density

    def _whiten(self, x: Tensor) -> Tensor:
        shifted = (x - self.broad.loc).mT
        return torch.linalg.solve_triangular(self.broad.scale_tril, shifted, upper=False).mT

    def sample(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n dim"]:
        """Draw n points, the broad ones last."""
        num_broad = round(self.share * n)
        white = self.white
        index = torch.multinomial(self.weight, n - num_broad, True, generator=generator)
        noise = torch.randn(
            len(index),
            white.shape[-1],
            dtype=white.dtype,
            device=white.device,
            generator=generator,
        )
        stretch = _stretch(len(index), TAIL, noise, generator)
        z = white[index] + (self.tril[index] @ noise.unsqueeze(-1)).squeeze(-1) * stretch
        near = self.broad.loc + z @ self.broad.scale_tril.mT
        return torch.cat([near, self.broad.sample(num_broad, generator)])

    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density, by all kernels."""
        dim = x.shape[-1]
        identity = torch.eye(dim, dtype=x.dtype, device=x.device).expand_as(self.tril)
        inverse = torch.linalg.solve_triangular(self.tril, identity, upper=False)
        centred = (inverse @ self.white.unsqueeze(-1)).squeeze(-1)
        log_det = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        half, constant = _student_constants(dim, TAIL)
        offset = self.weight.log() - log_det + constant
        offset = offset - self.broad.scale_tril.diagonal().log().sum()
        pieces = []
        for piece in self._whiten(x).split(max(1, 250_000 // len(offset))):
            exponent = torch.zeros(len(piece), len(offset), dtype=x.dtype, device=x.device)
            for axis in range(dim):
                gap = torch.addmm(-centred[:, axis], piece, inverse[:, axis].mT)
                exponent.addcmul_(gap, gap, value=1 / TAIL)
            pieces.append(torch.logsumexp(exponent.log1p_().mul_(-half).add_(offset), -1))
        near = torch.cat(pieces) + math.log1p(-self.share)
        return torch.logaddexp(near, self.broad.log_prob(x) + math.log(self.share))


class Mixture:
    r"""Student-t laws with shares of their own, and a twentieth of a broad law.

    .. math:: q(x) = (1 - \delta) \sum_k a_k\, t_\nu(x; m_k, S_k) + \delta\, q_{\rm broad}(x)

    Arguments:
        weight: The shares :math:`a_k`, (K), summing to 1.
        loc: Locations, (K, dim).
        scale_tril: Cholesky factors of the shape matrices, (K, dim, dim).
        broad: The broad law.
        df: Degrees of freedom.
        share: The share of the broad law, :math:`\delta`.
    """

    def __init__(
        self,
        weight: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        broad: StudentT,
        df: float,
        *,
        share: float = 0.05,
    ) -> None:
        self.weight, self.loc, self.scale_tril = weight, loc, scale_tril
        self.broad, self.df, self.share = broad, df, share
        self.parts = [StudentT(m, tril, df) for m, tril in zip(loc, scale_tril, strict=True)]

    def sample(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n dim"]:
        """Draw n points, component by component."""
        num_broad = round(self.share * n)
        # Whole numbers with the right expectation: systematic draws of the component.
        offset = torch.rand((), dtype=torch.float64, device=self.loc.device, generator=generator)
        edges = (self.weight.double().cumsum(0) * (n - num_broad) + offset).floor().long().tolist()
        edges[-1] = n - num_broad
        counts = [high - low for low, high in zip([0, *edges], edges, strict=False)]
        pieces = [
            part.sample(count, generator) for part, count in zip(self.parts, counts, strict=True)
        ]
        return torch.cat([*pieces, self.broad.sample(num_broad, generator)])

    def log_probs(
        self, x: Float[Tensor, "n dim"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n parts"]]:
        """Log-density, and the terms of the sum over components."""
        terms = torch.stack([part.log_prob(x) for part in self.parts], -1) + self.weight.log()
        terms = terms + math.log1p(-self.share)
        broad = self.broad.log_prob(x) + math.log(self.share)
        return torch.logaddexp(torch.logsumexp(terms, -1), broad), terms

    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density."""
        return self.log_probs(x)[0]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same density again."""
        broad = self.broad
        return {
            "parts": self.loc,
            "weight": self.weight,
            "tril": self.scale_tril,
            "loc": broad.loc,
            "scale_tril": broad.scale_tril,
            "df": broad.df,
            "tail": self.df,
            "share": self.share,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Mixture":
        """The density of :meth:`state`."""
        parts, weight, tril, loc, scale_tril = (
            state[key].to(device) for key in ("parts", "weight", "tril", "loc", "scale_tril")
        )
        broad = StudentT(loc, scale_tril, state["df"])
        return cls(weight, parts, tril, broad, state["tail"], share=state["share"])


Density = KernelDensity | Mixture
"""What a bank's points are drawn from."""


def density_from_state(state: dict[str, Any], device: torch.device) -> Density:
    """The density of a ``state()``."""
    kind = Mixture if "parts" in state else KernelDensity
    return kind.from_state(state, device)


def weighted_moments(
    points: Tensor, weight: Tensor, *, shrunk: bool = True
) -> tuple[Tensor, Tensor]:
    """Weighted mean and Cholesky factor of the covariance.

    Arguments:
        points: Points, with any leading dimensions.
        weight: Their weights, which sum to one.
        shrunk: Whether the covariance goes towards a diagonal one where there are few points.

    Returns:
        The mean, (dim), and the factor, (dim, dim).
    """
    dim = points.shape[-1]
    weight, x = weight.reshape(-1, 1), points.reshape(-1, dim)
    loc = (weight * x).sum(0)
    centred = x - loc
    covariance = (weight * centred).mT @ centred
    ess = float(1 / weight.square().sum())
    shrink = (dim / (dim + ess)) ** 2 if shrunk else 0.0
    diagonal = covariance.diagonal().clamp(min=1e-300)
    if dim > 1 and shrunk:  # the diagonal, too, goes towards its mean, on the log scale
        diagonal = torch.exp((1 - 1 / ess) * diagonal.log() + diagonal.log().mean() / ess)
    covariance = (1 - shrink) * covariance + shrink * diagonal.diag()
    return loc, torch.linalg.cholesky(covariance + 1e-12 * diagonal.diag())
