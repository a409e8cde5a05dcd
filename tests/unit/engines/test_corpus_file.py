"""Every unusable row of a corpus file is refused by line, field and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.corpus_file import read_corpus_file
from pear_ray.errors import InputError

GOOD = {"prompt": "1 + 2 =", "completion": "3"}


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(path: Path, chat: ChatTokenizer) -> str:
    with pytest.raises(InputError) as caught:
        read_corpus_file(path, chat, max_model_len=32)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_both_spellings_make_the_same_row(tmp_path: Path, chat: ChatTokenizer) -> None:
    messages = [
        {"role": "user", "content": "1 + 2 ="},
        {"role": "assistant", "content": "3"},
    ]
    path = written(
        tmp_path, GOOD, "", {"messages": messages, "id": "mine", "source": "someone", "extra": 1}
    )
    first, second = read_corpus_file(path, chat, max_model_len=32)
    assert (first["example_id"], first["source"]) == ("line-00000001", "corpus")
    assert (second["example_id"], second["source"]) == ("mine", "someone")
    assert first["token_ids"] == second["token_ids"]
    assert chat.tokenizer.decode(first["token_ids"]) == (
        "<|user|>1 + 2 =<|end|><|assistant|>3<|end|>"
    )
    assert sum(first["loss_mask"]) == 2
    assert (first["question"], first["completion"]) == ("1 + 2 =", "3")
    assert first["sampled_logprobs"] is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not valid JSON"),
        ('["a"]', "expected an object, got list"),
        ({"completion": "3"}, "prompt: expected text (or `messages`), got None"),
        ({"prompt": "a", "completion": 3}, "completion: expected text (or `messages`), got 3"),
        ({"prompt": "a", "completion": " "}, "completion: no trainable token"),
        ({"messages": []}, "messages: expected a list of turns"),
        ({"messages": "hello"}, "messages: expected a list of turns"),
        ({"messages": ["hello"]}, "messages.0.content: expected text"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: expected text"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]},
            "messages.1.role: expected one of system, user, assistant, got 'bot'",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: no trainable token"),
        (
            {"messages": [{"role": "assistant", "content": "  "}]},
            "messages: no trainable token",
        ),
        (
            {"prompt": "a", "completion": "b" * 40},
            "45 tokens, more than models.max_model_len=32",
        ),
    ],
)
def test_an_unusable_row(tmp_path: Path, chat: ChatTokenizer, row: Any, reason: str) -> None:
    message = refusal(written(tmp_path, GOOD, row, GOOD), chat)
    assert "1 unusable rows; mend or remove them" in message
    assert f"  line 2: {reason}" in message


def test_a_duplicate_id_names_both_lines(tmp_path: Path, chat: ChatTokenizer) -> None:
    message = refusal(written(tmp_path, GOOD | {"id": 7}, GOOD, GOOD | {"id": "7"}), chat)
    assert "  line 3: id '7' is already on line 1" in message


def test_a_row_at_the_limit_is_kept(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = written(tmp_path, {"prompt": "a", "completion": "b" * 27})
    assert len(read_corpus_file(path, chat, max_model_len=32)[0]["token_ids"]) == 32


def test_text_that_is_not_utf8(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = written(tmp_path, GOOD)
    with path.open("ab") as file:
        file.write(b'{"prompt": "caf\xe9", "completion": "3"}\n')
    assert "  line 2: not UTF-8 text" in refusal(path, chat)


def test_a_missing_and_an_empty_file(tmp_path: Path, chat: ChatTokenizer) -> None:
    assert "no such file" in refusal(tmp_path / "absent.jsonl", chat)
    assert "the corpus is empty" in refusal(written(tmp_path, "", "  "), chat)


def test_at_most_ten_problems_are_shown(tmp_path: Path, chat: ChatTokenizer) -> None:
    message = refusal(written(tmp_path, *["{"] * 13), chat)
    assert "13 unusable rows" in message
    assert message.count("not valid JSON") == 10
    assert message.endswith("and 3 more")
