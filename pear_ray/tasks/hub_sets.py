"""Problem sets of the hub: the usual ones by name, any other by its columns."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pear_ray.config.problems import HubProblems, ProblemColumns
from pear_ray.errors import InputError
from pear_ray.records import Problem
from pear_ray.tasks.hub import HubUnreachableError, reach_hub, said
from pear_ray.tasks.problem_files import Layout, problems_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSet:
    """What is known of a set: where it is, how it is read, and how many problems it has.

    Attributes:
        answer_after: What a column with a worked solution has before the final answer.
        num_problems: In its split; None where nothing is known.
    """

    path: str
    configuration: str | None = None
    split: str = "test"
    columns: ProblemColumns = field(default_factory=ProblemColumns)
    answer_after: str = ""
    num_problems: int | None = None


_PROBLEM = ProblemColumns(prompt="problem")
KNOWN = {
    "gsm8k": HubSet(
        path="openai/gsm8k",
        configuration="main",
        columns=ProblemColumns(prompt="question"),
        answer_after="####",
        num_problems=1319,
    ),
    "math-500": HubSet(
        path="HuggingFaceH4/MATH-500",
        columns=ProblemColumns(prompt="problem", id="unique_id"),
        num_problems=500,
    ),
    "aime-2024": HubSet(
        path="HuggingFaceH4/aime_2024", split="train", columns=_PROBLEM, num_problems=30
    ),
    "aime-2025": HubSet(path="math-ai/aime25", columns=_PROBLEM, num_problems=30),
}


def read_hub_problems(config: HubProblems) -> list[Problem]:
    """The set's problems with ids `name/row`, rows counting from 1, or `name/ID`.

    Raises:
        InputError: The dataset cannot be had, has too few rows, or a row cannot be used.
    """
    known = _set_of(config)
    layout = Layout(
        source=f"hub:{known.path}",
        task=config.name.rpartition("/")[2],
        columns=known.columns,
        prompt_template=config.prompt_template,
    )
    rows = _rows(known.path, known.configuration, known.split)
    if known.answer_after:
        rows = tuple((row, _with_final_answer(known, tree)) for row, tree in rows)
    return problems_of_rows(rows, layout, skip=config.skip, size=config.size)


def known_size(config: HubProblems) -> int | None:
    """How many problems a known set has, without asking the hub."""
    num_problems = _set_of(config).num_problems
    return None if num_problems is None else max(0, num_problems - config.skip)


def fetch_command(path: str, configuration: str | None, split: str) -> str:
    """What fetches the dataset into the cache that `HF_HUB_OFFLINE=1` reads."""
    which = repr(path) if configuration is None else f"{path!r}, {configuration!r}"
    return f'python -c "import datasets; datasets.load_dataset({which}, split={split!r})"'


def _set_of(config: HubProblems) -> HubSet:
    """What is known of the set, under what the config says of it."""
    known = KNOWN.get(config.name) or HubSet(path=config.name)
    is_known_split = config.split in (None, known.split)
    return HubSet(
        path=known.path,
        configuration=config.configuration or known.configuration,
        split=config.split or known.split,
        columns=config.columns or known.columns,
        answer_after="" if config.columns else known.answer_after,
        num_problems=known.num_problems if is_known_split else None,
    )


@functools.lru_cache(maxsize=8)
def _rows(path: str, configuration: str | None, split: str) -> tuple[tuple[int, Any], ...]:
    """The split's rows with their numbers, from 1; evaluation sets are small."""
    import datasets  # noqa: PLC0415 - seconds, and only hub sets need it

    if Path(path).exists():  # `datasets` would read it, and not what the hub has
        raise InputError(
            f"{path} is here as well ({Path(path).absolute()}), and `datasets` would read it in "
            "the hub's place; start from another folder"
        )
    try:
        reach_hub(path)
        found = datasets.load_dataset(path, configuration, split=split).with_format(None)
    except HubUnreachableError as error:
        raise InputError(
            f"hub:{path}: the hub cannot be reached ({error}); fetch the set where it can, with "
            f"{fetch_command(path, configuration, split)}, then set HF_HUB_OFFLINE=1, with HF_HOME "
            "where the cache is; or give a JSONL file (kind: file)"
        ) from error
    except Exception as error:  # the libraries' errors share no base: offline, missing, broken
        raise InputError(
            f"hub:{path}: no split {split!r} to be had ({said(error)}); check name, configuration "
            "and split, or, offline, fetch it where there is a network, with "
            f"{fetch_command(path, configuration, split)}, and copy HF_HOME here; or give a JSONL "
            "file (kind: file)"
        ) from error
    return tuple(enumerate(found.to_list(), start=1))


def _with_final_answer(known: HubSet, tree: Any) -> Any:
    """GSM8K's rows end in `#### 1,234`; a row without the mark has no answer, and is refused."""
    column = known.columns.answer
    _, mark, answer = str(tree.get(column)).rpartition(known.answer_after)
    return tree | {
        column: answer.strip().replace(",", "") if mark else None,
        "solution": tree.get(column),
    }
