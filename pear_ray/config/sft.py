"""PEAR-weighted supervised fine-tuning."""

from typing import Annotated, Literal, TypeGuard

from pydantic import Field, model_validator

from pear_ray.config.backends import BackendConfig, FsdpBackend
from pear_ray.config.base import Section, by_kind
from pear_ray.config.evaluate import PassAtKConfig
from pear_ray.config.lora import LoraConfig
from pear_ray.config.objectives import Asft, IwSft, Nll, ObjectiveConfig, Psft, SftKl
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
    ratio_policy: Literal["live", "init", "ema"] = "live"
    """Whose log-probs stand above the behavior policy's: the model in training (the paper's, as far
    as is known), the one it started from, scored once before (PriFT, arXiv 2606.09396), or the
    average that `sft.ema_decay` keeps (one forward pass more)."""
    rescale: Literal["none", "batch_mean_one", "sequence_mean_one", "centred"] = "none"
    """What is done about weights that are all small or all large; ours, not the paper's. The mean
    weight of the step's, or of each sequence's, loss tokens is made 1; or each sequence's
    log-ratios are centred on their mean before they are clipped and summed."""
    control: Literal["none", "shuffled", "position_profile", "likelihood_only"] = "none"
    """What a study compares this arm with: its own weights given to other sequences (level
    sequence) or tokens (other levels) of the step; the step's mean weight at each token's distance
    from the end; or the ratio without the behavior policy, whose log-probs are taken as 0. The
    first two take one forward pass more."""


class BySourceWeights(Section):
    """A fixed weight for all rows of a source: an oracle, where somebody knows which rows help."""

    kind: Literal["by_source"]
    weights: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """The weight of each source of the corpus, every one by name; 0 leaves its rows out of the
    gradient and in the denominator."""

    @model_validator(mode="after")
    def _something_trains(self) -> "BySourceWeights":
        if not any(self.weights.values()):
            raise ValueError(
                f"weights={self.weights} are all 0, so nothing would train; give one source more"
            )
        return self


class NegativesConfig(Section):
    """Pushing known-wrong rows away, with PEAR's sequence weight and the sign flipped."""

    scale: Annotated[float, Field(gt=0)]
    """lambda; the paper's value is not known. A large one diverges: 1 has."""
    logprob_floor: Annotated[float, Field(lt=0)] = -5.0
    """A token whose log-prob (nats) is at or below this is pushed no further."""


WeightsConfig = Annotated[
    Annotated[UniformWeights | PearWeights | BySourceWeights, Field(discriminator="kind")],
    by_kind("pear"),
]


class AlarmsConfig(Section):
    """When the weights of training are worth a warning."""

    min_ess_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Effective sample size of a step's weights over its tokens: fewer than one in five decides the
    gradient below this."""
    max_floor_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a step's tokens whose log-weight is at its lower bound: they do not train."""
    max_ceiling_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a step's tokens whose log-weight is at its upper bound: each counts as 148."""
    max_clip_fraction: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of a step's tokens whose log-ratio is clipped: their weights tell little apart."""
    max_source_nll_growth: Annotated[float, Field(gt=1)] = 2.0
    """NLL of a source's tokens over the lowest that it has been, while the source has less than
    half of the weight that its tokens would have alike: the policy forgets it."""
    patience: Annotated[int, Field(gt=0)] = 3
    """Steps in a row that must be beyond a bound. Not for the gradient ratio, and not for weights
    that are all at their floor: those speak at once."""
    gradient_ratio_every: Annotated[int, Field(ge=0)] = 50
    """Steps between two looks, from the first step on, at the gradient norm of a few of the step's
    rows over what uniform weights would give them: two forward and backward passes over those. 0:
    never."""
    min_gradient_ratio: Annotated[float, Field(ge=0)] = 0.03
    """That ratio: the weights let next to nothing train below this."""
    max_gradient_ratio: Annotated[float, Field(gt=0)] = 30.0
    """That ratio: gradient clipping makes every step above this a small one in a direction that few
    tokens choose."""
    action: Literal["warn", "stop"] = "warn"
    """`stop` ends the run, at its last checkpoint, with the warning as its error."""


class SftConfig(Section):
    """The SFT stage."""

    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    weights: WeightsConfig = PearWeights()
    """How each token's loss is weighted; `uniform` alone is plain SFT."""
    objective: ObjectiveConfig = Nll()
    """The per-token loss that the weights multiply; its name alone stands for its defaults."""
    negatives: NegativesConfig | None = None
    """Rows marked `is_negative`, known to be wrong: none are trained on unless this says how."""
    reduction: Literal["sum", "token_mean", "seq_mean", "weight_norm"] = "token_mean"
    """What the weighted sum is divided by, over all microbatches and ranks at once."""
    backend: BackendConfig = FsdpBackend()
    """What spreads the model over the trainers."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only (needs the extra `lora`); null trains every parameter."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third
    more compute."""
    compile: bool = False
    """Compile the model's layers and its log-probs with torch.compile: the first steps take up to a
    minute longer, each one after less. Not with DeepSpeed."""
    check_equivalence: bool = True
    """Before the first step, compare the gradient of a few rows at once, split over the ranks and
    accumulated; the run stops if they differ."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the weights, of which each step leaves this share: 0.99 looks back about
    100 steps. Takes another copy of the parameters; not with DeepSpeed."""
    export: Literal["live", "ema"] = "live"
    """Which weights the stage leaves: those of the last step, or their average."""
    heldout_rows: Annotated[int, Field(ge=0)] = 0
    """Rows kept out of training, to see its loss on what it has not seen; chosen by `seed`."""
    evaluate_every: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between two looks at the held-out rows, and one after the last step."""
    pass_at_k: PassAtKConfig | None = None
    """Evaluate while training, with a vLLM engine beside each trainer; off unless this is set."""
    alarms: AlarmsConfig = AlarmsConfig()
    """When the weights of training are worth a warning."""
    num_epochs: Annotated[int, Field(ge=0)] = 1
    """Passes over the corpus; 0 trains nothing and hands the policy on as it came (no SFT)."""
    global_batch_size: Annotated[int, Field(gt=0)] = 64
    """Sequences per optimizer step, over all ranks."""
    microbatch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Most tokens in one forward and backward pass of one rank: rows end to end, or padded where
    the model mixes tokens otherwise than by causal attention. A CPU takes fewer at once."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 20
    """Optimizer steps between checkpoints."""


def needs_initial_policy(config: SftConfig) -> bool:
    """Whether the corpus must be scored under the model that training starts from."""
    weights = config.weights
    by_ratio = weights.kind == "pear" and weights.ratio_policy == "init"
    reads_it = by_ratio or isinstance(config.objective, IwSft | Psft | Asft | SftKl)
    return reads_it and config.num_epochs > 0


def describe_weights(weights: WeightsConfig) -> str:
    """The weights in words, as reports show them."""
    match weights:
        case UniformWeights():
            return "uniform (plain SFT)"
        case BySourceWeights():
            sources = ", ".join(f"{name} {each:g}" for name, each in weights.weights.items())
            return f"by source: {sources}"
        case PearWeights():
            control = "" if weights.control == "none" else f", control {weights.control}"
            return f"pear, {weights.level} level{control}"


def needs_step_weights(weights: WeightsConfig) -> TypeGuard[PearWeights]:
    """Whether all of a step's weights must be known before the first of them is used."""
    return weights.kind == "pear" and weights.control in {"shuffled", "position_profile"}
