"""PEAR weights where only totals over spans of tokens are known: our extension of arXiv 2602.01058.

A behavior model with another tokenizer gives one log-prob per span of n loss tokens (see
`engines.byte_alignment`), not one per token. A span is PEAR's block with a size of its own. Its
log-ratio is clipped as that of n tokens, `d = n clip((sum policy - sum behavior) / n)`, which is
the paper's `d_t` for n = 1. So everything here is PEAR on log-probs averaged over their span.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import select_loss_tokens
from pear_ray.algorithms.pear import (
    LOG_RATIO_CLIP,
    LOG_WEIGHT_CLIP,
    PearWeights,
    pear_sequence_weights,
    pear_token_weights,
)


def pear_span_weights(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    span_ids: Int[Tensor, " token"],
    *,
    gamma: float,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> PearWeights:
    """Span-level PEAR weights: `g_t = (T-e) ln(gamma) + S_e` with e the last token of t's span.

    As in block mode a span's own ratio is excluded and its tokens share a weight; spans of one
    token give token mode exactly. Both log-ratios are per token: the span's over n.

    Args:
        policy_logprobs: Target policy, nats; read only where `loss_mask` is True.
        behavior_logprobs: Behavior policy, nats; only its sum over each span matters.
        sequence_ids: The sequence of each position, non-decreasing.
        loss_mask: True where a token trains; t = 1..T counts these only.
        span_ids: The span of each loss token, 0 or more and non-decreasing within a sequence. Each
            sequence has its own numbers, so no span can reach into the next.
        gamma: Discount per token in (0, 1].
        log_ratio_clip: Bounds on a span's log-ratio per token.
        log_weight_clip: Bounds on the summed log-weight.

    Raises:
        ValueError: `span_ids` are not as above; otherwise as in `pear_token_weights`.
    """
    spans = _select_spans(sequence_ids, loss_mask, span_ids)
    pear = pear_token_weights(
        _span_means(policy_logprobs, spans),
        _span_means(behavior_logprobs, spans),
        sequence_ids,
        loss_mask,
        gamma=gamma,
        log_ratio_clip=log_ratio_clip,
        log_weight_clip=log_weight_clip,
    )
    return replace(
        pear,
        weights=_of_last_token(pear.weights, spans),
        log_weights=_of_last_token(pear.log_weights, spans),
    )


def pear_span_sequence_weights(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    span_ids: Int[Tensor, " token"],
    *,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> PearWeights:
    """Sequence-level PEAR weights from the spans' log-ratios: one weight per sequence, no discount.

    Arguments and errors as in `pear_span_weights`.
    """
    spans = _select_spans(sequence_ids, loss_mask, span_ids)
    return pear_sequence_weights(
        _span_means(policy_logprobs, spans),
        _span_means(behavior_logprobs, spans),
        sequence_ids,
        loss_mask,
        log_ratio_clip=log_ratio_clip,
        log_weight_clip=log_weight_clip,
    )


@dataclass(frozen=True)
class _Spans:
    """The spans of a flat batch.

    Attributes:
        positions: Where each loss token sits in the flat batch.
        index: The span of each loss token, counted over the whole batch.
        counts: For each span its number of loss tokens.
        num_tokens: Length of the flat batch.
    """

    positions: Int[Tensor, " loss_token"]
    index: Int[Tensor, " loss_token"]
    counts: Int[Tensor, " span"]
    num_tokens: int


def _select_spans(
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    span_ids: Int[Tensor, " token"],
) -> _Spans:
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    ids = span_ids.index_select(0, loss_tokens.positions)
    if bool((ids < 0).any()):
        raise ValueError(
            f"{int((ids < 0).sum())} of {ids.numel()} loss tokens are in no span (span_ids below "
            "0); give each loss token a span, or mask it out"
        )
    same_sequence = loss_tokens.sequence_index[1:] == loss_tokens.sequence_index[:-1]
    if bool(((ids[1:] < ids[:-1]) & same_sequence).any()):
        raise ValueError(
            "span_ids decrease within a sequence, so one span may be cut into pieces; number each "
            "sequence's spans in the order of its tokens"
        )
    begins = torch.ones_like(ids)
    begins[1:] = (ids[1:] != ids[:-1]) | ~same_sequence
    index = begins.cumsum(0) - 1
    _, counts = torch.unique_consecutive(index, return_counts=True)
    return _Spans(loss_tokens.positions, index, counts, loss_tokens.num_tokens)


def _span_means(logprobs: Float[Tensor, " token"], spans: _Spans) -> Float64[Tensor, " token"]:
    """Each loss token's share of its span's total, detached; 0 outside the loss mask."""
    own = logprobs.detach().index_select(0, spans.positions).double()
    totals = own.new_zeros(spans.counts.numel()).index_add_(0, spans.index, own)
    shares = (totals / spans.counts).index_select(0, spans.index)
    return own.new_zeros(spans.num_tokens).index_copy_(0, spans.positions, shares)


def _of_last_token(values: Float[Tensor, " token"], spans: _Spans) -> Float[Tensor, " token"]:
    """Every loss token with the value of its span's last one."""
    last = spans.positions.index_select(0, spans.counts.cumsum(0) - 1)
    shared = values.index_select(0, last).index_select(0, spans.index)
    return torch.zeros_like(values).index_copy_(0, spans.positions, shared)
