"""Runs paired by problem: pass@1 of a checkpoint of one run, minus that of another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.reporting.comparison.runs import ComparedRun, evaluated_on, suite_names
from pear_ray.reporting.page import Table
from pear_ray.reporting.paired import difference_words, pair, problem_counts
from pear_ray.reporting.words import CHECKPOINT_WORDS

if TYPE_CHECKING:
    from pear_ray.algorithms.paired import PairedDifference


def paired_runs(
    before: ComparedRun, after: ComparedRun, suite: str, checkpoint: str
) -> "PairedDifference | None":
    """`after` minus `before`; None where they were not asked the same, or have no samples."""
    if evaluated_on(before, suite) is None:
        return None
    if evaluated_on(before, suite) != evaluated_on(after, suite):
        return None
    place = (suite, checkpoint)
    confidence = after.suites[suite].confidence
    return pair(before.counts.get(place), after.counts.get(place), k=1, confidence=confidence)


def paired_with_first(runs: Sequence[ComparedRun], suite: str) -> Table:
    """One row per other run, one column per checkpoint."""
    first, *others = runs
    found = [[paired_runs(first, each, suite, name) for name in CHECKPOINTS] for each in others]
    columns = [place for place in range(len(CHECKPOINTS)) if any(row[place] for row in found)]
    rows = [
        [run.label, *(_cell(row[place]) for place in columns)]
        for run, row in zip(others, found, strict=True)
        if any(row)
    ]
    words = [f"pass@1, {CHECKPOINT_WORDS[CHECKPOINTS[place]]}" for place in columns]
    return Table([f"minus {first.label}", *words], rows)


def paired_tables(runs: Sequence[ComparedRun]) -> list[tuple[str, Table]]:
    """By suite, where anything can be paired."""
    tables = [(suite, paired_with_first(runs, suite)) for suite in suite_names(runs)]
    return [(suite, table) for suite, table in tables if table.rows]


def _cell(found: "PairedDifference | None") -> str:
    return f"{difference_words(found)}; {problem_counts(found)}" if found else "-"
