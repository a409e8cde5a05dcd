"""A run on several hosts that lose one another: what is left is what an undisturbed run leaves.

Hosts are network namespaces with an address and a /tmp of their own; the run's folder is the only
thing that they share. A host that is lost is replaced by another one, as an autoscaler would.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from net_hosts import HEAD, PORT, ROOT, Hosts, cluster_of, why_not
from safetensors.torch import load_file

from pear_ray.artifacts.tables import CORPUS, SCORED, read_table
from pear_ray.telemetry.metrics_log import (
    EventKind,
    EventRecord,
    MetricRecord,
    latest_by_step,
    read_metrics,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

RUN_S = 900
CHECKPOINT_EVERY = 2
# By stage: the step after which a host is lost. Not one that a checkpoint follows.
STRUCK_AFTER = {"score": 1, "sft": 3, "rl": 3}
COMPARED = {
    "sft": ("sft/weighted_loss", "sft/grad_norm", "sft/effective_sample_size"),
    "rl": ("rl/reward/mean", "rl/loss", "rl/grad_norm", "rl/mismatch/mean_gap", "rl/entropy"),
}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """A head without work and two workers."""
    with cluster_of("a", "b") as hosts:
        yield hosts


class Losses:
    """Loses a host of the cluster in the middle of each stage named, and starts another."""

    def __init__(self, hosts: Hosts, how: Mapping[str, str]) -> None:
        self.hosts, self.how = hosts, dict(how)
        self.lost: dict[str, str] = {}
        self.committed: dict[str, int] = {}  # by stage: the step of its last checkpoint then
        self._spare = iter("cdefgh")

    def look(self, folder: Path) -> None:
        """Strike if the run has got where a loss is due."""
        for stage, how in self.how.items():
            if stage in self.lost or not self._is_due(folder, stage):
                continue
            self.committed[stage] = committed_step(folder / stage)
            host = self.hosts.workers[0]
            self.hosts.kill(host) if how == "kill" else self.hosts.cut_off(host)
            self.lost[stage] = f"{how} {host}"
            self.hosts.start_worker(next(self._spare))

    def _is_due(self, folder: Path, stage: str) -> bool:
        if stage == "score":
            return (
                len(list((folder / "score" / "blocks").glob("*/*.parquet"))) >= STRUCK_AFTER[stage]
            )
        return committed_step(folder / stage) > 0 and any(
            isinstance(each, MetricRecord)
            and each.stage == stage
            and each.step >= STRUCK_AFTER[stage]
            for each in read_metrics(folder / "metrics.jsonl")
        )


def pear(hosts: Hosts, *arguments: str, losses: Losses | None = None, folder: Path) -> None:
    """Run a `pear` command on the head, with `losses` on the way."""
    log = hosts.shared / "said"
    command = [sys.executable, "-m", "pear_ray", *arguments, f"cluster.address={HEAD}:{PORT}"]
    process = hosts.run("head", command, log=log)
    deadline = time.monotonic() + RUN_S
    while process.poll() is None and time.monotonic() < deadline:
        if losses is not None and (folder / "metrics.jsonl").exists():
            losses.look(folder)
        time.sleep(0.1)
    said = log.read_text(encoding="utf-8")
    assert process.poll() == 0, said[-4000:]
    print(said)


def small_run(**changes: dict[str, Any]) -> dict[str, Any]:
    """A small version of the demo's run file."""
    tree = yaml.safe_load((ROOT / "jobs" / "runs" / "demo.yaml").read_text(encoding="utf-8"))
    tree["cluster"] = {"max_failures": 3}
    tree["score"] = {"rows_per_block": 4}
    checkpoints = {"checkpoint_every": CHECKPOINT_EVERY}
    tree["sft"] |= checkpoints | {"num_epochs": 1, "global_batch_size": 8}
    tree["rl"] |= checkpoints | {"num_steps": 6}
    tree["corpus"]["problems"]["size"] = 160
    tree["rl"]["problems"]["size"] = 96
    tree["evaluate"]["problems"]["size"] = 16
    return tree | changes


def check_scored_once(folder: Path) -> None:
    """Every row of the corpus is in the scored table, once."""
    corpus = column(folder / "collect" / "corpus", CORPUS)
    scored = column(folder / "score" / "scored", SCORED)
    assert sorted(scored) == sorted(corpus)
    assert len(set(scored)) == len(scored) > 0


def column(folder: Path, schema: Any) -> list[str]:
    return [
        one
        for file in sorted(folder.glob("*.parquet"))
        for one in read_table(file, schema)["example_id"].to_pylist()
    ]


def committed_step(stage_dir: Path) -> int:
    """The step of the last checkpoint that Ray Train knows of, which is a moment after its save."""
    try:
        text = (stage_dir / "train" / "checkpoint_manager_snapshot.json").read_text()
        return json.loads(text)["latest_checkpoint_result"]["metrics"]["step"]
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is being written
        return 0


def check_nothing_lost(folder: Path, stage: str, losses: Losses) -> None:
    """After the loss the stage went on from its last checkpoint, and from nowhere before it."""
    steps = [
        each.step
        for each in read_metrics(folder / "metrics.jsonl")
        if isinstance(each, MetricRecord) and each.stage == stage and each.step > 0
    ]
    again = next((n for n in range(1, len(steps)) if steps[n] <= steps[n - 1]), None)
    assert again is not None, f"no step of {stage} was done again: {steps}"
    before = steps[again] - 1
    assert before % CHECKPOINT_EVERY == 0, steps
    assert 0 < losses.committed[stage] <= before <= steps[again - 1], (losses.committed, steps)
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))


def check_same(undisturbed: Path, struck: Path, stage: str) -> None:
    """Numbers of every step and the model, bit by bit."""
    assert steps_of(struck, stage) == steps_of(undisturbed, stage)
    weights, same = (
        load_file(folder / stage / "model" / "model.safetensors")
        for folder in (undisturbed, struck)
    )
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def steps_of(folder: Path, stage: str) -> dict[int, list[float]]:
    records = latest_by_step(read_metrics(folder / "metrics.jsonl"), stage)
    return {
        each.step: [each.metrics[name] for name in COMPARED[stage]]
        for each in records
        if COMPARED[stage][0] in each.metrics
    }


def waits(folder: Path) -> list[str]:
    return [
        each.message
        for each in read_metrics(folder / "metrics.jsonl")
        if isinstance(each, EventRecord) and each.event is EventKind.WAITING
    ]


def test_scoring_and_sft_outlive_a_host_each(hosts: Hosts) -> None:
    """One is killed and one is cut off; the rest of the pipeline is in the slow test."""
    generator = np.random.default_rng(0)
    with (hosts.shared / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for _ in range(160):
            ids = generator.integers(5, 60, size=40).tolist()
            row = {"token_ids": ids, "loss_mask": [False] * 5 + [True] * 35}
            rows.write(json.dumps(row) + "\n")
    tree = small_run(corpus={"kind": "dataset", "path": "rows.jsonl"})
    (hosts.shared / "demo.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    folder = hosts.shared / "outputs" / "demo"
    losses = Losses(hosts, {"score": "kill", "sft": "cut"})
    for stage in ("collect", "score", "sft"):
        pear(hosts, stage, "demo.yaml", losses=losses, folder=folder)
    assert set(losses.lost) == {"score", "sft"}
    check_scored_once(folder)
    check_nothing_lost(folder, "sft", losses)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run on this machine alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "demo.yaml").write_text(yaml.safe_dump(small_run()), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pear_ray", "run", "demo.yaml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "outputs" / "demo"


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_S)
@pytest.mark.parametrize(
    "how",
    [
        {"score": "kill", "sft": "cut", "rl": "kill"},
        {"score": "cut", "sft": "kill", "rl": "cut"},
    ],
    ids=["kill-cut-kill", "cut-kill-cut"],
)
def test_a_run_that_loses_hosts_leaves_what_one_on_one_machine_does(
    undisturbed: Path, hosts: Hosts, how: dict[str, str]
) -> None:
    (hosts.shared / "demo.yaml").write_text(yaml.safe_dump(small_run()), encoding="utf-8")
    struck = hosts.shared / "outputs" / "demo"
    losses = Losses(hosts, how)
    pear(hosts, "run", "demo.yaml", losses=losses, folder=struck)
    assert losses.lost.keys() == how.keys()
    check_scored_once(struck)
    assert column(struck / "collect" / "corpus", CORPUS) == column(
        undisturbed / "collect" / "corpus", CORPUS
    )
    for stage in ("sft", "rl"):
        check_nothing_lost(struck, stage, losses)
        check_same(undisturbed, struck, stage)
    assert (struck / "report" / "manifest.json").exists()
