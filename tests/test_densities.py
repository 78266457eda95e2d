"""Laws to draw from: the density is that of the draws, and has mass one."""

import math

import pytest
import torch
from scipy import integrate, stats

from rsm_sampler.montecarlo.densities import (
    Joint,
    KernelDensity,
    Mixture,
    ScaleLadder,
    StudentT,
    density_from_state,
    weighted_moments,
)

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def broad(dim, scale):
    return StudentT(torch.zeros(dim, dtype=DOUBLE), scale * torch.eye(dim, dtype=DOUBLE))


def kernel_density(share=0.2, dim=2):
    centres = torch.randn(12, dim, dtype=DOUBLE, generator=rng()) * 2
    weight = torch.rand(12, dtype=DOUBLE, generator=rng(1))
    wide = StudentT(torch.ones(dim, dtype=DOUBLE), 2 * torch.eye(dim, dtype=DOUBLE))
    return KernelDensity(centres, weight / weight.sum(), wide, share=share, neighbours=3)


def ladder(*kinds, low=0.1, high=30.0):
    return ScaleLadder(
        torch.tensor(kinds),
        torch.where(torch.tensor(kinds) == 0, 0.5, 0.0).double(),
        torch.logspace(math.log10(low), math.log10(high), 16, dtype=DOUBLE),
    )


def mixture(share=0.05, wide=None):
    return Mixture(
        torch.tensor([0.3, 0.7], dtype=DOUBLE),
        torch.tensor([[-2.0, 0.0], [3.0, 1.0]], dtype=DOUBLE),
        torch.tensor([[[1.0, 0.0], [0.5, 0.7]], [[0.6, 0.0], [0.0, 1.2]]], dtype=DOUBLE),
        broad(2, 3.0) if wide is None else wide,
        20.0,
        share=share,
    )


LAWS = {
    "student": lambda: StudentT(
        torch.tensor([1.0, -1.0], dtype=DOUBLE),
        torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=DOUBLE),
    ),
    "heavy student": lambda: StudentT(
        torch.zeros(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE), 1.0
    ),
    "kernels": kernel_density,
    "mixture": mixture,
    "mixture over a ladder": lambda: mixture(0.3, ladder(0, 0)),
    "mixture over a box": lambda: mixture(0.3, ladder(2, 2)),
    "mixture over kernels": lambda: mixture(0.5, kernel_density()),
    "no broad law": lambda: mixture(0.0),
    "free": lambda: ladder(0, 0),
    "from below": lambda: ladder(1),
    "from above": lambda: ladder(-1, -1),
    "box": lambda: ladder(2, 2, 2),
    "all bounds": lambda: ladder(0, 1, -1, 2),
    "joint": lambda: Joint([mixture(), broad(2, 4.0), ladder(0, 2)], [100, 50, 350]),
}


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]()


def dim_of(law):
    return law.sample(2, rng()).shape[-1]


def test_draws_of_a_law_have_its_density(law):
    """Means of h / q over draws of q are one for densities h: within 5 standard errors.

    Nine normal densities h at draws of high density, false alarm 1e-5 for each law. An error of
    a normaliser, of a share or of the draws by more than 5 / sqrt(n) times the spread of h / q
    shows, from 3 % in one to half in four dimensions.
    """
    n, dim = 60_000, dim_of(law)
    x = law.sample(n, rng(3))
    assert x.shape == (n, dim)
    assert x.dtype == DOUBLE
    log_q = law.log_prob(x)
    width = x.quantile(0.7, 0) - x.quantile(0.3, 0)
    places = law.sample(900, rng(4))
    places = places[torch.randperm(900, generator=rng(5))]  # components come in order
    for k, place in enumerate(places.split(100)):
        at = place[law.log_prob(place).argmax()]
        scale = width * 0.2 * 1.3 ** (k // 3)
        log_h = torch.distributions.Normal(at, scale).log_prob(x).sum(-1)
        ratio = (log_h - log_q).exp()
        error = float(ratio.std()) / math.sqrt(n)
        assert error < 0.1, "the probe says nothing"
        assert abs(float(ratio.mean()) - 1) <= 5 * error


def test_densities_do_not_depend_on_the_batch(law):
    x = law.sample(40, rng(2))
    one_by_one = torch.cat([law.log_prob(row[None]) for row in x])
    torch.testing.assert_close(law.log_prob(x), one_by_one, rtol=1e-10, atol=1e-10)


def test_a_law_survives_its_state(law, tmp_path):
    """Plain values and tensors only: they go through a file of weights_only."""
    torch.save(law.state(), tmp_path / "law")
    state = torch.load(tmp_path / "law", weights_only=True)
    again = density_from_state(state, torch.device("cpu"))
    assert type(again) is type(law)
    x = law.sample(50, rng())
    assert torch.equal(again.sample(50, rng()), x)
    assert torch.equal(again.log_prob(x), law.log_prob(x))


def test_draws_are_those_of_the_generator(law):
    assert torch.equal(law.sample(7, rng(4)), law.sample(7, rng(4)))
    assert not torch.equal(law.sample(7, rng(4)), law.sample(7, rng(5)))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("name", ["student", "kernels", "mixture", "all bounds"])
def test_few_draws_are_as_many_as_asked_for(name, n):
    law = LAWS[name]()
    assert law.sample(n, rng()).shape == (n, dim_of(law))


# Student-t


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
    law = StudentT(
        torch.tensor([1.0, -1.0], dtype=DOUBLE),
        torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=DOUBLE),
        df=5.0,
    )
    n = 20_000
    x = law.sample(n, rng()).numpy()
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    for i, width in enumerate([2.0, math.hypot(1.5, 0.5)]):
        exact = stats.t(df=5, loc=float(law.loc[i]), scale=width)
        assert stats.kstest(x[:, i], exact.cdf).statistic <= band


# Kernels


def test_kernel_density_integrates_to_one():
    """Trapezoid over a box of half-width 150, in sinh-stretched coordinates.

    Outside of it the broad law (df 5, scale 2) holds P(|t| > 74 scales), below 1e-8 a coordinate.
    """
    law = kernel_density()
    s = torch.linspace(-math.asinh(150.0), math.asinh(150.0), 601, dtype=DOUBLE)
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


def test_equal_centres_have_a_finite_bandwidth():
    centres = torch.zeros(4, 1, dtype=DOUBLE)
    law = KernelDensity(centres, torch.full((4,), 0.25, dtype=DOUBLE), broad(1, 1.0))
    assert bool((law.tril.diagonal(dim1=-2, dim2=-1) > 0.1).all())
    assert law.log_prob(centres).isfinite().all()


# Mixtures


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_terms_of_a_mixture_are_its_components(share):
    """Against scipy, term by term; what is left of the density is the broad law's share."""
    law = mixture(share)
    x = law.sample(100, rng(1))
    total, terms = law.log_probs(x)
    exact = []
    for k in range(2):
        shape = (law.scale_tril[k] @ law.scale_tril[k].mT).numpy()
        t = stats.multivariate_t(law.loc[k].numpy(), shape, df=20)
        exact.append(
            torch.as_tensor(t.logpdf(x.numpy())) + math.log((1 - share) * float(law.weight[k]))
        )
    torch.testing.assert_close(terms, torch.stack(exact, -1))
    rest = total.exp() - terms.exp().sum(-1)
    torch.testing.assert_close(rest, share * law.broad.log_prob(x).exp(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_draws_of_a_mixture_have_its_mean(share):
    """Within 5 standard errors; false alarm 1e-6. A share wrong by 0.02 is found."""
    law = mixture(share)
    x = law.sample(50_000, rng(1))
    exact = (1 - share) * (law.weight @ law.loc)
    assert bool(((x.mean(0) - exact).abs() < 5 * x.std(0) / math.sqrt(len(x))).all())


def test_components_get_their_share_of_draws_within_one():
    """Shares of 1 to 40 of 820 in 1,000 draws: far components tell whose a draw is."""
    weight = torch.arange(1.0, 41.0, dtype=DOUBLE)
    weight = weight / weight.sum()
    loc = 1e6 * torch.arange(40, dtype=DOUBLE)[:, None]
    law = Mixture(weight, loc, torch.ones(40, 1, 1, dtype=DOUBLE), broad(1, 1.0), 5.0, share=0.0)
    counts = (law.sample(1000, rng())[:, 0] / 1e6).round().long().bincount(minlength=40)
    assert float((counts - 1000 * weight).abs().max()) < 1


# Scales


@pytest.mark.parametrize("kind", [0, 1, -1, 2])
def test_a_ladder_integrates_to_one(kind):
    """Quadrature over the unbounded coordinate, where 1e-9 of the mass is beyond 700."""
    law = ladder(kind)

    def density(u):
        return float(law.log_prob(torch.tensor([[u]], dtype=DOUBLE)).exp())

    mass, _ = integrate.quad(
        density, -300, 300, points=[-30, -3, -1, 0, 0.5, 1, 3, 30], limit=400, epsabs=1e-9
    )
    assert mass == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", [0, 1, -1])
def test_distances_of_a_ladder_are_those_of_its_scales(kind):
    """KS of the distance from centre or bound: half-normal, averaged over the scales."""
    n, law = 20_000, ladder(kind)
    u = law.sample(n, rng())[:, 0]
    away = torch.nn.functional.softplus(kind * u) if kind else (u - 0.5).abs()

    def cdf(d):
        return stats.halfnorm.cdf(d[:, None] / law.scales.numpy()).mean(-1)

    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    assert stats.kstest(away.numpy(), cdf).statistic <= band


def test_a_box_is_uniform():
    law = ladder(2, 2)
    assert law.boxed
    assert not ladder(2, 1).boxed
    n = 20_000
    x = torch.special.ndtr(law.sample(n, rng())).numpy()
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    for i in range(2):
        assert stats.kstest(x[:, i], "uniform").statistic <= band


def test_the_largest_scale_of_a_draw_bounds_it():
    """Six widths of the largest scale hold all coordinates but one in 1e9; half share a scale."""
    law = ladder(0, 2, 0)
    x, largest = law.sample_with_scale(2000, rng())
    assert bool(((x[:, [0, 2]] - 0.5).abs() <= 7 * largest[:, None]).all())
    assert set(largest.tolist()) <= set(law.scales.tolist())


def test_far_tails_of_a_ladder_are_finite():
    law = ladder(0, 1, -1, 2, high=1e5)
    x = torch.tensor([[1e3, 1e3, -1e3, 30.0], [-1e5, -600.0, 600.0, -600.0]], dtype=DOUBLE)
    assert law.log_prob(x).isfinite().all()


# Joint laws, moments


def test_a_joint_law_is_the_sum_by_hand():
    parts = [mixture(), broad(2, 4.0)]
    law = Joint(parts, [30, 70])
    x = law.sample(100, rng())
    exact = 0.3 * parts[0].log_prob(x).exp() + 0.7 * parts[1].log_prob(x).exp()
    torch.testing.assert_close(law.log_prob(x), exact.log())


@pytest.mark.parametrize("counts", [[1, 1, 1], [10, 3, 1], [1, 0, 999]])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_a_joint_law_draws_of_each_in_proportion(counts, n):
    parts = [
        StudentT(torch.full((1,), 1e9 * k, dtype=DOUBLE), torch.eye(1, dtype=DOUBLE))
        for k in range(3)
    ]
    drawn = (
        (Joint(parts, counts).sample(n, rng())[:, 0] / 1e9).round().long().bincount(minlength=3)
    )
    wanted = n * torch.tensor(counts).double() / sum(counts)
    assert int(drawn.sum()) == n
    assert float((drawn - wanted).abs().max()) <= 1


def test_weighted_moments_are_sums_by_hand():
    x = torch.randn(200, 3, generator=rng(), dtype=DOUBLE)
    weight = torch.rand(200, generator=rng(1), dtype=DOUBLE)
    weight = weight / weight.sum()
    loc, tril = weighted_moments(x, weight, shrunk=False)
    exact = (weight[:, None] * x).sum(0)
    covariance = (weight[:, None] * (x - exact)).mT @ (x - exact)
    torch.testing.assert_close(loc, exact)
    torch.testing.assert_close(tril @ tril.mT, covariance)
    again, shrunk = weighted_moments(x.view(4, 50, 3), weight.view(4, 50))
    torch.testing.assert_close(again, exact)
    # Towards a diagonal that itself goes towards its mean: by (d / (d + ess))^2 and 1 / ess.
    torch.testing.assert_close(shrunk @ shrunk.mT, covariance, atol=0.01, rtol=0.02)
    assert not torch.allclose(shrunk, tril, rtol=1e-6)
