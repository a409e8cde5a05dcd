"""Key diagnostics of a step's weights, apart for groups of sequences: a corpus's sources.

Sums as in `weight_health`: those of every microbatch and rank, `merge`d there, then finalised once.
Over all groups they add up to the sums of `weight_health.weight_sums`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.pear import LOG_RATIO_CLIP, LOG_WEIGHT_CLIP, PearWeights
from pear_ray.algorithms.weight_health import effective_size

NAMES = (
    "tokens",
    "weight",
    "weight_squared",
    "log_ratio",
    "log_ratio_clip_low",
    "log_ratio_clip_high",
    "log_weight_floor",
    "nll",
)


def group_sums(
    pear: PearWeights,
    policy_logprobs: Float[Tensor, " token"],
    group_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    num_groups: int,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> dict[str, float]:
    """One microbatch's sums over loss tokens per group, for `weight_health.merge`.

    All groups in one product: a sum per group and name would read the tokens as often. Groups
    without a loss token are left out.

    Args:
        pear: The weights and log-ratios of the microbatch.
        policy_logprobs: Target policy, nats; gives the NLL.
        group_ids: The group of each position, 0 to `num_groups - 1`; read at loss tokens only.
        loss_mask: True where a token trains.
        num_groups: Number of groups.
        log_ratio_clip: The bounds that the weights were made with.
        log_weight_clip: The bounds that the weights were made with.
    """
    at = loss_mask.nonzero().squeeze(1)
    weights, log_ratios = pear.weights[at].double(), pear.log_ratios[at]
    # Compared in the dtype they were stored in: float64's -0.08 is not float32's.
    low, high = log_ratios.new_tensor(log_ratio_clip)
    columns = (
        torch.ones_like(weights),
        weights,
        weights.square(),
        log_ratios.double(),
        (log_ratios < low).double(),
        (log_ratios > high).double(),
        (pear.log_weights[at] < log_weight_clip[0]).double(),
        -policy_logprobs.detach()[at].double(),
    )  # in the order of NAMES
    empty = weights.new_zeros(num_groups, len(NAMES))
    rows = empty.index_add_(0, group_ids[at], torch.stack(columns, dim=1)).tolist()
    return {
        _key(group, name): value
        for group, row in enumerate(rows)
        if row[0]
        for name, value in zip(NAMES, row, strict=True)
    }


def finalise_groups(sums: Mapping[str, float], *, num_groups: int) -> list[dict[str, float]]:
    """Metrics of each group from the step's merged `group_sums`; NLL in nats per token.

    Names and meanings as in `weight_health.finalise`, over the group's tokens. `token_share` and
    `weight_share` are of all groups' tokens and weights: the second above the first means that the
    weights favour the group. A group without a token in this step has only its three zeros.
    """
    table = [
        {name: sums.get(_key(group, name), 0.0) for name in NAMES} for group in range(num_groups)
    ]
    all_tokens = sum(row["tokens"] for row in table)
    all_weight = sum(row["weight"] for row in table)
    return [
        {
            "num_tokens": row["tokens"],
            "token_share": row["tokens"] / all_tokens if all_tokens else 0.0,
            "weight_share": row["weight"] / all_weight if all_weight else 0.0,
        }
        | (_means(row) if row["tokens"] else {})
        for row in table
    ]


def _means(row: Mapping[str, float]) -> dict[str, float]:
    tokens = row["tokens"]
    return {
        "nll": row["nll"] / tokens,
        "weight/mean": row["weight"] / tokens,
        "ess_fraction": effective_size(row["weight"], row["weight_squared"]) / tokens,
        "log_ratio/mean": row["log_ratio"] / tokens,
        "log_ratio_clip_low_fraction": row["log_ratio_clip_low"] / tokens,
        "log_ratio_clip_high_fraction": row["log_ratio_clip_high"] / tokens,
        "log_weight_floor_fraction": row["log_weight_floor"] / tokens,
    }


def _key(group: int, name: str) -> str:
    return f"group_{group:02d}_{name}"
