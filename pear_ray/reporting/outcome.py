"""What the run achieved: pass@k before and after each stage, and completions to read."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pear_ray.artifacts.tables import EVALUATION_SAMPLES
from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.records import FinishReason, RewardStatus
from pear_ray.reporting.load import Evaluation, RunData
from pear_ray.reporting.page import Table
from pear_ray.reporting.paired import difference_words, problem_counts
from pear_ray.reporting.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Chart,
    chart,
    legend,
    new_axes,
    note,
    whole_steps,
)
from pear_ray.reporting.words import (
    CHECKPOINT_WORDS,
    metric_words,
    paired_change,
    pass_at_k_names,
)

SHOWN_CHARS = 1200  # of a completion: the start and the end carry the reasoning and the answer
_PASSES_SIDE_BY_SIDE = 3
_COLOURS = {"base": GREY, "sft": BLUE, "rl": ORANGE}
_K_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
_IMPROVED, _NOT_IMPROVED = 3, 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of one checkpoint as the page shows it."""

    checkpoint: str
    status: str
    num_right: int
    num_samples: int
    completion: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class ExampleProblem:
    """A problem with the same sample of every checkpoint."""

    problem_id: str
    task: str
    question: str
    samples: list[Sample]


def has_many_passes(evaluation: Evaluation) -> bool:
    """Whether the figure of pass@k spans the page: fewer bars are read at half its width."""
    done = [name for name in CHECKPOINTS if name in evaluation.checkpoints]
    return len(pass_at_k_names(evaluation.checkpoints[done[-1]])) > _PASSES_SIDE_BY_SIDE


def pass_at_k(evaluation: Evaluation, *, named: bool) -> Chart:
    """pass@k of every checkpoint with its interval, `named` by its suite where there are more."""
    done = [name for name in CHECKPOINTS if name in evaluation.checkpoints]
    metrics = pass_at_k_names(evaluation.checkpoints[done[-1]])
    is_wide = has_many_passes(evaluation)
    figure, axes = new_axes(x_label="", y_label="fraction of problems", wide=is_wide)
    width = 0.8 / len(done)
    for index, name in enumerate(done):
        estimates = [evaluation.checkpoints[name][metric] for metric in metrics]
        values = np.array([e.value for e in estimates])
        errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        centres = np.arange(len(metrics)) + (index - (len(done) - 1) / 2) * width
        axes.bar(
            centres,
            values,
            0.86 * width,
            yerr=np.maximum(0.0, np.array(errors)),
            color=_COLOURS[name],
            ecolor=INK,
            capsize=3,
            label=CHECKPOINT_WORDS[name],
        )
        for centre, estimate in zip(centres, estimates, strict=True):
            note(axes, f"{estimate.value:.2f}", (centre, estimate.high), beside=False)
    axes.set_xticks(range(len(metrics)), [metric_words(metric) for metric in metrics])
    axes.set_ylim(0, 1.08)
    axes.grid(visible=False, axis="x")
    legend(axes)
    caption = (
        "Held-out problems, the same for every checkpoint; bars end at the estimate, whiskers "
        f"span the {100 * evaluation.confidence:g} % interval over problems. Whether two "
        "checkpoints are told apart is a question to their paired difference, where there is one."
    )
    title = "pass@k before and after each stage"
    title = f"{title}: {evaluation.suite}" if named else title
    return chart(figure, title=title, caption=caption)


def paired_table(data: RunData) -> Table | None:
    """How each pass@k differs between checkpoints, problem by problem; None where nothing does."""
    names = pass_at_k_names(
        {name for each in data.suites for found in each.checkpoints.values() for name in found}
    )
    rows = []
    for evaluation in data.suites:
        done = [name for name in CHECKPOINTS if name in evaluation.checkpoints]
        for before, after in itertools.combinations(done, 2):
            found = [
                paired_change(evaluation, data.counts, name, before, after)
                if name in evaluation.checkpoints[after]
                else None
                for name in names
            ]
            if any(found):
                words = f"{CHECKPOINT_WORDS[before]}, then {CHECKPOINT_WORDS[after]}"
                suite = f"{evaluation.suite}: " if len(data.suites) > 1 else ""
                cells = [f"{difference_words(e)}; {problem_counts(e)}" if e else "-" for e in found]
                rows.append([f"{suite}{words}", *cells])
    headers = [f"{metric_words(name)}: difference [interval], exact p" for name in names]
    return Table(["paired by problem", *headers], rows) if rows else None


def evaluated_while_training(data: RunData, stage: str) -> list[str]:
    """The pass@k metrics that the stage logged while it trained, by k, without their prefix."""
    prefix = f"{stage}/eval/"
    logged = {name for record in data.metrics[stage] for name in record.metrics}
    names = (name.removeprefix(prefix) for name in logged if name.startswith(prefix))
    return pass_at_k_names(name for name in names if "/" not in name)


def pass_at_k_over_steps(data: RunData, stage: str) -> Chart:
    """pass@k of the weights in training, each in the band of its interval."""
    figure, axes = new_axes(x_label=f"{stage.upper()} step", y_label="fraction of problems")
    for index, name in enumerate(evaluated_while_training(data, stage)):
        colour = _K_COLOURS[index % len(_K_COLOURS)]
        metric = f"{stage}/eval/{name}"
        steps, values = data.series(stage, metric)
        low, high = (data.series(stage, f"{metric}/{end}")[1] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(steps, values, color=colour, marker="o", label=metric_words(name))
    axes.set_ylim(0, 1.05)
    whole_steps(axes)
    legend(axes)
    which, level = "Problems", ""
    if data.config:
        settings = {"sft": data.config.sft.pass_at_k, "rl": data.config.rl.pass_at_k}[stage]
        which = f"The first {settings.num_problems} problems" if settings else which
        which = "All problems" if settings and settings.num_problems is None else which
        level = f"{100 * data.config.evaluate.confidence:g} % "
    caption = (
        f"{which} of the evaluation, held out; bands span the {level}interval over problems. "
        "Step 0 is the model that the stage begins with."
    )
    title = f"pass@k while {stage.upper()} trains"
    return chart(figure, title=title, caption=caption)


def example_problems(path: Path, suite: str) -> list[ExampleProblem]:
    """A few problems of a suite with sample 0 of every checkpoint, chosen by rule.

    The first problems, by id, whose sample 0 the last checkpoint got right and the first did not;
    then the first that the last checkpoint got wrong.
    """
    names = ["checkpoint", "problem_id", "sample_index", "reward_status"]
    # Two suites may ask the same problem; tables from before there were suites are of one.
    has_suites = "suite" in pq.read_schema(path).names
    in_suite: list[tuple[str, str, object]] = [("suite", "==", suite)] if has_suites else []
    table = pq.read_table(path, columns=names, filters=in_suite or None)
    rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    num_right = Counter((c, p) for c, p, _, status in rows if status == RewardStatus.OK)
    num_samples = Counter((c, p) for c, p, _, _ in rows)
    first_samples: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for checkpoint, problem, index, status in rows:
        if index == 0:
            first_samples[problem][checkpoint] = status
    chosen = _choose(first_samples)
    filters = [*in_suite, ("problem_id", "in", chosen), ("sample_index", "==", 0)]
    shown = pq.read_table(path, filters=filters) if chosen else EVALUATION_SAMPLES.empty_table()
    by_key = {(row["problem_id"], row["checkpoint"]): row for row in shown.to_pylist()}
    return [
        ExampleProblem(
            problem_id=problem,
            task=next(by_key[problem, c]["task"] for c in first_samples[problem]),
            question=next(by_key[problem, c]["question"] for c in first_samples[problem]),
            samples=[
                Sample(
                    checkpoint=CHECKPOINT_WORDS[checkpoint],
                    status=row["reward_status"],
                    num_right=num_right[checkpoint, problem],
                    num_samples=num_samples[checkpoint, problem],
                    completion=shorten(row["completion"]),
                    truncated=row["finish_reason"] == FinishReason.LENGTH,
                )
                for checkpoint in CHECKPOINTS
                if (row := by_key.get((problem, checkpoint)))
            ],
        )
        for problem in chosen
    ]


def shorten(text: str) -> str:
    """`text`, with its middle left out when it is longer than `SHOWN_CHARS`."""
    if len(text) <= SHOWN_CHARS:
        return text
    half = SHOWN_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _choose(first_samples: dict[str, dict[str, str]]) -> list[str]:
    improved, not_improved = [], []
    for problem in sorted(first_samples):
        statuses = first_samples[problem]
        done = [name for name in CHECKPOINTS if name in statuses]
        if not done:
            continue
        if statuses[done[-1]] != RewardStatus.OK:
            not_improved.append(problem)
        elif statuses[done[0]] != RewardStatus.OK:
            improved.append(problem)
    return improved[:_IMPROVED] + not_improved[:_NOT_IMPROVED]
