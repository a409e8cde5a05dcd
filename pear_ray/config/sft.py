"""PEAR-weighted supervised fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.backends import BackendConfig, FsdpBackend
from pear_ray.config.base import Section
from pear_ray.config.sections import OptimizerConfig


class UniformWeights(Section):
    """Plain SFT: every loss token weighs 1."""

    kind: Literal["uniform"] = "uniform"


class PearWeights(Section):
    """PEAR (arXiv 2602.01058): a token weighs as much as its continuation suits the policy."""

    kind: Literal["pear"] = "pear"
    level: Literal["token", "block", "sequence", "span"] = "token"
    """What shares a weight: each token its own, blocks of `block_size` tokens, the whole sequence,
    or (with `models.align: bytes` only) the spans that both tokenizations share."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Discount per token of continuation (all levels but sequence)."""
    block_size: Annotated[int, Field(gt=0)] = 4
    """Tokens per block (block level)."""
    log_ratio_clip_low: Annotated[float, Field(le=0)] = -0.08
    """Lower bound of a token's log-ratio."""
    log_ratio_clip_high: Annotated[float, Field(ge=0)] = 0.30
    """Upper bound of a token's log-ratio."""
    log_weight_clip_low: Annotated[float, Field(le=0)] = -10.0
    """Lower bound of a summed log-weight."""
    log_weight_clip_high: Annotated[float, Field(ge=0)] = 5.0
    """Upper bound of a summed log-weight."""
    rescale: Literal["none", "batch_mean_one"] = "none"
    """`batch_mean_one` divides by the mean weight of the step's loss tokens; ours, not the
    paper's."""


WeightsConfig = Annotated[UniformWeights | PearWeights, Field(discriminator="kind")]


class SftConfig(Section):
    """The SFT stage."""

    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    weights: WeightsConfig = PearWeights()
    """How each token's loss is weighted."""
    objective: Literal["nll", "dft"] = "nll"
    """The per-token loss that the weights multiply."""
    reduction: Literal["sum", "token_mean", "seq_mean", "weight_norm"] = "token_mean"
    """What the weighted sum is divided by, over all microbatches and ranks at once."""
    backend: BackendConfig = FsdpBackend()
    """What spreads the model over the trainers."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third
    more compute."""
    check_equivalence: bool = True
    """Before the first step, compare the gradient of a few rows at once, split over the ranks and
    accumulated; the run stops if they differ."""
    num_epochs: Annotated[int, Field(gt=0)] = 1
    """Passes over the corpus."""
    global_batch_size: Annotated[int, Field(gt=0)] = 64
    """Sequences per optimizer step, over all ranks."""
    microbatch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Most padded tokens in one forward and backward pass of one rank."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 20
    """Optimizer steps between checkpoints."""
