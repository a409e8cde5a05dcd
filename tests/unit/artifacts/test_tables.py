"""Tables come back as they were declared, or are refused with what to do."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.artifacts.tables import (
    CORPUS,
    ROWS_PER_WRITE,
    SCORED,
    WEIGHT_SAMPLES,
    TableWriter,
    read_table,
    write_rows,
)
from pear_ray.errors import ArtifactError


def scored_row(example_id: str) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "source": "teacher",
        "is_negative": False,
        "token_ids": [5, 6, 7],
        "loss_mask": [False, True, True],
        "behavior_logprobs": [0.0, -0.5, -1.25],
        "span_ids": None,
    }


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_table(path, SCORED)
    assert "run the stage that makes it again" in str(caught.value)
    return str(caught.value)


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [scored_row("a"), scored_row("b")]
    write_rows(tmp_path / "rows.parquet", rows, SCORED)
    table = read_table(tmp_path / "rows.parquet", SCORED)
    assert table.schema.equals(SCORED)
    assert table.to_pylist() == rows


def test_a_folder_of_files_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "a.parquet", [scored_row("a")], SCORED)
    write_rows(tmp_path / "deep" / "b.parquet", [scored_row("b")], SCORED)
    assert read_table(tmp_path, SCORED)["example_id"].to_pylist() == ["a", "b"]


def test_no_rows_keep_their_schema(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [], SCORED)
    assert len(read_table(tmp_path / "rows.parquet", SCORED)) == 0


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no Parquet file there" in refusal(tmp_path / "absent.parquet")
    assert "no Parquet file there" in refusal(tmp_path / "empty")


def test_a_half_written_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    write_rows(whole, [scored_row(str(number)) for number in range(50)], SCORED)
    half = tmp_path / "half.parquet"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "not a table of this version" in refusal(half)
    half.write_bytes(b"")
    assert "not a table of this version" in refusal(half)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    row = scored_row("a")
    del row["loss_mask"]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert "loss_mask" in refusal(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("token_ids", [["five", "six", "seven"]]),
        ("token_ids", [7]),
        ("loss_mask", ["yes"]),
        ("behavior_logprobs", [None]),
    ],
)
def test_a_column_of_another_type(tmp_path: Path, column: str, value: list[Any]) -> None:
    table = pa.Table.from_pylist([scored_row("a")], schema=SCORED)
    place = table.schema.names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(value)), tmp_path / "rows.parquet")
    refusal(tmp_path / "rows.parquet")


def test_a_table_of_another_kind(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "rows.parquet",
        [{"step": 1, "example_id": "a", "tokens_left": 0, "log_ratio": 0.5, "weight": 1.5}],
        WEIGHT_SAMPLES,
    )
    assert "not a table of this version" in refusal(tmp_path / "rows.parquet")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, [scored_row("a")], SCORED)
    with pytest.raises(pa.ArrowInvalid):
        write_rows(path, [scored_row("b") | {"token_ids": ["x"]}], SCORED)
    assert read_table(path, SCORED)["example_id"].to_pylist() == ["a"]


def test_optional_columns_may_be_empty(tmp_path: Path) -> None:
    row = {
        "example_id": "a",
        "source": "s",
        "is_negative": False,
        "token_ids": [1],
        "loss_mask": [True],
    }
    write_rows(tmp_path / "corpus.parquet", [row], CORPUS)
    found = read_table(tmp_path / "corpus.parquet", CORPUS).to_pylist()[0]
    assert found["given_logprobs"] is None
    assert found["token_ids"] == [1]


@pytest.mark.parametrize("num_rows", [0, 1, ROWS_PER_WRITE, ROWS_PER_WRITE + 1])
def test_rows_written_one_by_one(tmp_path: Path, num_rows: int) -> None:
    path = tmp_path / "deep" / "rows.parquet"
    with TableWriter(path, SCORED) as writer:
        for number in range(num_rows):
            writer.write(scored_row(str(number)))
            assert not path.exists()
    found = read_table(path, SCORED)["example_id"].to_pylist()
    assert found == [str(number) for number in range(num_rows)]
    assert [each.name for each in path.parent.iterdir()] == ["rows.parquet"]


def write_one_by_one(path: Path, rows: list[Any]) -> None:
    with TableWriter(path, SCORED) as writer:
        for row in rows:
            if isinstance(row, Exception):
                raise row
            writer.write(row)


@pytest.mark.parametrize("num_good", [0, 1, ROWS_PER_WRITE])
@pytest.mark.parametrize("last", [InterruptedError(), scored_row("new") | {"token_ids": ["x"]}])
def test_a_failed_writer_leaves_the_old_file_alone(
    tmp_path: Path, num_good: int, last: Any
) -> None:
    """A row of a wrong type is found out only as the last rows are written."""
    path = tmp_path / "rows.parquet"
    write_one_by_one(path, [scored_row("old")])
    with pytest.raises((InterruptedError, pa.ArrowInvalid)):
        write_one_by_one(path, [*[scored_row("new")] * num_good, last])
    assert read_table(path, SCORED)["example_id"].to_pylist() == ["old"]
    assert [each.name for each in tmp_path.iterdir()] == ["rows.parquet"]
