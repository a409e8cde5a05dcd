"""collect: the corpus as token ids, sampled from the behavior model or read from a file."""

import time
from pathlib import Path
from typing import Any

from pear_ray.artifacts import manifest
from pear_ray.artifacts.tables import CORPUS, write_rows
from pear_ray.config.corpus import JsonlCorpus, SampledCorpus
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import engine_spec
from pear_ray.distributed.samplers import SamplerPool
from pear_ray.distributed.session import ray_session
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.corpus_file import read_corpus_file
from pear_ray.engines.model_files import resolve_model
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.errors import InputError, RewardError
from pear_ray.records import Completion, FinishReason, Problem, Reward, RewardStatus
from pear_ray.tasks.games import make_problems
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `collect/corpus.parquet` and its manifest.

    Raises:
        InputError: No row can be trained on, or a row of a corpus file is unusable.
        RewardError: Too many rewards could not be computed.
    """
    log = MetricsLog(run_dir, run=config.name, stage="collect", attempt=attempt)
    stage_dir = run_dir / "collect"
    chat = ChatTokenizer(resolve_model(config.models.policy))
    if isinstance(config.corpus, JsonlCorpus):
        rows = read_corpus_file(
            Path(config.corpus.path), chat, max_model_len=config.models.max_model_len
        )
        metrics: dict[str, float] = {}
    else:
        rows, metrics = _sample(config, config.corpus, chat, log)
    write_rows(stage_dir / "corpus.parquet", rows, CORPUS)
    num_tokens = sum(len(row["token_ids"]) for row in rows)
    loss_tokens = sum(sum(row["loss_mask"]) for row in rows)
    log.log(metrics | {"collect/rows": len(rows)}, step=1, num_steps=1)
    return manifest.complete(
        stage_dir,
        counts={"rows": len(rows), "tokens": num_tokens, "loss_tokens": loss_tokens},
        details=metrics,
    )


def _sample(
    config: RunConfig, corpus: SampledCorpus, chat: ChatTokenizer, log: MetricsLog
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of verified completions of the behavior model, and what was measured on the way."""
    problems = make_problems(corpus.problems)
    prompts = [chat.prompt_ids(problem.question) for problem in problems]
    behavior = resolve_model(config.models.behavior)
    spec = engine_spec(config, behavior)
    sampling = [
        Sampling(
            num_samples=corpus.samples_per_problem,
            temperature=corpus.temperature,
            max_tokens=corpus.max_tokens,
            seed=config.seed * 1_000_003 + index,
        )
        for index in range(len(problems))
    ]
    started = time.monotonic()

    def report(done: int, tokens: int) -> None:
        speed = tokens / (time.monotonic() - started)
        log.log({"collect/tokens_per_s": speed}, step=done, num_steps=len(problems))

    with ray_session(config.cluster), RewardPool(corpus.rewards) as rewards:
        with SamplerPool(config, spec, stage="collect") as samplers:
            completions = samplers.generate(prompts, sampling, progress=report)
        pairs = [
            (problem, one.text)
            for problem, group in zip(problems, completions, strict=True)
            for one in group
        ]
        verdicts = rewards.verify_all(pairs)
    return _corpus_rows(corpus, behavior.name, problems, prompts, completions, verdicts)


def _corpus_rows(
    corpus: SampledCorpus,
    source: str,
    problems: list[Problem],
    prompts: list[list[int]],
    completions: list[list[Completion]],
    verdicts: list[Reward],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Verified, ended, distinct completions as rows."""
    judged = iter(verdicts)
    rows: list[dict[str, Any]] = []
    for problem, prompt, group in zip(problems, prompts, completions, strict=True):
        kept: set[tuple[int, ...]] = set()
        for index, one in enumerate(group):
            ended = one.finish_reason is FinishReason.STOP
            verified = next(judged).status is RewardStatus.OK
            if verified and ended and tuple(one.token_ids) not in kept:
                kept.add(tuple(one.token_ids))
                rows.append(_row(f"{problem.problem_id}/{index}", source, problem, prompt, one))
    everything = [one for group in completions for one in group]
    status = [verdict.status for verdict in verdicts]
    errored = status.count(RewardStatus.ERRORED) / len(status)
    if errored > corpus.rewards.max_errored_fraction:
        detail = next(v.detail for v in verdicts if v.status is RewardStatus.ERRORED)
        raise RewardError(
            f"{errored:.1%} of the corpus's rewards could not be computed "
            f"(corpus.rewards.max_errored_fraction={corpus.rewards.max_errored_fraction:g}); "
            f"the first: {detail}"
        )
    verified = status.count(RewardStatus.OK) / len(status)
    if not rows:
        raise InputError(
            f"none of the behavior model's {len(everything)} completions verified, so there is no "
            f"corpus; give it easier problems, more samples_per_problem, or raise "
            f"corpus.max_tokens={corpus.max_tokens}"
        )
    truncated = [one.finish_reason is FinishReason.LENGTH for one in everything]
    return rows, {
        "collect/verified_fraction": verified,
        "collect/errored_fraction": errored,
        "collect/mean_length": sum(len(one.token_ids) for one in everything) / len(everything),
        "collect/truncated_fraction": sum(truncated) / len(truncated),
        "collect/tokens": sum(len(one.token_ids) for one in everything),
    }


def _row(
    example_id: str, source: str, problem: Problem, prompt: list[int], completion: Completion
) -> dict[str, Any]:
    num_completion = len(completion.token_ids)
    return {
        "example_id": example_id,
        "source": source,
        "problem_id": problem.problem_id,
        "question": problem.question,
        "completion": completion.text,
        "token_ids": [*prompt, *completion.token_ids],
        "loss_mask": [False] * len(prompt) + [True] * num_completion,
        "sampled_logprobs": [0.0] * len(prompt) + completion.behavior_logprobs,
    }
