"""Log-probs of chosen tokens without a float32 copy of [token, vocab].

`F.linear_cross_entropy(reduction="none")` does the same for float32, but hands bfloat16 inputs back
a bfloat16 result: 0.03 nats off at -10, the size of PEAR's whole log-ratio clip. It also scales
temperature into rounded inputs and lets a masked NaN row into the head's gradient. Hence our own.
"""

from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def chosen_logprobs(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    chosen_ids: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Float32[Tensor, " token"]:
    """Log-probs (nats) of `chosen_ids` under `softmax(hidden @ head_weight.T / temperature)`.

    Differentiable in `hidden` and `head_weight`. Logits live one chunk at a time, in float32, and
    are made again in backward, for rows with a nonzero gradient only: masked rows cost nothing
    there, and their NaN or inf reaches no gradient. The head must have no bias.

    Args:
        hidden: Last hidden states, already shifted so that row t predicts `chosen_ids[t]`.
        head_weight: Output embedding; same dtype as `hidden`.
        chosen_ids: Token ids in [0, vocab).
        temperature: The sampler's temperature, above 0; divides the float32 logits.
        chunk_tokens: Rows per chunk; the peak is about 4 * chunk_tokens * vocab bytes.

    Raises:
        ValueError: An id outside the vocabulary, differing dtypes, a temperature not above 0.
    """
    _check_arguments(chosen_ids, head_weight.shape[0], temperature, chunk_tokens)
    if hidden.dtype != head_weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and head_weight {head_weight.dtype}; cast one, so that the "
            "product is rounded the way the model rounds it"
        )
    return _ChosenLogprobs.apply(hidden, head_weight, chosen_ids, temperature, chunk_tokens)


def chosen_logprobs_from_logits(
    logits: Float[Tensor, "token vocab"],
    chosen_ids: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Float32[Tensor, " token"]:
    """Log-probs (nats) of `chosen_ids` under `softmax(logits / temperature)`; differentiable.

    For models that only give logits: the float32 copy is one chunk at a time. Arguments and errors
    as in `chosen_logprobs`.
    """
    _check_arguments(chosen_ids, logits.shape[1], temperature, chunk_tokens)
    return _ChosenLogprobsFromLogits.apply(logits, chosen_ids, temperature, chunk_tokens)


@torch.no_grad()
def entropies_from_logits(
    logits: Float[Tensor, "token vocab"], *, temperature: float = 1.0, chunk_tokens: int = 256
) -> Float32[Tensor, " token"]:
    """Entropy (nats) of each row's `softmax(logits / temperature)`; a diagnostic, no gradient.

    Raises:
        ValueError: `temperature` is not above 0 or `chunk_tokens` is below 1.
    """
    _check_numbers(temperature, chunk_tokens)
    entropies = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    for start in range(0, logits.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        probs = torch.softmax(logits[rows].float() / temperature, dim=-1)
        # entr(0) = 0, where p * log p of a vocabulary entry masked to -inf would be NaN.
        entropies[rows] = torch.special.entr(probs).sum(-1)
    return entropies


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        chosen_ids: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        num_tokens = hidden.shape[0]
        log_normalizers = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        chosen = torch.empty_like(log_normalizers)
        # Autocast would quietly turn the float32 products below into bfloat16 ones.
        with torch.autocast(hidden.device.type, enabled=False):
            head = _operand(head_weight)
            for start in range(0, num_tokens, chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = _matmul_float32(hidden[rows], head.t()).div_(temperature)
                log_normalizers[rows] = logits.logsumexp(-1)
                chosen[rows] = logits.gather(1, chosen_ids[rows, None])[:, 0]
        ctx.save_for_backward(hidden, head_weight, chosen_ids, log_normalizers)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return chosen - log_normalizers

    @staticmethod
    @once_differentiable
    # once_differentiable hides the name of `ctx`.
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        hidden, head_weight, chosen_ids, log_normalizers = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        # Summed over chunks in float32: bfloat16 would drop late, small contributions.
        head_grad = torch.zeros_like(head_weight, dtype=torch.float32) if needs_head else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _operand(head_weight)
            for rows in grad_output.nonzero(as_tuple=True)[0].split(ctx.chunk_tokens):
                hidden_rows = hidden[rows]
                logits = _matmul_float32(hidden_rows, head.t()).div_(ctx.temperature)
                scale = grad_output[rows] / ctx.temperature
                logits_grad = _logits_grad_(logits, log_normalizers[rows], chosen_ids[rows], scale)
                logits_grad = logits_grad.to(head.dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = _matmul_float32(logits_grad, head).to(hidden.dtype)
                if head_grad is not None:
                    head_grad += _matmul_float32(logits_grad.t(), hidden_rows)
        if head_grad is not None:
            head_grad = head_grad.to(head_weight.dtype)
        return hidden_grad, head_grad, None, None, None


class _ChosenLogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, chosen_ids: Tensor, temperature: float, chunk_tokens: int
    ) -> Tensor:
        log_normalizers = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        chosen = torch.empty_like(log_normalizers)
        for start in range(0, logits.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            scaled = logits[rows].float() / temperature
            log_normalizers[rows] = scaled.logsumexp(-1)
            chosen[rows] = scaled.gather(1, chosen_ids[rows, None])[:, 0]
        ctx.save_for_backward(logits, chosen_ids, log_normalizers)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return chosen - log_normalizers

    @staticmethod
    @once_differentiable
    # once_differentiable hides the name of `ctx`.
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        logits, chosen_ids, log_normalizers = ctx.saved_tensors
        logits_grad = torch.zeros_like(logits)
        for rows in grad_output.nonzero(as_tuple=True)[0].split(ctx.chunk_tokens):
            scaled = logits[rows].float() / ctx.temperature
            scale = grad_output[rows] / ctx.temperature
            chunk_grad = _logits_grad_(scaled, log_normalizers[rows], chosen_ids[rows], scale)
            logits_grad[rows] = chunk_grad.to(logits.dtype)
        return logits_grad, None, None, None


def _logits_grad_(
    scaled_logits: Tensor, log_normalizers: Tensor, chosen_ids: Tensor, scale: Tensor
) -> Tensor:
    """`scale * (onehot(chosen) - softmax)`, written over `scaled_logits`."""
    grad = scaled_logits.sub_(log_normalizers[:, None]).exp_().neg_()
    grad.scatter_add_(1, chosen_ids[:, None], torch.ones_like(scale)[:, None])
    return grad.mul_(scale[:, None])


def _operand(matrix: Tensor) -> Tensor:
    """The matrix as `_matmul_float32` wants it; cast once here rather than in every chunk."""
    return matrix if matrix.is_cuda else matrix.float()


def _matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with a float32 result that was never rounded to a narrower type."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _check_numbers(temperature: float, chunk_tokens: int) -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} divides the logits; use a value above 0")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} makes no progress; use 1 or more")


def _check_arguments(
    chosen_ids: Tensor, vocab_size: int, temperature: float, chunk_tokens: int
) -> None:
    _check_numbers(temperature, chunk_tokens)
    if chosen_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(chosen_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"chosen_ids span [{low}, {high}] but the head has {vocab_size} rows; replace label "
            "padding such as -100 by a real id under a False loss mask"
        )
