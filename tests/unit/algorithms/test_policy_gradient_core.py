"""Advantages, surrogate, KL estimators and mismatch, by numbers worked out by hand."""

import math

import pytest
import torch

from pear_ray.algorithms.advantages import (
    degenerate_group_fraction,
    grpo_advantages,
    mean_baseline_advantages,
)
from pear_ray.algorithms.mismatch import (
    finalise_mismatch,
    mismatch_sums,
)
from pear_ray.algorithms.policy_losses import clipped_surrogate, kl_k1, kl_k2, kl_k3
from pear_ray.algorithms.weight_health import merge

NAN = math.nan


def test_advantages_by_hand_with_interleaved_groups():
    rewards = torch.tensor([1.0, 3.0, 0.0, 3.0, 0.0, 1.0])
    groups = torch.tensor([9, 4, 9, 4, 9, 9])
    assert mean_baseline_advantages(rewards, groups).tolist() == [0.5, 0.0, -0.5, 0.0, -0.5, 0.5]
    # Group 9 has mean .5 and (population) std .5; group 4 is degenerate.
    got = grpo_advantages(rewards, groups, epsilon=0.5)
    assert got.tolist() == [0.5, 0.0, -0.5, 0.0, -0.5, 0.5]
    got = grpo_advantages(torch.tensor([2.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.long))
    root = math.sqrt(1.5)
    assert got.tolist() == pytest.approx([root, -root, 0.0], rel=1e-5)
    assert degenerate_group_fraction(rewards, groups) == 0.5


def test_errored_rows_are_left_out_and_get_nothing():
    rewards = torch.tensor([1.0, NAN, 0.0, NAN, 5.0])
    groups = torch.tensor([0, 0, 0, 1, 2])
    valid = torch.tensor([True, False, True, False, True])
    assert mean_baseline_advantages(rewards, groups, valid).tolist() == [0.5, 0.0, -0.5, 0.0, 0.0]
    got = grpo_advantages(rewards, groups, valid)
    assert got.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0, 0.0], rel=1e-5)
    # Group 1 has no valid row and is not counted; group 2 has one, hence is degenerate.
    assert degenerate_group_fraction(rewards, groups, valid) == 0.5
    nobody = torch.zeros(5, dtype=torch.bool)
    assert grpo_advantages(rewards, groups, nobody).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="none of 5 rows"):
        degenerate_group_fraction(rewards, groups, nobody)


def test_a_group_of_equal_rewards_is_exactly_zero():
    rewards = torch.full((7,), 0.1)  # seven tenths over seven is not a tenth in binary
    groups = torch.zeros(7, dtype=torch.long)
    assert grpo_advantages(rewards, groups, epsilon=1e-30).tolist() == [0.0] * 7


def test_the_surrogate_by_hand():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0, 0.0])
    policy = ratios.log().requires_grad_()
    mask = torch.ones(6, dtype=torch.bool)
    got = clipped_surrogate(policy, torch.zeros(6), advantages, mask, clip_low=0.2, clip_high=0.28)
    # A>0 keeps the smaller of r and 1.28; A<0 keeps the larger of r and 0.8.
    assert got.losses.tolist() == pytest.approx([-2.56, 3.0, -1.0, 1.6, -1.1, 0.0], rel=1e-6)
    assert got.clipped_high.tolist() == [True, False, False, False, False, False]
    assert got.clipped_low.tolist() == [False, False, False, True, False, False]
    assert got.ratios.tolist() == pytest.approx(ratios.tolist())
    (gradient,) = torch.autograd.grad(got.losses.sum(), policy)
    assert gradient.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -1.1, 0.0], rel=1e-6)


def test_the_surrogate_never_reads_masked_positions_and_stays_finite():
    policy = torch.tensor([NAN, -1.0, -1.0, math.inf], requires_grad=True)
    behavior = torch.tensor([-1.0, -200.0, -1.0, NAN])
    advantages = torch.tensor([NAN, 0.0, 2.0, 1.0])
    mask = torch.tensor([False, True, True, False])
    got = clipped_surrogate(policy, behavior, advantages, mask, clip_low=0.2, clip_high=0.2)
    assert got.losses.tolist() == [0.0, 0.0, -2.0, 0.0]
    (gradient,) = torch.autograd.grad(got.losses.sum(), policy)
    assert gradient.tolist() == [0.0, 0.0, -2.0, 0.0]
    with pytest.raises(ValueError, match="distances from 1"):
        clipped_surrogate(policy, behavior, advantages, mask, clip_low=1.2, clip_high=0.2)


def test_kl_estimators_by_hand_and_without_leaks():
    policy = torch.tensor([math.log(0.5), math.log(0.2), NAN], requires_grad=True)
    reference = torch.tensor([math.log(0.25), math.log(0.4), math.inf])
    mask = torch.tensor([True, True, False])
    two = math.log(2.0)
    expected = {
        kl_k1: ([two, -two, 0], [1, 1, 0]),
        kl_k2: ([two**2 / 2, two**2 / 2, 0], [two, -two, 0]),
        kl_k3: ([0.5 - 1 + two, 2 - 1 - two, 0], [0.5, -1, 0]),  # gradient 1 - q/p
    }
    for estimator, (values, gradients) in expected.items():
        got = estimator(policy, reference, mask)
        assert got.tolist() == pytest.approx(values, abs=1e-6)
        (gradient,) = torch.autograd.grad(got.sum(), policy)
        assert gradient.tolist() == pytest.approx(gradients, abs=1e-6)


def test_kl_estimators_are_the_kl_on_average():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    truth = (p * (p / q).log()).sum()  # KL(policy || reference), not the reverse
    for estimator in (kl_k1, kl_k3):
        mean = (p * estimator(p.log(), q.log(), torch.ones(3, dtype=torch.bool))).sum()
        torch.testing.assert_close(mean, truth)


def test_mismatch_by_hand_and_merged():
    policy = torch.tensor([math.log(0.5), math.log(0.4), NAN, math.log(0.15)])
    behavior = torch.tensor([math.log(0.25), math.log(0.4), 0.0, math.log(0.6)])
    mask = torch.tensor([True, True, False, True])
    whole = finalise_mismatch(mismatch_sums(policy, behavior, mask))
    two = math.log(2.0)
    expected = {
        "num_tokens": 3,
        "abs_gap/mean": two,
        "abs_gap/max": 2 * two,
        "mismatch_kl_k1": two / 3,
        # ratios 2, 1, 1/4: r - 1 - log r
        "mismatch_kl_k3": ((2 - 1 - two) + 0 + (0.25 - 1 + 2 * two)) / 3,
        "ratio/mean": 3.25 / 3,
        "effective_sample_size": 3.25**2 / 5.0625,
        "ess_fraction": 3.25**2 / 5.0625 / 3,
    }
    assert whole == pytest.approx(expected, abs=1e-7)
    parts = [mismatch_sums(policy[s], behavior[s], mask[s]) for s in (slice(0, 1), slice(1, 4))]
    parts.append(mismatch_sums(policy[2:3], behavior[2:3], mask[2:3]))  # no loss token at all
    merged = merge(parts[2], merge(parts[0], parts[1]))
    assert finalise_mismatch(merged) == pytest.approx(whole)
    with pytest.raises(ValueError, match="no loss token"):
        finalise_mismatch(parts[2])
