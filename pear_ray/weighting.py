"""From a run's `sft.weights` to the algorithm that makes them: for training and for diagnosis."""

import dataclasses
import functools

import torch

from pear_ray.algorithms.pear import (
    PearWeights,
    pear_block_weights,
    pear_sequence_weights,
    pear_token_weights,
)
from pear_ray.algorithms.pear_spans import pear_span_sequence_weights, pear_span_weights
from pear_ray.algorithms.reduce import centred_log_ratios, mean_one_over_sequence
from pear_ray.config import sft as sft_config

Bounds = tuple[float, float]


def clips(config: sft_config.PearWeights) -> tuple[Bounds, Bounds]:
    """Bounds of a token's log-ratio, and of a summed log-weight."""
    return (
        (config.log_ratio_clip_low, config.log_ratio_clip_high),
        (config.log_weight_clip_low, config.log_weight_clip_high),
    )


def pear_weights(
    policy_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    sequence_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    span_ids: torch.Tensor | None,
    config: sft_config.PearWeights,
) -> PearWeights:
    """The weights that `config` asks for, of a flat batch.

    Args:
        policy_logprobs: Target policy, nats, [token].
        behavior_logprobs: Behavior policy, nats, [token].
        sequence_ids: The sequence of each position, non-decreasing, [token].
        loss_mask: True where a token trains, [token].
        span_ids: The span of each loss token within its sequence, [token]; None unless the behavior
            model has another tokenizer, and one log-prob per span.
        config: Level, discount and bounds.

    With `control: likelihood_only` the behavior policy's log-probs are not read, and 0 stands for
    them. The other controls are made of a whole step's weights (`algorithms.weight_controls`): what
    comes back is then what they are made of.

    Raises:
        ValueError: A log-ratio at a loss token is not finite.
    """
    if config.control == "likelihood_only":
        behavior_logprobs = torch.zeros_like(behavior_logprobs)
    if config.rescale == "centred":
        centred = centred_log_ratios(policy_logprobs, behavior_logprobs, sequence_ids, loss_mask)
        found = _weights(centred, torch.zeros_like(centred), sequence_ids, loss_mask, None, config)
        raw = torch.where(loss_mask, policy_logprobs.detach() - behavior_logprobs, 0.0)
        return dataclasses.replace(found, log_ratios=raw)
    found = _weights(policy_logprobs, behavior_logprobs, sequence_ids, loss_mask, span_ids, config)
    if config.rescale == "sequence_mean_one":
        scaled = mean_one_over_sequence(found.weights, sequence_ids, loss_mask)
        return dataclasses.replace(found, weights=scaled)
    return found


def _weights(
    policy_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    sequence_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    span_ids: torch.Tensor | None,
    config: sft_config.PearWeights,
) -> PearWeights:
    arguments = (policy_logprobs, behavior_logprobs, sequence_ids, loss_mask)
    ratio_clip, weight_clip = clips(config)
    gamma, size = config.gamma, config.block_size
    if span_ids is not None:
        weigh = {
            "span": functools.partial(pear_span_weights, gamma=gamma),
            "sequence": pear_span_sequence_weights,
        }[config.level]
        spanned = functools.partial(weigh, *arguments, span_ids)
        return spanned(log_ratio_clip=ratio_clip, log_weight_clip=weight_clip)
    weigh = {
        "token": functools.partial(pear_token_weights, gamma=gamma),
        "block": functools.partial(pear_block_weights, gamma=gamma, block_size=size),
        "sequence": pear_sequence_weights,
    }[config.level]
    return weigh(*arguments, log_ratio_clip=ratio_clip, log_weight_clip=weight_clip)
