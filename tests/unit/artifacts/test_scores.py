"""Scores come back in the corpus's order, of exactly its ids, whatever was killed in between."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pear_ray.artifacts.scores import (
    ANY_SOURCE,
    Block,
    Scores,
    ids_hash,
    join_scores,
    plan_blocks,
    remove_blocks,
    rows_to_score,
    write_block,
)
from pear_ray.artifacts.tables import CORPUS, SCORED, read_table, write_rows
from pear_ray.errors import ArtifactError, InputError


def row(number: int, source: str = "x", given: list[float] | None = None) -> dict[str, Any]:
    return {
        "example_id": f"e{number}",
        "source": source,
        "is_negative": number % 2 == 1,
        "token_ids": [number, number + 1],
        "loss_mask": [False, True],
        "problem_id": None,
        "file": None,
        "row": None,
        "messages": None,
        "given_logprobs": given,
    }


def written(folder: Path, *parts: Sequence[dict[str, Any]]) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, rows in enumerate(parts):
        write_rows(corpus / f"part-{index:06d}.parquet", rows, CORPUS)
    return corpus


def planned(
    corpus: Path,
    *sources: str,
    rows_per_block: int = 2,
    at_least: int = 1,
    keep_given: bool = False,
) -> list[Block]:
    return plan_blocks(
        corpus,
        sources=sources or (ANY_SOURCE,),
        rows_per_block=rows_per_block,
        at_least=at_least,
        keep_given=keep_given,
    )


def spans(blocks: Sequence[Block]) -> list[tuple[int, int, int, str, int]]:
    """Part, begin, end, source and number of rows of each block."""
    return [(int(b.part[5:11]), b.begin, b.end, b.source, b.num_rows) for b in blocks]


def score(
    corpus: Path, stage_dir: Path, blocks: Sequence[Block], *, keep_given: bool = False
) -> None:
    """Score each token as minus its id."""
    for block in blocks:
        rows = rows_to_score(read_table(corpus / block.part, CORPUS), block, keep_given=keep_given)
        assert len(rows) == block.num_rows
        scored = (Scores([-float(i) for i in r["token_ids"]]) for r in rows)
        write_block(stage_dir, block, rows, scored)


def joined(corpus: Path, stage_dir: Path, *, keep_given: bool = False) -> list[dict[str, Any]]:
    join_scores(corpus, stage_dir, "scored", keep_given=keep_given)
    return read_table(stage_dir / "scored", SCORED).to_pylist()


def wanted(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    scores = [{"behavior_logprobs": [-float(i) for i in each["token_ids"]]} for each in rows]
    return [
        {name: (each | own).get(name) for name in SCORED.names}
        for each, own in zip(rows, scores, strict=True)
    ]


def test_a_part_is_cut_into_blocks(tmp_path: Path) -> None:
    corpus = written(tmp_path, [row(n) for n in range(5)], [], [row(5)])
    assert spans(planned(corpus)) == [
        (0, 0, 2, "*", 2), (0, 2, 4, "*", 2), (0, 4, 5, "*", 1), (2, 0, 1, "*", 1)
    ]  # fmt: skip
    assert spans(planned(corpus, rows_per_block=100)) == [(0, 0, 5, "*", 5), (2, 0, 1, "*", 1)]


@pytest.mark.parametrize(
    ("at_least", "sizes"),
    [(1, [6]), (2, [3, 3]), (4, [2, 2, 2]), (6, [1] * 6), (100, [1] * 6)],
)
def test_a_small_corpus_is_cut_for_all_engines(
    tmp_path: Path, at_least: int, sizes: list[int]
) -> None:
    corpus = written(tmp_path, [row(n) for n in range(6)])
    blocks = planned(corpus, rows_per_block=100, at_least=at_least)
    assert [block.num_rows for block in blocks] == sizes


def test_no_rows_are_no_blocks(tmp_path: Path) -> None:
    assert planned(written(tmp_path, []), at_least=4) == []
    assert planned(tmp_path / "corpus", "x") == []


TWO = [row(0, "x"), row(1, "y"), row(2, "x"), row(3, "x"), row(4, "x"), row(5, "y")]


def test_each_source_has_blocks_of_its_own(tmp_path: Path) -> None:
    corpus = written(tmp_path, TWO)
    blocks = planned(corpus, "y", "x")
    assert spans(blocks) == [
        (0, 0, 2, "y", 1), (0, 0, 2, "x", 1), (0, 2, 4, "x", 2), (0, 4, 6, "y", 1),
        (0, 4, 6, "x", 1),
    ]  # fmt: skip
    assert len({block.file(tmp_path) for block in blocks}) == 5
    part = read_table(corpus / blocks[3].part, CORPUS)
    (only,) = rows_to_score(part, blocks[3], keep_given=False)
    assert (only["example_id"], only["place"]) == ("e5", 5)


def test_a_source_without_a_model_is_named(tmp_path: Path) -> None:
    corpus = written(tmp_path, TWO)
    with pytest.raises(InputError, match=r"no model for source 'y' of the corpus \(it has x, z\)"):
        planned(corpus, "x", "z")
    assert len(planned(corpus, ANY_SOURCE)) == 3


def test_given_logprobs_are_kept_or_scored_again(tmp_path: Path) -> None:
    rows = [row(0, given=[0.0, -9.0]), row(1), row(2, given=[0.0, -8.0]), row(3, "closed", [0, -7])]
    corpus = written(tmp_path, rows)
    blocks = planned(corpus, "x", keep_given=True)  # all rows of `closed` bring theirs
    assert spans(blocks) == [(0, 0, 2, "x", 1)]
    score(corpus, tmp_path, blocks, keep_given=True)
    found = joined(corpus, tmp_path, keep_given=True)
    assert [each["behavior_logprobs"] for each in found] == [
        [0.0, -9.0], [-1.0, -2.0], [0.0, -8.0], [0.0, -7.0]
    ]  # fmt: skip
    with pytest.raises(InputError, match="'closed'"):
        planned(corpus, "x", keep_given=False)
    again = tmp_path / "again"
    again.mkdir()
    score(corpus, again, planned(corpus, "x", "closed"))
    assert joined(corpus, again) == wanted(rows)


def test_scores_come_back_in_the_corpuss_order(tmp_path: Path) -> None:
    parts = [TWO, [], [row(9, "y"), row(8, "x"), row(7, "y")]]
    corpus = written(tmp_path, *parts)
    score(corpus, tmp_path, planned(corpus, "y", "x")[::-1])  # engines end in any order
    assert joined(corpus, tmp_path) == wanted([each for part in parts for each in part])
    remove_blocks(tmp_path)
    assert not (tmp_path / "blocks").exists()
    assert [file.name for file in sorted((tmp_path / "scored").iterdir())] == [
        f"part-{index:06d}.parquet" for index in range(3)
    ]


def test_what_an_earlier_attempt_scored_is_used(tmp_path: Path) -> None:
    corpus = written(tmp_path, TWO)
    blocks = planned(corpus, "x", "y")
    score(corpus, tmp_path, blocks[:2])
    todo = [block for block in planned(corpus, "x", "y") if not block.file(tmp_path).exists()]
    assert todo == blocks[2:]
    score(corpus, tmp_path, todo)
    assert joined(corpus, tmp_path) == wanted(TWO)


def test_an_attempt_with_more_engines_left_smaller_blocks(tmp_path: Path) -> None:
    """The number of engines is no part of a stage's identity, so both sizes meet in a folder."""
    corpus = written(tmp_path, TWO)
    score(corpus, tmp_path, planned(corpus, rows_per_block=100, at_least=6)[:2])
    blocks = planned(corpus, rows_per_block=100, at_least=2)
    todo = [block for block in blocks if not block.file(tmp_path).exists()]
    assert todo == blocks
    score(corpus, tmp_path, todo)
    assert joined(corpus, tmp_path) == wanted(TWO)


def refusal(corpus: Path, stage_dir: Path, *, keep_given: bool = False) -> str:
    with pytest.raises(ArtifactError, match="remove the run's score folder and score") as caught:
        join_scores(corpus, stage_dir, "scored", keep_given=keep_given)
    assert not list((stage_dir / "scored").glob("*.parquet"))
    return str(caught.value)


def test_a_row_that_was_not_scored(tmp_path: Path) -> None:
    corpus = written(tmp_path, TWO)
    assert refusal(corpus, tmp_path).startswith("example 'e0' was not scored")
    score(corpus, tmp_path, planned(corpus)[:2])
    assert refusal(corpus, tmp_path).startswith("example 'e4' was not scored")


def test_given_logprobs_stand_in_for_no_score_unless_kept(tmp_path: Path) -> None:
    corpus = written(tmp_path, [row(0, given=[0.0, -1.0])])
    assert refusal(corpus, tmp_path).startswith("example 'e0' was not scored")


@pytest.mark.parametrize("ids", [[1, 3], [2, 1], [1], [1, 2, 0]])
def test_scores_of_other_ids(tmp_path: Path, ids: list[int]) -> None:
    """Another id, another order, one fewer, one more."""
    corpus = written(tmp_path, [row(0), row(1)])
    (block,) = planned(corpus)
    others = [row(0) | {"place": 0}, row(1) | {"place": 1, "token_ids": ids}]
    write_block(tmp_path, block, others, [Scores([0.0, -1.0])] * 2)
    assert refusal(corpus, tmp_path).startswith("example 'e1' was scored on other token ids")


@pytest.mark.parametrize("values", [[], [-1.0], [0.0, -1.0, -2.0]])
def test_scores_of_another_length(tmp_path: Path, values: list[float]) -> None:
    corpus = written(tmp_path, [row(0), row(1)])
    (block,) = planned(corpus)
    rows = [row(0) | {"place": 0}, row(1) | {"place": 1}]
    write_block(tmp_path, block, rows, [Scores([0.0, -1.0]), Scores(values)])
    assert refusal(corpus, tmp_path).startswith(
        f"example 'e1' has 2 tokens, 1 of which train, and {len(values)} log-probs"
    )


def test_kept_logprobs_of_another_length(tmp_path: Path) -> None:
    corpus = written(tmp_path, [row(0, given=[-1.0])])
    assert refusal(corpus, tmp_path, keep_given=True).startswith(
        "example 'e0' has 2 tokens, 1 of which train, and 1 log-probs"
    )


def test_an_engine_that_answers_for_fewer_rows(tmp_path: Path) -> None:
    corpus = written(tmp_path, [row(0), row(1)])
    (block,) = planned(corpus)
    rows = rows_to_score(read_table(corpus / block.part, CORPUS), block, keep_given=False)
    with pytest.raises(ValueError, match="shorter"):
        write_block(tmp_path, block, rows, [Scores([0.0, -1.0])])
    assert not block.file(tmp_path).exists()


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_join_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Before any of the three files is in its place."""
    parts = [TWO, [row(6)], [row(7, "y")]]
    corpus = written(tmp_path, *parts)
    score(corpus, tmp_path, planned(corpus))
    replace, calls = Path.replace, iter(range(1, 100))

    def die(path: Path, target: Path) -> Path:
        if next(calls) == number:
            raise Killed
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            join_scores(corpus, tmp_path, "scored", keep_given=False)
    assert len(list((tmp_path / "scored").glob("*.parquet"))) == number - 1
    assert joined(corpus, tmp_path) == wanted([each for part in parts for each in part])
    remove_blocks(tmp_path)
    assert not (tmp_path / "blocks").exists()
    assert joined(corpus, tmp_path) == wanted([each for part in parts for each in part])


def test_the_hash_is_of_ids_as_the_table_holds_them() -> None:
    assert ids_hash([1, 2]) == ids_hash((1, 2))
    assert len({ids_hash(ids) for ids in ([], [0], [0, 0], [1, 2], [2, 1], [1], [258])}) == 7
    assert all(-(2**63) <= ids_hash([n]) < 2**63 for n in range(100))
    assert {ids_hash([n]) < 0 for n in range(100)} == {True, False}
