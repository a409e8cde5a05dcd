"""Figures of a study's report."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pear_ray.reporting.comparison.figures import spread
from pear_ray.reporting.plot import (
    ALERT,
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    STYLE,
    WIDTH_IN,
    Chart,
    chart,
    legend,
    log_axis,
    new_axes,
    run_colour,
    running_mean,
    whole_steps,
)
from pear_ray.reporting.study.estimates import SeedMean
from pear_ray.reporting.study.load import AFTER, BEFORE
from pear_ray.reporting.study.numbers import StudyNumbers
from pear_ray.reporting.study.orders import Ranks
from pear_ray.reporting.study.scores import ScoreTable
from pear_ray.reporting.study.training import CurveSet, MeanCurve
from pear_ray.reporting.study.tuning import Tuned
from pear_ray.reporting.words import metric_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Shown = TypeVar("_Shown")
_ROW_IN = 0.3  # of an arm in a figure with one row each
_NAME_SHARE = 0.24  # of the width, for the names at the left
_OFFSET = 0.14  # of two estimates of one arm, from the middle of its row
_STYLES = ((BEFORE, "before RL", GREY, "s"), (AFTER, "after RL", ORANGE, "D"))
_COLUMNS, _PANEL_IN = 4, 1.35
_SMOOTHED_SHARE = 15  # a curve of every step is a mean over one in so many of its steps
_FIRST_CURVES = ("rl/reward/mean", "rl/eval/")  # the others are folded away
_LEFT, _RIGHT = 0.27, 0.73  # where a slope begins and ends
_METRIC_WORDS = {
    "rl/reward/mean": "reward in RL",
    "rl/correct_fraction": "correct answers in RL",
    "rl/entropy": "entropy in RL",
    "rl/kl_to_init": "KL to the policy that RL began with",
    "rl/kl": "KL to the policy that RL began with",
    "sft/nll": "training nll in SFT",
    "sft/heldout/nll": "held-out nll in SFT",
}


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


def curves(found: CurveSet, *, baseline: str) -> Chart:
    """A small figure for each arm, its mean with a band, in front of the baseline's."""
    smooth = found.metric.count("/eval/") == 0 and "heldout" not in found.metric
    behind = next((each for each in found.arms if each.arm == baseline), None)

    def draw(axes: "Axes", each: MeanCurve) -> None:
        if behind is not None and behind is not each:
            _draw(axes, behind, colour=GREY, smooth=smooth)
        _draw(axes, each, colour=BLUE, smooth=smooth)
        whole_steps(axes)

    named = {f"{each.arm}  (n = {len(each.seeds)})": each for each in found.arms}
    smoothed = " Each is a running mean over a fifteenth of its steps." if smooth else ""
    return chart(
        _panels(named, draw, x_label=f"{found.metric.partition('/')[0].upper()} step"),
        title=curve_words(found.metric),
        caption=f"Mean over seeds in blue, in front of {baseline}'s in grey; bands are the "
        f"bootstrap interval of the mean at each step.{smoothed}",
    )


def tuning(found: Sequence[Tuned], *, score: str) -> Chart:
    """A small figure for each arm: its score after RL by learning rate."""
    rates = sorted({rate for each in found for rate, _ in each.scores})

    def draw(axes: "Axes", each: Tuned) -> None:
        for other in found:
            axes.plot(*_by_rate(other), color=MUTED, linewidth=0.5, alpha=0.55)
        axes.plot(*_by_rate(each), color=BLUE, marker="o")
        for rate, value in zip(*_by_rate(each), strict=True):
            if rate == each.chosen:
                axes.plot([rate], [value], "D", color=ORANGE, markersize=6)
        log_axis(axes, along="x")
        axes.set_xticks(rates)
        axes.minorticks_off()

    return chart(
        _panels({each.arm: each for each in found}, draw, x_label="learning rate (log axis)"),
        title=f"{score} by learning rate",
        caption="Mean over the tuning seeds in blue, in front of all other arms in grey; the "
        "diamond is the rate that was chosen. A diamond at an end asks for rates beyond it.",
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


def curve_words(metric: str) -> str:
    """`reward in RL`, `pass@8 while RL trains`."""
    stage, _, rest = metric.partition("/")
    if rest.startswith("eval/"):
        return f"{metric_words(rest.removeprefix('eval/'))} while {stage.upper()} trains"
    words = _METRIC_WORDS.get(metric, metric)
    return words[0].upper() + words[1:]


def _panels(
    shown: Mapping[str, _Shown], draw: Callable[["Axes", _Shown], None], *, x_label: str
) -> "Figure":
    """A small figure for each of `shown`, under its name, all on the same axes."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that other stages do not pay
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(_COLUMNS, max(2, len(shown)))
    rows = -(-len(shown) // columns)
    with mpl.rc_context(STYLE):
        height = _PANEL_IN * rows + 0.6
        figure = Figure(figsize=(2 * WIDTH_IN, height))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            *(0.06, 0.45 / height, 0.995, 1 - 0.24 / height), hspace=0.36, wspace=0.08
        )
        for empty in grid.flat[len(shown) :]:
            empty.set_visible(False)
        for place, (name, each) in enumerate(shown.items()):
            axes = grid.flat[place]
            draw(axes, each)
            axes.set_title(name, fontsize=8, loc="left", color=INK, pad=3, parse_math=False)
            axes.tick_params(labelsize=7, labelbottom=place + columns >= len(shown))
        figure.supxlabel(x_label, fontsize=9, color=INK, y=0.01)
    return figure


def _by_rate(found: Tuned) -> tuple[list[float], list[float]]:
    known = [(rate, mean.value) for rate, mean in found.scores if mean]
    return [rate for rate, _ in known], [value for _, value in known]


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


def _draw(axes: "Axes", curve: MeanCurve, *, colour: str, smooth: bool) -> None:
    window = max(1, len(curve.steps) // _SMOOTHED_SHARE | 1) if smooth else 1
    steps = np.array(curve.steps, dtype=np.float64)
    mean = running_mean(np.array(curve.mean), window=window)
    axes.plot(steps, mean, color=colour, linewidth=1.4, marker="o" if len(steps) == 1 else "")
    if curve.low is not None and curve.high is not None:
        low, high = (running_mean(np.array(end), window=window) for end in (curve.low, curve.high))
        axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
