"""`pear status`: what a run is doing, read from its folder alone, from any terminal."""

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.text import Text

from pear_ray.errors import InputError
from pear_ray.telemetry.follow import Follower, ProgressState, StageState
from pear_ray.telemetry.metrics_log import METRICS_FILE
from pear_ray.telemetry.view import duration, render_progress

IDENTITY_FILE = "run.json"
LOCK_FILE = "run.lock"
SILENT_S = 300.0  # longer than any step or engine start that we ship
_ENDED = {StageState.DONE, StageState.SKIPPED}


@dataclass(frozen=True, slots=True)
class Health:
    """A run's condition in a word and a sentence."""

    word: str
    sentence: str


def render_status(
    run_dir: Path, *, alive: bool | None, place: str = "", now: float | None = None
) -> Group:
    """The run's condition, its stage table and last warnings, for a rich console.

    Args:
        run_dir: The run's folder, or a copy of it.
        alive: Whether its driver lives, or None where that cannot be told.
        place: Where the run is kept, if not in `run_dir`.
        now: Unix seconds; the present time if None.

    Raises:
        InputError: `run_dir` is no run folder.
    """
    now = time.time() if now is None else now
    state = read_progress(run_dir)
    health = run_health(state, alive=alive, now=now)
    style = {"finished": "green", "running": "cyan", "waiting": "dim", "stopped": "yellow"}.get(
        health.word, "bold red"
    )
    head = Text.assemble((health.word, style), f"  {health.sentence}")
    where = Text(place or str(run_dir), style="dim")
    clock = now if health.word == "running" else state.last_time or now
    return Group(head, where, Text(), render_progress(state, now=clock))


def read_progress(run_dir: Path) -> ProgressState:
    """Everything that the run in `run_dir` has written so far, folded.

    Raises:
        InputError: `run_dir` is no run folder.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such folder; give a run's folder, such as outputs/demo")
    if not any((run_dir / name).exists() for name in (IDENTITY_FILE, METRICS_FILE)):
        runs = sorted(path.parent.name for path in run_dir.glob(f"*/{IDENTITY_FILE}"))
        hint = f"it holds the runs {', '.join(runs)}: name one" if runs else "give a run's folder"
        raise InputError(
            f"{run_dir}: not a run folder (no {IDENTITY_FILE}, no {METRICS_FILE}); {hint}"
        )
    state = ProgressState()
    for record in Follower(run_dir / METRICS_FILE).poll():
        state.fold(record)
    state.look_at_phases(run_dir)
    return state


def run_health(state: ProgressState, *, alive: bool | None, now: float) -> Health:
    """Judge a run by its records and by whether its driver process is `alive` (None: unknown)."""
    if state.last_time is None:
        if alive is False:
            return Health("dead", "its driver is gone and nothing was logged; run it again")
        return Health("waiting", "nothing logged yet")
    silent_s = now - state.last_time
    running = [stage for stage in state.stages.values() if stage.state is StageState.RUNNING]
    if running:
        stage = running[-1]
        if stage.waiting is not None and alive is not False:
            words, since = stage.waiting
            return Health("running", f"{stage.name} is {words} (for {duration(now - since)})")
        return _running_health(stage.name, alive=alive, silent_s=silent_s)
    return _resting_health(state, alive=alive, ago=f"{duration(silent_s)} ago")


def _resting_health(state: ProgressState, *, alive: bool | None, ago: str) -> Health:
    """No stage runs: the run failed, finished, is between stages, or was stopped there."""
    failed = [stage for stage in state.stages.values() if stage.state is StageState.FAILED]
    if failed:
        return Health("failed", f"in {failed[-1].name}, {ago}: {failed[-1].message}")
    ended = [stage.name for stage in state.stages.values() if stage.state in _ENDED]
    if len(ended) == len(state.stages):
        return Health("finished", ago)
    if alive:
        return Health("running", f"between stages, last news {ago}")
    last = f"after {ended[-1]}" if ended else "before its first stage"
    return Health("stopped", f"{last}, {ago}; `pear run` goes on from there")


def _running_health(stage: str, *, alive: bool | None, silent_s: float) -> Health:
    silent = duration(silent_s)
    if alive is False:
        return Health(
            "dead", f"in {stage}: its driver is gone, last news {silent} ago; run it again"
        )
    if silent_s > SILENT_S:
        word = "silent" if alive else "dead?"
        return Health(word, f"in {stage}: no news for {silent}; look at the logs in the run folder")
    return Health("running", f"in {stage}, last news {silent} ago")


def process_alive(lock: Path) -> bool | None:
    """Whether the driver that `lock` names lives; None when that cannot be told from here."""
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
        pid, host = int(content["pid"]), content["host"]
    except (OSError, ValueError, KeyError, TypeError):  # absent: no driver says that it is there
        return None
    if host != platform.node():  # a process of another machine cannot be looked at
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, under another user
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether the process has ended and only waits for its parent to notice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:  # no /proc on this system, or it ended just now
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"
