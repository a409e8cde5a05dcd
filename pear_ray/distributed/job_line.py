"""The line that `pear jobs` and the dashboard show of a submitted job beside its state."""

import asyncio
import json
import logging
import os
import time

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import (
    JOB_ID_METADATA_KEY,
    JobInfoStorageClient,
    JobStatus,
)

from pear_ray.telemetry.follow import ProgressState
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, Record
from pear_ray.telemetry.view import event_line, short_line

PAUSE_S = 2.0
_logger = logging.getLogger(__name__)


def submission_id() -> str | None:
    """The id under which this driver was submitted; None where it was started by hand."""
    config = os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR)
    if config is None:
        return None
    return json.loads(config).get("metadata", {}).get(JOB_ID_METADATA_KEY)


class JobLine:
    """Keeps the status message of this driver's own job current; nothing without a job.

    Ray has no public call for it. Its supervisor writes the job's state when the driver begins and
    when it is gone, and never in between.
    """

    def __init__(self) -> None:
        self._job_id = submission_id()
        self._state = ProgressState()
        self._written = 0.0
        self._client: JobInfoStorageClient | None = None
        if self._job_id is not None:
            self._client = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)  # noqa: SLF001

    def take(self, record: Record) -> None:
        """Take over a record, and say where the run is: at most every two seconds."""
        self._state.fold(record)
        now = time.monotonic()
        is_event = isinstance(record, EventRecord)
        if is_event and record.event is EventKind.WARNING:
            return  # it would hide where the run is; the log has it
        if self._client is None or (now - self._written < PAUSE_S and not is_event):
            return
        self._written = now
        stage = self._state.stages[record.stage]
        line = event_line(self._state, record) if is_event else short_line(stage, record.time)
        try:
            asyncio.run(self._client.put_status(self._job_id, JobStatus.RUNNING, message=line))
        except (RuntimeError, OSError, ray.exceptions.RaySystemError) as error:
            self._client = None  # it is for looking at, and must not take the gauges along
            _logger.warning("the job's line in the dashboard stays as it is: %r", error)
