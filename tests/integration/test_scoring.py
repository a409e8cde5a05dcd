"""Scoring through Ray Data, with real engines: right, in order, and resumable."""

import contextlib
import dataclasses
import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pear_ray.artifacts.scores import Block, join_scores, remove_blocks
from pear_ray.artifacts.tables import CORPUS, SCORED, SCORED_TOP, read_table, write_rows
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed import scoring
from pear_ray.distributed.scoring import BehaviorScorer, ScoringJob, score_corpus
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.errors import EngineError, InputError

NUM_ROWS = 24


def scoring_config() -> RunConfig:
    game = {"games": [{"name": "chain_sum"}], "size": 8}
    return validate_run(
        {
            "name": "scoring",
            "models": {
                "policy": "embedded:student",
                "behavior": "embedded:teacher",
                "dtype": "float32",
                "max_model_len": 160,
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "score": {"rows_per_block": 4},
            "sft": {"optimizer": {"learning_rate": 1e-3}},
            "rl": {"problems": game, "optimizer": {"learning_rate": 1e-3}, "num_steps": 1},
            "evaluate": {"problems": game},
            "cluster": {"num_samplers": 1},
        },
        origin="test",
    )


def corpus_rows() -> list[dict[str, Any]]:
    """Rows of two sources, one in three of the second."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(NUM_ROWS):
        ids = generator.integers(5, 60, size=10 + number).tolist()
        rows.append(
            {
                "example_id": f"row-{number:02d}",
                "source": "student" if number % 3 == 2 else "teacher",
                "is_negative": False,
                "token_ids": ids,
                "loss_mask": [False] * 5 + [True] * (len(ids) - 5),
            }
        )
    return rows


@pytest.fixture
def job(tmp_path: Path) -> ScoringJob:
    """A corpus in two parts, to be scored with one model per source."""
    rows = corpus_rows()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "stage").mkdir()
    write_rows(tmp_path / "corpus" / "part-000000.parquet", rows[:16], CORPUS)
    write_rows(tmp_path / "corpus" / "part-000001.parquet", rows[16:], CORPUS)
    return ScoringJob(
        config=scoring_config(),
        corpus=tmp_path / "corpus",
        folder=tmp_path / "stage",
        models={name: embedded_path(name) for name in ("teacher", "student")},
        keep_given=False,
        align="refuse",
        top_k=0,
    )


def join(job: ScoringJob) -> list[dict[str, Any]]:
    join_scores(job.corpus, job.folder, "scored", keep_given=False, top_k=job.top_k)
    return read_table(job.folder / "scored", SCORED).to_pylist()


def test_every_source_is_scored_by_its_own_model(local_ray: None, job: ScoringJob) -> None:
    seen: list[int] = []
    score_corpus(job, progress=seen.append)
    scored = join(job)
    assert [row["example_id"] for row in scored] == [row["example_id"] for row in corpus_rows()]
    for source in job.models:
        own = [row for row in scored if row["source"] == source]
        reference = reference_logprobs(job.models[source], [row["token_ids"] for row in own])
        for row, expected in zip(own, reference, strict=True):
            wanted = np.where(row["loss_mask"], expected, 0.0)
            np.testing.assert_allclose(row["behavior_logprobs"], wanted, rtol=2e-6, atol=1e-5)
    remove_blocks(job.folder)
    assert not (job.folder / "blocks").exists()


def test_an_engine_spread_over_two_devices_gives_the_same(
    local_ray: None, job: ScoringJob, tmp_path: Path
) -> None:
    """The embedded models have three heads, which no two devices can share: one with four."""
    model = four_headed(tmp_path / "four-headed")
    config = job.config.model_copy(
        update={"score": job.config.score.model_copy(update={"tensor_parallel_size": 2})}
    )
    score_corpus(
        dataclasses.replace(job, config=config, models={"*": model}), progress=lambda rows: None
    )
    scored = join(job)
    reference = reference_logprobs(model, [row["token_ids"] for row in scored])
    for row, expected in zip(scored, reference, strict=True):
        wanted = np.where(row["loss_mask"], expected, 0.0)
        np.testing.assert_allclose(row["behavior_logprobs"], wanted, rtol=2e-6, atol=2e-5)


def four_headed(folder: Path) -> Path:
    """A random model of the embedded teacher's shape and tokenizer, with four attention heads."""
    teacher = embedded_path("teacher")
    shutil.copytree(teacher, folder)
    shape = AutoConfig.from_pretrained(
        teacher, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


def test_candidates_are_of_the_rows_own_tokens(
    local_ray: None, job: ScoringJob, tmp_path: Path
) -> None:
    wanted = dataclasses.replace(
        job, folder=tmp_path / "top", models={"*": embedded_path("teacher")}, top_k=3
    )
    wanted.folder.mkdir()
    score_corpus(wanted, progress=lambda rows: None)
    plain = dataclasses.replace(wanted, folder=job.folder, top_k=0)
    score_corpus(plain, progress=lambda rows: None)
    join(wanted)
    for row, other in zip(
        read_table(wanted.folder / "scored", SCORED_TOP).to_pylist(), join(plain), strict=True
    ):
        assert row["behavior_logprobs"] == pytest.approx(other["behavior_logprobs"], abs=1e-6)
        trains = np.array(row["loss_mask"])
        own_ids = np.array(row["token_ids"])[trains, None]  # [num_loss_tokens, 1]
        own_logprobs = np.array(row["behavior_logprobs"])[trains]
        is_own = np.reshape(row["top_ids"], (-1, 3)) == own_ids
        assert is_own.sum(axis=1).tolist() == [1] * len(own_ids)
        np.testing.assert_array_equal(
            np.reshape(row["top_logprobs"], (-1, 3))[is_own], own_logprobs
        )


def test_a_resumed_and_disturbed_scoring_gives_the_same_values(
    local_ray: None, job: ScoringJob, tmp_path: Path
) -> None:
    """Some blocks lost, one half-written, and an engine's process killed in the middle."""
    undisturbed = dataclasses.replace(job, folder=tmp_path / "undisturbed")
    score_corpus(undisturbed, progress=lambda rows: None)
    blocks = sorted((undisturbed.folder / "blocks").rglob("*.parquet"))
    for file in blocks[::2]:
        kept = job.folder / file.relative_to(undisturbed.folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, kept)
    stamps = {file: file.stat().st_mtime_ns for file in job.folder.rglob("*.parquet")}
    half = job.folder / "blocks" / "part-000000" / ".half.parquet.4242"
    half.write_bytes(b"PAR1")
    with killing_first_engine():
        score_corpus(job, progress=lambda rows: None)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert join(job) == join(undisturbed)


@contextlib.contextmanager
def killing_first_engine() -> Iterator[None]:
    """Kill the first process that has come to hold a vLLM engine of this test, once."""
    killed: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not killed and not stop.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "BehaviorScorer" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
                        return

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    stop.set()
    watcher.join()
    assert killed, "no engine's process was found to kill"


def test_a_source_without_a_model_is_refused_before_an_engine_starts(
    local_ray: None, job: ScoringJob
) -> None:
    lacking = dataclasses.replace(job, models={"teacher": job.models["teacher"]})
    with pytest.raises(InputError, match="no model for source 'student' of the corpus"):
        score_corpus(lacking, progress=lambda rows: None)


def test_a_full_disk_is_named(
    local_ray: None, job: ScoringJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a full disk does in the actor, which needs no engine for it."""

    class Full(BehaviorScorer):
        def __init__(self, job: ScoringJob, source: str) -> None:
            """No engine: what is tested is the way of the error."""

        def _score_block(self, block: Block) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", "block.parquet")

    monkeypatch.setattr(scoring, "BehaviorScorer", Full)
    with pytest.raises(EngineError, match=r"scoring failed: no space left on the disk; what is wr"):
        score_corpus(job, progress=lambda rows: None)


def test_an_error_of_ours_in_an_actor_reaches_the_driver_as_it_is(
    local_ray: None, job: ScoringJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(BehaviorScorer):
        def __init__(self, job: ScoringJob, source: str) -> None:
            """No engine: what is tested is the way of the error."""

        def _score_block(self, block: Block) -> int:
            raise EngineError("example row-03: planted")

    monkeypatch.setattr(scoring, "BehaviorScorer", Broken)
    with pytest.raises(EngineError, match=r"^example row-03: planted$"):
        score_corpus(job, progress=lambda rows: None)
