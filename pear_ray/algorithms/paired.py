"""Paired comparison of two policies on the same problems, or of two arms with the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from pear_ray.algorithms.pass_at_k import bootstrap_interval

# Additions that an exact p may cost (a second): more problems, or unlike numbers of samples, have
# none.
MAX_ADDITIONS = 200_000_000
# Seeds whose sign patterns are counted one by one, in two halves of a million each; of more, sums
# are counted on a grid of this width.
_MOST_PATTERNS, _GRID = 40, 1e-5
# Sums that differ by less, relative to the largest one possible, count as equal; so do scores,
# relative to the larger. Counting more as equal only makes p larger.
_SUM_ROUNDING, _SCORE_ROUNDING = 1e-9, 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean over pairs (problems or seeds) of one policy's score minus another's.

    Attributes:
        value: The mean difference.
        low: Lower end of its bootstrap interval over pairs.
        high: Upper end.
        confidence: Level of the interval.
        p: Two-sided exact sign-flip p; None where it would cost too much.
        num_pairs: How many problems or seeds both have.
        num_better: On how many of them the difference is above 0.
        num_worse: On how many it is below.
    """

    value: float
    low: float
    high: float
    confidence: float
    p: float | None
    num_pairs: int
    num_better: int
    num_worse: int

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves 0 out, and p, where there is one, agrees.

        Over few pairs a bootstrap interval is too narrow; the exact p is not.
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
    value = float(sum(differences) / len(differences))
    return _difference(
        differences, value=value, p=sign_flip_p(differences), seed=seed, confidence=confidence
    )


def paired_over_seeds(
    before: Sequence[float], after: Sequence[float], *, seed: int, confidence: float
) -> PairedDifference:
    """`after` minus `before`, seed by seed.

    What varies here is the run, problems and samples with it; a difference on the same problems
    that was found with one seed each says nothing of the next seed.

    Args:
        before: One score per seed.
        after: The other arm's, in the same order of seeds.
        seed: Of the resampling.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: The lengths differ, there is no seed, or a score is not finite.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"{len(before)} and {len(after)} scores; pair at least one seed, each with both"
        )
    if not all(map(math.isfinite, (*before, *after))):
        raise ValueError("a score is not finite; leave its seed out of both")
    differences = [new - old for old, new in zip(before, after, strict=True)]
    scale = max(*map(abs, before), *map(abs, after))
    # What is rounding, such as .3 - .1 - .2, is no difference.
    differences = [each if abs(each) > _SCORE_ROUNDING * scale else 0.0 for each in differences]
    return _difference(
        differences,
        value=math.fsum(differences) / len(differences),
        p=sign_flip_p_of_floats(differences),
        seed=seed,
        confidence=confidence,
    )


def _difference(
    differences: Sequence[Fraction] | Sequence[float],
    *,
    value: float,
    p: float | None,
    seed: int,
    confidence: float,
) -> PairedDifference:
    floats = torch.tensor([float(each) for each in differences], dtype=torch.float64)
    low, high = bootstrap_interval(floats, seed=seed, confidence=confidence)
    return PairedDifference(
        value=value,
        low=low,
        high=high,
        confidence=confidence,
        p=p,
        num_pairs=len(differences),
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


def sign_flip_p_of_floats(differences: Sequence[float]) -> float | None:
    """`sign_flip_p` of numbers that are rounded: sums that are equal but for that count as equal.

    Exact up to 40 differences, over all patterns, met in the middle: each sum is one of the first
    half plus one of the second. Of more, the differences are rounded to 1e-5 first.

    Raises:
        ValueError: One is not finite.
    """
    if not all(map(math.isfinite, differences)):
        raise ValueError("a difference is not finite; leave its pair out")
    found = [each for each in differences if each]
    if len(found) > _MOST_PATTERNS:
        return sign_flip_p([Fraction(round(each / _GRID)) for each in found])
    distance = abs(math.fsum(found)) - _SUM_ROUNDING * math.fsum(map(abs, found))
    if distance <= 0:
        return 1.0
    half = len(found) // 2
    first, second = _signed_sums(found[:half]), np.sort(_signed_sums(found[half:]))
    above = len(second) - np.searchsorted(second, distance - first, side="left")
    # The distribution is symmetric: as many sums are at most -distance.
    return min(1.0, 2.0 * float(above.sum()) / 2.0 ** len(found))


def _signed_sums(values: Sequence[float]) -> NDArray[np.float64]:
    """The sums of all 2^n patterns of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
