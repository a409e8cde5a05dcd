"""Exact entropies: by hand, and value and gradient against autograd on a full softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.entropy import exact_entropies


def test_entropies_by_hand():
    head = torch.tensor([[math.log(0.5)], [math.log(0.25)], [math.log(0.25)]])
    got = exact_entropies(torch.tensor([[1.0], [0.0]]), head)
    assert got.tolist() == pytest.approx([1.5 * math.log(2), math.log(3)])
    sure = exact_entropies(torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]]))
    assert sure.tolist() == [0.0]
    with pytest.raises(ValueError, match="temperature"):
        exact_entropies(torch.zeros(1, 1), head, temperature=0.0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_against_autograd_on_a_full_softmax(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 5, generator=generator).requires_grad_()
    head = torch.randn(11, 5, generator=generator).requires_grad_()
    scale = torch.randn(7, generator=generator)
    got = exact_entropies(hidden, head, temperature=temperature, chunk_tokens=3)
    logs = (hidden @ head.T / temperature).log_softmax(-1)
    expected = -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((got * scale).sum(), (hidden, head))
    theirs = torch.autograd.grad((expected * scale).sum(), (hidden, head))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
