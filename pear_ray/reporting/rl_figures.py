"""Figures of what RL learns: reward, outcomes, advantages, waste, lengths, entropy."""

import numpy as np

from pear_ray.reporting.load import Floats, RunData
from pear_ray.reporting.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Chart,
    Line,
    Threshold,
    line_chart,
    plain_label,
    running_mean,
)

STEP = "RL step"
_OUTCOME = "rl/correct_fraction"
_COMPONENT_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)


def reward(data: RunData) -> Chart:
    """Mean reward per step with its running mean."""
    steps, values = data.series("rl", "rl/reward/mean")
    same = ""
    if data.has("rl", _OUTCOME) and not outcome_differs(data):
        same = " Here it is the fraction of correct answers as well."
    return line_chart(
        [
            Line("each step", steps, values, GREY),
            Line(f"mean of {_window(values)} steps", steps, _smooth(values), BLUE),
        ],
        title="RL reward",
        caption="Mean reward of the step's completions, on training problems: it should rise, and "
        f"it says nothing about held-out problems (see the evaluation).{same}",
        x_label=STEP,
        y_label="mean reward",
    )


def outcome_differs(data: RunData) -> bool:
    """Whether the reward is another number than the fraction of correct answers."""
    outcome, rewards = (data.series("rl", name) for name in (_OUTCOME, "rl/reward/mean"))
    if not np.array_equal(outcome[0], rewards[0]):
        return len(outcome[0]) > 0
    return not np.allclose(outcome[1], rewards[1], atol=1e-9, equal_nan=True)


def component_names(data: RunData) -> list[str]:
    """The metrics of a reward's components, sorted."""
    found = {
        name
        for record in data.metrics["rl"]
        for name in record.metrics
        if name.startswith("rl/reward/") and name.endswith("/mean") and name.count("/") == 3  # noqa: PLR2004 - rl/reward/NAME/mean
    }
    return sorted(found)


def components(data: RunData) -> Chart:
    """Running means of the reward's components, and of the outcome beside them."""
    steps, outcomes = data.series("rl", _OUTCOME)
    names = component_names(data)
    lines, same = [], ""
    if len(names) > 1:  # a single one is the reward
        for place, name in enumerate(names):
            label = plain_label(name.removeprefix("rl/reward/").removesuffix("/mean"))
            at, values = data.series("rl", name)
            if np.array_equal(at, steps) and np.allclose(values, outcomes, atol=1e-9):
                same = f" ({label.strip()})"  # one line over the other would hide it
                continue
            colour = _COMPONENT_COLOURS[place % len(_COMPONENT_COLOURS)]
            dashes = "-" if place < len(_COMPONENT_COLOURS) else ":"
            lines.append(Line(label, at, _smooth(values), colour, dashes))
    lines.append(Line(f"correct answers{same}", steps, _smooth(outcomes), INK, "--"))
    return line_chart(
        [line for line in lines if len(line.x)],
        title="Reward by component, and the outcome",
        caption="Mean of each component before its weight, and the fraction of answers that are "
        "correct (dashed), which no format term or penalty moves: a reward that rises while it "
        f"stays is learnt from the other terms. Each point is a mean of {_window(outcomes)} steps.",
        x_label=STEP,
        y_label="mean value, fraction",
    )


def advantage(data: RunData) -> Chart:
    """Size and spread of the advantages per step."""
    return line_chart(
        [
            Line("mean size", *data.series("rl", "rl/advantage/mean_abs"), BLUE),
            Line("standard deviation", *data.series("rl", "rl/advantage/std"), GREY, "--"),
        ],
        title="Advantages",
        caption="Mean absolute advantage of the trained tokens, and the deviation: this is what "
        "moves the policy. It falls as groups become all right or all wrong.",
        x_label=STEP,
        y_label="advantage",
        from_zero=True,
    )


def fractions(data: RunData) -> Chart:
    """The shares of what was sampled that teach little or nothing."""
    named = [
        ("degenerate groups", "rl/degenerate_group_fraction", GREY, "-"),
        ("truncated completions", "rl/truncated_fraction", ORANGE, "-"),
    ]
    if np.any(data.series("rl", "rl/errored_fraction")[1] > 0):
        named.append(("errored rewards", "rl/errored_fraction", PURPLE, "-"))
    lines = [Line(label, *data.series("rl", name), c, d) for label, name, c, d in named]
    waste = ""
    steps, kept = data.series("rl", "rl/dynamic_sampling/kept_fraction")
    if len(steps):
        lines.append(Line("groups thrown away", steps, 1 - kept, BLUE))
        filled = data.series("rl", "rl/dynamic_sampling/filled_fraction")
        lines.append(Line("groups filled up", *filled, BLUE, ":"))
        waste = _waste(data)
    return line_chart(
        [line for line in lines if len(line.x)],
        title="What RL could not use",
        caption="Groups whose outcomes are all equal teach nothing about what is right; truncated "
        f"completions are mostly wrong; errored rewards are unknown.{waste}",
        x_label=STEP,
        y_label="fraction",
        from_zero=True,
    )


def length(data: RunData) -> Chart:
    """Completion length per step, with the limit."""
    limit = data.config.rl.max_tokens if data.config else None
    mean, low, high = (
        data.series("rl", f"rl/completion_length/{stat}") for stat in ("mean", "min", "max")
    )
    is_whole = np.array_equal(low[0], mean[0]) and np.array_equal(high[0], mean[0])
    band = (low[1], high[1]) if is_whole else None
    spans = "; the band goes from the shortest to the longest" if band else ""
    return line_chart(
        [Line("mean length", *mean, BLUE, band=band)],
        title="Completion length",
        caption=f"Mean completion length{spans}. Growth up to the limit means that answers get "
        "cut, a collapse that reasoning is dropped.",
        x_label=STEP,
        y_label="tokens",
        from_zero=True,
        thresholds=[Threshold("token limit", float(limit))] if limit else [],
    )


def entropy(data: RunData) -> Chart:
    """The policy's entropy per step."""
    lines = [Line("surprise of sampled tokens", *data.series("rl", "rl/entropy"), PURPLE)]
    exact = data.series("rl", "rl/entropy/exact")
    if len(exact[0]):
        lines.append(Line("exact, of trained tokens", *exact, BLUE, "--"))
    return line_chart(
        lines,
        title="Entropy",
        caption="Mean entropy of the policy at the sampled tokens: a fast fall towards 0 means "
        "that it stops exploring, and reward will stop rising soon after.",
        x_label=STEP,
        y_label="entropy (nats per token)",
    )


def _waste(data: RunData) -> str:
    """What dynamic sampling sampled in vain, over all steps."""
    sampled = data.series("rl", "rl/dynamic_sampling/sampled_groups")[1]
    kept = data.series("rl", "rl/dynamic_sampling/kept_fraction")[1]
    tokens = data.series("rl", "rl/dynamic_sampling/discarded_tokens")[1]
    capped = data.series("rl", "rl/dynamic_sampling/cap_reached")[1]
    return (
        f" Dynamic sampling sampled {np.nansum(sampled):,.0f} groups for the "
        f"{np.nansum(sampled * kept):,.0f} that trained, threw {np.nansum(tokens):,.0f} tokens "
        f"away and reached its cap in {np.nansum(capped):,.0f} of {len(capped):,} steps, which "
        "were filled up with degenerate groups."
    )


def _smooth(values: Floats) -> Floats:
    return running_mean(values, window=_window(values))


def _window(values: Floats) -> int:
    return max(3, len(values) // 10 | 1)  # odd, so that it has a middle
