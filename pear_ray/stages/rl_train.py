"""rl_train: the training half of `rl` on saved rollouts, an artifact of its own."""

from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.replay import rollout_files
from pear_ray.config.run import RunConfig
from pear_ray.distributed.handover import sft_checkpoint
from pear_ray.distributed.loops import REPLAY_STAGE as STAGE
from pear_ray.distributed.loops import replay_loop
from pear_ray.distributed.session import ray_session
from pear_ray.distributed.train_group import run_train_group
from pear_ray.telemetry.metrics_log import MetricsLog, latest_by_step, read_metrics


def run(config: RunConfig, run_dir: Path, *, attempt: int, rollouts: Path) -> manifest.Manifest:
    """Write `rl_train/model` (a Hugging Face folder) and the manifest; `rollouts` has the files.

    Raises:
        HandoverError: The SFT checkpoint cannot be trained on.
        TrainingError: The worker group failed more often than allowed, or diverged.
        ArtifactError: A file of `rollouts` cannot be read.
    """
    stage_dir = run_dir / STAGE
    manifest.require_manifest(run_dir / "sft")
    log = MetricsLog(run_dir, run=config.name, stage=STAGE, attempt=attempt)
    model = sft_checkpoint(config, run_dir, log=log)
    files = rollout_files(rollouts, config)
    if config.rl.pass_at_k is not None:
        log.event("warning", "rl.pass_at_k is left out: --train-only starts no engine")
    with ray_session(config.cluster):
        run_train_group(
            replay_loop,
            {
                "config": config,
                "run_dir": run_dir,
                "attempt": attempt,
                "model": model,
                "files": files,
            },
            cluster=config.cluster,
            stage_dir=stage_dir,
        )
    records = latest_by_step(read_metrics(run_dir / "metrics.jsonl"), STAGE)
    return manifest.complete(
        stage_dir,
        counts={
            "steps": config.rl.num_steps,
            "rollouts": config.rl.num_steps * config.rl.prompts_per_step * config.rl.group_size,
        },
        details={
            "rollouts": str(rollouts),
            "max_policy_lag": max(abs(each.metrics["rl/policy_lag"]) for each in records),
        },
    )
