"""Gradients at a bank's points, and what they do to the loss."""

import dataclasses
import math

import pytest
import torch

import energies
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig
from rsm_sampler.bank.bank import Bank
from rsm_sampler.estimators import posterior_estimate
from rsm_sampler.kernels import GaussianReferenceKernel
from rsm_sampler.losses import denoising_loss
from rsm_sampler.montecarlo.densities import Mixture, StudentT
from rsm_sampler.target.coordinates import Bounds
from rsm_sampler.target.energy import EnergyError, MeteredEnergy
from rsm_sampler.target.gradients import (
    autograd_gradient,
    difference_curvature,
    difference_gradient,
    difference_hessian,
    differentiable,
    value_and_gradient,
    virial_holds,
)

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def quartic(x):
    return 0.25 * x.pow(4).sum(-1) + 0.5 * x[..., 0] * x[..., 1]


def test_differences_are_gradients():
    """Central differences of a quartic: the error is h^2 x, at most 0.01 * 3."""
    z = torch.randn(200, 4, dtype=DOUBLE, generator=rng())
    leaf = z.clone().requires_grad_()
    (exact,) = torch.autograd.grad(quartic(leaf).sum(), leaf)
    found = difference_gradient(quartic, z)
    torch.testing.assert_close(found, exact, atol=0.04, rtol=0)


def test_differences_count_two_evaluations_a_coordinate():
    meter = MeteredEnergy(quartic, 4)
    difference_gradient(meter, torch.zeros(100, 4, dtype=DOUBLE))
    assert meter.evaluations == 2 * 4 * (100 + 64)


def test_curvatures_come_with_the_gradients():
    """Of a cubic: E(x + h) - 2 E(x) + E(x - h) is exact; the gradient is off by h^2 times 2."""
    cubic = torch.randn(3, 3, 3, dtype=DOUBLE, generator=rng())
    z = torch.randn(20, 3, dtype=DOUBLE, generator=rng(1))
    step = torch.tensor([0.1, 0.2, 0.05], dtype=DOUBLE)

    def energy(x):
        return torch.einsum("ijk,ni,nj,nk->n", cubic, x, x, x)

    hessian = torch.stack(
        [torch.autograd.functional.hessian(lambda v: energy(v[None]), x) for x in z]
    )
    meter = MeteredEnergy(lambda x: energy(x.double()), 3)
    slope, curvature = difference_curvature(energy, z, step=step)
    torch.testing.assert_close(curvature, hessian.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(slope, difference_gradient(energy, z, step=step))
    difference_curvature(meter, z, step=step)
    assert meter.evaluations == 20 * 7
    # All second derivatives, in steps of each point's own, and in pieces.
    own = step * torch.linspace(0.5, 2, 20, dtype=DOUBLE)[:, None]
    for chunk in (65_536, 4):
        found = difference_hessian(energy, z, step=own, chunk=chunk)
        torch.testing.assert_close(found, hessian)
    one = difference_hessian(lambda x: x[:, 0] ** 2, z[:, :1], step=own[:, :1])
    torch.testing.assert_close(one, torch.full_like(one, 2.0))
    before = meter.evaluations
    difference_hessian(meter, z, step=own)
    assert meter.evaluations - before == 20 * (3 * 4 + 1)


def test_rows_next_to_infinite_energies_have_no_gradient():
    def energy(x):
        return torch.where(x[:, 0] > 0, x.square().sum(-1), torch.inf)

    z = torch.tensor([[1e-4, 1.0], [1.0, 1.0]], dtype=DOUBLE)
    found = difference_gradient(energy, z)
    assert bool(found[0].isnan().all())
    torch.testing.assert_close(found[1], torch.tensor([2.0, 2.0], dtype=DOUBLE))


def test_autograd_follows_the_bounds():
    """The pulled-back gradient is that of the energy in unbounded coordinates, volume included."""
    box = Bounds(0.0, 2.0, 2)
    meter = MeteredEnergy(lambda x: quartic(x), 2)
    u = torch.randn(50, 2, dtype=DOUBLE, generator=rng())
    found = autograd_gradient(meter, box.forward, u)

    def in_u(u):
        x, log_det = box.forward(u)
        return quartic(x) - log_det

    leaf = u.clone().requires_grad_()
    (exact,) = torch.autograd.grad(in_u(leaf).sum(), leaf)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)
    assert meter.evaluations == 100


def test_black_boxes_are_found_out():
    x = torch.zeros(2, 3)
    assert differentiable(MeteredEnergy(lambda x: x.square().sum(-1), 3), x, "gradients")
    assert not differentiable(MeteredEnergy(lambda x: x.detach().sum(-1), 3), x, "gradients")


def test_the_virial_theorem_tells_walls():
    """A normal law passes; one cut in half does not: there E[x g] loses the boundary's part."""
    x = torch.randn(20_000, 2, dtype=DOUBLE, generator=rng())
    weight = torch.ones(len(x), dtype=DOUBLE)
    assert virial_holds(x, x, weight)
    half = x[:, 0] > 0
    assert not virial_holds(x[half], x[half], weight[half])
    flat = torch.rand(20_000, 2, dtype=DOUBLE, generator=rng())
    assert not virial_holds(flat, torch.zeros_like(flat), weight)
    unknown = torch.full_like(x, torch.nan)
    assert not virial_holds(x, unknown, weight)


# The loss


def test_nothing_is_left_of_the_variance_for_a_normal_law():
    """With the exact denoiser the helped loss is zero, whatever the noise."""
    x_0 = torch.randn(100, 3, dtype=DOUBLE, generator=rng())
    sigma = torch.logspace(-2, 1, 100, dtype=DOUBLE)

    def denoise(x_t, sigma):
        return x_t / (1 + sigma.square()).unsqueeze(-1)

    plain = denoising_loss(denoise, x_0, sigma, generator=rng(1))
    helped = denoising_loss(
        denoise, x_0, sigma, gradient=x_0, stiffness=torch.ones(3, dtype=DOUBLE), generator=rng(1)
    )
    assert bool((plain > 1e-6).all())
    torch.testing.assert_close(helped, torch.zeros_like(helped), atol=1e-20, rtol=0)


def test_the_helped_target_has_the_same_mean():
    """Double well: means of 4e5 targets given x_t, within 5 standard errors in 20 bins of x_t.

    Bins whose mean would be off by a tenth of their spread are found; false alarm 1e-5.
    """
    target = energies.get("double-well")
    dim = target.dim
    x_0 = target.sample(400_000, generator=rng(), dtype=DOUBLE)
    leaf = x_0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target(leaf).sum(), leaf)
    stiffness = gradient.square().mean(0)
    sigma, seen = 0.5, {}

    def record(x_t, sigma):
        seen["x_t"] = x_t
        return torch.zeros_like(x_t).requires_grad_()

    # loss = weight * |0 - y|^2: read y off by the gradient with respect to the output.
    targets = {}
    for name, help_ in (
        ("plain", {}),
        ("helped", {"gradient": gradient, "stiffness": stiffness}),
    ):
        output = {}

        def denoise(x_t, sigma, output=output):
            seen["x_t"] = x_t
            output["D"] = torch.zeros_like(x_t).requires_grad_()
            return output["D"]

        loss = denoising_loss(denoise, x_0, sigma, loss_weight=1.0, generator=rng(1), **help_)
        targets[name] = -0.5 * torch.autograd.grad(loss.sum(), output["D"])[0]
    difference = (targets["helped"] - targets["plain"])[:, 0]
    assert dim >= 1
    order = seen["x_t"][:, 0].argsort()
    for part in difference[order].chunk(20):
        assert abs(float(part.mean())) < 5 * float(part.std()) / math.sqrt(len(part))
    residual = {
        k: float((v[:, 0][order].view(400, -1).var(-1)).mean()) for k, v in targets.items()
    }
    assert residual["helped"] < 0.9 * residual["plain"]


def correlated():
    """A normal law with one stiff direction along no axis: x_0, gradients, exact denoiser."""
    precision = torch.tensor([[50.0, -40.0], [-40.0, 50.0]], dtype=DOUBLE)
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    x_0 = torch.randn(64, 20, 2, dtype=DOUBLE, generator=rng()) @ root.mT

    def denoise(x_t, sigma):
        # E[x_0 | x_t] = (1 + sigma^2 P)^-1 x_t
        wide = torch.eye(2, dtype=DOUBLE) + sigma.square()[..., None, None] * precision
        return torch.linalg.solve(wide, x_t.unsqueeze(-1)).squeeze(-1)

    return x_0, x_0 @ precision, denoise


def test_with_the_jacobian_nothing_is_left_whatever_the_directions():
    """One factor for each coordinate cannot do what the Jacobian does: normal laws are exact."""
    x_0, gradient, denoise = correlated()
    sigma = torch.logspace(-2, 1, 64, dtype=DOUBLE).unsqueeze(-1)
    given = {"gradient": gradient, "stiffness": gradient.square().mean((0, 1))}
    helped = denoising_loss(denoise, x_0, sigma, generator=rng(1), **given)
    curved = denoising_loss(denoise, x_0, sigma, jacobian_rows=40, generator=rng(1), **given)
    assert bool((helped.mean(-1) > 1e-8).all())
    torch.testing.assert_close(curved[:40], torch.zeros_like(curved[:40]), atol=1e-18, rtol=0)
    assert torch.equal(curved[40:], helped[40:])


def test_the_jacobians_share_is_never_a_rows_own():
    """One draw of the first row changes: the other targets of that row keep their share of the
    Jacobian, which the other rows tell it; those of the other rows do not."""
    x_0, gradient, denoise = correlated()
    x_0, gradient = x_0[:3], gradient[:3]
    sigma = torch.full((3, 1), 0.1, dtype=DOUBLE)
    stiffness = gradient.square().mean((0, 1))

    def targets(x, g):
        calls = []

        def recorded(x_t, sigma):
            # Not exact, so that shares are strictly between 0 and 1.
            calls.append((0.8 * denoise(x_t, sigma) + 0.1 * x_t.sin()).requires_grad_())
            return calls[-1]

        given = {"gradient": g, "stiffness": stiffness, "jacobian_rows": 3}
        loss = denoising_loss(recorded, x, sigma, loss_weight=1.0, generator=rng(1), **given)
        (slope,) = torch.autograd.grad(loss.sum(), calls[0])
        return calls[0].detach() - 0.5 * slope

    before = targets(x_0, gradient)
    moved, pushed = x_0.clone(), gradient.clone()
    moved[0, 0] += 0.5
    pushed[0, 0] *= 3
    after = targets(moved, pushed)
    assert torch.equal(before[0, 1:], after[0, 1:])
    assert not torch.equal(before[1:], after[1:])


def test_the_curved_target_has_the_same_mean():
    """A double well, noise below its width: means of 1e5 targets given x_t agree with plain ones,
    within 5 standard errors in 20 bins of x_t.

    The denoiser is a wrong one, as in training. False alarm 1e-5; what is found is a mean off by
    a twentieth of its spread.
    """
    target = energies.get("double-well")
    sigma = torch.full((5000, 1), 0.2, dtype=DOUBLE)
    x_0 = target.sample(100_000, generator=rng(), dtype=DOUBLE).view(5000, 20, 2)
    leaf = x_0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target(leaf).sum(), leaf)
    given = {
        "gradient": gradient,
        "stiffness": gradient.square().mean((0, 1)),
        "jacobian_rows": 5000,
    }

    def found(help_):
        calls = []

        def denoise(x_t, sigma):
            calls.append((x_t, (0.9 * x_t + 0.05 * (2 * x_t).sin()).requires_grad_()))
            return calls[-1][1]

        loss = denoising_loss(denoise, x_0, sigma, loss_weight=1.0, generator=rng(1), **help_)
        x_t, denoised = calls[0]
        (slope,) = torch.autograd.grad(loss.sum(), denoised)
        assert len(calls) == (2 if help_ else 1)
        return x_t[..., 0].view(-1), (denoised.detach() - 0.5 * slope)[..., 0].view(-1)

    (x_t, plain), (again, curved) = found({}), found(given)
    assert torch.equal(x_t, again)
    order = x_t.argsort()
    for part in (curved - plain)[order].chunk(20):
        assert abs(float(part.mean())) < 5 * float(part.std()) / math.sqrt(len(part))
    left = [float(y[order].view(500, -1).var(-1).mean()) for y in (curved, plain)]
    assert left[0] < 0.5 * left[1]


def weighted_bank(n):
    """A normal law from draws twice as wide."""
    tril = 2 * torch.eye(2, dtype=DOUBLE)
    wide = StudentT(torch.zeros(2, dtype=DOUBLE), tril, df=50)
    mixture = Mixture(torch.ones(1, dtype=DOUBLE), wide.loc[None], tril[None], wide, 50)
    x = mixture.sample(n, rng())
    log_weight = -0.5 * x.square().sum(-1) - mixture.log_prob(x)
    return Bank.of_draws(x[None], log_weight[None], None, mixture)


def test_which_points_have_a_gradient_does_not_depend_on_the_point():
    """Were they chosen by weight, their targets would be those of a narrower law.

    Of 30,000 points 16,384: the mean square under the weights is 1 among them and among the rest,
    each within 0.06, four standard errors; by weight it would be below 0.8 and above 1.2.
    """
    trainer = EnergyDiffusionTrainer(
        lambda x: 0.5 * x.square().sum(-1), 2, gradients="autograd", config=SMALL
    )
    supply = trainer.supply
    bank = weighted_bank(30_000)
    supply.adopt(supply._helped(bank, 0, lambda _: None))
    assert supply.helped
    known = supply._stiffness.isfinite().all(-1)
    assert int(known.sum()) == 16_384
    weight = torch.softmax(bank.log_weight[0], 0)
    for part in (known, ~known):
        square = (weight[part, None] * bank.points[0][part].square()).sum(0) / weight[part].sum()
        torch.testing.assert_close(square, torch.ones(2, dtype=DOUBLE), atol=0.06, rtol=0)
    stiffness = supply._stiffness[known][0].double()
    torch.testing.assert_close(stiffness, torch.ones(2, dtype=DOUBLE), atol=0.06, rtol=0)


def test_a_bank_of_many_draws_needs_no_gradients():
    trainer = EnergyDiffusionTrainer(
        lambda x: 0.5 * x.square().sum(-1), 2, gradients="autograd", config=SMALL
    )
    bank = weighted_bank(40_000)
    assert trainer.supply._helped(bank, 0, lambda _: None) is bank
    assert trainer.evaluations == 0


def test_points_without_a_gradient_keep_their_target():
    x_0 = torch.randn(10, 2, generator=rng())
    stiffness = torch.full((10, 2), torch.inf)
    denoise = lambda x_t, sigma: x_t  # noqa: E731
    helped = denoising_loss(
        denoise, x_0, 1.0, gradient=torch.zeros(10, 2), stiffness=stiffness, generator=rng(1)
    )
    plain = denoising_loss(denoise, x_0, 1.0, generator=rng(1))
    assert torch.equal(helped, plain)
    curved = denoising_loss(
        denoise,
        x_0,
        torch.ones(10),
        gradient=torch.zeros(10, 2),
        stiffness=stiffness,
        jacobian_rows=10,
        generator=rng(1),
    )
    assert torch.equal(curved, plain)


@pytest.mark.bad_input
def test_gradients_come_with_their_mean_square():
    with pytest.raises(ValueError, match="gradient and stiffness must be given together"):
        denoising_loss(lambda x, s: x, torch.zeros(3, 2), 1.0, gradient=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="jacobian_rows must be 0 without a gradient, got 2"):
        denoising_loss(lambda x, s: x, torch.zeros(3, 2), 1.0, jacobian_rows=2)
    with pytest.raises(ValueError, match="gradients must be one of"):
        EnergyDiffusionTrainer(quartic, 2, gradients="exact")


# The trainer

SMALL = TrainerConfig(
    chain_evaluations=60_000,
    round_draws=8192,
    steps_per_cycle=300,
    max_cycles=2,
    width=32,
    depth=2,
    check_draws=512,
)


@pytest.mark.parametrize("gradients", ["auto", "differences", "none"])
def test_eighteen_dimensions_from_an_energy(gradients):
    """Two unequal wells in one coordinate of 18: a bank of basins, or chains and a renewed bank.

    By differences a descent is too dear for this budget.
    """

    def energy(x):
        first = x[:, 0]
        wells = torch.logaddexp(
            -0.5 * ((first - 2) / 0.5).square() + math.log(0.7),
            -0.5 * ((first + 2) / 0.5).square() + math.log(0.3),
        )
        return 0.5 * x[:, 1:].square().sum(-1) - wells

    exact = 9 * math.log(2 * math.pi) + math.log(0.5)
    trainer = EnergyDiffusionTrainer(energy, 18, gradients=gradients, seed=1, config=SMALL)
    sampler = trainer.fit(progress=False)
    counts = trainer.energy.counts
    assert ("gradients" in counts) == trainer.supply.helped
    if gradients == "none" or trainer.bank.method == "chains":
        assert trainer.supply.helped == (gradients != "none")
    if trainer.supply.helped and gradients == "auto":
        assert counts["gradients"] <= 4 * 16_384 + 4
    assert counts.get("rounds", 0) == (8192 if trainer.bank.method == "paths" else 0)
    assert trainer.bank.method == "bank"
    if trainer.bank.log_z_se < 0.1:
        assert abs(trainer.bank.log_z - exact) < 6 * trainer.bank.log_z_se + 0.01
        share = float((sampler.sample(4000)[:, 0] > 0).double().mean())
        assert abs(share - 0.7) < 0.06
    state = trainer.state()
    again = EnergyDiffusionTrainer(energy, 18, gradients=gradients, seed=1, config=SMALL)
    again.load_state(state)
    assert torch.equal(again.supply.batch(4, 2).x_0, trainer.supply.batch(4, 2).x_0)


@pytest.mark.numbers
@pytest.mark.parametrize("budget", [None, 700_000])
def test_basins_by_values_alone(budget):
    """Four unequal wells in two coordinates of 24, of an energy that autograd cannot follow.

    A slope costs 49 evaluations, so basins have 4.9 times a third of the chains' evaluations, or
    what the budget leaves. The shares' errors are those of 4,000 draws (standard deviation 0.008)
    and of a short training.
    """

    def energy(x):
        first = x[:, :2].detach()
        wells = torch.logaddexp(
            -0.5 * ((first - 2) / 0.3).square() + math.log(0.7),
            -0.5 * ((first + 2) / 0.3).square() + math.log(0.3),
        )
        return 0.5 * x[:, 2:].detach().square().sum(-1) - wells.sum(-1)

    exact = 12 * math.log(2 * math.pi) + 2 * math.log(0.3)
    config = dataclasses.replace(
        SMALL, search_evaluations=30_000, bank_size=50_000, chain_evaluations=200_000
    )
    trainer = EnergyDiffusionTrainer(energy, 24, seed=0, config=config)
    sampler = trainer.fit(progress=False, budget=budget)
    assert trainer.bank.method == "bank"
    assert trainer.energy.counts["search"] <= 30_000 + 50_000 + 4.9 * 66_667
    assert trainer.energy.evaluations <= (budget or math.inf)
    assert abs(trainer.bank.log_z - exact) < 5 * trainer.bank.log_z_se < 0.1
    share = (sampler.sample(4000)[:, :2] > 0).double().mean(0)
    assert float((share - 0.7).abs().amax()) < 0.06


@pytest.mark.numbers
def test_an_energy_with_walls_goes_without_gradients():
    def energy(x):
        inside = (x.abs() < 1).all(-1)
        return torch.where(inside, 0.1 * x.square().sum(-1), torch.inf)

    trainer = EnergyDiffusionTrainer(energy, 14, config=SMALL, scale=0.5)
    trainer.fit(progress=False, max_cycles=1)
    assert trainer.bank.method == "chains"
    assert not trainer.supply.helped


def test_wanted_autograd_of_a_black_box_is_an_error():
    trainer = EnergyDiffusionTrainer(
        lambda x: 0.5 * x.detach().square().sum(-1), 14, gradients="autograd", config=SMALL
    )
    with pytest.raises(EnergyError, match="differentiable"):
        trainer.fit(progress=False)


def test_gradients_are_the_same_within_vmap():
    """Of several functions at once, as of each alone; estimates in the gradient form too."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x = torch.randn(3, 5, 2, generator=rng, dtype=torch.float64)

    def both(s, points):
        return value_and_gradient(lambda z: (s * z).sin().sum(-1), points)

    values, gradients = torch.vmap(both)(scale, x)
    for k, s in enumerate(scale):
        value, gradient = both(s, x[k])
        torch.testing.assert_close(values[k], value, rtol=0, atol=1e-14)
        torch.testing.assert_close(gradients[k], gradient, rtol=0, atol=1e-14)
        torch.testing.assert_close(gradient, s * (s * x[k]).cos(), rtol=0, atol=1e-14)

    def mean(s, points):
        kernel = GaussianReferenceKernel(0.0, 1.0)
        noise = torch.Generator().manual_seed(1)
        return posterior_estimate(
            lambda z: (s * z).square().sum(-1),
            points,
            0.5,
            kernel,
            16,
            target="mixed",
            generator=noise,
        ).mean

    found = torch.vmap(mean, randomness="same")(scale, x)
    for k, s in enumerate(scale):
        torch.testing.assert_close(found[k], mean(s, x[k]), rtol=0, atol=1e-12)


@pytest.mark.bad_input
def test_what_autograd_cannot_follow_is_refused():
    """Values without a graph have no gradient."""
    with pytest.raises(ValueError, match="differentiable by autograd"):
        value_and_gradient(lambda x: x.detach().sum(-1), torch.ones(3, 2))


def test_functions_may_change_their_points_in_place():
    def function(x):
        x *= 3
        return x.square().sum(-1)

    x = torch.ones(2, 2)
    value, gradient = value_and_gradient(function, x)
    assert value.tolist() == [18.0, 18.0] and torch.equal(gradient, torch.full((2, 2), 18.0))
    assert torch.equal(x, torch.ones(2, 2))
