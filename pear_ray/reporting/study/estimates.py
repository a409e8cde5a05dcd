"""Scores over seeds: means with intervals, and differences of arms, paired seed by seed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pear_ray.algorithms.many_comparisons import holm
from pear_ray.algorithms.paired import PairedDifference, paired_over_seeds
from pear_ray.algorithms.pass_at_k import bootstrap_interval
from pear_ray.reporting.study.load import BySeed, StudyData

_RESAMPLING_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedMean:
    """A mean over seeds.

    Attributes:
        low: Lower end of its bootstrap interval over seeds; None with one seed.
        high: Upper end.
        sd: From seed to seed; None with one seed.
        seeds: Which.
    """

    value: float
    low: float | None
    high: float | None
    sd: float | None
    seeds: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One arm's score minus another's, over the seeds that both have.

    Attributes:
        when: `before` or `after` RL.
        difference: None where no seed has both.
        sd: Of one seed's difference, from seed to seed; None with fewer than two.
        seeds: That both have.
        missing: Those of the study that one or both lack.
        holm_p: p, adjusted for `family` comparisons; None where it is not one of a family.
        family: How many comparisons p is adjusted for.
    """

    arm: str
    against: str
    suite: str
    metric: str
    when: str
    difference: PairedDifference | None
    sd: float | None
    seeds: list[int]
    missing: list[int]
    holm_p: float | None = None
    family: int = 1

    def is_apart(self, alpha: float) -> bool:
        """Whether, taken alone, the seeds tell the arms apart: by p and by the interval."""
        found = self.difference
        if found is None or found.p is None or found.p > alpha:
            return False
        return not found.low <= 0.0 <= found.high

    def is_apart_in_family(self, alpha: float) -> bool:
        """The same, corrected for the family."""
        return self.is_apart(alpha) and (self.holm_p is None or self.holm_p <= alpha)

    @property
    def value(self) -> float:
        """The mean difference; 0 where there is none."""
        return self.difference.value if self.difference else 0.0


def seed_mean(values: BySeed, *, confidence: float) -> SeedMean | None:
    """The mean over seeds; None of none."""
    if not values:
        return None
    seeds = sorted(values)
    found = [values[seed] for seed in seeds]
    low = high = sd = None
    if len(found) > 1:
        low, high = bootstrap_interval(
            torch.tensor(found, dtype=torch.float64), seed=_RESAMPLING_SEED, confidence=confidence
        )
        sd = statistics.stdev(found)
    return SeedMean(value=statistics.fmean(found), low=low, high=high, sd=sd, seeds=seeds)


def compare(
    data: StudyData, arm: str, against: str, *, suite: str, metric: str, when: str
) -> Comparison:
    """`arm` minus `against`."""
    new, old = (data.values(each, suite, when, metric) for each in (arm, against))
    seeds = [seed for seed in data.config.seeds if seed in new and seed in old]
    difference = sd = None
    if seeds:
        difference = paired_over_seeds(
            [old[seed] for seed in seeds],
            [new[seed] for seed in seeds],
            seed=_RESAMPLING_SEED,
            confidence=data.config.confidence,
        )
    if len(seeds) > 1:
        sd = statistics.stdev([new[seed] - old[seed] for seed in seeds])
    return Comparison(
        arm=arm,
        against=against,
        suite=suite,
        metric=metric,
        when=when,
        difference=difference,
        sd=sd,
        seeds=seeds,
        missing=[seed for seed in data.config.seeds if seed not in seeds],
    )


def as_family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, each with its p adjusted for all that have one."""
    p_values = [each.difference.p if each.difference else None for each in comparisons]
    known = [place for place, p in enumerate(p_values) if p is not None]
    adjusted = dict(zip(known, holm([p for p in p_values if p is not None]), strict=True))
    return [
        replace(each, holm_p=adjusted.get(place), family=len(known))
        for place, each in enumerate(comparisons)
    ]
