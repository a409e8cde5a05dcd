"""What one microbatch of RL adds to an update: its losses' sum, and the sums behind metrics."""

from dataclasses import dataclass
from typing import assert_never

import torch

from pear_ray.algorithms import mismatch, policy_losses
from pear_ray.algorithms.reduce import Reduction, loss_denominator, loss_numerator
from pear_ray.config import rl_losses as config
from pear_ray.config.rl import RlConfig
from pear_ray.distributed.rl_advantages import KL_ESTIMATORS, trained_mask
from pear_ray.engines.batches import TokenBatch


@dataclass(frozen=True, slots=True)
class Terms:
    """A microbatch's share of an update.

    Attributes:
        numerator: Its part of the loss before the division; differentiable.
        sums: For `weight_health.merge`, with `numerator` and `denominator`.
    """

    numerator: torch.Tensor
    sums: dict[str, float]


def microbatch_terms(
    outputs: dict[str, torch.Tensor], batch: TokenBatch, settings: RlConfig
) -> Terms:
    """Policy loss, KL and entropy of a microbatch, and their sums.

    Args:
        outputs: `logprobs` at the sampling temperature and, with an entropy term, `entropies`.
        batch: With `behavior_logprobs`, `trains` and `advantages`; with `proximal_logprobs` unless
            the policy is what it was when the batch was sampled; with `reference_logprobs` where
            the KL is wanted.
        settings: Loss, correction, KL, entropy, reduction.
    """
    logprobs, mask = outputs["logprobs"], trained_mask(batch)
    # Before the first update policy and proximal policy are one: the ratio is 1 and has a gradient.
    proximal = batch.aligned.get("proximal_logprobs", logprobs.detach())
    found = policy_loss(logprobs, proximal, batch, mask, settings.loss)
    correction = sampler_correction(proximal, batch, mask, settings.mismatch_correction)
    ones, reduction = torch.ones_like(proximal), _sums_like(settings)
    flat = (batch.sequence_ids, mask)
    numerator = loss_numerator(found.losses, correction.weights, *flat, reduction=reduction)
    advantages = batch.aligned["advantages"].double() * mask
    sums = {
        "trained_tokens": mask.sum(),
        "advantage": advantages.sum(),
        "advantage_abs": advantages.abs().sum(),
        "advantage_squared": advantages.square().sum(),
        "clipped_low": found.clipped_low.sum(),
        "clipped_high": found.clipped_high.sum(),
        "correction_masked": correction.masked.sum(),
        "correction_bounded": correction.bounded.sum(),
        "correction_weight": correction.weights.double().sum(),
        "correction_weight_squared": correction.weights.double().square().sum(),
    }
    if mask.any():
        sums["max/ratio"], sums["min/ratio"] = found.ratios[mask].max(), found.ratios[mask].min()
    if settings.kl.is_wanted:
        reference = batch.aligned["reference_logprobs"]
        # Of the three, k3 alone is unbiased and steady, whatever the penalty is made of.
        sums["kl"] = policy_losses.kl_k3(logprobs.detach(), reference, mask).double().sum()
        if settings.kl.coefficient and settings.kl.placement == "loss":
            kl = KL_ESTIMATORS[settings.kl.estimator](logprobs, reference, mask)
            added = loss_numerator(kl, ones, *flat, reduction=reduction)
            numerator = numerator + settings.kl.coefficient * added
    if settings.entropy_coefficient:
        entropies = outputs["entropies"]
        sums["entropy"] = entropies.detach()[mask].double().sum()
        added = loss_numerator(entropies, ones, *flat, reduction=reduction)
        numerator = numerator - settings.entropy_coefficient * added
    sums["numerator"] = numerator.detach()
    sums["denominator"] = loss_denominator(ones, *flat, reduction=reduction)
    values = torch.stack([value.double() for value in sums.values()]).tolist()
    behavior = batch.aligned["behavior_logprobs"]
    measured = mismatch.mismatch_sums(proximal, behavior, batch.loss_mask)
    return Terms(numerator, dict(zip(sums, values, strict=True)) | measured)


def policy_loss(
    logprobs: torch.Tensor,
    proximal: torch.Tensor,
    batch: TokenBatch,
    mask: torch.Tensor,
    loss: config.PolicyLossConfig,
) -> policy_losses.PolicyLosses:
    """The policy loss of each token, as the run wants it."""
    advantages = batch.aligned["advantages"]
    columns = (logprobs, proximal, advantages)
    match loss:
        case config.GrpoLoss():
            clip = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
            return policy_losses.clipped_surrogate(*columns, mask, **clip)
        case config.GspoLoss():
            clip = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
            return policy_losses.gspo_surrogate(*columns, batch.sequence_ids, mask, **clip)
        case config.CispoLoss():
            clip = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
            return policy_losses.cispo_losses(*columns, mask, **clip)
        case config.ReinforceLoss():
            return policy_losses.reinforce_losses(*columns, mask)
        case _:
            assert_never(loss)


def sampler_correction(
    proximal: torch.Tensor,
    batch: TokenBatch,
    mask: torch.Tensor,
    knobs: config.MismatchCorrectionConfig,
) -> mismatch.Correction:
    """The weights that correct for the sampler; 1 everywhere when that is off."""
    if knobs.level == "off":
        nowhere = torch.zeros_like(mask)
        return mismatch.Correction(mask.to(proximal.dtype), masked=nowhere, bounded=nowhere)
    return mismatch.correction_weights(
        proximal,
        batch.aligned["behavior_logprobs"],
        batch.sequence_ids,
        mask,
        level=knobs.level,
        mode=knobs.mode,
        low=knobs.low,
        high=knobs.high,
    )


def denominator_of(sums: dict[str, float], settings: RlConfig) -> float:
    """What the sum of an update's numerators is divided by, from the sums of all ranks.

    At least 1: an update whose completions are all left out has a gradient of 0, like one whose
    groups all have equal rewards, and is no error.
    """
    per_sequence = settings.max_tokens if settings.reduction == "dr_grpo" else 1
    return max(1.0, sums["denominator"]) * per_sequence


def _sums_like(settings: RlConfig) -> Reduction:
    """Dr.GRPO's sum is a plain one; its constant is in the denominator."""
    return "sum" if settings.reduction == "dr_grpo" else settings.reduction
