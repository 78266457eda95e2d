import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rsm_sampler.proposals import (
    GaussianProposal,
    MixtureProposal,
    PerturbedBuffer,
    PerturbedModel,
    UniformProposal,
)
from rsm_sampler.transitions import variance_preserving
from tests.exact import NoReadBack

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def ks_band(n, false_alarm=1e-6):
    """Dvoretzky-Kiefer-Wolfowitz: the empirical law of n draws is this near with that risk."""
    return math.sqrt(math.log(2 / false_alarm) / (2 * n))


def noise_scales(n):
    return torch.logspace(-2, 2, n, dtype=DOUBLE)


def point_at(value):
    """A proposal whose clean point is always the same."""
    return PerturbedBuffer(torch.tensor([[value]], dtype=DOUBLE))


def proposals():
    low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 5.0, 3.0])
    parts = [
        GaussianProposal(low, 2.0),
        GaussianProposal(low, torch.tensor([1.0, 2.0, 3.0]), coordinates="variance_preserving"),
        UniformProposal(low, high),
        UniformProposal(low, high, coordinates="variance_preserving"),
        PerturbedModel(lambda n, generator: torch.randn(n, 3, generator=generator)),
        PerturbedBuffer(torch.randn(20, 3, generator=rng())),
        PerturbedBuffer(torch.randn(20, 3, generator=rng()), torch.randn(20, generator=rng(1))),
    ]
    return [*parts, MixtureProposal(parts, [1, 2, 3, 4, 5, 6, 7])]


@pytest.mark.parametrize("proposal", proposals(), ids=lambda proposal: type(proposal).__name__)
@pytest.mark.parametrize("n", [1, 2, 17])
def test_draws_have_their_shape_and_the_seed_decides(proposal, n):
    with NoReadBack():
        x_t = proposal.draw(n, noise_scales(n), generator=rng())
    assert x_t.shape == (n, 3)
    assert x_t.dtype == torch.float32  # that of the points, not of sigma
    assert x_t.isfinite().all()
    assert torch.equal(x_t, proposal.draw(n, noise_scales(n), generator=rng()))
    assert not torch.equal(x_t, proposal.draw(n, noise_scales(n), generator=rng(1)))


@pytest.mark.bad_input
@pytest.mark.parametrize("proposal", proposals(), ids=lambda proposal: type(proposal).__name__)
def test_bad_draws_are_named(proposal):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        proposal.draw(0, torch.ones(0))
    with pytest.raises(ValueError, match=r"sigma must have shape \(3,\), got \(2,\)"):
        proposal.draw(3, torch.ones(2))


def test_gaussian_of_clean_points_widens_with_the_noise():
    """KS over all noise scales; detects a scale off by 7 %; false alarm below 1e-6 each."""
    n, loc, scale = 20_000, torch.tensor([3.0, -1.0], dtype=DOUBLE), torch.tensor([0.5, 8.0])
    sigma = noise_scales(n)
    x_t = GaussianProposal(loc, scale).draw(n, sigma, generator=rng())
    standard = (x_t - loc) / torch.hypot(sigma[:, None], scale.double())
    for column in standard.T:
        assert stats.kstest(column.numpy(), stats.norm.cdf).statistic <= ks_band(n)


def test_gaussian_of_the_papers_variable():
    """The law of sqrt(alpha_bar) x_t is N(loc, scale^2) at every noise scale; KS as above."""
    n, loc = 20_000, torch.tensor([3.0, -1.0], dtype=DOUBLE)
    sigma = noise_scales(n)
    proposal = GaussianProposal(loc, 2.0, coordinates="variance_preserving")
    paper = variance_preserving(proposal.draw(n, sigma, generator=rng()), sigma)
    for column in ((paper - loc) / 2).T:
        assert stats.kstest(column.numpy(), stats.norm.cdf).statistic <= ks_band(n)


def test_uniform_on_a_box_of_clean_points_and_of_the_papers_variable():
    """KS at no noise, and in the paper's coordinates at all; detects an end off by 2 %."""
    n, low, high = 20_000, torch.tensor([-6.0, 1.0]), torch.tensor([6.0, 2.0])
    clean = UniformProposal(low, high).draw(n, torch.zeros(n), generator=rng())
    sigma = noise_scales(n)
    proposal = UniformProposal(low, high, coordinates="variance_preserving")
    paper = variance_preserving(proposal.draw(n, sigma, generator=rng()), sigma)
    for x in (clean, paper):
        for column in ((x - low) / (high - low)).T:
            assert stats.kstest(column.numpy(), stats.uniform.cdf).statistic <= ks_band(n)
    noise = UniformProposal(low, high).draw(n, sigma.float() + 1e4, generator=rng()) / 1e4
    # The box is 1e-3 of the noise here, and sigma varies by 1e-2.
    for column in noise.T:
        assert stats.kstest(column.numpy(), stats.norm.cdf).statistic <= ks_band(n) + 5e-3


def test_model_samples_are_drawn_without_gradient_and_made_noisy():
    """Noise scales per row by KS: detects one off by 7 %; false alarm below 1e-6."""
    calls = []

    def sample(n, generator):
        calls.append((n, torch.is_grad_enabled()))
        return torch.full((n, 1), 4.0, dtype=DOUBLE)

    n = 20_000
    sigma = noise_scales(n)
    x_t = PerturbedModel(sample).draw(n, sigma, generator=rng())
    assert calls == [(n, False)]
    noise = ((x_t[:, 0] - 4) / sigma).numpy()
    assert stats.kstest(noise, stats.norm.cdf).statistic <= ks_band(n)


def test_a_buffer_is_drawn_by_weight_and_in_no_order():
    """Stratified draws of 3 points are within 2 of their share, and not sorted by row.

    The half's count is hypergeometric: 6 standard deviations, false alarm below 1e-8.
    """
    n, weight = 10_000, torch.tensor([0.25, 0.0, 0.75], dtype=DOUBLE)
    points = torch.tensor([[0.0], [1.0], [2.0]], dtype=DOUBLE)
    proposal = PerturbedBuffer(points, weight.log() + 700)
    x_t = proposal.draw(n, torch.zeros(n, dtype=DOUBLE), generator=rng())[:, 0]
    counts = x_t.long().bincount(minlength=3)
    assert ((counts - n * weight).abs() < 2).all()
    assert counts[1] == 0
    half = (x_t[: n // 2] == 0).sum().item()
    assert abs(half - n / 8) <= 6 * math.sqrt(n / 4 * 0.25 * 0.75) + 2
    even = PerturbedBuffer(points).draw(n, torch.zeros(n, dtype=DOUBLE), generator=rng())
    assert ((even[:, 0].long().bincount() - n / 3).abs() < 2).all()


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda w: sum(w) > 1e-3),
    n=st.integers(1, 60),
)
def test_mixture_counts_are_their_shares_rounded(weights, n):
    parts = [point_at(float(index)) for index in range(len(weights))]
    x_t = MixtureProposal(parts, weights).draw(n, torch.zeros(n, dtype=DOUBLE), generator=rng())
    counts = x_t[:, 0].long().bincount(minlength=len(weights))
    shares = n * torch.tensor(weights, dtype=DOUBLE) / sum(weights)
    assert counts.sum() == n
    assert (counts >= (shares - 1e-6).floor()).all()
    assert (counts <= (shares - 1e-6).floor() + len(weights)).all()
    assert (counts[shares < 1e-9] == 0).all()


@pytest.mark.numbers
@pytest.mark.parametrize("n", [1, 3, 8])
def test_every_row_of_a_mixture_has_the_right_law(n):
    """Frequencies by row over 4,000 draws within 6 standard errors; false alarm below 1e-6."""
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=DOUBLE)
    mixture = MixtureProposal([point_at(0.0), point_at(1.0), point_at(2.0)], weights.tolist())
    generator, sigma, repeats = rng(), torch.zeros(n, dtype=DOUBLE), 4000
    draws = torch.stack([mixture.draw(n, sigma, generator=generator) for _ in range(repeats)])
    shares = torch.nn.functional.one_hot(draws[..., 0].long(), 3).double().mean(0)
    assert ((shares - weights).abs() <= 6 * (weights * (1 - weights) / repeats).sqrt()).all()


def test_every_row_of_a_mixture_has_its_own_noise_scale():
    """Detects a scale off by 7 % and a row with another's; false alarm below 1e-6."""
    n = 20_001
    sigma = noise_scales(n)[torch.randperm(n, generator=rng(1))]
    mixture = MixtureProposal([point_at(0.0)] * 3, [0.3, 0.3, 0.4])
    noise = mixture.draw(n, sigma, generator=rng())[:, 0] / sigma
    assert stats.kstest(noise.numpy(), stats.norm.cdf).statistic <= ks_band(n)


def test_a_mixture_draws_no_more_rows_than_it_needs():
    drawn = []

    def sample(n, generator):
        drawn.append(n)
        return torch.zeros(n, 1)

    parts = [PerturbedModel(sample), GaussianProposal(torch.zeros(1), 1.0)]
    mixture = MixtureProposal(parts, [0.1, 0.9])
    mixture.draw(1000, torch.ones(1000), generator=rng())
    assert drawn == [100]
    mixture.draw(1003, torch.ones(1003), generator=rng())
    assert sum(drawn) <= 100 + 101


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianProposal(torch.zeros(2, 2), 1.0),
            r"loc must have shape \(dim,\), got \(2, 2\)",
        ),
        (lambda: GaussianProposal(torch.zeros(2, dtype=torch.bool), 1.0), "got dtype torch.bool"),
        (lambda: GaussianProposal(torch.zeros(2), 0.0), "scale must be positive, got 0.0"),
        (
            lambda: GaussianProposal(torch.zeros(2), 1.0, coordinates="vp"),
            "coordinates must be 'clean' or 'variance_preserving', got 'vp'",
        ),
        (lambda: UniformProposal(torch.zeros(2), torch.ones(3)), r"high must .*, got \(3,\)"),
        (lambda: UniformProposal(torch.ones(2), torch.zeros(2)), "low must be less than high"),
        (
            lambda: UniformProposal(torch.zeros(1), torch.tensor([math.inf])),
            "low must be less than high and both finite",
        ),
        (
            lambda: PerturbedModel(lambda n, generator: torch.zeros(n)).draw(2, torch.ones(2)),
            r"sample_fn must return shape \(2, dim\), got \(2,\)",
        ),
        (lambda: PerturbedBuffer(torch.zeros(0, 2)), "points must have shape"),
        (lambda: PerturbedBuffer(torch.zeros(2, 2), torch.zeros(3)), "log_weight must have shape"),
        (lambda: MixtureProposal([], []), "parts must have at least one proposal"),
        (lambda: MixtureProposal([point_at(0.0)], [1, 2]), "weights must have 1 values, got 2"),
        (lambda: MixtureProposal([point_at(0.0)], [-1.0]), "weights must be non-negative"),
        (lambda: MixtureProposal([point_at(0.0)], [0.0]), "and not all zero"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
