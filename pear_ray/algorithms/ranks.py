"""Ranks, and how far two orders agree."""

import math
from collections.abc import Sequence


def average_ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1 (the smallest); equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's over ranks, ties sharing theirs.

    Returns:
        In [-1, 1]; None where one of both never changes, or there are fewer than three pairs: two
        always agree or disagree whole.

    Raises:
        ValueError: The lengths differ, or a value is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values; give pairs")
    if not all(map(math.isfinite, (*first, *second))):
        raise ValueError("a value is not finite and has no rank; leave its pair out")
    if len(first) < 3:  # noqa: PLR2004 - see above
        return None
    mean = (len(first) + 1) / 2
    xs = [rank - mean for rank in average_ranks(first)]
    ys = [rank - mean for rank in average_ranks(second)]
    spread = math.sqrt(sum(x * x for x in xs) * sum(y * y for y in ys))
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / spread if spread else None
