"""Text to token ids, once, with the target model's tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from pear_ray.errors import InputError


class ChatTokenizer:
    """The tokenizer of a model folder, writing chats as its template does."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos_id: int = self.tokenizer.eos_token_id
        if self.eos_id is None:
            raise InputError(
                f"{folder}: the tokenizer has no end token; set eos_token in its config"
            )
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad

    def prompt_ids(self, question: str) -> list[int]:
        """Ids of a chat that asks `question`, up to where the assistant's answer begins."""
        text = self._render([{"role": "user", "content": question}], answer_begins=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def example(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of a whole chat: assistant turns train, their end tokens included.

        One tokenisation gives both: turns are found by their place in the text, because ids of a
        prompt tokenised alone need not be a prefix of the ids of the whole.

        Raises:
            ValueError: The template does not write a chat as a continuation of its beginning, or
                the chat begins with the assistant, whose first tokens then have nothing before
                them.
        """
        if messages[0]["role"] == "assistant":
            raise ValueError("messages.0.role: a chat begins with a user or system turn")
        text = self._render(messages, answer_begins=False)
        spans = [
            self._answer_span(messages, index, text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            any(begin <= start and end <= stop for begin, stop in spans) and end > start
            for start, end in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], mask

    def _answer_span(
        self, messages: Sequence[Mapping[str, str]], index: int, text: str
    ) -> tuple[int, int]:
        before = self._render(messages[:index], answer_begins=True)
        through = self._render(messages[: index + 1], answer_begins=False)
        if not (text.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"the chat template rewrites earlier turns (turn {index}), so the answer cannot be "
                "found in the text; use a template that only appends"
            )
        end_token = self.tokenizer.eos_token
        cut = through.rfind(end_token, len(before))
        # What the template writes after the end token (a newline, say) was never sampled.
        return len(before), len(through) if cut < 0 else cut + len(end_token)

    def _render(self, messages: Sequence[Mapping[str, str]], *, answer_begins: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_begins
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these turns: {error}") from error
