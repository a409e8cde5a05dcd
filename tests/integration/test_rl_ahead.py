"""Rollouts a step ahead, with a real engine: whose they are, what runs meanwhile, exact resume."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import parameters_of

from pear_ray.artifacts.rollouts import read_groups, saved_steps
from pear_ray.errors import RewardError

SMALL = {"prompts_per_step": 2, "group_size": 4, "max_tokens": 32, "rollouts_ahead": 1}
OPTIMIZER = {"learning_rate": 1e-3, "warmup_fraction": 0.0}


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What makes a reward section of a verifier's source."""

    def make(source: str) -> dict[str, Any]:
        (tmp_path / "planted_verifier.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        component = {"kind": "function", "function": "planted_verifier:verify"}
        return {"components": [component], "num_processes": 1}

    return make


def tokens_of(worker: Any, step: int) -> list[list[int]]:
    """What trained in a step, counted from 1."""
    groups = read_groups(saved_steps(worker.stage_dir / "rollouts")[step])
    return [one.completion.token_ids for group in groups for one in group.rollouts]


def test_each_step_trains_on_what_the_policy_before_sampled(start_grpo: Any) -> None:
    worker = start_grpo(num_steps=3, optimizer=OPTIMIZER, updates_per_batch=2, **SMALL)
    first, second = (
        [one.token_ids for each in worker.rollouts.sample(step) for one in each.completions]
        for step in range(2)
    )
    found = [worker.step(step) for step in range(3)]
    assert [each["rl/policy_lag"] for each in found] == [0.0, 2.0, 2.0]  # optimizer steps
    assert tokens_of(worker, 1) == first
    assert tokens_of(worker, 2) == second  # of the weights before step 1
    # What was learnt in between shows as a gap, and is weighted for.
    assert found[0]["rl/mismatch/max_gap"] < 1e-4
    assert found[1]["rl/mismatch/mean_gap"] > 100 * found[0]["rl/mismatch/mean_gap"]
    assert found[1]["rl/correction/weight/mean"] != pytest.approx(1.0, abs=1e-5)
    assert all(each["rl/sync_gap"] < 1e-5 for each in found)


def test_verifiers_work_while_the_policy_trains(
    start_grpo: Any, verifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"""
import time
def verify(problem, text):
    time.sleep(0.1)
    with open({str(tmp_path / "verified")!r}, "a") as file:
        file.write(f"{{time.time()}}\\n")
    return len(text) % 2 == 0
"""
    worker = start_grpo(num_steps=2, rewards=verifier(source), **SMALL)
    update, trained = worker.update, []

    def timed(minibatches: Any) -> Any:
        trained.append(time.time())
        result = update(minibatches)
        while time.time() < trained[-1] + 0.5:  # however fast this machine trains
            time.sleep(0.01)
        trained.append(time.time())
        return result

    monkeypatch.setattr(worker, "update", timed)
    worker.step(0)
    worker.step(1)
    verified = [float(line) for line in (tmp_path / "verified").read_text().split()]
    assert len(verified) == 16
    begin, end = trained[:2]
    assert any(begin < at < end for at in verified)
    assert sum(at < begin for at in verified) >= 8  # all of the step's own


def test_what_is_ahead_is_in_the_checkpoint(start_grpo: Any, verifier: Any, tmp_path: Path) -> None:
    """With its rewards: this verifier would not say the same again."""
    source = "import random\ndef verify(problem, text):\n    return random.random() < 0.5\n"
    settings = {"rewards": verifier(source), "optimizer": OPTIMIZER, **SMALL}
    worker = start_grpo(**settings)
    worker.step(0)
    for each in (worker.trainer, *worker.kept):
        each.save(tmp_path / "checkpoint")
    metrics = worker.step(1)
    again = start_grpo(**settings)
    for each in (again.trainer, *again.kept):
        each.load(tmp_path / "checkpoint")
    again.publish_weights()
    repeated = again.step(1)
    bits = ("rl/reward/mean", "rl/loss", "rl/grad_norm", "rl/mismatch/mean_gap", "rl/policy_lag")
    assert {name: repeated[name] for name in bits} == {name: metrics[name] for name in bits}
    pairs = zip(parameters_of(worker), parameters_of(again), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)
    # Both have sampled step 3 with the weights between, whose rewards are another roll of the dice.
    for each in (worker, again):
        each.publish_weights()
        each.step(2)
    assert tokens_of(worker, 3) == tokens_of(again, 3)


def test_a_pool_that_is_left_busy_is_of_no_more_use(start_grpo: Any, verifier: Any) -> None:
    """Answers to what nobody waits for would be taken for those of the next run in this process."""
    source = "import time\ndef verify(problem, text):\n    time.sleep(0.5)\n    return True\n"
    worker = start_grpo(rewards=verifier(source), **SMALL)
    worker.step(0)  # step 2's are under way
    assert worker.pool.is_open
    worker.batches.close()
    assert not worker.pool.is_open
    names = [thread.name for thread in threading.enumerate()]
    deadline = time.monotonic() + 20
    while "rewards" in names and time.monotonic() < deadline:
        time.sleep(0.1)
        names = [thread.name for thread in threading.enumerate()]
    assert "rewards" not in names


def test_nothing_is_sampled_beyond_the_last_step(start_grpo: Any, tmp_path: Path) -> None:
    worker = start_grpo(num_steps=1, **SMALL)
    worker.step(0)
    worker.batches.save(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_verifier_that_always_raises_stops_the_first_step(start_grpo: Any, verifier: Any) -> None:
    source = "def verify(problem, text):\n    raise KeyError('planted')\n"
    worker = start_grpo(rewards=verifier(source), **SMALL)
    with pytest.raises(RewardError, match=r"8 of 8 rewards could not be computed"):
        worker.step(0)
    assert worker.trainer.step_count == 0
