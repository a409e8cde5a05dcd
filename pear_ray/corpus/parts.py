"""Where a corpus's rows are: its files, cut into parts that one task each prepares."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config.corpus import DatasetCorpus
from pear_ray.corpus.files import COMPRESSED, KEY, CorpusFile, list_files
from pear_ray.stores import open_filesystem

_READ_BYTES = 8 * 2**20
_NEWLINE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a corpus that one task prepares.

    Attributes:
        index: Its place in the corpus's order.
        file: Path or URI of the file, or the name of the dataset.
        name: What example ids call the file.
        format: `jsonl`, `parquet`, `arrow`, `saved` or `hub`.
        begin: First byte (jsonl), row group (parquet) or row (the others).
        end: Where it ends, in the same unit; None for the end of the file.
        first_row: Number of its first row in the file, counted from 1 (a line, in a JSONL file).
        problem: Why the file cannot be read, or empty.
    """

    index: int
    file: str
    name: str
    format: str
    begin: int = 0
    end: int | None = None
    first_row: int = 1
    problem: str = ""


def find_parts(corpus: DatasetCorpus) -> list[Part]:
    """The corpus as parts in a fixed order; a file that cannot be read is one part that says so.

    Raises:
        InputError: There is nothing at `corpus.path`, or nothing that can be a corpus.
    """
    pieces = (
        Part(index=0, file=file.path, name=file.name, format=file.format, **place)
        for file in list_files(corpus)
        for place in _places(corpus, file)
    )
    return [replace(piece, index=index) for index, piece in enumerate(pieces)]


def _places(corpus: DatasetCorpus, file: CorpusFile) -> Iterator[dict]:
    """Begin, end and first row of each part of one file; `problem` where it cannot be read."""
    try:
        if file.format == "jsonl":
            yield from _line_ranges(file.path, corpus.rows_per_part)
        elif file.format == "parquet":
            yield from _row_group_ranges(file.path, corpus.rows_per_part)
        elif file.format == "arrow":
            yield {}
        else:
            yield from _row_ranges(corpus, file)
    except (OSError, pa.ArrowException) as error:
        yield {"problem": " ".join(f"{type(error).__name__}: {error}".split())}


def _line_ranges(file: str, rows_per_part: int) -> Iterator[dict]:
    """Byte ranges of `rows_per_part` lines each; a compressed file cannot be entered midway."""
    system, inside = open_filesystem(file, key=KEY)
    if inside.endswith(COMPRESSED):
        yield {}
        return
    begin, first_row, lines, offset = 0, 1, 0, 0
    with system.open_input_stream(inside, compression=None) as stream:
        while chunk := stream.read(_READ_BYTES):
            ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == _NEWLINE) + 1
            # Lines of this chunk that complete a part, counted on from the chunks before.
            for place in range(rows_per_part - lines % rows_per_part - 1, len(ends), rows_per_part):
                end = offset + int(ends[place])
                yield {"begin": begin, "end": end, "first_row": first_row}
                begin, first_row = end, first_row + rows_per_part
            lines += len(ends)
            offset += len(chunk)
    if offset > begin or begin == 0:
        yield {"begin": begin, "end": offset, "first_row": first_row}


def _row_group_ranges(file: str, rows_per_part: int) -> Iterator[dict]:
    """Ranges of whole row groups that reach `rows_per_part` rows."""
    system, inside = open_filesystem(file, key=KEY)
    with system.open_input_file(inside) as stream:
        metadata = pq.ParquetFile(stream).metadata
    begin, first_row, rows = 0, 1, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= rows_per_part or group == metadata.num_row_groups - 1:
            yield {"begin": begin, "end": group + 1, "first_row": first_row}
            begin, first_row, rows = group + 1, first_row + rows, 0


def _row_ranges(corpus: DatasetCorpus, file: CorpusFile) -> Iterator[dict]:
    from pear_ray.corpus.saved import open_dataset  # noqa: PLC0415 - seconds, and seldom wanted

    size = len(open_dataset(file.path, file.format, corpus.split))
    for begin in range(0, size, corpus.rows_per_part):
        end = min(begin + corpus.rows_per_part, size)
        yield {"begin": begin, "end": end, "first_row": begin + 1}
