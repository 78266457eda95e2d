r"""The reverse kernel within a box, exact however far outside of it the noisy point lies.

Policies act in a box of actions, and many posteriors live in one of parameters. Draws of
:math:`\phi(x_0 | x_t)` that fall outside would be wasted or, cut to its faces, wrong: near a face
half of them pile up on it. Each coordinate of the kernel in a box is a truncated normal variable,
and the share of the normal law that falls into the box is its correction.

Where a clean point is known that the target may be concentrated about, as the action that a policy
has chosen, :class:`AnchoredKernel` spends a part of the candidates in its neighbourhood.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.kernels import Kernel, ReverseDraws, check_num_draws
from rsm_sampler.transitions import sigma_column

__all__ = ["AnchoredKernel", "TruncatedReverseKernel"]


@checked(infinite=("low", "high"))
class TruncatedReverseKernel(Kernel):
    r"""The reverse kernel within a box, each coordinate a truncated normal variable.

    For targets that vanish outside of the box, such as the policies of a bounded action space.
    The correction is constant per noisy point, the share of the normal law that falls into the
    box.

    Each coordinate is drawn by inverting its distribution function. On the side of the noisy
    point that faces the box, let :math:`c \ge 0` be the distance from it to the near edge and w
    the width of the box, in units of sigma. The depth :math:`\delta \in [0, w]` of the draw
    behind the near edge solves

    .. math:: \log \frac{\Phi(-c - \delta)}{\Phi(-c)} = \log\big(1 - v\,(1 - e^{g})\big), \qquad
              g = \log \frac{\Phi(-c - w)}{\Phi(-c)}, \quad v \sim \mathcal U(0, 1),

    and with :math:`\Phi(-x) = \frac12 e^{-x^2/2}\, \mathrm{erfcx}(x/\sqrt2)` the ratio of two
    tails is

    .. math:: \log \frac{\Phi(-c - \delta)}{\Phi(-c)} = -\delta \Big(c + \frac{\delta}{2}\Big)
              + \log \mathrm{erfcx}\Big(\frac{c + \delta}{\sqrt2}\Big)
              - \log \mathrm{erfcx}\Big(\frac{c}{\sqrt2}\Big),

    in which no large numbers cancel, however far outside the noisy point is. Two steps of
    Halley's method solve it to rounding. Boxes much narrower than sigma follow the exponential
    law into which the normal one turns there. If the noisy point is inside, the error function
    is inverted directly.

    Arguments:
        low: Lower end of the box, a number or of shape :math:`(\mathrm{dim})`; may be
            :math:`-\infty`.
        high: Upper end, likewise; may be :math:`\infty`.

    Raises:
        ValueError: If low is not less than high in every coordinate.

    Note:
        In single precision a draw does not go beyond 5.3 standard deviations from a noisy point
        that lies inside of the box (8.1 in double precision), where :math:`10^{-7}` of the law
        is.

    References:
        Draws of this law in a box are used by MaxEntDP (Dong et al., 2025)

    Example:
        >>> x_t = torch.tensor([[-500.0, 0.0, 500.0]])
        >>> x_0 = TruncatedReverseKernel(-1.0, 1.0).draw(x_t, 1.0, 1000).x_0
        >>> bool(x_0.abs().max() <= 1), x_0.mean(-2)[0, ::2].round(decimals=1)
        (True, tensor([-1.,  1.]))
    """

    bounded = True

    def __init__(
        self, low: Float[Tensor, " dim"] | float, high: Float[Tensor, " dim"] | float
    ) -> None:
        ordered = low < high  # of numbers no tensor is made: policies ask in every step
        if not (bool(ordered.all()) if isinstance(ordered, Tensor) else ordered):
            raise ValueError(f"low must be less than high, got {low} and {high}")
        self.low = low
        self.high = high

    @torch.no_grad()
    def draw(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        num_draws: int,
        *,
        generator: torch.Generator | None = None,
    ) -> ReverseDraws:
        """Candidates of every noisy point, all of them within the box."""
        check_num_draws(num_draws)
        column = sigma_column(sigma, x_t).unsqueeze(-2)
        centre = x_t.unsqueeze(-2)  # (*batch, 1, dim), as everything until the uniform draws
        low, high = self._edge(self.low, x_t), self._edge(self.high, x_t)
        above = (centre - low) > (
            high - centre
        )  # beyond the middle: mirror, to face the lower tail
        near = torch.where(above, high, low)
        far = torch.where(above, low, high)
        side = torch.where(above, -1.0, 1.0).to(x_t)  # the way from the near edge into the box
        distance = side * (near - centre) / column  # to the near edge: positive outside of the box
        width = (high - low) / column

        shape = (*x_t.shape[:-1], num_draws, x_t.shape[-1])
        v = torch.rand(shape, dtype=x_t.dtype, device=x_t.device, generator=generator)
        depth, log_mass_outside = _tail_depth(v, distance.clamp(min=0.0), width)
        step, log_mass_inside = _central_step(v, distance, side * (far - centre) / column)
        outside = distance >= 0
        x_0 = torch.where(
            outside, near + side * column * depth, centre + side * column * step
        ).clamp(low, high)
        log_mass = torch.where(outside, log_mass_outside, log_mass_inside).squeeze(-2).sum(-1)
        return ReverseDraws(x_0, x_t.new_zeros(()).expand(shape[:-1]), log_mass)

    @staticmethod
    def _edge(edge: Tensor | float, x: Tensor) -> Tensor:
        if isinstance(edge, Tensor):
            return edge.to(x)
        return torch.full((1,), edge, dtype=x.dtype, device=x.device)


@checked(infinite=("low", "high"))
class AnchoredKernel(Kernel):
    r"""The reverse kernel within a box, mixed with normal laws about a known clean point.

    .. math:: r(x_0 | x_t) = (1 - p)\, \phi_B(x_0 | x_t)
              + \frac{p}{J} \sum_{j=1}^J \mathcal N_B(x_0; a, s_j^2 I),

    every law cut to the box B, each with its fixed part of the candidates, all of them weighted
    by :math:`\phi / r`, which is at most :math:`1 / (1 - p)` times what it would be without
    anchors. Whatever the anchor a, the estimates are those of the same posterior; one that lies
    where the target is large spares most of the candidates that would miss it.

    Arguments:
        anchor: The clean points, one for each noisy point, :math:`(*, \mathrm{dim})`, in the box.
        low: Lower end of the box, a number or of shape :math:`(\mathrm{dim})`.
        high: Upper end, likewise.
        scales: The standard deviations :math:`s_j`, in units of x.
        share: The share p of candidates about the anchor, rounded down to a multiple of J.

    Raises:
        ValueError: If low is not less than high, a scale is not positive or the share is not
            within [0, 1).

    References:
        | Weighting by the mixture of all laws: Optimally combining sampling techniques for Monte
        | Carlo rendering (Veach and Guibas, 1995), the balance heuristic
        | https://doi.org/10.1145/218380.218498

    Example:
        >>> anchor = torch.full((5, 3), 0.4)
        >>> kernel = AnchoredKernel(anchor, -1.0, 1.0, scales=(0.1, 0.3))
        >>> kernel.draw(torch.zeros(5, 3), 2.0, 32).x_0.shape
        torch.Size([5, 32, 3])
    """

    bounded = True

    def __init__(
        self,
        anchor: Float[Tensor, "*batch dim"],
        low: Float[Tensor, " dim"] | float,
        high: Float[Tensor, " dim"] | float,
        *,
        scales: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
        share: float = 0.5,
    ) -> None:
        if not scales or not min(scales) > 0:
            raise ValueError(f"scales must be positive, got {scales}")
        if not 0 <= share < 1:
            raise ValueError(f"share must be in [0, 1), got {share}")
        self.anchor, self.scales, self.share = anchor, tuple(scales), share
        self.dim = anchor.shape[-1]
        self._inside = TruncatedReverseKernel(low, high)

    @torch.no_grad()
    def draw(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        num_draws: int,
        *,
        generator: torch.Generator | None = None,
    ) -> ReverseDraws:
        """Candidates of every noisy point, those of the reverse kernel first."""
        check_num_draws(num_draws)
        dim, laws = x_t.shape[-1], len(self.scales)
        each = int(self.share * num_draws) // laws
        reverse = self._inside.draw(x_t, sigma, num_draws - laws * each, generator=generator)
        if each == 0:
            return reverse
        scale = torch.cat([x_t.new_full((1,), s) for s in self.scales])  # filled on the device
        centre = self.anchor.to(x_t).unsqueeze(-2).expand(*x_t.shape[:-1], laws, dim)
        about = self._inside.draw(centre, scale, each, generator=generator)
        x_0 = torch.cat([reverse.x_0, about.x_0.flatten(-3, -2)], -2)
        assert reverse.log_constant is not None and about.log_constant is not None
        # Log-densities of the candidates (*batch, K) under the kernel, (*batch, K, J) of the rest.
        column = sigma_column(sigma, x_t)
        first = -0.5 * ((x_0 - x_t.unsqueeze(-2)) / column.unsqueeze(-2)).square().sum(-1)
        first = first - dim * column.log() - reverse.log_constant.unsqueeze(-1)
        square = (x_0 - self.anchor.to(x_t).unsqueeze(-2)).square().sum(-1, keepdim=True)
        rest = (
            -0.5 * square / scale.square() - dim * scale.log() - about.log_constant.unsqueeze(-2)
        )
        part = each / num_draws
        mixed = [first.unsqueeze(-1) + math.log(1 - laws * part), rest + math.log(part)]
        log_r = torch.logsumexp(torch.cat(mixed, -1), -1)
        return ReverseDraws(x_0, first - log_r, reverse.log_constant)


def _tail_depth(v: Tensor, distance: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Depth behind the near edge of a normal variable beyond it, and the log of its probability.

    distance >= 0 and width > 0 are in standard deviations, v is uniform on [0, 1).
    """
    root = math.sqrt(0.5)
    erfcx_near = torch.special.erfcx(distance * root)
    # g: the share of the tail that lies beyond the far edge, in logarithm
    ratio = torch.special.erfcx((distance + width) * root) / erfcx_near
    log_beyond = ratio.log() - width * (distance + width / 2)

    target = -torch.log1p(v * torch.expm1(log_beyond))
    hazard = math.sqrt(2 / math.pi) / erfcx_near
    convexity = 1 - (1 - hazard * (hazard - distance)) / (1 + 0.35 * target)
    depth = 2 * target / (hazard + (hazard.square() + 2 * convexity * target).sqrt())
    for _ in range(2):
        erfcx_here = torch.special.erfcx((distance + depth) * root)
        slope = math.sqrt(2 / math.pi) / erfcx_here
        error = depth * (distance + depth / 2) - torch.log(erfcx_here / erfcx_near) - target
        curvature = slope - distance - depth  # second derivative over the first
        depth = (depth - error / (slope - error * curvature / 2)).clamp(min=0.0)

    # A narrow box: the normal density is exponential within it, up to a factor 1 + O(width^2).
    tilt = ((distance + width / 2) * width).clamp(min=torch.finfo(v.dtype).tiny ** 0.5)
    log_tilted_mass = torch.log(-torch.expm1(-tilt) / tilt)
    narrow_depth = -width * torch.log1p(v * torch.expm1(-tilt)) / tilt
    narrow = width < 2 * torch.finfo(v.dtype).eps ** (1 / 3)
    depth = torch.where(narrow, narrow_depth, depth)
    log_mass = -distance.square() / 2 + torch.where(
        narrow,
        width.log() + log_tilted_mass - math.log(2 * math.pi) / 2,
        torch.log(erfcx_near / 2) + torch.log(-torch.expm1(log_beyond)),
    )
    return depth, log_mass


def _central_step(v: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """A normal variable within [near, far], near < 0 < far, and the log of its probability."""
    root = math.sqrt(0.5)
    erf_near, erf_far = torch.erf(near * root), torch.erf(far * root)
    limit = 1 - torch.finfo(v.dtype).eps / 2
    step = torch.erfinv(torch.lerp(erf_near, erf_far, v).clamp(-limit, limit)) / root
    return step, torch.log((erf_far - erf_near) / 2)
