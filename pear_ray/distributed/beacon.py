"""Where the run is, for people who look at the Ray dashboard or Prometheus: a named actor's gauges.

Ray exports what a gauge was set to once, at the next of its exports (every 10 s), and forgets it
20 s later. So the beacon sets all gauges again and again while the run lives, and what is not set
any more leaves no stale number behind.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pear_ray.telemetry.follow import ProgressState
from pear_ray.telemetry.gauges import LINGER_S, GaugeValue, gauges_of, of_a_dead_driver

NAMESPACE = "pear_ray"  # of all drivers alike, so that the next one finds a beacon that lingers
SEND_S = 2.0  # well under Ray's 10 s between exports: no export may find a gauge that is not set
GONE_S = 30.0  # of a driver's silence; it sends every 2 s, however long its steps are
NAME_FREED_S = 10.0
LAST_WORD_S = 5.0
_FOLDER_DIGITS = 8


class RunBeacon:
    """An actor that exports a run's gauges as long as its driver lives, and a while longer.

    It outlives its driver by `linger_s`, so that Prometheus sees how the run ended, or that its
    driver died without a word.
    """

    def __init__(self, run: str, *, linger_s: float = LINGER_S, gone_s: float = GONE_S) -> None:
        self._run, self._linger_s, self._gone_s = run, linger_s, gone_s
        self._gauges: dict[str, Gauge] = {}
        self._values: list[GaugeValue] = []
        self._heard = time.monotonic()
        self._ends: float | None = None
        self._lock = threading.Lock()
        # Asked for here: in the thread Ray does not know which actor this is.
        myself = ray.get_runtime_context().current_actor
        threading.Thread(target=self._repeat, args=(myself,), daemon=True).start()

    def __repr__(self) -> str:
        """What the dashboard shows for this actor; Ray asks once, when it starts."""
        return f"pear_ray {self._run}"

    def show(self, values: list[GaugeValue]) -> None:
        """Export `values` from now on, and nothing else."""
        with self._lock:
            self._values, self._heard = values, time.monotonic()
            self._set()

    def finish(self) -> None:
        """The driver ends: go on for the time to linger, then leave."""
        with self._lock:
            self._ends = time.monotonic() + self._linger_s

    def _repeat(self, myself: ray.actor.ActorHandle) -> None:
        while self._ends is None or time.monotonic() < self._ends:
            time.sleep(SEND_S)
            with self._lock:
                now = time.monotonic()
                if self._ends is None and now - self._heard > self._gone_s:
                    self._values = of_a_dead_driver(self._values)
                    self._ends = now + self._linger_s
                self._set()
        ray.kill(myself)

    def _set(self) -> None:
        for one in self._values:
            if one.name not in self._gauges:
                self._gauges[one.name] = Gauge(one.name, one.description, tuple(one.tags))
            self._gauges[one.name].set(one.value, tags=dict(one.tags))


class BeaconHandle:
    """The driver's end of a run's beacon."""

    def __init__(self, run: str, run_dir: Path, *, linger_s: float, gone_s: float) -> None:
        # Two runs of the same name, in two folders, may well be on one cluster.
        folder = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:_FOLDER_DIGITS]
        name = f"{run}/beacon-{folder}"
        _end_lingering(name)
        self._actor = (
            ray.remote(RunBeacon)
            .options(
                name=name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,  # whatever it knew comes again with the next `show`
                # Beside the driver, whose machine is the one that is not taken away.
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=True
                ),
            )
            .remote(run, linger_s=linger_s, gone_s=gone_s)
        )
        self._sent = 0.0
        self._states: list[str] = []

    def show(self, state: ProgressState) -> None:
        """Send what is known of the run: every few seconds, and whenever a stage changes state.

        It does not wait for it to arrive.
        """
        states = [stage.state.value for stage in state.stages.values()]
        now = time.time()
        if states != self._states or now - self._sent >= SEND_S:
            self._actor.show.remote(gauges_of(state, now=now))
            self._states, self._sent = states, now

    def finish(self) -> None:
        """Let it end by itself, after what it has been shown has been seen."""
        with contextlib.suppress(ray.exceptions.RayError):  # lost; the run has ended all the same
            ray.get(self._actor.finish.remote(), timeout=LAST_WORD_S)


def _end_lingering(name: str) -> None:
    """End the beacon of an earlier driver of this run, or both would export the same series."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        deadline = time.monotonic() + NAME_FREED_S
        while time.monotonic() < deadline:
            ray.get_actor(name, namespace=NAMESPACE)
            time.sleep(0.05)


@contextlib.contextmanager
def beacon(
    run: str, run_dir: Path, *, linger_s: float = LINGER_S, gone_s: float = GONE_S
) -> Iterator[BeaconHandle]:
    """The beacon of `run`, as long as the `with` block and `linger_s` more.

    Args:
        run: The run's name.
        run_dir: Its folder; another run of this name has another.
        linger_s: How long it shows the end of the run.
        gone_s: After how long without a word the driver counts as dead.
    """
    handle = BeaconHandle(run, run_dir, linger_s=linger_s, gone_s=gone_s)
    try:
        yield handle
    finally:
        handle.finish()
