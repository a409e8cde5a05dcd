"""Ending a run on SIGTERM so that the same command goes on: at a checkpoint where there are any."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pear_ray.errors import StopRequested

_graceful: list[Callable[[], object]] = []
_asked = threading.Event()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Within this, SIGTERM raises StopRequested in the main thread, or asks as `gracefully` says.

    Ray takes SIGTERM for itself when it starts; enter this after that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and a notebook's or a test's own handler stands
        return
    _asked.clear()
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()  # who comes later was not asked


@contextlib.contextmanager
def gracefully(ask: Callable[[], object]) -> Iterator[None]:
    """Within this, a first SIGTERM only calls `ask`; a second one raises at once."""
    _graceful.append(ask)
    try:
        yield
    finally:
        _graceful.remove(ask)


def stop_asked() -> bool:
    """Whether SIGTERM has come since `stop_on_sigterm` was entered; not outside of it."""
    return _asked.is_set()


def _on_sigterm(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal calls it
    first = not _asked.is_set()
    _asked.set()
    if first and _graceful:
        _graceful[-1]()
        return
    raise StopRequested("stopped by SIGTERM; run the same command again to go on")
