"""One row of a corpus as an example of the target model's ids, or why it cannot be one."""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pear_ray.config.corpus import DatasetCorpus
from pear_ray.corpus.parts import Part
from pear_ray.engines.byte_alignment import align_messages
from pear_ray.engines.chat import ChatTokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_LOG_PROB = 1e-4  # a certain token's, after float32 rounding


class Reason(StrEnum):
    """Why a row cannot be used."""

    UNREADABLE = "unreadable"
    WRONG_TYPE = "wrong_type"
    EMPTY = "empty"
    BAD_ROLES = "bad_roles"
    TEMPLATE = "template"
    ALIGNMENT = "alignment"
    NO_TRAINABLE_TOKEN = "no_trainable_token"
    TOO_LONG = "too_long"
    ID_OUT_OF_VOCABULARY = "id_out_of_vocabulary"
    BAD_LOGPROBS = "bad_logprobs"
    DUPLICATE_ID = "duplicate_id"


class BadRow(Exception):  # noqa: N818 - a verdict on a row that is kept, seldom raised far
    """A row that cannot be used: the reason, the field at fault, and what was found there."""

    def __init__(self, reason: Reason, field: str, detail: str) -> None:
        super().__init__(reason, field, detail)
        self.reason, self.field, self.detail = reason, field, detail

    def __str__(self) -> str:
        """Field and detail in words."""
        return f"{self.field}: {self.detail}" if self.field else self.detail


@dataclass(frozen=True, slots=True)
class RowReader:
    """What turns rows into examples.

    Attributes:
        corpus: Column names and what trains.
        chat: The target model's tokenizer.
        vocab_size: Ids must be below it.
        max_model_len: Longest example, in tokens.
        behavior: The tokenizer of each source's behavior model (`*`: any source) where it is
            another than the target's.
    """

    corpus: DatasetCorpus
    chat: ChatTokenizer
    vocab_size: int
    max_model_len: int
    behavior: Mapping[str, ChatTokenizer] = dataclasses.field(default_factory=dict)

    def example(self, tree: Any, *, part: Part, row: int) -> tuple[dict[str, Any], bool]:
        """The row as a row of `artifacts.tables.CORPUS`, and whether it was cut.

        Raises:
            BadRow: It cannot be used.
        """
        if isinstance(tree, BadRow):  # the reader could not make a row of it
            raise tree
        if not isinstance(tree, dict):
            raise BadRow(Reason.WRONG_TYPE, "", f"expected an object, got {type(tree).__name__}")
        columns = self.corpus.columns
        messages: list[dict[str, str]] | None = None
        if tree.get(columns.token_ids) is not None:
            token_ids, loss_mask = self._given_ids(tree)
        else:
            messages = self._messages(tree)
            token_ids, loss_mask = self._tokenised(messages)
        given = self._given_logprobs(tree, loss_mask)
        length = len(token_ids)
        if length > self.max_model_len:
            if self.corpus.too_long == "drop":
                raise BadRow(
                    Reason.TOO_LONG,
                    "",
                    f"{length} tokens, more than models.max_model_len={self.max_model_len}",
                )
            token_ids, loss_mask = token_ids[: self.max_model_len], loss_mask[: self.max_model_len]
            given = given[: self.max_model_len] if given is not None else None
        source = _text(tree, columns.source, self.corpus.source)
        self._check_alignment(messages, source)
        # The first token never trains: nothing before it predicts it.
        if not any(loss_mask[1:]):
            raise BadRow(Reason.NO_TRAINABLE_TOKEN, "", "no token of it trains")
        example = {
            "example_id": self._example_id(tree, part, row),
            "source": source,
            "is_negative": self._is_negative(tree),
            "problem_id": None,
            "file": part.file,
            "row": row,
            "messages": json.dumps(messages, ensure_ascii=False) if messages else None,
            "token_ids": token_ids,
            "loss_mask": loss_mask,
            "given_logprobs": given,
        }
        return example, length > self.max_model_len

    def _tokenised(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        try:
            return self.chat.example(messages, train_on=self.corpus.train_on)
        except ValueError as error:
            raise BadRow(Reason.TEMPLATE, self.corpus.columns.messages, str(error)) from error

    def _check_alignment(self, messages: list[dict[str, str]] | None, source: str) -> None:
        """See that a behavior model with another tokenizer can score the row."""
        behavior = self.behavior.get(source) or self.behavior.get("*")
        if behavior is None:
            return
        field = self.corpus.columns.messages
        if messages is None:
            raise BadRow(Reason.ALIGNMENT, field, "models.align=bytes needs the chat's text")
        try:
            found = align_messages(self.chat, behavior, messages, train_on=self.corpus.train_on)
        except ValueError as error:
            raise BadRow(Reason.ALIGNMENT, field, str(error)) from error
        length = len(found.behavior_ids)
        if length > self.max_model_len:
            raise BadRow(
                Reason.TOO_LONG,
                field,
                f"{length} tokens of the behavior model, more than "
                f"models.max_model_len={self.max_model_len}",
            )

    def _messages(self, tree: dict[str, Any]) -> list[dict[str, str]]:
        columns = self.corpus.columns
        if tree.get(columns.messages) is not None:
            return _checked_turns(tree[columns.messages], columns.messages)
        for field in (columns.prompt, columns.completion):
            if not isinstance(tree.get(field), str):
                raise BadRow(
                    Reason.WRONG_TYPE,
                    field,
                    f"expected text (or `{columns.messages}`, or `{columns.token_ids}`), "
                    f"got {reprlib.repr(tree.get(field))}",
                )
        if not tree[columns.completion].strip():
            raise BadRow(Reason.EMPTY, columns.completion, "it has no text")
        return [
            {"role": "user", "content": tree[columns.prompt]},
            {"role": "assistant", "content": tree[columns.completion]},
        ]

    def _given_ids(self, tree: dict[str, Any]) -> tuple[list[int], list[bool]]:
        columns = self.corpus.columns
        ids: Any = tree[columns.token_ids]
        mask: Any = tree.get(columns.loss_mask)
        if not _is_list_of(ids, int):
            raise BadRow(Reason.WRONG_TYPE, columns.token_ids, "expected a list of integers")
        if not ids:
            raise BadRow(Reason.EMPTY, columns.token_ids, "it has no id")
        if not _is_list_of(mask, bool) or len(mask) != len(ids):
            raise BadRow(
                Reason.WRONG_TYPE, columns.loss_mask, f"expected {len(ids)} booleans, one per id"
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            raise BadRow(
                Reason.ID_OUT_OF_VOCABULARY,
                columns.token_ids,
                f"ids span [{low}, {high}], the policy knows [0, {self.vocab_size - 1}]",
            )
        return ids, mask

    def _given_logprobs(
        self, tree: dict[str, Any], loss_mask: Sequence[bool]
    ) -> list[float] | None:
        """Log-probs that came with the row, one per id, 0 where nothing trains."""
        field = self.corpus.columns.behavior_logprobs
        values = tree.get(field)
        if values is None:
            return None
        num_ids, num_trained = len(loss_mask), sum(loss_mask)
        if not _is_list_of(values, float) or len(values) not in (num_ids, num_trained):
            found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
            raise BadRow(
                Reason.BAD_LOGPROBS,
                field,
                f"expected {num_ids} numbers (one per id) or {num_trained} (one per token that "
                f"trains), got {found}",
            )
        if len(values) == num_ids:
            aligned = [float(v) if m else 0.0 for v, m in zip(values, loss_mask, strict=True)]
        else:
            left = iter(values)
            aligned = [float(next(left)) if trains else 0.0 for trains in loss_mask]
        if not all(math.isfinite(value) and value <= MAX_LOG_PROB for value in aligned):
            raise BadRow(Reason.BAD_LOGPROBS, field, "not finite, or above 0, at a trained token")
        return aligned

    def _is_negative(self, tree: dict[str, Any]) -> bool:
        field = self.corpus.columns.is_negative
        value = tree.get(field)
        if value is not None and not isinstance(value, bool):
            raise BadRow(
                Reason.WRONG_TYPE, field, f"expected true or false, got {reprlib.repr(value)}"
            )
        return bool(value)

    def _example_id(self, tree: dict[str, Any], part: Part, row: int) -> str:
        value = tree.get(self.corpus.columns.id)
        return f"{part.name}:{row}" if value is None else str(value)


def _text(tree: dict[str, Any], field: str, default: str) -> str:
    value = tree.get(field)
    return default if value is None else str(value)


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether `value` is a list of exactly `kind`; integers pass for floats, booleans never do."""
    kinds = (float, int) if kind is float else (kind,)
    return isinstance(value, list) and all(type(each) in kinds for each in value)


def _checked_turns(messages: Any, field: str) -> list[dict[str, str]]:
    """`messages` with role and content of every turn, and nothing else."""
    if not isinstance(messages, list):
        raise BadRow(Reason.WRONG_TYPE, field, "expected a list of turns")
    if not messages:
        raise BadRow(Reason.EMPTY, field, "it has no turn")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow(Reason.WRONG_TYPE, f"{field}.{index}.content", "expected text")
        if message.get("role") not in ROLES:
            raise BadRow(
                Reason.BAD_ROLES,
                f"{field}.{index}.role",
                f"expected one of {', '.join(ROLES)}, got {reprlib.repr(message.get('role'))}",
            )
        turns.append({"role": message["role"], "content": message["content"]})
    if turns[0]["role"] == "assistant":
        raise BadRow(
            Reason.BAD_ROLES, f"{field}.0.role", "a chat begins with a user or system turn"
        )
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise BadRow(Reason.NO_TRAINABLE_TOKEN, field, "no assistant turn")
    if not any(turn["content"].strip() for turn in answers):
        raise BadRow(Reason.EMPTY, field, "no assistant turn has any text")
    return turns
