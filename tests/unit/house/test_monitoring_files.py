"""The dashboard and the alert rules hold together; what their queries find, e2e tests ask."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pear_ray.config.rl import RlConfig
from pear_ray.config.sft import AlarmsConfig
from pear_ray.telemetry.gauges import RUN_STATES

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "cluster" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/pear_ray.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]


def test_the_written_files_are_what_the_description_says() -> None:
    script = [sys.executable, str(ROOT / "scripts/make_dashboard.py"), "--check"]
    subprocess.run(script, check=True, timeout=60)


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert not taken & cells
        taken |= cells


def test_every_query_of_ours_is_of_the_chosen_runs_and_names_its_series() -> None:
    for panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
        for target in panel["targets"]:
            query, legend = target["expr"], target["legendFormat"]
            assert query.count("ray_pear_ray_") == query.count('{run=~"$run"'), query
            kept = re.search(r" by \(([^)]*)\)", query)  # none: of a node, and all of it is kept
            shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
            assert kept is None or shown == set(kept.group(1).split(", ")), query
    (runs,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == "run"]
    assert runs["query"]["query"] == "label_values(ray_pear_ray_run_state, run)"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_the_documentation_explains_every_panel(panel: dict[str, str]) -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
    assert f"| {panel['title']} |" in page


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert {"summary", "action"} == set(rule["annotations"])
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert f"`{rule['alert']}`" in (ROOT / "docs" / "monitoring.md").read_text("utf-8")


def test_bounds_and_states_are_those_of_the_code() -> None:
    expressions = {rule["alert"]: rule["expr"] for rule in RULES}
    assert expressions["PearRunFailed"].endswith(f"== {RUN_STATES.index('failed')}")
    assert expressions["PearDriverGone"].endswith(f"== {RUN_STATES.index('dead')}")
    assert f"< {AlarmsConfig().min_ess_fraction:g}" in expressions["PearEssLow"]
    alert = RlConfig.model_fields["mismatch_alert"].default
    assert f"> {alert:g}" in expressions["PearMismatchHigh"]


def test_grafana_and_prometheus_listen_on_loopback_only() -> None:
    assert "http_addr = 127.0.0.1" in (MONITORING / "grafana/grafana.ini").read_text("utf-8")
    source = MONITORING / "grafana/provisioning/datasources/prometheus.yaml"
    (datasource,) = yaml.safe_load(source.read_text("utf-8"))["datasources"]
    assert datasource["url"] == "http://127.0.0.1:9090"
    assert datasource["uid"] == "prometheus"
    # Where Prometheus listens is no setting of its file: every command that we give says it.
    for path in (MONITORING / "prometheus.yaml", ROOT / "docs" / "monitoring.md"):
        text = path.read_text("utf-8")
        commands = re.findall(r"prometheus --config(?:.*\\\n)*.*", text)
        assert commands
        assert all("--web.listen-address=127.0.0.1:9090" in command for command in commands)


def test_pods_are_scraped_under_the_job_that_alerts_name() -> None:
    monitor = yaml.safe_load((MONITORING / "kuberay/pod_monitor.yaml").read_text("utf-8"))
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    relabeled = {one["targetLabel"]: one for one in endpoint["relabelings"]}
    assert relabeled["job"]["replacement"] == "ray"
    rules = yaml.safe_load((MONITORING / "kuberay/prometheus_rule.yaml").read_text("utf-8"))
    plain = yaml.safe_load((MONITORING / "alerts.yaml").read_text("utf-8"))
    assert rules["spec"] == plain
