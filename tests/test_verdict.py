"""The verdict, with samplers that are exact for the target or for something near it."""

import math
import sys

import pytest
import torch
from scipy import stats

from energies import ConditionalMixture, GaussianMixture
from rsm_sampler.montecarlo.weights import pareto_shape
from rsm_sampler.target.coordinates import Affine
from rsm_sampler.target.energy import MeteredEnergy
from tests.exact_sampler import ConditionalDenoiser, exact_sampler, sampler_of

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(seed, dim=2):
    """Two to five modes of std 1, at least 6 apart, weights of at least 0.05."""
    generator = rng(seed)
    modes = int(torch.randint(2, 6, (), generator=generator))
    return GaussianMixture.random(dim=dim, modes=modes, generator=generator)


def broken(target, how):
    """The law of a sampler that is wrong in one way."""
    loc, weights, scale = target.loc, target.weights.clone(), target.variance[0, 0].sqrt()
    light, heavy = int(weights.argmin()), int(weights.argmax())
    if how == "a mode removed":
        keep = torch.arange(len(weights)) != light
        return GaussianMixture(loc[keep], scale, weights=weights[keep])
    if how == "weights off":
        weights[heavy] -= 0.1
        weights[light] += 0.1
    elif how == "too wide":
        scale = 1.3 * scale
    elif how == "too narrow":
        scale = 0.75 * scale
    elif how == "moved":
        loc = loc + 0.5 * scale
    else:
        raise AssertionError(how)
    return GaussianMixture(loc, scale, weights=weights)


FAULTS = ["a mode removed", "weights off", "too wide", "too narrow", "moved"]


class Blank(torch.nn.Module):
    """The denoiser of a standard normal law: a network that has learned nothing."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, z_t, sigma, context=None):
        return z_t / (1 + sigma.square()).unsqueeze(-1)


def identity(dim, loc=0.0, scale=1.0):
    return Affine(torch.full((dim,), loc, dtype=DOUBLE), scale * torch.eye(dim, dtype=DOUBLE))


# The verdict


@pytest.mark.parametrize(("seed", "dim"), [(0, 2), (3, 2), (2, 1), (4, 3)])
def test_an_exact_sampler_is_trusted(seed, dim):
    """False alarm below 4e-3 for each, by the count in the module's docstring."""
    report = exact_sampler(mixture(seed, dim), seed=seed).diagnose(seed=seed)
    assert report.trustworthy, str(report)
    assert report.findings == report.advice == []
    assert report.ess > 0.95 * report.n
    assert abs(report.log_z) <= 5 * report.log_z_se + 0.005  # and the steps of the ODE
    assert abs(report.witness.log_z) <= 5 * report.witness.log_z_se
    assert report.pareto_k < 0.7


@pytest.mark.numbers
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_sampler_is_not_trusted(fault):
    target = mixture(1)
    report = exact_sampler(target, broken(target, fault)).diagnose(4096)
    assert not report.trustworthy
    assert report.findings
    assert report.advice


def test_only_the_witness_sees_a_missing_mode():
    """The sampler's own measures look perfect; its log Z is off by the log of what is left."""
    target = mixture(16)
    report = exact_sampler(target, broken(target, "a mode removed")).diagnose()
    assert report.ess > 0.99 * report.n
    assert abs(report.drift) <= 5 * report.drift_se
    left = 1 - float(target.weights.amin())
    assert abs(report.log_z - math.log(left)) <= 5 * report.log_z_se + 0.005
    assert abs(report.witness.log_z) <= 5 * report.witness.log_z_se
    assert any("log Z differs from the witness" in finding for finding in report.findings)
    assert any("region holds" in finding for finding in report.findings)


def test_an_error_of_mode_weights_shows_however_many_cells_share_it():
    """Weights off by 0.1 leave ESS, log Z and drift in order; the clusters of cells catch it."""
    target = mixture(0)
    report = exact_sampler(target, broken(target, "weights off")).diagnose()
    (finding,) = report.findings
    assert "region holds" in finding
    assert report.worst_cell == pytest.approx(0.1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_twenty_good_and_twenty_broken_samplers(dim):
    """At most one of twenty wrong, either way; faults in turn."""
    alarms, misses = [], []
    for seed in range(20):
        target = mixture(100 + seed, dim)
        law = broken(target, FAULTS[seed % len(FAULTS)])
        if not exact_sampler(target, seed=seed).diagnose(seed=seed).trustworthy:
            alarms.append(seed)
        if exact_sampler(target, law, seed=seed).diagnose(seed=seed).trustworthy:
            misses.append(seed)
    assert len(alarms) <= 1, alarms
    assert len(misses) <= 1, misses


def test_a_sampler_that_learned_nothing_is_not_trusted():
    target = GaussianMixture.grid(9, spacing=4.0, std=0.5)
    sampler = sampler_of(Blank(), target, identity(2, scale=4.0))
    report = sampler.diagnose(2000, witness_evaluations=20_000)
    assert not report.trustworthy
    assert any("effective sample size" in finding for finding in report.findings)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_sampler_far_from_every_finite_energy_gets_a_verdict(value):
    def energy(x):
        return torch.where(x.abs().amax(-1) < 1, x.square().sum(-1), value)

    sampler = sampler_of(Blank(), energy, identity(2, loc=300.0))
    report = sampler.diagnose(500, witness_evaluations=2000)
    assert not report.trustworthy
    assert report.ess == 0
    assert "no draw has a finite energy" in report.findings
    assert "not trustworthy" in str(report)


@pytest.mark.parametrize("evaluations", [100, 300])
def test_an_inconclusive_witness_confirms_nothing(evaluations):
    report = exact_sampler(mixture(1)).diagnose(1000, witness_evaluations=evaluations)
    assert not report.witness.conclusive
    assert report.verdict == "cannot tell"
    assert any("witness is inconclusive" in finding for finding in report.findings)
    assert any(f"witness_evaluations={4 * evaluations}" in advice for advice in report.advice)


def test_a_small_budget_makes_a_small_examination():
    sampler = exact_sampler(mixture(1), budget=10_000)
    report = sampler.diagnose()
    assert report.n == 1000
    assert report.witness.evaluations == 2500
    assert report.evaluations < 10_000
    assert report.trustworthy, str(report)


# The energy itself


def test_a_noisy_energy_is_recognised_and_not_blamed_on_the_sampler():
    """Noise of one nat costs two thirds of the effective size of exact draws."""
    target, noise = mixture(0), torch.Generator().manual_seed(7)

    def energy(x):
        return target(x) + torch.randn(len(x), generator=noise).to(x)

    sampler = exact_sampler(target)
    sampler.energy = MeteredEnergy(energy, 2)
    report = sampler.diagnose(4096, witness_evaluations=20_000)
    assert report.verdict == "cannot tell", str(report)
    assert report.noise == pytest.approx(1.0, abs=0.3)
    assert any(text.startswith("noise: the energy gives other values") for text in report.findings)
    assert not any("train longer" in text for text in report.advice)


def test_an_exact_energy_has_no_noise():
    assert exact_sampler(mixture(0)).diagnose(1000, witness_evaluations=2000).noise < 1e-3


def test_rounding_is_named():
    """Single precision near 10^8 knows steps of 8, the draws' energies spread by one."""
    target = mixture(0)
    sampler = exact_sampler(target)
    sampler.energy = MeteredEnergy(lambda x: (target(x).float() + 1e8).float(), 2)
    report = sampler.diagnose(2000, witness_evaluations=20_000)
    assert report.verdict == "cannot tell", str(report)
    assert any(text.startswith("rounding: energies of about 1e+08") for text in report.findings)
    assert any(text.startswith("rounding: subtract a constant") for text in report.advice)


# What it says


@pytest.mark.parametrize(
    ("stopped", "advice"),
    [
        ("rule", "training stopped by its own rule"),
        ("budget", "a larger budget"),
        ("cycles", "train longer: trainer.fit(max_cycles=...)"),
        (None, "train longer if training did not stop by itself"),
    ],
)
def test_advice_leads_somewhere(stopped, advice):
    target = mixture(1)
    sampler = exact_sampler(target, broken(target, "too narrow"))
    sampler.search = {"stopped": stopped}
    report = sampler.diagnose(2000, witness_evaluations=20_000)
    assert report.verdict == "not trustworthy"
    assert any(text.startswith(advice) for text in report.advice), report.advice


def test_a_finding_has_value_tolerance_and_error():
    target = mixture(16)
    report = exact_sampler(target, broken(target, "a mode removed")).diagnose(
        witness_evaluations=20_000
    )
    found = {finding.test: finding for finding in report.failed}
    assert {"log Z", "masses", "basins"} <= set(found)
    z = found["log Z"]
    assert z.value == pytest.approx(abs(report.log_z - report.witness.log_z))
    assert z.value > z.tolerance + 4 * z.error
    lightest = float(target.weights.amin())
    assert found["basins"].value < 0.1 * lightest
    assert found["basins"].tolerance == pytest.approx(lightest, abs=5 * found["basins"].error)
    assert [str(finding) for finding in report.failed] == report.findings


def test_a_bank_that_is_worth_nothing_in_most_contexts_is_not_passed():
    sampler = exact_sampler(mixture(0))
    sampler.search = {"context_ess": [1.0, 1.003, 1.1, 50.0]}
    report = sampler.diagnose(1000, witness_evaluations=20_000)
    assert report.verdict == "cannot tell", str(report)
    assert any("the bank was worth 1.0 effective points" in text for text in report.findings)


def test_effort_multiplies_the_cost_that_is_stated_before(caplog):
    sampler = exact_sampler(mixture(0))
    with caplog.at_level("INFO", logger="rsm_sampler.verdict.diagnosis"):
        report = sampler.diagnose(1000, witness_evaluations=4000, effort=2.0)
    assert report.witness.evaluations == 8000
    assert "8000 evaluations for the witness" in caplog.text
    assert f"up to {report.planned} in all" in caplog.text
    assert report.evaluations <= report.planned


@pytest.mark.bad_input
@pytest.mark.parametrize("effort", [0.0, -1.0, math.inf, math.nan])
def test_effort_is_positive(effort):
    with pytest.raises(
        ValueError, match=r"effort must be (positive and finite|a finite number), got"
    ):
        exact_sampler(mixture(0)).diagnose(effort=effort)


# A nested sampler of another library


@pytest.mark.numbers
def test_a_referee_takes_part():
    pytest.importorskip("nautilus")
    target = mixture(0)
    report = exact_sampler(target).diagnose(4096, witness_evaluations=20_000, referee="nautilus")
    assert report.trustworthy, str(report)
    referee = report.referee
    assert referee is not None and referee.conclusive
    assert abs(referee.log_z) <= 5 * referee.log_z_se + 0.05
    assert "referee       nautilus" in str(report)
    report = exact_sampler(target, broken(target, "a mode removed")).diagnose(
        4096, witness_evaluations=20_000, referee="nautilus"
    )
    assert any("log Z differs from nautilus" in text for text in report.findings)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dynesty", None)
    with pytest.raises(ImportError, match=r"needs dynesty: pip install 'rsm-sampler\[referee\]'"):
        exact_sampler(mixture(0)).diagnose(500, witness_evaluations=1000, referee="dynesty")


@pytest.mark.bad_input
def test_an_unknown_referee_is_refused():
    with pytest.raises(ValueError, match=r"referee must be one of .*nautilus.*, got 'umpire'"):
        exact_sampler(mixture(0)).diagnose(500, witness_evaluations=1000, referee="umpire")


# What it counts, prints and needs


def test_evaluations_are_counted_apart_from_training():
    sampler = exact_sampler(mixture(0))
    sampler.energy(torch.zeros(7, 2), purpose="training")
    report = sampler.diagnose(1000, witness_evaluations=12_000)
    assert sampler.energy.counts == {"training": 7}
    assert report.witness.evaluations == 12_000
    assert report.evaluations > 13_000


def test_the_same_seed_gives_the_same_report():
    sampler = exact_sampler(mixture(0))
    first, again, other = (
        sampler.diagnose(500, witness_evaluations=1000, seed=seed) for seed in (1, 1, 2)
    )
    assert str(first) == str(again) != str(other)


def test_the_report_prints_what_was_searched_and_what_to_try():
    target = mixture(1)
    text = str(exact_sampler(target, broken(target, "a mode removed")).diagnose(2000))
    for part in ("verdict       not trustworthy", "ESS", "Pareto k", "log Z", "energy drift",
                 "witness       importance sampling, 65,536 evaluations", "resolution",
                 "coverage      searched scales 10^-4 to 10^5", "independent starts ended in",
                 "cost          ", "planned at most ", "against it    ",
                 "try           "):  # fmt: skip
        assert part in text, part


def test_a_loaded_sampler_needs_an_energy():
    target = mixture(0)
    sampler = exact_sampler(target)
    sampler.energy = None
    with pytest.raises(ValueError, match="energy must be given for a sampler that was loaded"):
        sampler.diagnose(500)
    report = sampler.diagnose(500, energy=target, witness_evaluations=1000)
    assert report.n == 500


@pytest.mark.bad_input
def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="n must be at least 100, got 99"):
        exact_sampler(mixture(0)).diagnose(99)


# Contexts


def conditional(blind=False):
    mix = ConditionalMixture.line()
    affine = Affine(mix.prior.mean, torch.linalg.cholesky(mix.prior.covariance))

    def draw(n, generator):
        return mix.sample_context(n, generator=generator)

    return sampler_of(ConditionalDenoiser(mix, affine, blind), mix, affine, context_dim=1,
                      draw_context=draw)  # fmt: skip


def test_a_conditional_sampler_is_examined_at_its_worst_context():
    report = conditional().diagnose(2000, witness_evaluations=8000)
    assert report.contexts == 8
    assert report.trustworthy, str(report)
    assert "worst of 8 contexts" in str(report)
    single = conditional().diagnose(2000, context=torch.tensor([1.0]), witness_evaluations=8000)
    assert single.contexts == 0
    assert 5 * single.evaluations < report.evaluations


def test_a_sampler_that_ignores_its_context_is_not_trusted():
    assert not conditional(blind=True).diagnose(2000, witness_evaluations=8000).trustworthy


def test_a_loaded_conditional_sampler_needs_a_context():
    sampler = conditional()
    sampler.draw_context = None
    with pytest.raises(ValueError, match="context must be given for a conditional sampler"):
        sampler.diagnose(500)


# The weight tail


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_shape_finds_the_shape_of_known_tails(k):
    """Generalised Pareto draws. False alarm below 1e-6, detects an error of 0.25.

    The tail above a threshold has the same shape; its m largest draws estimate it with standard
    error (1 + k) / sqrt(m); the prior pulls towards 0.5 with the weight of ten draws.
    """
    n = 1_000_000
    draws = stats.genpareto(k).rvs(n, random_state=0)
    m = math.ceil(3 * math.sqrt(n))
    exact = (m * k + 5) / (m + 10)
    shape = pareto_shape(torch.as_tensor(draws).log())
    assert abs(shape - exact) <= 5 * (1 + k) / math.sqrt(m)


def test_pareto_shape_does_not_depend_on_the_scale_of_weights():
    log_weight = torch.randn(5000, dtype=DOUBLE, generator=rng())
    expected = pareto_shape(log_weight)
    assert pareto_shape(log_weight + 1234.0) == pytest.approx(expected, abs=1e-6)
    assert pareto_shape(log_weight - 1e4) == pytest.approx(expected, abs=1e-6)


def test_pareto_shape_of_special_weights():
    assert pareto_shape(torch.zeros(1000)) == 0.0
    assert pareto_shape(torch.zeros(20)) == math.inf
    single = torch.zeros(1000)
    single[0] = 30.0
    assert pareto_shape(single) >= 0
    bounded = torch.rand(20_000, dtype=DOUBLE, generator=rng()).log()
    assert pareto_shape(bounded) < 0
