import io
import json
import subprocess
import sys
import time

import pytest
from rich.console import Console

from pear_ray.telemetry.live import LiveView
from pear_ray.telemetry.metrics_log import EventRecord, MetricRecord, MetricsLog

STAGES = ("sft", "rl")


def log_for(folder, stage, *, attempt=1):
    return MetricsLog(folder, run="demo", stage=stage, attempt=attempt)


def run_one_stage(folder, *, num_steps):
    log = log_for(folder, "rl")
    log.event("stage_started", f"{num_steps} steps")
    for step in range(1, num_steps + 1):
        log.log({"rl/reward/mean": step / 100}, step=step, num_steps=num_steps)
    log.event("stage_finished", "")


def job_log_of(folder, *, step_s):
    """The lines of a log of 25 steps that took `step_s` each."""
    out = io.StringIO()
    log_for(folder, "sft").event("stage_skipped", "complete and current")
    with LiveView(folder, STAGES, console=Console(file=out), poll_s=0.01):
        log = log_for(folder, "rl")
        log.event("stage_started", "25 steps")
        of = {"run": "demo", "stage": "rl", "attempt": 1, "num_steps": 25}
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for step in range(1, 26):
                numbers = {"step": step, "metrics": {"rl/reward/mean": step / 100}}
                file.write(json.dumps({"time": 1000 + step_s * step} | of | numbers) + "\n")
        log.event("stage_finished", "")
    assert "\x1b" not in out.getvalue()
    lines = [line.partition("] ")[2] for line in out.getvalue().splitlines()]
    assert lines[0] == "rl started: 25 steps"  # sft's event is of an earlier driver
    assert lines[-1].startswith("rl finished after ")
    return lines[1:-1]


def test_a_job_log_gets_a_line_per_step(tmp_path):
    lines = job_log_of(tmp_path, step_s=2.0)
    assert lines[0] == "rl step 1/25, rl/reward/mean 0.010"
    assert lines[2] == "rl step 3/25, rl/reward/mean 0.030, 44 s left"
    assert [line.split(",")[0] for line in lines] == [f"rl step {n}/25" for n in range(1, 26)]


def test_steps_of_less_than_a_second_share_a_line(tmp_path):
    lines = job_log_of(tmp_path, step_s=0.25)
    shown = [int(line.split()[2].split("/")[0]) for line in lines]
    assert shown == [1, 5, 9, 13, 17, 21, 25]


def test_a_terminal_gets_the_table_and_prints_do_not_garble_it(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    before = sys.stdout
    with LiveView(tmp_path, STAGES, console=console, poll_s=0.01):
        run_one_stage(tmp_path, num_steps=3)
        sys.stdout.write("a worker speaks\n")
    assert sys.stdout is before
    text = out.getvalue()
    assert "a worker speaks\n" in text
    last = text[text.rindex("run demo") :]
    assert "✓ done" in last
    assert "3/3" in last
    assert "rl/reward/mean 0.030" in last


def test_only_new_records_are_handed_on(tmp_path):
    log_for(tmp_path, "rl").log({"x": 1.0}, step=1, num_steps=2)
    seen = []
    with LiveView(tmp_path, STAGES, on_record=seen.append, console=Console(file=io.StringIO())):
        log_for(tmp_path, "rl", attempt=2).log({"x": 2.0}, step=2, num_steps=2)
        log_for(tmp_path, "rl", attempt=2).event("stage_finished", "")
    assert [type(record) for record in seen] == [MetricRecord, EventRecord]
    assert seen[0].metrics == {"x": 2.0}


def test_a_failing_callback_is_dropped_and_the_run_goes_on(tmp_path, caplog):
    calls = []

    def gauge(record):
        calls.append(record)
        raise RuntimeError("no such gauge")

    with LiveView(tmp_path, STAGES, on_record=gauge, console=Console(file=io.StringIO())):
        run_one_stage(tmp_path, num_steps=3)
    assert len(calls) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "on_record is off for the rest of this run: RuntimeError('no such gauge')"
    ]


class GoneTerminal(io.StringIO):
    def write(self, text):
        raise OSError(f"no terminal for {len(text)} characters")


def test_a_lost_terminal_turns_the_view_off_and_records_still_flow(tmp_path, caplog):
    seen = []
    console = Console(file=GoneTerminal(), force_terminal=True)
    with LiveView(tmp_path, STAGES, console=console, on_record=seen.append, poll_s=0.01):
        time.sleep(0.05)
        run_one_stage(tmp_path, num_steps=2)
    assert len(seen) == 4
    assert [r.levelname for r in caplog.records] == ["WARNING"]


PIPED = """
import pathlib, sys
from pear_ray.telemetry.live import LiveView
from pear_ray.telemetry.metrics_log import MetricsLog
folder = pathlib.Path(sys.argv[1])
log = MetricsLog(folder, run="demo", stage="rl", attempt=1)
sys.stdin.read()  # until the reader of our output is gone
with LiveView(folder, ("rl",), poll_s=0.01):
    log.event("stage_started", "")
(folder / "went_on").touch()
"""


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", PIPED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.close()
    child.stdin.close()
    assert child.wait(60) == 0
    assert (tmp_path / "went_on").exists()


def test_an_error_of_the_run_passes_through(tmp_path):
    with (
        pytest.raises(KeyError, match="absent"),
        LiveView(tmp_path, STAGES, console=Console(file=io.StringIO())),
    ):
        {}["absent"]
