"""Advantages of rollouts: reward minus the baseline of the group, or of the whole batch."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked, select_loss_tokens


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


def rloo_advantages(
    rewards: Float[Tensor, " row"],
    group_ids: Int[Tensor, " row"],
    valid: Bool[Tensor, " row"] | None = None,
) -> Float32[Tensor, " row"]:
    """`reward - mean of the group's other rewards` per row (RLOO, arXiv 2402.14740).

    That is `n / (n - 1)` times the mean-baseline advantage, n counting valid rows; a row without
    another has none to be compared with, and gets 0.

    Arguments, and what gets exactly 0, as in `grpo_advantages`.
    """
    keep = _keep(rewards, valid)
    selected, group_index, mean = _centred(rewards, group_ids, keep)
    counts = torch.bincount(group_index)[group_index].double()
    equal = _equal_groups(selected, group_index)[group_index]  # a group of one is one of these
    left_out = (selected - mean) * counts / (counts - 1).clamp(min=1)
    return scatter_masked(left_out.masked_fill(equal, 0.0).float(), keep)


def returns_to_go(
    rewards: Float[Tensor, " row"],
    penalties: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """`reward - sum of the penalties from a token on` (REINFORCE++, arXiv 2501.03262).

    Undiscounted. With `kl_k1` times its coefficient as penalties that is the paper's advantage
    before `normalised_over_batch`. 0 outside the mask.

    Args:
        rewards: One per sequence, by its id.
        penalties: One per token, read at loss tokens.
        sequence_ids: The sequence of each position, non-decreasing, an index into `rewards`.
        loss_mask: True where a token trains.

    Raises:
        ValueError: `sequence_ids` decrease.
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    selected = penalties.detach()[loss_tokens.positions].double()
    through = selected.cumsum(0)
    # Of all tokens through its sequence's last one, less those before itself.
    to_go = through[loss_tokens.ends][loss_tokens.sequence_index] - through + selected
    reward = rewards[sequence_ids.index_select(0, loss_tokens.positions)]
    return scatter_masked((reward.double() - to_go).to(penalties.dtype), loss_mask)


def advantage_sums(
    advantages: Float[Tensor, " token"], loss_mask: Bool[Tensor, " token"]
) -> dict[str, float]:
    """Sums over loss tokens for `weight_health.merge` and `normalised_over_batch`."""
    selected = advantages.detach()[loss_mask].double()
    if not selected.numel():
        return {"tokens": 0.0, "advantage": 0.0, "advantage_squared": 0.0}
    low, high = torch.aminmax(selected)
    return {
        "tokens": float(selected.numel()),
        "advantage": float(selected.sum()),
        "advantage_squared": float(selected.square().sum()),
        "min/advantage": float(low),
        "max/advantage": float(high),
    }


def normalised_over_batch(
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    sums: Mapping[str, float],
    *,
    epsilon: float = 1e-8,
) -> Float[Tensor, " token"]:
    """`(A - mean) / (std + epsilon)` with moments of the whole batch (REINFORCE++, 2501.03262).

    The std is the population one. A batch of equal advantages gets exactly 0, and so does what is
    outside the mask.

    Args:
        advantages: One per token of this microbatch.
        loss_mask: True where a token trains.
        sums: `advantage_sums` merged over all microbatches and ranks.
        epsilon: Added to the std.
    """
    selected = advantages.detach()[loss_mask].double()
    if sums["tokens"] == 0.0 or sums["min/advantage"] == sums["max/advantage"]:
        return torch.zeros_like(advantages)
    mean = sums["advantage"] / sums["tokens"]
    std = max(sums["advantage_squared"] / sums["tokens"] - mean**2, 0.0) ** 0.5
    scaled = (selected - mean) / (std + epsilon)
    return scatter_masked(scaled.to(advantages.dtype), loss_mask)


def overlong_penalties(
    lengths: Int[Tensor, " row"], *, max_tokens: int, buffer_tokens: int
) -> Float[Tensor, " row"]:
    """What a completion's length takes off its reward, 0 to -1 (DAPO, arXiv 2503.14476, eq. 13).

    0 up to `max_tokens - buffer_tokens`, then falling linearly to -1 at `max_tokens`.

    Raises:
        ValueError: Not `0 < buffer_tokens <= max_tokens`.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens={buffer_tokens} is no part of max_tokens={max_tokens}; use 1 up to "
            f"{max_tokens}"
        )
    over = lengths.double() - (max_tokens - buffer_tokens)
    return -(over / buffer_tokens).clamp(0.0, 1.0)


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
