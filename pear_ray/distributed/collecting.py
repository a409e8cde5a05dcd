"""A corpus sampled from behavior models: verified, labelled, with its log-probs kept."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.artifacts.tables import CORPUS, PASS_RATES, TableWriter, write_rows
from pear_ray.config.corpus import SampledCorpus, sampling_seed
from pear_ray.config.run import RunConfig
from pear_ray.corpus.prepare import PartSummary
from pear_ray.distributed.capacity import sampler_spec
from pear_ray.distributed.samplers import SamplerPool
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import by_source_name, resolve_behavior, resolve_model
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.errors import InputError
from pear_ray.records import Completion, FinishReason, Problem, Reward, RewardStatus
from pear_ray.tasks.problem_sets import make_problems
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.tasks.reward_totals import check_errored, first_error
from pear_ray.telemetry.metrics_log import MetricsLog


@dataclass(frozen=True, slots=True)
class Answered:
    """One problem with a source's completions of it and their verdicts."""

    source: str
    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]
    verdicts: list[Reward]

    def count(self, status: RewardStatus) -> int:
        """How many verdicts are `status`."""
        return sum(verdict.status is status for verdict in self.verdicts)


def sample_corpus(
    config: RunConfig, corpus: SampledCorpus, stage_dir: Path, log: MetricsLog
) -> tuple[PartSummary, dict[str, float]]:
    """Write the corpus and each problem's pass rate; counts, and what was measured on the way.

    Raises:
        InputError: No completion can be trained on.
        RewardError: Too many rewards could not be computed.
    """
    chat = ChatTokenizer(resolve_model(config.models.policy))
    problems = make_problems(corpus.problems)
    prompts = [chat.prompt_ids(problem.question) for problem in problems]
    answered: list[Answered] = []
    with RewardPool(corpus.rewards) as rewards:
        for source, model in by_source_name(resolve_behavior(config.models.behavior)).items():
            groups = _sample(config, corpus, model, prompts, log)
            pairs = [
                (problem, one.text)
                for problem, group in zip(problems, groups, strict=True)
                for one in group
            ]
            verdicts = iter(rewards.verify_all(pairs))
            answered += [
                Answered(source, problem, prompt, group, [next(verdicts) for _ in group])
                for problem, prompt, group in zip(problems, prompts, groups, strict=True)
            ]
    check_verdicts(corpus, answered)
    summary = PartSummary()
    (stage_dir / "corpus").mkdir(exist_ok=True)
    with TableWriter(stage_dir / "corpus" / "part-000000.parquet", CORPUS) as writer:
        for each in answered:
            for row in corpus_rows(each, keep=corpus.keep):
                writer.write(row)
                summary.count(row)
    write_rows(stage_dir / "pass_rates.parquet", [_pass_rate(a) for a in answered], PASS_RATES)
    if not summary.rows:
        raise InputError(
            f"none of {len(answered) * corpus.samples_per_problem} completions can be trained on, "
            "so there is no corpus; give the behavior model easier problems, raise "
            f"corpus.samples_per_problem or corpus.max_tokens={corpus.max_tokens}"
        )
    return summary, _measured(answered)


def _sample(
    config: RunConfig,
    corpus: SampledCorpus,
    model: Path,
    prompts: Sequence[list[int]],
    log: MetricsLog,
) -> list[list[Completion]]:
    sampling = _samplings(corpus, run_seed=config.seed, num_prompts=len(prompts))
    started = time.monotonic()

    def report(done: int, tokens: int) -> None:
        speed = tokens / (time.monotonic() - started)
        log.log({"collect/tokens_per_s": speed}, step=done, num_steps=len(prompts))

    spec = sampler_spec(config, model, stage="collect")
    with SamplerPool(config, spec, stage="collect") as samplers:
        return samplers.generate(prompts, sampling, progress=report)


def _samplings(corpus: SampledCorpus, *, run_seed: int, num_prompts: int) -> list[Sampling]:
    """How each prompt is sampled, with a seed of its own."""
    seed = sampling_seed(corpus, run_seed=run_seed) * 1_000_003
    return [
        Sampling(
            num_samples=corpus.samples_per_problem,
            temperature=corpus.temperature,
            max_tokens=corpus.max_tokens,
            seed=seed + index,
        )
        for index in range(num_prompts)
    ]


def check_verdicts(corpus: SampledCorpus, answered: Sequence[Answered]) -> None:
    """See that enough rewards could be computed.

    Raises:
        RewardError: They could not.
    """
    verdicts = [verdict for each in answered for verdict in each.verdicts]
    check_errored(
        errored=sum(verdict.status is RewardStatus.ERRORED for verdict in verdicts),
        total=len(verdicts),
        limit=corpus.rewards.max_errored_fraction,
        key="corpus.rewards",
        first=first_error(verdicts),
    )


def corpus_rows(answered: Answered, *, keep: str) -> Iterator[dict[str, Any]]:
    """Distinct completions that ended by themselves: the verified, or with their label all."""
    seen: set[tuple[int, ...]] = set()
    for index, (one, verdict) in enumerate(
        zip(answered.completions, answered.verdicts, strict=True)
    ):
        judged = verdict.status is not RewardStatus.ERRORED
        is_negative = verdict.status is RewardStatus.FAILED
        wanted = judged and (keep == "labelled" or not is_negative)
        ids = tuple(one.token_ids)
        if wanted and one.finish_reason is FinishReason.STOP and ids not in seen:
            seen.add(ids)
            yield _row(answered, index, one, is_negative=is_negative)


def _row(
    answered: Answered, index: int, completion: Completion, *, is_negative: bool
) -> dict[str, Any]:
    prompt, length = answered.prompt_ids, len(completion.token_ids)
    return {
        "example_id": f"{answered.source}/{answered.problem.problem_id}/{index}",
        "source": answered.source,
        "is_negative": is_negative,
        "problem_id": answered.problem.problem_id,
        "file": None,
        "row": None,
        "messages": None,
        "token_ids": [*prompt, *completion.token_ids],
        "loss_mask": [False] * len(prompt) + [True] * length,
        "given_logprobs": [0.0] * len(prompt) + completion.behavior_logprobs,
    }


def _pass_rate(answered: Answered) -> dict[str, Any]:
    correct, failed = answered.count(RewardStatus.OK), answered.count(RewardStatus.FAILED)
    return {
        "problem_id": answered.problem.problem_id,
        "task": answered.problem.task,
        "source": answered.source,
        "num_judged": correct + failed,
        "num_correct": correct,
        "pass_rate": correct / (correct + failed) if correct + failed else None,
    }


def _measured(answered: Sequence[Answered]) -> dict[str, float]:
    every = [one for each in answered for one in each.completions]
    lengths = [len(one.token_ids) for one in every]
    truncated = sum(one.finish_reason is FinishReason.LENGTH for one in every)
    return {
        "collect/verified_fraction": sum(a.count(RewardStatus.OK) for a in answered) / len(every),
        "collect/errored_fraction": (
            sum(a.count(RewardStatus.ERRORED) for a in answered) / len(every)
        ),
        "collect/mean_length": sum(lengths) / len(every),
        "collect/truncated_fraction": truncated / len(every),
        "collect/tokens": sum(lengths),
    }
