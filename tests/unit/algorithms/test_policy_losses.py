"""GSPO, CISPO, REINFORCE: by hand, against loops over rows, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms import policy_losses
from pear_ray.algorithms.reduce import loss_denominator, loss_numerator

QUICK = settings(deadline=None, max_examples=30)
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)
NAN = math.nan
CLIPS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"clip_low": 0.3, "clip_high": 0.5},
    "reinforce": {},
}


def losses_of(kind, policy, proximal, advantages, ids, mask):
    if kind == "gspo":
        return policy_losses.gspo_surrogate(
            policy, proximal, advantages, ids, mask, **CLIPS["gspo"]
        )
    function = {
        "grpo": policy_losses.clipped_surrogate,
        "cispo": policy_losses.cispo_losses,
        "reinforce": policy_losses.reinforce_losses,
    }[kind]
    return function(policy, proximal, advantages, mask, **CLIPS[kind])


def check(got, policy, *, values, gradients):
    assert got.losses.tolist() == pytest.approx(values, abs=1e-6)
    (found,) = torch.autograd.grad(got.losses.sum(), policy)
    assert found.tolist() == pytest.approx(gradients, abs=1e-6)


def test_gspo_by_hand():
    # Sequence 0: ratios 4 and 1, geometric mean 2. Sequence 1: ratio 1.1 and a masked NaN.
    policy = torch.tensor([math.log(0.4), math.log(0.5), math.log(0.55), NAN], requires_grad=True)
    proximal = torch.tensor([math.log(0.1), math.log(0.5), math.log(0.5), NAN])
    ids, mask = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False])
    clips = {"clip_low": 0.2, "clip_high": 0.5}
    good = torch.tensor([3.0, 3.0, 2.0, NAN])
    got = policy_losses.gspo_surrogate(policy, proximal, good, ids, mask, **clips)
    # A > 0: 2 is held at 1.5, without gradient; 1.1 passes.
    check(got, policy, values=[-4.5, -4.5, -2.2, 0.0], gradients=[0.0, 0.0, -2.2, 0.0])
    assert got.ratios.tolist() == pytest.approx([2.0, 2.0, 1.1, 0.0])
    assert got.clipped_high.tolist() == [True, True, False, False]
    # A < 0: the larger loss is the unclipped one, and all of it has its gradient.
    bad = torch.tensor([-3.0, -3.0, -2.0, NAN])
    got = policy_losses.gspo_surrogate(policy, proximal, bad, ids, mask, **clips)
    check(got, policy, values=[6.0, 6.0, 2.2, 0.0], gradients=[6.0, 6.0, 2.2, 0.0])
    assert not got.clipped_high.any()
    assert not got.clipped_low.any()


def test_cispo_by_hand():
    policy = torch.tensor([math.log(0.8), math.log(0.1), math.log(0.5), NAN], requires_grad=True)
    proximal = torch.tensor([math.log(0.2), math.log(0.5), math.log(0.4), NAN])
    advantages = torch.tensor([1.0, -2.0, 1.0, NAN])
    mask = torch.tensor([True, True, True, False])
    # Ratios 4, 1/5, 5/4 become the weights 3, 1/2, 5/4: clipped tokens keep a gradient.
    got = policy_losses.cispo_losses(
        policy, proximal, advantages, mask, clip_low=0.5, clip_high=2.0
    )
    values = [-3 * math.log(0.8), math.log(0.1), -1.25 * math.log(0.5), 0.0]
    check(got, policy, values=values, gradients=[-3.0, 1.0, -1.25, 0.0])
    assert got.clipped_high.tolist() == [True, False, False, False]
    assert got.clipped_low.tolist() == [False, True, False, False]
    got = policy_losses.cispo_losses(
        policy, proximal, advantages, mask, clip_low=1.0, clip_high=4.0
    )
    (free,) = torch.autograd.grad(got.losses.sum(), policy)
    assert free.tolist() == pytest.approx([-4.0, 0.4, -1.25, 0.0])  # -r A, no bound in force


def test_reinforce_by_hand():
    policy = torch.tensor([math.log(0.5), math.log(0.25), NAN], requires_grad=True)
    proximal = torch.tensor([math.log(0.25), math.log(0.25), NAN])
    mask = torch.tensor([True, True, False])
    got = policy_losses.reinforce_losses(policy, proximal, torch.tensor([2.0, -1.0, NAN]), mask)
    values = [2 * math.log(2), -math.log(4), 0.0]
    check(got, policy, values=values, gradients=[-2.0, 1.0, 0.0])
    assert got.ratios.tolist() == pytest.approx([2.0, 1.0, 0.0])


@pytest.mark.parametrize("function", [policy_losses.clipped_surrogate, policy_losses.cispo_losses])
def test_clips_that_are_bounds_are_refused(function):
    one, mask = torch.zeros(1), torch.tensor([True])
    with pytest.raises(ValueError, match="distances from 1"):
        function(one, one, one, mask, clip_low=0.2, clip_high=-0.1)
    ids = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="distances from 1"):
        policy_losses.gspo_surrogate(one, one, one, ids, mask, clip_low=1.2, clip_high=0.1)


def batch(lengths, seed, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    policy = -torch.rand(size, generator=generator, dtype=torch.float64) * 3
    proximal = policy + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)[ids]
    mask = torch.rand(size, generator=generator) > 0.2
    return policy.requires_grad_(), proximal, advantages, ids, mask


def peer(kind, policy, proximal, advantages, ids, mask):
    """(sum over tokens, mean over sequences of token means), written row by row from the papers."""
    clip = CLIPS[kind]
    totals = []
    for row in range(int(ids.max()) + 1):
        places = [t for t in range(len(ids)) if ids[t] == row and mask[t]]
        if not places:
            continue
        count = len(places)
        gap = [policy[t] - proximal[t] for t in places]
        if kind == "gspo":  # one number for the row, differentiated whole
            whole = (sum(gap) / count).exp()
            advantage = advantages[places[0]]
            low, high = 1 - clip["clip_low"], 1 + clip["clip_high"]
            surrogate = min(whole * advantage, min(max(whole, low), high) * advantage)
            totals.append((-surrogate * count, count))
            continue
        total = policy.new_zeros(())
        for t, step in zip(places, gap, strict=True):
            ratio, advantage = step.exp(), advantages[t]
            if kind == "grpo":
                low, high = 1 - clip["clip_low"], 1 + clip["clip_high"]
                total = total - min(ratio * advantage, min(max(ratio, low), high) * advantage)
            elif kind == "cispo":
                low, high = 1 - clip["clip_low"], 1 + clip["clip_high"]
                total = total - min(max(ratio.item(), low), high) * advantage * policy[t]
            else:
                total = total - advantage * policy[t]
        totals.append((total, count))
    nothing = 0.0 * policy.sum()  # where all is clipped there is still something to differentiate
    token = nothing + sum(total for total, _ in totals)
    sequence = nothing + sum(total / count for total, count in totals)
    return token, sequence, sum(count for _, count in totals), len(totals)


@pytest.mark.parametrize("kind", CLIPS)
@QUICK
@given(lengths=LENGTHS, seed=SEEDS)
def test_values_and_gradients_are_those_of_a_loop_over_rows(kind, lengths, seed):
    policy, proximal, advantages, ids, mask = batch(lengths, seed)
    if not mask.any():
        return
    got = losses_of(kind, policy, proximal, advantages, ids, mask)
    token, sequence, num_tokens, num_sequences = peer(kind, policy, proximal, advantages, ids, mask)
    ones = torch.ones(len(ids))
    for reduction, theirs, count in (
        ("token_mean", token, num_tokens),
        ("seq_mean", sequence, num_sequences),
    ):
        ours = loss_numerator(got.losses, ones, ids, mask, reduction=reduction)
        assert float(loss_denominator(ones, ids, mask, reduction=reduction)) == count
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
        (mine,) = torch.autograd.grad(ours, policy, retain_graph=True)
        (other,) = torch.autograd.grad(theirs, policy, retain_graph=True)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CLIPS)
@QUICK
@given(lengths=LENGTHS, seed=SEEDS)
def test_on_policy_every_loss_has_reinforces_gradient(kind, lengths, seed):
    """With a ratio of 1 they differ in value at most: the first update is the same one."""
    policy, _, advantages, ids, mask = batch(lengths, seed)
    got = losses_of(kind, policy, policy.detach(), advantages, ids, mask)
    assert set(got.ratios[mask].tolist()) <= {1.0}
    assert not (got.clipped_low | got.clipped_high).any()
    (gradient,) = torch.autograd.grad(got.losses.sum(), policy)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages, 0.0))


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@QUICK
@given(lengths=LENGTHS, seed=SEEDS)
def test_clipped_tokens_have_no_gradient_and_others_have(kind, lengths, seed):
    policy, proximal, advantages, ids, mask = batch(lengths, seed)
    got = losses_of(kind, policy, proximal, advantages, ids, mask)
    (gradient,) = torch.autograd.grad(got.losses.sum(), policy)
    clipped = got.clipped_low | got.clipped_high
    assert torch.equal(gradient != 0, mask & ~clipped)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("reduction", ["sum", "token_mean", "seq_mean"])
@QUICK
@given(lengths=LENGTHS, seed=SEEDS, data=st.data())
def test_microbatches_do_not_change_the_loss(kind, reduction, lengths, seed, data):
    """Cut between any two rows: the sums add up to the same loss and gradient."""
    policy, proximal, advantages, ids, mask = batch(lengths, seed)
    row = data.draw(st.integers(0, len(lengths)))
    cut = sum(lengths[:row])
    whole = slice(0, len(ids))

    def numerator(part):
        columns = (policy[part], proximal[part], advantages[part], ids[part], mask[part])
        losses = losses_of(kind, *columns).losses
        return loss_numerator(
            losses, torch.ones_like(losses), ids[part], mask[part], reduction=reduction
        )

    (once,) = torch.autograd.grad(numerator(whole), policy)
    parts = numerator(slice(0, cut)) + numerator(slice(cut, len(ids)))
    (cut_up,) = torch.autograd.grad(parts, policy)
    assert parts.item() == pytest.approx(numerator(whole).item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(cut_up, once, rtol=1e-5, atol=1e-6)
