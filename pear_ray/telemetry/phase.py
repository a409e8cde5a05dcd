"""What a stage is doing within a step: written by its first worker, read by whoever looks."""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

PHASE_FILE = ".phase"
_LINE_BYTES = 96  # longer than any: what it overwrites leaves nothing behind


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step.

    Attributes:
        since: Unix time at which it began.
    """

    name: str
    since: float


class PhaseWriter:
    """Says what the stage in `stage_dir` is doing; a disk that refuses this costs the run nothing.

    It overwrites an open file in place: 4 microseconds on ext4, where writing it anew takes 2 ms,
    several times in every step.
    """

    def __init__(self, stage_dir: Path) -> None:
        self._path = stage_dir / PHASE_FILE
        self._file: int | None = None

    def write(self, name: str) -> None:
        """Say that `name` begins now."""
        text = json.dumps({"name": name, "since": time.time()}).ljust(_LINE_BYTES)
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(self._file, text.encode(), 0)

    def close(self) -> None:
        """Say nothing any more; harmless when called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):
                self._path.unlink()


def read_phase(stage_dir: Path) -> Phase | None:
    """What was written last; None where nothing is, or nothing whole."""
    try:
        content = json.loads((stage_dir / PHASE_FILE).read_text(encoding="utf-8"))
        return Phase(str(content["name"]), float(content["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
