"""Negatives: known-wrong traces, pushed away with the sequence weight (off by default)."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.pear import (
    LOG_RATIO_CLIP,
    LOG_WEIGHT_CLIP,
    PearWeights,
    pear_sequence_weights,
)


def above_logprob_floor(
    policy_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    logprob_floor: float,
) -> Bool[Tensor, " token"]:
    """True at loss tokens whose log-prob is still above `logprob_floor` (nats).

    Pushing a token down has no lower bound, so a term without this stop diverges.
    """
    return loss_mask & (policy_logprobs.detach() > logprob_floor)


def negative_sequence_weights(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    negative_scale: float,
    logprob_floor: float,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> PearWeights:
    """Signed weights `-negative_scale * exp(clip(S_0))` of known-wrong traces.

    They are 0 outside the mask and at tokens at or below `logprob_floor`; such tokens still count
    in `S_0` and in every denominator, so that stopping one does not push the others harder.
    Reduce and log this term apart from the positive one.

    Args:
        policy_logprobs: As in `pear_sequence_weights`.
        behavior_logprobs: As in `pear_sequence_weights`.
        sequence_ids: As in `pear_sequence_weights`.
        loss_mask: True at the loss tokens of negative traces only.
        negative_scale: lambda, 0 or more; the paper's value is not known.
        logprob_floor: Nats; use `-math.inf` for no floor.
        log_ratio_clip: Bounds on a token's log-ratio.
        log_weight_clip: Bounds on the summed log-weight.

    Raises:
        ValueError: `negative_scale` is below 0; otherwise as in `pear_token_weights`.
    """
    if negative_scale < 0.0:
        raise ValueError(
            f"negative_scale={negative_scale} would train towards wrong traces; the sign is "
            "applied here, so pass 0 or more"
        )
    pear = pear_sequence_weights(
        policy_logprobs,
        behavior_logprobs,
        sequence_ids,
        loss_mask,
        log_ratio_clip=log_ratio_clip,
        log_weight_clip=log_weight_clip,
    )
    keep = above_logprob_floor(policy_logprobs, loss_mask, logprob_floor=logprob_floor)
    signed = torch.where(keep, -negative_scale * pear.weights, torch.zeros_like(pear.weights))
    return replace(pear, weights=signed)
