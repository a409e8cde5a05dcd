"""Runs as jobs of a cluster with token authentication: sent, followed, attached to, stopped."""

import http.server
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray_head import ROOT, Head, Relay, ray_head
from safetensors.numpy import load_file

from pear_ray.telemetry.metrics_log import MetricRecord, read_metrics

RUN_FILE = "jobs/runs/suffix.yaml"
SECRET = "hf_not_a_real_token_but_nobodys_business"
SETTINGS = ("sft.num_epochs=60", "sft.checkpoint_every=1000", "name=job")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


@pytest.fixture
def relay(head: Head) -> Iterator[Relay]:
    between = Relay(head.dashboard)
    yield between
    between.close()


def submitted(folder: Path, *more: str) -> list[str]:
    return ["submit", RUN_FILE, f"output_dir={folder}", *SETTINGS, *more]


def read_until(process: "subprocess.Popen[str]", pattern: str) -> str:
    """What a command wrote up to the line with `pattern`."""
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"ended without {pattern!r}: {seen}")


def driver_of(run_dir: Path) -> psutil.Process:
    lock = json.loads((run_dir / "run.lock").read_text(encoding="utf-8"))
    return psutil.Process(lock["pid"])


def test_a_run_is_sent_followed_attached_to_and_stopped(
    head: Head, relay: Relay, tmp_path: Path
) -> None:
    head.environment["HF_TOKEN"] = SECRET
    began = time.monotonic()
    client = head.start(*submitted(tmp_path, "--follow", "--env", "HF_TOKEN"), address=relay.url)
    seen = read_until(client, "collect started")
    print(f"first stage's line after {time.monotonic() - began:.1f} s")
    assert "job-1" in seen
    assert f"{relay.url}/#/jobs/job-1" in seen
    seen += read_until(client, r"sft step \d+/")

    attached, other, stage, listed, logged = head.run_all(
        submitted(tmp_path),
        submitted(tmp_path, "seed=7"),
        submitted(tmp_path, "--stage", "sft"),
        ["jobs"],
        ["logs", "job"],
    )
    assert attached[0] == 0
    assert "already running as job job-1; not started again" in attached[2]
    assert other[0] == 2
    assert re.search(r"^ClusterError: run 'job' is running as job job-1.*its config is", other[2])
    assert stage[0] == 2
    assert "its stage is run, this one's sft" in stage[2]
    assert re.search(r"job +run +running +sft \d+/\d+, .*sft/weighted_loss", listed[1])
    assert "sft step" in logged[1]

    relay.cut(for_s=1.5)  # the follower finds the line again, and the log where it was
    seen += read_until(client, "the log goes on")
    seen += read_until(client, r"sft step \d+/")
    stopping = head.start("stop", "job")
    seen += client.communicate(timeout=120)[0]
    assert client.returncode == 3
    assert "stopped at a checkpoint, as SIGTERM asked" in seen
    assert stopping.wait(timeout=60) == 0
    assert "stopped after" in stopping.communicate()[0]
    steps = [int(n) for n in re.findall(r"sft step (\d+)/", seen)]
    assert steps == sorted(set(steps)), "a line was lost or came twice"
    assert len(seen.split("collect started")) == 2

    done = [r.step for r in read_metrics(tmp_path / "job" / "metrics.jsonl") if of_sft(r)]
    kept = [path.name for path in (tmp_path / "job" / "sft" / "train").glob("step-*")]
    assert kept == [f"step-{done[-1]:06d}"]
    check_secret(head, tmp_path, seen)


def check_secret(head: Head, folder: Path, seen: str) -> None:
    """It is in nothing that the run, its log or its metadata hold.

    Ray itself writes a job's environment into one log of each machine (docs/jobs.md).
    """
    assert SECRET not in seen
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    listed, logged = head.run_all(["jobs"], ["logs", "job"])
    assert SECRET not in "".join((*listed[1:], *logged[1:]))
    logs = head.folder / "r" / "session_latest" / "logs"
    named = {p.name for p in logs.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()}
    assert named <= {"runtime_env_agent.log"}


def of_sft(record: object) -> bool:
    return isinstance(record, MetricRecord) and record.stage == "sft"


def test_what_cannot_be_sent_is_one_error_at_once(head: Head, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "weights").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    (tree / "mine.yaml").write_text((ROOT / RUN_FILE).read_text().replace("suffix", "mine", 1))
    with (tree / "weights" / "model.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    mine = ["submit", str(tree / "mine.yaml"), f"output_dir={tmp_path}"]
    old = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OldDashboard)
    threading.Thread(target=old.serve_forever, daemon=True).start()
    began = time.monotonic()
    results = head.run_all(
        mine,
        [*mine, "--address", "http://127.0.0.1:1"],
        [*mine, "--address", f"http://127.0.0.1:{old.server_port}"],
        [*mine, "--address", f"127.0.0.1:{head.gcs}"],
        [*mine, "--env", "NOT_SET_ANYWHERE"],
        [*mine, "sft.num_epoch=2"],
        ["submit", RUN_FILE],
        ["logs", "nobody"],
    )
    wrong = head.run_all(["jobs"], RAY_AUTH_TOKEN="not the cluster's")
    assert time.monotonic() - began < 60
    old.shutdown()
    old.server_close()
    wanted = [
        r"InputError: .*101\.\d MiB would be sent.* up to 100\.0 MiB; .* weights \(101\.0 MiB\)",
        r"ClusterError: no Ray dashboard answers at http://127\.0\.0\.1:1 ",
        rf"ClusterError: .* runs Ray 2\.9\.0, and this machine has Ray {ray.__version__}",
        r"ClusterError: --address .* not the URL of a dashboard.* http://HOST:8265",
        r"ConfigError: --env NOT_SET_ANYWHERE: no variable of that name here",
        r"ConfigError: .*num_epoch.*\n?.*did you mean",
        r"ConfigError: output_dir='outputs' is relative",
        r"ClusterError: nobody: no job and no run of that name",
        r"ClusterError: .* does not let us in: the token of RAY_AUTH_TOKEN .* not the cluster's",
    ]
    for (code, out, err), pattern in zip([*results, *wrong], wanted, strict=True):
        assert code == 2, err
        assert re.search(pattern, err, re.DOTALL), err
        assert out == ""


class OldDashboard(http.server.BaseHTTPRequestHandler):
    """A cluster of long ago, as far as a client asks it."""

    def do_GET(self) -> None:
        body = b'{"version": "4", "ray_version": "2.9.0", "ray_commit": "", "session_name": ""}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_result(head: Head, tmp_path: Path) -> None:
    """Sent, followed, its driver killed with SIGKILL, and sent again; against one left alone."""
    short = ("sft.num_epochs=4", "sft.checkpoint_every=2", "rl.num_steps=2")
    short += ("evaluate.num_samples=8",)
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    undisturbed = head.start(*submitted(calm, *short, "name=calm", "--follow"))
    text = undisturbed.communicate(timeout=500)[0]
    assert undisturbed.returncode == 0, text

    client = head.start(*submitted(struck, *short, "name=struck", "--follow"))
    read_until(client, r"sft step [5-9]\d*/")
    driver_of(struck / "struck").send_signal(signal.SIGKILL)
    text = client.communicate(timeout=120)[0]
    assert client.returncode in {1, 128 + signal.SIGKILL}, text
    assert "submitted again it goes on" in text

    again = head.start(*submitted(struck, *short, "name=struck", "--follow"))
    text = again.communicate(timeout=500)[0]
    assert again.returncode == 0, text
    assert "struck-2" in text
    assert "sft started: goes on where it stopped" in text
    for stage in ("sft", "rl"):
        one, other = (
            load_file(folder / stage / "model" / "model.safetensors")
            for folder in (calm / "calm", struck / "struck")
        )
        assert all((one[name] == other[name]).all() for name in one)
