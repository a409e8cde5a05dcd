"""Rollouts that a step leaves, and training on them again without an engine."""

from typing import Any

import pyarrow.parquet as pq
import pytest
from test_grpo_steps import start_grpo  # noqa: F401 - a fixture

from pear_ray.artifacts.rollouts import read_groups, saved_steps


def test_a_step_leaves_its_rollouts_with_what_training_found(start_grpo: Any) -> None:  # noqa: F811
    worker = start_grpo()
    metrics = worker.step(0)
    files = saved_steps(worker.stage_dir / "rollouts")
    assert list(files) == [1]
    groups = read_groups(files[1])
    assert [len(group.rollouts) for group in groups] == [8] * 4
    again = worker.rollouts.sample(0)
    assert [group.rollouts[0].problem for group in groups] == [each.problem for each in again]
    rows = pq.read_table(files[1]).to_pylist()
    values = [row["reward_value"] for row in rows]
    assert sum(values) / 32 == pytest.approx(metrics["rl/reward/mean"], rel=1e-6)
    for group in range(4):
        of_group = [row for row in rows if row["group"] == group]
        # GRPO's sum to nothing in a group and are in the order of the rewards.
        assert sum(row["advantage"] for row in of_group) == pytest.approx(0, abs=1e-5)
        best = max(of_group, key=lambda row: row["reward_value"])
        assert best["advantage"] == max(row["advantage"] for row in of_group)
    gaps = [
        abs(ours - theirs)
        for row in rows
        for ours, theirs in zip(row["proximal_logprobs"], row["behavior_logprobs"], strict=True)
    ]
    assert len(gaps) == sum(len(row["token_ids"]) for row in rows)
    assert max(gaps) == pytest.approx(metrics["rl/mismatch/max_gap"], rel=1e-3)
    assert sum(gaps) / len(gaps) == pytest.approx(metrics["rl/mismatch/mean_gap"], rel=1e-3)


def test_steps_between_are_not_kept_where_only_some_are_wanted(start_grpo: Any) -> None:  # noqa: F811
    worker = start_grpo(save_rollouts_every=2, num_steps=4)
    for step in range(4):
        assert ("time/save_s" in worker.step(step)) == (step != 1)
    assert list(saved_steps(worker.stage_dir / "rollouts")) == [1, 3, 4]
