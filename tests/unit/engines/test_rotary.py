"""Our rotation against those of transformers: values and gradients to the bit."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from pear_ray.engines.rotary import NAME, _own, _Rotary, use_own_rotary

FAMILIES = {
    "llama": (modeling_llama, modeling_llama.LlamaConfig, modeling_llama.LlamaAttention),
    "qwen3": (modeling_qwen3, modeling_qwen3.Qwen3Config, modeling_qwen3.Qwen3Attention),
    "cohere": (modeling_cohere, modeling_cohere.CohereConfig, modeling_cohere.CohereAttention),
}
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
}


def made(family: str) -> tuple[nn.Module, nn.Module]:
    """An attention layer as transformers has it, and with our rotation."""
    _, config, layer = FAMILIES[family]
    settings = config(**SIZES)
    settings._attn_implementation = "sdpa"
    torch.manual_seed(1)
    theirs = layer(settings, layer_idx=0)
    ours = copy.deepcopy(theirs)
    use_own_rotary(ours)
    return theirs, ours


def outputs(layer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of a forward and a backward pass over two rows of five tokens."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 5, 32, generator=generator).to(dtype).requires_grad_()
    angles = torch.randn(2, 5, 8, generator=generator)
    layer.zero_grad()
    found, _ = layer(hidden, (angles.cos().to(dtype), angles.sin().to(dtype)), None)
    found.square().sum().backward()
    gradients: dict[str, Any] = {name: each.grad for name, each in layer.named_parameters()}
    return {"output": found.detach(), "hidden": hidden.grad} | gradients


def nodes(layer: nn.Module, dtype: torch.dtype = torch.float32) -> set[str]:
    """Names of the steps of the backward pass."""
    hidden = torch.randn(1, 3, 32, dtype=dtype, requires_grad=True)
    angles = torch.randn(1, 3, 8, dtype=dtype)
    waiting, names = [layer(hidden, (angles, angles), None)[0].grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(type(node).__name__)
            waiting += [each for each, _ in node.next_functions]
    return names


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_values_and_gradients(family: str) -> None:
    theirs, ours = made(family)
    wanted, found = outputs(theirs), outputs(ours)
    assert torch.equal(found["output"], wanted["output"])
    # Those of norms before it are sums in another order: the tensor lies otherwise in memory.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert "_RotaryBackward" in nodes(ours)
    assert "_RotaryBackward" not in nodes(theirs)  # other models of the process are as they were


def test_gradients_by_finite_differences() -> None:
    """Also with angles that differ between the halves."""
    generator = torch.Generator().manual_seed(3)
    states, cos, sin = (
        torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    states.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: _Rotary.apply(given, cos, sin), (states,))


def test_a_quarter_turn_by_hand() -> None:
    """(1, 2, 3, 4) with cos 0 and sin 1 is (-3, -4, 1, 2); the gradient turns back."""
    states = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    turned = _Rotary.apply(states, torch.zeros(4), torch.ones(4))
    assert turned.tolist() == [-3.0, -4.0, 1.0, 2.0]
    turned.backward(torch.tensor([1.0, 0.0, 0.0, 5.0]))
    assert states.grad is not None
    assert states.grad.tolist() == [0.0, 5.0, -1.0, 0.0]


def test_a_rotation_of_another_kind_is_left_alone() -> None:
    """Cohere's turns neighbours, not halves."""
    theirs, ours = made("cohere")
    assert type(ours) is type(theirs)


def test_bfloat16_goes_on_as_it_was() -> None:
    theirs, ours = (each.bfloat16() for each in made("llama"))
    assert "_RotaryBackward" not in nodes(ours, torch.bfloat16)
    wanted, found = outputs(theirs, torch.bfloat16), outputs(ours, torch.bfloat16)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_every_axis_of_the_heads() -> None:
    """With heads before and behind the tokens, as families call it; gradients to the bit too."""
    theirs = getattr(modeling_llama, NAME)
    generator = torch.Generator().manual_seed(4)
    cos, sin = torch.randn(2, 1, 5, 8, generator=generator)
    for axis, shape in ((1, (1, 3, 5, 8)), (2, (1, 5, 3, 8))):
        states, directions = torch.randn(2, 2, *shape, generator=generator)
        found = []
        for rotate in (theirs, _own(theirs)):
            given = states.clone().requires_grad_()
            turned = rotate(*given, cos, sin, unsqueeze_dim=axis)
            torch.autograd.backward(turned, [*directions])
            found.append([*turned, given.grad])
        assert all(map(torch.equal, *found))
