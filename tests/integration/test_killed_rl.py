"""RL under every fault that we know how to plant: it goes on bitwise, or says in a line why not."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import run_config

from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.train_group import run_train_group
from pear_ray.embedded.paths import embedded_path
from pear_ray.errors import TrainingError
from pear_ray.telemetry.metrics_log import MetricRecord, latest_by_step, read_metrics

# By the phase that it strikes in, the step. A step has one fault at most, struck once.
FAULTS = {
    "reward pool killed": 0,
    "engine raises": 1,
    "killed in sample": 2,
    "killed in reward": 3,
    "killed in train": 4,
    "killed in sync": 5,
    "killed in checkpoint": 6,
}
NUM_STEPS = 7
RESTARTS = len(FAULTS) - 1  # the pool mends itself
COMPARED = ("rl/reward/mean", "rl/loss", "rl/grad_norm", "rl/mismatch/mean_gap", "rl/entropy")


def make_loop(faults: dict[str, int]) -> Callable[[dict[str, Any]], None]:
    """The RL loop with `faults`; made here, because workers cannot import a module of tests."""
    here = str(Path(__file__).parent)

    def loop(job: dict[str, Any]) -> None:
        import sys

        sys.path.append(here)
        from rl_faults import Faults

        from pear_ray.distributed.rl_loop import rl_loop

        Faults(faults, job["run_dir"]).plant()
        rl_loop(job)

    return loop


def rl_config(folder: Path, *, max_failures: int) -> RunConfig:
    tree = run_config(folder).model_dump(mode="json")
    tree["rl"] |= {
        "num_steps": NUM_STEPS,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_tokens": 32,
        "checkpoint_every": 1,
    }
    tree["cluster"] |= {
        "num_trainers": 1,
        "cpus_per_worker": 1.0,
        "max_failures": max_failures,
    }
    return validate_run(tree, origin="test")


def train(faults: dict[str, int], folder: Path, *, max_failures: int) -> None:
    (folder / "rl").mkdir(parents=True)
    config = rl_config(folder, max_failures=max_failures)
    job = {"config": config, "run_dir": folder, "attempt": 1, "model": embedded_path("student")}
    run_train_group(make_loop(faults), job, cluster=config.cluster, stage_dir=folder / "rl")


def steps_of(folder: Path) -> dict[int, dict[str, float]]:
    records = latest_by_step(read_metrics(folder / "metrics.jsonl"), "rl")
    return {each.step: {name: each.metrics[name] for name in COMPARED} for each in records[1:]}


@pytest.mark.slow
def test_faults_in_every_phase_change_no_bit(local_ray: None, tmp_path: Path) -> None:
    undisturbed, struck = tmp_path / "undisturbed", tmp_path / "struck"
    train({}, undisturbed, max_failures=0)
    train(FAULTS, struck, max_failures=RESTARTS)
    records = read_metrics(struck / "metrics.jsonl")
    logged = [each for each in records if isinstance(each, MetricRecord)]
    recovered = {}
    for fault in FAULTS:
        at = float((struck / f"struck {fault}").read_text(encoding="utf-8"))
        later = [each.time for each in logged if each.time > at]
        # The last checkpoint is after the last step's numbers: what follows it is the model.
        done = (struck / "rl" / "model" / "config.json").stat().st_mtime
        recovered[fault] = min(later, default=done) - at
    print({fault: round(seconds, 1) for fault, seconds in recovered.items()})
    assert max(recovered.values()) < 60
    assert steps_of(struck) == steps_of(undisturbed)
    assert sorted(steps_of(struck)) == list(range(1, NUM_STEPS + 1))
    weights, same = (
        load_file(folder / "rl" / "model" / "model.safetensors") for folder in (undisturbed, struck)
    )
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_an_engine_that_raises_with_no_restart_left(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"^the worker group failed: RuntimeError: planted: the device was lost$",
    ):
        train({"engine raises": 0}, tmp_path / "run", max_failures=0)
    struck = float((tmp_path / "run" / "struck engine raises").read_text(encoding="utf-8"))
    assert time.time() - struck < 60
