"""What a comparison reads of each run, and what has to be said of runs that are not alike."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.artifacts.manifest import UNFINISHED_FILE, Manifest, read_manifest
from pear_ray.config.evaluate import MAIN_SUITE
from pear_ray.config.yaml12 import YamlError, parse
from pear_ray.errors import ArtifactError, InputError
from pear_ray.records import STAGES
from pear_ray.reporting.load import CONFIG_FILE, Evaluation, Floats, load_suites, series
from pear_ray.reporting.paired import Counts, load_counts
from pear_ray.telemetry.metrics_log import (
    METRICS_FILE,
    EventKind,
    EventRecord,
    MetricRecord,
    Record,
    latest_by_step,
    read_metrics,
)

# Of a suite's settings, what decides pass@k beside the numbers: `k` and `seed` do not.
_DECIDES = ("problems", "content", "first_prompt", "rewards")
_NO_CHANGE = {EventKind.WARNING, EventKind.WAITING, EventKind.WAITED}  # of state
_TRAINED = ("sft", "rl", "evaluate")  # what a comparison looks at


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        label: Its name, with as much of its folder as tells it from the others.
        config: Its resolved config, as it stands on disk: an older version's is no error.
        metrics: Per stage, one record per step.
        manifests: Of the stages that are complete.
        suites: What it was evaluated on, if on anything, by name.
        counts: Its samples of each problem, by suite and checkpoint.
        num_warnings: Warnings of `sft` and `rl`.
        notes: What is not as in a run that went through.
    """

    label: str
    run_dir: Path
    config: dict[str, Any]
    config_text: str
    metrics: dict[str, list[MetricRecord]]
    manifests: dict[str, Manifest]
    suites: dict[str, Evaluation]
    counts: dict[tuple[str, str], Counts]
    num_warnings: int
    notes: list[str]

    def series(self, stage: str, name: str) -> tuple[Floats, Floats]:
        """Steps and values of one metric, NaN where the value is not finite."""
        return series(self.metrics[stage], name)

    def setting(self, key: str) -> Any:
        """The value at the dotted `key`; None where the config has none."""
        node: Any = self.config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node


def load_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """The runs in `run_dirs`, in that order; what they have not made yet is noted.

    Raises:
        InputError: A folder is no run's, or is given twice.
    """
    folders = [folder.resolve() for folder in run_dirs]
    for folder, given in zip(folders, run_dirs, strict=True):
        if folders.count(folder) > 1:
            raise InputError(f"{given}: given twice; name each run's folder once")
    labels = _labels(folders)
    return [_load(folder, label) for folder, label in zip(folders, labels, strict=True)]


def shared_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """What hinders a comparison of `runs`, in sentences; nothing where they are alike."""
    return [
        f"{words}: {grouped}."
        for words, key in _SHARED.items()
        if (grouped := _grouped([run for run in runs if key(run)], key))
    ] + [*_differing_suites(runs), *_one_sft(runs)]


def _differing_suites(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """A sentence for each suite that is not of one kind for all runs that were evaluated on it."""
    for suite in suite_names(runs):

        def of(run: ComparedRun, suite: str = suite) -> Hashable:
            return evaluated_on(run, suite)

        if grouped := _grouped([run for run in runs if of(run)], of):
            named = "" if suite == MAIN_SUITE else f" of suite {suite}"
            yield (
                f"The evaluations{named} differ (problems, prompts, samples, temperature, token "
                f"limit or verifiers), so pass@k is not of the same task: {grouped}."
            )


def _one_sft(runs: Sequence[ComparedRun]) -> list[str]:
    """A sentence for each SFT that several runs hold: their figures agree because they are one."""
    groups: dict[Hashable, list[str]] = {}
    for run in runs:
        if made := run.manifests.get("sft"):
            groups.setdefault((made.fingerprint, made.finished), []).append(run.label)
    return [
        f"One and the same SFT, taken over from run to run: {', '.join(labels)}."
        for labels in groups.values()
        if len(labels) > 1
    ]


def heldout_rows(run: ComparedRun) -> Hashable:
    """What decides which rows are held out; None where none are."""
    count = run.setting("sft.heldout_rows")
    return (_rows(run), run.setting("seed"), count) if count else None


def evaluated_on(run: ComparedRun, suite: str) -> Hashable:
    """What pass@k of the suite is of; None where the run was not evaluated on it."""
    found = run.suites.get(suite)
    if found is None:
        return None
    counts = (found.num_problems, found.num_samples, found.temperature, found.max_tokens)
    written = {key: each for key, each in found.settings.items() if key in _DECIDES}
    # Results from before there were suites do not say what their problems are.
    problems = written.get("problems") or run.setting("evaluate.problems")
    return (*counts, str(written | {"problems": problems}))


def suite_names(runs: Sequence[ComparedRun]) -> list[str]:
    """The suites that any run was evaluated on, in the order of the runs' results."""
    return list(dict.fromkeys(name for run in runs for name in run.suites))


def _rows(run: ComparedRun) -> str | None:
    return run.manifests["collect"].fingerprint if "collect" in run.manifests else None


def _scores(run: ComparedRun) -> str | None:
    return run.manifests["score"].fingerprint if "score" in run.manifests else None


def _batch_size(run: ComparedRun) -> Hashable:
    return run.setting("sft.global_batch_size")


def _versions(run: ComparedRun) -> Hashable:
    return tuple(sorted(run.manifests["sft"].versions.items())) if "sft" in run.manifests else None


_SHARED: dict[str, Callable[[ComparedRun], Hashable]] = {
    "The runs' corpora differ (`collect` has different fingerprints), so losses, held-out ones "
    "included, are not known to be of the same text": _rows,
    "The runs' scored corpora differ (`score` has different fingerprints), so weights and weighted "
    "losses are not known to rest on the same behavior log-probs": _scores,
    "Held-out rows are not known to be the same (the corpus, `seed` or `sft.heldout_rows` "
    "differs), so neither are held-out figures": heldout_rows,
    "A step has not the same number of sequences (`sft.global_batch_size` differs), so curves over "
    "steps do not see data at one pace": _batch_size,
    "`sft` was made with different package versions": _versions,
}


def _grouped(runs: Sequence[ComparedRun], key: Callable[[ComparedRun], Hashable]) -> str:
    """`a, b; c` for runs of which a and b have the same key; nothing where all have."""
    groups: dict[Hashable, list[str]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run.label)
    return "; ".join(", ".join(group) for group in groups.values()) if len(groups) > 1 else ""


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell all of them apart."""
    most = max(len(folder.parts) for folder in folders)
    for depth in range(1, most):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _load(run_dir: Path, label: str) -> ComparedRun:
    config_text = _config_text(run_dir)
    config = _parsed(config_text, run_dir)
    metrics_path = run_dir / METRICS_FILE
    records: list[Record] = read_metrics(metrics_path) if metrics_path.exists() else []
    metrics = {stage: latest_by_step(records, stage) for stage in STAGES}
    manifests = {stage: read_manifest(run_dir / stage) for stage in STAGES}
    notes = list(_unfinished(run_dir, metrics, records))
    suites: list[Evaluation] = []
    samples = run_dir / "evaluate" / "samples.parquet"
    if (run_dir / "evaluate" / "results.json").exists():
        try:
            suites = load_suites(run_dir / "evaluate")
        except ArtifactError as error:
            notes.append(str(error))
    return ComparedRun(
        label=label,
        run_dir=run_dir,
        config=config,
        config_text=config_text,
        metrics=metrics,
        manifests={stage: made for stage, made in manifests.items() if made},
        suites={each.suite: each for each in suites},
        counts=load_counts(samples) if samples.exists() else {},
        num_warnings=sum(
            isinstance(r, EventRecord) and r.event is EventKind.WARNING and r.stage in _TRAINED
            for r in records
        ),
        notes=notes,
    )


def _config_text(run_dir: Path) -> str:
    try:
        return (run_dir / CONFIG_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{run_dir}: no run's folder, or one that never started ({CONFIG_FILE}: "
            f"{error.strerror}); give the folders of runs, such as outputs/demo"
        ) from error


def _parsed(config_text: str, run_dir: Path) -> dict[str, Any]:
    try:
        tree = parse(config_text)
    except YamlError as error:
        raise InputError(f"{run_dir / CONFIG_FILE}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(
            f"{run_dir / CONFIG_FILE}: expected a resolved config, got {type(tree).__name__}; give "
            "the folders of runs, such as outputs/demo"
        )
    return tree


def _unfinished(
    run_dir: Path, metrics: dict[str, list[MetricRecord]], records: Sequence[Record]
) -> Iterator[str]:
    """A sentence for each stage that was begun and is not complete, and for an SFT never begun."""
    last_events = {
        record.stage: record
        for record in records
        if isinstance(record, EventRecord) and record.event not in _NO_CHANGE
    }
    for stage in STAGES:
        if (run_dir / stage / UNFINISHED_FILE).exists():
            last = metrics[stage][-1:]
            where = f" at step {last[0].step} of {last[0].num_steps}" if last else ""
            event = last_events.get(stage)
            failed = event is not None and event.event is EventKind.STAGE_FAILED
            why = f"; it failed: {event.message}" if event and failed else ""
            yield f"{stage} is unfinished{where}{why}"
        elif stage == "sft" and read_manifest(run_dir / stage) is None:
            yield "sft has not begun"
