"""Declared Parquet schemas: what each table holds, checked when written and when read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.errors import ArtifactError

CORPUS = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("problem_id", pa.string()),
        pa.field("question", pa.string()),
        pa.field("completion", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("sampled_logprobs", pa.list_(pa.float32())),
    ]
)
SCORED = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
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
EVALUATION_SAMPLES = pa.schema(
    [
        pa.field("checkpoint", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward_status", pa.string(), nullable=False),
        pa.field("reward_value", pa.float32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write `rows` as one Parquet file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), partial)
    partial.replace(path)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The rows of one Parquet file or of a folder of them, with exactly the columns of `schema`.

    Raises:
        ArtifactError: A file is missing, or a column is missing or of another type.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise ArtifactError(f"{path}: no Parquet file there; run the stage that makes it again")
    try:
        tables = [pq.read_table(file).select(schema.names).cast(schema) for file in files]
    except (KeyError, OSError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path}: not a table of this version ({error}); run the stage that makes it again"
        ) from error
    return pa.concat_tables(tables)
