"""Pages: one self-contained HTML file that needs no network and runs no script."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pear_ray.artifacts.partial import partial_of


@dataclass(frozen=True, slots=True)
class Table:
    """Words in rows; the first column names the row."""

    headers: list[str]
    rows: list[list[str]]


def render_page(template: str, **content: Any) -> str:
    """The page as HTML; everything that comes from a run is escaped."""
    environment = Environment(
        loader=PackageLoader("pear_ray.reporting", "."),
        autoescape=True,  # completions and warnings are text from a model: never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # ours: drawn by matplotlib, which escapes its texts
    environment.filters["code"] = _code
    return environment.get_template(template).render(**content)


def write_page(path: Path, html: str) -> None:
    """Write `html` to `path`, whole or not at all."""
    partial = partial_of(path)
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)


def _code(text: str) -> Markup:
    """`text`, escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped
