"""A real Prometheus that watches a Ray, as cluster/monitoring sets it up."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from free_ports import free_ports

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "cluster" / "monitoring"
TOOLS = ROOT / ".tools" / "prometheus"
SCRAPE_S = 1
START_S = 30.0


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A server that runs.

    Attributes:
        url: Where it answers.
        environment: With which a Ray must be started to be scraped.
    """

    url: str
    environment: dict[str, str]

    def ask(self, path: str, **parameters: Any) -> Any:
        """What its API answers."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def over_time(self, expression: str, *, begin: float, end: float) -> list[dict[str, Any]]:
        """The series of `expression` between two Unix times, one value a second."""
        asked = {"query": expression, "start": begin, "end": end, "step": SCRAPE_S}
        return self.ask("query_range", **asked)["result"]


def find_program(name: str) -> str | None:
    """Where `prometheus` or `promtool` is, if it is."""
    return shutil.which(name, path=f"{os.environ['PATH']}:{TOOLS}")


def program(name: str) -> str:
    """Where it is; the test is skipped where it is not."""
    found = find_program(name)
    if found is None:
        pytest.skip(f"no {name} on PATH nor in {TOOLS}: scripts/prometheus.sh puts it there")
    return found


def dashboard_queries() -> dict[str, str]:
    """Every query of our dashboard, of all runs, by panel and legend."""
    path = MONITORING / "grafana" / "dashboards" / "pear_ray.json"
    panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$run", ".*")
        for panel in panels
        for target in panel.get("targets", ())
    }


def alert_queries() -> dict[str, str]:
    """The expression of every alert, by its name."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def names_in(query: str) -> set[str]:
    """The metrics that a query names."""
    return set(re.findall(r"\b(?:ray_\w+|up)\b", query))


@contextlib.contextmanager
def prometheus() -> Iterator[Prometheus]:
    """A Prometheus by our configuration, but for a Ray of its own place and pace."""
    server = program("prometheus")
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="pear-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        settings = yaml.safe_load((MONITORING / "prometheus.yaml").read_text(encoding="utf-8"))
        settings["global"] = dict.fromkeys(settings["global"], f"{SCRAPE_S}s")
        (scrape,) = settings["scrape_configs"]
        (discovery,) = scrape["file_sd_configs"]
        discovery["refresh_interval"] = f"{SCRAPE_S}s"
        (file,) = discovery["files"]
        (folder / "ray").mkdir()  # where Ray will be
        discovery["files"] = [str(folder / "ray" / Path(file).name)]
        settings["rule_files"] = [str(MONITORING / name) for name in settings["rule_files"]]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        address = f"127.0.0.1:{free_ports(1)[0]}"
        process = subprocess.Popen(
            [
                server,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=error",
            ],
            cwd=folder,
        )
        try:
            _wait_until_ready(f"http://{address}", process)
            environment = {"RAY_TMPDIR": place, "RAY_metrics_report_interval_ms": "2500"}
            yield Prometheus(f"http://{address}", environment)
        finally:
            process.terminate()
            process.wait(timeout=START_S)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, "prometheus ended; see its message above"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)
