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

from pear_ray.algorithms.candidate_logprobs import candidate_logprobs
from pear_ray.algorithms.head_logits import check_chunking, check_head, head_operand, row_logits

EAFT_K = 20  # ids that EAFT's entropy is over (arXiv 2601.02151)
MIN_ENTROPY_K = 2  # ln 1 = 0: one id has no entropy to compare with


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
        chunk_tokens: Rows per chunk; the peak is about 8 * chunk_tokens * vocab bytes.

    Raises:
        ValueError: An id outside the vocabulary, differing dtypes, a temperature not above 0.
    """
    check_ids(chosen_ids, head_weight.shape[0])  # here -1 is no padding
    return candidate_logprobs(
        hidden,
        head_weight,
        chosen_ids[:, None],
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )[:, 0]


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
    check_chunking(temperature=temperature, chunk_tokens=chunk_tokens)
    check_ids(chosen_ids, logits.shape[1])
    return _ChosenLogprobsFromLogits.apply(logits, chosen_ids, temperature, chunk_tokens)


@torch.no_grad()
def entropies_from_logits(
    logits: Float[Tensor, "token vocab"], *, temperature: float = 1.0, chunk_tokens: int = 256
) -> Float32[Tensor, " token"]:
    """Entropy (nats) of each row's `softmax(logits / temperature)`; a diagnostic, no gradient.

    Raises:
        ValueError: `temperature` is not above 0 or `chunk_tokens` is below 1.
    """
    check_chunking(temperature=temperature, chunk_tokens=chunk_tokens)
    entropies = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    for start in range(0, logits.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        probs = torch.softmax(logits[rows].float() / temperature, dim=-1)
        # entr(0) = 0, where p * log p of a vocabulary entry masked to -inf would be NaN.
        entropies[rows] = torch.special.entr(probs).sum(-1)
    return entropies


@torch.no_grad()
def top_k_entropies(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    *,
    k: int = EAFT_K,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Float32[Tensor, " token"]:
    """Entropy (nats) of each row's `k` likeliest ids, renormalised: 0 to ln k, no gradient.

    What EAFT (arXiv 2601.02151) gates its loss by; see `objectives.eaft`.

    Raises:
        ValueError: `k` is not in [2, vocab] (one id has no entropy); as in `chosen_logprobs`.
    """
    check_head(hidden, head_weight, temperature=temperature, chunk_tokens=chunk_tokens)
    if not MIN_ENTROPY_K <= k <= head_weight.shape[0]:
        raise ValueError(
            f"k={k} likeliest ids of a vocabulary of {head_weight.shape[0]} have no entropy to "
            f"compare with ln k; use {MIN_ENTROPY_K} up to the vocabulary, e.g. {EAFT_K}"
        )
    entropies = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    head = head_operand(head_weight)
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = row_logits(hidden[rows], head, temperature=temperature)
        probs = logits.topk(k, dim=-1, sorted=False).values.softmax(-1)
        entropies[rows] = torch.special.entr(probs).sum(-1)
    # Rounding: a probability just above 1 has an entropy just below 0.
    return entropies.clamp_(min=0.0)


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


def check_ids(chosen_ids: Int[Tensor, " token"], vocab_size: int) -> None:
    """Refuse ids that would be read from beyond the head.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    if chosen_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(chosen_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"chosen_ids span [{low}, {high}] but the head has {vocab_size} rows; replace label "
            "padding such as -100 by a real id under a False loss mask"
        )
