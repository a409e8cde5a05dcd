"""Every worked number of the method's description, to six decimals."""

import math

import pytest
import torch

from pear_ray.algorithms.loss_tokens import select_loss_tokens
from pear_ray.algorithms.negatives import above_logprob_floor, negative_sequence_weights
from pear_ray.algorithms.objectives import nll
from pear_ray.algorithms.pear import (
    block_log_weights,
    clipped_log_ratios,
    pear_block_weights,
    pear_sequence_weights,
    pear_token_weights,
    token_log_weights,
    weights_from_log_weights,
)
from pear_ray.algorithms.reduce import loss_denominator, loss_numerator
from pear_ray.algorithms.weight_health import finalise, weight_sums

POLICY = torch.tensor([-3.0, -0.7, -1.2, -0.10, -0.50, -2.00, -0.05, -0.30, -0.02, -9, -9])
BEHAVIOR = torch.tensor([-0.1, -4.0, -0.2, -0.15, -0.20, -2.90, -0.05, -0.28, -0.12, -0.5, -0.5])
MASK = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
IDS = torch.zeros(11, dtype=torch.long)
SECOND_POLICY = torch.tensor([-1.0, -0.4])
SECOND_BEHAVIOR = torch.tensor([-0.2, -0.6])
SIX = {"rtol": 0.0, "atol": 6e-7}

ROWS = {
    "sequence": (pear_sequence_weights, {}, [1.419068] * 6, 4.214631, 0.702438, 6.000000),
    "token_999": (
        pear_token_weights,
        {"gamma": 0.999},
        [1.343123, 1.456444, 1.080040, 1.081122, 1.104066, 1.000000],
        3.427891,
        0.571315,
        5.886130,
    ),
    "token_9": (
        pear_token_weights,
        {"gamma": 0.9},
        [0.797078, 0.959405, 0.789716, 0.877463, 0.994654, 1.000000],
        2.501112,
        0.416852,
        None,
    ),
    "block4_999": (
        pear_block_weights,
        {"gamma": 0.999, "block_size": 4},
        [1.081122] * 4 + [1.0] * 2,
        3.184972,
        0.530829,
        5.992113,
    ),
    "block2_9": (
        pear_block_weights,
        {"gamma": 0.9, "block_size": 2},
        [0.959405] * 2 + [0.877463] * 2 + [1.0] * 2,
        2.694441,
        0.449074,
        None,
    ),
}


def reduced(policy, weights, ids, mask, reduction):
    numerator = loss_numerator(nll(policy, mask), weights, ids, mask, reduction=reduction)
    return (numerator / loss_denominator(weights, ids, mask, reduction=reduction)).item()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_of_the_table(row):
    function, kwargs, expected, expected_sum, expected_mean, expected_ess = row
    pear = function(POLICY, BEHAVIOR, IDS, MASK, **kwargs)
    torch.testing.assert_close(pear.weights[MASK], torch.tensor(expected), **SIX)
    assert (pear.weights[~MASK] == 0).all()
    assert reduced(POLICY, pear.weights, IDS, MASK, "sum") == pytest.approx(expected_sum, abs=6e-7)
    mean = reduced(POLICY, pear.weights, IDS, MASK, "token_mean")
    assert mean == pytest.approx(expected_mean, abs=6e-7)
    if expected_ess is not None:
        metrics = finalise(weight_sums(pear, POLICY, IDS, MASK))
        assert metrics["effective_sample_size"] == pytest.approx(expected_ess, abs=2e-6)


def test_the_clipped_log_ratios_and_the_plain_nll():
    pear = pear_token_weights(POLICY, BEHAVIOR, IDS, MASK, gamma=0.999)
    expected = torch.tensor([0.05, -0.08, 0.30, 0.0, -0.02, 0.10])
    torch.testing.assert_close(pear.clipped_log_ratios[MASK], expected, **SIX)
    assert pear.clipped_log_ratios.sum().item() == pytest.approx(0.35, abs=6e-7)
    raw = torch.tensor([0.05, -0.3, 0.9, 0.0, -0.02, 0.10])
    torch.testing.assert_close(pear.log_ratios[MASK], raw, **SIX)
    ones = torch.ones(11)
    assert reduced(POLICY, ones, IDS, MASK, "sum") == pytest.approx(2.97, abs=6e-7)


def two_hundred(log_ratio, function=pear_token_weights, **kwargs):
    zeros = torch.zeros(200, dtype=torch.float64)
    args = (zeros + log_ratio, zeros, zeros.long(), torch.ones(200, dtype=torch.bool))
    return args, function(*args, **kwargs)


def test_two_hundred_tokens_stuck_low_reach_the_floor():
    args, pear = two_hundred(-0.08, gamma=0.999)
    clipped = pear.log_weights.clamp(-10, 5)
    assert clipped[75].item() == -10.0  # g_76
    assert pear.log_weights[75].item() < -10.0
    assert clipped[76].item() == pytest.approx(-9.963062, abs=1.5e-6)  # g_77
    assert pear.weights[0].item() == pytest.approx(4.539993e-05, rel=1e-6)
    metrics = finalise(weight_sums(pear, args[0].float(), *args[2:]))
    assert metrics["weight/mean"] == pytest.approx(0.064276, abs=6e-7)
    assert metrics["effective_sample_size"] == pytest.approx(24.715823, abs=3e-5)
    assert metrics["log_weight_floor_fraction"] == 76 / 200
    assert metrics["log_ratio_clip_low_fraction"] == 0.0  # on the bound, not past it


def test_two_hundred_tokens_stuck_high_reach_the_ceiling():
    args, pear = two_hundred(0.30, gamma=0.999)
    assert pear.log_weights[183].item() == pytest.approx(4.783992, abs=6e-7)  # g_184
    assert pear.log_weights[182].item() > 5.0
    metrics = finalise(weight_sums(pear, args[0].float(), *args[2:]))
    assert metrics["log_weight_ceiling_fraction"] == 183 / 200
    _, sequence = two_hundred(0.30, pear_sequence_weights)
    assert sequence.weights[0].item() == pytest.approx(148.413159, rel=1e-7)


def both():
    policy, behavior = torch.cat([POLICY, SECOND_POLICY]), torch.cat([BEHAVIOR, SECOND_BEHAVIOR])
    mask = torch.cat([MASK, torch.ones(2, dtype=torch.bool)])
    ids = torch.cat([IDS, torch.ones(2, dtype=torch.long)])
    return policy, ids, mask, pear_token_weights(policy, behavior, ids, mask, gamma=0.999).weights


def test_the_second_sequence_alone():
    mask, ids = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    pear = pear_token_weights(SECOND_POLICY, SECOND_BEHAVIOR, ids, mask, gamma=0.999)
    torch.testing.assert_close(pear.weights, torch.tensor([1.220181, 1.0]), **SIX)
    total = reduced(SECOND_POLICY, pear.weights, ids, mask, "sum")
    assert total == pytest.approx(1.620181, abs=6e-7)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", 2.524036),
        ("token_mean", 0.631009),
        ("seq_mean", 0.690703),
        ("weight_norm", 0.543682),
    ],
)
def test_a_batch_of_both_under_every_reduction(reduction, expected):
    policy, ids, mask, weights = both()
    assert reduced(policy, weights, ids, mask, reduction) == pytest.approx(expected, abs=6e-7)


def test_a_negative_trace():
    policy, behavior = torch.tensor([-0.3, -1.2, -0.9]), torch.tensor([-0.2, -1.0, -1.3])
    ids, mask = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    pear = negative_sequence_weights(
        policy, behavior, ids, mask, negative_scale=0.1, logprob_floor=-math.inf
    )
    torch.testing.assert_close(pear.log_weights, torch.full((3,), 0.14), **SIX)
    torch.testing.assert_close(pear.weights, torch.full((3,), -0.1150274), **SIX)
    term = reduced(policy, pear.weights, ids, mask, "token_mean")
    assert term == pytest.approx(-0.092022, abs=6e-7)


def test_a_negative_below_the_floor_stops_without_pushing_the_others_harder():
    policy = torch.tensor([-0.3, -math.inf, -0.9], requires_grad=True)
    behavior = torch.tensor([-0.2, -1.0, -1.3])
    ids, mask = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    keep = above_logprob_floor(policy, mask, logprob_floor=-1.0)
    assert keep.tolist() == [True, False, True]
    pear = negative_sequence_weights(
        policy, behavior, ids, mask, negative_scale=0.5, logprob_floor=-1.0
    )
    weight = math.exp(-0.08 - 0.08 + 0.30)  # the stopped token still counts in S_0
    losses = nll(policy, mask)
    numerator = loss_numerator(losses, pear.weights, ids, mask, reduction="token_mean")
    assert numerator.item() == pytest.approx(-0.5 * weight * 1.2, rel=1e-6)
    assert loss_denominator(pear.weights, ids, mask, reduction="token_mean").item() == 3
    (gradient,) = torch.autograd.grad(numerator, policy)
    assert gradient.tolist() == pytest.approx([0.5 * weight, 0.0, 0.5 * weight])


def test_a_negative_needs_a_scale_of_zero_or_more():
    policy, ids = torch.tensor([-0.3]), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"negative_scale=-1\.0"):
        negative_sequence_weights(
            policy, policy, ids, ids == 0, negative_scale=-1.0, logprob_floor=-9.0
        )


@pytest.mark.parametrize(
    ("length", "mean"), [(256, 0.88), (1024, 0.63), (4096, 0.24), (8192, 0.12)]
)
def test_what_the_discount_alone_does_to_long_traces(length, mean):
    zeros = torch.zeros(length)
    ones = torch.ones(length, dtype=torch.bool)
    pear = pear_token_weights(zeros, zeros, zeros.long(), ones, gamma=0.999)
    assert pear.weights.mean().item() == pytest.approx(mean, abs=0.005)
    if length > 693:
        assert pear.weights[length - 1 - 693].item() == pytest.approx(0.5, abs=5e-4)


@pytest.mark.parametrize(("log_ratio", "distance"), [(-0.08, 124), (0.30, 17)])
def test_how_soon_a_stuck_ratio_reaches_a_bound(log_ratio, distance):
    _, pear = two_hundred(log_ratio, gamma=0.999)
    outside = (pear.log_weights < -10) | (pear.log_weights > 5)
    assert bool(outside[199 - distance])
    assert not bool(outside[199 - distance + 1])


def test_impossible_numbers_are_refused():
    mask, ids = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    args = (SECOND_POLICY, SECOND_BEHAVIOR, ids, mask)
    for gamma in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="not a discount"):
            pear_token_weights(*args, gamma=gamma)
    with pytest.raises(ValueError, match="not a block"):
        pear_block_weights(*args, gamma=1.0, block_size=0)
    with pytest.raises(ValueError, match="log_ratio_clip"):
        pear_sequence_weights(*args, log_ratio_clip=(0.3, -0.08))
    with pytest.raises(ValueError, match="log_weight_clip"):
        weights_from_log_weights(torch.zeros(1), log_weight_clip=(5.0, -10.0))
    nan = torch.tensor([math.nan, -0.4])
    with pytest.raises(ValueError, match="1 of 2 loss tokens"):
        pear_token_weights(nan, SECOND_BEHAVIOR, ids, mask, gamma=1.0)
    with pytest.raises(ValueError, match="sequence_ids decrease"):
        pear_token_weights(SECOND_POLICY, SECOND_BEHAVIOR, torch.tensor([1, 0]), mask, gamma=1.0)


def test_the_low_level_steps_compose_to_the_same_weights():
    tokens = select_loss_tokens(IDS, MASK)
    clipped = clipped_log_ratios((POLICY - BEHAVIOR)[tokens.positions])
    token = weights_from_log_weights(token_log_weights(clipped, tokens, gamma=0.9))
    torch.testing.assert_close(token, torch.tensor(ROWS["token_9"][2]), **SIX)
    block = block_log_weights(clipped, tokens, gamma=0.9, block_size=2)
    torch.testing.assert_close(
        weights_from_log_weights(block), torch.tensor(ROWS["block2_9"][2]), **SIX
    )
