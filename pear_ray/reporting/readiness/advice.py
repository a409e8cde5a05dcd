"""What a readiness report advises: rules with a threshold each, in words, with what can be done."""

import dataclasses
import math

from pear_ray.reporting.diagnosis.warnings import percent
from pear_ray.reporting.load import Estimate
from pear_ray.reporting.readiness.numbers import Readiness

# Every second prompt costs its completions and teaches nothing, whatever the group size.
MAX_ALWAYS_FAIL = 0.5
MAX_ALWAYS_PASS = 0.5
# Fewer than three groups in ten with a gradient: DAPO (arXiv 2503.14476) samples others then.
MIN_MIXED = 0.3
WANTED_MIXED = 0.5
# A step's gradient is a mean over these; with three of them it is mostly their noise.
MIN_GROUPS_PER_STEP = 4.0
# More of a group than one in twenty is cut, and mostly wrong for that alone.
MAX_TRUNCATED = 0.05
# A twentieth of a nat per token: over 20 tokens one completion has 1/e of the probability, and a
# group of 8 is mostly copies of it.
MIN_ENTROPY = 0.05
# The chance of a right answer in a group hardly above that of one sample: nothing to reinforce.
MIN_HEADROOM = 0.02
# At one nat per token the base gives a sampled token a third of the checkpoint's probability.
MAX_KL_PER_TOKEN = 1.0
MAX_ERRORED = 0.01
# The interval of the share of mixed groups is this wide: a verdict on it would be a guess.
MAX_WIDTH = 0.3
_MOST_BATCHES = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """One thing to look at before RL.

    Attributes:
        rule: Name of the rule.
        headline: What is the matter, in a few words.
        message: The same with numbers, and the threshold.
        options: What can be done about it.
    """

    rule: str
    headline: str
    message: str
    options: list[str]


def readiness_advice(found: Readiness) -> list[Advice]:
    """All advice, the rules in order of weight."""
    rules = (
        _always_fail,
        _always_pass,
        _few_mixed,
        _few_groups,
        _cut,
        _low_entropy,
        _no_headroom,
        _far_from_base,
        _errors,
        _probe_falls,
        _few_prompts,
    )
    return [advice for rule in rules if (advice := rule(found))]


def verdict(found: Readiness, advice: list[Advice]) -> str:
    """The report in two sentences."""
    effect = (
        f"{interval(found.mixed)} of the groups of {found.group_size} hold right and wrong "
        f"completions: about {found.groups_per_step:.1f} of {found.prompts_per_step} in a step "
        f"teach something. pass@1 is {found.pass_at[1].value:.3f}, "
        f"pass@{max(found.pass_at)} {found.pass_at[max(found.pass_at)].value:.3f}."
    )
    if not advice:
        return f"Nothing speaks against RL. {effect}"
    more = f", and {len(advice) - 1} more" if len(advice) > 1 else ""
    return f"Look before RL: {advice[0].headline}{more}. {effect}"


def interval(estimate: Estimate) -> str:
    """`62 % [54, 70]`."""
    return f"{percent(estimate.value)} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _always_fail(found: Readiness) -> Advice | None:
    share = found.always_fail
    if share.value < MAX_ALWAYS_FAIL:
        return None
    return Advice(
        "always_fail",
        f"{percent(share.value)} of prompts always fail",
        f"{interval(share)} of {found.num_prompts:,} prompts have no right completion among "
        f"{found.group_size} (from {percent(MAX_ALWAYS_FAIL)} on this is told).",
        [
            "easier prompts, or `rl.difficulty`, which keeps those of a pass-rate band",
            "more SFT, or a corpus nearer to these prompts",
            *_larger_groups(found),
        ],
    )


def _always_pass(found: Readiness) -> Advice | None:
    share = found.always_pass
    if share.value < MAX_ALWAYS_PASS:
        return None
    return Advice(
        "always_pass",
        f"{percent(share.value)} of prompts always pass",
        f"{interval(share)} of {found.num_prompts:,} prompts have {found.group_size} right "
        f"completions of {found.group_size} (from {percent(MAX_ALWAYS_PASS)} on this is told).",
        [
            "harder prompts, or `rl.difficulty`, which keeps those of a pass-rate band",
            *_larger_groups(found),
        ],
    )


def _few_mixed(found: Readiness) -> Advice | None:
    if found.mixed.value >= MIN_MIXED:
        return None
    options = [*_larger_groups(found)]
    if found.mixed.value:
        batches = min(_MOST_BATCHES, math.ceil(1 / found.mixed.value))
        options.append(
            f"`rl.dynamic_sampling={{max_batches: {batches}}}`, which samples other prompts in "
            "place of groups that teach nothing"
        )
    return Advice(
        "few_mixed",
        f"only {percent(found.mixed.value)} of the groups can teach",
        f"{interval(found.mixed)} of the groups of {found.group_size} hold right and wrong "
        f"completions (below {percent(MIN_MIXED)} this is told); the sampling of all others is "
        "lost.",
        [*options, "prompts of a pass rate near a half: `rl.difficulty`"],
    )


def _few_groups(found: Readiness) -> Advice | None:
    if found.groups_per_step >= MIN_GROUPS_PER_STEP or not found.mixed.value:
        return None
    wanted = math.ceil(MIN_GROUPS_PER_STEP / found.mixed.value)
    return Advice(
        "few_groups",
        "few groups decide a step",
        f"About {found.groups_per_step:.1f} of {found.prompts_per_step} groups per step have a "
        f"gradient (below {MIN_GROUPS_PER_STEP:g} this is told): its direction is mostly chance.",
        [f"`rl.prompts_per_step={wanted}` or more", "`rl.dynamic_sampling`"],
    )


def _cut(found: Readiness) -> Advice | None:
    if found.truncated <= MAX_TRUNCATED:
        return None
    return Advice(
        "truncated",
        f"{percent(found.truncated)} of the completions are cut",
        f"They reached `rl.max_tokens={found.max_tokens}` (above {percent(MAX_TRUNCATED)} this is "
        f"told), and {percent(found.truncated_right)} of the cut ones are right; 95 % of all have "
        f"at most {found.length_quantiles[1]:.0f} tokens.",
        [
            "a larger `rl.max_tokens`",
            "`rl.overlong.mask_truncated=true`, which leaves them out of the loss",
            "SFT on answers that end, or for longer",
        ],
    )


def _low_entropy(found: Readiness) -> Advice | None:
    if found.entropy >= MIN_ENTROPY:
        return None
    return Advice(
        "low_entropy",
        "the policy hardly varies its completions",
        f"Its entropy is {found.entropy:.3f} nats per token (below {MIN_ENTROPY:g} this is told): "
        "the completions of a group are mostly the same, and RL has little to choose from.",
        [
            "fewer epochs of SFT, or a lower learning rate",
            "a higher `rl.temperature`, with its `rl.entropy_coefficient`",
        ],
    )


def _no_headroom(found: Readiness) -> Advice | None:
    last = max(found.pass_at)
    if found.pass_at[last].value - found.pass_at[1].value >= MIN_HEADROOM or last == 1:
        return None
    return Advice(
        "no_headroom",
        f"pass@{last} is hardly above pass@1",
        f"{found.pass_at[last].value:.3f} and {found.pass_at[1].value:.3f} (less than "
        f"{MIN_HEADROOM:g} apart is told): what the checkpoint does not solve at once, it does not "
        "solve in a group either.",
        ["prompts of other difficulty", "SFT that keeps more of its variety"],
    )


def _far_from_base(found: Readiness) -> Advice | None:
    if found.drift is None or found.drift.kl_per_token.value <= MAX_KL_PER_TOKEN:
        return None
    return Advice(
        "far_from_base",
        "SFT has moved far from the base",
        f"KL(checkpoint || base) is {found.drift.kl_per_token.value:.2f} nats per token (above "
        f"{MAX_KL_PER_TOKEN:g} this is told): what the base could do beside this may be lost.",
        [
            "nothing, where a new format is all that was to be learned",
            "fewer epochs of SFT, a lower learning rate, or `sft.lora`",
        ],
    )


def _errors(found: Readiness) -> Advice | None:
    if found.errored <= MAX_ERRORED:
        return None
    return Advice(
        "errors",
        f"{percent(found.errored)} of the rewards could not be computed",
        f"Above {percent(MAX_ERRORED)} this is told; above `rl.rewards.max_errored_fraction` RL "
        "stops. The rollouts have the reason in `reward_detail`.",
        ["`pear inspect` on the stage's folder shows them", "mend the verifier, or its deadline"],
    )


def _probe_falls(found: Readiness) -> Advice | None:
    if found.probe is None or found.probe.change.high >= 0.0:
        return None
    change = found.probe.change
    return Advice(
        "probe_falls",
        "the reward fell in the probe",
        f"Mean reward changed by {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] from "
        f"the earlier to the later half of {len(found.probe.rewards)} short runs (told where the "
        "whole interval is below 0).",
        ["a lower `rl.optimizer.learning_rate`", "more prompts or completions per step"],
    )


def _few_prompts(found: Readiness) -> Advice | None:
    width = found.mixed.high - found.mixed.low
    if width <= MAX_WIDTH:
        return None
    times = math.ceil((width / MAX_WIDTH) ** 2)  # an interval narrows with the root
    return Advice(
        "few_prompts",
        "too few prompts for a verdict",
        f"With {found.num_prompts:,} prompts the share of mixed groups is only known to lie in "
        f"{interval(found.mixed)} (wider than {percent(MAX_WIDTH)} is told).",
        [f"`ready.num_steps={found.num_steps * times}`"],
    )


def _larger_groups(found: Readiness) -> list[str]:
    """The first larger group size at which half of the groups are mixed, or what the last does."""
    larger = {size: share for size, share in found.mixed_at.items() if size > found.group_size}
    enough = [size for size, share in larger.items() if share >= WANTED_MIXED]
    if not larger:
        return []
    size = enough[0] if enough else max(larger)
    words = (
        f"`rl.group_size={size}`: {percent(larger[size])} of the groups would be mixed, "
        f"{percent(found.mixed_at[found.group_size])} are at {found.group_size} (expected, by a "
        "Beta fitted to the pass rates)"
    )
    return [words]
