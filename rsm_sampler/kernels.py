r"""Clean candidates around a noisy point: the reverse-sampling kernel and what corrects it.

As a function of the clean point the forward density (:mod:`rsm_sampler.transitions`) is itself a
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
:class:`BankKernel`              points with known energies    expensive energies
``TruncatedReverseKernel``       :math:`\phi` within a box     bounded targets, actions; see
                                                               :mod:`rsm_sampler.box_kernel`
``AnchoredKernel``               the same, and about an anchor actions of a policy; likewise
================================ ============================= ===============================
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices
from rsm_sampler.transitions import isotropic_log_prob, sigma_column

__all__ = [
    "BankKernel",
    "GaussianReferenceKernel",
    "Kernel",
    "ReverseDraws",
    "ReverseKernel",
]


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
            log_constant=isotropic_log_prob(shift / total, total)
            - isotropic_log_prob(torch.zeros_like(shift), reference),
        )

    def _loc_like(self, x: Tensor) -> Tensor | float:
        return self.loc.to(x) if isinstance(self.loc, Tensor) else self.loc


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
        check_num_draws(num_draws)
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
            log_constant=isotropic_log_prob(torch.zeros_like(x_t), column),
        )


def check_num_draws(num_draws: int) -> None:
    """Refuse a number of candidates below 1."""
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")


def _draw_noise(
    x_t: Tensor, num_draws: int, antithetic: bool, generator: torch.Generator | None
) -> Tensor:
    """Normal draws, (*batch, num_draws, dim); if antithetic the second half mirrors the first."""
    check_num_draws(num_draws)
    if antithetic and num_draws % 2:
        raise ValueError(f"num_draws must be even for antithetic draws, got {num_draws}")
    count = num_draws // 2 if antithetic else num_draws
    shape = (*x_t.shape[:-1], count, x_t.shape[-1])
    noise = torch.randn(shape, dtype=x_t.dtype, device=x_t.device, generator=generator)
    return torch.cat([noise, -noise], dim=-2) if antithetic else noise
