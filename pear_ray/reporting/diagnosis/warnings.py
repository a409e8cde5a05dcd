"""What a diagnosis warns of: rules with a threshold each, in plain words, with what can be done."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from pear_ray.algorithms.discount import gamma_for_mean_weight, tokens_to_bound
from pear_ray.reporting.diagnosis.numbers import (
    ALL_SOURCES,
    Diagnosis,
    SourceDiagnosis,
    discounted_block_size,
)

# Clipped low: the policy gives a token less than exp(-0.08) = 92 % of the behavior model's
# probability. With half of the tokens there, 13 % must be clipped high (0.08 * 0.5 / 0.30) before
# log-weights stop drifting down.
MAX_CLIP_LOW_FRACTION = 0.5
# A weight at the floor is exp(-10) = 0.00005: those tokens do not train. One in twenty is a tail.
MAX_FLOOR_FRACTION = 0.05
# At the ceiling one token counts as 148: a twentieth of the tokens outweighs all the others.
MAX_CEILING_FRACTION = 0.05
# Half of all that is learnt, from what is a tenth of the tokens ...
MAX_LAST_TENTH_SHARE = 0.5
# ... or more in short completions, whose last tenth is still a whole token: twice the even share.
MIN_LAST_TENTH_EXCESS = 2.0
# Fewer than one token in five decides the gradient: its noise is that of a fifth of the batch.
MIN_ESS_FRACTION = 0.2
# A hundred tokens that differ by this much, all one way, move a weight by a tenth: below it, PEAR
# has nothing to tell apart. Two float32 scorings of one model differ by under 0.00001; bfloat16 may
# hide a copy from this rule.
MIN_LOG_RATIO_ABSOLUTE_MEAN = 0.001
# Weights that all but equal each other: at 0.95 their standard deviation is 23 % of their mean.
MAX_ESS_FRACTION = 0.95
# The discount alone has taken half of the gradient from a completion that the policy would write.
MIN_PERFECT_RATIO_MEAN_WEIGHT = 0.5
WANTED_PERFECT_RATIO_MEAN_WEIGHT = 0.9

_CLOSER = "a behavior model nearer to the policy (smaller, or of its family), or the policy's own"
_RESCALE = (
    "`sft.weights.rescale=batch_mean_one`, which restores the size of the step, not which tokens "
    "train (ours, not the paper's)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class DiagnosisWarning:
    """One thing to look at before training.

    Attributes:
        rule: Name of the rule.
        source: The source that it concerns, or `ALL_SOURCES`.
        headline: What is the matter, in a few words.
        message: The same with numbers.
        options: What can be done about it.
    """

    rule: str
    source: str
    headline: str
    message: str
    options: list[str]


def diagnosis_warnings(diagnosis: Diagnosis) -> list[DiagnosisWarning]:
    """Every warning, the rules in order of weight, each over all sources by name."""
    return [
        warning
        for rule in _RULES
        if not (rule in _OF_THE_BEHAVIOR and diagnosis.weights.control == "likelihood_only")
        for warning in _apply(rule, diagnosis)
    ]


def verdict(diagnosis: Diagnosis, warnings: list[DiagnosisWarning]) -> str:
    """The diagnosis in a sentence or two."""
    overall = diagnosis.overall
    effect = (
        f"PEAR leaves {percent(overall.health['ess_fraction'])} of "
        f"{overall.num_loss_tokens:,} loss tokens effective, with a mean weight of "
        f"{overall.health['weight/mean']:.3g}."
    )
    sentence = f"Nothing stands out. {effect}"
    if warnings:
        first = f"{warnings[0].headline} ({warnings[0].source})"
        more = f", and {len(warnings) - 1} more" if len(warnings) > 1 else ""
        sentence = f"Look before training: {first}{more}. {effect}"
    if diagnosis.is_assumed:
        sentence += " The run's weights have no ratio in them; PEAR's defaults would do this."
    elif diagnosis.weights.control != "none":
        sentence += f" {_CONTROLS[diagnosis.weights.control]}"
    return sentence


def percent(fraction: float) -> str:
    """A share as a reader wants it: `34 %`, `3.4 %`, `<0.1 %`."""
    value = 100 * fraction
    if 0.0 < value < 0.1:  # noqa: PLR2004 - the last digit shown
        return "<0.1 %"
    return f"{value:.1f} %" if 0.0 < value < 10.0 else f"{value:.0f} %"  # noqa: PLR2004


_Rule = Callable[[SourceDiagnosis, Diagnosis], DiagnosisWarning | None]


def _apply(rule: _Rule, diagnosis: Diagnosis) -> Iterator[DiagnosisWarning]:
    found = [rule(source, diagnosis) for source in diagnosis.sources]
    yield from (warning for warning in found if warning)
    # Sources that are fine one by one may still outweigh each other.
    if rule is _ess_collapse and len(diagnosis.sources) > 1 and not any(found):
        together = rule(diagnosis.overall, diagnosis)
        if together:
            yield together


def _behavior_unlike_policy(
    source: SourceDiagnosis, diagnosis: Diagnosis
) -> DiagnosisWarning | None:
    health, weights = source.health, diagnosis.weights
    low, floor = health["log_ratio_clip_low_fraction"], health["log_weight_floor_fraction"]
    if low <= MAX_CLIP_LOW_FRACTION and floor <= MAX_FLOOR_FRACTION:
        return None
    message = (
        f"{percent(low)} of the loss tokens are clipped low (the policy gives them less than "
        f"{percent(math.exp(weights.log_ratio_clip_low))} of the behavior model's probability; "
        f"mean log-ratio {health['log_ratio/mean']:.3g}), and {percent(floor)} weigh "
        f"exp({weights.log_weight_clip_low:g}), the floor, where they do not train."
    )
    if weights.level != "sequence":
        steps = tokens_to_bound(
            source.clipped_log_ratio_mean,
            gamma=weights.gamma,
            log_weight_clip=(weights.log_weight_clip_low, weights.log_weight_clip_high),
        )
        if steps and source.clipped_log_ratio_mean < 0.0:
            message += f" At the mean drift the floor is {steps:,} tokens from the end."
    return DiagnosisWarning(
        "behavior_unlike_policy",
        source.source,
        "the behavior model is far stronger than the policy, or unlike it",
        message,
        [_CLOSER, *_rescale(diagnosis), *_coarser_level(diagnosis)],
    )


def _ceiling(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    fraction = source.health["log_weight_ceiling_fraction"]
    if fraction <= MAX_CEILING_FRACTION:
        return None
    high = diagnosis.weights.log_weight_clip_high
    return DiagnosisWarning(
        "ceiling",
        source.source,
        "many weights are at the ceiling",
        f"{percent(fraction)} of the loss tokens weigh exp({high:g}) = {math.exp(high):.0f}, the "
        "ceiling: they outweigh all others, and differ no more among themselves. "
        f"{percent(source.health['log_ratio_clip_high_fraction'])} of the log-ratios are clipped "
        "high.",
        [
            "a lower `sft.weights.log_ratio_clip_high` or `log_weight_clip_high`",
            *_rescale(diagnosis),
            "see that the behavior log-probs are of the model and temperature that wrote the rows",
        ],
    )


def _ess_collapse(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    health = source.health
    if health["ess_fraction"] >= MIN_ESS_FRACTION:
        return None
    if source.source == ALL_SOURCES:
        heaviest = max(diagnosis.sources, key=lambda each: each.weight_share / each.token_share)
        told = (
            f"{heaviest.source} has {percent(heaviest.weight_share)} of all weight with "
            f"{percent(heaviest.token_share)} of the tokens."
        )
    else:
        told = f"Within a sequence it is {percent(health['sequence_ess_fraction'])}."
    return DiagnosisWarning(
        "ess_collapse",
        source.source,
        "few tokens decide the gradient",
        f"The effective sample size is {percent(health['ess_fraction'])} of "
        f"{source.num_loss_tokens:,} loss tokens. {told}",
        [
            "narrower `sft.weights.log_weight_clip_low` and `log_weight_clip_high`",
            _CLOSER,
            *_coarser_level(diagnosis),
            "a larger `sft.global_batch_size`, which averages over more of them",
        ],
    )


def _weights_on_the_ends(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    share, even = source.health["last_tenth_weight_share"], source.even_last_tenth_share
    if share <= max(MAX_LAST_TENTH_SHARE, MIN_LAST_TENTH_EXCESS * even):
        return None
    gamma = diagnosis.weights.gamma
    higher = (
        [f"a higher `sft.weights.gamma` (now {gamma:g}; 1 is no discount)"] if gamma < 1 else []
    )
    return DiagnosisWarning(
        "weights_on_the_ends",
        source.source,
        "completions train on their ends only",
        f"{percent(share)} of the weight is on the last tenth of the completions, which holds "
        f"{percent(even)} of the tokens.",
        [*higher, *_coarser_level(diagnosis), "shorter traces", _CLOSER],
    )


def _behavior_is_policy(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    if not _is_copy(source):
        return None
    rest = "so every weight is 1: plain SFT"
    if discounted_block_size(diagnosis.weights) and diagnosis.weights.gamma < 1.0:
        rest = f"so PEAR reduces to the discount: {diagnosis.weights.gamma:g} per token"
    return DiagnosisWarning(
        "behavior_is_policy",
        source.source,
        "the behavior model is a copy of the policy",
        f"The mean absolute log-ratio is {source.log_ratio_absolute_mean:.2g} nats per token: "
        f"every ratio is 1, {rest}.",
        [
            "see that `models.behavior` is the model that wrote these rows",
            "`sft.weights.kind=uniform`, if the policy did write them",
        ],
    )


def _long_traces(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    weights, length = diagnosis.weights, source.completion_lengths["p50"]
    block_size = discounted_block_size(weights)
    mean = source.perfect_ratio_mean_weights["p50"]
    if block_size is None or mean >= MIN_PERFECT_RATIO_MEAN_WEIGHT:
        return None
    gamma = gamma_for_mean_weight(
        WANTED_PERFECT_RATIO_MEAN_WEIGHT,
        num_loss_tokens=length,
        block_size=block_size,
        log_weight_low=weights.log_weight_clip_low,
    )
    return DiagnosisWarning(
        "long_traces",
        source.source,
        "the discount is strong for such long completions",
        f"At the median length of {length:,} loss tokens, gamma {weights.gamma:g} alone leaves a "
        f"mean weight of {mean:.2g}, even where the policy agrees with every token.",
        [f"`sft.weights.gamma={_rounded_up(gamma)}`: {WANTED_PERFECT_RATIO_MEAN_WEIGHT:g} instead"],
    )


def _proxy_scorer(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    if source.source not in diagnosis.proxy_sources:
        return None
    return DiagnosisWarning(
        "proxy_scorer",
        source.source,
        "its log-probs are a proxy's",
        "The model that gave the behavior log-probs did not write these rows: their ratios say how "
        "the policy differs from the scorer, not from the author.",
        [
            "score them with the model that wrote them, where it can be had",
            "a second run with `sft.weights.kind=uniform`, to see what the weights are worth",
        ],
    )


def _flat_weights(source: SourceDiagnosis, diagnosis: Diagnosis) -> DiagnosisWarning | None:
    fraction = source.health["ess_fraction"]
    if fraction <= MAX_ESS_FRACTION or _is_copy(source):  # a copy is told of already
        return None
    return DiagnosisWarning(
        "flat_weights",
        source.source,
        "PEAR does little here",
        f"The effective sample size is {percent(fraction)} of the loss tokens: at "
        f"{diagnosis.weights.level} level weights are nearly equal (mean "
        f"{source.health['weight/mean']:.3g}), so training is close to plain SFT.",
        ["nothing; but expect little from PEAR over `sft.weights.kind=uniform`"],
    )


_RULES: tuple[_Rule, ...] = (
    _behavior_unlike_policy,
    _ceiling,
    _ess_collapse,
    _weights_on_the_ends,
    _behavior_is_policy,
    _long_traces,
    _proxy_scorer,
    _flat_weights,
)
# They compare with the behavior policy, which a control of the policy's likelihood does without.
_OF_THE_BEHAVIOR = (_behavior_unlike_policy, _behavior_is_policy, _proxy_scorer)
_CONTROLS = {
    "shuffled": "The run is a control that gives these weights to other places of a step.",
    "position_profile": "The run is a control that trains with their mean at each distance from "
    "the end.",
    "likelihood_only": "The run is a control without the behavior policy: log-ratios are the "
    "policy's log-probs.",
}


def _is_copy(source: SourceDiagnosis) -> bool:
    return source.log_ratio_absolute_mean < MIN_LOG_RATIO_ABSOLUTE_MEAN


def _rescale(diagnosis: Diagnosis) -> list[str]:
    return [_RESCALE] if diagnosis.weights.rescale == "none" else []


def _coarser_level(diagnosis: Diagnosis) -> list[str]:
    """The levels above the present one."""
    coarser = {
        "token": "`sft.weights.level=block` or `sequence`, whose tokens share a weight",
        "block": "a larger `sft.weights.block_size`, or `sft.weights.level=sequence`",
        "span": "`sft.weights.level=sequence`",
    }
    level = diagnosis.weights.level
    return [coarser[level]] if level in coarser else []


def _rounded_up(gamma: float) -> str:
    """`gamma` with two digits of what it lacks to 1, rounded towards 1."""
    lacking = 1.0 - gamma
    digits = 1 - math.floor(math.log10(lacking))
    return f"{1.0 - math.floor(lacking * 10**digits) / 10**digits:.{digits}f}"
