"""Our norm against those of transformers: values to the bit, gradients by autograd."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pear_ray.engines.norms import _RmsNorm, use_own_norms

WIDTH = 24


def made(norm: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """As transformers has it, and with ours, both with the same weight."""
    theirs = norm(WIDTH, eps=1e-5)
    with torch.no_grad():
        theirs.weight.normal_(generator=torch.Generator().manual_seed(3))
    ours = copy.deepcopy(theirs)
    use_own_norms(ours)
    return theirs, ours


def passes_through_ours(norm: nn.Module, hidden: torch.Tensor) -> bool:
    return type(norm(hidden.requires_grad_()).grad_fn).__name__ == "_RmsNormBackward"


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 7, WIDTH), (2, 5, 3, WIDTH)])
def test_values_and_gradients(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    theirs, ours = made(norm)
    generator = torch.Generator().manual_seed(4)
    hidden, direction = (torch.randn(shape, generator=generator) for _ in range(2))
    found = []
    for each in (theirs, ours):
        given = hidden.clone().requires_grad_()
        normed = each(given)
        normed.backward(direction)
        found.append((normed.detach(), given.grad, each.weight.grad))
    assert passes_through_ours(ours, hidden)
    (value, of_hidden, of_weight), (our_value, our_hidden, our_weight) = found
    assert torch.equal(our_value, value)
    torch.testing.assert_close(our_hidden, of_hidden, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(our_weight, of_weight, atol=1e-5, rtol=1e-5)


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: _RmsNorm.apply(*given, 1e-5), (hidden, weight))


def test_by_hand() -> None:
    """x = (3, 4): mean square 12.5, r = 1 / sqrt(12.5); gradient of y_1 for weights (2, 1)."""
    hidden = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([2.0, 1.0], requires_grad=True)
    normed = _RmsNorm.apply(hidden, weight, 0.0)
    torch.testing.assert_close(normed, torch.tensor([[1.697056, 1.131371]]))
    normed[0, 0].backward()
    # r (2 - 3 x 6 / (2 x 12.5)) and r (-4 x 6 / (2 x 12.5)); x_1 r and nothing
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.362039, -0.271529]]))
    torch.testing.assert_close(weight.grad, torch.tensor([0.848528, 0.0]))


def test_a_frozen_weight_has_no_gradient() -> None:
    _, ours = made(LlamaRMSNorm)
    ours.weight.requires_grad_(requires_grad=False)
    hidden = torch.randn(2, WIDTH, requires_grad=True)
    ours(hidden).sum().backward()
    assert ours.weight.grad is None
    assert hidden.grad is not None


def test_norms_that_compute_something_else_are_left_alone() -> None:
    theirs, ours = made(GemmaRMSNorm)  # 1 + weight
    hidden = torch.randn(2, WIDTH)
    assert not passes_through_ours(ours, hidden.clone())
    assert torch.equal(ours(hidden), theirs(hidden))


def test_bfloat16_goes_on_as_it_was() -> None:
    theirs, ours = made(LlamaRMSNorm)
    hidden = torch.randn(2, WIDTH).bfloat16()
    assert not passes_through_ours(ours.bfloat16(), hidden.clone())
    assert torch.equal(ours(hidden), theirs.bfloat16()(hidden))


def test_a_copy_has_weights_of_its_own() -> None:
    _, ours = made(LlamaRMSNorm)
    copied, hidden = copy.deepcopy(ours), torch.randn(2, WIDTH)
    before = ours(hidden)
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(ours(hidden), before)
    assert not copied(hidden).any()
