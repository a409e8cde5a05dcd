"""Figures of the corpus, its scores, and the weights that PEAR gave it."""

import numpy as np
from numpy.typing import NDArray

from pear_ray.config.sft import PearWeights
from pear_ray.reporting.load import CorpusLengths, RunData, WeightSamples
from pear_ray.reporting.plot import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    Chart,
    Line,
    Threshold,
    chart,
    legend,
    line_chart,
    log_axis,
    new_axes,
)

_BINS = 40
_POSITION_BINS = 24
_SHOWN_CLIP_WIDTHS = 3.0
_DECADE = 10.0


def length_histogram(corpus: CorpusLengths, max_tokens: int | None) -> Chart:
    """How long the corpus's completions are."""
    lengths = corpus.num_loss_tokens
    figure, axes = new_axes(x_label="tokens that train", y_label="examples")
    axes.hist(lengths, bins=_integer_edges(lengths).tolist(), color=BLUE)
    limit = ""
    if max_tokens is not None:
        axes.axvline(max_tokens, color=INK, linestyle="--", linewidth=1)
        limit = f" The dashed line is the limit of {max_tokens} tokens."
    caption = (
        f"{len(lengths):,} examples, {int(lengths.sum()):,} trained tokens, median "
        f"{np.median(lengths):.0f}: a pile at the right edge would mean cut completions.{limit}"
    )
    return chart(figure, title="Completion lengths in the corpus", caption=caption)


def behavior_histogram(corpus: CorpusLengths) -> Chart:
    """How sure the behavior policy was of each example."""
    means = corpus.behavior_logprob_means
    figure, axes = new_axes(x_label="mean log-prob per token (nats)", y_label="examples")
    axes.hist(means, bins=_BINS, color=PURPLE)
    caption = (
        f"Each example's mean behavior log-prob, median {np.median(means):.3f}: near 0 the "
        "behavior policy writes it almost surely; a far left tail is text that it would hardly "
        "write."
    )
    return chart(figure, title="Behavior log-probs", caption=caption)


def verified_fraction(data: RunData) -> Chart:
    """Which share of the behavior policy's completions was right, while collecting."""
    steps, values = data.series("collect", "collect/verified_fraction")
    return line_chart(
        [Line("verified", steps, values, BLUE)],
        title="Verified fraction while collecting",
        caption="Share of sampled completions whose answer was verified, so far: "
        "only these enter the corpus.",
        x_label="collect step",
        y_label="verified fraction",
        from_zero=True,
    )


def log_ratio_histogram(samples: WeightSamples, weights: PearWeights) -> Chart:
    """Raw per-token log-ratios at the start and at the end of SFT, with the clip bounds."""
    low, high = weights.log_ratio_clip_low, weights.log_ratio_clip_high
    first, last = _first_and_last_quarter(samples)
    lowest, highest = np.quantile(samples.log_ratios, (0.01, 0.99))
    reach = _SHOWN_CLIP_WIDTHS * max(high - low, 0.1)  # or a few far tokens would hide the rest
    edges = np.linspace(
        max(min(lowest, 2 * low), low - reach), min(max(highest, 2 * high), high + reach), _BINS + 1
    )
    figure, axes = new_axes(
        x_label="log-ratio, policy minus behavior (nats)", y_label="share of tokens"
    )
    for mask, label, colour in (
        (first, "first quarter of SFT", GREY),
        (last, "last quarter", BLUE),
    ):
        values = np.clip(samples.log_ratios[mask], edges[0], edges[-1])
        shares = np.histogram(values, edges)[0] / max(1, len(values))
        axes.stairs(shares, edges, color=colour, label=label, linewidth=1.6)
    for bound in (low, high):
        axes.axvline(bound, color=INK, linestyle="--", linewidth=1)
    legend(axes)
    ratios = samples.log_ratios[last]
    below, above = 100 * np.mean(ratios < low), 100 * np.mean(ratios > high)
    caption = (
        f"Before clipping; dashed lines are the clip bounds {low:g} and {high:g}. In the last "
        f"quarter {below:.0f} % of tokens lie below and {above:.0f} % above: mass far left means a "
        "behavior policy that the policy cannot follow. The outermost bins hold the tails."
    )
    return chart(figure, title="Log-ratios and their clip bounds", caption=caption)


def weights_by_position(samples: WeightSamples, weights: PearWeights) -> Chart:
    """Mean weight and 10-90 % band against the distance from the last trained token."""
    centres, mean, low, high = _by_position(samples)
    figure, axes = new_axes(x_label="tokens from the end (0 = last)", y_label="weight")
    axes.fill_between(centres, low, high, color=BLUE, alpha=0.22, linewidth=0, label="10-90 %")
    axes.plot(centres, mean, color=BLUE, label="mean", marker="o")
    if weights.level == "token":
        label = f"discount alone ({weights.gamma:g} per token)"
        discount = weights.gamma ** centres.astype(np.float64)
        axes.plot(centres, discount, color=MUTED, linestyle=":", label=label)
    if high.max() > _DECADE * max(low.min(), 1e-12):
        log_axis(axes)
    legend(axes)
    caption = (
        "What a token's loss was multiplied by: where the line lies above the dotted one, the "
        "policy finds the rest of the text likelier than its author did; a line that falls steeply "
        "to the right means that long completions train mostly on their ends."
    )
    return chart(figure, title="Weights by position", caption=caption)


def effective_sample_size(data: RunData) -> Chart:
    """ESS as a fraction of the tokens, per SFT step."""
    steps, values = data.series("sft", "sft/ess_fraction")
    tenth_steps, tenth = data.series("sft", "sft/weight_mass_last_tenth")
    lines = [Line("effective sample size", steps, values, BLUE)]
    if len(tenth):
        lines.append(Line("weight in the last tenth", tenth_steps, tenth, ORANGE, "--"))
    return line_chart(
        lines,
        title="Effective sample size",
        caption="Share of the trained tokens that the weights leave effective: 1 is plain SFT; "
        "low values mean that few tokens decide the gradient. The last tenth of each completion "
        "holds 0.1 of the weight when all weigh the same.",
        x_label="SFT step",
        y_label="fraction",
        from_zero=True,
    )


def clip_fractions(data: RunData) -> Chart:
    """Shares of tokens at the clip bounds, per SFT step."""
    named = (
        ("log-ratio at low bound", "sft/log_ratio_clip_low_fraction", BLUE, "-"),
        ("log-ratio at high bound", "sft/log_ratio_clip_high_fraction", ORANGE, "-"),
        ("log-weight at floor", "sft/log_weight_floor_fraction", BLUE, ":"),
        ("log-weight at ceiling", "sft/log_weight_ceiling_fraction", ORANGE, ":"),
    )
    lines = [Line(label, *data.series("sft", name), c, d) for label, name, c, d in named]
    return line_chart(
        [line for line in lines if len(line.x)],
        title="Clipped fractions",
        caption="Share of tokens whose log-ratio was clipped, and of those whose summed log-weight "
        "reached a bound: floor or ceiling well above 0 means that weights say little any more.",
        x_label="SFT step",
        y_label="fraction of tokens",
        from_zero=True,
    )


def sft_loss(data: RunData) -> Chart:
    """The weighted loss that was optimised, and the plain NLL beside it."""
    lines = [
        Line("weighted loss", *data.series("sft", "sft/weighted_loss"), BLUE),
        Line("plain NLL", *data.series("sft", "sft/nll"), GREY, "--"),
        Line("held-out NLL", *data.series("sft", "sft/heldout/nll"), ORANGE, "-"),
    ]
    return line_chart(
        [line for line in lines if len(line.x)],
        title="SFT loss",
        caption="The weighted loss is what was optimised; the plain NLL of the same tokens is "
        "there to compare runs with different weights, and that of held-out rows to see when "
        "training only learns its rows by heart.",
        x_label="SFT step",
        y_label="loss (nats per token)",
    )


def gradient_ratio(data: RunData) -> Chart:
    """Gradient norm over that of uniform weights, where it was looked at, with the alarms."""
    steps, values = data.series("sft", "sft/grad_norm_ratio_to_uniform")
    alarms = data.config.sft.alarms if data.config else None
    bounds = (alarms.min_gradient_ratio, alarms.max_gradient_ratio) if alarms else ()
    return line_chart(
        [Line("ratio", steps, np.where(values > 0, values, np.nan), BLUE)],
        title="Gradient norm beside uniform weights",
        caption="Of a few of a step's rows: the gradient norm over what uniform weights would give "
        "them. 1 is plain SFT; far below it the weights let little train, far above it few tokens "
        "decide. Dashed lines are the alarms.",
        x_label="SFT step",
        y_label="ratio",
        thresholds=[Threshold(f"{bound:g}", bound) for bound in bounds if bound > 0],
        log=True,
    )


def _first_and_last_quarter(
    samples: WeightSamples,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which samples are of the first and of the last quarter of the steps seen."""
    early, late = np.quantile(samples.steps, (0.25, 0.75))
    return samples.steps <= early, samples.steps >= late


def _by_position(samples: WeightSamples) -> tuple[NDArray[np.float64], ...]:
    """Centre, mean, 10 % and 90 % quantile of the weights in bins of `tokens_left`."""
    edges = _integer_edges(samples.tokens_left.astype(np.float64), bins=_POSITION_BINS)
    where = np.digitize(samples.tokens_left, edges)
    rows = []
    for index in np.unique(where):
        inside = where == index
        weights = samples.weights[inside]
        low, high = np.quantile(weights, (0.1, 0.9))
        rows.append((samples.tokens_left[inside].mean(), weights.mean(), low, high))
    return tuple(np.array(rows).T)


def _integer_edges(values: NDArray[np.float64], *, bins: int = _BINS) -> NDArray[np.float64]:
    """Bin edges between whole numbers, every bin equally wide."""
    low, high = values.min(), values.max()
    width = max(1, int(np.ceil((high - low + 1) / bins)))
    return np.arange(low - 0.5, high + width + 0.5, width)
