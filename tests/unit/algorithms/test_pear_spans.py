"""Span weights: worked by hand, against plain loops, and what they must not depend on."""

import math

import pear_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.pear import (
    pear_block_weights,
    pear_sequence_weights,
    pear_token_weights,
)
from pear_ray.algorithms.pear_spans import pear_span_sequence_weights, pear_span_weights

QUICK = settings(deadline=None, max_examples=25)
GAMMAS = st.sampled_from([0.9, 0.999, 1.0])
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)
COLUMNS = ("weights", "log_weights", "log_ratios", "clipped_log_ratios")

# Spans of 2, 1 and 2 loss tokens. Log-ratios: 0.10 over 2 tokens; 0.90; 0.06 over 2 tokens.
POLICY = torch.tensor([-3.0, -0.10, -0.50, -2.00, -0.05, -0.30, -9.0])
BEHAVIOR = torch.tensor([-0.1, -0.65, -0.05, -2.90, -0.40, -0.01, -0.5])
MASK = torch.tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
SEQUENCES = torch.zeros(7, dtype=torch.long)
SPANS = torch.tensor([-1, 0, 0, 1, 2, 2, -1])
WORKED = (POLICY, BEHAVIOR, SEQUENCES, MASK, SPANS)
SIX = {"rtol": 0.0, "atol": 6e-7}


def make_batch(lengths, seed, *, masked_share=0.3, spread=0.2, join=0.5):
    """Packed, with holes in the mask and spans of random size; numbers may be left out."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    policy = -3 * torch.rand(total, generator=generator)
    behavior = policy + spread * torch.randn(total, generator=generator)
    mask = torch.rand(total, generator=generator) >= masked_share
    mask[torch.tensor(lengths).cumsum(0) - 1] = True
    steps = (torch.rand(total, generator=generator) >= join).long()
    spans = torch.cat([part.cumsum(0) for part in steps.split(lengths)])
    return policy, behavior, ids, mask, spans


def close(left, right):
    torch.testing.assert_close(left, right, rtol=2e-6, atol=1e-7)


def test_a_worked_example():
    pear = pear_span_weights(*WORKED, gamma=0.9)
    per_token = [0.05, 0.05, 0.90, 0.03, 0.03]
    torch.testing.assert_close(pear.log_ratios[MASK], torch.tensor(per_token), **SIX)
    clipped = [0.05, 0.05, 0.30, 0.03, 0.03]  # d = 0.10, 0.30, 0.06
    torch.testing.assert_close(pear.clipped_log_ratios[MASK], torch.tensor(clipped), **SIX)
    # .9^3 e^.36 twice, .9^2 e^.06, 1 twice
    expected = torch.tensor([1.044897, 1.044897, 0.860088, 1.0, 1.0])
    torch.testing.assert_close(pear.weights[MASK], expected, **SIX)
    logs = torch.tensor([0.043918, 0.043918, -0.150721, 0.0, 0.0])
    torch.testing.assert_close(pear.log_weights[MASK], logs, **SIX)
    for column in COLUMNS:
        assert (getattr(pear, column)[~MASK] == 0).all()


def test_a_worked_example_of_the_sequence_weight():
    pear = pear_span_sequence_weights(*WORKED)
    torch.testing.assert_close(pear.log_weights[MASK], torch.full((5,), 0.46), **SIX)
    torch.testing.assert_close(pear.weights[MASK], torch.full((5,), 1.584074), **SIX)


def test_the_clip_is_that_of_n_tokens():
    """Ratios of +1 and -1 in one span cancel; 3 tokens at -0.2 each are held to -0.24."""
    zeros, mask = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    policy = torch.tensor([0.0, 1.0, -1.0, -0.6, 0.0, 0.0])
    spans = torch.tensor([0, 1, 1, 2, 2, 2])
    pear = pear_span_weights(policy, zeros, zeros.long(), mask, spans, gamma=1.0)
    expected = torch.tensor([-0.24, -0.24, -0.24, 0.0, 0.0, 0.0])
    torch.testing.assert_close(pear.log_weights, expected, **SIX)
    token = pear_token_weights(policy, zeros, zeros.long(), mask, gamma=1.0)
    assert token.log_weights[0].item() == pytest.approx(0.30 - 0.08 - 0.08)  # unlike each alone


def test_bounds_given_by_the_caller_are_used():
    pear = pear_span_weights(*WORKED, gamma=1.0, log_ratio_clip=(-1.0, 0.04))
    torch.testing.assert_close(pear.log_weights[1:4], torch.tensor([0.10, 0.10, 0.06]), **SIX)
    held = pear_span_weights(*WORKED, gamma=1.0, log_weight_clip=(-1.0, 0.1))
    assert held.weights[1].item() == pytest.approx(math.exp(0.1))
    held = pear_span_sequence_weights(
        *WORKED, log_ratio_clip=(0.0, 0.04), log_weight_clip=(0.0, 0.1)
    )
    assert held.log_weights[1].item() == pytest.approx(2 * 0.04 + 0.04 + 2 * 0.03)
    assert held.weights[1].item() == pytest.approx(math.exp(0.1))


@QUICK
@given(LENGTHS, SEEDS, GAMMAS, st.sampled_from([0.0, 0.5, 0.9]))
def test_the_vectorised_weights_are_those_of_the_plain_loops(lengths, seed, gamma, join):
    batch = make_batch(lengths, seed, join=join)
    pear = pear_span_weights(*batch, gamma=gamma)
    expected = reference.flat_span_log_weights(*[t.tolist() for t in batch], gamma=gamma)
    close(pear.log_weights, torch.tensor(expected))
    close(pear.weights[batch[3]], pear.log_weights[batch[3]].clamp(-10, 5).exp())


@QUICK
@given(LENGTHS, SEEDS, GAMMAS)
def test_spans_of_one_token_are_the_papers_modes_exactly(lengths, seed, gamma):
    *batch, _ = make_batch(lengths, seed)
    spans = torch.cat([torch.arange(length) for length in lengths])
    token = pear_token_weights(*batch, gamma=gamma)
    sequence = pear_sequence_weights(*batch)
    for column in COLUMNS:
        own = getattr(pear_span_weights(*batch, spans, gamma=gamma), column)
        assert torch.equal(own, getattr(token, column))
        own = getattr(pear_span_sequence_weights(*batch, spans), column)
        assert torch.equal(own, getattr(sequence, column))


@QUICK
@given(LENGTHS, SEEDS, GAMMAS, st.integers(1, 5))
def test_equal_ratios_within_spans_of_one_size_are_block_mode(lengths, seed, gamma, size):
    policy, _, ids, mask, _ = make_batch(lengths, seed, masked_share=0.0)
    spans = torch.cat([torch.arange(length) // size for length in lengths])
    ratios = torch.randn(len(lengths), 12, generator=torch.Generator().manual_seed(seed)) * 0.2
    behavior = policy - ratios[ids, spans]
    block = pear_block_weights(policy, behavior, ids, mask, gamma=gamma, block_size=size)
    pear = pear_span_weights(policy, behavior, ids, mask, spans, gamma=gamma)
    for column in COLUMNS:
        close(getattr(pear, column), getattr(block, column))


@QUICK
@given(LENGTHS, SEEDS)
def test_one_span_per_sequence_is_plain_sft(lengths, seed):
    *batch, spans = make_batch(lengths, seed)
    pear = pear_span_weights(*batch, torch.zeros_like(spans), gamma=0.9)
    assert torch.equal(pear.weights, batch[3].float())


@QUICK
@given(LENGTHS, SEEDS)
def test_only_totals_within_a_span_matter(lengths, seed):
    policy, behavior, ids, mask, spans = make_batch(lengths, seed)
    expected = pear_span_weights(policy, behavior, ids, mask, spans, gamma=0.999)
    group = (100 * ids + spans)[mask]
    for column in COLUMNS:  # all of a span's tokens have the same
        values = getattr(expected, column)[mask]
        for number in group.unique():
            assert values[group == number].unique().numel() == 1
    generator = torch.Generator().manual_seed(seed + 1)
    moved = []
    for values in (policy.double(), behavior.double()):
        noise = torch.randn(group.numel(), generator=generator, dtype=torch.float64)
        for number in group.unique():
            noise[group == number] -= noise[group == number].mean()
        shifted = values.clone()
        shifted[mask] += noise
        moved.append(shifted)
    pear = pear_span_weights(*moved, ids, mask, spans, gamma=0.999)
    for column in COLUMNS:
        close(getattr(pear, column), getattr(expected, column))


@QUICK
@given(st.integers(2, 20), SEEDS, st.data())
def test_a_spans_ratio_moves_only_the_spans_before_it(length, seed, data):
    policy, behavior, ids, mask, spans = make_batch([length], seed, masked_share=0.0, spread=0.02)
    at = data.draw(st.integers(0, length - 1))
    moved = behavior.clone()
    moved[at] += 5.0  # its span is now clipped low, however long
    before = pear_span_weights(policy, behavior, ids, mask, spans, gamma=0.9).log_weights
    after = pear_span_weights(policy, moved, ids, mask, spans, gamma=0.9).log_weights
    earlier = spans < spans[at]
    assert torch.equal(after[~earlier], before[~earlier])
    assert (after[earlier] < before[earlier]).all()


@QUICK
@given(LENGTHS, SEEDS, st.integers(0, 4), st.integers(0, 4), st.randoms(use_true_random=False))
def test_nothing_outside_a_mask_matters(lengths, seed, left, right, random):
    policy, behavior, ids, mask, spans = make_batch(lengths, seed)
    args = (policy, behavior, ids, mask, spans)
    expected = (pear_span_weights(*args, gamma=0.999), pear_span_sequence_weights(*args))
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    order = list(range(len(lengths)))
    random.shuffle(order)
    before, after = torch.full((left,), -1), torch.full((right,), -1)
    pieces = [torch.cat([before, (ids == s).nonzero().squeeze(1), after]) for s in order]
    origin = torch.cat(pieces)
    keep = (origin >= 0) & mask[origin]
    bad = garbage[torch.arange(len(origin)) % 4]
    numbers = [torch.full((len(piece),), 7 * n + 3) for n, piece in enumerate(pieces)]
    moved = (
        torch.where(keep, policy[origin], bad),
        torch.where(keep, behavior[origin], bad),
        torch.where(keep, torch.cat(numbers), -99),
        keep,
        torch.where(keep, 3 * spans[origin] + 1, -1),  # only the order of the numbers counts
    )
    got = (pear_span_weights(*moved, gamma=0.999), pear_span_sequence_weights(*moved))
    for pear, want in zip(got, expected, strict=True):
        for column in COLUMNS:
            close(getattr(pear, column)[keep], getattr(want, column)[origin[keep]])
            assert (getattr(pear, column)[~keep] == 0).all()


def test_equal_numbers_in_two_sequences_are_two_spans():
    policy, behavior = torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -1.2])
    mask, zeros = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    pear = pear_span_weights(policy, behavior, torch.tensor([0, 1]), mask, zeros, gamma=0.9)
    torch.testing.assert_close(pear.log_ratios, torch.tensor([0.1, 0.2]), **SIX)
    assert pear.weights.tolist() == [1.0, 1.0]
    joined = pear_span_weights(policy, behavior, zeros, mask, zeros, gamma=0.9)
    torch.testing.assert_close(joined.log_ratios, torch.tensor([0.15, 0.15]), **SIX)


def test_no_loss_token_at_all():
    none = torch.zeros(7, dtype=torch.bool)
    pear = pear_span_weights(POLICY, BEHAVIOR, SEQUENCES, none, SPANS, gamma=0.9)
    assert pear.weights.tolist() == [0.0] * 7


def test_no_gradient_reaches_the_weights():
    policy = POLICY.clone().requires_grad_()
    pear = pear_span_weights(policy, *WORKED[1:], gamma=0.9)
    assert not any(getattr(pear, column).requires_grad for column in COLUMNS)


def test_impossible_spans_are_refused():
    with pytest.raises(ValueError, match="2 of 5 loss tokens are in no span"):
        pear_span_weights(*WORKED[:4], torch.tensor([-1, 0, -1, 1, 2, -1, -1]), gamma=0.9)
    with pytest.raises(ValueError, match="span_ids decrease within a sequence"):
        pear_span_weights(*WORKED[:4], torch.tensor([-1, 0, 1, 0, 2, 2, -1]), gamma=0.9)
    nan = BEHAVIOR.clone()
    nan[2] = math.nan
    with pytest.raises(ValueError, match="2 of 5 loss tokens have a log-ratio"):  # its whole span
        pear_span_weights(POLICY, nan, SEQUENCES, MASK, SPANS, gamma=0.9)


def test_float64_sums_hold_over_32k_tokens():
    policy, behavior, ids, mask, _ = make_batch([32768], 1, masked_share=0.0, spread=0.03)
    spans = torch.arange(32768) // 2
    got = pear_span_weights(policy, behavior, ids, mask, spans, gamma=0.999).log_weights
    means = (policy.double() - behavior.double()).view(-1, 2).mean(1)
    d = 2 * means.clamp(-0.08, 0.3)
    after = d.flip(0).cumsum(0).flip(0) - d
    num_after = torch.arange(32766, -1, -2)
    expected = after + num_after * math.log(0.999)
    assert expected.abs().max() > 20  # or the test would not reach far
    close(got.double(), expected.repeat_interleave(2))
