"""vLLM's own C kernels for a CPU's small layers, which on x86 it has built and does not call.

It leaves norms to torch.compile there. Uncompiled they are six operations of PyTorch each, and a
fourteenth of an RL step of the 0.3M student. (Its kernel for SwiGLU's activation takes twice as
long as the two operations that it would stand for.)
"""

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_KERNELS = torch.ops._C  # noqa: SLF001 - there is no public name for them


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
