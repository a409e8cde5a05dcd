"""Rotary position embedding with a backward pass of its own, where it computes in float32.

PyTorch has a backward step for each slice, product and sum of the one that transformers writes.
Values and gradients here are the same to the bit. On a CPU, of 2,266 tokens, ours takes .8 (3 heads
of 32) or .6 (8 of 64) of the time forward, .6 or .4 backward.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pear_ray.engines.own_backward import has_own_backward

NAME = "apply_rotary_pos_emb"  # in the modelling code of every family that has it
TAKES = ["q", "k", "cos", "sin", "unsqueeze_dim"]
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Rotary(torch.autograd.Function):
    """y = x cos + (-x_2, x_1) sin, with x_1 and x_2 the halves of x's last dimension.

    With g the gradient of y, that of x is g cos + (g_2 sin_2, -g_1 sin_1).
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, *sin.chunk(2, dim=-1), sign=1)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[torch.Tensor, None, None]:
        (gradient,) = grad_outputs
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(gradient, cos, second, first, sign=-1), None, None


def _turned(
    states: torch.Tensor, cos: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor, *, sign: int
) -> torch.Tensor:
    """For x: x cos + sign (-x_2 upper, x_1 lower), x_1 and x_2 halves of its last dimension."""
    first, second = states.chunk(2, dim=-1)
    turned = states * cos
    left, right = turned.chunk(2, dim=-1)
    part = second * upper
    left.add_(part, alpha=-sign)
    right.add_(torch.mul(first, lower, out=part), alpha=sign)
    return turned


def _own(theirs: Rotate) -> Rotate:
    """Ours in place of `theirs`, which goes on as it was where ours does not compute."""

    @functools.wraps(theirs)
    def rotate(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not has_own_backward(q, k, cos, sin):
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    return rotate


def use_own_rotary(model: nn.Module) -> None:
    """Have the attention layers of `model` whose rotation ours equals to the bit use it, in place.

    Other models of the process keep transformers' own: tests compare with them.
    """
    for module in model.modules():
        changed = _with_own(type(module))
        if changed is not None:
            module.__class__ = changed


@functools.cache
def _with_own(layer: type[nn.Module]) -> type[nn.Module] | None:
    """A class whose forward pass is that of `layer` with our rotation; None where there is none."""
    forward: Any = layer.forward
    if NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    theirs = forward.__globals__.get(NAME)
    if theirs is None or hasattr(theirs, "__wrapped__") or not _is_ours(theirs):
        return None
    rebound = FunctionType(
        forward.__code__,
        {**forward.__globals__, NAME: _own(theirs)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    rebound.__kwdefaults__ = forward.__kwdefaults__
    rebound.__annotations__ = forward.__annotations__
    return type(layer.__name__, (layer,), {"forward": rebound})


def _is_ours(theirs: Rotate) -> bool:
    """Whether a rotation computes what ours does: on queries, keys and angles by chance."""
    if [*inspect.signature(theirs).parameters] != TAKES:
        return False
    generator = torch.Generator().manual_seed(0)
    queries, keys, cos, sin = (
        torch.randn(*shape, 8, generator=generator)
        for shape in ((1, 2, 3), (1, 1, 3), (1, 3), (1, 3))
    )
    with torch.no_grad():
        wanted = theirs(queries, keys, cos, sin)
        found = _own(theirs)(queries, keys, cos, sin)
    return all(map(torch.equal, found, wanted))
