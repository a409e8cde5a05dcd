"""Scores on disk: blocks of log-probs as engines write them, joined to the corpus they are of.

A block's file holds no ids, only a hash of them: scores join the corpus by place, and the hash says
that they were made from the ids that stand there.
"""

import functools
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.artifacts.tables import CORPUS, SCORED_TOP, TableWriter, read_table, write_rows
from pear_ray.errors import ArtifactError, InputError

ANY_SOURCE = "*"
_AGAIN = "remove the run's score folder and score again"
_BLOCK = pa.schema(
    [
        pa.field("place", pa.int64(), nullable=False),
        pa.field("ids_hash", pa.int64(), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("span_ids", pa.list_(pa.int32())),
        pa.field("top_ids", pa.list_(pa.int32())),
        pa.field("top_logprobs", pa.list_(pa.float32())),
    ]
)
_TOP = ("top_ids", "top_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of one part of the corpus and one source that are scored and written together.

    Attributes:
        part: File name of the corpus's part.
        begin: Place of its first row in the part.
        end: Place after its last row.
        source: Its behavior policy, or `*` for any.
        source_index: Number of the source, for the file's name.
        num_rows: How many rows between `begin` and `end` are of that source.
    """

    part: str
    begin: int
    end: int
    source: str
    source_index: int
    num_rows: int

    def file(self, stage_dir: Path) -> Path:
        """Where the block's scores go; blocks of another size have other names."""
        stem = self.part.removesuffix(".parquet")
        # With its end: after a change of cluster, blocks may begin alike and reach elsewhere.
        name = f"{self.begin:09d}-{self.end:09d}-{self.source_index}.parquet"
        return stage_dir / "blocks" / stem / name


@dataclass(frozen=True, slots=True)
class Scores:
    """One example's log-probs, 0 where nothing trains.

    Attributes:
        logprobs: One per token.
        span_ids: Their spans, where they come in such.
        top_ids: Where asked for, k candidates of each loss token, [num_loss_tokens * k].
        top_logprobs: Their log-probs.
    """

    logprobs: Sequence[float] | np.ndarray
    span_ids: Sequence[int] | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def plan_blocks(
    corpus: Path,
    *,
    sources: Sequence[str],
    rows_per_block: int,
    at_least: int,
    keep_given: bool,
) -> list[Block]:
    """Every block that has a row to score, in order.

    Args:
        corpus: Folder of the corpus's parts.
        sources: Sources with a behavior model; `["*"]` when one model is for all.
        rows_per_block: Rows of a block, fewer where `at_least` would not be reached.
        at_least: A small corpus is cut into so many blocks, so that no engine idles.
        keep_given: Whether rows that came with log-probs are left out.

    Raises:
        InputError: A source of the corpus has no model.
    """
    files = sorted(corpus.glob("*.parquet"))
    num_rows = sum(pq.read_metadata(file).num_rows for file in files)
    size = max(1, min(rows_per_block, -(-num_rows // at_least)))
    blocks = []
    for file in files:
        table = pq.read_table(file, columns=["source", "given_logprobs"])
        names = np.array(table["source"].to_pylist())
        wanted = np.ones(len(names), dtype=bool)
        if keep_given:
            wanted = table["given_logprobs"].is_null().to_numpy()
        _check_sources(names[wanted], sources)
        for begin in range(0, len(names), size):
            end = min(begin + size, len(names))
            for index, source in enumerate(sources):
                own = wanted[begin:end] & ((names[begin:end] == source) | (source == ANY_SOURCE))
                if own.any():
                    blocks.append(
                        Block(
                            part=file.name,
                            begin=begin,
                            end=end,
                            source=source,
                            source_index=index,
                            num_rows=int(own.sum()),
                        )
                    )
    return blocks


def rows_to_score(part: pa.Table, block: Block, *, keep_given: bool) -> list[dict[str, Any]]:
    """The block's rows, each with its `place` in the part."""
    rows = part.slice(block.begin, block.end - block.begin).to_pylist()
    return [
        row | {"place": block.begin + offset}
        for offset, row in enumerate(rows)
        if block.source in (ANY_SOURCE, row["source"])
        and not (keep_given and row["given_logprobs"] is not None)
    ]


def write_block(
    stage_dir: Path,
    block: Block,
    rows: Sequence[dict[str, Any]],
    scored: Iterable[Scores],
) -> None:
    """Write one block's scores, one for each of `rows`, whole or not at all."""
    path = block.file(stage_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [
        {
            "place": row["place"],
            "ids_hash": ids_hash(row["token_ids"]),
            "logprobs": each.logprobs,
            "span_ids": each.span_ids,
            "top_ids": each.top_ids,
            "top_logprobs": each.top_logprobs,
        }
        for row, each in zip(rows, scored, strict=True)
    ]
    write_rows(path, table, _BLOCK)


def ids_hash(token_ids: Sequence[int]) -> int:
    """A 64-bit hash of token ids, as a signed integer."""
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int32).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), signed=True)


def join_scores(
    corpus: Path, stage_dir: Path, name: str, *, keep_given: bool, top_k: int = 0
) -> None:
    """Write the folder `name`, part by part in the corpus's order, from the corpus and the blocks.

    Raises:
        ArtifactError: A row has no score, or one of other ids, another length or another number of
            candidates; nothing is ever cut to the shorter.
    """
    folder = stage_dir / name
    folder.mkdir(exist_ok=True)
    for file in sorted(corpus.glob("*.parquet")):
        if (folder / file.name).exists():
            continue
        found = _BlockRows(stage_dir / "blocks" / file.stem)
        with TableWriter(folder / file.name, SCORED_TOP) as joined:
            for place, row in enumerate(read_table(file, CORPUS).to_pylist()):
                if keep_given and row["given_logprobs"] is not None:
                    scores = Scores(row["given_logprobs"])
                else:
                    scores = _scores_of(row, found.get(place), top_k=top_k)
                _check_length(row, "log-probs", scores.logprobs, len(row["token_ids"]))
                joined.write(_joined(row, scores))


def remove_blocks(stage_dir: Path) -> None:
    """Remove what a resumed attempt would have gone on from; once the artifact is complete."""
    shutil.rmtree(stage_dir / "blocks", ignore_errors=True)


class _BlockRows:
    """Rows of one part's blocks by place; only blocks in use are held, for candidates are large."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.parquet"))
        self._found = {
            place: (file, index)
            for file in files
            for index, place in enumerate(
                pq.read_table(file, columns=["place"])["place"].to_pylist()
            )
        }
        # Rows of several sources alternate, and each source has a block of its own.
        num_sources = len({file.stem.rpartition("-")[2] for file in files})
        self._read = functools.lru_cache(maxsize=num_sources)(_read_block)

    def get(self, place: int) -> dict[str, Any] | None:
        """The row of `place`, its candidates as arrays."""
        if place not in self._found:
            return None
        file, index = self._found[place]
        rows, top = self._read(file)
        return rows[index] | {name: _array(top[name][index]) for name in _TOP}


def _read_block(file: Path) -> tuple[list[dict[str, Any]], pa.Table]:
    table = read_table(file, _BLOCK)
    return table.drop_columns(_TOP).to_pylist(), table.select(_TOP)


def _array(values: pa.ListScalar) -> np.ndarray | None:
    return values.values.to_numpy() if values.is_valid else None


def _scores_of(row: dict[str, Any], scored: Mapping[str, Any] | None, *, top_k: int) -> Scores:
    if scored is None:
        raise ArtifactError(f"example {row['example_id']!r} was not scored; {_AGAIN}")
    if scored["ids_hash"] != ids_hash(row["token_ids"]):
        raise ArtifactError(
            f"example {row['example_id']!r} was scored on other token ids; {_AGAIN}"
        )
    wanted = sum(row["loss_mask"][1:]) * top_k if top_k else None
    for name in _TOP:
        _check_length(row, name, scored[name], wanted)
    return Scores(*(scored[name] for name in ("logprobs", "span_ids", *_TOP)))


def _check_length(
    row: dict[str, Any], name: str, values: Sequence[Any] | np.ndarray | None, wanted: int | None
) -> None:
    found = None if values is None else len(values)
    if found != wanted:
        raise ArtifactError(
            f"example {row['example_id']!r} has {len(row['token_ids'])} tokens, "
            f"{sum(row['loss_mask'][1:])} of which train, and {_count(found)} {name} where "
            f"{_count(wanted)} belong; {_AGAIN}"
        )


def _count(number: int | None) -> str:
    return "no" if number is None else str(number)


def _joined(row: dict[str, Any], scores: Scores) -> dict[str, Any]:
    row = row | {
        "behavior_logprobs": scores.logprobs,
        "span_ids": scores.span_ids,
        "top_ids": scores.top_ids,
        "top_logprobs": scores.top_logprobs,
    }
    return {name: row[name] for name in SCORED_TOP.names}


def _check_sources(names: np.ndarray, sources: Sequence[str]) -> None:
    if ANY_SOURCE in sources:
        return
    missing = sorted(set(names.tolist()) - set(sources))
    if missing:
        raise InputError(
            f"models.behavior has no model for source {', '.join(map(repr, missing))} of the "
            f"corpus (it has {', '.join(sources) or 'none'}); name one for each, give one model "
            "for all, or set score.given=keep where the rows bring log-probs"
        )
