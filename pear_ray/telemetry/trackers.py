"""Optional trackers beside `metrics.jsonl`. One that fails warns once and never fails the run."""

import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from pear_ray.config.sections import TelemetryConfig
from pear_ray.telemetry.metrics_log import MetricRecord, Record

Warn = Callable[[str], None]
_logger = logging.getLogger(__name__)
_MLFLOW_PARAMS_PER_CALL = 100  # the server's limit for one batch
_MLFLOW_PARAM_CHARS = 500  # the oldest servers' limit for a value


class Tracker(Protocol):
    """Where the numbers of one run go."""

    def log(self, record: MetricRecord) -> None:
        """Take one step's numbers."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class TensorBoardTracker:
    """Event files under the run folder's `tensorboard/`."""

    def __init__(self, run_dir: Path) -> None:
        """Open one more event file; TensorBoard joins those of all attempts."""
        from tensorboard.summary import Writer  # noqa: PLC0415 - optional, and slow to import

        self._writer = Writer(str(run_dir / "tensorboard"))

    def log(self, record: MetricRecord) -> None:
        """One scalar per metric."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(name, value, record.step, wall_time=record.time)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """A W&B run that a resumed run of ours continues."""

    def __init__(
        self, project: str, run_dir: Path, run_name: str, config: Mapping[str, Any]
    ) -> None:
        """Start or continue the W&B run whose id the run folder keeps."""
        import wandb  # noqa: PLC0415 - optional

        identity = _kept_id(run_dir, "wandb_run_id", lambda: uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=run_name,
            id=identity,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )

    def log(self, record: MetricRecord) -> None:
        """The numbers with the stage's own step: W&B's only goes up, ours starts anew per stage."""
        step_name = f"{record.stage}/step"
        self._run.define_metric(step_name, hidden=True)
        for name in record.metrics:
            self._run.define_metric(name, step_metric=step_name)
        self._run.log({**record.metrics, step_name: record.step})

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class MlflowTracker:
    """An MLflow run that a resumed run of ours continues; the server is MLFLOW_TRACKING_URI."""

    def __init__(
        self, project: str, run_dir: Path, run_name: str, config: Mapping[str, Any]
    ) -> None:
        """Start or continue the MLflow run whose id the run folder keeps."""
        import mlflow  # noqa: PLC0415 - optional

        client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(project)
        fresh = not (run_dir / "mlflow_run_id").exists()
        self._client = client
        self._run_id = _kept_id(
            run_dir,
            "mlflow_run_id",
            lambda: client.create_run(experiment.experiment_id, run_name=run_name).info.run_id,
        )
        if fresh:  # MLflow refuses to change a parameter that is set
            params = [
                mlflow.entities.Param(name, str(value)[:_MLFLOW_PARAM_CHARS])
                for name, value in _flat(config).items()
            ]
            for start in range(0, len(params), _MLFLOW_PARAMS_PER_CALL):
                batch = params[start : start + _MLFLOW_PARAMS_PER_CALL]
                client.log_batch(self._run_id, params=batch)

    def log(self, record: MetricRecord) -> None:
        """All numbers of the step in one call."""
        from mlflow.entities import Metric  # noqa: PLC0415 - optional

        time_ms = int(record.time * 1000)
        metrics = [Metric(name, v, time_ms, record.step) for name, v in record.metrics.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the MLflow run as ended."""
        self._client.set_terminated(self._run_id)


class Trackers:
    """The trackers that still work. Nothing that one of them does can fail the run."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]], warn: Warn) -> None:
        """Open each; one that cannot be opened is warned about and left out."""
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name, opener in openers.items():
            try:
                self._open[name] = opener()
            except ImportError as error:
                self._give_up(name, error, f"install it (pip install {name})")
            except Exception as error:  # noqa: BLE001 - a third party's service must not fail the run
                self._give_up(name, error, "check its server, login and settings")

    @property
    def names(self) -> list[str]:
        """Which trackers still take numbers."""
        return list(self._open)

    def log(self, record: Record) -> None:
        """Hand a metric record to every tracker that works; events go to none."""
        if not isinstance(record, MetricRecord):
            return
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(record)
            except Exception as error:  # noqa: BLE001 - a third party's service must not fail the run
                del self._open[name]
                self._give_up(name, error, "check its server, login and quota")

    def close(self) -> None:
        """Close every tracker that works. A second call does nothing."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - a third party's service must not fail the run
                self._give_up(name, error, "its last numbers may be missing")

    def __enter__(self) -> Self:
        """The trackers themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self.close()

    def _give_up(self, name: str, error: Exception, mend: str) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._warn(
            f"tracker {name} is off for the rest of this run ({reason}); metrics.jsonl still has "
            f"every number; {mend}, or remove {name} from telemetry.trackers"
        )


def open_trackers(
    config: TelemetryConfig,
    run_dir: Path,
    run_name: str,
    resolved_config: Mapping[str, Any],
    *,
    warn: Warn = _logger.warning,
) -> Trackers:
    """The trackers that `config` names, opened; `warn` gets one sentence for each that fails."""
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(run_dir),
        "wandb": lambda: WandbTracker(config.project, run_dir, run_name, resolved_config),
        "mlflow": lambda: MlflowTracker(config.project, run_dir, run_name, resolved_config),
    }
    return Trackers({name: openers[name] for name in config.trackers}, warn)


def _kept_id(run_dir: Path, file_name: str, make: Callable[[], str]) -> str:
    """The id in the run folder's `file_name`, made and kept there the first time."""
    path = run_dir / file_name
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"rl": {"num_steps": 3}}` as `{"rl.num_steps": 3}`; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
