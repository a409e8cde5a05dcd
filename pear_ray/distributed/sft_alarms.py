"""Warnings while SFT trains: weights that have collapsed, or that tell nothing apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pear_ray.config.sft import AlarmsConfig

_NEARER = (
    "take a behavior model nearer to the policy, widen sft.weights.log_ratio_clip_low/high, or set "
    "sft.weights.rescale (ours, not the paper's); `pear diagnose` shows what each would do"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A metric, the bound it must keep to, and what it means beyond it."""

    metric: str
    setting: str
    is_minimum: bool
    meaning: str
    options: str


RULES = (
    Rule(
        metric="sft/ess_fraction",
        setting="min_ess_fraction",
        is_minimum=True,
        meaning="the gradient is decided by few tokens",
        options="a shorter reach (lower sft.weights.gamma) or level=block evens weights out; "
        + _NEARER,
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
)


@dataclass
class WeightAlarms:
    """Watches a run's steps; each rule speaks once, when it has been broken long enough."""

    config: AlarmsConfig
    _broken: dict[str, int] = field(default_factory=dict)

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
            self._words(rule, known[rule.metric], step)
            for rule in RULES
            if rule.metric in known and self._breaks_now(rule, known[rule.metric])
        ]

    def _breaks_now(self, rule: Rule, value: float) -> bool:
        bound = getattr(self.config, rule.setting)
        beyond = value < bound if rule.is_minimum else value > bound
        seen = self._broken.get(rule.metric, 0)
        if seen < self.config.patience:  # afterwards it has spoken
            self._broken[rule.metric] = seen + 1 if beyond else 0
        return beyond and seen + 1 == self.config.patience

    def _words(self, rule: Rule, value: float, step: int) -> str:
        side = "below" if rule.is_minimum else "above"
        bound = getattr(self.config, rule.setting)
        return (
            f"step {step}: {rule.metric} is {value:.3g}, {side} {bound:g} for "
            f"{self.config.patience} steps: {rule.meaning}; {rule.options}"
        )
