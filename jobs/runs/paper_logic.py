"""SynLogic and Enigmata for `paper_logic.yaml`: their rows as problem files, their own verifiers.

Both judge with code of theirs, which is not part of pear_ray (docs/paper.md says where it is); a
run finds it on PYTHONPATH. Their verifiers call `eval` on what a model wrote: run them in a
container without network and secrets.
"""

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pear_ray.records import Problem
from pear_ray.tasks.entries import metadata_of


def synlogic(problem: Problem, completion: str) -> bool:
    """Whether SynLogic's verifier of the row's task takes the completion for right.

    It turns its own failures into "wrong": they are not seen as errors.
    """
    metadata = metadata_of(problem)
    verifier = importlib.import_module("task2verifier").verifier_classes[metadata["task"]]()
    data = importlib.import_module("base.data").Data.from_json_str(metadata["game_data"])
    return bool(verifier.verify(data, completion))


def enigmata(problem: Problem, completion: str) -> bool:
    """Whether Enigmata's verifier of the row's task takes the completion for right (gives 1)."""
    metadata = metadata_of(problem)
    module = importlib.import_module(f"verifiable_tasks.tasks.{metadata['task']}.verifier")
    return float(module.verify(completion, metadata["solution"], metadata["meta"])) >= 1


def synlogic_problems(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Problem rows of SynLogic's: `prompt` is a chat, `extra_info.game_data_str` its game."""
    for row in rows:
        yield {
            "prompt": row["prompt"][-1]["content"],
            "metadata": {
                "task": row["data_source"],
                "game_data": row["extra_info"]["game_data_str"],
            },
        }


def enigmata_problems(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Problem rows of Enigmata's: `answer` may be a list, and some tasks' `meta` is text."""
    for row in rows:
        yield {
            "prompt": row["prompt"],
            "metadata": {
                "task": row["task_name"],
                "solution": row["answer"],
                "meta": row["meta"],
            },
        }


KINDS = {"synlogic": synlogic_problems, "enigmata": enigmata_problems}


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL or Parquet file, or of all such files below a folder, in order of path."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    for file in files:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in file.read_text("utf-8").splitlines() if line)
        elif file.suffix == ".parquet":
            parquet = importlib.import_module("pyarrow.parquet")
            yield from parquet.read_table(file).to_pylist()


def main(arguments: list[str] | None = None) -> None:
    """Write a problem file: `python jobs/runs/paper_logic.py enigmata FOLDER out.jsonl`.

    The sets come task by task; rows are put in an order that mixes tasks and is the same each time.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("source", type=Path, help="a JSONL or Parquet file, or a folder of them")
    parser.add_argument("target", type=Path)
    parser.add_argument("--without", nargs="*", default=[], help="tasks to leave out")
    parsed = parser.parse_args(arguments)
    problems = [
        problem
        for problem in KINDS[parsed.kind](_rows(parsed.source))
        if problem["metadata"]["task"] not in parsed.without
    ]
    problems.sort(key=lambda problem: hashlib.sha256(problem["prompt"].encode()).digest())
    lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
    parsed.target.parent.mkdir(parents=True, exist_ok=True)
    parsed.target.write_text("".join(lines), encoding="utf-8")
    sys.stdout.write(f"{parsed.target}: {len(lines):,} problems\n")


if __name__ == "__main__":
    main()
