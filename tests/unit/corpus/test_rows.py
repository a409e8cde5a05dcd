"""A row becomes exactly one example, or is refused by reason, field and what was found."""

from pathlib import Path
from typing import Any

import pytest
from by_hand import corpus

from pear_ray.corpus.parts import Part
from pear_ray.corpus.rows import BadRow, Reason, RowReader
from pear_ray.engines.chat import ChatTokenizer

PART = Part(index=0, file="/far/away/rows.jsonl", name="rows.jsonl", format="jsonl")
VOCAB = 50
NAN, INF = float("nan"), float("inf")
USER, ANSWER = {"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "3"}
IDS = {"token_ids": [5, 6, 7, 8], "loss_mask": [False, True, False, True]}


def reader(chat: ChatTokenizer, **changes: Any) -> RowReader:
    return RowReader(
        corpus=corpus("rows.jsonl", **changes), chat=chat, vocab_size=VOCAB, max_model_len=32
    )


def example(chat: ChatTokenizer, tree: Any, **changes: Any) -> dict[str, Any]:
    return reader(chat, **changes).example(tree, part=PART, row=7)[0]


def trained(chat: ChatTokenizer, tree: Any, **changes: Any) -> str:
    """The text of the tokens that train."""
    found = example(chat, tree, **changes)
    pairs = zip(found["token_ids"], found["loss_mask"], strict=True)
    return chat.tokenizer.decode([each for each, trains in pairs if trains])


def refusal(chat: ChatTokenizer, tree: Any, **changes: Any) -> tuple[Reason, str, str]:
    with pytest.raises(BadRow) as caught:
        example(chat, tree, **changes)
    return caught.value.reason, caught.value.field, caught.value.detail


def test_both_spellings_make_the_same_example(chat: ChatTokenizer) -> None:
    found = example(chat, {"prompt": "1 + 2 =", "completion": "3"})
    assert found | {"token_ids": None, "loss_mask": None} == {
        "example_id": "rows.jsonl:7",
        "source": "corpus",
        "is_negative": False,
        "problem_id": None,
        "file": "/far/away/rows.jsonl",
        "row": 7,
        "messages": '[{"role": "user", "content": "1 + 2 ="}, '
        '{"role": "assistant", "content": "3"}]',
        "token_ids": None,
        "loss_mask": None,
        "given_logprobs": None,
    }
    text = "<|user|>1 + 2 =<|end|><|assistant|>3<|end|>"
    assert chat.tokenizer.decode(found["token_ids"]) == text
    assert found["loss_mask"] == [False] * 7 + [True] * 2
    assert example(chat, {"messages": [USER, ANSWER]}) == found


def test_what_a_row_says_of_itself(chat: ChatTokenizer) -> None:
    said = {"id": 12, "source": "someone", "is_negative": True, "weather": "fine"}
    found = example(chat, {"messages": [USER, ANSWER]} | said)
    assert (found["example_id"], found["source"], found["is_negative"]) == ("12", "someone", True)
    unsaid = dict.fromkeys(said) | {"token_ids": None, "messages": None}
    found = example(chat, {"prompt": "a", "completion": "b"} | unsaid, source="them")
    assert (found["example_id"], found["source"], found["is_negative"]) == (
        "rows.jsonl:7",
        "them",
        False,
    )


def test_a_turn_keeps_its_role_and_content_alone(chat: ChatTokenizer) -> None:
    found = example(chat, {"messages": [USER | {"name": "Ann", "tool_calls": None}, ANSWER]})
    assert found == example(chat, {"messages": [USER, ANSWER]})


def test_ids_come_before_messages_and_messages_before_text(chat: ChatTokenizer) -> None:
    every = {"prompt": "x", "completion": "y", "messages": [USER, ANSWER]} | IDS
    assert example(chat, every)["token_ids"] == [5, 6, 7, 8]
    assert example(chat, every)["messages"] is None
    assert trained(chat, every | {"token_ids": None}) == "3<|end|>"


def test_which_turns_train(chat: ChatTokenizer) -> None:
    rows = {"messages": [USER, ANSWER, USER, ANSWER | {"content": "4"}]}
    assert trained(chat, rows) == "3<|end|>4<|end|>"
    assert trained(chat, rows, train_on="last") == "4<|end|>"
    assert trained(chat, {"messages": [*rows["messages"], USER]}, train_on="last") == "4<|end|>"


def test_columns_under_other_names(chat: ChatTokenizer) -> None:
    columns = {
        "prompt": "q", "completion": "a", "id": "key", "source": "by", "is_negative": "wrong",
        "token_ids": "ids", "loss_mask": "mask", "behavior_logprobs": "lp", "messages": "turns",
    }  # fmt: skip
    named = {"key": "k", "by": "me", "wrong": True}
    text = example(chat, {"q": "1 + 2 =", "a": "3"} | named, columns=columns)
    assert text["token_ids"] == example(chat, {"messages": [USER, ANSWER]})["token_ids"]
    assert (text["example_id"], text["source"], text["is_negative"]) == ("k", "me", True)
    turns = example(chat, {"turns": [USER, ANSWER]} | named, columns=columns)
    assert turns == text
    ids = example(chat, {"ids": [5, 6], "mask": [False, True], "lp": [-1]}, columns=columns)
    assert (ids["token_ids"], ids["given_logprobs"]) == ([5, 6], [0.0, -1.0])
    assert refusal(chat, {"prompt": "a", "completion": "b"}, columns=columns) == (
        Reason.WRONG_TYPE,
        "q",
        "expected text (or `turns`, or `ids`), got None",
    )


BAD = [
    (BadRow(Reason.UNREADABLE, "", "not valid JSON"), "unreadable", "", "not valid JSON"),
    (["a"], "wrong_type", "", "expected an object, got list"),
    (None, "wrong_type", "", "expected an object, got NoneType"),
    ({}, "wrong_type", "prompt", "expected text (or `messages`, or `token_ids`), got None"),
    (
        {"prompt": "a", "completion": 3},
        "wrong_type", "completion", "expected text (or `messages`, or `token_ids`), got 3",
    ),
    ({"prompt": "a", "completion": " \n"}, "empty", "completion", "it has no text"),
    ({"messages": []}, "empty", "messages", "it has no turn"),
    ({"messages": "hello"}, "wrong_type", "messages", "expected a list of turns"),
    ({"messages": ["hello"]}, "wrong_type", "messages.0.content", "expected text"),
    ({"messages": [{"role": "user"}]}, "wrong_type", "messages.0.content", "expected text"),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"text": "3"}]}]},
        "wrong_type", "messages.1.content", "expected text",
    ),
    (
        {"messages": [USER, {"role": "bot", "content": "b"}]},
        "bad_roles", "messages.1.role", "expected one of system, user, assistant, tool, got 'bot'",
    ),
    (
        {"messages": [USER, {"content": "b"}]},
        "bad_roles", "messages.1.role", "expected one of system, user, assistant, tool, got None",
    ),
    (
        {"messages": [ANSWER, USER]},
        "bad_roles", "messages.0.role", "a chat begins with a user or system turn",
    ),
    ({"messages": [USER]}, "no_trainable_token", "messages", "no assistant turn"),
    (
        {"messages": [USER, ANSWER | {"content": "  "}]},
        "empty", "messages", "no assistant turn has any text",
    ),
    (
        {"prompt": "a", "completion": "b" * 28},
        "too_long", "", "33 tokens, more than models.max_model_len=32",
    ),
    ({"token_ids": "5 6"}, "wrong_type", "token_ids", "expected a list of integers"),
    (IDS | {"token_ids": [5, 6.0, 7, 8]}, "wrong_type", "token_ids", "expected a list of integers"),
    (
        IDS | {"token_ids": [5, True, 7, 8]},
        "wrong_type", "token_ids", "expected a list of integers",
    ),
    ({"token_ids": [], "loss_mask": []}, "empty", "token_ids", "it has no id"),
    ({"token_ids": [5]}, "wrong_type", "loss_mask", "expected 1 booleans, one per id"),
    (IDS | {"loss_mask": [False, True]}, "wrong_type", "loss_mask",
     "expected 4 booleans, one per id"),
    (IDS | {"loss_mask": [0, 1, 0, 1]}, "wrong_type", "loss_mask",
     "expected 4 booleans, one per id"),
    (IDS | {"token_ids": [5, 50, 7, 8]}, "id_out_of_vocabulary", "token_ids",
     "ids span [5, 50], the policy knows [0, 49]"),
    (IDS | {"token_ids": [5, -1, 7, 8]}, "id_out_of_vocabulary", "token_ids",
     "ids span [-1, 8], the policy knows [0, 49]"),
    (IDS | {"loss_mask": [True, False, False, False]}, "no_trainable_token", "",
     "no token of it trains"),
    (IDS | {"is_negative": 1}, "wrong_type", "is_negative", "expected true or false, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "reason", "field", "detail"), BAD)
def test_a_row_that_cannot_be_used(
    chat: ChatTokenizer, tree: Any, reason: str, field: str, detail: str
) -> None:
    assert refusal(chat, tree) == (reason, field, detail)


def test_every_reason_that_one_row_can_have_is_planted_above() -> None:
    elsewhere = {Reason.TEMPLATE, Reason.ALIGNMENT, Reason.BAD_LOGPROBS, Reason.DUPLICATE_ID}
    assert {reason for _, reason, _, _ in BAD} | elsewhere == set(Reason)


def test_what_was_found_is_shown_in_short(chat: ChatTokenizer) -> None:
    _, _, detail = refusal(chat, {"prompt": ["word"] * 100_000, "completion": "b"})
    assert len(detail) < 150


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        (
            "{{ raise_exception('no system turns here') }}",
            "the chat template refuses these turns: no system turns here",
        ),
        ("{{ messages|length }}", "the chat template rewrites earlier turns (turn 1)"),
    ],
)
def test_a_template_that_does_not_take_the_row(student: Path, template: str, detail: str) -> None:
    chat = ChatTokenizer(student)
    chat.tokenizer.chat_template = template
    reason, field, found = refusal(chat, {"messages": [USER, ANSWER]})
    assert (reason, field) == (Reason.TEMPLATE, "messages")
    assert found.startswith(detail)


def test_a_row_at_the_limit_is_kept(chat: ChatTokenizer) -> None:
    row = {"prompt": "a", "completion": "b" * 27}
    found, was_cut = reader(chat, too_long="cut").example(row, part=PART, row=1)
    assert len(found["token_ids"]) == 32
    assert not was_cut
    assert example(chat, row) == found | {"row": 7, "example_id": "rows.jsonl:7"}


def test_a_longer_row_is_cut_at_its_end(chat: ChatTokenizer) -> None:
    row = {"prompt": "a", "completion": "b" * 28}  # 4 ids, 28 and the end token: 33
    given = {"behavior_logprobs": [-float(n) for n in range(29)]}
    found, was_cut = reader(chat, too_long="cut").example(row | given, part=PART, row=1)
    assert was_cut
    assert chat.tokenizer.decode(found["token_ids"]) == "<|user|>a<|end|><|assistant|>" + "b" * 28
    assert found["loss_mask"] == [False] * 4 + [True] * 28
    assert found["given_logprobs"] == [0.0] * 4 + [-float(n) for n in range(28)]


def test_a_row_whose_answer_is_cut_away(chat: ChatTokenizer) -> None:
    row = {"prompt": "a" * 40, "completion": "b"}
    assert refusal(chat, row, too_long="cut")[0] is Reason.NO_TRAINABLE_TOKEN
    assert refusal(chat, row, too_long="drop")[0] is Reason.TOO_LONG


@pytest.mark.parametrize(
    ("mask", "values", "wanted"),
    [
        ([False, True, False, True], [-1.0, -2.0, -3.0, -4.0], [0.0, -2.0, 0.0, -4.0]),
        ([False, True, False, True], [-1.0, -2.0], [0.0, -1.0, 0.0, -2.0]),
        ([False, True, False, True], [-1, 0], [0.0, -1.0, 0.0, 0.0]),  # whole numbers, and 0
        ([False, True, False, True], [NAN, -2.0, INF, -4.0], [0.0, -2.0, 0.0, -4.0]),
        ([False, True, False, True], [0.00005, -2.0], [0.0, 0.00005, 0.0, -2.0]),  # rounding
        ([True, True, True, True], [-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]),
    ],
)
def test_logprobs_that_came_with_a_row(
    chat: ChatTokenizer, mask: list[bool], values: list[float], wanted: list[float]
) -> None:
    row = {"token_ids": [5, 6, 7, 8], "loss_mask": mask, "behavior_logprobs": values}
    assert example(chat, row)["given_logprobs"] == wanted


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([-1.0] * 3, "3 values"),
        ([], "0 values"),
        ("-1 -2", "str"),
        ([-1.0, True], "2 values"),
        ([-1.0, None], "2 values"),
        ([-1.0, "-2"], "2 values"),
    ],
)
def test_logprobs_that_are_not_one_per_token(chat: ChatTokenizer, values: Any, found: str) -> None:
    assert refusal(chat, IDS | {"behavior_logprobs": values}) == (
        Reason.BAD_LOGPROBS,
        "behavior_logprobs",
        f"expected 4 numbers (one per id) or 2 (one per token that trains), got {found}",
    )


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.1])
def test_logprobs_that_no_policy_has(chat: ChatTokenizer, value: float) -> None:
    for values in ([-1.0, value], [0.0, value, 0.0, -1.0]):
        assert refusal(chat, IDS | {"behavior_logprobs": values}) == (
            Reason.BAD_LOGPROBS,
            "behavior_logprobs",
            "not finite, or above 0, at a trained token",
        )


def test_logprobs_of_text_are_of_its_answers_tokens(chat: ChatTokenizer) -> None:
    found = example(chat, {"messages": [USER, ANSWER], "behavior_logprobs": [-0.5, -0.25]})
    assert found["given_logprobs"] == [0.0] * 7 + [-0.5, -0.25]


def test_the_first_token_is_not_counted_as_training(chat: ChatTokenizer) -> None:
    row = {"token_ids": [5, 6], "loss_mask": [True, True]}
    assert example(chat, row)["loss_mask"] == [True, True]
    assert refusal(chat, row | {"loss_mask": [True, False]})[0] is Reason.NO_TRAINABLE_TOKEN
    assert refusal(chat, {"token_ids": [5], "loss_mask": [True]})[0] is Reason.NO_TRAINABLE_TOKEN
