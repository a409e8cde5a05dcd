"""sft: PEAR-weighted supervised fine-tuning on a Ray Train worker group."""

from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.tables import WEIGHT_SAMPLES, read_table, write_rows
from pear_ray.config.run import RunConfig
from pear_ray.distributed.session import ray_session
from pear_ray.distributed.sft_loop import num_sft_steps, sft_loop, training_rows
from pear_ray.distributed.train_group import run_train_group
from pear_ray.engines.model_files import resolve_model


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `sft/model` (a Hugging Face folder), the weight samples and the manifest.

    Raises:
        TrainingError: The worker group failed more often than allowed, or diverged.
    """
    stage_dir = run_dir / "sft"
    scored = manifest.require_manifest(run_dir / "score")
    with ray_session(config.cluster):
        run_train_group(
            sft_loop,
            {
                "config": config,
                "run_dir": run_dir,
                "attempt": attempt,
                "model": resolve_model(config.models.policy),
            },
            cluster=config.cluster,
            stage_dir=stage_dir,
        )
    samples = read_table(stage_dir / "weight_samples", WEIGHT_SAMPLES).to_pylist()
    write_rows(stage_dir / "weight_samples.parquet", samples, WEIGHT_SAMPLES)
    num_rows = len(training_rows(run_dir))
    return manifest.complete(
        stage_dir,
        counts={
            "steps": num_sft_steps(config, num_rows=num_rows),
            "rows": num_rows * config.sft.num_epochs,
            "tokens": scored.counts["tokens"] * config.sft.num_epochs,
        },
    )
