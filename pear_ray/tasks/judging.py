"""Samples of the evaluation problems with their verdicts, and what they sum up to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pear_ray.algorithms.pass_at_k import bootstrap_interval, pass_at_k
from pear_ray.config.evaluate import EvaluateConfig
from pear_ray.errors import RewardError
from pear_ray.records import Completion, FinishReason, Problem, Reward, RewardStatus
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.tasks.reward_totals import check_errored, first_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What counts of one sample: little enough to gather over ranks."""

    num_tokens: int
    is_truncated: bool
    reward: Reward


def judge(
    pool: RewardPool, problems: Sequence[Problem], groups: Sequence[Sequence[Completion]]
) -> list[list[Judged]]:
    """The completions of each problem, verified.

    Raises:
        RewardError: The pool cannot verify at all.
    """
    rewards = iter(
        pool.verify_all(
            [(p, one.text) for p, group in zip(problems, groups, strict=True) for one in group]
        )
    )
    return [
        [
            Judged(
                num_tokens=len(one.token_ids),
                is_truncated=one.finish_reason is FinishReason.LENGTH,
                reward=next(rewards),
            )
            for one in group
        ]
        for group in groups
    ]


def summarise(
    evaluate: EvaluateConfig, groups: Sequence[Sequence[Judged]], *, seed: int
) -> dict[str, dict[str, float]]:
    """Each metric's value and interval (`value`, `low`, `high`) over problems.

    Errored rewards are left out of a problem's samples, never counted as wrong.

    Args:
        evaluate: Which pass@k, and how sure intervals are to be.
        groups: The samples of each problem, in the problems' order.
        seed: Of the resampling.

    Raises:
        RewardError: More rewards errored than `evaluate.rewards.max_errored_fraction`, or a problem
            has fewer judged samples than the largest k.
    """
    rewards = [one.reward for group in groups for one in group]
    errored = [reward for reward in rewards if reward.status is RewardStatus.ERRORED]
    check_errored(
        errored=len(errored),
        total=len(rewards),
        limit=evaluate.rewards.max_errored_fraction,
        key="evaluate.rewards",
        first=first_error(rewards),
    )
    counts: list[tuple[int, int]] = []
    for group in groups:
        status = [one.reward.status for one in group]
        correct = status.count(RewardStatus.OK)
        counts.append((correct + status.count(RewardStatus.FAILED), correct))
    too_few = [number for number, (num, _) in enumerate(counts) if num < max(evaluate.k)]
    if too_few:
        raise RewardError(
            f"{len(too_few)} problems have fewer than {max(evaluate.k)} judged samples; "
            "raise evaluate.num_samples, or mend the verifier"
        )
    per_problem = {
        f"pass_at_{k}": [pass_at_k(num, correct, k) for num, correct in counts] for k in evaluate.k
    } | {
        "mean_length": [sum(one.num_tokens for one in g) / len(g) for g in groups],
        "truncated_fraction": [sum(one.is_truncated for one in g) / len(g) for g in groups],
    }
    summary = {
        name: _with_interval(values, confidence=evaluate.confidence, seed=seed)
        for name, values in per_problem.items()
    }
    share = len(errored) / len(rewards)
    return summary | {"errored_fraction": {"value": share, "low": share, "high": share}}


def _with_interval(values: list[float], *, confidence: float, seed: int) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(tensor, seed=seed, confidence=confidence)
    return {"value": float(tensor.mean()), "low": low, "high": high}
