"""Where the run is, for people who look at the Ray dashboard: a named actor, marks, and gauges."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping

import ray
from ray.util.metrics import Gauge

from pear_ray.config.run import RunConfig

GAUGE_PREFIX = "pear_ray_"
# Of a stage at most: each is a call that waits. A stage of more steps has a mark for several.
MAX_MARKS = 400
WAITING_CALLS = 10 * MAX_MARKS  # of all stages and the driver's own
LAST_WORD_S = 5.0


class RunBeacon:
    """An actor that exports every metric, and holds the marks of the steps to come."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._steps: dict[str, int] = {}
        self._newest: dict[str, int] = {}
        self._moved = asyncio.Condition()

    def __repr__(self) -> str:
        """What the dashboard shows for this actor."""
        return f"pear_ray {self._run}"

    async def show(
        self, number: int, stage: str, step: int, num_steps: int, metrics: Mapping[str, float]
    ) -> None:
        """Take over a step's numbers; `number` counts the calls, which may overtake each other."""
        if number > self._newest.get(stage, -1):
            self._newest[stage] = number
            self._set("stage_step", stage, float(step))
            self._set("stage_steps", stage, float(num_steps))
            for name, value in metrics.items():
                self._set(name, stage, value)
        async with self._moved:
            self._steps[stage] = max(step, self._steps.get(stage, 0))
            self._moved.notify_all()

    async def mark(self, stage: str, step: int) -> None:
        """Return when `stage` has done `step`: the dashboard then counts the call as finished."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._steps.get(stage, 0) >= step)

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


def marks_of(num_steps: int) -> tuple[int, range]:
    """Steps per mark, and the step at which each mark is passed.

    The last is the stage's last step, so that the bar is full where the stage is done.
    """
    each = max(1, -(-num_steps // MAX_MARKS))
    first = num_steps % each or each
    return each, range(first, num_steps + 1, each)


class BeaconHandle:
    """The driver's end of a run's beacon."""

    def __init__(self, config: RunConfig) -> None:
        self._actor = (
            ray.remote(RunBeacon)
            .options(
                name=f"{config.name}/beacon",
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=WAITING_CALLS,
            )
            .remote(config.name)
        )
        self._marks: dict[str, list[ray.ObjectRef]] = {}
        self._sent = itertools.count()
        self._last: ray.ObjectRef | None = None

    def show(self, stage: str, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Send a step's numbers, without waiting for them to arrive.

        With a stage's first its marks are set up: calls named `sft step`, which the job's page
        counts, so that its bar is the stage's.
        """
        if num_steps and stage not in self._marks:
            each, steps = marks_of(num_steps)
            name = f"{stage} step" if each == 1 else f"{stage} {each} steps"
            mark = self._actor.mark.options(name=name)
            self._marks[stage] = [mark.remote(stage, done) for done in steps]
        number = next(self._sent)
        self._last = self._actor.show.remote(number, stage, step, num_steps, dict(metrics))

    def close(self) -> None:
        """End the beacon, after it has heard the last number."""
        if self._last is not None:
            ray.wait([self._last], timeout=LAST_WORD_S)
        ray.kill(self._actor)


@contextlib.contextmanager
def beacon(config: RunConfig) -> Iterator[BeaconHandle]:
    """The run's beacon, as long as the `with` block."""
    handle = BeaconHandle(config)
    try:
        yield handle
    finally:
        handle.close()
