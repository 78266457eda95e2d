import math

import pytest
import torch

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
    assert value.dtype is dtype and seen == [(6, 4)]
    torch.testing.assert_close(value, quadratic(x))


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


def test_an_energy_beyond_the_precision_of_the_points_has_weight_zero():
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
