"""Packing plans and pass@k, by hand and by invariance."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.packing import (
    cheapest_cuts,
    group_microbatches,
    length_sorted_microbatches,
    packed_microbatches,
    split_for_ranks,
)
from pear_ray.algorithms.pass_at_k import bootstrap_interval, maj_at_n, mean_at_n, pass_at_k

QUICK = settings(deadline=None, max_examples=50)
LENGTHS = st.lists(st.integers(0, 50), max_size=40)


def test_groups_stay_together_and_count_their_prompt_once():
    # Prompts of 3 and 2. The second group has the longest row; its rows cost 9, 2, 1 tokens.
    lengths, prompts = [5, 4, 6, 4, 9, 3], [3, 3, 3, 2, 2, 2]
    plan = functools.partial(group_microbatches, lengths, prompts, group_size=3)
    assert plan(max_tokens=100, enough=12) == [[4, 3, 5], [2, 0, 1]]
    assert plan(max_tokens=100, enough=11) == [[4, 3], [5, 2, 0], [1]]
    assert plan(max_tokens=13, enough=100) == [[4, 3], [5, 2], [0, 1]]  # for each row: 13, 9, 9
    assert plan(max_tokens=100, enough=100) == [[4, 3, 5, 2, 0, 1]]
    with pytest.raises(ValueError, match="row 4 has 9 tokens"):
        plan(max_tokens=8, enough=8)


def test_microbatches_by_hand():
    # 9 alone (2 x 9 > 12); 5 and 4 cost 2 x 5 = 10; the rest cost 4 x 3 = 12.
    lengths = [3, 9, 1, 5, 3, 4, 2]
    few = functools.partial(length_sorted_microbatches, max_tokens=12, overhead_tokens=1000)
    assert few(lengths) == [[1], [3, 5], [0, 4, 6, 2]]
    assert few([]) == []
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        length_sorted_microbatches(lengths, max_tokens=8, overhead_tokens=1000)
    # Nothing lost to padding where a microbatch costs nothing; at 2 tokens each, 3 3 2 1 as 3 3 and
    # 2 1 costs 6 + 4 + 4, all together 12 + 2, and the fewer are taken of what costs the same.
    free = length_sorted_microbatches(lengths, max_tokens=12, overhead_tokens=0)
    assert free == [[1], [3], [5], [0, 4], [6], [2]]
    cheap = length_sorted_microbatches([3, 3, 2, 1], max_tokens=12, overhead_tokens=2)
    assert cheap == [[0, 1, 2, 3]]


@QUICK
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 6))
def test_no_way_to_cut_the_rows_is_cheaper(lengths, overhead):
    def cost(groups):
        padded = [len(group) * max(group) for group in groups]
        return math.inf if max(padded) > 20 else sum(padded) + overhead * len(groups)

    plan = length_sorted_microbatches(lengths, max_tokens=20, overhead_tokens=overhead)
    found = cost([[lengths[row] for row in rows] for rows in plan])
    rows = sorted(lengths, reverse=True)
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(rows)), count) for count in range(len(rows))
    )
    best = min(
        cost([rows[a:b] for a, b in itertools.pairwise([0, *cut, len(rows)])]) for cut in cuts
    )
    assert found == best


@QUICK
@given(LENGTHS, st.integers(50, 200))
def test_microbatches_hold_every_row_once_within_budget(lengths, max_tokens):
    plan = length_sorted_microbatches(lengths, max_tokens=max_tokens, overhead_tokens=7)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    for rows in plan:
        assert len(rows) * max(lengths[row] for row in rows) <= max_tokens


def test_packed_microbatches_by_hand():
    # 9 and nothing beside it that fits in its turn; then 5 and 4; 3, 3, 2 and 1 fill the last.
    lengths = [3, 9, 1, 5, 3, 4, 2]
    assert packed_microbatches(lengths, max_tokens=10) == [[1], [3, 5], [0, 4, 6, 2]]
    assert packed_microbatches([], max_tokens=10) == []
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        packed_microbatches(lengths, max_tokens=8)


@QUICK
@given(LENGTHS, st.integers(50, 200))
def test_packed_microbatches_hold_every_row_once_and_are_full(lengths, max_tokens):
    plan = packed_microbatches(lengths, max_tokens=max_tokens)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in rows) for rows in plan]
    assert max(sums, default=0) <= max_tokens
    for total, following in zip(sums, plan[1:], strict=False):
        assert total + lengths[following[0]] > max_tokens


def test_cuts_keep_the_order_of_the_rows():
    # 1 9 9 1: the nines go together; with dear cuts all four, padded to 9.
    cuts = functools.partial(cheapest_cuts, [1, 9, 9, 1], max_tokens=36)
    assert cuts(overhead_tokens=1) == [(0, 1), (1, 3), (3, 4)]
    assert cuts(overhead_tokens=9) == [(0, 4)]


def test_ranks_by_hand():
    # Rounds: (8, 7), (5, 2), (1): 8 | 7, then 5 to the lighter rank: 10 | 12, then 11 | 12.
    assert split_for_ranks([1, 8, 5, 2, 7], num_ranks=2) == [[0, 1, 3], [2, 4]]
    with pytest.raises(ValueError, match="num_ranks=0"):
        split_for_ranks([1], num_ranks=0)


@QUICK
@given(LENGTHS, st.integers(1, 6))
def test_ranks_get_every_row_once_and_fair_shares(lengths, num_ranks):
    shares = split_for_ranks(lengths, num_ranks=num_ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(lengths)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # one of the six pairs has two wrong
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(64, 16, 1) == mean_at_n(64, 16) == 0.25
    assert pass_at_k(10**5, 1, 10) == pytest.approx(1e-4, rel=1e-12)  # no cancellation
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 2, 5)
    with pytest.raises(ValueError, match="num_correct=5"):
        pass_at_k(4, 5, 1)


@QUICK
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_counts_the_subsets(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(itertools.combinations(correct, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(expected)


def test_maj_at_n_by_hand():
    assert maj_at_n(["7", "7", "3"], [True, True, False]) == 1.0
    assert maj_at_n(["7", "3", "3"], [True, False, False]) == 0.0
    assert maj_at_n(["7", "3"], [True, False]) == 0.5  # a tie is drawn
    assert maj_at_n([None, None, "7"], [False, False, True]) == 1.0  # None has no vote
    assert maj_at_n([None], [False]) == 0.0
    with pytest.raises(ValueError, match="1 answers and 2 verdicts"):
        maj_at_n(["7"], [True, False])


def test_bootstrap_interval():
    flat = torch.full((20,), 0.25)
    assert bootstrap_interval(flat, seed=0) == pytest.approx((0.25, 0.25))
    values = (torch.arange(400) % 2).float()  # mean .5, standard error .025
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
    narrow = bootstrap_interval(values, seed=1, confidence=0.5)
    assert low < narrow[0] < 0.5 < narrow[1] < high
    # 30,000 problems are drawn in several blocks: still num_resamples of them.
    many = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(many, seed=0, num_resamples=200)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(30_000), rel=0.25)
    with pytest.raises(ValueError, match="no problem"):
        bootstrap_interval(many[:0], seed=0)
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_interval(many, seed=0, confidence=95.0)
