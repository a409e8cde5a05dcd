"""Which sources are logged apart: the largest, decided once, under names that metrics can have."""

import pyarrow as pa
import pytest

from pear_ray.distributed.sft_sources import LARGEST, Sources, metric_names


def table(*rows: tuple[str, int, bool]) -> pa.Table:
    return pa.table(
        {
            "source": [source for source, _, _ in rows],
            "token_ids": pa.array([[0] * length for _, length, _ in rows], pa.list_(pa.int32())),
            "is_negative": [negative for _, _, negative in rows],
        }
    )


def test_the_largest_by_tokens_comes_first() -> None:
    sources = Sources(table(("a", 3, False), ("b", 4, False), ("a", 2, False), ("c", 9, True)))
    assert sources.names == ["a", "b"]  # 5 tokens and 4; negatives are in no metric
    found = sources.groups_of([{"source": "b"}, {"source": "a"}, {"source": "c"}])
    assert found is not None
    assert found.of_row.tolist() == [1, 0, 1]
    assert found.num_groups == 2
    nothing = sources.groups_of([])
    assert nothing is not None
    assert nothing.of_row.tolist() == []


@pytest.mark.parametrize(
    "rows", [[("a", 3, False), ("a", 5, False)], [("a", 3, False), ("b", 3, True)]]
)
def test_one_source_is_not_logged_twice(rows: list[tuple[str, int, bool]]) -> None:
    sources = Sources(table(*rows))
    assert sources.names == []
    assert sources.groups_of([{"source": "a"}]) is None
    assert sources.metrics({"tokens": 3.0}) == {}


def test_small_sources_are_logged_together() -> None:
    rows = [(f"s{number:02d}", 100 - number, False) for number in range(LARGEST + 3)]
    sources = Sources(table(*reversed(rows)))
    assert sources.names == [*(f"s{number:02d}" for number in range(LARGEST)), "other"]
    found = sources.groups_of([{"source": "s00"}, {"source": "s21"}, {"source": "s22"}])
    assert found is not None
    assert found.of_row.tolist() == [0, LARGEST, LARGEST]


def test_equal_sources_are_in_the_order_of_their_names() -> None:
    """So that every rank and every attempt logs the same."""
    assert Sources(table(("b", 3, False), ("a", 3, False))).names == ["a", "b"]


def test_names_that_metrics_can_have() -> None:
    given = ["data/train a.jsonl", "data_train_a.jsonl", "other", "/", "x" * 90]
    assert metric_names(given) == [
        "data_train_a.jsonl",
        "data_train_a.jsonl_2",
        "other_2",
        "unnamed",
        "x" * 60,
    ]
