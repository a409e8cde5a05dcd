"""Paired comparison of two policies on the same problems."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from pear_ray.algorithms.pass_at_k import bootstrap_interval

# Additions that an exact p may cost (a second): more problems, or unlike numbers of samples, have
# none.
MAX_ADDITIONS = 200_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean over problems of one policy's score minus another's.

    Attributes:
        value: The mean difference.
        low: Lower end of its bootstrap interval over problems.
        high: Upper end.
        confidence: Level of the interval.
        p: Two-sided exact sign-flip p; None where it would cost too much.
        num_problems: How many problems were paired.
        num_better: On how many of them the difference is above 0.
        num_worse: On how many it is below.
    """

    value: float
    low: float
    high: float
    confidence: float
    p: float | None
    num_problems: int
    num_better: int
    num_worse: int

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves 0 out, and p, where there is one, agrees.

        Over few problems a bootstrap interval is too narrow; the exact p is not.
        """
        agrees = self.p is None or self.p <= 1.0 - self.confidence
        return not self.low <= 0.0 <= self.high and agrees


def paired_difference(
    before: Sequence[Fraction],
    after: Sequence[Fraction],
    *,
    seed: int,
    confidence: float,
) -> PairedDifference:
    """`after` minus `before`, problem by problem.

    Args:
        before: One score per problem, exact.
        after: The other policy's, in the same order of problems.
        seed: Of the resampling.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: The lengths differ, or there is no problem.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"{len(before)} and {len(after)} scores; pair at least one problem, each with both"
        )
    differences = [new - old for old, new in zip(before, after, strict=True)]
    floats = torch.tensor([float(each) for each in differences], dtype=torch.float64)
    low, high = bootstrap_interval(floats, seed=seed, confidence=confidence)
    return PairedDifference(
        value=float(sum(differences) / len(differences)),
        low=low,
        high=high,
        confidence=confidence,
        p=sign_flip_p(differences),
        num_problems=len(differences),
        num_better=sum(each > 0 for each in differences),
        num_worse=sum(each < 0 for each in differences),
    )


def sign_flip_p(
    differences: Sequence[Fraction], *, max_additions: int = MAX_ADDITIONS
) -> float | None:
    """Share of all sign patterns whose sum is at least as far from 0 as the one that was found.

    Fisher's randomisation test: without an effect each difference could as well have had the other
    sign. Exact, by counting over the sums that are possible rather than over the patterns.

    Args:
        differences: One per pair, exact, so that equal sums are equal.
        max_additions: What it may cost; None is returned where it would cost more.
    """
    found = [each for each in differences if each]
    scale = math.lcm(*(each.denominator for each in found))
    steps = [abs(int(each * scale)) for each in found]
    common = math.gcd(*steps) or 1
    steps = [each // common for each in steps]
    largest = sum(steps)
    if len(steps) * (2 * largest + 1) > max_additions:
        return None
    chances = np.zeros(2 * largest + 1)  # of each sum, from -largest to largest
    chances[largest] = 1.0
    for step in steps:
        up, down = np.zeros_like(chances), np.zeros_like(chances)
        up[step:], down[:-step] = chances[:-step], chances[step:]
        chances = (up + down) / 2.0
    distance = abs(int(sum(found, Fraction(0)) * scale)) // common
    sums = np.arange(-largest, largest + 1)
    return min(1.0, float(chances[np.abs(sums) >= distance].sum()))
