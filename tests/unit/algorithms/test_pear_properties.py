"""The nine properties of the method, and agreement with the plain-loop reference."""

import pear_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.logprobs import chosen_logprobs_from_logits
from pear_ray.algorithms.objectives import dft, nll
from pear_ray.algorithms.pear import (
    pear_block_weights,
    pear_sequence_weights,
    pear_token_weights,
)
from pear_ray.algorithms.reduce import (
    loss_denominator,
    loss_numerator,
    mean_one_over_batch,
    mean_one_over_sequence,
)

QUICK = settings(deadline=None, max_examples=25)
GAMMAS = st.sampled_from([0.9, 0.999, 1.0])
REDUCTIONS = ("sum", "token_mean", "seq_mean", "weight_norm")
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)


def make_batch(lengths, seed, *, masked_share=0.3, spread=0.2):
    """A packed batch with holes in its mask; the last token of each sequence is a loss token."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    policy = -3 * torch.rand(total, generator=generator)
    behavior = policy + spread * torch.randn(total, generator=generator)
    mask = torch.rand(total, generator=generator) >= masked_share
    mask[torch.tensor(lengths).cumsum(0) - 1] = True
    return policy, behavior, ids, mask


def all_modes(*batch, gamma=0.999, block_size=3):
    return {
        "token": pear_token_weights(*batch, gamma=gamma),
        "block": pear_block_weights(*batch, gamma=gamma, block_size=block_size),
        "sequence": pear_sequence_weights(*batch),
    }


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


@QUICK
@given(LENGTHS, SEEDS, GAMMAS, st.integers(1, 6))
def test_the_vectorised_weights_are_those_of_the_plain_loops(lengths, seed, gamma, block_size):
    batch = make_batch(lengths, seed)
    kwargs = {"gamma": gamma, "block_size": block_size}
    for mode, pear in all_modes(*batch, **kwargs).items():
        expected = reference.flat_weights(*[t.tolist() for t in batch], mode=mode, **kwargs)
        torch.testing.assert_close(pear.weights, torch.tensor(expected), rtol=2e-6, atol=0)


@QUICK
@given(LENGTHS, SEEDS)
def test_property_1_equal_policies_and_no_discount_are_plain_sft_exactly(lengths, seed):
    policy, _, ids, mask = make_batch(lengths, seed)
    for pear in all_modes(policy, policy, ids, mask, gamma=1.0).values():
        assert torch.equal(pear.weights, mask.float())


@QUICK
@given(st.integers(1, 25), SEEDS, GAMMAS)
def test_property_2_the_recursion_and_the_last_weight(length, seed, gamma):
    batch = make_batch([length], seed, masked_share=0.0, spread=0.1)
    pear = pear_token_weights(*batch, gamma=gamma)
    assert pear.weights[-1].item() == 1.0
    # 25 tokens stay in (-10, 5) at gamma >= .9 unless nearly all are clipped high.
    unclipped = (pear.log_weights[1:].abs() < 5) & (pear.log_weights[:-1].abs() < 5)
    expected = gamma * pear.clipped_log_ratios[1:].exp() * pear.weights[1:]
    torch.testing.assert_close(pear.weights[:-1][unclipped], expected[unclipped], rtol=2e-6, atol=0)


@QUICK
@given(LENGTHS, SEEDS, GAMMAS, st.integers(1, 5))
def test_property_3_blocks(lengths, seed, gamma, block_size):
    batch = make_batch(lengths, seed)
    token = pear_token_weights(*batch, gamma=gamma).weights
    one = pear_block_weights(*batch, gamma=gamma, block_size=1).weights
    assert torch.equal(one, token)
    _, _, ids, mask = batch
    longest = int(torch.bincount(ids[mask]).max())
    whole = pear_block_weights(*batch, gamma=gamma, block_size=longest).weights
    assert torch.equal(whole, mask.float())
    blocks = pear_block_weights(*batch, gamma=gamma, block_size=block_size).weights
    for sequence in range(len(lengths)):
        own = mask & (ids == sequence)
        for here, weight in zip(
            blocks[own].split(block_size), token[own].split(block_size), strict=True
        ):
            close(here, weight[-1].expand_as(here))  # all have the weight of the block's last token


@QUICK
@given(LENGTHS, SEEDS, st.integers(0, 4), st.integers(0, 4), st.randoms(use_true_random=False))
def test_property_4_nothing_outside_a_mask_matters(lengths, seed, left, right, random):
    policy, behavior, ids, mask = make_batch(lengths, seed)
    expected = all_modes(policy, behavior, ids, mask)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    order = list(range(len(lengths)))
    random.shuffle(order)
    pieces, keeps, origin = [], [], []
    for sequence in order:
        own = (ids == sequence).nonzero().squeeze(1)
        for source, size in ((None, left), (own, own.numel()), (None, right)):
            bad = garbage[torch.randint(0, 4, (size,))]
            keep = torch.zeros(size, dtype=torch.bool) if source is None else mask[source]
            values = (policy[source], behavior[source]) if source is not None else (bad, bad)
            # Masked positions of the sequence itself are poisoned as well.
            pieces.append(torch.stack([torch.where(keep, v, bad) for v in values]))
            keeps.append(keep)
            origin.append(torch.full((size,), -1) if source is None else source)
    moved = torch.cat(pieces, dim=1)
    new_mask, origin = torch.cat(keeps), torch.cat(origin)
    new_ids = torch.cat(
        [torch.full((left + lengths[s] + right,), 7 * n + 3) for n, s in enumerate(order)]
    )
    new_ids[~new_mask] = -99  # ids of masked positions are not read either
    for mode, pear in all_modes(moved[0], moved[1], new_ids, new_mask).items():
        close(pear.weights[new_mask], expected[mode].weights[origin[new_mask]])
        for tensor in (pear.weights, pear.log_weights, pear.log_ratios, pear.clipped_log_ratios):
            assert (tensor[~new_mask] == 0).all()


@QUICK
@given(st.integers(2, 20), SEEDS, st.data())
def test_property_5_a_ratio_moves_only_what_comes_before(length, seed, data):
    policy, behavior, ids, mask = make_batch([length], seed, masked_share=0.0, spread=0.02)
    at = data.draw(st.integers(0, length - 1))
    moved = behavior.clone()
    moved[at] += 1.0  # now clipped low
    for mode, block in (("token", 1), ("block", 3)):
        before = all_modes(policy, behavior, ids, mask, block_size=block)[mode].log_weights
        after = all_modes(policy, moved, ids, mask, block_size=block)[mode].log_weights
        first = (at // block) * block
        assert torch.equal(after[first:], before[first:])
        assert (after[:first] < before[:first]).all()


@QUICK
@given(LENGTHS, SEEDS, st.sampled_from(REDUCTIONS))
def test_property_6_the_gradient_is_that_of_frozen_weights(lengths, seed, reduction):
    policy, behavior, ids, mask = make_batch(lengths, seed)
    policy[~mask] = torch.nan
    policy.requires_grad_()
    behavior.requires_grad_()
    for pear in all_modes(policy, behavior, ids, mask).values():
        losses = nll(policy, mask)
        numerator = loss_numerator(losses, pear.weights, ids, mask, reduction=reduction)
        assert not pear.weights.requires_grad
        gradient, behavior_gradient = torch.autograd.grad(
            numerator, [policy, behavior], allow_unused=True
        )
        assert behavior_gradient is None
        scale = 1.0
        if reduction == "seq_mean":
            scale = 1.0 / torch.bincount(ids[mask], minlength=len(lengths))[ids]
        close(gradient, -pear.weights * scale)


@QUICK
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), SEEDS, st.sampled_from(REDUCTIONS))
def test_property_7_microbatches_and_ranks_change_nothing(lengths, seed, reduction):
    batch = make_batch(lengths, seed)
    policy, behavior, ids, mask = batch

    def loss_and_gradient(splits):
        leaf = policy.clone().requires_grad_()
        numerator, denominator = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for split in splits:
            at = torch.isin(ids, torch.tensor(split)).nonzero().squeeze(1)
            part = (leaf[at], behavior[at], ids[at], mask[at])
            weights = pear_token_weights(*part, gamma=0.999).weights
            numerator = numerator + loss_numerator(
                nll(part[0], part[3]), weights, *part[2:], reduction=reduction
            )
            denominator += loss_denominator(weights, *part[2:], reduction=reduction)
        loss = numerator / denominator
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    num = len(lengths)
    whole, whole_gradient = loss_and_gradient([list(range(num))])
    lists = [t.tolist() for t in batch]
    weights = reference.flat_weights(*lists, mode="token", gamma=0.999)
    losses = [-value for value in lists[0]]
    assert whole == pytest.approx(
        reference.loss(losses, weights, *lists[2:], reduction=reduction), rel=1e-5
    )
    one_each = [[sequence] for sequence in range(num)]
    two_ranks = [list(range(0, num, 2)), list(range(1, num, 2))]
    for splits in (one_each, two_ranks, [[], list(range(num))]):
        loss, gradient = loss_and_gradient(splits)
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("lengths", [[32768], [1, 20000, 12767]])
@pytest.mark.parametrize("scale", [1.0, 1e4, float("inf")])
def test_property_8_everything_is_finite_at_any_length_and_ratio(lengths, scale):
    policy, _, ids, mask = make_batch(lengths, 0)
    for sign in (torch.ones_like(policy), -torch.ones_like(policy), torch.randn_like(policy)):
        for pear in all_modes(policy, policy - sign * scale, ids, mask).values():
            kept = pear.weights[mask]
            assert kept.isfinite().all()
            assert kept.min().item() >= 4.5399e-05
            assert kept.max().item() <= 148.4132


def test_property_8_float64_sums_hold_over_32k_tokens():
    batch = make_batch([32768], 1, masked_share=0.0, spread=0.03)
    got = pear_token_weights(*batch, gamma=0.999).log_weights
    ratios = (batch[0].double() - batch[1].double()).clamp(-0.08, 0.3)
    after = ratios.flip(0).cumsum(0).flip(0) - ratios
    places = torch.arange(32767, -1, -1)
    expected = after + places * torch.tensor(0.999, dtype=torch.float64).log()
    assert expected.abs().max() > 20  # or the test would not reach far
    torch.testing.assert_close(got.double(), expected, rtol=1e-7, atol=1e-6)


def test_property_8_bfloat16_logits_give_nearly_the_weights_of_float32():
    # What is left is the rounding of the logits themselves: up to 2^-9 of a logit per token, summed
    # over what follows. It stays below 1e-2 for logits of size 1 and 8 tokens, not for any T.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 500, generator=generator)
    chosen = torch.randint(500, (64,), generator=generator)
    exact = chosen_logprobs_from_logits(logits, chosen)
    rounded = chosen_logprobs_from_logits(logits.bfloat16(), chosen)
    behavior = exact + 0.1 * torch.randn(64, generator=generator)
    ids, mask = torch.arange(64) // 8, torch.ones(64, dtype=torch.bool)

    def weights(policy):
        return pear_token_weights(policy, behavior, ids, mask, gamma=0.999).weights

    error = (weights(exact) - weights(rounded)).abs().max().item()
    assert 0.0 < error < 1e-2
    # Our own arithmetic adds nothing to that rounding, which a bfloat16 log-softmax would.
    same = torch.log_softmax(logits.bfloat16().double(), -1)[torch.arange(64), chosen]
    assert (weights(same) - weights(rounded)).abs().max().item() < 1e-5
    lossy = torch.log_softmax(logits.bfloat16(), -1)[torch.arange(64), chosen]
    assert (weights(exact) - weights(lossy)).abs().max().item() > 2e-2


def test_property_9_a_forward_kl_base_is_zero_between_equal_policies():
    logprobs = torch.log_softmax(torch.randn(7, 30, dtype=torch.float64), -1).requires_grad_()
    behavior = logprobs.detach()
    losses = (behavior.exp() * (behavior - logprobs)).sum(-1)
    batch = make_batch([7], 3)
    weights = pear_token_weights(*batch, gamma=0.999).weights
    assert loss_numerator(losses, weights, *batch[2:], reduction="sum").item() == 0.0


def test_nan_outside_the_mask_reaches_no_gradient():
    policy = torch.tensor([torch.nan, -1.0, -torch.inf, -0.5], requires_grad=True)
    mask = torch.tensor([False, True, False, True])
    ids = torch.zeros(4, dtype=torch.long)
    bad = torch.tensor([torch.inf, 2.0, torch.nan, 3.0])
    expected = {nll: [0, -2.0, 0, -3.0]}
    p = [torch.tensor(-1.0).exp().item(), torch.tensor(-0.5).exp().item()]
    expected[dft] = [0, -2.0 * p[0], 0, -3.0 * p[1]]  # p is frozen: no product rule
    for base, want in expected.items():
        numerator = loss_numerator(base(policy, mask), bad, ids, mask, reduction="sum")
        (gradient,) = torch.autograd.grad(numerator, policy)
        assert gradient.tolist() == pytest.approx(want)
    # Losses that are themselves NaN outside the mask are selected away too.
    numerator = loss_numerator(-policy, bad, ids, mask, reduction="seq_mean")
    assert numerator.item() == pytest.approx((2.0 * 1.0 + 3.0 * 0.5) / 2)
    assert torch.autograd.grad(numerator, policy)[0].tolist() == [0, -1.0, 0, -1.5]


def test_dft_is_p_times_nll():
    policy = torch.tensor([0.5, 0.25]).log()
    losses = dft(policy, torch.tensor([True, True]))
    torch.testing.assert_close(losses, torch.tensor([0.346574, 0.346574]), atol=1e-6, rtol=0)


def test_mean_one_rescaling():
    weights = torch.tensor([1.0, 3.0, 9.0, 6.0])
    ids, mask = torch.tensor([0, 0, 0, 1]), torch.tensor([True, True, False, True])
    assert mean_one_over_sequence(weights, ids, mask).tolist() == [0.5, 1.5, 0.0, 1.0]
    # Another rank holds weights of sum 10 over 2 tokens: (10 + 10) over 5 tokens.
    scaled = mean_one_over_batch(weights, mask, weight_sum=20.0, num_tokens=5.0)
    assert scaled.tolist() == [0.25, 0.75, 0.0, 1.5]
    with pytest.raises(ValueError, match=r"weight_sum=0\.0"):
        mean_one_over_batch(weights, mask, weight_sum=0.0, num_tokens=5.0)


def test_the_denominator_of_signed_weights_is_positive():
    mask, ids = torch.tensor([True, True]), torch.tensor([0, 1])
    weights = torch.tensor([-0.5, 2.0])
    assert loss_denominator(weights, ids, mask, reduction="weight_norm").item() == 2.5
