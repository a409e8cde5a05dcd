"""evaluate: pass@k of every checkpoint on the same held-out problems, with intervals."""

import time
from pathlib import Path
from typing import Any

from pear_ray.artifacts import manifest
from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.tables import EVALUATION_SAMPLES, write_rows
from pear_ray.config.evaluate import MAIN_SUITE, EvaluateConfig
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import engine_spec
from pear_ray.distributed.evaluation import evaluation_requests
from pear_ray.distributed.samplers import SamplerPool
from pear_ray.distributed.session import ray_session
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import resolve_model
from pear_ray.engines.weights import MAX_GAP
from pear_ray.tasks.judging import judge, sample_rows, summarise
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `evaluate/samples.parquet`, `evaluate/results.json` and the manifest.

    Raises:
        RewardError: Too many rewards could not be computed.
        WeightSyncError: An engine did not take a checkpoint's weights.
    """
    log = MetricsLog(run_dir, run=config.name, stage="evaluate", attempt=attempt)
    stage_dir, evaluate = run_dir / "evaluate", config.evaluate
    base = resolve_model(config.models.policy)
    checkpoints = {"base": base, "sft": run_dir / "sft" / "model", "rl": run_dir / "rl" / "model"}
    for stage in ("sft", "rl"):
        manifest.require_manifest(run_dir / stage)
    asked = evaluation_requests(config, ChatTokenizer(base))
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    spec = engine_spec(config, base)
    with (
        ray_session(config.cluster),
        RewardPool(evaluate.rewards) as rewards,
        SamplerPool(config, spec, stage="evaluate") as samplers,
    ):
        for number, (checkpoint, folder) in enumerate(checkpoints.items(), start=1):
            samplers.load(folder, max_gap=MAX_GAP[config.models.dtype])
            started = time.monotonic()
            groups = samplers.generate(
                asked.prompts,
                asked.sampling,
                progress=lambda *_: None,
                prompts_per_call=asked.problems_per_call,
            )
            seconds = time.monotonic() - started
            judged = judge(rewards, asked.problems, groups)
            rows += sample_rows(MAIN_SUITE, checkpoint, asked.problems, groups, judged)
            metrics = summarise(evaluate, judged, seed=config.seed)
            version = config.rl.num_steps if checkpoint == "rl" else 0
            results.append(
                {"checkpoint": checkpoint, "policy_version": version, "metrics": metrics}
            )
            tokens = sum(len(one.token_ids) for group in groups for one in group)
            log.log(
                {f"eval/{name}": each["value"] for name, each in metrics.items()}
                | {"eval/tokens_per_s": tokens / seconds, "eval/tokens": tokens},
                step=number,
                num_steps=len(checkpoints),
            )
    write_rows(stage_dir / "samples.parquet", rows, EVALUATION_SAMPLES)
    write_json(
        stage_dir / "results.json",
        _settings(evaluate, num_problems=len(asked.problems)) | {"checkpoints": results},
    )
    return manifest.complete(
        stage_dir,
        counts={
            "checkpoints": len(results),
            "problems": len(asked.problems),
            "samples": len(rows),
            "tokens": sum(row["num_tokens"] for row in rows),
        },
    )


def _settings(evaluate: EvaluateConfig, *, num_problems: int) -> dict[str, Any]:
    return {
        "num_problems": num_problems,
        "num_samples": evaluate.num_samples,
        "temperature": evaluate.temperature,
        "max_tokens": evaluate.max_tokens,
        "confidence": evaluate.confidence,
        "k": evaluate.k,
    }
