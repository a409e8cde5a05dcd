"""Rollouts that a step leaves, and training on them again without an engine."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from training_runs import job, parameters_of, run_config

from pear_ray.artifacts.rollouts import read_groups, saved_steps
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.telemetry.metrics_log import read_metrics


def test_a_step_leaves_its_rollouts_with_what_training_found(start_grpo: Any) -> None:
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


def test_steps_between_are_not_kept_where_only_some_are_wanted(start_grpo: Any) -> None:
    worker = start_grpo(save_rollouts_every=2, num_steps=4)
    for step in range(4):
        assert ("time/save_s" in worker.step(step)) == (step != 1)
    assert list(saved_steps(worker.stage_dir / "rollouts")) == [1, 3, 4]


@pytest.mark.parametrize(
    "rl",
    [
        {},
        {
            "updates_per_batch": 2,
            "microbatch_tokens": 100,
            "advantage": "reinforce_pp",
            "loss": {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1},
            "reduction": "seq_mean",
            "kl": {"coefficient": 0.1, "estimator": "k1", "placement": "reward"},
            "overlong": {"buffer_tokens": 32, "mask_truncated": True},
        },
    ],
    ids=["defaults", "all terms"],
)
def test_training_on_saved_rollouts_is_the_step_that_saved_them(
    start_grpo: Any,
    tmp_path: Path,
    rl: dict[str, Any],
) -> None:
    """The same weights, rewards and loss path: to the bit, engine or not."""
    worker = start_grpo(**rl)
    metrics = worker.step(0)
    files = saved_steps(worker.stage_dir / "rollouts")
    replay = replay_worker(tmp_path, [files[1]], **rl)
    again = replay.step(0)
    assert again["rl/policy_lag"] == 0
    assert metrics["rl/grad_norm"] > 0
    engines_own = ("rl/sync_gap", "rl/tokens_per_s")
    of_rl = {name for name in metrics if name.startswith("rl/")}
    compared = {name for name in of_rl if not name.startswith(engines_own)}
    assert {name: again[name] for name in compared} == {name: metrics[name] for name in compared}
    pairs = zip(parameters_of(worker), parameters_of(replay), strict=True)
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)
    # What the replay keeps of the step is what the step kept.
    kept = saved_steps(replay.stage_dir / "rollouts")[1]
    assert pq.read_table(kept).equals(pq.read_table(files[1]))


def test_a_replay_says_how_far_its_rollouts_are_from_the_policy(
    start_grpo: Any,
    tmp_path: Path,
) -> None:
    worker = start_grpo()
    worker.step(0)
    file = saved_steps(worker.stage_dir / "rollouts")[1]
    replay = replay_worker(tmp_path, [file, file])
    first = replay.step(0)
    assert replay.warning(first) == ""
    assert "may be of other weights" in replay.warning(first | {"rl/mismatch/mean_gap": 0.5})
    second = replay.step(1)
    assert second["rl/policy_lag"] == 1
    assert second["rl/mismatch/mean_gap"] > 100 * first["rl/mismatch/mean_gap"]
    assert "have a policy lag of 1 optimizer step(s)" in replay.warning(second)


def test_rollouts_alone_are_those_of_the_run_and_go_on_where_they_stopped(
    start_grpo: Any,
    engine: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pear_ray.distributed import rl_rollouts_loop

    monkeypatch.setattr(rl_rollouts_loop, "open_engine", lambda spec: engine)
    worker = start_grpo(num_steps=3)  # gives the engine the student's weights
    told = asdict_shallow(job(worker_config(tmp_path, num_steps=3), tmp_path, "rl_rollouts"))
    rl_rollouts_loop.rollouts_loop(told)
    folder = tmp_path / "rl_rollouts" / "rollouts"
    files = saved_steps(folder)
    assert list(files) == [1, 2, 3]
    whole = {step: pq.read_table(file) for step, file in files.items()}
    files[2].unlink()
    before = files[3].stat().st_mtime_ns
    rl_rollouts_loop.rollouts_loop(told)
    assert files[3].stat().st_mtime_ns == before
    assert pq.read_table(files[2]).equals(whole[2])
    # `pear rl` itself would sample the same, as long as its weights are the same.
    worker.step(0)
    of_run = pq.read_table(saved_steps(worker.stage_dir / "rollouts")[1])
    trained = ["proximal_logprobs", "advantage"]
    assert of_run.drop_columns(trained).equals(whole[1].drop_columns(trained))
    assert whole[1]["advantage"].null_count == 32
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r.stage == "rl_rollouts"]
    assert [record.step for record in records] == [1, 2, 3, 2]
    values = whole[3]["reward_value"].to_pylist()
    assert records[2].metrics["rl/reward/mean"] == pytest.approx(sum(values) / 32)


def worker_config(tmp_path: Path, **rl: Any) -> RunConfig:
    tree = run_config(tmp_path).model_dump(mode="json")
    tree["rl"] |= rl
    return validate_run(tree, origin="test")


def replay_worker(tmp_path: Path, files: list[Path], **rl: Any) -> Any:
    from pear_ray.distributed.rl_replay import ReplayWorker

    return ReplayWorker(job(worker_config(tmp_path, **rl), tmp_path, "rl_train"), files)


def asdict_shallow(told: Any) -> dict[str, Any]:
    return {name: getattr(told, name) for name in told.__slots__}
