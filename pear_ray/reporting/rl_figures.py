"""Figures of RL: learning, the numbers that warn of trouble, and where a step's time went."""

import numpy as np

from pear_ray.reporting.load import Floats, RunData
from pear_ray.reporting.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    Line,
    Threshold,
    chart,
    legend,
    line_chart,
    name_bars,
    new_axes,
    running_mean,
    whole_steps,
)
from pear_ray.telemetry.follow import SPEED_METRIC

SMALLEST_GAP = 1e-8  # a logarithmic axis has no place for an exact 0
MAX_SYNC_GAPS = {"float32": 1e-4, "bfloat16": 0.3}  # as in engines.weights, a peer
_MOST_BARS = 60
_PHASES = (
    ("sample", "time/sample_s", BLUE),
    ("reward", "time/reward_s", PURPLE),
    ("train", "time/train_s", ORANGE),
    ("sync", "time/sync_s", GREEN),
)
_STEP = "RL step"


def reward(data: RunData) -> Chart:
    """Mean reward per step with its running mean."""
    steps, values = data.series("rl", "rl/reward/mean")
    window = max(3, len(values) // 10 | 1)  # odd, so that it has a middle
    smooth = running_mean(values, window=window)
    return line_chart(
        [
            Line("each step", steps, values, GREY),
            Line(f"mean of {window} steps", steps, smooth, BLUE),
        ],
        title="RL reward",
        caption="Mean reward of the step's completions, on training problems: it should rise, and "
        "it says nothing about held-out problems (see the evaluation).",
        x_label=_STEP,
        y_label="mean reward",
    )


def entropy(data: RunData) -> Chart:
    """The policy's entropy per step."""
    return line_chart(
        [Line("entropy", *data.series("rl", "rl/entropy"), PURPLE)],
        title="Entropy",
        caption="Mean entropy of the policy at the sampled tokens: a fast fall towards 0 means "
        "that it stops exploring, and reward will stop rising soon after.",
        x_label=_STEP,
        y_label="entropy (nats per token)",
    )


def length(data: RunData) -> Chart:
    """Mean completion length per step, with the limit."""
    limit = data.config.rl.max_tokens if data.config else None
    return line_chart(
        [Line("mean length", *data.series("rl", "rl/completion_length/mean"), BLUE)],
        title="Completion length",
        caption="Mean completion length: growth up to the limit means that answers get cut, a "
        "collapse that reasoning is dropped.",
        x_label=_STEP,
        y_label="tokens",
        from_zero=True,
        thresholds=[Threshold("token limit", float(limit))] if limit else [],
    )


def fractions(data: RunData) -> Chart:
    """The shares that waste samples or gradient."""
    named = (
        ("degenerate groups", "rl/degenerate_group_fraction", GREY, "-"),
        ("truncated", "rl/truncated_fraction", ORANGE, "-"),
        ("ratio clipped", "rl/clip_fraction", BLUE, "--"),
        ("errored", "rl/errored_fraction", PURPLE, ":"),
    )
    lines = [Line(label, *data.series("rl", name), c, d) for label, name, c, d in named]
    return line_chart(
        [line for line in lines if len(line.x)],
        title="What RL could not use",
        caption="Groups whose rewards are all equal teach nothing; truncated completions are "
        "mostly wrong; clipped tokens get no gradient; errored rewards are unknown.",
        x_label=_STEP,
        y_label="fraction",
        from_zero=True,
    )


def gaps(data: RunData) -> Chart:
    """Engine against trainer: the rollouts' gap and the gap after each sync, with thresholds."""
    named = (
        ("mismatch, mean", "rl/mismatch/mean_gap", BLUE, "-"),
        ("mismatch, largest", "rl/mismatch/max_gap", BLUE, ":"),
        ("after weight sync", "rl/sync_gap", ORANGE, "-"),
    )
    lines = []
    for label, name, colour, dashes in named:
        steps, values = data.series("rl", name)
        if len(steps):
            lines.append(Line(label, steps, np.maximum(values, SMALLEST_GAP), colour, dashes))
    thresholds = []
    if data.config:
        thresholds = [
            Threshold("rl.mismatch_alert (mean)", data.config.rl.mismatch_alert),
            Threshold(
                "rl.max_sync_gap",
                data.config.rl.max_sync_gap or MAX_SYNC_GAPS[data.config.models.dtype],
            ),
        ]
    return line_chart(
        lines,
        title="Engine against trainer",
        caption="Absolute log-prob differences between the engine and the trainer for the same "
        f"weights and tokens: all should stay below the dashed lines (0 is drawn at "
        f"{SMALLEST_GAP:g}).",
        x_label=_STEP,
        y_label="log-prob gap (nats)",
        thresholds=thresholds,
        log=True,
    )


def grad_norm(data: RunData) -> Chart:
    """Gradient norm per step, with the clip."""
    limit = data.config.rl.optimizer.max_grad_norm if data.config else None
    return line_chart(
        [Line("gradient norm", *data.series("rl", "rl/grad_norm"), GREEN)],
        title="Gradient norm",
        caption="Global gradient norm before clipping: steps above the dashed line were scaled "
        "down; spikes that recur ask for a smaller learning rate.",
        x_label=_STEP,
        y_label="norm",
        thresholds=[Threshold("max_grad_norm", limit)] if limit else [],
    )


def step_time(data: RunData) -> Chart:
    """Seconds per step, by phase."""
    steps, total = data.series("rl", "time/step_s")
    parts = [(n, _aligned(data, metric, steps), colour) for n, metric, colour in _PHASES]
    known = np.sum([values for _, values, _ in parts], axis=0)
    parts.append(("other", np.maximum(0.0, total - known), GREY))
    figure, axes = new_axes(x_label=_STEP, y_label="seconds per step", wide=True)
    width = max(1, -(-len(steps) // _MOST_BARS))
    centres = _grouped_mean(steps, width)
    bottom = np.zeros(len(centres))
    whole = max(float(np.nansum(total)), 1e-12)
    for name, values, colour in parts:
        heights = _grouped_mean(values, width)
        label = f"{name} {100 * np.nansum(values) / whole:.0f} %"
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


def has(data: RunData, stage: str, *names: str) -> bool:
    """Whether the stage logged any of the metrics."""
    return any(len(data.series(stage, name)[0]) for name in names)


def _aligned(data: RunData, name: str, steps: Floats) -> Floats:
    """The metric at `steps`, 0 where it was not logged."""
    known = dict(zip(*(part.tolist() for part in data.series("rl", name)), strict=True))
    return np.nan_to_num(np.array([known.get(step, 0.0) for step in steps.tolist()]))


def _grouped_mean(values: Floats, width: int) -> Floats:
    """Means of `width` neighbours each; the last group may be smaller."""
    starts = range(0, len(values), width)
    return np.array([values[i : i + width].mean() for i in starts], dtype=np.float64)
