"""The order of the arms before and after RL, and what before RL goes with the score after it."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pear_ray.algorithms.ranks import average_ranks, spearman
from pear_ray.reporting.study.estimates import Comparison, SeedMean, compare, seed_mean
from pear_ray.reporting.study.load import AFTER, BEFORE, BySeed, StudyData

FEWEST_ARMS = 5  # of four, 24 orders are possible: a perfect one is nothing unusual


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """An arm's place before and after RL, from 1, the highest; equal means share theirs."""

    arm: str
    before: float
    after: float
    before_mean: float
    after_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The order of the arms by their means.

    Attributes:
        seeds: That all arms in it have, before and after RL.
        left_out: Arms without any such seed.
    """

    arms: list[Rank]
    seeds: list[int]
    left_out: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reversal:
    """Two arms of which the one ahead before RL is behind after it.

    Attributes:
        before: The arm that was ahead, against the other, before RL.
        after: The same after RL.
        is_apart: Whether the seeds tell them apart both times, each taken alone.
    """

    arm: str
    against: str
    before: Comparison
    after: Comparison
    is_apart: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """How a number known before RL goes with the score after it.

    Attributes:
        over_arms: Spearman over the means of the arms.
        num_arms: How many arms that is over.
        within_seeds: Mean over seeds of Spearman over the arms with that seed.
    """

    metric: str
    over_arms: float | None
    num_arms: int
    within_seeds: SeedMean | None


def ranks_of(data: StudyData) -> Ranks:
    """The order by the study's score, over the seeds that all arms with any have."""
    score = data.config.score
    found = {
        arm: [data.values(arm, score.suite, when, score.metric) for when in (BEFORE, AFTER)]
        for arm in data.arms
    }
    both = {arm: set(before) & set(after) for arm, (before, after) in found.items()}
    shown = [arm for arm in data.arms if both[arm]]
    seeds = sorted(set.intersection(*(both[arm] for arm in shown))) if shown else []
    # Each over its own where there is no common one: better than no order while a study runs.
    own = {arm: seeds or sorted(both[arm]) for arm in shown}
    means = {
        arm: [statistics.fmean(values[seed] for seed in own[arm]) for values in found[arm]]
        for arm in shown
    }
    places = [average_ranks([-means[arm][side] for arm in shown]) for side in (0, 1)]
    return Ranks(
        arms=[
            Rank(
                arm=arm,
                before=places[0][place],
                after=places[1][place],
                before_mean=means[arm][0],
                after_mean=means[arm][1],
            )
            for place, arm in enumerate(shown)
        ],
        seeds=seeds,
        left_out=[arm for arm in data.arms if arm not in shown],
    )


def reversals_of(data: StudyData) -> list[Reversal]:
    """Every pair of arms whose order RL turns around; those that the seeds carry come first.

    Of pairs with the arm that plain SFT is, and of any pair that is apart both times.
    """
    score, baseline = data.config.score, data.baseline.name
    found = []
    for one, other in itertools.combinations(data.arms, 2):
        before, after = (
            compare(data, one, other, suite=score.suite, metric=score.metric, when=when)
            for when in (BEFORE, AFTER)
        )
        if before.value * after.value >= 0:
            continue
        if before.value < 0:
            one, other = other, one  # noqa: PLW2901 - named by who was ahead
            before, after = (
                compare(data, one, other, suite=score.suite, metric=score.metric, when=when)
                for when in (BEFORE, AFTER)
            )
        apart = before.is_apart(data.alpha) and after.is_apart(data.alpha)
        if apart or baseline in {one, other}:
            found.append(
                Reversal(arm=one, against=other, before=before, after=after, is_apart=apart)
            )
    return sorted(found, key=lambda each: (not each.is_apart, each.after.value))


def predictors_of(data: StudyData) -> list[Predictor]:
    """Every number known before RL that enough arms have, the strongest first.

    Without mean@n, which is pass@1 again.
    """
    suite = data.config.score.suite
    target = {arm: data.values(arm, suite, AFTER, data.config.score.metric) for arm in data.arms}
    names = {metric for _, each, where, metric in data.scores if each == suite and where == "sft"}
    updates = {
        metric
        for _, _, where, metric in data.scores
        if not where and metric in {"update/sft_norm", "update/relative_sft_norm"}
    }
    found = [
        _predictor(
            metric,
            {arm: data.values(arm, suite, BEFORE, metric) for arm in data.arms},
            target,
            data,
        )
        for metric in sorted(names)
        if not metric.startswith("mean_at_")
    ] + [
        _predictor(
            metric,
            {arm: data.scores.get((arm, "", "", metric), {}) for arm in data.arms},
            target,
            data,
        )
        for metric in sorted(updates)
    ]
    kept = [each for each in found if each.over_arms is not None or each.within_seeds is not None]
    return sorted(kept, key=lambda each: -abs(each.over_arms or 0.0))


def _predictor(
    metric: str, known: dict[str, BySeed], target: dict[str, BySeed], data: StudyData
) -> Predictor:
    pairs = {
        (arm, seed): (known[arm][seed], target[arm][seed])
        for arm in known
        for seed in known[arm]
        if seed in target[arm]
    }
    means = [
        [
            statistics.fmean(pair[side] for (each, _), pair in pairs.items() if each == arm)
            for side in (0, 1)
        ]
        for arm in dict.fromkeys(arm for arm, _ in pairs)
    ]
    by_seed = {}
    for seed in data.config.seeds:
        rows = [pair for (_, each), pair in pairs.items() if each == seed]
        rho = _rank_correlation(rows)
        if rho is not None:
            by_seed[seed] = rho
    return Predictor(
        metric=metric,
        over_arms=_rank_correlation(means),
        num_arms=len(means),
        within_seeds=seed_mean(by_seed, confidence=data.config.confidence),
    )


def _rank_correlation(rows: Sequence[Sequence[float]]) -> float | None:
    if len(rows) < FEWEST_ARMS:
        return None
    return spearman([row[0] for row in rows], [row[1] for row in rows])
