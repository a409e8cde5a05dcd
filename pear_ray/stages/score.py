"""score: behavior log-probs of exactly the corpus's tokens, audited against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pear_ray.artifacts import manifest
from pear_ray.artifacts.tables import CORPUS, SCORED, read_table
from pear_ray.config.run import RunConfig
from pear_ray.distributed.scoring import ScoringJob, score_corpus
from pear_ray.distributed.session import ray_session
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.model_files import model_fingerprint, resolve_model
from pear_ray.errors import ArtifactError, EngineError
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `score/scored/*.parquet` and its manifest.

    Raises:
        EngineError: The engine failed, or the audit found log-probs that transformers does not.
        ArtifactError: Scored rows are not exactly the corpus's rows.
    """
    log = MetricsLog(run_dir, run=config.name, stage="score", attempt=attempt)
    stage_dir, corpus_dir = run_dir / "score", run_dir / "collect"
    manifest.require_manifest(corpus_dir)
    behavior = resolve_model(config.models.behavior)
    corpus = read_table(corpus_dir / "corpus.parquet", CORPUS)
    job = ScoringJob(
        config=config,
        model=behavior,
        corpus=corpus_dir / "corpus.parquet",
        output=stage_dir / "scored",
    )
    with ray_session(config.cluster):
        seconds = score_corpus(
            job,
            progress=lambda rows: log.log({"score/rows": rows}, step=rows, num_steps=len(corpus)),
        )
    scored = read_table(stage_dir / "scored", SCORED).sort_by("example_id")
    check_same_rows(corpus.sort_by("example_id"), scored)
    audit = _audit(config, behavior, scored) | _as_sampled(corpus, scored)
    num_tokens = sum(len(ids) for ids in scored["token_ids"])
    log.log(
        audit | {"score/rows": len(scored), "score/tokens_per_s": num_tokens / seconds},
        step=len(scored),
        num_steps=len(scored),
    )
    return manifest.complete(
        stage_dir,
        counts={"rows": len(scored), "tokens": num_tokens},
        details=audit
        | {
            "behavior_model": config.models.behavior,
            "behavior_fingerprint": model_fingerprint(behavior),
            "engine": "vllm",
            "dtype": config.models.dtype,
            "temperature": 1.0,
        },
    )


def check_same_rows(corpus: pa.Table, scored: pa.Table) -> None:
    """See that both tables (sorted by id) hold the same ids with the same tokens and masks.

    Raises:
        ArtifactError: They do not; nothing is ever cut to the shorter.
    """
    if len(corpus) != len(scored):
        raise ArtifactError(
            f"the corpus has {len(corpus)} rows and {len(scored)} are scored; remove the run's "
            "score folder and score again"
        )
    for column in ("example_id", "source", "token_ids", "loss_mask"):
        if not corpus[column].combine_chunks().equals(scored[column].combine_chunks()):
            raise ArtifactError(
                f"scored rows differ from the corpus in {column}; remove the run's score folder "
                "and score again"
            )
    lengths = [len(ids) for ids in scored["token_ids"]]
    if lengths != [len(values) for values in scored["behavior_logprobs"]]:
        raise ArtifactError("some scored rows have another number of log-probs than tokens")


def _audit(config: RunConfig, behavior: Path, scored: pa.Table) -> dict[str, Any]:
    """Score a spread of rows again with transformers in float32 and compare.

    Raises:
        EngineError: The mean difference is above `score.max_audit_gap`.
    """
    wanted = min(config.score.audit_rows, len(scored))
    if not wanted:
        return {}
    places = np.linspace(0, len(scored) - 1, wanted).round().astype(int)
    rows = scored.take(pa.array(places)).to_pylist()
    again = reference_logprobs(behavior, [row["token_ids"] for row in rows])
    gaps = np.concatenate([_gaps(row, values) for row, values in zip(rows, again, strict=True)])
    mean, largest = float(gaps.mean()), float(gaps.max())
    if not mean <= config.score.max_audit_gap:
        raise EngineError(
            f"the engine's log-probs differ from transformers' by {mean:.3g} nats per token on "
            f"{wanted} rows (score.max_audit_gap={config.score.max_audit_gap:g}, largest "
            f"{largest:.3g}); the scores cannot be trusted: check dtype, quantisation and model"
        )
    return {"score/audit_gap/mean": mean, "score/audit_gap/max": largest}


def _as_sampled(corpus: pa.Table, scored: pa.Table) -> dict[str, Any]:
    """How far scores are from the log-probs kept while sampling, where the corpus has them."""
    rows = corpus.sort_by("example_id").select(["sampled_logprobs", "loss_mask"]).to_pylist()
    gaps = [
        _gaps(row | {"behavior_logprobs": values.as_py()}, row["sampled_logprobs"])
        for row, values in zip(rows, scored["behavior_logprobs"], strict=True)
        if row["sampled_logprobs"] is not None
    ]
    return {"score/sampled_gap/mean": float(np.concatenate(gaps).mean())} if gaps else {}


def _gaps(row: dict[str, Any], other: list[float]) -> np.ndarray:
    mask = np.asarray(row["loss_mask"], dtype=bool)
    return np.abs(np.asarray(row["behavior_logprobs"]) - np.asarray(other))[mask]
