"""A corpus file: every row checked and tokenised before any engine starts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pear_ray.engines.chat import ChatTokenizer
from pear_ray.errors import InputError

ROLES = ("system", "user", "assistant")
SHOWN_PROBLEMS = 10


def read_corpus_file(
    path: Path, chat: ChatTokenizer, *, max_model_len: int
) -> list[dict[str, Any]]:
    """Rows of the corpus table (see `artifacts.tables.CORPUS`).

    Args:
        path: JSONL; each row has `messages`, or `prompt` and `completion`, and may have `id` and
            `source` (which behavior policy wrote it).
        chat: The target model's tokenizer.
        max_model_len: Longest row, in tokens.

    Raises:
        InputError: The file is missing or empty, or rows are unusable: all of them are listed by
            line, field and reason (at most ten).
    """
    if not path.is_file():
        raise InputError(f"corpus.path={path}: no such file; give a JSONL file")
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    lines_of: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            row = _row(line, number, chat, max_model_len=max_model_len)
        except ValueError as error:
            problems.append(f"  line {number}: {error}")
            continue
        first = lines_of.setdefault(row["example_id"], number)
        if first != number:
            problems.append(f"  line {number}: id {row['example_id']!r} is already on line {first}")
            continue
        rows.append(row)
    if problems:
        shown = "\n".join(problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        raise InputError(
            f"{path}: {len(problems)} unusable rows; mend or remove them\n{shown}{rest}"
        )
    if not rows:
        raise InputError(f"{path}: the corpus is empty; it needs at least one row")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:  # decoded line by line, so that the line can be named
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _row(line: bytes, number: int, chat: ChatTokenizer, *, max_model_len: int) -> dict[str, Any]:
    """One line as a row of the corpus table; ValueError says field and reason."""
    try:
        tree = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(  # noqa: TRY004 - read_corpus_file collects ValueErrors
            f"expected an object, got {type(tree).__name__}"
        )
    messages = _messages(tree)
    token_ids, loss_mask = chat.example(messages)
    if not any(loss_mask[1:]):
        raise ValueError("no trainable token: no assistant turn has any text")
    if len(token_ids) > max_model_len:
        raise ValueError(
            f"{len(token_ids)} tokens, more than models.max_model_len={max_model_len}; "
            "shorten the row or raise the limit"
        )
    return {
        "example_id": str(tree.get("id", f"line-{number:08d}")),
        "source": str(tree.get("source", "corpus")),
        "problem_id": None,
        "question": messages[0]["content"],
        "completion": messages[-1]["content"],
        "token_ids": token_ids,
        "loss_mask": loss_mask,
        "sampled_logprobs": None,
    }


def _messages(tree: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" not in tree:
        for field in ("prompt", "completion"):
            if not isinstance(tree.get(field), str):
                raise ValueError(  # noqa: TRY004 - as above
                    f"{field}: expected text (or `messages`), got {tree.get(field)!r}"
                )
        if not tree["completion"].strip():
            raise ValueError("completion: no trainable token: it is empty")
        return [
            {"role": "user", "content": tree["prompt"]},
            {"role": "assistant", "content": tree["completion"]},
        ]
    messages = tree["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list of turns")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(  # noqa: TRY004 - as above
                f"messages.{index}.content: expected text"
            )
        if message.get("role") not in ROLES:
            raise ValueError(
                f"messages.{index}.role: expected one of {', '.join(ROLES)}, got "
                f"{message.get('role')!r}"
            )
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ValueError("messages: no trainable token: no assistant turn has any text")
    return messages
