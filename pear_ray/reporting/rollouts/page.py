"""The report's rollouts: of a few steps a few groups, best completion beside worst."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.artifacts.rollouts import saved_steps
from pear_ray.artifacts.tables import ROLLOUTS, read_table
from pear_ray.records import FinishReason, RewardStatus
from pear_ray.reporting.outcome import shorten
from pear_ray.reporting.rollouts.facts import StepFacts, step_facts

SHOWN_GROUPS = 2  # of a step


@dataclass(frozen=True, slots=True)
class ShownCompletion:
    """One completion of a group as the page shows it; `label` says which."""

    label: str
    status: str
    facts: str
    text: str


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """One problem of a step with its best and its worst completion."""

    problem_id: str
    task: str
    question: str
    words: str
    completions: list[ShownCompletion]


@dataclass(frozen=True, slots=True)
class ShownStep:
    """One step: what it sums up to, and some of its groups."""

    step: int
    words: str
    groups: list[ShownGroup]


def shown_steps(folder: Path) -> list[ShownStep]:
    """The first step, the middle one and the last, each with a few groups chosen by rule.

    The first groups, by place, whose rewards differ, which alone teach something; where there are
    too few, the first of the others. Empty where nothing was saved.

    Raises:
        ArtifactError: A file cannot be read.
    """
    files = list(saved_steps(folder).values())
    if not files:
        return []
    chosen = sorted({0, (len(files) - 1) // 2, len(files) - 1})
    return [_shown_step(files[place]) for place in chosen]


def _shown_step(file: Path) -> ShownStep:
    facts = step_facts(file)
    groups = _choose(file)
    rows: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in pq.read_table(file, filters=[("group", "in", groups)]).to_pylist():
        rows[row["group"]].append(row)
    return ShownStep(facts.step, _step_words(facts), [_shown_group(rows[each]) for each in groups])


def _choose(file: Path) -> list[int]:
    """The groups to show, by place."""
    names = ("group", "reward_value")
    table = read_table(file, pa.schema([ROLLOUTS.field(name) for name in names]))
    rewards: dict[int, set[float]] = {}
    for group, value in zip(*(table[name].to_pylist() for name in names), strict=True):
        rewards.setdefault(group, set()).update([] if value is None else [value])
    differ = [group for group in sorted(rewards) if len(rewards[group]) > 1]
    others = [group for group in sorted(rewards) if len(rewards[group]) <= 1]
    return sorted([*differ, *others][:SHOWN_GROUPS])


def _shown_group(rows: list[dict[str, Any]]) -> ShownGroup:
    rows = sorted(rows, key=lambda row: row["sample_index"])
    judged = [row for row in rows if row["reward_value"] is not None]
    num_right = sum(row["reward_status"] == RewardStatus.OK for row in rows)
    first = rows[0]
    return ShownGroup(
        problem_id=first["problem_id"],
        task=first["task"],
        question=first["question"],
        words=f"{num_right} of {len(rows)} completions right",
        completions=_ends(judged) if judged else [_shown("not judged", first)],
    )


def _ends(judged: Sequence[dict[str, Any]]) -> list[ShownCompletion]:
    best = max(judged, key=lambda row: row["reward_value"])  # the first of several
    worst = min(judged, key=lambda row: row["reward_value"])
    if best["reward_value"] == worst["reward_value"]:
        return [_shown("all rewards alike", best)]
    return [_shown("best", best), _shown("worst", worst)]


def _shown(label: str, row: dict[str, Any]) -> ShownCompletion:
    value, components = row["reward_value"], row["reward_components"]
    told = ["no reward" if value is None else f"reward {value:.3g}"]
    if len(components) > 1:
        told.append("(" + ", ".join(f"{name} {each:.3g}" for name, each in components) + ")")
    if row["advantage"] is not None:
        told.append(f"advantage {row['advantage']:+.3g}")
    cut = ", cut" if row["finish_reason"] == FinishReason.LENGTH else ""
    told.append(f"{len(row['token_ids'])} tokens{cut}")
    return ShownCompletion(label, row["reward_status"], " · ".join(told), shorten(row["text"]))


def _step_words(facts: StepFacts) -> str:
    judged = max(1, facts.num_judged)
    told = [
        f"{facts.num_rollouts:,} completions of {facts.num_groups:,} problems",
        f"mean reward {facts.reward_sum / judged:.3f}",
        f"{100 * facts.statuses[RewardStatus.OK] / judged:.1f} % right",
        f"{facts.lengths.mean():.1f} tokens on average",
        f"{100 * facts.num_truncated / facts.num_rollouts:.1f} % cut",
    ]
    if facts.gaps is not None:
        told.append(f"sampler to trainer {np.abs(facts.gaps).mean():.1g} nats per token")
    return ", ".join(told)
