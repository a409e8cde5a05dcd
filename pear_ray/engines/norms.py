"""RMSNorm with a backward pass of its own, where it computes in float32.

PyTorch has a backward step for each operation of the one that transformers writes, and keeps the
normed values beside the input. Ours takes 6 % off training the 0.3M student on a CPU, 2 % at 7M.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from pear_ray.engines.own_backward import has_own_backward

TRIED_TOKENS = 3  # of the hidden states on which a norm is compared with ours


class _RmsNorm(torch.autograd.Function):
    """y = w x r with r = 1 / sqrt(mean(x^2) + epsilon), over the last dimension.

    With g the gradient of y and d the dimension: that of w is sum(g x r), and that of x is
    r (g w - x r^2 sum(g w x) / d).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        scale = hidden.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (gradient,) = grad_outputs
        hidden, weight, scale = ctx.saved_tensors
        product = gradient * hidden
        rows, scales = product.flatten(0, -2), scale.flatten()
        of_weight = rows.T.mv(scales) if ctx.needs_input_grad[1] else None
        along = rows.mv(weight).mul_(scales.pow(3)).div_(-hidden.shape[-1]).view_as(scale)
        of_hidden = torch.mul(gradient, weight, out=product).mul_(scale)
        return of_hidden.addcmul_(hidden, along), of_weight, None


class _OwnNorm(nn.Module):
    """In front of a norm of transformers, which goes on as it was where ours does not compute."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if not has_own_backward(hidden, weight):
            return super().forward(hidden)
        return _RmsNorm.apply(hidden, weight, self.variance_epsilon)


@functools.cache
def _own(norm: type[nn.Module]) -> type[nn.Module]:
    return type(norm.__name__, (_OwnNorm, norm), {})


def use_own_norms(model: nn.Module) -> None:
    """Have the norms of `model` that ours equals to the bit computed by it, in place."""
    for module in model.modules():
        is_theirs = not isinstance(module, _OwnNorm)
        if is_theirs and type(module).__name__.endswith("RMSNorm") and _is_ours(module):
            # A class, not a method of each: compiled layers share their graphs by it.
            module.__class__ = _own(type(module))


def _is_ours(norm: nn.Module) -> bool:
    """Whether a norm computes what ours does: on hidden states and with a weight by chance."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if [*norm.state_dict()] != ["weight"] or weight is None or not isinstance(epsilon, float):
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TRIED_TOKENS, len(weight), generator=generator)
    tried = torch.randn(len(weight), generator=generator)
    with torch.no_grad():
        theirs = functional_call(norm, {"weight": tried}, (hidden,))
        return torch.equal(_RmsNorm.apply(hidden, tried, epsilon), theirs)
