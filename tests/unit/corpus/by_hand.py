"""Corpora written by hand, in every format that a corpus may have."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config.corpus import DatasetCorpus
from pear_ray.corpus.parts import Part, find_parts
from pear_ray.corpus.read import read_rows

Rows = Sequence[dict[str, Any]]


def corpus(path: Path | str, **changes: Any) -> DatasetCorpus:
    return DatasetCorpus.model_validate({"kind": "dataset", "path": str(path)} | changes)


def jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def packed_jsonl(path: Path, rows: Rows) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def parquet(path: Path, rows: Rows, *, group_size: int = 2) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group_size)


def arrow_file(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def arrow_stream(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def saved(path: Path, rows: Rows) -> None:
    import datasets

    datasets.Dataset.from_list(list(rows)).save_to_disk(path)


def saved_splits(path: Path, rows: Rows) -> None:
    import datasets

    whole = datasets.Dataset.from_list(list(rows))
    other = datasets.Dataset.from_list([{"prompt": "of the test split"}])
    datasets.DatasetDict({"train": whole, "test": other}).save_to_disk(path)


def places(parts: Sequence[Part]) -> list[tuple[int, int | None, int]]:
    return [(part.begin, part.end, part.first_row) for part in parts]


def rows_of(corpus: DatasetCorpus) -> list[tuple[str, int, Any]]:
    """Name, number and tree of every row, read part by part."""
    return [
        (part.name, number, tree)
        for part in find_parts(corpus)
        for number, tree in read_rows(part, split=corpus.split)
    ]
