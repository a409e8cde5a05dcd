"""Curves and estimates of several runs in one figure each, named where they end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.reporting.comparison.runs import ComparedRun
from pear_ray.reporting.load import Floats
from pear_ray.reporting.plot import (
    BLUE,
    GREY,
    HEIGHT_IN,
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
    run_style,
    running_mean,
    whole_steps,
)
from pear_ray.reporting.words import CHECKPOINT_WORDS, metric_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_OVERLAID = 8  # runs whose curves an eye keeps apart in one figure
_SMOOTHED_SHARE = 15  # a curve of every step is a mean over one in so many of its steps
_MOST_POINTS = 150  # of a curve on the page
_LABEL_IN, _LABELS_RIGHT = 0.15, 0.79  # height of a name; where the axes end and names begin
_NAME_AT, _LEADER = 1.035, (1.004, 1.03)  # in the axes' widths
_PANEL_COLUMNS, _PANEL_HEIGHT_IN = 5, 1.25
_LOG = " (log axis)"
_ROW_IN = 0.3  # of a run in a figure of estimates
_CHECKPOINT_STYLE = {"base": (GREY, "o"), "sft": (BLUE, "s"), "rl": (ORANGE, "D")}


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's metric.

    Attributes:
        place: Of the run among those compared.
        is_smoothed: Whether `values` are a running mean of what was logged.
    """

    place: int
    label: str
    steps: Floats
    values: Floats
    is_smoothed: bool

    @property
    def last(self) -> int:
        """Place of the last value that is finite."""
        return int(np.flatnonzero(np.isfinite(self.values))[-1])

    @property
    def name(self) -> str:
        """The label, with the last value: of a running mean that is no number of the run's."""
        return self.label if self.is_smoothed else f"{self.label}  {self.values[self.last]:.3g}"


def curves_of(runs: Sequence[ComparedRun], stage: str, name: str) -> list[Curve]:
    """The curve of every run that logged `name`, those of every step smoothed."""
    found = []
    for place, run in enumerate(runs):
        steps, values = run.series(stage, name)
        if np.isfinite(values).any():
            # What is logged at every step, not at every tenth, goes up and down with the batches.
            every_step = len(steps) > 1 and len(steps) > run.metrics[stage][-1].step // 2
            if every_step:
                values = running_mean(values, window=max(1, len(values) // _SMOOTHED_SHARE | 1))
            stride = -(-len(steps) // _MOST_POINTS)
            kept = sorted({*range(0, len(steps), stride), len(steps) - 1})
            found.append(Curve(place, run.label, steps[kept], values[kept], every_step))
    return found


def above_zero(curves: Sequence[Curve]) -> list[Curve]:
    """The curves as a logarithmic axis can take them: a gradient of 0 leaves a gap."""
    found = [
        replace(each, values=np.where(each.values > 0, each.values, np.nan)) for each in curves
    ]
    return [each for each in found if np.isfinite(each.values).any()]


def overlay(
    curves: Sequence[Curve],
    *,
    title: str,
    caption: str,
    x_label: str,
    y_label: str,
    log: bool = False,
) -> Chart:
    """All curves over one another, each named with its last value at the right."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - matplotlib takes half a second

    height = max(HEIGHT_IN, _LABEL_IN * len(curves) + 0.9)
    figure, axes = new_axes(
        x_label=x_label, y_label=y_label + _LOG * log, wide=True, height_in=height
    )
    figure.subplots_adjust(right=_LABELS_RIGHT)
    for curve in curves:
        _, dashes = run_style(curve.place)
        axes.plot(
            *(curve.steps, curve.values),
            color=run_colour(curve.place),
            linestyle=(0, [float(each) for each in dashes.split()]) if dashes else "-",
            marker="o" if len(curve.steps) == 1 else "",
            gid=f"run-{curve.place}",
        )
    axes.margins(x=0.01, y=0.06)
    if log:
        log_axis(axes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    whole_steps(axes)
    axes.autoscale_view()  # or ends would be placed by the limits of an empty figure
    _name_ends(axes, curves, gap=_LABEL_IN / (height * (0.97 - 0.48 / height)))
    return chart(figure, title=title, caption=caption)


def panels(
    curves: Sequence[Curve],
    *,
    title: str,
    caption: str,
    x_label: str,
    y_label: str,
    log: bool = False,
) -> Chart:
    """A small figure for each run, with all the others behind it in grey, on the same axes."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that other stages do not pay
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    rows = -(-len(curves) // _PANEL_COLUMNS)
    with mpl.rc_context(STYLE):
        height = _PANEL_HEIGHT_IN * rows + 0.6
        figure = Figure(figsize=(2 * WIDTH_IN, height))
        grid = figure.subplots(rows, _PANEL_COLUMNS, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            *(0.06, 0.5 / height, 0.995, 1 - 0.22 / height), hspace=0.34, wspace=0.08
        )
        for empty in grid.flat[len(curves) :]:
            empty.set_visible(False)
        for place_in_grid, curve in enumerate(curves):
            axes = grid.flat[place_in_grid]
            for other in curves:
                axes.plot(other.steps, other.values, color=MUTED, linewidth=0.5, alpha=0.55)
            axes.plot(
                *(curve.steps, curve.values), color=BLUE, linewidth=1.9, gid=f"run-{curve.place}"
            )
            axes.set_title(curve.name, fontsize=8, loc="left", color=INK, pad=3, parse_math=False)
            if log:
                log_axis(axes)
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.tick_params(labelsize=7, labelbottom=place_in_grid + _PANEL_COLUMNS >= len(curves))
            whole_steps(axes)
        figure.supxlabel(x_label, fontsize=9, color=INK, y=0.01)
        figure.supylabel(y_label + _LOG * log, fontsize=9, color=INK, x=0.004)
    return chart(figure, title=title, caption=caption)


def estimates(runs: Sequence[ComparedRun], suite: str, metric: str, *, named: bool) -> Chart:
    """A suite's metric of every checkpoint of every run that was evaluated, with its interval.

    It is `named` by its suite where there are several.
    """
    shown = [(run.label, run.suites[suite]) for run in runs if suite in run.suites]
    figure, axes = new_axes(
        x_label=metric_words(metric), y_label="", wide=True, height_in=0.9 + _ROW_IN * len(shown)
    )
    figure.subplots_adjust(left=0.2)
    for offset, checkpoint in zip((-0.22, 0.0, 0.22), CHECKPOINTS, strict=True):
        rows = [
            (row + offset, evaluation.checkpoints[checkpoint][metric])
            for row, (_, evaluation) in enumerate(shown)
            if metric in evaluation.checkpoints.get(checkpoint, {})
        ]
        if not rows:
            continue
        colour, marker = _CHECKPOINT_STYLE[checkpoint]
        values = np.array([e.value for _, e in rows])
        errors = [[e.value - e.low for _, e in rows], [e.high - e.value for _, e in rows]]
        axes.errorbar(
            *(values, [row for row, _ in rows]),
            xerr=np.maximum(0.0, np.array(errors)),
            fmt=marker,
            color=colour,
            capsize=2,
            markersize=4,
            linewidth=1.2,
            label=CHECKPOINT_WORDS[checkpoint],
        )
    axes.set_yticks(range(len(shown)), [label for label, _ in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    legend(axes)
    caption = (
        "On held-out problems. Whiskers span the interval over problems of one run each: where "
        "two overlap, this evaluation does not tell the runs apart; where they do not, another "
        "seed still might."
    )
    title = f"{metric_words(metric)} of every run"
    title = f"{title}: {suite}" if named else title
    return chart(figure, title=title, caption=caption)


def _name_ends(axes: "Axes", curves: Sequence[Curve], *, gap: float) -> None:
    """Names at the right, none over another, each with a line to where its curve ends."""
    ends = []
    for curve in curves:
        end = (curve.steps[curve.last], curve.values[curve.last])
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(end))
        ends.append((float(y), float(x), curve.place, curve.name))
    ends.sort()
    heights = spread([end[0] for end in ends], gap=gap)
    for (y, x, place, text), height in zip(ends, heights, strict=True):
        colour = run_colour(place)
        for xs, ys, dashes in (
            ((x, _LEADER[0]), (y, y), (0, (1, 3))),  # through the figure, of a run that ended early
            (_LEADER, (y, height), "-"),
        ):
            axes.plot(
                *(xs, ys),
                transform=axes.transAxes,
                clip_on=False,
                color=colour,
                linewidth=0.7,
                linestyle=dashes,
                gid=f"run-{place}",
            )
        axes.text(
            *(_NAME_AT, height, text),
            transform=axes.transAxes,
            va="center",
            fontsize=8,
            color=colour,
            parse_math=False,  # a folder's name may have a $ in it
            gid=f"run-{place}",
        )


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Rising `heights` moved as little as may be so that neighbours are `gap` apart, within 0 to 1.

    Neighbours that are too close become a block around their mean; blocks that touch are joined.
    """
    blocks: list[list[float]] = []  # [sum of heights, number of names]

    def bottom(block: list[float]) -> float:
        span = gap * (block[1] - 1)
        return min(max(block[0] / block[1] - span / 2, 0.0), max(1.0 - span, 0.0))

    for height in heights:
        blocks.append([height, 1])
        while len(blocks) > 1 and (
            bottom(blocks[-2]) + gap * blocks[-2][1] > bottom(blocks[-1]) + 1e-9
        ):
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return [bottom(block) + gap * k for block in blocks for k in range(int(block[1]))]
