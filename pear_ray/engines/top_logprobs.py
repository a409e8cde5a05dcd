"""The likeliest ids of each token that trains: what a distillation compares a policy with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class MaskedIds:
    """A sequence to score, and which of its tokens train.

    The first token never does: nothing precedes it.
    """

    token_ids: list[int]
    loss_mask: list[bool]

    def __len__(self) -> int:
        """How many tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """One sequence's log-probs, and the candidates of each of its loss tokens.

    Attributes:
        logprobs: Of the sequence's own ids, float32 [seq]; the first is 0.
        top_ids: Candidate ids, likeliest first, int32 [num_loss_tokens, k]. The sequence's own id
            is always among them: in the last place, where it is not one of the k likeliest.
        top_logprobs: Their natural-log probabilities, float32 [num_loss_tokens, k].
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def select_top(ids: np.ndarray, logprobs: np.ndarray, loss_mask: Sequence[bool]) -> TopLogprobs:
    """What to keep of a scored sequence's candidates.

    Args:
        ids: At each token but the first its own id, then the k likeliest in falling order, int32
            [seq - 1, 1 + k].
        logprobs: Their log-probs, float32 of the same shape.
        loss_mask: Whether each token trains, [seq].
    """
    own_logprobs = np.zeros(len(ids) + 1, dtype=np.float32)
    own_logprobs[1:] = logprobs[:, 0]
    trains = np.asarray(loss_mask, dtype=bool)[1:]
    own, top_ids = ids[trains, :1], ids[trains, 1:]  # copies: [num_loss_tokens, 1], [.., k]
    top_logprobs = logprobs[trains, 1:]
    # By id, not by log-prob: an id tied with the k-th need not be among the k that were chosen.
    missing = ~(top_ids == own).any(axis=1)
    top_ids[missing, -1] = own[missing, 0]
    top_logprobs[missing, -1] = logprobs[trains, 0][missing]
    return TopLogprobs(own_logprobs, top_ids, top_logprobs)


def within_tokens(rows: Sequence[MaskedIds], most: int) -> Iterator[Sequence[MaskedIds]]:
    """`rows` in order, cut into runs of at most `most` tokens; a longer row is a run of its own."""
    begin, tokens = 0, 0
    for place, row in enumerate(rows):
        if place > begin and tokens + len(row) > most:
            yield rows[begin:place]
            begin, tokens = place, 0
        tokens += len(row)
    if begin < len(rows):
        yield rows[begin:]
