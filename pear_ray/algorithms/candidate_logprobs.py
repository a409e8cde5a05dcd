"""Log-probs of several ids per token, and of all the others together, without [token, vocab].

What a distillation needs of the policy: its opinion on the ids that the teacher's scores name.
"""

from typing import Any

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

PADDING_ID = -1


def candidate_logprobs(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    candidate_ids: Int[Tensor, "token candidate"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Float32[Tensor, "token candidate"]:
    """Log-probs (nats) of each row's candidates under `softmax(hidden @ head_weight.T / T)`.

    `logprobs.chosen_logprobs` for more than one id, with the same memory, rounding and gradient; a
    candidate of -1 is padding: its log-prob is -inf (no mass) and no gradient passes it. An id may
    come twice in a row, so the token's own id can be one more column and needs no second pass.

    Args:
        hidden: Last hidden states, already shifted so that row t predicts what comes at t.
        head_weight: Output embedding, without bias; same dtype as `hidden`.
        candidate_ids: Ids in [0, vocab), -1 where a row has fewer than the others.
        temperature: Divides the float32 logits; above 0.
        chunk_tokens: Rows per chunk; the peak is about 8 * chunk_tokens * vocab bytes.

    Raises:
        ValueError: An id outside the vocabulary (the message has row and id), no column at all,
            differing dtypes, `temperature` not above 0, `chunk_tokens` below 1.
    """
    check_head(hidden, head_weight, temperature=temperature, chunk_tokens=chunk_tokens)
    _check_ids(candidate_ids, head_weight.shape[0])
    settings = (temperature, chunk_tokens, False)
    return _CandidateLogprobs.apply(hidden, head_weight, candidate_ids, *settings)[0]


def candidate_and_rest_logprobs(
    hidden: Float[Tensor, "token hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    candidate_ids: Int[Tensor, "token candidate"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> tuple[Float32[Tensor, "token candidate"], Float32[Tensor, " token"]]:
    """`candidate_logprobs`, and the log of the probability of all other ids together.

    The second is summed over the other ids' logits. `log(1 - sum p)` of the float32 log-probs has
    an error of some 1e-6 in the mass, which is all the mass there is where a policy is sure. Both
    are differentiable; -inf where a row's candidates are the whole vocabulary, 0 where it has none.

    Arguments, errors and peak memory as in `candidate_logprobs`.
    """
    check_head(hidden, head_weight, temperature=temperature, chunk_tokens=chunk_tokens)
    _check_ids(candidate_ids, head_weight.shape[0])
    settings = (temperature, chunk_tokens, True)
    return _CandidateLogprobs.apply(hidden, head_weight, candidate_ids, *settings)


class _CandidateLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        candidate_ids: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_rest: bool,  # noqa: FBT001 - apply() takes no keywords
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        padding = candidate_ids == PADDING_ID  # [token, candidate]
        ids = _real_ids(candidate_ids)
        log_normalizers = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        rest = torch.empty_like(log_normalizers) if with_rest else log_normalizers.new_empty(0)
        candidates = log_normalizers.new_empty(ids.shape)
        head = head_operand(head_weight)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = row_logits(hidden[rows], head, temperature=temperature)
            log_normalizers[rows] = logits.logsumexp(-1)
            candidates[rows] = logits.gather(1, ids[rows])
            if with_rest:
                rest[rows] = logits.scatter_(1, ids[rows], -torch.inf).logsumexp(-1)
        ctx.save_for_backward(hidden, head_weight, ids, padding, log_normalizers, rest)
        ctx.settings = (temperature, chunk_tokens, with_rest)
        logprobs = (candidates - log_normalizers[:, None]).masked_fill_(padding, -torch.inf)
        if not with_rest:
            return logprobs, rest
        return logprobs, (rest - log_normalizers).masked_fill_(padding.all(1), 0.0)

    @staticmethod
    @once_differentiable
    # once_differentiable hides the name of `ctx`.
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, ids, padding, log_normalizers, rest = ctx.saved_tensors
        temperature, chunk_tokens, with_rest = ctx.settings
        # Selected away, not multiplied: what meets the -inf of padding may well be NaN.
        grad = grad_outputs[0].masked_fill(padding, 0.0) / temperature
        has_grad = (grad != 0.0).any(1)
        if with_rest:
            rest_grad = grad_outputs[1].masked_fill(padding.all(1), 0.0) / temperature
            has_grad = has_grad | (rest_grad != 0.0)

        def logits_grad(rows: Tensor, logits: Tensor) -> Tensor:
            """`sum_k g_k (onehot(k) - p) + g_rest (p_rest - p)`, p_rest within the rest."""
            total = grad[rows].sum(1, keepdim=True)
            within_rest = None
            if with_rest:
                total = total + rest_grad[rows, None]
                # From its own normaliser: p / rest mass would be 0 / 0 where the mass underflows.
                within_rest = (logits - rest[rows, None]).exp_().scatter_(1, ids[rows], 0.0)
                within_rest.mul_(rest_grad[rows, None])
            result = logits.sub_(log_normalizers[rows, None]).exp_().mul_(-total)
            result.scatter_add_(1, ids[rows], grad[rows])
            return result if within_rest is None else result.add_(within_rest)

        hidden_grad, head_grad = backward_through_head(
            logits_grad,
            has_grad.nonzero(as_tuple=True)[0],
            hidden,
            head_weight,
            needs_grad=ctx.needs_input_grad[:2],
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return hidden_grad, head_grad, None, None, None, None


def _real_ids(candidate_ids: Tensor) -> Tensor:
    """Ids to index with: padding repeats an id of its own row (id 0 where the row has none)."""
    largest = candidate_ids.amax(1, keepdim=True)
    return torch.where(candidate_ids == PADDING_ID, largest, candidate_ids).clamp(min=0).long()


def _check_ids(candidate_ids: Tensor, vocab_size: int) -> None:
    if candidate_ids.shape[1] == 0:
        raise ValueError(
            "candidate_ids has no column, so there is nothing to compare; give at least one id per "
            "row (score.top_k above 0 keeps them)"
        )
    outside = (candidate_ids < PADDING_ID) | (candidate_ids >= vocab_size)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has candidate id {int(candidate_ids[row, column])}, but the policy's head "
            f"has {vocab_size} rows ({int(outside.sum())} such ids in all); pad with {PADDING_ID}, "
            "and score with a behavior model of the policy's vocabulary, or drop these ids"
        )
