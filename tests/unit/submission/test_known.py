"""Which job of a cluster is a run's, and what its end means."""

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from pear_ray.errors import ClusterError
from pear_ray.submission.client import dashboard_url
from pear_ray.submission.commands import exit_code, jobs_table
from pear_ray.submission.known import SentJob, next_id, running_job
from pear_ray.submission.target import Target


def job(job_id: str, status: str, **fields) -> SentJob:
    run = job_id.rpartition("-")[0]
    known = {"stage": "run", "config_hash": "abc", "message": "", "started": 0.0, "ended": None}
    return SentJob(
        job_id=job_id, run=run, status=JobStatus(status), **known | {"exit_code": None} | fields
    )


def target(**fields) -> Target:
    known = {"name": "demo", "stage": "run", "config_hash": "abc", "output_dir": "/shared"}
    return Target(root=None, entrypoint="", reads=(), **known | fields)


def test_attempts_of_a_run_are_counted_and_names_do_not_mix():
    jobs = [job("demo-1", "FAILED"), job("demo-10", "STOPPED"), job("demo-2-7", "RUNNING")]
    assert next_id(jobs, "demo") == "demo-11"
    assert next_id(jobs, "demo-2") == "demo-2-8"
    assert next_id(jobs, "other") == "other-1"


def test_only_a_running_job_of_the_same_config_is_attached_to():
    ended, running = job("demo-1", "FAILED"), job("demo-2", "PENDING")
    assert running_job([ended], target()) is None
    assert running_job([ended, running], target()) == running
    assert running_job([running], target(name="other")) is None
    with pytest.raises(ClusterError, match=r"its config is abc, this one's xyz"):
        running_job([running], target(config_hash="xyz"))
    with pytest.raises(ClusterError, match=r"its stage is run, this one's sft"):
        running_job([running], target(stage="sft"))


def test_the_exit_code_says_how_a_job_ended():
    assert exit_code(job("demo-1", "SUCCEEDED", exit_code=0)) == 0
    assert exit_code(job("demo-1", "FAILED", exit_code=2)) == 2
    assert exit_code(job("demo-1", "FAILED")) == 1  # Ray itself gave up on it
    assert exit_code(job("demo-1", "STOPPED")) == 3


def test_the_table_has_the_newest_first_and_where_it_is():
    jobs = [
        job("demo-1", "FAILED", message="Job entrypoint command failed", started=0.0, ended=65.0),
        job("demo-2", "RUNNING", message="sft step 3/60, 2 min 00 s left", started=100.0),
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(jobs_table(jobs, now=130.0))
    head, newest, oldest = captured.get().splitlines()
    assert head.split() == ["run", "stage", "state", "where", "took", "since", "id"]
    assert newest.startswith("demo  run    running  sft step 3/60, 2 min 00 s left")
    assert "  30 s  " in newest
    assert "entrypoint" not in oldest
    assert "1 min 05 s" in oldest
    assert oldest.rstrip().endswith("demo-1")


def test_the_address_is_the_flags_then_the_environments(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert dashboard_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster itself: it takes no jobs
    assert dashboard_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    assert dashboard_url(None) == "http://10.0.0.1:8265"
    assert dashboard_url("https://head/") == "https://head"
    with pytest.raises(ClusterError, match="not the URL of a dashboard"):
        dashboard_url("10.0.0.1:6379")
