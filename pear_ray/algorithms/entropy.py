"""Entropy of the policy over the whole vocabulary, with a gradient, a chunk of rows at a time."""

from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable

from pear_ray.algorithms.head_logits import (
    backward_through_head,
    check_head,
    head_operand,
    row_logits,
)


def exact_entropies(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Float32[Tensor, " token"]:
    """Entropy (nats) of each row's `softmax(hidden @ head_weight.T / temperature)`.

    Differentiable in `hidden` and `head_weight`: d H / d logit_v = -p_v (log p_v + H). The surprise
    of the sampled token has the same mean, but a gradient that is 0 on average: as a loss term it
    would do nothing. Logits live one chunk at a time and are made again in backward.

    Args:
        hidden: Last hidden states, shifted so that row t predicts what comes at t.
        head_weight: Output embedding, without bias; same dtype as `hidden`.
        temperature: The sampler's, above 0; divides the float32 logits.
        chunk_tokens: Rows per chunk; the peak is about 8 * chunk_tokens * vocab bytes.

    Raises:
        ValueError: Differing dtypes, `temperature` not above 0, `chunk_tokens` below 1.
    """
    check_head(hidden, head_weight, temperature=temperature, chunk_tokens=chunk_tokens)
    return _Entropies.apply(hidden, head_weight, temperature, chunk_tokens)


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, temperature: float, chunk_tokens: int
    ) -> Tensor:
        entropies = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        log_normalizers = torch.empty_like(entropies)
        head = head_operand(head_weight)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = row_logits(hidden[rows], head, temperature=temperature)
            log_normalizers[rows] = logits.logsumexp(-1)
            entropies[rows] = _plogp_(logits.sub_(log_normalizers[rows, None])).sum(-1).neg_()
            del logits  # or it would be held beside the next chunk's
        ctx.save_for_backward(hidden, head_weight, log_normalizers, entropies)
        ctx.settings = (temperature, chunk_tokens)
        return entropies.clone()

    @staticmethod
    @once_differentiable
    # once_differentiable hides the name of `ctx`.
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, log_normalizers, entropies = ctx.saved_tensors
        temperature, chunk_tokens = ctx.settings
        scale = grad_outputs[0] / temperature

        def logits_grad(rows: Tensor, logits: Tensor) -> Tensor:
            """`-g p (log p + H)`."""
            logprobs = logits.sub_(log_normalizers[rows, None])
            probs = logprobs.exp()
            # p = 0 where a vocabulary entry is masked to -inf: 0 * -inf would be NaN.
            shifted = torch.where(probs > 0, logprobs.add_(entropies[rows, None]), 0.0)
            return probs.mul_(shifted).mul_(-scale[rows, None])

        hidden_grad, head_grad = backward_through_head(
            logits_grad,
            scale.nonzero(as_tuple=True)[0],
            hidden,
            head_weight,
            needs_grad=ctx.needs_input_grad[:2],
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return hidden_grad, head_grad, None, None


def _plogp_(logprobs: Tensor) -> Tensor:
    """`p log p`, 0 where p is 0, written over `logprobs`."""
    probs = logprobs.exp()
    return logprobs.mul_(probs).masked_fill_(probs == 0, 0.0)
