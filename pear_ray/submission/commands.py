"""`pear submit`, `pear jobs`, `pear logs` and `pear stop`: each returns its exit code."""

import logging
import os
import sys
import time
from collections.abc import Sequence

from ray.job_submission import JobStatus
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pear_ray.errors import ClusterError, ConfigError
from pear_ray.submission.client import Client, connect, named_errors
from pear_ray.submission.follow import follow
from pear_ray.submission.known import SentJob, find_job, next_id, running_job, sent_jobs
from pear_ray.submission.package import check_package, excludes_of, sent_files
from pear_ray.submission.target import Target
from pear_ray.telemetry.view import duration

STOPPED = 3  # exit code of a job that was told to stop: neither done nor failed
DETACHED = 130  # the shell's convention for a Ctrl-C
# How long a job that is to stop may take to its checkpoint before Ray kills it; Ray's own is 3 s.
STOP_WAIT_S = 900
POLL_S = 2.0
SAY_EVERY_S = 15.0
PIPED_WIDTH = 200  # of the table where there is no terminal to say how wide it is
_STYLE = {
    JobStatus.RUNNING: "bold cyan",
    JobStatus.SUCCEEDED: "green",
    JobStatus.FAILED: "bold red",
    JobStatus.STOPPED: "yellow",
}


def submit(
    target: Target, *, address: str | None, follow_it: bool = False, secrets: Sequence[str] = ()
) -> int:
    """Send `target` to the cluster, or attach to the job that already runs it.

    Args:
        target: What to run.
        address: URL of the dashboard; None as in `connect`.
        follow_it: Whether to stay and write its log until it ends.
        secrets: Names of variables of this environment that the job gets.

    Raises:
        InputError: The tree cannot be sent.
        ConfigError: A secret is not set here.
        ClusterError: As `connect`; or another run of that name is running.
    """
    _quieten()
    values = _values_of(secrets)
    client = connect(address)
    job = running_job(sent_jobs(client), target)
    if job is not None:
        _say(f"run {target.name!r} is already running as job {job.job_id}; not started again")
        job_id = job.job_id
    else:
        job_id = _send(client, target, values)
        _say(f"job:       {job_id} ({target.entrypoint})")
    _say(f"dashboard: {client.get_address()}/#/jobs/{job_id}")
    if follow_it:
        return _follow(client, job_id, run=target.name)
    _say(f"follow it: pear logs {target.name} --follow{_with_address(address)}")
    return 0


def list_jobs(*, address: str | None) -> int:
    """Write a table of the cluster's jobs, the newest first."""
    _quieten()
    jobs = sent_jobs(connect(address))
    if not jobs:
        _say("no job was sent yet; `pear submit RUN.yaml` sends one")
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(jobs_table(jobs, now=time.time()))
    return 0


def jobs_table(jobs: Sequence[SentJob], *, now: float) -> Table:
    """One row per job: run, stage, state, where it is, how long it ran, when it began, id."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("run", "stage", "state", "where", "took", "since", "id"):
        table.add_column(header, no_wrap=header != "where", header_style="dim")
    for job in reversed(jobs):
        state = Text(job.status.value.lower(), style=_STYLE.get(job.status, "dim"))
        where = job.message if job.is_running else ""
        since = time.strftime("%d %b %H:%M", time.localtime(job.started))
        took = duration((job.ended or now) - job.started)
        table.add_row(job.run, job.stage, state, where, took, since, job.job_id)
    return table


def logs(wanted: str, *, address: str | None, follow_it: bool) -> int:
    """Write a job's log; with `follow_it` until it ends, and its exit code then."""
    _quieten()
    client = connect(address)
    job = find_job(client, wanted)
    if follow_it:
        return _follow(client, job.job_id, run=job.run)
    with named_errors(client.get_address()):
        _write(client.get_job_logs(job.job_id))
    return 0


def stop(wanted: str, *, address: str | None) -> int:
    """Have a job checkpoint and end, and wait until it has.

    Raises:
        ClusterError: As `find_job`; or it has not ended in `STOP_WAIT_S`.
    """
    _quieten()
    client = connect(address)
    job = find_job(client, wanted)
    if not job.is_running:
        _say(f"job {job.job_id} has ended already: {_how(job)}")
        return 0
    with named_errors(client.get_address()):
        client.stop_job(job.job_id)
    _say(f"job {job.job_id} is told to stop: it goes on to its next checkpoint, and ends there")
    began = said = time.monotonic()
    try:
        while job.is_running:
            time.sleep(POLL_S)
            now = time.monotonic()
            if now - began > STOP_WAIT_S + SAY_EVERY_S:
                raise ClusterError(
                    f"job {job.job_id} has not ended in {duration(now - began)}; look at its log "
                    f"(`pear logs {job.job_id}`)"
                )
            if now - said > SAY_EVERY_S:
                _say(f"still waiting, for {duration(now - began)}: {job.message}")
                said = now
            job = find_job(client, job.job_id)
    except KeyboardInterrupt:
        _say("not waiting any more; the job ends at its next checkpoint all the same")
        return DETACHED
    _say(f"job {job.job_id}: {_how(job)}")
    return 0


def exit_code(job: SentJob) -> int:
    """0 done, its driver's own where it failed, `STOPPED` where it was told to stop."""
    if job.status is JobStatus.SUCCEEDED:
        return 0
    return STOPPED if job.status is JobStatus.STOPPED else job.exit_code or 1


def _send(client: Client, target: Target, secrets: dict[str, str]) -> str:
    excludes = excludes_of(target)
    files = sent_files(target.root, excludes)
    check_package(target, files)
    size = sum(files.values()) / 2**20
    _say(f"sending {len(files):,} files of {target.root} ({size:.1f} MiB)")
    job_id = next_id(sent_jobs(client), target.name)
    with named_errors(client.get_address()):
        try:
            return client.submit_job(
                entrypoint=target.entrypoint,
                submission_id=job_id,
                runtime_env={
                    "working_dir": str(target.root),
                    "excludes": excludes,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)} | secrets,
                },
                metadata=target.metadata,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            raise ClusterError(
                f"job {job_id} was sent by another command at this moment; the same command again "
                "attaches to it"
            ) from error


def _values_of(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            f"--env {missing[0]}: no variable of that name here; export it first. Only its name "
            "belongs on the command line"
        )
    return {name: os.environ[name] for name in names}


def _follow(client: Client, job_id: str, *, run: str) -> int:
    try:
        job = follow(client, job_id, _write)
    except KeyboardInterrupt:
        _say(
            f"\ndetached; job {job_id} goes on. Attach again: pear logs {run} --follow; end it: "
            f"pear stop {run}"
        )
        return DETACHED
    _say(f"job {job_id}: {_how(job)}")
    return exit_code(job)


def _how(job: SentJob) -> str:
    after = duration((job.ended or time.time()) - job.started)
    if job.status is JobStatus.SUCCEEDED:
        return f"done after {after}"
    if job.status is JobStatus.STOPPED:
        return f"stopped after {after}; submit it again to go on"
    return f"failed after {after} (exit code {job.exit_code}); submitted again it goes on"


def _with_address(address: str | None) -> str:
    return f" --address {address}" if address else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    """To people, beside the log: a log that is piped on stays as the job wrote it."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _quieten() -> None:
    """Keep Ray's own words about uploads and sockets off the terminal."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in ("dashboard_sdk", "job.sdk"):  # which set a level of their own
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
