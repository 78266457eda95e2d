"""NumPyro models as energies, and the way out to ArviZ."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import energies
from rsm_sampler.energy_sampler import WeightedDraws

numpyro = pytest.importorskip("numpyro")
try:
    arviz = pytest.importorskip("arviz")
except FileNotFoundError:  # of its first import on a day, which another worker made meanwhile
    arviz = pytest.importorskip("arviz")
jax = pytest.importorskip("jax")
dist = numpyro.distributions

SCHOOLS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def eight_schools(y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("obs", dist.Normal(theta, 10.0), obs=y)
    numpyro.deterministic("twice", 2 * tau)


def rate(count, scale=1.0):
    value = numpyro.sample("rate", dist.Gamma(2.0, scale))
    numpyro.sample("count", dist.Poisson(value), obs=count)


@pytest.fixture(scope="module")
def schools():
    return energies.from_numpyro(eight_schools, SCHOOLS)


def test_energies_by_scipy(schools):
    """Minus the joint log-density, and the Jacobian of tau = exp(u)."""
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert schools.dim == 10
    assert schools.names == ("mu", "tau", *(f"theta[{i}]" for i in range(8)))
    energy = schools(x)
    assert energy.shape == (2, 3) and energy.dtype == torch.float64
    for index in np.ndindex(2, 3):
        mu, u, *theta = x[index].tolist()
        tau = math.exp(u)
        log_p = stats.norm(0, 5).logpdf(mu) + stats.halfnorm(scale=5).logpdf(tau) + u
        log_p += stats.norm(mu, tau).logpdf(theta).sum()
        log_p += stats.norm(theta, 10).logpdf(SCHOOLS).sum()
        assert float(energy[index]) == pytest.approx(-log_p, rel=1e-10)


def test_precision_and_global_settings_stay(schools):
    x = torch.zeros(5, 10)
    assert schools(x).dtype == torch.float32
    assert jax.numpy.zeros(1).dtype == np.float32
    assert schools(x[:0]).shape == (0,)


def test_gradients_are_those_of_the_energy(schools):
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(schools, (x.requires_grad_(),), atol=1e-5)


def test_constrained_values_and_deterministic_ones(schools):
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    found = schools.constrain(x)
    torch.testing.assert_close(found["tau"], x[:, 1].exp())
    torch.testing.assert_close(found["twice"], 2 * found["tau"])
    assert found["theta"].shape == (4, 8) and found["theta"].dtype == torch.float32


def test_the_evidence_is_the_normaliser():
    """A Gamma prior and a Poisson count: the evidence is negative binomial."""
    energy = energies.from_numpyro(rate, 3, scale=0.5)
    evidence = stats.nbinom(2, 0.5 / 1.5).pmf(3)
    total, _ = integrate.quad(
        lambda u: math.exp(-float(energy(torch.tensor([u], dtype=torch.float64)))), -15, 8
    )
    assert total == pytest.approx(evidence, rel=1e-6)


@pytest.mark.bad_input
def test_bad_models_are_refused():
    with pytest.raises(TypeError, match="model must be callable, got 3"):
        energies.from_numpyro(3)
    with pytest.raises(ValueError, match="continuous latent variable"):
        energies.from_numpyro(lambda: numpyro.sample("y", dist.Normal(0, 1), obs=0.0))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 1\), got \(3, 2\)"):
        energies.from_numpyro(rate, 3)(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x must have shape \(n, 1\)"):
        energies.from_numpyro(rate, 3).constrain(torch.zeros(1))


# -- ArviZ ----------------------------------------------------------------------------------------


def draws():
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    return WeightedDraws(x, torch.tensor([0.0, math.log(2), -math.inf]), torch.ones(3), None)


def test_draws_go_to_arviz_with_their_weights():
    found = draws().to_arviz()
    assert dict(found.posterior.sizes) == {"chain": 1, "draw": 3, "x_dim_0": 2}
    np.testing.assert_array_equal(found.posterior["x"].values[0], draws().x)
    np.testing.assert_array_equal(found.sample_stats["lp"].values, [[-1.0, -1.0, -1.0]])
    np.testing.assert_allclose(found.sample_stats["log_weight"].values[0][:2], [0, math.log(2)])


def test_resampled_draws_carry_no_weights(schools):
    found = draws().to_arviz(["a", "b"], resampled=300, generator=torch.Generator().manual_seed(0))
    values = found.posterior["a"].values[0]
    assert len(values) == 300 and set(values) == {0.0, 2.0}
    assert abs((values == 2.0).mean() - 2 / 3) < 0.01  # stratified
    assert "log_weight" not in found.sample_stats
    assert {"mean", "sd", "ess_bulk"} <= set(arviz.summary(found).columns)


def test_named_variables_of_a_model_go_to_arviz(schools):
    x = torch.zeros(6, 10)
    weighted = WeightedDraws(x, torch.zeros(6), schools(x), None)
    found = weighted.to_arviz(schools.constrain)
    assert found.posterior["theta"].shape == (1, 6, 8)
    assert set(found.posterior.data_vars) >= {"mu", "tau", "theta", "twice"}


@pytest.mark.bad_input
def test_bad_arguments_of_the_export_are_refused():
    with pytest.raises(ValueError, match="variables must be 2 names, got 1"):
        draws().to_arviz(["a"])
    with pytest.raises(ValueError, match="resampled must be at least 1, got 0"):
        draws().to_arviz(resampled=0)


def discrete():
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(z * 1.0, 1.0), obs=0.3)


def subsampled(data):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", len(data), subsample_size=5) as rows:
        numpyro.sample("y", dist.Normal(m, 1.0), obs=data[rows])


def optimised():
    numpyro.sample("m", dist.Normal(0.0, numpyro.param("s", 1.0)))


@pytest.mark.parametrize(
    ("model", "arguments", "kind", "message"),
    [
        (discrete, (), ValueError, "model must have continuous latent .* the discrete one 'z'"),
        (subsampled, (np.arange(9.0),), ValueError, "plate 'n' with subsample_size 5 of 9"),
        (optimised, (), ValueError, "got numpyro.param 's'"),
        (subsampled, (), TypeError, r"arguments must be those of the model \(data\), got 0 by"),
    ],
)
def test_models_without_one_continuous_law_are_refused(model, arguments, kind, message):
    with pytest.raises(kind, match=message):
        energies.from_numpyro(model, *arguments)


def improper(y):
    a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.positive, (), ()))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def test_improper_priors_have_density_one():
    """At u = 0, a = 1: two normal terms, and no volume of the exponential."""
    energy = energies.from_numpyro(improper, np.array([1.0, 2.0]))
    expected = 0.5 + math.log(2 * math.pi)
    assert float(energy(torch.zeros(1, 1, dtype=torch.float64))) == pytest.approx(expected)
