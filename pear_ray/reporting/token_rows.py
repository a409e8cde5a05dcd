"""Rows of a table with what colours their tokens: log-ratios where both policies scored them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pear_ray.artifacts.manifest import read_manifest
from pear_ray.config.sft import PearWeights
from pear_ray.errors import ArtifactError
from pear_ray.reporting.diagnosis.numbers import row_weights
from pear_ray.reporting.diagnosis.rows import LOGPROBS_COLUMN, ScoredRow
from pear_ray.reporting.token_view import TokenRow

GIVEN_COLUMN = "given_logprobs"
# The tables that hold the two sides of a ratio.
_SCORED, _POLICY = Path("score/scored"), Path("diagnose/policy")


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row and the file that it is in."""

    file: Path
    values: dict[str, Any]


def opened(file: Path) -> pq.ParquetFile:
    """The Parquet file, its metadata read.

    Raises:
        ArtifactError: It is none.
    """
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{file}: not a Parquet file ({error}); give a stage's folder of a run or a Parquet "
            "file, or run the stage that makes it again"
        ) from error


def first_rows(files: Sequence[Path], num_rows: int) -> list[TableRow]:
    """The first rows of the files in order; nothing more is read."""
    if not num_rows:
        return []

    def rows() -> Iterator[TableRow]:
        for file in files:
            with opened(file) as parquet:
                for batch in parquet.iter_batches(num_rows):
                    yield from (TableRow(file, values) for values in batch.to_pylist())

    return list(itertools.islice(rows(), num_rows))


def both_logprobs(
    run_dir: Path | None, rows: Sequence[TableRow], notes: list[str]
) -> list[ScoredRow]:
    """The rows with both policies' scores.

    Empty where one side is missing or unfinished, or (which is added to `notes`) of other tokens.
    """
    scored: list[ScoredRow] = []
    for file, group in itertools.groupby(rows, key=lambda row: row.file):
        counterpart = _counterpart(run_dir, file.resolve()) if run_dir else None
        if counterpart is None:
            return []
        mine = [row.values for row in group]
        others = _rows_by_id(counterpart.file, [values["example_id"] for values in mine])
        for values in mine:
            other = others.get(values["example_id"], {})
            if any(other.get(name) != values[name] for name in ("token_ids", "loss_mask")):
                notes.append(
                    f"no log-ratios: {counterpart.file} does not hold example "
                    f"{values['example_id']!r} with the same tokens; run the stage `diagnose` again"
                )
                return []
            sides = (_logprobs(values, LOGPROBS_COLUMN), _logprobs(other, LOGPROBS_COLUMN))
            scored.append(_scored_row(values, *(sides if counterpart.is_policy else sides[::-1])))
    return scored


def ratio_row(row: ScoredRow, texts: Sequence[str], settings: PearWeights) -> TokenRow:
    """Coloured by log-ratio and lettered by weight; a negative has no token weights."""
    mask, log_ratios = row.loss_mask, row.policy_logprobs - row.behavior_logprobs
    told = [_about(row.example_id, row.source, mask, is_negative=row.is_negative)]
    weights = None
    if mask.any():
        told.append(f"mean log-ratio {log_ratios[mask].mean():.3f}")
        if not row.is_negative and np.isfinite(log_ratios[mask]).all():
            weights = row_weights([row], settings).weights.numpy()
            told.append(f"mean weight {weights[mask].mean():.3f}")
    return TokenRow(
        ", ".join(told),
        texts,
        mask.tolist(),
        log_ratios.tolist(),
        None if weights is None else weights.tolist(),
    )


def own_logprobs(run_dir: Path | None, row: TableRow) -> tuple[str, str]:
    """The column that colours a table by itself and its name; both empty where there is none."""
    if row.values.get(LOGPROBS_COLUMN) is not None:
        is_policy = run_dir is not None and row.file.resolve().is_relative_to(run_dir / _POLICY)
        return LOGPROBS_COLUMN, "policy log-prob" if is_policy else "behavior log-prob"
    if row.values.get(GIVEN_COLUMN) is not None:
        return GIVEN_COLUMN, "log-prob as sampled"
    return "", ""


def plain_row(row: TableRow, texts: Sequence[str], column: str) -> TokenRow:
    """Coloured by the log-probs of `column`, where it is named and the row has them."""
    values, mask = row.values, _mask(row.values)
    about = _about(
        str(values.get("example_id", "")),
        str(values.get("source", "")),
        mask,
        is_negative=bool(values.get("is_negative")),
    )
    if not column or values[column] is None or not mask.any():
        return TokenRow(about, texts, mask.tolist())
    logprobs = _logprobs(values, column)
    told = f"{about}, mean log-prob {logprobs[mask].mean():.3f}"
    return TokenRow(told, texts, mask.tolist(), logprobs.tolist())


@dataclass(frozen=True, slots=True)
class _Counterpart:
    """The file with the other policy's scores of the same rows."""

    file: Path
    is_policy: bool


def _counterpart(run_dir: Path, file: Path) -> _Counterpart | None:
    for mine, other in ((_SCORED, _POLICY), (_POLICY, _SCORED)):
        if file.is_relative_to(run_dir / mine):
            path = run_dir / other / file.relative_to(run_dir / mine)
            if path.exists() and read_manifest((run_dir / other).parent):
                return _Counterpart(path, is_policy=other == _POLICY)
    return None


def _rows_by_id(file: Path, example_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    columns = ["example_id", "token_ids", "loss_mask", LOGPROBS_COLUMN]
    try:
        table = pq.read_table(file, columns=columns, filters=[("example_id", "in", example_ids)])
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{file}: not a table of scores ({error}); run the stage that makes it again"
        ) from error
    return {row["example_id"]: row for row in table.to_pylist()}


def _scored_row(
    values: Mapping[str, Any],
    behavior_logprobs: NDArray[np.float32],
    policy_logprobs: NDArray[np.float32],
) -> ScoredRow:
    return ScoredRow(
        example_id=values["example_id"],
        source=values["source"],
        token_ids=np.array(values["token_ids"], dtype=np.int32),
        loss_mask=_mask(values),
        behavior_logprobs=behavior_logprobs,
        policy_logprobs=policy_logprobs,
        is_negative=bool(values.get("is_negative")),
    )


def _mask(values: Mapping[str, Any]) -> NDArray[np.bool_]:
    return np.array(_aligned(values, "loss_mask"), dtype=bool)


def _logprobs(values: Mapping[str, Any], column: str) -> NDArray[np.float32]:
    return np.array(_aligned(values, column), dtype=np.float32)  # a null becomes NaN


def _aligned(values: Mapping[str, Any], column: str) -> list[Any]:
    """The row's list in `column`, one entry for each token.

    Raises:
        ArtifactError: There is another number of them.
    """
    if len(values[column]) != len(values["token_ids"]):
        raise ArtifactError(
            f"example {values.get('example_id')!r} has {len(values[column])} {column} for "
            f"{len(values['token_ids'])} tokens; run the stage that makes it again"
        )
    return values[column]


def _about(example_id: str, source: str, loss_mask: NDArray[np.bool_], *, is_negative: bool) -> str:
    negative = ", negative" if is_negative else ""
    return (
        f"{example_id} of {source}{negative}: {len(loss_mask)} tokens, {int(loss_mask.sum())} train"
    )
