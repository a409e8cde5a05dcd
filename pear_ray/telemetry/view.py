"""Progress as people read it: a table for a terminal, a line for a log."""

import math
import time as clock

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pear_ray.telemetry.follow import KEY_METRIC, ProgressState, StageProgress, StageState
from pear_ray.telemetry.metrics_log import EventKind, EventRecord
from pear_ray.telemetry.phase import Phase

_STYLE = {
    StageState.WAITING: "dim",
    StageState.RUNNING: "bold cyan",
    StageState.DONE: "green",
    StageState.SKIPPED: "dim green",
    StageState.FAILED: "bold red",
}
_MARK = {
    StageState.WAITING: "·",
    StageState.RUNNING: "▶",
    StageState.DONE: "✓",
    StageState.SKIPPED: "↷",
    StageState.FAILED: "✗",
}
_BAR_WIDTH = 20
SHOWN_WARNINGS = 4
_MINUTE_S, _HOUR_S = 60, 3600


def stage_table(state: ProgressState, *, now: float, title: str) -> Table:
    """One row per stage: state, bar, step, elapsed and left, tokens/s, key metric."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header, justify in (
        ("stage", "left"),
        ("state", "left"),
        ("progress", "left"),
        ("step", "right"),
        ("elapsed", "right"),
        ("left", "right"),
        ("tokens/s", "right"),
        ("key metric", "left"),
    ):
        table.add_column(header, justify=justify, no_wrap=True, header_style="dim")
    for stage in state.stages.values():
        style = _STYLE[stage.state]
        table.add_row(
            Text(stage.name, style=style),
            Text(f"{_MARK[stage.state]} {stage.state}", style=style),
            _bar(stage),
            _step(stage),
            duration(elapsed_s(stage, now)),
            duration(stage.eta_s(now)),
            number(stage.tokens_per_s),
            key_metric(stage),
        )
    return table


def warning_line(record: EventRecord) -> Text:
    """`12:03:04 sft: message`, on one line however long."""
    stamp = clock.strftime("%H:%M:%S", clock.localtime(record.time))
    message = " ".join(record.message.split())
    return Text(
        f"! {stamp} {record.stage}: {message}", style="yellow", no_wrap=True, overflow="ellipsis"
    )


def event_line(state: ProgressState, record: EventRecord) -> str:
    """`sft finished after 3 min 05 s: message`."""
    if record.event is EventKind.WAITING:
        return f"{record.stage} {record.message}"
    verb = record.event.value.removeprefix("stage_")
    took = ""
    if record.event in {
        EventKind.STAGE_FINISHED,
        EventKind.STAGE_FAILED,
        EventKind.STAGE_STOPPED,
    }:
        took = f" after {duration(elapsed_s(state.stages[record.stage], record.time))}"
    message = " ".join(record.message.split())
    return f"{record.stage} {verb}{took}" + (f": {message}" if message else "")


def render_progress(state: ProgressState, *, now: float) -> Group:
    """The table; below it what running stages say of themselves, and the last warnings."""
    title = f"run {state.run}" if state.run else "run starting"
    warnings = [warning_line(record) for record in list(state.warnings)[-SHOWN_WARNINGS:]]
    running = [stage for stage in state.stages.values() if stage.state is StageState.RUNNING]
    details = [Text(said, style="dim") for stage in running if (said := detail_line(stage, now))]
    return Group(stage_table(state, now=now, title=title), *details, *warnings)


def detail_line(stage: StageProgress, now: float) -> str:
    """`rl: correct 0.310, degenerate 0.250, length 41.0, in sample for 12 s`, or nothing.

    A line of its own, since the table would leave out columns for it on a narrow terminal.
    """
    said = _side_metrics(stage)
    if stage.waiting is not None:
        words, since = stage.waiting
        return f"{stage.name}: {words} (for {duration(max(0.0, now - since))})"
    if stage.phase is not None:
        said.append(phase_words(stage.phase, now))
    return f"{stage.name}: {', '.join(said)}" if said else ""


def step_line(stage: StageProgress, now: float) -> str:
    """`rl step 10/60, rl/reward/mean 0.310, correct 0.310, 1,240 tokens/s, 3 min left`."""
    parts = [f"{stage.name} step {_step(stage)}"]
    if key_metric(stage):
        parts.append(key_metric(stage))
    parts += _side_metrics(stage)
    if stage.tokens_per_s is not None:
        parts.append(f"{number(stage.tokens_per_s)} tokens/s")
    eta_s = stage.eta_s(now)
    if eta_s is not None and stage.step < stage.num_steps:
        parts.append(f"{duration(eta_s)} left")
    return ", ".join(parts)


def short_line(stage: StageProgress, now: float) -> str:
    """`rl 10/60, 3 min 05 s left, rl/reward/mean 0.310`: what matters first, for narrow columns."""
    eta_s = stage.eta_s(now)
    left = f"{duration(eta_s)} left" if eta_s is not None and stage.step < stage.num_steps else ""
    return ", ".join(filter(None, (f"{stage.name} {_step(stage)}", left, key_metric(stage))))


def elapsed_s(stage: StageProgress, now: float) -> float | None:
    """Seconds since the stage started, up to its end."""
    if stage.started is None:
        return None
    return max(0.0, (stage.finished or now) - stage.started)


def key_metric(stage: StageProgress) -> str:
    """The stage's key metric with its name, and pass@k where it evaluates; or nothing."""
    shown = []
    if stage.key_metric is not None:
        shown.append(f"{KEY_METRIC[stage.name]} {number(stage.key_metric)}")
    if stage.pass_at_k is not None:
        name, value = stage.pass_at_k
        shown.append(f"{name} {number(value)}")
    return ", ".join(shown)


def _side_metrics(stage: StageProgress) -> list[str]:
    return [f"{word} {number(value)}" for word, value in stage.side_metrics.items()]


def phase_words(phase: Phase, now: float) -> str:
    """`in sample for 12 s`; of a run that was left in it, how long is not known."""
    if now < phase.since:
        return f"in {phase.name}"
    return f"in {phase.name} for {duration(now - phase.since)}"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; nothing for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 100:  # noqa: PLR2004 - three digits are there without decimals
        return f"{value:,.0f}"
    if magnitude >= 1e-3 or magnitude == 0:  # noqa: PLR2004 - below, zeros would push digits out
        decimals = 2 - max(-1, math.floor(math.log10(magnitude))) if magnitude else 1
        return f"{value:.{decimals}f}"
    return f"{value:.2e}"


def duration(seconds: float | None) -> str:
    """`8 s`, `3 min 05 s`, `2 h 10 min`; nothing for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S:02d} s"
    return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S:02d} min"


def _step(stage: StageProgress) -> str:
    return f"{stage.step:,}/{stage.num_steps:,}" if stage.num_steps else ""


def _bar(stage: StageProgress) -> ProgressBar | str:
    if stage.state is StageState.RUNNING and not stage.num_steps:
        return "starting"
    if stage.state in {StageState.WAITING, StageState.SKIPPED}:
        return ""
    if stage.state is StageState.DONE:
        return ProgressBar(total=1, completed=1, width=_BAR_WIDTH)
    return ProgressBar(total=max(1, stage.num_steps), completed=stage.step, width=_BAR_WIDTH)
