"""Which rows go together: microbatches of like length, and a fair share for each rank."""

import math
from collections.abc import Sequence


def packed_microbatches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Row indices per microbatch, longest rows first, each full up to `max_tokens`.

    Every row appears exactly once and the result depends on the arguments alone. Rows of like
    length stay together, for attention kernels that pad.

    Raises:
        ValueError: A row alone is longer than `max_tokens`, or a length is negative.
    """
    _check_lengths(lengths, max_tokens=max_tokens)
    microbatches: list[list[int]] = []
    room = -1
    for row in _longest_first(lengths):
        if lengths[row] > room:
            microbatches.append([])
            room = max_tokens
        microbatches[-1].append(row)
        room -= lengths[row]
    return microbatches


def group_microbatches(
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    *,
    group_size: int,
    max_tokens: int,
    enough: int,
) -> list[list[int]]:
    """Row indices per microbatch, the groups' rows one after the other, prompts counted once.

    The group with the longest row comes first, and in a group the longest row. Every row appears
    exactly once and the result depends on the arguments alone.

    Args:
        lengths: Tokens per row, groups one after the other.
        prompt_lengths: Those of its prompt, the same within a group.
        group_size: Rows per group.
        max_tokens: Most tokens of a microbatch, a prompt counted for each row.
        enough: Most tokens of a microbatch, a prompt counted once.

    Raises:
        ValueError: A row alone is longer than `max_tokens`, or a length is negative.
    """
    _check_lengths(lengths, max_tokens=max_tokens)
    groups = [
        sorted(range(begin, begin + group_size), key=lambda row: (-lengths[row], row))
        for begin in range(0, len(lengths), group_size)
    ]
    microbatches: list[list[int]] = []
    whole, once = max_tokens, enough  # as if full: the first row opens one
    for group in sorted(groups, key=lambda rows: (-lengths[rows[0]], rows[0])):
        for number, row in enumerate(group):
            own = lengths[row] - (prompt_lengths[row] if number else 0)
            if whole + lengths[row] > max_tokens or once + own > enough:
                microbatches.append([])
                whole, once, own = 0, 0, lengths[row]
            microbatches[-1].append(row)
            whole, once = whole + lengths[row], once + own
    return microbatches


def length_sorted_microbatches(
    lengths: Sequence[int], *, max_tokens: int, overhead_tokens: int
) -> list[list[int]]:
    """Row indices per microbatch, longest rows first, each of at most `max_tokens`, padded.

    Of all ways to cut the sorted rows, the one that computes least: padded tokens (rows times
    longest row), and `overhead_tokens` for each microbatch. Every row appears exactly once and the
    result depends on the arguments alone. The longest row comes first, so memory peaks at the
    start.

    Args:
        lengths: Tokens per row.
        max_tokens: Most padded tokens of a microbatch.
        overhead_tokens: What a microbatch costs besides, as tokens; a large number gives as few
            microbatches as there can be.

    Raises:
        ValueError: A row alone is longer than `max_tokens`, or a length is negative.
    """
    _check_lengths(lengths, max_tokens=max_tokens)
    order = _longest_first(lengths)
    cuts = cheapest_cuts(
        [lengths[row] for row in order], max_tokens=max_tokens, overhead_tokens=overhead_tokens
    )
    return [order[begin:end] for begin, end in cuts]


def cheapest_cuts(
    lengths: Sequence[int], *, max_tokens: int, overhead_tokens: int
) -> list[tuple[int, int]]:
    """Begin and end of runs of rows, in their order, that are padded to their longest row.

    Of all ways to cut them the one that computes least: padded tokens (rows times longest row), and
    `overhead_tokens` for each run; a run is of one row, or of at most `max_tokens`, padded.
    """
    cheapest, begins = [0], [0]  # of the first n rows: the cost, and where their last cut is
    for end in range(1, len(lengths) + 1):
        cost, begin, longest = math.inf, end - 1, 0
        for first in range(end - 1, -1, -1):
            longest = max(longest, lengths[first])
            padded = (end - first) * longest
            if padded > max_tokens and first < end - 1:
                break
            if cheapest[first] + padded + overhead_tokens <= cost:
                cost, begin = cheapest[first] + padded + overhead_tokens, first
        cheapest.append(int(cost))
        begins.append(begin)
    cuts: list[tuple[int, int]] = []
    end = len(lengths)
    while end:
        cuts.insert(0, (begins[end], end))
        end = begins[end]
    return cuts


def split_for_ranks(lengths: Sequence[int], *, num_ranks: int) -> list[list[int]]:
    """Row indices per rank: equal numbers of rows (one more at most) and nearly equal tokens.

    Rows are dealt in rounds, longest first, the longest of a round to the rank with the fewest
    tokens so far. Every row appears exactly once; the result depends on the arguments alone.

    Raises:
        ValueError: `num_ranks` is below 1.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} leaves nobody to train; use 1 or more")
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    order = _longest_first(lengths)
    for start in range(0, len(order), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        for rank, row in zip(ranks, order[start : start + num_ranks], strict=False):
            shares[rank].append(row)
            loads[rank] += lengths[row]
    return [sorted(share) for share in shares]


def _check_lengths(lengths: Sequence[int], *, max_tokens: int) -> None:
    for row, length in enumerate(lengths):
        if not 0 <= length <= max_tokens:
            raise ValueError(
                f"row {row} has {length} tokens, not 0 to max_tokens={max_tokens}; raise "
                "max_tokens, or leave the row out before training"
            )


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Row indices by falling length; equal lengths keep their order."""
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
