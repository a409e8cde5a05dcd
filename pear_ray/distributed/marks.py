"""A bar per stage on the dashboard's page of a job: calls that return when their step is done."""

import asyncio
from types import TracebackType

import ray

from pear_ray.telemetry.metrics_log import MetricRecord, Record

# Of a stage at most: each is a call that waits. A stage of more steps has a mark for several.
MAX_MARKS = 400
WAITING_CALLS = 10 * MAX_MARKS  # of all stages and the driver's own
LAST_WORD_S = 5.0


class StepMarks:
    """An actor that holds the marks of the steps to come."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._steps: dict[str, int] = {}
        self._moved = asyncio.Condition()

    def __repr__(self) -> str:
        """What the dashboard shows for this actor."""
        return f"pear_ray {self._run}"

    async def passed(self, stage: str, step: int) -> None:
        """`stage` has done `step`; such calls may overtake each other."""
        async with self._moved:
            self._steps[stage] = max(step, self._steps.get(stage, 0))
            self._moved.notify_all()

    async def mark(self, stage: str, step: int) -> None:
        """Return when `stage` has done `step`: the dashboard then counts the call as finished."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._steps.get(stage, 0) >= step)


def marks_of(num_steps: int) -> tuple[int, range]:
    """Steps per mark, and the step at which each mark is passed.

    The last is the stage's last step, so that the bar is full where the stage is done.
    """
    each = max(1, -(-num_steps // MAX_MARKS))
    first = num_steps % each or each
    return each, range(first, num_steps + 1, each)


class StepBars:
    """The driver's end of a run's marks."""

    def __init__(self, run: str) -> None:
        make = ray.remote(StepMarks).options(num_cpus=0, max_concurrency=WAITING_CALLS)  # type: ignore[attr-defined] - built by ray.remote
        self._actor = make.remote(run)
        self._marks: dict[str, list[ray.ObjectRef]] = {}
        self._last: ray.ObjectRef | None = None

    def __enter__(self) -> "StepBars":
        """The bars; they end with the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End them, after the last step has been heard of."""
        if self._last is not None:
            ray.wait([self._last], timeout=LAST_WORD_S)
        ray.kill(self._actor)

    def take(self, record: Record) -> None:
        """Pass the record's step, without waiting for it to be heard of.

        With a stage's first its marks are set up: calls named `sft step`, which the job's page
        counts, so that its bar is the stage's.
        """
        if not isinstance(record, MetricRecord):
            return
        stage = record.stage
        if record.num_steps and stage not in self._marks:
            each, steps = marks_of(record.num_steps)
            name = f"{stage} step" if each == 1 else f"{stage} {each} steps"
            mark = self._actor.mark.options(name=name)
            self._marks[stage] = [mark.remote(stage, done) for done in steps]
        self._last = self._actor.passed.remote(stage, record.step)
