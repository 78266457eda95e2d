"""Mixture recovery: random mixtures, learned from their energies alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from energies import GaussianMixture
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig

CONFIG = TrainerConfig(
    search_evaluations=30_000, bank_size=40_000, steps_per_cycle=900, max_cycles=1, width=64,
    batch_size=512, check_draws=1024, num_steps=24,
)
DRAWS = 20_000


def recover(dim: int, modes: int, seed: int) -> None:
    """Train on the energy of one random mixture and compare its components.

    Modes are at least 6 standard deviations apart and weigh at least 0.05. Statistical errors are
    bounded by 5 standard errors, of the DRAWS draws and of the bank (an effective size of at
    least a tenth of it); the model's own error by 0.03 in a weight, and 0.15 standard deviations
    in a mean or a standard deviation. False alarms of the statistical part: below 1e-6 a number.
    """
    generator = torch.Generator().manual_seed(seed)
    target = GaussianMixture.random(
        dim, modes, min_separation=6.0, min_weight=0.05, generator=generator
    )
    trainer = EnergyDiffusionTrainer(target, dim, seed=seed, config=CONFIG, device="cpu")
    sampler = trainer.fit(progress=False)
    x = sampler.sample(DRAWS).double()
    share = target.responsibilities(x)
    weight = share.mean(0)
    exact = target.mode_weights.double()
    effective = 1 / (1 / DRAWS + 10 / CONFIG.bank_size)
    band = 5 * (exact * (1 - exact) / effective).sqrt() + 0.03
    assert bool(((weight - exact).abs() <= band).all()), (weight, exact)
    for k in range(modes):
        w = share[:, k : k + 1] / share[:, k].sum()
        mean = (w * x).sum(0)
        std = (w * (x - mean).square()).sum(0).sqrt()
        error = 5 / math.sqrt(effective * float(exact[k]))
        assert float((mean - target.modes[k]).abs().amax()) <= error + 0.15
        assert float((std - 1).abs().amax()) <= error + 0.15
    assert bool(x.isfinite().all())


@settings(max_examples=5)
@given(dim=st.integers(1, 3), modes=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_random_mixtures_are_recovered(dim, modes, seed):
    recover(dim, modes, seed)


@pytest.mark.slow
@settings(max_examples=50)
@given(dim=st.integers(1, 3), modes=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_many_random_mixtures_are_recovered(dim, modes, seed):
    recover(dim, modes, seed)
