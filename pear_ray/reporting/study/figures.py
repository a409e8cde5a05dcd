"""Figures of a study's report."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.reporting.comparison.figures import spread
from pear_ray.reporting.plot import (
    ALERT,
    GREY,
    INK,
    MUTED,
    ORANGE,
    Chart,
    chart,
    legend,
    new_axes,
    run_colour,
)
from pear_ray.reporting.study.estimates import SeedMean
from pear_ray.reporting.study.load import AFTER, BEFORE
from pear_ray.reporting.study.numbers import StudyNumbers
from pear_ray.reporting.study.orders import Ranks
from pear_ray.reporting.study.panels import curves, tuning
from pear_ray.reporting.study.scores import ScoreTable
from pear_ray.reporting.words import metric_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_IN = 0.3  # of an arm in a figure with one row each
_NAME_SHARE = 0.24  # of the width, for the names at the left
_OFFSET = 0.14  # of two estimates of one arm, from the middle of its row
_STYLES = ((BEFORE, "before RL", GREY, "s"), (AFTER, "after RL", ORANGE, "D"))
_FIRST_CURVES = ("rl/reward/mean", "rl/eval/")  # the others are folded away
_LEFT, _RIGHT = 0.27, 0.73  # where a slope begins and ends


def scores(table: ScoreTable) -> Chart:
    """Every arm's mean before and after RL."""
    means = [{BEFORE: row.before, AFTER: row.after} for row in table.arms]
    figure, axes = _rows([row.arm for row in table.arms], x_label=metric_words(table.metric))
    for offset, (when, label, colour, marker) in zip((-_OFFSET, _OFFSET), _STYLES, strict=True):
        known = [(row + offset, mean) for row, each in enumerate(means) if (mean := each[when])]
        _whiskers(
            axes,
            known=[(row, mean.value, *_ends(mean)) for row, mean in known],
            colour=colour,
            marker=marker,
            label=label,
        )
    legend(axes)
    return chart(
        figure,
        title=f"{metric_words(table.metric)} of {table.suite}, before and after RL",
        caption="Means over seeds; whiskers span the bootstrap interval of the mean over seeds. "
        "Arms share seeds, so that the differences above tell more than whether whiskers overlap.",
    )


def differences(table: ScoreTable, *, confidence: float) -> Chart:
    """Every arm minus the baseline, paired by seed."""
    rows = [row for row in table.arms if row.versus_after]
    figure, axes = _rows(
        [row.arm for row in rows], x_label=f"{metric_words(table.metric)}, minus {table.baseline}"
    )
    axes.axvline(0.0, color=MUTED, linewidth=1.0)
    for offset, (when, label, colour, marker) in zip((-_OFFSET, _OFFSET), _STYLES, strict=True):
        known = []
        for place, row in enumerate(rows):
            versus = row.versus_before if when == BEFORE else row.versus_after
            if versus and (found := versus.difference):
                known.append((place + offset, found.value, found.low, found.high))
        _whiskers(axes, known=known, colour=colour, marker=marker, label=label)
    legend(axes)
    return chart(
        figure,
        title=f"{metric_words(table.metric)} of {table.suite} against {table.baseline}, paired "
        "by seed",
        caption=f"Mean over seeds of the difference, with {100 * confidence:g} % bootstrap "
        "intervals over seeds. Of few seeds these are too narrow: the table's p decides. An arm "
        "on one side of 0 before RL and on the other after it changed order with "
        f"{table.baseline}.",
    )


def slopes(ranks: Ranks, *, reversed_arms: Sequence[str]) -> Chart:
    """The order of the arms before and after RL, a line each."""
    number = len(ranks.arms)
    figure, axes = new_axes(x_label="", y_label="", wide=True, height_in=0.8 + _ROW_IN * number)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.04)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(number + 0.5, 0.0)
    for place, rank in enumerate(ranks.arms):
        is_reversed = rank.arm in reversed_arms
        axes.plot(
            [_LEFT, _RIGHT],
            [rank.before, rank.after],
            color=ALERT if is_reversed else run_colour(place),
            linewidth=2.6 if is_reversed else 1.3,
            marker="o",
        )
    for side, x, align in ((BEFORE, _LEFT - 0.015, "right"), (AFTER, _RIGHT + 0.015, "left")):
        named = sorted(
            (rank.before if side == BEFORE else rank.after, rank.arm, rank) for rank in ranks.arms
        )
        # Equal ranks would print one name over another.
        heights = spread(
            [(place - 1) / max(number - 1, 1) for place, *_ in named], gap=0.8 / number
        )
        for (_, arm, rank), height in zip(named, heights, strict=True):
            mean = rank.before_mean if side == BEFORE else rank.after_mean
            axes.text(
                x,
                1 + height * max(number - 1, 1),
                f"{arm}  {mean:.3f}" if side == BEFORE else f"{mean:.3f}  {arm}",
                ha=align,
                va="center",
                fontsize=8,
                color=ALERT if arm in reversed_arms else INK,
                parse_math=False,
            )
    for x, words, align in ((_LEFT, "before RL", "right"), (_RIGHT, "after RL", "left")):
        axes.text(x, 0.25, words, ha=align, va="center", fontsize=9, color=MUTED)
    over = f"{len(ranks.seeds)} seeds that all of them have" if ranks.seeds else "its own seeds"
    return chart(
        figure,
        title="The order before and after RL",
        caption=f"Arms from the highest mean (top) to the lowest, over the {over}. Lines that "
        "cross changed order; by chance alone some do. Red, thick: ahead of another arm before RL "
        "and behind it after, told apart both times.",
    )


def all_figures(found: StudyNumbers) -> dict[str, list[Chart]]:
    """By the section that they stand in; what nobody logged is left out."""
    reversed_arms = sorted({each.arm for each in found.reversals if each.is_apart})
    tuned = [each for each in found.tuning if any(mean for _, mean in each.scores)]
    scored = [table for table in found.tables if any(row.after or row.before for row in table.arms)]
    return {
        "scores": [scores(scored[0])] if scored else [],
        "differences": [differences(scored[0], confidence=found.confidence)]
        if scored and found.main.comparisons
        else [],
        "order": [slopes(found.ranks, reversed_arms=reversed_arms)]
        if len(found.ranks.arms) > 1
        else [],
        "curves": [
            curves(each, baseline=found.baseline)
            for each in found.curves
            if each.metric.startswith(_FIRST_CURVES)
        ],
        "folded_curves": [
            curves(each, baseline=found.baseline)
            for each in found.curves
            if not each.metric.startswith(_FIRST_CURVES)
        ],
        "tuning": [tuning(tuned, score=f"{metric_words(found.metric)} after RL")] if tuned else [],
    }


def _rows(names: Sequence[str], *, x_label: str) -> tuple["Figure", "Axes"]:
    figure, axes = new_axes(
        x_label=x_label, y_label="", wide=True, height_in=1.0 + _ROW_IN * len(names)
    )
    figure.subplots_adjust(left=_NAME_SHARE)
    axes.set_yticks(range(len(names)), list(names), parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _whiskers(
    axes: "Axes",
    *,
    known: Sequence[tuple[float, float, float, float]],
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Each of `known`: its row, value, and the ends of its interval."""
    if not known:
        return
    rows, values, lows, highs = (np.array(column) for column in zip(*known, strict=True))
    axes.errorbar(
        *(values, rows),
        xerr=np.maximum(0.0, np.stack([values - lows, highs - values])),
        fmt=marker,
        color=colour,
        capsize=2,
        markersize=4,
        linewidth=1.2,
        label=label,
    )


def _ends(mean: SeedMean) -> tuple[float, float]:
    low = mean.value if mean.low is None else mean.low
    return low, mean.value if mean.high is None else mean.high
