"""Figures of a readiness report."""

import numpy as np

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
    draw_threshold,
    legend,
    line_chart,
    log_axis,
    new_axes,
    note,
    run_colour,
    whole_steps,
)
from pear_ray.reporting.readiness.advice import MIN_MIXED
from pear_ray.reporting.readiness.numbers import Probe, Readiness

_LENGTH_BINS = 40


def outcomes(found: Readiness) -> Chart:
    """Prompts by how many of their completions are right."""
    figure, axes = new_axes(
        x_label=f"right completions of {found.group_size}", y_label="share of prompts"
    )
    shares = np.array(found.correct_counts) / found.num_prompts
    size = len(shares) - 1
    colours = [ORANGE, *[BLUE] * (size - 1), GREEN]
    axes.bar(range(size + 1), shares, color=colours, width=0.8)
    for place in (0, size):
        note(axes, f"{100 * shares[place]:.0f} %", (place, shares[place]), beside=False)
    axes.set_ylim(0, 1.15 * float(shares.max()))
    axes.grid(visible=False, axis="x")
    whole_steps(axes)
    return chart(
        figure,
        title="Right completions per prompt",
        caption="Prompts at the left end always fail and those at the right end always pass: "
        "neither has a gradient. Those between are what RL learns from.",
    )


def pass_curve(found: Readiness) -> Chart:
    """pass@k over k, with its intervals."""
    figure, axes = new_axes(x_label="k", y_label="pass@k")
    ks = np.array(sorted(found.pass_at))
    middle, low, high = (
        np.array([getattr(found.pass_at[k], name) for k in ks]) for name in ("value", "low", "high")
    )
    axes.fill_between(ks, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(ks, middle, color=BLUE, marker="o")
    axes.set_ylim(0, min(1.0, 1.1 * float(high.max())) or 1.0)
    whole_steps(axes)
    return chart(
        figure,
        title="pass@k",
        caption=f"At temperature {found.temperature:g}, unbiased, with "
        f"{100 * found.confidence:g} % intervals over prompts. The rise from pass@1 "
        "is what RL can turn into pass@1 at once.",
    )


def group_sizes(found: Readiness) -> Chart:
    """Share of mixed groups by group size."""
    figure, axes = new_axes(x_label="group size", y_label="share of mixed groups")
    sizes = np.array(sorted(found.mixed_at))
    shares = np.array([found.mixed_at[size] for size in sizes])
    known = sizes <= found.group_size
    axes.plot(sizes[known], shares[known], color=PURPLE, marker="o", label="from the samples")
    beyond = sizes >= found.group_size
    axes.plot(
        sizes[beyond],
        shares[beyond],
        "--",
        color=PURPLE,
        marker="o",
        label="with more samples",
    )
    at = found.mixed_at[found.group_size]
    axes.plot([found.group_size], [at], "o", color=ORANGE, markersize=8, label="configured")
    log_axis(axes, along="x")
    axes.set_xticks(sizes)
    axes.minorticks_off()
    axes.set_ylim(0, 1.05)
    draw_threshold(axes, Threshold(f"too few below {MIN_MIXED:g}", MIN_MIXED), name_above=False)
    legend(axes)
    return chart(
        figure,
        title="Groups that teach, by group size",
        caption="A group teaches where it holds right and wrong completions. Beyond the configured "
        "size: what further completions of the same prompts would bring, with a Beta distribution "
        "fitted to their pass rates.",
    )


def probe(found: Probe) -> Chart:
    """Mean reward of a short RL, by step and seed."""
    lines = [
        Line(
            f"seed {seed}",
            np.array(range(1, len(rewards) + 1), dtype=np.float64),
            np.array(rewards, dtype=np.float64),
            run_colour(place),
        )
        for place, (seed, rewards) in enumerate(found.rewards.items())
    ]
    return line_chart(
        lines,
        title="A few steps of RL",
        caption="Mean reward of each step's completions, on other prompts in each: lines wobble by "
        "chance, and say nothing of what more steps would do.",
        x_label="RL step",
        y_label="mean reward",
        from_zero=True,
    )


def lengths(found: Readiness) -> Chart:
    """Completion lengths, with the limit."""
    figure, axes = new_axes(x_label="tokens of a completion", y_label="share of completions")
    bins = min(_LENGTH_BINS, found.max_tokens)
    edges = np.linspace(0, found.max_tokens, bins + 1)
    shares, _ = np.histogram(found.lengths, bins=edges)
    axes.stairs(shares / len(found.lengths), edges, color=BLUE, fill=True, alpha=0.6)
    axes.axvline(found.length_mean, color=GREY, linestyle=":", linewidth=1.4, label="mean")
    axes.axvline(found.max_tokens, color=ORANGE, linestyle="--", linewidth=1.4, label="max_tokens")
    legend(axes)
    return chart(
        figure,
        title="Completion lengths",
        caption=f"{100 * found.truncated:.1f} % were cut at {found.max_tokens} tokens, the rest "
        "ended by themselves.",
    )
