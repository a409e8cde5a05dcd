"""From per-token losses to one number with one global denominator.

`loss = (sum of numerators) / (sum of denominators)`, both over all microbatches and ranks of a
step. Averaging local means instead up-weights short microbatches; nothing here can do that.
"""

from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import LossTokens, select_loss_tokens

Reduction = Literal["sum", "token_mean", "seq_mean", "weight_norm"]


def loss_numerator(
    losses: Float[Tensor, " token"],
    weights: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    reduction: Reduction,
) -> Float[Tensor, ""]:
    """This microbatch's share of the loss, float32, differentiable in `losses` only.

    Each sequence must lie whole in one microbatch. A loss token of weight 0 is not read, so an
    infinite loss there cannot become NaN; it still counts in the denominator.

    Args:
        losses: Per-token losses; read only at loss tokens.
        weights: What multiplies them; never gets a gradient. Ones for plain SFT.
        sequence_ids: The sequence of each position, non-decreasing.
        loss_mask: True where a token trains.
        reduction: `sum`: weighted losses summed per sequence; `token_mean` and `weight_norm`:
            summed over tokens; `seq_mean`: averaged over each sequence's loss tokens, then summed.

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    frozen = weights.detach()
    positions = (loss_mask & (frozen != 0)).nonzero(as_tuple=True)[0]
    weighted = frozen[positions].float() * losses[positions].float()
    match reduction:
        case "sum" | "token_mean" | "weight_norm":
            return weighted.sum()
        case "seq_mean":
            # The length is that of the whole loss mask: a zero weight does not shorten a sequence.
            loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
            lengths = torch.ones_like(frozen, dtype=torch.float32)
            lengths[loss_tokens.positions] = _own_counts(loss_tokens).float()
            return (weighted / lengths[positions]).sum()
        case _:
            assert_never(reduction)


def loss_denominator(
    weights: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    reduction: Reduction,
) -> Float[Tensor, ""]:
    """This microbatch's share of the denominator, float64 and detached.

    `sum` and `seq_mean` count sequences with a loss token, `token_mean` counts loss tokens,
    `weight_norm` sums the absolute weights (a negative's weight carries a minus sign).

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    match reduction:
        case "sum" | "seq_mean":
            count = select_loss_tokens(sequence_ids, loss_mask).ends.numel()
            return torch.tensor(count, dtype=torch.float64, device=weights.device)
        case "token_mean":
            return loss_mask.sum().double()
        case "weight_norm":
            return weights.detach()[loss_mask].double().abs().sum()
        case _:
            assert_never(reduction)


def mean_one_over_batch(
    weights: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    weight_sum: float,
    num_tokens: float,
) -> Float[Tensor, " token"]:
    """Weights scaled so that their mean over the global batch is 1. Not the paper's.

    Args:
        weights: This microbatch's weights.
        loss_mask: True where a token trains.
        weight_sum: Sum of the weights over all microbatches and ranks of the step.
        num_tokens: Number of loss tokens over all microbatches and ranks of the step.

    Raises:
        ValueError: `weight_sum` is not positive.
    """
    if not weight_sum > 0.0:
        raise ValueError(
            f"weight_sum={weight_sum} cannot be scaled to a mean of 1; pass the positive sum of "
            "the weights over every microbatch and rank (negatives left out)"
        )
    scaled = weights.detach() * (num_tokens / weight_sum)
    return torch.where(loss_mask, scaled, torch.zeros_like(scaled))


def mean_one_over_sequence(
    weights: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Weights scaled so that their mean over each sequence's loss tokens is 1. Not the paper's.

    Keeps which tokens matter within a trace, forgets which traces do: in sequence mode that is
    plain SFT. The weights must be positive (PEAR's are: exp of a bounded log-weight).

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    selected = weights.detach()[loss_tokens.positions].double()
    sums = selected.new_zeros(loss_tokens.ends.numel())
    sums.index_add_(0, loss_tokens.sequence_index, selected)
    scaled = selected * _own_counts(loss_tokens) / sums[loss_tokens.sequence_index]
    return torch.zeros_like(weights).index_copy_(0, loss_tokens.positions, scaled.to(weights.dtype))


def centred_log_ratios(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Log-ratios less their mean over each sequence's loss tokens; detached. Not the paper's.

    A behavior policy that is far stronger makes nearly every log-ratio negative, and the weights
    say only how far a token is from the end. Centred, they say which tokens suit the policy more
    than the rest of their own trace does. 0 outside the mask, which is never read.

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    at = loss_tokens.positions
    ratios = policy_logprobs.detach()[at].double() - behavior_logprobs.detach()[at].double()
    sums = ratios.new_zeros(loss_tokens.ends.numel())
    sums.index_add_(0, loss_tokens.sequence_index, ratios)
    centred = ratios - (sums / loss_tokens.counts)[loss_tokens.sequence_index]
    empty = torch.zeros_like(policy_logprobs, requires_grad=False)
    return empty.index_copy_(0, at, centred.to(empty.dtype))


def _own_counts(loss_tokens: LossTokens) -> Int[Tensor, " loss_token"]:
    """For each loss token, the number of loss tokens of its sequence."""
    return loss_tokens.counts[loss_tokens.sequence_index]
