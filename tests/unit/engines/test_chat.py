"""One tokenisation gives ids and mask; the mask covers what the model would have sampled."""

from pathlib import Path

import pytest
from other_tokenizers import byte_pair_chat
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from pear_ray.engines.chat import AnswerSpan, ChatTokenizer
from pear_ray.errors import InputError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def trained_text(chat: ChatTokenizer, messages: list[dict[str, str]]) -> str:
    ids, mask = chat.example(messages)
    assert len(ids) == len(mask)
    return chat.tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep])


def test_the_whole_text_is_there_once(chat: ChatTokenizer) -> None:
    ids, _ = chat.example([user("1 + 2 ="), assistant("3")])
    assert chat.tokenizer.decode(ids) == "<|user|>1 + 2 =<|end|><|assistant|>3<|end|>"


@pytest.mark.parametrize(
    "answer",
    [
        "3",
        "1 + 2 = 3",
        " = 3",
        "<answer>3</answer>",
        "3\n",
        "Grüße 日本 🙂",
        "<|assistant|>",
        "x" * 90,
    ],
)
def test_the_mask_covers_answer_and_end_token(chat: ChatTokenizer, answer: str) -> None:
    assert trained_text(chat, [user("1 + 2 ="), assistant(answer)]) == f"{answer}<|end|>"


def test_the_mask_covers_every_assistant_turn(chat: ChatTokenizer) -> None:
    messages = [
        {"role": "system", "content": "s"},
        user("a"),
        assistant("bb"),
        user("bb"),
        assistant("cc"),
    ]
    ids, mask = chat.example(messages)
    assert trained_text(chat, messages) == "bb<|end|>cc<|end|>"
    assert sum(mask) == 6
    assert ids[-1] == chat.eos_id
    assert mask[-1]


def test_one_tokenisation_says_where_everything_is(chat: ChatTokenizer) -> None:
    encoded = chat.encode([user("a"), assistant("é🙂"), user("c"), assistant("")])
    text = "<|user|>a<|end|><|assistant|>é🙂<|end|><|user|>c<|end|><|assistant|><|end|>"
    assert encoded.text == text
    # 8 + 1 + 7 + 13 characters before the first answer; 8 + 1 + 7 + 13 between the two.
    assert encoded.answers == [AnswerSpan(29, 31, 38), AnswerSpan(67, 67, 74)]
    assert chat.tokenizer.decode(encoded.token_ids) == text
    # User turn, its end, assistant; then 2 bytes of é and 4 of the emoji share their characters.
    pieces = [(29, 30)] * 2 + [(30, 31)] * 4
    assert encoded.offsets[:11] == [(0, 8), (8, 9), (9, 16), (16, 29), *pieces, (31, 38)]


def test_a_turn_that_the_template_does_not_end_has_no_end_token(folder: Path) -> None:
    chat = with_template(
        folder,
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    )
    messages = [user("a"), assistant("b"), user("c")]
    assert chat.encode(messages).answers == [AnswerSpan(17, 19, 19)]
    assert trained_text(chat, messages) == "b;"


def test_only_the_last_assistant_turn_trains(chat: ChatTokenizer) -> None:
    messages = [user("a"), assistant("bb"), user("c"), assistant("dd"), user("e")]
    all_ids, all_mask = chat.example(messages, train_on="all")
    ids, mask = chat.example(messages, train_on="last")
    assert ids == all_ids
    assert (all_ids, all_mask) == chat.example(messages)
    trained = [i for i, keep in zip(ids, mask, strict=True) if keep]
    assert chat.tokenizer.decode(trained) == "dd<|end|>"
    assert sum(all_mask) == 2 * sum(mask) == 6


def test_without_an_assistant_turn_nothing_trains(chat: ChatTokenizer) -> None:
    for train_on in ("all", "last"):
        assert not any(chat.example([user("a")], train_on=train_on)[1])


def test_a_chat_that_ends_with_the_user_trains_only_the_answer(chat: ChatTokenizer) -> None:
    assert trained_text(chat, [user("a"), assistant("b"), user("c")]) == "b<|end|>"


def test_a_chat_that_begins_with_the_assistant_is_refused(chat: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match="a chat begins with a user or system turn"):
        chat.example([assistant("hello"), user("c")])


@pytest.mark.parametrize("question", ["1 + 2 =", "", "Spell this: 🙂", "ends with space "])
def test_prompt_ids_are_a_prefix_of_the_example(chat: ChatTokenizer, question: str) -> None:
    prompt = chat.prompt_ids(question)
    ids, mask = chat.example([user(question), assistant("7")])
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def with_template(folder: Path, template: str) -> ChatTokenizer:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ChatTokenizer(folder)


def test_what_follows_the_end_token_does_not_train(folder: Path) -> None:
    """ChatML writes a newline after the end token, which is never sampled."""
    chat = with_template(
        folder,
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    )
    assert trained_text(chat, [user("a"), assistant("b"), user("c")]) == "b<|end|>"


def test_a_template_that_rewrites_turns_is_refused(folder: Path) -> None:
    chat = with_template(
        folder,
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}",
    )
    with pytest.raises(ValueError, match=r"rewrites earlier turns \(turn 1\)"):
        chat.example([user("a"), assistant("b")])


TURNS = (
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "BODY{% endif %}{{ '<|' + m['role'] + '|>' + content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REASONED = assistant("<think>one\n\nand two </think>Three.")


def test_a_template_that_drops_the_reasoning_is_refused(folder: Path) -> None:
    """As DeepSeek's distilled models have it: unseen, the answer alone would train."""
    chat = with_template(
        folder, TURNS.replace("BODY", "{% set content = content.split('</think>')[-1] %}")
    )
    assert trained_text(chat, [user("a"), assistant("Three.")]) == "Three.<|end|>"
    with pytest.raises(ValueError, match=r"leaves out or changes part of the answer \(turn 1\)"):
        chat.example([user("a"), REASONED])


def test_a_template_may_move_white_space_around_the_reasoning(folder: Path) -> None:
    """As Qwen3's does."""
    body = (
        "{% if '</think>' in content %}{% set parts = content.split('</think>') %}"
        "{% set content = '<think>\n' + parts[0].split('<think>')[-1].strip('\n')"
        " + '\n</think>\n\n' + parts[-1].lstrip('\n') %}{% endif %}"
    )
    chat = with_template(folder, TURNS.replace("BODY", body))
    kept = "<think>\none\n\nand two \n</think>\n\nThree.<|end|>"
    assert trained_text(chat, [user("a"), REASONED]) == kept


def test_a_template_that_refuses_a_chat_says_so(folder: Path) -> None:
    chat = with_template(folder, "{{ raise_exception('system turns are not supported') }}")
    with pytest.raises(ValueError, match="system turns are not supported"):
        chat.example([user("a"), assistant("b")])


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"eos_token"', '"other_token"'), encoding="utf-8")
    with pytest.raises(InputError, match="no end token; set eos_token"):
        ChatTokenizer(folder)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_whitespace_trains_whatever_the_post_processor_trims(
    tmp_path: Path, *, trim_offsets: bool
) -> None:
    """GPT-2's and Llama 3's trims offsets; a token of spaces alone then has none left."""
    chat = byte_pair_chat(tmp_path, trim_offsets=trim_offsets)
    messages = [user("a"), assistant("x   the  answer \n\n")]
    assert trained_text(chat, messages) == "x   the  answer \n\n</s>"
    encoded = chat.encode(messages)
    assert encoded.token_ids == chat.tokenizer(encoded.text)["input_ids"]
    assert "".join(encoded.text[begin:end] for begin, end in encoded.offsets) == encoded.text


def test_an_end_token_that_swallows_what_follows_still_trains(tmp_path: Path) -> None:
    end_token = AddedToken("</s>", rstrip=True, normalized=False, special=True)
    chat = byte_pair_chat(tmp_path, end_token=end_token)
    assert trained_text(chat, [user("a"), assistant("b"), user("c")]) == "b</s>"
    encoded = chat.encode([user("a"), assistant("b"), user("c")])
    at = encoded.token_ids.index(chat.eos_id)
    begin, end = encoded.offsets[at]
    assert encoded.text[begin:end] == "</s>"
    assert encoded.text[end : encoded.offsets[at + 1][0]] == "\n"  # the one swallowed


def test_a_token_across_the_beginning_of_an_answer_does_not_train(tmp_path: Path) -> None:
    chat = byte_pair_chat(tmp_path)
    messages = [user("a"), assistant("\nb")]
    encoded = chat.encode(messages)
    across = (encoded.answers[0].begin - 1, encoded.answers[0].begin + 1)
    assert across in encoded.offsets  # two newlines are one token
    assert trained_text(chat, messages) == "b</s>"


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"ByT5Tokenizer does not say .* tokenizer\.json"):
        ChatTokenizer(tmp_path)
