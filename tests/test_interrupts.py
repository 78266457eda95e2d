import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rsm_sampler import EnergyDiffusionTrainer, TrainerConfig, checkpoint
from rsm_sampler.interrupts import deferred_interrupt, terminable

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("ctrl_c")


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_came_is_known_afterwards():
    with deferred_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
    assert interrupted()


def test_another_handler_stays_in_place():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *arguments: seen.append(arguments))
    try:
        with deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
        assert len(seen) == 1 and not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing():
    found = []

    def work():
        with deferred_interrupt() as interrupted:
            found.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.fixture
def default_term():
    """The system's own handler of SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


def test_sigterm_interrupts_and_then_ends_the_process(default_term):
    saved = []
    with pytest.raises(SystemExit) as ended, terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            saved.append(True)
    assert saved == [True] and ended.value.code == 143
    with pytest.raises(SystemExit) as ended, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_a_deferred_sigterm_waits_and_a_second_one_does_not(default_term):
    with pytest.raises(SystemExit), terminable(), deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()
    reached = []
    with pytest.raises(SystemExit), terminable(), deferred_interrupt():
        signal.raise_signal(signal.SIGTERM)
        reached.append(1)
        signal.raise_signal(signal.SIGTERM)
        reached.append(2)
    assert reached == [1]


def test_ctrl_c_within_terminable_is_as_ever(default_term):
    with pytest.raises(KeyboardInterrupt), terminable():
        signal.raise_signal(signal.SIGINT)


def test_an_inner_block_leaves_the_outer_one_in_charge(default_term):
    with pytest.raises(SystemExit), terminable():
        with terminable():
            pass
        signal.raise_signal(signal.SIGTERM)


def test_another_handler_of_sigterm_stays_in_place():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *arguments: seen.append(arguments))
    try:
        with terminable(), deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert not interrupted()
        assert len(seen) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_unwanted_or_in_another_thread_nothing_changes(default_term):
    found = []

    def work():
        with terminable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with terminable(False):
        found.append(signal.getsignal(signal.SIGTERM))
    assert found == [signal.SIG_DFL, signal.SIG_DFL]


CONFIG = TrainerConfig(
    search_evaluations=4000, bank_size=4000, steps_per_cycle=10**6, max_cycles=1, batch_size=64,
    width=16, depth=2, check_draws=128, num_steps=8, max_epochs=10**9,
)  # fmt: skip
FIT = """
import sys
from rsm_sampler import EnergyDiffusionTrainer
from tests.test_interrupts import CONFIG, normal
EnergyDiffusionTrainer(normal, 2, config=CONFIG, device="cpu").fit(
    progress=False, callback=lambda progress: print(progress.step, flush=True),
    checkpoint_path=sys.argv[1] if len(sys.argv) > 1 else None,
)
"""
LEARN = """
import sys
from rl import train
from tests.toy_envs import SHORT
small = dict(warmup_steps=10, replay_size=1000, batch_size=8, width=8, depth=1, num_steps=2)
train(
    "sdac", SHORT, total_steps=10**9, run_dir=sys.argv[1], device="cpu", num_envs=1,
    eval_every=100, eval_episodes=1, checkpoint_every=0, progress=False, policy_states=4,
    callback=lambda progress: print(progress.step, flush=True), **small,
)
"""


def normal(x):
    return x.square().sum(-1) / 2


def terminated(code, *arguments):
    """Exit status, and the last step printed, of a script that gets SIGTERM after 2 lines."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        lines += process.communicate(timeout=60)[0].splitlines()
        steps = [line for line in lines if line.strip().isdigit()]  # not what tqdm writes
        return process.returncode, int(steps[-1])


def test_a_fit_that_gets_sigterm_is_saved(tmp_path):
    path = tmp_path / "run.pt"
    status, step = terminated(FIT, path)
    assert status == 143
    assert checkpoint.load(path, kind="trainer")["step"] >= step
    trainer = EnergyDiffusionTrainer(normal, 2, config=CONFIG, device="cpu")
    trainer.fit(progress=False, checkpoint_path=path, callback=lambda progress: True)
    assert trainer.step > step


def test_a_fit_without_a_checkpoint_ends_at_once():
    status, _ = terminated(FIT)
    assert status == -signal.SIGTERM


def test_a_run_that_gets_sigterm_is_saved(tmp_path):
    status, step = terminated(LEARN, tmp_path / "run")
    assert status == 143
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", kind="run")["step"] >= step
