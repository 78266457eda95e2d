r"""How far a set of samples is from the truth: distances, occupancies, and the floor beneath them.

A distance between samples is only readable beside two things: its **convention** (which cost,
root or no root, how many points) and its **floor**, the value that exact draws would score at the
same :math:`n`. The same name covers different numbers in the literature: transport costs with and
without the root, kernels of unstated bandwidth, histograms that drop what falls outside. So every
function here says what it computes, computes it in float64, and does not round or clip:

===================================  ====================================================  =============================
function                             value                                                 floor
===================================  ====================================================  =============================
:func:`wasserstein2`                 root of the optimal mean *squared* Euclidean cost     two exact sets
:func:`sliced_wasserstein2`          root of the mean over directions of 1-D squared cost  two exact sets
:func:`mmd2`                         *squared* discrepancy, mean of Gaussian kernels       0 (unbiased)
:func:`total_variation`              half the :math:`\ell_1` distance                      —
:func:`grid_total_variation`         the same over cells, the outside being one cell       :func:`total_variation_floor`
:func:`mode_weight_total_variation`  the same over modes                                   :func:`total_variation_floor`
:func:`ks_per_coordinate`            largest gap between distribution functions            :func:`dkw_band`
:func:`kl_paired`, :func:`nll`       nats, with a standard error                           0, entropy
===================================  ====================================================  =============================

Quantities averaged over the **model's** samples (:func:`elbo`, reverse effective sample size) cannot
see a mode that the model never visits. Those averaged over **exact** samples (:func:`eubo`,
:func:`kl_paired`, :func:`forward_effective_sample_size`) can; prefer them wherever exact samples exist.
"""  # noqa: E501

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = [
    "Estimate",
    "dkw_band",
    "elbo",
    "eubo",
    "forward_effective_sample_size",
    "grid_total_variation",
    "kl_paired",
    "ks_per_coordinate",
    "mmd2",
    "mode_weight_total_variation",
    "mode_weights",
    "nll",
    "sliced_wasserstein2",
    "total_variation",
    "total_variation_floor",
    "wasserstein2",
    "wasserstein2_1d",
]


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error.

    Attributes:
        value: The mean.
        standard_error: Sample standard deviation divided by the root of the number of terms;
            infinite where the mean is.
    """

    value: float
    standard_error: float


# --- transport --------------------------------------------------------------------------


@checked
def wasserstein2(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, ""]:
    r"""Exact 2-Wasserstein distance between two equal-sized sets of equally weighted points.

    .. math:: W_2(x, y) = \Bigl(\min_{\pi \in S_n} \frac1n \sum_i \lVert x_i - y_{\pi(i)} \rVert^2\Bigr)^{1/2}

    The cost is the squared Euclidean distance, the assignment is exact, and the root is taken.

    Arguments:
        x: Points, with shape :math:`(n, d)`.
        y: As many points, with shape :math:`(n, d)`.

    Returns:
        The distance, in the units of the points.

    Raises:
        ValueError: If a set is empty or not finite, or if the sizes or dimensions differ.

    Note:
        The value decreases with :math:`n` and is well above zero for two exact sets, about as
        :math:`n^{-1/d}`; show it beside that floor. The time grows about as :math:`n^3`: one or two
        seconds at :math:`n = 2000`, while memory holds one :math:`(n, n)` matrix.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> wasserstein2(x, x.flip(0) + torch.tensor([0.0, 3.0]))
        tensor(3., dtype=torch.float64)
    """  # noqa: E501
    x, y = _two_sets(x, y)
    if len(x) != len(y):
        raise ValueError(
            f"x and y must have the same number of points, got {len(x)} and {len(y)}; "
            "drop points at random, or use sliced_wasserstein2"
        )
    if x.shape[-1] == 1:
        return wasserstein2_1d(x[:, 0], y[:, 0])
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    rows, columns = linear_sum_assignment(cost.numpy())
    return cost[torch.as_tensor(rows), torch.as_tensor(columns)].mean().sqrt().to(x.device)


@checked
def wasserstein2_1d(
    x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch m"]
) -> Float[Tensor, "*batch"]:
    r"""Exact 2-Wasserstein distance on the line, for sets of any two sizes.

    .. math:: W_2(x, y) = \Bigl(\int_0^1 \bigl(F_x^{-1}(u) - F_y^{-1}(u)\bigr)^2 \mathrm{d}u\Bigr)^{1/2}

    The root is taken. Applied to energies this is the "energy W2", to pair distances the
    "distance W2"; some papers report the square of either.

    Arguments:
        x: Values, with shape :math:`(*, n)`.
        y: Values, with shape :math:`(*, m)`.

    Returns:
        The distance, with shape :math:`(*)`.

    Raises:
        ValueError: If a set is empty or not finite.

    Example:
        >>> wasserstein2_1d(torch.tensor([0.0, 2.0]), torch.tensor([1.0]))
        tensor(1., dtype=torch.float64)
    """  # noqa: E501
    x, y = _finite("x", x), _finite("y", y)
    n, m = x.shape[-1], y.shape[-1]
    x, y = x.sort(dim=-1).values, y.sort(dim=-1).values
    if n != m:
        # Both quantile functions are constant between consecutive multiples of 1/n and of 1/m;
        # counted in units of 1/(n m) these are integers, so nothing is rounded.
        ends = torch.cat((torch.arange(n + 1) * m, torch.arange(m + 1) * n)).unique()
        starts, width = ends[:-1].to(x.device), ends.diff().to(x) / (n * m)
        gap = x[..., starts // m] - y[..., starts // n]
        return (width * gap.square()).sum(dim=-1).sqrt()
    return (x - y).square().mean(dim=-1).sqrt()


@checked
def sliced_wasserstein2(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, "m dim"],
    num_projections: int = 256,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Root-mean-square of the 1-D Wasserstein distances along random directions.

    .. math:: \mathrm{SW}_2^2(x, y) = \mathbb{E}_\theta\, W_2^2(\theta^\top x, \theta^\top y),
        \qquad \theta \text{ uniform on the unit sphere}

    The root is taken, and there is no factor for the dimension: shifting a set by a vector of
    length :math:`\delta` gives :math:`\delta / \sqrt{d}` in expectation of the square.

    Arguments:
        x: Points, with shape :math:`(n, d)`.
        y: Points, with shape :math:`(m, d)`; any number of them.
        num_projections: Number of directions. Time and memory grow linearly with it.
        generator: Source of the directions.

    Returns:
        The distance, in the units of the points.

    Raises:
        ValueError: If a set is empty or not finite, if the dimensions differ, or if
            ``num_projections`` is below one.

    References:
        | Wasserstein barycenter and its application to texture mixing (Rabin et al., 2011)
        | https://hal.science/hal-00476064

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> sliced_wasserstein2(x, x + 2, generator=torch.Generator().manual_seed(0))
        tensor(2., dtype=torch.float64)
    """
    x, y = _two_sets(x, y)
    if num_projections < 1:
        raise ValueError(f"num_projections must be at least 1, got {num_projections}")
    directions = torch.randn(
        num_projections, x.shape[-1], generator=generator, dtype=x.dtype, device=x.device
    )
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return wasserstein2_1d(directions @ x.T, directions @ y.T).square().mean().sqrt()


# --- kernels ----------------------------------------------------------------------------


@checked
def mmd2(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, "m dim"],
    bandwidths: Sequence[float] | None = None,
    *,
    unbiased: bool = True,
) -> Float[Tensor, ""]:
    r"""Squared maximum mean discrepancy under a mean of Gaussian kernels.

    .. math::
        \mathrm{MMD}^2 = \overline{k(x, x')} + \overline{k(y, y')} - 2\, \overline{k(x, y)},
        \qquad k(a, b) = \frac1B \sum_{h} \exp\Bigl(-\frac{\lVert a - b \rVert^2}{2 h^2}\Bigr)

    No root is taken, so that the unbiased estimate stays unbiased; it may be negative.

    Arguments:
        x: Points, with shape :math:`(n, d)`.
        y: Points, with shape :math:`(m, d)`.
        bandwidths: The :math:`h`, in the units of the points. By default 1/4, 1/2, 1, 2 and 4 times
            the median distance between distinct points of the pooled sets, each set thinned evenly
            to at most 1000 points for that median. Fix them to compare values across sample sets.
        unbiased: Whether to leave out the pairs of a point with itself (the U-statistic, whose
            expectation is zero for equal laws) or keep them (the V-statistic, never negative).

    Returns:
        The squared discrepancy, at most 2.

    Raises:
        ValueError: If a set is empty or not finite, if dimensions differ, if a bandwidth is not
            positive, if the median distance is zero, or if the unbiased form has fewer than two points.

    References:
        | A kernel two-sample test (Gretton et al., 2012), equations (3) and (5)
        | https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> x = torch.zeros(2, 1)
        >>> mmd2(x, x + 1, bandwidths=[1.0], unbiased=False)
        tensor(0.7869, dtype=torch.float64)
    """  # noqa: E501
    x, y = _two_sets(x, y)
    if unbiased and min(len(x), len(y)) < 2:
        raise ValueError(
            f"x and y must have at least 2 points each when unbiased, got {len(x)} and {len(y)}"
        )
    if bandwidths is None:
        median = _median_distance(x, y)
        if median == 0:
            raise ValueError(
                "bandwidths must be given when most points coincide, got median distance 0"
            )
        bandwidths = [median * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    if len(bandwidths) == 0 or not all(h > 0 for h in bandwidths):
        raise ValueError(f"bandwidths must be positive, got {list(bandwidths)}")
    xx, yy = _kernel_sum(x, x, bandwidths), _kernel_sum(y, y, bandwidths)
    xy = _kernel_sum(x, y, bandwidths)
    n, m = len(x), len(y)
    if unbiased:
        return (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m)
    return xx / n**2 + yy / m**2 - 2 * xy / (n * m)


def _kernel_sum(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Sum over all pairs of the mean kernel, in row blocks so that memory stays bounded."""
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for rows in x.split(max(1, 4_000_000 // len(y))):
        squared = torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        for h in bandwidths:
            total += (squared * (-0.5 / h**2)).exp().sum()
    return total / len(bandwidths)


def _median_distance(x: Tensor, y: Tensor, limit: int = 1000) -> float:
    thinned = [z[torch.linspace(0, len(z) - 1, min(len(z), limit)).long()] for z in (x, y)]
    return torch.pdist(torch.cat(thinned)).median().item()


# --- total variation --------------------------------------------------------------------


@checked
def total_variation(
    p: Float[Tensor, "*batch cells"], q: Float[Tensor, "*batch cells"]
) -> Float[Tensor, "*batch"]:
    r"""Total variation distance between probability vectors, half their :math:`\ell_1` distance.

    .. math:: \mathrm{TV}(p, q) = \frac12 \sum_i |p_i - q_i| = \max_A |p(A) - q(A)| \in [0, 1]

    Arguments:
        p: Probabilities, with shape :math:`(*, m)`, each row summing to one.
        q: Probabilities, with shape :math:`(*, m)`.

    Returns:
        The distance, with shape :math:`(*)`.

    Raises:
        ValueError: If the shapes differ or a row is not a probability vector (to 1e-4).

    Example:
        >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]))
        tensor(0.3000, dtype=torch.float64)
    """
    if p.shape != q.shape:
        raise ValueError(
            f"p and q must have the same shape, got {tuple(p.shape)} and {tuple(q.shape)}"
        )
    p, q = _probabilities("p", p), _probabilities("q", q)
    return (p - q).abs().sum(dim=-1) / 2


@checked
def grid_total_variation(
    samples: Float[Tensor, "n dim"],
    cell_masses: Float[Tensor, "*grid"],
    edges: Sequence[Float[Tensor, "_"]],
) -> Float[Tensor, ""]:
    r"""Total variation between the histogram of samples and exact cell masses.

    A cell is :math:`[e_j, e_{j+1})` in every coordinate (the last one closed). Everything outside
    the box, NaN included, is **one more cell**, whose exact mass is what the others leave: what a
    sampler throws far away counts against it.

    Arguments:
        samples: Points, with shape :math:`(n, d)`.
        cell_masses: Exact probability of each cell, with one axis per coordinate.
        edges: One increasing tensor of cell edges per coordinate, each one longer than its axis.

    Returns:
        The distance, in [0, 1]. Exact draws score :func:`total_variation_floor` on average.

    Raises:
        ValueError: If there are no samples, if the edges do not fit the samples or the masses or
            do not increase, or if the masses are negative or sum to more than one.

    Example:
        >>> samples = torch.tensor([[0.5], [1.5], [1.7], [9.0]])
        >>> edges = [torch.tensor([0.0, 1.0, 2.0])]
        >>> grid_total_variation(samples, torch.tensor([0.5, 0.5]), edges)
        tensor(0.2500, dtype=torch.float64)
    """
    n, dim = samples.shape
    if n < 1:
        raise ValueError("samples must hold at least 1 point, got 0")
    if len(edges) != dim:
        raise ValueError(f"edges must hold one tensor per coordinate ({dim}), got {len(edges)}")
    shape = tuple(len(e) - 1 for e in edges)
    if tuple(cell_masses.shape) != shape:
        raise ValueError(
            f"cell_masses must have one cell between edges {shape}, got {tuple(cell_masses.shape)}"
        )
    exact = _with_outside(cell_masses).to(samples.device)
    x = samples.double()
    inside = torch.ones(n, dtype=torch.bool, device=x.device)
    cell = torch.zeros(n, dtype=torch.long, device=x.device)
    for axis, edge in enumerate(edges):
        edge = edge.to(x)
        if not bool((edge.diff() > 0).all()):
            raise ValueError(f"edges must increase, got {edge.tolist()} for coordinate {axis}")
        column = x[:, axis].contiguous()
        inside &= (column >= edge[0]) & (column <= edge[-1])
        index = torch.bucketize(column, edge, right=True) - 1
        cell = cell * shape[axis] + index.clamp(0, shape[axis] - 1)
    cell = torch.where(inside, cell, len(exact) - 1)
    return total_variation(torch.bincount(cell, minlength=len(exact)).double() / n, exact)


@checked
def total_variation_floor(cell_masses: Float[Tensor, "*grid"], n: int) -> Float[Tensor, ""]:
    r"""Expected total variation between the histogram of ``n`` exact draws and the exact masses.

    A cell's count is binomial, and its mean absolute deviation has a closed form (de Moivre), so
    the expectation is **exact**, not the Gaussian approximation
    :math:`\frac12 \sum_i \sqrt{2 p_i (1 - p_i) / (\pi n)}` that it tends to:

    .. math::
        \mathbb{E}\,\mathrm{TV} = \frac{1}{n} \sum_i \nu_i \binom{n}{\nu_i} p_i^{\nu_i}
        (1 - p_i)^{n - \nu_i + 1}, \qquad \nu_i = \lfloor n p_i \rfloor + 1

    Arguments:
        cell_masses: Exact probabilities, of any shape. If they sum to less than one, the rest is a
            further cell, as in :func:`grid_total_variation`.
        n: Number of draws.

    Returns:
        The expected distance.

    Raises:
        ValueError: If a mass is negative, the sum exceeds one, or ``n`` is below one.

    References:
        | Closed form summation for classical distributions (Diaconis and Zabell, 1991)
        | https://doi.org/10.1214/ss/1177011699

    Example:
        >>> total_variation_floor(torch.full((40,), 1 / 40), 1000)
        tensor(0.0785, dtype=torch.float64)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    p = _with_outside(cell_masses)
    p = p[(p > 0) & (p < 1)]
    nu = torch.floor(n * p) + 1
    log_binomial = (
        math.lgamma(n + 1) - torch.lgamma(nu + 1) - torch.lgamma((n - nu + 1).clamp_min(1))
    )
    log_term = nu.log() + log_binomial + nu * p.log() + (n - nu + 1) * torch.log1p(-p)
    return torch.where(nu <= n, log_term.exp(), 0.0).sum() / n


@checked
def mode_weights(responsibilities: Float[Tensor, "n modes"]) -> Float[Tensor, "modes"]:
    """Share of the samples that belongs to each mode: the mean responsibility.

    Arguments:
        responsibilities: Probability that each sample belongs to each mode, with shape
            :math:`(n, m)`, rows summing to one. One-hot rows give plain counts.

    Returns:
        The shares, with shape :math:`(m)`, summing to one.

    Raises:
        ValueError: If there are no samples or a row is not a probability vector (to 1e-4).

    Example:
        >>> mode_weights(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if len(responsibilities) < 1:
        raise ValueError("responsibilities must hold at least 1 sample, got 0")
    return _probabilities("responsibilities", responsibilities).mean(dim=0)


@checked(finite=("responsibilities", "weights"))
def mode_weight_total_variation(
    responsibilities: Float[Tensor, "n modes"], weights: Float[Tensor, "modes"]
) -> Float[Tensor, ""]:
    """Total variation between the samples' shares of the modes and the true mode weights.

    Arguments:
        responsibilities: As in :func:`mode_weights`, with shape :math:`(n, m)`.
        weights: True mode weights, with shape :math:`(m)`, summing to one.

    Returns:
        The distance, in [0, 1]. Independent exact draws score
        ``total_variation_floor(weights, n)`` on average when modes do not overlap, and less
        when they do.

    Raises:
        ValueError: If either is not made of probability vectors, or if the modes do not match.

    Example:
        >>> one_hot = torch.eye(2)[[0, 0, 0, 1]]
        >>> mode_weight_total_variation(one_hot, torch.tensor([0.5, 0.5]))
        tensor(0.2500, dtype=torch.float64)
    """
    shares = mode_weights(responsibilities)
    return total_variation(shares, weights.to(shares))


# --- distribution functions -------------------------------------------------------------


@checked
def ks_per_coordinate(
    x: Float[Tensor, "n dim"],
    reference: Float[Tensor, "m dim"] | Sequence[Callable],
) -> Float[Tensor, "dim"]:
    r"""Kolmogorov-Smirnov statistic of every coordinate.

    .. math:: D_j = \sup_u \bigl| F_{x, j}(u) - F_j(u) \bigr| \in [0, 1]

    Arguments:
        x: Samples, with shape :math:`(n, d)`.
        reference: Either reference samples, with shape :math:`(m, d)`, or one cumulative
            distribution function per coordinate, each mapping a float64 tensor of shape
            :math:`(n)` to an array or tensor of the same shape (``scipy.stats`` ones will do).

    Returns:
        The statistics, with shape :math:`(d)`. For independent exact samples, one of them exceeds
        :func:`dkw_band` with the false-alarm rate asked there.

    Raises:
        ValueError: If a set is empty or not finite, or if the dimensions differ.

    Example:
        >>> x = torch.tensor([[0.25], [0.75]])
        >>> ks_per_coordinate(x, [lambda u: u])
        tensor([0.2500], dtype=torch.float64)
    """
    n, dim = x.shape
    x = _finite("x", x).T.contiguous().sort(dim=-1).values
    if isinstance(reference, Tensor):
        if reference.shape[-1] != dim:
            raise ValueError(
                f"reference must have {dim} coordinates as x has, got {reference.shape[-1]}"
            )
        y = _finite("reference", reference).to(x).T.contiguous().sort(dim=-1).values
        both = torch.cat((x, y), dim=-1)
        gap = (
            torch.searchsorted(x, both, right=True).double() / n
            - torch.searchsorted(y, both, right=True).double() / y.shape[-1]
        )
        return gap.abs().amax(dim=-1)
    if len(reference) != dim:
        raise ValueError(
            f"reference must hold one cdf per coordinate ({dim}), got {len(reference)}"
        )
    cdf = torch.stack([torch.as_tensor(f(u)).to(u) for f, u in zip(reference, x, strict=True)])
    # At ties the empirical function jumps once, from the share below to the share not above.
    below = torch.searchsorted(x, x).double() / n
    above = torch.searchsorted(x, x, right=True).double() / n
    return torch.maximum((above - cdf).abs(), (cdf - below).abs()).amax(dim=-1)


@checked
def dkw_band(
    n: int, m: int | None = None, *, false_alarm: float = 1e-6, num_tests: int = 1
) -> float:
    r"""Bound on the Kolmogorov-Smirnov statistic of exact independent samples.

    .. math:: P\bigl(D > \sqrt{\ln(2 / p) / (2 n)}\bigr) \le p

    the Dvoretzky-Kiefer-Wolfowitz inequality with Massart's constant, valid for every :math:`n`
    and every law. Against ``m`` reference samples the two bands are added, each at half the rate.

    Arguments:
        n: Number of samples.
        m: Number of reference samples, or None for an exact distribution function.
        false_alarm: Probability that any of the tests exceeds the bound by chance.
        num_tests: Number of statistics looked at, such as the dimension; their rates add.

    Returns:
        The bound.

    Raises:
        ValueError: If a count is below one or the rate is outside (0, 1).

    References:
        | The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality (Massart, 1990)
        | https://doi.org/10.1214/aop/1176990746

    Example:
        >>> round(dkw_band(10_000), 4)
        0.0269
    """
    for name, count in (("n", n), ("m", n if m is None else m), ("num_tests", num_tests)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm must be between 0 and 1, got {false_alarm}")
    rate = false_alarm / num_tests
    if m is None:
        return math.sqrt(math.log(2 / rate) / (2 * n))
    return sum(math.sqrt(math.log(4 / rate) / (2 * count)) for count in (n, m))


# --- densities --------------------------------------------------------------------------


@checked
def kl_paired(log_p: Float[Tensor, "n"], log_q: Float[Tensor, "n"]) -> Estimate:
    r"""Kullback-Leibler divergence from exact samples at which both log-densities are known.

    .. math:: \mathrm{KL}(p \,\|\, q) \approx \frac1n \sum_i \log p(x_i) - \log q(x_i), \qquad x_i \sim p

    Taking the difference at the same points removes the fluctuation of the entropy. It is a
    forward quantity: a mode that :math:`q` misses is paid for in full.

    Arguments:
        log_p: Normalised log-density of the target at exact samples of it, with shape :math:`(n)`.
        log_q: Normalised log-density of the model at the same samples, with shape :math:`(n)`.
            :math:`-\infty` anywhere makes the divergence infinite.

    Returns:
        The mean and its standard error, in nats. The estimate may be negative by chance.

    Raises:
        ValueError: If there are fewer than two points, if ``log_p`` is not finite, or if ``log_q``
            has a NaN or :math:`+\infty` value.

    Example:
        >>> kl_paired(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5]))
        Estimate(value=0.5, standard_error=0.0)
    """  # noqa: E501
    if len(log_p) != len(log_q):
        raise ValueError(
            f"log_p and log_q must have the same length, got {len(log_p)} and {len(log_q)}"
        )
    return _mean(
        _finite("log_p", log_p) - _no_nan("log_q", log_q).to(log_p.device), "log_p - log_q"
    )


@checked
def nll(log_q: Float[Tensor, "n"]) -> Estimate:
    r"""Mean negative log-likelihood of held-out exact samples, in nats.

    .. math:: -\frac1n \sum_i \log q(x_i), \qquad x_i \sim p

    Its floor is the entropy of the target; the excess over that is :func:`kl_paired`.

    Arguments:
        log_q: Normalised log-density of the model at exact samples, with shape :math:`(n)`.

    Returns:
        The mean and its standard error.

    Raises:
        ValueError: If there are fewer than two values, or one is NaN or :math:`+\infty`.

    Example:
        >>> nll(torch.tensor([-1.0, -3.0]))
        Estimate(value=2.0, standard_error=1.0)
    """
    return _mean(-_no_nan("log_q", log_q), "-log_q")


@checked
def elbo(log_weight: Float[Tensor, "n"]) -> Estimate:
    r"""Evidence lower bound: mean log-weight over the **model's** samples.

    .. math:: \log Z - \mathrm{KL}(q \,\|\, p)
        \approx \frac1n \sum_i -E(x_i) - \log q(x_i), \qquad x_i \sim q

    Blind to modes that the model does not visit.

    Arguments:
        log_weight: :math:`-E - \log q` at the model's samples, with shape :math:`(n)`.
            :math:`-\infty` (a sample outside the support) makes the bound :math:`-\infty`.

    Returns:
        The mean and its standard error, in nats.

    Raises:
        ValueError: If there are fewer than two values, or one is NaN or :math:`+\infty`.

    Example:
        >>> elbo(torch.tensor([1.0, 3.0]))
        Estimate(value=2.0, standard_error=1.0)
    """
    return _mean(_no_nan("log_weight", log_weight), "log_weight")


@checked
def eubo(log_weight: Float[Tensor, "n"]) -> Estimate:
    r"""Evidence upper bound: mean log-weight over **exact** samples.

    .. math:: \log Z + \mathrm{KL}(p \,\|\, q)
        \approx \frac1n \sum_i -E(x_i) - \log q(x_i), \qquad x_i \sim p

    The gap to :func:`elbo` is the sum of both divergences.

    Arguments:
        log_weight: :math:`-E - \log q` at exact samples, with shape :math:`(n)`.
            :math:`+\infty` (the model's density is zero there) makes the bound :math:`+\infty`.

    Returns:
        The mean and its standard error, in nats.

    Raises:
        ValueError: If there are fewer than two values, or one is NaN or :math:`-\infty`.

    References:
        | Beyond ELBOs: a large-scale evaluation of variational methods for sampling (Blessing et al., 2024)
        | https://arxiv.org/abs/2406.07423

    Example:
        >>> eubo(torch.tensor([1.0, 3.0]))
        Estimate(value=2.0, standard_error=1.0)
    """  # noqa: E501
    return _mean(-_no_nan("-log_weight", -log_weight), "log_weight")


@checked
def forward_effective_sample_size(
    log_weight: Float[Tensor, "n"], log_z: float | None = None
) -> Float[Tensor, ""]:
    r"""Share of the model's samples that importance weights would leave, from **exact** samples.

    .. math:: \frac{1}{\mathbb{E}_q[(w / Z)^2]} = \frac{Z}{\mathbb{E}_p[w]}, \qquad
        w = \frac{e^{-E}}{q}, \quad \frac1Z = \mathbb{E}_p\Bigl[\frac1w\Bigr]

    A share in [0, 1], not a count. Unlike the reverse form it falls when the model misses a mode.

    Arguments:
        log_weight: :math:`-E - \log q` at exact samples, with shape :math:`(n)`. :math:`+\infty`
            gives zero.
        log_z: The exact :math:`\log Z`. Without it the harmonic estimate on the right is used,
            which keeps the result within [0, 1]; with it, chance may exceed one.

    Returns:
        The share.

    Raises:
        ValueError: If there are no values, or one is NaN or :math:`-\infty`.

    Example:
        >>> forward_effective_sample_size(torch.tensor([0.0, 0.0]))
        tensor(1., dtype=torch.float64)
    """
    log_weight = -_no_nan("-log_weight", -log_weight)
    n = log_weight.shape[-1]
    if n < 1:
        raise ValueError("log_weight must hold at least 1 value, got 0")
    if bool(log_weight.isposinf().any()):
        return torch.zeros((), dtype=torch.float64, device=log_weight.device)
    log_mean = log_weight.logsumexp(dim=-1) - math.log(n)
    if log_z is not None:
        return (log_z - log_mean).exp()
    return (math.log(n) - (-log_weight).logsumexp(dim=-1) - log_mean).exp()


# --- checks -----------------------------------------------------------------------------


def _mean(values: Tensor, name: str) -> Estimate:
    n = len(values)
    if n < 2:
        raise ValueError(f"{name} must hold at least 2 values, got {n}")
    mean = values.mean().item()
    if math.isinf(mean):
        return Estimate(mean, math.inf)
    return Estimate(mean, values.std().item() / math.sqrt(n))


def _no_nan(name: str, x: Tensor) -> Tensor:
    r"""Float64 copy, refusing empty tensors, NaN and :math:`+\infty`."""
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    bad = x.isnan() | x.isposinf()
    if bool(bad.any()):
        raise ValueError(
            f"{name} must have no NaN or +inf value, got {int(bad.sum())} of {x.numel()}"
        )
    return x.double()


def _finite(name: str, x: Tensor) -> Tensor:
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    bad = ~x.isfinite()
    if bool(bad.any()):
        raise ValueError(f"{name} must be finite, got {int(bad.sum())} bad values of {x.numel()}")
    return x.double()


def _two_sets(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            "x and y must have shapes (n, dim) and (m, dim), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return _finite("x", x), _finite("y", y)


def _probabilities(name: str, p: Tensor) -> Tensor:
    p = p.double()
    if not bool((p >= 0).all()):
        raise ValueError(f"{name} must be non-negative, got minimum {p.min().item():g}")
    worst = (p.sum(dim=-1) - 1).abs().max().item()
    if not worst <= 1e-4:
        raise ValueError(f"{name} must sum to 1 along its last axis, got a sum off by {worst:g}")
    return p


def _with_outside(cell_masses: Tensor) -> Tensor:
    """Flat float64 masses with the mass outside appended."""
    p = cell_masses.double().flatten()
    if p.numel() == 0 or not bool((p >= 0).all()):
        raise ValueError(
            f"cell_masses must be non-negative, got {tuple(cell_masses.shape)} masses"
        )
    total = p.sum()
    if not bool(total <= 1 + 1e-4):
        raise ValueError(f"cell_masses must sum to at most 1, got {total.item():g}")
    return torch.cat((p, (1 - total).clamp_min(0)[None]))
