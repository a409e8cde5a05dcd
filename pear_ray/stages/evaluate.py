"""evaluate: pass@k of every checkpoint on the same held-out problems, with intervals."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pear_ray.artifacts import manifest
from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.tables import EVALUATION_SAMPLES, TableWriter
from pear_ray.config.evaluate import distinct_rewards
from pear_ray.config.problems import GameProblems
from pear_ray.config.rewards import describe
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import sampler_spec
from pear_ray.distributed.evaluation import Requests, evaluation_requests
from pear_ray.distributed.in_process import reward_pool
from pear_ray.distributed.samplers import Samplers, open_samplers
from pear_ray.distributed.session import ray_session
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import resolve_model
from pear_ray.engines.weights import MAX_GAP
from pear_ray.records import Completion
from pear_ray.tasks.judging import judge, sample_rows, summarise
from pear_ray.tasks.problem_sets import content_of
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
    folders = {"base": base, "sft": run_dir / "sft" / "model", "rl": run_dir / "rl" / "model"}
    checkpoints = {name: folders[name] for name in folders if name in evaluate.checkpoints}
    for stage in ("sft", "rl"):
        manifest.require_manifest(run_dir / stage)
    chat = ChatTokenizer(base)
    asked = evaluation_requests(config, chat)
    results: list[list[dict[str, Any]]] = [[] for _ in asked]
    num_tokens = 0
    with ExitStack() as open_things:
        open_things.enter_context(ray_session(config.cluster))
        # Suites verified alike share a pool; all load while the engines start.
        pools = [
            (rewards, open_things.enter_context(reward_pool(rewards)))
            for rewards in distinct_rewards(evaluate)
        ]
        spec = sampler_spec(config, base, stage="evaluate")
        samplers = open_things.enter_context(open_samplers(config, spec, stage="evaluate"))
        table = open_things.enter_context(
            TableWriter(stage_dir / "samples.parquet", EVALUATION_SAMPLES)
        )
        for number, (checkpoint, folder) in enumerate(checkpoints.items(), start=1):
            samplers.load(folder, max_gap=MAX_GAP[config.models.dtype])
            seconds, tokens, metrics = 0.0, 0, {}
            for place, each in enumerate(asked):
                started = time.monotonic()
                groups = _sample(samplers, each)
                seconds += time.monotonic() - started
                tokens += sum(len(one.token_ids) for group in groups for one in group)
                pool = next(pool for rewards, pool in pools if rewards == each.suite.rewards)
                judged = judge(pool, each.problems, groups)
                for row in sample_rows(each.suite.name, checkpoint, each.problems, groups, judged):
                    table.write(row)
                summary = summarise(each.suite, judged, seed=config.seed)
                version = config.rl.num_steps if checkpoint == "rl" else 0
                results[place].append(
                    {"checkpoint": checkpoint, "policy_version": version, "metrics": summary}
                )
                prefix = "eval" if place == 0 else f"eval/{each.suite.name}"
                metrics |= {f"{prefix}/{name}": one["value"] for name, one in summary.items()}
            num_tokens += tokens
            metrics |= {"eval/tokens_per_s": tokens / seconds, "eval/tokens": tokens}
            log.log(metrics, step=number, num_steps=len(checkpoints))
    suites = [
        _settings(config, chat, each) | {"checkpoints": found}
        for each, found in zip(asked, results, strict=True)
    ]
    write_json(stage_dir / "results.json", {"confidence": evaluate.confidence, "suites": suites})
    return manifest.complete(
        stage_dir, counts=_counts(asked, len(checkpoints)) | {"tokens": num_tokens}
    )


def _counts(asked: Sequence[Requests], num_checkpoints: int) -> dict[str, int]:
    samples = sum(len(each.problems) * each.suite.num_samples for each in asked)
    return {
        "checkpoints": num_checkpoints,
        "suites": len(asked),
        "problems": sum(len(each.problems) for each in asked),
        "samples": num_checkpoints * samples,
    }


def _sample(samplers: Samplers, asked: Requests) -> Sequence[Sequence[Completion]]:
    return samplers.generate(
        asked.prompts,
        asked.sampling,
        progress=lambda *_: None,
        prompts_per_call=asked.problems_per_call,
    )


def _settings(config: RunConfig, chat: ChatTokenizer, asked: Requests) -> dict[str, Any]:
    """What the numbers of a suite are of: they compare only where all of this is the same."""
    suite = asked.suite
    problems, template = suite.problems, str(chat.tokenizer.chat_template or "")
    return {
        "name": suite.name,
        "num_problems": len(asked.problems),
        "num_samples": suite.num_samples,
        "k": list(suite.k),
        "temperature": suite.temperature,
        "max_tokens": suite.max_tokens,
        "seed": config.seed,
        "problems": problems.model_dump(mode="json"),
        "content": content_of(problems).get("problems"),
        "prompt_template": (
            None if isinstance(problems, GameProblems) else problems.prompt_template
        ),
        "first_prompt": asked.first_prompt,
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:20],
        "rewards": describe(suite.rewards),
    }
