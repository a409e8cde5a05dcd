"""What RL minimises: the policy loss, a KL to the initial policy, and what rollouts go through."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section, by_kind


class GrpoLoss(Section):
    """PPO's clipped surrogate on each token's ratio (GRPO, arXiv 2402.03300; DAPO's two bounds)."""

    kind: Literal["grpo"] = "grpo"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """How far below 1 a token's ratio may fall before its gradient stops."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """How far above 1 a token's ratio may rise before its gradient stops."""


class GspoLoss(Section):
    """The surrogate on one ratio per sequence, the geometric mean (GSPO, arXiv 2507.18071)."""

    kind: Literal["gspo"] = "gspo"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """How far below 1 a sequence's ratio may fall; the paper's value."""
    clip_high: Annotated[float, Field(gt=0)] = 4e-4
    """How far above 1 a sequence's ratio may rise; the paper's value."""


class CispoLoss(Section):
    """REINFORCE weighted by a clipped ratio, which stops no gradient (CISPO, arXiv 2506.13585)."""

    kind: Literal["cispo"] = "cispo"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How far below 1 the weight may fall; 1 is no lower bound, as in the paper."""
    clip_high: Annotated[float, Field(gt=0)] = 4.0
    """How far above 1 the weight may rise. Ours: the paper names no value."""


class ReinforceLoss(Section):
    """`-A log p`, without ratio: later updates on a batch are taken as if on policy."""

    kind: Literal["reinforce"] = "reinforce"


PolicyLossConfig = Annotated[
    Annotated[GrpoLoss | GspoLoss | CispoLoss | ReinforceLoss, Field(discriminator="kind")],
    by_kind("grpo"),
]


class KlConfig(Section):
    """KL from the policy to the one that RL starts from, estimated on sampled tokens."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the penalty; 0 is none."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators: `log r`, `(log r)^2 / 2`, `1/r - 1 + log r`, r being policy over
    reference."""
    placement: Literal["loss", "reward"] = "loss"
    """Added to each token's loss, or taken off the reward before advantages are made of it."""
    measure: bool = False
    """Log `rl/kl_to_init` without a penalty too. Measured or penalised, the KL takes one more
    forward pass and, but with `rl.lora`, a second model in memory."""

    @property
    def is_wanted(self) -> bool:
        """Whether the log-probs of the policy that RL starts from are needed."""
        return self.measure or self.coefficient > 0

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "KlConfig":
        if self.coefficient and self.estimator == "k1" and self.placement == "loss":
            raise ValueError(
                "estimator=k1 in the loss has a gradient that is 0 on average; use k2 or k3, or "
                "placement=reward"
            )
        return self


class OverlongConfig(Section):
    """What becomes of completions near or at `rl.max_tokens` (DAPO, arXiv 2503.14476)."""

    buffer_tokens: Annotated[int, Field(gt=0)] | None = None
    """Over the last so many tokens up to `rl.max_tokens`, the reward falls linearly by `penalty`.
    None: not at all."""
    penalty: Annotated[float, Field(gt=0)] = 1.0
    """How much it has fallen by at `rl.max_tokens`."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss and its denominator; their reward still
    counts in their group's baseline."""
    max_truncated_fraction: Annotated[float, Field(ge=0, le=1)] = 0.95
    """The run stops at the first step where more of its completions are cut: a policy that cannot
    end its answer. 1: it never does."""


class MismatchCorrectionConfig(Section):
    """Importance weights for tokens whose log-probs sampler and trainer compute differently."""

    level: Literal["off", "token", "sequence", "geometric"] = "token"
    """What shares a ratio of trainer to sampler: each token its own, a sequence their product, or
    their geometric mean."""
    mode: Literal["mask", "clip", "truncate"] = "truncate"
    """A ratio outside `low` to `high` becomes 0, or the nearer bound; `truncate` bounds it above
    only."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Lower bound; `truncate` does not read it."""
    high: Annotated[float, Field(ge=1)] = 2.0
    """Upper bound."""
