"""Controls: a step's own weights with what they know taken away, so that a gain can be explained.

An arm whose weights help must beat the same weights in the wrong place (`shuffled_over_tokens`,
`shuffled_over_sequences`) and the same weights as a function of position alone
(`position_profile`). All take the loss tokens of a whole step, of every microbatch and rank, as one
`StepWeights`. Its sequences may come in any order: they have keys, and in the order of the keys
tokens are counted, so that neither packing nor ranks can change what a token gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import select_loss_tokens
from pear_ray.algorithms.pear import PearWeights


@dataclass(frozen=True)
class StepWeights:
    """The weights of a step's loss tokens, or of a part of them: whole sequences, end to end.

    Attributes:
        weights: `G_t`, what multiplies a token's loss.
        log_weights: `g_t` before the log-weight clip.
        keys: For each sequence a number that no other of the step has, such as its row's.
        counts: Loss tokens of each sequence.
    """

    weights: Float[Tensor, " loss_token"]
    log_weights: Float[Tensor, " loss_token"]
    keys: Int[Tensor, " sequence"]
    counts: Int[Tensor, " sequence"]


def select_step_weights(
    pear: PearWeights,
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    row_keys: Int[Tensor, " row"],
) -> StepWeights:
    """A microbatch's part of its step's weights.

    Args:
        pear: The weights of the microbatch.
        sequence_ids: The row of each position in the microbatch, non-decreasing.
        loss_mask: True where a token trains; a row without one is in no part.
        row_keys: The key of each row of the microbatch.

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    at = loss_tokens.positions
    rows = sequence_ids[at[loss_tokens.starts]]
    return StepWeights(pear.weights[at], pear.log_weights[at], row_keys[rows], loss_tokens.counts)


def join_step_weights(parts: Sequence[StepWeights]) -> StepWeights:
    """All parts as one, in their order."""
    return StepWeights(
        torch.cat([part.weights for part in parts]),
        torch.cat([part.log_weights for part in parts]),
        torch.cat([part.keys for part in parts]),
        torch.cat([part.counts for part in parts]),
    )


def shuffled_over_tokens(found: StepWeights, *, seed: int, step: int) -> StepWeights:
    """Every loss token gets the weight of another loss token of the step, of any sequence.

    For weights that differ within a sequence (token, block and span level). One cycle through all
    tokens, drawn by seed and step: none keeps its own weight where there are two, and the multiset
    of the step's weights, hence its mean and effective sample size, is exactly the arm's.

    Raises:
        ValueError: Two sequences have one key.
    """
    places = _places(found)
    at = _inverse(places)
    givers = at[_cycle(places.numel(), seed=seed, step=step).to(at.device)[places]]
    return replace(found, weights=found.weights[givers], log_weights=found.log_weights[givers])


def shuffled_over_sequences(found: StepWeights, *, seed: int, step: int) -> StepWeights:
    """Every sequence gets the weight of another sequence of the step.

    For weights that a sequence shares (sequence level); what is given is its first loss token's.
    One cycle through all sequences, drawn by seed and step: none keeps its own weight where there
    are two, and the multiset of the sequences' weights is exactly the arm's. That of the tokens'
    is not, where sequences differ in length: a weight goes to as many tokens as its new sequence
    has.

    Raises:
        ValueError: Two sequences have one key.
    """
    order = _checked_order(found.keys)
    places = _inverse(order)
    givers = order[_cycle(order.numel(), seed=seed, step=step).to(order.device)[places]]
    given = (found.counts.cumsum(0) - found.counts)[givers]  # a first loss token each
    of_token = given.repeat_interleave(found.counts)
    return replace(found, weights=found.weights[of_token], log_weights=found.log_weights[of_token])


def position_profile(found: StepWeights) -> StepWeights:
    """Every loss token gets the step's mean weight at its distance from its sequence's end.

    From the end, for PEAR's discount and sums run to the end: the last token's weight is 1 in every
    sequence, and with the same log-ratio everywhere a weight is a function of that distance alone,
    so that weights which know position only are left exactly as they are. Counted from the
    beginning, the mean would mix sequences of different lengths and take part of that away. The sum
    of the weights at each distance, hence their mean over the step, stays the arm's.

    Sums run in float64 in the order of the keys.

    Raises:
        ValueError: Two sequences have one key.
    """
    at = _inverse(_places(found))
    ends = found.counts.cumsum(0).repeat_interleave(found.counts)
    tokens_left = ends - 1 - torch.arange(ends.numel(), device=ends.device)
    longest = int(found.counts.max()) if found.counts.numel() else 0
    sums = found.weights.new_zeros(longest, dtype=torch.float64)
    sums.index_add_(0, tokens_left[at], found.weights[at].double())
    means = sums / torch.bincount(tokens_left, minlength=longest)
    return replace(
        found,
        weights=means[tokens_left].to(found.weights.dtype),
        log_weights=means.log()[tokens_left].to(found.log_weights.dtype),
    )


def _places(found: StepWeights) -> Int[Tensor, " loss_token"]:
    """The number of each loss token when sequences stand in the order of their keys."""
    order, counts = _checked_order(found.keys), found.counts
    in_order = counts[order]
    firsts = torch.empty_like(counts)
    firsts[order] = in_order.cumsum(0) - in_order
    shifts = firsts - (counts.cumsum(0) - counts)  # from where a sequence begins here to there
    tokens = torch.arange(int(counts.sum()), device=counts.device)
    return tokens + shifts.repeat_interleave(counts)


def _checked_order(keys: Int[Tensor, " sequence"]) -> Int[Tensor, " sequence"]:
    """Which sequence is first, second, ... by key."""
    in_order, order = keys.sort()
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if twice.numel():
        raise ValueError(
            f"key {int(twice[0])} belongs to two sequences of the step, which leaves their order "
            "open; give every sequence of a step a key of its own"
        )
    return order


def _cycle(size: int, *, seed: int, step: int) -> Int[Tensor, " item"]:
    """For each of `size` things, which one it is given: one cycle through all of them.

    A permutation drawn freely would leave one of them, on average, where it was.
    """
    order = torch.from_numpy(np.random.default_rng((seed, step)).permutation(size))
    givers = torch.empty_like(order)
    givers[order] = order.roll(1)
    return givers


def _inverse(permutation: Int[Tensor, " item"]) -> Int[Tensor, " item"]:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse
