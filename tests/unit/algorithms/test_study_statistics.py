"""Holm, Spearman, power and bands: by hand, by enumeration, and by simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.algorithms.bands import bootstrap_band
from pear_ray.algorithms.many_comparisons import holm
from pear_ray.algorithms.pass_at_k import bootstrap_interval
from pear_ray.algorithms.power import (
    detectable_difference,
    fewest_pairs,
    least_p,
    pairs_needed,
)
from pear_ray.algorithms.ranks import average_ranks, spearman


def test_holm_by_hand() -> None:
    # smallest first: 4 x .01, 3 x .02 = .06, 2 x .03 = .06, 1 x .04 raised to the .06 before it
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"p=1.5 is no chance"):
        holm([1.5])


def by_closed_testing(p_values: list[float], which: int) -> float:
    """Bonferroni's p of every set of hypotheses with this one in it: the largest."""
    others = [place for place in range(len(p_values)) if place != which]
    sets = itertools.chain.from_iterable(
        itertools.combinations(others, size) for size in range(len(p_values))
    )
    return max(
        min(1.0, (1 + len(each)) * min(p_values[place] for place in (which, *each)))
        for each in sets
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p_values: list[float]) -> None:
    found = holm(p_values)
    wanted = [by_closed_testing(p_values, which) for which in range(len(p_values))]
    assert found == pytest.approx(wanted)


def test_ranks_and_ties_by_hand() -> None:
    assert average_ranks([10.0, 30.0, 20.0, 30.0]) == [1.0, 3.5, 2.0, 3.5]
    assert average_ranks([5.0, 5.0, 5.0]) == [2.0, 2.0, 2.0]
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]) == pytest.approx(1.0)
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 x 4 / (4 x 15)
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    # ranks 1 2.5 2.5 4 and 1 2 3 4 about 2.5: 4.5 / sqrt(4.5 x 5)
    assert spearman([0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        4.5 / math.sqrt(22.5)
    )
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None  # no order to agree with
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None  # two always agree or disagree
    with pytest.raises(ValueError, match="2 and 1 values; give pairs"):
        spearman([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        spearman([1.0, math.nan, 2.0], [1.0, 2.0, 3.0])


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=12))
def test_spearman_is_pearson_over_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found = spearman(first, second)
    if found is None:
        assert len(set(first)) == 1 or len(set(second)) == 1
        return
    ranks = [[sum(b < a for b in v) + (1 + sum(b == a for b in v)) / 2 for a in v]
             for v in (first, second)]  # fmt: skip
    assert found == pytest.approx(np.corrcoef(*ranks)[0, 1])
    grown = spearman([x**3 + 7 for x in first], second)  # a rank knows no scale
    assert grown == pytest.approx(found)


def test_the_least_p_of_so_many_seeds() -> None:
    assert [least_p(n) for n in (0, 1, 4, 6)] == [1.0, 1.0, 0.125, 0.03125]
    assert [fewest_pairs(alpha) for alpha in (0.05, 0.03125, 0.03, 0.01)] == [6, 6, 7, 8]
    for n in range(2, 12):
        assert fewest_pairs(least_p(n)) == n
    with pytest.raises(ValueError, match="num_pairs=-1"):
        least_p(-1)
    with pytest.raises(ValueError, match=r"alpha=1.0; use a share"):
        fewest_pairs(1.0)


def test_pairs_needed_against_known_numbers() -> None:
    # exact numbers of the paired t test at .05 and .8, by effect size
    known = {1.0: 10, 0.8: 15, 0.5: 34, 0.2: 199}
    found = {size: pairs_needed(sd=1.0, difference=size, alpha=0.05, power=0.8) for size in known}
    assert found == known
    # a sd of .06, the larger one of a first trial: about 12 for .05, 33 for .03 were read off it
    assert pairs_needed(sd=0.06, difference=0.05, alpha=0.05, power=0.8) == 14
    assert pairs_needed(sd=0.06, difference=-0.03, alpha=0.05, power=0.8) == 34
    assert pairs_needed(sd=0.0, difference=0.03, alpha=0.05, power=0.8) == 6  # of p, not of sd
    with pytest.raises(ValueError, match="difference=0"):
        pairs_needed(sd=1.0, difference=0.0, alpha=0.05, power=0.8)


def test_what_can_be_seen_is_the_inverse() -> None:
    size = detectable_difference(sd=0.06, num_pairs=34, alpha=0.05, power=0.8)
    assert size is not None
    assert 0.029 < size <= 0.03
    assert pairs_needed(sd=0.06, difference=size, alpha=0.05, power=0.8) == 34
    assert detectable_difference(sd=0.06, num_pairs=5, alpha=0.05, power=0.8) is None


def test_power_holds_in_simulated_studies() -> None:
    """Normal differences, tested by t: four of five are found with the pairs that it says."""
    number = pairs_needed(sd=1.0, difference=0.7, alpha=0.05, power=0.8)
    draws = np.random.default_rng(0).normal(0.7, 1.0, size=(20_000, number))
    t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(number)
    assert number == 18
    assert np.mean(np.abs(t) > 2.110) == pytest.approx(0.8, abs=0.02)  # t of 17 degrees at .975


def test_a_band_is_the_interval_at_every_step() -> None:
    curves = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 6.0]])
    low, high = bootstrap_band(curves, seed=0, confidence=0.8)
    assert (low[0].item(), high[0].item()) == (0.0, 0.0)
    # Means of three drawn from 1, 2, 6, of 27: 1 is one, 4/3 three; 6 is one, 14/3 three.
    assert (low[1].item(), high[1].item()) == pytest.approx((4 / 3, 14 / 3))
    one = bootstrap_interval(curves[:, 1], seed=0, confidence=0.8)
    assert (low[1].item(), high[1].item()) == pytest.approx(one)
    single, same = bootstrap_band(curves[:1], seed=0, confidence=0.8)
    assert torch.equal(single, same)  # one seed has no spread to show
    with pytest.raises(ValueError, match="0 curves"):
        bootstrap_band(curves[:0], seed=0, confidence=0.8)
