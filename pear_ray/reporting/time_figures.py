"""Figures of a run's seconds, tokens per second and memory."""

import numpy as np

from pear_ray.reporting.load import Floats, RunData
from pear_ray.reporting.plot import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    PURPLE,
    Chart,
    Line,
    chart,
    legend,
    line_chart,
    name_bars,
    new_axes,
    run_colour,
    whole_steps,
)
from pear_ray.reporting.rl_figures import STEP
from pear_ray.telemetry.follow import SPEED_METRIC

# In the order of a step; the rest of it is "other".
_PHASES = (
    ("sample", BLUE),
    ("reward", PURPLE),
    ("wake_trainer", run_colour(5)),
    ("train", ORANGE),
    ("sync", GREEN),
    ("save", MUTED),
)
_MOST_BARS = 60
_SHOWN_SHARE = 0.005  # of a step's time: less is part of "other"
_ALIKE = 0.05  # phases whose memory differs by less are one line


def stage_time(data: RunData) -> Chart:
    """Wall time of each stage, from its manifest."""
    names = list(data.manifests)
    seconds = np.array([data.manifests[n].finished - data.manifests[n].started for n in names])
    figure, axes = new_axes(x_label="wall time (s)", y_label="")
    axes.barh(names, seconds, color=BLUE, height=0.6)
    name_bars(axes, seconds.tolist(), unit=" s")
    caption = (
        "From a stage's first start to its manifest: the time between two attempts counts as well."
    )
    return chart(figure, title="Time per stage", caption=caption)


def speed(data: RunData) -> Chart:
    """Median tokens per second of each stage that says it."""
    rates = {}
    for stage in data.metrics:
        values = data.series(stage, SPEED_METRIC[stage])[1]
        if np.isfinite(values).any():
            rates[stage] = float(np.nanmedian(values))
    figure, axes = new_axes(x_label="tokens per second (median step)", y_label="")
    axes.barh(list(rates), list(rates.values()), color=GREEN, height=0.6)
    name_bars(axes, list(rates.values()))
    caption = "Tokens over wall seconds of the stage's median step, all workers together."
    return chart(figure, title="Tokens per second", caption=caption)


def step_time(data: RunData) -> Chart:
    """Seconds per step, by phase."""
    steps, total = data.series("rl", "time/step_s")
    whole = max(float(np.nansum(total)), 1e-12)
    parts = [(name, _aligned(data, f"time/{name}_s", steps), colour) for name, colour in _PHASES]
    parts = [part for part in parts if part[1].sum() >= _SHOWN_SHARE * whole]
    known = np.sum([values for _, values, _ in parts], axis=0)
    rest = np.maximum(0.0, total - known)
    if np.nansum(rest) >= _SHOWN_SHARE * whole:
        parts.append(("other", rest, GREY))
    figure, axes = new_axes(x_label=STEP, y_label="seconds per step")
    width = max(1, -(-len(steps) // _MOST_BARS))
    centres = _grouped_mean(steps, width)
    bottom = np.zeros(len(centres))
    for name, values, colour in parts:
        heights = _grouped_mean(values, width)
        label = f"{_words(name)} {100 * np.nansum(values) / whole:.0f} %"
        axes.bar(
            centres, heights, 0.85 * width, bottom=bottom, color=colour, label=label, linewidth=0
        )
        bottom = bottom + heights
    whole_steps(axes)
    legend(axes)
    grouped = f" Each bar is the mean of {width} steps." if width > 1 else ""
    caption = (
        f"Where an RL step's seconds went, {whole:,.0f} s in all; the shares stand in the "
        f"legend.{grouped}"
    )
    return chart(figure, title="Time per RL step", caption=caption)


def phase_speed(data: RunData) -> Chart:
    """Tokens per second of a step, and of its sampling and training alone."""
    named = (
        ("sampling", "rl/tokens_per_s/sample", BLUE, "-"),
        ("training", "rl/tokens_per_s/train", ORANGE, "-"),
        ("whole step", "rl/tokens_per_s", GREY, "--"),
    )
    lines = [Line(label, *data.series("rl", name), c, d) for label, name, c, d in named]
    return line_chart(
        [line for line in lines if len(line.x)],
        title="RL tokens per second",
        caption="Completion tokens over the seconds of the phase, all ranks together: the engine "
        "is the faster the more alike the lengths of a step's completions are.",
        x_label=STEP,
        y_label="tokens per second",
        from_zero=True,
    )


def memory(data: RunData) -> Chart:
    """Memory held at the end of each phase of a step."""
    found = [(name, *data.series("rl", f"memory/{name}_gib"), colour) for name, colour in _PHASES]
    found = [part for part in found if len(part[1])]
    medians = [float(np.nanmedian(values)) for _, _, values, _ in found]
    if max(medians) - min(medians) <= _ALIKE * max(medians):
        name, steps, values, _ = found[int(np.argmax(medians))]
        lines = [Line(f"after {_words(name)}", steps, values, BLUE)]
        rest = f" The phases' medians lie within {100 * _ALIKE:g} %: the fullest is drawn."
    else:
        lines = [Line(_words(name), steps, values, colour) for name, steps, values, colour in found]
        rest = ""
    return line_chart(
        lines,
        title="RL memory by phase",
        caption="Held when the phase ends, on the fullest rank: all of a GPU that is taken, or on "
        f"a CPU the worker's resident memory. A line that climbs is a leak.{rest}",
        x_label=STEP,
        y_label="GiB",
        from_zero=True,
    )


def memory_metrics() -> list[str]:
    """What `memory` draws, if it is there."""
    return [f"memory/{name}_gib" for name, _ in _PHASES]


def _words(phase: str) -> str:
    return phase.replace("_", " ")


def _aligned(data: RunData, name: str, steps: Floats) -> Floats:
    """The metric at `steps`, 0 where it was not logged."""
    known = dict(zip(*(part.tolist() for part in data.series("rl", name)), strict=True))
    return np.nan_to_num(np.array([known.get(step, 0.0) for step in steps.tolist()]))


def _grouped_mean(values: Floats, width: int) -> Floats:
    """Means of `width` neighbours each; the last group may be smaller."""
    starts = range(0, len(values), width)
    return np.array([values[i : i + width].mean() for i in starts], dtype=np.float64)
