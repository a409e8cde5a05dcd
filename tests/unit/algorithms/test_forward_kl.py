"""Forward KL over kept candidates: by hand, against a full softmax, and its bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.candidate_logprobs import candidate_and_rest_logprobs, candidate_logprobs
from pear_ray.algorithms.forward_kl import MIN_LOG_MASS, forward_kl_top_k, log_rest
from pear_ray.algorithms.full_kl import full_kl
from pear_ray.algorithms.pear import pear_token_weights
from pear_ray.algorithms.reduce import loss_numerator

QUICK = settings(deadline=None, max_examples=50)
SEEDS = st.integers(0, 2**31)
NAN = math.nan


def everything(count):
    return torch.ones(count, dtype=torch.bool)


def make(seed, *, num_tokens=6, vocab=9, k=4, spread=1.0):
    """Float64 log-softmax rows of a policy and a teacher, and each row's likeliest teacher ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, num_tokens, vocab, generator=generator, dtype=torch.float64)
    policy, behavior = torch.log_softmax(logits, -1)
    ids = behavior.topk(k, dim=1).indices
    return policy, behavior, ids


def kept(policy, behavior, ids, **kwargs):
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = (policy.gather(1, ids), behavior.gather(1, ids), mask, everything(len(ids)))
    return forward_kl_top_k(*rows, **kwargs)


def straightforward(policy, behavior, ids, variant):
    """Bucket by bucket from full distributions; probabilities, no log-space."""
    losses = []
    for log_p, log_q, row in zip(policy, behavior, ids, strict=True):
        p, q = log_p.exp()[row], log_q.exp()[row]
        if variant == "tail":
            p, q = torch.cat([p, (1 - p.sum())[None]]), torch.cat([q, (1 - q.sum())[None]])
        else:
            p, q = p / p.sum(), q / q.sum()
        losses.append((q * (q / p).log()).sum())
    return torch.stack(losses)


def test_by_hand():
    # Row 0: teacher .5, .25 and a rest of .25; policy .25, .25 and a rest of .5.
    # Row 1: one candidate, teacher .5, policy .125. Row 2 does not train.
    behavior = torch.tensor([[0.5, 0.25], [0.5, NAN], [NAN, 0.9]]).log()
    policy = torch.tensor([[0.25, 0.25], [0.125, NAN], [NAN, 0.9]]).log().requires_grad_()
    candidates = torch.tensor([[True, True], [True, False], [True, True]])
    mask = torch.tensor([True, True, False])
    tail = forward_kl_top_k(policy, behavior, candidates, mask)
    # .5 ln 2 + .25 ln 1 + .25 ln(1/2) = .346574 - .173287
    # .5 ln 4 + .5 ln(.5 / .875) = .693147 - .279808
    assert tail.tolist() == pytest.approx([0.173287, 0.413339, 0.0], abs=1e-6)
    # d / d log p_k = -q_k + Q p_k / P: -.5 + .25 * .25 / .5, then -.25 + .125; -.5 + .5 / 7.
    (gradient,) = torch.autograd.grad(tail.sum(), policy)
    expected = [-0.375, -0.125, -0.5 + 0.5 / 7, 0, 0, 0]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-6)

    renormalised = forward_kl_top_k(policy, behavior, candidates, mask, variant="renormalised")
    # Teacher 2/3, 1/3 and policy 1/2, 1/2: 2/3 ln(4/3) + 1/3 ln(2/3). One id is always sure: 0.
    assert renormalised.tolist() == pytest.approx([0.056633, 0.0, 0.0], abs=1e-6)
    (gradient,) = torch.autograd.grad(renormalised.sum(), policy)
    expected = [1 / 2 - 2 / 3, 1 / 2 - 1 / 3, 0, 0, 0, 0]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-6)

    # Half of the policy's mass is in the rest either way, were it known exactly.
    rest = torch.tensor([0.5, 0.875, NAN]).log()
    given_rest = forward_kl_top_k(policy, behavior, candidates, mask, policy_rest_logprobs=rest)
    torch.testing.assert_close(given_rest, tail, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["tail", "renormalised"])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_through_hidden_states_are_those_of_full_softmaxes(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, vocab, k = 11, 40, 5
    hidden = torch.randn(num_tokens, 8, generator=generator).requires_grad_()
    head = torch.randn(vocab, 8, generator=generator).requires_grad_()
    behavior = torch.log_softmax(torch.randn(num_tokens, vocab, generator=generator), -1)
    ids = behavior.topk(k, dim=1).indices
    ids = ids.masked_fill(torch.arange(k) >= torch.arange(1, num_tokens + 1)[:, None], -1)
    upstream = torch.randn(num_tokens, generator=generator)
    mask = torch.arange(num_tokens) != 6

    leaves = [each.detach().double().requires_grad_() for each in (hidden, head)]
    full = torch.log_softmax(leaves[0] @ leaves[1].t(), -1)
    rows = [row[row >= 0] for row in ids]
    want = straightforward(full, behavior.double(), rows, variant) * mask
    expected = torch.autograd.grad((want * upstream).sum(), leaves)

    at = (behavior.gather(1, ids.clamp(min=0)), ids >= 0, mask)
    logprobs, rest = candidate_and_rest_logprobs(hidden, head, ids, chunk_tokens=3)
    options = [{"variant": variant}]
    if variant == "tail":
        options.append({"policy_rest_logprobs": rest})
    for kwargs in options:
        got = forward_kl_top_k(logprobs, *at, **kwargs)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad((got * upstream).sum(), [hidden, head], retain_graph=True)
        for gradient, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-4)


@QUICK
@given(SEEDS, st.integers(1, 9), st.sampled_from([0.1, 1.0, 5.0]))
def test_the_tail_kl_is_between_0_and_the_full_kl_and_grows_with_k(seed, k, spread):
    policy, behavior, ids = make(seed, k=k, spread=spread)
    full = (behavior.exp() * (behavior - policy)).sum(1)
    tail = kept(policy, behavior, ids)
    assert (tail >= -1e-12).all()
    assert (tail <= full + 1e-9).all()
    assert (kept(policy, behavior, ids[:, : max(1, k - 1)]) <= tail + 1e-9).all()
    assert (kept(policy, behavior, ids, variant="renormalised") >= -1e-12).all()
    if k == policy.shape[1]:
        torch.testing.assert_close(tail, full, rtol=1e-6, atol=1e-9)
    for variant in ("tail", "renormalised"):
        same = kept(behavior, behavior, ids, variant=variant)
        torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)


@QUICK
@given(SEEDS, st.integers(1, 8))
def test_the_tail_kl_is_that_of_the_kept_mass_and_of_what_is_within_it(seed, k):
    # Chain rule: KL(tail) = KL(kept or not) + q(kept) KL(renormalised).
    policy, behavior, ids = make(seed, k=k)
    p, q = policy.gather(1, ids).exp().sum(1), behavior.gather(1, ids).exp().sum(1)
    coarse = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    within = kept(policy, behavior, ids, variant="renormalised")
    torch.testing.assert_close(kept(policy, behavior, ids), coarse + q * within)


def test_the_renormalised_kl_may_be_above_the_full_one_and_blind_to_lost_mass():
    behavior = torch.tensor([[0.25, 0.25, 0.5]]).log()
    policy, lost = torch.tensor([[0.4, 0.1, 0.5]]).log(), torch.tensor([[0.005, 0.005, 0.99]]).log()
    ids = torch.tensor([[0, 1]])
    # Full and tail: .25 ln(.25/.4) + .25 ln(.25/.1) = .111572; renormalised: twice that.
    assert kept(policy, behavior, ids).tolist() == pytest.approx([0.111572], abs=1e-6)
    twice = kept(policy, behavior, ids, variant="renormalised")
    assert twice.tolist() == pytest.approx([0.223144], abs=1e-6)
    # A policy with 99 % of its mass elsewhere: renormalised sees nothing, tail
    # .5 ln(.5/.01) + .5 ln(.5/.99) = 1.956012 - .341548.
    assert kept(lost, behavior, ids, variant="renormalised").tolist() == pytest.approx([0.0])
    assert kept(lost, behavior, ids).tolist() == pytest.approx([1.614464], abs=1e-5)


@QUICK
@given(SEEDS, st.permutations(range(6)), st.integers(0, 3))
def test_order_of_rows_and_padding_columns_change_nothing(seed, order, num_padding):
    policy, behavior, ids = make(seed)
    rows = [each.gather(1, ids)[list(order)] for each in (policy, behavior)]
    padding = torch.full((6, num_padding), NAN, dtype=torch.float64)
    padded = [torch.cat([padding, each.flip(1)], dim=1) for each in rows]
    mask = torch.cat([padding.isinf(), torch.ones_like(ids, dtype=torch.bool)], dim=1)
    for variant in ("tail", "renormalised"):
        got = forward_kl_top_k(*padded, mask, everything(6), variant=variant)
        expected = kept(policy, behavior, ids, variant=variant)[list(order)]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_policy_surer_than_its_teacher_is_pulled_back_where_its_rest_is_known():
    # Policy logits 40, 0, 0, 0; the teacher gives id 0 a mass of .9 and is not asked for more.
    hidden = torch.ones(1, 1)
    head = torch.tensor([[40.0], [0.0], [0.0], [0.0]], requires_grad=True)
    ids, behavior = torch.tensor([[0]]), torch.tensor([[0.9]]).log()
    logprobs, rest = candidate_and_rest_logprobs(hidden, head, ids)
    at = (logprobs, behavior, ids >= 0, everything(1))
    known = forward_kl_top_k(*at, policy_rest_logprobs=rest)
    # .9 ln .9 + .1 (ln .1 - (ln 3 - 40)) = -.094824 + .1 * 36.598803
    assert known.item() == pytest.approx(3.565056, abs=1e-5)
    (gradient,) = torch.autograd.grad(known.sum(), head, retain_graph=True)
    # p - q on the kept id and on the rest, whose parts share it.
    assert gradient[:, 0].tolist() == pytest.approx([0.1, *[-0.1 / 3] * 3], abs=1e-6)
    # 1 - sum p is 0 in float32 and held at 16 eps = 1.907e-6: never above the true KL, no pull.
    blind = forward_kl_top_k(*at)
    want = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - math.log(2.0**-19))
    assert blind.item() == pytest.approx(want, abs=1e-5)
    (gradient,) = torch.autograd.grad(blind.sum(), head)
    assert gradient[:, 0].tolist() == pytest.approx([0.0] * 4, abs=1e-12)


def test_teachers_whose_kept_mass_is_all_there_is():
    # Rounded up to 1.0001 in all: no rest on the teacher's side, whatever the policy's.
    behavior = torch.tensor([[0.8, 0.2001], [1.0, 0.0]]).log()
    policy = torch.tensor([[0.8, 0.2], [0.5, 0.25]]).log().requires_grad_()
    kl = forward_kl_top_k(policy, behavior, torch.ones(2, 2, dtype=torch.bool), everything(2))
    assert kl.tolist() == pytest.approx([0.0001, math.log(2.0)], abs=1e-5)
    (gradient,) = torch.autograd.grad(kl.sum(), policy)
    expected = [-0.8, -0.2001, -1.0, 0.0]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    none = torch.full((2,), -math.inf)
    kl = forward_kl_top_k(
        policy,
        behavior,
        torch.ones(2, 2, dtype=torch.bool),
        everything(2),
        policy_rest_logprobs=none,
    )
    assert kl.tolist() == pytest.approx([0.0001, math.log(2.0)], abs=1e-5)


def test_the_log_of_the_rest_at_both_ends():
    def of(log_mass):
        return log_rest(torch.tensor([[log_mass]], dtype=torch.float64)).item()

    # ln(1 - e^-30) = -e^-30 to 13 digits; ln(1 - e^-1e-12) = ln 1e-12; ln(1 - 1/2).
    assert of(-30.0) == pytest.approx(-math.exp(-30.0), rel=1e-12)
    assert of(-1e-12) == pytest.approx(math.log(1e-12), rel=1e-12)
    assert of(-math.log(2.0)) == pytest.approx(-math.log(2.0), rel=1e-15)
    assert [of(0.0), of(1e-6), of(-1e-300)] == [MIN_LOG_MASS] * 3
    for log_mass in (-60.0, -1.0, -math.log(2.0), -1e-9, 0.0, 1e-6):
        leaf = torch.tensor([[log_mass]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(log_rest(leaf).sum(), leaf)
        want = 0.0 if log_mass >= 0 else -1 / math.expm1(-log_mass)  # -p / (1 - p)
        assert gradient.item() == pytest.approx(want, rel=1e-6)


def test_nan_outside_the_masks_reaches_neither_value_nor_gradient():
    policy, behavior, ids = make(0)
    policy, behavior = policy.gather(1, ids), behavior.gather(1, ids)
    candidates = torch.ones_like(ids, dtype=torch.bool)
    candidates[:, 3] = False
    mask = torch.arange(6) != 2
    rest = torch.full((6,), -1.0, dtype=torch.float64)
    for kwargs in ({}, {"variant": "renormalised"}, {"policy_rest_logprobs": rest}):
        clean = policy.clone().requires_grad_()
        want = forward_kl_top_k(clean, behavior, candidates, mask, **kwargs)
        (expected,) = torch.autograd.grad(want.sum(), clean)
        for garbage in (NAN, math.inf, -math.inf):
            unread = ~(candidates & mask[:, None])
            dirty = policy.masked_fill(unread, garbage).requires_grad_()
            teacher = behavior.masked_fill(unread, garbage).requires_grad_()
            more = {
                k: v.masked_fill(~mask, garbage) if k[0] == "p" else v for k, v in kwargs.items()
            }
            got = forward_kl_top_k(dirty, teacher, candidates, mask, **more)
            assert torch.equal(got, want)
            gradient, none = torch.autograd.grad(got.sum(), [dirty, teacher], allow_unused=True)
            assert torch.equal(gradient, expected)
            assert none is None


def test_pear_weighs_it_and_equal_policies_give_0():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=generator)
    head = torch.randn(30, 8, generator=generator).requires_grad_()
    behavior = torch.log_softmax(hidden @ head.detach().t(), -1)
    ids = behavior.topk(5, dim=1).indices
    flat = (torch.zeros(7, dtype=torch.long), everything(7))
    chosen = behavior[:, 0]
    weights = pear_token_weights(chosen, chosen + 0.1, *flat, gamma=0.999).weights
    losses = forward_kl_top_k(
        candidate_logprobs(hidden, head, ids), behavior.gather(1, ids), ids >= 0, everything(7)
    )
    loss = loss_numerator(losses, weights, *flat, reduction="token_mean")
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, head)
    assert gradient.abs().max().item() < 1e-4
    # All ids kept, it is the KL to a frozen reference: two ways to the same number.
    other = torch.randn(30, 8, generator=generator)
    every = torch.arange(30).expand(7, 30)
    logprobs, rest = candidate_and_rest_logprobs(hidden, other, every)
    tail = forward_kl_top_k(
        logprobs, behavior, every >= 0, everything(7), policy_rest_logprobs=rest
    )
    torch.testing.assert_close(tail, full_kl(hidden, other, hidden, head), rtol=1e-4, atol=1e-4)


def test_a_batch_without_loss_tokens():
    nothing = torch.empty(3, 0, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, dtype=torch.bool)
    losses = forward_kl_top_k(nothing, nothing, torch.empty(3, 0, dtype=torch.bool), mask)
    assert losses.tolist() == [0.0] * 3
    losses.sum().backward()


def test_what_is_no_distribution_is_refused():
    behavior = torch.tensor([[0.5, 0.2], [0.5, 0.2]]).log()
    candidates, mask = torch.tensor([[True, True], [False, False]]), everything(2)
    with pytest.raises(ValueError, match=r"position 1 has no candidate.*score\.top_k"):
        forward_kl_top_k(behavior, behavior, candidates, mask)
    forward_kl_top_k(behavior, behavior, candidates, torch.tensor([True, False]))
    candidates = torch.ones(2, 2, dtype=torch.bool)
    twins = torch.tensor([[0.5, 0.2], [0.8, 0.8]]).log()
    with pytest.raises(ValueError, match=r"position 1 add up to 1\.6000"):
        forward_kl_top_k(behavior, twins, candidates, mask)
    with pytest.raises(ValueError, match=r"position 0 add up to nan"):
        forward_kl_top_k(behavior, torch.full((2, 2), NAN), candidates, mask)
    with pytest.raises(ValueError, match="leave policy_rest_logprobs out"):
        forward_kl_top_k(
            behavior,
            behavior,
            candidates,
            mask,
            variant="renormalised",
            policy_rest_logprobs=behavior[:, 0],
        )
