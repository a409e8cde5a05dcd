"""Evaluation of every checkpoint that the run made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from pear_ray.config.base import Section
from pear_ray.config.problems import ProblemSetConfig
from pear_ray.config.rewards import MathVerifier, Name, RewardConfig

Checkpoint = Literal["base", "sft", "rl"]
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
MAIN_SUITE = "main"  # what the problems of `evaluate.problems` are called
Ks = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]


class SuiteConfig(Section):
    """One problem set of several, with what differs for it from the section around it."""

    name: Name
    """What results and metrics call it: `eval/NAME/pass_at_1`."""
    problems: ProblemSetConfig
    """Held-out problems."""
    rewards: RewardConfig | None = None
    """How completions are verified. None: as `evaluate.rewards` says, and for a set of the hub by
    math-verify."""
    num_samples: Annotated[int, Field(gt=0)] | None = None
    """Completions per problem. None: `evaluate.num_samples`."""
    k: Ks | None = None
    """Which pass@k to report. None: `evaluate.k`."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Sampling temperature. None: `evaluate.temperature`."""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    """Longest completion, in tokens. None: `evaluate.max_tokens`."""


class EvaluateConfig(Section):
    """The evaluate stage: base model, SFT checkpoint and RL checkpoint on the same problems."""

    problems: ProblemSetConfig | None = None
    """Held-out problems, as the suite `main`; give them a seed of their own. None: those of
    `suites` alone."""
    suites: list[SuiteConfig] = Field(default=[])
    """Further problem sets, each with results of its own."""
    checkpoints: Annotated[list[Checkpoint], Field(min_length=1)] = Field(default=[*CHECKPOINTS])
    """Which are evaluated."""
    num_samples: Annotated[int, Field(gt=0)] = 8
    """Completions per problem."""
    k: Ks = Field(default=[1, 8])
    """Which pass@k to report; each at most `num_samples`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest completion, in tokens."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the bootstrap intervals over problems."""
    rewards: RewardConfig = RewardConfig()
    """How completions are verified."""
    tensor_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Devices of one node that each engine is spread over, for a model that does not fit on one; it
    must divide the policy's attention heads. With `sft.pass_at_k` so many trainers next to each
    other share an engine, and it divides `cluster.num_trainers`."""

    @model_validator(mode="after")
    def _has_problems(self) -> "EvaluateConfig":
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise ValueError(f"checkpoints={self.checkpoints} has one twice; give each once")
        names = [suite.name for suite in suites_of(self)]
        if not names:
            raise ValueError("nothing to evaluate on; give `problems`, or `suites`, or both")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two suites are called {', '.join(twice)} (`problems` is called {MAIN_SUITE}); "
                "give each a `name` of its own"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A problem set with everything that decides what is measured on it.

    Attributes:
        key: The dotted key that says it in a run file.
    """

    key: str
    name: str
    problems: ProblemSetConfig
    rewards: RewardConfig
    num_samples: int
    k: Sequence[int]
    temperature: float
    max_tokens: int
    confidence: float


def suites_of(evaluate: EvaluateConfig) -> list[Suite]:
    """Every suite in order: the section's own problems first, where it has any."""
    own = [SuiteConfig(name=MAIN_SUITE, problems=evaluate.problems)] if evaluate.problems else []
    keys = ["evaluate"] * len(own) + [f"evaluate.suites.{n}" for n in range(len(evaluate.suites))]
    return [
        Suite(
            key=key,
            name=each.name,
            problems=each.problems,
            rewards=each.rewards or _rewards(evaluate, each, is_own=key == "evaluate"),
            num_samples=each.num_samples or evaluate.num_samples,
            k=tuple(each.k or evaluate.k),
            temperature=each.temperature or evaluate.temperature,
            max_tokens=each.max_tokens or evaluate.max_tokens,
            confidence=evaluate.confidence,
        )
        for key, each in zip(keys, [*own, *evaluate.suites], strict=True)
    ]


def distinct_rewards(evaluate: EvaluateConfig) -> list[RewardConfig]:
    """What verifies the suites, each once: as many pools of processes are there."""
    found: list[RewardConfig] = []
    for suite in suites_of(evaluate):
        if suite.rewards not in found:
            found.append(suite.rewards)
    return found


def _rewards(evaluate: EvaluateConfig, suite: SuiteConfig, *, is_own: bool) -> RewardConfig:
    if suite.problems.kind != "hub" or is_own:
        return evaluate.rewards
    return evaluate.rewards.model_copy(update={"components": [MathVerifier(kind="math")]})


class PassAtKConfig(Section):
    """pass@k while a stage trains: by the evaluate stage's evaluator, with its settings."""

    every: Annotated[int, Field(gt=0)]
    """Optimizer steps between two evaluations; there is one before the first step and one after the
    last."""
    num_problems: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many of `evaluate.problems`, or of the first suite where there are none.
    None: all, and numbers equal the evaluate stage's."""
