"""Reinforcement learning on a colocated actor group: GRPO and its relatives."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section
from pear_ray.config.colocation import ColocationConfig
from pear_ray.config.evaluate import PassAtKConfig
from pear_ray.config.lora import RlLoraConfig
from pear_ray.config.problems import ProblemSetConfig
from pear_ray.config.rewards import RewardConfig
from pear_ray.config.rl_losses import (
    GrpoLoss,
    KlConfig,
    MismatchCorrectionConfig,
    OverlongConfig,
    PolicyLossConfig,
)
from pear_ray.config.rl_sampling import DifficultyConfig, DynamicSamplingConfig
from pear_ray.config.sections import OptimizerConfig


class RlConfig(Section):
    """The RL stage."""

    problems: ProblemSetConfig
    """Training problems, visited in a seeded order, epoch after epoch."""
    difficulty: DifficultyConfig | None = None
    """Train on those only whose pass rate lies in a band; on all unless this is set."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    lora: RlLoraConfig | None = None
    """Train low-rank adapters on the SFT checkpoint only (needs the extra `lora`); null trains
    every parameter."""
    num_steps: Annotated[int, Field(gt=0)]
    """Rollout batches; each is sampled, rewarded, trained on with `updates_per_batch` optimizer
    steps, and followed by a weight sync."""
    prompts_per_step: Annotated[int, Field(gt=0)] = 16
    """Problems per step, over all ranks."""
    group_size: Annotated[int, Field(gt=1)] = 8
    """Completions per problem."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the trainer divides its logits by it as well."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest completion, in tokens."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Sample further problems where all outcomes of a group are equal; off unless this is set."""
    rollouts_ahead: Literal[0, 1] = 0
    """Sample each step's completions before the step before trains (1), so that they are verified
    meanwhile: for slow verifiers. They are of a policy one rollout batch older, which
    `mismatch_correction` weights for. Not with `dynamic_sampling`."""
    updates_per_batch: Annotated[int, Field(gt=0)] = 1
    """Optimizer steps per rollout batch, each on its own share of the groups. With more than one
    the trainer's log-probs before the first are computed too, for the ratios."""
    advantage: Literal["grpo", "mean_baseline", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = (
        "grpo"
    )
    """`grpo` divides by the group's standard deviation, `mean_baseline` (Dr.GRPO) does not, `rloo`
    takes the mean of the others off. `reinforce_pp` (REINFORCE++) normalises over all tokens of
    the batch, `reinforce_pp_baseline` after the group's mean is taken off."""
    loss: PolicyLossConfig = GrpoLoss()
    """The policy loss; its name alone stands for its defaults."""
    reduction: Literal["token_mean", "seq_mean", "dr_grpo"] = "token_mean"
    """What a step's loss sum is divided by: its tokens (DAPO); each completion's tokens, then their
    number (GRPO, GSPO); their number times `max_tokens` (Dr.GRPO)."""
    kl: KlConfig = KlConfig()
    """KL to the policy that RL starts from."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the policy's exact entropy, which is raised: one more pass over the vocabulary. 0:
    none."""
    overlong: OverlongConfig = OverlongConfig()
    """What becomes of completions near the length limit."""
    mismatch_correction: MismatchCorrectionConfig = MismatchCorrectionConfig()
    """What is done about a sampler that computes other log-probs than the trainer."""
    rewards: RewardConfig = RewardConfig()
    """How completions are verified."""
    pass_at_k: PassAtKConfig | None = None
    """Evaluate while training; off unless this is set."""
    tensor_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Trainers next to each other that share one vLLM engine, each holding a part of it, for models
    too large for an engine on each. It divides `cluster.num_trainers` and the policy's heads."""
    colocation: ColocationConfig = ColocationConfig()
    """How trainer and engine share a GPU's memory."""
    microbatch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Most tokens in one forward and backward pass of one rank: rows end to end, or padded where
    the model mixes tokens otherwise than by causal attention. A CPU takes fewer at once."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them, as
    `sft.activation_checkpointing` does: less memory, a third more compute in training."""
    compile: bool = False
    """Compile the layers of the policy in training and its log-probs with torch.compile, as
    `sft.compile` does."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 5
    """Optimizer steps between checkpoints."""
    save_rollouts_every: Annotated[int, Field(ge=0)] = 1
    """Steps between rollout batches that are kept in `rl/rollouts`, with rewards, advantages and
    log-probs; the first and the last are among them. 0: none."""
    max_sync_gap: Annotated[float, Field(gt=0)] | None = None
    """Largest mean canary log-prob gap between engine and trainer after a weight sync, in nats;
    above it the step fails. None: 1e-4 in float32, 0.3 in bfloat16."""
    mismatch_alert: Annotated[float, Field(gt=0)] = 0.01
    """Mean absolute log-prob gap over a step's rollouts above which a warning is logged."""

    @model_validator(mode="after")
    def _has_rates(self) -> "RlConfig":
        by_column = self.difficulty is not None and self.difficulty.rates.kind == "column"
        if by_column and self.problems.kind != "file":
            raise ValueError(
                "difficulty.rates.kind=column reads the problem file, and problems are games; use "
                "{kind: table, path: RUN/evaluate/samples.parquet}"
            )
        return self

    @model_validator(mode="after")
    def _knows_what_to_sample(self) -> "RlConfig":
        if self.rollouts_ahead and self.dynamic_sampling is not None:
            raise ValueError(
                "rollouts_ahead=1 and dynamic_sampling do not go together: which problems to "
                "sample further would wait for the rewards that are to be computed meanwhile; "
                "leave one out"
            )
        return self

    @model_validator(mode="after")
    def _buffer_fits(self) -> "RlConfig":
        buffer = self.overlong.buffer_tokens
        if buffer is not None and buffer > self.max_tokens:
            raise ValueError(
                f"overlong.buffer_tokens={buffer} is more than max_tokens={self.max_tokens}; make "
                "it a part of it, such as a fifth"
            )
        return self
