"""The jobs of a cluster that `pear submit` sent, newest last, and which of them is meant."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ray.job_submission import JobDetails, JobStatus

from pear_ray.errors import ClusterError
from pear_ray.submission.client import Client, named_errors
from pear_ray.submission.target import Target

RUNNING = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentJob:
    """One attempt at a run on a cluster.

    Attributes:
        job_id: Its submission id, `RUN-ATTEMPT`.
        message: What its driver last said of its step, or Ray of its end.
        started: Unix time in seconds.
        ended: The same; None while it runs.
        exit_code: Of its driver; None where Ray does not say.
    """

    job_id: str
    run: str
    stage: str
    config_hash: str
    status: JobStatus
    message: str
    started: float
    ended: float | None
    exit_code: int | None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended: it runs, or it is about to."""
        return self.status in RUNNING


def sent_jobs(client: Client) -> list[SentJob]:
    """Every job that says which run it is of, in the order sent.

    Raises:
        ClusterError: The cluster does not answer.
    """
    with named_errors(client.get_address()):
        found = [_sent_job(each) for each in client.list_jobs()]
    return sorted((each for each in found if each is not None), key=lambda job: job.started)


def find_job(client: Client, wanted: str) -> SentJob:
    """The job with the id `wanted`, or the newest of the run `wanted`.

    Raises:
        ClusterError: There is none.
    """
    jobs = sent_jobs(client)
    for of in ([j for j in jobs if j.job_id == wanted], [j for j in jobs if j.run == wanted]):
        if of:
            return of[-1]
    there = ", ".join(dict.fromkeys(job.run for job in jobs)) or "none"
    raise ClusterError(
        f"{wanted}: no job and no run of that name at {client.get_address()}; the runs there are: "
        f"{there} (`pear jobs` lists them)"
    )


def running_job(jobs: Sequence[SentJob], target: Target) -> SentJob | None:
    """The job that already runs `target`; None where there is none.

    Raises:
        ClusterError: One of that name runs, with another config or of another stage.
    """
    running = [job for job in jobs if job.run == target.name and job.is_running]
    if not running:
        return None
    job = running[-1]
    differs = [
        f"its {what} is {theirs}, this one's {ours}"
        for what, theirs, ours in (
            ("stage", job.stage, target.stage),
            ("config", job.config_hash, target.config_hash),
        )
        if theirs != ours
    ]
    if differs:
        raise ClusterError(
            f"run {target.name!r} is running as job {job.job_id}, and it is another: "
            f"{'; '.join(differs)}. Wait for it (`pear logs {target.name} --follow`), end it "
            f"(`pear stop {target.name}`), or choose another name"
        )
    return job


def next_id(jobs: Sequence[SentJob], name: str) -> str:
    """The id of the next attempt at the run `name`: `demo-1`, `demo-2`."""
    pattern = re.compile(re.escape(name) + r"-([0-9]+)")
    taken = [int(found[1]) for job in jobs if (found := pattern.fullmatch(job.job_id))]
    return f"{name}-{max(taken, default=0) + 1}"


def _sent_job(details: JobDetails) -> SentJob | None:
    metadata = details.metadata or {}
    if "run" not in metadata or not details.submission_id:
        return None
    return SentJob(
        job_id=details.submission_id,
        run=metadata["run"],
        stage=metadata.get("stage", ""),
        config_hash=metadata.get("config", ""),
        status=details.status,
        message=details.message or "",
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )
