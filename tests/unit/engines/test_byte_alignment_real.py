"""Real tokenizers against each other: single bytes, byte-level merges, SentencePiece's marks."""

import pytest
from other_tokenizers import TEMPLATE, byte_pair_chat, word_mark_chat
from tokenizers import AddedToken, normalizers

from pear_ray.engines.byte_alignment import align_messages, assign
from pear_ray.engines.chat import ChatTokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory) -> ChatTokenizer:
    return byte_pair_chat(tmp_path_factory.mktemp("byte_pairs"))


def span_texts(chat: ChatTokenizer, ids, spans):
    return [chat.tokenizer.decode([ids[i] for i in span]) for span in spans]


def both_texts(target, behavior, messages, **kwargs):
    alignment = align_messages(target, behavior, messages, **kwargs)
    ids = target.encode(messages).token_ids
    own = [
        [i for i, number in enumerate(alignment.span_ids) if number == span]
        for span in range(len(alignment.behavior_spans))
    ]
    theirs = [range(*span) for span in alignment.behavior_spans]
    return span_texts(target, ids, own), span_texts(behavior, alignment.behavior_ids, theirs)


CHAT = [
    user("3 + 4 = ?"),
    assistant("the answer is\n\n7 🙂, or 日本 in café"),
    user('and "s"?'),
    assistant("<answer>twenty</answer>"),
]


def test_bytes_against_merges(chat, byte_pairs):
    """The embedded tokenizer parts at every character, so spans are what BPE can tell apart."""
    ours, theirs = both_texts(chat, byte_pairs, CHAT, train_on="all")
    assert [t for t in ours if t != "<|end|>"] == [t for t in theirs if t != "</s>"]
    assert ours.count("<|end|>") == theirs.count("</s>") == 2
    assert "".join(ours) == f"{CHAT[1]['content']}<|end|>{CHAT[3]['content']}<|end|>"
    # `<answer>` is one token of the embedded tokenizer and several of the other's.
    assert "<answer>" in ours
    assert max(map(len, ours)) > 3  # merges are there
    assert "🙂" in "".join(ours)
    assert not any("�" in text for text in (*ours, *theirs))  # no character is parted


def test_merges_against_bytes_is_the_same_seen_from_there(chat, byte_pairs):
    ours, theirs = both_texts(chat, byte_pairs, CHAT, train_on="last")
    assert (theirs, ours) == both_texts(byte_pairs, chat, CHAT, train_on="last")
    assert "".join(theirs) == "<answer>twenty</answer></s>"


def test_equal_tokenizers_give_each_token_its_span_and_its_log_prob(chat):
    messages = [user("1 + 2 ="), assistant("1 + 2 = 3"), user("x"), assistant("y")]
    alignment = align_messages(chat, chat, messages, train_on="all")
    ids, mask = chat.example(messages)
    assert alignment.behavior_ids == ids
    assert [span for span in alignment.span_ids if span >= 0] == list(range(sum(mask)))
    assert alignment.behavior_spans == [(i, i + 1) for i, keep in enumerate(mask) if keep]
    values = [-0.01 * n for n in range(len(ids))]
    kept = [v if keep else 0.0 for v, keep in zip(values, mask, strict=True)]
    assert assign(alignment, values) == kept


def test_a_behavior_merge_across_the_beginning_is_refused(chat, byte_pairs):
    """ChatML-like templates write a newline before the answer, which merges with one of its own."""
    with pytest.raises(ValueError, match=r"\[assistant\]\\n' and '\\nseven</s>\\n', but the behav"):
        align_messages(chat, byte_pairs, [user("x"), assistant("\nseven")], train_on="all")


def test_a_target_merge_across_the_beginning_leaves_it_out(chat, byte_pairs):
    ours, theirs = both_texts(byte_pairs, chat, [user("x"), assistant("\nab")], train_on="all")
    assert ours == ["a", "b", "</s>"]
    assert theirs == ["a", "b", "<|end|>"]


@pytest.mark.parametrize("marks", ["always", "first", "never"])
def test_word_marks(chat, tmp_path, marks):
    """Their decoder drops the space that they put before the first word."""
    other = word_mark_chat(tmp_path, marks=marks)
    for messages in (CHAT, [user("x"), assistant(" two  spaces 🙂 ")]):
        ours, theirs = both_texts(chat, other, messages, train_on="all")
        said = "".join(message["content"] + "<|end|>" for message in messages[1::2])
        assert "".join(ours) == said
        # Decoded one by one, every span of theirs loses its first space.
        assert [text.lstrip(" ") for text in ours if text != "<|end|>"] == [
            text.lstrip(" ") for text in theirs if text != "</s>"
        ]


def test_an_unknown_character_is_refused(chat, tmp_path):
    other = word_mark_chat(tmp_path, marks="first", byte_fallback=False)
    with pytest.raises(ValueError, match=r"unknown characters.* at character 4 .*'🙂', .*'<unk>'"):
        align_messages(chat, other, [user("x"), assistant("the 🙂")], train_on="all")


def test_an_end_token_that_swallows_a_newline_is_a_span(chat, tmp_path):
    end_token = AddedToken("</s>", rstrip=True, normalized=False, special=True)
    other = byte_pair_chat(tmp_path, end_token=end_token)
    messages = [user("x"), assistant("ab"), user("y"), assistant("cd")]
    ours, theirs = both_texts(chat, other, messages, train_on="all")
    assert ours == ["a", "b", "<|end|>", "c", "d", "<|end|>"]
    assert theirs == ["a", "b", "</s>", "c", "d", "</s>"]


@pytest.mark.parametrize(
    ("begins", "content", "message"),
    [
        ("", "m['content'] | trim", "at character 0 the target has ' seven', .* model 'seven'"),
        ("", "'<think></think>' + m['content']", "the behavior model '<think></think> seve"),
        ("<t>", "'<t>' + m['content'] + '!'", "at character 6 the target has '', .* model '!'"),
    ],
)
def test_a_template_that_writes_another_answer_is_refused(chat, tmp_path, begins, content, message):
    template = TEMPLATE.replace("m['content']", f"({content} if m['role'] != 'user' else 'x')")
    template = template.replace("[assistant]\\n", f"[assistant]\\n{begins}")
    other = byte_pair_chat(tmp_path, template=template)
    with pytest.raises(ValueError, match=message):
        align_messages(chat, other, [user("x"), assistant(" seven")], train_on="all")


def test_a_template_that_refuses_the_chat_is_the_behavior_models(chat, tmp_path):
    other = byte_pair_chat(tmp_path, template="{{ raise_exception('no system turn') }}")
    with pytest.raises(
        ValueError, match=r"behavior model: the chat template refuses .*system turn"
    ):
        align_messages(chat, other, [user("x"), assistant("y")], train_on="all")


def test_a_tokenizer_that_normalises_the_answer_is_refused(chat, tmp_path):
    other = byte_pair_chat(tmp_path, normalizer=normalizers.NFC())
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    ours, _ = both_texts(chat, other, [user(decomposed), assistant(composed)], train_on="all")
    assert "".join(ours) == f"{composed}<|end|>"
    with pytest.raises(ValueError, match=r"change the answer in different ways .* at character 3"):
        align_messages(chat, other, [user("x"), assistant(f"{decomposed}!")], train_on="all")
    # Two that normalise alike say the same.
    ours, theirs = both_texts(
        other, other, [user("x"), assistant(f"{decomposed}!")], train_on="all"
    )
    assert ours == theirs
    assert "".join(ours) == f"{composed}!</s>"
