"""The discount by hand: the method's own numbers, and what the weights themselves sum to."""

import math

import pytest
import torch

from pear_ray.algorithms.discount import (
    gamma_for_mean_weight,
    perfect_ratio_mean_weights,
    tokens_to_bound,
)
from pear_ray.algorithms.loss_tokens import select_loss_tokens
from pear_ray.algorithms.pear import block_log_weights, weights_from_log_weights


def summed(length, *, gamma, block_size=1, low=-10.0):
    """The mean as the weights themselves give it."""
    mask = torch.ones(length, dtype=torch.bool)
    loss_tokens = select_loss_tokens(torch.zeros(length, dtype=torch.long), mask)
    zeros = torch.zeros(length, dtype=torch.float64)
    log_weights = block_log_weights(zeros, loss_tokens, gamma=gamma, block_size=block_size)
    return weights_from_log_weights(log_weights, log_weight_clip=(low, 5.0)).double().mean().item()


def test_the_numbers_of_the_method():
    lengths = torch.tensor([256, 1024, 4096, 8192])
    means = perfect_ratio_mean_weights(lengths, gamma=0.999)
    assert [round(mean, 2) for mean in means.tolist()] == [0.88, 0.63, 0.24, 0.12]


def test_a_few_tokens_by_hand():
    lengths = torch.tensor([1, 2, 3])
    found = perfect_ratio_mean_weights(lengths, gamma=0.5).tolist()
    assert found == pytest.approx([1.0, 1.5 / 2, 1.75 / 3])
    # Five tokens in blocks of two: weights g^3 g^3 g g 1.
    (blocks,) = perfect_ratio_mean_weights(torch.tensor([5]), gamma=0.5, block_size=2).tolist()
    assert blocks == pytest.approx((2 / 8 + 2 / 2 + 1) / 5)
    # A floor of 1/4: 1/8 and 1/16 are lifted to it.
    (floored,) = perfect_ratio_mean_weights(
        torch.tensor([5]), gamma=0.5, log_weight_low=math.log(0.25)
    ).tolist()
    assert floored == pytest.approx((1 + 0.5 + 3 * 0.25) / 5)


@pytest.mark.parametrize("length", [1, 3, 4, 7, 100, 4001])
@pytest.mark.parametrize("block_size", [1, 4, 5000])
@pytest.mark.parametrize(("gamma", "low"), [(0.999, -10.0), (0.9, -3.0), (0.99, 0.0), (1.0, -1.0)])
def test_the_closed_form_is_the_sum(length, block_size, gamma, low):
    (mean,) = perfect_ratio_mean_weights(
        torch.tensor([length]), gamma=gamma, block_size=block_size, log_weight_low=low
    ).tolist()
    expected = summed(length, gamma=gamma, block_size=block_size, low=low)
    assert mean == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 8])
def test_gamma_for_a_mean_is_the_smallest_that_has_it(block_size):
    gamma = gamma_for_mean_weight(0.9, num_loss_tokens=4096, block_size=block_size)
    # 1 - x/2 + x^2/6 = 0.9 gives x = T (1 - gamma) = 0.2148
    assert 4096 * (1 - gamma) == pytest.approx(0.2148, rel=5e-3)
    assert summed(4096, gamma=gamma, block_size=block_size) == pytest.approx(0.9, abs=1e-6)


def test_a_mean_of_one_needs_no_discount():
    assert gamma_for_mean_weight(1.0, num_loss_tokens=512) == pytest.approx(1.0, abs=1e-15)


def test_how_far_from_the_end_the_bounds_are():
    assert tokens_to_bound(-0.08, gamma=0.999) == 124
    assert tokens_to_bound(0.30, gamma=0.999) == 17
    assert tokens_to_bound(0.0, gamma=0.999) == 9995  # 10 / 0.00100050 = 9994.9986
    assert tokens_to_bound(0.0, gamma=1.0) is None
    assert tokens_to_bound(-0.5, gamma=1.0, log_weight_clip=(-1.0, 1.0)) == 2


@pytest.mark.parametrize("gamma", [0.0, 1.5, math.nan])
def test_what_is_not_a_discount_is_refused(gamma):
    with pytest.raises(ValueError, match="not a discount"):
        perfect_ratio_mean_weights(torch.tensor([3]), gamma=gamma)
    with pytest.raises(ValueError, match="not a discount"):
        tokens_to_bound(0.1, gamma=gamma)


def test_what_is_no_length_or_mean_is_refused():
    with pytest.raises(ValueError, match="use 1 or more"):
        perfect_ratio_mean_weights(torch.tensor([3, 0]), gamma=0.9)
    with pytest.raises(ValueError, match="use one in"):
        gamma_for_mean_weight(1.5, num_loss_tokens=3)
