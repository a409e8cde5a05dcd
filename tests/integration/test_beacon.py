"""The beacon's gauges, read where Prometheus reads them: a run that ends, a driver that dies."""

import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import ray

from pear_ray.distributed.beacon import BeaconHandle, beacon
from pear_ray.telemetry.follow import ProgressState
from pear_ray.telemetry.gauges import RUN_STATES
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, MetricRecord

WAIT_S = 60.0


def series(name: str, run: str) -> dict[str, float]:
    """The gauge's value of each worker that exports it for `run`."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    mine = [one for one in lines if one.startswith(f"ray_pear_ray_{name}{{") and f'"{run}"' in one]
    workers = [worker for line in mine for worker in re.findall(r'WorkerId="(\w+)"', line)]
    return dict(zip(workers, (float(line.rsplit(" ", 1)[1]) for line in mine), strict=True))


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.25)


def run_states(run: str) -> list[str]:
    return [RUN_STATES[int(value)] for value in series("run_state", run).values()]


def running(run: str) -> ProgressState:
    state, now = ProgressState(["sft"]), time.time()
    state.fold(EventRecord(now, run, "sft", 1, EventKind.STAGE_STARTED, ""))
    for step in (1, 2):
        state.fold(MetricRecord(now + step, run, "sft", 1, step, 9, {"sft/nll": 1.5}))
    return state


def is_there(handle: BeaconHandle) -> bool:
    try:
        ray.get(handle._actor.__ray_ready__.remote(), timeout=WAIT_S)
    except ray.exceptions.ActorDiedError:
        return False
    return True


def test_a_run_is_seen_to_its_end_and_leaves_no_stale_gauge(
    local_ray: None, tmp_path: Path
) -> None:
    # One whose driver says nothing any more, from here on; what comes of it is looked at below.
    left = BeaconHandle("left", tmp_path / "left", linger_s=60, gone_s=3)
    left.show(running("left"))

    state = running("watched")
    with beacon("watched", tmp_path, linger_s=60) as handle:
        handle.show(state)
        wait_for(lambda: list(series("sft_nll", "watched").values()) == [1.5])
        assert run_states("watched") == ["running"]
        (eta_s,) = series("stage_eta_s", "watched").values()
        assert 0 <= eta_s <= 7
        state.fold(EventRecord(time.time(), "watched", "sft", 1, EventKind.STAGE_FAILED, "no"))
        handle.show(state)
    # The driver is out of the block; the state that it ended with is exported only now.
    wait_for(lambda: run_states("watched") == ["failed"])
    # What is not set any more goes; what the stage's last step left stays for a while.
    wait_for(lambda: series("stage_eta_s", "watched") == {})
    assert list(series("sft_nll", "watched").values()) == [1.5]
    (first,) = series("run_state", "watched")

    with beacon("watched", tmp_path, linger_s=0) as again:  # it takes the lingering one's place
        assert not is_there(handle)
        again.show(running("watched"))
        wait_for(lambda: run_states("watched") == ["running"])
        assert first not in series("run_state", "watched")

    wait_for(lambda: run_states("left") == ["dead"])
    assert series("stage_eta_s", "left") == {}
    ray.kill(left._actor)
    wait_for(lambda: not is_there(again))  # by itself
    wait_for(lambda: not run_states("left") and not run_states("watched"))
