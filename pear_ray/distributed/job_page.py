"""What the dashboard's page of a job shows of a run: a bar per stage, and a line beside the state.

Both want nothing but Ray. The bars are calls that return when their step is done, since the page
counts calls by name.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import (
    JOB_ID_METADATA_KEY,
    JobInfoStorageClient,
    JobStatus,
)

from pear_ray.telemetry.follow import ProgressState, StageProgress, StageState
from pear_ray.telemetry.view import short_line

# Of a stage at most: each is a call that waits. A stage of more steps has a mark for several.
MAX_MARKS = 400
WAITING_CALLS = 10 * MAX_MARKS  # of all stages and the driver's own
LAST_WORD_S = 5.0
PAUSE_S = 2.0  # between two lines
_logger = logging.getLogger(__name__)


class StepMarks:
    """An actor that holds the marks of the steps to come."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._steps: dict[str, int] = {}
        self._moved = asyncio.Condition()

    def __repr__(self) -> str:
        """What the dashboard calls this actor."""
        return f"{self._run} steps"

    async def reach(self, stage: str, step: int) -> None:
        """`stage` has done `step`; calls may overtake each other."""
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


class JobPage:
    """The driver's end: what is known of the run goes to the page, and nothing is waited for."""

    def __init__(self, run: str) -> None:
        self._actor = (
            ray.remote(StepMarks)
            .options(name=f"{run}/steps", num_cpus=0, max_concurrency=WAITING_CALLS)
            .remote(run)
        )
        self._marks: dict[str, list[ray.ObjectRef]] = {}
        self._steps: dict[str, int] = {}
        self._last: ray.ObjectRef | None = None
        self._line = JobLine()

    def show(self, state: ProgressState) -> None:
        """Take over what is known now."""
        for stage in state.stages.values():
            if stage.num_steps and (stage.state is StageState.RUNNING or stage.name in self._marks):
                self._mark(stage)
        self._line.show(state)

    def _mark(self, stage: StageProgress) -> None:
        if stage.name not in self._marks:
            each, steps = marks_of(stage.num_steps)
            name = f"{stage.name} step" if each == 1 else f"{stage.name} {each} steps"
            mark = self._actor.mark.options(name=name)
            self._marks[stage.name] = [mark.remote(stage.name, done) for done in steps]
        if self._steps.get(stage.name) != stage.step:
            self._steps[stage.name] = stage.step
            self._last = self._actor.reach.remote(stage.name, stage.step)

    def close(self) -> None:
        """End the marks, after they have heard of the last step."""
        if self._last is not None:
            ray.wait([self._last], timeout=LAST_WORD_S)
        ray.kill(self._actor)


class JobLine:
    """Keeps the status message of this driver's own job current; nothing without a job.

    Ray has no public call for it. Its supervisor writes the job's state when the driver begins and
    when it is gone, and never in between.
    """

    def __init__(self) -> None:
        self._job_id = submission_id()
        self._said, self._written = "", 0.0
        self._client: JobInfoStorageClient | None = None
        if self._job_id is not None:
            self._client = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)  # noqa: SLF001

    def show(self, state: ProgressState) -> None:
        """Say where the run is: at most every two seconds, and only what is new."""
        running = [each for each in state.stages.values() if each.state is StageState.RUNNING]
        now = time.monotonic()
        if self._client is None or not running or now - self._written < PAUSE_S:
            return
        stage = running[-1]
        line = short_line(stage, time.time()) if stage.ticks else f"{stage.name}: starting"
        if line == self._said:
            return
        self._said, self._written = line, now
        try:
            asyncio.run(self._client.put_status(self._job_id, JobStatus.RUNNING, message=line))
        except (RuntimeError, OSError, ray.exceptions.RaySystemError) as error:
            self._client = None  # it is for looking at, and must not take the marks along
            _logger.warning("the job's line in the dashboard stays as it is: %r", error)


def submission_id() -> str | None:
    """The id under which this driver was submitted; None where it was started by hand."""
    config = os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR)
    if config is None:
        return None
    return json.loads(config).get("metadata", {}).get(JOB_ID_METADATA_KEY)


@contextlib.contextmanager
def job_page(run: str) -> Iterator[JobPage]:
    """The page of the run's job, as long as the `with` block."""
    page = JobPage(run)
    try:
        yield page
    finally:
        page.close()
