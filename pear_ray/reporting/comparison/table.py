"""The numbers that runs end with, to read and for machines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.reporting.comparison.config_diff import Setting, differing_settings
from pear_ray.reporting.comparison.pairs import paired_runs
from pear_ray.reporting.comparison.runs import ComparedRun, shared_notes
from pear_ray.telemetry.view import duration

_LAST_SHARE = 10  # a number of every step is the mean over the last tenth of the steps


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of every run.

    Attributes:
        name: In the JSON.
        header: On the page.
        of: The number; NaN where the run has none.
        words: How it is read.
    """

    name: str
    header: str
    of: Callable[[ComparedRun], float]
    words: Callable[[float], str]


def final_figures(runs: Sequence[ComparedRun]) -> list[Figure]:
    """The numbers that any of `runs` has."""
    return [each for each in FIGURES if any(math.isfinite(each.of(run)) for run in runs)]


def comparison_tree(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The comparison as JSON: what is null was not measured."""
    settings = differing_settings([run.config for run in runs])
    figures = final_figures(runs)
    return {
        "notes": shared_notes(runs),
        "runs": [
            {
                "run": run.label,
                "folder": str(run.run_dir),
                "settings": {setting.key: setting.values[place] for setting in settings},
                "figures": {each.name: _or_none(each.of(run)) for each in figures},
                "evaluation": _evaluated(run),
                "minus_first": _paired(runs[0], run) if place else {},
                "notes": run.notes,
            }
            for place, run in enumerate(runs)
        ],
    }


def row_words(
    run: ComparedRun, place: int, settings: Sequence[Setting], figures: Sequence[Figure]
) -> tuple[list[str], list[str]]:
    """The row of the run at `place`: its settings and its figures, in words."""
    values = [(each, each.of(run)) for each in figures]
    return (
        [setting.words[place] for setting in settings],
        [each.words(value) if math.isfinite(value) else "-" for each, value in values],
    )


def last_value(run: ComparedRun, stage: str, name: str) -> float:
    """The last value that was logged; NaN where none was."""
    values = run.series(stage, name)[1]
    return float(values[-1]) if len(values) else math.nan


def _last_tenth(stage: str, name: str) -> Callable[[ComparedRun], float]:
    """The mean over the last tenth of the steps: one step's batch is a small sample."""

    def of(run: ComparedRun) -> float:
        values = run.series(stage, name)[1]
        values = values[-max(1, len(values) // _LAST_SHARE) :]
        return float(np.mean(values)) if len(values) else math.nan

    return of


def _last(stage: str, name: str) -> Callable[[ComparedRun], float]:
    return lambda run: last_value(run, stage, name)


def _steps(run: ComparedRun) -> float:
    records = run.metrics["sft"]
    return float(records[-1].step) if records else math.nan


def _tokens_per_s(run: ComparedRun) -> float:
    values = run.series("sft", "sft/tokens_per_s")[1]
    return float(np.median(values)) if len(values) else math.nan


def _seconds(stage: str) -> Callable[[ComparedRun], float]:
    def of(run: ComparedRun) -> float:
        made = run.manifests.get(stage)
        return made.finished - made.started if made else math.nan

    return of


def _warnings(run: ComparedRun) -> float:
    return float(run.num_warnings) if run.num_warnings else math.nan


def _evaluated(run: ComparedRun) -> dict[str, Any]:
    """By suite, checkpoint and metric."""
    return {
        suite: {
            checkpoint: {name: asdict(estimate) for name, estimate in metrics.items()}
            for checkpoint, metrics in evaluation.checkpoints.items()
            if checkpoint in CHECKPOINTS
        }
        for suite, evaluation in run.suites.items()
    }


def _paired(first: ComparedRun, run: ComparedRun) -> dict[str, Any]:
    """pass@1 minus the first run's, problem by problem, by suite and checkpoint."""
    return {
        suite: {name: asdict(each) for name, each in found.items()}
        for suite in run.suites
        if (
            found := {
                name: each
                for name in CHECKPOINTS
                if (each := paired_runs(first, run, suite, name)) is not None
            }
        )
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _short(value: float) -> str:
    return f"{value:#.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


FIGURES = (
    Figure("heldout_nll", "held-out nll", _last("sft", "sft/heldout/nll"), _nats),
    Figure(
        "heldout_weighted_nll",
        "weighted held-out nll",
        _last("sft", "sft/heldout/weighted_nll"),
        _nats,
    ),
    Figure("train_nll", "train nll", _last_tenth("sft", "sft/nll"), _nats),
    Figure("grad_norm", "gradient norm", _last_tenth("sft", "sft/grad_norm"), _short),
    Figure("weight_mean", "mean weight", _last_tenth("sft", "sft/weight/mean"), _short),
    Figure("ess_fraction", "ESS / tokens", _last_tenth("sft", "sft/ess_fraction"), _short),
    Figure("rl_reward", "RL reward", _last_tenth("rl", "rl/reward/mean"), _short),
    Figure("rl_correct", "RL correct", _last_tenth("rl", "rl/correct_fraction"), _short),
    Figure("sft_steps", "SFT steps", _steps, _whole),
    Figure("sft_tokens_per_s", "SFT tokens/s", _tokens_per_s, _whole),
    Figure("sft_s", "SFT took", _seconds("sft"), duration),
    Figure("rl_s", "RL took", _seconds("rl"), duration),
    Figure("num_warnings", "warnings", _warnings, _whole),
)
