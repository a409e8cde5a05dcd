"""`metrics.jsonl`: the one stream of numbers and events that every view of a run reads."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class EventKind(StrEnum):
    """What can be said about a stage besides its numbers."""

    STAGE_STARTED = "stage_started"
    STAGE_FINISHED = "stage_finished"
    STAGE_SKIPPED = "stage_skipped"
    STAGE_FAILED = "stage_failed"
    STAGE_STOPPED = "stage_stopped"
    WAITING = "waiting"
    WAITED = "waited"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """The numbers of one step of one stage, in one attempt at it.

    Attributes:
        time: Unix time of writing, in seconds.
        run: The run's name.
        stage: Which stage wrote it.
        attempt: Counts up each time the stage is started or resumed.
        step: Steps done, this one included.
        num_steps: Steps that the stage will do.
        metrics: Values by name; NaN and infinities are kept.
    """

    time: float
    run: str
    stage: str
    attempt: int
    step: int
    num_steps: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A stage's change of state, or a warning, with its sentence."""

    time: float
    run: str
    stage: str
    attempt: int
    event: EventKind
    message: str


Record = MetricRecord | EventRecord


class MetricsLog:
    """Appends to a run's `metrics.jsonl`; holds no open file, so it pickles into any worker."""

    def __init__(self, run_dir: Path, *, run: str, stage: str, attempt: int) -> None:
        """Log as `stage` of `run`; the folder must exist, the file need not."""
        self._path = run_dir / METRICS_FILE
        self._header = {"run": run, "stage": stage, "attempt": attempt}
        self._end_broken_line()

    def log(self, metrics: Mapping[str, float], *, step: int, num_steps: int) -> None:
        """Write one line; torch and numpy scalars are taken as floats."""
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        self._append({"step": step, "num_steps": num_steps, "metrics": values})

    def event(self, kind: EventKind | str, message: str) -> None:
        """Write one event line; an unknown `kind` is a ValueError."""
        self._append({"event": EventKind(kind).value, "message": message})

    def _append(self, body: Mapping[str, Any]) -> None:
        line = json.dumps({"time": time.time(), **self._header, **body}, allow_nan=False)
        _write(self._path, line.encode() + b"\n")

    def _end_broken_line(self) -> None:
        """Close the line that a killed writer left open, or our first one would be glued to it."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            complete = file.read(1) == b"\n"
        if not complete:
            _write(self._path, b"\n")


def copy_metrics(source: Path, target: Path, *, stage: str, run: str, attempt: int) -> None:
    """Append the numbers of `stage` in the file `source` to `target`, as of `run`'s `attempt`.

    For an artifact that was taken over: its run's curves belong to it. Times stay as they were.
    """
    if not source.exists():
        return
    lines = [
        json.dumps(
            asdict(record)
            | {"run": run, "attempt": attempt}
            | {"metrics": {name: _to_json(value) for name, value in record.metrics.items()}},
            allow_nan=False,
        )
        for record in latest_by_step(read_metrics(source), stage)
    ]
    if lines:
        _write(target, "".join(f"{line}\n" for line in lines).encode())


def read_metrics(path: Path) -> list[Record]:
    """Every complete record of the file, in the order written.

    A line that a killed writer left half-written is passed over; that is the only way one breaks.
    """
    records = (parse_line(line) for line in path.read_bytes().splitlines())
    return [record for record in records if record is not None]


def parse_line(line: bytes) -> Record | None:
    """The record that `line` spells, or None when it is half-written."""
    try:
        fields = json.loads(line)
        header = {name: fields[name] for name in ("time", "run", "stage", "attempt")}
        if "event" in fields:
            event = EventKind(fields["event"])
            return EventRecord(**header, event=event, message=fields["message"])
        metrics = {name: _from_json(value) for name, value in fields["metrics"].items()}
        return MetricRecord(
            **header, step=fields["step"], num_steps=fields["num_steps"], metrics=metrics
        )
    except (ValueError, KeyError, TypeError):  # cut anywhere, a line may still be some JSON
        return None


def latest_by_step(records: Iterable[Record], stage: str) -> list[MetricRecord]:
    """One record per step of `stage`, by step, from the last attempt that wrote the step.

    A resumed stage does again the steps after its last checkpoint; only the redone ones count.
    Within one attempt several lines about one step are joined, later values winning. Steps past the
    last attempt's `num_steps` are of a longer stage that a shorter one replaced, and are left out.
    """
    latest: dict[int, MetricRecord] = {}
    newest: MetricRecord | None = None
    for record in records:
        if not isinstance(record, MetricRecord) or record.stage != stage:
            continue
        if newest is None or record.attempt >= newest.attempt:
            newest = record
        known = latest.get(record.step)
        if known is None or record.attempt > known.attempt:
            latest[record.step] = record
        elif record.attempt == known.attempt:
            latest[record.step] = _joined(known, record)
    num_steps = newest.num_steps if newest else 0
    return [latest[step] for step in sorted(latest) if step <= num_steps]


def _joined(earlier: MetricRecord, later: MetricRecord) -> MetricRecord:
    return MetricRecord(
        time=later.time,
        run=later.run,
        stage=later.stage,
        attempt=later.attempt,
        step=later.step,
        num_steps=later.num_steps,
        metrics=earlier.metrics | later.metrics,
    )


def _write(path: Path, line: bytes) -> None:
    # One write to an O_APPEND file: lines of several processes interleave but never mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
    finally:
        os.close(descriptor)
    if written != len(line):
        raise OSError(f"{path}: wrote {written} of {len(line)} bytes; free some disk space")


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no word for these


def _from_json(value: float | str) -> float:
    return _NOT_FINITE[value] if isinstance(value, str) else float(value)
