"""Log-probs of a behavior model with another tokenizer, brought onto the target's tokens.

This is our extension of PEAR (arXiv 2602.01058), which has both models score one sequence of ids.
Here the behavior model scores its own ids of the same chat. Both write the same answer, so wherever
a token ends and the next begins in BOTH tokenizations, the tokens up to there say the same bytes.
Between two such cuts lies a span, whose total log-prob is kept exactly; how it divides over the
target's tokens is not known. `algorithms.pear_spans` uses spans as PEAR's blocks. A total is that
of the one tokenization that was scored; the probability of the bytes themselves would be a sum over
all tokenizations of them.

Cuts are counted in characters of the answer, which is exact: the answer is one and the same string
in both texts, and tokenizers give offsets in characters. A cut inside a character cannot be seen
(all its byte-level pieces have its offsets, so they overlap) and is never made. Where both part a
character at the same byte, their span is only longer than it need be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pear_ray.engines.chat import (
    AnswerSpan,
    ChatTokenizer,
    EncodedChat,
    TrainOn,
    chat_loss_mask,
    trained_answers,
)

SHOWN_CHARACTERS = 20  # of a text, in a message


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which behavior tokens say the same bytes as which target tokens.

    Attributes:
        behavior_ids: The whole chat in the behavior model's ids: what it is to score.
        span_ids: For each target token its span, numbered 0.. in order; -1 outside the loss mask.
        behavior_spans: For each span the behavior tokens of it, as (first, one past the last).
    """

    behavior_ids: list[int]
    span_ids: list[int]
    behavior_spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One tokenization as arrays; index i stands for the boundary before token i.

    Attributes:
        model: "target" or "behavior", for messages.
        chat: What was encoded.
        reached: How far the tokens before the boundary reach.
        resumed: Where the tokens after it begin.
        cuts: Characters at which tokens can be told apart: reached and resumed are the same there.
        cut_tokens: For each cut the first token after it; one without characters goes with what
            follows.
    """

    model: str
    chat: EncodedChat
    reached: NDArray[np.int64]
    resumed: NDArray[np.int64]
    cuts: NDArray[np.int64]
    cut_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Match:
    """One answer's boundaries: span k holds the tokens from boundary k to boundary k + 1.

    The first `num_content` spans are the content, and what is left is the end token.
    """

    target: NDArray[np.int64]
    behavior: NDArray[np.int64]
    num_content: int


def align_messages(
    target: ChatTokenizer,
    behavior: ChatTokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    train_on: TrainOn,
) -> Alignment:
    """Both models' tokenizations of one chat, aligned; also checks that they stand for one text.

    A tokenizer may change what it is given (normalise it, write an unknown character as one token).
    Its offsets do not show that, but its ids decode to something else.

    Raises:
        ValueError: The row cannot be scored by this behavior model; the message says what differs.
    """
    target_chat = target.encode(messages)
    try:
        behavior_chat = behavior.encode(messages)
    except ValueError as error:
        raise ValueError(f"behavior model: {error}") from error
    matches = _matches(target_chat, behavior_chat, train_on=train_on)
    for match in matches:
        ours = _read(target, target_chat, match.target[[0, match.num_content]])
        theirs = _read(behavior, behavior_chat, match.behavior[[0, match.num_content]])
        if ours != theirs:
            raise ValueError(
                "the tokenizers change the answer in different ways (normalisation, or unknown "
                f"characters): {_difference(ours, theirs)}"
            )
    return _numbered(target_chat, behavior_chat, matches, train_on=train_on)


def align(target: EncodedChat, behavior: EncodedChat, *, train_on: TrainOn) -> Alignment:
    """Spans of the answers that train; between them they hold every loss token once.

    The end token of a turn is a span of its own, target's and behavior's. A target token that
    reaches into the answer from before it does not train, so the spans begin behind it. A behavior
    token that does so is refused: its log-prob is partly the template's, and a behavior model that
    was given the prompt would not have sampled it.

    Raises:
        ValueError: The templates write different answers, or no cut is shared where the trained
            part of an answer begins, where its content ends, or where its end token ends.
    """
    matches = _matches(target, behavior, train_on=train_on)
    return _numbered(target, behavior, matches, train_on=train_on)


def assign(alignment: Alignment, behavior_logprobs: Sequence[float]) -> list[float]:
    """Behavior log-probs per target token: a span's total in even shares; 0 outside the loss mask.

    Only the totals mean anything: how a total divides over its span's tokens is not known.

    Args:
        alignment: Of the same chat.
        behavior_logprobs: One for each of `alignment.behavior_ids`; read inside spans only.

    Raises:
        ValueError: There are more or fewer of them than ids.
    """
    values = np.asarray(behavior_logprobs, dtype=np.float64)
    if values.shape != (len(alignment.behavior_ids),):
        raise ValueError(
            f"{len(behavior_logprobs)} log-probs for {len(alignment.behavior_ids)} behavior ids; "
            "score exactly the alignment's behavior_ids"
        )
    bounds = np.asarray(alignment.behavior_spans, dtype=np.int64).ravel()
    # Sums from each bound to the next: every second one is a span. The 0 lets a span end the row.
    totals = np.add.reduceat(np.append(values, 0.0), bounds)[::2]
    span_ids = np.asarray(alignment.span_ids, dtype=np.int64)
    own = span_ids[span_ids >= 0]
    shared = np.zeros(len(span_ids))
    shared[span_ids >= 0] = (totals / np.bincount(own, minlength=len(totals)))[own]
    return shared.tolist()


def _matches(target: EncodedChat, behavior: EncodedChat, *, train_on: TrainOn) -> list[_Match]:
    if len(target.answers) != len(behavior.answers):
        raise ValueError(
            f"the target has {len(target.answers)} assistant turns and the behavior model "
            f"{len(behavior.answers)}; encode the same messages with both"
        )
    ours, theirs = _tokens("target", target), _tokens("behavior", behavior)
    trains = np.asarray(chat_loss_mask(target, train_on=train_on), dtype=bool)
    pairs = zip(
        trained_answers(target, train_on=train_on),
        trained_answers(behavior, train_on=train_on),
        strict=True,
    )
    matches = []
    for answer, other in pairs:
        content = _match_content(ours, theirs, answer, other)
        end = _end_boundary(ours, answer)
        has_end = bool(trains[content.target[-1] : end].any())
        matches.append(_with_end(content, end, theirs, other) if has_end else content)
    return matches


def _tokens(model: str, chat: EncodedChat) -> _Tokens:
    begins, ends = np.asarray(chat.offsets, dtype=np.int64).reshape(-1, 2).T
    reached = np.concatenate([[0], np.maximum.accumulate(ends)])
    resumed = np.concatenate([np.minimum.accumulate(begins[::-1])[::-1], [len(chat.text)]])
    clean = np.flatnonzero(reached == resumed)
    cuts, first = np.unique(reached[clean], return_index=True)
    return _Tokens(model, chat, reached, resumed, cuts, clean[first])


def _match_content(
    target: _Tokens, behavior: _Tokens, answer: AnswerSpan, other: AnswerSpan
) -> _Match:
    """Boundaries at the cuts that both have, from where the target begins to train."""
    content = target.chat.text[answer.begin : answer.content_end]
    other_content = behavior.chat.text[other.begin : other.content_end]
    if content != other_content:
        raise ValueError(
            "the chat templates write different answers (does one strip or add text, or end a turn "
            f"with something else than its eos_token?): {_difference(content, other_content)}"
        )
    cuts, tokens = _content_cuts(target, answer)
    other_cuts, other_tokens = _content_cuts(behavior, other)
    shared, at, other_at = np.intersect1d(cuts, other_cuts, assume_unique=True, return_indices=True)
    if shared[0] != cuts[0]:
        begin = other.begin + int(cuts[0])
        raise _no_cut(behavior, begin, "the trained part of an answer begins")
    match = _Match(tokens[at], other_tokens[other_at], len(shared) - 1)
    if match.behavior[0] == 0:
        raise ValueError(
            "the behavior model's template writes nothing before the answer, so the answer's first "
            "token has no log-prob"
        )
    return match


def _content_cuts(
    tokens: _Tokens, answer: AnswerSpan
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts in the content, counted from its beginning, and the tokens after them."""
    first = np.searchsorted(tokens.cuts, answer.begin, side="left")
    last = np.searchsorted(tokens.cuts, answer.content_end, side="right")
    cuts = tokens.cuts[first:last]
    if not len(cuts) or cuts[-1] != answer.content_end:
        raise _no_cut(tokens, answer.content_end, "the content of an answer ends")
    return cuts - answer.begin, tokens.cut_tokens[first:last]


def _with_end(content: _Match, end: int, behavior: _Tokens, other: AnswerSpan) -> _Match:
    """The same with one more span: the end token."""
    if other.content_end == other.end:
        raise ValueError(
            "the behavior model's template ends the answer without its eos_token, so the target's "
            "end token has no log-prob"
        )
    other_end = _end_boundary(behavior, other)
    return _Match(
        np.append(content.target, end),
        np.append(content.behavior, other_end),
        content.num_content,
    )


def _end_boundary(tokens: _Tokens, answer: AnswerSpan) -> int:
    """The first token behind the end token, which may have swallowed what follows it."""
    boundary = int(np.searchsorted(tokens.resumed, answer.end, side="left"))
    if tokens.reached[boundary] > answer.end:
        raise _no_cut(tokens, answer.end, "the end token of an answer ends")
    return boundary


def _numbered(
    target: EncodedChat, behavior: EncodedChat, matches: list[_Match], *, train_on: TrainOn
) -> Alignment:
    trains = np.asarray(chat_loss_mask(target, train_on=train_on), dtype=bool)
    span_ids = np.full(len(target.token_ids), -1, dtype=np.int64)
    behavior_spans: list[tuple[int, int]] = []
    for match in matches:
        numbers = len(behavior_spans) + np.arange(len(match.target) - 1)
        span_ids[match.target[0] : match.target[-1]] = np.repeat(numbers, np.diff(match.target))
        bounds = match.behavior.tolist()
        behavior_spans.extend(pairwise(bounds))
    lost = np.flatnonzero(trains & (span_ids < 0))
    if len(lost):
        begin, end = target.offsets[lost[0]]
        raise ValueError(
            f"the target's token for {target.text[begin:end]!r} trains, but cannot be told apart "
            "from tokens that do not"
        )
    span_ids[~trains] = -1
    return Alignment(behavior.token_ids, span_ids.tolist(), behavior_spans)


def _read(tokenizer: ChatTokenizer, chat: EncodedChat, bounds: NDArray[np.int64]) -> str:
    """What the ids between two boundaries say, less first spaces: some decoders drop one."""
    first, last = bounds.tolist()
    text = tokenizer.tokenizer.decode(
        chat.token_ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text.lstrip(" ")


def _no_cut(tokens: _Tokens, position: int, where: str) -> ValueError:
    before = tokens.chat.text[max(0, position - SHOWN_CHARACTERS) : position]
    after = tokens.chat.text[position : position + SHOWN_CHARACTERS]
    return ValueError(
        f"{where} between {before!r} and {after!r}, but the {tokens.model} model's tokens are not "
        "parted there"
    )


def _difference(target: str, behavior: str) -> str:
    """Where two texts first differ, and what each of them says there."""
    pairs = enumerate(zip(target, behavior, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(target), len(behavior)))
    shown = [text[at : at + SHOWN_CHARACTERS] for text in (target, behavior)]
    return f"at character {at} the target has {shown[0]!r}, the behavior model {shown[1]!r}"
