"""However a corpus is cut into parts, every row is read once, in order, with its number."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import pyarrow as pa
import pytest
from by_hand import corpus, places, rows_of
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.corpus import parts as parts_module
from pear_ray.corpus import read as read_module
from pear_ray.corpus.parts import find_parts
from pear_ray.corpus.read import read_rows
from pear_ray.corpus.rows import BadRow, Reason
from pear_ray.errors import InputError

ROWS = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(5)]


def text_file(folder: Path, content: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


def test_a_file_is_cut_after_every_so_many_lines(tmp_path: Path) -> None:
    path = text_file(tmp_path, b"1\n22\n333\n4444\n55555\n")
    assert places(find_parts(corpus(path, rows_per_part=2))) == [(0, 5, 1), (5, 14, 3), (14, 20, 5)]
    assert places(find_parts(corpus(path, rows_per_part=5))) == [(0, 20, 1)]
    assert places(find_parts(corpus(path, rows_per_part=1)))[2:4] == [(5, 9, 3), (9, 14, 4)]
    assert [part.index for part in find_parts(corpus(path, rows_per_part=2))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"1\n2\n3", [(1, 1), (2, 2), (3, 3)]),  # no newline at the end
        (b"\n1\n\n \t\n2\n\n", [(2, 1), (5, 2)]),  # blank lines count as lines
        (b"1\r\n2\r\n", [(1, 1), (2, 2)]),
        (b"\xef\xbb\xbf1\n2\n", [(1, 1), (2, 2)]),  # the mark that some editors write first
        ('"a\u2028b"\n2\n'.encode(), [(1, "a\u2028b"), (2, 2)]),  # ends no line of JSONL
        (b"", []),
        (b"\n", []),
    ],
)
@pytest.mark.parametrize("rows_per_part", [1, 2, 100])
def test_lines(tmp_path: Path, content: bytes, rows: list[Any], rows_per_part: int) -> None:
    found = rows_of(corpus(text_file(tmp_path, content), rows_per_part=rows_per_part))
    assert [(number, tree) for _, number, tree in found] == rows


def test_a_line_longer_than_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_READ_BYTES", 1000)
    long = "x" * 2_500_000  # reading takes a MiB at once
    path = text_file(tmp_path, f'1\n"{long}"\n3\n'.encode())
    found = rows_of(corpus(path, rows_per_part=1))
    assert [(number, tree) for _, number, tree in found] == [(1, 1), (2, long), (3, 3)]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as stream:
        stream.write(path.read_bytes())
    assert [tree for _, _, tree in rows_of(corpus(tmp_path / "rows.jsonl.gz"))] == [1, long, 3]


@given(
    lines=st.lists(
        st.sampled_from([b"", b"1", b"22", b"  ", b'"\xc3\xa9"', b"333\r"]), max_size=40
    ),
    end=st.sampled_from([b"", b"\n"]),
    rows_per_part=st.integers(1, 12),
    block=st.integers(1, 30),
)
def test_all_parts_together_are_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    end: bytes,
    rows_per_part: int,
    block: int,
) -> None:
    content = b"\n".join(lines) + end
    path = text_file(tmp_path_factory.mktemp("rows"), content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "_READ_BYTES", block)
        patch.setattr(read_module, "READ_BYTES", block)
        parts = find_parts(corpus(path, rows_per_part=rows_per_part))
        found = [pair for part in parts for pair in read_rows(part, split="train")]
    assert found == [
        (number, json.loads(line))
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    ]
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == len(content)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b"{not json", "not valid JSON: Expecting property name"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 text: 'utf-8' codec can't decode byte 0xe9"),
        (b'{"prompt": "\\ud83d"}', "not UTF-8 text: 'utf-8' codec can't encode character"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        (b"1" * 5000, "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_row_is_that_lines_alone(
    tmp_path: Path, line: bytes, detail: str
) -> None:
    path = text_file(tmp_path, b'{"prompt": "\\ud83d\\ude00"}\n' + line + b"\n3\n")
    (_, _, first), (_, number, bad), (_, _, last) = rows_of(corpus(path))
    assert (first, number, last) == ({"prompt": "\U0001f600"}, 2, 3)
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.field) == (Reason.UNREADABLE, "")
    assert bad.detail.startswith(detail)


def test_a_file_said_to_be_text_is_not_unpacked_for_its_name(tmp_path: Path) -> None:
    path = text_file(tmp_path, b"1\n2\n").rename(tmp_path / "rows.lz4")
    found = rows_of(corpus(path, format="jsonl", rows_per_part=1))
    assert found == [("rows.lz4", 1, 1), ("rows.lz4", 2, 2)]


def test_whole_row_groups_make_a_part(tmp_path: Path) -> None:
    """Groups of 2, 2 and 1 rows."""
    by_hand.parquet(tmp_path / "a.parquet", ROWS, group_size=2)
    cut = {n: places(find_parts(corpus(tmp_path, rows_per_part=n))) for n in (1, 2, 3, 4, 5, 100)}
    assert cut[1] == cut[2] == [(0, 1, 1), (1, 2, 3), (2, 3, 5)]
    assert cut[3] == cut[4] == [(0, 2, 1), (2, 3, 5)]
    assert cut[5] == cut[100] == [(0, 3, 1)]


FORMATS: dict[str, Callable[[Path, by_hand.Rows], None]] = {
    "rows.jsonl": by_hand.jsonl,
    "rows.ndjson.gz": by_hand.packed_jsonl,
    "rows.parquet": by_hand.parquet,
    "file.arrow": by_hand.arrow_file,
    "stream.arrow": by_hand.arrow_stream,
    "saved": by_hand.saved,
    "splits": by_hand.saved_splits,
}


@pytest.mark.parametrize("rows_per_part", [1, 2, 4, 100])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_rows(tmp_path: Path, name: str, rows_per_part: int) -> None:
    FORMATS[name](tmp_path / name, ROWS)
    found = rows_of(corpus(tmp_path / name, rows_per_part=rows_per_part))
    assert [(number, tree) for _, number, tree in found] == list(enumerate(ROWS, start=1))


def test_the_other_split(tmp_path: Path) -> None:
    by_hand.saved_splits(tmp_path / "splits", ROWS)
    assert rows_of(corpus(tmp_path / "splits", split="test")) == [
        ("test", 1, {"prompt": "of the test split"})
    ]
    with pytest.raises(InputError, match="no dataset with a split 'dev'"):
        find_parts(corpus(tmp_path / "splits", split="dev"))


def test_a_saved_dataset_that_was_set_to_give_arrays_gives_lists(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"token_ids": [1, 2]}])
    rows.with_format("numpy").save_to_disk(tmp_path / "rows")
    (_, _, tree) = rows_of(corpus(tmp_path / "rows"))[0]
    assert tree == {"token_ids": [1, 2]}
    assert type(tree["token_ids"]) is list


def test_a_folder_of_several_formats_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    by_hand.parquet(tmp_path / "b.parquet", ROWS[:3])
    by_hand.jsonl(tmp_path / "a.jsonl", ROWS[3:])
    by_hand.packed_jsonl(tmp_path / "c.jsonl.gz", ROWS[:1])
    parts = find_parts(corpus(tmp_path, rows_per_part=2))
    assert [(part.index, part.name) for part in parts] == [
        (0, "a.jsonl"), (1, "b.parquet"), (2, "b.parquet"), (3, "c.jsonl.gz")
    ]  # fmt: skip
    assert [tree for _, _, tree in rows_of(corpus(tmp_path))] == [*ROWS[3:], *ROWS[:3], ROWS[0]]


def test_no_rows_at_all(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("prompt", pa.string())])
    pa.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    by_hand.packed_jsonl(tmp_path / "b.jsonl.gz", [])
    text_file(tmp_path, b"")
    assert rows_of(corpus(tmp_path)) == []


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_file_that_cannot_be_planned_is_a_part_that_says_so(tmp_path: Path) -> None:
    by_hand.jsonl(tmp_path / "a.jsonl", ROWS)
    by_hand.parquet(tmp_path / "b.parquet", ROWS)
    half(tmp_path / "b.parquet")
    good, bad = find_parts(corpus(tmp_path))
    assert good.problem == ""
    assert bad.problem.startswith("ArrowInvalid: ")
    with pytest.raises(OSError, match="ArrowInvalid"):
        next(read_rows(bad, split="train"))


@pytest.mark.parametrize("name", ["rows.ndjson.gz", "file.arrow", "stream.arrow"])
def test_half_a_file_is_an_error_and_never_the_end(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name, ROWS)
    half(tmp_path / name)
    with pytest.raises((OSError, pa.ArrowException)):
        rows_of(corpus(tmp_path / name))


def test_a_file_that_shrank_or_went_since_it_was_planned(tmp_path: Path) -> None:
    path = text_file(tmp_path, b"1\n2\n3\n")
    first, _, last = find_parts(corpus(path, rows_per_part=1))
    text_file(tmp_path, b"1\n")
    assert list(read_rows(first, split="train")) == [(1, 1)]
    with pytest.raises(OSError, match="it ends before byte 6"):
        next(read_rows(last, split="train"))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        next(read_rows(first, split="train"))
