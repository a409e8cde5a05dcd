"""Quicker kernels for a small model's layers on a CPU than those that vLLM calls there.

It leaves norms to torch.compile. Uncompiled they are six operations of PyTorch each, and a
fourteenth of an RL step of the 0.3M student; it has a C kernel for them that it does not call on
x86. (Its kernel for SwiGLU's activation takes twice as long as the two operations that it would
stand for.) And it packs weights for oneDNN, whose product of 64 tokens with a small weight takes
1.1 to 2 times as long as MKL's, and whose packing is a tenth of a weight sync.
"""

from typing import Any

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.layernorm import RMSNorm

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_KERNELS = torch.ops._C  # noqa: SLF001 - there is no public name for them
_vllms_choice = utils.dispatch_cpu_unquantized_gemm
# oneDNN is quicker from twice as many on, which a second-level cache does not hold.
NARROW_NUMBERS = 2**20


class KernelRMSNorm(RMSNorm):
    """RMSNorm in one kernel; with a residual the sum and the norm are written in place."""

    def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
        """As `forward_native`: [..., hidden] normed, and the sum with `residual` where given."""
        weight = self.weight.data
        is_plain = self.variance_size_override is None and weight.dtype is x.dtype
        if not is_plain or (residual is not None and not x.is_contiguous()):
            return self.forward_native(x, residual)
        if residual is None:
            out = torch.empty(x.shape, dtype=x.dtype)
            _KERNELS.rms_norm(out, x.contiguous(), weight, self.variance_epsilon)
            return out
        _KERNELS.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
        return x, residual


def use_kernels() -> None:
    """Have the models that vLLM builds from here on in this process call them."""
    KernelRMSNorm.name = "RMSNorm"
    op_registry_oot.setdefault("RMSNorm", KernelRMSNorm)
    utils.dispatch_cpu_unquantized_gemm = choose_product


def choose_product(layer: Any, remove_weight: bool) -> None:  # noqa: FBT001 - vLLM calls it so
    """Give a layer that is loaded what it computes its product with; a narrow one MKL's.

    Args:
        layer: With a float32 or other `weight`, [output, input].
        remove_weight: Whether that is then let go of.
    """
    weight = layer.weight
    is_narrow = weight.dtype is torch.float32 and weight.numel() <= NARROW_NUMBERS
    if not is_narrow or weight.ndim != 2 or not torch.backends.mkl.is_available():  # noqa: PLR2004
        _vllms_choice(layer, remove_weight)
        return
    layer.cpu_linear = _Product(weight.detach().t().contiguous())
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


class _Product:
    """What a layer computes with, in place of vLLM's packed weight; `turned` is [input, output]."""

    def __init__(self, turned: torch.Tensor) -> None:
        self.turned = turned

    def __call__(
        self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = x @ self.turned
        return found if bias is None else found.add_(bias)


def turned_weight(layer: Any) -> torch.Tensor | None:
    """The weight that a narrow layer computes with, [input, output]; None of other layers."""
    product = layer.cpu_linear
    return product.turned if isinstance(product, _Product) else None
