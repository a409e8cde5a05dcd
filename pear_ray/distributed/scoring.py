"""Behavior log-probs of a corpus: Ray Data over engine actors, each block written once."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from pear_ray.artifacts import scores
from pear_ray.artifacts.scores import Block, Scores
from pear_ray.artifacts.tables import CORPUS, read_table
from pear_ray.config.run import RunConfig
from pear_ray.corpus.rows import MAX_LOG_PROB
from pear_ray.distributed.capacity import (
    CPU_SHARE_LEFT,
    engine_resources,
    engine_spec,
    num_threads,
    worker_environment,
)
from pear_ray.distributed.failures import engine_errors, quiet_ray_data
from pear_ray.distributed.in_process import is_host, kept
from pear_ray.engines.backing_off import BackingOff
from pear_ray.engines.importing import collector_paused
from pear_ray.engines.model_files import resolve_behavior, resolve_model
from pear_ray.engines.scored_ids import OwnIds, ids_to_score
from pear_ray.errors import EngineError

REPORT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringJob:
    """What to score, with what, and where to.

    Attributes:
        config: The run.
        corpus: Folder of the corpus's parts.
        folder: The stage's folder.
        models: Folder of each source's model; `*` is any source.
        keep_given: Whether rows that came with log-probs are left out.
        align: As `models.align`; `refuse` scores the corpus's own ids.
        top_k: Candidates to keep for each loss token; 0 for none.
    """

    config: RunConfig
    corpus: Path
    folder: Path
    models: dict[str, Path]
    keep_given: bool
    align: str
    top_k: int = 0


class BehaviorScorer:
    """One engine on one source's behavior model, as an actor of a Ray Data pool."""

    def __init__(self, job: ScoringJob, source: str) -> None:
        with collector_paused():
            import torch  # noqa: PLC0415 - the driver that names this class needs no torch

            from pear_ray.engines.vllm.engine import VllmEngine  # noqa: PLC0415 - nor vLLM

        config = job.config
        torch.set_num_threads(num_threads(config.cluster))
        self.job = job
        engine = VllmEngine(
            engine_spec(
                config,
                job.models[source],
                chunk_tokens=config.score.chunk_tokens,
                max_top_k=job.top_k,
                tensor_parallel_size=config.score.tensor_parallel_size,
            )
        )
        most = config.score.rows_per_block
        self._scored: Callable[[Sequence[dict[str, Any]]], list[Scores]]
        if job.top_k:
            top = BackingOff(functools.partial(engine.score_top, top_k=job.top_k), at_most=most)
            self._scored = functools.partial(OwnIds().scored_top, score=top)
        else:
            ids = ids_to_score(config, job.models[source], align=job.align)
            self._scored = functools.partial(
                ids.scored, score=BackingOff(engine.score, at_most=most)
            )
        self._read_part = functools.lru_cache(maxsize=1)(_read_part)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score and write each block named in `batch`; how many rows that were.

        Raises:
            EngineError: A log-prob of a loss token is not finite, or above 0.
        """
        return pa.table({"rows": self.score_blocks([Block(**row) for row in batch.to_pylist()])})

    def score_blocks(self, blocks: Sequence[Block]) -> list[int]:
        """Score and write each block; how many rows that were."""
        return [self._score_block(block) for block in blocks]

    def _score_block(self, block: Block) -> int:
        part = self._read_part(self.job.corpus, block.part)
        rows = scores.rows_to_score(part, block, keep_given=self.job.keep_given)
        found = self._scored(rows)
        scores.write_block(self.job.folder, block, rows, map(_checked, found, rows))
        return len(rows)


def _read_part(corpus: Path, part: str) -> pa.Table:
    return read_table(corpus / part, CORPUS)


def _checked(scored: Scores, row: dict[str, Any]) -> Scores:
    """The scores of one row, if they can be log-probs."""
    for found in (scored.logprobs, scored.top_logprobs):
        values = np.asarray([] if found is None else found)
        if not ((values > -np.inf) & (values <= MAX_LOG_PROB)).all():  # NaN is in no range
            raise EngineError(
                f"example {row['example_id']}: the engine gave log-probs that are not finite or "
                f"above 0 (between {values.min()} and {values.max()}); check the behavior model "
                "and its dtype"
            )
    return scored


def behavior_job(config: RunConfig, run_dir: Path) -> ScoringJob:
    """Scoring the run's corpus under the behavior models."""
    return ScoringJob(
        config=config,
        corpus=run_dir / "collect" / "corpus",
        folder=run_dir / "score",
        models=resolve_behavior(config.models.behavior),
        keep_given=config.score.given == "keep",
        align=config.models.align,
        top_k=config.score.top_k,
    )


def policy_job(
    config: RunConfig, run_dir: Path, *, folder: str = "diagnose", top_k: int = 0
) -> ScoringJob:
    """Scoring the run's corpus under the initial target policy, whose own ids it has."""
    return ScoringJob(
        config=config,
        corpus=run_dir / "collect" / "corpus",
        folder=run_dir / folder,
        models={scores.ANY_SOURCE: resolve_model(config.models.policy)},
        keep_given=False,
        align="refuse",
        top_k=top_k,
    )


def score_corpus(job: ScoringJob, *, progress: Callable[[int], None]) -> float:
    """Score what an earlier, killed attempt did not; rows per second of what was left.

    A block's file is there whole or not at all, so a run killed anywhere loses the blocks in
    flight, and an actor that dies is replaced and does its block again. Ray Data's own
    checkpointing is not used: its filter actors need CPUs of their own, and on two cores a resumed
    run waited for them for ever.

    Args:
        job: What to score.
        progress: Called about every second with the rows scored so far.

    Raises:
        EngineError: An engine failed, or answered nonsense.
    """
    started = time.monotonic()
    blocks = scores.plan_blocks(
        job.corpus,
        sources=list(job.models),
        rows_per_block=job.config.score.rows_per_block,
        at_least=job.config.cluster.num_samplers,
        keep_given=job.keep_given,
    )
    left = [block for block in blocks if not block.file(job.folder).exists()]
    quiet_ray_data()
    with engine_errors("scoring"), _reporting(job.folder, blocks, progress):
        # One source after the other: their engines need not fit beside each other.
        for source in job.models:
            todo = [block for block in left if block.source == source]
            if todo and is_host():
                _scorer_here(job, source).score_blocks(todo)
            elif todo:
                for _ in _dataset(job, source, todo).iter_batches(batch_size=None):
                    pass
    return sum(block.num_rows for block in left) / (time.monotonic() - started)


def _scorer_here(job: ScoringJob, source: str) -> BehaviorScorer:
    """The scorer of this process, which scores the same corpus under the same model for all runs.

    It must stay: vLLM would take what all engines of a process share along when the first ends.
    """
    key = ("scorer", job.models[source], job.top_k, job.align)
    scorer = kept(key, lambda: BehaviorScorer(job, source))
    scorer.job = job
    return scorer


def _dataset(job: ScoringJob, source: str, blocks: Sequence[Block]) -> ray.data.Dataset:
    cluster = job.config.cluster
    wanted = engine_resources(job.config, "score")
    most = min(cluster.num_samplers, len(blocks))
    least = min(cluster.min_samplers or most, most)
    rows = ray.data.from_items([asdict(block) for block in blocks], override_num_blocks=len(blocks))
    return rows.map_batches(
        BehaviorScorer,
        fn_constructor_args=(job, source),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=wanted["CPU"] * CPU_SHARE_LEFT,
        num_gpus=wanted.get("GPU"),
        runtime_env={"env_vars": worker_environment(cluster)},
    )


@contextlib.contextmanager
def _reporting(
    folder: Path, blocks: Sequence[Block], progress: Callable[[int], None]
) -> Iterator[None]:
    """Call `progress` with the rows written about every second, from a thread."""
    stop = threading.Event()

    def watch() -> None:
        waiting, done = list(blocks), 0
        while not stop.wait(REPORT_S):
            written = [block for block in waiting if block.file(folder).exists()]
            waiting = [block for block in waiting if block not in written]
            done += sum(block.num_rows for block in written)
            progress(done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
