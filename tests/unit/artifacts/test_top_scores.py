"""Blocks join the corpus by place, with candidates of just its loss tokens, or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pear_ray.artifacts.scores import (
    Block,
    Scores,
    join_scores,
    plan_blocks,
    rows_to_score,
    write_block,
)
from pear_ray.artifacts.tables import CORPUS, SCORED, SCORED_TOP, read_table, write_rows
from pear_ray.errors import ArtifactError

MASKS = [[False, True, True], [False, False, True], [True, True, False]]  # 2, 1 and 1 that train


def corpus_row(number: int) -> dict[str, Any]:
    return {
        "example_id": f"row-{number}",
        "source": "ab"[number % 2],
        "is_negative": False,
        "token_ids": [number, 5, 6],
        "loss_mask": MASKS[number % 3],
    }


def scores_of(number: int, *, top_k: int) -> Scores:
    """Candidates that say which row and token they are of."""
    found = Scores([0.0, -1.0 - number, -0.5])
    if not top_k:
        return found
    size = sum(MASKS[number % 3][1:]) * top_k
    ids = np.arange(size, dtype=np.int32) + 100 * number
    return Scores(found.logprobs, None, ids, -ids.astype(np.float32))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six rows in one part, two sources taking turns."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "score").mkdir()
    rows = [corpus_row(number) for number in range(6)]
    write_rows(tmp_path / "corpus" / "part-000000.parquet", rows, CORPUS)
    return tmp_path / "corpus"


def blocks_of(corpus: Path) -> list[tuple[Block, list[dict[str, Any]]]]:
    """Blocks of three rows, each with its rows."""
    part = read_table(corpus / "part-000000.parquet", CORPUS)
    blocks = plan_blocks(corpus, sources=["a", "b"], rows_per_block=3, at_least=1, keep_given=False)
    return [(block, rows_to_score(part, block, keep_given=False)) for block in blocks]


def joined(corpus: Path, *, top_k: int) -> list[dict[str, Any]]:
    join_scores(corpus, corpus.parent / "score", "scored", keep_given=False, top_k=top_k)
    return read_table(corpus.parent / "score" / "scored", SCORED_TOP).to_pylist()


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_each_row_gets_its_own(corpus: Path, top_k: int) -> None:
    for block, rows in blocks_of(corpus):
        found = [scores_of(row["place"], top_k=top_k) for row in rows]
        write_block(corpus.parent / "score", block, rows, found)
    for number, row in enumerate(joined(corpus, top_k=top_k)):
        expected = scores_of(number, top_k=top_k)
        assert row["example_id"] == f"row-{number}"
        assert row["behavior_logprobs"] == expected.logprobs
        if top_k:
            assert row["top_ids"] == expected.top_ids.tolist()
            assert row["top_logprobs"] == expected.top_logprobs.tolist()
        else:
            assert (row["top_ids"], row["top_logprobs"]) == (None, None)


def test_readers_of_the_log_probs_load_no_candidates(corpus: Path) -> None:
    for block, rows in blocks_of(corpus):
        write_block(
            corpus.parent / "score", block, rows, [scores_of(r["place"], top_k=2) for r in rows]
        )
    joined(corpus, top_k=2)
    assert read_table(corpus.parent / "score" / "scored", SCORED).schema.equals(SCORED)


@pytest.mark.parametrize(("made", "wanted"), [(2, 3), (3, 2), (0, 2), (2, 0)])
def test_another_number_of_candidates_is_refused(corpus: Path, made: int, wanted: int) -> None:
    for block, rows in blocks_of(corpus):
        found = [scores_of(row["place"], top_k=made) for row in rows]
        write_block(corpus.parent / "score", block, rows, found)
    belong = f"{2 * made or 'no'} top_ids where {2 * wanted or 'no'} belong; remove the run's score"
    with pytest.raises(ArtifactError, match=rf"'row-0' has 3 tokens, 2 of which train, .*{belong}"):
        joined(corpus, top_k=wanted)
    assert not list((corpus.parent / "score" / "scored").iterdir())


def test_one_list_cut_short_is_refused(corpus: Path) -> None:
    for block, rows in blocks_of(corpus):
        found = [scores_of(row["place"], top_k=2) for row in rows]
        cut = [Scores(s.logprobs, None, s.top_ids, s.top_logprobs[:-1]) for s in found]
        write_block(corpus.parent / "score", block, rows, cut)
    with pytest.raises(ArtifactError, match="3 top_logprobs where 4 belong"):
        joined(corpus, top_k=2)


def test_kept_log_probs_have_no_candidates(corpus: Path) -> None:
    rows = [corpus_row(number) for number in range(6)]
    rows[1]["given_logprobs"] = [0.0, -0.25, -0.75]
    write_rows(corpus / "part-000000.parquet", rows, CORPUS)
    for block, block_rows in blocks_of(corpus):
        scored = [row for row in block_rows if row["place"] != 1]
        found = [scores_of(row["place"], top_k=2) for row in scored]
        write_block(corpus.parent / "score", block, scored, found)
    stage_dir = corpus.parent / "score"
    join_scores(corpus, stage_dir, "scored", keep_given=True, top_k=2)
    table = read_table(stage_dir / "scored", SCORED_TOP).to_pylist()
    assert table[1]["behavior_logprobs"] == [0.0, -0.25, -0.75]
    assert (table[1]["top_ids"], table[1]["top_logprobs"]) == (None, None)
    assert table[2]["top_ids"] == [200, 201]


def test_a_row_without_a_score_is_refused(corpus: Path) -> None:
    block, rows = blocks_of(corpus)[0]
    found = [scores_of(row["place"], top_k=0) for row in rows]
    write_block(corpus.parent / "score", block, rows, found)
    with pytest.raises(ArtifactError, match="'row-1' was not scored"):
        joined(corpus, top_k=0)
