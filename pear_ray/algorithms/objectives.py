"""Base objectives: the per-token loss that a weight multiplies.

`l = -log p` of the token's own id and `sg` a stop-gradient. Losses are in nats unless they say
otherwise, 0 outside the mask, and read nothing there. Where a paper's reference model stands in a
ratio it is `proximal_logprobs` here: the target policy frozen before the phase began.

`forward_kl` holds the distillation loss, `talr` what TALR needs of the whole batch.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.logprobs import EAFT_K, MIN_ENTROPY_K
from pear_ray.algorithms.loss_tokens import scatter_masked, select_loss_tokens
from pear_ray.algorithms.policy_losses import bounded_ratios, clipped_surrogate

# Below this power p_family differs from -log p by less than float32 shows, up to 1000 nats.
MIN_POWER = 1e-10
# iw-SFT's bounds (arXiv 2507.12856, authors' code): on a sequence's weight, on a token's ratio.
SEQUENCE_WEIGHT_CAP = 16.0
TOKEN_RATIO_CLIP = (0.2, 1.8)
# PSFT's clip distances (arXiv 2508.17784), those of DAPO.
PSFT_CLIP_LOW, PSFT_CLIP_HIGH = 0.2, 0.28
# ASFT (arXiv 2509.23753) and the SFT+KL that it is compared with.
KL_COEFFICIENT = 0.1


def nll(
    policy_logprobs: Float[Tensor, " token"], loss_mask: Bool[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """`-log p` per token (plain SFT), nats; 0 outside the mask, which is never read."""
    selected = policy_logprobs[loss_mask]
    return scatter_masked(-selected, loss_mask)


def dft(
    policy_logprobs: Float[Tensor, " token"], loss_mask: Bool[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """`sg[p] * -log p` per token (DFT, arXiv 2508.05629), nats; 0 outside the mask.

    `p` is frozen, so an unlikely token is trained on in proportion to its own probability.
    """
    selected = policy_logprobs[loss_mask]
    return scatter_masked(-selected.detach().exp() * selected, loss_mask)


def p_family(
    policy_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    power: float,
) -> Float[Tensor, " token"]:
    """`(1 - p^a) / a` per token (arXiv 2510.00526), without unit; the gradient goes through p.

    The gradient of a token's log-prob is `-p^a`: `a = 0` is `nll`, its limit, exactly, and `a = 1`
    is `1 - p`, whose gradient is DFT's.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient.
        loss_mask: True where a token trains; nothing else is read.
        power: `a`, 0 or more.

    Raises:
        ValueError: `power` is below 0, where a loss would grow as a power of 1 / p, or not finite.
    """
    if not 0.0 <= power < math.inf:
        raise ValueError(
            f"power={power} is not a member of the family; use 0 (nll), 1 (1 - p) or any other "
            "finite value above 0"
        )
    if power < MIN_POWER:
        return nll(policy_logprobs, loss_mask)
    selected = policy_logprobs[loss_mask]
    # expm1: 1 - p^a itself loses every digit where a * log p is small.
    return scatter_masked(-torch.expm1(power * selected) / power, loss_mask)


def iw_sft_sequence(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    weight_cap: float = SEQUENCE_WEIGHT_CAP,
) -> Float[Tensor, " token"]:
    """`sg[min(exp(mean_t(log p - log p_ref)), cap)] * l` (iw-SFT, arXiv 2507.12856), nats.

    One weight per sequence, the geometric mean of its tokens' ratios: it forgets the length, which
    PEAR's sequence weight does not.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient, but for the weight.
        proximal_logprobs: The paper's `p_ref`, the model before training, nats; none.
        sequence_ids: The sequence of each position, non-decreasing; the mean is over its loss
            tokens, and each sequence must lie whole in the batch.
        loss_mask: True where a token trains; nothing else is read.
        weight_cap: The largest weight.

    Raises:
        ValueError: `weight_cap` is not above 0, or `sequence_ids` decrease.
    """
    if not weight_cap > 0.0:
        raise ValueError(
            f"weight_cap={weight_cap} would silence every token; use a value above 0, e.g. "
            f"{SEQUENCE_WEIGHT_CAP}"
        )
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    at = loss_tokens.positions
    log_ratios = policy_logprobs.detach()[at].double() - proximal_logprobs.detach()[at].double()
    means = log_ratios.new_zeros(loss_tokens.ends.numel())
    means.index_add_(0, loss_tokens.sequence_index, log_ratios).div_(loss_tokens.counts)
    weights = means.clamp(max=math.log(weight_cap)).exp()[loss_tokens.sequence_index]
    selected = policy_logprobs[at]
    return scatter_masked(-weights.to(selected.dtype) * selected, loss_mask)


def iw_sft_token(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    ratio_clip: tuple[float, float] = TOKEN_RATIO_CLIP,
) -> Float[Tensor, " token"]:
    """`sg[clamp(p / p_ref, low, high)] * l` per token (iw-SFT, arXiv 2507.12856), nats.

    Arguments as in `iw_sft_sequence`; `ratio_clip` bounds the ratio itself, not its log.

    Raises:
        ValueError: Not `0 <= low <= high`.
    """
    low, high = ratio_clip
    if not 0.0 <= low <= high:
        raise ValueError(
            f"ratio_clip={ratio_clip} are no bounds on a ratio; use 0 <= low <= high, e.g. "
            f"{TOKEN_RATIO_CLIP}"
        )
    selected = policy_logprobs[loss_mask]
    log_ratios = selected.detach() - proximal_logprobs.detach()[loss_mask]
    ratios = bounded_ratios(log_ratios).clamp(low, high)
    return scatter_masked(-ratios * selected, loss_mask)


def talr(
    policy_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    tau: float,
    min_weight: float,
) -> Float[Tensor, " token"]:
    """`sg[max(p^(1/tau), w_min)] * l` per token (TALR, arXiv 2509.20758), nats.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient, but for the weight.
        loss_mask: True where a token trains; nothing else is read.
        tau: From `talr.batch_tau`, nats: of the whole step's batch, never of a microbatch.
        min_weight: `w_min`, what a hopeless token keeps, in [0, 1].

    Raises:
        ValueError: `tau` is not above 0 or `min_weight` outside [0, 1].
    """
    if not tau > 0.0:
        raise ValueError(f"tau={tau} is a root of p; use batch_tau's, which is above 0")
    if not 0.0 <= min_weight <= 1.0:
        raise ValueError(
            f"min_weight={min_weight} is the share of the loss that a token keeps; use a value in "
            "[0, 1]"
        )
    selected = policy_logprobs[loss_mask]
    # A log-prob a rounding above 0 would be blown up by a small tau.
    weights = (selected.detach().clamp(max=0.0) / tau).exp().clamp(min=min_weight)
    return scatter_masked(-weights * selected, loss_mask)


def psft(
    policy_logprobs: Float[Tensor, " token"],
    proximal_logprobs: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    clip_low: float = PSFT_CLIP_LOW,
    clip_high: float = PSFT_CLIP_HIGH,
) -> Float[Tensor, " token"]:
    """`-min(r, clip(r, 1 - low, 1 + high))`, `r = p / p_old` (PSFT, arXiv 2508.17784), no unit.

    PPO's surrogate with every advantage 1. A token stops training once its probability is
    `1 + clip_high` times the old one; the low bound never binds, for the smaller of both is taken.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient, through the ratio.
        proximal_logprobs: `p_old`, the policy when this batch's updates began, nats; none.
        loss_mask: True where a token trains; nothing else is read.
        clip_low: Distance below 1, in [0, 1].
        clip_high: Distance above 1, 0 or more.

    Raises:
        ValueError: A clip distance is out of range.
    """
    return clipped_surrogate(
        policy_logprobs,
        proximal_logprobs,
        torch.ones_like(policy_logprobs),
        loss_mask,
        clip_low=clip_low,
        clip_high=clip_high,
    ).losses


def eaft(
    policy_logprobs: Float[Tensor, " token"],
    entropies: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    k: int = EAFT_K,
    power: float = 1.0,
) -> Float[Tensor, " token"]:
    """`sg[(H_k / ln k)^a] * l` per token (EAFT, arXiv 2601.02151), nats.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient, but for the weight.
        entropies: From `logprobs.top_k_entropies` with the same `k`, nats; no gradient.
        loss_mask: True where a token trains; nothing else is read.
        k: How many ids the entropies are over, 2 or more.
        power: `a`, 0 (plain SFT) or more.

    Raises:
        ValueError: `k` is below 2 or `power` below 0.
    """
    if k < MIN_ENTROPY_K or not power >= 0.0:
        raise ValueError(
            f"k={k}, power={power}: the gate (H / ln k)^power needs a k of {MIN_ENTROPY_K} or more "
            f"and a power of 0 or more, e.g. {EAFT_K} and 1"
        )
    selected = policy_logprobs[loss_mask]
    # An entropy a rounding below 0 has no real power.
    gates = (entropies.detach()[loss_mask].clamp(min=0.0) / math.log(k)) ** power
    return scatter_masked(-gates * selected, loss_mask)


def asft(
    policy_logprobs: Float[Tensor, " token"],
    reference_kl: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    kl_coefficient: float = KL_COEFFICIENT,
) -> Float[Tensor, " token"]:
    """`sg[p] * l + c * KL(p_ref || p)` per token (ASFT, arXiv 2509.23753), nats: DFT, anchored.

    Args:
        policy_logprobs: Target policy, nats; gets the gradient.
        reference_kl: KL(reference || policy) over the whole vocabulary, nats, from
            `full_kl.full_kl`; gets the gradient too.
        loss_mask: True where a token trains; nothing else is read.
        kl_coefficient: `c`, 0 or more.

    Raises:
        ValueError: `kl_coefficient` is below 0.
    """
    return dft(policy_logprobs, loss_mask) + _penalty(reference_kl, loss_mask, kl_coefficient)


def sft_kl(
    policy_logprobs: Float[Tensor, " token"],
    reference_kl: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    kl_coefficient: float = KL_COEFFICIENT,
) -> Float[Tensor, " token"]:
    """`l + c * KL(p_ref || p)` per token (SFT+KL, as in arXiv 2509.23753), nats.

    Arguments and errors as in `asft`.
    """
    return nll(policy_logprobs, loss_mask) + _penalty(reference_kl, loss_mask, kl_coefficient)


def _penalty(reference_kl: Tensor, loss_mask: Tensor, kl_coefficient: float) -> Tensor:
    if not kl_coefficient >= 0.0:
        raise ValueError(
            f"kl_coefficient={kl_coefficient} would push the policy away from the reference; use 0 "
            f"or more, e.g. {KL_COEFFICIENT}"
        )
    return scatter_masked(kl_coefficient * reference_kl[loss_mask], loss_mask)
