"""Rollouts on disk: one Parquet file per step of RL, there as a whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.artifacts.partial import partial_of
from pear_ray.artifacts.tables import ROLLOUTS, read_table
from pear_ray.errors import ArtifactError
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    Reward,
    RewardStatus,
    Rollout,
    RolloutGroup,
)

FOLDER = "rollouts"  # within a stage's folder
_PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class TrainedNumbers:
    """What training found of each rollout of a step, in their order.

    Attributes:
        advantages: One number per rollout.
        proximal_logprobs: One number per completion token of each rollout.
    """

    advantages: Sequence[float]
    proximal_logprobs: Sequence[Sequence[float]]


def step_file(folder: Path, step: int) -> Path:
    """Where the rollouts of `step`, counted from 1, are."""
    return folder / f"{_PREFIX}{step:05d}.parquet"


def saved_steps(folder: Path) -> dict[int, Path]:
    """The files of `folder` by step, in order; empty where there is no such folder."""
    files = sorted(folder.glob(f"{_PREFIX}*.parquet"))
    return {int(file.stem.removeprefix(_PREFIX)): file for file in files}


def rollouts_table(
    groups: Sequence[RolloutGroup],
    *,
    step: int,
    places: Sequence[int],
    temperature: float,
    trained: TrainedNumbers | None = None,
) -> pa.Table:
    """One row per rollout.

    Args:
        groups: Some groups of the step.
        step: Counted from 1.
        places: Each group's place in the step.
        temperature: At which the completions were sampled.
        trained: Of all rollouts of `groups`, where they were trained on.
    """
    numbered = [
        (place, index, one)
        for place, group in zip(places, groups, strict=True)
        for index, one in enumerate(group.rollouts)
    ]
    rollouts = [one for _, _, one in numbered]
    rewards = [one.reward for one in rollouts]
    nothing = [None] * len(rollouts)
    columns: dict[str, Sequence[Any]] = {
        "step": [step] * len(rollouts),
        "policy_version": [one.policy_version for one in rollouts],
        "group": [place for place, _, _ in numbered],
        "sample_index": [index for _, index, _ in numbered],
        "problem_id": [one.problem.problem_id for one in rollouts],
        "task": [one.problem.task for one in rollouts],
        "question": [one.problem.question for one in rollouts],
        "entry": [one.problem.entry for one in rollouts],
        "temperature": [temperature] * len(rollouts),
        "prompt_ids": [one.prompt_ids for one in rollouts],
        "token_ids": [one.completion.token_ids for one in rollouts],
        "text": [one.completion.text for one in rollouts],
        "finish_reason": [one.completion.finish_reason.value for one in rollouts],
        "behavior_logprobs": [one.completion.behavior_logprobs for one in rollouts],
        "proximal_logprobs": trained.proximal_logprobs if trained else nothing,
        "reward_status": [each.status.value for each in rewards],
        "reward_value": [
            None if each.status is RewardStatus.ERRORED else each.value for each in rewards
        ],
        "reward_detail": [each.detail for each in rewards],
        "reward_components": [list(each.components.items()) for each in rewards],
        "advantage": trained.advantages if trained else nothing,
    }
    return pa.table(columns, schema=ROLLOUTS)


def write_step(folder: Path, step: int, tables: Sequence[pa.Table]) -> Path:
    """Write all `tables` of a step as its file, in the order of the groups; what was there goes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = step_file(folder, step)
    partial = partial_of(path)
    whole = pa.concat_tables(tables).sort_by(
        [("group", "ascending"), ("sample_index", "ascending")]
    )
    # Of log-probs a dictionary would list every one: files of the demo are a fifth smaller without.
    pq.write_table(whole, partial, compression="zstd", use_dictionary=False)
    partial.replace(path)
    return path


def read_groups(path: Path) -> list[RolloutGroup]:
    """The groups of one step's file, in their places.

    Raises:
        ArtifactError: It is no such file, or its columns do not fit each other.
    """
    rows = read_table(path, ROLLOUTS).to_pylist()
    for row in rows:
        if len(row["token_ids"]) != len(row["behavior_logprobs"]):
            raise ArtifactError(
                f"{path}: group {row['group']}, completion {row['sample_index']} has "
                f"{len(row['behavior_logprobs'])} behavior_logprobs for {len(row['token_ids'])} "
                "token_ids; sample these rollouts again"
            )
    rows.sort(key=lambda row: (row["group"], row["sample_index"]))
    return [
        RolloutGroup([_rollout(row) for row in group])
        for _, group in groupby(rows, key=lambda row: row["group"])
    ]


def _rollout(row: dict[str, Any]) -> Rollout:
    value = row["reward_value"]
    return Rollout(
        problem=Problem(
            problem_id=row["problem_id"],
            task=row["task"],
            question=row["question"],
            entry=row["entry"],
        ),
        prompt_ids=row["prompt_ids"],
        completion=Completion(
            token_ids=row["token_ids"],
            behavior_logprobs=row["behavior_logprobs"],
            text=row["text"],
            finish_reason=FinishReason(row["finish_reason"]),
        ),
        policy_version=row["policy_version"],
        reward=Reward(
            status=RewardStatus(row["reward_status"]),
            # Of an errored reward nobody reads it; the record wants a number.
            value=0.0 if value is None else value,
            detail=row["reward_detail"],
            components=dict(row["reward_components"]),
        ),
    )
