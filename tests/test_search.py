"""The search: location, scale and log Z from energy values alone, and its proposals."""

import math

import pytest
import torch
from rsm_sampler.bank.search import search
from scipy import stats

from energies import Funnel, GaussianMixture
from rsm_sampler.bank.bank import Bank
from rsm_sampler.montecarlo.densities import KernelDensity, StudentT
from rsm_sampler.target.energy import EnergyError, MeteredEnergy

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def lopsided():
    """Three unequal modes in the plane, with the mean and covariance in closed form."""
    loc = torch.tensor([[0.0, 0.0], [6.0, 2.0], [-3.0, 5.0]])
    return GaussianMixture(loc, torch.tensor([1.0, 0.6, 1.3]), weights=[0.5, 0.2, 0.3])


def find(energy, dim, *, seed=0, evaluations=30_000, bank_size=20_000, **options):
    """The bank, and the meter that counted for it."""
    meter = MeteredEnergy(energy, dim)
    bank = search(
        lambda x, context: meter(x, purpose="search"),
        dim,
        evaluations=evaluations,
        bank_size=bank_size,
        generator=rng(seed),
        check=meter.check,
        **options,
    )
    return bank, meter


# Location, scale, log Z


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (0.01, 0.0), (100.0, 0.0), (1.0, 50.0), (0.01, 0.5)]
)
def test_finds_location_and_scale_of_any_target(scale, shift):
    """Detects a mean or a variance off by 0.1 of the variance; false alarm below 1e-5.

    Weighted means within 5 standard errors of the delta method: 12 of them, 6e-7 each. Shifts
    are 50 widths of the target (0.5 / 0.01).
    """
    law = lopsided()
    target = law.affine(shift, scale)
    bank, _ = find(target, 2)
    assert bank.method == "bank"
    weight = bank.log_weight[0].softmax(0)
    z = (bank.points[0] - shift) / scale - law.mean
    products = torch.stack([z[:, 0], z[:, 1], z[:, 0] ** 2, z[:, 1] ** 2, z[:, 0] * z[:, 1]], -1)
    (a, c), (_, b) = law.covariance.tolist()
    exact = torch.tensor([0, 0, a, b, c], dtype=DOUBLE)
    se = (weight.square() @ (products - exact).square()).sqrt()
    assert (weight @ products - exact).abs().le(5 * se).all()
    assert bool((se < 0.1 * max(a, b)).all())
    torch.testing.assert_close(bank.loc, weight @ bank.points[0])
    assert abs(bank.log_z - 2 * math.log(scale)) <= 5 * bank.log_z_se
    assert bank.log_z_se < 0.02


def test_the_standard_error_of_log_z_is_honest():
    """Squared z-scores of 12 searches are chi-square up to the error's own error.

    False alarm below 1e-5. Detects a standard error wrong by a factor of 2.5 either way.
    """
    target = lopsided()
    scores = []
    for seed in range(12):
        bank, _ = find(target, 2, seed=seed, bank_size=4000)
        scores.append(bank.log_z / bank.log_z_se)
    low, high = stats.chi2(12).interval(1 - 1e-5)
    assert low <= sum(score**2 for score in scores) <= high


def test_bank_weights_give_mode_weights():
    """Self-normalised means within 5 standard errors of the delta method; three tests."""
    target = lopsided()
    bank, _ = find(target, 2, seed=3)
    weight = bank.log_weight[0].softmax(0)
    share = target.responsibilities(bank.points[0])
    error = weight @ share - target.weights
    se = (weight.square() @ (share - target.weights).square()).sqrt()
    assert error.abs().le(5 * se).all()
    assert float(se.amax()) < 0.01


@pytest.mark.parametrize("dim", [2, 4])
def test_long_and_thin_targets_are_found_in_any_direction(dim):
    """A rotated Gaussian a thousand times longer than wide; log Z within 5 standard errors."""
    noise = torch.randn(dim, dim, dtype=DOUBLE, generator=rng(1))
    rotation = torch.linalg.qr(noise).Q
    variance = torch.ones(dim, dtype=DOUBLE)
    variance[0] = 1e6
    target = GaussianMixture(
        torch.zeros(1, dim), covariance=((rotation * variance) @ rotation.T)[None]
    )
    bank, _ = find(target, dim, evaluations=150_000, bank_size=10_000)
    assert bank.method == "bank"
    assert bank.ess > 2000
    assert abs(bank.log_z) <= 5 * bank.log_z_se


def test_a_hint_of_centre_and_scale_saves_evaluations():
    target = lopsided().affine(1e7, 1.0)  # beyond the bracket of 1e5 around the origin
    bank, _ = find(target, 2, evaluations=8000, bank_size=4000,
                   centre=torch.full((2,), 1e7), scale=3.0)  # fmt: skip
    assert bank.method == "bank"
    assert abs(bank.log_z) <= 5 * bank.log_z_se


def test_contexts_get_a_row_of_points_each():
    """The bank of E(x, c) = |x - c|^2 / 2 in one dimension: rows of 128, weighted means near c."""

    def energy(x, context):
        return (x - context).square().sum(-1) / 2

    generator = rng()
    contexts = []

    def draw(n):
        contexts.append(4 * torch.rand(n, 1, dtype=DOUBLE, generator=generator) - 2)
        return contexts[-1]

    bank = search(energy, 1, evaluations=20_000, bank_size=32 * 128, generator=generator,
                  draw_context=draw, rows=32)  # fmt: skip
    assert bank.points.shape == (32, 128, 1)
    assert bank.log_weight.shape == (32, 128)
    torch.testing.assert_close(bank.context, contexts[-1])
    weight = bank.log_weight.softmax(-1)
    mean = (weight * bank.points[..., 0]).sum(-1)
    # A weighted mean of a row, delta method; 32 rows at 6 standard errors each.
    se = (weight.square() * (bank.points[..., 0] - bank.context).square()).sum(-1).sqrt()
    assert (mean - bank.context[:, 0]).abs().le(6 * se + 0.05).all()
    assert abs(bank.log_z - 0.5 * math.log(2 * math.pi)) < 0.1


@pytest.mark.parametrize(("width", "refused"), [(0.5, False), (0.05, True)])
def test_contexts_whose_narrow_law_was_missed_are_left_out(width, refused):
    """Walls about each context; if a tenth of the contexts and more are missed, it says so."""

    def energy(x, context):
        inside = (x - context).abs().amax(-1) < width
        return torch.where(inside, 0.0, torch.inf)

    generator = rng()

    def draw(n):
        return torch.randn(n, 1, dtype=DOUBLE, generator=generator)

    def run():
        return search(energy, 1, evaluations=14_000, bank_size=200 * 32, generator=generator,
                      draw_context=draw, rows=200)  # fmt: skip

    if refused:
        with pytest.raises(EnergyError, match=r"every context, .* of 200 contexts, such as \["):
            run()
        return
    bank = run()
    assert 180 <= len(bank.context) == len(bank.points) == len(bank.log_weight) < 200
    assert bank.log_weight.amax(-1).isfinite().all()
    inside = bank.log_weight > -torch.inf
    off = (bank.points[..., 0] - bank.context).abs()
    assert off[inside].max() < width


# High dimensions


def test_twenty_dimensions_go_by_chains():
    """A Gaussian of std 3 at 7 in 20-D: the population has its location and scale.

    The chains mix over their last sweeps, so their draws are dependent: bounds are loose, an
    error of location by half a standard deviation or of scale by a factor 1.5 is caught.
    """
    bank, meter = find(
        lambda x: ((x - 7) / 3).square().sum(-1) / 2, 20, evaluations=60_000, bank_size=60_000
    )
    assert (bank.method, bank.density) == ("chains", None)
    assert meter.evaluations <= 120_000
    assert bank.points.isfinite().all()
    assert bank.log_weight.eq(0).all()
    assert math.isfinite(bank.log_z)
    assert math.isnan(bank.log_z_se)
    points = bank.points[0]
    assert (points.mean(0) - 7).abs().max() < 1.5
    std = points.std(0).log().mean().exp()
    assert 2.0 < std < 4.5


def test_a_target_that_defies_kernels_still_ends_finite():
    bank, meter = find(Funnel(dim=10), 10, evaluations=20_000, bank_size=20_000)
    assert bank.points.isfinite().all()
    assert meter.evaluations <= 40_000


# Energies that cannot be sampled


@pytest.mark.parametrize(
    ("energy", "dim"),
    [
        (lambda x: -x.square().sum(-1), 2),
        (lambda x: -x.square().sum(-1) / 1e6, 3),
        (lambda x: -x.abs().sum(-1), 1),
        (lambda x: torch.zeros_like(x[:, 0]), 1),
        (lambda x: torch.zeros_like(x[:, 0]), 2),
        (lambda x: torch.full_like(x[:, 0], 3.0), 6),
        (lambda x: x[:, 0].square() / 2, 2),
        (lambda x: x[:, :2].square().sum(-1) / 2, 3),
        (lambda x: x[:, 0], 2),
        (lambda x: -lopsided().energy(x), 2),
        (lambda x: 50 * (x[:, 0] - x[:, 1]).square(), 2),
    ],
    ids=["flipped", "flipped slowly", "flipped cusp", "constant 1-D", "constant 2-D",
         "constant 6-D", "flat axis", "flat third axis", "linear",
         "flipped mixture", "flat diagonal"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_energies_that_cannot_be_normalised_are_refused(energy, dim, seed):
    with pytest.raises(EnergyError, match=r"exp\(-energy\) cannot be normalised.*opposite sign"):
        find(energy, dim, seed=seed, evaluations=150_000, bank_size=2000)


def test_a_molecule_that_nothing_holds_is_refused():
    """Two flat directions of six, neither along an axis; 29 of 30 other seeds are refused."""

    def energy(x):
        places = x.view(-1, 3, 2)
        return torch.cdist(places, places).square().sum((1, 2))

    refused = 0
    for seed in range(10, 20):
        try:
            find(energy, 6, seed=seed, evaluations=150_000, bank_size=2000)
        except EnergyError:
            refused += 1
    assert refused >= 8  # at 29 of 30, fewer in 0.4 % of all tens of seeds


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_heaviest_tails_are_not_refused(dim):
    """A Cauchy law has no moments, but mass one."""
    for seed in range(3):
        find(
            lambda x: 0.5 * (1 + dim) * torch.log1p(x.square().sum(-1)),
            dim, seed=seed, evaluations=100_000, bank_size=3000,
        )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_energy_without_a_finite_value_names_the_region(value):
    with pytest.raises(EnergyError, match=r"finite somewhere, got NaN or inf at all \d+ points, "
                       r"drawn between \(-\S+, -\S+\) and \(\S+, \S+\)"):  # fmt: skip
        find(lambda x: torch.full_like(x[:, 0], value), 2, evaluations=5000, bank_size=2000)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_half_a_plane_without_energy_has_no_mass(value):
    """Half a Gaussian: log Z is that of the whole less log 2, within 5 standard errors."""

    def energy(x):
        return torch.where(x[:, 0] < 0, value, (x - 0.5).square().sum(-1) / 2)

    bank, _ = find(energy, 2, bank_size=20_000)
    weight = bank.log_weight[0].softmax(0)
    assert weight[bank.points[0, :, 0] < 0].sum() == 0
    exact = math.log(2 * math.pi) + float(torch.special.log_ndtr(torch.tensor(0.5)))
    assert abs(bank.log_z - exact) <= 5 * bank.log_z_se


# Counts


@pytest.mark.parametrize("evaluations", [200, 500, 1111, 5000])
@pytest.mark.parametrize("make", [lopsided, lambda: Funnel(dim=5), lambda: Funnel(dim=20)])
def test_the_search_stays_within_its_evaluations(make, evaluations):
    target, bank_size = make(), 2 * evaluations
    _, meter = find(target, target.dim, evaluations=evaluations, bank_size=bank_size)
    assert meter.counts.keys() == {"search"}
    assert meter.evaluations <= evaluations + bank_size


def test_the_bank_has_exactly_its_size():
    phases = []
    bank, meter = find(lopsided(), 2, evaluations=20_000, bank_size=7001, report=phases.append)
    assert bank.points.shape == (1, 7001, 2)
    assert phases == ["bracket", "kernels 1/4", "kernels 2/4", "kernels 3/4", "kernels 4/4",
                      "bank"]  # fmt: skip
    seen = meter.evaluations
    more = bank.extended(999, lambda x, context: meter(x), rng(1))
    assert meter.evaluations == seen + 999
    assert more.points.shape == (1, 8000, 2)
    torch.testing.assert_close(more.points[:, :7001], bank.points)
    assert abs(more.log_z) <= 5 * more.log_z_se


def test_a_bank_survives_its_state():
    bank, _ = find(lopsided(), 2, evaluations=5000, bank_size=2000)
    again = Bank.from_state(bank.state(), torch.device("cpu"))
    assert torch.equal(again.points, bank.points)
    assert (again.log_z, again.ess, again.method) == (bank.log_z, bank.ess, bank.method)
    assert torch.equal(again.density.sample(50, rng()), bank.density.sample(50, rng()))
    assert torch.equal(
        again.density.log_prob(bank.points[0]), bank.density.log_prob(bank.points[0])
    )


# Proposal laws


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_student_t_density_is_scipys(dim):
    matrix = torch.randn(dim, dim, dtype=DOUBLE, generator=rng())
    scale_tril = torch.linalg.cholesky(matrix @ matrix.mT + torch.eye(dim, dtype=DOUBLE))
    loc = torch.arange(dim, dtype=DOUBLE)
    law = StudentT(loc, scale_tril, df=4.0)
    x = 10 * torch.randn(50, dim, dtype=DOUBLE, generator=rng(1))
    exact = stats.multivariate_t(loc.numpy(), (scale_tril @ scale_tril.mT).numpy(), df=4)
    torch.testing.assert_close(
        law.log_prob(x), torch.as_tensor(exact.logpdf(x.numpy())).reshape(-1)
    )


def test_student_t_draws_have_its_law():
    """Both coordinates by KS; detects a scale off by 5 %, false alarm below 2e-6."""
    scale_tril = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=DOUBLE)
    law = StudentT(torch.tensor([1.0, -1.0], dtype=DOUBLE), scale_tril, df=5.0)
    n = 20_000
    x = law.sample(n, rng()).numpy()
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    for i, width in enumerate([2.0, math.hypot(1.5, 0.5)]):
        exact = stats.t(df=5, loc=float(law.loc[i]), scale=width)
        assert stats.kstest(x[:, i], exact.cdf).statistic <= band


def kernel_density(share=0.2, dim=2):
    centres = torch.randn(12, dim, dtype=DOUBLE, generator=rng()) * 2
    weight = torch.rand(12, dtype=DOUBLE, generator=rng(1))
    broad = StudentT(torch.ones(dim, dtype=DOUBLE), 2 * torch.eye(dim, dtype=DOUBLE))
    return KernelDensity(centres, weight / weight.sum(), broad, share=share, neighbours=3)


def test_kernel_density_integrates_to_one():
    """Trapezoid over a box of half-width 150, in sinh-stretched coordinates.

    Outside of it the broad law (df 5, scale 2) holds P(|t| > 74 scales), below 1e-8 a coordinate.
    """
    law = kernel_density()
    s = torch.linspace(-math.asinh(150.0), math.asinh(150.0), 1201, dtype=DOUBLE)
    x, volume = s.sinh(), s.cosh() * (s[1] - s[0])
    grid = torch.cartesian_prod(x, x)
    mass = (law.log_prob(grid).exp() * torch.outer(volume, volume).reshape(-1)).sum()
    assert abs(float(mass) - 1) < 1e-5


def test_kernel_density_draws_have_its_law():
    """KS of a coordinate against its exact marginal; false alarm below 1e-6."""
    law = kernel_density()
    n = 20_000
    x = law.sample(n, rng(5))[:, 0].numpy()
    centres = law.white @ law.broad.scale_tril.mT + law.broad.loc
    widths = 2.0 * (law.tril @ law.tril.mT)[:, 0, 0].sqrt()

    def cdf(value):
        value = torch.as_tensor(value).unsqueeze(-1)
        scaled = ((value - centres[:, 0]) / widths).numpy()
        near = torch.as_tensor(stats.t(df=5).cdf(scaled)) @ law.weight
        far = stats.t(df=5, loc=1.0, scale=2.0).cdf(value[..., 0].numpy())
        return ((1 - law.share) * near + law.share * torch.as_tensor(far)).numpy()

    # The broad share is stratified (exactly a fifth), which only narrows the law.
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    assert stats.kstest(x, cdf).statistic <= band


def test_kernel_density_log_prob_does_not_depend_on_the_batch():
    law = kernel_density()
    x = 5 * torch.randn(300, 2, dtype=DOUBLE, generator=rng(2))
    one_by_one = torch.cat([law.log_prob(row[None]) for row in x])
    torch.testing.assert_close(law.log_prob(x), one_by_one, rtol=1e-12, atol=1e-12)


def test_equal_centres_have_a_finite_bandwidth():
    centres = torch.zeros(4, 1, dtype=DOUBLE)
    broad = StudentT(torch.zeros(1, dtype=DOUBLE), torch.eye(1, dtype=DOUBLE))
    law = KernelDensity(centres, torch.full((4,), 0.25, dtype=DOUBLE), broad)
    assert bool((law.tril.diagonal(dim1=-2, dim2=-1) > 0.1).all())
    assert law.log_prob(centres).isfinite().all()


def test_an_energy_that_overflows_far_out_is_no_error():
    """A scale by its logarithm, as probabilistic programs have it: exp(1e7) is infinite."""

    def energy(x):
        scale = x[:, 0].exp()
        return 0.5 * x[:, 0].square() + 0.5 * (x[:, 1] / scale).square() + x[:, 0]

    def evaluate(u, context):
        return metered(u.float()).double()

    metered = MeteredEnergy(lambda x: torch.where(x[:, 0].abs() < 80, energy(x), torch.inf), 2)
    bank = search(
        evaluate,
        2,
        evaluations=20_000,
        bank_size=20_000,
        generator=torch.Generator().manual_seed(0),
        check=metered.check,
    )
    assert abs(bank.log_z - math.log(2 * math.pi)) < 0.1
