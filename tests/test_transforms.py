import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsm_sampler.target.coordinates import Affine, Bounds, bounds_of, coordinates_of
from tests.exact import NoReadBack

DOUBLE = torch.float64
INF = math.inf
# One coordinate of each kind: free, above, below, between.
LOW, HIGH = [-INF, -1.5, -INF, 2.0], [INF, INF, 0.5, 5.0]


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixed():
    return Bounds(LOW, HIGH, dim=4)


# --- bounds -----------------------------------------------------------------------------


def test_the_maps_are_those_of_the_table():
    u = torch.tensor([[0.7, 0.7, 0.7, 0.7], [-3.0, -3.0, -3.0, -3.0]], dtype=DOUBLE)
    x, log_det = mixed().forward(u)
    sigmoid = torch.sigmoid(u)
    expected = [
        u[:, 0],
        -1.5 + (1 + u[:, 1].exp()).log(),
        0.5 - (1 + (-u[:, 2]).exp()).log(),
        2 + 3 * torch.special.ndtr(u[:, 3]),
    ]
    torch.testing.assert_close(x, torch.stack(expected, -1))
    normal_density = (-0.5 * u[:, 3].square()).exp() / math.sqrt(2 * math.pi)
    slopes = sigmoid[:, 1] * (1 - sigmoid[:, 2]) * 3 * normal_density
    torch.testing.assert_close(log_det, slopes.log())


def test_files_that_do_not_say_otherwise_have_logistic_bounds():
    """Samplers were written before two-sided bounds became those of the normal law."""
    low, high = (torch.tensor(end, dtype=DOUBLE) for end in (LOW, HIGH))
    old = coordinates_of({"low": low, "high": high})
    u = normal(50, 4)
    x, log_det = old.forward(u)
    sigmoid = torch.sigmoid(u[:, 3])
    torch.testing.assert_close(x[:, 3], 2 + 3 * sigmoid)
    torch.testing.assert_close(old.inverse(x), u)
    both = (3 * sigmoid * (1 - sigmoid)).log()
    rest = torch.sigmoid(u[:, 1]).log() + torch.sigmoid(-u[:, 2]).log()
    torch.testing.assert_close(log_det, both + rest)
    assert old.logistic and set(old.state_dict()) == {"low", "high"}


@pytest.mark.parametrize("reach", [1.0, 10.0, 30.0])
def test_the_volume_is_that_of_autograd(reach):
    u = reach * normal(50, 4) * torch.tensor([1.0, 1.0, 1.0, 0.2], dtype=DOUBLE)
    _, log_det = mixed().forward(u)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: mixed().forward(v)[0]))(u)
    free = jacobian.abs().diagonal(dim1=1, dim2=2).amin(-1) > 0  # not held inside by a clamp
    assert free.float().mean() > 0.6
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_det[free], expected[free], rtol=1e-8, atol=1e-8)


@given(u=st.floats(-30, 30), shift=st.floats(-3, 3), width=st.floats(0.01, 100))
def test_bounds_round_trip(u, shift, width):
    """Up to the digits that x can hold near a bound."""
    for low, high in [(-INF, INF), (shift, INF), (-INF, shift), (shift, shift + width)]:
        bounds = Bounds(low, high, 1)
        point = torch.tensor([u], dtype=DOUBLE)
        x, log_det = bounds.forward(point)
        eps = 4e-16 * (abs(shift) + width + abs(u))
        tolerance = 1e-12 + 4 * eps * (-log_det).exp().item()
        if tolerance < 0.1:
            assert abs(bounds.inverse(x).item() - u) <= tolerance
        assert low < x.item() < high


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("u", [-1e30, -1e4, -200.0, -50.0, 50.0, 200.0, 1e4, 1e30])
def test_points_stay_strictly_inside(u, dtype):
    point = torch.full((1, 4), u, dtype=dtype, requires_grad=True)
    x, log_det = mixed().forward(point)
    low, high = torch.tensor(LOW, dtype=dtype), torch.tensor(HIGH, dtype=dtype)
    assert (x > low).all() and (x < high).all() and x.dtype is log_det.dtype is dtype
    assert log_det.isfinite()
    gradient = torch.autograd.grad(x.sum() + log_det.sum(), point)[0]
    assert gradient.isfinite().all()
    assert mixed().inverse(x)[..., 1:].isfinite().all()


@given(u=st.floats(-800, 800), low=st.floats(-1e6, 1e6))
def test_points_stay_inside_in_single_precision_too(u, low):
    """Made in double, where they may be nearer to a bound than single precision can say."""
    bounds = Bounds(low, low + max(1.0, abs(low)), dim=1)
    x = bounds.inside(bounds.forward(torch.tensor([u], dtype=DOUBLE))[0], torch.float32)
    assert x.dtype == torch.float32
    assert bounds.low.float() < x < bounds.high.float()
    one = Bounds(-math.inf, 0.0, dim=1)
    assert one.inside(one.forward(torch.tensor([u], dtype=DOUBLE))[0], torch.float32) < 0


def test_small_distances_from_zero_keep_their_digits():
    u = torch.tensor([[-80.0, 80.0]], dtype=torch.float32)
    x, _ = Bounds([0.0, -INF], [INF, 0.0], 2).forward(u)
    torch.testing.assert_close(
        x.double(),
        torch.tensor([[-80.0, -80.0]], dtype=DOUBLE).exp()
        * torch.tensor([1.0, -1.0], dtype=DOUBLE),
        rtol=1e-5,
        atol=0,
    )
    y = torch.tensor([1e-30, 1e-5, 0.3, 5.0, 50.0, 1e4], dtype=DOUBLE)[:, None]
    back, _ = Bounds(0.0, INF, 1).forward(Bounds(0.0, INF, 1).inverse(y))
    torch.testing.assert_close(back, y, rtol=1e-12, atol=0)


def test_points_outside_have_no_preimage():
    x = torch.tensor([[9.0, -1.5, 0.5, 2.0], [9.0, -2.0, 1.0, 5.0], [9.0, 0.0, 0.0, 3.0]])
    nan = mixed().inverse(x).isnan()
    assert nan.tolist() == [[False, True, True, True]] * 2 + [[False] * 4]


def test_a_density_keeps_its_mass():
    """The integral of exp(-E) over a box, by the trapezoidal rule in unbounded coordinates."""
    grid = torch.linspace(-40, 40, 4001, dtype=DOUBLE)[:, None]
    for low, high, exact in [
        (0.0, INF, 1.0),  # the exponential law
        (-INF, 0.0, 1.0),
        (1.0, 3.0, math.exp(-1) - math.exp(-3)),
    ]:
        x, log_det = Bounds(low, high, 1).forward(grid)
        value = np.trapezoid((log_det - x[:, 0].abs()).exp(), grid[:, 0])
        assert value == pytest.approx(exact, rel=1e-6)


def test_without_bounds_nothing_is_done():
    bounds, u = Bounds(-INF, INF, 3), normal(5, 3)
    assert not bounds.active and mixed().active
    x, log_det = bounds.forward(u)
    assert x is u and bounds.inverse(u) is u and torch.equal(log_det, torch.zeros(5, dtype=DOUBLE))


def test_batch_shapes_state_and_precision():
    bounds = Bounds(0.0, torch.tensor([1.0, 2.0]), 2)
    u = normal(3, 5, 2, dtype=torch.float32)
    x, log_det = bounds.forward(u)
    assert x.shape == (3, 5, 2) and log_det.shape == (3, 5) and log_det.dtype is torch.float32
    again = coordinates_of(bounds.state_dict())
    assert torch.equal(again.forward(u)[0], x)
    torch.testing.assert_close(again.inverse(x), u, rtol=1e-4, atol=1e-4)
    with NoReadBack():
        bounds.forward(u), bounds.inverse(x)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bounds(0.0, 1.0, 0), "dim must be at least 1, got 0"),
        (lambda: Bounds(1.0, 1.0, 2), "low below high .* got low .* and high"),
        (lambda: Bounds(INF, INF, 2), "low below high"),
        (lambda: Bounds(math.nan, 1.0, 2), "low must be a number, got nan"),
        (lambda: Bounds([0.0, 0.0, 0.0], 1.0, 2), r"low must be a number or 2 .* shape \(3,\)"),
        (lambda: Bounds(0.0, torch.ones(2, 1), 2), r"high must be a number or 2 .* \(2, 1\)"),
        (
            lambda: Bounds(1.0, 1.0 + 1e-12, 2).forward(torch.zeros(1, 2)),
            "bounds must be apart in torch.float32",
        ),
        (
            lambda: Affine(torch.zeros(2), torch.eye(3)),
            r"scale_tril must have shape \(2, 2\), got \(3, 3\)",
        ),
        (lambda: Affine(torch.full((2,), INF), torch.eye(2)), "loc must be finite"),
        (lambda: Affine(torch.zeros(2), -torch.eye(2)), "positive diagonal"),
        (lambda: Affine(torch.zeros(2), torch.ones(2, 2)), "lower triangular"),
        (lambda: Affine(torch.zeros(2), torch.eye(2) * math.nan), "finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- location and scale -----------------------------------------------------------------


def affine(dim=3):
    scale_tril = normal(dim, dim, seed=1).tril(-1) + torch.diag(normal(dim, seed=2).exp())
    return Affine(normal(dim, seed=3), scale_tril)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 0, 3), (2, 4, 3)])
def test_affine_round_trip(shape):
    z, map_ = normal(*shape), affine()
    u = map_.forward(z)
    torch.testing.assert_close(u, map_.loc + torch.einsum("ij,...j->...i", map_.scale_tril, z))
    torch.testing.assert_close(map_.inverse(u), z)


def test_affine_has_the_volume_of_its_jacobian_and_the_moments_of_its_factor():
    map_ = affine()
    jacobian = torch.func.jacrev(map_.forward)(normal(3))
    torch.testing.assert_close(jacobian, map_.scale_tril)
    assert map_.log_det == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item())
    assert Affine.identity(4).log_det == 0
    assert torch.equal(Affine.identity(4).forward(normal(2, 4)), normal(2, 4))


def test_affine_takes_the_precision_of_the_points():
    map_ = affine()
    z = normal(5, 3, dtype=torch.float32)
    assert map_.forward(z).dtype is map_.inverse(z).dtype is torch.float32
    again = Affine(**map_.state_dict())
    assert torch.equal(again.forward(z), map_.forward(z)) and again.log_det == map_.log_det
    with NoReadBack():
        map_.inverse(map_.forward(z))


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ((0.0, 1.0), [0, 0], [1, 1]),
        ((0.0, [1.0, 2.0]), [0, 0], [1, 2]),
        (([0.0, 1.0], [2.0, 3.0]), [0, 1], [2, 3]),
        ((torch.zeros(2), torch.ones(2)), [0, 0], [1, 1]),
        ([(-5.0, 5.0), (0.0, 1.0)], [-5, 0], [5, 1]),  # as (low, high) it would be no box
        ([(1.0, 0.0), (3.0, 2.0)], [1, 0], [3, 2]),  # as pairs it would be none
        ([(0.0, None), (2.0, 3.0)], [0, 2], [math.inf, 3]),
        ([(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)], [0, 2, 4], [1, 3, 5]),
        (torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), [0, 2, 4], [1, 3, 5]),
        ([(0.0, 1.0)], [0], [1]),
        (None, [-math.inf], [math.inf]),
    ],
)
def test_bounds_come_in_two_forms(given, low, high):
    bounds = bounds_of(given, len(low))
    assert (bounds.low.tolist(), bounds.high.tolist()) == (low, high)


def test_bounds_keep_double_precision():
    assert bounds_of(([2450000.123, 0.1], [2450001.0, 1.0]), 2).low.tolist() == [2450000.123, 0.1]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("given", "dim", "message"),
    [
        ([(0.0, 1.0), (2.0, 3.0)], 2, r"write \(\[0.0, 1.0\], \[2.0, 3.0\]\).*\[0.0, 2.0\], \[1"),
        ([[0.0, 1.0], [2.0, 3.0]], 2, "bounds must have one meaning"),
        (([0, 0], [1]), 2, r"high must be a number or 2 numbers, got shape \(1,\)"),
        ((0.0,), 3, r"bounds must be \(low, high\), .* or a list of 3 pairs .*, got \(0.0,\)"),
        ("ab", 2, "bounds must be .*, got 'ab'"),
        (3.0, 2, "bounds must be .*, got 3.0"),
        ((1.0, 0.0), 2, "bounds must have low below high"),
    ],
)
def test_bounds_of_no_or_two_meanings_are_refused(given, dim, message):
    with pytest.raises(ValueError, match=message):
        bounds_of(given, dim)
