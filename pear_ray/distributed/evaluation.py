"""The one evaluator: what the evaluate stage asks of a checkpoint, also while a stage trains."""

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pear_ray.config.evaluate import PassAtKConfig, Suite, suites_of
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import sampler_spec
from pear_ray.distributed.in_process import close_rewards, open_engine, open_rewards
from pear_ray.distributed.train_worker import export
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.trainer import Trainer
from pear_ray.engines.vllm.spec import MAX_NUM_SEQS, Sampling
from pear_ray.engines.weights import MAX_GAP, load_checkpoint
from pear_ray.records import Problem
from pear_ray.tasks.judging import judge, summarise
from pear_ray.tasks.problem_sets import evaluation_problems
from pear_ray.tasks.sample_metrics import Judged

if TYPE_CHECKING:
    from pear_ray.engines.vllm.engine import VllmEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What every checkpoint is asked of a suite: problems, with prompt ids and sampling of each.

    Attributes:
        first_prompt: The first problem's prompt as text, as the chat template writes it.
        problems_per_call: What an engine is given at once; the suite alone decides.
            Where rounding depends on what shares a batch, calls cut by the number of engines would
            let that number decide tokens.
    """

    suite: Suite
    problems: list[Problem]
    prompts: list[list[int]]
    first_prompt: str
    sampling: list[Sampling]
    problems_per_call: int

    def calls(self) -> list[slice]:
        """The places of each call's problems."""
        size = self.problems_per_call
        return [slice(begin, begin + size) for begin in range(0, len(self.problems), size)]


def evaluation_requests(config: RunConfig, chat: ChatTokenizer) -> list[Requests]:
    """The requests of every suite, in order.

    Raises:
        ConfigError: The games cannot give that many problems.
        InputError: A suite's problems cannot be used.
    """
    suites = suites_of(config.evaluate)
    return [
        _requests(config, chat, suite, problems)
        for suite, problems in zip(suites, evaluation_problems(config, suites), strict=True)
    ]


def first_requests(
    config: RunConfig, chat: ChatTokenizer, *, num_problems: int | None = None
) -> Requests:
    """The requests of the first suite, or those of its first `num_problems` problems.

    Raises:
        ConfigError: The games cannot give that many problems.
        InputError: The suite's problems cannot be used.
    """
    suite = suites_of(config.evaluate)[0]
    (problems,) = evaluation_problems(config, [suite])
    return _requests(config, chat, suite, problems[:num_problems])


def _requests(
    config: RunConfig, chat: ChatTokenizer, suite: Suite, problems: list[Problem]
) -> Requests:
    return Requests(
        suite=suite,
        problems=problems,
        prompts=[chat.prompt_ids(problem.question) for problem in problems],
        first_prompt=chat.prompt_text(problems[0].question),
        sampling=[
            Sampling(
                num_samples=suite.num_samples,
                temperature=suite.temperature,
                max_tokens=suite.max_tokens,
                seed=config.seed * 1_000_003 + index,
            )
            for index in range(len(problems))
        ],
        problems_per_call=max(1, MAX_NUM_SEQS // suite.num_samples),  # fills an engine
    )


class TrainingEvaluation:
    """pass@k of the weights in training. Every engine answers a share, of one rank or of several.

    Of equal weights the numbers are those of the evaluate stage, whatever the number of ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: PassAtKConfig,
        chat: ChatTokenizer,
        *,
        engine: "VllmEngine",
        stage_dir: Path,
    ) -> None:
        self._config, self._settings = config, settings
        self._chat, self._engine, self._stage_dir = chat, engine, stage_dir
        self._requests = first_requests(config, chat, num_problems=settings.num_problems)
        self._pool = open_rewards(self._requests.suite.rewards)

    def is_due(self, step: int, *, num_steps: int) -> bool:
        """Whether the weights after `step` optimizer steps are to be evaluated."""
        return step % self._settings.every == 0 or step == num_steps

    def of_trainer(self, trainer: Trainer, *, averaged: bool) -> dict[str, float]:
        """Metrics of the trainer's weights, or of their average (a collective).

        They go the way that a stage's model goes, through a Hugging Face folder, on every backend.

        Raises:
            WeightSyncError: This rank's engine did not take the weights.
            RewardError: Too many rewards could not be computed.
        """

        def load() -> None:
            with trainer.averaged() if averaged else nullcontext():
                export(trainer, self._chat, folder)
            max_gap = MAX_GAP[self._config.models.dtype]
            load_checkpoint(self._engine, folder, max_gap=max_gap)

        # A name of its own: another node may remember what a name held before.
        folder = self._stage_dir / f".evaluated-{trainer.step_count:06d}"
        metrics = self._metrics(load)
        self._engine.sleep()  # the trainer's device until the next time
        if dist.get_rank() == 0:  # all ranks have loaded: they have answered
            shutil.rmtree(folder)
        return metrics

    def of_engine(self) -> dict[str, float]:
        """Metrics of the weights that the engines hold (a collective).

        Raises:
            RewardError: Too many rewards could not be computed.
        """
        return self._metrics(lambda: None)

    def close(self) -> None:
        """End the verifiers' processes."""
        close_rewards(self._pool)

    def _metrics(self, load: Callable[[], None]) -> dict[str, float]:
        begun = time.perf_counter()
        load()
        gathered: list[Any] = [None] * dist.get_world_size()
        size = self._engine.spec.tensor_parallel_size
        rank = dist.get_rank()
        mine = self._share(rank // size, dist.get_world_size() // size, answers=rank % size == 0)
        dist.all_gather_object(gathered, mine)
        answered = {begin: groups for share in gathered for begin, groups in share.items()}
        groups = [group for begin in sorted(answered) for group in answered[begin]]
        # Every rank sums up, so that every rank raises what is wrong.
        summary = summarise(self._requests.suite, groups, seed=self._config.seed)
        return _named(f"{self._stage_dir.name}/eval", summary) | {
            "time/eval_s": time.perf_counter() - begun
        }

    def _share(
        self, engine: int, num_engines: int, *, answers: bool
    ) -> dict[int, list[list[Judged]]]:
        """The judged samples of an engine's calls, by the place of each call's first problem.

        Of the ranks that share an engine all ask it, and the one that `answers` judges.
        """
        asked = self._requests
        found = {}
        for call in asked.calls()[engine::num_engines]:
            samples = self._engine.generate(asked.prompts[call], asked.sampling[call])
            if answers:
                found[call.start] = judge(self._pool, asked.problems[call], samples)
        return found


def start_evaluation(
    config: RunConfig, chat: ChatTokenizer, model: Path, stage_dir: Path
) -> TrainingEvaluation | None:
    """SFT's evaluation with an engine of its own on `model`; None unless `sft.pass_at_k` is set.

    Call it before the policy is there: vLLM measures free memory when it sizes its cache.
    """
    settings = config.sft.pass_at_k
    if settings is None:
        return None
    engine = open_engine(sampler_spec(config, model, stage="evaluate", sleeps=True))
    engine.sleep()
    return TrainingEvaluation(config, settings, chat, engine=engine, stage_dir=stage_dir)


def join_evaluation(
    config: RunConfig, chat: ChatTokenizer, engine: "VllmEngine", stage_dir: Path
) -> TrainingEvaluation | None:
    """RL's evaluation with the engine that samples for it; None unless `rl.pass_at_k` is set."""
    settings = config.rl.pass_at_k
    if settings is None:
        return None
    return TrainingEvaluation(config, settings, chat, engine=engine, stage_dir=stage_dir)


def _named(prefix: str, summary: dict[str, dict[str, float]]) -> dict[str, float]:
    """`sft/eval/pass_at_1` and its interval's `sft/eval/pass_at_1/low` and `.../high`."""
    metrics: dict[str, float] = {}
    for name, each in summary.items():
        metrics[f"{prefix}/{name}"] = each["value"]
        metrics |= {f"{prefix}/{name}/{end}": each[end] for end in ("low", "high")}
    return metrics
