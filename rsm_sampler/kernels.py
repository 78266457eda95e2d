r"""Transition laws of the diffusion: forwards, in between, and backwards from a noisy point.

Everything is in variance-exploding coordinates, :math:`x_t = x_0 + \sigma_t \epsilon` (see
:mod:`rsm_sampler.schedules`). As a function of the clean point the forward density is itself a
normal law,

.. math:: q(x_t | x_0) = \mathcal N(x_t; x_0, \sigma^2 I)
          = \mathcal N(x_0; x_t, \sigma^2 I) = \phi(x_0 | x_t),

so clean candidates can be drawn *around a noisy point* with no sample of the target at hand.
This is the reverse sampling kernel (15). With an unnormalised target :math:`e^{-E}` the
posterior of the clean point is

.. math:: p(x_0 | x_t) \propto e^{-E(x_0)}\, \phi(x_0 | x_t),

and for candidates from any law r that covers it the importance weights are

.. math:: \log w_k = -E(x_{0,k}) +
          \underbrace{\log \phi(x_{0,k} | x_t) - \log r(x_{0,k} | x_t)}_{\text{correction}} .

A kernel draws the K candidates of every noisy point and reports the correction. It does so in
two parts, one that varies between the candidates and one that is constant for each noisy point:
the constant cancels in self-normalised weights, may be huge (a noisy point hundreds of standard
deviations outside of a box), and is wanted for one purpose only, the by-product
:math:`\log \frac1K \sum_k w_k \approx \log p_t(x_t) + \log Z`.

================================ ============================= ===============================
kernel                           candidates                    for
================================ ============================= ===============================
:class:`ReverseKernel`           :math:`\phi` itself           noise below the target's scale
:class:`GaussianReferenceKernel` :math:`\phi` times a wide law every noise level, any target
:class:`TruncatedReverseKernel`  :math:`\phi` within a box     bounded targets, actions
:class:`BankKernel`              points with known energies    expensive energies
================================ ============================= ===============================
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "BankKernel",
    "GaussianReferenceKernel",
    "Kernel",
    "ReverseDraws",
    "ReverseKernel",
    "TruncatedReverseKernel",
    "cumulative_weight",
    "forward_kernel",
    "forward_log_prob",
    "posterior",
    "sigma_column",
    "stratified_indices",
    "variance_exploding",
    "variance_preserving",
]


def sigma_column(
    sigma: Float[Tensor, "*#batch"] | float, x: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*#batch 1"]:
    r"""Noise scales with a last axis of size one, in the precision and on the device of x.

    Arguments:
        sigma: Noise scales, broadcastable to the batch shape of x.
        x: Points, with shape :math:`(*, \mathrm{dim})`.

    Returns:
        The noise scales, ready to multiply x.

    Raises:
        ValueError: If sigma is a negative number, or its shape does not broadcast to the batch
            shape of x.

    Example:
        >>> sigma_column(torch.tensor([1.0, 2.0]), torch.zeros(2, 3)).shape
        torch.Size([2, 1])
    """
    if not isinstance(sigma, Tensor):
        if not sigma >= 0:
            raise ValueError(f"sigma must be at least 0, got {sigma}")
        return torch.full((1,), float(sigma), dtype=x.dtype, device=x.device)
    batch = x.shape[:-1]
    lead = len(batch) - sigma.ndim
    if lead < 0 or any(s not in (1, b) for s, b in zip(sigma.shape, batch[lead:], strict=True)):
        raise ValueError(
            f"sigma must broadcast to the batch shape {tuple(batch)}, got {tuple(sigma.shape)}"
        )
    return sigma.to(dtype=x.dtype, device=x.device).unsqueeze(-1)


def variance_preserving(
    x: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float
) -> Float[Tensor, "*batch dim"]:
    r"""The paper's variable, :math:`\sqrt{\bar\alpha}\, x = x / \sqrt{1 + \sigma^2}`.

    Densities change with the volume:
    :math:`\log p^{\mathrm{VP}} = \log p + \frac{d}{2} \log(1 + \sigma^2)`.

    Arguments:
        x: Noisy points in variance-exploding coordinates, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, broadcastable to :math:`(*)`.

    Returns:
        The points in variance-preserving coordinates, with the shape of x.

    Example:
        >>> variance_preserving(torch.tensor([5.0]), 3.0 / 4.0)
        tensor([4.])
    """
    column = sigma_column(sigma, x)
    return x / torch.hypot(column, torch.ones_like(column))


def variance_exploding(
    x_vp: Float[Tensor, "*batch dim"], sigma: Float[Tensor, "*#batch"] | float
) -> Float[Tensor, "*batch dim"]:
    r"""Inverse of :func:`variance_preserving`, :math:`x = \sqrt{1 + \sigma^2}\, x^{\mathrm{VP}}`.

    Arguments:
        x_vp: Noisy points in the paper's coordinates, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales, broadcastable to :math:`(*)`.

    Returns:
        The points in variance-exploding coordinates, with the shape of x_vp.

    Example:
        >>> variance_exploding(torch.tensor([4.0]), 3.0 / 4.0)
        tensor([5.])
    """
    column = sigma_column(sigma, x_vp)
    return x_vp * torch.hypot(column, torch.ones_like(column))


def forward_kernel(
    x_0: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch dim"]:
    r"""Draw of the forward process, :math:`x_t = x_0 + \sigma\, \epsilon` with normal noise.

    Arguments:
        x_0: Clean points, with shape :math:`(*, \mathrm{dim})`.
        sigma: Noise scales in units of x, broadcastable to :math:`(*)`.
        generator: Source of randomness, on the device of x_0.

    Returns:
        Noisy points, with the shape of x_0.

    References:
        Equation (6), divided by :math:`\sqrt{\bar\alpha_t}`

    Example:
        >>> forward_kernel(torch.zeros(5, 2), torch.full((5,), 3.0)).shape
        torch.Size([5, 2])
    """
    noise = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device, generator=generator)
    return x_0 + sigma_column(sigma, x_0) * noise


def forward_log_prob(
    x_t: Float[Tensor, "*batch dim"],
    x_0: Float[Tensor, "*batch dim"],
    sigma: Float[Tensor, "*#batch"] | float,
) -> Float[Tensor, "*batch"]:
    r"""Log-density of the forward process, :math:`\log \mathcal N(x_t; x_0, \sigma^2 I)`.

    It is symmetric, hence also the log-density :math:`\log \phi(x_0 | x_t)` of the reverse
    kernel (15).

    Arguments:
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        x_0: Clean points, with the same shape.
        sigma: Noise scales, broadcastable to :math:`(*)`.

    Returns:
        The log-density in nats, with shape :math:`(*)`.

    References:
        Equations (6), (15) and (23)

    Example:
        >>> forward_log_prob(torch.zeros(2), torch.zeros(2), 1.0)
        tensor(-1.8379)
    """
    column = sigma_column(sigma, x_t)
    return _isotropic_log_prob((x_t - x_0) / column, column)


def posterior(
    x_t: Float[Tensor, "*batch dim"],
    x_0: Float[Tensor, "*batch dim"],
    sigma_t: Float[Tensor, "*#batch"] | float,
    sigma_s: Float[Tensor, "*#batch"] | float,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*#batch 1"]]:
    r"""Law of a point between a noisy and a clean one, :math:`q(x_s | x_t, x_0)` for s < t.

    .. math:: \mathcal N\Big(x_0 + \frac{\sigma_s^2}{\sigma_t^2} (x_t - x_0),\;
              \frac{\sigma_s^2 (\sigma_t^2 - \sigma_s^2)}{\sigma_t^2} I\Big)

    Arguments:
        x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
        x_0: Clean points, or their estimates, with the same shape.
        sigma_t: Noise scales of x_t, positive, broadcastable to :math:`(*)`.
        sigma_s: Noise scales of the wanted point, at most sigma_t.

    Returns:
        The mean, with the shape of x_t, and the standard deviation, with a last axis of size one
        so that ``mean + std * noise`` is a draw.

    References:
        Equation (8), with the square root of the variance in front of the noise

    Example:
        >>> mean, std = posterior(torch.tensor([4.0]), torch.tensor([0.0]), 2.0, 1.0)
        >>> mean, std.square()
        (tensor([1.]), tensor([0.7500]))
    """
    from_sigma, to_sigma = sigma_column(sigma_t, x_t), sigma_column(sigma_s, x_t)
    ratio = to_sigma / from_sigma
    std = ratio * ((from_sigma - to_sigma) * (from_sigma + to_sigma)).sqrt()
    return torch.lerp(x_0, x_t, ratio.square()), std


@dataclass(frozen=True)
class ReverseDraws:
    r"""K clean candidates for every noisy point.

    Attributes:
        x_0: Candidates, with shape :math:`(*, K, \mathrm{dim})`. It may be an expanded view of
            candidates that the whole batch shares: do not write to it.
        log_correction: :math:`\log \phi(x_0 | x_t) - \log r(x_0 | x_t)` up to a constant per
            noisy point, with shape :math:`(*, K)`.
        log_constant: That constant, with shape :math:`(*)`; None if the kernel does not know it.
    """

    x_0: Float[Tensor, "*batch draws dim"]
    log_correction: Float[Tensor, "*batch draws"]
    log_constant: Float[Tensor, "*batch"] | None = None


class Kernel(ABC):
    """A law of clean candidates given a noisy point.

    Attributes:
        bounded: Whether the candidates cover a part of space only. Targets made of energy
            gradients are then invalid, because they leave out what happens on the boundary.
        needs_energy: Whether the energy of the candidates has to be added to the correction. If
            not, the correction is the whole log-weight.
    """

    bounded: bool = False
    needs_energy: bool = True

    @abstractmethod
    def draw(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        num_draws: int,
        *,
        generator: torch.Generator | None = None,
    ) -> ReverseDraws:
        r"""Candidates of every noisy point, with their corrections.

        Arguments:
            x_t: Noisy points, with shape :math:`(*, \mathrm{dim})`.
            sigma: Noise scales, positive, broadcastable to :math:`(*)`.
            num_draws: The number K of candidates of each noisy point.
            generator: Source of randomness, on the device of x_t.

        Returns:
            The candidates.

        Raises:
            ValueError: If the kernel cannot make this number of draws.
        """


class ReverseKernel(Kernel):
    r"""The reverse sampling kernel, :math:`\phi(x_0 | x_t) = \mathcal N(x_0; x_t, \sigma^2 I)`.

    A candidate is :math:`x_t - \sigma \epsilon`, so that :math:`\epsilon` is the noise that
    leads from it to the noisy point. Where sigma is far larger than the target most candidates
    miss it; see :class:`GaussianReferenceKernel`.

    Arguments:
        antithetic: Whether candidates come in pairs :math:`x_t \mp \sigma \epsilon`: number k
            and number k + K/2. The noise then cancels exactly where the weights are equal. The
            number of draws must be even.

    References:
        Equation (15)

    Example:
        >>> draws = ReverseKernel(antithetic=True).draw(torch.ones(3, 2), 0.5, 8)
        >>> draws.x_0.shape, draws.x_0.mean(-2)[0]
        (torch.Size([3, 8, 2]), tensor([1., 1.]))
    """

    def __init__(self, antithetic: bool = False) -> None:
        self.antithetic = antithetic

    @torch.no_grad()
    def draw(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        num_draws: int,
        *,
        generator: torch.Generator | None = None,
    ) -> ReverseDraws:
        """Candidates of every noisy point; their correction is zero."""
        noise = _draw_noise(x_t, num_draws, self.antithetic, generator)
        x_0 = x_t.unsqueeze(-2) - sigma_column(sigma, x_t).unsqueeze(-2) * noise
        zero = x_t.new_zeros(())
        return ReverseDraws(x_0, zero.expand(x_0.shape[:-1]), zero.expand(x_t.shape[:-1]))


class GaussianReferenceKernel(Kernel):
    r"""The reverse kernel times a broad normal law, the reference.

    .. math:: r(x_0 | x_t) \propto \phi(x_0 | x_t)\, \mathcal N(x_0; m, s^2 I) \propto
              \mathcal N\Big(x_0; \frac{s^2 x_t + \sigma^2 m}{s^2 + \sigma^2},\;
              \frac{s^2 \sigma^2}{s^2 + \sigma^2} I\Big), \qquad
              \frac{\phi}{r} =
              \frac{\mathcal N(x_t; m, (s^2 + \sigma^2) I)}{\mathcal N(x_0; m, s^2 I)}

    Candidates stay within reach of the reference at every noise level, where those of (15)
    spread with sigma. For :math:`s \to \infty` it is :class:`ReverseKernel` again.

    Arguments:
        loc: Mean m of the reference, a number or of shape :math:`(\mathrm{dim})`.
        scale: Standard deviation s of the reference, in units of x. The reference should be
            *wider* than the target: the weights carry its reciprocal.
        antithetic: Whether candidates come in pairs on either side of the mean, number k and
            number k + K/2.

    Raises:
        ValueError: If scale is not positive and finite.

    Example:
        >>> kernel = GaussianReferenceKernel(loc=0.0, scale=3.0)
        >>> bool(kernel.draw(torch.zeros(4, 2), 1e5, 256).x_0.abs().max() < 30)
        True
    """

    def __init__(
        self, loc: Float[Tensor, " dim"] | float, scale: float, antithetic: bool = False
    ) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.loc = loc
        self.scale = scale
        self.antithetic = antithetic

    @torch.no_grad()
    def draw(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        num_draws: int,
        *,
        generator: torch.Generator | None = None,
    ) -> ReverseDraws:
        """Candidates of every noisy point, corrected for the reference."""
        noise = _draw_noise(x_t, num_draws, self.antithetic, generator)
        column = sigma_column(sigma, x_t)
        reference = torch.full_like(column, self.scale)
        total = torch.hypot(column, reference)
        shift = x_t - self._loc_like(x_t)
        # Offsets from loc keep their precision where loc is far from the origin.
        mean = (reference / total).square() * shift
        offset = mean.unsqueeze(-2) - (reference / total * column).unsqueeze(-2) * noise
        return ReverseDraws(
            x_0=self._loc_like(x_t) + offset,
            log_correction=(offset / self.scale).square().sum(-1) / 2,
            log_constant=_isotropic_log_prob(shift / total, total)
            - _isotropic_log_prob(torch.zeros_like(shift), reference),
        )

    def _loc_like(self, x: Tensor) -> Tensor | float:
        return self.loc.to(x) if isinstance(self.loc, Tensor) else self.loc


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
        if not bool((torch.as_tensor(low) < torch.as_tensor(high)).all()):
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
        _check_draws(num_draws)
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


class BankKernel(Kernel):
    r"""Candidates from a bank of points whose energy is known already: no energy is evaluated.

    The points :math:`x_i` came from some law with density :math:`\pi` and carry the importance
    log-weight :math:`\log W_i = -E(x_i) - \log \pi(x_i)`. Given a noisy point they represent the
    posterior with log-weights

    .. math:: \log w_i = \log W_i + \log \mathcal N(x_t; x_i, \sigma^2 I),

    which is the correction of this kernel. All noisy points of a batch share the same
    candidates: the whole bank if as many draws are asked for as it has points, else a stratified
    resample by :math:`W` (with replacement), whose own log-weights are then all equal.

    Arguments:
        points: The bank, with shape :math:`(n, \mathrm{dim})`.
        log_weight: Log-weights :math:`\log W_i`, with shape :math:`(n)`, up to a constant; equal
            if None, for points that are samples of the target. :math:`-\infty` is a point of
            weight zero.

    Raises:
        ValueError: If the shapes do not fit, or the log-weights have a NaN, :math:`+\infty`, or
            are all :math:`-\infty`.

    Note:
        Sharing makes the errors of a batch's targets depend on one another. A bank resolves the
        posterior only while sigma is not small against the distance between its points: watch
        the effective sample size.

    Example:
        >>> bank = BankKernel(torch.randn(1000, 2), torch.zeros(1000))
        >>> draws = bank.draw(torch.zeros(5, 2), 1.0, 100)
        >>> draws.x_0.shape, draws.x_0.untyped_storage().nbytes() == 100 * 2 * 4
        (torch.Size([5, 100, 2]), True)
    """

    needs_energy = False

    def __init__(
        self,
        points: Float[Tensor, "points dim"],
        log_weight: Float[Tensor, " points"] | None = None,
    ) -> None:
        if log_weight is None:
            log_weight = points.new_zeros(len(points))
        self.points = points.detach()
        self.log_weight = log_weight.detach()
        self._cumulative_weight = cumulative_weight(self.points, self.log_weight)
        self._log_mean_weight = self.log_weight.logsumexp(0) - math.log(len(points))

    @torch.no_grad()
    def draw(
        self,
        x_t: Float[Tensor, "*batch dim"],
        sigma: Float[Tensor, "*#batch"] | float,
        num_draws: int,
        *,
        generator: torch.Generator | None = None,
    ) -> ReverseDraws:
        """Candidates shared by all noisy points, as an expanded view.

        Raises:
            ValueError: If num_draws is less than 1 or more than the bank has points.
        """
        _check_draws(num_draws)
        if num_draws > len(self.points):
            raise ValueError(
                f"num_draws must be at most the bank's {len(self.points)} points, got {num_draws}"
            )
        if num_draws == len(self.points):
            chosen, log_weight = self.points, self.log_weight
        else:
            index = stratified_indices(self._cumulative_weight, num_draws, generator)
            chosen, log_weight = self.points[index], self._log_mean_weight
        chosen = chosen.to(x_t)
        column = sigma_column(sigma, x_t)
        flat = x_t.reshape(-1, x_t.shape[-1])
        # Not by the matrix product, which cancels where points are far from the origin.
        distance = torch.cdist(flat, chosen, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.reshape(*x_t.shape[:-1], num_draws)
        return ReverseDraws(
            x_0=chosen.expand(*x_t.shape[:-1], *chosen.shape),
            log_correction=log_weight.to(x_t) - (distance / column).square() / 2,
            log_constant=_isotropic_log_prob(torch.zeros_like(x_t), column),
        )


def cumulative_weight(
    points: Float[Tensor, "points dim"], log_weight: Float[Tensor, " points"]
) -> Float[Tensor, " points"]:
    r"""Distribution function over weighted points, for :func:`stratified_indices`.

    Arguments:
        points: The points, with shape :math:`(n, \mathrm{dim})`; only their number matters.
        log_weight: Their log-weights, with shape :math:`(n)`, up to a constant.

    Returns:
        Increasing values that end in exactly 1, in double precision, with shape :math:`(n)`.

    Raises:
        ValueError: If the shapes do not fit, or the log-weights have a NaN, :math:`+\infty`, or
            are all :math:`-\infty`.

    Example:
        >>> cumulative_weight(torch.zeros(4, 2), torch.zeros(4))
        tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must have shape (points, dim), got {tuple(points.shape)}")
    if log_weight.shape != points.shape[:1]:
        raise ValueError(
            f"log_weight must have shape ({len(points)},), got {tuple(log_weight.shape)}"
        )
    total = log_weight.double().logsumexp(0)
    if not bool(total.isfinite()):
        raise ValueError(
            "log_weight must have no NaN or +inf and at least one finite value, "
            f"got a total of {total.item()}"
        )
    weight = (log_weight.double() - total).exp().cumsum(0)
    return weight / weight[-1]


def stratified_indices(
    cumulative: Float[Tensor, " points"], num_draws: int, generator: torch.Generator | None = None
) -> Int[Tensor, " draws"]:
    r"""Indices drawn by weight with replacement, one from each stratum of equal probability.

    Each index has the same expected number of draws as if they were independent, with less
    variance.

    Arguments:
        cumulative: Distribution function, with shape :math:`(n)`, from :func:`cumulative_weight`.
        num_draws: The number of indices.
        generator: Source of randomness, on the device of cumulative.

    Returns:
        Increasing indices, with shape :math:`(\mathrm{num\_draws})`.

    Example:
        >>> stratified_indices(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64), 4)
        tensor([0, 0, 2, 2])
    """
    device = cumulative.device
    u = torch.rand(num_draws, dtype=torch.float64, device=device, generator=generator)
    u = (u + torch.arange(num_draws, dtype=torch.float64, device=device)) / num_draws
    return torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)


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


def _check_draws(num_draws: int) -> None:
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")


def _draw_noise(
    x_t: Tensor, num_draws: int, antithetic: bool, generator: torch.Generator | None
) -> Tensor:
    """Normal draws, (*batch, num_draws, dim); if antithetic the second half mirrors the first."""
    _check_draws(num_draws)
    if antithetic and num_draws % 2:
        raise ValueError(f"num_draws must be even for antithetic draws, got {num_draws}")
    count = num_draws // 2 if antithetic else num_draws
    shape = (*x_t.shape[:-1], count, x_t.shape[-1])
    noise = torch.randn(shape, dtype=x_t.dtype, device=x_t.device, generator=generator)
    return torch.cat([noise, -noise], dim=-2) if antithetic else noise


def _isotropic_log_prob(standardised: Tensor, scale: Tensor) -> Tensor:
    """Normal log-density at points (*batch, dim) in units of the scale, (*batch or 1, 1)."""
    dim = standardised.shape[-1]
    log_volume = dim * (scale.squeeze(-1).log() + math.log(2 * math.pi) / 2)
    return -standardised.square().sum(-1) / 2 - log_volume
