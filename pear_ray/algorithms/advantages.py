"""Advantages of a group of rollouts: reward minus the group's baseline."""

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked


def grpo_advantages(
    rewards: Float[Tensor, " row"],
    group_ids: Int[Tensor, " row"],
    valid: Bool[Tensor, " row"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float32[Tensor, " row"]:
    """`(reward - group mean) / (group std + epsilon)` per row (GRPO, arXiv 2402.03300).

    The std is the population one (divide by n, not n - 1), so a group of one is defined. A group
    whose valid rewards are all equal gets exactly 0, and so does a row that is not valid.

    Args:
        rewards: One per rollout; read only where `valid` is True.
        group_ids: The group of each row, in any order.
        valid: False where the reward errored: left out of mean and std. All rows when None.
        epsilon: Added to the std.
    """
    keep = _keep(rewards, valid)
    selected, group_index, mean = _centred(rewards, group_ids, keep)
    variance = _group_means((selected - mean) ** 2, group_index)
    advantages = (selected - mean) / (variance.sqrt()[group_index] + epsilon)
    equal = _equal_groups(selected, group_index)[group_index]
    return scatter_masked(advantages.masked_fill(equal, 0.0).float(), keep)


def mean_baseline_advantages(
    rewards: Float[Tensor, " row"],
    group_ids: Int[Tensor, " row"],
    valid: Bool[Tensor, " row"] | None = None,
) -> Float32[Tensor, " row"]:
    """`reward - group mean` per row (Dr. GRPO, arXiv 2503.20783): no division by the std.

    Arguments, and what gets exactly 0, as in `grpo_advantages`.
    """
    keep = _keep(rewards, valid)
    selected, group_index, mean = _centred(rewards, group_ids, keep)
    equal = _equal_groups(selected, group_index)[group_index]
    return scatter_masked((selected - mean).masked_fill(equal, 0.0).float(), keep)


def degenerate_group_fraction(
    rewards: Float[Tensor, " row"],
    group_ids: Int[Tensor, " row"],
    valid: Bool[Tensor, " row"] | None = None,
) -> float:
    """Share of groups whose valid rewards are all equal: they teach nothing.

    Groups without a valid row are not counted, above or below the line.

    Raises:
        ValueError: No row is valid.
    """
    keep = _keep(rewards, valid)
    if not bool(keep.any()):
        raise ValueError(
            f"none of {rewards.numel()} rows has a valid reward, so no group can be judged; look "
            "at the verifier's errors"
        )
    _, group_index = torch.unique(group_ids[keep], return_inverse=True)
    return _equal_groups(rewards[keep].double(), group_index).double().mean().item()


def _keep(
    rewards: Float[Tensor, " row"], valid: Bool[Tensor, " row"] | None
) -> Bool[Tensor, " row"]:
    return torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid


def _centred(
    rewards: Float[Tensor, " row"], group_ids: Int[Tensor, " row"], keep: Bool[Tensor, " row"]
) -> tuple[Float[Tensor, " kept"], Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Valid rewards in float64, the index of their group, and that group's mean."""
    selected = rewards.detach()[keep].double()
    _, group_index = torch.unique(group_ids[keep], return_inverse=True)
    return selected, group_index, _group_means(selected, group_index)[group_index]


def _num_groups(group_index: Int[Tensor, " kept"]) -> int:
    return int(group_index.max()) + 1 if group_index.numel() else 0


def _group_means(
    values: Float[Tensor, " kept"], group_index: Int[Tensor, " kept"]
) -> Float[Tensor, " group"]:
    sums = values.new_zeros(_num_groups(group_index)).index_add_(0, group_index, values)
    return sums / torch.bincount(group_index)


def _equal_groups(
    values: Float[Tensor, " kept"], group_index: Int[Tensor, " kept"]
) -> Bool[Tensor, " group"]:
    """True for groups of equal values; by comparison, since a rounded mean misses some."""
    empty = values.new_zeros(_num_groups(group_index))
    low = empty.scatter_reduce(0, group_index, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, group_index, values, "amax", include_self=False)
    return low == high
