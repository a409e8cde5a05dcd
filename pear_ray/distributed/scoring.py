"""Behavior log-probs of a corpus: Ray Data over engine actors, resumable block by block."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ActorPoolStrategy, SaveMode

from pear_ray.artifacts.tables import SCORED
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import (
    engine_spec,
    num_threads,
    worker_environment,
    worker_resources,
)
from pear_ray.distributed.samplers import engine_errors
from pear_ray.errors import EngineError

REPORT_S = 1.0
IO_CPUS = 0.25  # of a CPU per writing task, so that engines on few cores cannot starve them
CPU_SHARE_LEFT = 0.5  # of one worker's CPUs, so that Ray Data's reading and writing find a place


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringJob:
    """What to score, with what, and where to."""

    config: RunConfig
    model: Path
    corpus: Path
    output: Path


class BehaviorScorer:
    """One engine on the behavior model, as an actor of a Ray Data pool."""

    def __init__(self, job: ScoringJob) -> None:
        import torch  # noqa: PLC0415 - the driver that names this class needs no torch

        from pear_ray.engines.vllm.engine import VllmEngine  # noqa: PLC0415 - nor vLLM

        torch.set_num_threads(num_threads(job.config.cluster))
        self._engine = VllmEngine(engine_spec(job.config, job.model))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows with `behavior_logprobs`, 0 outside the loss mask.

        Raises:
            EngineError: A log-prob of a loss token is not finite, or above 0.
        """
        rows = batch.select(["example_id", "source", "token_ids", "loss_mask"]).to_pylist()
        logprobs = self._engine.score([row["token_ids"] for row in rows])
        for row, values in zip(rows, logprobs, strict=True):
            row["behavior_logprobs"] = _masked(values, row)
        return pa.Table.from_pylist(rows, schema=SCORED)


def score_corpus(job: ScoringJob, *, progress: Callable[[int], None]) -> float:
    """Score every row that an earlier, killed attempt did not; the seconds it took.

    Rows already in `job.output` stay as they are, so a run killed anywhere loses the blocks in
    flight.
    Ray Data's own checkpointing is not used: its filter actors need CPUs of their own, and on two
    cores a resumed run waited for them for ever.

    Args:
        job: What to score.
        progress: Called about every second with the rows written so far.
    """
    started = time.monotonic()
    remaining = _remaining(job)
    if len(remaining) == 0:
        return time.monotonic() - started
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own view shows progress
    with engine_errors("scoring"), _reporting(job.output, progress):
        _dataset(job, remaining).write_parquet(
            str(job.output), mode=SaveMode.APPEND, ray_remote_args={"num_cpus": IO_CPUS}
        )
    return time.monotonic() - started


def _remaining(job: ScoringJob) -> pa.Table:
    """The corpus rows not scored yet; half-written files of a killed attempt are removed."""
    scored: set[str] = set()
    for file in sorted(job.output.rglob("*.parquet")):
        try:
            scored.update(pq.read_table(file, columns=["example_id"])["example_id"].to_pylist())
        except (pa.ArrowInvalid, OSError):
            file.unlink()
    corpus = pq.read_table(job.corpus, columns=["example_id", "source", "token_ids", "loss_mask"])
    keep = [example_id not in scored for example_id in corpus["example_id"].to_pylist()]
    return corpus.filter(pa.array(keep, pa.bool_()))


def _dataset(job: ScoringJob, remaining: pa.Table) -> ray.data.Dataset:
    wanted = worker_resources(job.config.cluster)
    # A small corpus is spread over all actors rather than filling one block of one of them.
    share = -(-len(remaining) // job.config.cluster.num_samplers)
    rows_per_block = min(job.config.score.rows_per_block, share)
    blocks = [
        remaining.slice(begin, rows_per_block).combine_chunks()
        for begin in range(0, len(remaining), rows_per_block)
    ]
    return ray.data.from_arrow(blocks).map_batches(
        BehaviorScorer,
        fn_constructor_args=(job,),
        batch_size=None,  # one block, one call
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(job.config.cluster.num_samplers, len(blocks))),
        num_cpus=wanted["CPU"] * CPU_SHARE_LEFT,
        num_gpus=wanted.get("GPU"),
        runtime_env={"env_vars": worker_environment(job.config.cluster)},
    )


@contextlib.contextmanager
def _reporting(folder: Path, progress: Callable[[int], None]) -> Iterator[None]:
    """Call `progress` with the rows in `folder` about every second, from a thread."""
    stop = threading.Event()

    def watch() -> None:
        counted: dict[Path, int] = {}
        while not stop.wait(REPORT_S):
            for file in folder.rglob("*.parquet"):
                # A file is being written while its footer is missing; it counts next time.
                with contextlib.suppress(pa.ArrowInvalid, OSError):
                    counted.setdefault(file, pq.read_metadata(file).num_rows)
            progress(sum(counted.values()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


MAX_LOG_PROB = 1e-4  # a certain token's, after float32 rounding


def _masked(values: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    mask = np.asarray(row["loss_mask"], dtype=bool)
    trained = values[mask]
    if not (np.isfinite(trained).all() and (trained <= MAX_LOG_PROB).all()):
        raise EngineError(
            f"example {row['example_id']}: the engine gave log-probs that are not finite or above "
            f"0 (min {trained.min()}, max {trained.max()}); check the behavior model and its dtype"
        )
    return np.where(mask, values, 0.0).astype(np.float32)
