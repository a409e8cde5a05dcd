"""report: one self-contained HTML file of what the run did."""

import time
from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.config.run import RunConfig
from pear_ray.reporting.report import write_report
from pear_ray.telemetry.metrics_log import MetricsLog

REPORT_FILE = "report.html"


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `report/report.html` and its manifest."""
    log = MetricsLog(run_dir, run=config.name, stage="report", attempt=attempt)
    out = run_dir / "report" / REPORT_FILE
    started = time.monotonic()
    write_report(run_dir, out)
    log.log({"time/report_s": time.monotonic() - started}, step=1, num_steps=1)
    return manifest.complete(run_dir / "report", counts={"bytes": out.stat().st_size})
