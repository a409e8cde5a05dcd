"""evaluate: pass@k of every checkpoint on the same held-out problems, with intervals."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pear_ray.algorithms.pass_at_k import bootstrap_interval, pass_at_k
from pear_ray.artifacts import manifest
from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.tables import EVALUATION_SAMPLES, write_rows
from pear_ray.config.evaluate import EvaluateConfig
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import engine_spec
from pear_ray.distributed.samplers import SamplerPool
from pear_ray.distributed.session import ray_session
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import resolve_model
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.engines.weights import MAX_GAP
from pear_ray.errors import RewardError
from pear_ray.records import Completion, Problem, Reward, RewardStatus
from pear_ray.tasks.held_out import evaluation_problems
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
    problems = evaluation_problems(config)
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
            groups = _sample(config, samplers, ChatTokenizer(base), problems)
            seconds = time.monotonic() - started
            verdicts = rewards.verify_all(
                [(p, one.text) for p, group in zip(problems, groups, strict=True) for one in group]
            )
            rows += _sample_rows(checkpoint, problems, groups, verdicts)
            metrics = summarise(evaluate, groups, verdicts, seed=config.seed)
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
    write_json(stage_dir / "results.json", _settings(evaluate) | {"checkpoints": results})
    return manifest.complete(
        stage_dir,
        counts={
            "checkpoints": len(results),
            "problems": len(problems),
            "samples": len(rows),
            "tokens": sum(row["num_tokens"] for row in rows),
        },
    )


def summarise(
    evaluate: EvaluateConfig,
    groups: Sequence[Sequence[Completion]],
    verdicts: Sequence[Reward],
    *,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Each metric's value and interval (`value`, `low`, `high`) over problems.

    Errored rewards are left out of a problem's samples, never counted as wrong.

    Raises:
        RewardError: More rewards errored than `evaluate.rewards.max_errored_fraction`, or a problem
            has fewer judged samples than the largest k.
    """
    errored = sum(verdict.status is RewardStatus.ERRORED for verdict in verdicts)
    if errored > evaluate.rewards.max_errored_fraction * len(verdicts):
        detail = next(v.detail for v in verdicts if v.status is RewardStatus.ERRORED)
        raise RewardError(
            f"{errored} of {len(verdicts)} rewards could not be computed; the first: {detail}"
        )
    judged = iter(verdicts)
    counts: list[tuple[int, int]] = []
    for group in groups:
        status = [next(judged).status for _ in group]
        correct = status.count(RewardStatus.OK)
        counts.append((correct + status.count(RewardStatus.FAILED), correct))
    too_few = [number for number, (num, _) in enumerate(counts) if num < max(evaluate.k)]
    if too_few:
        raise RewardError(
            f"{len(too_few)} problems have fewer than {max(evaluate.k)} judged samples; "
            "raise evaluate.num_samples, or mend the verifier"
        )
    flat = [one for group in groups for one in group]
    per_problem = {
        f"pass_at_{k}": [pass_at_k(num, correct, k) for num, correct in counts] for k in evaluate.k
    } | {
        "mean_length": [sum(len(one.token_ids) for one in g) / len(g) for g in groups],
        "truncated_fraction": [
            sum(one.finish_reason.value == "length" for one in g) / len(g) for g in groups
        ],
    }
    summary = {
        name: _with_interval(values, confidence=evaluate.confidence, seed=seed)
        for name, values in per_problem.items()
    }
    share = errored / len(flat)
    return summary | {"errored_fraction": {"value": share, "low": share, "high": share}}


def _with_interval(values: list[float], *, confidence: float, seed: int) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(tensor, seed=seed, confidence=confidence)
    return {"value": float(tensor.mean()), "low": low, "high": high}


def _sample(
    config: RunConfig, samplers: SamplerPool, chat: ChatTokenizer, problems: Sequence[Problem]
) -> list[list[Completion]]:
    sampling = [
        Sampling(
            num_samples=config.evaluate.num_samples,
            temperature=config.evaluate.temperature,
            max_tokens=config.evaluate.max_tokens,
            seed=config.seed * 1_000_003 + index,
        )
        for index in range(len(problems))
    ]
    prompts = [chat.prompt_ids(problem.question) for problem in problems]
    return samplers.generate(prompts, sampling, progress=lambda *_: None)


def _sample_rows(
    checkpoint: str,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Completion]],
    verdicts: Sequence[Reward],
) -> list[dict[str, Any]]:
    judged = iter(verdicts)
    rows = []
    for problem, group in zip(problems, groups, strict=True):
        for index, one in enumerate(group):
            verdict = next(judged)
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "problem_id": problem.problem_id,
                    "task": problem.task,
                    "question": problem.question,
                    "sample_index": index,
                    "completion": one.text,
                    "finish_reason": one.finish_reason.value,
                    "reward_status": verdict.status.value,
                    "reward_value": verdict.value,
                    "num_tokens": len(one.token_ids),
                }
            )
    return rows


def _settings(evaluate: EvaluateConfig) -> dict[str, Any]:
    return {
        "num_problems": evaluate.problems.size,
        "num_samples": evaluate.num_samples,
        "temperature": evaluate.temperature,
        "max_tokens": evaluate.max_tokens,
        "confidence": evaluate.confidence,
        "k": evaluate.k,
    }
