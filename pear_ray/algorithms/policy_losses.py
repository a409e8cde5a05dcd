"""Per-token policy losses; `reduce` turns them into one number."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked

# exp(20) is 4.9e8: far past every clip, and still finite, so that 0 * ratio cannot become NaN.
MAX_ABS_LOG_RATIO = 20.0


@dataclass(frozen=True)
class ClippedSurrogate:
    """Per-token surrogate losses, 0 (False) outside the loss mask.

    Attributes:
        losses: Differentiable in the policy log-probs.
        ratios: Detached policy / behavior ratios.
        clipped: True where the clip bound, so that the token has no gradient.
    """

    losses: Float[Tensor, " token"]
    ratios: Float[Tensor, " token"]
    clipped: Bool[Tensor, " token"]


def clipped_surrogate(
    policy_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    clip_low: float,
    clip_high: float,
) -> ClippedSurrogate:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` per token (PPO and GRPO; not reduced).

    Args:
        policy_logprobs: Target policy, nats; gets the gradient.
        behavior_logprobs: What the ratio is taken against (sampler or proximal), nats; none.
        advantages: One per token, constant over a completion in GRPO.
        loss_mask: True where a token trains; nothing else is read.
        clip_low: Distance below 1, in [0, 1].
        clip_high: Distance above 1, 0 or more.

    Raises:
        ValueError: A clip distance is out of range.
    """
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high} are distances from 1, not bounds: "
            "clip_low must be in [0, 1] and clip_high 0 or more, e.g. 0.2 and 0.28"
        )
    log_ratios = policy_logprobs[loss_mask] - behavior_logprobs.detach()[loss_mask]
    ratios = log_ratios.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()
    advantage = advantages.detach()[loss_mask]
    unclipped = ratios * advantage
    losses = -torch.minimum(unclipped, ratios.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage)
    frozen = ratios.detach()
    clipped = ((frozen > 1.0 + clip_high) & (advantage > 0)) | (
        (frozen < 1.0 - clip_low) & (advantage < 0)
    )
    return ClippedSurrogate(
        losses=scatter_masked(losses, loss_mask),
        ratios=scatter_masked(frozen, loss_mask),
        clipped=scatter_masked(clipped, loss_mask),
    )


def kl_k1(
    policy_logprobs: Float[Tensor, " token"],
    reference_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Schulman's k1 of KL(policy || reference), tokens sampled from the policy: `log p/q`.

    Unbiased, high variance, may be negative. As a loss its gradient is 0 on average: use k2 or k3.
    """
    return scatter_masked(_log_ratios(policy_logprobs, reference_logprobs, loss_mask), loss_mask)


def kl_k2(
    policy_logprobs: Float[Tensor, " token"],
    reference_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Schulman's k2 of KL(policy || reference), tokens sampled from the policy: `(log p/q)^2 / 2`.

    Biased, low variance, never negative; its gradient is that of the KL.
    """
    log_ratios = _log_ratios(policy_logprobs, reference_logprobs, loss_mask)
    return scatter_masked(0.5 * log_ratios**2, loss_mask)


def kl_k3(
    policy_logprobs: Float[Tensor, " token"],
    reference_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Schulman's k3 of KL(policy || reference), tokens from the policy: `q/p - 1 - log q/p`.

    Unbiased, low variance, never negative (GRPO's penalty).
    """
    reverse = -_log_ratios(policy_logprobs, reference_logprobs, loss_mask)
    reverse = reverse.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
    return scatter_masked(torch.expm1(reverse) - reverse, loss_mask)


def _log_ratios(
    policy_logprobs: Float[Tensor, " token"],
    reference_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " loss_token"]:
    return policy_logprobs[loss_mask] - reference_logprobs.detach()[loss_mask]
