"""Log-probs of several ids per token and of the rest, against torch.log_softmax in float64."""

import math

import pytest
import torch
from peak_memory import peak_bytes

from pear_ray.algorithms.candidate_logprobs import (
    candidate_and_rest_logprobs,
    candidate_logprobs,
)
from pear_ray.algorithms.logprobs import chosen_logprobs

NUM_TOKENS, VOCAB, K = 37, 101, 6


def make(dtype=torch.float32, num_tokens=NUM_TOKENS):
    """Hidden states, head and ids: most rows padded, one without any candidate, one with a twin."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator).to(dtype).requires_grad_()
    head = (0.5 * torch.randn(VOCAB, 16, generator=generator)).to(dtype).requires_grad_()
    ids = torch.rand(num_tokens, VOCAB, generator=generator).argsort(1)[:, :K]
    kept = torch.randint(1, K + 1, (num_tokens, 1), generator=generator)
    ids = ids.masked_fill(torch.arange(K) >= kept, -1)
    if num_tokens:
        ids[4] = -1
        ids[5, :2] = 7
    return hidden, head, ids


def exact(hidden, head, ids, temperature=1.0):
    """Candidates and rest from a full float64 softmax; the rest by summing every other id."""
    hidden = hidden.detach().double().requires_grad_()
    head = head.detach().double().requires_grad_()
    logprobs = torch.log_softmax(hidden @ head.t() / temperature, -1)
    candidates = logprobs.gather(1, ids.clamp(min=0))
    kept = (ids[:, :, None] == torch.arange(VOCAB)).any(1)
    rest = logprobs.masked_fill(kept, -math.inf).logsumexp(1)
    return hidden, head, candidates, rest


def upstreams(ids):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(ids.shape, generator=generator).masked_fill(ids < 0, 0.0)
    return grad, torch.randn(len(ids), generator=generator)


def assert_gradients(got, inputs, want, exact_inputs, **tolerances):
    gradients = torch.autograd.grad(got, inputs)
    expected = torch.autograd.grad(want, exact_inputs)
    for gradient, reference, leaf in zip(gradients, expected, inputs, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.double(), reference, **tolerances)


def test_by_hand():
    # Logits ln 1 .. ln 4 over a sum of 10: p = .1, .2, .3, .4.
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).log()
    ids = torch.tensor([[3, 0, -1]])
    logprobs, rest = candidate_and_rest_logprobs(hidden, head, ids)
    assert logprobs[0].tolist() == pytest.approx([math.log(0.4), math.log(0.1), -math.inf])
    assert rest.tolist() == pytest.approx([math.log(0.2 + 0.3)])
    # d log p_3 / d hidden = ln 4 - E[logit] = ln 4 - (.2 ln 2 + .3 ln 3 + .4 ln 4).
    mean = 0.2 * math.log(2) + 0.3 * math.log(3) + 0.4 * math.log(4)
    (gradient,) = torch.autograd.grad(logprobs[0, 0], hidden, retain_graph=True)
    assert gradient.item() == pytest.approx(math.log(4) - mean, abs=1e-6)
    # d log rest / d hidden = E[logit | rest] - E[logit] = (.2 ln 2 + .3 ln 3) / .5 - mean.
    (gradient,) = torch.autograd.grad(rest[0], hidden)
    want = (0.2 * math.log(2) + 0.3 * math.log(3)) / 0.5 - mean
    assert gradient.item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 37, 256])
def test_values_and_gradients_are_those_of_log_softmax(temperature, chunk_tokens):
    hidden, head, ids = make()
    kwargs = {"temperature": temperature, "chunk_tokens": chunk_tokens}
    alone = candidate_logprobs(hidden, head, ids, **kwargs)
    got, rest = candidate_and_rest_logprobs(hidden, head, ids, **kwargs)
    *leaves, want, want_rest = exact(hidden, head, ids, temperature)
    real = ids >= 0
    assert torch.equal(alone, got)
    torch.testing.assert_close(got[real].double(), want[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest.double(), want_rest, rtol=1e-5, atol=1e-5)
    assert (got[~real] == -math.inf).all()
    grad, rest_grad = upstreams(ids)
    close = {"rtol": 1e-4, "atol": 1e-5}
    wanted = (want * grad)[real].sum()
    assert_gradients((alone * grad)[real].sum(), [hidden, head], wanted, leaves, **close)
    *leaves, want, want_rest = exact(hidden, head, ids, temperature)
    both = (got * grad)[real].sum() + (rest * rest_grad).sum()
    wanted = (want * grad)[real].sum() + (want_rest * rest_grad).sum()
    assert_gradients(both, [hidden, head], wanted, leaves, **close)


def test_bfloat16_inputs_give_float32_accuracy():
    hidden, head, ids = make(torch.bfloat16)
    got, rest = candidate_and_rest_logprobs(hidden, head, ids, chunk_tokens=8)
    assert (got.dtype, rest.dtype) == (torch.float32, torch.float32)
    *leaves, want, want_rest = exact(hidden, head, ids)
    real = ids >= 0
    # A bfloat16 result would be off by up to 0.03 at -10.
    torch.testing.assert_close(got[real].double(), want[real], rtol=0, atol=2e-5)
    torch.testing.assert_close(rest.double(), want_rest, rtol=0, atol=2e-5)
    grad, rest_grad = upstreams(ids)
    both = (got * grad)[real].sum() + (rest * rest_grad).sum()
    wanted = (want * grad)[real].sum() + (want_rest * rest_grad).sum()
    assert_gradients(both, [hidden, head], wanted, leaves, rtol=2**-8, atol=1e-4)


def test_autocast_does_not_round_the_products():
    hidden, head, ids = make()
    want = candidate_and_rest_logprobs(hidden, head, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = candidate_and_rest_logprobs(hidden, head, ids)
    assert all(map(torch.equal, got, want))


def test_one_column_is_chosen_logprobs_and_more_columns_change_none():
    hidden, head, ids = make()
    chosen = torch.arange(NUM_TOKENS)
    together = candidate_logprobs(hidden, head, torch.cat([chosen[:, None], ids], dim=1))
    assert torch.equal(together[:, 0], chosen_logprobs(hidden, head, chosen))
    assert torch.equal(together[:, 1:], candidate_logprobs(hidden, head, ids))
    # Scored tables hold int32.
    assert torch.equal(candidate_logprobs(hidden, head, ids.int()), together[:, 1:])


def test_nan_in_a_masked_row_or_from_padding_reaches_no_gradient():
    hidden, head, ids = make()
    mask = torch.arange(NUM_TOKENS) != 9

    def gradients(states, padding_factor):
        got, rest = candidate_and_rest_logprobs(states, head, ids, chunk_tokens=8)
        # Padding's -inf times 0 is NaN, and so is what comes back to it.
        factor = torch.where(ids < 0, padding_factor, 1.0)
        selected = torch.where(ids < 0, 0.0, got * factor)
        return torch.autograd.grad(selected[mask].sum() + rest[mask].sum(), [states, head])

    poisoned = hidden.detach().clone()
    poisoned[9] = math.nan
    clean, dirty = gradients(hidden, 1.0), gradients(poisoned.requires_grad_(), math.nan)
    for left, right in zip(clean, dirty, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    got = candidate_logprobs(hidden, head, ids)
    (gradient,) = torch.autograd.grad(got, hidden, torch.where(ids < 0, math.nan, 0.0))
    assert (gradient == 0).all()


def test_a_frozen_head_gets_no_gradient():
    hidden, head, ids = make()
    candidate_logprobs(hidden, head.detach(), ids)[ids >= 0].sum().backward()
    assert head.grad is None
    assert hidden.grad.abs().sum().item() > 0


def test_the_rest_of_a_sure_policy_and_of_a_whole_vocabulary():
    # Logits 40, 0, 0, 0: the rest is 3 exp(-40) = 1.3e-17, where 1 - p rounds to 0.
    hidden = torch.ones(1, 1, requires_grad=True)
    head = torch.tensor([[40.0], [0.0], [0.0], [0.0]], requires_grad=True)
    logprobs, rest = candidate_and_rest_logprobs(hidden, head, torch.tensor([[0]]))
    assert logprobs.item() == 0.0
    assert rest.item() == pytest.approx(math.log(3.0) - 40.0, abs=1e-5)
    # Raising each of the three raises their log mass by a third of it.
    (gradient,) = torch.autograd.grad(rest.sum(), head)
    assert gradient[:, 0].tolist() == pytest.approx([-1.0, 1 / 3, 1 / 3, 1 / 3], abs=1e-6)
    _, rest = candidate_and_rest_logprobs(hidden, head, torch.tensor([[3, 1, 0, 2]]))
    assert rest.item() == -math.inf
    (gradient,) = torch.autograd.grad(rest.sum(), head)
    assert gradient.isfinite().all()
    _, rest = candidate_and_rest_logprobs(hidden, head, torch.tensor([[-1, -1]]))
    assert rest.item() == 0.0
    assert torch.autograd.grad(rest.sum(), head)[0].tolist() == [[0.0]] * 4


def test_a_batch_without_tokens():
    hidden, head, ids = make(num_tokens=0)
    got, rest = candidate_and_rest_logprobs(hidden, head, ids)
    assert (got.tolist(), rest.tolist()) == ([], [])
    (got.sum() + rest.sum()).backward()
    assert head.grad.abs().sum().item() == 0.0


def test_impossible_arguments_are_refused():
    hidden, head, ids = make()
    for bad in (-2, 101):
        wrong = ids.clone()
        wrong[3, 1] = bad
        with pytest.raises(ValueError, match=rf"row 3 has candidate id {bad}, .* has 101 rows"):
            candidate_logprobs(hidden, head, wrong)
        with pytest.raises(ValueError, match="of the policy's vocabulary"):
            candidate_and_rest_logprobs(hidden, head, wrong)
    with pytest.raises(ValueError, match="no column"):
        candidate_logprobs(hidden, head, ids[:, :0])
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        candidate_logprobs(hidden, head, ids, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        candidate_logprobs(hidden, head, ids, chunk_tokens=0)
    with pytest.raises(ValueError, match="bfloat16"):
        candidate_and_rest_logprobs(hidden, head.bfloat16(), ids)


def test_the_peak_is_that_of_a_chunk_and_not_of_the_batch(tmp_path):
    num_tokens, vocab, chunk_tokens = 512, 5000, 32
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=True)
    ids = torch.randint(vocab, (num_tokens, 5))

    def both_passes():
        got, rest = candidate_and_rest_logprobs(hidden, head, ids, chunk_tokens=chunk_tokens)
        (got.sum() + rest.sum()).backward()

    chunk_bytes = 4 * chunk_tokens * vocab
    # Two chunk-sized buffers, and a head gradient of an eighth of one; the batch would take 16.
    assert peak_bytes(both_passes, tmp_path) < 2.5 * chunk_bytes
