"""The driver's live view: a redrawn table on a terminal, readable lines in a job log."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from pear_ray.records import STAGES
from pear_ray.telemetry.follow import Follower, ProgressState, StageProgress
from pear_ray.telemetry.metrics_log import METRICS_FILE, EventRecord, Record
from pear_ray.telemetry.trackers import Trackers
from pear_ray.telemetry.view import event_line, render_progress, step_line

PLAIN_PAUSE_S = 1.0  # a job log gets a line per step, and one for several that are faster
_logger = logging.getLogger(__name__)


class _View(Protocol):
    def start(self) -> None: ...

    def take(self, state: ProgressState, record: Record) -> None: ...

    def refresh(self, state: ProgressState) -> None: ...

    def stop(self) -> None: ...


class LiveView:
    """Shows a run's progress from a thread, and hands each new record on.

    What is already in `metrics.jsonl` (earlier attempts) is shown but not handed on again. Ray
    prints its workers' output through `sys.stdout` and `sys.stderr`, which rich redirects above the
    table. No failure in here, in a tracker, in
    `on_record` or in `on_look` reaches the run.
    """

    def __init__(
        self,
        run_dir: Path,
        stages: Sequence[str] = STAGES,
        *,
        trackers: Trackers | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_look: Callable[[ProgressState], None] | None = None,
        console: Console | None = None,
        poll_s: float = 0.5,
    ) -> None:
        """Show `stages` of the run in `run_dir`; `console` is standard output if not given.

        Args:
            run_dir: The run's folder.
            stages: The rows, in order.
            trackers: Get every new record; closed when the view ends.
            on_record: Called in the view's thread with every new record.
            on_look: Called in the view's thread after every look, with all that is known.
            console: Where to show; a table if it is a terminal, otherwise lines.
            poll_s: Seconds between looks at the file.
        """
        self._console = console or Console()
        self._state = ProgressState(stages)
        self._run_dir = run_dir
        self._follower = Follower(run_dir / METRICS_FILE)
        self._consumers: dict[str, Callable[[Record], None]] = {}
        if trackers:
            self._consumers["trackers"] = trackers.log
        if on_record:
            self._consumers["on_record"] = on_record
        self._on_look = on_look
        self._trackers = trackers
        self._poll_s = poll_s
        self._ended = threading.Event()
        self._view: _View | None = None
        self._thread = threading.Thread(target=self._run, name="pear-live-view", daemon=True)

    def __enter__(self) -> Self:
        """Start showing."""
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._view = _TableView(self._console) if terminal else _LineView(self._console)
        for record in self._follower.poll():
            self._state.fold(record)
        self._state.forget_states()
        self._guarded(lambda view: view.start())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Show the last records, leave the final state on the screen, close the trackers."""
        self._ended.set()
        self._thread.join()
        self._guarded(lambda view: view.stop())
        if self._trackers:
            self._trackers.close()

    def _run(self) -> None:
        while not self._ended.wait(self._poll_s):
            self._look()
        self._look()  # what was written between the last look and the end

    def _look(self) -> None:
        try:
            records = self._follower.poll()
        except OSError as error:  # a network file system may blink; the next look reads on
            _logger.debug("cannot read metrics: %s", error)
            return
        for record in records:
            self._state.fold(record)
            self._guarded(lambda view, record=record: view.take(self._state, record))
            self._hand_on(record)
        self._state.look_at_phases(self._run_dir)
        self._guarded(lambda view: view.refresh(self._state))
        self._tell()

    def _tell(self) -> None:
        if self._on_look is None:
            return
        try:
            self._state.look_at_checkpoints(self._run_dir)
            self._on_look(self._state)
        except Exception as error:  # noqa: BLE001 - as below
            self._on_look = None
            _logger.warning("on_look is off for the rest of this run: %r", error)

    def _hand_on(self, record: Record) -> None:
        for name, consumer in list(self._consumers.items()):
            try:
                consumer(record)
            except Exception as error:  # noqa: BLE001 - a gauge must never fail the run
                del self._consumers[name]
                _logger.warning("%s is off for the rest of this run: %r", name, error)

    def _guarded(self, act: Callable[[_View], None]) -> None:
        view = self._view
        if view is None:
            return
        try:
            act(view)
        # A display must never fail the run. SystemExit is rich's answer to a closed pipe.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._view = None
            with contextlib.suppress(Exception, SystemExit):  # rich must give stdout back
                view.stop()
            _logger.warning(
                "the live view is off (%r); the run goes on, see it with `pear status`", error
            )


class _TableView:
    """A table redrawn in place."""

    def __init__(self, console: Console) -> None:
        # The polling thread redraws: a second thread of rich's own would only burn CPU.
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def start(self) -> None:
        self._live.start()

    def take(self, state: ProgressState, record: Record) -> None:
        pass

    def refresh(self, state: ProgressState) -> None:
        self._live.update(render_progress(state, now=time.time()), refresh=True)

    def stop(self) -> None:
        self._live.stop()


class _LineView:
    """A line per change of state, per warning and per step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: dict[str, tuple[int, float]] = {}  # stage: (step, time) of its last line

    def start(self) -> None:
        pass

    def take(self, state: ProgressState, record: Record) -> None:
        if isinstance(record, EventRecord):
            self._print(record.time, event_line(state, record))
        else:
            self._take_step(state.stages[record.stage], record.time)

    def refresh(self, state: ProgressState) -> None:
        pass

    def stop(self) -> None:
        pass

    def _take_step(self, stage: StageProgress, now: float) -> None:
        step, last_time = self._printed.get(stage.name, (-1, -math.inf))
        # A resumed stage counts from its checkpoint: its step may be one that was printed before.
        due = stage.step < step or now - last_time >= PLAIN_PAUSE_S
        if stage.step != step and (due or stage.step == stage.num_steps):
            self._printed[stage.name] = (stage.step, now)
            self._print(now, step_line(stage, now))

    def _print(self, when: float, line: str) -> None:
        stamp = time.strftime("%H:%M:%S", time.localtime(when))
        self._console.print(
            f"[{stamp}] {line}", markup=False, highlight=False, soft_wrap=True, emoji=False
        )
