"""What all tests share.

Nothing here imports the packages under test: the run-time check of shapes and types
(``pytest --check-types``, see ``make typecheck-runtime``) has to see their first import.
"""

import os
import shutil
import signal

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

PACKAGES = ["rsm_sampler", "energies", "rl"]
# An int is welcome where a float is: the "numeric tower" of PEP 484, as for mypy.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

# The same examples in every run: a failure is a failure for everyone.
hypothesis.settings.register_profile("house", derandomize=True, deadline=None)
hypothesis.settings.register_profile("brief", derandomize=True, deadline=None, max_examples=5)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser):
    parser.addoption(
        "--check-types",
        action="store_true",
        help="check every annotated shape and type at run time, in all three packages",
    )


def pytest_configure(config):
    if config.getoption("--check-types"):
        install_import_hook(PACKAGES, CHECKER)
    # Sums depend on the number of threads. One also suits the small tensors of tests best.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if config.getoption("--check-types"):
        reasons["compiles"] = "torch.compile cannot trace the checks"
    elif shutil.which("g++") is None:
        reasons["compiles"] = "torch.compile needs a compiler"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, also where the tests run as a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def default_dtype_is_kept():
    """Library code leaves the global default dtype alone."""
    yield
    assert torch.get_default_dtype() is torch.float32
