"""Importing the heavy libraries in less time."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from running within this.

    An import of vLLM and torch makes more than a million objects, which all stay. The collector
    would walk them again and again: 2 of 9 CPU seconds, in every process with an engine.
    """
    was_running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_running:
            gc.enable()
