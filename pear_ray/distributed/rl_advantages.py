"""Rollouts as rows to train on, and an advantage for each of their tokens."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pear_ray.algorithms import advantages, weight_health
from pear_ray.algorithms.policy_losses import kl_k1, kl_k2, kl_k3
from pear_ray.config.rl import RlConfig
from pear_ray.distributed.rl_rollouts import is_errored
from pear_ray.engines.batches import Row, TokenBatch
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.records import FinishReason, Rollout, RolloutGroup

ALIGNED = ("behavior_logprobs", "trains")
KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Rows that go through the policy together.

    Attributes:
        rows: Their places among this rank's rollouts of the step; none on a rank that has run out.
        batch: The same as tensors.
    """

    rows: list[int]
    batch: TokenBatch


def rollout_row(rollout: Rollout, *, mask_truncated: bool) -> Row:
    """A rollout as a row; `trains` is 0 where it was cut off and such are masked.

    All completion tokens are loss tokens of the batch, so that those too are measured.
    """
    num_prompt, completion = len(rollout.prompt_ids), rollout.completion
    num_tokens = len(completion.token_ids)
    is_masked = mask_truncated and completion.finish_reason is FinishReason.LENGTH
    return Row(
        token_ids=[*rollout.prompt_ids, *completion.token_ids],
        loss_mask=[False] * num_prompt + [True] * num_tokens,
        aligned={
            "behavior_logprobs": [0.0] * num_prompt + completion.behavior_logprobs,
            "trains": [float(not is_masked)] * (num_prompt + num_tokens),
        },
    )


def reward_tensors(
    groups: Sequence[RolloutGroup],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, group of each, and whether it is a verdict at all: [row] each."""
    rows = [(one, number) for number, group in enumerate(groups) for one in group.rollouts]
    return (
        torch.tensor([one.reward.value for one, _ in rows], dtype=torch.float32),
        torch.tensor([number for _, number in rows]),
        torch.tensor([not is_errored(one) for one, _ in rows]),
    )


def give_advantages(
    microbatches: Sequence[Microbatch], groups: Sequence[RolloutGroup], settings: RlConfig
) -> None:
    """Put `advantages` beside the tokens of all of this rank's microbatches of a step.

    A collective where the whole batch is normalised. With the KL in the reward the batches have
    `proximal_logprobs` and `reference_logprobs` already.
    """
    rewards, group_ids, valid = reward_tensors(groups)
    rewards = rewards + _length_penalties(groups, settings)
    penalties = [_penalties(each.batch, settings) for each in microbatches]
    if settings.advantage in ("reinforce_pp", "reinforce_pp_baseline"):
        if settings.advantage == "reinforce_pp_baseline":
            rewards = advantages.mean_baseline_advantages(rewards, group_ids, valid)
        found = _normalised_returns(microbatches, penalties, rewards, valid)
    else:
        estimate = {
            "grpo": advantages.grpo_advantages,
            "mean_baseline": advantages.mean_baseline_advantages,
            "rloo": advantages.rloo_advantages,
        }[settings.advantage]
        for each, penalty in zip(microbatches, penalties, strict=True):
            taken = torch.zeros(len(each.rows), dtype=torch.float64)
            taken.index_add_(0, each.batch.sequence_ids.cpu(), penalty.double().cpu())
            rewards[each.rows] -= taken.to(rewards.dtype)
        by_row = estimate(rewards, group_ids, valid)
        found = [_of_tokens(by_row, each) for each in microbatches]
    for each, values in zip(microbatches, found, strict=True):
        each.batch.aligned["advantages"] = values


def _normalised_returns(
    microbatches: Sequence[Microbatch],
    penalties: Sequence[torch.Tensor],
    rewards: torch.Tensor,
    valid: torch.Tensor,
) -> list[torch.Tensor]:
    """REINFORCE++'s advantages; [token] for each microbatch."""
    returns, masks = [], []
    sums: dict[str, float] = {}
    for each, penalty in zip(microbatches, penalties, strict=True):
        batch = each.batch
        of_row = rewards[each.rows].to(penalty.device)
        returns.append(
            advantages.returns_to_go(of_row, penalty, batch.sequence_ids, batch.loss_mask)
        )
        masks.append(_of_tokens(valid, each) & trained_mask(batch))
        sums = weight_health.merge(sums, advantages.advantage_sums(returns[-1], masks[-1]))
    sums = functools.reduce(weight_health.merge, gather_over_ranks(sums))
    return [
        advantages.normalised_over_batch(values, mask, sums)
        for values, mask in zip(returns, masks, strict=True)
    ]


def trained_mask(batch: TokenBatch) -> torch.Tensor:
    """[token], False at tokens of completions that are left out of the loss."""
    return batch.loss_mask & batch.aligned["trains"].bool()


def _of_tokens(by_row: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """[token] from [row]."""
    ids = microbatch.batch.sequence_ids
    return by_row[microbatch.rows].to(ids.device)[ids]


def _length_penalties(groups: Sequence[RolloutGroup], settings: RlConfig) -> torch.Tensor:
    """[row], 0 or less."""
    lengths = [len(one.completion.token_ids) for group in groups for one in group.rollouts]
    overlong = settings.overlong
    if overlong.buffer_tokens is None:
        return torch.zeros(len(lengths))
    found = advantages.overlong_penalties(
        torch.tensor(lengths), max_tokens=settings.max_tokens, buffer_tokens=overlong.buffer_tokens
    )
    return (overlong.penalty * found).float()


def _penalties(batch: TokenBatch, settings: RlConfig) -> torch.Tensor:
    """What the KL takes off the reward at each token, [token]."""
    if not (settings.kl.coefficient and settings.kl.placement == "reward"):
        return torch.zeros_like(batch.aligned["behavior_logprobs"])
    kl = KL_ESTIMATORS[settings.kl.estimator]
    policy, reference = (batch.aligned[f"{name}_logprobs"] for name in ("proximal", "reference"))
    return settings.kl.coefficient * kl(policy, reference, batch.loss_mask)
