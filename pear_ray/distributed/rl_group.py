"""The worker group of every stage that begins at the SFT checkpoint: rl, its halves and ready."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pear_ray.artifacts import manifest
from pear_ray.config.run import RunConfig
from pear_ray.distributed.handover import sft_checkpoint
from pear_ray.distributed.train_group import run_train_group
from pear_ray.tasks.problem_sets import with_absolute_paths
from pear_ray.telemetry.metrics_log import MetricsLog


def run_from_sft(
    loop: Callable[[dict[str, Any]], None],
    config: RunConfig,
    run_dir: Path,
    *,
    log: MetricsLog,
    stage: str,
    attempt: int,
    **more: Any,
) -> Path:
    """Run `loop` on a worker group from the run's SFT checkpoint; that checkpoint's folder.

    Args:
        loop: What each worker runs; it is given config, run folder, attempt, model and `more`.
        config: The run's.
        run_dir: The run's folder.
        log: Where the gate says what it found.
        stage: Whose folder the group's checkpoints are in.
        attempt: Number of this attempt at the run.
        more: What else the loop is given.

    Raises:
        HandoverError: The SFT checkpoint cannot be trained on or sampled from.
        PearRayError: See `run_train_group`.
    """
    manifest.require_manifest(run_dir / "sft")
    model = sft_checkpoint(config, run_dir, log=log)
    job = {
        "config": with_absolute_paths(config),
        "run_dir": run_dir,
        "attempt": attempt,
        "model": model,
    }
    run_train_group(loop, job | more, cluster=config.cluster, stage_dir=run_dir / stage)
    return model
