"""Write Grafana's dashboard and Kubernetes' alert rules; `--check` only says if they are current.

A panel is six lines here and fifty in Grafana's JSON, of which a reader wants the six.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from dashboard_panels import ROWS, Panel

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "pear_ray.json"
KUBERNETES_RULES = MONITORING / "kuberay" / "prometheus_rule.yaml"
COLUMNS = 24  # of Grafana's grid
HEIGHTS = {"stat": 5, "state-timeline": 6, "timeseries": 8}
COLORS = {
    "waiting": "text",
    "running": "blue",
    "finished": "green",
    "done": "green",
    "skipped": "semi-dark-green",
    "failed": "red",
    "stopped": "yellow",
    "silent": "orange",
    "dead": "dark-red",
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def main(arguments: list[str]) -> int:
    """Write or check both files; the exit code."""
    texts = {DASHBOARD: dashboard_text(), KUBERNETES_RULES: kubernetes_text()}
    if arguments == ["--check"]:
        stale = [
            str(path)
            for path, text in texts.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        if stale:
            mend = ".venv/bin/python scripts/make_dashboard.py"
            print(f"{', '.join(stale)}: not current; mend: {mend}", file=sys.stderr)
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


def dashboard_text() -> str:
    """Grafana's JSON of the dashboard, as of schema version 39 (Grafana 11)."""
    tree = {
        "uid": "pear-ray",
        "title": "pear_ray",
        "description": "Runs, training and machines. Written by scripts/make_dashboard.py.",
        "tags": ["pear_ray", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": list(_placed()),
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def kubernetes_text() -> str:
    """The alert rules as the Prometheus operator takes them."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
    tree = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pear-ray", "labels": {"release": "prometheus"}},
        "spec": rules,
    }
    head = "# alerts.yaml for the Prometheus operator; written by scripts/make_dashboard.py.\n"
    return head + yaml.safe_dump(tree, sort_keys=False, width=100)


def _placed() -> Iterator[dict[str, Any]]:
    """Every row and panel, with its number and its place."""
    number, top = 0, 0
    for title, panels in ROWS.items():
        number += 1
        where = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "gridPos": where, "panels": []}
        top, left, height = top + 1, 0, 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            height = max(height, HEIGHTS[panel.kind])
            where = {"x": left, "y": top, "w": panel.width, "h": HEIGHTS[panel.kind]}
            yield {"id": number, **_panel(panel), "gridPos": where}
            left += panel.width
        top += height


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bound is not None:
        below, above = ("red", "green") if panel.is_minimum else ("green", "red")
        steps = [{"color": below, "value": None}, {"color": above, "value": panel.bound}]
    field: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [_mapping(panel.states)] if panel.states else [],
    }
    if panel.kind == "timeseries":
        field["custom"] = {
            "fillOpacity": 20 if panel.is_stacked else 0,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.bound is None else "line"},
            "spanNulls": 60_000,  # milliseconds: a missed scrape is no gap
        }
    return field


def _mapping(states: Sequence[str]) -> dict[str, Any]:
    words = {
        str(number): {"text": str(word), "color": COLORS[word], "index": number}
        for number, word in enumerate(states)
    }
    return {"type": "value", "options": words}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "colorMode": "background" if panel.states else "value",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "textMode": "value_and_name",
        }
    if panel.kind == "state-timeline":
        return {"showValue": "never", "mergeValues": True, "rowHeight": 0.8}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
    }


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(ray_pear_ray_run_state, run)", "refId": "runs"},
        "refresh": 2,  # when the time range changes: runs come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
