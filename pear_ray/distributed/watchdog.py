"""Says where a rank hangs: a thread that dumps all stacks when its rank stops getting on."""

import contextlib
import faulthandler
import os
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from pear_ray.config.sections import ClusterConfig
from pear_ray.telemetry.metrics_log import MetricsLog
from pear_ray.telemetry.phase import PhaseWriter

STACKS = "stacks"
STALLED_FILE = ".stalled"  # how a rank that is stuck tells the controller why it ends itself
# Engines load, kernels compile and caches fill the first time that a phase is gone through.
FIRST_TIME_FACTOR = 3
EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
LOOKS_PER_TIMEOUT = 20
MAX_WAIT_S = 5.0


class Watchdog:
    """Watches one rank of a worker group, from its making to `close`.

    It sees a rank that waits: for another rank in a collective, for a process, a file, a lock. One
    that holds Python's interpreter lock it cannot see, since it is a Python thread itself.

    Attributes:
        phase: What the rank is doing, by its last `enter`.
    """

    def __init__(
        self, cluster: ClusterConfig, stage_dir: Path, *, rank: int, log: MetricsLog
    ) -> None:
        self.phase = "start"
        self._cluster, self._stage_dir, self._rank, self._log = cluster, stage_dir, rank, log
        self._since = time.monotonic()
        self._finished: set[str] = set()  # phases that have been gone through once
        self._told = False
        self._said = PhaseWriter(stage_dir)  # of rank 0
        self._closed = threading.Event()
        if cluster.stall_timeout_s is not None:
            wait_s = min(MAX_WAIT_S, cluster.stall_timeout_s / LOOKS_PER_TIMEOUT)
            # Not `self`: a worker that fails in starting is not closed, and its thread ends too.
            watched = (weakref.ref(self), self._closed, wait_s)
            threading.Thread(target=_watch, args=watched, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        """The rank gets on: `phase` begins, or has done another part of its work."""
        if phase != self.phase:
            self._finished.add(self.phase)
            if self._rank == 0:
                self._said.write(phase)
        self.phase, self._since, self._told = phase, time.monotonic(), False

    def close(self) -> None:
        """Stop watching; harmless when called twice."""
        self._closed.set()
        self._said.close()

    def __enter__(self) -> Self:
        """The watchdog itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def _limit_s(self) -> float:
        limit_s = self._cluster.stall_timeout_s or 0.0
        return limit_s if self.phase in self._finished else limit_s * FIRST_TIME_FACTOR

    def look(self) -> None:
        """Say so, once in a phase, if the rank has been in it for too long."""
        silent_s = time.monotonic() - self._since
        if silent_s > self._limit_s() and not self._told:
            self._told = True
            self._tell(silent_s)

    def _tell(self, silent_s: float) -> None:
        file = self._stage_dir / STACKS / f"rank-{self._rank}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        said = (
            f"rank {self._rank} has been in phase {self.phase!r} for {silent_s:.0f} s without "
            f"getting on (cluster.stall_timeout_s={self._cluster.stall_timeout_s:g}); where it "
            f"is: {file}"
        )
        if self._cluster.on_stall == "warn":
            self._log.event("warning", said)
            return
        # Where it exists another rank was first, and has waited longest.
        with (
            contextlib.suppress(FileExistsError),
            (self._stage_dir / STALLED_FILE).open("x", encoding="utf-8") as stream,
        ):
            stream.write(said)
        # Whatever the rank waits for in C cannot be interrupted by an exception.
        os._exit(EXIT_CODE)


def _watch(ref: "weakref.ref[Watchdog]", closed: threading.Event, wait_s: float) -> None:
    while not closed.wait(wait_s):
        watchdog = ref()
        if watchdog is None:
            return
        watchdog.look()
        del watchdog


def stalled(stage_dir: Path) -> str | None:
    """What a rank said that ended itself because it did not get on; None where none did."""
    file = stage_dir / STALLED_FILE
    return file.read_text(encoding="utf-8") if file.exists() else None
