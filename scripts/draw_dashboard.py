"""Draw what the dashboard's queries find in a Prometheus as one page, without a Grafana.

    draw_dashboard.py http://127.0.0.1:9090 --begin UNIX_TIME --end UNIX_TIME --out page.html

It is not Grafana's rendering: one line per series, of the values that Grafana would get.
"""

import argparse
import json
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from pear_ray.reporting.page import write_page
from pear_ray.reporting.plot import Chart, Line, Threshold, line_chart, run_colour

DASHBOARD = Path(__file__).parents[1] / "cluster/monitoring/grafana/dashboards/pear_ray.json"
POINTS = 240  # of a series, as Grafana asks for a panel of this width
UNITS = {"percentunit": "share", "s": "seconds", "percent": "%", "gbytes": "GiB", "bytes": "bytes"}
STYLE = """
:root { --page: #fff; --ink: #1b1f24; --muted: #69727d; --grid: #e3e6ea; --alert: #b3261e;
  --grey: #8a939e; --run0: #0072b2; --run1: #d55e00; --run2: #009e73; --run3: #b0568d;
  --run4: #3a9fd8; --run5: #b8860b; --run6: #4a515a; }
body { margin: 0; padding: 16px; background: var(--page); color: var(--ink);
  font: 13px sans-serif; }
h1 { font-size: 17px; margin: 0 0 2px; }
h2 { font-size: 14px; margin: 10px 0 4px; }
h3 { font-size: 12px; margin: 0 0 2px; }
p { margin: 0; color: var(--muted); }
figure { margin: 0; }
.grid { display: grid; grid-template-columns: repeat(COLUMNS, 1fr); gap: 8px 14px; }
svg { display: block; width: 100%; height: auto; }
"""


def main() -> int:
    """Ask, draw, write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("--begin", type=float, required=True, help="Unix time")
    parser.add_argument("--end", type=float, required=True, help="Unix time")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--note", default="", help="a sentence for the head of the page")
    parser.add_argument("--out", type=Path, required=True)
    told = parser.parse_args()
    parts = [f"<h1>The dashboard's queries</h1><p>{told.note}</p>"]
    is_open = False
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            parts += ["</div>"] * is_open + [f"<h2>{panel['title']}</h2>", '<div class="grid">']
            is_open = True
            continue
        drawn = _chart(panel, told)
        if drawn is not None:
            parts.append(f"<figure><h3>{drawn.title}</h3>{drawn.svg}</figure>")
    style = STYLE.replace("COLUMNS", str(told.columns))
    body = "".join([*parts, "</div>"])
    write_page(told.out, f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}")
    print(f"wrote {told.out}")
    return 0


def _chart(panel: dict[str, Any], told: argparse.Namespace) -> Chart | None:
    """The panel's series as lines; None where there are none."""
    lines = [
        Line(_legend(target["legendFormat"], series["metric"]), *_points(series, told.begin), "")
        for target in panel["targets"]
        for series in _ask(told, target["expr"].replace("$run", ".*"))
    ]
    if not lines:
        return None
    field = panel["fieldConfig"]["defaults"]
    steps = field["thresholds"]["steps"][1:]
    return line_chart(
        [Line(each.label, each.x, each.y, run_colour(place)) for place, each in enumerate(lines)],
        title=panel["title"],
        caption="",
        x_label="minutes",
        y_label=UNITS.get(field["unit"], ""),
        thresholds=[Threshold("", step["value"]) for step in steps],
        from_zero=all((each.y >= 0).all() for each in lines),
    )


def _ask(told: argparse.Namespace, query: str) -> list[dict[str, Any]]:
    step = max(1.0, (told.end - told.begin) / POINTS)
    asked = {"query": query, "start": told.begin, "end": told.end, "step": step}
    address = f"{told.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 - a Prometheus
        return json.load(answer)["data"]["result"]


def _points(series: dict[str, Any], begin: float) -> tuple[np.ndarray, np.ndarray]:
    """Minutes since `begin`, and values."""
    values = np.array([[float(time), float(value)] for time, value in series["values"]])
    return (values[:, 0] - begin) / 60, values[:, 1]


def _legend(pattern: str, tags: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: tags.get(found.group(1), ""), pattern)


if __name__ == "__main__":
    sys.exit(main())
