"""What every target promises, and what each family knows, against independent computations."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

import energies
from energies import (
    DecayPosterior,
    Funnel,
    ManyWell,
    Rings,
    StudentT,
    SymmetricManyWell,
    Target,
    TwoMoons,
)
from energies.quadrature import InverseCDF, integrate_cells

NO_DRAWS = {"lj13", "lj55", "breast-cancer"}  # they have tests of their own
NAMES = [
    name
    for name in energies.names()
    if not name.startswith("conditional") and name not in NO_DRAWS
]
_made = {name: energies.get(name) for name in NAMES}
PLANE = [name for name in NAMES if _made[name].dim == 2]
SMOOTH = [name for name in NAMES if name != "rings"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dkw_band(n, alarm=1e-6):
    """Half-width of the Dvoretzky-Kiefer-Wolfowitz band."""
    return math.sqrt(math.log(2 / alarm) / (2 * n))


# -- every target ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape(name, dtype):
    target = _made[name]
    x = target.sample((3, 2), generator=seeded(), dtype=dtype)
    assert x.shape == (3, 2, target.dim)
    assert x.dtype == dtype
    for value in (target(x), target.log_prob(x)):
        assert value.shape == (3, 2)
        assert value.dtype == dtype
    assert target.sample().shape == (target.dim,)
    assert target.sample(4).shape == (4, target.dim)
    assert target.sample((0,)).shape == (0, target.dim)
    assert target(x[:0]).shape == (0, 2)


@pytest.mark.parametrize("name", NAMES)
def test_energies_run_where_their_argument_lives(name):
    x = torch.empty(5, _made[name].dim, device="meta")
    assert _made[name](x).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_energies_and_draws_agree_on_cuda(name):
    target = _made[name]
    x = target.sample(100, generator=seeded(), device="cuda")
    assert x.device.type == "cuda"
    torch.testing.assert_close(target(x).cpu(), target(x.cpu()), rtol=1e-4, atol=1e-4)
    there = target.sample(100, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    assert bool(target(there).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_the_seed_alone(name):
    target = _made[name]
    state = torch.get_rng_state()
    one = target.sample(50, generator=seeded(7))
    two = target.sample((5, 10), generator=seeded(7), dtype=torch.float64)
    torch.testing.assert_close(one.reshape(5, 10, -1), two.float(), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, target.sample(50, generator=seeded(8)))


@pytest.mark.parametrize("name", NAMES)
def test_targets_survive_pickle_and_copy(name):
    target = _made[name]
    x = target.sample(5, generator=seeded())  # makes what is made on first use
    for other in (pickle.loads(pickle.dumps(target)), copy.deepcopy(target)):
        assert torch.equal(other(x), target(x))
        assert torch.equal(other.sample(5, generator=seeded()), x)


@given(
    name=st.sampled_from(NAMES),
    batch=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_batch_is_a_loop(name, batch, seed):
    target = _made[name]
    x = 2 * torch.randn(*batch, target.dim, generator=seeded(seed), dtype=torch.float64)
    energy = target(x)
    assert energy.shape == tuple(batch)
    for index in itertools.product(*map(range, batch)):
        torch.testing.assert_close(energy[index], target(x[index]))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_energy(name):
    target = _made[name]
    x = target.sample(4, generator=seeded(3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(target, (x,), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nan_passes_through(name):
    target = _made[name]
    x = torch.zeros(2, target.dim)
    x[1, 0] = torch.nan
    assert target(x).isnan().tolist() == [False, True]


@pytest.mark.numbers
@pytest.mark.parametrize("name", NAMES)
def test_extent_holds_the_mass(name):
    """1e-6 outside by construction; 20,000 draws see more than 3 with probability below 1e-8."""
    target = _made[name]
    low, high = target.extent
    x = target.sample(20_000, generator=seeded(5), dtype=torch.float64)
    assert int(((x < low) | (x > high)).any(-1).sum()) <= 3


@pytest.mark.parametrize("name", [n for n in NAMES if _made[n].mode_weights is not None])
def test_mode_weights_are_mean_responsibilities(name):
    """Hoeffding for numbers in [0, 1]; false alarm below 1e-6, detects 0.02."""
    target, n = _made[name], 20_000
    x = target.sample(n, generator=seeded(6), dtype=torch.float64)
    share = target.responsibilities(x)
    torch.testing.assert_close(share.sum(-1), torch.ones(n, dtype=torch.float64))
    bound = math.sqrt(math.log(2 * share.shape[-1] / 1e-6) / (2 * n))
    assert float(target.mode_weights.sum()) == pytest.approx(1)
    assert float((share.mean(0) - target.mode_weights).abs().max()) <= bound


@pytest.mark.parametrize("name", ["two-moons", "double-well", "student-t", "decay"])
def test_modes_are_minima(name):
    target = _made[name]
    for mode in target.modes:
        gradient = torch.autograd.functional.jacobian(target.energy, mode)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)
        around = mode + 0.05 * torch.randn(100, target.dim, generator=seeded(), dtype=mode.dtype)
        assert bool((target(around) > target(mode)).all())


@pytest.mark.parametrize("name", PLANE)
def test_draws_fill_the_cells_as_computed(name):
    """Pearson's chi-square over cells with at least 10 expected draws; false alarm 1e-6."""
    target, n = _made[name], 50_000
    x = target.sample(n, generator=seeded(9), dtype=torch.float64)
    low, high = torch.quantile(x, 0.002, dim=0), torch.quantile(x, 0.998, dim=0)
    edges = [
        torch.linspace(float(a), float(b), 25, dtype=torch.float64)
        for a, b in zip(low, high, strict=True)
    ]
    expected = n * target.cell_masses(*edges).numpy().ravel()
    counts = np.histogram2d(*x.numpy().T, bins=[e.numpy() for e in edges])[0].ravel()
    rich = expected >= 10
    expected = np.append(expected[rich], n - expected[rich].sum())
    counts = np.append(counts[rich], n - counts[rich].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic <= stats.chi2.isf(1e-6, len(expected) - 1)


@pytest.mark.parametrize("name", PLANE)
def test_cells_of_a_box_hold_all_mass(name):
    target = _made[name]
    low, high = target.extent
    edges = [torch.linspace(float(a), float(b), 12) for a, b in zip(low, high, strict=True)]
    total = float(target.cell_masses(*edges).sum())
    assert 1 - 2e-6 <= total <= 1 + 1e-8


# -- quadrature -----------------------------------------------------------------------------------


def test_thin_rings_are_not_stepped_over():
    """Against a midpoint rule of 4 million points per cell; both are good to 1e-6."""
    target = Rings()
    edges = torch.tensor([0.0, 2.0, 3.05, 5.0], dtype=torch.float64)
    masses = target.cell_masses(edges, edges)
    for i, j in itertools.product(range(3), repeat=2):
        (a, b), (c, d) = edges[i : i + 2].tolist(), edges[j : j + 2].tolist()
        k = 1000
        x = a + (b - a) * (torch.arange(k, dtype=torch.float64) + 0.5) / k
        y = c + (d - c) * (torch.arange(k, dtype=torch.float64) + 0.5) / k
        points = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1)
        brute = float(target.log_prob(points).exp().mean()) * (b - a) * (d - c)
        assert float(masses[i, j]) == pytest.approx(brute, abs=1e-6)


def test_cell_masses_do_not_depend_on_the_grid():
    target = TwoMoons()
    fine = torch.linspace(-3, 3, 61, dtype=torch.float64)
    masses = target.cell_masses(fine, fine)
    coarse = target.cell_masses(fine[::20], fine[::30])
    torch.testing.assert_close(masses.reshape(3, 20, 2, 30).sum((1, 3)), coarse, atol=1e-7, rtol=0)


def test_a_jump_is_reported_not_hidden():
    edges = [torch.tensor([0.0, 1.0], dtype=torch.float64)] * 2
    with pytest.warns(UserWarning, match="only good to"):
        mass = integrate_cells(
            lambda x: (x.sum(-1) < math.sqrt(0.5)).double(),
            edges,
            resolution=(0.5, 0.5),
            max_boxes=1 << 10,
        )
    assert float(mass[0, 0]) == pytest.approx(0.25, abs=1e-3)


@given(location=st.floats(-5, 5), scale=st.floats(0.05, 3))
def test_inverse_cdf_inverts_the_cdf(location, scale):
    low, high = location - 9 * scale, location + 9 * scale
    table = InverseCDF(lambda x: -0.5 * ((x - location) / scale) ** 2 + 700, low, high)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    x = table(u)
    law = stats.norm(location, scale)
    np.testing.assert_allclose(law.cdf(x.numpy()), u, atol=1e-7)
    torch.testing.assert_close(table.cdf(x), u, atol=1e-10, rtol=0)
    assert table.log_mass == pytest.approx(700 + math.log(scale * math.sqrt(2 * math.pi)))
    assert table.cdf(torch.tensor([low - 1, high + 1])).tolist() == [0.0, 1.0]


# -- families -------------------------------------------------------------------------------------


def test_two_moons_normaliser_by_cartesian_quadrature():
    def density(y, x):
        radius = -0.5 * ((math.hypot(x, y) - 2) / 0.2) ** 2
        return math.exp(radius - 0.5 * ((x - 2) / 0.3) ** 2) + math.exp(
            radius - 0.5 * ((x + 2) / 0.3) ** 2
        )

    # twice the right half, twice the upper half
    quarter, _ = integrate.dblquad(density, 0, 3.6, 0, 3.6, epsabs=1e-9, epsrel=1e-9)
    assert TwoMoons().log_z == pytest.approx(math.log(4 * quarter), abs=1e-7)
    assert float(-TwoMoons()(torch.tensor([0.4, 1.7], dtype=torch.float64))) == pytest.approx(
        math.log(density(1.7, 0.4))
    )


def test_rings_in_closed_form():
    """Piecewise Gaussian integrals of r exp(-100 (r - r_k)^2), by hand."""

    def mass(a, b, r):
        ends = np.array([a, b]) - r
        gauss = np.diff(special.erf(10 * ends))[0] * math.sqrt(math.pi) / 20
        return 2 * math.pi * (r * gauss - np.diff(np.exp(-100 * ends**2))[0] / 200)

    masses = np.array([mass(0, 2, 1), mass(2, 4, 3), mass(4, 9, 5)])
    target = Rings()
    assert target.log_z == pytest.approx(math.log(masses.sum()), abs=1e-10)
    np.testing.assert_allclose(target.mode_weights, masses / masses.sum(), atol=1e-10)
    radii = torch.tensor([0.9, 1.0, 2.0, 3.03, 4.9, 5.2], dtype=torch.float64)
    exact = [
        sum(mass(a, min(r, b), k) for a, b, k in ((0, 2, 1), (2, 4, 3), (4, 9, 5)) if r > a)
        for r in radii.tolist()
    ]
    np.testing.assert_allclose(target.radial_cdf(radii), np.array(exact) / masses.sum(), atol=1e-6)


def test_ring_draws_have_the_radial_law():
    """DKW in radius and angle; false alarm below 1e-6, detects 0.02."""
    target, n = Rings(), 20_000
    x = target.sample(n, generator=seeded(1), dtype=torch.float64)
    u = target.radial_cdf(torch.linalg.vector_norm(x, dim=-1))
    angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) + 0.5
    for sample in (u, angle):
        assert stats.kstest(sample.numpy(), "uniform").statistic <= dkw_band(n, 5e-7)


def test_other_rings():
    target = Rings((2.0,), sharpness=8.0)
    exact, _ = integrate.quad(lambda r: 2 * math.pi * r * math.exp(-8 * (r - 2) ** 2), 0, 6)
    assert target.log_z == pytest.approx(math.log(exact), abs=1e-10)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize(("dim", "df"), [(1, 1.0), (2, 3.0), (3, 2.5), (5, 30.0)])
def test_student_t_agrees_with_scipy(independent, dim, df):
    target = StudentT(dim, df, loc=1.5, scale=0.7, independent=independent)
    x = target.sample(50, generator=seeded(), dtype=torch.float64)
    if independent:
        expected = stats.t(df, 1.5, 0.7).logpdf(x.numpy()).sum(-1)
    else:
        law = stats.multivariate_t(np.full(dim, 1.5), 0.49 * np.eye(dim), df)
        expected = law.logpdf(x.numpy()).reshape(-1)
    np.testing.assert_allclose(target.log_prob(x), expected, rtol=1e-9)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("df", [1.0, 2.5, 20.0])
def test_student_t_draws(independent, df):
    """Marginals and the radius by DKW, false alarm below 1e-6; detects 0.02."""
    dim, n = 4, 20_000
    target = StudentT(dim, df, independent=independent)
    x = target.sample(n, generator=seeded(2), dtype=torch.float64).numpy()
    band = dkw_band(n, 1e-6 / (dim + 2))
    for i in range(dim):
        assert stats.kstest(x[:, i], stats.t(df).cdf).statistic <= band
    if independent:  # signs of one coordinate say nothing on the size of another, nor do the sizes
        large = abs(x) > stats.t(df).ppf(0.75)
        both = (large[:, 0] & large[:, 1]).mean()
        assert abs(both - 0.25) <= math.sqrt(math.log(2 / 1e-6) / (2 * n))
    else:
        radius = (x**2).sum(-1) / dim
        assert stats.kstest(radius, stats.f(dim, df).cdf).statistic <= band


@pytest.mark.parametrize(("dim", "df"), [(1, 1.0), (3, 2.0), (2, 40.0)])
def test_student_t_extent_is_a_bound(dim, df):
    reach = float(StudentT(dim, df).extent[1][0])
    assert 2 * dim * stats.t(df).sf(reach) <= 1e-6


def test_funnel_density_and_draws():
    target, n = Funnel(), 20_000
    x = target.sample(n, generator=seeded(), dtype=torch.float64)
    expected = stats.norm(0, 3).logpdf(x[:, 0]) + stats.norm(
        0, np.exp(x[:, :1].numpy() / 2)
    ).logpdf(x[:, 1:]).sum(-1)
    np.testing.assert_allclose(target.log_prob(x), expected, rtol=1e-10)
    scaled = torch.cat([x[:, :1] / 3, x[:, 1:] * (-x[:, :1] / 2).exp()], -1).numpy()
    band = dkw_band(n, 1e-7)  # ten coordinates
    assert max(stats.kstest(scaled[:, i], "norm").statistic for i in range(10)) <= band
    reach = target.extent[1]
    tail, _ = integrate.quad(
        lambda v: stats.norm(0, 3).pdf(v) * 2 * stats.norm.sf(float(reach[1]) * math.exp(-v / 2)),
        -40,
        40,
        points=[0, 10, 15, 20],
    )
    assert tail == pytest.approx(1e-7, rel=1e-2)


def test_many_well_has_the_published_constants():
    integral, _ = integrate.quad(
        lambda a: math.exp(0.5 * a + 6 * a**2 - a**4), -5, 5, points=[-1.7, 1.7]
    )
    assert integral == pytest.approx(11784.50927, abs=1e-4)
    pair = math.log(integral) + 0.5 * math.log(2 * math.pi)
    assert pair == pytest.approx(10.2935, abs=1e-4)
    assert ManyWell(2).log_z == pytest.approx(pair, abs=1e-9)
    assert ManyWell(32).log_z == pytest.approx(16 * pair, abs=1e-8)
    assert ManyWell(32).log_z == pytest.approx(164.70, abs=5e-3)
    right, _ = integrate.quad(
        lambda a: math.exp(0.5 * a + 6 * a**2 - a**4), ManyWell(2).barrier, 5, points=[1.7]
    )
    np.testing.assert_allclose(
        ManyWell(2).well_weights, [1 - right / integral, right / integral], atol=1e-9
    )


def test_many_well_energy_and_modes():
    x = torch.randn(5, 32, generator=seeded(), dtype=torch.float64)
    pairs = x.reshape(5, 16, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    torch.testing.assert_close(ManyWell(32)(x), (-0.5 * a - 6 * a**2 + a**4 + 0.5 * b**2).sum(-1))
    torch.testing.assert_close(ManyWell(32)(x), ManyWell(2)(pairs).sum(-1))
    six = ManyWell(6)
    assert six.modes.shape == (8, 6)
    assert torch.equal(six.responsibilities(six.modes), torch.eye(8, dtype=torch.float64))
    assert ManyWell(32).modes is None


def test_many_well_draws():
    """DKW with all pairs pooled, false alarm below 1e-6, detects 0.007; pairs are independent."""
    n = 10_000
    target = ManyWell(32)
    x = target.sample(n, generator=seeded(4), dtype=torch.float64)
    wells, normals = x[:, 0::2], x[:, 1::2]
    band = dkw_band(16 * n, 5e-7)

    def cdf(points):
        grid = np.linspace(-4, 4, 8001)
        density = np.exp(0.5 * grid + 6 * grid**2 - grid**4)
        total = integrate.cumulative_simpson(density, x=grid, initial=0)
        return np.interp(points, grid, total / total[-1])

    assert stats.kstest(wells.flatten().numpy(), cdf).statistic <= band
    assert stats.kstest(normals.flatten().numpy(), "norm").statistic <= band
    right = target.wells(x).double()
    weight = float(target.well_weights[1])
    both = float((right[:, 0] * right[:, 1]).mean())
    assert abs(both - weight**2) <= math.sqrt(math.log(2 / 1e-6) / (2 * n))


def test_decay_posterior_is_its_black_box():
    target = DecayPosterior()
    x = target.sample((3, 4), generator=seeded(), dtype=torch.float64)
    box = energies.from_numpy(energies.decay_energy, vectorized=False)
    torch.testing.assert_close(box(x), target(x))


def test_decay_posterior_by_independent_quadrature():
    target = DecayPosterior()
    peak = energies.decay_energy(target.modes[0].numpy())

    def density(v, u):
        return math.exp(peak - energies.decay_energy(np.array([u, v])))

    # the mode with the slow rate first; the other is its mirror image
    half, _ = integrate.dblquad(density, -1.7, 0.0, 0.0, 2.2, epsabs=1e-7, epsrel=1e-7)
    assert target.log_z == pytest.approx(math.log(2 * half) - peak, abs=2e-6)
    x = target.sample(50_000, generator=seeded(1), dtype=torch.float64)
    error = (x.mean(0) - target.mean) / x.std(0)
    assert float(error.abs().max()) <= 5 / math.sqrt(len(x))
    products = (x - target.mean)[:, :, None] * (x - target.mean)[:, None, :]
    bound = 5 * products.std(0) / math.sqrt(len(x))
    assert bool(((products.mean(0) - target.covariance).abs() <= bound).all())


# -- change of scale ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dw4"])  # it refuses other units
def test_affine_targets_carry_everything_across(name):
    base = _made[name]
    shift = torch.linspace(-1, 1, base.dim, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, base.dim, dtype=torch.float64)
    target = base.affine(shift, scale)
    x = base.sample(20, generator=seeded(), dtype=torch.float64)
    y = shift + scale * x
    torch.testing.assert_close(target.sample(20, generator=seeded(), dtype=torch.float64), y)
    torch.testing.assert_close(target(y), base(x), rtol=1e-6, atol=1e-6)
    assert target.log_z == pytest.approx(base.log_z + float(scale.log().sum()))
    torch.testing.assert_close(target.extent[0], shift + scale * base.extent[0])
    if base.modes is not None:
        torch.testing.assert_close(target.modes, shift + scale * base.modes)
    if base.mode_weights is not None:
        torch.testing.assert_close(
            target.responsibilities(y), base.responsibilities(x), rtol=1e-5, atol=1e-6
        )
    assert target(y.float()).dtype == torch.float32


def test_affine_log_z_grows_by_dim_log_scale():
    target = ManyWell(32).affine(scale=1 / 3)
    assert target.log_z == pytest.approx(164.6957 + 32 * math.log(1 / 3), abs=1e-3)
    twice = target.affine(1.0, 3.0)
    assert twice.log_z == pytest.approx(ManyWell(32).log_z)


def test_affine_cell_masses_are_those_of_an_integral():
    target = TwoMoons().affine([0.5, -1.0], [2.0, 0.5])
    edges = torch.tensor([-6.0, -1.0, 2.0, 7.0]), torch.tensor([-3.0, -1.2, 0.0, 1.0])
    torch.testing.assert_close(
        target.cell_masses(*edges), Target.cell_masses(target, *edges), atol=1e-7, rtol=0
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rings().affine(scale=0.0), "scale must be positive"),
        (
            lambda: Rings().affine(shift=[1.0, 2.0, 3.0]),
            r"shift must be a number or have shape \(2,\)",
        ),
        (lambda: Rings().affine(shift=math.nan), "shift must be a finite number, got nan"),
        (lambda: Rings()(torch.zeros(3)), r"x must have shape \(..., 2\), got \(3,\)"),
        (lambda: Rings((1.0, 1.0)), "radii must be positive and increasing"),
        (lambda: Rings(sharpness=-1.0), "sharpness must be positive, got -1"),
        (lambda: StudentT(0), "dim must be at least 1"),
        (lambda: StudentT(2, -1.0), "df must be positive and finite, got -1"),
        (lambda: StudentT(2, scale=0.0), "scale must be positive"),
        (lambda: Funnel(1), "dim must be at least 2, got 1"),
        (lambda: ManyWell(3), "dim must be a positive even number, got 3"),
        (lambda: ManyWell(32).responsibilities(torch.zeros(32)), "65536 modes"),
        (lambda: Funnel().responsibilities(torch.zeros(10)), "no finite list of modes"),
        (lambda: Rings().cell_masses(torch.tensor([0.0, 1.0])), "one list of edges per dimension"),
        (
            lambda: Rings().cell_masses(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])),
            "edges_y must be at least two finite, increasing",
        ),
        (lambda: InverseCDF(lambda x: x, 1.0, 0.0), "high must exceed low"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_answers_are_refused():
    class Plain(Target):
        def energy(self, x):
            return x.square().sum(-1)

    box = (-torch.ones(2), torch.ones(2))
    target = Plain(dim=2, name="plain", extent=box)
    with pytest.raises(ValueError, match="log_z of plain is unknown"):
        target.log_prob(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="plain has no exact sampler"):
        target.sample(3)
    assert target.affine(scale=2.0).log_z is None


def test_symmetric_wells_by_scipy():
    """The normaliser by another quadrature, the draws by DKW (false alarm 1e-6, detects 0.02)."""
    target, n = SymmetricManyWell(7, wells=3, separation=2.0), 20_000
    well, _ = integrate.quad(lambda a: math.exp(-((a * a - 2) ** 2)), -4, 4, epsabs=1e-13)
    assert target.log_z == pytest.approx(3 * math.log(well) + 2 * math.log(2 * math.pi), abs=1e-10)
    x = target.sample(n, generator=seeded(), dtype=torch.float64)
    band = dkw_band(n, 1e-6 / 7)
    for i in range(3):
        u = target.well_cdf(x[:, i]).numpy()
        assert stats.kstest(u, "uniform").statistic <= band
    for i in range(3, 7):
        assert stats.kstest(x[:, i].numpy(), "norm").statistic <= band
    assert target.well_cdf(torch.tensor([0.0])).item() == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "rule"), [({"wells": 6}, "wells"), ({"separation": 0.0}, "separation")]
)
def test_symmetric_wells_refuse(options, rule):
    with pytest.raises(ValueError, match=rule):
        SymmetricManyWell(5, **options)


def test_forty_gaussians_in_the_plane_stay_as_they_were():
    """The first three means of the published target; the other dimensions are another target."""
    plane, high = energies.get("gmm40"), energies.get("gmm40-50d")
    published = [[-0.2995, 21.4577], [-32.9218, -29.4376], [-15.4062, 10.7263]]
    torch.testing.assert_close(plane.modes[:3].float(), torch.tensor(published), atol=1e-4, rtol=0)
    assert high.dim == 50 and float(high.modes.abs().max()) <= 40
    gap = torch.cdist(high.modes, high.modes) + 1e9 * torch.eye(40, dtype=torch.float64)
    assert float(gap.min()) > 100  # forty modes, none of them near another
