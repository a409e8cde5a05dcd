"""The rows of one part of a corpus, as trees, in order and one at a time."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.corpus.files import KEY
from pear_ray.corpus.parts import Part
from pear_ray.corpus.rows import BadRow, Reason
from pear_ray.stores import open_filesystem

ROWS_PER_READ = 512
READ_BYTES = 2**20


def read_rows(part: Part, *, split: str) -> Iterator[tuple[int, Any | BadRow]]:
    """Every row with its number in the file, or why it cannot be read.

    Raises:
        OSError: The file cannot be read on (as does pyarrow for broken content).
        pa.ArrowException: Its content is not what its format promises.
    """
    if part.problem:
        raise OSError(part.problem)
    match part.format:
        case "jsonl":
            yield from _json_rows(part)
        case "parquet":
            yield from enumerate(_parquet_rows(part), start=part.first_row)
        case "arrow":
            yield from enumerate(_arrow_rows(part), start=part.first_row)
        case _:
            from pear_ray.corpus.saved import open_dataset  # noqa: PLC0415 - seconds, seldom wanted

            dataset = open_dataset(part.file, part.format, split)
            rows = dataset.select(range(part.begin, part.end or len(dataset)))
            yield from enumerate(iter(rows), start=part.first_row)


def _json_rows(part: Part) -> Iterator[tuple[int, Any | BadRow]]:
    for number, line in enumerate(_lines(part), start=part.first_row):
        if line.strip():
            yield number, _tree(line)


def _tree(line: bytes) -> Any | BadRow:
    try:
        tree = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a mark
        if b"\\ud" in line.lower():  # half of an escaped pair is text that no file can hold
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeError as error:
        return BadRow(Reason.UNREADABLE, "", f"not UTF-8 text: {error}")
    except (ValueError, RecursionError) as error:
        return BadRow(Reason.UNREADABLE, "", f"not valid JSON: {error}")
    return tree


def _lines(part: Part) -> Iterator[bytes]:
    """Lines of the part's byte range, whatever block they come in."""
    system, inside = open_filesystem(part.file, key=KEY)
    if part.end is None:  # compressed: from the beginning to the end
        with system.open_input_stream(inside, compression="detect") as stream:
            yield from _cut(iter(lambda: stream.read(READ_BYTES), b""))
        return
    with system.open_input_file(inside) as file:
        if file.size() < part.end:
            raise OSError(f"it ends before byte {part.end}, so it changed while it was read")
        file.seek(part.begin)
        places = range(part.begin, part.end, READ_BYTES)
        yield from _cut(file.read(min(READ_BYTES, part.end - place)) for place in places)


def _cut(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parquet_rows(part: Part) -> Iterator[Any]:
    system, inside = open_filesystem(part.file, key=KEY)
    with system.open_input_file(inside) as stream:
        file = pq.ParquetFile(stream)
        groups = range(part.begin, file.num_row_groups if part.end is None else part.end)
        for batch in file.iter_batches(ROWS_PER_READ, row_groups=list(groups)):
            yield from batch.to_pylist()


def _arrow_rows(part: Part) -> Iterator[Any]:
    system, inside = open_filesystem(part.file, key=KEY)
    with system.open_input_file(inside) as stream:
        try:
            reader = pa.ipc.open_file(stream)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the streaming format, which `datasets` writes
            stream.seek(0)
            batches = iter(pa.ipc.open_stream(stream))
        for batch in batches:
            for begin in range(0, len(batch), ROWS_PER_READ):
                yield from batch.slice(begin, ROWS_PER_READ).to_pylist()
