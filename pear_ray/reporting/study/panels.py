"""Small figures side by side: an arm each, all on the same axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pear_ray.reporting.plot import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    STYLE,
    WIDTH_IN,
    Chart,
    chart,
    running_mean,
)
from pear_ray.reporting.study.training import CurveSet, MeanCurve
from pear_ray.reporting.study.tuning import Tuned
from pear_ray.reporting.words import metric_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS, _PANEL_IN = 4, 1.35
_SMOOTHED_SHARE = 15  # a curve of every step is a mean over one in so many of its steps
_MARGIN = 0.06  # of the range, around what is drawn
_METRIC_WORDS = {
    "rl/reward/mean": "reward in RL",
    "rl/correct_fraction": "correct answers in RL",
    "rl/entropy": "entropy in RL",
    "rl/kl_to_init": "KL to the policy that RL began with",
    "sft/nll": "training nll in SFT",
    "sft/heldout/nll": "held-out nll in SFT",
}


class _Draw(Protocol):
    def __call__(self, axes: "Axes", name: str) -> None:
        """Draw what belongs to `name`."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """The axes of every panel, set before anything is drawn: shared ones cost seconds each."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    x_ticks: Mapping[float, str]


def curves(found: CurveSet, *, baseline: str) -> Chart:
    """Each arm's mean with a band, in front of the baseline's."""
    # What is looked at every so often, on the same problems, is no noisy series of batches.
    smooth = "/eval/" not in found.metric and "heldout" not in found.metric
    drawn = {each.arm: _smoothed(each) if smooth else each for each in found.arms}
    behind = drawn.get(baseline)

    def draw(axes: "Axes", name: str) -> None:
        if behind is not None and name != baseline:
            _draw_curve(axes, behind, colour=GREY)
        _draw_curve(axes, drawn[name], colour=BLUE)

    ends = [value for each in drawn.values() for value in (*each.mean, *(each.low or ()))]
    ends += [value for each in drawn.values() for value in each.high or ()]
    steps = [step for each in found.arms for step in (each.steps[0], each.steps[-1])]
    frame = _Frame(
        x=_around([float(step) for step in steps]),
        y=_around(ends),
        x_label=f"{found.metric.partition('/')[0].upper()} step",
        x_ticks=_whole_ticks(min(steps), max(steps)),
    )
    titles = {each.arm: f"{each.arm}  (n = {len(each.seeds)})" for each in found.arms}
    smoothed = " Each is a running mean over a fifteenth of its steps." if smooth else ""
    return chart(
        _panels(titles, draw, frame),
        title=curve_words(found.metric),
        caption=f"Mean over seeds in blue, in front of {baseline}'s in grey; bands are the "
        f"bootstrap interval of the mean at each step.{smoothed}",
    )


def tuning(found: Sequence[Tuned], *, score: str) -> Chart:
    """Each arm's score after RL by learning rate, in front of all others'."""
    by_arm = {each.arm: each for each in found}

    def draw(axes: "Axes", name: str) -> None:
        for other in found:
            axes.plot(*_by_rate(other), color=MUTED, linewidth=0.5, alpha=0.55)
        xs, ys = _by_rate(by_arm[name])
        axes.plot(xs, ys, color=BLUE, marker="o")
        chosen = by_arm[name].chosen
        for x, y in zip(xs, ys, strict=True):
            if chosen is not None and x == math.log10(chosen):
                axes.plot([x], [y], "D", color=ORANGE, markersize=6)

    rates = sorted({rate for each in found for rate, _ in each.scores})
    frame = _Frame(
        x=_around([math.log10(rate) for rate in rates]),
        y=_around([y for each in found for y in _by_rate(each)[1]]),
        x_label="learning rate (log axis)",
        x_ticks={math.log10(rate): f"{rate:g}" for rate in rates},
    )
    return chart(
        _panels({arm: arm for arm in by_arm}, draw, frame),
        title=f"{score} by learning rate",
        caption="Mean over the tuning seeds in blue, in front of all other arms in grey; the "
        "diamond is the rate that was chosen. A diamond at an end asks for rates beyond it.",
    )


def curve_words(metric: str) -> str:
    """`Reward in RL`, `pass@8 while RL trains`."""
    stage, _, rest = metric.partition("/")
    if rest.startswith("eval/"):
        return f"{metric_words(rest.removeprefix('eval/'))} while {stage.upper()} trains"
    words = _METRIC_WORDS.get(metric, metric)
    return words[0].upper() + words[1:]


def _panels(titles: Mapping[str, str], draw: _Draw, frame: _Frame) -> "Figure":
    """A small figure for each name of `titles`."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that other stages do not pay
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(_COLUMNS, max(2, len(titles)))
    rows = -(-len(titles) // columns)
    with mpl.rc_context(STYLE):
        height = _PANEL_IN * rows + 0.6
        figure = Figure(figsize=(2 * WIDTH_IN, height))
        grid = figure.add_gridspec(
            rows,
            columns,
            left=0.06,
            bottom=0.45 / height,
            right=0.995,
            top=1 - 0.24 / height,
            hspace=0.36,
            wspace=0.08,
        )
        for place, (name, title) in enumerate(titles.items()):
            axes = figure.add_subplot(grid[place // columns, place % columns], autoscale_on=False)
            axes.set_xlim(frame.x)
            axes.set_ylim(frame.y)
            is_last = place + columns >= len(titles)
            labels = frame.x_ticks.values() if is_last else [""] * len(frame.x_ticks)
            axes.set_xticks(list(frame.x_ticks), list(labels))
            axes.locator_params(axis="y", nbins=4)
            axes.tick_params(labelsize=7, labelleft=place % columns == 0)
            draw(axes, name)
            axes.set_title(title, fontsize=8, loc="left", color=INK, pad=3, parse_math=False)
        figure.supxlabel(frame.x_label, fontsize=9, color=INK, y=0.01)
    return figure


def _draw_curve(axes: "Axes", curve: MeanCurve, *, colour: str) -> None:
    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, curve.mean, color=colour, linewidth=1.4, marker=marker)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.22, linewidth=0)


def _smoothed(curve: MeanCurve) -> MeanCurve:
    window = max(1, len(curve.steps) // _SMOOTHED_SHARE | 1)

    def smooth(values: list[float]) -> list[float]:
        return running_mean(np.array(values, dtype=np.float64), window=window).tolist()

    return MeanCurve(
        arm=curve.arm,
        seeds=curve.seeds,
        steps=curve.steps,
        mean=smooth(curve.mean),
        low=None if curve.low is None else smooth(curve.low),
        high=None if curve.high is None else smooth(curve.high),
    )


def _by_rate(found: Tuned) -> tuple[list[float], list[float]]:
    known = [(math.log10(rate), mean.value) for rate, mean in found.scores if mean]
    return [rate for rate, _ in known], [value for _, value in known]


def _around(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = _MARGIN * (high - low) or 0.05 * abs(high) or 1.0  # of a constant: some room
    return low - margin, high + margin


def _whole_ticks(first: int, last: int) -> dict[float, str]:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    ticks = MaxNLocator(nbins=6, integer=True, min_n_ticks=1).tick_values(first, last)
    return {float(tick): f"{tick:g}" for tick in ticks if first <= tick <= last}
