import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rsm_sampler.metrics import dkw_band, ks_per_coordinate
from rsm_sampler.montecarlo.run import (
    HMC,
    MALA,
    GaussianPath,
    Langevin,
    ParallelTempering,
    RandomWalk,
    refine,
    run_mcmc,
)
from rsm_sampler.target.energy import BudgetExceededError, MeteredEnergy

METHODS = ["parallel-tempering", "rw", "mala", "hmc", "langevin"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def quadratic(x):
    return x.square().sum(-1) / 2


def quartic(x):
    return (x**4).sum(-1) / 4 + (x[..., 0] * x[..., -1]) / 2


class Wells:
    """Two Gaussian wells at ±centre on the first axis; the share of the right one is 0.3."""

    def __init__(self, centre, std, dim=2):
        self.centre, self.std, self.dim, self.share = centre, std, dim, 0.3
        self.log_z = dim / 2 * math.log(2 * math.pi * std**2)

    def __call__(self, x):
        rest = x[..., 1:].square().sum(-1)
        right = math.log(0.3) - ((x[..., 0] - self.centre) ** 2 + rest) / (2 * self.std**2)
        left = math.log(0.7) - ((x[..., 0] + self.centre) ** 2 + rest) / (2 * self.std**2)
        return -torch.logaddexp(right, left)

    def sample(self, n, seed=0):
        x = self.std * normal(n, self.dim, seed=seed)
        right = torch.rand(n, generator=rng(seed + 1)) < self.share
        x[:, 0] += torch.where(right, self.centre, -self.centre)
        return x

    @property
    def cdfs(self):
        def first(u):
            right = stats.norm.cdf(u, self.centre, self.std)
            return 0.3 * right + 0.7 * stats.norm.cdf(u, -self.centre, self.std)

        return [first] + [stats.norm(0, self.std).cdf] * (self.dim - 1)


def advance(kernel, state, steps, generator):
    for _ in range(steps):
        state = kernel.step(state, generator)
    return state


# --- kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [RandomWalk(0.8), MALA(0.9), HMC(0.6, 4), HMC(0.8, 3, jitter=0.0)],
    ids=["rw", "mala", "hmc", "hmc-plain"],
)
def test_kernels_leave_the_law_invariant(kernel):
    """False alarm 1e-6: exact draws stay exact after any number of steps, chain by chain.

    The steps are long enough that moving without the Metropolis test is seen.
    """
    wells, n = Wells(1.0, 0.5), 5000
    state = advance(kernel, kernel.start(wells, wells.sample(n)), 15, rng(7))
    assert 0.2 < state.acceptance.mean() < 0.95
    assert (ks_per_coordinate(state.x, wells.cdfs) <= dkw_band(n, num_tests=2)).all()
    torch.testing.assert_close(state.energy, wells(state.x))


@pytest.mark.parametrize(
    ("kernel", "steps"), [(RandomWalk(2.0), 150), (MALA(1.2), 60), (HMC(0.5, 5), 30)]
)
@pytest.mark.parametrize("dim", [1, 2])
def test_kernels_forget_their_start(kernel, steps, dim):
    """False alarm 1e-6: far from the start, all of one point; the rest of it is below 1e-4."""
    n = 3000
    start = torch.full((n, dim), 3.0, dtype=torch.float64)
    x = advance(kernel, kernel.start(quadratic, start), steps, rng(1)).x
    assert (ks_per_coordinate(x, [stats.norm.cdf] * dim) <= dkw_band(n, num_tests=2)).all()


def test_leapfrog_is_reversible():
    x, momentum = normal(50, 3), normal(50, 3, seed=1)
    kernel = HMC(0.1, 40)
    end, final = kernel.trajectory(kernel.start(quartic, x), momentum)
    back, reversed_momentum = kernel.trajectory(end, -final)
    assert (end.x - x).abs().max() > 1
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(reversed_momentum, -momentum, rtol=0, atol=1e-9)


def test_leapfrog_error_is_of_second_order():
    x, momentum = normal(200, 2), normal(200, 2, seed=1)
    errors = []
    for halvings in range(3):
        kernel = HMC(0.1 / 2**halvings, 10 * 2**halvings)
        end, final = kernel.trajectory(kernel.start(quartic, x), momentum)
        change = end.energy - quartic(x) + (final.square() - momentum.square()).sum(-1) / 2
        errors.append(change.abs().mean().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - 2) < 0.15 for slope in slopes)


def test_mala_has_the_textbook_acceptance():
    x, h = normal(100, 3), 0.7
    kernel = MALA(h)
    state = kernel.start(quartic, x)
    after = kernel.step(state, rng(3))

    def mean(z):
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(quartic(z).sum(), z)
        return (z - h**2 / 2 * slope).detach()

    y = mean(x) + h * normal(100, 3, seed=3)
    log_forward = -(y - mean(x)).square().sum(-1) / (2 * h**2)
    log_backward = -(x - mean(y)).square().sum(-1) / (2 * h**2)
    expected = (quartic(x) - quartic(y) + log_backward - log_forward).clamp_max(0).exp()
    torch.testing.assert_close(after.acceptance, expected)
    moved = (after.x != x).any(-1)
    assert 10 < moved.sum() < 100
    torch.testing.assert_close(after.x[moved], y[moved])


def test_langevin_bias_is_of_first_order_in_the_time_step():
    """On a Gaussian the step is linear, x' = a x + b xi, so its law is known without sampling."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    time_steps, biases = [0.02, 0.01, 0.005], []
    for time_step in time_steps:  # h² / 2
        kernel = Langevin(math.sqrt(2 * time_step))
        at_zero, at_one = (
            kernel.step(kernel.start(quadratic, x), rng(2)).x.item() for x in (zero, one)
        )
        a, b = at_one - at_zero, at_zero / normal(1, 1, seed=2).item()
        biases.append(b * b / (1 - a * a) - 1)
        assert biases[-1] == pytest.approx(1 / (1 - time_step / 2) - 1, rel=1e-9)
    assert all(1.98 < p / q < 2.02 for p, q in itertools.pairwise(biases))


def test_langevin_follows_its_own_biased_law():
    """False alarm 1e-6; detects the unbiased law, whose variance is a third smaller."""
    n, h = 12_000, 1.0
    std = math.sqrt(1 / (1 - h * h / 4))
    kernel = Langevin(h)
    x = advance(kernel, kernel.start(quadratic, std * normal(n, 1)), 10, rng(1)).x
    assert ks_per_coordinate(x, [stats.norm(0, std).cdf]).item() <= dkw_band(n)
    assert ks_per_coordinate(x, [stats.norm(0, 1).cdf]).item() > dkw_band(n)


# --- failures of the energy -------------------------------------------------------------


def walled(value):
    """Flat on the square [-1, 1]², ``value`` outside: log Z = log 4 if outside is excluded."""

    def energy(x):
        return torch.where((x.abs() <= 1).all(-1), 0.0 * x.sum(-1), value)

    return energy


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("kernel", [RandomWalk(0.8), MALA(0.8), Langevin(0.5), HMC(0.3, 3)])
def test_forbidden_energies_are_never_entered(value, kernel):
    state = kernel.start(walled(value), normal(200, 2).clamp(-1, 1))
    state = advance(kernel, state, 30, rng())
    assert (state.x.abs() <= 1).all() and state.energy.isfinite().all()
    assert (state.target.failures > 0) == (value != math.inf)


def test_random_walk_on_a_box_is_uniform():
    """False alarm 1e-6."""
    kernel, n = RandomWalk(0.8), 4000
    state = kernel.start(walled(math.inf), 2 * torch.rand(n, 2, generator=rng()).double() - 1)
    x = advance(kernel, state, 20, rng(1)).x
    uniform = stats.uniform(-1, 2).cdf
    assert (ks_per_coordinate(x, [uniform] * 2) <= dkw_band(n, num_tests=2)).all()


def test_a_chain_leaves_a_forbidden_start():
    kernel = RandomWalk(1.0)
    state = kernel.start(walled(math.inf), torch.full((20, 2), 1.5))
    assert state.energy.isposinf().all()
    assert advance(kernel, state, 100, rng()).energy.isfinite().all()


# --- parallel tempering -----------------------------------------------------------------


def test_path_slope_is_the_gradient_of_its_potential():
    x = normal(5, 3, 2)
    path = GaussianPath(torch.tensor([0.0, 0.3, 1.0]).double(), normal(2), normal(2).exp())
    z = x.clone().requires_grad_()
    energy = quartic(z)
    (expected,) = torch.autograd.grad(path.potential(z, energy).sum(), z)
    z = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(quartic(z).sum(), z)
    torch.testing.assert_close(path.slope(x, plain), expected)
    normalised = torch.distributions.Normal(path.loc, path.scale).log_prob(x).sum(-1)
    torch.testing.assert_close(path.reference_energy(x), -normalised)
    torch.testing.assert_close(path.potential(x, quartic(x))[:, 0], -normalised[:, 0])


@pytest.mark.parametrize("move", [RandomWalk(1.0), MALA(0.9), HMC(0.5, 3)])
def test_every_level_keeps_its_law(move):
    """False alarm 1e-6: each level starts in its exact (Gaussian) law and stays there."""
    n, mean, std, scale = 4000, torch.tensor([1.0, -0.5]).double(), 0.5, 2.0
    beta = torch.tensor([0.0, 0.15, 0.5, 1.0], dtype=torch.float64)
    precision = beta / std**2 + (1 - beta) / scale**2
    means = (beta / std**2 / precision)[:, None] * mean
    kernel = ParallelTempering(beta, 0.0, scale, move)
    state = kernel.start(
        lambda x: (x - mean).square().sum(-1) / (2 * std**2),
        means + normal(n, 4, 2) / precision.sqrt()[:, None],
    )
    state = advance(kernel, state, 9, rng(1))
    assert 0.3 < state.swap_acceptance.mean() < 0.9
    band = dkw_band(n, num_tests=8)
    for k in range(4):
        laws = [stats.norm(means[k, j], precision[k] ** -0.5).cdf for j in range(2)]
        assert (ks_per_coordinate(state.x[:, k], laws) <= band).all()
    torch.testing.assert_close(state.energy, state.target(state.x))
    if state.gradient is not None:
        torch.testing.assert_close(state.gradient, (state.x - mean) / std**2)


def test_swaps_alternate_between_even_and_odd_pairs():
    beta = torch.linspace(0, 1, 5, dtype=torch.float64)
    kernel = ParallelTempering(beta, 0.0, 1.0, RandomWalk(1e-9))  # moves that can be told apart
    state = kernel.start(lambda x: 0.5 * x.square().sum(-1), normal(500, 5, 1))
    generator = rng()
    for parity in (0, 1, 0):
        before, state = state, kernel.step(state, generator)
        came_from_above = (state.x[:, 1:-1, 0] - before.x[:, 2:, 0]).abs() < 1e-6
        pairs = came_from_above.any(0).nonzero().flatten() + 1
        assert pairs.tolist() == ([2] if parity == 0 else [1, 3])


def test_warm_up_finds_the_constants_of_the_bridge():
    """On a Gaussian path they are known; 200 chains leave an error of a few hundredths."""
    n, dim, std, scale = 200, 3, 0.2, 1.0
    beta = torch.linspace(0, 1, 5, dtype=torch.float64) ** 2
    precision = beta / std**2 + (1 - beta) / scale**2
    log_z = dim / 2 * (beta * math.log(2 * math.pi * scale**2) - (precision * scale**2).log())
    kernel = ParallelTempering(beta, 0.0, scale)
    state = kernel.start(
        lambda x: x.square().sum(-1) / (2 * std**2), normal(n, 5, dim) / precision.sqrt()[:, None]
    )
    generator = rng(1)
    for i in range(300):
        state = kernel.step(state, generator)
        kernel.adapt(state, (1 + i / 10) ** -0.6)
    torch.testing.assert_close(kernel.log_ratio, log_z.diff(), rtol=0, atol=0.15)


@pytest.mark.numbers
@pytest.mark.parametrize("move", ["rw", "mala"])
def test_parallel_tempering_weighs_separated_wells(move):
    """All chains start in the lighter well, 16 standard deviations from the other.

    Chains are independent, so five standard errors over chains are a false alarm below 1e-5;
    detects a share off by 0.1 and a log Z off by 0.2.
    """
    wells, chains = Wells(4.0, 0.5), 64
    start = normal(chains, 2) * 0.5 + torch.tensor([4.0, 0.0])
    result = run_mcmc(
        wells,
        start,
        evaluations=64 * 8 * 1000 * (2 if move == "mala" else 1),
        generator=rng(1),
        num_samples=64 * 200,
        num_levels=8,
        reference_loc=0.0,
        reference_scale=5.0,
        move=move,
    )
    share = (result.chains[..., 0] > 0).double().mean(0)
    error = share.std().item() / math.sqrt(chains)
    assert abs(share.mean().item() - wells.share) <= 5 * error < 0.1
    assert abs(result.log_z - wells.log_z) <= 5 * result.log_z_se < 0.2
    assert abs(result.log_z_ti - wells.log_z) <= 5 * result.log_z_ti_se + 0.05
    assert result.inverse_temperatures[0] == 0 and result.inverse_temperatures[-1] == 1
    assert result.swap_acceptance.max() - result.swap_acceptance.min() < 0.2


@pytest.mark.numbers
def test_log_z_errors_are_calibrated():
    """24 runs on a Gaussian: the mean is unbiased and the quoted error is the scatter.

    Five standard errors of the mean, and chi-square at 1e-6 with room for the error of the quoted
    errors; detects quoted errors off by a factor of two and a half.
    """
    dim, std = 4, 0.3
    exact = dim / 2 * math.log(2 * math.pi * std**2)
    runs = [
        run_mcmc(
            lambda x: x.square().sum(-1) / (2 * std**2),
            normal(32, dim, seed=seed),
            evaluations=32 * 5 * 200,
            generator=rng(seed),
            num_levels=5,
            reference_loc=0.0,
            reference_scale=1.0,
            move="rw",
        )
        for seed in range(24)
    ]
    for value, error in (("log_z", "log_z_se"), ("log_z_ti", "log_z_ti_se")):
        values = np.array([getattr(r, value) for r in runs]) - exact
        errors = np.array([getattr(r, error) for r in runs])
        slack = 0.02 if value == "log_z_ti" else 0.0  # the discretisation
        assert abs(values.mean()) <= 5 * errors.mean() / math.sqrt(24) + slack
        low, high = stats.chi2.interval(1 - 1e-6, 23)
        ratio = values.var(ddof=1) / np.mean(errors**2)
        assert low / 23 / 1.5 < ratio < high / 23 * 1.5


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_log_z_of_a_box(value):
    """False alarm below 1e-5. Hard walls: the bridge holds, the integral has no meaning."""
    result = run_mcmc(
        walled(value),
        torch.zeros(48, 2),
        evaluations=48 * 6 * 400,
        generator=rng(),
        num_levels=6,
        reference_scale=1.5,
    )
    assert abs(result.log_z - math.log(4)) <= 5 * result.log_z_se < 0.2
    assert math.isnan(result.log_z_ti) and math.isnan(result.log_z_ti_se)
    assert (result.num_bad > 0) == math.isnan(value)
    assert result.energy.isfinite().all()


def test_log_z_shifts_with_the_energy():
    def run(shift):
        return run_mcmc(
            lambda x: quadratic(x) + shift,
            normal(8, 2),
            evaluations=8 * 5 * 200,
            generator=rng(),
            num_levels=5,
            reference_scale=1.5,
        )

    assert run(1000.0).log_z == pytest.approx(run(0.0).log_z - 1000, abs=0.3)
    single = run_mcmc(
        quadratic, normal(1, 2), evaluations=5000, generator=rng(), reference_scale=2.0
    )
    assert math.isfinite(single.log_z) and math.isnan(single.log_z_se)


# --- one call ---------------------------------------------------------------------------


def options(method):
    return {"step_size": 0.3} if method == "langevin" else {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1000, 4321, 20_000])
def test_the_budget_is_counted_and_never_exceeded(method, budget):
    calls = []

    def energy(x):
        calls.append(len(x))
        return quadratic(x)

    extra = {"num_levels": 5} if method == "parallel-tempering" else {"num_leapfrog": 3}
    result = run_mcmc(
        energy,
        normal(7, 2),
        method=method,
        evaluations=budget,
        generator=rng(),
        **extra,
        **options(method),
    )
    factor = 1 if method in ("rw", "parallel-tempering") else 2
    step = {"rw": 1, "hmc": 6, "parallel-tempering": 5}.get(method, 2)
    assert result.evaluations == factor * sum(calls) <= budget
    assert budget - result.evaluations < 7 * step
    steps = result.num_warm_up + result.num_steps
    start = 5 if method == "parallel-tempering" else factor
    assert result.evaluations == 7 * (start + step * steps)


@pytest.mark.numbers
@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything_and_the_global_generator_is_left_alone(method):
    def run(seed):
        return run_mcmc(
            quadratic,
            normal(6, 2),
            method=method,
            evaluations=5000,
            generator=rng(seed),
            **options(method),
        )

    before = torch.random.get_rng_state()
    first, again, other = run(0), run(0), run(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.samples, again.samples) and first.log_z == again.log_z
    assert not torch.equal(first.samples, other.samples)


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("method", "dim", "goal"),
    [("rw", 1, 0.44), ("rw", 4, 0.234), ("mala", 4, 0.574), ("hmc", 4, 0.7)],
)
@pytest.mark.parametrize("step_size", [1e-3, None, 1e3])
def test_step_sizes_reach_the_target_acceptance(method, dim, goal, step_size):
    result = run_mcmc(
        quadratic,
        normal(100, dim),
        method=method,
        evaluations=100 * 600 * {"rw": 1, "mala": 2, "hmc": 10}[method],
        generator=rng(),
        step_size=step_size,
        num_leapfrog=5,
        warm_up=0.5,
    )
    assert result.acceptance == pytest.approx(goal, abs=0.06)


def test_kept_states_are_spread_over_the_run():
    result = run_mcmc(
        quadratic, normal(10, 2), method="rw", evaluations=10_000, generator=rng(), num_samples=95
    )
    assert result.samples.shape == (95, 2) and result.chains.shape == (10, 10, 2)
    assert torch.equal(result.samples[-10:], result.chains[-1])
    torch.testing.assert_close(result.energy, quadratic(result.samples))
    assert (result.chains[1:] != result.chains[:-1]).any(-1).all(0).any()
    final = run_mcmc(quadratic, normal(10, 2), method="rw", evaluations=10_000, generator=rng())
    assert torch.equal(final.samples, result.samples[-10:])


def test_one_call_samples_the_law():
    """False alarm 1e-6: final states of independent chains, three hundred steps from the start."""
    n = 3000
    result = run_mcmc(quadratic, 3 * normal(n, 2), method="mala", evaluations=n * 600)
    assert (
        ks_per_coordinate(result.samples, [stats.norm.cdf] * 2) <= dkw_band(n, num_tests=2)
    ).all()


def test_a_metered_energy_keeps_the_account():
    energy = MeteredEnergy(walled(math.nan), 2, budget=4000)
    energy(torch.full((5, 2), 9.0), purpose="search")
    x = torch.zeros(10, 2)
    chain = run_mcmc(energy, x, method="mala", evaluations=1000, generator=rng(), step_size=0.5)
    short = refine(energy, x, steps=5, generator=rng())
    assert energy.counts == {"search": 5, "mcmc": chain.evaluations + short.evaluations}
    assert chain.evaluations == 1000 and energy.failures == 5 + chain.num_bad + short.num_bad
    with pytest.raises(BudgetExceededError):
        refine(energy, x, steps=500, generator=rng())


def test_float32_stays_float32():
    result = run_mcmc(quadratic, normal(6, 2, dtype=torch.float32), evaluations=3000)
    assert result.samples.dtype == torch.float32 and result.energy.dtype == torch.float64
    for method in ("rw", "mala", "hmc"):
        result = run_mcmc(
            quadratic, normal(6, 2, dtype=torch.float32), method=method, evaluations=3000
        )
        assert result.samples.dtype == torch.float32 and result.energy.dtype == torch.float64


# --- refinement -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rw", "mala", "hmc"])
def test_refinement_drifts_only_if_the_samples_are_wrong(method):
    """False alarm below 1e-6 for exact samples; twice too wide is seen at once."""
    wells, n = Wells(2.0, 0.5), 2000
    exact = refine(wells, wells.sample(n), steps=5, method=method, generator=rng())
    assert abs(exact.energy_drift) <= 5 * exact.energy_drift_se
    assert (ks_per_coordinate(exact.x, wells.cdfs) <= dkw_band(n, num_tests=2)).all()
    torch.testing.assert_close(exact.energy, wells(exact.x))
    wide = refine(wells, 2 * wells.sample(n), steps=5, method=method, generator=rng())
    assert wide.energy_drift < -5 * wide.energy_drift_se


def test_refinement_counts_and_admits_forbidden_samples():
    x = torch.cat((torch.zeros(50, 2), torch.full((3, 2), 9.0)))
    result = refine(walled(math.nan), x, steps=4, tuning_steps=6, generator=rng())
    assert result.num_infinite == 3 and result.energy_drift == 0 and result.num_bad >= 3
    assert result.evaluations == 53 + 6 * 50 + 4 * 53
    assert torch.equal(result.x[50:], x[50:])
    fixed = refine(quadratic, normal(9, 2), steps=4, step_size=0.5, generator=rng())
    assert fixed.evaluations == 9 * 5 and fixed.step_size == 0.5


def test_states_are_not_changed_by_steps():
    kernel = ParallelTempering(torch.linspace(0, 1, 3), 0.0, 2.0, MALA(0.5))
    x = normal(4, 2, dtype=torch.float32)
    state = kernel.start(quadratic, x)
    copy = dataclasses.replace(state, x=state.x.clone(), energy=state.energy.clone())
    kernel.step(state, rng())
    assert torch.equal(state.x, copy.x) and torch.equal(state.energy, copy.energy)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomWalk(0.0), "step_size must be positive, got 0.0"),
        (lambda: HMC(1.0, 0), "num_leapfrog must be at least 1, got 0"),
        (lambda: HMC(1.0, 2, jitter=1.0), "jitter must be"),
        (lambda: ParallelTempering(torch.tensor([0.0, 0.5])), "increase from 0 to 1"),
        (lambda: ParallelTempering(torch.tensor([0.0, 1.0]), scale=-1.0), "scale must be pos"),
        (
            lambda: run_mcmc(quadratic, torch.zeros(3), evaluations=100),
            r"x_0 must have shape \(chains, dim\)",
        ),
        (lambda: run_mcmc(quadratic, torch.ones(3, 2).bool(), evaluations=9), "real numbers"),
        (lambda: run_mcmc(quadratic, torch.full((3, 2), math.nan), evaluations=9), "be finite"),
        (lambda: run_mcmc(quadratic, torch.ones(3, 2), evaluations=99), "reference_scale must"),
        (lambda: run_mcmc(quadratic, normal(3, 2), evaluations=5), "at least 72 for one step of"),
        (lambda: run_mcmc(quadratic, normal(3, 2), evaluations=99, warm_up=1.0), "warm_up must"),
        (lambda: run_mcmc(quadratic, normal(3, 2), evaluations=99, num_levels=1), "num_levels"),
        (
            lambda: run_mcmc(quadratic, normal(3, 2), method="langevin", evaluations=99),
            "step_size must be given",
        ),
        (
            lambda: run_mcmc(quadratic, normal(3, 2), method="gibbs", evaluations=99),
            "method must be .* got 'gibbs'",
        ),
        (
            lambda: run_mcmc(
                quadratic, normal(3, 2), method="rw", evaluations=99, num_samples=999
            ),
            "num_samples must be at most 69",
        ),
        (
            lambda: run_mcmc(
                walled(math.inf), torch.full((3, 2), 9.0), method="rw", evaluations=99
            ),
            "finite energies, got 3 of 3",
        ),
        (
            lambda: run_mcmc(lambda x: x, normal(3, 2), method="rw", evaluations=99),
            r"energy must return one value per point, shape \(3,\) for points of shape \(3, 2\)",
        ),
        (
            lambda: run_mcmc(
                lambda x: quadratic(x.detach()), normal(3, 2), method="mala", evaluations=99
            ),
            "differentiable",
        ),
        (lambda: refine(quadratic, normal(3, 2), steps=0), "steps must be at least 1, got 0"),
        (lambda: refine(walled(math.inf), torch.full((3, 2), 9.0), steps=1), "finite energy"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
