"""Where the run is, for people who look at the Ray dashboard: a named actor, and gauges."""

import contextlib
import re
from collections.abc import Iterator, Mapping

import ray
from ray.util.metrics import Gauge

from pear_ray.config.run import RunConfig

GAUGE_PREFIX = "pear_ray_"


class RunBeacon:
    """An actor whose name in the dashboard says run, stage and step; it exports every metric."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._state = "starting"
        self._gauges: dict[str, Gauge] = {}

    def __repr__(self) -> str:
        """What the dashboard shows for this actor."""
        return f"pear_ray {self._run}: {self._state}"

    def show(self, stage: str, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Take over a step's numbers."""
        self._state = f"{stage} {step}/{num_steps}"
        self._set("stage_step", stage, float(step))
        self._set("stage_steps", stage, float(num_steps))
        for name, value in metrics.items():
            self._set(name, stage, value)

    def _set(self, name: str, stage: str, value: float) -> None:
        metric, tags = gauge_of(name)
        tags |= {"run": self._run, "stage": stage}
        if metric not in self._gauges:
            key = GAUGE_PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
            self._gauges[metric] = Gauge(key, description=metric, tag_keys=tuple(tags))
        self._gauges[metric].set(value, tags=tags)


def gauge_of(name: str) -> tuple[str, dict[str, str]]:
    """What the gauge of the metric `name` measures, and its tags besides run and stage.

    `sft/source/NAME/nll` is `sft/source/nll` with the tag `source`: one gauge for all sources, so
    that a panel shows them side by side.
    """
    of_source = re.fullmatch(r"(\w+/source)/([^/]+)/(.+)", name)
    if of_source is None:
        return name, {}
    group, source, metric = of_source.groups()
    return f"{group}/{metric}", {"source": source}


class BeaconHandle:
    """The driver's end of a run's beacon."""

    def __init__(self, config: RunConfig) -> None:
        self._actor = (
            ray.remote(RunBeacon)
            .options(name=f"{config.name}/beacon", get_if_exists=True, num_cpus=0)
            .remote(config.name)
        )

    def show(self, stage: str, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Send a step's numbers, without waiting for them to arrive."""
        self._actor.show.remote(stage, step, num_steps, dict(metrics))


@contextlib.contextmanager
def beacon(config: RunConfig) -> Iterator[BeaconHandle]:
    """The run's beacon, as long as the `with` block."""
    handle = BeaconHandle(config)
    try:
        yield handle
    finally:
        ray.kill(handle._actor)  # noqa: SLF001 - its own module
