"""sft: PEAR-weighted supervised fine-tuning on a Ray Train worker group."""

from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.scores import join_scores, remove_blocks
from pear_ray.artifacts.tables import WEIGHT_SAMPLES, read_table, write_rows
from pear_ray.config.objectives import reference_top_k
from pear_ray.config.run import RunConfig
from pear_ray.config.sft import needs_initial_policy
from pear_ray.distributed.loops import sft_loop
from pear_ray.distributed.scoring import policy_job, score_corpus
from pear_ray.distributed.session import ray_session
from pear_ray.distributed.sft_rows import INITIAL, num_sft_steps, num_training_rows
from pear_ray.distributed.train_group import run_train_group
from pear_ray.engines.model_files import resolve_model
from pear_ray.tasks.problem_sets import with_absolute_paths
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `sft/model` (a Hugging Face folder), the weight samples and the manifest.

    With `sft.lora` also `sft/adapter`, as peft has it; the model is then the merged one. With
    `sft.num_epochs` 0 the model is the one that the run starts from.

    Raises:
        TrainingError: The worker group failed more often than allowed, or diverged.
    """
    stage_dir = run_dir / "sft"
    scored = manifest.require_manifest(run_dir / "score")
    with ray_session(config.cluster):
        if needs_initial_policy(config.sft):
            _score_initial_policy(config, run_dir, attempt=attempt, num_rows=scored.counts["rows"])
        run_train_group(
            sft_loop,
            {
                "config": with_absolute_paths(config),
                "run_dir": run_dir,
                "attempt": attempt,
                "model": resolve_model(config.models.policy),
            },
            cluster=config.cluster,
            stage_dir=stage_dir,
        )
    num_rows = num_training_rows(config.sft, run_dir) - config.sft.heldout_rows
    num_steps = num_sft_steps(config, num_rows=num_rows)
    folder = stage_dir / "weight_samples"
    samples = read_table(folder, WEIGHT_SAMPLES).to_pylist() if num_steps else []
    write_rows(stage_dir / "weight_samples.parquet", samples, WEIGHT_SAMPLES)
    made = manifest.complete(
        stage_dir,
        counts={
            "steps": num_steps,
            "rows": num_rows * config.sft.num_epochs,
            "tokens": scored.counts["tokens"] * config.sft.num_epochs,
        },
    )
    remove_blocks(stage_dir / INITIAL)  # only now: a resumed attempt scores what has none
    return made


def _score_initial_policy(
    config: RunConfig, run_dir: Path, *, attempt: int, num_rows: float
) -> None:
    """Score the corpus under the model that training starts from, where it is not done yet."""
    top_k = reference_top_k(config.sft.objective)
    job = policy_job(config, run_dir, folder=f"sft/{INITIAL}", top_k=top_k)
    job.folder.mkdir(exist_ok=True)
    log = MetricsLog(run_dir, run=config.name, stage="sft", attempt=attempt)
    score_corpus(
        job,
        progress=lambda rows: log.log(
            {"sft/rows_scored_first": rows}, step=rows, num_steps=int(num_rows)
        ),
    )
    join_scores(job.corpus, job.folder, "scored", keep_given=False, top_k=top_k)
