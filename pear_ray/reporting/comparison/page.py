"""`pear compare`: several runs on one page."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.errors import InputError
from pear_ray.reporting.comparison.config_diff import differing_settings
from pear_ray.reporting.comparison.pairs import paired_tables
from pear_ray.reporting.comparison.parts import build_parts
from pear_ray.reporting.comparison.runs import (
    ComparedRun,
    load_runs,
    shared_notes,
    suite_names,
)
from pear_ray.reporting.comparison.table import comparison_tree, final_figures, row_words
from pear_ray.reporting.comparison.words import headline
from pear_ray.reporting.page import Table, render_page, write_page
from pear_ray.reporting.plot import run_style
from pear_ray.reporting.words import (
    CHECKPOINT_WORDS,
    estimate_words,
    metric_words,
    pass_at_k_names,
)

_TEMPLATE = "compare.html.j2"


@dataclass(frozen=True, slots=True)
class Row:
    """A run in the table, with the line that stands for it in the figures."""

    label: str
    colour: str
    dashes: str
    settings: list[str]
    figures: list[str]
    note: str


def write_comparison(run_dirs: Sequence[Path], path: Path) -> None:
    """Write the comparison of the runs in `run_dirs` to `path`, whole or not at all.

    Raises:
        InputError: A folder is no run's, or is given twice; or `path` cannot be there.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; make it, or choose another --out")
    write_page(path, render_comparison(load_runs(run_dirs)))


def comparison_json(run_dirs: Sequence[Path]) -> str:
    """The page's tables as JSON. Errors as in `write_comparison`."""
    return json.dumps(comparison_tree(load_runs(run_dirs)), indent=2, allow_nan=False) + "\n"


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """The page as HTML; everything that comes from a run is escaped."""
    settings = differing_settings([run.config for run in runs])
    shown = final_figures(runs)
    rows = []
    for place, run in enumerate(runs):
        words = row_words(run, place, settings, shown)
        rows.append(Row(run.label, *run_style(place), *words, "; ".join(run.notes)))
    return render_page(
        _TEMPLATE,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(runs),
        headline=headline(runs),
        notes=shared_notes(runs),
        settings=[setting.key for setting in settings],
        figures=[each.header for each in shown],
        rows=rows,
        passes=[(suite, _passes(runs, suite)) for suite in suite_names(runs)],
        pairs=paired_tables(runs),
        parts=build_parts(runs),
        configs=[(run.label, str(run.run_dir), run.config_text) for run in runs],
    )


def _facts(runs: Sequence[ComparedRun]) -> list[tuple[str, str]]:
    """What all runs have in common."""
    facts = [("runs", str(len(runs)))]
    for words, key in (("policy", "models.policy"), ("behavior", "models.behavior")):
        values = {str(run.setting(key)) for run in runs}
        if len(values) == 1:
            facts.append((words, values.pop()))
    corpora = {run.manifests["score"].fingerprint for run in runs if "score" in run.manifests}
    if len(corpora) == 1:
        facts.append(("scored corpus", f"the same for all, {corpora.pop()}"))
    return facts


def _passes(runs: Sequence[ComparedRun], suite: str) -> Table:
    """One row per run that was evaluated on the suite, one column per pass@k and checkpoint."""
    evaluated = [(run.label, run.suites[suite].checkpoints) for run in runs if suite in run.suites]
    found = {
        (name, checkpoint)
        for _, checkpoints in evaluated
        for checkpoint, metrics in checkpoints.items()
        for name in metrics
    }
    columns = [
        (name, checkpoint)
        for name in pass_at_k_names({name for name, _ in found})
        for checkpoint in CHECKPOINTS
        if (name, checkpoint) in found
    ]
    return Table(
        ["run", *(f"{metric_words(name)}, {CHECKPOINT_WORDS[each]}" for name, each in columns)],
        [
            [
                label,
                *(
                    estimate_words(checkpoints[each][name])
                    if name in checkpoints.get(each, {})
                    else "-"
                    for name, each in columns
                ),
            ]
            for label, checkpoints in evaluated
        ],
    )
