"""Evaluation of every checkpoint that the run made."""

from typing import Annotated

from pydantic import Field

from pear_ray.config.base import Section
from pear_ray.config.problems import ProblemSetConfig
from pear_ray.config.rewards import RewardConfig

MAIN_SUITE = "main"  # what the problems of `evaluate.problems` are called


class EvaluateConfig(Section):
    """The evaluate stage: base model, SFT checkpoint and RL checkpoint on the same problems."""

    problems: ProblemSetConfig
    """Held-out problems; give them a seed of their own."""
    num_samples: Annotated[int, Field(gt=0)] = 8
    """Completions per problem."""
    k: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = Field(default=[1, 8])
    """Which pass@k to report; each at most `num_samples`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest completion, in tokens."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the bootstrap intervals over problems."""
    rewards: RewardConfig = RewardConfig()
    """How completions are verified."""


class PassAtKConfig(Section):
    """pass@k while a stage trains: by the evaluate stage's evaluator, with its settings."""

    every: Annotated[int, Field(gt=0)]
    """Optimizer steps between two evaluations; there is one before the first step and one after the
    last."""
    num_problems: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many of `evaluate.problems`. None: all, and numbers equal the evaluate
    stage's."""
