"""rl_rollouts: the sampling half of `rl` from the SFT checkpoint, an artifact of its own."""

import statistics
from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.rollouts import FOLDER, saved_steps
from pear_ray.config.run import RunConfig
from pear_ray.distributed.loops import ROLLOUTS_STAGE as STAGE
from pear_ray.distributed.loops import rollouts_loop
from pear_ray.distributed.rl_group import run_from_sft
from pear_ray.distributed.session import ray_session
from pear_ray.errors import StopRequested
from pear_ray.reporting.rollouts.summary import summarise
from pear_ray.telemetry.metrics_log import MetricsLog, latest_by_step, read_metrics


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `rl_rollouts/rollouts`, one file per step, and the manifest with its summary.

    Steps that are there are passed over.

    Raises:
        HandoverError: The SFT checkpoint cannot be sampled from.
        TrainingError: The worker group failed more often than allowed.
        RewardError: Too many rewards could not be computed.
        StopRequested: SIGTERM came; the steps done are there.
    """
    stage_dir = run_dir / STAGE
    log = MetricsLog(run_dir, run=config.name, stage=STAGE, attempt=attempt)
    with ray_session(config.cluster):
        run_from_sft(rollouts_loop, config, run_dir, log=log, stage=STAGE, attempt=attempt)
    files = saved_steps(stage_dir / FOLDER)
    if len(files) < config.rl.num_steps:
        raise StopRequested(
            f"{STAGE} stopped after {len(files)} of {config.rl.num_steps} steps, as SIGTERM asked; "
            "run the same command again to go on"
        )
    records = latest_by_step(read_metrics(run_dir / "metrics.jsonl"), STAGE)
    speed = statistics.median(each.metrics["rl/tokens_per_s"] for each in records)
    summary = summarise(list(files.values()), tokens_per_s=speed)
    counts = {"steps": len(files), "rollouts": summary["rollouts"], "tokens": summary["tokens"]}
    return manifest.complete(stage_dir, counts=counts, details={"summary": summary})
