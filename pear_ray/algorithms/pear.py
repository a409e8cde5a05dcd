"""PEAR weights: how plausible what follows a token is under the target policy (arXiv 2602.01058).

Every function returns detached values, works on flat batches (see `loss_tokens`) and sums in
float64: a float32 running sum over 32k packed tokens is off by up to 6e-5 in the log-weight.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import LossTokens, select_loss_tokens

# Both from the paper: bounds on one token's log-ratio, and on the summed log-weight.
LOG_RATIO_CLIP = (-0.08, 0.30)
LOG_WEIGHT_CLIP = (-10.0, 5.0)


@dataclass(frozen=True)
class PearWeights:
    """Weights of a flat batch and what they were made of; 0 outside the loss mask, all detached.

    Attributes:
        weights: `G_t`, what multiplies a token's loss.
        log_weights: `g_t` before the log-weight clip.
        log_ratios: Raw policy minus behavior log-prob.
        clipped_log_ratios: `d_t`, after the log-ratio clip.
    """

    weights: Float[Tensor, " token"]
    log_weights: Float[Tensor, " token"]
    log_ratios: Float[Tensor, " token"]
    clipped_log_ratios: Float[Tensor, " token"]


def clipped_log_ratios(
    log_ratios: Float[Tensor, " loss_token"],
    *,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
) -> Float64[Tensor, " loss_token"]:
    """`d_t`: per-token log-ratios held inside `log_ratio_clip`, in float64 and detached.

    Raises:
        ValueError: The bounds are out of order, or a value is not finite after clipping (a NaN
            log-prob at a loss token, which would poison every weight summed over it).
    """
    low, high = _checked_bounds(log_ratio_clip, name="log_ratio_clip")
    clipped = log_ratios.detach().double().clamp(low, high)
    # One NaN or inf makes the sum so; finite terms cannot overflow it.
    if not math.isfinite(clipped.sum()):
        raise ValueError(
            f"{int((~clipped.isfinite()).sum())} of {clipped.numel()} loss tokens have a log-ratio "
            "that is not finite; find the rows whose policy or behavior log-probs are NaN or inf, "
            "and mask them out or score them again"
        )
    return clipped


def token_log_weights(
    log_ratios: Float64[Tensor, " loss_token"], loss_tokens: LossTokens, *, gamma: float
) -> Float64[Tensor, " loss_token"]:
    """`g_t = (T-t) ln(gamma) + sum_{j>t} d_j`: a token's own ratio is excluded, the last is 0."""
    cumulative = _discounted_cumsum(log_ratios, gamma=gamma)
    ends = loss_tokens.ends.index_select(0, loss_tokens.sequence_index)
    return cumulative.index_select(0, ends) - cumulative


def block_log_weights(
    log_ratios: Float64[Tensor, " loss_token"],
    loss_tokens: LossTokens,
    *,
    gamma: float,
    block_size: int,
) -> Float64[Tensor, " loss_token"]:
    """`g_t = (T-e) ln(gamma) + S_e` with `e = min(ceil(t/B)*B, T)`, the last token of t's block.

    `block_size` 1 is token mode; `block_size >= T` gives 0 everywhere, that is plain SFT.

    Raises:
        ValueError: `block_size` is below 1 or `gamma` is outside (0, 1].
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size} is not a block; use 1 (token mode) or more")
    cumulative = _discounted_cumsum(log_ratios, gamma=gamma)
    starts = loss_tokens.starts.index_select(0, loss_tokens.sequence_index)
    ends = loss_tokens.ends.index_select(0, loss_tokens.sequence_index)
    here = torch.arange(log_ratios.numel(), device=log_ratios.device)
    block = torch.div(here - starts, block_size, rounding_mode="floor")
    block_ends = torch.minimum(starts + (block + 1) * block_size - 1, ends)
    return cumulative.index_select(0, ends) - cumulative.index_select(0, block_ends)


def sequence_log_weights(
    log_ratios: Float64[Tensor, " loss_token"], loss_tokens: LossTokens
) -> Float64[Tensor, " loss_token"]:
    """`g_t = sum_j d_j` for every token of a sequence: the whole ratio, with no discount."""
    cumulative = torch.nn.functional.pad(log_ratios.cumsum(0), (1, 0))
    totals = cumulative[loss_tokens.ends + 1] - cumulative[loss_tokens.starts]
    return totals.index_select(0, loss_tokens.sequence_index)


def weights_from_log_weights(
    log_weights: Float[Tensor, " loss_token"],
    *,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> Float[Tensor, " loss_token"]:
    """`G_t = exp(clip(g_t))` in float32, detached; the clip is of the log-weight, not of `G_t`.

    Raises:
        ValueError: The bounds are out of order.
    """
    low, high = _checked_bounds(log_weight_clip, name="log_weight_clip")
    return log_weights.detach().clamp(low, high).exp().float()


def pear_token_weights(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    gamma: float,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> PearWeights:
    """Token-level PEAR weights of a flat batch (arXiv 2602.01058, token mode).

    Args:
        policy_logprobs: Target policy, nats; read only where `loss_mask` is True.
        behavior_logprobs: Behavior policy, nats; read only where `loss_mask` is True.
        sequence_ids: The sequence of each position, non-decreasing.
        loss_mask: True where a token trains; t = 1..T counts these only.
        gamma: Discount per token in (0, 1]; the paper uses 0.999.
        log_ratio_clip: Bounds on a token's log-ratio.
        log_weight_clip: Bounds on the summed log-weight.

    Raises:
        ValueError: See `clipped_log_ratios`, `select_loss_tokens`; or `gamma` outside (0, 1].
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    raw = _log_ratios(policy_logprobs, behavior_logprobs, loss_tokens)
    clipped = clipped_log_ratios(raw, log_ratio_clip=log_ratio_clip)
    log_weights = token_log_weights(clipped, loss_tokens, gamma=gamma)
    return _pear_weights(raw, clipped, log_weights, loss_tokens, log_weight_clip=log_weight_clip)


def pear_block_weights(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    gamma: float,
    block_size: int,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> PearWeights:
    """Block-level PEAR weights of a flat batch: tokens of one block share a weight.

    Arguments and errors as in `pear_token_weights`; `block_size` counts loss tokens (1 or more).
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    raw = _log_ratios(policy_logprobs, behavior_logprobs, loss_tokens)
    clipped = clipped_log_ratios(raw, log_ratio_clip=log_ratio_clip)
    log_weights = block_log_weights(clipped, loss_tokens, gamma=gamma, block_size=block_size)
    return _pear_weights(raw, clipped, log_weights, loss_tokens, log_weight_clip=log_weight_clip)


def pear_sequence_weights(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> PearWeights:
    """Sequence-level PEAR weights of a flat batch: one weight per sequence, no discount.

    Arguments and errors as in `pear_token_weights`.
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    raw = _log_ratios(policy_logprobs, behavior_logprobs, loss_tokens)
    clipped = clipped_log_ratios(raw, log_ratio_clip=log_ratio_clip)
    log_weights = sequence_log_weights(clipped, loss_tokens)
    return _pear_weights(raw, clipped, log_weights, loss_tokens, log_weight_clip=log_weight_clip)


def _discounted_cumsum(
    log_ratios: Float64[Tensor, " loss_token"], *, gamma: float
) -> Float64[Tensor, " loss_token"]:
    """Running sum of `d_j + ln(gamma)`: its difference over (t, T] is `S_t + (T-t) ln(gamma)`."""
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma={gamma} is not a discount; use a value in (0, 1], e.g. 0.999")
    return (log_ratios + math.log(gamma)).cumsum(0)


def _log_ratios(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    loss_tokens: LossTokens,
) -> Float64[Tensor, " loss_token"]:
    """Policy minus behavior log-probs of the loss tokens, detached."""
    positions = loss_tokens.positions
    policy = policy_logprobs.detach().index_select(0, positions).double()
    return policy - behavior_logprobs.detach().index_select(0, positions).double()


def _pear_weights(
    log_ratios: Float64[Tensor, " loss_token"],
    clipped: Float64[Tensor, " loss_token"],
    log_weights: Float64[Tensor, " loss_token"],
    loss_tokens: LossTokens,
    *,
    log_weight_clip: tuple[float, float],
) -> PearWeights:
    weights = weights_from_log_weights(log_weights, log_weight_clip=log_weight_clip)
    columns = (weights, log_weights, log_ratios, clipped)
    return PearWeights(
        *(
            weights.new_zeros(loss_tokens.num_tokens).scatter_(
                0, loss_tokens.positions, column.float()
            )
            for column in columns
        )
    )


def _checked_bounds(bounds: tuple[float, float], *, name: str) -> tuple[float, float]:
    low, high = bounds
    if not low <= high:
        raise ValueError(f"{name}={bounds} has its low bound above its high one; swap them")
    return low, high
