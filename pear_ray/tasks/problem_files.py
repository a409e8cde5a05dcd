"""Problems of a JSONL or Parquet file, every row of it checked before one is used."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.config.problems import PROMPT_MARK, FileProblems, ProblemColumns
from pear_ray.errors import InputError
from pear_ray.records import Problem
from pear_ray.shipped import local_path

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class BadRowError(ValueError):
    """Field and reason, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How rows become problems.

    Attributes:
        source: Where they are of, as messages say it.
        task: What the problems' ids begin with.
        columns: What the rows call their columns.
        prompt_template: The user's turn around the prompt.
    """

    source: str
    task: str
    columns: ProblemColumns
    prompt_template: str


def read_problems(config: FileProblems) -> list[Problem]:
    """The file's problems with ids `stem/row`, rows counting from 1, or `stem/ID`.

    Raises:
        InputError: The file cannot be read, has too few rows, or a row cannot be used; the message
            names file, row and field.
    """
    path = Path(local_path(config.path)).expanduser()
    layout = Layout(
        source=config.path,
        task=path.stem,
        columns=config.columns,
        prompt_template=config.prompt_template,
    )
    rows = _rows(path, _format(config))
    return problems_of_rows(rows, layout, skip=config.skip, size=config.size)


def problems_of_rows(
    rows: Iterable[tuple[int, Any]], layout: Layout, *, skip: int, size: int | None
) -> list[Problem]:
    """Problems of numbered rows, every one checked, without the first `skip`, at most `size`.

    Raises:
        InputError: A row cannot be used, two have one id, or there are too few.
    """
    last = None if size is None else skip + size
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for row, tree in rows:
        try:
            problem = _problem(layout, row, tree)
        except BadRowError as error:
            raise InputError(f"{layout.source} row {row}: {error}") from error
        other = seen.setdefault(problem.problem_id, row)
        if other != row:
            raise InputError(
                f"{layout.source} row {row}: {layout.columns.id}: the same as row {other}'s; ids "
                "must differ"
            )
        problems.append(problem)
    if len(problems) < (last if last is not None else skip + 1):
        wanted = "at least one" if size is None else f"size={size}"
        raise InputError(
            f"{layout.source}: has {len(problems)} problems; {wanted} wanted after skip={skip}"
        )
    return problems[skip:last]


def _format(config: FileProblems) -> str:
    if config.format != "auto":
        return config.format
    suffix = Path(config.path).suffix
    if suffix not in _SUFFIXES:
        raise InputError(
            f"{config.path}: ends in {suffix or 'nothing'!r}, and not in {', '.join(_SUFFIXES)}; "
            "set `format`"
        )
    return _SUFFIXES[suffix]


def _rows(path: Path, kind: str) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers, from 1."""
    try:
        yield from _json_rows(path) if kind == "jsonl" else _parquet_rows(path)
    except OSError as error:  # pyarrow's own errors of reading are among them
        said = error.strerror or str(error).splitlines()[0]
        raise InputError(
            f"{path}: cannot be read ({said}); give a JSONL or Parquet file of problems"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as stream:
        for row, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield row, json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} row {row}: not valid JSON: {error}; mend it") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa  # noqa: PLC0415 - most runs have games or JSONL
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        yield from enumerate(pq.read_table(path).to_pylist(), start=1)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: is no Parquet file ({str(error).splitlines()[0]})") from error


def _problem(layout: Layout, row: int, tree: Any) -> Problem:
    if not isinstance(tree, dict):
        raise BadRowError(f"expected a mapping of columns, got {type(tree).__name__}")
    columns = layout.columns
    prompt = tree.get(columns.prompt)
    if columns.prompt not in tree:
        raise BadRowError(
            f"{columns.prompt}: missing; the row has {', '.join(map(str, tree)) or 'nothing'}; "
            "set columns.prompt"
        )
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRowError(f"{columns.prompt}: expected text, got {prompt!r}")
    answer = tree.get(columns.answer)
    if answer is not None and (
        isinstance(answer, bool) or not isinstance(answer, str | int | float)
    ):
        raise BadRowError(f"{columns.answer}: expected text or a number, got {answer!r:.60}")
    if isinstance(answer, str) and not answer.strip():
        raise BadRowError(f"{columns.answer}: expected text or a number, got {answer!r}")
    own_id = tree.get(columns.id)
    if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
        raise BadRowError(f"{columns.id}: expected text or a whole number, got {own_id!r:.60}")
    entry = {
        "file": layout.source,
        "row": row,
        "answer": None if answer is None else str(answer),
        "metadata": _metadata(columns, tree),
    }
    try:
        text = json.dumps(entry)
    except (TypeError, ValueError) as error:
        raise BadRowError(f"{columns.metadata}: cannot be written as JSON: {error}") from error
    number = row if own_id is None else own_id
    question = layout.prompt_template.replace(PROMPT_MARK, prompt)
    return Problem(f"{layout.task}/{number}", layout.task, question, text)


def _metadata(columns: ProblemColumns, tree: dict[str, Any]) -> dict[str, Any]:
    given = tree.get(columns.metadata)
    if given is not None and not isinstance(given, dict):
        raise BadRowError(f"{columns.metadata}: expected a mapping, got {type(given).__name__}")
    mapped = (columns.prompt, columns.answer, columns.metadata, columns.id)
    return {key: value for key, value in tree.items() if key not in mapped} | (given or {})
