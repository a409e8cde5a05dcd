"""Each arm's scores against plain SFT's, its controls', and its own other scale."""

from collections.abc import Iterator
from dataclasses import dataclass

from pear_ray.algorithms.power import detectable_difference, pairs_needed
from pear_ray.reporting.study.estimates import (
    Comparison,
    SeedMean,
    as_family,
    compare,
    seed_mean,
)
from pear_ray.reporting.study.load import AFTER, BEFORE, StudyData
from pear_ray.reporting.words import pass_at_k_names

POWER = 0.8
SIZES = (0.05, 0.03)  # differences of a score that people ask after


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmScores:
    """One arm in a table; of the baseline both comparisons are None.

    Attributes:
        before: Its score before RL.
        after: Its score after RL.
        versus_before: Against the baseline before RL.
        versus_after: Against the baseline after RL.
    """

    arm: str
    before: SeedMean | None
    after: SeedMean | None
    versus_before: Comparison | None
    versus_after: Comparison | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Every arm by one metric of one suite."""

    suite: str
    metric: str
    baseline: str
    arms: list[ArmScores]

    @property
    def comparisons(self) -> list[Comparison]:
        """With the baseline, after RL."""
        return [arm.versus_after for arm in self.arms if arm.versus_after]


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What a comparison's seeds can show.

    Attributes:
        sd: Of one seed's difference after RL.
        needed: Seeds for a difference of each size of `SIZES`, by its text.
        detectable: The difference that the seeds at hand show; None with too few.
    """

    arm: str
    against: str
    num_seeds: int
    sd: float
    needed: dict[str, int]
    detectable: float | None


def score_tables(data: StudyData) -> list[ScoreTable]:
    """The study's own score first, then every pass@k of every suite."""
    main = (data.config.score.suite, data.config.score.metric)
    others = [
        (suite, metric)
        for suite in data.suites()
        for metric in pass_at_k_names(data.metrics(suite))
        if (suite, metric) != main
    ]
    return [_table(data, suite, metric) for suite, metric in (main, *others)]


def _table(data: StudyData, suite: str, metric: str) -> ScoreTable:
    baseline = data.baseline.name
    others = [arm for arm in data.arms if arm != baseline]
    versus = {
        when: {
            each.arm: each
            for each in as_family(
                [
                    compare(data, arm, baseline, suite=suite, metric=metric, when=when)
                    for arm in others
                ]
            )
        }
        for when in (BEFORE, AFTER)
    }
    rows = []
    for arm in data.arms:
        before, after = (
            seed_mean(data.values(arm, suite, when, metric), confidence=data.config.confidence)
            for when in (BEFORE, AFTER)
        )
        rows.append(
            ArmScores(
                arm=arm,
                before=before,
                after=after,
                versus_before=versus[BEFORE].get(arm),
                versus_after=versus[AFTER].get(arm),
            )
        )
    return ScoreTable(suite=suite, metric=metric, baseline=baseline, arms=rows)


def control_comparisons(data: StudyData) -> list[Comparison]:
    """Each weighted arm against its controls of the same scale, after RL, as one family."""
    pairs = [(arm.name, other) for arm in data.facts.arms for other in _controls(data, arm.name)]
    return _after_rl(data, pairs)


def rescaled_comparisons(data: StudyData) -> list[Comparison]:
    """Each rescaled arm against the same as it is, after RL, as one family."""
    plain = {(arm.parent, arm.control): arm.name for arm in data.facts.arms if not arm.rescaled}
    pairs = [
        (arm.name, plain[arm.parent, arm.control])
        for arm in data.facts.arms
        if arm.rescaled and (arm.parent, arm.control) in plain
    ]
    return _after_rl(data, pairs)


def power_of(data: StudyData, comparisons: list[Comparison]) -> list[Power]:
    """What each comparison's seeds can show; of those with a spread."""
    level = {"alpha": data.alpha, "power": POWER}
    return [
        Power(
            arm=each.arm,
            against=each.against,
            num_seeds=len(each.seeds),
            sd=each.sd,
            needed={
                f"{size:g}": pairs_needed(sd=each.sd, difference=size, **level) for size in SIZES
            },
            detectable=detectable_difference(sd=each.sd, num_pairs=len(each.seeds), **level),
        )
        for each in comparisons
        if each.sd is not None
    ]


def _controls(data: StudyData, name: str) -> Iterator[str]:
    arm = data.arm(name)
    if arm.control is None:
        for other in data.facts.arms:
            same = (other.parent, other.rescaled) == (arm.parent, arm.rescaled)
            if same and other.control is not None:
                yield other.name


def _after_rl(data: StudyData, pairs: list[tuple[str, str]]) -> list[Comparison]:
    score = data.config.score
    return as_family(
        [
            compare(data, arm, other, suite=score.suite, metric=score.metric, when=AFTER)
            for arm, other in pairs
        ]
    )
