"""The trained sampler: draws, densities, weights, files. Mostly with exact denoisers."""

import copy
import math
import pickle
import zipfile

import pytest
import torch
from scipy import stats

from energies import ConditionalMixture, GaussianMixture
from rsm_sampler import (
    CheckpointError,
    EnergyDiffusionTrainer,
    EnergySampler,
    TrainerConfig,
    checkpoint,
)
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.networks import MLP
from rsm_sampler.schedules import EDM
from rsm_sampler.target.coordinates import Affine, Bounds, MeanFree
from rsm_sampler.target.energy import MeteredEnergy
from tests.exact_sampler import ConditionalDenoiser, exact_sampler, sampler_of

DOUBLE = torch.float64
METHODS = ["heun", "ddim", "ancestral", "multistep", "langevin"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def two_modes():
    return GaussianMixture(torch.tensor([[103.0, 3.0], [97.0, -3.0]]), 1.0, weights=[0.7, 0.3])


def untrained(dim=2, context_dim=None, bounds=(-math.inf, math.inf), num_steps=8, **options):
    """A small network with random weights."""
    architecture = {"dim": dim, "context_dim": context_dim, "width": 8, "depth": 2,
                    "frequencies": 4, "bandwidth": 1.0}  # fmt: skip
    denoiser = Denoiser(MLP(**architecture, generator=rng(3)))
    for parameter in denoiser.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng(4))
    scale = torch.eye(dim, dtype=DOUBLE) + 0.3 * torch.ones(dim, dim, dtype=DOUBLE).tril()
    return EnergySampler(
        denoiser.requires_grad_(False),
        Affine(torch.arange(dim, dtype=DOUBLE), scale),
        Bounds(*bounds, dim),
        EDM(0.02, 10.0),
        num_steps,
        architecture,
        5,
        **options,
    )


# Draws


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_samples_have_their_shape_and_follow_the_generator(method, n):
    sampler = untrained()
    x = sampler.sample(n, method=method, generator=rng(1))
    assert (x.shape, x.dtype) == ((n, 2), torch.float64)
    assert torch.equal(x, sampler.sample(n, method=method, generator=rng(1)))
    if n:
        assert not torch.equal(x, sampler.sample(n, method=method, generator=rng(2)))


def test_particles_are_drawn_by_the_chain(monkeypatch):
    """Of four times as many steps; with a method named, as ever."""
    asked = []
    original = EnergySampler.process

    def process(self, method="heun", num_steps=None):
        asked.append((method, num_steps))
        return original(self, method, num_steps)

    monkeypatch.setattr(EnergySampler, "process", process)
    for n, s in ((7, 3), (3, 2)):
        inside = MeanFree(n, s)
        architecture = {"num_particles": n, "space_dim": s, "width": 8, "depth": 1}
        sampler = EnergySampler(
            Denoiser.build(architecture, rng()), Affine.identity(inside.reduced), inside,
            EDM(0.01, 10.0), 6, architecture, 0,
        )  # fmt: skip
        assert sampler.sample(4, generator=rng()).shape == (4, n * s)
        sampler.sample(2, method="heun", generator=rng())
        assert asked == [("multistep", 24), ("heun", None)]
        asked.clear()


def test_without_a_generator_the_samplers_own_advances():
    sampler, twin = untrained(), untrained()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = sampler.sample(5), sampler.sample(5)
    assert not torch.equal(first, second)
    assert torch.equal(first, twin.sample(5))
    assert torch.equal(second, twin.sample(5))
    assert torch.equal(state, torch.get_rng_state())


def test_chunks_change_memory_not_the_law():
    """One chunk at a time draws its own noise; a whole chunk is the same numbers."""
    sampler = untrained()
    whole = sampler.sample(10, generator=rng(), chunk=10)
    assert torch.equal(whole, sampler.sample(10, generator=rng(), chunk=1000))
    pieces = sampler.sample(10, generator=rng(), chunk=4)
    assert pieces.shape == (10, 2)


@pytest.mark.parametrize(
    ("method", "num_steps"), [("heun", 32), ("ddim", 128), ("ancestral", 128), ("multistep", 64)]
)
def test_an_exact_denoiser_gives_the_target(method, num_steps):
    """KS of both coordinates, 0.005 for the steps; false alarm 4e-6, detects weights off 0.03.

    The target sits a hundred widths from the origin: affine coordinates are on trial as well.
    """
    target, n = two_modes(), 20_000
    x = exact_sampler(target).sample(n, method=method, num_steps=num_steps, generator=rng())
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n)) + 0.005
    for i in range(2):
        law = [stats.norm(float(loc[i]), 1.0).cdf for loc in target.loc]
        cdf = lambda v, law=law: 0.7 * law[0](v) + 0.3 * law[1](v)  # noqa: E731
        assert stats.kstest(x[:, i].numpy(), cdf).statistic <= band


# Densities


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, math.inf), (-1.0, 2.0)])
def test_draws_come_with_the_density_of_the_process_that_made_them(bounds):
    """In one dimension: the density integrates to the empirical shares between quantiles.

    The map is monotone, so a cell between two neighbouring draws holds the density's integral:
    noise levels in, draws out, checked against a finite difference of the map itself.
    """
    sampler = untrained(dim=1, bounds=bounds)
    x, log_prob = sampler.sample_with_log_prob(4000, generator=rng())
    flow = sampler.process()
    z_t, noise = (v.double() for v in flow.start(4000, generator=rng()))
    base = stats.norm(0, 1).logpdf(noise[:, 0].numpy()) - math.log(flow.levels[0])
    order = z_t[:, 0].argsort()
    u, v, density = z_t[order, 0], x[order, 0].double(), (log_prob.double())[order]
    # d x / d z_t by central differences over neighbours two apart, in the bulk.
    slope = (v[2:] - v[:-2]) / (u[2:] - u[:-2])
    expected = torch.as_tensor(base)[order][1:-1] - slope.abs().log()
    close = (u[2:] - u[:-2] < 0.05) & (u[2:] - u[:-2] > 1e-3)
    assert int(close.sum()) > 500
    error = (density[1:-1] - expected)[close].abs()
    assert float(error.median()) < 0.01
    assert float(error.quantile(0.9)) < 0.05


@pytest.mark.numbers
@pytest.mark.parametrize("bounds", [None, Bounds(-math.inf, [102.0, math.inf], 2)])
def test_log_prob_agrees_with_the_density_of_the_draws(bounds):
    """Within the step-doubling error of the ODE, and that of the sampler's own steps.

    The sampler with 64 steps; errors of second order. The mean over draws, as single points far
    out may do worse.
    """
    target = two_modes()
    sampler = exact_sampler(target, num_steps=64)
    if bounds is not None:
        sampler.coordinates = bounds
        sampler.affine = Affine(torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE))
    x, log_prob = sampler.sample_with_log_prob(300, generator=rng())
    again, error = sampler.log_prob(x, with_error=True)
    assert float(error.median()) < 0.02
    difference = (again - log_prob).abs()
    assert float(difference.median()) <= 3 * float(error.median()) + 0.01
    finer, finer_error = sampler.log_prob(x, num_steps=256, with_error=True)
    assert finer_error.median() < error.median()
    assert (finer - log_prob).abs().median() < 0.02


def test_log_prob_is_that_of_the_target():
    target = two_modes()
    sampler = exact_sampler(target)
    x = target.sample((500,), generator=rng())
    error = sampler.log_prob(x) - target.log_prob(x.double())
    assert float(error.abs().median()) < 0.02
    assert sampler.log_prob(x[:0]).shape == (0,)


def test_outside_of_the_bounds_there_is_no_density():
    sampler = untrained(bounds=(0.0, [math.inf, 1.0]))
    x = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [1.0, 1.5], [0.0, 0.5]])
    log_prob = sampler.log_prob(x)
    assert log_prob[0].isfinite()
    assert log_prob[1:].eq(-math.inf).all()


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (-math.inf, 1.0), ([0.0, -2.0], [1.0, 3.0])])
def test_draws_lie_within_the_bounds(bounds):
    sampler = untrained(bounds=bounds)
    x = sampler.sample(2000, generator=rng())
    assert (x >= sampler.coordinates.low.float()).all()
    assert (x <= sampler.coordinates.high.float()).all()


# Weights


def test_weights_give_log_z_without_bias():
    """A sampler of another law than the target: log Z within 5 standard errors, 6e-7."""
    target = GaussianMixture(torch.zeros(1, 2), 1.0)
    around = GaussianMixture(torch.tensor([[0.3, 0.0]]), 1.3)
    sampler = exact_sampler(target, around)
    shift = 7.5  # an energy of known log Z
    energy = MeteredEnergy(lambda x: target(x) - shift, 2)
    draws = sampler.weighted_draws(8192, energy=energy, generator=rng())
    assert energy.counts == {"diagnosis": 8192}
    again = sampler.weighted_draws(8192, energy=lambda x: target(x) - shift, generator=rng())
    assert torch.equal(again.log_weight, draws.log_weight)
    weight = (draws.log_weight.double() - shift).exp()
    se = float(weight.std()) / math.sqrt(8192)
    assert abs(float(weight.mean()) - 1) <= 5 * se
    assert se < 0.02
    assert draws.ess == pytest.approx(8192 / (1 + 8192 * se**2), rel=0.02)
    torch.testing.assert_close(draws.log_weight, -draws.energy - draws.log_prob)


def test_many_dimensions_use_path_weights():
    """A 20-D normal target and its denoiser: path weights average to Z = 1, 5 standard errors."""
    target = GaussianMixture(torch.zeros(1, 20), 1.0)
    sampler = exact_sampler(target)
    draws = sampler.weighted_draws(2000, generator=rng())
    assert draws.log_prob is None
    weight = draws.log_weight.double().exp()
    assert abs(float(weight.mean()) - 1) <= 5 * float(weight.std()) / math.sqrt(2000)
    assert draws.ess > 500
    torch.testing.assert_close(draws.energy, target(draws.x))


def test_few_dimensions_may_use_path_weights_in_pieces(monkeypatch):
    """Another law than the target: weights average to Z = 1 within 5 standard errors, 6e-7."""
    monkeypatch.setattr("rsm_sampler.energy_sampler._CHUNK", 1000)
    target = GaussianMixture(torch.zeros(1, 2), 1.0)
    sampler = exact_sampler(target, GaussianMixture(torch.tensor([[0.3, 0.0]]), 1.2))
    draws = sampler.weighted_draws(8500, paths=True, num_steps=100, generator=rng())
    assert draws.log_prob is None and draws.x.shape == (8500, 2)
    weight = draws.log_weight.double().exp()
    se = float(weight.std()) / math.sqrt(8500)
    assert abs(float(weight.mean()) - 1) <= 5 * se < 0.1
    torch.testing.assert_close(draws.energy, target(draws.x))


def test_resampled_draws_have_the_targets_law():
    """A mean moved by 0.5 comes back; resampling by weight, KS with the band of the ESS."""
    target = GaussianMixture(torch.zeros(1, 1), 1.0)
    sampler = exact_sampler(target, GaussianMixture(torch.tensor([[0.5]]), 1.2))
    draws = sampler.weighted_draws(20_000, generator=rng())
    x = draws.resample(5000, generator=rng(1))
    assert x.shape == (5000, 1)
    band = math.sqrt(math.log(2 / 1e-6) / 2 * (1 / draws.ess + 1 / 5000))
    assert stats.kstest(x[:, 0].numpy(), stats.norm.cdf).statistic <= 2 * band
    assert stats.kstest(draws.x[:, 0].numpy(), stats.norm.cdf).statistic > 2 * band


@pytest.mark.parametrize("paths", [False, True])
def test_draws_and_their_energies_are_in_double_precision(paths):
    """At 2.5e6 with a width of 1e-3, where single precision has steps of 0.25."""
    architecture = {"dim": 1, "width": 8, "depth": 1}
    law = Affine(torch.tensor([2.457e6], dtype=DOUBLE), torch.tensor([[1e-3]], dtype=DOUBLE))
    energy = lambda x: ((x[:, 0] - 2.457e6) / 1e-3).square() / 2  # noqa: E731
    sampler = EnergySampler(
        Denoiser.build(architecture, rng()).requires_grad_(False), law,
        Bounds(-math.inf, math.inf, 1), EDM(0.01, 20.0), 16, architecture, 0,
        MeteredEnergy(energy, 1),
    )  # fmt: skip
    draws = sampler.weighted_draws(4000, paths=paths, num_steps=64, generator=rng())
    assert draws.x.dtype is draws.log_weight.dtype is draws.energy.dtype is DOUBLE
    assert torch.equal(draws.energy, energy(draws.x))
    if not paths:  # the untrained network is exact but for the steps
        assert torch.equal(draws.log_weight, -draws.energy - draws.log_prob)
        exact = -draws.energy - math.log(1e-3 * math.sqrt(2 * math.pi))
        torch.testing.assert_close(sampler.log_prob(draws.x), exact, rtol=0, atol=0.05)
    assert draws.ess > 3000
    x = sampler.sample(4000, generator=rng())[:, 0]
    band = math.sqrt(math.log(2 / 1e-6) / (2 * 4000)) + 0.005
    assert stats.kstest((x.numpy() - 2.457e6) / 1e-3, stats.norm.cdf).statistic <= band


def test_points_stay_inside_in_the_precision_of_the_energy():
    """Where double precision is inside and single precision would be on the bound."""
    seen = []

    def energy(x):
        seen.append(x.clone())
        return x.sum(-1)

    for dtype in (torch.float32, DOUBLE):
        sampler = untrained(bounds=(1.0, 1.0 + 1e-5))
        sampler.energy = MeteredEnergy(energy, 2, dtype=dtype)
        draws = sampler.weighted_draws(500, generator=rng())
        sampler.refine(draws.x[:50], steps=2, generator=rng())
        low, high = torch.tensor([1.0, 1.0 + 1e-5], dtype=DOUBLE).to(dtype)
        assert all(x.dtype is dtype and bool(((x > low) & (x < high)).all()) for x in seen)
        seen.clear()


def test_refinement_counts_on_the_samplers_meter():
    target = GaussianMixture.paper()
    for method in ("rw", "mala"):
        sampler = exact_sampler(target)
        result = sampler.refine(
            sampler.sample(20, generator=rng()), steps=3, method=method, generator=rng()
        )
        assert sampler.energy.counts == {"refinement": result.evaluations}
        assert result.x.dtype is result.energy.dtype is DOUBLE


# Contexts


def conditional():
    mix = ConditionalMixture.line()
    affine = Affine(mix.prior.mean, torch.linalg.cholesky(mix.prior.covariance))
    return mix, sampler_of(ConditionalDenoiser(mix, affine), mix, affine, context_dim=1)


def test_one_context_serves_all_draws_or_each_has_its_own():
    mix, sampler = conditional()
    one = sampler.sample(50, context=torch.tensor([2.0]), generator=rng())
    each = sampler.sample(50, context=torch.full((50, 1), 2.0), generator=rng())
    plain = sampler.sample(50, context=[2.0], generator=rng())
    assert torch.equal(one, each)
    assert torch.equal(one, plain)
    small = sampler.sample(50, context=torch.full((50, 1), 2.0), generator=rng(), chunk=50)
    assert torch.equal(one, small)
    x = torch.linspace(-4, 4, 9)[:, None]
    error = sampler.log_prob(x, context=torch.tensor([2.0])) - mix.log_prob(
        x, torch.ones(9, 1) * 2
    )
    # The start at sigma 20 forgets the posterior's own mean m (in widths): m z / 20, |z| up to 2.
    assert float(error.abs().median()) < 0.2
    draws = sampler.weighted_draws(500, context=torch.tensor([2.0]), generator=rng())
    exact = float(mix.log_z(torch.tensor([2.0])))
    assert float(torch.logsumexp(draws.log_weight, 0)) - math.log(500) == pytest.approx(
        exact, abs=0.02
    )


def test_contexts_stay_with_their_draws_across_chunks():
    """Rows with context 0 and rows with context 6 go to different modes."""
    _, sampler = conditional()
    context = torch.tensor([[-6.0], [6.0]]).repeat(50, 1)
    x = sampler.sample(100, context=context, generator=rng(), chunk=33)
    assert (x[0::2] < 0).float().mean() > 0.9
    assert (x[1::2] > 0).float().mean() > 0.9


@pytest.mark.parametrize("method", ["rw", "mala"])
def test_refined_draws_keep_their_contexts_beside_a_draw_of_infinite_energy(method):
    """Tuning leaves that draw out, and its context with it."""
    sampler, seen = conditional()[1], []

    def energy(x, context):
        seen.append(context.clone())
        return torch.where(x[:, 0] > 90, torch.inf, (x[:, 0] - context[:, 0]).square() / 2)

    sampler.energy = MeteredEnergy(energy, 1, context_dim=1)
    context = 10 * torch.arange(8.0)[:, None].double()
    x = context + 0.1
    x[3] = 100.0
    result = sampler.refine(x, context=context, steps=20, method=method, generator=rng())
    assert result.num_infinite == 1 and result.x.shape == (8, 1)
    finite = torch.arange(8) != 3
    assert ((result.x - context)[finite].abs() < 5).all()
    assert all(torch.equal(own, context if len(own) == 8 else context[finite]) for own in seen)
    assert {len(own) for own in seen} == {7, 8}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context must be of length 1, got None"),
        (torch.zeros(2), r"context must have shape \(1,\) or \(5, 1\), got \(2,\)"),
        (torch.zeros(4, 1), r"context must have shape \(1,\) or \(5, 1\), got \(4, 1\)"),
        (torch.tensor(0.0), r"context must have shape \(1,\) or \(n, 1\), got \(\)"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(context, message):
    with pytest.raises(ValueError, match=message):
        conditional()[1].sample(5, context=context)


@pytest.mark.bad_input
def test_bad_arguments_are_refused():
    sampler = untrained()
    with pytest.raises(ValueError, match="context must be None, got"):
        sampler.sample(5, context=torch.zeros(1))
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        sampler.sample(-1)
    with pytest.raises(ValueError, match="chunk must be at least 1, got -1"):
        sampler.sample(4, chunk=-1)
    for paths in (False, True):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            sampler.weighted_draws(0, paths=paths)
    with pytest.raises(ValueError, match=r"method must be one of \('heun', 'ddim', 'ancestral', "
                       r"'multistep', 'langevin'\), got 'euler'"):  # fmt: skip
        sampler.sample(5, method="euler")
    with pytest.raises(ValueError, match=r"x must have shape \(n, 2\), got \(3,\)"):
        sampler.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match=r"x must have shape \(n, 2\), got \(3, 1\)"):
        sampler.log_prob(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="energy must be given for a sampler that was loaded"):
        sampler.weighted_draws(5)


# Files


@pytest.mark.parametrize("context_dim", [None, 3])
def test_a_saved_sampler_comes_back_bit_for_bit(tmp_path, context_dim):
    sampler = untrained(context_dim=context_dim, bounds=([0.0, -math.inf], [math.inf, 2.0]),
                        search={"log_z": 1.5, "log_z_se": math.nan, "ess": 3.0, "method": "bank"},
                        history=[{"step": 10.0, "ess": 0.5}], counts={"search": 7})  # fmt: skip
    sampler.save(tmp_path / "sampler.pt")
    again = EnergySampler.load(tmp_path / "sampler.pt")
    context = None if context_dim is None else torch.ones(context_dim)
    for method in METHODS:
        x, y = (s.sample(9, context=context, method=method) for s in (sampler, again))
        assert torch.equal(x, y)
    x = torch.tensor([[1.0, 1.0]])
    assert torch.equal(again.log_prob(x, context=context), sampler.log_prob(x, context=context))
    assert again.history == sampler.history
    assert again.counts == sampler.counts
    assert again.search["method"] == "bank"
    assert again.energy is None
    assert again.seed == sampler.seed


def test_files_keep_the_radius_and_older_ones_have_none(tmp_path):
    sampler = untrained()
    sampler.denoiser.radius = 0.75
    sampler.save(tmp_path / "sampler.pt")
    assert EnergySampler.load(tmp_path / "sampler.pt").denoiser.radius == 0.75
    state = sampler.state()
    del state["radius"]
    checkpoint.save(tmp_path / "older.pt", state, kind="sampler", version=3)
    assert EnergySampler.load(tmp_path / "older.pt").denoiser.radius == math.inf
    checkpoint.save(tmp_path / "too_old.pt", state, kind="sampler", version=2)
    with pytest.raises(CheckpointError, match=r"version 2.* from version 3 on"):
        EnergySampler.load(tmp_path / "too_old.pt")


def test_a_loaded_sampler_takes_an_energy(tmp_path):
    untrained().save(tmp_path / "sampler.pt")
    again = EnergySampler.load(tmp_path / "sampler.pt", energy=lambda x: x.square().sum(-1))
    assert again.weighted_draws(10).log_weight.shape == (10,)
    assert again.energy.counts == {"diagnosis": 10}


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (type(self.mark).touch, (self.mark,))


def test_loading_executes_nothing(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "trap.pt"
    torch.save({"magic": "rsm_sampler checkpoint", "payload": Trap(mark)}, path)
    with pytest.raises(CheckpointError, match=r"trap\.pt"):
        EnergySampler.load(path)
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(CheckpointError, match=r"trap\.pt"):
        EnergySampler.load(path)
    assert not mark.exists()


def test_files_that_are_no_sampler_are_named(tmp_path):
    good = tmp_path / "good.pt"
    untrained().save(good)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*missing\.pt"):
        EnergySampler.load(tmp_path / "missing.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(good.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        EnergySampler.load(cut)
    spoilt, data = tmp_path / "spoilt.pt", bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + 200] ^= 0xFF
    spoilt.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"spoilt\.pt cannot be read"):
        EnergySampler.load(spoilt)
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match="was not written by rsm_sampler"):
        EnergySampler.load(foreign)


def test_a_trainers_file_is_no_sampler(tmp_path):
    config = TrainerConfig(search_evaluations=500, bank_size=500, steps_per_cycle=1, max_cycles=1,
                           width=8, check_draws=16)  # fmt: skip
    trainer = EnergyDiffusionTrainer(lambda x: x.square().sum(-1), 1, config=config)
    trainer.fit(progress=False, checkpoint_path=tmp_path / "trainer.pt")
    with pytest.raises(CheckpointError, match="kind 'trainer', expected 'sampler'"):
        EnergySampler.load(tmp_path / "trainer.pt")


def test_later_training_leaves_a_sampler_alone():
    config = TrainerConfig(search_evaluations=1000, bank_size=1000, steps_per_cycle=20,
                           max_cycles=1, width=8, batch_size=64, check_draws=64,
                           target_ess=1.0)  # fmt: skip
    trainer = EnergyDiffusionTrainer(lambda x: x.square().sum(-1), 2, config=config)
    sampler = trainer.fit(progress=False)
    before, history = sampler.sample(20, generator=rng()), copy.deepcopy(sampler.history)
    later = trainer.fit(max_cycles=2, progress=False)
    assert torch.equal(before, sampler.sample(20, generator=rng()))
    assert sampler.history == history
    assert len(later.history) == 2
    assert not torch.equal(before, later.sample(20, generator=rng()))
