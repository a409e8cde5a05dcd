"""Which learning rate each arm gets: the one that ends highest after RL, on seeds of its own."""

import statistics
from collections.abc import Iterable

from pear_ray.config.study import ScoreOfStudy
from pear_ray.config.study_plan import StudyPlan
from pear_ray.errors import ConfigError
from pear_ray.study.cell import Measured


def score_after_rl(found: Measured, score: ScoreOfStudy, *, checkpoint: str = "rl") -> float:
    """The study's score of a run that is done, after RL unless another `checkpoint` is asked for.

    Raises:
        ConfigError: The suite has no such metric.
    """
    of_suite = [
        each for each in found.scores if each.suite == score.suite and each.checkpoint == checkpoint
    ]
    for each in of_suite:
        if each.metric == score.metric:
            return each.value
    known = ", ".join(sorted({each.metric for each in of_suite}))
    raise ConfigError(
        f"score.metric={score.metric!r}: suite {score.suite!r} has {known or 'no results'}"
    )


def chosen_rates(plan: StudyPlan, measured: Iterable[Measured]) -> dict[str, float]:
    """By arm the learning rate with the highest mean score; of equals the smaller one.

    One with which a run failed counts only where every other one has failed too: what is left of
    its seeds may be the easier ones. An arm whose runs all failed is left out.
    """
    tune = plan.study.tune
    if tune is None:
        return {}
    scores: dict[str, dict[float, list[float]]] = {}
    for found in measured:
        run = found.run
        if run.is_tuning and run.status == "done" and run.learning_rate is not None:
            of_arm = scores.setdefault(run.arm, {})
            of_arm.setdefault(run.learning_rate, []).append(score_after_rl(found, plan.study.score))
    chosen = {}
    for arm, by_rate in scores.items():
        whole = {rate: each for rate, each in by_rate.items() if len(each) == len(tune.seeds)}
        means = {rate: statistics.fmean(each) for rate, each in (whole or by_rate).items()}
        chosen[arm] = max(sorted(means), key=means.__getitem__)
    return chosen
