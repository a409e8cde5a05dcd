"""One part of a corpus made ready: read, checked, tokenised, written, with its bad rows aside."""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.tables import CORPUS, QUARANTINE, TableWriter
from pear_ray.config.corpus import DatasetCorpus
from pear_ray.config.run import RunConfig
from pear_ray.corpus.parts import Part
from pear_ray.corpus.read import read_rows
from pear_ray.corpus.rows import BadRow, Reason, RowReader
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import vocab_size

WORK_FOLDERS = ("quarantine", "parts")  # of bad rows and summaries by part, until all are done


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareJob:
    """What every part is prepared with.

    Attributes:
        corpus: Where rows come from and what they are called.
        model: Folder of the target model: its tokenizer, template and vocabulary.
        max_model_len: Longest example, in tokens.
        folder: The collect stage's folder.
        aligned: Source and folder of each behavior model whose tokenizer is another; empty where
            all have the target's.
    """

    corpus: DatasetCorpus
    model: Path
    max_model_len: int
    folder: Path
    aligned: tuple[tuple[str, Path], ...] = ()

    def rows_file(self, index: int) -> Path:
        """Where the examples of part `index` go."""
        return self.folder / "corpus" / f"part-{index:06d}.parquet"

    def quarantine_file(self, index: int) -> Path:
        """Where its bad rows go."""
        return self.folder / "quarantine" / f"part-{index:06d}.parquet"

    def summary_file(self, index: int) -> Path:
        """What says that the part is done; written last."""
        return self.folder / "parts" / f"part-{index:06d}.json"


def prepare_job(
    config: RunConfig,
    corpus: DatasetCorpus,
    policy: Path,
    behavior: Mapping[str, Path],
    *,
    folder: Path,
) -> PrepareJob:
    """The run's job of preparing `corpus` into `folder`."""
    aligned = tuple(behavior.items()) if config.models.align == "bytes" else ()
    return PrepareJob(
        corpus=corpus,
        model=policy,
        max_model_len=config.models.max_model_len,
        folder=folder,
        aligned=aligned,
    )


@dataclass(slots=True)
class PartSummary:
    """Counts of one part, or of several added up."""

    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    negatives: int = 0
    cut: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def num_bad(self) -> int:
        """Rows that cannot be used."""
        return sum(self.bad.values())

    def count(self, example: dict[str, Any]) -> None:
        """Count one example."""
        self.rows += 1
        self.tokens += len(example["token_ids"])
        self.loss_tokens += sum(example["loss_mask"][1:])
        self.negatives += example["is_negative"]
        self.sources[example["source"]] += 1

    def add(self, other: "PartSummary") -> None:
        """Add another part's counts."""
        for name in ("rows", "tokens", "loss_tokens", "negatives", "cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad.update(other.bad)
        self.sources.update(other.sources)
        self.unreadable.update(other.unreadable)


def write_summary(path: Path, summary: PartSummary) -> None:
    """Write a summary, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not asdict(): it takes a Counter's items for things to count.
    write_json(path, {name: getattr(summary, name) for name in PartSummary.__slots__})


def read_summary(path: Path) -> PartSummary:
    """A summary as `write_summary` wrote it."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return PartSummary(
        **tree | {name: Counter(tree[name]) for name in ("bad", "sources")},
    )


def is_prepared(part: Part, job: PrepareJob) -> bool:
    """Whether an earlier attempt read the part to its end; if not, by now it may be readable."""
    file = job.summary_file(part.index)
    return file.exists() and not read_summary(file).unreadable


def prepare_part(part: Part, job: PrepareJob) -> PartSummary:
    """Write the part's examples and bad rows, then its summary; memory is that of a few rows.

    A file that breaks off is no error here: what was read of it stays, and the summary names it.
    """
    summary = PartSummary()
    rows_file, quarantine_file = job.rows_file(part.index), job.quarantine_file(part.index)
    with TableWriter(rows_file, CORPUS) as kept, TableWriter(quarantine_file, QUARANTINE) as bad:
        for verdict in examples(part, job, summary):
            if isinstance(verdict, dict):
                kept.write(verdict)
            else:
                row, problem = verdict
                bad.write(quarantined(part.file, row, problem))
    write_summary(job.summary_file(part.index), summary)
    return summary


def examples(
    part: Part, job: PrepareJob, summary: PartSummary
) -> Iterator[dict[str, Any] | tuple[int | None, BadRow]]:
    """Every row of the part as an example, or its number and why it is none; counts them all."""
    reader = row_reader(job)
    try:
        for row, tree in read_rows(part, split=job.corpus.split):
            try:
                example, was_cut = reader.example(tree, part=part, row=row)
            except BadRow as problem:
                summary.bad[problem.reason.value] += 1
                yield row, problem
                continue
            summary.count(example)
            summary.cut += was_cut
            yield example
    except (OSError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        summary.unreadable[part.file] = said
        yield None, BadRow(Reason.UNREADABLE, "", f"the file cannot be read: {said}")


@functools.lru_cache(maxsize=1)
def row_reader(job: PrepareJob) -> RowReader:
    """The job's reader; loading its tokenizer takes a second, once per process."""
    return RowReader(
        corpus=job.corpus,
        chat=ChatTokenizer(job.model),
        vocab_size=vocab_size(job.model),
        max_model_len=job.max_model_len,
        behavior={source: ChatTokenizer(model) for source, model in job.aligned},
    )


def quarantined(file: str, row: int | None, problem: BadRow) -> dict[str, Any]:
    """A bad row as a row of `artifacts.tables.QUARANTINE`."""
    return {
        "file": file,
        "row": row,
        "field": problem.field,
        "reason": problem.reason.value,
        "detail": problem.detail,
    }
