"""Samples of the evaluation problems with their verdicts, and what they sum up to."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from pear_ray.algorithms.pass_at_k import bootstrap_interval
from pear_ray.config.evaluate import Suite
from pear_ray.errors import RewardError
from pear_ray.records import Completion, FinishReason, Problem, RewardStatus
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.tasks.reward_totals import check_errored, first_error, is_verdict
from pear_ray.tasks.sample_metrics import Judged, problem_values


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
                logprob_sum=math.fsum(one.behavior_logprobs),
                reward=next(rewards),
            )
            for one in group
        ]
        for group in groups
    ]


def summarise(
    suite: Suite, groups: Sequence[Sequence[Judged]], *, seed: int
) -> dict[str, dict[str, float]]:
    """Each metric's value and interval (`value`, `low`, `high`) over problems.

    Errored rewards are left out of a problem's samples, never counted as wrong.

    Args:
        suite: Which pass@k, and how sure intervals are to be.
        groups: The samples of each problem, in the problems' order.
        seed: Of the resampling.

    Raises:
        RewardError: More rewards errored than `rewards.max_errored_fraction`, or a problem
            has fewer judged samples than the largest k.
    """
    rewards = [one.reward for group in groups for one in group]
    errored = [reward for reward in rewards if reward.status is RewardStatus.ERRORED]
    check_errored(
        errored=len(errored),
        total=len(rewards),
        limit=suite.rewards.max_errored_fraction,
        key=f"{suite.key}.rewards",
        first=first_error(rewards),
    )
    num_verdicts = [sum(is_verdict(one.reward) for one in group) for group in groups]
    too_few = [number for number in num_verdicts if number < max(suite.k)]
    if too_few:
        raise RewardError(
            f"{len(too_few)} problems have fewer than {max(suite.k)} judged samples; "
            f"raise {suite.key}.num_samples, or mend the verifier"
        )
    values = problem_values(groups, suite.rewards, k=suite.k, num_samples=suite.num_samples)
    return {
        name: _with_interval(each, confidence=suite.confidence, seed=seed)
        for name, each in values.items()
    }


def sample_rows(
    suite: str,
    checkpoint: str,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Completion]],
    judged: Sequence[Sequence[Judged]],
) -> list[dict[str, Any]]:
    """Rows of `EVALUATION_SAMPLES`, from which all of `summarise` can be computed again."""
    rows = []
    for problem, group, verdicts in zip(problems, groups, judged, strict=True):
        for index, (one, verdict) in enumerate(zip(group, verdicts, strict=True)):
            rows.append(
                {
                    "suite": suite,
                    "checkpoint": checkpoint,
                    "problem_id": problem.problem_id,
                    "task": problem.task,
                    "question": problem.question,
                    "sample_index": index,
                    "completion": one.text,
                    "finish_reason": one.finish_reason.value,
                    "reward_status": verdict.reward.status.value,
                    "reward_value": verdict.reward.value,
                    "reward_components": list(verdict.reward.components.items()),
                    "answer": verdict.reward.answer,
                    "num_tokens": verdict.num_tokens,
                    "logprob_sum": verdict.logprob_sum,
                }
            )
    return rows


def _with_interval(values: list[float], *, confidence: float, seed: int) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(tensor, seed=seed, confidence=confidence)
    return {"value": float(tensor.mean()), "low": low, "high": high}
