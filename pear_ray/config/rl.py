"""GRPO on a colocated actor group."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section
from pear_ray.config.evaluate import PassAtKConfig
from pear_ray.config.problems import ProblemSetConfig, RewardConfig
from pear_ray.config.sections import OptimizerConfig


class RlConfig(Section):
    """The RL stage."""

    problems: ProblemSetConfig
    """Training problems, visited in a seeded order, epoch after epoch."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    num_steps: Annotated[int, Field(gt=0)]
    """Optimizer steps; each samples, rewards, trains once and syncs weights."""
    prompts_per_step: Annotated[int, Field(gt=0)] = 16
    """Problems per step, over all ranks."""
    group_size: Annotated[int, Field(gt=1)] = 8
    """Completions per problem."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the trainer divides its logits by it as well."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest completion, in tokens."""
    advantage: Literal["grpo", "mean_baseline"] = "grpo"
    """`grpo` divides by the group's standard deviation, `mean_baseline` (Dr.GRPO) does not."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far below 1 a token's ratio may fall before its gradient stops."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """How far above 1 a token's ratio may rise before its gradient stops."""
    rewards: RewardConfig = RewardConfig()
    """How completions are verified."""
    pass_at_k: PassAtKConfig | None = None
    """Evaluate while training; off unless this is set."""
    microbatch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Most tokens in one forward and backward pass of one rank: rows end to end, or padded where
    the model mixes tokens otherwise than by causal attention. A CPU takes fewer at once."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 5
    """Optimizer steps between checkpoints."""
    max_sync_gap: Annotated[float, Field(gt=0)] | None = None
    """Largest mean canary log-prob gap between engine and trainer after a weight sync, in nats;
    above it the step fails. None: 1e-4 in float32, 0.3 in bfloat16."""
    mismatch_alert: Annotated[float, Field(gt=0)] = 0.01
    """Mean absolute log-prob gap over a step's rollouts above which a warning is logged."""
