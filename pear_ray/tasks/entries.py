"""What a problem's entry holds for verifiers, be it of a game or of a file."""

import functools
import json
from typing import Any

from pear_ray.records import Problem
from pear_ray.tasks.games import open_game


def answer_of(problem: Problem) -> str | None:
    """The problem's answer as text; None where it has none."""
    return _answer_and_metadata(problem.task, problem.entry)[0]


def metadata_of(problem: Problem) -> dict[str, Any]:
    """The problem's metadata; not to be changed, since a group's completions share it."""
    return _answer_and_metadata(problem.task, problem.entry)[1]


@functools.lru_cache(maxsize=4096)
def game_and_item(task: str, entry: str) -> tuple[Any, dict[str, Any]]:
    """The open game and the problem's record; a group's completions share one entry."""
    record = json.loads(entry)
    params = json.dumps(record["params"], sort_keys=True)
    dataset = open_game(task, params, record["seed"])
    return dataset, record["item"] or dataset[record["index"]]


@functools.lru_cache(maxsize=4096)
def _answer_and_metadata(task: str, entry: str) -> tuple[str | None, dict[str, Any]]:
    record = json.loads(entry)
    if "item" in record:
        record = record["item"] or game_and_item(task, entry)[1]
    answer = record.get("answer")
    return None if answer is None else str(answer), record.get("metadata") or {}
