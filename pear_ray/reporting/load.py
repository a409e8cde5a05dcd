"""What a report reads of a run folder. What is not there is named with the reason, not an error."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pear_ray.artifacts.manifest import Manifest, read_manifest
from pear_ray.artifacts.rollouts import FOLDER as ROLLOUTS
from pear_ray.config.evaluate import MAIN_SUITE
from pear_ray.config.run import RunConfig, load_run
from pear_ray.errors import ArtifactError, ConfigError, InputError
from pear_ray.records import STAGES
from pear_ray.reporting.paired import Counts, load_counts
from pear_ray.telemetry.metrics_log import (
    METRICS_FILE,
    EventKind,
    EventRecord,
    MetricRecord,
    Record,
    latest_by_step,
    read_metrics,
)

Floats = NDArray[np.float64]

_ROWS_PER_READ = 1024  # long completions must not be in memory all at once
CONFIG_FILE = "config.yaml"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A suite of `evaluate/results.json`: per checkpoint, estimates by metric name.

    Attributes:
        settings: All that the numbers are of, as it stands in the file.
    """

    suite: str
    settings: dict[str, Any]
    num_problems: int
    num_samples: int
    temperature: float
    max_tokens: int
    confidence: float
    checkpoints: dict[str, dict[str, Estimate]]


@dataclass(frozen=True, slots=True)
class CorpusLengths:
    """Per corpus row: tokens that train and, where scored, the mean behavior log-prob."""

    num_loss_tokens: Floats  # [row]
    behavior_logprob_means: Floats  # [scored row]


@dataclass(frozen=True, slots=True)
class WeightSamples:
    """Columns of `sft/weight_samples.parquet`: one entry per sampled loss token."""

    steps: NDArray[np.int64]
    tokens_left: NDArray[np.int64]
    log_ratios: Floats
    weights: Floats


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything that a report shows; None where `missing` says why."""

    name: str
    config: RunConfig | None
    config_text: str
    metrics: dict[str, list[MetricRecord]]
    warnings: list[EventRecord]
    manifests: dict[str, Manifest]
    corpus: CorpusLengths | None
    weights: WeightSamples | None
    suites: list[Evaluation]
    samples_path: Path | None
    counts: dict[tuple[str, str], Counts]
    rollouts_path: Path
    missing: dict[str, str]

    def series(self, stage: str, name: str) -> tuple[Floats, Floats]:
        """Steps and values of one metric, NaN where the value is not finite."""
        return series(self.metrics[stage], name)

    def has(self, stage: str, *names: str) -> bool:
        """Whether the stage logged any of the metrics."""
        return any(name in record.metrics for record in self.metrics[stage] for name in names)


def series(records: Sequence[MetricRecord], name: str) -> tuple[Floats, Floats]:
    """Steps and values of one metric of a stage, NaN where the value is not finite."""
    rows = [(r.step, r.metrics[name]) for r in records if name in r.metrics]
    table = np.array(rows, dtype=np.float64).reshape(-1, 2)
    values = np.where(np.isfinite(table[:, 1]), table[:, 1], np.nan)
    return table[:, 0], values


def load_run_data(run_dir: Path) -> RunData:
    """All that there is of the run in `run_dir`.

    Raises:
        InputError: There is no such folder.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such folder; give a run's folder, such as outputs/demo")
    missing: dict[str, str] = {}

    def attempt(name: str, load: Callable[[], _T]) -> _T | None:
        try:
            return load()
        except (ArtifactError, ConfigError) as error:
            missing[name] = str(error)
            return None

    config_path = run_dir / CONFIG_FILE
    config = attempt("config", lambda: load_run(config_path))
    metrics_path = run_dir / METRICS_FILE
    records: list[Record] = read_metrics(metrics_path) if metrics_path.exists() else []
    samples_path = run_dir / "evaluate" / "samples.parquet"
    manifests = {stage: read_manifest(run_dir / stage) for stage in STAGES if stage != "report"}
    return RunData(
        name=config.name if config else run_dir.name,
        config=config,
        config_text=config_path.read_text(encoding="utf-8") if config_path.exists() else "",
        metrics={stage: latest_by_step(records, stage) for stage in STAGES},
        warnings=[
            r for r in records if isinstance(r, EventRecord) and r.event is EventKind.WARNING
        ],
        manifests={stage: manifest for stage, manifest in manifests.items() if manifest},
        corpus=attempt("corpus", lambda: _load_corpus(run_dir)),
        weights=attempt("weights", lambda: _load_weights(run_dir / "sft")),
        suites=attempt("evaluation", lambda: load_suites(run_dir / "evaluate")) or [],
        samples_path=samples_path if samples_path.exists() else None,
        counts=load_counts(samples_path) if samples_path.exists() else {},
        rollouts_path=run_dir / "rl" / ROLLOUTS,
        missing=missing,
    )


def _load_corpus(run_dir: Path) -> CorpusLengths:
    lengths = [
        _row_sums(_column(batch, "loss_mask"), _column(batch, "loss_mask"))
        for path in _parts(run_dir / "collect" / "corpus")
        for batch in _batches(path, ["loss_mask"])
    ]
    scored = run_dir / "score" / "scored"
    means = []
    for path in sorted(scored.rglob("*.parquet")):
        for batch in _batches(path, ["loss_mask", "behavior_logprobs"]):
            mask = _column(batch, "loss_mask")
            sums = _row_sums(_column(batch, "behavior_logprobs"), mask)
            means.append(sums / np.maximum(_row_sums(mask, mask), 1))
    return CorpusLengths(
        num_loss_tokens=np.concatenate(lengths) if lengths else np.zeros(0),
        behavior_logprob_means=np.concatenate(means) if means else np.zeros(0),
    )


def _column(batch: pa.RecordBatch, name: str) -> pa.ListArray:
    """The list column `name` of `batch`."""
    return batch.column(batch.schema.get_field_index(name))


def _row_sums(values: pa.ListArray, mask: pa.ListArray) -> Floats:
    """Per row, the sum of the list's values where the row's mask is true."""
    flat = values.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    kept = np.where(mask.flatten().to_numpy(zero_copy_only=False), flat, 0.0)
    ends = np.cumsum(mask.value_lengths().to_numpy(zero_copy_only=False))
    totals = np.concatenate([[0.0], np.cumsum(kept)])
    return np.diff(totals[ends], prepend=0.0)


def _load_weights(sft_dir: Path) -> WeightSamples:
    names = ["step", "tokens_left", "log_ratio", "weight"]
    batches = list(_batches(sft_dir / "weight_samples.parquet", names))
    steps, tokens_left, log_ratios, weights = (
        np.concatenate([b.column(b.schema.get_field_index(n)).to_numpy() for b in batches])
        if batches
        else np.zeros(0)
        for n in names
    )
    return WeightSamples(
        steps=steps.astype(np.int64),
        tokens_left=tokens_left.astype(np.int64),
        log_ratios=log_ratios.astype(np.float64),
        weights=weights.astype(np.float64),
    )


def load_suites(evaluate_dir: Path) -> list[Evaluation]:
    """The results in `evaluate_dir`, suite by suite.

    Results from before there were suites are those of one: a finished run is not made again for it.

    Raises:
        ArtifactError: They are not there, or not of this version.
    """
    path = evaluate_dir / "results.json"
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return [
            Evaluation(
                suite=suite.get("name", MAIN_SUITE),
                settings={key: each for key, each in suite.items() if key != "checkpoints"},
                num_problems=suite["num_problems"],
                num_samples=suite["num_samples"],
                temperature=suite["temperature"],
                max_tokens=suite["max_tokens"],
                confidence=tree["confidence"],
                checkpoints={
                    row["checkpoint"]: {
                        name: Estimate(value=e["value"], low=e["low"], high=e["high"])
                        for name, e in row["metrics"].items()
                    }
                    for row in suite["checkpoints"]
                },
            )
            for suite in tree.get("suites", [tree])
        ]
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run the stage `evaluate`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: not results of this version ({error!r}); run the stage `evaluate` again"
        ) from error


def _parts(folder: Path) -> list[Path]:
    """The Parquet files of a table that is a folder of them."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ArtifactError(f"{folder}: not there; run the stage `{folder.parent.name}`")
    return files


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The file's rows, a thousand at a time, only the columns asked for."""
    try:
        with pq.ParquetFile(path) as file:
            if absent := set(columns) - set(file.schema_arrow.names):
                raise ArtifactError(
                    f"{path}: has no column {', '.join(sorted(absent))}; run its stage again"
                )
            yield from file.iter_batches(batch_size=_ROWS_PER_READ, columns=columns)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run the stage `{path.parent.name}`") from error
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{path}: not a Parquet file ({error}); run its stage again") from error
