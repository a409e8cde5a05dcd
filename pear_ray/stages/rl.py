"""rl: GRPO on a colocated worker group, from the SFT checkpoint."""

from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.config.run import RunConfig
from pear_ray.distributed.loops import SAMPLED_GROUPS, rl_loop
from pear_ray.distributed.rl_group import run_from_sft
from pear_ray.distributed.session import ray_session
from pear_ray.telemetry.metrics_log import MetricsLog, latest_by_step, read_metrics


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `rl/model` (a Hugging Face folder) and the manifest.

    With `rl.lora` also `rl/adapter`, as peft has it; the model is then the merged one.

    Raises:
        HandoverError: The SFT checkpoint cannot be trained on.
        TrainingError: The worker group failed more often than allowed, or diverged.
        WeightSyncError: An engine did not hold the trainer's weights.
        RewardError: Too many rewards could not be computed.
    """
    stage_dir = run_dir / "rl"
    log = MetricsLog(run_dir, run=config.name, stage="rl", attempt=attempt)
    with ray_session(config.cluster):
        run_from_sft(rl_loop, config, run_dir, log=log, stage="rl", attempt=attempt)
    records = latest_by_step(read_metrics(run_dir / "metrics.jsonl"), "rl")
    per_group = config.rl.group_size
    # Step 0 is an evaluation before training. With dynamic sampling steps sample more than they
    # train on.
    steps = [record.metrics for record in records if record.step]
    rollouts = [per_group * each.get(SAMPLED_GROUPS, config.rl.prompts_per_step) for each in steps]
    lengths = [each["rl/completion_length/mean"] for each in steps]
    return manifest.complete(
        stage_dir,
        counts={
            "steps": config.rl.num_steps,
            "rollouts": round(sum(rollouts)),
            "tokens": round(sum(n * mean for n, mean in zip(rollouts, lengths, strict=True))),
        },
    )
