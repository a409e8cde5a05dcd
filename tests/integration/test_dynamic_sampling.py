"""Dynamic sampling through the real engine: what trains, what a cap leaves, and exact resume."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import run_config

from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.rl_sampling import Worth, worth_of
from pear_ray.distributed.train_group import run_train_group
from pear_ray.distributed.train_worker import Laps
from pear_ray.embedded.paths import embedded_path
from pear_ray.telemetry.metrics_log import EventRecord, MetricRecord, read_metrics

UNREACHABLE = {"components": [{"kind": "regex", "compare": "match", "pattern": "no such words"}]}


def test_only_informative_groups_train(start_grpo: Any) -> None:
    # Of two completions half the groups at most have both outcomes.
    worker = start_grpo(group_size=2, dynamic_sampling={"max_batches": 6})
    batch = worker.batches.make(0, policy_version=0, laps=Laps())
    sampled = [worth_of(group) for group in batch.sampled]
    assert Worth.DEGENERATE in sampled  # or the test shows nothing
    assert [worth_of(group) for group in batch.groups] == [Worth.INFORMATIVE] * 4
    # The first four of them, in the order of problems.
    informative = [group for group in batch.sampled if worth_of(group) is Worth.INFORMATIVE]
    assert batch.groups == informative[:4]
    assert worker.batches.next_place == len(sampled)
    metrics = worker.step(1)
    assert metrics["rl/dynamic_sampling/filled_fraction"] == 0.0
    assert metrics["rl/dynamic_sampling/cap_reached"] == 0.0
    more = metrics["rl/dynamic_sampling/sampled_groups"]
    assert metrics["rl/dynamic_sampling/kept_fraction"] == 4 / more
    assert worker.batches.next_place == len(sampled) + more
    # Of all that was sampled, as without dynamic sampling.
    assert metrics["rl/degenerate_group_fraction"] > 0
    assert metrics["rl/grad_norm"] > 0


def test_at_the_cap_a_step_goes_on_and_says_so(start_grpo: Any, tmp_path: Path) -> None:
    worker = start_grpo(dynamic_sampling={"max_batches": 2}, rewards=UNREACHABLE)
    for step in range(2):
        metrics = worker.step(step)
        assert metrics["rl/dynamic_sampling/cap_reached"] == 1.0
        assert metrics["rl/dynamic_sampling/rounds"] == 2.0
        assert metrics["rl/dynamic_sampling/sampled_groups"] == 8.0
        assert metrics["rl/dynamic_sampling/filled_fraction"] == 1.0
        assert metrics["rl/dynamic_sampling/discarded_tokens"] > 0
        assert metrics["rl/grad_norm"] == 0.0
    assert worker.batches.next_place == 16
    events = read_metrics(tmp_path / "metrics.jsonl")
    (said,) = [each.message for each in events if isinstance(each, EventRecord)]
    assert "0 of 8 sampled groups have both right and wrong completions" in said


def make_loop(dies_at: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
    """The RL loop; before it trains on each step of `dies_at`, rank 0 is killed once.

    Made here and not named at the top: workers cannot import a module of tests.
    """

    def loop(job: dict[str, Any]) -> None:
        import torch.distributed as dist

        from pear_ray.distributed.rl_loop import GrpoWorker, rl_loop

        update = GrpoWorker.update

        def update_or_die(self: GrpoWorker, minibatches: Any) -> Any:
            step = self.trainer.step_count + 1
            died = job["run_dir"] / f"died-{step}"
            if step in dies_at and dist.get_rank() == 0 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return update(self, minibatches)

        GrpoWorker.update = update_or_die
        rl_loop(job)

    return loop


def rl_config(folder: Path, *, num_trainers: int) -> RunConfig:
    tree = run_config(folder).model_dump(mode="json")
    tree["rl"] |= {
        "dynamic_sampling": {"max_batches": 3},
        "num_steps": 5,
        "max_tokens": 48,
        "checkpoint_every": 2,
        "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.0},
    }
    tree["cluster"] |= {"num_trainers": num_trainers, "cpus_per_worker": 0.5, "max_failures": 2}
    return validate_run(tree, origin="test")


def train(
    folder: Path, *, dies_at: tuple[int, ...] = (), num_trainers: int = 1
) -> tuple[dict[int, dict[str, float]], dict[str, torch.Tensor]]:
    """The last attempt's metrics of each step, and the model."""
    (folder / "rl").mkdir(parents=True)
    config = rl_config(folder, num_trainers=num_trainers)
    job = {"config": config, "run_dir": folder, "attempt": 1, "model": embedded_path("student")}
    run_train_group(make_loop(dies_at), job, cluster=config.cluster, stage_dir=folder / "rl")
    records = read_metrics(folder / "metrics.jsonl")
    of_rl = (each for each in records if isinstance(each, MetricRecord))
    steps = {each.step: each.metrics for each in of_rl if each.step}  # 0 is before training
    return steps, load_file(folder / "rl" / "model" / "model.safetensors")


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    """Without what a machine does differently each time: seconds and bytes."""
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith(("time/", "memory/", "rl/tokens_per_s"))
    }


@pytest.mark.slow
def test_a_killed_run_samples_and_learns_the_same(local_ray: None, tmp_path: Path) -> None:
    """Killed in steps that used other numbers of problems: equal rewards and weights, bit by bit.

    Two ranks sample the same problems and train on the same groups.
    """
    steps, weights = train(tmp_path / "undisturbed")
    assert sorted(steps) == [1, 2, 3, 4, 5]
    counts = [steps[step]["rl/dynamic_sampling/sampled_groups"] for step in sorted(steps)]
    assert sum(counts[:2]) != 8  # what the step alone would say of the place to go on from
    again, same = train(tmp_path / "killed", dies_at=(2, 4))
    assert (tmp_path / "killed" / "died-2").exists()
    assert (tmp_path / "killed" / "died-4").exists()
    for step, metrics in steps.items():
        assert timeless(again[step]) == timeless(metrics)
    assert all(torch.equal(weights[name], same[name]) for name in weights)

    apart, _ = train(tmp_path / "two", num_trainers=2)
    for name in ("rl/dynamic_sampling/sampled_groups", "rl/dynamic_sampling/discarded_tokens"):
        assert apart[1][name] == steps[1][name]
    for name in ("rl/reward/mean", "rl/loss", "rl/grad_norm"):
        torch.testing.assert_close(apart[1][name], steps[1][name], rtol=1e-3, atol=1e-5)
