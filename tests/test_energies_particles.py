"""Particles: symmetries, exact draws against quadrature, and the virial theorem."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from energies import DoubleWellCluster, LennardJones
from rsm_sampler.target.coordinates import MeanFree

DW4, LJ5 = DoubleWellCluster(), LennardJones(5)
BOTH = pytest.mark.parametrize("target", [DW4, LJ5], ids=["dw4", "lj5"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rotation(dim, seed):
    """A random orthogonal matrix; every other seed gives a reflection."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=seeded(seed), dtype=torch.float64))
    q = q * r.diagonal().sign()
    if (float(torch.det(q)) < 0) != (seed % 2 == 1):
        q[:, 0] *= -1
    return q


# -- coordinates ----------------------------------------------------------------------------------


@given(n=st.integers(2, 9), s=st.integers(1, 3), seed=st.integers(0, 99))
def test_mean_free_coordinates_are_an_isometry(n, s, seed):
    inside = MeanFree(n, s)
    u = torch.randn(3, 2, inside.reduced, generator=seeded(seed), dtype=torch.float64)
    x, log_det = inside.forward(u)
    assert x.shape == (3, 2, n * s) and not log_det.any()
    torch.testing.assert_close(x.unflatten(-1, (n, s)).mean(-2), torch.zeros(3, 2, s).double())
    torch.testing.assert_close(x.square().sum(-1), u.square().sum(-1))
    torch.testing.assert_close(inside.inverse(x), u)
    moved = x + torch.randn(s, generator=seeded(seed), dtype=torch.float64).repeat(n)
    torch.testing.assert_close(inside.inverse(moved), u)
    torch.testing.assert_close(inside.centred(moved), x)


@pytest.mark.bad_input
@pytest.mark.parametrize("numbers", [(1, 2), (3, 0)])
def test_mean_free_coordinates_refuse(numbers):
    with pytest.raises(ValueError, match="must be at least"):
        MeanFree(*numbers)


# -- energies -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_energies_do_not_feel_symmetries(target, seed):
    n, s = target.num_particles, target.space_dim
    x = target.scattered(6, generator=seeded(seed)).view(6, n, s)
    energy = target(x.flatten(1))
    order = torch.randperm(n, generator=seeded(seed))
    moved = (x @ rotation(s, seed) + torch.randn(s, generator=seeded(seed)).double())[:, order]
    torch.testing.assert_close(target(moved.flatten(1)), energy, rtol=1e-11, atol=1e-9)


@BOTH
def test_energies_by_hand(target):
    n, s = target.num_particles, target.space_dim
    x = target.scattered(1, generator=seeded(1))[0]
    points = x.view(n, s).tolist()
    total = 0.0
    for a, b in itertools.combinations(points, 2):
        square = sum((i - j) ** 2 for i, j in zip(a, b, strict=True))
        if s == 2:
            d = math.sqrt(square)
            total += -4 * (d - 4) ** 2 + 0.9 * (d - 4) ** 4
        else:
            total += 2 * ((square + 1e-6) ** -6 - 2 * (square + 1e-6) ** -3)
    total += 0.5 * target.tether * sum(c**2 for point in points for c in point)
    assert float(target(x)) == pytest.approx(total, rel=1e-12)
    distances = sorted(math.dist(a, b) for a, b in itertools.combinations(points, 2))
    torch.testing.assert_close(
        target.distances(x).sort().values, torch.tensor(distances, dtype=torch.float64)
    )


def test_a_pair_of_the_lennard_jones_energy_is_two_deep_at_distance_one():
    """Equation (1) of the file's conventions: ordered pairs, each of depth 1."""
    pair = LennardJones(2)
    at = torch.linspace(0.9, 1.2, 3001, dtype=torch.float64)
    energy = pair.pair_energy(at.square())
    assert float(energy.min()) == pytest.approx(-2.0, abs=1e-6)
    assert float(at[energy.argmin()]) == pytest.approx(1.0, abs=2e-4)
    half = LennardJones(2, strength=1.0).pair_energy(at.square())
    torch.testing.assert_close(2 * half, energy)


# -- the exact cluster ----------------------------------------------------------------------------


def test_the_normaliser_is_that_of_importance_sampling():
    """Which knows nothing of Fourier series: radii about particle 1 from a table of their own law.

    1,000,000 draws; six standard errors (false alarm 2e-9), which are about 6 %.
    """
    n = 1_000_000
    law = DW4._radius
    total, square = 0.0, 0.0
    generator = seeded(3)
    for _ in range(8):
        u = torch.rand(n // 8, 6, generator=generator, dtype=torch.float64)
        radius, angle = law(u[:, :3]), 2 * math.pi * u[:, 3:]
        others = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
        well = DW4.pair_energy(radius.square())
        log_q = -(well + law.log_mass + math.log(2 * math.pi)).sum(-1)  # in the plane
        x = torch.cat([torch.zeros_like(others[:, :1]), others], 1).flatten(1)
        weight = (-DW4(x) - log_q - (DW4.log_z + math.log(4))).exp()
        total, square = total + float(weight.sum()), square + float(weight.square().sum())
    mean = total / n
    error = math.sqrt((square / n - mean**2) / n)
    assert abs(mean - 1) <= 6 * error
    assert error < 0.011


def test_quadrature_has_converged():
    fine = DoubleWellCluster._log_z(1.0, nodes=120, angles=320)
    assert DW4.log_z == pytest.approx(fine, abs=1e-10)
    assert DW4.log_z == pytest.approx(29.666, abs=3e-3)  # a published Monte Carlo value, its error


def test_exact_draws_have_the_exact_energies_and_virial():
    """Means of 4,000 draws within five standard errors: false alarm 6e-7 each.

    They are 0.03 for the energy and 0.6 for the virial.
    """
    n = 4000
    x = DW4.sample(n, generator=seeded(5), dtype=torch.float64)
    energy, virial = DW4(x), DW4.virial(x)
    assert abs(float(energy.mean()) - DW4.mean_energy) <= 5 * DW4.std_energy / math.sqrt(n)
    assert float(energy.std()) == pytest.approx(DW4.std_energy, rel=0.12)
    assert abs(float(virial.mean()) - 6) <= 5 * float(virial.std()) / math.sqrt(n)
    torch.testing.assert_close(DW4.coordinates.centred(x), x)
    # the entropy: minus the mean log-density on the subspace
    assert DW4.entropy == pytest.approx(DW4.log_z + DW4.mean_energy, abs=1e-9)


def test_exact_draws_are_exchangeable():
    """Every pair of particles has the same mean distance, within five standard errors."""
    n = 4000
    distance = DW4.distances(DW4.sample(n, generator=seeded(6), dtype=torch.float64))
    error = float(distance.std()) * math.sqrt(2 / n)
    assert float(distance.mean(0).max() - distance.mean(0).min()) <= 5 * error


# -- chains ---------------------------------------------------------------------------------------


@pytest.mark.numbers
def test_reference_chains_agree_with_exact_draws():
    """Energies of 100 independent chains: their means are independent, and so is the error."""
    x = DW4.reference(1000, chains=100, burn_in=150, thinning=10, generator=seeded(7))
    mean = DW4(x).view(100, -1).mean(1)
    assert abs(float(mean.mean()) - DW4.mean_energy) <= 5 * float(mean.std()) / 10
    torch.testing.assert_close(DW4.coordinates.centred(x), x)


@pytest.mark.numbers
def test_reference_chains_of_a_droplet_obey_the_virial_theorem():
    """Two halves agree, and the virial is (n - 1) s; five standard errors of chain means."""
    x = LJ5.reference(1000, chains=100, burn_in=200, thinning=10, generator=seeded(8))
    virial = LJ5.virial(x).view(100, -1).mean(1)
    assert abs(float(virial.mean()) - 12) <= 5 * float(virial.std()) / 10
    energy = LJ5(x).view(100, -1).mean(1)
    halves = energy[:50].mean() - energy[50:].mean()
    assert abs(float(halves)) <= 5 * float(energy.std()) * math.sqrt(2 / 50)


@pytest.mark.parametrize("n", [2, 13, 55])
def test_scattered_particles_do_not_overlap(n):
    target = LennardJones(n)
    x = target.scattered(20, generator=seeded(2))
    assert x.shape == (20, 3 * n)
    assert float(target.distances(x).min()) > 0.6
    assert bool(target(x).isfinite().all())


@pytest.mark.bad_input
def test_particles_refuse():
    with pytest.raises(ValueError, match="num_particles must be at least 2, got 1"):
        LennardJones(1)
    with pytest.raises(ValueError, match="strength must be positive"):
        LennardJones(3, strength=-1.0)
    with pytest.raises(ValueError, match="dw4 has no other units"):
        DW4.affine(scale=2.0)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 8\)"):
        DW4.distances(torch.zeros(3, 6))
    with pytest.raises(NotImplementedError, match="lj5 has no exact sampler"):
        LJ5.sample(3)
