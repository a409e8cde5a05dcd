"""Compiled log-probs equal the plain function's: values, gradients, rounding and NaN rows."""

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from pear_ray.algorithms.compiled_logprobs import compiled_chosen_logprobs
from pear_ray.algorithms.logprobs import chosen_logprobs

VOCAB = 101
COMPILES = shutil.which(os.environ.get("CXX", "g++")) is not None
CASES = [
    ("aot_eager", 0.7),  # the same graphs, no code generated
    pytest.param(
        *("inductor", 1.0), marks=pytest.mark.skipif(not COMPILES, reason="needs a C++ compiler")
    ),
]


def make(num_tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator).to(dtype).requires_grad_()
    head = (0.5 * torch.randn(VOCAB, 16, generator=generator)).to(dtype).requires_grad_()
    chosen = torch.randint(VOCAB, (num_tokens,), generator=generator)
    return hidden, head, chosen, torch.randn(num_tokens, generator=generator)


def values_and_gradients(function, hidden, head, chosen, upstream, **settings):
    found = function(hidden, head, chosen, chunk_tokens=8, **settings)
    return found, *torch.autograd.grad((found * upstream).sum(), [hidden, head])


@pytest.mark.parametrize(("backend", "temperature"), CASES)
def test_equal_to_the_plain_function(backend, temperature):
    """For numbers of rows that leave other last chunks each time, from two graphs and one of 1."""
    torch._dynamo.reset()
    counters.clear()
    for num_tokens in (20, 37, 8, 30, 17):
        given = make(num_tokens)
        how = {"temperature": temperature}
        found = values_and_gradients(compiled_chosen_logprobs, *given, **how, backend=backend)
        wanted = values_and_gradients(chosen_logprobs, *given, **how)
        for ours, plain in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-6)
        if num_tokens == 20:
            assert counters["stats"]["unique_graphs"] == 2  # forward, backward
    assert counters["stats"]["unique_graphs"] == 4  # and of the one row that is left of 17


def test_bfloat16_inputs_give_float32_accuracy():
    hidden, head, chosen, upstream = make(21, torch.bfloat16)
    found = values_and_gradients(
        compiled_chosen_logprobs, hidden, head, chosen, upstream, backend="aot_eager"
    )
    wanted = values_and_gradients(chosen_logprobs, hidden, head, chosen, upstream)
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
    for ours, plain in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-5)


def test_rows_without_a_gradient_reach_none():
    hidden, head, chosen, upstream = make(9)
    poisoned = hidden.detach().clone()
    poisoned[4] = float("nan")
    kept = torch.arange(9) != 4
    found = compiled_chosen_logprobs(poisoned, head, chosen, backend="aot_eager")
    (gradient,) = torch.autograd.grad((found * upstream)[kept].sum(), head)
    whole = chosen_logprobs(hidden, head, chosen)
    (wanted,) = torch.autograd.grad((whole * upstream)[kept].sum(), head)
    assert found[4].isnan()
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen_ids": torch.tensor([0, VOCAB])}, "the head has 101 rows"),
        ({"temperature": 0.0}, "use a value above 0"),
        ({"chunk_tokens": 0}, "use 1 or more"),
    ],
)
def test_bad_input_is_refused_before_compiling(change, words):
    hidden, head, chosen, _ = make(2)
    counters.clear()
    given = {"hidden": hidden, "head_weight": head, "chosen_ids": chosen} | change
    with pytest.raises(ValueError, match=words):
        compiled_chosen_logprobs(**given)
    assert not counters["stats"]
