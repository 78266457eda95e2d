"""The trainer: end to end in small, to the bit where that is promised, and its error messages."""

import dataclasses
import math
import traceback

import pytest
import torch
from scipy import stats

import energies
from energies import ConditionalMixture, GaussianMixture
from rsm_sampler import (
    CheckpointError,
    DivergedError,
    EnergyDiffusionTrainer,
    EnergyError,
    EnergySampler,
    MemoryLogger,
    TrainerConfig,
    checkpoint,
)
from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.supply import Supply
from rsm_sampler.proposals import GaussianProposal

TINY = {"search_evaluations": 3000, "bank_size": 2000, "steps_per_cycle": 120, "max_cycles": 2,
        "batch_size": 64, "check_draws": 128, "num_steps": 8, "width": 16, "depth": 2,
        "frequencies": 4, "target_ess": 1.0}  # fmt: skip


def tiny(**options):
    return TrainerConfig(**(TINY | options))


def two_modes():
    return GaussianMixture(torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), 1.0, weights=[0.8, 0.2])


def normal(x):
    return x.square().sum(-1) / 2


def fit(trainer, **options):
    return trainer.fit(progress=False, **options)


def weights(sampler):
    return torch.cat([value.double().reshape(-1) for value in sampler.state()["network"].values()])


def same(first, second):
    """Weights, draws, coordinates, counts and history are equal, but for the time it took."""
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(first.affine.scale_tril, second.affine.scale_tril)
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    x, y = (s.sample(20, generator=g) for s, g in zip((first, second), generators, strict=True))
    assert torch.equal(x, y)
    plain = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in s.history]
        for s in (first, second)
    ]
    assert str(plain[0]) == str(plain[1])  # NaN included
    assert first.counts == second.counts


@pytest.mark.parametrize(("dim", "settles"), [(16, False), (17, True)])
def test_training_beyond_sixteen_dimensions_ends_when_a_cycle_brings_little(dim, settles):
    """There no check says that all is learned: growth by a quarter has to pay for a cycle."""
    trainer = EnergyDiffusionTrainer(normal, dim, config=tiny())
    for ess, ends in (([0.2], False), ([0.2, 0.26], False), ([0.2, 0.26, 0.3], settles)):
        trainer.history = [{"ess": share} for share in ess]
        assert trainer.converged == ends


def test_cycles_beyond_sixteen_dimensions_are_short():
    """But not of particles, and not of loss (14), whose every step sees points of its own."""

    def length(dim, **options):
        trainer = EnergyDiffusionTrainer(normal, dim, config=tiny(max_epochs=10**6), **options)
        trainer.supply.adopt(Bank.of_samples(torch.randn(64, trainer.coordinates.reduced)))
        found = []
        for trainer.cycle in range(2):
            found.append(trainer._length())
        return found

    assert length(16) == [120, 180]
    assert length(17) == [60, 90]
    assert length(24, particles=(8, 3)) == [120, 180]
    law = GaussianProposal(torch.zeros(17), 2.0)
    assert length(17, loss="reverse-sampling", proposal=law) == [120, 180]


# End to end


def test_a_short_training_finds_the_mixture():
    """One cycle of 1,000 steps at width 32: weights within 0.05, means within 0.15, log Z 0.02."""
    target = two_modes()
    config = tiny(search_evaluations=20_000, bank_size=40_000, steps_per_cycle=1000, max_cycles=1,
                  batch_size=512, check_draws=1024, num_steps=24, width=32,
                  frequencies=16)  # fmt: skip
    trainer = EnergyDiffusionTrainer(target, 2, config=config)
    sampler = fit(trainer)
    x = sampler.sample(20_000)
    share = target.responsibilities(x.double())
    assert share.mean(0).tolist() == pytest.approx([0.8, 0.2], abs=0.05)
    means = (share.unsqueeze(-1) * x.unsqueeze(1)).sum(0) / share.sum(0).unsqueeze(-1)
    torch.testing.assert_close(means, target.loc, atol=0.15, rtol=0)
    (record,) = sampler.history
    assert record["step"] == 1000
    assert record["ess"] > 0.7
    assert abs(record["log_z"]) < 0.02
    assert record["evaluations"] == trainer.evaluations
    assert sampler.counts["check"] == 1024
    assert sampler.counts["search"] <= 60_000
    assert sampler.search["method"] == "bank"
    assert abs(sampler.search["log_z"]) <= 5 * sampler.search["log_z_se"]


def test_the_same_seed_gives_the_same_bits(whole):
    again = fit(EnergyDiffusionTrainer(two_modes(), 2, config=tiny()))
    same(whole, again)
    other = fit(EnergyDiffusionTrainer(two_modes(), 2, seed=1, config=tiny()))
    assert not torch.equal(weights(whole), weights(other))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit(EnergyDiffusionTrainer(normal, 2, config=tiny()))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    same(first, fit(EnergyDiffusionTrainer(normal, 2, config=tiny())))


def test_the_energy_is_never_differentiated():
    """Where gradients are not wanted, values without a graph train to the same bits."""

    class ValuesOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return normal(x)

        @staticmethod
        def backward(ctx, *gradient):
            raise AssertionError("a gradient was asked for")

    def energy(x):
        assert not x.requires_grad
        return ValuesOnly.apply(x)

    def run(function):
        return fit(
            EnergyDiffusionTrainer(function, 2, gradients="none", config=tiny(max_cycles=1))
        )

    plain = run(normal)
    same(plain, run(energy))
    same(plain, run(lambda x: normal(x).detach()))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}])
def test_energies_see_one_precision_and_draws_are_double(options):
    seen = set()

    def energy(x):
        seen.add(x.dtype)
        return normal(x).float()

    sampler = fit(EnergyDiffusionTrainer(energy, 2, config=tiny(max_cycles=1), **options))
    sampler.weighted_draws(10), sampler.refine(sampler.sample(10), steps=2)
    assert seen == {options.get("dtype", torch.float64)}
    assert sampler.sample(3).dtype == torch.float64
    assert sampler.log_prob(torch.zeros(3, 2)).dtype == torch.float64


def test_an_energy_may_treat_its_arguments_and_torch_as_it_likes():
    """In place, keeping and spoiling old points, with settings of its own and a graph."""
    kept, one = [], torch.ones((), dtype=torch.float64, requires_grad=True)

    def energy(x):
        torch.set_default_dtype(torch.float64)
        for old in kept:
            old.fill_(torch.nan)
        kept[:] = [x]
        x *= 2
        x /= 2
        value = one * normal(x)
        torch.set_grad_enabled(False)
        return value

    plain = fit(EnergyDiffusionTrainer(normal, 2, config=tiny(max_cycles=1)))
    strange = fit(EnergyDiffusionTrainer(energy, 2, config=tiny(max_cycles=1)))
    assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32
    same(plain, strange)


@pytest.fixture
def double_default():
    """Switches torch's default precision, and back at the end."""
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["plain", "contexts", "particles", "harmonics", "loss (14)"])
def test_the_default_precision_of_torch_does_not_matter(kind, double_default):
    """People set it to double at the top of their script; networks stay in single precision."""

    def run():
        energy, dim, options, config = normal, 2, {}, tiny(max_cycles=1, steps_per_cycle=20)
        context = None
        if kind == "contexts":
            context = torch.zeros(2, dtype=torch.float32)
            energy = lambda x, c: normal(x - c)  # noqa: E731
            draw = lambda n, g: torch.randn(n, 2, generator=g, dtype=torch.float32)  # noqa: E731
            options = {"context_dim": 2, "context": draw}
        elif kind == "particles":
            energy = lambda x: normal(x.view(-1, 3, 2).diff(dim=1).flatten(1))  # noqa: E731
            dim, options = 6, {"particles": (3, 2)}
        elif kind == "harmonics":
            dim, config = 14, dataclasses.replace(config, harmonics=4, chain_evaluations=5000)
        elif kind == "loss (14)":
            centre = torch.zeros(2, dtype=torch.float32)
            options = {"loss": "reverse-sampling", "proposal": GaussianProposal(centre, 2.0)}
            config = dataclasses.replace(config, num_draws=4)
        sampler = fit(EnergyDiffusionTrainer(energy, dim, config=config, **options))
        x = sampler.sample(20, context=context)
        report = sampler.diagnose(100, context=context, witness_evaluations=2000)
        return (
            torch.cat([p.flatten() for p in sampler.denoiser.parameters()]),
            x,
            *(sampler.sample(5, method=m, context=context) for m in ("ddim", "langevin")),
            *(
                sampler.weighted_draws(20, context=context, paths=p).log_weight
                for p in (False, True)
            ),
            sampler.log_prob(x, context=context),
            sampler.refine(x, steps=2, context=context).x,
            torch.tensor([report.log_z, report.witness.log_z], dtype=torch.float64),
        )

    single = run()
    double_default()
    assert single[0].dtype is torch.float32
    for one, other in zip(single, run(), strict=True):
        assert one.dtype is other.dtype and torch.equal(one, other)


def test_a_float64_design_matrix_works():
    matrix = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    energy = lambda x: (x @ matrix.T - 1).square().sum(-1) / 2  # noqa: E731
    draws = fit(EnergyDiffusionTrainer(energy, 2, config=tiny(max_cycles=1))).weighted_draws(1000)
    log_z = math.log(2 * math.pi) - float(torch.logdet(matrix.T @ matrix)) / 2
    estimate = float(torch.logsumexp(draws.log_weight, 0)) - math.log(1000)
    assert abs(estimate - log_z) <= 5 * math.sqrt(1 / draws.ess - 1 / 1000)


def test_far_places_and_huge_energies_keep_their_digits():
    """A time in Julian days to a minute, with 1e8 on its energy: log Z within 5 errors, 6e-7.

    Single precision has steps of a quarter of a day there, and of 8 in the energy.
    """
    place, width = 2_457_000.7312, 7e-4
    trainer = EnergyDiffusionTrainer(
        lambda x: 1e8 + normal((x - place) / width),
        1,
        bounds=(2_457_000.0, 2_457_002.0),
        config=tiny(max_cycles=1),
    )
    draws = fit(trainer).weighted_draws(2000)
    assert draws.ess > 200
    log_z = math.log(width * math.sqrt(2 * math.pi))
    estimate = float(torch.logsumexp(draws.log_weight + 1e8, 0)) - math.log(2000)
    assert abs(estimate - log_z) <= 5 * math.sqrt(1 / draws.ess - 1 / 2000)
    standard = (draws.resample(2000) - place) / width
    assert abs(float(standard.mean())) <= 5 / math.sqrt(draws.ess)


@pytest.mark.parametrize("budget", [500, 1000, 5000, 20_000])
@pytest.mark.parametrize("dim", [1, 2, 14])
def test_budgets_hold(budget, dim):
    trainer = EnergyDiffusionTrainer(normal, dim, budget=budget, config=tiny(steps_per_cycle=20))
    sampler = fit(trainer)
    assert trainer.evaluations == sum(sampler.counts.values()) <= budget
    assert sampler.counts.keys() - {"gradients"} == {"search", "check"}
    assert dim == 14 or "gradients" not in sampler.counts
    assert len(sampler.history) == 2


def test_training_steps_evaluate_nothing_and_checks_their_draws():
    seen = []
    config = tiny(max_cycles=2)
    trainer = EnergyDiffusionTrainer(normal, 2, config=config)
    sampler = fit(trainer, callback=lambda progress: seen.append(progress.evaluations))
    searched = sampler.counts["search"]
    assert seen[:2] == [searched] * 2  # steps 100 and 120
    assert seen[2:] == [searched + 128] * 2  # 200 and 300
    assert trainer.evaluations == searched + 2 * 128


def test_convergence_ends_the_training():
    trainer = EnergyDiffusionTrainer(normal, 1, config=tiny(target_ess=0.2, max_cycles=9))
    sampler = fit(trainer)
    assert trainer.converged
    assert len(sampler.history) == 1
    same(sampler, fit(trainer))  # nothing more to do


# Interruptions


@pytest.fixture(scope="module")
def whole():
    """A run that was never interrupted."""
    return fit(EnergyDiffusionTrainer(two_modes(), 2, config=tiny()))


class Interrupt:
    """A callback that raises at a step, once."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def __call__(self, progress):
        if progress.step == self.step:
            raise self.error


@pytest.mark.parametrize("step", [100, 200])
@pytest.mark.parametrize("how", ["Ctrl-C", "exception", "stop"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, whole, how, step):
    """Step 100 lies in the middle of the first cycle, step 200 of the second."""
    path = tmp_path / "run.pt"
    first = EnergyDiffusionTrainer(two_modes(), 2, config=tiny())
    if how == "Ctrl-C":
        partial = fit(first, checkpoint_path=path, callback=Interrupt(step, KeyboardInterrupt()))
        assert partial.sample(5).isfinite().all()
    elif how == "stop":
        fit(first, checkpoint_path=path, callback=lambda progress: progress.step == step)
    else:
        with pytest.raises(ZeroDivisionError, match="mine"):
            fit(first, checkpoint_path=path, callback=Interrupt(step, ZeroDivisionError("mine")))
    assert first.step == step
    second = EnergyDiffusionTrainer(two_modes(), 2, config=tiny())
    steps = []
    resumed = fit(second, checkpoint_path=path, callback=lambda p: steps.append(p.step))
    assert second.seconds > first.seconds > 0  # the time before counts
    assert steps[0] == min(s for s in (100, 120, 200, 300) if s > step)
    same(whole, resumed)
    # The trainer that was interrupted can itself go on, too.
    same(whole, fit(first))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_renewal_that_was_interrupted_is_made_again(tmp_path, monkeypatch, error):
    """With the check before it, whose record would otherwise stand twice and end the training."""
    config = tiny(steps_per_cycle=40, round_draws=512)
    monkeypatch.setattr("rsm_sampler.bank.supply._LEAST_EFFECTIVE", 20)
    whole = fit(EnergyDiffusionTrainer(normal, 17, config=config))
    assert len(whole.history) == 2

    def failing(self, *arguments):
        torch.rand(3, generator=self.generator)
        self.energy(torch.zeros(5, 17), purpose="rounds")
        raise error("once")

    trainer = EnergyDiffusionTrainer(normal, 17, config=config)
    path = tmp_path / "run.pt"
    with monkeypatch.context() as context:
        context.setattr(Supply, "renew", failing)
        if error is KeyboardInterrupt:
            fit(trainer, checkpoint_path=path)
        else:
            with pytest.raises(OSError, match="once"):
                fit(trainer, checkpoint_path=path)
    assert not trainer.history and trainer.cycle == 0
    same(whole, fit(EnergyDiffusionTrainer(normal, 17, config=config), checkpoint_path=path))
    same(whole, fit(trainer))


def test_more_cycles_are_made_where_they_are_asked_for():
    """Beyond sixteen dimensions training ends by itself when a cycle brings little."""
    trainer = EnergyDiffusionTrainer(normal, 17, config=tiny(max_cycles=9, steps_per_cycle=40))
    fit(trainer)
    ended = trainer.cycle
    assert trainer.converged and ended < 9
    fit(trainer)
    assert trainer.cycle == ended
    fit(trainer, max_cycles=ended + 2)
    assert trainer.cycle == ended + 2


@pytest.mark.parametrize("given", [{}, {"scale": 0.5}, {"scale": 50.0}])
def test_a_centre_is_in_the_users_units(given):
    """Within bounds, on all sides of it: the coordinates of the search saturate at 50."""
    centre = torch.tensor([50.0, 10.0, 90.0])

    def narrow(x):
        return ((x - centre) / 0.5).square().sum(-1) / 2

    trainer = EnergyDiffusionTrainer(
        narrow, 3, bounds=(0.0, 100.0), centre=centre, budget=20_000, config=tiny(), **given
    )
    there, _ = trainer.coordinates.forward(trainer.centre)
    torch.testing.assert_close(there, centre.double())
    trainer._search(lambda text: None)
    truth = 3 * math.log(0.5 * math.sqrt(2 * math.pi))
    assert trainer.bank.method == "bank"
    assert abs(trainer.bank.log_z - truth) <= 5 * trainer.bank.log_z_se < 0.5


def test_a_killed_run_goes_on_from_within_a_cycle(tmp_path, monkeypatch, whole):
    """What the file holds at step 200 is all that is left of the first run."""
    monkeypatch.setattr("rsm_sampler.trainer._SAVE_EVERY", 0.0)
    path, left = tmp_path / "run.pt", tmp_path / "left.pt"

    def killed(progress):
        if progress.step == 200:
            left.write_bytes(path.read_bytes())
        return progress.step == 200

    fit(
        EnergyDiffusionTrainer(two_modes(), 2, config=tiny()),
        checkpoint_path=path,
        callback=killed,
    )
    second = EnergyDiffusionTrainer(two_modes(), 2, config=tiny())
    steps = []
    resumed = fit(second, checkpoint_path=left, callback=lambda p: steps.append(p.step))
    assert steps[0] == 300
    same(whole, resumed)


def test_a_finished_run_resumes_to_itself(tmp_path):
    path = tmp_path / "run.pt"
    whole = fit(EnergyDiffusionTrainer(normal, 2, config=tiny()), checkpoint_path=path)
    trainer = EnergyDiffusionTrainer(normal, 2, config=tiny())
    same(whole, fit(trainer, checkpoint_path=path))
    longer = fit(EnergyDiffusionTrainer(normal, 2, config=tiny()), max_cycles=3)
    again = EnergyDiffusionTrainer(normal, 2, config=tiny())
    same(longer, fit(again, checkpoint_path=path, max_cycles=3))


def test_ctrl_c_during_the_search_is_not_swallowed(tmp_path):
    def energy(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(EnergyDiffusionTrainer(energy, 2, config=tiny()), checkpoint_path=tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()


class Fragile:
    """An energy that raises once at its n-th call."""

    def __init__(self, call):
        self.left = call

    def __call__(self, x):
        self.left -= 1
        if self.left == 0:
            raise OSError("the simulator is down")
        return normal(x)


def calls_of(make):
    """How many calls a whole run makes."""
    counter = Fragile(0)
    fit(make(counter))
    return -counter.left


def by_reverse_sampling(energy, target="value", **options):
    """A trainer whose steps evaluate the energy."""
    config = tiny(steps_per_cycle=30, num_draws=8, **options)
    proposal = GaussianProposal(torch.zeros(2), 1.0)
    return EnergyDiffusionTrainer(
        energy, 2, loss="reverse-sampling", proposal=proposal, target=target, config=config
    )


@pytest.mark.parametrize("where", ["a step", "a check"])
def test_an_energy_that_raises_leaves_its_traceback_and_a_checkpoint(tmp_path, where):
    """The user's own exception; the run then goes on to the bits of one that never failed."""
    path = tmp_path / "run.pt"
    whole = fit(by_reverse_sampling(normal))
    steps = 30 + 45
    search = calls_of(by_reverse_sampling) - steps - 2
    call = search + (17 if where == "a step" else 31)
    trainer = by_reverse_sampling(Fragile(call))
    with pytest.raises(OSError, match="the simulator is down") as caught:
        fit(trainer, checkpoint_path=path)
    assert "raise OSError" in traceback.format_exc() or any(
        frame.name == "__call__" and "OSError" in (frame.line or "")
        for frame in traceback.extract_tb(caught.tb)
    )
    assert trainer.step == (16 if where == "a step" else 30)
    resumed = fit(by_reverse_sampling(normal), checkpoint_path=path)
    assert torch.equal(weights(whole), weights(resumed))
    assert len(resumed.history) == 2


def test_an_energy_that_raises_in_the_search_raises_the_users_error():
    with pytest.raises(OSError, match="the simulator is down"):
        fit(EnergyDiffusionTrainer(Fragile(3), 2, config=tiny()))


def test_training_that_diverges_says_so_and_leaves_its_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    trainer = EnergyDiffusionTrainer(normal, 2, config=tiny(learning_rate=1e30))
    with pytest.raises(DivergedError, match="a learning_rate below 1e\\+30 may help"):
        fit(trainer, checkpoint_path=path)
    assert not trainer.history
    kept = checkpoint.load(path, kind="trainer")
    assert kept["step"] == 0 and all(v.isfinite().all() for v in kept["denoiser"].values())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(EnergyDiffusionTrainer(normal, 2, config=tiny()), checkpoint_path=path)
    others = [
        {"seed": 1},
        {"config": tiny(width=8)},
        {"config": tiny(learning_rate=1e-3)},
        {"bounds": (-9.0, 9.0)},
    ]
    for options in others:
        trainer = EnergyDiffusionTrainer(normal, 2, **({"config": tiny()} | options))
        with pytest.raises(CheckpointError, match="checkpoint must be of this trainer, with"):
            fit(trainer, checkpoint_path=path)
    with pytest.raises(CheckpointError, match="expected 'trainer'"):
        sampler = tmp_path / "sampler.pt"
        fit(EnergyDiffusionTrainer(normal, 2, config=tiny(max_cycles=1))).save(sampler)
        fit(EnergyDiffusionTrainer(normal, 2, config=tiny()), checkpoint_path=sampler)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(EnergyDiffusionTrainer(normal, 2, config=tiny()), checkpoint_path=path)


# Going on


def test_a_larger_budget_makes_a_larger_bank():
    config = tiny(bank_size=20_000, search_evaluations=20_000, max_cycles=1)
    trainer = EnergyDiffusionTrainer(normal, 2, budget=4000, config=config)
    fit(trainer)
    small, spent = trainer.bank.points.shape[1], trainer.evaluations
    sampler = fit(trainer, budget=12_000)
    assert spent <= 4000 < trainer.evaluations <= 12_000
    assert trainer.bank.points.shape[1] > 2 * small
    assert len(sampler.history) == 2  # the larger bank is worth another cycle
    assert abs(trainer.bank.log_z - math.log(2 * math.pi)) <= 5 * trainer.bank.log_z_se


def test_a_warm_start_begins_where_the_other_ended():
    shifted = GaussianMixture(torch.tensor([[500.0, 500.0]]), 2.0)
    sampler = fit(EnergyDiffusionTrainer(shifted, 2, config=tiny(max_cycles=1)))
    trainer = EnergyDiffusionTrainer(shifted, 2, warm_start=sampler, seed=3, config=tiny())
    assert torch.equal(weights(sampler), weights(trainer.sampler()))
    torch.testing.assert_close(trainer.centre, sampler.affine.loc)
    assert trainer.scale == pytest.approx(2.0, rel=0.3)
    warm = fit(trainer)
    assert warm.history[-1]["ess"] > 0.5


@pytest.mark.bad_input
def test_a_warm_start_of_another_architecture_is_refused():
    sampler = fit(EnergyDiffusionTrainer(normal, 2, config=tiny(max_cycles=1)))
    with pytest.raises(ValueError, match=r"warm_start must have this trainer's architecture"):
        EnergyDiffusionTrainer(normal, 2, warm_start=sampler, config=tiny(width=8))


@pytest.mark.parametrize(("least", "whole"), [(1500, True), (6400, False)])
def test_chains_with_wrong_shares_give_way_to_the_samplers_draws(monkeypatch, least, whole):
    """A bank of equal shares where they are 0.8 and 0.2: a whole step of (13) finds these.

    Where the weights are to be worth nearly all of the draws, they bear a part of the step. The
    share of 8,192 draws worth a third of them at least is off by 5 standard errors, 0.04, with a
    chance of 6e-7; and the next cycle is learned from the new bank, however often the old one was.
    """
    monkeypatch.setattr("rsm_sampler.bank.supply._LEAST_EFFECTIVE", least)
    target = two_modes()
    config = tiny(max_cycles=2, steps_per_cycle=400, batch_size=256, width=32, num_steps=24,
                  round_draws=4096, max_epochs=20)  # fmt: skip
    trainer = EnergyDiffusionTrainer(target.energy, 2, seed=2, config=config)
    half = GaussianMixture(target.loc, 1.0, weights=[0.5, 0.5])
    points = half.sample(8000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trainer.supply.adopt(Bank.of_samples(points, method="chains"))
    sampler = fit(trainer)
    bank = trainer.bank
    assert bank.method == "paths" and sampler.counts["rounds"] == 8192
    share = float(target.responsibilities(bank.points[0])[:, 0].double().mean())
    assert abs(share - 0.8) < 0.04 if whole else 0.54 < share < 0.76
    assert bank.ess >= least
    assert abs(bank.log_z - target.log_z) < 5 * bank.log_z_se < 0.1
    # 20 epochs of 8,000 points end the first cycle's 400 steps; the second has its own.
    assert trainer.step > 625


def test_a_callback_and_a_logger_see_the_run():
    logger, seen = MemoryLogger(), []
    trainer = EnergyDiffusionTrainer(normal, 2, config=tiny())
    sampler = fit(trainer, logger=logger, callback=seen.append)
    assert [p.step for p in seen] == [100, 120, 200, 300]
    assert [p.cycle for p in seen] == [0] * 2 + [1] * 2
    assert all(math.isfinite(p.loss) and p.seconds > 0 for p in seen)
    assert all(math.isnan(p.ess) for p in seen[:2])
    assert seen[-1].ess == sampler.history[0]["ess"]
    steps, losses = logger.column("loss")
    assert steps == [p.step for p in seen]
    assert losses == [p.loss for p in seen]
    assert logger.column("log_z")[0] == [120, 300]
    assert logger.column("ess")[1] == [record["ess"] for record in sampler.history]


# Other targets, other data


def test_energies_that_cannot_be_sampled_are_refused():
    with pytest.raises(EnergyError, match="cannot be normalised"):
        fit(EnergyDiffusionTrainer(lambda x: -normal(x), 2, config=tiny()))
    with pytest.raises(EnergyError, match=r"NaN or inf at all \d+ points"):
        fit(EnergyDiffusionTrainer(lambda x: x[:, 0] * math.nan, 2, config=tiny()))
    with pytest.raises(EnergyError, match="one value per point"):
        fit(EnergyDiffusionTrainer(lambda x: x, 2, config=tiny()))


@pytest.mark.parametrize(
    ("bounds", "law"),
    [
        ((0.0, math.inf), stats.truncnorm(0, math.inf)),
        ((-math.inf, 0.5), stats.truncnorm(-math.inf, 0.5)),
        ((-0.5, 2.0), stats.truncnorm(-0.5, 2.0)),
    ],
    ids=["lower", "upper", "both"],
)
def test_bounded_coordinates(bounds, law):
    """A truncated normal: log Z exact by weights, KS within the DKW band and a model error.

    False alarm 1e-6; the model error, 0.04 after 500 short steps, is a stated allowance.
    """
    config = tiny(search_evaluations=10_000, bank_size=20_000, steps_per_cycle=500, max_cycles=1,
                  batch_size=256, check_draws=2048, num_steps=24, width=32)  # fmt: skip
    trainer = EnergyDiffusionTrainer(normal, 1, bounds=bounds, config=config)
    sampler = fit(trainer)
    n = 10_000
    x = sampler.sample(n)
    assert (x >= bounds[0]).all()
    assert (x <= bounds[1]).all()
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    assert stats.kstest(x[:, 0].numpy(), law.cdf).statistic <= band + 0.04
    mass = stats.norm.cdf(bounds[1]) - stats.norm.cdf(bounds[0])
    exact = math.log(mass) + 0.5 * math.log(2 * math.pi)
    assert abs(trainer.bank.log_z - exact) <= 5 * trainer.bank.log_z_se
    record = sampler.history[0]
    se = math.sqrt((1 / record["ess"] - 1) / 2048)
    assert abs(record["log_z"] - exact) <= 5 * se + 1e-4
    grid = torch.linspace(*law.ppf([0.001, 0.999]).tolist(), 400)[:, None]
    density = sampler.log_prob(grid).exp()
    mass = float(torch.trapezoid(density, grid[:, 0]))
    assert mass == pytest.approx(0.998, abs=0.03)


@pytest.mark.parametrize("gradients", ["none", "autograd"])
def test_a_density_that_is_infinite_at_its_bounds(gradients):
    """The arcsine law, log Z = log pi: no point may be rounded onto a bound."""

    def arcsine(x):
        return 0.5 * (x.log() + (1 - x).log()).sum(-1)

    trainer = EnergyDiffusionTrainer(
        arcsine, 1, bounds=(0.0, 1.0), budget=40_000, gradients=gradients, config=tiny()
    )
    sampler = fit(trainer)
    # Mass within 2^-25 of the upper bound, which single precision cannot see, is 1e-4 of all.
    assert abs(trainer.bank.log_z - math.log(math.pi)) <= 5 * trainer.bank.log_z_se + 5e-4
    assert ((sampler.sample(1000) > 0) & (sampler.sample(1000) < 1)).all()
    assert math.isfinite(sampler.diagnose(1000).log_z)


def test_contexts_train_one_amortised_sampler():
    """Posterior means of two contexts, within 5 standard errors and 0.4 of model error."""
    mix = ConditionalMixture.line()
    config = tiny(search_evaluations=20_000, bank_size=40_000, bank_contexts=256, max_cycles=1,
                  steps_per_cycle=500, batch_size=256, width=32, check_draws=1024)  # fmt: skip
    trainer = EnergyDiffusionTrainer(
        mix, 1, context_dim=1, context=lambda n, g: mix.sample_context(n, g), config=config
    )
    sampler = fit(trainer)
    assert trainer.bank.context.shape == (256, 1)
    for value in (-3.0, 2.0):
        law = mix.posterior(torch.tensor([value]))
        x = sampler.sample(5000, context=[value])
        error = abs(float(x.mean()) - float(law.mean))
        assert error <= 5 * float(law.covariance.sqrt()) / math.sqrt(5000) + 0.4
    assert sampler.history[0]["ess"] > 0.3
    assert sampler.denoiser.radius == math.inf


def test_a_conditional_run_resumes_to_the_same_bits(tmp_path):
    mix = ConditionalMixture.line()

    def make():
        return EnergyDiffusionTrainer(
            mix, 1, context_dim=1, context=lambda n, g: mix.sample_context(n, g),
            config=tiny(bank_contexts=8),
        )  # fmt: skip

    whole = fit(make())
    path = tmp_path / "run.pt"
    fit(make(), checkpoint_path=path, callback=Interrupt(200, KeyboardInterrupt()))
    resumed = fit(make(), checkpoint_path=path)
    assert torch.equal(weights(whole), weights(resumed))
    assert str([r["ess"] for r in whole.history]) == str([r["ess"] for r in resumed.history])


def test_contexts_of_the_wrong_shape_are_refused():
    def make(context):
        return EnergyDiffusionTrainer(lambda x, c: normal(x - c), 1, context_dim=1,
                                      context=context, config=tiny())  # fmt: skip

    with pytest.raises(ValueError, match=r"context must return shape \(\d+, 1\), got \(\d+,\)"):
        fit(make(lambda n, generator: torch.zeros(n)))
    with pytest.raises(ValueError, match=r"context must return shape \(\d+, 1\), got \(3, 1\)"):
        fit(make(lambda n, generator: torch.zeros(3, 1)))
    with pytest.raises(ValueError, match=r"context must return shape \(\d+, 1\), got .*list"):
        fit(make(lambda n, generator: [0.0] * n))


def test_training_on_samples_searches_nothing():
    """Loss (9) on exact draws: the energy serves the check alone."""
    target = two_modes()
    samples = target.sample((5000,), generator=torch.Generator().manual_seed(0))
    trainer = EnergyDiffusionTrainer(target, 2, samples=samples, config=tiny(max_cycles=1))
    sampler = fit(trainer)
    assert sampler.counts == {"check": 128}
    assert sampler.search["method"] == "samples"
    assert math.isnan(sampler.search["log_z"])
    torch.testing.assert_close(sampler.affine.loc, samples.double().mean(0))
    bounded = EnergyDiffusionTrainer(
        normal, 1, samples=torch.rand(100, 1) + 0.1, bounds=(0.0, 2.0), config=tiny(max_cycles=1)
    )
    x = fit(bounded).sample(100)
    assert (x >= 0).all()
    assert (x <= 2).all()


def test_a_sampler_knows_how_far_out_its_training_saw_points():
    """The farthest of the data; of weighted points without those that are hardly ever drawn."""
    target = two_modes()
    samples = target.sample((500,), generator=torch.Generator().manual_seed(0))
    trainer = EnergyDiffusionTrainer(target, 2, samples=samples, config=tiny(max_cycles=1))
    sampler = fit(trainer)
    farthest = sampler.affine.inverse(samples.double()).norm(dim=-1).max()
    assert sampler.denoiser.radius == pytest.approx(float(farthest), rel=1e-6)
    assert trainer.denoiser.radius == trainer.average.radius == math.inf
    points = torch.tensor([[[3.0], [-1.0], [0.0], [9.0]]], dtype=torch.float64)
    log_weight = torch.tensor([[0.0, 0.0, -2.0, -20.0]], dtype=torch.float64)
    bank = dataclasses.replace(
        Bank.of_samples(points[0]), log_weight=log_weight, loc=torch.zeros(1).double(),
        scale_tril=2 * torch.eye(1).double(),
    )  # fmt: skip
    trainer = EnergyDiffusionTrainer(normal, 1, config=tiny())
    trainer.supply.adopt(bank)
    assert trainer.sampler().denoiser.radius == 1.5


def test_reverse_sampling_counts_k_evaluations_and_one_network_call_per_point(monkeypatch):
    config = tiny(max_cycles=1, steps_per_cycle=10, batch_size=32, num_draws=16)
    proposal = GaussianProposal(torch.zeros(2), 1.0)
    trainer = EnergyDiffusionTrainer(
        normal, 2, loss="reverse-sampling", proposal=proposal, config=config
    )
    points = []
    trainer.denoiser.register_forward_hook(
        lambda module, arguments, output: points.append(output.numel() // 2)
    )
    sampler = fit(trainer)
    assert sampler.counts["training"] == 10 * 32 * 16
    assert points == [32] * 10


@pytest.mark.parametrize("target", ["gradient", "mixed"])
def test_gradients_of_reverse_sampling_count_as_one_more(target):
    """As everywhere else; and a budget sees them."""
    trainer = by_reverse_sampling(normal, batch_size=20, target=target)
    trainer.energy.budget = 12_000
    sampler = fit(trainer)
    assert sampler.counts["training"] == 2 * 20 * 8 * trainer.step
    assert trainer.step < 75 and trainer.evaluations <= 12_000


def test_the_gradient_of_reverse_sampling_is_that_of_the_users_energy():
    """Through the coordinates: with bounds, whose volume counts, in double precision."""
    trainer = EnergyDiffusionTrainer(
        two_modes().energy, 2, bounds=(-8.0, 8.0), loss="reverse-sampling", target="mixed",
        proposal=GaussianProposal(torch.zeros(2), 1.0), config=tiny(),
    )  # fmt: skip
    z = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    x, log_det = trainer.coordinates.forward(trainer.affine.forward(z))
    wanted = two_modes().energy(x) - log_det
    found = trainer._standard_energy(z)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(v.sum(), z, retain_graph=True)[0] for v in (found, wanted)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("budget", [500, 1000, 2500])
def test_small_budgets_do_for_reverse_sampling_and_particles_too(budget):
    proposal = GaussianProposal(torch.zeros(2), 1.0)
    plain = EnergyDiffusionTrainer(
        two_modes(), 2, loss="reverse-sampling", proposal=proposal, budget=budget,
        config=tiny(num_draws=2, batch_size=8),
    )  # fmt: skip
    target = energies.LennardJones(13)
    config = tiny(steps_per_cycle=2, max_cycles=1, batch_size=4, check_draws=16)
    particles = EnergyDiffusionTrainer(target, 39, budget=budget, config=config)
    for trainer in (plain, particles):
        assert fit(trainer).sample(2).isfinite().all()
        assert trainer.evaluations <= budget


def test_reverse_sampling_learns():
    """A shifted normal in 400 steps: half of the effective sample size."""
    config = tiny(max_cycles=1, steps_per_cycle=400, batch_size=256, num_draws=32, num_steps=16)
    proposal = GaussianProposal(torch.zeros(2), 1.2)
    trainer = EnergyDiffusionTrainer(
        two_modes(), 2, loss="reverse-sampling", proposal=proposal, config=config
    )
    assert fit(trainer).history[0]["ess"] > 0.5


def test_reverse_sampling_ends_with_its_budget():
    trainer = by_reverse_sampling(normal, batch_size=20)
    trainer.energy.budget = 8000
    sampler = fit(trainer)
    assert trainer.evaluations <= 8000
    assert sampler.counts["training"] > 3000
    assert sampler.history[-1]["ess"] > 0
    assert trainer.step < 75
    more = fit(trainer, budget=12_000)
    assert 8000 < trainer.evaluations <= 12_000
    assert more.counts["training"] > sampler.counts["training"]


# Bad input


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"context_dim": 1}, "context must be given together with context_dim"),
        ({"context": lambda n, g: None}, "context must be given together with context_dim"),
        ({"context_dim": 0, "context": lambda n, g: None}, "context_dim must be at least 1"),
        ({"loss": "ddpm"}, "loss must be 'mirror-descent' or 'reverse-sampling', got 'ddpm'"),
        ({"loss": "reverse-sampling"}, "proposal must be given for, and only for"),
        ({"proposal": GaussianProposal(torch.zeros(2), 1.0)}, "proposal must be given for, and"),
        ({"loss": "reverse-sampling", "proposal": GaussianProposal(torch.zeros(2), 1.0),
          "context_dim": 1, "context": lambda n, g: None},
         "loss must be 'mirror-descent' with contexts"),
        ({"budget": 0}, "budget must be at least 500 evaluations, got 0"),
        ({"budget": -5}, "budget must be at least 500 evaluations, got -5"),
        ({"budget": 499}, "budget must be at least 500 evaluations, got 499"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": math.nan}, "scale must be positive, got nan"),
        ({"centre": [1.0, 2.0], "bounds": (0.0, 2.0)}, "centre must lie within the bounds, got"),
        ({"samples": torch.zeros(5, 2), "context_dim": 1, "context": lambda n, g: None},
         "samples must be None with contexts, got both"),
        ({"loss": "reverse-sampling", "proposal": GaussianProposal(torch.zeros(2), 1.0),
          "config": tiny(num_draws=3)}, "num_draws must be even for an antithetic kernel, got 3"),
        ({"centre": [1.0]}, r"centre must have shape \(2,\), got \(1,\)"),
        ({"samples": torch.zeros(5, 3)}, r"samples must have shape \(n, 2\), got \(5, 3\)"),
        ({"samples": torch.zeros(5)}, r"samples must have shape \(n, dim\), got \(5,\)"),
        ({"samples": torch.zeros(1, 2)}, "samples must be at least two finite points"),
        ({"samples": torch.full((5, 2), math.nan)}, "samples must be at least two finite points"),
        ({"samples": torch.zeros(5, 2), "bounds": (1.0, 2.0)}, "within the bounds, got 5 others"),
        ({"bounds": (1.0, 0.0)}, "bounds must have low below high in every coordinate"),
        ({"bounds": (0.0, 0.0)}, "bounds must have low below high in every coordinate"),
        ({"bounds": ([0.0, 0.0, 0.0], 1.0)}, "low must be a number or 2 numbers"),
        ({"bounds": (math.nan, 1.0)}, "low must be a number, got nan"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float64 or torch.float32, got"),
        ({"call_timeout": -1.0}, "call_timeout must be positive, got -1.0"),
        ({"device": "abacus"}, "device must be available on this machine, got 'abacus'"),
        ({"device": "cuda:99"}, "device must be available on this machine, got 'cuda:99'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        EnergyDiffusionTrainer(normal, **({"dim": 2} | options))


@pytest.mark.bad_input
def test_an_energy_must_be_callable_and_of_the_right_dimension():
    with pytest.raises(TypeError, match="energy must be a callable, got Normal"):
        EnergyDiffusionTrainer(torch.distributions.Normal(0.0, 1.0), 1)
    with pytest.raises(ValueError, match="dim must be the energy's own dimension 2, got 3"):
        EnergyDiffusionTrainer(two_modes(), 3)


@pytest.mark.bad_input
@pytest.mark.parametrize("budget", [0, -1, 10])
def test_fit_refuses_a_budget_that_covers_nothing(budget):
    trainer = EnergyDiffusionTrainer(normal, 1, config=tiny())
    with pytest.raises(ValueError, match=f"budget must be at least 500 evaluations, got {budget}"):
        fit(trainer, budget=budget)
    assert trainer.evaluations == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name",
    ["search_evaluations", "bank_size", "bank_contexts", "steps_per_cycle", "max_cycles",
     "batch_size", "check_draws", "num_steps", "width", "depth", "num_draws"],
)  # fmt: skip
def test_counts_of_the_config_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainerConfig(**{name: 0})


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", ["learning_rate", "sigma_min", "reference_scale", "bandwidth"])
def test_scales_of_the_config_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got"):
        TrainerConfig(**{name: value})


@pytest.mark.parametrize(
    ("particles", "batch", "check", "steps", "cycles"),
    [
        (None, 1024, 8192, 4000, 3),
        ((4, 2), 1024, 1024, 4000, 3),
        ((13, 3), 256, 256, 6000, 1),
        ((30, 2), 32, 32, 6000, 1),
        ((55, 3), 32, 16, 6000, 1),
        ((1, 2), 1024, 1024, 4000, 3),
    ],
)
def test_particles_have_smaller_batches(particles, batch, check, steps, cycles):
    sizes = TrainerConfig().sizes(2 if particles is None else math.prod(particles), particles)
    assert (sizes.batch_size, sizes.check_draws) == (batch, check)
    assert (sizes.steps_per_cycle, sizes.max_cycles) == (steps, cycles)
    given = TrainerConfig(batch_size=7, check_draws=8, steps_per_cycle=9, max_cycles=2, width=5)
    again = given.sizes(6, particles)
    assert (again.batch_size, again.check_draws, again.steps_per_cycle) == (7, 8, 9)
    assert (again.max_cycles, again.width) == (2, 5)


@pytest.mark.bad_input
def test_noise_levels_and_the_wanted_ess_must_make_sense():
    with pytest.raises(ValueError, match=r"sigma_max must be above sigma_min 0\.004, got 0\.001"):
        TrainerConfig(sigma_max=0.001)
    for value in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"target_ess must be in \(0, 1\], got"):
            TrainerConfig(target_ess=value)


# -- particles ------------------------------------------------------------------------------------


def trio(x):
    """Three particles on springs of length 1 in the plane."""
    points = x.unflatten(-1, (3, 2))
    gap = points[..., [0, 0, 1], :] - points[..., [1, 2, 2], :]
    distance = (gap.square().sum(-1) + 1e-12).sqrt()
    return 4 * (distance - 1).square().sum(-1)


def particle_trainer(**options):
    config = tiny(max_cycles=1, width=16, depth=2)
    return EnergyDiffusionTrainer(trio, 6, particles=(3, 2), config=config, seed=3, **options)


def test_particles_are_learned_on_centred_configurations(tmp_path):
    """Draws are centred, distances come out, and the density does not feel symmetries."""
    sizes = {"width": 24, "depth": 2, "batch_size": 256, "check_draws": 512}
    config = TrainerConfig(
        steps_per_cycle=500, max_cycles=1, search_evaluations=20_000, bank_size=40_000, **sizes
    )
    trainer = EnergyDiffusionTrainer(trio, 6, particles=(3, 2), config=config, seed=3)
    sampler = trainer.fit(progress=False)
    assert sampler.denoiser.radius == math.inf
    assert sampler.dim == 6
    x = sampler.sample(2000)
    points = x.unflatten(-1, (3, 2))
    torch.testing.assert_close(points.mean(1), torch.zeros(2000, 2).double(), atol=1e-5, rtol=0)
    exact = trainer.bank.points[0]
    weight = torch.softmax(trainer.bank.log_weight[0], 0)
    energy = trio(trainer.coordinates.forward(exact)[0])
    mean = float((weight * energy).sum())
    assert abs(float(trio(x).mean()) - mean) < 0.15  # of about 1.5; 2,000 draws: 0.03
    assert trainer.history[-1]["ess"] > 0.7
    # log Z on the subspace: three lengths near 1 fix a triangle, which turns freely
    assert abs(trainer.history[-1]["log_z"] - trainer.bank.log_z) < 0.2
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()
    moved = (points[:50] @ turn)[:, [2, 0, 1]].flatten(1) + 5.0
    torch.testing.assert_close(
        sampler.log_prob(moved), sampler.log_prob(x[:50]), atol=2e-3, rtol=1e-3
    )
    sampler.save(tmp_path / "sampler.pt")
    again = EnergySampler.load(tmp_path / "sampler.pt", energy=trio)
    torch.testing.assert_close(
        again.sample(5, generator=torch.Generator().manual_seed(1)),
        sampler.sample(5, generator=torch.Generator().manual_seed(1)),
    )
    refined = again.refine(x[:64], steps=3)
    torch.testing.assert_close(
        refined.x.unflatten(-1, (3, 2)).mean(1), torch.zeros(64, 2).double(), atol=1e-5, rtol=0
    )


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # within torch
def test_a_compiled_network_learns_the_same(tmp_path):
    """Up to rounding; and a checkpoint may be gone on with either way."""
    found, path = {}, tmp_path / "run.pt"
    for compiled in (False, True):
        config = tiny(max_cycles=1, steps_per_cycle=20, compile=compiled)
        trainer = EnergyDiffusionTrainer(two_modes(), 2, seed=3, config=config)
        found[compiled] = fit(trainer, checkpoint_path=path)
        if not compiled:
            path.rename(tmp_path / "eager.pt")
    torch.testing.assert_close(weights(found[True]), weights(found[False]), atol=1e-4, rtol=0)
    again = EnergyDiffusionTrainer(two_modes(), 2, seed=3, config=config)
    same(fit(again, checkpoint_path=tmp_path / "eager.pt"), found[False])


@pytest.mark.parametrize("budget", [3000, 20_000, 60_000])
def test_many_particles_keep_to_a_budget(budget):
    """Chains of Langevin steps are as long as there is budget for, or left out."""
    target = energies.get("lj13")
    config = tiny(max_cycles=1, steps_per_cycle=4, width=8, depth=1)
    trainer = EnergyDiffusionTrainer(target.energy, 39, particles=(13, 3), budget=budget,
                                     config=config)  # fmt: skip
    sampler = fit(trainer)
    assert sum(sampler.counts.values()) <= budget
    assert bool(trainer.bank.points.isfinite().all())


def test_an_energy_may_know_its_particles_itself():
    class Known:
        particles = (3, 2)

        def __call__(self, x):
            return trio(x)

    trainer = EnergyDiffusionTrainer(Known(), 6, config=tiny())
    assert trainer.coordinates.reduced == 4
    assert trainer.architecture["num_particles"] == 3
    counted = Known()
    counted.particles = 3  # of some other meaning
    assert EnergyDiffusionTrainer(counted, 6, config=tiny()).coordinates.reduced == 6


def test_particles_start_warm():
    first = particle_trainer().fit(progress=False)
    again = particle_trainer(warm_start=first)
    assert again.scale == pytest.approx(float(first.affine.scale_tril[0, 0]))
    assert again.fit(progress=False, max_cycles=1).dim == 6


def test_a_run_of_particles_resumes_to_the_same_numbers(tmp_path):
    whole = particle_trainer().fit(progress=False)
    path = tmp_path / "run.pt"
    first = particle_trainer()
    first.fit(progress=False, checkpoint_path=path, callback=lambda p: True)
    second = particle_trainer()
    resumed = second.fit(progress=False, checkpoint_path=path)
    for one, other in zip(whole.denoiser.parameters(), resumed.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": (4, 2)}, r"particles must have n s equal to dim 6, got \(4, 2\)"),
        ({"particles": (6, 1), "bounds": (0.0, 1.0)}, "bounds must be None for particles"),
        ({"particles": (3, 2), "centre": [0.0] * 6}, "centre must be None for particles"),
        ({"particles": (1, 6)}, "num_particles must be at least 2, got 1"),
    ],
)
def test_what_does_not_go_with_particles_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EnergyDiffusionTrainer(trio, 6, config=tiny(), **options)
