"""RLOO, REINFORCE++ and DAPO's length penalty: by hand, against loops, and their invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.advantages import (
    advantage_sums,
    grpo_advantages,
    mean_baseline_advantages,
    normalised_over_batch,
    overlong_penalties,
    returns_to_go,
    rloo_advantages,
)
from pear_ray.algorithms.weight_health import merge

QUICK = settings(deadline=None, max_examples=40)
REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.0]), min_size=1, max_size=12)
NAN = math.nan


def test_rloo_by_hand():
    rewards = torch.tensor([1.0, 5.0, 0.0, NAN, 0.5])
    groups = torch.tensor([3, 8, 3, 3, 3])
    valid = torch.tensor([True, True, True, False, True])
    # Group 3 without the errored row: 1 - .25, 0 - .75, .5 - .5. Group 8 has nobody to compare.
    assert rloo_advantages(rewards, groups, valid).tolist() == [0.75, 0.0, -0.75, 0.0, 0.0]


@QUICK
@given(rewards=REWARDS, num_groups=st.integers(1, 4))
def test_rloo_leaves_one_out(rewards, num_groups):
    groups = [place % num_groups for place in range(len(rewards))]
    got = rloo_advantages(torch.tensor(rewards), torch.tensor(groups)).tolist()
    for place, group in enumerate(groups):
        others = [r for k, r in enumerate(rewards) if groups[k] == group and k != place]
        expected = rewards[place] - sum(others) / len(others) if others else 0.0
        assert got[place] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimate", [grpo_advantages, mean_baseline_advantages, rloo_advantages])
@QUICK
@given(value=st.floats(-3, 3, width=32), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_groups_of_equal_rewards_get_exactly_nothing(estimate, value, sizes):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert not estimate(torch.full((sum(sizes),), value), groups).any()


def test_returns_to_go_by_hand():
    rewards = torch.tensor([1.0, -2.0])
    penalties = torch.tensor([0.5, NAN, 0.25, 0.125, 3.0, NAN])
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    mask = torch.tensor([True, False, True, True, True, False])
    got = returns_to_go(rewards, penalties, ids, mask)
    assert got.tolist() == [0.125, 0.0, 0.625, 0.875, -5.0, 0.0]


def test_batch_normalisation_by_hand():
    values = torch.tensor([3.0, 1.0, NAN, 1.0, -1.0])
    mask = torch.tensor([True, True, False, True, True])
    sums = advantage_sums(values, mask)
    # Mean 1, variance (4 + 0 + 0 + 4) / 4 = 2.
    root = math.sqrt(2)
    got = normalised_over_batch(values, mask, sums)
    assert got.tolist() == pytest.approx([root, 0.0, 0.0, 0.0, -root])
    assert (
        normalised_over_batch(values, ~mask & mask, advantage_sums(values, ~mask & mask))
        .eq(0)
        .all()
    )
    tenth = torch.full((7,), 0.1)
    everywhere = torch.ones(7, dtype=torch.bool)
    same = normalised_over_batch(tenth, everywhere, advantage_sums(tenth, everywhere), epsilon=0.0)
    assert same.tolist() == [0.0] * 7


@QUICK
@given(values=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20), data=st.data())
def test_batch_moments_add_up_over_ranks(values, data):
    tensor = torch.tensor(values, dtype=torch.float64)
    mask = torch.ones(len(values), dtype=torch.bool)
    cut = data.draw(st.integers(0, len(values)))
    whole = normalised_over_batch(tensor, mask, advantage_sums(tensor, mask))
    parts = [(tensor[:cut], mask[:cut]), (tensor[cut:], mask[cut:])]
    sums = merge(*(advantage_sums(*part) for part in parts))
    cut_up = torch.cat([normalised_over_batch(*part, sums) for part in parts])
    torch.testing.assert_close(cut_up, whole, rtol=1e-6, atol=1e-5)
    if tensor.std() > 1e-3:
        assert whole.mean().item() == pytest.approx(0.0, abs=1e-6)
        assert whole.std(unbiased=False).item() == pytest.approx(1.0, rel=1e-4)


def test_overlong_penalties_by_hand():
    lengths = torch.tensor([1, 12, 13, 14, 16, 20])
    got = overlong_penalties(lengths, max_tokens=16, buffer_tokens=4)
    assert got.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    for buffer_tokens in (0, 17):
        with pytest.raises(ValueError, match=f"buffer_tokens={buffer_tokens} is no part"):
            overlong_penalties(lengths, max_tokens=16, buffer_tokens=buffer_tokens)
