"""Recovery of random mixtures from their energies alone.

Every mixture has one to three dimensions and two to five normal modes of standard deviation 1,
whose means are at least 6 apart and whose weights are at least 0.05. A short training shall give
back weights and means, up to two errors that add:

* that of the draws, which is known: a weight w from n draws has the standard error
  sqrt(w (1 - w) / n), a mean of a mode sqrt(1 / (n w)) in each coordinate. Six of these leave a
  false-alarm rate of 2e-9 each;
* that of the model, which is allowed: 0.04 for a weight and 0.15 for a coordinate of a mean, some
  three times what this short training leaves (the full one leaves 0.01 and 0.05).

A mode that is missing, doubled or merged with another one is an error of at least 0.05 in some
weight together with an error of means of several units.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from energies import GaussianMixture
from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig

SHORT = TrainerConfig(
    search_evaluations=60_000, bank_size=60_000, steps_per_cycle=800, max_cycles=1,
    batch_size=512, check_draws=2048, num_steps=24, width=64,
)  # fmt: skip
WEIGHT, MEAN = 0.04, 0.15  # allowed errors of the model
DRAWS = 20_000


@st.composite
def mixtures(draw):
    dim, modes = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return GaussianMixture.random(
        dim, modes, min_separation=6.0, min_weight=0.05, generator=generator
    )


def check_recovery(target):
    trainer = EnergyDiffusionTrainer(target, target.dim, config=SHORT, device="cpu")
    sampler = trainer.fit(progress=False)
    assert trainer.evaluations <= 122_048
    # The bank itself has errors that it states.
    assert abs(trainer.bank.log_z) <= 6 * trainer.bank.log_z_se
    x = sampler.sample(DRAWS, generator=torch.Generator().manual_seed(1))
    share = target.responsibilities(x.double())
    weight = share.mean(0)
    noise = (target.weights * (1 - target.weights) / DRAWS).sqrt()
    error = (weight - target.weights).abs()
    assert bool((error <= WEIGHT + 6 * noise).all()), (weight, target.weights)
    means = share.T @ x.double() / share.sum(0).unsqueeze(-1)
    noise = (1 / (DRAWS * target.weights)).sqrt().unsqueeze(-1)
    error = (means - target.loc).abs()
    assert bool((error <= MEAN + 6 * noise).all()), (means, target.loc)
    # Importance weights correct what the model gets wrong: log Z = 0.
    record = sampler.history[-1]
    assert record["ess"] > 0.3
    se = math.sqrt((1 / record["ess"] - 1) / SHORT.check_draws)
    assert abs(record["log_z"]) <= 6 * se + 0.002


PLAIN = settings(phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


@settings(PLAIN, max_examples=5)
@given(mixtures())
def test_a_random_mixture_is_recovered(target):
    check_recovery(target)


@pytest.mark.slow
@settings(PLAIN, max_examples=50)
@given(mixtures())
def test_fifty_random_mixtures_are_recovered(target):
    check_recovery(target)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "scale"), [(50.0, 1.0), (0.0, 0.01), (0.0, 100.0)])
def test_recovery_does_not_depend_on_place_and_scale(shift, scale):
    """The same mixture moved and scaled: weights to the same tolerance."""
    generator = torch.Generator().manual_seed(3)
    law = GaussianMixture.random(2, 4, generator=generator)
    target = law.affine(shift, scale)
    sampler = EnergyDiffusionTrainer(target, 2, config=SHORT, device="cpu").fit(progress=False)
    x = (sampler.sample(DRAWS).double() - shift) / scale
    noise = (law.weights * (1 - law.weights) / DRAWS).sqrt()
    error = (law.responsibilities(x).mean(0) - law.weights).abs()
    assert bool((error <= WEIGHT + 6 * noise).all())
