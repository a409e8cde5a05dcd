"""Warnings while SFT trains: weights that have collapsed, or that tell nothing apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pear_ray.config.sft import AlarmsConfig, SftConfig
from pear_ray.distributed.sft_sources import SOURCE

_NEARER = (
    "take a behavior model nearer to the policy, widen sft.weights.log_ratio_clip_low/high, or set "
    "sft.weights.rescale (ours, not the paper's); `pear diagnose` shows what each would do"
)


# A step whose tokens all weigh less than this hundredth moves nothing beside others. A floor above
# it (log_weight_clip_low near 0) is a choice, and max_floor_fraction speaks of it.
NEGLIGIBLE_WEIGHT = 0.01
# Below it a source's NLL may double and mean nothing.
NOTICEABLE_NLL = 0.1  # nats per token


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A metric, the bound it must keep to, and what it means beyond it.

    Attributes:
        at_once: Whether it speaks at the first step beyond, whatever the patience: of what is not
            looked at in every step.
    """

    metric: str
    setting: str
    is_minimum: bool
    meaning: str
    options: str
    at_once: bool = False


RULES = (
    Rule(
        metric="sft/ess_fraction",
        setting="min_ess_fraction",
        is_minimum=True,
        meaning="the gradient is decided by few tokens",
        options="a shorter reach (lower sft.weights.gamma) or level=block evens weights out; if it "
        "falls as training goes on, sft.weights.ratio_policy=init does not prefer what has been "
        "learnt by heart; or " + _NEARER,
    ),
    Rule(
        metric="sft/log_weight_floor_fraction",
        setting="max_floor_fraction",
        is_minimum=False,
        meaning="those tokens do not train: the policy finds what follows them implausible",
        options=_NEARER,
    ),
    Rule(
        metric="sft/log_weight_ceiling_fraction",
        setting="max_ceiling_fraction",
        is_minimum=False,
        meaning="a few tokens outweigh all others: the policy likes what follows them best",
        options="lower sft.weights.log_weight_clip_high, or train fewer epochs on the same rows",
    ),
    Rule(
        metric="sft/log_ratio_clip_fraction",
        setting="max_clip_fraction",
        is_minimum=False,
        meaning="nearly every log-ratio is at a bound: weights count tokens, not plausibility",
        options=_NEARER,
    ),
    Rule(
        metric="sft/grad_norm_ratio_to_uniform",
        setting="min_gradient_ratio",
        is_minimum=True,
        meaning="the weights let next to nothing of the batch train",
        options="reduction=weight_norm divides by the weights; or " + _NEARER,
        at_once=True,
    ),
    Rule(
        metric="sft/grad_norm_ratio_to_uniform",
        setting="max_gradient_ratio",
        is_minimum=False,
        meaning="steps are far larger than those of plain SFT, and max_grad_norm cuts them to the "
        "direction of a few tokens",
        options="lower sft.weights.log_weight_clip_high, or set reduction=weight_norm or "
        "sft.weights.rescale (ours, not the paper's)",
        at_once=True,
    ),
)


def weights_are_absolute(config: SftConfig) -> bool:
    """Whether a step of small weights alone is a small step: nothing divides by their sum."""
    weights = config.weights
    rescaled = weights.kind == "pear" and weights.rescale.endswith("mean_one")
    return config.reduction != "weight_norm" and not rescaled


@dataclass
class WeightAlarms:
    """Watches a run's steps; each rule speaks once, when it has been broken long enough."""

    config: AlarmsConfig
    weights_are_absolute: bool = True
    _broken: dict[str, int] = field(default_factory=dict)
    _floor_told: bool = False
    _best_nll: dict[str, float] = field(default_factory=dict)  # of each source

    def check(self, metrics: Mapping[str, float], *, step: int) -> list[str]:
        """What to warn of after this step, in words.

        Args:
            metrics: Of the step, as SFT logs them; those of uniform weights break no rule.
            step: Its number, from 1.
        """
        clipped = ("sft/log_ratio_clip_low_fraction", "sft/log_ratio_clip_high_fraction")
        known = dict(metrics)
        if all(name in known for name in clipped):
            known["sft/log_ratio_clip_fraction"] = sum(known[name] for name in clipped)
        return [
            *self._all_at_floor(metrics, step),
            *self._forgotten(metrics, step),
            *(
                self._words(rule, known[rule.metric], step)
                for rule in RULES
                if rule.metric in known and self._breaks_now(rule, known[rule.metric])
            ),
        ]

    def _all_at_floor(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """What to say of a step whose every token has the smallest weight there is."""
        weight = metrics.get("sft/weight/mean", 1.0)
        at_floor = metrics.get("sft/log_weight_floor_fraction", 0.0) == 1.0
        small = self.weights_are_absolute and weight < NEGLIGIBLE_WEIGHT
        if self._floor_told or not (at_floor and small):
            return []
        self._floor_told = True
        words = (
            f"step {step}: all weights are at the floor: each of the step's "
            f"{metrics['sft/num_tokens']:,.0f} tokens weighs {weight:.3g}, so the step trains next "
            "to nothing and tells no token from another; check that the behavior log-probs are of "
            "the model that wrote the corpus, take sft.weights.level=token or block (whose last "
            f"tokens weigh 1), set sft.reduction=weight_norm, or {_NEARER}"
        )
        return [words]

    def _forgotten(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """What to say of sources that lose their weight because the policy unlearns them."""
        words, bound, patience = [], self.config.max_source_nll_growth, self.config.patience
        for metric, nll in metrics.items():
            if not (metric.startswith(SOURCE) and metric.endswith("/nll")):
                continue
            source = metric.removeprefix(SOURCE).removesuffix("/nll")
            best = self._best_nll[source] = min(nll, self._best_nll.get(source, nll))
            weight, even = (metrics[f"{SOURCE}{source}/{of}_share"] for of in ("weight", "token"))
            forgets = nll > max(bound * best, NOTICEABLE_NLL) and weight < even / 2
            if self._has_lasted(metric, beyond=forgets, patience=patience):
                words.append(
                    f"step {step}: the policy forgets source {source}: {nll:.2g} nats per token, "
                    f"{best:.2g} at its best, and {weight:.1%} of the weight for "
                    f"{even:.1%} of the tokens. A ratio that moves with the policy takes weight "
                    "from what it forgets, which it then forgets more; "
                    "sft.weights.ratio_policy=init does not move (docs/study.md)"
                )
        return words

    def _breaks_now(self, rule: Rule, value: float) -> bool:
        bound = getattr(self.config, rule.setting)
        beyond = value < bound if rule.is_minimum else value > bound
        return self._has_lasted(
            rule.setting, beyond=beyond, patience=1 if rule.at_once else self.config.patience
        )

    def _has_lasted(self, what: str, *, beyond: bool, patience: int) -> bool:
        """Whether `what` has now been beyond its bound for as long as that takes; True once."""
        seen = self._broken.get(what, 0)
        if seen < patience:  # afterwards it has spoken
            self._broken[what] = seen + 1 if beyond else 0
        return beyond and seen + 1 == patience

    def _words(self, rule: Rule, value: float, step: int) -> str:
        side = "below" if rule.is_minimum else "above"
        bound = getattr(self.config, rule.setting)
        lasting = "" if rule.at_once else f" for {self.config.patience} steps"
        return (
            f"step {step}: {rule.metric} is {value:.3g}, {side} {bound:g}{lasting}: "
            f"{rule.meaning}; {rule.options}"
        )
