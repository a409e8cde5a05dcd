"""What a worker group does when a worker fails: restarts for deaths, none for our own errors."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pear_ray.config.sections import ClusterConfig
from pear_ray.distributed.train_group import run_train_group
from pear_ray.errors import TrainingError
from pear_ray.telemetry.metrics_log import EventRecord, read_metrics

CLUSTER = ClusterConfig(num_trainers=2, cpus_per_worker=0.5, max_failures=2)


def attempts(folder: Path) -> list[str]:
    return (folder / "attempts").read_text(encoding="utf-8").split()


def run(loop: Any, folder: Path) -> None:
    run_train_group(loop, {"folder": folder}, cluster=CLUSTER, stage_dir=folder)


def test_our_own_error_ends_the_group_at_once(local_ray: None, tmp_path: Path) -> None:
    """The other rank waits in a collective that will never come: it must not be waited for."""

    def loop(job: dict[str, Any]) -> None:
        import torch.distributed as dist

        if dist.get_rank() == 0:
            with (job["folder"] / "attempts").open("a", encoding="utf-8") as file:
                file.write("x\n")
            raise TrainingError("planted: the gradient norm is nan")
        dist.barrier()

    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingError, match=r"^planted: the gradient norm is nan$"):
        run(loop, tmp_path)
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ray Train would keep its own
    assert attempts(tmp_path) == ["x"]


@pytest.fixture
def none_to_spare(local_ray: None) -> Iterator[None]:
    """The other CPU of the two is taken: what a failed group keeps, the next one lacks."""
    gc.collect()  # actors that the errors of earlier tests hold
    taken = ray.util.placement_group([{"CPU": 1}])
    assert taken.wait(60)
    yield
    ray.util.remove_placement_group(taken)


@pytest.mark.parametrize("lives_s", [0, 3])
def test_a_worker_that_dies_is_restarted(
    none_to_spare: None, tmp_path: Path, lives_s: float
) -> None:
    """Whether it dies while Ray Train still starts the group, or later."""

    def loop(job: dict[str, Any]) -> None:
        import torch.distributed as dist

        if dist.get_rank() == 0:
            with (job["folder"] / "attempts").open("a", encoding="utf-8") as file:
                file.write("x\n")
            if (job["folder"] / "attempts").read_text(encoding="utf-8").count("x") == 1:
                time.sleep(lives_s)
                os._exit(9)
        dist.barrier()

    run(loop, tmp_path)
    assert attempts(tmp_path) == ["x", "x"]


@pytest.mark.parametrize("on_stall", ["warn", "fail"])
def test_a_rank_that_sleeps_while_another_waits_for_it(
    local_ray: None, tmp_path: Path, on_stall: str
) -> None:
    """Both ranks say where they are; with `fail` the run ends with the first to say so."""

    def loop(job: dict[str, Any]) -> None:
        import torch.distributed as dist

        from pear_ray.distributed.watchdog import Watchdog
        from pear_ray.telemetry.metrics_log import MetricsLog

        log = MetricsLog(job["folder"], run="test", stage="rl", attempt=1)
        with Watchdog(job["cluster"], job["folder"], rank=dist.get_rank(), log=log) as watchdog:
            for phase in ("sample", "train", "sample"):
                watchdog.enter(phase)
            if dist.get_rank() == 1:
                time.sleep(6 if job["cluster"].on_stall == "warn" else 600)
            watchdog.enter("train")
            dist.barrier()
        (job["folder"] / "model").mkdir(exist_ok=True)

    cluster = CLUSTER.model_copy(update={"stall_timeout_s": 2.0, "on_stall": on_stall})
    job = {"folder": tmp_path, "cluster": cluster}
    if on_stall == "fail":
        with pytest.raises(TrainingError, match=r"^rank . has been in phase .*on_stall=fail\)$"):
            run_train_group(loop, job, cluster=cluster, stage_dir=tmp_path)
        told = min(each.stat().st_mtime for each in (tmp_path / "stacks").iterdir())
        assert time.time() - told < 60
    else:
        run_train_group(loop, job, cluster=cluster, stage_dir=tmp_path)
        said = sorted(
            each.message
            for each in read_metrics(tmp_path / "metrics.jsonl")
            if isinstance(each, EventRecord)
        )
        assert [each.partition(" for ")[0] for each in said] == [
            "rank 0 has been in phase 'train'",
            "rank 1 has been in phase 'sample'",
        ]
        (slept,) = (tmp_path / "stacks").glob("rank-1-*.txt")
        assert "in loop" in slept.read_text(encoding="utf-8")
        (waited,) = (tmp_path / "stacks").glob("rank-0-*.txt")
        assert "barrier" in waited.read_text(encoding="utf-8")
