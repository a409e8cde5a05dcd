"""Controls by hand, what they keep, and that they do not see how a step is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.pear import PearWeights, pear_sequence_weights, pear_token_weights
from pear_ray.algorithms.weight_controls import (
    StepWeights,
    join_step_weights,
    position_profile,
    select_step_weights,
    shuffled_over_sequences,
    shuffled_over_tokens,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**31)


def step_weights(*sequences: list[float], keys: list[int] | None = None) -> StepWeights:
    weights = torch.tensor([weight for each in sequences for weight in each])
    return StepWeights(
        weights,
        weights.log(),
        torch.tensor(keys or list(range(len(sequences))), dtype=torch.long),
        torch.tensor([len(each) for each in sequences], dtype=torch.long),
    )


def random_step(lengths: list[int], seed: int) -> StepWeights:
    """All weights different; keys neither sorted nor next to each other."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randperm(sum(lengths), generator=generator) + 1) / 7
    keys = torch.randperm(3 * len(lengths), generator=generator)[: len(lengths)]
    return StepWeights(weights, weights.log(), keys, torch.tensor(lengths))


def by_key(found: StepWeights) -> dict[int, list[float]]:
    parts = found.weights.split(found.counts.tolist())
    return {int(key): part.tolist() for key, part in zip(found.keys, parts, strict=True)}


def reordered(found: StepWeights, order: list[int]) -> StepWeights:
    """The same sequences in another order, or some of them: other microbatches, other ranks."""
    ends = found.counts.cumsum(0).tolist()
    spans = [range(end - int(n), end) for end, n in zip(ends, found.counts, strict=True)]
    tokens = [token for index in order for token in spans[index]]
    return StepWeights(
        found.weights[tokens], found.log_weights[tokens], found.keys[order], found.counts[order]
    )


def test_a_profile_by_hand():
    """Counted from the end: 1 and 4; 3 and 6; 8 alone."""
    found = position_profile(step_weights([8.0, 3.0, 1.0], [6.0, 4.0]))
    assert found.weights.tolist() == [8.0, 4.5, 2.5, 4.5, 2.5]
    assert found.log_weights.tolist() == pytest.approx([math.log(w) for w in found.weights])


def test_a_sequence_weight_goes_to_all_tokens_of_another_sequence():
    """With two sequences there is one way to give each the other's."""
    found = shuffled_over_sequences(step_weights([2.0, 2.0, 2.0], [5.0]), seed=0, step=0)
    assert found.weights.tolist() == [5.0, 5.0, 5.0, 2.0]
    assert found.log_weights.tolist() == pytest.approx([math.log(w) for w in found.weights])


def test_two_tokens_swap_their_weights():
    found = shuffled_over_tokens(step_weights([2.0], [5.0]), seed=0, step=0)
    assert found.weights.tolist() == [5.0, 2.0]
    assert found.log_weights.tolist() == pytest.approx([math.log(5), math.log(2)])


@pytest.mark.parametrize("shuffled", [shuffled_over_tokens, shuffled_over_sequences])
def test_one_alone_keeps_its_weight_and_none_is_none(shuffled):
    assert shuffled(step_weights([2.0]), seed=0, step=0).weights.tolist() == [2.0]
    nothing = step_weights(keys=[])
    assert shuffled(nothing, seed=0, step=0).weights.tolist() == []
    assert position_profile(nothing).weights.tolist() == []


@pytest.mark.parametrize("shuffled", [shuffled_over_tokens, shuffled_over_sequences])
def test_seed_and_step_decide_the_order(shuffled):
    found = step_weights(*([float(number)] for number in range(1, 40)))
    first = shuffled(found, seed=1, step=2).weights
    assert torch.equal(first, shuffled(found, seed=1, step=2).weights)
    assert not torch.equal(first, shuffled(found, seed=1, step=3).weights)
    assert not torch.equal(first, shuffled(found, seed=2, step=2).weights)


@given(LENGTHS, SEEDS)
def test_every_token_gets_another_tokens_weight_and_each_is_given_once(lengths, seed):
    found = random_step(lengths, seed)
    shuffled = shuffled_over_tokens(found, seed=seed, step=3)
    assert sorted(shuffled.weights.tolist()) == sorted(found.weights.tolist())
    assert torch.equal(shuffled.weights.log(), shuffled.log_weights)  # both go together
    if sum(lengths) > 1:
        assert not bool((shuffled.weights == found.weights).any())


@given(LENGTHS, SEEDS)
def test_every_sequence_gets_another_ones_weight_and_each_is_given_once(lengths, seed):
    weights = [[float(number)] * length for number, length in enumerate(lengths, start=1)]
    found = step_weights(*weights)
    shuffled = by_key(shuffled_over_sequences(found, seed=seed, step=3))
    given_to = [values[0] for values in shuffled.values()]
    assert sorted(given_to) == [values[0] for values in weights]
    assert all(len(set(values)) == 1 for values in shuffled.values())
    if len(lengths) > 1:
        assert all(got != own[0] for got, own in zip(given_to, weights, strict=True))


@given(LENGTHS, SEEDS)
def test_a_profile_keeps_the_sum_at_each_position_and_knows_nothing_else(lengths, seed):
    found = random_step(lengths, seed)
    own, profile = by_key(found), by_key(position_profile(found))
    for left in range(max(lengths)):
        here = [values[-1 - left] for values in profile.values() if len(values) > left]
        before = [values[-1 - left] for values in own.values() if len(values) > left]
        assert len(set(here)) == 1
        assert sum(here) == pytest.approx(sum(before), rel=1e-6)


@settings(max_examples=50)
@given(LENGTHS, SEEDS, st.data())
def test_neither_packing_nor_microbatches_nor_ranks_matter(lengths, seed, data):
    """The same sequences in any order and in any parts: to the bit."""
    found = random_step(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    moved = reordered(found, order)
    cut = data.draw(st.integers(0, len(lengths)))
    parts = [reordered(moved, list(range(cut))), reordered(moved, list(range(cut, len(lengths))))]
    for control in (
        position_profile,
        lambda each: shuffled_over_tokens(each, seed=seed, step=1),
        lambda each: shuffled_over_sequences(each, seed=seed, step=1),
    ):
        whole = by_key(control(found))
        assert by_key(control(moved)) == whole
        assert by_key(control(join_step_weights(parts))) == whole


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(-0.3, 0.5))
def test_weights_that_know_position_alone_are_their_own_profile(lengths, log_ratio):
    """The same log-ratio everywhere: what is left of PEAR is the discount and the distance."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.ones(len(ids), dtype=torch.bool)
    policy = torch.full((len(ids),), log_ratio)
    pear = pear_token_weights(policy, torch.zeros(len(ids)), ids, mask, gamma=0.9)
    found = select_step_weights(pear, ids, mask, torch.arange(len(lengths)))
    assert torch.allclose(position_profile(found).weights, pear.weights, rtol=1e-6)


def test_parts_are_of_rows_with_a_loss_token_and_have_their_keys():
    """Row 1 has no loss token; masked positions are never read."""
    weights = torch.tensor([math.nan, 2.0, math.nan, 4.0, 5.0])
    pear = PearWeights(weights, weights.log(), weights, weights)
    mask = torch.tensor([False, True, False, True, True])
    found = select_step_weights(
        pear, torch.tensor([0, 0, 1, 2, 2]), mask, torch.tensor([30, 10, 20])
    )
    assert by_key(found) == {30: [2.0], 20: [4.0, 5.0]}


def test_sequence_weights_of_pear_are_shuffled_whole():
    """Two sequences with log-ratios .3 and -.08 per token: exp(.6) and exp(-.24), exchanged."""
    ids, mask = torch.tensor([0, 0, 1, 1, 1]), torch.ones(5, dtype=torch.bool)
    policy = torch.tensor([0.3, 0.3, -0.08, -0.08, -0.08])
    pear = pear_sequence_weights(policy, torch.zeros(5), ids, mask)
    found = select_step_weights(pear, ids, mask, torch.tensor([7, 3]))
    shuffled = shuffled_over_sequences(found, seed=5, step=0).weights.tolist()
    low, high = math.exp(-0.24), math.exp(0.6)
    assert shuffled == pytest.approx([low] * 2 + [high] * 3, rel=1e-6)


def test_one_key_for_two_sequences_is_refused():
    found = step_weights([1.0], [2.0], keys=[4, 4])
    with pytest.raises(ValueError, match="key 4 belongs to two sequences"):
        position_profile(found)
    with pytest.raises(ValueError, match="key 4 belongs to two sequences"):
        shuffled_over_sequences(found, seed=0, step=0)
