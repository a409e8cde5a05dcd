"""What a comparison says of its runs in sentences. It never claims more than the intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.reporting.comparison.pairs import paired_runs
from pear_ray.reporting.comparison.runs import (
    ComparedRun,
    evaluated_on,
    heldout_rows,
    suite_names,
)
from pear_ray.reporting.comparison.table import last_value
from pear_ray.reporting.load import Estimate
from pear_ray.reporting.paired import difference_words
from pear_ray.reporting.words import CHECKPOINT_WORDS, estimate_words, metric_words, overlap

if TYPE_CHECKING:
    from pear_ray.algorithms.paired import PairedDifference

_OUTCOME = "pass_at_1"
_ONE_RUN = "Intervals of pass@k are over the problems of one run each, not over seeds"
_CHOSEN = ", and not corrected for the choice of the highest among several"
_MOST_LISTED = 4  # the figure of estimates shows all
_NO_INTERVAL = "one run each, so no interval: another seed may order them otherwise"
_NO_MEASURE = (
    "No two runs have a common measure yet: pass@k of `evaluate`, or the loss of rows kept out of "
    "training (`sft.heldout_rows`)."
)


def headline(runs: Sequence[ComparedRun]) -> list[str]:
    """What may be said of the outcome, the most telling sentence first."""
    if len(runs) == 1:
        return ["One run: there is nothing to compare it with."]
    names = suite_names(runs)
    passes = [
        f"{suite}: {sentence}" if len(names) > 1 else sentence
        for suite in names
        for sentence in _pass_at_1(runs, suite)
    ]
    return [*passes, *_heldout(runs)] or [_NO_MEASURE]


def _pass_at_1(runs: Sequence[ComparedRun], suite: str) -> Iterator[str]:
    """How the runs' last common checkpoint did, where it was evaluated on the same problems."""
    evaluated = {run.label: run.suites[suite] for run in runs if suite in run.suites}
    if len({evaluated_on(run, suite) for run in runs if suite in run.suites}) > 1:
        yield "pass@1 is not compared: the evaluations are not of the same problems and settings."
        return
    for checkpoint in reversed(CHECKPOINTS):
        found = {
            label: evaluation.checkpoints[checkpoint][_OUTCOME]
            for label, evaluation in evaluated.items()
            if _OUTCOME in evaluation.checkpoints.get(checkpoint, {})
        }
        if len(found) > 1:
            best = max(found, key=lambda label: found[label].value)
            by_label = {run.label: run for run in runs}
            paired = {
                label: each
                for label in found
                if label != best
                and (each := paired_runs(by_label[label], by_label[best], suite, checkpoint))
            }
            yield compared(found, where=CHECKPOINT_WORDS[checkpoint], paired=paired)
            yield _ONE_RUN + (_CHOSEN if len(found) > 2 else "") + "."  # noqa: PLR2004 - a pair
            return


def compared(
    found: dict[str, Estimate],
    *,
    where: str,
    paired: Mapping[str, "PairedDifference"] | None = None,
) -> str:
    """Which run's pass@1 is highest, and from which others this evaluation tells it apart.

    `paired` holds the differences from the highest, problem by problem, of those that have one;
    of the others the intervals decide.
    """
    best = max(found, key=lambda label: found[label].value)
    pairs = paired or {}
    others = [label for label in found if label not in (best, *pairs)]
    alike = [label for label in others if overlap(found[label], found[best])]
    below = [label for label in others if label not in alike]
    words = f"{metric_words(_OUTCOME)} ({where}) is highest for {best}, "
    words += estimate_words(found[best])
    if alike:
        words += f"; its interval overlaps with that of {_listed(alike)}: not told apart"
    if below:
        words += f"; the interval lies below it for {_listed(below)}"
    apart = [label for label, each in pairs.items() if each.is_told_apart]
    for labels, said in (
        ([label for label in pairs if label not in apart], "not told apart from"),
        (apart, "above"),
    ):
        if labels:
            told = [f"{label} ({difference_words(pairs[label])})" for label in labels]
            words += f"; paired by problem it is {said} {_listed(told)}"
    return f"{words}."


def _heldout(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """How far the held-out losses of the same rows lie apart."""
    finished = [run for run in runs if "sft" in run.manifests]
    values = {run.label: last_value(run, "sft", "sft/heldout/nll") for run in finished}
    found = {label: value for label, value in values.items() if math.isfinite(value)}
    if len(found) < 2:  # noqa: PLR2004 - two make a comparison
        return
    if len({heldout_rows(run) for run in finished if run.label in found}) > 1:
        yield "Held-out losses are not compared: they are not known to be of the same rows."
        return
    low, high = (
        min(found, key=lambda label: found[label]),
        max(found, key=lambda label: found[label]),
    )
    yield (
        f"Held-out nll goes from {found[low]:.4f} ({low}) to {found[high]:.4f} ({high}) nats per "
        f"token over {len(found)} runs; {_NO_INTERVAL}."
    )


def _listed(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    if len(labels) > _MOST_LISTED:
        return f"{len(labels)} others"
    return f"{', '.join(labels[:-1])} and {labels[-1]}"
