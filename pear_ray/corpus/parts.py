"""Where a corpus's rows are: its files, cut into parts that one task each prepares."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pear_ray.config.corpus import DatasetCorpus
from pear_ray.errors import InputError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".bz2")
HUB = "hub:"
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")
HASHED_BYTES = 4 * 2**30  # of content that a fingerprint reads; more is known by size and time
_READ_BYTES = 8 * 2**20
_NEWLINE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a corpus that one task prepares.

    Attributes:
        index: Its place in the corpus's order.
        file: Path or URI of the file, or the name of the dataset.
        format: `jsonl`, `parquet`, `arrow`, `saved` or `hub`.
        begin: First byte (jsonl), row group (parquet) or row (the others).
        end: Where it ends, in the same unit; None for the end of the file.
        first_row: Number of its first row in the file, counted from 1 (a line, in a JSONL file).
        problem: Why the file cannot be read, or empty.
    """

    index: int
    file: str
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
        Part(index=0, file=file, format=kind, **place)
        for file, kind in list_files(corpus)
        for place in _places(corpus, file, kind)
    )
    return [
        Part(
            index=index,
            file=piece.file,
            format=piece.format,
            begin=piece.begin,
            end=piece.end,
            first_row=piece.first_row,
            problem=piece.problem,
        )
        for index, piece in enumerate(pieces)
    ]


def list_files(corpus: DatasetCorpus) -> list[tuple[str, str]]:
    """Every file of the corpus with its format, sorted; a dataset of `datasets` counts as one.

    Raises:
        InputError: There is nothing there, or no file of a known kind.
    """
    path, wanted = corpus.path, corpus.format
    if wanted == "hub" or path.startswith(HUB):
        return [(path.removeprefix(HUB), "hub")]
    system, inside = open_filesystem(path)
    root = re.split(r"[*?\[]", inside, maxsplit=1)[0]
    if root != inside:  # a pattern: list the folder in front of it
        root = root.rpartition("/")[0] or "."
    info = system.get_file_info(root)
    if info.type is pafs.FileType.NotFound:
        raise InputError(
            f"corpus.path={path}: no such file or folder; give a file, a folder, a pattern, an "
            f"s3:// or gs:// URI, or {HUB}NAME"
        )
    if info.type is pafs.FileType.File:
        return [(path, wanted if wanted != "auto" else _format_of(path))]
    found = system.get_file_info(pafs.FileSelector(root, recursive=True))
    names = sorted(each.path for each in found if each.type is pafs.FileType.File)
    if root != inside:
        names = [name for name in names if fnmatch.fnmatch(name, inside)]
    elif wanted == "saved" or any(f"{root.rstrip('/')}/{mark}" in names for mark in SAVED_MARKS):
        return [(path, "saved")]
    files = [
        (_whole(path, name), kind)
        for name in names
        if (kind := _known_format(name) if wanted == "auto" else wanted)
    ]
    if not files:
        raise InputError(
            f"corpus.path={path}: holds no corpus file ({', '.join(SUFFIXES)}); "
            "check the path, or name the files' corpus.format"
        )
    return files


def corpus_fingerprint(corpus: DatasetCorpus) -> str:
    """Identity of the corpus's content: of its bytes, or beyond 4 GiB of names, sizes and times.

    Raises:
        InputError: There is nothing at `corpus.path`.
    """
    digest = hashlib.sha256()
    for file, kind in list_files(corpus):
        if kind in ("saved", "hub"):
            from pear_ray.corpus.saved import open_dataset  # noqa: PLC0415 - seconds, and seldom

            digest.update(open_dataset(file, kind, corpus.split)._fingerprint.encode())  # noqa: SLF001
            continue
        system, inside = open_filesystem(file)
        info = system.get_file_info(inside)
        digest.update(f"{file.rpartition('/')[2]} {info.size}".encode())
        if isinstance(system, pafs.LocalFileSystem) and info.size <= HASHED_BYTES:
            with Path(inside).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(str(info.mtime_ns).encode())
    return digest.hexdigest()[:20]


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system that `path` is on, and its name there.

    Raises:
        InputError: Its scheme is none that pyarrow knows.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path).expanduser())
    try:
        return pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise InputError(f"corpus.path={path}: cannot be opened ({error})") from error


def _whole(path: str, name: str) -> str:
    """`name`, found under `path`, as a path or URI of its own."""
    scheme, separator, _ = path.partition("://")
    return f"{scheme}{separator}{name}" if separator else name


def _known_format(name: str) -> str | None:
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def _format_of(path: str) -> str:
    kind = _known_format(path)
    if kind is None:
        raise InputError(
            f"corpus.path={path}: its ending is none of {', '.join(SUFFIXES)}; "
            "set corpus.format to what it is"
        )
    return kind


def _places(corpus: DatasetCorpus, file: str, kind: str) -> Iterator[dict]:
    """Begin, end and first row of each part of one file; `problem` where it cannot be read."""
    try:
        if kind == "jsonl":
            yield from _line_ranges(file, corpus.rows_per_part)
        elif kind == "parquet":
            yield from _row_group_ranges(file, corpus.rows_per_part)
        elif kind == "arrow":
            yield {}
        else:
            yield from _row_ranges(corpus, file, kind)
    except (OSError, pa.ArrowException) as error:
        yield {"problem": " ".join(f"{type(error).__name__}: {error}".split())}


def _line_ranges(file: str, rows_per_part: int) -> Iterator[dict]:
    """Byte ranges of `rows_per_part` lines each; a compressed file cannot be entered midway."""
    if file.endswith(COMPRESSED):
        yield {}
        return
    system, inside = open_filesystem(file)
    begin, first_row, lines, offset = 0, 1, 0, 0
    with system.open_input_stream(inside) as stream:
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
    system, inside = open_filesystem(file)
    with system.open_input_file(inside) as stream:
        metadata = pq.ParquetFile(stream).metadata
    begin, first_row, rows = 0, 1, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= rows_per_part or group == metadata.num_row_groups - 1:
            yield {"begin": begin, "end": group + 1, "first_row": first_row}
            begin, first_row, rows = group + 1, first_row + rows, 0


def _row_ranges(corpus: DatasetCorpus, name: str, kind: str) -> Iterator[dict]:
    from pear_ray.corpus.saved import open_dataset  # noqa: PLC0415 - seconds, and seldom wanted

    size = len(open_dataset(name, kind, corpus.split))
    for begin in range(0, size, corpus.rows_per_part):
        end = min(begin + corpus.rows_per_part, size)
        yield {"begin": begin, "end": end, "first_row": begin + 1}
