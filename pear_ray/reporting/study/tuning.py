"""How each arm's learning rate was chosen."""

from dataclasses import dataclass

from pear_ray.reporting.study.estimates import SeedMean, seed_mean
from pear_ray.reporting.study.load import StudyData


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """One arm's scores after RL by learning rate, on the tuning seeds.

    Attributes:
        scores: In the order of the rates; None where no run has a score yet.
        chosen: None while it is not.
        is_at_end: Whether it is the lowest or highest that was tried: a better one may lie beyond.
    """

    arm: str
    scores: list[tuple[float, SeedMean | None]]
    chosen: float | None
    is_at_end: bool


def tuning_of(data: StudyData) -> list[Tuned]:
    """Every arm that was tuned, or is being."""
    tune = data.config.tune
    if tune is None:
        return []
    rates = sorted(tune.learning_rates)
    tuned = {run.arm for run in data.runs if run.is_tuning} | set(data.facts.learning_rates)
    found = []
    for arm in data.arms:
        if arm not in tuned:
            continue
        chosen = data.facts.learning_rates.get(arm)
        scores = [
            (
                rate,
                seed_mean(
                    data.tuning_scores.get((arm, rate), {}), confidence=data.config.confidence
                ),
            )
            for rate in rates
        ]
        found.append(
            Tuned(
                arm=arm,
                scores=scores,
                chosen=chosen,
                is_at_end=chosen in (rates[0], rates[-1]),
            )
        )
    return found
