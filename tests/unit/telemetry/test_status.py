import io
import json
import os
import platform
import subprocess
import sys

import pytest
from rich.console import Console

from pear_ray.errors import InputError
from pear_ray.telemetry.follow import ProgressState
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, MetricsLog
from pear_ray.telemetry.phase import PhaseWriter
from pear_ray.telemetry.status import process_alive, render_status, run_health
from pear_ray.telemetry.view import detail_line, duration, event_line, number


def state_of(*events):
    state = ProgressState(("sft", "rl"))
    for time, stage, kind, message in events:
        state.fold(EventRecord(time, "demo", stage, 1, kind, message))
    return state


STARTED = (0.0, "sft", EventKind.STAGE_STARTED, "")
SFT_DONE = (10.0, "sft", EventKind.STAGE_FINISHED, "")
RL_DONE = (20.0, "rl", EventKind.STAGE_FINISHED, "")
RL_FAILED = (20.0, "rl", EventKind.STAGE_FAILED, "loss is NaN")


@pytest.mark.parametrize(
    ("events", "alive", "now", "word"),
    [
        ([], None, 0.0, "waiting"),
        ([], False, 0.0, "dead"),
        ([STARTED], True, 100.0, "running"),
        ([STARTED], None, 100.0, "running"),
        ([STARTED], False, 1.0, "dead"),
        ([STARTED], True, 301.0, "silent"),
        ([STARTED], None, 301.0, "dead?"),
        ([STARTED, SFT_DONE], True, 11.0, "running"),
        ([STARTED, SFT_DONE], None, 11.0, "stopped"),
        ([STARTED, SFT_DONE, RL_DONE], False, 9e9, "finished"),
        ([STARTED, SFT_DONE, RL_FAILED], None, 60.0, "failed"),
    ],
)
def test_health(events, alive, now, word):
    assert run_health(state_of(*events), alive=alive, now=now).word == word


def test_a_failure_is_told_with_its_sentence():
    health = run_health(state_of(STARTED, SFT_DONE, RL_FAILED), alive=None, now=80.0)
    assert health.sentence == "in rl, 1 min 00 s ago: loss is NaN"


def test_what_a_stage_waits_for_is_told_until_it_is_there():
    waiting = (20.0, "sft", EventKind.WAITING, "waiting for 2 GPU: cluster has 0")
    closer = (80.0, "sft", EventKind.WAITING, "waiting for 2 GPU: cluster has 1, 1 starting")
    there = (140.0, "sft", EventKind.WAITED, "the devices are there, after 120 s")
    state = state_of(STARTED, waiting, closer)
    health = run_health(state, alive=True, now=500.0)  # long after the last word
    assert health.word == "running"
    assert health.sentence == "sft is waiting for 2 GPU: cluster has 1, 1 starting (for 8 min 00 s)"
    assert detail_line(state.stages["sft"], 110.0) == (
        "sft: waiting for 2 GPU: cluster has 1, 1 starting (for 1 min 30 s)"
    )
    record = EventRecord(80.0, "demo", "sft", 1, EventKind.WAITING, closer[3])
    assert event_line(state, record) == "sft waiting for 2 GPU: cluster has 1, 1 starting"
    assert run_health(state, alive=False, now=500.0).word == "dead"
    after = state_of(STARTED, waiting, there)
    assert after.stages["sft"].waiting is None
    assert run_health(after, alive=True, now=150.0).sentence == "in sft, last news 10 s ago"


def test_a_lock_tells_whether_its_process_lives(tmp_path):
    lock = tmp_path / "run.lock"
    assert process_alive(lock) is None
    lock.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}))
    assert process_alive(lock) is True
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock.write_text(json.dumps({"pid": ended.pid, "host": platform.node()}))
    assert process_alive(lock) is False
    lock.write_text(json.dumps({"pid": ended.pid, "host": "elsewhere"}))
    assert process_alive(lock) is None
    lock.write_text("")
    assert process_alive(lock) is None


def test_a_folder_that_is_no_run_is_refused_and_runs_in_it_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        render_status(tmp_path / "nowhere", alive=None)
    with pytest.raises(InputError, match="not a run folder"):
        render_status(tmp_path, alive=None)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds the runs demo"):
        render_status(tmp_path, alive=None)


def test_the_rendered_status_shows_stage_step_and_warning(tmp_path):
    log = MetricsLog(tmp_path, run="demo", stage="rl", attempt=1)
    log.event("stage_started", "")
    log.log(
        {"rl/reward/mean": 0.5, "rl/correct_fraction": 0.25, "rl/tokens_per_s": 1234.0},
        step=4,
        num_steps=40,
    )
    log.event("warning", "mismatch [bold]gap[/bold]")
    (tmp_path / "rl").mkdir()
    said = PhaseWriter(tmp_path / "rl")
    said.write("wake_trainer")
    said.write("train")
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_status(tmp_path, alive=None))
    text = console.export_text()
    for part in (
        "running",
        "▶ running",
        "4/40",
        "1,234",
        "rl/reward/mean 0.500",
        "\nrl: correct 0.250, in train for 0 s\n",
        "[bold]gap[/bold]",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"),
        (0.31, "0.310"),
        (1.5, "1.50"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (0.00002, "2.00e-05"),
        (-0.5, "-0.500"),
        (float("nan"), "nan"),
        (None, ""),
    ],
)
def test_numbers_show_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.4, "8 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
