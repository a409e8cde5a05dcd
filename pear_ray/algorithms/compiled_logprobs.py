"""`logprobs.chosen_logprobs` with what surrounds its matrix products compiled into single passes.

Between the products, a chunk's float32 logits are all there is to do, and that is bound by memory:
op by op forward and backward read or write them some twenty times, fused four times.
"""

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_ray.algorithms.head_logits import (
    backward_through_head,
    check_head,
    head_operand,
    row_logits,
)
from pear_ray.algorithms.logprobs import check_ids


def compiled_chosen_logprobs(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    chosen_ids: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
    backend: str = "inductor",
) -> Float32[Tensor, " token"]:
    """Log-probs (nats) of `chosen_ids` under `softmax(hidden @ head_weight.T / temperature)`.

    Arguments, errors, memory and gradient as in `logprobs.chosen_logprobs`, values to float32
    rounding; the first call takes seconds.

    Args:
        hidden: Last hidden states, already shifted so that row t predicts `chosen_ids[t]`.
        head_weight: Output embedding, without bias; same dtype as `hidden`.
        chosen_ids: Token ids in [0, vocab).
        temperature: The sampler's temperature, above 0; divides the float32 logits.
        chunk_tokens: Rows per chunk.
        backend: What generates code, as `torch.compile` names it.
    """
    check_head(hidden, head_weight, temperature=temperature, chunk_tokens=chunk_tokens)
    check_ids(chosen_ids, head_weight.shape[0])
    settings = (temperature, chunk_tokens, backend)
    return _CompiledLogprobs.apply(hidden, head_weight, chosen_ids, *settings)


class _CompiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        chosen_ids: Tensor,
        temperature: float,
        chunk_tokens: int,
        backend: str,
    ) -> Tensor:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        log_normalizers = torch.empty_like(logprobs)
        head, read = head_operand(head_weight), _compiled(_read_logits, backend)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = row_logits(hidden[rows], head, temperature=1.0)
            logprobs[rows], log_normalizers[rows] = read(logits, chosen_ids[rows], temperature)
            del logits  # or it would be held beside the next chunk's
        ctx.save_for_backward(hidden, head_weight, chosen_ids, log_normalizers)
        ctx.settings = (temperature, chunk_tokens, backend)
        return logprobs

    @staticmethod
    @once_differentiable
    # once_differentiable hides the name of `ctx`.
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, chosen_ids, log_normalizers = ctx.saved_tensors
        temperature, chunk_tokens, backend = ctx.settings
        scale = grad_outputs[0] / temperature  # [token]
        head_dtype = head_operand(head_weight[:0]).dtype
        make = _compiled(_logits_grad, backend)

        def logits_grad(rows: Tensor, logits: Tensor) -> Tensor:
            chunk = (chosen_ids[rows], log_normalizers[rows], scale[rows])
            return make(logits, *chunk, temperature, head_dtype)

        hidden_grad, head_grad = backward_through_head(
            logits_grad,
            scale.nonzero(as_tuple=True)[0],
            hidden,
            head_weight,
            needs_grad=ctx.needs_input_grad[:2],
            temperature=1.0,  # divided by within the pass that reads them
            chunk_tokens=chunk_tokens,
        )
        return hidden_grad, head_grad, None, None, None, None


# What tests wrap around every function would be compiled with it.
@no_type_check
def _read_logits(logits: Tensor, chosen_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen ids and the logarithms of what all are divided by, [row] each."""
    scaled = logits / temperature
    # Written out, because compilers know it as one pass over the row.
    largest = scaled.amax(-1, keepdim=True)
    total = (scaled - largest).exp().sum(-1, keepdim=True)
    log_normalizers = (largest + total.log())[:, 0]
    return scaled.gather(1, chosen_ids[:, None])[:, 0] - log_normalizers, log_normalizers


@no_type_check
def _logits_grad(
    logits: Tensor,
    chosen_ids: Tensor,
    log_normalizers: Tensor,
    scale: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """`scale * (onehot(chosen) - softmax)`, [row, vocab], in the dtype that products want."""
    probs = (logits / temperature - log_normalizers[:, None]).exp()
    # A comparison where `scatter_add_` would need a pass of its own.
    columns = torch.arange(logits.shape[1], device=logits.device)
    chosen = torch.where(columns == chosen_ids[:, None], scale[:, None], 0.0)
    return (chosen - scale[:, None] * probs).to(dtype)


@functools.cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    # Dynamic: the last chunk of a batch is shorter than the others, each time otherwise.
    return torch.compile(function, dynamic=True, backend=backend)
