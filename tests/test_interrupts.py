import signal
import threading

import pytest

from rsm_sampler.interrupts import deferred_interrupt

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
