"""Forward KL to the behavior policy over the candidates that scoring kept (distillation)."""

import math
from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked

KlVariant = Literal["tail", "renormalised"]

# Candidates of a normalised distribution may pass a mass of 1 by rounding, not by this much.
MAX_EXCESS_MASS = 1e-3
# exp(-87) is about the smallest normal float32: a mass below it is held there, so that rounding in
# the behavior policy's rest cannot meet log(0).
MIN_LOG_MASS = -87.0
# Log-probs are rounded like the logits they come from, of sizes around this many times 1; so is the
# policy's `1 - sum p`, which is not taken to be smaller than that.
LOGIT_SIZE = 16.0


def forward_kl_top_k(
    policy_candidate_logprobs: Float[Tensor, "token candidate"],
    behavior_candidate_logprobs: Float[Tensor, "token candidate"],
    candidate_mask: Bool[Tensor, "token candidate"],
    loss_mask: Bool[Tensor, " token"],
    *,
    variant: KlVariant = "tail",
    policy_rest_logprobs: Float[Tensor, " token"] | None = None,
) -> Float[Tensor, " token"]:
    """Forward KL(behavior || policy) per token over the kept candidates, nats; 0 outside the mask.

    `sum_v pi_b(v) (log pi_b(v) - log pi_theta(v))`, the distillation loss that PEAR may weight,
    from the k ids of each token that scoring kept. What it does about the others is ours.

    `tail` lumps them into one id of mass `1 - sum p` on both sides: 0 only where both agree on all
    kept ids, never above the KL over the whole vocabulary. `renormalised` divides both sides by
    their kept mass: blind to the mass that the policy has elsewhere, it may be above the full KL.

    Args:
        policy_candidate_logprobs: From `candidate_logprobs`; gets the gradient.
        behavior_candidate_logprobs: The scored table's `top_logprobs`; no gradient. The ids of a
            row must differ.
        candidate_mask: True at real candidates, False at padding, which is never read.
        loss_mask: True where a token trains; nothing else is read.
        variant: See above.
        policy_rest_logprobs: From `candidate_and_rest_logprobs`, for `tail`. Without it the
            policy's rest is `1 - sum p`, held at 2e-6 for float32 (below is rounding): a policy
            surer than that of ids that its teacher doubts is then not pulled back.

    Raises:
        ValueError: A loss token has no candidate, or its candidates' behavior probabilities add up
            to more than 1 or to NaN; `policy_rest_logprobs` with `renormalised`.
    """
    at = loss_mask.nonzero(as_tuple=True)[0]
    mask = candidate_mask[at]
    # Doubles: the sums below are compared with 1. Filled before any arithmetic, so that what stands
    # at padding reaches neither value nor gradient.
    absent = torch.tensor(-torch.inf, dtype=torch.float64, device=mask.device)
    policy = torch.where(mask, policy_candidate_logprobs[at].double(), absent)
    behavior = torch.where(mask, behavior_candidate_logprobs.detach()[at].double(), absent)
    _check_candidates(behavior, mask, at)
    match variant:
        case "tail":
            if policy_rest_logprobs is None:
                rounding = LOGIT_SIZE * torch.finfo(policy_candidate_logprobs.dtype).eps
                rest = log_rest(policy, min_log_mass=math.log(rounding))
            else:
                rest = policy_rest_logprobs[at].double().clamp(min=MIN_LOG_MASS)
            behavior_rest = log_rest(behavior)
            kl = _kept_kl(behavior, policy, mask) + behavior_rest.exp() * (behavior_rest - rest)
        case "renormalised":
            if policy_rest_logprobs is not None:
                raise ValueError("the renormalised KL has no rest; leave policy_rest_logprobs out")
            behavior = behavior - behavior.logsumexp(1, keepdim=True)
            policy = policy - policy.logsumexp(1, keepdim=True)
            kl = _kept_kl(behavior, policy, mask)
        case _:
            assert_never(variant)
    return scatter_masked(kl.to(policy_candidate_logprobs.dtype), loss_mask)


def log_rest(
    logprobs: Float64[Tensor, "token candidate"], *, min_log_mass: float = MIN_LOG_MASS
) -> Float64[Tensor, " token"]:
    """`log(1 - sum_k p_k)` per row (log1mexp of the kept mass), held at `min_log_mass` or above.

    The gradient is 0 where it is held, as where the kept mass is rounded to 1 or above.
    """
    log_mass = logprobs.logsumexp(1).clamp(max=-torch.finfo(torch.float64).tiny)
    # Each form is accurate where the other cancels (Maechler 2012, "Accurately computing
    # log(1 - exp(-|a|))"); both get arguments within their own range, for the gradient's sake.
    half = -math.log(2.0)
    near = (-torch.expm1(log_mass.clamp(min=half))).log()
    far = torch.log1p(-log_mass.clamp(max=half).exp())
    return torch.where(log_mass > half, near, far).clamp(min=min_log_mass)


def _kept_kl(behavior: Tensor, policy: Tensor, mask: Tensor) -> Tensor:
    """`sum_k q (log q - log p)` per row over real candidates."""
    zero = torch.zeros((), dtype=behavior.dtype, device=behavior.device)
    known = mask & (behavior > -torch.inf)  # q = 0 adds nothing, and 0 * inf would be NaN
    gap = torch.where(known, behavior, zero) - torch.where(known, policy, zero)
    return (behavior.exp() * gap).sum(1)


def _check_candidates(behavior: Tensor, mask: Tensor, at: Tensor) -> None:
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise ValueError(
            f"loss token at position {int(at[empty][0])} has no candidate, so there is no teacher "
            "to compare with; score with score.top_k above 0, or mask the token out"
        )
    mass = behavior.logsumexp(1).exp()
    over = ~(mass <= 1.0 + MAX_EXCESS_MASS)  # NaN is over too
    if bool(over.any()):
        raise ValueError(
            f"behavior probabilities of the candidates at position {int(at[over][0])} add up to "
            f"{float(mass[over][0]):.4f}; give log-probs, not logits, of ids that differ"
        )
