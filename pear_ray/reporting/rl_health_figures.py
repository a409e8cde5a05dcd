"""Figures that warn of trouble in RL: updates that go far, a sampler that is not the trainer."""

import numpy as np

from pear_ray.config.rl_losses import ReinforceLoss
from pear_ray.reporting.load import RunData
from pear_ray.reporting.plot import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    Line,
    Threshold,
    has_spikes,
    line_chart,
)
from pear_ray.reporting.rl_figures import STEP

SMALLEST_GAP = 1e-8  # a logarithmic axis has no place for an exact 0
MAX_SYNC_GAPS = {"float32": 1e-4, "bfloat16": 0.3}  # as in engines.weights, a peer
_LINEAR_RATIOS = 20.0  # ratios further apart are drawn on a logarithmic axis
_LEAST_COST = 1e-4  # of the tokens: what float32 rounds away is no cost
NO_MISMATCH_COST = (
    "the mismatch between sampler and trainer cost nothing: no correction weight was bounded or "
    f"masked, and the effective sample size is the number of tokens to {100 * _LEAST_COST:g}\u00a0%"
)
_COSTS = (
    ("bounded weights", "rl/correction/bounded_fraction", ORANGE),
    ("masked tokens", "rl/correction/masked_fraction", PURPLE),
)


def kl(data: RunData) -> Chart:
    """KL to the policy that RL started from."""
    steps, values = data.series("rl", "rl/kl_to_init")
    spikes = has_spikes(values)
    return line_chart(
        [Line("KL", steps, values, BLUE)],
        title="KL to the first policy",
        caption="k3 estimate at the trained tokens, to the policy that RL started from: how far it "
        "has gone. A steep rise at a flat reward is drift.",
        x_label=STEP,
        y_label="KL (nats per token)",
        log=spikes,
        from_zero=not spikes,
    )


def updates_move(data: RunData) -> bool:
    """Whether any ratio was not 1, so that ratios and clips say something."""
    ratios = (data.series("rl", f"rl/ratio/{end}")[1] for end in ("max", "min"))
    return any(np.any((values < 1) | (values > 1)) for values in ratios)  # NaN is neither


def clip_fractions(data: RunData) -> Chart:
    """Shares of the trained tokens whose gradient the ratio clip took."""
    return line_chart(
        [
            Line("clipped high", *data.series("rl", "rl/clip_fraction/high"), ORANGE),
            Line("clipped low", *data.series("rl", "rl/clip_fraction/low"), BLUE),
        ],
        title="Clipped ratios",
        caption="Share of the trained tokens whose ratio left the clip bounds, so that they got no "
        "gradient: a few per cent are usual, much more means updates too large for one batch.",
        x_label=STEP,
        y_label="fraction of tokens",
        from_zero=True,
    )


def ratios(data: RunData) -> Chart:
    """The largest and smallest ratio of a step, with the clip bounds."""
    high, low = (data.series("rl", f"rl/ratio/{end}") for end in ("max", "min"))
    bounds = []
    loss = data.config.rl.loss if data.config else None
    if loss is not None and not isinstance(loss, ReinforceLoss):
        bounds.append(Threshold("1 + clip_high", 1 + loss.clip_high))
        bounds.append(Threshold("1 - clip_low", 1 - loss.clip_low))
    far = np.nanmax(high[1]) > _LINEAR_RATIOS * max(np.nanmin(low[1]), 1e-12)
    return line_chart(
        [Line("largest", *high, ORANGE), Line("smallest", *low, BLUE)],
        title="Ratios",
        caption="Policy over the policy that the batch's updates began with, at the step's most "
        "extreme tokens: beyond the dashed lines they are clipped.",
        x_label=STEP,
        y_label="ratio",
        thresholds=bounds,
        log=bool(far),
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
        "weights and tokens: mean and sync gap should stay below the dashed lines (0 is drawn at "
        f"{SMALLEST_GAP:g}).",
        x_label=STEP,
        y_label="log-prob gap (nats)",
        thresholds=thresholds,
        log=True,
    )


def mismatch_costs(data: RunData) -> bool:
    """Whether the mismatch, or its correction, took anything from a step."""
    lost = 1 - data.series("rl", "rl/mismatch/ess_fraction")[1]
    touched = (data.series("rl", name)[1] for _, name, _ in _COSTS)
    return bool(np.any(lost > _LEAST_COST) or any(np.any(values > 0) for values in touched))


def mismatch_cost(data: RunData) -> Chart:
    """What sampler and trainer's disagreement costs: sample size, bounded and masked tokens."""
    steps, ess = data.series("rl", "rl/mismatch/ess_fraction")
    lines = [Line("sample size lost", steps, _positive(1 - ess), GREY)]
    for label, name, colour in _COSTS:
        touched = data.series("rl", name)
        if np.any(touched[1] > 0):
            lines.append(Line(label, touched[0], _positive(touched[1]), colour))
    return line_chart(
        lines,
        title="What the mismatch costs",
        caption="Sample size lost is 1 - effective sample size / tokens, of trainer over sampler "
        "without a correction; beside it the share of the trained tokens whose correction weight "
        "was set to a bound or to 0 (those of no such token leave a gap).",
        x_label=STEP,
        y_label="fraction of tokens",
        log=True,
    )


def self_test(data: RunData) -> str:
    """The sentence of the test before the first step; nothing where the run has none."""
    names = ("max_log_ratio", "mean_gap", "grad_norm")
    found = [data.series("rl", f"rl/self_test/{name}")[1] for name in names]
    took = data.series("rl", "time/self_test_s")[1]
    if not all(len(values) for values in (*found, took)):
        return ""
    log_ratio, gap, norm = (values[0] for values in found)
    return (
        f"Self-test before the first step, passed in {took[0]:.1f} s: two passes of the trainer "
        f"differ by {log_ratio:.2g} nats at most, sampler and trainer by {gap:.2g} nats per token "
        f"on average, and the gradient norm is {norm:.3g}."
    )


def _positive(values: np.ndarray) -> np.ndarray:
    """With gaps where a logarithmic axis has no place."""
    return np.where(values > 0, values, np.nan)
