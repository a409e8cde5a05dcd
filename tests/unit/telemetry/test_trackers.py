import sys

import pytest

from pear_ray.config.sections import TelemetryConfig
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, MetricRecord
from pear_ray.telemetry.trackers import open_trackers

RECORD = MetricRecord(100.0, "demo", "rl", 1, 3, 9, {"rl/reward/mean": 0.25, "rl/loss": -1.0})


@pytest.fixture
def warnings():
    return []


def install(folder, monkeypatch, name, source):
    """Put a third party's package, as `source`, where `import name` finds it."""
    (folder / "site").mkdir()
    (folder / "site" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.delitem(sys.modules, name, raising=False)


def opened(name, folder, warnings):
    config = TelemetryConfig(trackers=[name])
    return open_trackers(config, folder, "demo", {"rl": {"num_steps": 9}}, warn=warnings.append)


def test_a_missing_package_is_named_once_with_the_mend(tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own way to say: not installed
    trackers = opened("wandb", tmp_path, warnings)
    trackers.log(RECORD)
    trackers.log(RECORD)
    trackers.close()
    assert len(warnings) == 1
    assert "pip install wandb" in warnings[0]
    assert "telemetry.trackers" in warnings[0]


BREAKS_AT_LOG = """
calls = []
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, values):
        calls.append(values)
        if len(calls) == 2:
            raise RuntimeError("quota\\nexceeded")
    def finish(self): calls.append("finish")
def init(**settings):
    return Run()
"""


def test_a_tracker_that_breaks_is_off_after_one_warning(tmp_path, monkeypatch, warnings):
    install(tmp_path, monkeypatch, "wandb", BREAKS_AT_LOG)
    trackers = opened("wandb", tmp_path, warnings)
    for _ in range(4):
        trackers.log(RECORD)
    trackers.close()
    wandb = sys.modules["wandb"]
    assert len(wandb.calls) == 2
    assert wandb.calls[0] == {"rl/reward/mean": 0.25, "rl/loss": -1.0, "rl/step": 3}
    assert len(warnings) == 1
    assert "RuntimeError: quota exceeded" in warnings[0]
    assert trackers.names == []


KEEPS_SETTINGS = """
settings = []
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, values): pass
    def finish(self): pass
def init(**given):
    settings.append(given)
    return Run()
"""


def test_a_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch, warnings):
    install(tmp_path, monkeypatch, "wandb", KEEPS_SETTINGS)
    opened("wandb", tmp_path, warnings).close()
    opened("wandb", tmp_path, warnings).close()
    first, second = sys.modules["wandb"].settings
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"] == {"rl": {"num_steps": 9}}
    assert warnings == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_reads_back_what_was_logged(tmp_path, warnings):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with opened("tensorboard", tmp_path, warnings) as trackers:
        trackers.log(EventRecord(99.0, "demo", "rl", 1, EventKind.STAGE_STARTED, ""))
        trackers.log(RECORD)
    assert warnings == []
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"] + events.Tags()["tensors"]
    assert sorted(tags) == ["rl/loss", "rl/reward/mean"]
    (read,) = events.Tensors("rl/reward/mean")
    assert (read.step, read.wall_time) == (3, 100.0)
    assert read.tensor_proto.float_val == [0.25]


def test_no_tracker_configured_means_none_opened(tmp_path, warnings):
    trackers = open_trackers(TelemetryConfig(), tmp_path, "demo", {}, warn=warnings.append)
    trackers.log(RECORD)
    trackers.close()
    assert (trackers.names, warnings) == ([], [])
