"""What a study has found, as tables that its analysis reads: runs, scores, curves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pear_ray.artifacts.tables import read_table, write_rows

RUNS_FILE, SCORES_FILE, CURVES_FILE = "runs.parquet", "scores.parquet", "curves.parquet"

_CELL = [
    pa.field("arm", pa.string(), nullable=False),
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("learning_rate", pa.float64()),
    pa.field("is_tuning", pa.bool_(), nullable=False),
]
STUDY_RUNS = pa.schema(
    [
        *_CELL,
        pa.field("status", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("run_dir", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("optimizer_steps", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
STUDY_SCORES = pa.schema(
    [
        *_CELL,
        pa.field("suite", pa.string(), nullable=False),
        pa.field("checkpoint", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
STUDY_CURVES = pa.schema(
    [
        *_CELL,
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
RunStatus = Literal["done", "failed", "not_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One run of a study, and how it ended.

    Attributes:
        learning_rate: None where it is not tuned.
        is_tuning: Whether it only helped to choose a learning rate.
        status: `not_run` where the budget was used up, or the study was stopped.
        detail: Of a failed run its error; of one that was not run, why.
        run_dir: Its folder.
        seconds: Wall time of its attempts.
        optimizer_steps: Of SFT and RL.
        tokens: Trained on in SFT, sampled in RL.
    """

    arm: str
    seed: int
    learning_rate: float | None
    is_tuning: bool
    status: RunStatus
    detail: str
    run_dir: str
    attempts: int
    seconds: float
    optimizer_steps: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyScore:
    """One number of one run.

    Attributes:
        suite: Of a score of evaluation; else empty.
        checkpoint: `base`, `sft` or `rl` where it is a checkpoint's (`pass_at_1`, `pass_at_8`,
            `entropy`, ... as in docs/evaluation.md); else empty. Then the metric is one of
            `update/sft_norm`, `update/rl_norm` (L2 norm of the change of all parameters),
            `update/cosine` (between both changes), `update/relative_sft_norm` and
            `update/relative_rl_norm` (over the norm of the base's parameters).
        metric: Its name.
    """

    arm: str
    seed: int
    learning_rate: float | None
    is_tuning: bool
    suite: str
    checkpoint: str
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPoint:
    """One metric of one step of one run's SFT or RL, named as in its metrics.jsonl."""

    arm: str
    seed: int
    learning_rate: float | None
    is_tuning: bool
    stage: str
    step: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class StudyTables:
    """All that a study has found so far."""

    runs: Sequence[StudyRun]
    scores: Sequence[StudyScore]
    curves: Sequence[StudyPoint]

    def write(self, folder: Path) -> None:
        """Write the three tables into `folder`, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, schema, rows in (
            (RUNS_FILE, STUDY_RUNS, self.runs),
            (SCORES_FILE, STUDY_SCORES, self.scores),
            (CURVES_FILE, STUDY_CURVES, self.curves),
        ):
            write_rows(folder / name, [asdict(each) for each in rows], schema)


def read_study_tables(folder: Path) -> StudyTables:
    """The tables in `folder`.

    Raises:
        ArtifactError: One is missing, or of another version.
    """
    return StudyTables(
        runs=[StudyRun(**row) for row in read_table(folder / RUNS_FILE, STUDY_RUNS).to_pylist()],
        scores=[
            StudyScore(**row) for row in read_table(folder / SCORES_FILE, STUDY_SCORES).to_pylist()
        ],
        curves=[
            StudyPoint(**row) for row in read_table(folder / CURVES_FILE, STUDY_CURVES).to_pylist()
        ],
    )
