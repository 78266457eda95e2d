"""Long runs: exact resume, interruption, continuation, reproducibility."""

import math
import signal

import pytest
import torch

from rsm_sampler import EnergyDiffusionTrainer, EnergySampler, TrainerConfig
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.trainer import Progress

CONFIG = TrainerConfig(
    search_evaluations=4000,
    bank_size=4000,
    steps_per_cycle=220,
    max_cycles=2,
    batch_size=64,
    width=16,
    depth=2,
    frequencies=8,
    check_draws=128,
    num_steps=8,
    target_ess=1.0,
)


def energy(x: torch.Tensor) -> torch.Tensor:
    return ((x**2 - 4) ** 2).sum(-1) / 8


def new(seed: int = 0, **options: object) -> EnergyDiffusionTrainer:
    return EnergyDiffusionTrainer(energy, 2, seed=seed, config=CONFIG, device="cpu", **options)


def weights(trainer: EnergyDiffusionTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.average.parameters()])


@pytest.fixture(scope="module")
def uninterrupted() -> EnergyDiffusionTrainer:
    trainer = new()
    trainer.fit(progress=False)
    return trainer


@pytest.mark.numbers
def test_the_seed_decides_everything(uninterrupted):
    state = torch.get_rng_state()
    again, other = new(), new(seed=1)
    again.fit(progress=False)
    other.fit(progress=False)
    assert torch.equal(weights(again), weights(uninterrupted))
    assert not torch.equal(weights(other), weights(uninterrupted))
    assert torch.equal(torch.get_rng_state(), state)
    assert [r["ess"] for r in again.history] == [r["ess"] for r in uninterrupted.history]


@pytest.mark.numbers
@pytest.mark.parametrize("stop_at", [100, 300])
@pytest.mark.parametrize("how", ["callback", "interrupt", "exception"])
def test_resumed_equals_never_interrupted(tmp_path, uninterrupted, stop_at, how):
    path = tmp_path / "run.pt"

    def callback(progress: Progress) -> bool:
        if progress.step < stop_at:
            return False
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "exception":
            raise OSError("the disk of the callback is full")
        return True

    first = new()
    if how == "exception":
        with pytest.raises(OSError, match="disk of the callback"):
            first.fit(progress=False, callback=callback, checkpoint_path=path)
    else:
        sampler = first.fit(progress=False, callback=callback, checkpoint_path=path)
        assert isinstance(sampler, EnergySampler)
        assert sampler.sample(3).shape == (3, 2)
        first.save(path)
    assert first.step == stop_at

    second = new()
    second.fit(progress=False, checkpoint_path=path)
    assert second.step == uninterrupted.step
    assert torch.equal(weights(second), weights(uninterrupted))
    assert second.energy.counts == uninterrupted.energy.counts
    ess = [record["ess"] for record in second.history]
    assert ess == [record["ess"] for record in uninterrupted.history]


@pytest.mark.numbers
def test_ctrl_c_within_a_step_waits_for_its_end(tmp_path, uninterrupted, ctrl_c):
    path, first = tmp_path / "run.pt", new()
    step = first.optimiser.step

    def slow_step():
        step()
        if first.step == 149:
            signal.raise_signal(signal.SIGINT)

    first.optimiser.step = slow_step
    first.fit(progress=False, checkpoint_path=path)
    assert first.step == 150
    second = new()
    second.fit(progress=False, checkpoint_path=path)
    assert torch.equal(weights(second), weights(uninterrupted))


def test_an_energy_that_raises_keeps_its_traceback_and_the_state(tmp_path):
    path = tmp_path / "run.pt"
    calls = []
    searched = math.inf

    def fragile(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if sum(calls) > searched:  # the check after the first cycle
            raise ArithmeticError("simulator crashed")
        return energy(x)

    EnergyDiffusionTrainer(fragile, 2, config=CONFIG, device="cpu").explore(progress=False)
    searched = sum(calls)
    calls.clear()
    trainer = EnergyDiffusionTrainer(fragile, 2, config=CONFIG, device="cpu")
    with pytest.raises(ArithmeticError, match="simulator crashed") as caught:
        trainer.fit(progress=False, checkpoint_path=path)
    assert caught.traceback[-1].name == "fragile"
    if trainer.bank is not None:
        assert path.exists()
        calls.clear()
        fresh = EnergyDiffusionTrainer(energy, 2, config=CONFIG, device="cpu")
        fresh.fit(progress=False, checkpoint_path=path)
        assert fresh.cycle == CONFIG.max_cycles


@pytest.mark.numbers
def test_a_larger_budget_continues():
    trainer = EnergyDiffusionTrainer(energy, 2, config=CONFIG, budget=2000, device="cpu")
    trainer.fit(progress=False)
    before, points = trainer.evaluations, trainer.bank.points.shape[1]
    assert before <= 2000
    trainer.fit(progress=False, budget=6000, max_cycles=3)
    assert before < trainer.evaluations <= 6000
    assert trainer.bank.points.shape[1] > points


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    trainer = new()
    trainer.fit(progress=False, callback=lambda progress: True, checkpoint_path=path)
    trainer.save(path)
    with pytest.raises(CheckpointError, match="seed 5, got 0"):
        new(seed=5).fit(progress=False, checkpoint_path=path)
    with pytest.raises(CheckpointError):
        EnergySampler.load(path)


def test_warm_start_takes_weights_and_place(uninterrupted):
    sampler = uninterrupted.sampler()
    warm = new(seed=3, warm_start=sampler)
    for mine, theirs in zip(
        warm.denoiser.parameters(), sampler.denoiser.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert torch.allclose(warm.centre, sampler.affine.loc)


def test_later_training_leaves_a_sampler_alone(uninterrupted):
    trainer = new()
    sampler = trainer.fit(progress=False, max_cycles=1)
    first = sampler.sample(10, generator=torch.Generator().manual_seed(0))
    trainer.fit(progress=False)
    again = sampler.sample(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
