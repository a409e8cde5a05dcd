"""A run kept on an S3 server, whose machine goes away: another one with an empty disk goes on."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from s3_server import SECRET, S3Server, environment, s3_server
from safetensors.numpy import load_file

from pear_ray.artifacts.stored.location import CACHE_VARIABLE
from pear_ray.telemetry.metrics_log import EventRecord, MetricRecord, read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
NUM_STEPS = 48
SNAPSHOT = "team/suffix/sft/train/checkpoint_manager_snapshot.json"
# The suffix game's corpus brings its log-probs: no engine before RL.
OVERRIDES = (
    "sft.checkpoint_every=4",
    "rl.num_steps=2",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "rl.checkpoint_every=1",
    "rl.max_tokens=96",
    "evaluate.num_samples=1",
    "evaluate.k=[1]",
    "evaluate.suites=[]",
    "evaluate.checkpoints=[rl]",
    "evaluate.max_tokens=48",
    "cluster.cpus_per_worker=1",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        running.client().create_bucket(Bucket="runs")
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray that no driver takes along when it dies."""
    is_there = ray.is_initialized()
    if not is_there:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    if not is_there:
        ray.shutdown()


def start(
    stage: str, output_dir: str, cache: Path, cluster: str, *flags: str
) -> subprocess.Popen[str]:
    """`pear STAGE` on a machine whose disk is the folder `cache`."""
    cache.mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pear_ray", stage, "jobs/runs/suffix.yaml"),
            *(f"output_dir={output_dir}", *OVERRIDES, *flags),
        ],
        cwd=ROOT,
        env=environment(cache) | {"RAY_ADDRESS": cluster, CACHE_VARIABLE: str(cache)},
        stdout=(cache / "driver.log").open("a", encoding="utf-8"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_to_end(stage: str, output_dir: str, cache: Path, cluster: str, *flags: str) -> str:
    driver = start(stage, output_dir, cache, cluster, *flags)
    code = driver.wait(timeout=TIMEOUT_S)
    said = (cache / "driver.log").read_text(encoding="utf-8")
    assert code == 0, said[-4000:]
    return said


def working_copy(cache: Path) -> Path:
    (found,) = cache.glob("runs/*/suffix")
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_elsewhere_to_the_same_bits_and_is_then_skipped(
    server: S3Server, cluster: str, tmp_path: Path
) -> None:
    location, client = server.location("runs/team"), server.client()
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    driver = start("run", location, first, cluster)
    deadline = time.monotonic() + TIMEOUT_S
    while not client.list_objects_v2(Bucket="runs", Prefix=SNAPSHOT).get("KeyCount"):
        assert driver.poll() is None, (first / "driver.log").read_text(encoding="utf-8")[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    driver.kill()
    driver.wait()
    before = working_copy(first)
    # Kept for the undisturbed run: what SFT was made of, with nothing of SFT.
    kept = tmp_path / "kept"
    shutil.copytree(before, kept, ignore=shutil.ignore_patterns("sft", "run.lock"))
    shutil.rmtree(first, ignore_errors=True)  # its workers may still write there

    said = run_to_end("run", location, second, cluster)
    assert "sft started: goes on where it stopped" in said
    records = read_metrics(working_copy(second) / "metrics.jsonl")
    steps = [r for r in records if isinstance(r, MetricRecord) and r.stage == "sft"]
    assert next(r.step for r in steps if r.attempt == 1) == 1
    again = [r.step for r in steps if r.attempt == 2]
    assert again[0] > 1, "gone on from a checkpoint of the store"
    assert again[0] % 4 == 1
    assert again[-1] == NUM_STEPS

    run_to_end(
        "sft", str(tmp_path / "undisturbed"), tmp_path / "none", cluster, "--reuse", str(kept)
    )
    weights, again = (
        load_file(folder / "sft" / "model" / "model.safetensors")
        for folder in (tmp_path / "undisturbed" / "suffix", working_copy(second))
    )
    assert weights.keys() == again.keys()
    assert all((weights[name] == again[name]).all() for name in weights)

    since = server.num_requests()
    run_to_end("run", location, third, cluster)
    made = read_metrics(working_copy(third) / "metrics.jsonl")
    events = [each for each in made if isinstance(each, EventRecord) and each.attempt == 3]
    assert {str(each.event) for each in events} == {"stage_skipped"}
    assert len(events) == 6
    puts = {
        line.partition("/suffix/")[2] for line in server.requests(since) if line.startswith("PUT")
    }
    puts = {name for name in puts if not name.startswith(".")}
    assert puts == {"metrics.jsonl", "config.yaml", "logs/attempt-3/attempt.json"}
    assert not list(working_copy(third).rglob("*.safetensors"))
    check_seen_from_outside(server, tmp_path)


def check_seen_from_outside(server: S3Server, folder: Path) -> None:
    """`pear status` of the run in the store; and no secret is in any file or message."""
    seen = subprocess.run(
        [sys.executable, "-m", "pear_ray", "status", server.location("runs/team/suffix")],
        env=environment(folder) | {CACHE_VARIABLE: str(folder / "reader")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "finished" in seen.stdout
    everything = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in [*everything, seen.stdout.encode()])
