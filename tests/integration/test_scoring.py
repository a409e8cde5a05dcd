"""Scoring through Ray Data, with real engines: right, in order, and resumable."""

from pathlib import Path

import numpy as np

from pear_ray.artifacts.tables import CORPUS, SCORED, read_table, write_rows
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.scoring import ScoringJob, score_corpus
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.hf_scorer import reference_logprobs

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


def corpus_rows() -> list[dict]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(NUM_ROWS):
        ids = generator.integers(5, 60, size=10 + number).tolist()
        rows.append(
            {
                "example_id": f"row-{number:02d}",
                "source": "test",
                "problem_id": None,
                "question": "",
                "completion": "",
                "token_ids": ids,
                "loss_mask": [False] * 5 + [True] * (len(ids) - 5),
                "sampled_logprobs": None,
            }
        )
    return rows


def test_scores_resume_and_equal_transformers(local_ray: None, tmp_path: Path) -> None:
    """A third of the corpus, as if killed then, and the rest later: each row scored once."""
    rows = corpus_rows()
    output = tmp_path / "scored"

    def score(count: int) -> None:
        write_rows(tmp_path / "corpus.parquet", rows[:count], CORPUS)
        job = ScoringJob(
            config=scoring_config(),
            model=embedded_path("teacher"),
            corpus=tmp_path / "corpus.parquet",
            output=output,
        )
        score_corpus(job, progress=lambda rows: None)

    score(8)
    first = {file: file.stat().st_mtime_ns for file in output.rglob("*.parquet")}
    assert sum(len(read_table(file, SCORED)) for file in first) == 8
    (output / "half-written.parquet").write_bytes(b"PAR1")  # what a kill in mid-write leaves
    score(NUM_ROWS)
    assert {file: file.stat().st_mtime_ns for file in first} == first
    scored = read_table(output, SCORED).sort_by("example_id").to_pylist()
    assert [row["example_id"] for row in scored] == [row["example_id"] for row in rows]
    reference = reference_logprobs(embedded_path("teacher"), [row["token_ids"] for row in rows])
    for row, expected in zip(scored, reference, strict=True):
        mask = np.asarray(row["loss_mask"])
        wanted = np.where(mask, expected, 0.0)
        np.testing.assert_allclose(row["behavior_logprobs"], wanted, rtol=2e-6, atol=1e-5)
