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
# With two trainers: who waits in a collective for the one that is struck must not wait for ever.
FAULTS_OF_TWO = {"killed in sample": 1, "killed in train": 2, "killed in sync": 3}
RANKS = {"killed in sample": 1, "killed in train": 0, "killed in sync": 1}
COMPARED = ("rl/reward/mean", "rl/loss", "rl/grad_norm", "rl/mismatch/mean_gap", "rl/entropy")


def make_loop(
    faults: dict[str, int], ranks: dict[str, int] | None = None
) -> Callable[[dict[str, Any]], None]:
    """The RL loop with `faults`; made here, because workers cannot import a module of tests."""
    here = str(Path(__file__).parent)

    def loop(job: dict[str, Any]) -> None:
        import sys

        sys.path.append(here)
        from rl_faults import Faults

        from pear_ray.distributed.rl_loop import rl_loop

        Faults(faults, job["run_dir"], ranks).plant()
        rl_loop(job)

    return loop


def rl_config(folder: Path, *, max_failures: int, num_trainers: int = 1, **rl: Any) -> RunConfig:
    tree = run_config(folder).model_dump(mode="json")
    tree["rl"] |= {
        "num_steps": NUM_STEPS,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_tokens": 32,
        "checkpoint_every": 1,
    } | rl
    tree["cluster"] |= {
        "num_trainers": num_trainers,
        "cpus_per_worker": 1.0,
        "max_failures": max_failures,
    }
    return validate_run(tree, origin="test")


def train(
    faults: dict[str, int],
    folder: Path,
    *,
    max_failures: int,
    ranks: dict[str, int] | None = None,
    **settings: Any,
) -> float:
    """The seconds until the first number was logged."""
    (folder / "rl").mkdir(parents=True)
    begun = time.time()
    config = rl_config(folder, max_failures=max_failures, **settings)
    job = {"config": config, "run_dir": folder, "attempt": 1, "model": embedded_path("student")}
    loop = make_loop(faults, ranks)
    run_train_group(loop, job, cluster=config.cluster, stage_dir=folder / "rl")
    return read_metrics(folder / "metrics.jsonl")[0].time - begun


def steps_of(folder: Path) -> dict[int, dict[str, float]]:
    records = latest_by_step(read_metrics(folder / "metrics.jsonl"), "rl")
    return {each.step: {name: each.metrics[name] for name in COMPARED} for each in records[1:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"rollouts_ahead": 1, "lora": {"rank": 4}, "kl": {"measure": True}}],
    ids=["as it is", "adapters and rollouts ahead"],
)
def test_faults_in_every_phase_change_no_bit(
    local_ray: None, tmp_path: Path, settings: dict[str, Any]
) -> None:
    undisturbed, struck = tmp_path / "undisturbed", tmp_path / "struck"
    start_s = train({}, undisturbed, max_failures=0, **settings)
    train(FAULTS, struck, max_failures=RESTARTS, **settings)
    check_same(undisturbed, struck, num_steps=NUM_STEPS)
    check_recovered(FAULTS, struck, start_s=start_s)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_killed_rank_of_two_changes_no_bit(local_ray: None, tmp_path: Path, ahead: int) -> None:
    undisturbed, struck = tmp_path / "undisturbed", tmp_path / "struck"
    settings = {"num_trainers": 2, "num_steps": 4, "rollouts_ahead": ahead}
    start_s = train({}, undisturbed, max_failures=0, **settings)
    train(FAULTS_OF_TWO, struck, max_failures=len(FAULTS_OF_TWO), ranks=RANKS, **settings)
    check_same(undisturbed, struck, num_steps=4)
    check_recovered(FAULTS_OF_TWO, struck, start_s=start_s)


def check_recovered(faults: dict[str, int], struck: Path, *, start_s: float) -> None:
    """Every fault struck, and a step was logged within a minute.

    Or, on a machine that is busy with other things, within twice what a group took to start there.
    """
    records = read_metrics(struck / "metrics.jsonl")
    logged = [each for each in records if isinstance(each, MetricRecord)]
    recovered = {}
    for fault in faults:
        at = float((struck / f"struck {fault}").read_text(encoding="utf-8"))
        later = [each.time for each in logged if each.time > at]
        # The last checkpoint is after the last step's numbers: what follows it is the model.
        done = (struck / "rl" / "model" / "config.json").stat().st_mtime
        recovered[fault] = min(later, default=done) - at
    print({fault: round(seconds, 1) for fault, seconds in recovered.items()})
    assert max(recovered.values()) < max(60.0, 2 * start_s)


def check_same(undisturbed: Path, struck: Path, *, num_steps: int) -> None:
    assert steps_of(struck) == steps_of(undisturbed)
    assert sorted(steps_of(struck)) == list(range(1, num_steps + 1))
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
