"""The network of particles: symmetries in double precision, and the interface of a denoiser."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsm_sampler.denoisers import Denoiser
from rsm_sampler.equivariant import EGNN
from rsm_sampler.flows import Heun
from rsm_sampler.target.coordinates import MeanFree


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(n, s, seed=0, scale=0.5, **options):
    """In double precision, with every weight away from zero."""
    made = EGNN(n, s, **{"width": 12, "depth": 2, "radial": 6, **options}).double()
    generator = seeded(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def rotation(dim, seed):
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=seeded(seed), dtype=torch.float64))
    return q if seed % 2 else q * torch.tensor([-1.0] + [1.0] * (dim - 1), dtype=torch.float64)


@given(n=st.integers(2, 7), s=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_output_turns_mirrors_and_permutes_with_the_particles(n, s, seed):
    net, inside, generator = network(n, s, seed), MeanFree(n, s), seeded(seed)
    u = torch.randn(3, inside.reduced, generator=generator, dtype=torch.float64)
    log_sigma = torch.randn(3, generator=generator, dtype=torch.float64)
    turn, order = rotation(s, seed), torch.randperm(n, generator=generator)

    def moved(v):
        x = inside.forward(v)[0].unflatten(-1, (n, s))
        return inside.inverse((x @ turn)[:, order].flatten(-2))

    output = net(u, log_sigma)
    assert float(output.detach().abs().max()) > 1e-6
    torch.testing.assert_close(net(moved(u), log_sigma), moved(output), rtol=1e-9, atol=1e-10)


def test_it_starts_as_the_exact_denoiser_of_a_normal_law():
    net = EGNN(5, 3, width=8, depth=3)
    u = torch.randn(4, 12, generator=seeded())
    assert not net(u, torch.zeros(4)).any()
    denoised = Denoiser(net)(u, torch.full((4,), 2.0))
    torch.testing.assert_close(denoised, u / 5)


def test_any_batch_shape_and_a_shared_level():
    net = network(4, 2)
    u = torch.randn(2, 3, 6, generator=seeded(), dtype=torch.float64)
    level = torch.tensor(0.3, dtype=torch.float64).expand(2, 3)
    together = net(u, level)
    assert together.shape == u.shape
    torch.testing.assert_close(together, net(u, level.clone()))
    torch.testing.assert_close(together[1, 2], net(u[1, 2], level[1, 2]))


@pytest.mark.parametrize("shape", [(700,), (300, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_without_gradients_pieces_give_the_same(shape, shared):
    """21 messages of 48 numbers a point: 158 points to a piece of 160,000 numbers."""
    net = network(7, 2, width=48, scale=0.1)  # outputs of about one
    x = torch.randn(*shape, net.dim, generator=seeded(1), dtype=torch.float64)
    level = torch.randn(1 if shared else shape, generator=seeded(2), dtype=torch.float64)
    level = level.expand(shape)
    whole = net(x, level)
    with torch.no_grad():
        torch.testing.assert_close(net(x, level), whole.detach(), rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_weight_even_where_particles_meet():
    """Two particles in one place have no direction, and no NaN."""
    net = network(3, 2)
    points = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    u = MeanFree(3, 2).inverse(points.flatten(1)).requires_grad_()
    net(u, torch.zeros(1, dtype=torch.float64)).square().sum().backward()
    assert bool(u.grad.isfinite().all())
    for name, parameter in net.named_parameters():
        assert bool(parameter.grad.isfinite().all()) and parameter.grad.any(), name


def test_the_flow_of_an_equivariant_denoiser_has_an_invariant_density():
    """One configuration, turned and renumbered, has one log-density."""
    inside = MeanFree(4, 2)
    flow = Heun(
        Denoiser(network(4, 2, scale=0.2)), torch.tensor([5.0, 1.0, 0.2, 0.05, 0.0]), dim=6
    )
    u = torch.randn(3, 6, generator=seeded(), dtype=torch.float64)
    x = inside.forward(u)[0].unflatten(-1, (4, 2))
    other = inside.inverse((x @ rotation(2, 3))[:, [2, 0, 3, 1]].flatten(-2))
    torch.testing.assert_close(flow.log_prob(other)[0], flow.log_prob(u)[0], rtol=1e-8, atol=1e-8)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["width", "depth", "radial", "vectors"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EGNN(3, 2, **{name: 0})


def test_long_vectors_do_not_square_themselves_from_round_to_round():
    """Without bounds two rounds make 10¹² times as much of vectors 10⁴ times as long."""
    net = network(7, 2)
    x = torch.randn(50, net.dim, generator=seeded(3), dtype=torch.float64)
    level = torch.zeros(50, dtype=torch.float64)
    with torch.no_grad():
        usual = net(x, level).abs().amax()
        net.direction.weight *= 1e4
        net.direction.bias *= 1e4
        assert 0 < net(x, level).abs().amax() < 1e5 * usual
