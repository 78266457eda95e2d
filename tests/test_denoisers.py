import math

import pytest
import torch

from rsm_sampler.ancestral import Ancestral
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.flows import Heun
from rsm_sampler.networks import MLP
from rsm_sampler.schedules import EDM
from tests.exact import IsotropicMixture, NoReadBack

DOUBLE = torch.float64


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(**kwargs):
    made = MLP(2, width=16, generator=torch.Generator().manual_seed(0), **kwargs)
    torch.nn.init.normal_(made.output.weight, generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("sigma_data", [0.1, 1.0, 30.0])
def test_without_a_network_it_is_exact_for_a_normal_law(sigma_data):
    denoiser = Denoiser(lambda x, log_sigma: torch.zeros_like(x), sigma_data)
    law = IsotropicMixture([[0.0, 0.0]], [sigma_data], [1.0])
    x, sigma = 5 * normal(7, 2), normal(7, seed=1).exp()
    torch.testing.assert_close(denoiser(x, sigma), law.denoiser(x, sigma))
    torch.testing.assert_close(denoiser.score(x, sigma), law.score(x, sigma))
    noise = (x - law.denoiser(x, sigma)) / sigma[:, None]
    torch.testing.assert_close(denoiser.noise(x, sigma), noise)


def test_the_network_sees_and_gives_what_the_equation_says():
    seen = {}

    def made(x, log_sigma, context):
        seen.update(x=x, log_sigma=log_sigma, context=context)
        return x + context

    sigma_data = 0.5
    x, sigma, context = normal(4, 3, 2), normal(4, 1, seed=1).exp(), normal(4, 3, 2, seed=2)
    value = Denoiser(made, sigma_data)(x, sigma, context)
    assert seen["log_sigma"].shape == (4, 3) and seen["context"] is context
    level = sigma.expand(4, 3)
    torch.testing.assert_close(seen["log_sigma"], (level / sigma_data).log())
    root = (level**2 + sigma_data**2).sqrt()[..., None]
    torch.testing.assert_close(seen["x"], x / root)
    level = level[..., None]
    expected = sigma_data**2 / root**2 * x + level * sigma_data / root * (x / root + context)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("view", ["forward", "noise", "score"])
def test_noise_levels_broadcast(view):
    call = getattr(Denoiser(network().double()), view)
    x = normal(4, 3, 2)
    whole = call(x, torch.full((4, 3), 0.7, dtype=DOUBLE))
    for sigma in [0.7, torch.tensor(0.7, dtype=DOUBLE), torch.full((3,), 0.7, dtype=DOUBLE)]:
        torch.testing.assert_close(call(x, sigma), whole)
    rows = normal(4, 1, seed=1).exp()
    torch.testing.assert_close(call(x, rows), call(x, rows.repeat(1, 3)))


def test_the_points_decide_the_precision():
    denoiser = Denoiser(network())
    x = normal(3, 2, dtype=torch.float32)
    assert denoiser(x, torch.ones(3, dtype=DOUBLE)).dtype is torch.float32
    assert denoiser.score(x, 2.0).dtype is denoiser.noise(x, 2.0).dtype is torch.float32


def test_it_stays_bounded_at_every_noise_level():
    denoiser = Denoiser(network())
    for sigma in [1e-5, 1e-2, 1.0, 1e3, 1e6]:
        x = normal(100, 2, dtype=torch.float32) * math.hypot(1, sigma)
        value = denoiser(x, sigma)
        assert value.isfinite().all() and value.abs().max() < 100


@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_nothing_is_denoised_to_beyond_the_clean_points(sigma):
    free, bound = Denoiser(network().double()), Denoiser(network().double(), radius=0.5)
    x = 3 * math.hypot(1, sigma) * normal(200, 2)
    before, after = free(x, sigma), bound(x, sigma)
    length = before.norm(dim=-1)
    most = (x.norm(dim=-1) / (1 + sigma**2)).clamp(min=0.5)
    inside = length <= most
    assert 0 < int(inside.sum()) < 200
    assert torch.equal(after[inside], before[inside])  # to the bit
    torch.testing.assert_close(after[~inside].norm(dim=-1), most[~inside])
    torch.testing.assert_close(after / after.norm(dim=-1, keepdim=True), before / length[:, None])


def test_the_bound_can_be_differentiated_everywhere():
    denoiser = Denoiser(network().double(), radius=0.5)
    x = 3 * normal(50, 2)
    assert torch.autograd.gradcheck(lambda x: denoiser(x, 0.7), x.requires_grad_())
    empty = Denoiser(lambda x, log_sigma: torch.zeros_like(x) * x, radius=0.5)
    at_zero = torch.zeros(3, 2, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(empty(at_zero, 1.0).sum(), at_zero)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5))


def test_chains_of_a_network_that_runs_away_stay_with_the_clean_points():
    """F = 3 x has D = 2 x at sigma = 1: every step is away from the origin.

    With the bound, points beyond the radius come in as those of F = 0 do, which just do not get
    there: half of the radius more is far from what they do without.
    """
    sigmas = EDM(0.004, 20.0).sigmas(40)
    ends = []
    for radius in (math.inf, 4.0):
        denoiser = Denoiser(lambda x, log_sigma: 3 * x, radius=radius)
        for sampler in (Heun(denoiser, sigmas, dim=5), Ancestral(denoiser, sigmas, dim=5)):
            x = sampler.sample(100, generator=torch.Generator().manual_seed(0))
            ends.append(float(x.norm(dim=-1).max()))
    assert min(ends[:2]) > 100
    assert max(ends[2:]) < 6.0


def test_no_value_is_read_back_and_gradients_flow():
    denoiser = Denoiser(network(context_dim=1), radius=0.5)
    x = normal(3, 2, dtype=torch.float32)
    with NoReadBack():
        value = denoiser(x, torch.ones(3), torch.ones(3, 1))
    value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: Denoiser(network(), 0.0), "sigma_data must be positive, got 0.0"),
        (lambda d: Denoiser(network(), radius=-1.0), "radius must be positive, got -1.0"),
        (lambda d: d(torch.zeros(3, 2), 0.0), "sigma must be positive, got 0.0"),
        (lambda d: d(torch.zeros(3, 2), torch.ones(2)), r"batch shape \(3,\), got \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Denoiser(network()))
