"""KL to a frozen reference over the whole vocabulary, against a full float64 softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_bytes

from pear_ray.algorithms.full_kl import full_kl

NUM_TOKENS, VOCAB = 37, 101


def make(dtype=torch.float32, num_tokens=NUM_TOKENS):
    """Policy (width 16) and reference (width 9): hidden states and heads that ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_tokens, 16), (VOCAB, 16), (num_tokens, 9), (VOCAB, 9))
    return [
        (0.7 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for shape in shapes
    ]


def exact(tensors, temperature=1.0):
    leaves = [each.detach().double().requires_grad_() for each in tensors]
    policy = torch.log_softmax(leaves[0] @ leaves[1].t() / temperature, -1)
    reference = torch.log_softmax(leaves[2] @ leaves[3].t() / temperature, -1).detach()
    return leaves[:2], (reference.exp() * (reference - policy)).sum(-1)


def test_by_hand():
    # Policy (1/2, 1/2), reference (1/4, 3/4): KL = 1/4 ln(1/2) + 3/4 ln(3/2) = .130812.
    hidden, reference = torch.ones(1, 1), torch.ones(1, 1)
    head = torch.zeros(2, 1, requires_grad=True)
    kl = full_kl(hidden, head, reference, torch.tensor([[0.0], [math.log(3.0)]]))
    assert kl.tolist() == pytest.approx([0.130812], abs=1e-6)
    # The reverse would be 1/2 ln 2 + 1/2 ln(2/3) = .143841.
    kl.sum().backward()
    assert head.grad[:, 0].tolist() == pytest.approx([0.5 - 0.25, 0.5 - 0.75])  # p - p_ref


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 37, 256])
def test_values_and_gradients_are_those_of_a_full_softmax(temperature, chunk_tokens):
    tensors = make()
    got = full_kl(*tensors, temperature=temperature, chunk_tokens=chunk_tokens)
    leaves, want = exact(tensors, temperature)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    upstream[:3] = 0.0
    gradients = torch.autograd.grad((got * upstream).sum(), tensors, allow_unused=True)
    expected = torch.autograd.grad((want * upstream).sum(), leaves)
    for gradient, reference in zip(gradients[:2], expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)
    assert gradients[2:] == (None, None)  # the reference is frozen


def test_bfloat16_inputs_give_float32_accuracy_and_dtypes_may_differ_between_models():
    tensors = make(torch.bfloat16)
    got = full_kl(*tensors, chunk_tokens=8)
    assert got.dtype == torch.float32
    leaves, want = exact(tensors)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    gradients = torch.autograd.grad(got.sum(), tensors[:2])
    for gradient, reference in zip(gradients, torch.autograd.grad(want.sum(), leaves), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), reference, rtol=2**-8, atol=1e-4)
    wide = [each.float() for each in tensors[:2]]
    torch.testing.assert_close(full_kl(*wide, *tensors[2:]), got, rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(1e-4, 10.0), st.floats(0.0, 10.0))
def test_it_is_never_below_0_and_0_between_equal_models(seed, scale, change):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(5, 4, generator=generator)
    head = torch.randn(11, 4, generator=generator)
    other = head + change * torch.randn(11, 4, generator=generator)
    kl = full_kl(hidden, other, hidden, head)
    assert (kl >= 0).all()
    assert kl.isfinite().all()
    assert (full_kl(hidden, head, hidden, head) == 0).all()


def test_far_apart_models_stay_finite():
    # Each is sure of another id by 200 nats: the KL is 200 and p - p_ref is (-1, 1).
    hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [200.0]], requires_grad=True)
    kl = full_kl(hidden, head, torch.ones(1, 1), torch.tensor([[200.0], [0.0]]))
    assert kl.tolist() == [200.0]
    kl.sum().backward()
    assert head.grad[:, 0].tolist() == [-1.0, 1.0]


def test_a_masked_nan_row_reaches_no_gradient():
    tensors = make()
    mask = torch.arange(NUM_TOKENS) != 9
    clean = torch.autograd.grad(full_kl(*tensors, chunk_tokens=8)[mask].sum(), tensors[:2])
    poisoned = [each.detach().clone() for each in tensors]
    poisoned[0][9], poisoned[2][9] = math.nan, math.inf
    poisoned = [each.requires_grad_() for each in poisoned]
    dirty = torch.autograd.grad(full_kl(*poisoned, chunk_tokens=8)[mask].sum(), poisoned[:2])
    for left, right in zip(clean, dirty, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_batch_without_tokens():
    tensors = make(num_tokens=0)
    kl = full_kl(*tensors)
    assert kl.tolist() == []
    kl.sum().backward()
    assert tensors[1].grad.abs().sum().item() == 0.0


def test_models_that_cannot_be_compared_are_refused():
    hidden, head, reference, reference_head = make()
    with pytest.raises(ValueError, match=r"\(37, 101\) and the reference \(37, 100\)"):
        full_kl(hidden, head, reference, reference_head[:100])
    with pytest.raises(ValueError, match=r"\(37, 101\) and the reference \(36, 101\)"):
        full_kl(hidden, head, reference[1:], reference_head)
    with pytest.raises(ValueError, match="bfloat16"):
        full_kl(hidden, head, reference.bfloat16(), reference_head)
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        full_kl(hidden, head, reference, reference_head, temperature=-1.0)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        full_kl(hidden, head, reference, reference_head, chunk_tokens=0)


def test_the_peak_is_that_of_a_chunk_and_not_of_the_batch(tmp_path):
    num_tokens, vocab, chunk_tokens = 512, 5000, 32
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=True)
    reference = (torch.randn(num_tokens, 4), torch.randn(vocab, 4))

    def both_passes():
        full_kl(hidden, head, *reference, chunk_tokens=chunk_tokens).sum().backward()

    # Three chunk-sized buffers; the batch's logits of one model would be 16.
    assert peak_bytes(both_passes, tmp_path) < 3.25 * 4 * chunk_tokens * vocab
