"""The gap between sampler and trainer log-probs of the same weights, and weights that correct it.

Sums merge over microbatches and ranks with `weight_health.merge`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked
from pear_ray.algorithms.policy_losses import MAX_ABS_LOG_RATIO


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


def truncated_token_weights(
    proximal_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    cap: float,
) -> Float[Tensor, " token"]:
    """`min(proximal / behavior, cap)` per token, detached; 0 outside the mask.

    Truncated importance sampling: corrects for a sampler that computes other log-probs than the
    trainer, keeping every token.

    Raises:
        ValueError: `cap` is not above 0.
    """
    if not cap > 0.0:
        raise ValueError(f"cap={cap} would silence every token; use a value above 0, e.g. 2.0")
    ratios = _ratios(proximal_logprobs, behavior_logprobs, loss_mask)
    return scatter_masked(ratios.clamp(max=cap), loss_mask)


def masked_token_weights(
    proximal_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, " token"]:
    """`proximal / behavior` per token where it lies in [low, high], else 0; detached.

    Masked importance sampling: a token on which sampler and trainer disagree that much is dropped.

    Raises:
        ValueError: Not `0 <= low <= 1 <= high`, so that perfect agreement would be dropped.
    """
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(
            f"[low, high]=[{low}, {high}] leaves out the ratio 1, tokens on which sampler and "
            "trainer agree; use 0 <= low <= 1 <= high, e.g. 0.5 and 2.0"
        )
    ratios = _ratios(proximal_logprobs, behavior_logprobs, loss_mask)
    kept = (ratios >= low) & (ratios <= high)
    return scatter_masked(torch.where(kept, ratios, torch.zeros_like(ratios)), loss_mask)


def _ratios(
    proximal_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " loss_token"]:
    log_ratios = proximal_logprobs.detach()[loss_mask] - behavior_logprobs.detach()[loss_mask]
    return log_ratios.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()
