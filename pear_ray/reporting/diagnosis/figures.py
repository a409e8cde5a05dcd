"""Figures of a diagnosis: log-ratios, weights by position, and the discount by length."""

import numpy as np

from pear_ray.algorithms.weight_health import NUM_DECILES
from pear_ray.reporting.diagnosis.numbers import (
    LOG_RATIO_BINS,
    Diagnosis,
    SourceDiagnosis,
    discounted_block_size,
    mean_weights_at,
)
from pear_ray.reporting.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    Chart,
    chart,
    legend,
    log_axis,
    new_axes,
)

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_LABEL_CHARS = 24  # of a source's name, which may be a path
_TAIL = 0.01  # of the tokens on either side that need not be seen
_DECADE = 10.0
_MIN_LONGEST = 8192  # tokens: the length at which the discount's effect is known to all
_POINTS = 60
_MARKED_QUANTILES = ("p05", "p50", "p95")
_OTHER_GAMMA = 0.9999  # to compare with: its half-life is 6,931 tokens


def log_ratio_histogram(diagnosis: Diagnosis) -> Chart:
    """Raw log-ratios per source, with the clip bounds."""
    weights, shown = diagnosis.weights, _shown(diagnosis)
    bounds = (weights.log_ratio_clip_low, weights.log_ratio_clip_high)
    first, last = _seen_bins(shown, bounds)
    edges = LOG_RATIO_BINS[first : last + 1]
    figure, axes = new_axes(
        x_label="log-ratio, policy minus behavior (nats)", y_label="share of tokens"
    )
    for source, colour in zip(shown, _COLOURS, strict=False):
        shares = np.array(source.log_ratio_shares)  # [bin], the outer two without an outer edge
        inside = shares[first + 1 : last + 1].copy()
        inside[0] += shares[: first + 1].sum()
        inside[-1] += shares[last + 1 :].sum()
        axes.stairs(inside, edges, color=colour, label=_label(source.source), linewidth=1.6)
    for bound in bounds:
        axes.axvline(bound, color=INK, linestyle="--", linewidth=1)
    if len(shown) > 1:
        legend(axes)
    caption = (
        "Under the initial policy, before clipping; dashed lines are the clip bounds "
        f"{bounds[0]:g} and {bounds[1]:g}, the outermost bins hold the tails. Mass far left is "
        f"text that the policy would hardly write.{_left_out(diagnosis)}"
    )
    return chart(figure, title="Log-ratios and their clip bounds", caption=caption)


def weights_by_position(diagnosis: Diagnosis) -> Chart:
    """Mean weight per tenth of the completion, per source."""
    figure, axes = new_axes(x_label="tenth of the completion (10 = last)", y_label="mean weight")
    tenths = np.arange(1, NUM_DECILES + 1)
    shown = _shown(diagnosis)
    lines = [np.array(source.decile_weight_means, dtype=np.float64) for source in shown]
    for source, line, colour in zip(shown, lines, _COLOURS, strict=False):
        axes.plot(tenths, line, color=colour, marker="o", label=_label(source.source))
    axes.axhline(1.0, color=MUTED, linestyle=":", linewidth=1.2, label="plain SFT")
    values = np.concatenate(lines)
    if np.nanmax(values) > _DECADE * np.nanmin(values):
        log_axis(axes)
    else:
        axes.set_ylim(0, max(1.1, 1.1 * np.nanmax(values)))
    axes.set_xticks(tenths)
    legend(axes)
    caption = (
        "What a token's loss is multiplied by, over the completion's length: a line that rises "
        "steeply to the right means that completions train mostly on their ends."
        f"{_left_out(diagnosis)}"
    )
    return chart(figure, title="Weights by position", caption=caption)


def discount_by_length(diagnosis: Diagnosis) -> Chart:
    """Mean weight with a perfect ratio against completion length, with the corpus's lengths."""
    weights, shown = diagnosis.weights, _shown(diagnosis)
    longest = max(_MIN_LONGEST, diagnosis.overall.completion_lengths["max"])
    lengths = np.unique(np.geomspace(1, longest, _POINTS).round().astype(int))
    figure, axes = new_axes(x_label="loss tokens of a completion", y_label="mean weight")
    if discounted_block_size(weights) and weights.gamma != _OTHER_GAMMA:
        other = weights.model_copy(update={"gamma": _OTHER_GAMMA})
        values = mean_weights_at(lengths.tolist(), other)
        axes.plot(lengths, values, color=MUTED, linestyle=":", label=f"gamma {_OTHER_GAMMA:g}")
    axes.plot(
        lengths, mean_weights_at(lengths.tolist(), weights), color=INK, label=_discount(diagnosis)
    )
    for source, colour in zip(shown, _COLOURS, strict=False):
        marked = [source.completion_lengths[name] for name in _MARKED_QUANTILES]
        heights = [source.perfect_ratio_mean_weights[name] for name in _MARKED_QUANTILES]
        axes.plot(marked, heights, color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
        axes.plot(
            marked[1], heights[1], "o", color=colour, markersize=6, label=_label(source.source)
        )
    log_axis(axes, along="x")
    axes.set_ylim(0, 1.05)
    legend(axes)
    caption = (
        "The discount alone, as if the policy agreed with every token: the most that a completion "
        "of that length can weigh on average unless the policy finds it likelier than its author. "
        f"Dots are median lengths, bands reach from the 5 % to the 95 % quantile."
        f"{_left_out(diagnosis)}"
    )
    return chart(figure, title="The discount by length", caption=caption)


def _shown(diagnosis: Diagnosis) -> list[SourceDiagnosis]:
    """The sources with the most loss tokens, as many as there are colours, by name."""
    largest = sorted(diagnosis.sources, key=lambda each: -each.num_loss_tokens)[: len(_COLOURS)]
    return sorted(largest, key=lambda each: each.source)


def _left_out(diagnosis: Diagnosis) -> str:
    num_left_out = len(diagnosis.sources) - len(_COLOURS)
    if num_left_out <= 0:
        return ""
    return f" Drawn are the {len(_COLOURS)} largest sources; the tables have {num_left_out} more."


def _discount(diagnosis: Diagnosis) -> str:
    weights = diagnosis.weights
    return {
        "token": f"gamma {weights.gamma:g}",
        "block": f"gamma {weights.gamma:g}, blocks of {weights.block_size}",
        "span": f"gamma {weights.gamma:g}",
        "sequence": "sequence level: no discount",
    }[weights.level]


def _seen_bins(shown: list[SourceDiagnosis], bounds: tuple[float, float]) -> tuple[int, int]:
    """Indices of the outer edges: all but the tails, and at least twice the clip bounds."""
    reach = []
    for source in shown:
        passed = np.cumsum(source.log_ratio_shares)  # up to each of the edges, and in all
        reach.append(np.searchsorted(passed, (_TAIL, 1.0 - _TAIL)))
    wanted = np.searchsorted(LOG_RATIO_BINS, (2 * bounds[0], 2 * bounds[1]))
    first = min(*(low - 1 for low, _ in reach), wanted[0])
    last = max(*(high for _, high in reach), wanted[1])
    return max(int(first), 0), min(int(last), len(LOG_RATIO_BINS) - 1)


def _label(source: str) -> str:
    """A source's name as a legend takes it: short, no formula, not hidden by an underscore."""
    short = source if len(source) <= _LABEL_CHARS else f"…{source[1 - _LABEL_CHARS :]}"
    text = short.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
