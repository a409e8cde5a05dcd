"""Float32 logits of an output head, one chunk of rows at a time, forward and backward.

What every function needs that must not hold a float32 copy of [token, vocab]: logits are made for
a chunk, used and dropped, and made again in backward.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor


def check_head(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    *,
    temperature: float,
    chunk_tokens: int,
) -> None:
    """Refuse what would give wrong logits or none.

    Raises:
        ValueError: Differing dtypes, `temperature` not above 0, `chunk_tokens` below 1.
    """
    check_chunking(temperature=temperature, chunk_tokens=chunk_tokens)
    if hidden.dtype != head_weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and head_weight {head_weight.dtype}; cast one, so that the "
            "product is rounded the way the model rounds it"
        )


def check_chunking(*, temperature: float, chunk_tokens: int) -> None:
    """Refuse a division by zero and a loop without end.

    Raises:
        ValueError: `temperature` is not above 0 or `chunk_tokens` is below 1.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} divides the logits; use a value above 0")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} makes no progress; use 1 or more")


def head_operand(head_weight: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "vocab hidden"]:
    """The head as `row_logits` wants it; cast once here rather than in every chunk."""
    return head_weight if head_weight.is_cuda else head_weight.float()


def row_logits(
    hidden_rows: Float[Tensor, "row hidden"],
    head: Float[Tensor, "vocab hidden"],
    *,
    temperature: float,
) -> Float32[Tensor, "row vocab"]:
    """`hidden_rows @ head.T / temperature`, never rounded to a narrower type; free to overwrite."""
    logits = _matmul_float32(hidden_rows, head.t())
    # A division by 1 reads and writes all of them for the same bits.
    return logits if temperature == 1.0 else logits.div_(temperature)


def backward_through_head(
    logits_grad: Callable[[Tensor, Tensor], Tensor],
    rows: Int[Tensor, " row"],
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    *,
    needs_grad: tuple[bool, bool],
    temperature: float,
    chunk_tokens: int,
) -> tuple[Float[Tensor, "token hidden"] | None, Float[Tensor, "vocab hidden"] | None]:
    """Gradients of `hidden` and `head_weight`, from logits made again for `rows` only.

    Args:
        logits_grad: From some rows' numbers and their `row_logits`, which it may overwrite, the
            gradient of the logits before the temperature, float32 [row, vocab].
        rows: Rows with a gradient; no other is read, so NaN elsewhere reaches nothing.
        hidden: As in the forward pass.
        head_weight: As in the forward pass.
        needs_grad: Whether `hidden`, and whether `head_weight`, wants a gradient.
        temperature: As in the forward pass.
        chunk_tokens: Rows per chunk.
    """
    needs_hidden, needs_head = needs_grad
    hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
    # Summed over chunks in float32: bfloat16 would drop late, small contributions.
    head_grad = torch.zeros_like(head_weight, dtype=torch.float32) if needs_head else None
    head = head_operand(head_weight)
    for part in rows.split(chunk_tokens):
        hidden_rows = hidden[part]
        grad = logits_grad(part, row_logits(hidden_rows, head, temperature=temperature))
        grad = grad.to(head.dtype)
        if hidden_grad is not None:
            hidden_grad[part] = _matmul_float32(grad, head).to(hidden.dtype)
        if head_grad is not None:
            _add_product_(head_grad, grad.t(), hidden_rows)
        del grad  # or it would be held beside the next chunk's logits
    return hidden_grad, None if head_grad is None else head_grad.to(head_weight.dtype)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to the float32 `total`: in place, where there is a kernel that can."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            total += torch.mm(left, right, out_dtype=torch.float32)
        else:
            # A product of its own would be as large as the head.
            total.addmm_(left.float(), right.float())


def _matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with a float32 result that was never rounded to a narrower type."""
    # Autocast would quietly turn a float32 product into a bfloat16 one.
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
