"""Text to token ids, once, with a model's own tokenizer and chat template."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pear_ray.errors import InputError

TrainOn = Literal["all", "last"]
"""Which assistant turns train: every one, or only the last."""


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Where one assistant turn stands in the text of a chat, in characters.

    Attributes:
        begin: The first character that the model would have sampled.
        content_end: Past the content, before the end token; `end` where none was written.
        end: Past the end token. What the template writes after it was never sampled.
    """

    begin: int
    content_end: int
    end: int


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """One tokenisation of a chat, from which ids, loss mask and alignment are all read.

    Attributes:
        text: The chat as the template writes it.
        token_ids: The ids of `text`.
        offsets: The characters of `text` that each id stands for, as (begin, end); the byte-level
            pieces of one character all have that character's.
        answers: The assistant turns, in order.
    """

    text: str
    token_ids: list[int]
    offsets: list[tuple[int, int]]
    answers: list[AnswerSpan]


def trained_answers(chat: EncodedChat, *, train_on: TrainOn) -> list[AnswerSpan]:
    """The assistant turns that train, in order."""
    return chat.answers[-1:] if train_on == "last" else chat.answers


def chat_loss_mask(chat: EncodedChat, *, train_on: TrainOn) -> list[bool]:
    """True for tokens that lie wholly inside an answer that trains, its end token included."""
    answers = trained_answers(chat, train_on=train_on)
    begins = [answer.begin for answer in answers]
    mask = []
    for begin, end in chat.offsets:
        index = bisect_right(begins, begin) - 1  # the last answer that begins at or before
        mask.append(index >= 0 and begin < end <= answers[index].end)
    return mask


class ChatTokenizer:
    """The tokenizer of a model folder, writing chats as its template does."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos_id: int = self.tokenizer.eos_token_id
        if self.eos_id is None:
            raise InputError(
                f"{folder}: the tokenizer has no end token; set eos_token in its config"
            )
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{folder}: {type(self.tokenizer).__name__} does not say which characters a token "
                "stands for; give a model with a tokenizer.json"
            )
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad

    def prompt_ids(self, question: str) -> list[int]:
        """Ids of a chat that asks `question`, up to where the assistant's answer begins."""
        return self.tokenizer(self.prompt_text(question), add_special_tokens=False)["input_ids"]

    def prompt_text(self, question: str) -> str:
        """The chat that asks `question`, as text, up to where the assistant's answer begins."""
        return self._render([{"role": "user", "content": question}], answer_begins=True)

    def answer_ending(self) -> str:
        """What the template writes behind an answer, as text: how a policy learns to end one."""
        content = "answer"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        text = self._render(messages, answer_begins=False)
        return text[text.rfind(content) + len(content) :]

    def example(
        self, messages: Sequence[Mapping[str, str]], *, train_on: TrainOn = "all"
    ) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of a whole chat: assistant turns train, their end tokens included.

        Raises:
            ValueError: As `encode`.
        """
        chat = self.encode(messages)
        return chat.token_ids, chat_loss_mask(chat, train_on=train_on)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> EncodedChat:
        """A whole chat, tokenised once.

        Turns are found by their place in the text, because ids of a prompt tokenised alone need not
        be a prefix of the ids of the whole.

        Raises:
            ValueError: The template does not write a chat as a continuation of its beginning, or
                not all of an answer, or the chat begins with the assistant, whose first tokens then
                have nothing before them.
        """
        if messages[0]["role"] == "assistant":
            raise ValueError("messages.0.role: a chat begins with a user or system turn")
        text = self._render(messages, answer_begins=False)
        answers = [
            self._answer_span(messages, index, text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self._untrimmed.encode(text, add_special_tokens=False)
        offsets = [
            self._without_swallowed(text, begin, end) if token_id == self.eos_id else (begin, end)
            for token_id, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True)
        ]
        return EncodedChat(text, encoded.ids, offsets, answers)

    @cached_property
    def _untrimmed(self) -> Tokenizer:
        """The same tokenizer, except that offsets include a token's whitespace.

        The post-processor of GPT-2 and Llama 3 trims it off, so that a token of spaces seems to
        stand for nothing and would never train.
        """
        tokenizer = deepcopy(self.tokenizer.backend_tokenizer)
        tokenizer.post_processor = None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _without_swallowed(self, text: str, begin: int, end: int) -> tuple[int, int]:
        """Offsets of an end token alone; `rstrip` makes some (Phi-3's) swallow what follows."""
        at = text.find(self.tokenizer.eos_token, begin, end)
        return (begin, end) if at < 0 else (at, at + len(self.tokenizer.eos_token))

    def _answer_span(
        self, messages: Sequence[Mapping[str, str]], index: int, text: str
    ) -> AnswerSpan:
        before = self._render(messages[:index], answer_begins=True)
        through = self._render(messages[: index + 1], answer_begins=False)
        if not (text.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"the chat template rewrites earlier turns (turn {index}), so the answer cannot be "
                "found in the text; use a template that only appends"
            )
        content = messages[index]["content"]
        # Templates may trim and add white space, and marks around reasoning; words they must keep.
        if "".join(content.split()) not in "".join(through[len(before) :].split()):
            raise ValueError(
                f"the chat template leaves out or changes part of the answer (turn {index}), such "
                "as the reasoning before </think>, which then would not train; use a template that "
                "keeps it"
            )
        end_token = self.tokenizer.eos_token
        cut = through.rfind(end_token, len(before))
        if cut < 0:
            return AnswerSpan(len(before), len(through), len(through))
        return AnswerSpan(len(before), cut, cut + len(end_token))

    def _render(self, messages: Sequence[Mapping[str, str]], *, answer_begins: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_begins
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these turns: {error}") from error
