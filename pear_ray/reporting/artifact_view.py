"""An artifact's facts for a terminal: manifest, schema, counts, and rows that hold no tokens."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pear_ray.artifacts.manifest import Manifest
from pear_ray.reporting.page import write_page
from pear_ray.reporting.token_view import printable
from pear_ray.telemetry.view import duration

SHOWN_VALUES = 12  # of a counted column: the commonest
SHOWN_CHARS = 600  # of a text field
_PAGE_COLUMNS = 110
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pear inspect</title>
<style>
{stylesheet}
body {{ color: {foreground}; background: {background}; margin: 24px; }}
pre {{ font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
</style>
</head>
<body>
<pre><code>{code}</code></pre>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What a table's metadata says, and the counts of its grouping columns."""

    name: str
    schema: pa.Schema
    num_rows: int
    num_files: int
    num_bytes: int
    counts: Mapping[str, Counter[str]]


def render_manifest(manifest: Manifest) -> RenderableType:
    """When the artifact was made, of what, and with which versions."""
    finished = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.finished))
    facts = {
        "stage": manifest.stage,
        "finished": f"{finished}, took {duration(manifest.finished - manifest.started)}",
        "fingerprint": manifest.fingerprint,
        "counts": _pairs(manifest.counts),
        "details": _pairs(manifest.details),
        "versions": _pairs(manifest.versions),
    }
    return _grid([(name, value) for name, value in facts.items() if value])


def render_table(facts: TableFacts) -> RenderableType:
    """Rows, files, schema and counts."""
    files = "1 file" if facts.num_files == 1 else f"{facts.num_files:,} files"
    pairs = [
        ("table", facts.name),
        ("rows", f"{facts.num_rows:,} in {files}, {facts.num_bytes:,} bytes"),
        ("columns", "\n".join(f"{field.name}  {field.type}" for field in facts.schema)),
    ]
    for column, counter in facts.counts.items():
        shown = [f"{value}  {count:,}" for value, count in counter.most_common(SHOWN_VALUES)]
        if len(counter) > SHOWN_VALUES:
            shown.append(f"and {len(counter) - SHOWN_VALUES:,} more")
        pairs.append((f"by {column}", "\n".join(shown)))
    return _grid(pairs)


def render_fields(row: Mapping[str, Any]) -> RenderableType:
    """A row that holds no tokens, field by field."""
    return _grid([(name, _shortened(str(value))) for name, value in row.items()])


def write_view(parts: Sequence[RenderableType], path: Path) -> None:
    """What a terminal was shown, as one self-contained HTML file."""
    console = Console(record=True, file=StringIO(), width=_PAGE_COLUMNS)
    for part in parts:
        console.print(part)
        console.print()
    write_page(path, console.export_html(code_format=_PAGE))


def _grid(pairs: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(printable(name)), Text(printable(value)))
    return grid


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(values.items())
    )


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARS:
        return text
    return f"{text[:SHOWN_CHARS]} [... {len(text) - SHOWN_CHARS:,} more characters]"
