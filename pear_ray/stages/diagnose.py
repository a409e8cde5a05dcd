"""diagnose: what PEAR would do with the scored corpus, said before anything is trained."""

import json
from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.scores import join_scores, remove_blocks
from pear_ray.config.run import RunConfig
from pear_ray.distributed.scoring import policy_job, score_corpus
from pear_ray.distributed.session import ray_session
from pear_ray.reporting.diagnosis.numbers import diagnose
from pear_ray.reporting.diagnosis.page import write_diagnosis
from pear_ray.reporting.diagnosis.rows import load_diagnosis_rows
from pear_ray.reporting.diagnosis.warnings import diagnosis_warnings
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `diagnose/diagnose.html`, `diagnose.json`, the policy's scores and the manifest.

    Raises:
        EngineError: The engine failed, or answered nonsense.
        ArtifactError: The two scorings are not of the same rows.
    """
    log = MetricsLog(run_dir, run=config.name, stage="diagnose", attempt=attempt)
    stage_dir = run_dir / "diagnose"
    scored = manifest.require_manifest(run_dir / "score")
    num_rows = int(scored.counts["rows"])
    job = policy_job(config, run_dir)
    with ray_session(config.cluster):
        rows_per_s = score_corpus(
            job,
            progress=lambda rows: log.log({"diagnose/rows": rows}, step=rows, num_steps=num_rows),
        )
    join_scores(job.corpus, stage_dir, "policy", keep_given=False)
    diagnosis = diagnose(
        load_diagnosis_rows(run_dir / "score" / "scored", stage_dir / "policy"),
        weights=config.sft.weights,
        proxy_sources=config.score.proxy_sources,
    )
    write_diagnosis(
        diagnosis, stage_dir, name=config.name, facts=[("behavior", json.dumps(_models(config)))]
    )
    for warning in diagnosis_warnings(diagnosis):
        log.event("warning", f"{warning.source}: {warning.headline}: {warning.message}")
    log.log(
        {
            "diagnose/rows": num_rows,
            "diagnose/tokens_per_s": rows_per_s * scored.counts["tokens"] / num_rows,
        },
        step=num_rows,
        num_steps=num_rows,
    )
    made = manifest.complete(stage_dir, counts={"rows": num_rows})
    remove_blocks(stage_dir)
    return made


def _models(config: RunConfig) -> dict[str, str]:
    behavior = config.models.behavior or {}
    return {"all sources": behavior} if isinstance(behavior, str) else behavior
