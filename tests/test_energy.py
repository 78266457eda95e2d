import contextlib
import math
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from energies import from_numpy
from energies.gaussian_mixture import GaussianMixture
from rsm_sampler.target.energy import BudgetExceededError, EnergyError, MeteredEnergy
from tests.exact import NoReadBack


def quadratic(x):
    return x.square().sum(-1) / 2


def walled(value):
    """Quadratic where the first coordinate is positive, ``value`` elsewhere."""
    return lambda x: torch.where(x[:, 0] > 0, quadratic(x), value)


def points(*rows):
    return torch.tensor(rows)


# --- counting ---------------------------------------------------------------------------


def test_points_are_counted_by_purpose():
    energy = MeteredEnergy(quadratic, 4, budget=100)
    assert (energy.evaluations, energy.remaining, energy.counts) == (0, 100, {})
    energy(torch.zeros(2, 3, 4), purpose="search")
    energy(torch.zeros(4))
    energy(torch.zeros(0, 4))
    energy.value_and_gradient(torch.zeros(5, 4), purpose="search")
    assert energy.counts == {"search": 6 + 2 * 5, "training": 1}
    assert (energy.evaluations, energy.remaining) == (17, 83)
    assert MeteredEnergy(quadratic, 4).remaining is None


def test_the_budget_is_kept_and_nothing_is_evaluated_beyond_it():
    calls = []

    def energy(x):
        calls.append(len(x))
        return quadratic(x)

    metered = MeteredEnergy(energy, 2, budget=10)
    metered(torch.zeros(7, 2))
    with pytest.raises(BudgetExceededError, match="cover 4 more evaluations, got 3 left of 10"):
        metered(torch.zeros(4, 2))
    with pytest.raises(BudgetExceededError, match="cover 4 more evaluations, got 3 left of 10"):
        metered.value_and_gradient(torch.zeros(2, 2))
    metered(torch.zeros(3, 2))
    assert sum(calls) == 10 == metered.evaluations and metered.remaining == 0


def test_a_call_that_fails_in_the_energy_is_counted():
    metered = MeteredEnergy(lambda x: 1 / 0, 2)
    with pytest.raises(ZeroDivisionError):
        metered(torch.zeros(4, 2))
    assert metered.evaluations == 4


# --- values -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_batch_shape_and_precision(dtype):
    seen = []

    def energy(x):
        seen.append(x.shape)
        return quadratic(x).double()

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    value = MeteredEnergy(energy, 4)(x)
    assert value.dtype is torch.float64 and seen == [(6, 4)]
    assert torch.equal(value, quadratic(x.double()))
    value, gradient = MeteredEnergy(energy, 4).value_and_gradient(x)
    assert value.dtype is torch.float64 and gradient.dtype is dtype
    torch.testing.assert_close(gradient, x)


def test_contexts_go_along_point_by_point():
    energy = MeteredEnergy(lambda x, c: (x - c[:, :1]).square().sum(-1), 2, context_dim=3)
    x, c = torch.arange(12.0).view(3, 2, 2), torch.arange(18.0).view(3, 2, 3)
    expected = (x - c[..., :1]).square().sum(-1)
    assert torch.equal(energy(x, c), expected)
    value, gradient = energy.value_and_gradient(x, c)
    assert torch.equal(value, expected) and torch.equal(gradient, 2 * (x - c[..., :1]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_weight_zero(value):
    energy = MeteredEnergy(walled(value), 2)
    x = points([1.0, 0.0], [-1.0, 0.0])
    assert energy(x).tolist() == [0.5, math.inf]
    values, gradients = energy.value_and_gradient(x)
    assert values.tolist() == [0.5, math.inf] and gradients.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert energy.failures == (0 if value == math.inf else 2)


def test_an_energy_beyond_single_precision_has_weight_zero():
    energy = MeteredEnergy(lambda x: torch.full((len(x),), 1e300, dtype=torch.float64), 2)
    assert energy(torch.zeros(3, 2)).isposinf().all()
    with pytest.raises(EnergyError, match="all 3 points"):
        energy.check(torch.zeros(3, 2))


def test_gradients_are_those_of_autograd_and_leave_no_graph():
    target = GaussianMixture.paper()
    x = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy = MeteredEnergy(target, 2)
    with torch.no_grad():
        value, gradient = energy.value_and_gradient(x.requires_grad_())
    assert not value.requires_grad and not gradient.requires_grad
    torch.testing.assert_close(value, target(x).detach())
    torch.testing.assert_close(gradient, -target.score(x).detach())
    (flowing,) = torch.autograd.grad(energy(x).sum(), x)
    torch.testing.assert_close(flowing, gradient)


def test_a_finite_energy_with_an_infinite_gradient_has_weight_zero():
    energy = MeteredEnergy(lambda x: x.square().sum(-1).sqrt(), 2)  # no gradient at 0
    value, gradient = energy.value_and_gradient(points([0.0, 0.0], [3.0, 4.0]))
    assert value.tolist() == [math.inf, 5.0] and energy.failures == 1
    torch.testing.assert_close(gradient, points([0.0, 0.0], [0.6, 0.8]))


def test_no_value_is_read_back():
    energy = MeteredEnergy(walled(math.nan), 2, budget=100)
    with NoReadBack():
        for _ in range(3):
            energy(torch.ones(4, 2))
            energy.value_and_gradient(torch.ones(4, 2))


# --- what an energy may do --------------------------------------------------------------


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_the_energy_sees_points_of_its_own_in_one_precision(given, wanted):
    seen = []

    def energy(x, c):
        seen.extend([x, c])
        return (x.sum(-1) + c.sum(-1)).exp()

    base = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=given)
    x, c = base[:, ::4].requires_grad_(), base[:, 1:2]
    metered = MeteredEnergy(energy, 2, context_dim=1, dtype=wanted)
    with torch.no_grad():
        value = metered(x, c)
    assert metered.dtype is wanted and value.dtype is torch.float64
    for own, outer in zip(seen, (x, c), strict=True):
        assert own.dtype is wanted and own.is_contiguous() and not own.requires_grad
        assert own.data_ptr() != outer.data_ptr()
        assert torch.equal(own, outer.detach().to(wanted))


def test_an_energy_may_work_in_place():
    def energy(x):
        x[:, 0] = 3 * x[:, 0] - 1
        x *= 2
        return x.square().sum(-1)

    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = x.clone()
    inner = torch.stack([6 * x[:, 0] - 2, 2 * x[:, 1]], -1)
    metered = MeteredEnergy(energy, 2)
    torch.testing.assert_close(metered(x), inner.square().sum(-1))
    value, gradient = metered.value_and_gradient(x)
    torch.testing.assert_close(value, inner.square().sum(-1))
    torch.testing.assert_close(gradient, 2 * inner * torch.tensor([6.0, 2.0]).double())
    assert torch.equal(x, before)


def test_an_energy_that_spoils_its_own_gradient_is_told():
    def energy(x):
        value = x.square().sum(-1)
        x += 1
        return value

    metered = MeteredEnergy(energy, 2)
    assert metered(torch.ones(1, 2)) == 2
    with pytest.raises(EnergyError, match="must not change in place what its gradient needs"):
        metered.value_and_gradient(torch.ones(1, 2))


def test_an_energy_may_keep_its_points_and_its_values():
    kept, buffer = [], torch.zeros(40, dtype=torch.float64)

    def energy(x):
        for old in kept:
            old.fill_(torch.nan)
        kept.append(x)
        return torch.sum(x, -1, out=buffer[: len(x)])

    x = torch.arange(400.0, dtype=torch.float64).view(200, 2)
    metered = MeteredEnergy(energy, 2)
    value = torch.cat([metered(piece) for piece in x.split(40)])
    assert len(kept) > 5 and torch.equal(value, x.sum(-1))  # the first call is divided
    assert x.isfinite().all()


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_settings_are_as_before(fails):
    def energy(x):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        if fails:
            raise ZeroDivisionError
        return quadratic(x)

    metered = MeteredEnergy(energy, 2)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            for call in (metered, metered.value_and_gradient):
                with contextlib.suppress(ZeroDivisionError, EnergyError):
                    call(torch.zeros(3, 2))
                assert torch.get_default_dtype() is torch.float32
                assert torch.is_grad_enabled() is enabled


def test_values_that_require_a_gradient_come_back_without():
    slope = torch.ones(2, dtype=torch.float64, requires_grad=True)
    value = MeteredEnergy(lambda x: x @ slope, 2)(torch.ones(3, 2))
    assert value.tolist() == [2.0] * 3 and not value.requires_grad


def test_an_energy_may_differentiate_itself_wherever_it_is_called():
    def energy(x):
        y = x.clone().requires_grad_()
        return torch.autograd.grad(y.pow(3).sum(), y)[0].sum(-1)

    with torch.no_grad():
        assert MeteredEnergy(energy, 2)(torch.ones(3, 2)).tolist() == [6.0] * 3


def test_points_that_require_a_gradient_get_it_and_count_twice():
    metered = MeteredEnergy(quadratic, 2, budget=10)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(3 * metered(x).sum(), x)
    assert torch.equal(gradient, 3 * x) and gradient.dtype is torch.float32
    assert metered.evaluations == 4
    plain = MeteredEnergy(lambda x: quadratic(x.detach()), 2)
    assert not plain(x).requires_grad and plain.evaluations == 2


def test_a_huge_constant_leaves_all_digits():
    """At 1e8 double precision has steps of 1.5e-8, single precision of 8."""
    x = torch.linspace(-1, 1, 101)[:, None]
    value = MeteredEnergy(from_numpy(lambda x: 1e8 + 0.5 * (x**2).sum(-1)), 1)(x)
    expected = 0.5 * x.double().square().sum(-1)
    torch.testing.assert_close(value - 1e8, expected, rtol=0, atol=3e-8)


def test_tensors_of_another_precision_in_the_energy_are_named():
    for own, wanted in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        matrix = torch.ones(2, 5, dtype=own)

        def energy(x, matrix=matrix):
            return (x @ matrix).sum(-1)

        with pytest.raises(EnergyError, match=f"points in {wanted}, .* give dtype={own}"):
            MeteredEnergy(energy, 2, dtype=wanted)(torch.ones(3, 2))
        assert MeteredEnergy(energy, 2, dtype=own)(torch.ones(3, 2)).tolist() == [10.0] * 3


# --- batches ----------------------------------------------------------------------------


def recording(energy, sizes):
    def recorded(x, *context):
        sizes.append(len(x))
        return energy(x, *context)

    return recorded


def test_a_cheap_energy_soon_gets_as_many_points_as_there_are():
    sizes = []
    metered = MeteredEnergy(recording(quadratic, sizes), 2)
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = metered(x)
    assert max(sizes) == 65_536 and sum(sizes) == 200_000 and len(sizes) < 20
    assert torch.equal(value, quadratic(x))
    sizes.clear()
    metered(x[:65_536])
    assert sizes == [65_536] and metered.evaluations == 265_536


@pytest.mark.parametrize("gradient", [False, True])
def test_values_do_not_depend_on_the_batches(gradient):
    target = GaussianMixture.paper()
    x = 3 * torch.randn(5001, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = torch.arange(5001.0, dtype=torch.float64)[:, None]
    sizes = []
    metered = MeteredEnergy(recording(lambda x, c: target(x) + c[:, 0], sizes), 2, context_dim=1)
    value = metered.value_and_gradient(x, c)[0] if gradient else metered(x, c)
    assert len(sizes) > 4 and min(sizes) >= 16
    assert torch.equal(value, target(x) + c[:, 0])


@pytest.mark.parametrize("purpose", ["value", "gradient"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((300, 7), np.dtype("f8")),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_call_that_finds_no_memory_is_made_again_with_half_the_points(error, purpose):
    most, sizes = 300, []

    def energy(x):
        if len(x) > most:
            raise error
        return quadratic(x)

    metered = MeteredEnergy(recording(energy, sizes), 2)
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):
        value = metered(x) if purpose == "value" else metered.value_and_gradient(x)[0]
        assert torch.equal(value, quadratic(x))
    assert metered.evaluations == (1 if purpose == "value" else 2) * 10_000
    assert max(sizes) == 1024 and sum(size > most for size in sizes) == 2  # 1024 and 512


def test_memory_for_a_single_point_has_to_be_there():
    def energy(x):
        raise MemoryError

    with pytest.raises(MemoryError):
        MeteredEnergy(energy, 2)(torch.zeros(100, 2))


def test_other_errors_are_not_tried_again():
    sizes = []

    def energy(x):
        raise RuntimeError("no convergence")

    with pytest.raises(RuntimeError, match="no convergence"):
        MeteredEnergy(recording(energy, sizes), 2)(torch.zeros(10, 2))
    assert sizes == [10]


# --- time -------------------------------------------------------------------------------


def test_the_time_of_a_point_is_measured():
    def energy(x):
        time.sleep(0.002 * len(x))
        return quadratic(x)

    metered = MeteredEnergy(energy, 2)
    assert math.isnan(metered.seconds_per_point)
    metered(torch.zeros(40, 2))
    assert 0.002 <= metered.seconds_per_point < 0.02
    assert metered.seconds >= 0.08


@pytest.fixture
def own_alarm():
    """A handler and a distant alarm of somebody else."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    mine = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    yield mine
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_point_that_takes_too_long_has_weight_zero(gradient, own_alarm):
    sizes = []

    def energy(x):
        if bool((x[:, 0] > 3).any()):
            time.sleep(30)
        return quadratic(x)

    x = torch.arange(7.0)[:, None].expand(-1, 2)
    metered = MeteredEnergy(recording(energy, sizes), 2, call_timeout=0.1)
    started = time.monotonic()
    value = metered.value_and_gradient(x)[0] if gradient else metered(x)
    assert 0.4 <= time.monotonic() - started < 10
    assert value.tolist() == [0.0, 1.0, 4.0, 9.0] + 3 * [math.inf]
    assert sizes == [7] + 7 * [1]
    assert metered.timeouts == 3 and metered.failures == 0
    assert metered.evaluations == (14 if gradient else 7)
    with pytest.warns(RuntimeWarning, match="3 of 7 points .* longer than call_timeout=0.1 s"):
        assert metered.check(x) == pytest.approx(3 / 7)
    assert metered.check(x) == 0  # it was told once
    assert signal.getsignal(signal.SIGALRM) is own_alarm
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 900 < left <= 1000 and interval == 7


def test_an_energy_that_never_answers_in_time_is_refused():
    def energy(x):
        time.sleep(30)
        return quadratic(x)

    metered = MeteredEnergy(energy, 2, call_timeout=0.05)
    metered(torch.zeros(3, 2))
    with pytest.raises(EnergyError, match=r"all 3 points.*; 3 took longer than call_timeout=0.05"):
        metered.check(torch.zeros(3, 2))


def test_calls_are_kept_well_below_the_timeout():
    """So that points are not evaluated twice because there are many of them."""
    sizes = []

    def energy(x):
        time.sleep(0.01 * len(x))
        return quadratic(x)

    metered = MeteredEnergy(recording(energy, sizes), 2, call_timeout=0.5)
    metered(torch.zeros(60, 2))
    assert metered.timeouts == 0 and sum(sizes) == 60 and max(sizes) <= 32


def test_other_exceptions_leave_a_bounded_call_unchanged(own_alarm):
    metered = MeteredEnergy(lambda x: 1 / 0, 2, call_timeout=5.0)
    with pytest.raises(ZeroDivisionError):
        metered(torch.zeros(3, 2))
    assert signal.getsignal(signal.SIGALRM) is own_alarm


def test_beside_the_main_thread_there_is_no_limit_and_one_warning():
    metered = MeteredEnergy(quadratic, 2, call_timeout=1.0)
    caught = []

    def work():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            metered(torch.zeros(3, 2))
            metered(torch.zeros(3, 2))
        caught.extend(found)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "call_timeout has no effect here" in str(caught[0].message)
    assert metered.call_timeout is None and metered.evaluations == 6


def test_nothing_is_evaluated_after_the_deadline():
    sizes = []
    metered = MeteredEnergy(recording(quadratic, sizes), 2)
    metered.deadline = time.monotonic() + 1000
    metered(torch.zeros(3, 2))
    metered.deadline = time.monotonic() - 2
    for call in (metered, metered.value_and_gradient):
        with pytest.raises(BudgetExceededError, match=r"deadline .* got 4 points .* 2.\d s after"):
            call(torch.zeros(4, 2))
    assert sizes == [3] and metered.evaluations == 3
    metered.deadline = None
    assert metered(torch.zeros(4, 2)).shape == (4,)


def test_a_deadline_within_a_call_ends_it_between_batches():
    sizes = []

    def energy(x):
        time.sleep(0.01 * len(x))
        return quadratic(x)

    metered = MeteredEnergy(recording(energy, sizes), 2)
    metered.deadline = time.monotonic() + 0.2
    with pytest.raises(BudgetExceededError, match="deadline must not have passed"):
        metered(torch.zeros(1000, 2), purpose="search")
    assert metered.counts == {"search": sum(sizes)} and 16 < sum(sizes) < 500


# --- noise ------------------------------------------------------------------------------


def test_repeatability_is_the_noise_of_an_energy():
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    exact = MeteredEnergy(quadratic, 2)
    assert exact.repeatability(x) == 0 and exact.counts == {"probe": 128}
    walls = MeteredEnergy(walled(math.nan), 2)
    assert walls.repeatability(x) == 0
    calls = iter(range(1000))

    def noisy(size):
        return lambda x: quadratic(x) + size * next(calls)

    assert MeteredEnergy(noisy(0.5), 2).repeatability(x[:10]) == pytest.approx(0.5)
    assert MeteredEnergy(noisy(1e-7), 2).repeatability(x[:10]) == 0  # rounding
    large = MeteredEnergy(lambda x: 1e9 + noisy(0.5)(x), 2)
    assert large.repeatability(x[:10]) == 0  # half a nat is rounding there
    sometimes = MeteredEnergy(lambda x: quadratic(x) + (math.inf if next(calls) % 2 else 0), 2)
    assert sometimes.repeatability(x[:10]) == math.inf
    other = MeteredEnergy(lambda x, c: noisy(2.0)(x) + c[:, 0], 2, context_dim=1)
    assert other.repeatability(x[:10], torch.ones(10, 1)) == pytest.approx(2.0)
    assert exact.repeatability(x[:0]) == 0


def test_a_meter_apart_counts_by_itself():
    metered = MeteredEnergy(quadratic, 2, budget=5, dtype=torch.float32, call_timeout=9.0)
    metered.deadline = 0.0
    other = metered.apart()
    assert (other.budget, other.deadline) == (None, None)
    assert (other.dtype, other.call_timeout) == (torch.float32, 9.0)
    other(torch.zeros(8, 2))
    assert other.evaluations == 8 and metered.evaluations == 0
    assert metered.seconds == other.seconds > 0


# --- check ------------------------------------------------------------------------------


def test_check_gives_the_share_of_weight_zero_since_the_last_one():
    energy = MeteredEnergy(walled(math.nan), 2)
    x = points([1.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [2.0, 2.0])
    assert energy.check(x) == 0
    energy(x)
    energy.value_and_gradient(x)
    assert energy.check(x) == 0.25 and energy.check(x) == 0
    energy(x[2:])
    assert energy.check(x) == 0 and energy.failures == 2


def test_check_names_the_region_where_nothing_is_finite():
    energy = MeteredEnergy(walled(math.inf), 4)
    x = torch.tensor([[-1.0, 2.0, 0.0, 9.0], [-3.0, 0.5, 1e6, 9.0]])
    energy(x)
    match = r"NaN or inf at all 2 points, .* \(-3, 0.5, 0, ...\) and \(-1, 2, 1e\+06, ...\)"
    with pytest.raises(EnergyError, match=match):
        energy.check(x[None])
    assert energy.check(x) == 0  # it was told once


def test_check_refuses_infinite_density():
    energy = MeteredEnergy(walled(-math.inf), 2)
    x = points([1.0, 0.0], [-1.0, 0.0])
    energy(x)
    with pytest.raises(EnergyError, match="above -inf, got -inf at 1 of 2 points"):
        energy.check(x)
    energy(x[:1])
    assert energy.check(x) == 0


# --- messages ---------------------------------------------------------------------------


def test_a_target_that_knows_its_dimension_is_believed():
    assert MeteredEnergy(GaussianMixture.paper(), 2).dim == 2
    with pytest.raises(ValueError, match="dim must be the energy's own dimension 2, got 3"):
        MeteredEnergy(GaussianMixture.paper(), 3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: x, r"one value per point, shape \(3,\) for .* \(3, 2\), got \(3, 2\)"),
        (lambda x: quadratic(x).sum(), r"one value per point, .* got \(\)"),
        (lambda x: quadratic(x).numpy(), "torch tensor, got ndarray; .*from_numpy"),
        (lambda x: quadratic(x).long(), "floating-point values, got torch.int64"),
    ],
)
def test_what_is_no_energy_is_refused(energy, message):
    with pytest.raises(EnergyError, match=message):
        MeteredEnergy(energy, 2)(torch.zeros(3, 2))


def test_an_energy_without_a_graph_has_no_gradient():
    with pytest.raises(EnergyError, match="differentiable by autograd"):
        MeteredEnergy(lambda x: quadratic(x.detach()), 2).value_and_gradient(torch.zeros(3, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MeteredEnergy(quadratic, 0), ValueError, "dim must be at least 1, got 0"),
        (lambda: MeteredEnergy(quadratic, 2, context_dim=0), ValueError, "context_dim must be"),
        (lambda: MeteredEnergy(quadratic, 2, budget=0), ValueError, "budget must be at least 1"),
        (
            lambda: MeteredEnergy(quadratic, 2, dtype=torch.float16),
            ValueError,
            "dtype must be torch.float64 or torch.float32, got torch.float16",
        ),
        (
            lambda: MeteredEnergy(quadratic, 2, call_timeout=0.0),
            ValueError,
            "call_timeout must be positive, got 0.0",
        ),
        (lambda: MeteredEnergy(3, 2), TypeError, "callable, got int; .*from_distribution"),
        (
            lambda: MeteredEnergy(quadratic, 2)(torch.zeros(3, 4)),
            ValueError,
            r"x must have shape \(..., 2\), got \(3, 4\)",
        ),
        (
            lambda: MeteredEnergy(quadratic, 2)(torch.zeros(3, 2), torch.zeros(3, 1)),
            ValueError,
            r"context must be None, got shape \(3, 1\)",
        ),
        (
            lambda: MeteredEnergy(quadratic, 2, context_dim=1)(torch.zeros(3, 2)),
            ValueError,
            r"context must be of shape \(3, 1\), got None",
        ),
        (
            lambda: MeteredEnergy(quadratic, 2, context_dim=1)(torch.zeros(3, 2), torch.ones(1)),
            ValueError,
            r"context must have shape \(3, 1\), got \(1,\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
