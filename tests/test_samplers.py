import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from energies.gaussian_mixture import GaussianMixture
from rsm_sampler import ancestral
from rsm_sampler.ancestral import Ancestral, Multistep
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.flows import DDIM, Heun
from rsm_sampler.metrics import dkw_band, ks_per_coordinate
from rsm_sampler.networks import MLP
from rsm_sampler.samplers import Langevin
from rsm_sampler.schedules import EDM, Cosine, Linear, VariancePreserving
from rsm_sampler.transitions import posterior, variance_exploding, variance_preserving
from tests.exact import IsotropicMixture, NoReadBack, two_modes

DOUBLE = torch.float64
SAMPLERS = [Ancestral, Multistep, DDIM, Heun, Langevin]
FLOWS = [DDIM, Heun]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def learned(dim=2, context_dim=None, dtype=DOUBLE):
    """An untrained but not trivial denoiser: wrong, smooth, and a contraction at every level."""
    network = MLP(dim, width=16, context_dim=context_dim, bandwidth=0.5, generator=rng())
    torch.nn.init.normal_(network.output.weight, std=0.05, generator=rng(1))
    return Denoiser(network).to(dtype)


def shifted(x_t, sigma, context):
    """Exact for the law N(context, 0.5²) in every coordinate."""
    keep = 0.25 / (0.25 + sigma.square())
    return context + keep.unsqueeze(-1) * (x_t - context)


def mixture_cdfs(law):
    def marginal(axis):
        def cdf(u):
            parts = zip(law.weights, law.means[:, axis], law.stds, strict=True)
            return sum(w.item() * stats.norm.cdf(u, m.item(), s.item()) for w, m, s in parts)

        return cdf

    return [marginal(axis) for axis in range(law.dim)]


# --- laws under the exact denoiser ------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(Ancestral, 150), (Multistep, 60), (DDIM, 150), (Heun, 40)],
    ids=["ancestral", "multistep", "ddim", "heun"],
)
def test_draws_follow_the_mixture(kind, steps):
    """False alarm below 1e-6, with 0.005 of the band left to discretisation.

    Detects a mode weight off by 0.06, or a mode shifted by a fifth of its width.
    """
    law, n = two_modes(), 8000
    sampler = kind(law.denoiser, EDM(0.01, 100.0).sigmas(steps), dim=2)
    x = sampler.sample(n, generator=rng())
    band = dkw_band(n, num_tests=2)
    assert band < 0.033
    assert (ks_per_coordinate(x, mixture_cdfs(law)) <= band + 0.005).all()


def test_the_start_knows_the_mean_of_the_target():
    """The share of a mode of an off-centre law, without sampling error: the map is monotone.

    From a start at 0 the share of the right mode would be 0.60 + 0.05.
    """
    law = IsotropicMixture([[-1.0], [-5.0]], [0.5, 0.5], [0.6, 0.4])
    sampler = Heun(law.denoiser, EDM(0.01, 20.0).sigmas(100), dim=1)
    x, noise = sampler.start(4000, generator=rng())
    for sigma_t, sigma_s in itertools.pairwise(sampler.levels):
        x = sampler.step(x, sigma_t, sigma_s)
    right = x[:, 0] > -3
    threshold = (noise[right].min() + noise[~right].max()) / 2
    assert 0 < noise[right].min() - noise[~right].max() < 0.01
    assert stats.norm.sf(threshold.item()) == pytest.approx(0.6, abs=0.005)


@pytest.mark.parametrize("sigma_data", [0.0, 0.6])
def test_langevin_on_a_gaussian_has_the_law_of_its_recursion(sigma_data):
    """False alarm 1e-6. With an exact normal denoiser every step is linear with known moments."""
    n, scale, step = 12_000, 0.8, 0.6
    law = IsotropicMixture([[1.0, -2.0]], [scale], [1.0])
    levels = EDM(0.05, 10.0).sigmas(40)
    options = {"steps_per_level": 2, "step_size": step, "sigma_data": sigma_data}
    sampler = Langevin(law.denoiser, levels, dim=2, **options)
    variance = levels[0].item() ** 2
    mean = variance / (variance + scale**2)  # in units of the target's
    for sigma in levels[:-1].tolist():
        h_square = step**2 * (sigma**2 + sigma_data**2)
        keep = 1 - h_square / 2 / (sigma**2 + scale**2)
        for _ in range(2):
            mean, variance = keep * mean + 1 - keep, keep**2 * variance + h_square
    x = sampler.sample(n, generator=rng())
    cdfs = [stats.norm(mean * m, math.sqrt(variance)).cdf for m in (1.0, -2.0)]
    assert (ks_per_coordinate(x, cdfs) <= dkw_band(n, num_tests=2)).all()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps_per_level": 8, "step_size": 1.0}, 120),
        ({"steps_per_level": 4, "step_size": 0.5, "sigma_data": 0.5}, 60),
    ],
)
def test_langevin_is_right_within_each_mode(options, steps):
    """False alarm 1e-6, with 0.01 left to the step (a standard deviation 3 % too large)."""
    law = IsotropicMixture([[6.0, 0.0], [-6.0, 0.0]], [0.5, 0.5], [0.8, 0.2])
    sampler = Langevin(law.denoiser, EDM(0.01, 20.0).sigmas(steps), dim=2, **options)
    x = sampler.sample(3000, generator=rng())
    for sign in (1, -1):
        inside = x[x[:, 0] * sign > 0]
        assert len(inside) > 200  # the weights of the modes are beyond it
        inside = inside - torch.tensor([6.0 * sign, 0.0])
        band = dkw_band(len(inside), num_tests=4) + 0.01
        assert (ks_per_coordinate(inside, [stats.norm(0, 0.5).cdf] * 2) <= band).all()


def test_langevin_defaults_reach_a_normal_law():
    """What the docstring says: a variance of 1.10; a chi-square band at 1e-6."""
    law, n = IsotropicMixture([[0.0]], [1.0], [1.0]), 4000
    x = Langevin(law.denoiser, EDM(0.01, 20.0).sigmas(50), dim=1).sample(n, generator=rng())
    low, high = stats.chi2.interval(1 - 1e-6, n - 1)
    assert low / (n - 1) < x.var().item() / 1.10 < high / (n - 1)


# --- one step ---------------------------------------------------------------------------


def test_ancestral_step_is_the_posterior_kernel():
    law, x_t = two_modes(), 3 * normal(50, 2)
    sampler = Ancestral(law.denoiser, torch.tensor([2.0, 1.0, 0.0], dtype=DOUBLE), dim=2)
    for sigma_t, sigma_s in [(2.0, 1.9), (2.0, 0.1), (1e5, 1e4), (2.0, 0.0)]:
        denoised = law.denoiser(x_t, torch.full((50,), sigma_t, dtype=DOUBLE))
        mean, std = posterior(x_t, denoised, sigma_t, sigma_s)
        expected = mean + std * normal(50, 2, seed=4)
        torch.testing.assert_close(sampler.step(x_t, sigma_t, sigma_s, None, rng(4)), expected)


def test_multistep_extrapolates_the_denoised_point():
    """The formula, step by step on the same random numbers."""
    law, levels = two_modes(), [5.0, 3.0, 2.0, 0.5, 0.0]
    sampler = Multistep(law.denoiser, torch.tensor(levels, dtype=DOUBLE), dim=2)
    found = sampler.sample(50, generator=rng(4))
    generator, before = rng(4), None
    x, _ = sampler.start(50, generator=generator)
    for i, (sigma_t, sigma_s) in enumerate(itertools.pairwise(levels[:-1])):
        denoised = law.denoiser(x, torch.full((50,), sigma_t, dtype=DOUBLE))
        ahead = denoised
        if before is not None:
            share = math.log(sigma_t / sigma_s) / math.log(levels[i - 1] / sigma_t)
            ahead = denoised + 0.5 * share * (denoised - before)
        mean, std = posterior(x, ahead, sigma_t, sigma_s)
        x = mean + std * torch.randn(x.shape, dtype=DOUBLE, generator=generator)
        before = denoised
    expected = law.denoiser(x, torch.full((50,), 0.5, dtype=DOUBLE))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [(Ancestral, 1.7, 2.1), (Multistep, 3.5, 5.0)], ids=["1", "2"]
)
def test_order_of_the_chain(kind, low, high, monkeypatch):
    """Twice the levels leave a half or a quarter of the error in a normal law's variance.

    No sampling error: the chain is linear in its noises, and each row carries one of them.
    """
    law = IsotropicMixture([[0.0]], [1.0], [1.0])

    def error(steps):
        levels = EDM(0.01, 20.0).sigmas(steps)
        rows = iter(torch.eye(steps, dtype=DOUBLE)[1:])
        monkeypatch.setattr(ancestral, "noise_like", lambda x, generator: next(rows)[:, None])
        sampler = kind(law.denoiser, levels, dim=1)
        start = levels[0] * torch.eye(steps, dtype=DOUBLE)[0][:, None]
        x = sampler._walk(start, sampler._steps(), None, None)
        assert next(rows, None) is None
        return x.square().sum().item() - 1

    assert low < error(100) / error(200) < high


@pytest.mark.parametrize("schedule", [Cosine(20), Linear(20, scale=0.8), VariancePreserving(20)])
def test_the_chain_in_paper_coordinates_is_equation_8(schedule):
    """(8) with predicted noise, betas and alphas of the schedule, on the same random numbers."""
    law, n = two_modes(), 30
    sampler = Ancestral(law.denoiser, schedule.sigmas(), dim=2)
    x = sampler.sample(n, generator=rng())

    generator = rng()
    sigma = schedule.sigma(torch.arange(21))
    alpha_bar = schedule.alpha_bar(torch.arange(21))
    y = variance_preserving(sampler.start(n, generator=generator)[0], sigma[20].expand(n))
    for t in range(20, 0, -1):
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        ve = variance_exploding(y, sigma[t].expand(n))
        noise_pred = (ve - law.denoiser(ve, sigma[t].expand(n))) / sigma[t]
        y = (y - beta / (1 - alpha_bar[t]).sqrt() * noise_pred) / (1 - beta).sqrt()
        if t > 1:
            variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
            y = y + variance.sqrt() * torch.randn(n, 2, generator=generator, dtype=DOUBLE)
    torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", FLOWS)
def test_flows_are_exact_where_the_slope_is_constant(kind):
    """For a point mass the predicted noise does not change on the way."""
    point = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    sampler = kind(lambda x, sigma: point.expand_as(x), torch.tensor([9.0, 1.0, 0.0]), dim=2)
    x_t = normal(5, 2)
    torch.testing.assert_close(sampler.step(x_t, 9.0, 1.0), point + (x_t - point) / 9)
    torch.testing.assert_close(sampler.step(x_t, 9.0, 0.0), point.expand(5, 2))


@pytest.mark.parametrize(("kind", "order"), [(DDIM, 1), (Heun, 2)])
def test_order_of_convergence(kind, order):
    """Halving the steps between the same two levels divides the error by 2 to the order."""
    law = two_modes()

    def ends(kind, intervals):
        sampler = kind(law.denoiser, EDM(0.1, 10.0).sigmas(intervals + 1), dim=2)
        return sampler.sample(100, generator=rng())

    best = ends(Heun, 2000)
    errors = [(ends(kind, m) - best).norm(dim=-1).mean().item() for m in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.15)


# --- densities of the flows -------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_density_is_the_change_of_variables(kind, dim):
    """Against the Jacobian of the whole map, of single points."""
    denoiser = learned(dim)
    sampler = kind(denoiser, EDM(0.1, 5.0).sigmas(4), dim=dim)
    x, log_prob = sampler.sample_with_log_prob(6, generator=rng(2))
    start, noise = sampler.start(6, generator=rng(2))

    def whole(point):
        y = point[None]
        for sigma_t, sigma_s in itertools.pairwise(sampler.levels):
            y = sampler.step(y, sigma_t, sigma_s)
        return y[0]

    for i in range(6):
        jacobian = torch.func.jacrev(whole)(start[i])
        source = torch.distributions.Normal(0.0, 1.0).log_prob(noise[i]).sum()
        source = source - dim * math.log(sampler.levels[0])
        torch.testing.assert_close(x[i], whole(start[i]).detach())
        expected = (source - torch.linalg.slogdet(jacobian).logabsdet).detach()
        torch.testing.assert_close(log_prob[i], expected)


@pytest.mark.parametrize(("kind", "steps"), [(DDIM, 40), (Heun, 10), (Heun, 40)])
def test_weights_estimate_log_z(kind, steps):
    """The density belongs to the finite steps: few of them cost precision, not correctness.

    Five standard errors; detects a log Z off by 0.05.
    """
    law = two_modes(log_z=1.5)
    sampler = kind(law.denoiser, EDM(0.02, 80.0).sigmas(steps), dim=2)
    x, log_prob = sampler.sample_with_log_prob(4000, generator=rng())
    weight = (-law.energy(x) - log_prob).exp()
    error = weight.std().item() / math.sqrt(4000) / weight.mean().item()
    assert 5 * error < 0.05
    assert abs(weight.mean().log().item() - 1.5) <= 5 * error + error**2


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("dim", [1, 2])
def test_densities_integrate(kind, dim):
    """E_q[f / q] = 1 for other laws f, under a wrong denoiser; detects 10 % of missing mass."""
    sampler = kind(learned(dim), EDM(0.1, 10.0).sigmas(6), dim=dim)
    x, log_prob = sampler.sample_with_log_prob(20_000, generator=rng())
    for loc, scale in [(0.0, 0.6), (0.5, 0.5), (-0.5, 0.6)]:
        f = torch.distributions.Normal(loc, scale).log_prob(x).sum(-1)
        ratio = (f - log_prob).exp()
        error = ratio.std().item() / math.sqrt(20_000)
        assert 5 * error < 0.1
        assert abs(ratio.mean().item() - 1) <= 5 * error


def test_an_energy_mixture_agrees_with_its_own_density():
    """Heun on the target of another room, with a full covariance, in its own float32."""
    target = GaussianMixture(
        torch.tensor([[2.0, 0.0], [-2.0, 1.0]]),
        covariance=torch.tensor([[1.0, 0.4], [0.4, 0.5]]),
        weights=[0.25, 0.75],
    )
    sampler = Heun(target.denoiser, EDM(0.02, 60.0).sigmas(40).float(), dim=2)
    x, log_prob = sampler.sample_with_log_prob(2000, generator=rng())
    assert x.dtype is log_prob.dtype is torch.float32
    assert (target.log_prob(x) - log_prob).abs().median() < 0.02


@pytest.mark.parametrize("kind", FLOWS)
def test_draws_with_density_are_the_plain_draws_in_any_chunks(kind):
    sampler = kind(learned(), EDM(0.1, 10.0).sigmas(5), dim=2)
    x, log_prob = sampler.sample_with_log_prob(10, generator=rng())
    torch.testing.assert_close(x, sampler.sample(10, generator=rng()))
    pieces = sampler.sample_with_log_prob(10, generator=rng(), chunk=3)
    torch.testing.assert_close(pieces, (x, log_prob))
    assert not x.requires_grad and not log_prob.requires_grad
    empty, none = sampler.sample_with_log_prob(0)
    assert empty.shape == (0, 2) and none.shape == (0,) and sampler.sample(0).shape == (0, 2)


# --- density at given points ------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "sigma_min", "most"),
    [(20, 0.02, 0.3), (21, 0.02, 0.3), (60, 0.02, 0.02), (60, 0.3, 0.1)],
)
def test_log_prob_is_right_within_its_error(steps, sigma_min, most):
    """Three times the estimate: asymptotically it is the error, here the steps are finite.

    3e-4 more for the highest noised law, which is not quite N(0, sigma²).
    """
    law = two_modes()
    x = law.sample(300, rng())
    sampler = Heun(law.denoiser, EDM(sigma_min, 300.0).sigmas(steps), dim=2)
    log_prob, error = sampler.log_prob(x)
    off = (log_prob - law.log_prob(x)).abs()
    assert (off <= 3 * error + 3e-4).double().mean() > 0.9  # the estimate crosses zero somewhere
    assert off.mean() <= 3 * error.mean() + 3e-4
    assert error.mean() < most


@pytest.mark.numbers
def test_log_prob_converges_at_second_order():
    """Over three halvings: the leading terms nearly cancel, so that single slopes are uneven."""
    law = two_modes()
    x = law.sample(100, rng())

    def at(intervals):
        return Heun(law.denoiser, EDM(0.1, 5.0).sigmas(intervals + 1), dim=2).log_prob(x)[0]

    best = at(3000)
    coarse, fine = ((at(m) - best).abs().mean().item() for m in (80, 640))
    assert math.log2(coarse / fine) / 3 == pytest.approx(2, abs=0.3)


def test_log_prob_integrates():
    """By the trapezoidal rule on a line, under a wrong denoiser."""
    sampler = Heun(learned(1), EDM(0.02, 50.0).sigmas(60), dim=1)
    grid = torch.linspace(-6, 6, 1201, dtype=DOUBLE)[:, None]
    log_prob, error = sampler.log_prob(grid)
    assert np.trapezoid(log_prob.exp(), grid[:, 0]) == pytest.approx(1, abs=0.01)
    assert error[500:700].max() < 0.02


def test_log_prob_agrees_with_the_density_of_the_draws():
    """Round trip: with many steps the sampler's density becomes that of the ODE."""
    sampler = Heun(learned(), EDM(0.005, 50.0).sigmas(150), dim=2)
    x, log_prob = sampler.sample_with_log_prob(200, generator=rng())
    again, error = sampler.log_prob(x)
    assert error.max() < 0.02
    torch.testing.assert_close(again, log_prob, rtol=0, atol=0.02)


def test_log_prob_of_one_step_has_no_error_estimate():
    sampler = Heun(learned(), torch.tensor([1.0, 0.0]), dim=2)
    log_prob, error = sampler.log_prob(normal(3, 2))
    assert log_prob.isfinite().all() and error.isnan().all()
    value, error = Heun(learned(), EDM(0.1, 5.0).sigmas(6), dim=2).log_prob(normal(0, 2))
    assert value.shape == error.shape == (0,)


# --- path weights -----------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "pilot"), [(1, 0), (6, 256), (12, 0), (12, 256)])
@pytest.mark.parametrize("wrong", [False, True])
def test_path_weights_are_unbiased_whatever_the_denoiser(steps, pilot, wrong):
    """Five standard errors; detects a Z off by 10 %."""
    std, dim, n = 0.8, 2, 20_000

    def denoiser(x_t, sigma):
        exact = x_t * (std**2 / (std**2 + sigma.square())).unsqueeze(-1)
        return 0.95 * exact + 0.1 if wrong else exact

    levels = torch.cat([torch.logspace(0.5, -0.2, steps, dtype=DOUBLE), torch.zeros(1)])
    sampler = Ancestral(denoiser, levels.double(), dim=dim)
    x, log_weight = sampler.sample_with_path_weight(
        n, lambda x: x.square().sum(-1) / (2 * std**2), generator=rng(), pilot=pilot
    )
    weight = log_weight.exp()
    z = 2 * math.pi * std**2
    error = weight.std().item() / math.sqrt(n)
    assert 5 * error < 0.1 * z
    assert abs(weight.mean().item() - z) <= 5 * error
    # and so are weighted means: E[x] = 0
    moment = weight[:, None] * x / z
    assert (moment.mean(0).abs() <= 5 * moment.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("law", "least"),
    [(two_modes(log_z=-2.0), 0.8), (IsotropicMixture([[0.0] * 32], [0.5], [1.0], -2.0), 0.6)],
    ids=["two modes", "32 dimensions"],
)
def test_measured_widths_make_path_weights_nearly_equal(law, least):
    """A few steps serve; with the variances of (8) the share is below 0.15 in both cases."""
    sampler = Ancestral(law.denoiser, EDM(0.05, 50.0).sigmas(32), dim=law.dim)
    for pilot in (0, 256):
        _, log_weight = sampler.sample_with_path_weight(
            2000, law.energy, generator=rng(), pilot=pilot
        )
        weight = log_weight.exp()
        share = (weight.mean() ** 2 / weight.square().mean()).item()
        assert share < 0.15 if pilot == 0 else share > least
    assert abs(weight.mean() - math.exp(-2)) <= 5 * weight.std() / math.sqrt(2000)


def test_the_path_weight_is_the_ratio_of_the_path_densities():
    """Two steps written out with torch.distributions, on the same random numbers."""
    law, n, Normal = two_modes(), 20, torch.distributions.Normal
    sampler = Ancestral(law.denoiser, torch.tensor([3.0, 1.0, 0.0], dtype=DOUBLE), dim=2)
    x_0, log_weight = sampler.sample_with_path_weight(n, law.energy, generator=rng(), pilot=0)
    generator = rng()
    x_2, z_1, z_0 = (torch.randn(n, 2, generator=generator, dtype=DOUBLE) for _ in range(3))
    centre = law.denoiser(torch.zeros(1, 2, dtype=DOUBLE), 3.0)
    x_2 = centre + 3 * x_2
    mean, std = posterior(x_2, law.denoiser(x_2, 3.0), 3.0, 1.0)
    x_1 = mean + std * z_1
    last = law.denoiser(x_1, 1.0)
    torch.testing.assert_close(x_0, last + z_0)
    forward = Normal(x_0, 1.0).log_prob(x_1) + Normal(x_1, math.sqrt(8)).log_prob(x_2)
    reverse = Normal(mean, std).log_prob(x_1) + Normal(last, 1.0).log_prob(x_0)
    ratio = (forward - reverse - Normal(centre, 3.0).log_prob(x_2)).sum(-1)
    torch.testing.assert_close(log_weight, ratio - law.energy(x_0))


# --- contexts, precision, randomness ----------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLERS)
def test_contexts_go_along_point_by_point(kind):
    context = 5 * normal(50, 2)
    sampler = kind(shifted, EDM(0.02, 100.0).sigmas(60), dim=2)
    x = sampler.sample(50, context=context, generator=rng())
    assert ((x - context).abs() < 4).all() and (x - context).std() > 0.3


def test_densities_and_path_weights_take_contexts():
    context = 3 * normal(40, 2)
    flow = Heun(shifted, EDM(0.02, 1000.0).sigmas(120), dim=2)
    x, log_prob = flow.sample_with_log_prob(40, context=context, generator=rng(), chunk=7)
    exact = torch.distributions.Normal(context, 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(log_prob, exact, rtol=0, atol=0.05)
    given, _ = flow.log_prob(x, context=context, chunk=7)
    torch.testing.assert_close(given, exact, rtol=0, atol=0.05)

    chain = Ancestral(shifted, EDM(0.05, 50.0).sigmas(100), dim=2)
    seen = {}

    def energy(x, c):
        seen["context"] = c
        return -torch.distributions.Normal(c, 0.5).log_prob(x).sum(-1)

    _, log_weight = chain.sample_with_path_weight(40, energy, context=context, generator=rng())
    assert seen["context"] is context and log_weight.abs().median() < 1


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_denoiser_or_the_levels_decide_the_precision(kind, dtype):
    def plain(x_t, sigma):
        return x_t / (1 + sigma.square()).unsqueeze(-1)

    by_network = kind(learned(dtype=dtype), EDM(0.1, 5.0).sigmas(5), dim=2)
    by_levels = kind(plain, EDM(0.1, 5.0).sigmas(5).to(dtype), dim=2)
    for sampler in (by_network, by_levels):
        assert sampler.sample(4, generator=rng()).dtype is dtype
        if isinstance(sampler, Ancestral):
            energy = two_modes().energy
            _, log_weight = sampler.sample_with_path_weight(4, energy, generator=rng())
            assert log_weight.dtype is dtype
        if isinstance(sampler, (DDIM, Heun)):
            assert sampler.sample_with_log_prob(4, generator=rng())[1].dtype is dtype


@pytest.mark.parametrize("kind", FLOWS)
def test_single_precision_is_close_to_double(kind):
    levels = EDM(0.02, 80.0).sigmas(30)
    double = kind(learned(), levels, dim=2)
    single = kind(learned(dtype=torch.float32), levels, dim=2)
    start, zero = normal(50, 2) * levels[0], torch.zeros(50, dtype=DOUBLE)
    x, log_prob = double._push(start, zero, None)
    y, approximate = single._push(start.float(), zero.float(), None)
    torch.testing.assert_close(y.double(), x, rtol=0, atol=1e-3)
    torch.testing.assert_close(approximate.double(), log_prob, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_generator_decides_everything(kind):
    sampler = kind(learned(), EDM(0.1, 5.0).sigmas(5), dim=2)
    before = torch.random.get_rng_state()
    first, again, other = (sampler.sample(8, generator=rng(seed)) for seed in (0, 0, 1))
    if isinstance(sampler, Ancestral):
        sampler.sample_with_path_weight(8, two_modes().energy, generator=rng())
    if isinstance(sampler, (DDIM, Heun)):
        sampler.sample_with_log_prob(8, generator=rng())
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_no_value_is_read_back_on_the_way(kind):
    sampler = kind(learned(context_dim=1), EDM(0.1, 5.0).sigmas(5), dim=2)
    context = torch.ones(4, 1, dtype=DOUBLE)
    with NoReadBack():
        sampler.sample(4, context=context, generator=rng())
        if isinstance(sampler, (DDIM, Heun)):
            sampler.sample_with_log_prob(4, context=context, generator=rng())
        if isinstance(sampler, Heun):
            sampler.log_prob(torch.ones(4, 2, dtype=DOUBLE), context=context)


@pytest.mark.parametrize(
    ("kind", "calls"), [(Ancestral, 7), (Multistep, 7), (DDIM, 7), (Heun, 12), (Langevin, 19)]
)
def test_denoiser_calls(kind, calls):
    """One for the start; one level for the whole batch in each, which is embedded once."""
    seen = []

    def denoiser(x_t, sigma):
        seen.append(sigma)
        return x_t / (1 + sigma.square()).unsqueeze(-1)

    options = {"steps_per_level": 3} if kind is Langevin else {}
    kind(denoiser, EDM(0.1, 5.0).sigmas(6), dim=2, **options).sample(4, generator=rng())
    assert len(seen) == calls
    assert all(sigma.shape == (4,) and sigma.stride() == (0,) for sigma in seen[1:])


def test_the_progress_bar_counts_levels(capsys):
    sampler = DDIM(learned(), EDM(0.1, 5.0).sigmas(6), dim=2)
    sampler.sample(2, progress=True)
    assert "sampling:   0%|          | 0/6" in capsys.readouterr().err
    sampler.sample(2)
    assert capsys.readouterr().err == ""


# --- messages ---------------------------------------------------------------------------


def test_a_density_needs_a_differentiable_denoiser():
    sampler = DDIM(lambda x, sigma: x.detach() / 2, torch.tensor([3.0, 1.0, 0.0]), dim=2)
    with pytest.raises(ValueError, match="denoiser must be differentiable by autograd"):
        Heun(sampler.denoiser, sampler.sigmas, dim=2).log_prob(torch.zeros(3, 2))


LEVELS = torch.tensor([3.0, 1.0, 0.0])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIM(shifted, torch.tensor([1.0]), dim=2), "two levels that end with 0"),
        (lambda: DDIM(shifted, torch.tensor([2.0, 1.0]), dim=2), "end with 0, got"),
        (
            lambda: DDIM(shifted, torch.zeros(2, 2), dim=2),
            r"sigmas must have shape \(levels,\), got",
        ),
        (lambda: DDIM(shifted, torch.tensor([1.0, 2.0, 0.0]), dim=2), "decrease, got"),
        (lambda: DDIM(shifted, torch.tensor([1.0, -1.0, 0.0]), dim=2), "decrease, got"),
        (lambda: DDIM(shifted, torch.tensor([math.inf, 1.0, 0.0]), dim=2), "be finite"),
        (lambda: DDIM(shifted, torch.tensor([3.0, math.nan, 0.0]), dim=2), "decrease, got"),
        (lambda: DDIM(shifted, LEVELS, dim=0), "dim must be at least 1, got 0"),
        (lambda: DDIM(shifted, LEVELS, dim=2).sample(-1), "n must be at least 0, got -1"),
        (
            lambda: DDIM(shifted, LEVELS, dim=2).sample(3, context=torch.zeros(2, 2)),
            "context must have 3 rows, one for each draw, got 2",
        ),
        (
            lambda: DDIM(shifted, LEVELS, dim=2).sample_with_log_prob(3, chunk=0),
            "chunk must be at least 1, got 0",
        ),
        (
            lambda: Heun(shifted, LEVELS, dim=2).log_prob(
                torch.zeros(3, 2), context=torch.zeros(2, 2)
            ),
            r"context must have shape \(3, context_dim\), got \(2, 2\)",
        ),
        (
            lambda: Ancestral(shifted, LEVELS, dim=2).sample_with_path_weight(
                3, torch.sum, context=torch.zeros(2, 2)
            ),
            "context must have 3 rows",
        ),
        (
            lambda: Ancestral(shifted, LEVELS, dim=2).sample_with_path_weight(
                3, torch.sum, pilot=-1
            ),
            "pilot must be at least 0, got -1",
        ),
        (lambda: Langevin(shifted, LEVELS, dim=2, steps_per_level=0), "steps_per_level must be"),
        (lambda: Langevin(shifted, LEVELS, dim=2, step_size=0.0), "step_size must be positive"),
        (lambda: Langevin(shifted, LEVELS, dim=2, step_size=2.0), "below 2, got 2.0"),
        (lambda: Langevin(shifted, LEVELS, dim=2, sigma_data=-1.0), "sigma_data must be at"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
