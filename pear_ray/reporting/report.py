"""`report.html`: what a run did, on one page."""

import time
from pathlib import Path

from pear_ray.config.evaluate import CHECKPOINTS, MAIN_SUITE
from pear_ray.config.sft import describe_weights
from pear_ray.errors import ArtifactError
from pear_ray.reporting.load import Evaluation, RunData, load_run_data
from pear_ray.reporting.outcome import ExampleProblem, example_problems
from pear_ray.reporting.page import Table, render_page, write_page
from pear_ray.reporting.rollouts.page import ShownStep, shown_steps
from pear_ray.reporting.sections import build_sections
from pear_ray.reporting.words import (
    CHECKPOINT_WORDS,
    estimate_words,
    metric_words,
    suite_words,
    summary_order,
    verdicts,
)
from pear_ray.telemetry.view import duration

SHOWN_WARNINGS = 40
_TEMPLATE = "report.html.j2"


def write_report(run_dir: Path, out_path: Path) -> None:
    """Write the report of the run in `run_dir` to `out_path`, whole or not at all.

    What a run has not made yet is named in its section; only a missing folder is an error.

    Raises:
        InputError: `run_dir` does not exist.
    """
    write_page(out_path, render_report(load_run_data(run_dir)))


def render_report(data: RunData) -> str:
    """The page as HTML; everything that comes from the run is escaped."""
    steps, no_steps = _rollouts(data)
    return render_page(
        _TEMPLATE,
        name=data.name,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(data),
        verdict=verdicts(data.suites, data.counts),
        no_verdict=data.missing.get("evaluation", "the evaluation holds no checkpoint"),
        suites=[(each, suite_words(each), _summary(each)) for each in data.suites],
        sections=build_sections(data),
        steps=steps,
        no_steps=no_steps,
        problems=_examples(data),
        warnings=[
            (time.strftime("%H:%M:%S", time.localtime(w.time)), w.stage, w.message)
            for w in data.warnings[-SHOWN_WARNINGS:]
        ],
        num_warnings=len(data.warnings),
        config_text=data.config_text,
        config_missing=data.missing.get("config", ""),
        stages=_stages(data),
        versions=_versions(data),
    )


def _examples(data: RunData) -> list[ExampleProblem]:
    """Completions of the first suite, where there are any."""
    suite = data.suites[0].suite if data.suites else MAIN_SUITE
    return example_problems(data.samples_path, suite) if data.samples_path else []


def _rollouts(data: RunData) -> tuple[list[ShownStep], str]:
    """The steps whose rollouts are shown, or why there are none."""
    try:
        steps = shown_steps(data.rollouts_path)
    except ArtifactError as error:
        return [], str(error)
    return steps, "" if steps else "no rollouts in rl/rollouts: run the stage `rl`"


def _facts(data: RunData) -> list[tuple[str, str]]:
    """What identifies the run at a glance."""
    config = data.config
    if config is None:
        return []
    rl = f"{config.rl.num_steps} steps, {config.rl.prompts_per_step} x {config.rl.group_size}"
    took = sum(m.finished - m.started for m in data.manifests.values())
    return [
        ("policy", config.models.policy),
        ("behavior", _behavior_words(config.models.behavior)),
        ("SFT weights", describe_weights(config.sft.weights)),
        ("SFT", f"{config.sft.num_epochs} epoch, {config.sft.global_batch_size} per step"),
        ("RL", rl),
        ("device", f"{config.cluster.device}, {config.cluster.num_trainers} trainers"),
        ("stages took", duration(took)),
    ]


def _summary(evaluation: Evaluation) -> Table:
    """One row per checkpoint, one column per metric."""
    done = [name for name in CHECKPOINTS if name in evaluation.checkpoints]
    names = summary_order({m for name in done for m in evaluation.checkpoints[name]})
    rows = []
    for name in done:
        estimates = evaluation.checkpoints[name]
        cells = [estimate_words(estimates[m], name=m) if m in estimates else "" for m in names]
        rows.append([CHECKPOINT_WORDS[name], *cells])
    return Table(["", *map(metric_words, names)], rows)


def _stages(data: RunData) -> Table:
    """One row per finished stage: when, how long, what it left, its fingerprint."""
    rows = [
        [
            stage,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.finished)),
            duration(manifest.finished - manifest.started),
            ", ".join(f"{name} {value:,g}" for name, value in sorted(manifest.counts.items())),
            manifest.fingerprint,
        ]
        for stage, manifest in data.manifests.items()
    ]
    return Table(["stage", "finished", "took", "counts", "fingerprint"], rows)


def _versions(data: RunData) -> Table:
    """Versions per package; stages that ran under different ones are told apart."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in data.manifests.items():
        for package, version in manifest.versions.items():
            found.setdefault((package, version), []).append(stage)
    everywhere = list(data.manifests)
    rows = [
        [package, version, "all stages" if stages == everywhere else ", ".join(stages)]
        for (package, version), stages in sorted(found.items())
    ]
    return Table(["package", "version", "used by"], rows)


def _behavior_words(behavior: str | dict[str, str] | None) -> str:
    if behavior is None:
        return "none: the corpus brings its log-probs"
    if isinstance(behavior, str):
        return behavior
    return ", ".join(f"{source}: {model}" for source, model in behavior.items())
