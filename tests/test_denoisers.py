import math

import pytest
import torch

from rsm_sampler.denoisers import Denoiser
from rsm_sampler.networks import MLP
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


def test_no_value_is_read_back_and_gradients_flow():
    denoiser = Denoiser(network(context_dim=1))
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
        (lambda d: d(torch.zeros(3, 2), 0.0), "sigma must be positive, got 0.0"),
        (lambda d: d(torch.zeros(3, 2), torch.ones(2)), r"batch shape \(3,\), got \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Denoiser(network()))
