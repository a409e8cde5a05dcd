"""What every benchmark writes: results/NAME.json, a list of figures with how they came about."""

import datetime as dt
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pear_ray.artifacts.run_dir import versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number. `ratio` is against `reference`, measured in the same run."""

    name: str
    value: float
    unit: str
    reference: str | None = None
    ratio: float | None = None
    goal: str | None = None
    holds: bool | None = None


def write_parts(name: str, parts: Mapping[str, Callable[[], list[Figure]]]) -> None:
    """Measure the parts named on the command line, or all; the others' figures stay as they are.

    Names of figures begin with their part's: `sft: ...`.
    """
    wanted = [part for part in parts if part in sys.argv[1:]] or list(parts)
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    begins = tuple(f"{part}: " for part in wanted)
    kept = [row for row in rows if not row["name"].startswith(begins)]
    write_figures(name, [figure for part in wanted for figure in parts[part]()], kept=kept)


def write_figures(name: str, figures: list[Figure], *, kept: Sequence[dict] = ()) -> None:
    """Write `results/NAME.json`, `kept` rows of it first, and print the figures."""
    context = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    rows = [*kept, *(asdict(figure) | context for figure in figures)]
    text = json.dumps(rows, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    for figure in figures:
        verdict = {None: "", True: " (holds)", False: " (missed)"}[figure.holds]
        ratio = f", {figure.ratio:.3g}x against {figure.reference}" if figure.ratio else ""
        goal = f"; goal: {figure.goal}{verdict}" if figure.goal else ""
        print(f"{figure.name}: {figure.value:.4g} {figure.unit}{ratio}{goal}")
