"""What a diagnosis reads: the corpus's rows under both policies, shard by shard."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pear_ray.artifacts.tables import SCORED, read_table
from pear_ray.errors import ArtifactError

ROWS_PER_BATCH = 64
# Both folders hold the scored table. `diagnose/policy` keeps the name of the log-prob column: there
# it is the target policy's.
LOGPROBS_COLUMN = "behavior_logprobs"
_LIST_COLUMNS = ("token_ids", "loss_mask", LOGPROBS_COLUMN)


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One row of the corpus with log-probs of both policies.

    Attributes:
        example_id: Unique within the corpus.
        source: Which behavior policy wrote it.
        token_ids: Prompt and completion, [token].
        loss_mask: True where a token trains, [token].
        behavior_logprobs: Nats, [token]; read only where `loss_mask` is True.
        policy_logprobs: Under the initial target policy, nats, [token]; read likewise.
        is_negative: A known-wrong trace, which the token weights are not for.
        span_ids: The span of each token, -1 outside the loss mask, where the behavior model has
            another tokenizer and one log-prob per span, [token].
    """

    example_id: str
    source: str
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    behavior_logprobs: NDArray[np.float32]
    policy_logprobs: NDArray[np.float32]
    is_negative: bool = False
    span_ids: NDArray[np.int32] | None = None


def load_diagnosis_rows(score_dir: Path, policy_dir: Path) -> Iterator[list[ScoredRow]]:
    """Batches of rows from two folders of shards, one pair of shards in memory at a time.

    Shards pair by name, their rows by `example_id`, in whose order they come.

    Args:
        score_dir: Shards with the behavior policy's log-probs: `score/scored` of a run.
        policy_dir: Shards of the same rows with the target policy's: `diagnose/policy`.

    Raises:
        ArtifactError: A shard is missing on one side or is no such table, or two paired shards
            differ in ids, sources, tokens or masks: nothing is ever cut to the shorter.
    """
    for name in _paired_names(score_dir, policy_dir):
        behavior = _read_shard(score_dir / name)
        policy = _read_shard(policy_dir / name)
        _check_same_rows(behavior, policy, shard=policy_dir / name)
        for start in range(0, len(behavior), ROWS_PER_BATCH):
            yield _rows(behavior.slice(start, ROWS_PER_BATCH), policy.slice(start, ROWS_PER_BATCH))


def _paired_names(score_dir: Path, policy_dir: Path) -> list[Path]:
    """The shards' paths below both folders, in order."""
    scored, policy = (
        {path.relative_to(folder) for path in folder.rglob("*.parquet")}
        for folder in (score_dir, policy_dir)
    )
    if not scored:
        raise ArtifactError(f"{score_dir}: no Parquet file there; run the stage `score` again")
    if scored != policy:
        one = min(scored ^ policy)
        there, absent = (score_dir, policy_dir) if one in scored else (policy_dir, score_dir)
        raise ArtifactError(
            f"{absent}: {len(scored ^ policy)} of {len(scored | policy)} shards have no "
            f"counterpart, the first {one}, which {there} has; run the stage `diagnose` again"
        )
    return sorted(scored)


def _read_shard(path: Path) -> pa.Table:
    """One shard's rows, sorted by id, every list as long as its token ids.

    Raises:
        ArtifactError: It is no such table, has nulls inside a list, or lists of unequal length.
    """
    table = read_table(path, SCORED).sort_by("example_id").combine_chunks()
    lists = {name: table[name].combine_chunks() for name in _LIST_COLUMNS}
    for name, column in lists.items():
        if column.flatten().null_count:
            raise ArtifactError(f"{path}: {name} holds nulls; run the stage that makes it again")
        if not column.value_lengths().equals(lists["token_ids"].value_lengths()):
            raise ArtifactError(
                f"{path}: some rows have another number of {name} than of token_ids; run the "
                "stage that makes it again"
            )
    return table


def _check_same_rows(behavior: pa.Table, policy: pa.Table, *, shard: Path) -> None:
    again = "remove the run's diagnose folder and run the stage `diagnose` again"
    if len(behavior) != len(policy):
        raise ArtifactError(
            f"{shard}: {len(behavior)} rows are scored under the behavior policy and {len(policy)} "
            f"under the target policy; {again}"
        )
    for column in SCORED.names:
        left, right = behavior[column].combine_chunks(), policy[column].combine_chunks()
        if column not in (LOGPROBS_COLUMN, "span_ids") and not left.equals(right):
            ids = behavior["example_id"].to_pylist()
            pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
            one = next(row for row, (a, b) in zip(ids, pairs, strict=True) if a != b)
            raise ArtifactError(
                f"{shard}: example {one!r} differs in {column} between the two policies' scores; "
                f"{again}"
            )


def _rows(behavior: pa.Table, policy: pa.Table) -> list[ScoredRow]:
    spans = behavior["span_ids"]
    columns = zip(
        *(behavior[name].to_pylist() for name in ("example_id", "source")),
        *(_arrays(behavior[name]) for name in _LIST_COLUMNS),
        _arrays(policy[LOGPROBS_COLUMN]),
        behavior["is_negative"].to_pylist(),
        [None] * len(behavior) if spans.null_count else _arrays(spans),
        strict=True,
    )
    return [ScoredRow(*row) for row in columns]


def _arrays(column: pa.ChunkedArray) -> list[NDArray]:
    """Each row's list as a view into one flat array."""
    lists = column.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return np.split(flat, np.cumsum(lists.value_lengths().to_numpy())[:-1])
