"""Mixtures over the basins of an energy: exact weights for modes far apart in many dimensions."""

import math

import pytest
import torch
from rsm_sampler.montecarlo.basins import _Basins, _quasi_newton, crowded, mixture_of_basins

import energies
from rsm_sampler.bank.bank import Bank
from rsm_sampler.montecarlo.densities import Mixture, StudentT, density_from_state
from rsm_sampler.target.energy import MeteredEnergy
from rsm_sampler.target.gradients import difference_curvature

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def broad(dim, scale):
    return StudentT(torch.zeros(dim, dtype=DOUBLE), scale * torch.eye(dim, dtype=DOUBLE))


def distant(dim=20):
    """Three Gaussians of unequal shares, 20 to 30 widths apart."""
    loc = torch.zeros(3, dim)
    loc[1, :2] = torch.tensor([20.0, 5.0])
    loc[2, 1:4] = torch.tensor([-20.0, 10.0, 10.0])
    return energies.GaussianMixture(loc, torch.ones(3), weights=[0.5, 0.2, 0.3])


def slope_of(energy):
    def slope(x, _):
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(energy(leaf).sum(), leaf)[0], None

    return slope


def curved_by_values(energy):
    return lambda x, scale: difference_curvature(energy, x, step=1e-2 * scale.norm(dim=-1))


def find(target, dim, scale, evaluations, cost=2, *, by_values=False):
    meter = MeteredEnergy(target, dim)
    slope = slope_of(target)
    if by_values:
        slope, cost = curved_by_values(meter), 2 * dim + 1
    mixture, spent = mixture_of_basins(meter, slope, cost, broad(dim, scale), evaluations, rng())
    assert not by_values or spent == meter.evaluations
    return mixture, spent, meter.evaluations


def test_shares_of_distant_modes_and_log_z():
    """Within 5 standard errors of the delta method, which are below 0.02; false alarm 3e-6."""
    target = distant()
    mixture, spent, values = find(target, 20, 12.0, 300_000)
    assert values < spent <= 300_000
    assert len(mixture.loc) == 3
    x = mixture.sample(30_000, rng(1))
    log_weight = -target(x) - mixture.log_prob(x)
    weight = torch.softmax(log_weight, 0)
    assert float(1 / weight.square().sum()) > 0.3 * len(x)
    seen = target.responsibilities(x).double()
    share = weight @ seen
    se = (weight.square() @ (seen - share).square()).sqrt()
    assert bool((se < 0.02).all())
    assert bool(((share - target.mode_weights).abs() < 5 * se).all())
    log_z = float(torch.logsumexp(log_weight, 0)) - math.log(len(x))
    assert abs(log_z) < 5 / math.sqrt(0.3 * len(x))


def test_curvature_gives_components_in_a_hundred_dimensions():
    """Four wells among normal coordinates: walks would leave 5,000 numbers of a covariance open.

    log Z within 5 standard errors of the delta method; false alarm 6e-7.
    """
    target = energies.SymmetricManyWell(100, wells=2)
    mixture, spent, values = find(target, 100, 2.0, 150_000, cost=1)
    assert values < spent <= 150_000
    x = mixture.sample(10_000, rng(1))
    weight = torch.exp(-target(x) - mixture.log_prob(x) - target.log_z)
    mean, error = float(weight.mean()), float(weight.std()) / math.sqrt(len(x))
    assert float(weight.sum().square() / weight.square().sum()) > 0.2 * len(x)
    assert abs(mean - 1) < 5 * error < 0.2


def test_too_many_basins_are_left_to_chains():
    target = energies.get("many-well-32")
    mixture, spent, _ = find(target, 32, 3.0, 400_000)
    assert mixture is None
    assert spent < 40_000


def test_few_evaluations_are_left_to_chains():
    mixture, spent, _ = find(distant(), 20, 12.0, 5000, cost=40)
    assert (mixture, spent) == (None, 0)


def finder_of(energy, dim, scale, *, by_values):
    slope, cost = (curved_by_values(energy), 2 * dim + 1) if by_values else (slope_of(energy), 2)
    return _Basins(energy, slope, cost, broad(dim, scale), rng())


@pytest.mark.parametrize("by_values", [False, True])
def test_descents_come_to_rest_in_curved_valleys(by_values):
    """From afar to the minimum of a stretched bowl: condition number 100, within 0.2 nats."""
    width = torch.logspace(-1, 0, 6, dtype=DOUBLE)
    axes, _ = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE, generator=rng(2)))

    def energy(x):
        return 0.5 * (((x - 3) @ axes) / width).square().sum(-1)

    finder = finder_of(energy, 6, 3.0, by_values=by_values)
    x, value = finder.scouts(finder.anywhere(32))
    assert float(value.quantile(0.9)) < 0.2
    assert int(finder.basins(x, value).bincount().amax()) >= 29


def test_curvatures_end_descents_along_the_coordinates_at_once():
    """A bowl whose axes they are: one slope where they start, one where Newton's step ends."""
    width = torch.logspace(-2, 0, 30, dtype=DOUBLE)

    def energy(x):
        return 0.5 * ((x - 1) / width).square().sum(-1)

    finder = finder_of(energy, 30, 1.0, by_values=True)
    _, value = finder.scouts(finder.broad.sample(20, rng()))
    assert float(value.amax()) < 1e-3
    assert finder.spent <= 20 * (2 * 61 + 3)


def test_curvature_by_values_gives_the_covariances():
    """Of two Gaussians with all axes askew, to 1 %: centres, covariances and shares."""
    dim, generator = 15, rng(4)
    root = torch.randn(2, dim, dim, dtype=DOUBLE, generator=generator)
    covariance = root @ root.mT / dim + 0.1 * torch.eye(dim, dtype=DOUBLE)
    loc = torch.zeros(2, dim, dtype=DOUBLE)
    loc[1, 0] = 40.0
    laws = [
        torch.distributions.MultivariateNormal(m, c) for m, c in zip(loc, covariance, strict=True)
    ]

    def energy(x):
        parts = torch.stack([laws[0].log_prob(x), laws[1].log_prob(x) + math.log(3)])
        return -torch.logsumexp(parts, 0)

    finder = finder_of(energy, dim, 20.0, by_values=True)
    x, value = finder.scouts(loc.repeat_interleave(8, 0) + 0.5)
    label = finder.basins(x, value)
    before = finder.spent
    mixture = finder.curved(x, value, label)
    assert finder.spent - before <= finder.cost_of_curvature(2)
    order = mixture.loc[:, 0].argsort()
    torch.testing.assert_close(mixture.loc[order], loc, atol=0.01, rtol=0)
    found = mixture.scale_tril @ mixture.scale_tril.mT
    torch.testing.assert_close(found[order], covariance, atol=0.01, rtol=0.01)
    torch.testing.assert_close(
        mixture.weight[order], torch.tensor([0.25, 0.75], dtype=DOUBLE), atol=0.01, rtol=0
    )


def test_steps_of_l_bfgs_solve_a_quadratic():
    """With as many conjugate pairs as dimensions the direction is Newton's."""
    dim, generator = 5, rng(3)
    root = torch.randn(2, dim, dim, generator=generator, dtype=DOUBLE)
    hessian = root @ root.mT + torch.eye(dim, dtype=DOUBLE)
    _, axes = torch.linalg.eigh(hessian)
    steps = axes.movedim(-1, 0)  # (pairs, n, dim): conjugate, as those of exact line searches
    changes = (hessian @ steps[..., None])[..., 0]
    slope = torch.randn(2, dim, generator=generator, dtype=DOUBLE)
    newton = -torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(_quasi_newton(slope, steps, changes), newton)
    # Pairs without convexity, or of rejected steps, are passed over.
    useless = torch.cat([steps, -steps[:1], 0 * steps[:1]])
    more = torch.cat([changes, changes[:1], changes[:1]])
    torch.testing.assert_close(_quasi_newton(slope, useless, more), newton)


@pytest.mark.numbers
@pytest.mark.parametrize(("dim", "by_values"), [(5, False), (60, False), (60, True)])
def test_all_of_32_wells_are_found(dim, by_values):
    """By draws of the mixture: each has 1/32 of 20,000, 625 +- 25; none is below half of it."""
    target = energies.SymmetricManyWell(dim)
    most = 1_500_000 if by_values else 200_000
    mixture, spent, _ = find(target, dim, 2.0, most, by_values=by_values)
    assert spent <= most
    x = mixture.sample(20_000, rng(1))
    weight = torch.softmax(-target(x) - mixture.log_prob(x), 0)
    share = weight @ target.responsibilities(x).double()
    assert float(1 / weight.square().sum()) > 0.1 * len(x)
    assert float(share.amin()) > 0.5 / 32


def test_starts_from_far_off_see_the_rim():
    """One of 41 modes lies 1.6 times as far out as the others, in 50 dimensions.

    Where the widths are alike a descent ends at the nearest mode. Of 2,000 starts spread as the
    modes are none is expected to be nearest to the outer one (|m|^2 - 2 x m falls short by 3
    standard deviations of x m); from far off directions decide, and it has more than its share.
    """
    loc = torch.nn.functional.normalize(torch.randn(41, 50, dtype=DOUBLE, generator=rng()), dim=-1)
    loc = 160 * loc
    loc[0] *= 1.6
    finder = _Basins(lambda x: x[:, 0], lambda x, _: (x, None), 1, broad(50, 1.0), rng(1))

    def share(farthest):
        x = finder.between(loc, torch.arange(41), 2000, farthest)
        return float((torch.cdist(x, loc).argmin(-1) == 0).double().mean())

    assert share(1.0) < 0.005
    assert share(16.0) > 1 / 41


def test_what_crosses_two_basins_has_the_coordinates_of_either():
    target = energies.SymmetricManyWell(8, wells=2)
    finder = _Basins(target, slope_of(target), 2, broad(8, 2.0), rng())
    rest = torch.zeros(2, 8, dtype=DOUBLE)
    rest[:, :2] = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    x = torch.cat([rest, rest + 0.1])
    start = finder.crossed(x, target(x), torch.tensor([0, 1, 0, 1]), 100)
    assert bool(((start == rest[0]) | (start == rest[1])).all())
    signs = {tuple(row) for row in start[:, :2].sign().int().tolist()}
    assert signs == {(1, 1), (1, -1), (-1, 1), (-1, -1)}


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_density_of_a_mixture_is_that_of_its_draws(share):
    """Densities over another law's have mean one: within 5 standard errors; draws have its mean.

    False alarm 1e-5. A share wrong by 0.02 is found.
    """
    loc = torch.tensor([[-2.0, 0.0], [3.0, 1.0]], dtype=DOUBLE)
    tril = torch.tensor([[[1.0, 0.0], [0.5, 0.7]], [[0.6, 0.0], [0.0, 1.2]]], dtype=DOUBLE)
    weight = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    mixture = Mixture(weight, loc, tril, broad(2, 3.0), 20.0, share=share)
    wide = broad(2, 6.0)
    y = wide.sample(200_000, rng())
    ratio = torch.exp(mixture.log_prob(y) - wide.log_prob(y))
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(len(y))
    x = mixture.sample(50_000, rng(1))
    exact = (1 - share) * (weight @ loc)
    assert bool(((x.mean(0) - exact).abs() < 5 * x.std(0) / math.sqrt(len(x))).all())
    total, terms = mixture.log_probs(x)
    assert terms.shape == (50_000, 2)
    assert bool((torch.logsumexp(terms, -1) <= total).all())
    again = density_from_state(mixture.state(), torch.device("cpu"))
    assert torch.equal(again.log_prob(x[:10]), mixture.log_prob(x[:10]))


def test_a_bank_of_a_mixture_grows_and_is_saved():
    target = distant(4)
    mixture = Mixture(
        torch.ones(1, dtype=DOUBLE),
        torch.zeros(1, 4, dtype=DOUBLE),
        10 * torch.eye(4, dtype=DOUBLE)[None],
        broad(4, 10.0),
        20.0,
    )
    x = mixture.sample(500, rng())
    log_weight = (-target(x) - mixture.log_prob(x))[None]
    bank = Bank.of_draws(x[None], log_weight, None, mixture)
    again = Bank.from_state(bank.state(), torch.device("cpu"))
    larger = again.extended(100, lambda x, c: target(x), rng(1))
    assert larger.points.shape == (1, 600, 4)
    assert torch.equal(larger.points[0, :500], x)


def test_few_scouts_are_no_sign_of_many_basins():
    """Forty scouts of 32 equal basins see 23 of them on average, 12 but once; of a thousand all.

    More than 24 alone has a probability of 3e-6 (4.5 standard deviations of 2.7).
    """
    rng = torch.Generator().manual_seed(0)

    def labels(basins):
        return torch.randint(basins, (40,), generator=rng).unique(return_inverse=True)[1]

    assert not any(crowded(labels(32)) for _ in range(100))
    assert all(crowded(labels(1000)) for _ in range(100))
