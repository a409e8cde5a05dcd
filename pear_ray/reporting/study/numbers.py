"""Everything that a study's report says, as numbers."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.algorithms.power import fewest_pairs, least_p
from pear_ray.artifacts.study_facts import BudgetUse
from pear_ray.artifacts.study_results import StudyRun
from pear_ray.reporting.study.estimates import Comparison, SeedMean
from pear_ray.reporting.study.load import StudyData, load_study_data
from pear_ray.reporting.study.orders import (
    Predictor,
    Ranks,
    Reversal,
    predictors_of,
    ranks_of,
    reversals_of,
)
from pear_ray.reporting.study.primary import Primary, primary_of
from pear_ray.reporting.study.scores import (
    Power,
    ScoreTable,
    control_comparisons,
    power_of,
    rescaled_comparisons,
    score_tables,
)
from pear_ray.reporting.study.training import CurveSet, curve_sets, distances, weight_health
from pear_ray.reporting.study.tuning import Tuned, tuning_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """How the runs ended.

    Attributes:
        planned: Reported runs: arms times seeds.
        done: Of them.
        failed: Reported and tuning runs that ended with an error.
        not_run: Those that the budget or a stop left out.
        seconds: Of all runs, tuning included.
    """

    planned: int
    done: int
    failed: list[StudyRun]
    not_run: list[StudyRun]
    seconds: float
    optimizer_steps: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyNumbers:
    """A study's report.

    Attributes:
        seeds: Planned ones.
        alpha: Level that p is held to.
        confidence: Level of the intervals.
        most_pairs: Seeds of the best-covered comparison that the verdict is about.
        least_p: The smallest p that so many pairs can have.
        fewest_pairs: How many it takes for `alpha`.
        tables: Scores; the study's own first.
        controls: Weighted arms against their controls.
        rescaled: Rescaled arms against the same as they are.
    """

    name: str
    state: str
    arms: list[str]
    seeds: list[int]
    suite: str
    metric: str
    alpha: float
    confidence: float
    baseline: str
    baseline_is_uniform: bool
    most_pairs: int
    least_p: float
    fewest_pairs: int
    runs: Runs
    primary: Primary | None
    changed_since_registration: list[str]
    tables: list[ScoreTable]
    controls: list[Comparison]
    control_kinds: dict[str, str]
    rescaled: list[Comparison]
    ranks: Ranks
    reversals: list[Reversal]
    curves: list[CurveSet]
    weights: dict[str, dict[str, SeedMean]]
    distances: dict[str, dict[str, SeedMean]]
    predictors: list[Predictor]
    tuning: list[Tuned]
    power: list[Power]
    budget: list[BudgetUse]
    strangers: list[str]

    @property
    def main(self) -> ScoreTable:
        """By the study's own score."""
        return self.tables[0]

    @property
    def has_too_few_seeds(self) -> bool:
        """Whether no comparison could reach `alpha`, whatever the scores."""
        return self.least_p > self.alpha

    @property
    def is_complete(self) -> bool:
        """Whether every planned run has ended."""
        ended = self.runs.done + sum(not run.is_tuning for run in self.runs.failed)
        return self.state == "done" and ended >= self.runs.planned


def study_numbers(study_dir: Path) -> StudyNumbers:
    """All numbers of the study in `study_dir`, finished or not. Errors as of its parts."""
    return numbers_of(load_study_data(study_dir))


def numbers_of(data: StudyData) -> StudyNumbers:
    """All numbers of `data`."""
    tables, primary = score_tables(data), primary_of(data)
    judged = primary.against if primary else tables[0].comparisons
    counts = [len(each.seeds) for each in judged]
    # A rule that names several arms is only as sure as the one with the fewest pairs.
    pairs = (min if primary else max)(counts, default=0)
    return StudyNumbers(
        name=data.config.name,
        state=data.facts.state,
        arms=data.arms,
        seeds=list(data.config.seeds),
        suite=data.config.score.suite,
        metric=data.config.score.metric,
        alpha=data.alpha,
        confidence=data.config.confidence,
        baseline=data.baseline.name,
        baseline_is_uniform=data.baseline.is_uniform,
        most_pairs=pairs,
        least_p=least_p(pairs),
        fewest_pairs=fewest_pairs(data.alpha),
        runs=_runs(data),
        primary=primary,
        changed_since_registration=list(data.facts.changed_since_registration),
        tables=tables,
        controls=control_comparisons(data),
        control_kinds={arm.name: arm.control for arm in data.facts.arms if arm.control},
        rescaled=rescaled_comparisons(data),
        ranks=ranks_of(data),
        reversals=reversals_of(data),
        curves=curve_sets(data),
        weights=weight_health(data),
        distances=distances(data),
        predictors=predictors_of(data),
        tuning=tuning_of(data),
        power=power_of(data, [*tables[0].comparisons]),
        budget=list(data.facts.budget),
        strangers=data.strangers,
    )


def numbers_tree(found: StudyNumbers) -> dict[str, Any]:
    """The numbers as JSON takes them; what is not finite is null."""
    return _finite(dataclasses.asdict(found))


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _runs(data: StudyData) -> Runs:
    return Runs(
        planned=len(data.arms) * len(data.config.seeds),
        done=sum(run.status == "done" and not run.is_tuning for run in data.runs),
        failed=[run for run in data.runs if run.status == "failed"],
        not_run=[run for run in data.runs if run.status == "not_run"],
        seconds=sum(run.seconds for run in data.runs),
        optimizer_steps=sum(run.optimizer_steps for run in data.runs),
        tokens=sum(run.tokens for run in data.runs),
    )
