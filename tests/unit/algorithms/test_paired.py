"""Paired differences: exact p against all sign patterns, and what may be claimed."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.algorithms.paired import (
    PairedDifference,
    paired_difference,
    paired_over_seeds,
    sign_flip_p,
    sign_flip_p_of_floats,
)


def by_enumeration(differences: list[Fraction]) -> float:
    found = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = (sum(s * d for s, d in zip(p, differences, strict=True)) for p in patterns)
    return sum(abs(each) >= found for each in sums) / len(patterns)


@given(
    st.lists(
        st.builds(Fraction, st.integers(-8, 8), st.sampled_from([1, 3, 4, 7, 8])),
        min_size=1,
        max_size=9,
    )
)
def test_p_is_the_share_of_sign_patterns(differences: list[Fraction]) -> None:
    assert sign_flip_p(differences) == pytest.approx(by_enumeration(differences), abs=1e-12)


def test_p_by_hand() -> None:
    assert sign_flip_p([Fraction(1, 8)] * 5) == 2 / 32  # all up or all down, of 32 patterns
    # |1 + 1 - 1/2| is reached by all patterns but those where 1 and 1 cancel: 4 of 8.
    assert sign_flip_p([Fraction(1), Fraction(1), Fraction(-1, 2)]) == 4 / 4 * 0.5
    assert sign_flip_p([Fraction(1, 2), Fraction(-1, 2)]) == 1.0
    assert sign_flip_p([Fraction(0)] * 4) == 1.0
    assert sign_flip_p([Fraction(0), Fraction(3)]) == 1.0  # one pair proves nothing
    assert sign_flip_p([Fraction(1)] * 2000) == 0.0  # below what a float can hold


def test_p_that_would_cost_too_much_is_none() -> None:
    unlike = [Fraction(1, 63), Fraction(1, 64), Fraction(1, 61)]
    assert sign_flip_p(unlike, max_additions=1000) is None
    assert sign_flip_p(unlike) == by_enumeration(unlike)


def test_a_difference_and_its_interval() -> None:
    before = [Fraction(n, 8) for n in (0, 1, 2, 3, 4, 5)]
    after = [Fraction(n, 8) for n in (1, 2, 3, 3, 5, 4)]
    found = paired_difference(before, after, seed=0, confidence=0.95)
    assert found.value == pytest.approx(3 / 8 / 6)
    assert (found.num_pairs, found.num_better, found.num_worse) == (6, 4, 1)
    assert found.low < found.value < found.high
    assert found.p == by_enumeration([b - a for a, b in zip(before, after, strict=True)])
    back = paired_difference(after, before, seed=0, confidence=0.95)
    assert (back.value, back.low, back.high, back.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )
    with pytest.raises(ValueError, match="6 and 5 scores; pair at least one problem"):
        paired_difference(before, after[:5], seed=0, confidence=0.95)


@pytest.mark.parametrize(
    ("low", "high", "p", "apart"),
    [
        (0.01, 0.2, 0.03, True),
        (-0.2, -0.01, 0.03, True),
        (-0.01, 0.2, 0.04, False),  # the interval holds 0
        (0.0, 0.2, 0.04, False),  # it touches 0
        (0.01, 0.2, 0.25, False),  # too few problems for the exact test
        (0.01, 0.2, None, True),
    ],
)
def test_told_apart_takes_the_interval_and_p(
    *, low: float, high: float, p: float | None, apart: bool
) -> None:
    found = PairedDifference(
        value=(low + high) / 2,
        low=low,
        high=high,
        confidence=0.95,
        p=p,
        num_pairs=9,
        num_better=5,
        num_worse=1,
    )
    assert found.is_told_apart is apart


def test_three_problems_never_suffice() -> None:
    """Their bootstrap interval may leave 0 out; no sign-flip p of three is below 1/4."""
    found = paired_difference(
        [Fraction(0)] * 3, [Fraction(1), Fraction(1), Fraction(1, 2)], seed=0, confidence=0.95
    )
    assert found.low > 0
    assert found.p == 0.25
    assert not found.is_told_apart


SCORES = st.lists(st.integers(-6, 6).map(lambda n: n / 10), min_size=1, max_size=8)


@given(SCORES)
def test_p_of_rounded_scores_is_that_of_the_exact_ones(differences: list[float]) -> None:
    """Tenths are no floats: .3 - .1 - .2 is not 0, yet the patterns tie."""
    exact = [Fraction(round(10 * each), 10) for each in differences]
    assert sign_flip_p_of_floats(differences) == pytest.approx(by_enumeration(exact), abs=1e-12)


def test_p_over_seeds_by_hand() -> None:
    assert sign_flip_p_of_floats([0.1, 0.2, 0.05, 0.3]) == 2 / 16
    assert sign_flip_p_of_floats([0.1, 0.2, -0.3]) == 1.0  # the sum is 0 but for rounding
    assert sign_flip_p_of_floats([0.0, 0.0]) == 1.0
    assert sign_flip_p_of_floats([]) == 1.0
    assert sign_flip_p_of_floats([0.01] * 40) == pytest.approx(2 / 2**40)
    # 41 of .01 with one down: the two patterns at 41 and their 41 neighbours, both ways
    assert sign_flip_p_of_floats([0.01] * 40 + [-0.01]) == pytest.approx(2 * 42 / 2**41)
    with pytest.raises(ValueError, match="a difference is not finite"):
        sign_flip_p_of_floats([float("nan")])


def test_both_ways_of_counting_agree() -> None:
    differences = [0.011 * (-1) ** n + 0.0007 * n for n in range(38)]
    exact = [Fraction(round(1e4 * each), 10_000) for each in differences]
    assert sign_flip_p_of_floats(differences) == pytest.approx(sign_flip_p(exact), rel=1e-9)


def test_a_difference_over_seeds() -> None:
    before, after = [0.70, 0.72, 0.68, 0.71], [0.75, 0.76, 0.70, 0.71]
    found = paired_over_seeds(before, after, seed=0, confidence=0.95)
    assert found.value == pytest.approx(0.11 / 4)
    assert (found.num_pairs, found.num_better, found.num_worse) == (4, 3, 0)
    assert found.p == 2 / 8  # the tie says nothing; three signs alike
    assert found.low < found.value < found.high
    alike = paired_over_seeds([0.3, 0.6], [0.1 + 0.2, 0.6], seed=0, confidence=0.95)
    assert (alike.num_better, alike.num_worse, alike.p) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="4 and 3 scores; pair at least one seed"):
        paired_over_seeds(before, after[:3], seed=0, confidence=0.95)
    with pytest.raises(ValueError, match="leave its seed out"):
        paired_over_seeds([0.1], [float("inf")], seed=0, confidence=0.95)
