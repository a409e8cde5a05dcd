"""Steps with a slow verifier, for benchmarks/rl.py: each way in a process of its own."""

import statistics
import time
from pathlib import Path
from typing import Any

from rl_measures import WARM_UP, drive, grpo_worker, share_of_digits
from sft_measures import one_process

TIMED = 10  # steps
PROCESSES = 2
# 64 completions in two processes: longer than sampling, shorter than training on the 7M model.
ASLEEP_S = 0.05


def slow_reward(problem: Any, completion: str) -> float:  # noqa: ARG001 - how verifiers are called
    """As cheap as `rl_measures.reward`, and as slow as one that waits for something."""
    time.sleep(ASLEEP_S)
    return share_of_digits(completion)


def steps_with_a_slow_verifier(folder: str, ahead: int) -> dict[str, float]:
    """Median seconds of a step and of its phases, and what the rollouts lag behind."""
    one_process()
    num_steps = WARM_UP + TIMED + 1  # the last samples nothing ahead
    component = {"kind": "function", "function": "rl_ahead:slow_reward"}
    rewards = {"components": [component], "num_processes": PROCESSES}
    run = Path(folder) / str(ahead)
    run.mkdir()
    (run / "model").symlink_to((Path(folder) / "model").resolve())
    worker = grpo_worker(str(run), num_steps, rewards=rewards, rollouts_ahead=ahead)
    worker.pool.wait_until_ready()
    seen: list[dict[str, float]] = []
    drive(worker, num_steps, seen.append)
    worker.pool.close()
    timed = seen[WARM_UP:-1]
    names = ("step", "sample", "reward", "train", "sync")
    found = {name: statistics.median(each[f"time/{name}_s"] for each in timed) for name in names}
    lags = [each.get("rl/policy_lag", 0.0) for each in timed]
    gaps = [each["rl/mismatch/mean_gap"] for each in timed]
    return found | {"lag": statistics.mean(lags), "gap": max(gaps)}
