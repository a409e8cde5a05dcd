"""The stall watchdog: silent while its rank gets on, and precise when it does not."""

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pear_ray.config.sections import ClusterConfig
from pear_ray.distributed.watchdog import FIRST_TIME_FACTOR, STACKS, Watchdog
from pear_ray.telemetry.metrics_log import EventRecord, MetricsLog, read_metrics
from pear_ray.telemetry.phase import read_phase


@pytest.fixture
def start(tmp_path: Path) -> Any:
    def make(timeout_s: float | None) -> Watchdog:
        (tmp_path / "rl").mkdir(exist_ok=True)
        log = MetricsLog(tmp_path, run="test", stage="rl", attempt=1)
        cluster = ClusterConfig(stall_timeout_s=timeout_s)
        return Watchdog(cluster, tmp_path / "rl", rank=1, log=log)

    return make


def warnings(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    return [each.message for each in records if isinstance(each, EventRecord)]


def test_the_first_rank_says_what_it_does(tmp_path: Path) -> None:
    """Also where nobody watches; a phase that goes on keeps its start."""
    (tmp_path / "rl").mkdir()
    log = MetricsLog(tmp_path, run="test", stage="rl", attempt=1)
    cluster = ClusterConfig(stall_timeout_s=None)
    for rank in (1, 0):
        with Watchdog(cluster, tmp_path / "rl", rank=rank, log=log) as watchdog:
            before = time.time()
            watchdog.enter("sample")
            first = read_phase(tmp_path / "rl")
            watchdog.enter("sample")
            assert read_phase(tmp_path / "rl") == first
            watchdog.enter("train")
            second = read_phase(tmp_path / "rl")
        assert read_phase(tmp_path / "rl") is None
        if rank == 1:
            assert first is second is None
        else:
            assert first is not None
            assert second is not None
            assert (first.name, second.name) == ("sample", "train")
            assert before <= first.since <= second.since <= time.time()


def waits_for_nothing(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_it_says_once_where_a_rank_is_stuck(tmp_path: Path, start: Any) -> None:
    with start(0.2) as watchdog:
        watchdog.enter("train")
        watchdog.enter("sync")
        watchdog.enter("train")
        waits_for_nothing(1.0)
    (said,) = warnings(tmp_path)
    assert said.startswith("rank 1 has been in phase 'train' for 0 s without getting on (cluster.")
    (file,) = (tmp_path / "rl" / STACKS).glob("rank-1-*.txt")
    assert said.endswith(f"where it is: {file}")
    stacks = file.read_text(encoding="utf-8")
    assert "in waits_for_nothing" in stacks
    assert "test_watchdog.py" in stacks


def test_progress_within_a_phase_counts(tmp_path: Path, start: Any) -> None:
    with start(0.5) as watchdog:
        watchdog.enter("sync")
        watchdog.enter("train")
        watchdog.enter("sync")
        for _ in range(10):
            watchdog.enter("train")
            time.sleep(0.1)
    assert warnings(tmp_path) == []


def test_the_first_time_may_take_longer(tmp_path: Path, start: Any) -> None:
    assert FIRST_TIME_FACTOR == 3
    with start(1.0) as watchdog:
        time.sleep(1.5)  # it starts
        watchdog.enter("sample")
        time.sleep(1.5)  # its first step
        assert warnings(tmp_path) == []
        watchdog.enter("train")
        watchdog.enter("sample")
        time.sleep(1.5)
    assert len(warnings(tmp_path)) == 1


def test_without_a_timeout_nothing_runs(start: Any) -> None:
    before = set(threading.enumerate())
    with start(None):
        assert not set(threading.enumerate()) - before


def test_it_ends_with_what_it_watches(start: Any) -> None:
    before = set(threading.enumerate())  # not their number: those of earlier tests may yet end
    watchdog = start(0.2)
    (thread,) = set(threading.enumerate()) - before
    del watchdog
    gc.collect()
    thread.join(timeout=10.0)
    assert not thread.is_alive()
