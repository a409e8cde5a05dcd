"""KL from a frozen reference to the policy over the whole vocabulary, a chunk of rows at a time."""

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


def full_kl(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    reference_hidden: Float[Tensor, "reference_token reference_hidden"],
    reference_head_weight: Float[Tensor, "reference_vocab reference_hidden"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Float32[Tensor, " token"]:
    """KL(reference || policy) of each row in nats: `sum_v p_ref(v) (log p_ref(v) - log p(v))`.

    Exact, where an estimate from the row's own token would not be: that token came from the corpus
    and from neither model, so k1, k2 and k3 do not average to a KL. The gradient goes to `hidden`
    and `head_weight` only, from logits made again in backward. Never below 0.

    Args:
        hidden: The policy's last hidden states, shifted so that row t predicts what comes at t.
        head_weight: Its output embedding, without bias; same dtype as `hidden`.
        reference_hidden: The reference's hidden states at the same rows, of any width.
        reference_head_weight: Its output embedding, of the same ids.
        temperature: Divides the float32 logits of both; above 0.
        chunk_tokens: Rows per chunk; the peak is about 12 * chunk_tokens * vocab bytes.

    Raises:
        ValueError: The two differ in rows or vocabulary; a model's hidden states and head differ in
            dtype; `temperature` not above 0; `chunk_tokens` below 1.
    """
    for states, head in ((hidden, head_weight), (reference_hidden, reference_head_weight)):
        check_head(states, head, temperature=temperature, chunk_tokens=chunk_tokens)
    policy_shape = (hidden.shape[0], head_weight.shape[0])
    reference_shape = (reference_hidden.shape[0], reference_head_weight.shape[0])
    if policy_shape != reference_shape:
        raise ValueError(
            f"the policy has (rows, vocabulary) {policy_shape} and the reference "
            f"{reference_shape}; give both the same tokens, and cut a head that is padded beyond "
            "the tokenizer to the other's rows"
        )
    reference = (reference_hidden.detach(), reference_head_weight.detach())
    return _FullKl.apply(hidden, head_weight, *reference, temperature, chunk_tokens)


class _FullKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        reference_hidden: Tensor,
        reference_head_weight: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        kl = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        log_normalizers, reference_normalizers = torch.empty_like(kl), torch.empty_like(kl)
        head, reference_head = head_operand(head_weight), head_operand(reference_head_weight)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            kl[rows], log_normalizers[rows], reference_normalizers[rows] = _row_kl_(
                row_logits(hidden[rows], head, temperature=temperature),
                row_logits(reference_hidden[rows], reference_head, temperature=temperature),
            )
        ctx.save_for_backward(
            hidden,
            head_weight,
            reference_hidden,
            reference_head_weight,
            log_normalizers,
            reference_normalizers,
        )
        ctx.settings = (temperature, chunk_tokens)
        return kl.clamp_(min=0.0)  # only rounding is below 0

    @staticmethod
    @once_differentiable
    # once_differentiable hides the name of `ctx`.
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, reference_hidden, reference_head_weight = ctx.saved_tensors[:4]
        log_normalizers, reference_normalizers = ctx.saved_tensors[4:]
        temperature, chunk_tokens = ctx.settings
        scale = grad_outputs[0] / temperature
        reference_head = head_operand(reference_head_weight)

        def logits_grad(rows: Tensor, logits: Tensor) -> Tensor:
            """`g (p - p_ref)`."""
            probs = logits.sub_(log_normalizers[rows, None]).exp_()
            reference = row_logits(reference_hidden[rows], reference_head, temperature=temperature)
            reference_probs = reference.sub_(reference_normalizers[rows, None]).exp_()
            return probs.sub_(reference_probs).mul_(scale[rows, None])

        hidden_grad, head_grad = backward_through_head(
            logits_grad,
            scale.nonzero(as_tuple=True)[0],
            hidden,
            head_weight,
            needs_grad=ctx.needs_input_grad[:2],
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return hidden_grad, head_grad, None, None, None, None


def _row_kl_(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || policy) per row and both log-normalisers; writes over the logits.

    A function of its own, so that a chunk's logits are gone before the next chunk's are made.
    """
    log_normalizers, reference_normalizers = policy.logsumexp(-1), reference.logsumexp(-1)
    policy.sub_(log_normalizers[:, None])
    reference.sub_(reference_normalizers[:, None])
    reference_probs = reference.exp()
    kl = reference.sub_(policy).mul_(reference_probs).sum(-1)
    return kl, log_normalizers, reference_normalizers
