"""Doctored files of samplers and trainers: refused by name, or right; in time, within memory."""

import math
import os

import pytest
import torch

from rsm_sampler import (
    CheckpointError,
    EnergyDiffusionTrainer,
    EnergySampler,
    TrainerConfig,
    checkpoint,
)
from tests.doctored import MEMORY, contents_of, failures, in_time, peak, write

CONFIG = TrainerConfig(steps_per_cycle=20, max_cycles=1, width=8, check_draws=64)


def normal(x):
    return x.square().sum(-1) / 2


def new():
    bounds = ([-9.0, -math.inf], [9.0, math.inf])
    return EnergyDiffusionTrainer(normal, 2, budget=2000, seed=0, bounds=bounds, config=CONFIG)


def load_trainer(path):
    trainer = new()
    with checkpoint.named(path):
        trainer.load_state(checkpoint.load(path, kind="trainer"))
    return trainer


def use_trainer(trainer):
    """Another cycle: what was loaded must train and draw."""
    use_sampler(trainer.fit(progress=False, max_cycles=2))


def use_sampler(sampler):
    draws = sampler.sample(3)
    assert draws.shape == (3, sampler.dim) and bool(draws.isfinite().all())
    sampler.state()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctored")
    sampler = new().fit(progress=False, checkpoint_path=folder / "trainer.pt")
    sampler.save(folder / "sampler.pt")
    pairs = EnergyDiffusionTrainer(
        lambda x: (x[:, :2] - x[:, 2:]).square().sum(-1) / 2, 4, particles=(2, 2), config=CONFIG
    )
    pairs.sampler().save(folder / "particles.pt")
    return folder


LOADERS = {
    "sampler": (EnergySampler.load, use_sampler),
    "particles": (EnergySampler.load, use_sampler),
    "trainer": (load_trainer, use_trainer),
}


def examine(path, kind, share):
    before = peak()
    wrong, tried = failures(path, *LOADERS[kind], share=share)
    assert wrong == []
    assert peak() - before < MEMORY
    return tried


@pytest.mark.parametrize("kind", LOADERS)
def test_some_doctored_files(files, kind):
    assert examine(files / f"{kind}.pt", kind, 0.05) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
def test_doctored_files(files, kind):
    assert examine(files / f"{kind}.pt", kind, 1.0) >= 250


# What asks for more than the file holds


def changed(path, target, **changes):
    contents = contents_of(path)
    payload = contents["payload"]
    for name, value in changes.items():
        payload["architecture"][name] = value
    write(target, contents)
    return target


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sampler", {"width": 10**8}),
        ("sampler", {"depth": 10**8}),
        ("sampler", {"frequencies": 10**9}),
        ("sampler", {"harmonics": 10**9}),
        ("sampler", {"context_dim": 10**9}),
        ("particles", {"width": 10**8}),
        ("particles", {"depth": 10**8}),
        ("particles", {"radial": 10**9}),
        ("particles", {"vectors": 10**9}),
    ],
)
def test_a_network_larger_than_the_file_is_refused_before_it_is_made(
    files, tmp_path, kind, changes
):
    path = changed(files / f"{kind}.pt", tmp_path / "large.pt", **changes)
    before = peak()
    with in_time(), pytest.raises(CheckpointError, match=r"large\.pt"):
        EnergySampler.load(path)
    assert peak() - before < 100 << 20


def test_a_network_of_other_shapes_is_refused(files, tmp_path):
    path = changed(files / "sampler.pt", tmp_path / "other.pt", width=16)
    with pytest.raises(CheckpointError, match=r"other\.pt: .* as its architecture says"):
        EnergySampler.load(path)


@pytest.mark.parametrize("kind", ["sampler", "particles"])
def test_coordinates_of_another_length_are_refused(files, tmp_path, kind):
    contents = contents_of(files / f"{kind}.pt")
    coordinates = contents["payload"]["coordinates"]
    if kind == "particles":
        coordinates["particles"] = torch.tensor([10**9, 10**9])
    else:
        coordinates["low"] = coordinates["low"].repeat(2)
        coordinates["high"] = coordinates["high"].repeat(2)
    write(tmp_path / "a.pt", contents)
    with in_time(), pytest.raises(CheckpointError, match="as many as the affine map has"):
        EnergySampler.load(tmp_path / "a.pt")


def test_a_refused_state_leaves_the_trainer_as_it_was(files):
    trainer, state = new(), checkpoint.load(files / "trainer.pt", kind="trainer")
    state["optimiser"]["state"][0]["exp_avg"] = torch.zeros(3)
    before = {name: value.clone() for name, value in trainer.denoiser.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"payload\['optimiser'\]\['state'\]\[0\]"):
        trainer.load_state(state)
    assert trainer.bank is None and trainer.step == 0 and trainer.energy.counts == {}
    assert all(torch.equal(before[k], v) for k, v in trainer.denoiser.state_dict().items())


# What is no file


@pytest.mark.parametrize("load", [EnergySampler.load, load_trainer])
def test_folders_links_and_pipes_are_no_checkpoints(tmp_path, load):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to("loop2.pt")
    (tmp_path / "loop2.pt").symlink_to("loop.pt")
    (tmp_path / "gone.pt").symlink_to("nowhere.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("folder", "loop", "gone", "pipe", "missing"):
        with in_time(), pytest.raises(CheckpointError, match=rf"no checkpoint at .*{name}\.pt"):
            load(tmp_path / f"{name}.pt")
    with in_time(), pytest.raises(CheckpointError, match=r"no checkpoint at .*x\.pt"):
        load(tmp_path / "folder.pt" / "x.pt" / ("y" * 5000 + "x.pt"))
