"""SIGTERM ends a run where it can go on: by an error of ours, or by asking first."""

import os
import signal
import threading

import pytest

from pear_ray.errors import StopRequested
from pear_ray.stopping import gracefully, stop_asked, stop_on_sigterm


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_raises_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested, match="run the same command"), stop_on_sigterm():
        terminate()
    assert signal.getsignal(signal.SIGTERM) is before
    assert StopRequested.exit_code == 0


def test_a_first_sigterm_asks_and_a_second_one_raises() -> None:
    asked: list[str] = []
    with stop_on_sigterm():
        with gracefully(lambda: asked.append("please")):
            terminate()
            assert asked == ["please"]
            assert stop_asked()
            with pytest.raises(StopRequested):
                terminate()
        assert asked == ["please"]
    assert not stop_asked()
    with stop_on_sigterm():
        assert not stop_asked()  # a run's own wish, not an earlier one's


def test_outside_of_gracefully_it_raises_again() -> None:
    with stop_on_sigterm():
        with gracefully(lambda: None):
            pass
        with pytest.raises(StopRequested):
            terminate()


def test_another_thread_leaves_the_handler_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stop_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
