"""Spans that two tokenizations share: worked by hand, and for any two byte-level ones."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.engines.byte_alignment import Alignment, align, assign
from pear_ray.engines.chat import AnswerSpan, EncodedChat, chat_loss_mask

QUICK = settings(deadline=None, max_examples=60)


def encoded(tokens, *answers):
    """A chat from its tokens' texts; ("é", 2) is two byte-level pieces of one character."""
    text, offsets = "", []
    for token in tokens:
        piece, count = token if isinstance(token, tuple) else (token, 1)
        offsets += [(len(text), len(text) + len(piece))] * count
        text += piece
    ids = list(range(100, 100 + len(offsets)))
    return EncodedChat(text, ids, offsets, [AnswerSpan(*answer) for answer in answers])


# By hand, on records


def test_a_worked_example():
    # Target cuts at 0 2 3 4, behavior's at 0 1 3 4: they share 0 3 4.
    target = encoded(["q", ":", "ab", "c", "d", "<e>"], (2, 6, 9))
    behavior = encoded(["[q]", "a", "bc", "d", "</s>", "\n"], (3, 7, 11))
    alignment = align(target, behavior, train_on="all")
    assert alignment == Alignment(
        behavior_ids=[100, 101, 102, 103, 104, 105],
        span_ids=[-1, -1, 0, 0, 1, 2],
        behavior_spans=[(1, 3), (3, 4), (4, 5)],
    )
    logprobs = assign(alignment, [math.nan, -0.5, -1.0, -0.25, -0.125, math.inf])
    assert logprobs == [0.0, 0.0, -0.75, -0.75, -0.25, -0.125]


def test_pieces_of_one_character_are_never_parted():
    # Both part the emoji's bytes (2 + 2, 1 + 3), and é from what follows only in one.
    target = encoded(["q:", "x", ("🙂", 2), ("é", 2), "y", "<e>"], (2, 6, 9))
    behavior = encoded(["q:", "x", ("🙂", 2), "éy", "<e>"], (2, 6, 9))
    alignment = align(target, behavior, train_on="all")
    assert alignment.span_ids == [-1, 0, 1, 1, 2, 2, 2, 3]
    assert alignment.behavior_spans == [(1, 2), (2, 4), (4, 5), (5, 6)]


def test_a_piece_that_reaches_into_the_next_character_joins_both():
    # [x + first byte of é] [second byte of é + y]: offsets (2, 4) and (3, 5) overlap.
    target = encoded(["q:", "x", "é", "y", "<e>"], (2, 5, 8))
    behavior = encoded(["q:", "xéy", "<e>"], (2, 5, 8))
    behavior = EncodedChat(
        behavior.text, [1, 2, 3, 4], [(0, 2), (2, 4), (3, 5), (5, 8)], behavior.answers
    )
    alignment = align(target, behavior, train_on="all")
    assert alignment.span_ids == [-1, 0, 0, 0, 1]
    assert alignment.behavior_spans == [(1, 3), (3, 4)]


def test_the_same_tokens_are_each_a_span():
    chat = encoded(["q:", "ab", "c", "d", "<e>", "r:", "e", "<e>"], (2, 6, 9), (11, 12, 15))
    alignment = align(chat, chat, train_on="all")
    assert alignment.span_ids == [-1, 0, 1, 2, 3, -1, 4, 5]
    assert alignment.behavior_spans == [(1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8)]
    values = [-0.1 * n for n in range(8)]
    assert assign(alignment, values) == [0.0, *values[1:5], 0.0, *values[6:]]


def test_turns_number_on_and_the_last_may_train_alone():
    target = encoded(["q:", "ab", "<e>", "r:", "c", "d", "<e>"], (2, 4, 7), (9, 11, 14))
    behavior = encoded(["q:", "a", "b", "<e>", "r:", "cd", "<e>"], (2, 4, 7), (9, 11, 14))
    both = align(target, behavior, train_on="all")
    assert both.span_ids == [-1, 0, 1, -1, 2, 2, 3]
    assert both.behavior_spans == [(1, 3), (3, 4), (5, 6), (6, 7)]
    last = align(target, behavior, train_on="last")
    assert last.span_ids == [-1, -1, -1, -1, 0, 0, 1]
    assert last.behavior_spans == [(5, 6), (6, 7)]
    assert assign(last, [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0]) == [
        *[0.0] * 4,
        *(-16.0, -16.0, -64.0),
    ]


def test_an_end_token_written_in_pieces_is_still_one_span():
    target = encoded(["q:", "a", "<", "e>"], (2, 3, 6))
    behavior = encoded(["q:", "a", "</", "s", ">", "\n"], (2, 3, 7))
    alignment = align(target, behavior, train_on="all")
    assert alignment.span_ids == [-1, 0, 1, 1]
    assert alignment.behavior_spans == [(1, 2), (2, 5)]


def test_an_empty_answer_is_its_end_token():
    chat = encoded(["q:", "<e>"], (2, 2, 5))
    assert align(chat, chat, train_on="all").span_ids == [-1, 0]


def test_a_target_without_end_token_needs_none_of_the_behavior():
    target = encoded(["q:", "a", "b"], (2, 4, 4))
    behavior = encoded(["q:", "ab", "</s>"], (2, 4, 8))
    alignment = align(target, behavior, train_on="all")
    assert alignment.span_ids == [-1, 0, 0]
    assert alignment.behavior_spans == [(1, 2)]


def test_a_token_without_characters_goes_with_what_follows():
    """Such as a word-begin mark; the target's own does not train."""
    chat = encoded(["q:", "a", "", "b", "", "<e>", ""], (2, 4, 7))
    alignment = align(chat, chat, train_on="all")
    assert alignment.span_ids == [-1, 0, -1, 1, -1, 2, -1]
    assert alignment.behavior_spans == [(1, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize(
    "offsets",
    [
        [(2, 4), (3, 3), (3, 4), (4, 5)],  # "ab", nothing, b again: neighbours alone look parted
        [(2, 3), (3, 3), (2, 4), (4, 5)],  # a, nothing, and "ab" again
    ],
)
def test_tokens_that_overlap_further_off_are_not_parted(offsets):
    offsets = [(0, 2), *offsets, (5, 8)]
    target = EncodedChat("q:abc<e>", list(range(6)), offsets, [AnswerSpan(2, 5, 8)])
    behavior = encoded(["q:", "a", "b", "c", "<e>"], (2, 5, 8))
    alignment = align(target, behavior, train_on="all")
    assert alignment.span_ids == [-1, 0, -1, 0, 1, 2]
    assert alignment.behavior_spans == [(1, 3), (3, 4), (4, 5)]


def test_characters_that_no_token_stands_for_are_inside_a_span():
    """A dropped space is no place to cut: it is not known which side it would belong to."""
    offsets = [(0, 2), (2, 4), (5, 6), (6, 7), (7, 10)]
    target = EncodedChat("q:ab cd<e>", list(range(5)), offsets, [AnswerSpan(2, 7, 10)])
    behavior = encoded(["q:", "ab", " ", "c", "d", "<e>"], (2, 7, 10))
    for other in (target, behavior):
        assert align(target, other, train_on="all").span_ids == [-1, 0, 0, 1, 2]


def test_a_target_token_across_the_beginning_is_conditioned_on():
    # ":a" does not train; the behavior's "a" is left out likewise.
    target = encoded(["q", ":a", "bc", "<e>"], (2, 5, 8))
    behavior = encoded(["q:", "a", "b", "c", "<e>"], (2, 5, 8))
    alignment = align(target, behavior, train_on="all")
    assert alignment.span_ids == [-1, -1, 0, 1]
    assert alignment.behavior_spans == [(2, 4), (4, 5)]
    # Both reach in, equally far: nothing of the template is scored.
    same = align(target, target, train_on="all")
    assert same.behavior_spans == [(2, 3), (3, 4)]


def test_no_span_at_all():
    chat = encoded(["q:"])
    alignment = align(chat, chat, train_on="all")
    assert alignment == Alignment([100], [-1], [])
    assert assign(alignment, [-1.0]) == [0.0]


SHARED = (["q:", "ab", "c", "<e>"], (2, 5, 8))
REFUSED = {
    "another_text": (
        SHARED,
        (["q:", "ab ", "c", "<e>"], (2, 6, 9)),
        r"write different answers .* at character 2 the target has 'c', the behavior model ' c'",
    ),
    "shorter": (SHARED, (["q:", "ab", "<e>"], (2, 4, 7)), r"the target has 'c', .* model ''"),
    "behavior_across_the_beginning": (
        SHARED,
        (["q", ":a", "b", "c", "<e>"], (2, 5, 8)),
        r"begins between 'q:' and 'abc<e>', but the behavior model's tokens are not parted there",
    ),
    "target_reaches_in_but_not_to_a_cut": (
        (["q", ":a", "bc", "<e>"], (2, 5, 8)),
        (["q:", "ab", "c", "<e>"], (2, 5, 8)),
        "begins between 'q:a' and 'bc<e>', but the behavior",
    ),
    "behavior_across_the_content_end": (
        SHARED,
        (["q:", "ab", "c<", "e>"], (2, 5, 8)),
        "ends between 'q:abc' and '<e>', but the behavior",
    ),
    "target_across_the_content_end": (
        (["q:", "ab", "c<", "e>"], (2, 5, 8)),
        SHARED,
        "ends between 'q:abc' and '<e>', but the target",
    ),
    "behavior_across_the_end": (
        SHARED,
        (["q:", "ab", "c", "<e>\n"], (2, 5, 8)),
        r"end token of an answer ends between 'q:abc<e>' and '\\n', but the behavior",
    ),
    "no_end_token": (SHARED, (["q:", "ab", "c"], (2, 5, 5)), "without its eos_token"),
    "nothing_before": (SHARED, (["ab", "c", "<e>"], (0, 3, 6)), "nothing before the answer"),
    "turns": (SHARED, (["q:"],), "the target has 1 assistant turns and the behavior model 0"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_aligned_says_why(case):
    target, behavior, message = case
    with pytest.raises(ValueError, match=message):
        align(encoded(*target), encoded(*behavior), train_on="all")


def test_a_target_piece_that_trains_but_cannot_be_told_apart_is_refused():
    # [: + first byte of é] [second byte of é]: the second lies inside the answer, so it trains.
    target = EncodedChat(
        "q:éb<e>", [1, 2, 3, 4, 5], [(0, 1), (1, 3), (2, 3), (3, 4), (4, 7)], [AnswerSpan(2, 4, 7)]
    )
    behavior = encoded(["q:", "é", "b", "<e>"], (2, 4, 7))
    with pytest.raises(ValueError, match="token for 'é' trains, but cannot be told apart"):
        align(target, behavior, train_on="all")


def test_log_probs_of_other_ids_are_refused():
    chat = encoded(*SHARED)
    alignment = align(chat, chat, train_on="all")
    with pytest.raises(ValueError, match="3 log-probs for 4 behavior ids"):
        assign(alignment, [-1.0] * 3)


# For any two byte-level tokenizations


@st.composite
def byte_cuts(draw, content):
    """Where a byte-level tokenizer parts a text: any bytes, begin and end included."""
    num_bytes = len(content.encode())
    inner = draw(st.sets(st.integers(1, max(1, num_bytes - 1)), max_size=num_bytes))
    return sorted({0, num_bytes} | {cut for cut in inner if cut < num_bytes})


def byte_level(turns, *, before, end, after):
    """A chat and, per turn, where its tokens' bytes end, as byte-level tokenizers give offsets."""
    text, offsets, answers = "", [], []
    for content, cuts in turns:
        for piece in before:
            offsets.append((len(text), len(text) + len(piece)))
            text += piece
        begin = len(text)
        # The character that each byte belongs to.
        owner = [i for i, character in enumerate(content) for _ in character.encode()]
        for first, last in pairwise(cuts):
            offsets.append((begin + owner[first], begin + owner[last - 1] + 1))
        text += content
        answers.append(AnswerSpan(begin, len(text), len(text) + len(end)))
        for piece in (end, *after):
            offsets.append((len(text), len(text) + len(piece)))
            text += piece
    return EncodedChat(text, list(range(len(offsets))), offsets, answers)


def shared_character_cuts(content, left, right):
    """In UTF-8 bytes: bounds of whole characters at which both part the text."""
    bounds = {len(content[:i].encode()) for i in range(len(content) + 1)}
    return sorted(bounds & set(left) & set(right))


@st.composite
def two_tokenizations(draw):
    contents = draw(
        st.lists(st.text("ab \né日🙂", min_size=1, max_size=12), min_size=1, max_size=3)
    )
    left = [(content, draw(byte_cuts(content))) for content in contents]
    right = [(content, draw(byte_cuts(content))) for content in contents]
    expected = [
        shared_character_cuts(content, a, b)
        for (content, a), (_, b) in zip(left, right, strict=True)
    ]
    target = byte_level(left, before=("<u>", "é?", "<a>"), end="<e>", after=())
    behavior = byte_level(right, before=("[", "é?", "]", "\n"), end="</s>", after=("\n",))
    return target, behavior, expected


def said(chat, indices):
    begins, ends = zip(*[chat.offsets[i] for i in indices], strict=True)
    return chat.text[min(begins) : max(ends)]


@QUICK
@given(two_tokenizations(), st.sampled_from(["all", "last"]))
def test_the_spans_partition_the_loss_tokens_and_say_the_same(chats, train_on):
    target, behavior, expected = chats
    alignment = align(target, behavior, train_on=train_on)
    mask = chat_loss_mask(target, train_on=train_on)
    assert [span >= 0 for span in alignment.span_ids] == mask
    answers = list(zip(target.answers, expected, strict=True))
    answers = answers if train_on == "all" else answers[-1:]
    texts = []
    for answer, cuts in answers:
        content = target.text[answer.begin : answer.content_end].encode()
        texts += [content[a:b].decode() for a, b in pairwise(cuts)]
        texts.append(None)  # the end token
    assert len(alignment.behavior_spans) == len(texts)
    for span, text in enumerate(texts):
        own = [i for i, number in enumerate(alignment.span_ids) if number == span]
        other = list(range(*alignment.behavior_spans[span]))
        wanted = ("<e>", "</s>") if text is None else (text, text)
        assert (said(target, own), said(behavior, other)) == wanted
        assert own == list(range(own[0], own[-1] + 1))
    flat = [i for span in alignment.behavior_spans for i in range(*span)]
    assert flat == sorted(set(flat))


@QUICK
@given(two_tokenizations(), st.integers(0, 2**31), st.sampled_from([1e-8, 1.0, 1e4]))
def test_every_total_is_kept(chats, seed, scale):
    target, behavior, _ = chats
    alignment = align(target, behavior, train_on="all")
    values = -scale * np.random.default_rng(seed).random(len(behavior.token_ids))
    inside = np.zeros(len(values), dtype=bool)
    for begin, end in alignment.behavior_spans:
        inside[begin:end] = True
    values[~inside] = math.nan  # never read
    logprobs = assign(alignment, values.tolist())
    stored = np.asarray(logprobs, dtype=np.float32).tolist()
    for span, (begin, end) in enumerate(alignment.behavior_spans):
        total = math.fsum(values[begin:end])
        own = [i for i, number in enumerate(alignment.span_ids) if number == span]
        assert math.fsum(logprobs[i] for i in own) == pytest.approx(total, rel=1e-14)
        assert math.fsum(stored[i] for i in own) == pytest.approx(total, rel=1e-6)
        assert len({logprobs[i] for i in own}) == 1
    assert all(v == 0 for v, n in zip(logprobs, alignment.span_ids, strict=True) if n < 0)


@QUICK
@given(two_tokenizations())
def test_the_other_way_round_the_spans_are_the_same(chats):
    target, behavior, _ = chats
    there = align(target, behavior, train_on="all")
    back = align(behavior, target, train_on="all")
    for one, other in ((there, back), (back, there)):
        for span, (begin, end) in enumerate(one.behavior_spans):
            assert other.span_ids[begin:end] == [span] * (end - begin)
