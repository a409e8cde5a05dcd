"""Following a run from its `metrics.jsonl`: reading what is new, and folding it into progress."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import assert_never

from pear_ray.records import HALF_STAGES, ON_DEMAND_STAGES, STAGES
from pear_ray.telemetry.metrics_log import (
    EventKind,
    EventRecord,
    MetricRecord,
    Record,
    parse_line,
)
from pear_ray.telemetry.phase import Phase, read_phase

KEY_METRIC = {
    "collect": "collect/verified_fraction",
    "score": "score/tokens_per_s",
    "sft": "sft/weighted_loss",
    "rl": "rl/reward/mean",
    "evaluate": "eval/pass_at_1",
} | dict.fromkeys(("ready", *HALF_STAGES), "rl/reward/mean")
SPEED_METRIC = {stage: f"{stage}/tokens_per_s" for stage in (*STAGES, *ON_DEMAND_STAGES)} | {
    "evaluate": "eval/tokens_per_s",
    **dict.fromkeys(("ready", *HALF_STAGES), "rl/tokens_per_s"),
}
# Beside the key metric, in a word: what tells an RL run that goes well from one that does not.
SIDE_METRICS = {
    stage: {
        "correct": "rl/correct_fraction",
        "degenerate": "rl/degenerate_group_fraction",
        "length": "rl/completion_length/mean",
    }
    for stage in ("rl", *HALF_STAGES)
}
RECENT_STEPS = 16  # enough that one slow step (a checkpoint, a pause) cannot move the median
KEPT_WARNINGS = 50
# Ray Train writes it anew with every checkpoint that it commits.
_COMMITTED = Path("train", "checkpoint_manager_snapshot.json")


class StageState(StrEnum):
    """Where a stage stands, in the words shown."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


class Follower:
    """Hands out the records added to `path` since the last poll; the file may not exist yet."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of the file."""
        self._path = path
        self._offset = 0

    def poll(self) -> list[Record]:
        """The new complete records; a line still without its end waits for the next poll."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        complete, newline, _ = new.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        records = (parse_line(line) for line in complete.splitlines())
        return [record for record in records if record is not None]


@dataclass
class StageProgress:
    """How far one stage is.

    Attributes:
        started: Unix time of its last start; None before it.
        finished: Unix time at which it finished, was skipped or failed.
        metrics: The latest value of every metric that it wrote.
        phase: What it is doing within a step, where it says so.
        checkpointed: Unix time of its last committed checkpoint; None where there is none.
        message: The sentence of its last event.
        waiting: What it waits for, as `waiting for 2 GPU: cluster has 1`, and since when; None
            where it does not wait.
    """

    name: str
    state: StageState = StageState.WAITING
    attempt: int = 0
    step: int = 0
    num_steps: int = 0
    started: float | None = None
    finished: float | None = None
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    phase: Phase | None = None
    checkpointed: float | None = None
    waiting: tuple[str, float] | None = None
    ticks: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=RECENT_STEPS + 1)
    )  # (time, step) of this attempt

    @property
    def key_metric(self) -> float | None:
        """The stage's one number to watch."""
        return self.metrics.get(KEY_METRIC.get(self.name, ""))

    @property
    def side_metrics(self) -> dict[str, float]:
        """What else is shown, by a short name."""
        wanted = SIDE_METRICS.get(self.name, {})
        return {word: self.metrics[name] for word, name in wanted.items() if name in self.metrics}

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second, as the stage last said."""
        return self.metrics.get(SPEED_METRIC.get(self.name, ""))

    @property
    def pass_at_k(self) -> tuple[str, float] | None:
        """`pass@1` (the smallest k) and its value, as last evaluated while training; or None."""
        prefix = f"{self.name}/eval/pass_at_"
        found = {
            int(name.removeprefix(prefix)): value
            for name, value in self.metrics.items()
            if name.startswith(prefix) and name.removeprefix(prefix).isdigit()
        }
        return (f"pass@{min(found)}", found[min(found)]) if found else None

    def step_s(self) -> float | None:
        """Median seconds per step over the recent steps of this attempt; None before two."""
        pairs = zip(self.ticks, list(self.ticks)[1:], strict=False)
        spans = [(after[0] - before[0]) / (after[1] - before[1]) for before, after in pairs]
        return statistics.median(spans) if spans else None

    def eta_s(self, now: float) -> float | None:
        """Seconds left at `now`: the steps left at the recent pace, less what has passed."""
        step_s = self.step_s()
        if self.state is not StageState.RUNNING or step_s is None:
            return None
        since_last = max(0.0, now - self.ticks[-1][0])
        return max(0.0, (self.num_steps - self.step) * step_s - since_last)

    def fold_metrics(self, record: MetricRecord) -> None:
        """Take over a step's numbers; a stage whose start was not seen is running by them."""
        if self.state is StageState.WAITING:
            self.begin(record.time)
        if record.attempt != self.attempt or (self.ticks and record.step < self.ticks[-1][1]):
            self.ticks.clear()  # the gap between two attempts is no step time
        self.attempt, self.step, self.num_steps = record.attempt, record.step, record.num_steps
        self.metrics.update(record.metrics)
        if not self.ticks or record.step > self.ticks[-1][1]:
            self.ticks.append((record.time, record.step))

    def begin(self, time: float) -> None:
        """Go to running, forgetting how an earlier attempt ended."""
        self.state, self.started, self.finished = StageState.RUNNING, time, None
        self.waiting = None
        self.ticks.clear()

    def end(self, state: StageState, time: float) -> None:
        """Go to a state that is final for this attempt."""
        self.state, self.finished, self.waiting = state, time, None
        if state is StageState.SKIPPED:
            self.started = None  # that was an earlier attempt's start: nothing ran in this one


class ProgressState:
    """A run's progress: records folded in the order written."""

    def __init__(self, stages: Sequence[str] = STAGES) -> None:
        """Every stage of `stages` waits; any other that writes is added behind them."""
        self.run = ""
        self.last_time: float | None = None
        self.warnings: deque[EventRecord] = deque(maxlen=KEPT_WARNINGS)
        self.num_warnings = 0
        self.stages = {name: StageProgress(name) for name in stages}

    def fold(self, record: Record) -> None:
        """Take over one record."""
        self.run, self.last_time = record.run, record.time
        stage = self.stages.setdefault(record.stage, StageProgress(record.stage))
        if isinstance(record, MetricRecord):
            stage.fold_metrics(record)
        elif record.event is EventKind.WARNING:
            self.warnings.append(record)
            self.num_warnings += 1
        else:
            _fold_event(stage, record)

    def look_at_phases(self, run_dir: Path) -> None:
        """Take over what the running stages say that they are doing within a step."""
        for stage in self.stages.values():
            running = stage.state is StageState.RUNNING
            found = read_phase(run_dir / stage.name) if running else None
            # An earlier attempt's last word says nothing of this one.
            stage.phase = found if found and found.since >= (stage.started or 0.0) else None

    def look_at_checkpoints(self, run_dir: Path) -> None:
        """Take over when the running stages committed a checkpoint last."""
        for stage in self.stages.values():
            if stage.state is StageState.RUNNING:
                stage.checkpointed = _checkpoint_time(run_dir / stage.name)

    def forget_states(self) -> None:
        """Set every stage to waiting, as a new driver finds it; the numbers seen so far stay."""
        self.warnings.clear()
        self.num_warnings, self.last_time = 0, None
        for stage in self.stages.values():
            stage.state, stage.started, stage.finished = StageState.WAITING, None, None
            stage.waiting = None
            stage.ticks.clear()


def _checkpoint_time(stage_dir: Path) -> float | None:
    """When Ray Train last committed a checkpoint of the stage, as Unix time."""
    try:
        return (stage_dir / _COMMITTED).stat().st_mtime
    except OSError:  # it has none, or its file system blinks
        return None


def _fold_event(stage: StageProgress, record: EventRecord) -> None:
    if record.event is EventKind.WAITING:
        since = record.time if stage.waiting is None else stage.waiting[1]
        stage.waiting = (record.message, since)
        return
    if record.event is EventKind.WAITED:
        stage.waiting = None
        stage.ticks.clear()  # the wait is no step time
        return
    stage.message = record.message
    match record.event:
        case EventKind.STAGE_STARTED:
            stage.begin(record.time)
            stage.attempt, stage.step = record.attempt, 0
        case EventKind.STAGE_FINISHED:
            stage.end(StageState.DONE, record.time)
        case EventKind.STAGE_SKIPPED:
            stage.end(StageState.SKIPPED, record.time)
        case EventKind.STAGE_FAILED | EventKind.STAGE_STOPPED:
            stage.end(StageState.FAILED, record.time)
        case EventKind.WARNING | EventKind.WAITING | EventKind.WAITED:
            pass  # no change of state
        case _:
            assert_never(record.event)
