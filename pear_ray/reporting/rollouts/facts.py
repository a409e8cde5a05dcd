"""What the rollouts of a step sum up to, from the columns of its file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pear_ray.artifacts.tables import ROLLOUTS, read_table
from pear_ray.records import FinishReason, RewardStatus

_COLUMNS = (
    "step",
    "policy_version",
    "group",
    "behavior_logprobs",
    "proximal_logprobs",
    "finish_reason",
    "reward_status",
    "reward_value",
    "reward_components",
)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Counts and sums over one step's rollouts.

    Attributes:
        step: Counted from 1.
        versions: The policy versions that sampled, ascending.
        num_groups: Problems of the step.
        num_degenerate: Groups whose judged outcomes are all equal.
        statuses: Rollouts by reward status.
        num_truncated: Completions that were cut.
        reward_sum: Of the judged ones.
        component_sums: The same by component.
        lengths: Tokens of each completion, [rollout].
        gaps: Trainer minus sampler log-prob of each token; None where nothing was trained.
    """

    step: int
    versions: list[int]
    num_groups: int
    num_degenerate: int
    statuses: Counter[str]
    num_truncated: int
    reward_sum: float
    component_sums: dict[str, float]
    lengths: NDArray[np.int64]
    gaps: NDArray[np.float64] | None

    @property
    def num_rollouts(self) -> int:
        """All completions."""
        return len(self.lengths)

    @property
    def num_judged(self) -> int:
        """Those whose reward is a verdict."""
        return self.num_rollouts - self.statuses[RewardStatus.ERRORED]


def step_facts(file: Path) -> StepFacts:
    """The facts of one step's file.

    Raises:
        ArtifactError: It is no such file.
    """
    table = read_table(file, pa.schema([ROLLOUTS.field(name) for name in _COLUMNS]))
    statuses = table["reward_status"].to_pylist()
    judged = [status != RewardStatus.ERRORED for status in statuses]
    outcomes: dict[int, set[str]] = {}
    for group, status, is_verdict in zip(table["group"].to_pylist(), statuses, judged, strict=True):
        outcomes.setdefault(group, set()).update([status] if is_verdict else [])
    components: dict[str, float] = {}
    for pairs, is_verdict in zip(table["reward_components"].to_pylist(), judged, strict=True):
        for name, value in pairs if is_verdict else ():
            components[name] = components.get(name, 0.0) + value
    finished = Counter(table["finish_reason"].to_pylist())
    return StepFacts(
        step=table["step"][0].as_py(),
        versions=sorted(table["policy_version"].unique().to_pylist()),
        num_groups=len(outcomes),
        num_degenerate=sum(len(each) == 1 for each in outcomes.values()),
        statuses=Counter(statuses),
        num_truncated=finished[FinishReason.LENGTH],
        reward_sum=sum(filter(None, table["reward_value"].to_pylist())),
        component_sums=components,
        lengths=_lists(table, "behavior_logprobs").value_lengths().to_numpy().astype(np.int64),
        gaps=_gaps(table),
    )


def _gaps(table: pa.Table) -> NDArray[np.float64] | None:
    if table["proximal_logprobs"].null_count:
        return None
    ours, theirs = (
        _lists(table, name).flatten().to_numpy().astype(np.float64)
        for name in ("proximal_logprobs", "behavior_logprobs")
    )
    return ours - theirs


def _lists(table: pa.Table, name: str) -> pa.ListArray:
    return pa.concat_arrays(table[name].chunks)


def all_lengths(facts: Sequence[StepFacts]) -> NDArray[np.int64]:
    """Tokens of every completion of all steps."""
    return np.concatenate([each.lengths for each in facts])
