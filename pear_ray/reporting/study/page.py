"""`report.html`, `summary.md` and `results.json` of a study, and its early view for terminals."""

import time
from collections.abc import Iterator
from pathlib import Path

from pear_ray.artifacts.run_dir import write_json
from pear_ray.reporting.page import render_page, write_page
from pear_ray.reporting.study.numbers import StudyNumbers, numbers_tree, study_numbers
from pear_ray.reporting.study.sections import Section, build_sections
from pear_ray.reporting.study.words import mean_words, notes, score_words, verdict

HTML_FILE, SUMMARY_FILE, JSON_FILE = "report.html", "summary.md", "results.json"
_TEMPLATE = "study.html.j2"
_TEXT_SENTENCES, _TEXT_ARMS = 3, 6  # in a terminal


def write_study_report(study_dir: Path) -> Path:
    """Write what the study in `study_dir` has found so far into it; the page's path comes back.

    `report.html` for people, `summary.md` for a repository, `results.json` with every number and
    sentence. A study that is not finished has one too, which says so.

    Raises:
        ArtifactError: `study_dir` is no study's folder, or something in it is of another version.
        ConfigError: Its `study.yaml` is missing or not YAML.
    """
    found = study_numbers(study_dir)
    said, noted = verdict(found), notes(found)
    sections = build_sections(found)
    write_json(
        study_dir / JSON_FILE,
        {"verdict": said, "notes": noted, "numbers": numbers_tree(found)},
    )
    (study_dir / SUMMARY_FILE).write_text(_markdown(found, said, noted, sections), encoding="utf-8")
    page = study_dir / HTML_FILE
    html = render_page(
        _TEMPLATE,
        name=found.name,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(found),
        verdict=said,
        notes=noted,
        is_alert=bool(noted) or found.has_too_few_seeds or not found.is_complete,
        sections=sections,
    )
    write_page(page, html)
    return page


def study_text(study_dir: Path) -> str:
    """What the study in `study_dir` has found so far, in a few lines for a terminal.

    Raises:
        ArtifactError: As `write_study_report`.
    """
    found = study_numbers(study_dir)
    width = max(len(arm) for arm in found.arms)
    lines = [
        f"{found.name}: {found.state}, {_counts(found)}",
        *verdict(found)[:_TEXT_SENTENCES],
    ]
    scored = [row for row in found.main.arms if row.after or row.before]
    scored.sort(key=lambda row: -(row.after.value if row.after else float("-inf")))
    lines += [
        f"  {row.arm:<{width}}  {mean_words(row.before)} -> {mean_words(row.after)}"
        for row in scored[:_TEXT_ARMS]
    ]
    if len(scored) > _TEXT_ARMS:
        lines.append(f"  and {len(scored) - _TEXT_ARMS} arms more, in the report")
    return "\n".join([*lines, ""])


def _facts(found: StudyNumbers) -> list[tuple[str, str]]:
    standing = found.primary.standing if found.primary else "exploratory"
    return [
        ("arms", str(len(found.arms))),
        ("seeds", str(len(found.seeds))),
        ("progress", _counts(found)),
        ("score", score_words(found)),
        ("compared with", found.baseline),
        ("primary comparison", {"changed": "changed since registration"}.get(standing, standing)),
        ("state", found.state),
    ]


def _counts(found: StudyNumbers) -> str:
    failed = len(found.runs.failed)
    tail = f", {failed} failed" if failed else ""
    return f"{found.runs.done} of {found.runs.planned} runs done{tail}"


def _markdown(
    found: StudyNumbers, said: list[str], noted: list[str], sections: list[Section]
) -> str:
    return "\n".join(_markdown_lines(found, said, noted, sections)) + "\n"


def _markdown_lines(
    found: StudyNumbers, said: list[str], noted: list[str], sections: list[Section]
) -> Iterator[str]:
    yield from (f"# {found.name}", "", f"**{said[0]}**", "")
    yield from (f"- {sentence}" for sentence in [*said[1:], *noted])
    yield ""
    yield "; ".join(f"{term}: {fact}" for term, fact in _facts(found)) + "."
    for section in sections:
        if not (section.sentences or section.tables):
            continue
        yield from ("", f"## {section.title}", "")
        yield from (f"- {sentence}" for sentence in section.sentences)
        for title, table in section.tables:
            yield from ("", *([f"### {title}", ""] if title else []))
            yield _cells(table.headers)
            yield _cells(["---"] * len(table.headers))
            yield from (_cells(row) for row in table.rows)
        yield from ("", *section.after)


def _cells(row: list[str]) -> str:
    """A line break or a bar within a cell would end it."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |"
