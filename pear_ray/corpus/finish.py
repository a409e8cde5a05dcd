"""What is known only once every part is prepared: repeated ids, the quarantine, the verdict."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pear_ray.artifacts.tables import CORPUS, QUARANTINE, TableWriter
from pear_ray.config.corpus import DatasetCorpus
from pear_ray.corpus.parts import Part
from pear_ray.corpus.prepare import (
    PartSummary,
    PrepareJob,
    examples,
    quarantined,
    read_summary,
    write_summary,
)
from pear_ray.corpus.rows import BadRow, Reason
from pear_ray.errors import InputError

SHOWN_ROWS = 10
PREVIEW_ROWS = 1000
HOPELESS_FRACTION = 0.5  # of the first rows: a column mapping that is wrong, rather than bad luck
QUARANTINE_FILE = "quarantine.parquet"


def finish(parts: Sequence[Part], job: PrepareJob) -> PartSummary:
    """Set repeated ids aside, write `quarantine.parquet`, and judge the whole; its counts.

    Raises:
        InputError: A file cannot be read, too large a share of the rows cannot be used, or none
            can. `quarantine.parquet` is there by then, and says which and why.
    """
    _quarantine_repeated_ids(parts, job)
    total = PartSummary()
    for part in parts:
        total.add(read_summary(job.summary_file(part.index)))
    quarantine = job.folder / QUARANTINE_FILE
    with TableWriter(quarantine, QUARANTINE) as writer:
        for part in parts:
            for row in _rows_of(job.quarantine_file(part.index)):
                writer.write(row)
    shown = [_shown(row) for row in itertools.islice(_rows_of(quarantine), SHOWN_ROWS)]
    _refuse_unreadable(total, job.corpus)
    _judge(total, shown, job.corpus, more=f"all of them are in {quarantine}")
    return total


def preview(parts: Sequence[Part], job: PrepareJob) -> None:
    """Look at the first thousand rows, and refuse what is hopeless before anything starts.

    Raises:
        InputError: A file cannot be read; the corpus is that short and would be refused at the
            end; or half of what was seen cannot be used.
    """
    total = PartSummary(unreadable={part.file: part.problem for part in parts if part.problem})
    rows = _first_rows(parts, job, total)
    problems = [row for row in itertools.islice(rows, PREVIEW_ROWS) if row is not None]
    seen_all = next(rows, total) is total  # nothing was left
    _refuse_unreadable(total, job.corpus)
    if seen_all or total.num_bad > HOPELESS_FRACTION * PREVIEW_ROWS:
        shown = [_shown(row) for row in problems[:SHOWN_ROWS]]
        _judge(total, shown, job.corpus, more="among the rows looked at")


def _first_rows(
    parts: Sequence[Part], job: PrepareJob, total: PartSummary
) -> Iterator[dict[str, Any] | None]:
    """For each row its line of the quarantine, or None where it can be used; counts them all."""
    first_seen: dict[str, str] = {}
    for part in parts:
        for verdict in examples(part, job, total):
            if not isinstance(verdict, dict):
                yield quarantined(part.file, *verdict)
                continue
            example_id, where = verdict["example_id"], f"row {verdict['row']} of {part.file}"
            first = first_seen.setdefault(example_id, where)
            if first == where:
                yield None
                continue
            total.rows -= 1
            total.bad[Reason.DUPLICATE_ID.value] += 1
            yield quarantined(part.file, verdict["row"], _repeated(example_id, first))


def _refuse_unreadable(total: PartSummary, corpus: DatasetCorpus) -> None:
    if total.unreadable and corpus.unreadable_files == "stop":
        files = "\n".join(f"  {file}: {why}" for file, why in total.unreadable.items())
        raise InputError(
            f"corpus.path={corpus.path}: {len(total.unreadable)} files cannot be read; mend or "
            f"remove them, or set corpus.unreadable_files=skip\n{files}"
        )


def _judge(total: PartSummary, shown: Sequence[str], corpus: DatasetCorpus, *, more: str) -> None:
    num_rows = total.rows + total.num_bad
    if not num_rows:
        skipped = f" ({len(total.unreadable)} files cannot be read)" if total.unreadable else ""
        raise InputError(
            f"corpus.path={corpus.path}: the corpus is empty; it needs at least one row{skipped}"
        )
    if total.rows and total.num_bad / num_rows <= corpus.max_bad_fraction:
        return
    reasons = "\n".join(f"  {count:>8} {reason}" for reason, count in total.bad.most_common())
    raise InputError(
        f"corpus.path={corpus.path}: {total.num_bad} of {num_rows} rows cannot be used, more "
        f"than corpus.max_bad_fraction={corpus.max_bad_fraction:g} allows (never all of them); "
        f"mend or remove them, or raise it\n{reasons}\nthe first ({more}):\n" + "\n".join(shown)
    )


def _shown(row: dict[str, Any]) -> str:
    where = f"  {row['file']}" + (f" row {row['row']}" if row["row"] is not None else "")
    return f"{where}: " + (f"{row['field']}: " if row["field"] else "") + row["detail"]


def _repeated(example_id: str, first: str) -> BadRow:
    return BadRow(Reason.DUPLICATE_ID, "id", f"{example_id!r} is the id of {first} already")


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(512):
            yield from batch.to_pylist()


def _quarantine_repeated_ids(parts: Sequence[Part], job: PrepareJob) -> None:
    """Keep the first row of each id; eight bytes per row are all that is held of the corpus.

    Killed anywhere, it does the same again: a part's rows are replaced last.
    """
    hashes = [_id_hashes(job.rows_file(part.index)) for part in parts]
    if not hashes:
        return
    every = np.concatenate(hashes)
    values, counts = np.unique(every, return_counts=True)
    suspects = values[counts > 1]
    if not len(suspects):
        return
    first_seen: dict[str, str] = {}
    for part, own in zip(parts, hashes, strict=True):
        if np.isin(own, suspects).any():
            _without_repeated(part, job, np.isin(own, suspects), first_seen)


def _without_repeated(
    part: Part, job: PrepareJob, suspect: np.ndarray, first_seen: dict[str, str]
) -> None:
    kept_file, bad_file = job.rows_file(part.index), job.quarantine_file(part.index)
    repeated: list[tuple[int, dict[str, Any]]] = []
    for place, row in enumerate(_rows_of(kept_file)):
        if suspect[place]:  # two ids may share a hash: the ids themselves decide
            where = f"row {row['row']} of {row['file']}"
            first = first_seen.setdefault(row["example_id"], where)
            if first != where:
                problem = _repeated(row["example_id"], first)
                repeated.append((place, quarantined(part.file, row["row"], problem)))
    if not repeated:
        return
    earlier = [r for r in _rows_of(bad_file) if r["reason"] != Reason.DUPLICATE_ID.value]
    with TableWriter(bad_file, QUARANTINE) as writer:
        for row in [*earlier, *(row for _, row in repeated)]:
            writer.write(row)
    before = read_summary(job.summary_file(part.index))
    summary = PartSummary(cut=before.cut, unreadable=before.unreadable)
    dropped = {place for place, _ in repeated}
    with TableWriter(kept_file, CORPUS) as writer:
        for place, row in enumerate(_rows_of(kept_file)):
            if place not in dropped:
                writer.write(row)
                summary.count(row)
        for row in _rows_of(bad_file):
            if row["row"] is not None:  # else a whole file, which is no row
                summary.bad[row["reason"]] += 1
        write_summary(job.summary_file(part.index), summary)


def _id_hashes(file: Path) -> np.ndarray:
    """A 64-bit hash of each example id, in order."""
    ids = pq.read_table(file, columns=["example_id"])["example_id"]
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(each.as_py().encode(), digest_size=8).digest())
            for each in ids
        ],
        dtype=np.uint64,
    )
