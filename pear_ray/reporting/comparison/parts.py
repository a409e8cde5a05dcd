"""A comparison's chapters: which curves each holds, and what it says where none was logged."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pear_ray.reporting.comparison import figures
from pear_ray.reporting.comparison.runs import ComparedRun, suite_names
from pear_ray.reporting.plot import Chart
from pear_ray.reporting.words import metric_words, pass_at_k_names

_STEP = "optimizer step"
_SMOOTHED = "Each curve is a running mean over a fifteenth of its steps."


@dataclass(frozen=True, slots=True)
class CurveFigure:
    """A figure of one metric of every run."""

    stage: str
    metric: str
    title: str
    caption: str
    y_label: str
    log: bool = False  # the axis: ends that lie close together stay apart
    uniform: str = ""  # what it is for runs with uniform weights, which are then left out


@dataclass(slots=True)
class Part:
    """A chapter of the page."""

    anchor: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


_LOSS = (
    CurveFigure(
        "sft",
        "sft/heldout/nll",
        "Held-out nll",
        "Plain negative log-likelihood of rows kept out of training: the same measure for every "
        "objective. It says how well the text is predicted, and not how well problems are solved.",
        "nats per token",
        log=True,
    ),
    CurveFigure(
        "sft",
        "sft/heldout/weighted_nll",
        "Weighted held-out nll",
        "The same, each token times its PEAR weight of the moment. Weights differ between runs and "
        "over time, and levels with them: this is no ranking.",
        "nats per token",
        log=True,
        uniform="the plain one",
    ),
    CurveFigure(
        "sft",
        "sft/nll",
        "Train nll",
        "Plain negative log-likelihood of each step's rows before the step, whatever the objective "
        f"trains on. {_SMOOTHED}",
        "nats per token",
        log=True,
    ),
)
_GRADIENT = (
    CurveFigure(
        "sft",
        "sft/grad_norm",
        "Gradient norm",
        "Before clipping. An objective's scale moves it, and Adam divides "
        f"that scale out again: look for growth and jumps. {_SMOOTHED}",
        "gradient norm",
        log=True,
    ),
    CurveFigure(
        "sft",
        "sft/ess_fraction",
        "Effective sample size",
        "Of each step's PEAR weights, over its tokens: 1 means that all tokens count alike. What "
        f"an objective multiplies by itself (as DFT does) is not in it. {_SMOOTHED}",
        "fraction of tokens",
        uniform="1",
    ),
    CurveFigure(
        "sft",
        "sft/weight/mean",
        "Mean weight",
        f"Of each step's tokens: with uniform weights it is 1. {_SMOOTHED}",
        "mean weight",
        uniform="1",
    ),
)
_RL = (
    CurveFigure(
        "rl",
        "rl/reward/mean",
        "RL reward",
        f"On training problems; it says nothing about held-out ones. {_SMOOTHED}",
        "mean reward",
    ),
    CurveFigure(
        "rl",
        "rl/correct_fraction",
        "RL correct answers",
        "Fraction of the step's answers that are correct, on training problems: the same measure "
        f"for runs whose rewards differ. {_SMOOTHED}",
        "fraction of answers",
    ),
    CurveFigure(
        "rl",
        "rl/degenerate_group_fraction",
        "RL degenerate groups",
        "Groups whose outcomes are all equal, and which so teach nothing about what is right. "
        f"{_SMOOTHED}",
        "fraction of groups",
    ),
    CurveFigure(
        "rl",
        "rl/kl_to_init",
        "RL KL to the first policy",
        "Of the trained tokens, to the policy that RL started from. Runs without rl.kl do "
        f"not measure it. {_SMOOTHED}",
        "nats per token",
        log=True,
    ),
    CurveFigure(
        "rl",
        "rl/grad_norm",
        "RL gradient norm",
        f"Before clipping, mean over a batch's updates: look for growth and jumps. {_SMOOTHED}",
        "gradient norm",
        log=True,
    ),
    CurveFigure(
        "rl",
        "rl/entropy",
        "RL entropy",
        f"Of the policy at the sampled tokens: near 0 it stops exploring. {_SMOOTHED}",
        "nats per token",
    ),
    CurveFigure(
        "rl",
        "rl/completion_length/mean",
        "RL completion length",
        f"Mean over each step's completions. {_SMOOTHED}",
        "tokens",
    ),
)


def build_parts(runs: Sequence[ComparedRun]) -> list[Part]:
    """Every chapter that has something to show or to say, in reading order."""
    parts = [
        _outcome(runs),
        _drawn(runs, Part("loss", "SFT losses"), [*_LOSS, *_passes_in_training(runs)]),
        _drawn(runs, Part("gradient", "SFT gradients and weights"), _GRADIENT),
        _drawn(runs, Part("rl", "RL"), _RL, needed=False),
    ]
    return [part for part in parts if part.charts or part.missing]


def _outcome(runs: Sequence[ComparedRun]) -> Part:
    part = Part("outcome", "pass@k")
    suites = suite_names(runs)
    part.charts += [
        figures.estimates(runs, suite, name, named=len(suites) > 1)
        for suite in suites
        for name in _evaluated_passes(runs, suite)
    ]
    return part


def _evaluated_passes(runs: Sequence[ComparedRun], suite: str) -> list[str]:
    """The pass@k metrics of the suite that any run was evaluated by."""
    evaluated = [run.suites[suite] for run in runs if suite in run.suites]
    return pass_at_k_names(
        {name for each in evaluated for metrics in each.checkpoints.values() for name in metrics}
    )


def _passes_in_training(runs: Sequence[ComparedRun]) -> list[CurveFigure]:
    """pass@k that was looked at while SFT ran."""
    prefix = "sft/eval/"
    names = {
        name.removeprefix(prefix)
        for run in runs
        for record in run.metrics["sft"]
        for name in record.metrics
        if name.startswith(f"{prefix}pass_at_")
        and name.removeprefix(f"{prefix}pass_at_").isdecimal()
    }
    return [
        CurveFigure(
            "sft",
            f"{prefix}{name}",
            f"{metric_words(name)} while SFT trains",
            "On held-out problems, a few at a time: without intervals, so that neighbouring curves "
            "are not told apart.",
            metric_words(name),
        )
        for name in pass_at_k_names(names)
    ]


def _drawn(
    runs: Sequence[ComparedRun],
    part: Part,
    wanted: Sequence[CurveFigure],
    *,
    needed: bool = True,
) -> Part:
    """`part` with each figure of `wanted` that a run logged; the others named where `needed`."""
    for figure in wanted:
        curves = figures.curves_of(runs, figure.stage, figure.metric)
        if figure.log:
            curves = figures.above_zero(curves)
        if figure.uniform:
            curves = [c for c in curves if runs[c.place].setting("sft.weights.kind") != "uniform"]
        if not curves:
            if needed:
                part.missing.append(_why_missing(runs, figure))
            continue
        caption = figure.caption
        if figure.uniform and len(curves) < len(runs):
            caption += f" Runs with uniform weights are left out: theirs is {figure.uniform}."
        if len(curves) > figures.MOST_OVERLAID and figure is _LOSS[0]:
            part.charts.append(
                figures.panels(
                    curves,
                    title=f"{figure.title}, run by run",
                    caption="Each run in front of all others, with its last value.",
                    x_label=_STEP,
                    y_label=figure.y_label,
                    log=figure.log,
                )
            )
        part.charts.append(
            figures.overlay(
                curves,
                title=figure.title,
                caption=caption,
                x_label=_STEP,
                y_label=figure.y_label,
                log=figure.log,
            )
        )
    return part


def _why_missing(runs: Sequence[ComparedRun], figure: CurveFigure) -> str:
    if figure.uniform and any(len(run.series(figure.stage, figure.metric)[0]) for run in runs):
        return f"no figure of {figure.metric}: with uniform weights it is {figure.uniform}"
    return f"no figure of {figure.metric}: no run has logged it"
