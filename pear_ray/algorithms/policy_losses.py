"""Per-token policy losses and KL estimators; `reduce` turns them into one number.

The ratio of every loss is taken against the proximal policy: the trainer's own log-probs before the
first update on a rollout batch. That the sampler computes others is corrected apart, by weights
(`mismatch.correction_weights`), so that clipping answers to learning alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked, select_loss_tokens

# exp(20) is 4.9e8: far past every clip, and still finite, so that 0 * ratio cannot become NaN.
MAX_ABS_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLosses:
    """Per-token losses, 0 (False) outside the loss mask.

    Attributes:
        losses: Differentiable in the policy log-probs.
        ratios: Detached policy / proximal ratios, before any clip; per sequence in GSPO.
        clipped_low: True where the lower bound was in force.
        clipped_high: True where the upper bound was in force.
    """

    losses: Float[Tensor, " token"]
    ratios: Float[Tensor, " token"]
    clipped_low: Bool[Tensor, " token"]
    clipped_high: Bool[Tensor, " token"]


def clipped_surrogate(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLosses:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` per token (PPO and GRPO; not reduced).

    GRPO: arXiv 2402.03300, eq. 3 (its KL apart). Two distances, "clip-higher": DAPO, arXiv
    2503.14476. A clipped token has no gradient.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient.
        proximal_logprobs: What the ratio is taken against, nats; none.
        advantages: One per token, constant over a completion in GRPO.
        loss_mask: True where a token trains; nothing else is read.
        clip_low: Distance below 1, in [0, 1].
        clip_high: Distance above 1, 0 or more.

    Raises:
        ValueError: A clip distance is out of range.
    """
    _check_clip(clip_low=clip_low, clip_high=clip_high)
    ratios = bounded_ratios(_log_ratios(policy_logprobs, proximal_logprobs, loss_mask))
    return _surrogate(ratios, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high)


def gspo_surrogate(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLosses:
    """GRPO's surrogate with one ratio per sequence, `exp(mean_t log r_t)` (arXiv 2507.18071).

    Written as the paper's GSPO-token: token t has `sg[s] p_t / sg[p_t]`, which
    is `s` and whose gradient goes through its own log-prob alone. Summed over a sequence of equal
    advantages, value and gradient are those of `-T min(s A, clip(s) A)`: reduced by `seq_mean` that
    is GSPO. A sequence is clipped whole.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient.
        proximal_logprobs: What the ratio is taken against, nats; none.
        advantages: One per token.
        sequence_ids: The sequence of each position, non-decreasing; each lies whole in the batch.
        loss_mask: True where a token trains; nothing else is read.
        clip_low: Distance below 1, in [0, 1]; the paper's is 3e-4.
        clip_high: Distance above 1, 0 or more; the paper's is 4e-4.

    Raises:
        ValueError: A clip distance is out of range, or `sequence_ids` decrease.
    """
    _check_clip(clip_low=clip_low, clip_high=clip_high)
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    selected = policy_logprobs[loss_tokens.positions]
    log_ratios = selected.detach() - proximal_logprobs.detach()[loss_tokens.positions]
    means = log_ratios.new_zeros(loss_tokens.ends.numel())
    means = means.index_add_(0, loss_tokens.sequence_index, log_ratios).div_(loss_tokens.counts)
    means = means.clamp_(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
    ratios = means.exp()[loss_tokens.sequence_index] * (selected - selected.detach()).exp()
    return _surrogate(ratios, advantages, loss_mask, clip_low=clip_low, clip_high=clip_high)


def cispo_losses(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLosses:
    """`-sg[clip(r, 1 - clip_low, 1 + clip_high)] A log p` per token (CISPO, arXiv 2506.13585).

    The clipped ratio is a weight, so that no token loses its gradient.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient.
        proximal_logprobs: What the ratio is taken against, nats; none.
        advantages: One per token.
        loss_mask: True where a token trains; nothing else is read.
        clip_low: Distance below 1, in [0, 1]; 1, the paper's choice, is no lower bound.
        clip_high: Distance above 1, 0 or more.

    Raises:
        ValueError: A clip distance is out of range.
    """
    _check_clip(clip_low=clip_low, clip_high=clip_high)
    selected = policy_logprobs[loss_mask]
    ratios = bounded_ratios(_log_ratios(policy_logprobs.detach(), proximal_logprobs, loss_mask))
    low, high = 1.0 - clip_low, 1.0 + clip_high
    losses = -ratios.clamp(low, high) * advantages.detach()[loss_mask] * selected
    return PolicyLosses(
        losses=scatter_masked(losses, loss_mask),
        ratios=scatter_masked(ratios, loss_mask),
        clipped_low=scatter_masked(ratios < low, loss_mask),
        clipped_high=scatter_masked(ratios > high, loss_mask),
    )


def reinforce_losses(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> PolicyLosses:
    """`-A log p` per token (REINFORCE), without ratio and clip.

    Exact for the first update on a rollout batch only; later ones are taken as if on policy. The
    proximal log-probs are read to report the ratios. Arguments as in `cispo_losses`.
    """
    selected = policy_logprobs[loss_mask]
    ratios = bounded_ratios(_log_ratios(policy_logprobs.detach(), proximal_logprobs, loss_mask))
    nowhere = torch.zeros_like(loss_mask)
    return PolicyLosses(
        losses=scatter_masked(-advantages.detach()[loss_mask] * selected, loss_mask),
        ratios=scatter_masked(ratios, loss_mask),
        clipped_low=nowhere,
        clipped_high=nowhere,
    )


def bounded_ratios(log_ratios: Float[Tensor, " *any"]) -> Float[Tensor, " *any"]:
    """`exp(log_ratios)`, kept finite by `MAX_ABS_LOG_RATIO`; differentiable inside it."""
    return log_ratios.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()


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


def _surrogate(
    ratios: Float[Tensor, " loss_token"],
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLosses:
    """The pessimistic surrogate of differentiable `ratios`."""
    advantage = advantages.detach()[loss_mask]
    bounded = ratios.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = -torch.minimum(ratios * advantage, bounded * advantage)
    frozen = ratios.detach()
    # Elsewhere the smaller term is the unclipped one: a bad token may rise, a good one fall.
    low, high = (frozen < 1.0 - clip_low), (frozen > 1.0 + clip_high)
    return PolicyLosses(
        losses=scatter_masked(losses, loss_mask),
        ratios=scatter_masked(frozen, loss_mask),
        clipped_low=scatter_masked(low & (advantage < 0), loss_mask),
        clipped_high=scatter_masked(high & (advantage > 0), loss_mask),
    )


def _check_clip(*, clip_low: float, clip_high: float) -> None:
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high} are distances from 1, not bounds: "
            "clip_low must be in [0, 1] and clip_high 0 or more, e.g. 0.2 and 0.28"
        )
