"""How many points one call gets: by time and by memory."""

import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from energies import from_numpy
from rsm_sampler.target.batches import (
    BatchSize,
    available_memory,
    peak_memory,
    resident_memory,
)
from rsm_sampler.target.energy import MeteredEnergy

GIGABYTE = 1 << 30


def grown(size, seconds, calls=40, points=10**7):
    """Sizes of calls that take seconds(n) each."""
    sizes = []
    for _ in range(calls):
        n = size.next(points)
        sizes.append(n)
        size.learn(n, seconds(n))
    return sizes


@pytest.mark.parametrize(
    ("seconds", "final"),
    [
        (lambda n: 1e-6 * n, 65_536),
        (lambda n: 3e-3 * n, 256),
        (lambda n: 0.3 * n, 2),
        (lambda n: 50.0 * n, 1),
        (lambda n: 3.0 + 1e-5 * n, 65_536),  # a program that takes three seconds to start
        (lambda n: 3.0 + 0.01 * n, 64),
    ],
)
def test_calls_take_about_a_second(seconds, final):
    sizes = grown(BatchSize(1.0), seconds)
    assert sizes[0] == 16 and sizes[1] <= 64
    assert set(sizes[-5:]) == {final}


def test_a_first_call_that_compiles_does_not_make_the_later_ones_small():
    size = BatchSize(1.0)
    sizes = [size.next(10**6)]
    size.learn(sizes[0], 30.0)
    sizes += grown(size, lambda n: 1e-6 * n)
    assert sizes[-1] == 65_536


def test_energies_that_became_slow_get_fewer_points():
    size = BatchSize(1.0)
    grown(size, lambda n: 1e-6 * n)
    size.learn(1000, 50.0)  # a small call, but a long one
    assert size.size == 16
    size.learn(3, 0.001)  # a small call says nothing else
    assert size.size == 16


def test_workers_always_have_something_to_do():
    size = BatchSize(1.0, least=32)
    assert set(grown(size, lambda n: 5.0 * n / 8)) == {32}
    size.run_out(32)
    assert size.size == 8


def test_no_call_has_few_points_because_few_were_left():
    """Below 16 rows a matrix product may round differently."""
    for size in (16, 64, 256):
        for n in range(16, 1000):
            batch = BatchSize(1.0)
            batch.size = size
            left, sizes = n, []
            while left:
                sizes.append(batch.next(left))
                left -= sizes[-1]
            assert sum(sizes) == n and min(sizes) >= 16 and max(sizes) < size + 16


@pytest.mark.parametrize("kilobytes", [10, 1000, 100_000])
def test_calls_take_a_quarter_of_the_memory_at_most(kilobytes):
    """A peak that is not seen below an earlier one of 200 MB."""
    size, each, free = BatchSize(1.0), 1000 * kilobytes, 8 * GIGABYTE
    for _ in range(40):
        n = size.next(10**7)
        used = n * each
        assert used <= max(free / 4, 16 * each)
        size.learn_memory(n, max(used, 200_000_000), used > 200_000_000, free)
        size.learn(n, 1e-3)
    assert size.size == min(65_536, 1 << int(math.log2(free / 4 / each)))


def test_without_knowledge_of_memory_the_cap_holds():
    size = BatchSize(1.0)
    for _ in range(20):
        size.learn_memory(size.size, 10**12, True, None)
        size.learn(size.size, 1e-6)
    assert size.size == 65_536


def test_a_failed_allocation_is_remembered():
    size = BatchSize(1.0)
    grown(size, lambda n: 1e-6 * n)
    size.halve(65_536)
    assert set(grown(size, lambda n: 1e-6 * n)) == {32_768}


def test_memory_is_that_of_this_process():
    before, peak = resident_memory(), peak_memory()
    assert before is not None and 0 < before <= peak + GIGABYTE / 64
    size = peak - before + 50_000_000
    block = np.ones(size // 8)
    assert resident_memory() >= before + 0.8 * size and peak_memory() >= peak + 30_000_000
    del block
    assert resident_memory() < before + 0.5 * size


@pytest.fixture
def address_space():
    """Sets how much more address space this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def limit(more):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_limits_of_the_process_count(address_space):
    address_space(GIGABYTE)
    assert 0 < available_memory() <= GIGABYTE


def test_a_vectorised_energy_of_many_data_stays_within_the_memory(address_space):
    """All points at once would take 1.6 GB for each of two arrays."""
    t, sizes = np.linspace(-1, 1, 2000), []

    def energy(x):
        sizes.append(len(x))
        return ((1 - x[:, :1] - x[:, 1:] * t) ** 2).sum(1)

    address_space(GIGABYTE)
    meter = MeteredEnergy(from_numpy(energy), 2)
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = meter(x)
    assert sum(sizes) == 20_000 and 256 <= max(sizes) <= 16_384
    assert meter.evaluations == 20_000
    few = slice(0, 50)
    torch.testing.assert_close(value[few], torch.from_numpy(energy(x[few].numpy())))
