"""The loops that worker groups run. Each is imported where it runs: the driver calls none of them.

vLLM alone takes three CPU seconds and a few hundred MB, in a driver that only waits.
"""
# ruff: noqa: PLC0415 - late imports are what this module is for

from typing import Any

from pear_ray.engines.importing import collector_paused

# What loops write and stages look for.
READY_STAGE, ROLLOUTS_STAGE, REPLAY_STAGE = "ready", "rl_rollouts", "rl_train"
MEASURED_FILE = "measured.json"
SAMPLED_GROUPS = "rl/dynamic_sampling/sampled_groups"

Job = dict[str, Any]


def sft_loop(job: Job) -> None:
    """PEAR-weighted SFT to the last step, and its export."""
    with collector_paused():
        from pear_ray.distributed import sft_loop
    sft_loop.sft_loop(job)


def rl_loop(job: Job) -> None:
    """GRPO to the last step, and its export."""
    with collector_paused():
        from pear_ray.distributed import rl_loop
    rl_loop.rl_loop(job)


def rollouts_loop(job: Job) -> None:
    """The sampling half of `rl_loop`, all steps."""
    with collector_paused():
        from pear_ray.distributed import rl_rollouts_loop
    rl_rollouts_loop.rollouts_loop(job)


def replay_loop(job: Job) -> None:
    """The training half of `rl_loop`, on saved rollouts."""
    with collector_paused():
        from pear_ray.distributed import rl_replay
    rl_replay.replay_loop(job)


def ready_loop(job: Job) -> None:
    """What RL would begin with, sampled and measured."""
    with collector_paused():
        from pear_ray.distributed import ready_loop
    ready_loop.ready_loop(job)
