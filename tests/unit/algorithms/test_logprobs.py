"""Memory-lean log-probs against torch.log_softmax: values, gradients, rounding and NaN rows."""

import math

import pytest
import torch
from peak_memory import peak_bytes

from pear_ray.algorithms.logprobs import (
    chosen_logprobs,
    chosen_logprobs_from_logits,
    entropies_from_logits,
    top_k_entropies,
)


def make(dtype=torch.float32, num_tokens=37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator).to(dtype).requires_grad_()
    head = (0.5 * torch.randn(101, 16, generator=generator)).to(dtype).requires_grad_()
    chosen = torch.randint(101, (num_tokens,), generator=generator)
    return hidden, head, chosen, torch.randn(num_tokens, generator=generator)


def exact(hidden, head, chosen, temperature):
    hidden = hidden.detach().double().requires_grad_()
    head = head.detach().double().requires_grad_()
    logits = hidden @ head.t() / temperature
    return hidden, head, torch.log_softmax(logits, -1)[torch.arange(len(chosen)), chosen]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 256])
def test_values_and_gradients_are_those_of_log_softmax(temperature, chunk_tokens):
    hidden, head, chosen, upstream = make()
    kwargs = {"temperature": temperature, "chunk_tokens": chunk_tokens}
    got = chosen_logprobs(hidden, head, chosen, **kwargs)
    exact_hidden, exact_head, want = exact(hidden, head, chosen, temperature)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((got * upstream).sum(), [hidden, head])
    expected = torch.autograd.grad((want * upstream).sum(), [exact_hidden, exact_head])
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)
    logits = (hidden @ head.t()).detach().requires_grad_()
    from_logits = chosen_logprobs_from_logits(logits, chosen, **kwargs)
    torch.testing.assert_close(from_logits, got.detach(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((from_logits * upstream).sum(), logits)
    plain = torch.log_softmax(logits / temperature, -1)[torch.arange(37), chosen]
    (reference,) = torch.autograd.grad((plain * upstream).sum(), logits)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_inputs_give_float32_accuracy(temperature):
    hidden, head, chosen, upstream = make(torch.bfloat16)
    got = chosen_logprobs(hidden, head, chosen, temperature=temperature, chunk_tokens=8)
    assert got.dtype == torch.float32
    exact_hidden, exact_head, want = exact(hidden, head, chosen, temperature)
    # A bfloat16 result would be off by up to 0.03 at -10.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    gradients = torch.autograd.grad((got * upstream).sum(), [hidden, head])
    expected = torch.autograd.grad((want * upstream).sum(), [exact_hidden, exact_head])
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), reference, rtol=2**-8, atol=1e-4)


def test_autocast_does_not_round_the_products():
    hidden, head, chosen, _ = make()
    want = chosen_logprobs(hidden, head, chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chosen_logprobs(hidden, head, chosen)
    assert torch.equal(got, want)


def test_a_frozen_head_gets_no_gradient():
    hidden, head, chosen, _ = make()
    chosen_logprobs(hidden, head.detach(), chosen).sum().backward()
    assert head.grad is None
    assert hidden.grad.abs().sum().item() > 0


def test_a_masked_nan_row_reaches_no_gradient():
    hidden, head, chosen, _ = make()
    mask = torch.ones(37, dtype=torch.bool)
    mask[5] = False
    clean = torch.autograd.grad(chosen_logprobs(hidden, head, chosen)[mask].sum(), [hidden, head])
    poisoned = hidden.detach().clone()
    poisoned[5] = math.nan
    poisoned.requires_grad_()
    losses = chosen_logprobs(poisoned, head, chosen)
    assert losses[5].isnan()
    dirty = torch.autograd.grad(losses[mask].sum(), [poisoned, head])
    for left, right in zip(clean, dirty, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    logits = torch.tensor([[math.nan, 1.0], [0.0, 0.0]], requires_grad=True)
    chosen_logprobs_from_logits(logits, torch.tensor([0, 1]))[1].backward()
    assert logits.grad.tolist() == [[0.0, 0.0], [-0.5, 0.5]]


def test_a_batch_without_tokens():
    hidden, head, chosen, _ = make(num_tokens=0)
    result = chosen_logprobs(hidden, head, chosen)
    assert result.tolist() == []
    result.sum().backward()
    assert head.grad.abs().sum().item() == 0.0


def test_entropies_by_hand():
    logits = torch.tensor(
        [[0.0, 0.0, -math.inf], [math.log(3.0), 0.0, -math.inf], [50.0, 0.0, 0.0]]
    )
    expected = [math.log(2.0), 0.75 * math.log(4 / 3) + 0.25 * math.log(4.0), 0.0]
    got = entropies_from_logits(logits, chunk_tokens=2)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    halved = entropies_from_logits(torch.tensor([[2 * math.log(3.0), 0.0]]), temperature=2.0)
    assert halved.tolist() == pytest.approx([expected[1]], abs=1e-6)


def test_impossible_arguments_are_refused():
    hidden, head, chosen, _ = make()
    for bad in (-100, 101):
        ids = chosen.clone()
        ids[3] = bad
        with pytest.raises(ValueError, match="head has 101 rows"):
            chosen_logprobs(hidden, head, ids)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        chosen_logprobs(hidden, head, chosen, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        chosen_logprobs(hidden, head, chosen, chunk_tokens=0)
    with pytest.raises(ValueError, match="bfloat16"):
        chosen_logprobs(hidden, head.bfloat16(), chosen)


def test_top_k_entropies_by_hand():
    # Logits ln 3, ln 1, ln 1, ln 1 and equal ones, width 4.
    head = torch.eye(4)
    hidden = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0], [1.0] * 4, [90.0, 0.0, 0.0, 0.0]])
    # The two likeliest renormalised: 3/4, 1/4; all four: 1/2, 1/6 x 3.
    two = 0.75 * math.log(4 / 3) + 0.25 * math.log(4.0)
    got = top_k_entropies(hidden, head, k=2, chunk_tokens=2)
    assert got.tolist() == pytest.approx([two, math.log(2.0), 0.0], abs=1e-6)
    assert (got >= 0).all()
    four = 0.5 * math.log(2.0) + 0.5 * math.log(6.0)
    got = top_k_entropies(hidden, head, k=4)
    assert got.tolist() == pytest.approx([four, math.log(4.0), 0.0], abs=1e-6)
    halved = top_k_entropies(2 * hidden[:1], head, k=2, temperature=2.0)
    assert halved.tolist() == pytest.approx([two], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 37, 256])
def test_top_k_entropies_are_those_of_a_full_softmax(dtype, chunk_tokens):
    hidden, head, _, _ = make(dtype)
    got = top_k_entropies(hidden, head, chunk_tokens=chunk_tokens)
    assert (got.dtype, got.requires_grad) == (torch.float32, False)
    top = (hidden.double() @ head.double().t()).softmax(-1).sort(descending=True).values[:, :20]
    top = top / top.sum(-1, keepdim=True)
    torch.testing.assert_close(got.double(), -(top * top.log()).sum(-1), rtol=1e-5, atol=1e-5)
    for k in (1, 102):
        with pytest.raises(ValueError, match=f"k={k} likeliest ids of a vocabulary of 101"):
            top_k_entropies(hidden, head, k=k)


def test_the_peak_is_that_of_a_chunk_and_not_of_the_batch(tmp_path):
    num_tokens, vocab, chunk_tokens = 512, 5000, 32
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=True)
    ids = torch.randint(vocab, (num_tokens,))

    def both_passes():
        chosen_logprobs(hidden, head, ids, chunk_tokens=chunk_tokens).sum().backward()

    # Two chunk-sized buffers (logsumexp makes one); the batch would take 16.
    most = 2.25 * 4 * chunk_tokens * vocab
    assert peak_bytes(both_passes, tmp_path) < most
    assert peak_bytes(lambda: top_k_entropies(hidden, head, chunk_tokens=32), tmp_path) < most
