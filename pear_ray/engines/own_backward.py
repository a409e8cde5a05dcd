"""Where parts of transformers' models get a backward pass of our own (norms, rotary)."""

import torch


def has_own_backward(*tensors: torch.Tensor) -> bool:
    """Whether ours computes with these: in float32, and not where torch.compile traces.

    In other dtypes transformers casts in places of its own, and a compiled layer has a backward
    pass that was made for it.
    """
    in_float32 = all(each.dtype is torch.float32 for each in tensors)
    return in_float32 and not torch.compiler.is_compiling()
