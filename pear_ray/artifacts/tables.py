"""Declared Parquet schemas: what each table holds, checked when written and when read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.artifacts.partial import partial_of
from pear_ray.errors import ArtifactError

_EXAMPLE = [
    pa.field("example_id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("is_negative", pa.bool_(), nullable=False),
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
]
# `messages` is JSON; `file` and `row` say where the example was read, `problem_id` what it answers;
# `given_logprobs` came with the row: as sampled, or collected elsewhere.
CORPUS = pa.schema(
    [
        *_EXAMPLE,
        pa.field("problem_id", pa.string()),
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("messages", pa.string()),
        pa.field("given_logprobs", pa.list_(pa.float32())),
    ]
)
# `row` is None where a whole file is at fault.
QUARANTINE = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("field", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
PASS_RATES = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("num_judged", pa.int32(), nullable=False),
        pa.field("num_correct", pa.int32(), nullable=False),
        pa.field("pass_rate", pa.float32()),
    ]
)
SCORED = pa.schema(
    [
        *_EXAMPLE,
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
        # Only where the behavior model has another tokenizer: -1 outside the loss mask.
        pa.field("span_ids", pa.list_(pa.int32())),
    ]
)
# What the score stage writes. For each loss token (never a sequence's first) the behavior model's
# k likeliest ids, its own id among them: [num_loss_tokens * k], null where none were asked for or
# log-probs were kept as given. Apart from SCORED, whose readers need not load so much.
SCORED_TOP = pa.schema(
    [
        *SCORED,
        pa.field("top_ids", pa.list_(pa.int32())),
        pa.field("top_logprobs", pa.list_(pa.float32())),
    ]
)
WEIGHT_SAMPLES = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("tokens_left", pa.int32(), nullable=False),
        pa.field("log_ratio", pa.float32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
# All that the metrics of `results.json` are computed from. `answer` is what votes in maj@n;
# `logprob_sum` is over the completion's tokens, at the sampling temperature.
EVALUATION_SAMPLES = pa.schema(
    [
        pa.field("suite", pa.string(), nullable=False),
        pa.field("checkpoint", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward_status", pa.string(), nullable=False),
        pa.field("reward_value", pa.float64(), nullable=False),
        pa.field("reward_components", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("logprob_sum", pa.float64(), nullable=False),
    ]
)
# `step` counts from 1; `group` is the problem's place in the step, `entry` the verifier's record of
# it. An errored reward has no value. `proximal_logprobs` are the trainer's before the step's first
# update, `advantage` is the mean over the completion's tokens; null where nothing was trained.
ROLLOUTS = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("entry", pa.string(), nullable=False),
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("proximal_logprobs", pa.list_(pa.float32())),
        pa.field("reward_status", pa.string(), nullable=False),
        pa.field("reward_value", pa.float64()),
        pa.field("reward_detail", pa.string(), nullable=False),
        pa.field("reward_components", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("advantage", pa.float32()),
    ]
)


ROWS_PER_WRITE = 512


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write `rows` as one Parquet file, whole or not at all."""
    partial = partial_of(path)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), partial)
    partial.replace(path)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The rows of one Parquet file or of a folder of them, with exactly the columns of `schema`.

    No other column is loaded.

    Raises:
        ArtifactError: A file is missing, or a column is missing or of another type.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise ArtifactError(f"{path}: no Parquet file there; run the stage that makes it again")
    try:
        tables = [pq.read_table(file, columns=schema.names).cast(schema) for file in files]
    except (KeyError, OSError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path}: not a table of this version ({error}); run the stage that makes it again"
        ) from error
    return pa.concat_tables(tables)


class TableWriter:
    """Writes rows as one Parquet file, a few hundred at a time; whole or not at all."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Write rows of `schema` to `path`, whose folder is made if it is missing."""
        self._path, self._schema = path, schema
        self._partial = partial_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(self._partial, schema)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> "TableWriter":
        """The writer; its file is there once the `with` block has ended well."""
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_WRITE:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Put the file in its place, or remove what was written of it."""
        try:
            if kind is None:
                self._flush()
            self._file.close()
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)
