"""`diagnose.json` and `diagnose.html`: a diagnosis for machines and for people."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pear_ray.artifacts.run_dir import write_json
from pear_ray.config.sft import describe_weights
from pear_ray.reporting.diagnosis import figures
from pear_ray.reporting.diagnosis.numbers import Diagnosis, SourceDiagnosis
from pear_ray.reporting.diagnosis.warnings import diagnosis_warnings, percent, verdict
from pear_ray.reporting.page import Table, render_page, write_page

JSON_FILE, HTML_FILE = "diagnose.json", "diagnose.html"
_TEMPLATE = "diagnosis.html.j2"


@dataclasses.dataclass(frozen=True, slots=True)
class _TitledTable:
    title: str
    table: Table
    legend: str


def write_diagnosis(
    diagnosis: Diagnosis, folder: Path, *, name: str, facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Write `diagnose.json` (every number) and `diagnose.html` to `folder`, each whole or not.

    Args:
        diagnosis: What to write.
        folder: Where; it exists.
        name: Heads the page: the run's name.
        facts: More to say under the heading, such as `("policy", config.models.policy)`.
    """
    write_json(folder / JSON_FILE, diagnosis_tree(diagnosis))
    write_page(folder / HTML_FILE, render_diagnosis(diagnosis, name=name, facts=facts))


def diagnosis_tree(diagnosis: Diagnosis) -> dict[str, Any]:
    """What `diagnose.json` holds."""
    warnings = diagnosis_warnings(diagnosis)
    return {
        "verdict": verdict(diagnosis, warnings),
        "warnings": [dataclasses.asdict(warning) for warning in warnings],
        "weights": diagnosis.weights.model_dump(),
        "is_assumed": diagnosis.is_assumed,
        "overall": dataclasses.asdict(diagnosis.overall),
        "sources": [dataclasses.asdict(source) for source in diagnosis.sources],
        "num_negative_rows": diagnosis.num_negative_rows,
        "proxy_sources": diagnosis.proxy_sources,
    }


def render_diagnosis(
    diagnosis: Diagnosis, *, name: str, facts: Sequence[tuple[str, str]] = ()
) -> str:
    """The page as HTML; everything that comes from the run is escaped."""
    warnings = diagnosis_warnings(diagnosis)
    rows = list(diagnosis.sources)
    if len(rows) > 1:
        rows.append(diagnosis.overall)
    return render_page(
        _TEMPLATE,
        name=name,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=[*facts, *_facts(diagnosis)],
        verdict=verdict(diagnosis, warnings),
        rescaled=diagnosis.weights.rescale != "none",
        warnings=warnings,
        charts=[
            figures.log_ratio_histogram(diagnosis),
            figures.weights_by_position(diagnosis),
            figures.discount_by_length(diagnosis),
        ],
        tables=[_log_ratios(rows), _weights(rows), _lengths(rows)],
        negatives=", ".join(
            f"{count:,} rows of {source}" for source, count in diagnosis.num_negative_rows.items()
        ),
    )


def _facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    weights, overall = diagnosis.weights, diagnosis.overall
    level = describe_weights(weights)
    if weights.level == "block":
        level += f", {weights.block_size} tokens"
    if weights.level != "sequence":
        level += f", gamma {weights.gamma:g}"
    return [
        ("rows", f"{overall.num_rows:,}"),
        ("loss tokens", f"{overall.num_loss_tokens:,}"),
        ("weights", f"{level}{' (assumed)' if diagnosis.is_assumed else ''}"),
        ("log-ratio clip", f"{weights.log_ratio_clip_low:g} to {weights.log_ratio_clip_high:g}"),
        ("log-weight clip", f"{weights.log_weight_clip_low:g} to {weights.log_weight_clip_high:g}"),
    ]


def _log_ratios(sources: Sequence[SourceDiagnosis]) -> _TitledTable:
    rows = [
        [
            source.source,
            f"{source.num_rows:,}",
            f"{source.num_loss_tokens:,}",
            f"{health['log_ratio/mean']:.3f}",
            f"{health['log_ratio/std']:.3f}",
            _quantiles(health, "log_ratio", digits=3),
            percent(health["log_ratio_clip_low_fraction"]),
            percent(health["log_ratio_clip_high_fraction"]),
            f"{source.clipped_log_ratio_mean:+.4f}",
        ]
        for source in sources
        for health in (source.health,)
    ]
    headers = ["", "rows", "loss tokens", "mean", "std", "5 %, 50 %, 95 %"]
    return _TitledTable(
        "Log-ratios",
        Table([*headers, "clipped low", "clipped high", "drift"], rows),
        "Policy minus behavior log-prob per loss token, before clipping; quantiles are read off a "
        "histogram. Drift is the mean after clipping: what a token adds, on average, to the "
        "log-weight of those before it.",
    )


def _weights(sources: Sequence[SourceDiagnosis]) -> _TitledTable:
    rows = [
        [
            source.source,
            f"{health['weight/mean']:.3g}",
            _quantiles(health, "log_weight", digits=2),
            percent(health["log_weight_floor_fraction"]),
            percent(health["log_weight_ceiling_fraction"]),
            percent(health["ess_fraction"]),
            percent(health["sequence_ess_fraction"]),
            percent(health["last_tenth_weight_share"]),
            percent(source.weight_share),
            percent(source.token_share),
        ]
        for source in sources
        for health in (source.health,)
    ]
    headers = ["", "mean", "log-weight 5 %, 50 %, 95 %", "at floor", "at ceiling"]
    return _TitledTable(
        "Weights",
        Table(
            [*headers, "ESS", "ESS in a row", "in last tenth", "of all weight", "of all tokens"],
            rows,
        ),
        "ESS is the effective sample size as a share of the loss tokens: 100 % when all weigh the "
        "same; in a row, its mean over single rows. The last two columns are the source's shares "
        "of all weight and of all loss tokens.",
    )


def _lengths(sources: Sequence[SourceDiagnosis]) -> _TitledTable:
    rows = [
        [
            source.source,
            f"{source.mean_completion_length:,.1f}",
            *(
                f"{length:,}: {source.perfect_ratio_mean_weights[name]:.2f}"
                for name, length in source.completion_lengths.items()
            ),
        ]
        for source in sources
    ]
    return _TitledTable(
        "Lengths and the discount",
        Table(["", "mean length", "shortest", "5 %", "50 %", "95 %", "longest"], rows),
        "Loss tokens of a completion, and after the colon the mean weight that the discount leaves "
        "at that length when the policy agrees with every token.",
    )


def _quantiles(health: dict[str, float], name: str, *, digits: int) -> str:
    return ", ".join(f"{health[f'{name}/{q}']:.{digits}f}" for q in ("p05", "p50", "p95"))
