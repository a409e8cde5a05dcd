"""The gap between sampler and trainer log-probs of the same weights, and weights that correct it.

Tokens are drawn by the sampler and trained on by a trainer that computes other log-probs for the
same weights (kernels, dtypes, batch layouts). The ratio of both is an importance weight.

Sums merge over microbatches and ranks with `weight_health.merge`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import LossTokens, scatter_masked, select_loss_tokens
from pear_ray.algorithms.policy_losses import MAX_ABS_LOG_RATIO, bounded_ratios

CorrectionLevel = Literal["token", "sequence", "geometric"]
CorrectionMode = Literal["mask", "clip", "truncate"]


@dataclass(frozen=True)
class Correction:
    """Weights that correct for the sampler; 0 (False) outside the loss mask, no gradient.

    Attributes:
        weights: What multiplies a token's policy loss.
        masked: True where the ratio was outside the bounds, and the weight is 0 for it.
        bounded: True where the ratio was outside the bounds, and the weight is the bound.
    """

    weights: Float[Tensor, " token"]
    masked: Bool[Tensor, " token"]
    bounded: Bool[Tensor, " token"]


def mismatch_sums(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> dict[str, float]:
    """Sums over loss tokens of the sampler-trainer gap, for `merge` and `finalise_mismatch`.

    The KL is that of sampler || trainer, KL(behavior || policy), since the sampler drew the tokens.

    Args:
        policy_logprobs: By the trainer, nats.
        behavior_logprobs: By the sampler, nats, for the same weights and temperature.
        loss_mask: True at completion tokens; nothing else is read.
    """
    policy = policy_logprobs.detach()[loss_mask].double()
    gaps = policy - behavior_logprobs.detach()[loss_mask].double()
    bounded = gaps.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
    ratios = bounded.exp()
    sums = {
        "tokens": torch.ones_like(gaps).sum(),
        "abs_gap": gaps.abs().sum(),
        "mismatch_kl_k1": -gaps.sum(),
        "mismatch_kl_k3": (torch.expm1(bounded) - bounded).sum(),
        "ratio": ratios.sum(),
        "ratio_squared": ratios.square().sum(),
    }
    if gaps.numel():
        sums["max/abs_gap"] = gaps.abs().max()
    values = torch.stack(list(sums.values())).tolist()
    return dict(zip(sums, values, strict=True))


def finalise_mismatch(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from its merged `mismatch_sums`: gaps and KLs in nats per token.

    Raises:
        ValueError: There was no loss token.
    """
    tokens = sums.get("tokens", 0.0)
    if tokens == 0.0:
        raise ValueError(
            "no loss token in this step, so sampler and trainer cannot be compared; look at how "
            "loss_mask is made, or skip the step"
        )
    effective_sample_size = sums["ratio"] ** 2 / sums["ratio_squared"]
    return {
        "num_tokens": tokens,
        "abs_gap/mean": sums["abs_gap"] / tokens,
        "abs_gap/max": sums["max/abs_gap"],
        "mismatch_kl_k1": sums["mismatch_kl_k1"] / tokens,
        "mismatch_kl_k3": sums["mismatch_kl_k3"] / tokens,
        "ratio/mean": sums["ratio"] / tokens,
        "effective_sample_size": effective_sample_size,
        "ess_fraction": effective_sample_size / tokens,
    }


def correction_weights(
    proximal_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    level: CorrectionLevel,
    mode: CorrectionMode,
    low: float,
    high: float,
) -> Correction:
    """Importance weights `proximal / behavior` at some level, with something done about outliers.

    The ratio of a token (`token`), the product over its sequence (`sequence`; exact, and wild for
    long ones), or the geometric mean over its sequence (`geometric`; biased, and tame). `mask`
    makes it 0 outside [low, high] (masked importance sampling), `clip` holds it inside, `truncate`
    holds it at `high` alone (truncated importance sampling). Logs are held to +-20 first.

    Args:
        proximal_logprobs: By the trainer, of the weights that sampled, nats.
        behavior_logprobs: By the sampler, nats, at the same temperature.
        sequence_ids: The sequence of each position, non-decreasing; each lies whole in the batch.
        loss_mask: True where a token trains; nothing else is read.
        level: What shares a ratio.
        mode: What becomes of a ratio outside the bounds.
        low: Lower bound, in [0, 1]; `truncate` does not read it.
        high: Upper bound, 1 or more.

    Raises:
        ValueError: Not `0 <= low <= 1 <= high`, so that perfect agreement would be corrected, or
            `sequence_ids` decrease.
    """
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(
            f"[low, high]=[{low}, {high}] leaves out the ratio 1, tokens on which sampler and "
            "trainer agree; use 0 <= low <= 1 <= high, e.g. 0.5 and 2.0"
        )
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    at = loss_tokens.positions
    gaps = proximal_logprobs.detach()[at].double() - behavior_logprobs.detach()[at].double()
    log_ratios = _at_level(gaps, loss_tokens, level)
    ratios = bounded_ratios(log_ratios)
    above, outside = ratios > high, (ratios < low) | (ratios > high)
    nowhere = torch.zeros_like(outside)
    match mode:
        case "mask":
            weights, masked, bounded = ratios.masked_fill(outside, 0.0), outside, nowhere
        case "clip":
            weights, masked, bounded = ratios.clamp(low, high), nowhere, outside
        case "truncate":
            weights, masked, bounded = ratios.clamp(max=high), nowhere, above
        case _:
            assert_never(mode)
    return Correction(
        weights=scatter_masked(weights.to(proximal_logprobs.dtype), loss_mask),
        masked=scatter_masked(masked, loss_mask),
        bounded=scatter_masked(bounded, loss_mask),
    )


def _at_level(
    gaps: Float[Tensor, " loss_token"], loss_tokens: LossTokens, level: CorrectionLevel
) -> Float[Tensor, " loss_token"]:
    """The log-ratio that each token's weight is made of."""
    if level == "token":
        return gaps
    sums = gaps.new_zeros(loss_tokens.ends.numel())
    sums.index_add_(0, loss_tokens.sequence_index, gaps)
    if level == "geometric":
        sums.div_(loss_tokens.counts)
    return sums[loss_tokens.sequence_index]
