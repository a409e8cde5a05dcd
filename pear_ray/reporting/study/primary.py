"""The comparison that the study was made for, held to what was written down before RL."""

from dataclasses import dataclass
from typing import Literal

from pear_ray.reporting.study.estimates import Comparison, compare
from pear_ray.reporting.study.load import AFTER, StudyData

Outcome = Literal["holds", "does_not_hold", "open"]
Standing = Literal["registered", "changed", "late", "exploratory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Primary:
    """The primary comparison.

    Attributes:
        against: The arm against each of those it has to be above, after RL.
        outcome: `open` while a run that it needs is still to come.
        standing: `changed`: something is no longer as registered; `late`: it was registered after
            RL had begun.
    """

    arm: str
    against: list[Comparison]
    alpha: float
    outcome: Outcome
    standing: Standing

    def is_above(self, comparison: Comparison) -> bool:
        """Whether the rule's condition on one of `against` is met."""
        found = comparison.difference
        return bool(found and found.value > 0 and found.p is not None and found.p <= self.alpha)


def primary_of(data: StudyData) -> Primary | None:
    """None where the study names no primary comparison."""
    wanted, score = data.config.primary, data.config.score
    if wanted is None:
        return None
    against = [
        compare(data, wanted.arm, other, suite=score.suite, metric=score.metric, when=AFTER)
        for other in wanted.against
    ]
    found = Primary(
        arm=wanted.arm,
        against=against,
        alpha=wanted.alpha,
        outcome="open",
        standing=_standing(data),
    )
    if not _is_complete(data, {wanted.arm, *wanted.against}):
        return found
    holds = all(found.is_above(each) for each in against)
    return Primary(
        arm=found.arm,
        against=against,
        alpha=found.alpha,
        outcome="holds" if holds else "does_not_hold",
        standing=found.standing,
    )


def _standing(data: StudyData) -> Standing:
    registration = data.facts.registration
    if registration is None:
        return "exploratory"
    first_rl = registration.first_rl_time
    if first_rl is not None and first_rl < registration.time:
        return "late"
    return "changed" if data.facts.changed_since_registration else "registered"


def _is_complete(data: StudyData, arms: set[str]) -> bool:
    """Whether every run of `arms` has ended, well or not: one looked at earlier may still turn.

    A run that the budget, or a stop, kept from running has not ended: the registered number of
    seeds is part of the rule.
    """
    ended = {
        (run.arm, run.seed)
        for run in data.runs
        if not run.is_tuning and run.status in {"done", "failed"}
    }
    return ended >= {(arm, seed) for arm in arms for seed in data.config.seeds}
