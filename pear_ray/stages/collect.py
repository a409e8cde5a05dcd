"""collect: the corpus as token ids, sampled from behavior models or read from where it is."""

import shutil
from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.config.corpus import DatasetCorpus
from pear_ray.config.run import RunConfig
from pear_ray.corpus.finish import finish
from pear_ray.corpus.parts import find_parts
from pear_ray.corpus.prepare import WORK_FOLDERS, PartSummary, prepare_job
from pear_ray.distributed.collecting import sample_corpus
from pear_ray.distributed.preparing import prepare_parts
from pear_ray.distributed.session import ray_session
from pear_ray.engines.model_files import resolve_behavior, resolve_model
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `collect/corpus/*.parquet`, `collect/quarantine.parquet` and the manifest.

    Raises:
        InputError: Too many rows cannot be used, or none was left.
        RewardError: Too many rewards could not be computed.
    """
    log = MetricsLog(run_dir, run=config.name, stage="collect", attempt=attempt)
    stage_dir = run_dir / "collect"
    if isinstance(config.corpus, DatasetCorpus):
        summary, metrics = _prepare(config, config.corpus, stage_dir, log), {}
    else:
        with ray_session(config.cluster):
            summary, metrics = sample_corpus(config, config.corpus, stage_dir, log)
    log.log(
        metrics | {"collect/rows": summary.rows, "collect/bad_rows": summary.num_bad},
        step=1,
        num_steps=1,
    )
    made = manifest.complete(
        stage_dir,
        counts={
            "rows": summary.rows,
            "tokens": summary.tokens,
            "loss_tokens": summary.loss_tokens,
            "negatives": summary.negatives,
            "cut": summary.cut,
            "bad": summary.num_bad,
        },
        details=metrics | {"sources": dict(summary.sources), "bad": dict(summary.bad)},
    )
    for name in WORK_FOLDERS:  # what a resumed attempt would have gone on from
        shutil.rmtree(stage_dir / name, ignore_errors=True)
    return made


def _prepare(
    config: RunConfig, corpus: DatasetCorpus, stage_dir: Path, log: MetricsLog
) -> PartSummary:
    """Read, check and tokenise every part of a corpus that is there."""
    parts = find_parts(corpus)
    policy = resolve_model(config.models.policy)
    behavior = resolve_behavior(config.models.behavior)
    job = prepare_job(config, corpus, policy, behavior, folder=stage_dir)
    with ray_session(config.cluster):
        prepare_parts(
            parts,
            job,
            progress=lambda done: log.log(
                {"collect/parts": done}, step=done, num_steps=len(parts) + 1
            ),
        )
    summary = finish(parts, job)
    for file, why in summary.unreadable.items():
        log.event("warning", f"{file} cannot be read and is left out: {why}")
    if summary.num_bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.bad.most_common())
        log.event("warning", f"{summary.num_bad} rows are in quarantine.parquet: {reasons}")
    return summary
