r"""Proposal densities of the search: what can be drawn from, and evaluated exactly.

Importance sampling is only as right as the density in its weights. Two laws serve: one broad
Student-t with the moments of what was found so far, and a mixture of small Student-t kernels,
each with the shape of its neighbourhood, over a share of the broad one. Polynomial tails keep
weights bounded where the target is wider than what was found.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus
from torch.special import ndtri

__all__ = [
    "Density",
    "Joint",
    "KernelDensity",
    "Mixture",
    "ScaleLadder",
    "StudentT",
    "density_from_state",
    "weighted_moments",
]

TAIL = 5.0  # degrees of freedom of the broad proposals
_ENTRIES = 500_000  # of a temporary tensor: 4 MB, which the cache bears


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

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same law again."""
        return {"loc": self.loc, "scale_tril": self.scale_tril, "df": self.df}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "StudentT":
        """The law of :meth:`state`."""
        return cls(state["loc"].to(device), state["scale_tril"].to(device), state["df"])

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
        near = n - num_broad
        index = torch.multinomial(self.weight, max(1, near), True, generator=generator)[:near]
        noise = torch.randn(
            len(index),
            white.shape[-1],
            dtype=white.dtype,
            device=white.device,
            generator=generator,
        )
        stretch = _stretch(len(index), TAIL, noise, generator)
        z = white[index] + (self.tril[index] @ noise.unsqueeze(-1)).squeeze(-1) * stretch
        x = self.broad.loc + z @ self.broad.scale_tril.mT
        return torch.cat([x, self.broad.sample(num_broad, generator)])

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
        for piece in self._whiten(x).split(max(1, _ENTRIES // len(offset))):
            exponent = torch.zeros(len(piece), len(offset), dtype=x.dtype, device=x.device)
            for axis in range(dim):
                gap = torch.addmm(-centred[:, axis], piece, inverse[:, axis].mT)
                exponent.addcmul_(gap, gap, value=1 / TAIL)
            pieces.append(torch.logsumexp(exponent.log1p_().mul_(-half).add_(offset), -1))
        near = torch.cat(pieces) + math.log1p(-self.share)
        return torch.logaddexp(near, self.broad.log_prob(x) + math.log(self.share))


class Mixture:
    r"""Student-t laws with shares of their own, and a share of a broad law.

    .. math:: q(x) = (1 - \delta) \sum_k a_k\, t_\nu(x; m_k, S_k) + \delta\, q_{\rm broad}(x)

    Arguments:
        weight: The shares :math:`a_k`, (K), summing to 1.
        loc: Locations, (K, dim).
        scale_tril: Cholesky factors of the shape matrices, (K, dim, dim).
        broad: The broad law.
        df: Degrees of freedom, a whole number.
        share: The share of the broad law, :math:`\delta`.
    """

    def __init__(
        self,
        weight: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        broad: "Density",
        df: float,
        *,
        share: float = 0.05,
    ) -> None:
        self.weight, self.loc, self.scale_tril = weight, loc, scale_tril
        self.broad, self.df, self.share = broad, df, share

    def sample(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n dim"]:
        """Draw n points, component by component, the broad ones last."""
        num_broad = round(self.share * n)
        # Whole numbers with the right expectation: systematic draws of the component.
        offset = torch.rand((), dtype=torch.float64, device=self.loc.device, generator=generator)
        edges = (self.weight.double().cumsum(0) * (n - num_broad) + offset).floor().long()
        edges[-1] = n - num_broad
        counts = edges.clamp(max=n - num_broad).diff(prepend=torch.zeros_like(edges[:1]))
        index = torch.arange(len(counts), device=self.loc.device).repeat_interleave(counts)
        noise = torch.randn(
            len(index), self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device,
            generator=generator,
        )  # fmt: skip
        stretch = _stretch(len(index), self.df, noise, generator)
        x = torch.empty_like(noise)
        for k, piece in enumerate(noise.split(counts.tolist())):
            x[index == k] = piece @ self.scale_tril[k].mT
        x = self.loc[index] + x * stretch
        return torch.cat([x, self.broad.sample(num_broad, generator)])

    def log_probs(
        self, x: Float[Tensor, "n dim"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n parts"]]:
        """Log-density, and the terms of the sum over components."""
        dim, parts = x.shape[-1], len(self.loc)
        identity = torch.eye(dim, dtype=x.dtype, device=x.device).expand_as(self.scale_tril)
        inverse = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
        centred = (inverse @ self.loc.unsqueeze(-1)).squeeze(-1)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        half, constant = _student_constants(dim, self.df)
        const = self.weight.log() - log_det + constant + math.log1p(-self.share)
        pieces = []
        for piece in x.split(max(1, _ENTRIES // parts)):
            square = piece.new_zeros(len(piece), parts)
            for axis in range(dim):  # roots are triangular
                root = inverse[:, axis, : axis + 1].mT
                gap = torch.addmm(-centred[:, axis], piece[:, : axis + 1], root)
                square.addcmul_(gap, gap, value=1 / self.df)
            pieces.append(square.log1p_().mul_(-half).add_(const))
        terms = torch.cat(pieces)
        log_q = torch.logsumexp(terms, -1)
        if self.share > 0:
            log_q = torch.logaddexp(log_q, self.broad.log_prob(x) + math.log(self.share))
        return log_q, terms

    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density."""
        return self.log_probs(x)[0]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same density again."""
        return {
            "parts": self.loc,
            "weight": self.weight,
            "tril": self.scale_tril,
            "broad": self.broad.state(),
            "tail": self.df,
            "share": self.share,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Mixture":
        """The density of :meth:`state`."""
        parts, weight, tril = (state[key].to(device) for key in ("parts", "weight", "tril"))
        broad = density_from_state(state["broad"], device)
        return cls(weight, parts, tril, broad, state["tail"], share=state["share"])


class ScaleLadder:
    r"""What is known of a target of which nothing is known: all scales about a centre.

    Coordinates with two bounds are uniform between them. The others have, about the centre, a
    normal law (a half-normal one of the distance to a single bound) with a scale that is
    log-uniform over a ladder: half of the draws have one scale for all these coordinates, half
    have a scale of its own for each,

    .. math:: q(x) = \tfrac12\, \tfrac1S \sum_s \prod_i N(x_i; m_i, s^2)
              + \tfrac12 \prod_i \tfrac1S \sum_s N(x_i; m_i, s^2).

    Its tails, :math:`|x|^{-d}` up to logarithms, are heavier than those of any law that can be
    normalised, up to the largest scale.

    Arguments:
        kind: For each coordinate 0 without bounds, 1 with a lower one, -1 with an upper one, 2
            with both, (dim).
        loc: The centre, in unbounded coordinates, (dim).
        scales: The ladder, increasing, (S).
    """

    def __init__(self, kind: Tensor, loc: Tensor, scales: Tensor) -> None:
        self.kind, self.loc, self.scales = kind, loc, scales
        self._box, self._free = kind == 2, kind == 0
        self._single = ~self._box & ~self._free

    @property
    def boxed(self) -> bool:
        """Whether all coordinates have two bounds: then it is the uniform law."""
        return bool(self._box.all())

    def sample(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n dim"]:
        """Draw n points, in no order."""
        return self.sample_with_scale(n, generator)[0]

    def sample_with_scale(
        self, n: int, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        """Draw n points, and the largest scale that was used for each."""
        dim = len(self.loc)
        like: dict[str, Any] = {"dtype": self.loc.dtype, "device": self.loc.device}
        pick = torch.randint(
            len(self.scales), (n, dim), generator=generator, device=self.loc.device
        )
        common = torch.rand(n, 1, generator=generator, **like) < 0.5
        pick = torch.where(common, pick[:, :1], pick)
        scale = self.scales[pick]
        uniform = torch.rand(n, dim, generator=generator, **like).clamp(1e-16, 1 - 1e-16)
        noise = torch.randn(n, dim, generator=generator, **like)
        distance = (scale * noise).abs().clamp(min=1e-300)
        unbounded = self.kind * _inverse_softplus(distance)
        u = torch.where(self._free, self.loc + scale * noise, unbounded)
        u = torch.where(self._box, ndtri(uniform), u)
        largest = torch.where(self._box, 0.0, scale).amax(-1)
        return u, largest

    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density."""
        return torch.cat([self._log_prob(piece) for piece in x.split(
            max(1, _ENTRIES // (len(self.scales) * x.shape[-1])))])  # fmt: skip

    def _log_prob(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        if bool(self._box.any()):
            u = x[:, self._box]
            total = -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
        rest = ~self._box
        if not bool(rest.any()):
            return total
        kind, u = self.kind[rest], x[:, rest]
        single = kind != 0
        signed = torch.where(single, kind * u, u)
        distance = torch.where(single, softplus(signed), u - self.loc[rest])
        volume = torch.where(single, logsigmoid(signed) + math.log(2.0), 0.0)
        scales = self.scales
        terms = -0.5 * (distance.unsqueeze(-1) / scales).square() - scales.log()
        terms = terms - 0.5 * math.log(2 * math.pi)  # (n, rest, S)
        number = math.log(len(scales))
        one = torch.logsumexp(terms.sum(-2), -1) - number
        each = (torch.logsumexp(terms, -1) - number).sum(-1)
        return total + volume.sum(-1) + torch.logaddexp(one, each) - math.log(2.0)

    def state(self) -> dict[str, Any]:
        """Tensors that make the same law again."""
        return {"kind": self.kind, "loc": self.loc, "scales": self.scales}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "ScaleLadder":
        """The law of :meth:`state`."""
        return cls(*(state[key].to(device) for key in ("kind", "loc", "scales")))


class Joint:
    r"""What points that were drawn from several laws in turn follow together.

    .. math:: q(x) = \frac{\sum_t n_t\, q_t(x)}{\sum_t n_t}

    Weights with this density are bounded by those of the best of the laws (deterministic mixture
    weights).

    Arguments:
        laws: The laws :math:`q_t`.
        counts: Numbers of draws :math:`n_t`.

    References:
        | Safe and effective importance sampling (Owen and Zhou, 2000)
        | https://doi.org/10.1080/01621459.2000.10473909
    """

    def __init__(self, laws: "Sequence[Density]", counts: Sequence[int]) -> None:
        self.laws, self.counts = list(laws), list(counts)

    def sample(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n dim"]:
        """Draw n points, of each law in turn in proportion to its count."""
        total, numbers, done = sum(self.counts), [], 0
        for i in range(len(self.counts)):
            until = round(n * sum(self.counts[: i + 1]) / total)
            numbers.append(until - done)
            done = until
        pairs = zip(self.laws, numbers, strict=True)
        parts = [law.sample(number, generator) for law, number in pairs if number]
        return torch.cat(parts) if parts else self.laws[0].sample(0, generator)

    def log_prob(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density."""
        total = sum(self.counts)
        terms = [
            law.log_prob(x) + math.log(count / total)
            for law, count in zip(self.laws, self.counts, strict=True)
        ]
        return torch.logsumexp(torch.stack(terms), 0)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same density again."""
        return {"laws": [law.state() for law in self.laws], "counts": self.counts}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Joint":
        """The density of :meth:`state`."""
        return cls([density_from_state(law, device) for law in state["laws"]], state["counts"])


Density = KernelDensity | Mixture | StudentT | ScaleLadder | Joint
"""What points are drawn from."""


def density_from_state(state: dict[str, Any], device: torch.device) -> Density:
    """The density of a ``state()``."""
    kinds: dict[str, type[Density]] = {
        "laws": Joint, "kind": ScaleLadder, "parts": Mixture, "white": KernelDensity
    }  # fmt: skip
    kind = next((kind for key, kind in kinds.items() if key in state), StudentT)
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


def _inverse_softplus(y: Tensor) -> Tensor:
    """log(e^y - 1), precise at both ends."""
    return torch.where(y > math.log(2), y + torch.log(-torch.expm1(-y)), torch.expm1(y).log())
