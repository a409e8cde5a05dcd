"""One run of a study: made in a worker of the pool, measured by the driver."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pear_ray import pipeline
from pear_ray.artifacts.manifest import read_manifest
from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.study_results import RunStatus, StudyPoint, StudyRun, StudyScore
from pear_ray.config.run import RunConfig
from pear_ray.config.study_plan import Cell
from pear_ray.engines.model_files import resolve_model
from pear_ray.study.geometry import update_geometry
from pear_ray.telemetry.metrics_log import METRICS_FILE, latest_by_step, read_metrics

RECORD_FILE = "study_run.json"
TRAINED = ("sft", "rl")
NO_CURVES = ("time/", "memory/", "sft/source/")  # of no use over steps, and many


@dataclass(frozen=True, slots=True)
class CellRecord:
    """What only the worker knows of a run.

    Attributes:
        seconds: Wall time of all attempts that ended.
        attempts: How many those were.
        geometry: As `update_geometry` says; empty before the run is done.
    """

    seconds: float = 0.0
    attempts: int = 0
    geometry: dict[str, float] = field(default_factory=dict)


def run_cell(config: RunConfig, shared: Path) -> None:
    """Make the run `config` in this process, with the corpus and scores of the run in `shared`.

    Raises:
        PearRayError: As `pipeline.run`.
    """
    started = time.monotonic()
    run_dir = Path(config.output_dir) / config.name
    geometry: dict[str, float] = {}
    try:
        pipeline.run(config, reuse_from=[shared], leave_out=("report",))
        base = resolve_model(config.models.policy)
        geometry = update_geometry(base, *(run_dir / stage / "model" for stage in TRAINED))
    finally:
        if run_dir.exists():
            before = read_record(run_dir)
            seconds = before.seconds + time.monotonic() - started
            now = CellRecord(seconds, before.attempts + 1, geometry or before.geometry)
            write_json(run_dir / RECORD_FILE, asdict(now))


def read_record(run_dir: Path) -> CellRecord:
    """The record of the run in `run_dir`; an empty one where there is none."""
    path = run_dir / RECORD_FILE
    return (
        CellRecord(**json.loads(path.read_text(encoding="utf-8")))
        if path.exists()
        else CellRecord()
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """All that the tables of a study say of one run."""

    run: StudyRun
    scores: list[StudyScore]
    curves: list[StudyPoint]


def measure(cell: Cell, run_dir: Path, *, status: RunStatus, detail: str = "") -> Measured:
    """What the run in `run_dir` came to; of one that is not done, what it took."""
    record = read_record(run_dir)
    key = _key(cell)
    counts = [made.counts for stage in TRAINED if (made := read_manifest(run_dir / stage))]
    run = StudyRun(
        **key,
        status=status,
        detail=detail,
        run_dir=str(run_dir),
        attempts=record.attempts,
        seconds=record.seconds,
        optimizer_steps=round(sum(each.get("steps", 0) for each in counts)),
        tokens=round(sum(each.get("tokens", 0) for each in counts)),
    )
    if status != "done":
        return Measured(run, [], [])
    scores = [StudyScore(**key, **each) for each in _scores(run_dir, record)]
    return Measured(run, scores, [StudyPoint(**key, **each) for each in _curves(run_dir)])


def _key(cell: Cell) -> dict[str, Any]:
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "is_tuning": cell.is_tuning,
    }


def _scores(run_dir: Path, record: CellRecord) -> Iterator[dict[str, Any]]:
    results = json.loads((run_dir / "evaluate" / "results.json").read_text(encoding="utf-8"))
    for suite in results["suites"]:
        for found in suite["checkpoints"]:
            for metric, each in found["metrics"].items():
                where = {"suite": suite["name"], "checkpoint": found["checkpoint"]}
                yield {**where, "metric": metric, "value": float(each["value"])}
    for metric, value in record.geometry.items():
        yield {"suite": "", "checkpoint": "", "metric": metric, "value": value}


def _curves(run_dir: Path) -> Iterator[dict[str, Any]]:
    records = read_metrics(run_dir / METRICS_FILE)
    for stage in TRAINED:
        for record in latest_by_step(records, stage):
            for metric, value in record.metrics.items():
                if not metric.startswith(NO_CURVES):
                    where = {"stage": stage, "step": record.step}
                    yield {**where, "metric": metric, "value": value}
