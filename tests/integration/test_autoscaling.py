"""With Ray's autoscaler: who waits says so, scoring takes what comes, nodes are given back."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_cluster import ROOT, FakeCluster, node_type

from pear_ray.artifacts.tables import SCORED, read_table
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, read_metrics

IDLE_S = 6.0  # after which a node is given back
NUM_ROWS = 4000
RUN_FILE = """
name: grown
models: {policy: embedded:student, behavior: embedded:teacher, dtype: float32, max_model_len: 160}
corpus: {kind: dataset, path: rows.jsonl}
score: {rows_per_block: 16}
sft: {optimizer: {learning_rate: 1e-3}}
rl:
  problems: {games: [{name: chain_sum}], size: 8}
  optimizer: {learning_rate: 1e-3}
  num_steps: 1
evaluate: {problems: {games: [{name: chain_sum}], size: 8}}
# An engine of scoring asks for half of a worker's CPUs: for one, which is all that a node has.
cluster: {address: %s, num_samplers: 2, min_samplers: 1, cpus_per_worker: 2, num_trainers: 1}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    """No node at first, and at most two that stay and two that may be taken back."""
    market = "ray.io/market-type"
    types = {
        "gpu": node_type(2, {market: "on-demand"}, CPU=1, GPU=1),
        "spot": node_type(2, {market: "spot"}, CPU=1),
    }
    with FakeCluster(types, idle_s=IDLE_S) as cluster:
        yield cluster


def within(seconds: float, wanted: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (there := wanted()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return there


def starting(said: list[str], words: str) -> bool:
    """Whether `words` was said, and that a node is on its way; its devices are known later."""
    wanted = rf"(waiting: )?{words}, 1 (node of (gpu|spot) )?starting"
    return any(re.fullmatch(wanted, each) for each in said)


def test_training_waits_with_words_and_what_cannot_be_had_is_refused(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    script, file = Path(__file__).with_name("growing.py"), tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(script), cluster.address, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))

    said, after_s = found["too many"]
    assert "gpu has 1 GPU, 1 CPU, at most 2 nodes; spot has 1 CPU, at most 2 nodes, spot" in said
    assert "at most 2 of 4 would fit; lower cluster.num_trainers=4 to 2" in said
    assert "cluster.training_nodes=any" in said
    assert after_s < 30  # a task looks at the autoscaler's settings
    assert "no node of it has room for one" in found["too large"][0]

    said, gpus = found["the first"]
    # Which nodes is said once the autoscaler's settings are known: a node may be there before.
    assert starting(said, "waiting for 1 CPU( on on-demand nodes)?: cluster has 0"), said
    assert gpus == [1.0]
    said, gpus = found["the second"]
    assert starting(said, "waiting for 2 GPU: cluster has 1"), said
    assert said[-1].startswith("waited: the devices are there, after ")
    assert gpus == [1.0, 1.0]
    assert within(60, lambda: cluster.num_nodes() == 0), cluster.log("monitor.log")


def test_scoring_grows_with_its_queue_and_gives_nodes_back(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "rows.jsonl")
    (tmp_path / "grown.yaml").write_text(RUN_FILE % cluster.address, encoding="utf-8")
    folder = tmp_path / "outputs" / "grown"
    assert pear(tmp_path, "collect", "grown.yaml").wait(120) == 0
    assert within(60, lambda: cluster.num_nodes() == 0)  # what collecting had is given back
    scoring = pear(tmp_path, "score", "grown.yaml")
    status, seen, held = "", set(), None
    deadline = time.monotonic() + 240
    while scoring.poll() is None:
        assert time.monotonic() < deadline, cluster.log("monitor.log")
        if not status and '"waiting"' in (folder / "metrics.jsonl").read_text(encoding="utf-8"):
            looking = pear(tmp_path, "status", "outputs/grown", stdout=subprocess.PIPE)
            status = looking.communicate()[0].decode()
        seen.add(tuple(cluster.nodes_with("BehaviorScorer")))
        held = hold_first_until_second_scores(cluster, folder / "score/blocks", held)
        time.sleep(0.2)
    assert scoring.returncode == 0, (tmp_path / "said").read_text(encoding="utf-8")
    assert held is not None
    assert not held.is_stopped  # the second scored while the first could not
    # What may be taken back will do, and leaves the GPUs to those who want them.
    assert max(seen, key=len) == ("spot", "spot")
    assert not any("gpu" in each for each in seen)
    assert "score is waiting for 1 CPU: cluster has 0" in " ".join(status.split())

    records = [r for r in read_metrics(folder / "metrics.jsonl") if isinstance(r, EventRecord)]
    waits = [r.message for r in records if r.event is EventKind.WAITING]
    assert starting(waits, "waiting for 1 CPU: cluster has 0"), waits
    assert any(r.event is EventKind.WAITED for r in records)
    assert waits[-1] in (tmp_path / "said").read_text(encoding="utf-8")  # as a job log has it
    ids = [
        example
        for file in sorted((folder / "score" / "scored").iterdir())
        for example in read_table(file, SCORED)["example_id"].to_pylist()
    ]
    assert len(ids) == len(set(ids)) == NUM_ROWS
    assert within(60, lambda: cluster.num_nodes() == 0), cluster.log("monitor.log")


@dataclass
class Held:
    """The first scorer, stopped when `num_blocks` were there."""

    process: psutil.Process
    num_blocks: int
    is_stopped: bool = True


def hold_first_until_second_scores(
    cluster: FakeCluster, blocks: Path, held: Held | None
) -> Held | None:
    """Have a queue that outlasts the 10 to 20 s after which Ray Data asks for a node.

    Ray Data sees a scorer that is busy for as long; a fast machine would be done before.
    """
    num_blocks = sum(1 for _ in blocks.glob("*/*.parquet"))
    scorers = cluster.processes_of("BehaviorScorer")
    if held is None and num_blocks and len(scorers) == 1:
        scorers[0].suspend()
        time.sleep(0.5)  # what was being written is there
        return Held(scorers[0], sum(1 for _ in blocks.glob("*/*.parquet")))
    if held is not None and held.is_stopped and num_blocks > held.num_blocks:
        held.process.resume()
        held.is_stopped = False
    return held


def write_corpus(path: Path) -> None:
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as rows:
        for _ in range(NUM_ROWS):
            ids = generator.integers(5, 60, size=40).tolist()
            row = {"token_ids": ids, "loss_mask": [False] * 5 + [True] * 35}
            rows.write(json.dumps(row) + "\n")


def pear(folder: Path, *arguments: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """A command in `folder`; what it says goes to the file `said` unless `stdout` is given."""
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "pear_ray", *arguments],
            cwd=folder,
            stdout=said if stdout is None else stdout,
            stderr=subprocess.STDOUT if stdout is None else None,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
