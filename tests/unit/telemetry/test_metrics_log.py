import json
import math
import multiprocessing

import pytest

from pear_ray.artifacts import run_dir as artifacts_run_dir
from pear_ray.telemetry import status
from pear_ray.telemetry.metrics_log import (
    METRICS_FILE,
    EventKind,
    EventRecord,
    MetricRecord,
    MetricsLog,
    latest_by_step,
    read_metrics,
)


def record(step, *, attempt=1, stage="rl", time=0.0, num_steps=4, **metrics):
    return MetricRecord(time, "demo", stage, attempt, step, num_steps, metrics)


def test_a_line_holds_what_the_format_promises(tmp_path):
    MetricsLog(tmp_path, run="demo", stage="sft", attempt=2).log(
        {"sft/nll": 1}, step=3, num_steps=9
    )
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    fields = json.loads(line)
    assert fields.pop("time") > 1e9
    assert fields == {
        "run": "demo",
        "stage": "sft",
        "attempt": 2,
        "step": 3,
        "num_steps": 9,
        "metrics": {"sft/nll": 1.0},
    }


def test_non_finite_values_are_strings_in_the_file_and_floats_when_read(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    MetricsLog(tmp_path, run="demo", stage="sft", attempt=1).log(values, step=1, num_steps=1)
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text)["metrics"] == {"a": "nan", "b": "inf", "c": "-inf"}
    (read,) = read_metrics(tmp_path / METRICS_FILE)
    assert isinstance(read, MetricRecord)
    assert math.isnan(read.metrics["a"])
    assert read.metrics["b"] == math.inf
    assert read.metrics["c"] == -math.inf


def test_events_come_back_in_order_and_unknown_kinds_are_refused(tmp_path):
    log = MetricsLog(tmp_path, run="demo", stage="rl", attempt=1)
    log.event("stage_started", "40 steps")
    log.event(EventKind.WARNING, "slow")
    first, second = read_metrics(tmp_path / METRICS_FILE)
    assert isinstance(first, EventRecord)
    assert (first.event, first.message) == (EventKind.STAGE_STARTED, "40 steps")
    assert isinstance(second, EventRecord)
    assert second.event is EventKind.WARNING
    with pytest.raises(ValueError, match="stage_began"):
        log.event("stage_began", "")


def test_a_half_written_last_line_is_passed_over_and_the_next_writer_does_not_join_it(tmp_path):
    MetricsLog(tmp_path, run="demo", stage="rl", attempt=1).log({"x": 1}, step=1, num_steps=2)
    path = tmp_path / METRICS_FILE
    with path.open("a") as file:
        file.write('{"time": 1.0, "run": "demo", "sta')
    assert len(read_metrics(path)) == 1
    MetricsLog(tmp_path, run="demo", stage="rl", attempt=2).log({"x": 2}, step=2, num_steps=2)
    assert [(r.attempt, r.metrics["x"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0)]


def write_many(folder, worker):
    log = MetricsLog(folder, run="demo", stage="rl", attempt=worker)
    for step in range(1, 101):
        log.log({"x": float(worker)}, step=step, num_steps=100)


def test_lines_of_several_processes_never_mix(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, n)) for n in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    records = read_metrics(tmp_path / METRICS_FILE)
    assert sorted((r.attempt, r.step) for r in records) == [
        (attempt, step) for attempt in (1, 2) for step in range(1, 101)
    ]
    assert all(r.metrics == {"x": float(r.attempt)} for r in records)


def test_a_resumed_attempt_replaces_the_steps_that_it_did_again():
    records = [
        record(1, x=1.0),
        record(2, x=2.0),
        record(3, x=3.0),
        record(2, attempt=2, x=20.0),
        record(9, stage="sft", attempt=3, x=9.0),
    ]
    assert [(r.step, r.attempt, r.metrics["x"]) for r in latest_by_step(records, "rl")] == [
        (1, 1, 1.0),
        (2, 2, 20.0),
        (3, 1, 3.0),
    ]


def test_a_straggler_of_an_old_attempt_does_not_win():
    records = [record(2, attempt=2, x=20.0), record(2, attempt=1, x=2.0)]
    assert [r.metrics for r in latest_by_step(records, "rl")] == [{"x": 20.0}]


def test_a_shorter_stage_hides_the_steps_of_the_longer_one_that_it_replaced():
    records = [*(record(s, x=1.0) for s in (1, 2, 3, 4)), record(1, attempt=2, num_steps=2, x=2.0)]
    assert [(r.step, r.attempt) for r in latest_by_step(records, "rl")] == [(1, 2), (2, 1)]


def test_lines_of_one_attempt_about_one_step_are_joined():
    records = [record(1, x=1.0, y=1.0), record(1, y=2.0, z=3.0)]
    assert [r.metrics for r in latest_by_step(records, "rl")] == [{"x": 1.0, "y": 2.0, "z": 3.0}]


def test_telemetry_and_artifacts_agree_on_names():
    # Peers may not import each other, so the names are spelt twice.
    assert status.LOCK_FILE == artifacts_run_dir.LOCK_FILE
    assert status.IDENTITY_FILE == artifacts_run_dir.IDENTITY_FILE
