"""score: behavior log-probs of exactly the corpus's tokens, audited against transformers."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pear_ray.artifacts import manifest
from pear_ray.artifacts.scores import ANY_SOURCE, join_scores, remove_blocks
from pear_ray.artifacts.tables import CORPUS, SCORED, read_table
from pear_ray.config.run import RunConfig
from pear_ray.distributed.scoring import ScoringJob, behavior_job, score_corpus
from pear_ray.distributed.session import ray_session
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.model_files import provenance
from pear_ray.engines.scored_ids import ids_to_score
from pear_ray.errors import EngineError
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `score/scored/*.parquet` and its manifest.

    Raises:
        InputError: A source of the corpus has no behavior model.
        EngineError: An engine failed, or the audit found log-probs that transformers does not.
        ArtifactError: Scores are not of exactly the corpus's token ids.
    """
    log = MetricsLog(run_dir, run=config.name, stage="score", attempt=attempt)
    stage_dir, corpus_dir = run_dir / "score", run_dir / "collect"
    counts = manifest.require_manifest(corpus_dir).counts
    job = behavior_job(config, run_dir)
    num_rows, num_tokens = int(counts["rows"]), int(counts["tokens"])
    with ray_session(config.cluster):
        rows_per_s = score_corpus(
            job,
            progress=lambda rows: log.log({"score/rows": rows}, step=rows, num_steps=num_rows),
        )
    join_scores(
        job.corpus, stage_dir, "scored", keep_given=job.keep_given, top_k=config.score.top_k
    )
    audits = {source: _audit(config, job, source) for source in job.models}
    found = _summary(list(audits.values()))
    log.log(
        found | {"score/rows": num_rows, "score/tokens_per_s": rows_per_s * num_tokens / num_rows},
        step=num_rows,
        num_steps=num_rows,
    )
    made = manifest.complete(
        stage_dir,
        counts={"rows": num_rows, "tokens": num_tokens},
        details=found
        | {
            "sources": {
                source: provenance(model)
                | {
                    "engine": "vllm",
                    "dtype": config.models.dtype,
                    "temperature": 1.0,
                    "audit": audits[source],
                }
                for source, model in job.models.items()
            },
            "given_logprobs": config.score.given,
            # `bytes` is our extension of the paper: log-probs of spans, not of tokens.
            "align": config.models.align,
            "top_k": config.score.top_k,
        },
    )
    remove_blocks(stage_dir)
    return made


def _audit(config: RunConfig, job: ScoringJob, source: str) -> dict[str, float]:
    """Score a spread of the source's rows again with transformers in float32 and compare.

    Raises:
        EngineError: The mean difference is above `score.max_audit_gap`.
    """
    rows = list(_audited_rows(config, job, source))
    if not rows:
        return {}
    again = ids_to_score(config, job.models[source], align=job.align).scored(
        rows, functools.partial(reference_logprobs, job.models[source])
    )
    found = _gap_figures("audit_gap", [(r, e.logprobs) for r, e in zip(rows, again, strict=True)])
    if not found["audit_gap/mean"] <= config.score.max_audit_gap:
        raise EngineError(
            f"the engine's log-probs of {job.models[source]} differ from transformers' by "
            f"{found['audit_gap/mean']:.3g} nats per token on {len(rows)} rows "
            f"(score.max_audit_gap={config.score.max_audit_gap:g}, largest "
            f"{found['audit_gap/max']:.3g}); the scores cannot be trusted: check dtype, "
            "quantisation and model"
        )
    # How far scores are from what was kept while sampling, where that came with the rows.
    given = [(row, row["given_logprobs"]) for row in rows if row["given_logprobs"] is not None]
    return found | (_gap_figures("given_gap", given) if given else {})


def _audited_rows(config: RunConfig, job: ScoringJob, source: str) -> Iterator[dict[str, Any]]:
    """Rows of the source that an engine scored, spread over the corpus."""
    files = sorted((job.folder / "scored").glob("*.parquet"))
    places = np.linspace(0, len(files) - 1, config.score.audit_rows).round().astype(int)
    chosen = [files[place] for place in places]
    for file in sorted(set(chosen)):
        scored = read_table(file, SCORED).to_pylist()
        corpus = read_table(job.corpus / file.name, CORPUS).to_pylist()
        rows = [
            one | row
            for one, row in zip(corpus, scored, strict=True)
            if source in (ANY_SOURCE, row["source"])
            and not (job.keep_given and one["given_logprobs"] is not None)
        ]
        count = min(chosen.count(file), len(rows))
        for place in np.linspace(0, len(rows) - 1, count).round().astype(int):
            yield rows[place]


def _gap_figures(
    name: str, pairs: Sequence[tuple[dict[str, Any], Sequence[float] | np.ndarray]]
) -> dict[str, float]:
    gaps = np.concatenate(
        [
            np.abs(np.asarray(row["behavior_logprobs"]) - np.asarray(other))[row["loss_mask"]]
            for row, other in pairs
        ]
    )
    return {f"{name}/mean": float(gaps.mean()), f"{name}/max": float(gaps.max())}


def _summary(audits: list[dict[str, float]]) -> dict[str, float]:
    """The worst source's figures."""
    names = {name for audit in audits for name in audit}
    return {
        f"score/{name}": max(audit[name] for audit in audits if name in audit)
        for name in sorted(names)
    }
