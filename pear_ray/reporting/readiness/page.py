"""`ready.json` and `ready.html`: a checkpoint's readiness for machines, people and terminals."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pear_ray.artifacts.run_dir import write_json
from pear_ray.config.run import RunConfig
from pear_ray.reporting.diagnosis.warnings import percent
from pear_ray.reporting.page import Table, render_page, write_page
from pear_ray.reporting.readiness import figures
from pear_ray.reporting.readiness.advice import interval, readiness_advice, verdict
from pear_ray.reporting.readiness.numbers import Readiness, readiness_tree

JSON_FILE, HTML_FILE = "ready.json", "ready.html"
_TEMPLATE = "readiness.html.j2"


def write_readiness(
    found: Readiness, folder: Path, *, config: RunConfig, measured: Mapping[str, Any]
) -> None:
    """Write `ready.json` (every number) and `ready.html` to `folder`, each whole or not.

    Args:
        found: What to write.
        folder: Where; it exists.
        config: The run.
        measured: The hand-over's `reload_gap` and `engine_gap`, in nats per token; None where the
            checkpoint had no record to compare with.
    """
    advice = readiness_advice(found)
    gate = [_gap_words("reload", measured), _gap_words("engine", measured)]
    tree = {
        "verdict": verdict(found, advice),
        "advice": [dataclasses.asdict(each) for each in advice],
        "handover": {name: measured[name] for name in ("reload_gap", "engine_gap")},
        "lines": [*_lines(found).items(), ("hand-over", "; ".join(gate))],
    }
    write_json(folder / JSON_FILE, tree | readiness_tree(found))
    html = render_page(
        _TEMPLATE,
        name=config.name,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(found, config),
        verdict=tree["verdict"],
        advice=advice,
        charts=[
            figures.outcomes(found),
            figures.group_sizes(found),
            figures.pass_curve(found),
            figures.lengths(found),
            *([figures.probe(found.probe)] if found.probe else []),
        ],
        numbers=Table(["", "found"], [list(line) for line in tree["lines"]]),
        tasks=_tasks(found),
    )
    write_page(folder / HTML_FILE, html)


def readiness_text(folder: Path) -> str:
    """What `ready.json` in `folder` says, in lines for a terminal."""
    tree = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    lines = [f"{name:<16} {words}" for name, words in tree["lines"]]
    for each in tree["advice"]:
        lines += ["", f"! {each['headline']}", f"  {each['message']}"]
        lines += [f"  - {option.replace('`', '')}" for option in each["options"]]
    return "\n".join([*lines, "", tree["verdict"], ""])


def _facts(found: Readiness, config: RunConfig) -> list[tuple[str, str]]:
    return [
        ("policy", config.models.policy),
        ("prompts", f"{found.num_prompts:,} of {found.num_steps} steps"),
        ("completions", f"{found.num_completions:,}, {found.group_size} per prompt"),
        ("temperature", f"{found.temperature:g}"),
        ("max_tokens", f"{found.max_tokens:,}"),
        ("advantage", found.advantage),
    ]


def _lines(found: Readiness) -> dict[str, str]:
    """The numbers in words, most telling first."""
    last = max(found.pass_at)
    shown = [k for k in sorted(found.pass_at) if k in {1, last} or not k & (k - 1)]
    median, p95, longest = found.length_quantiles
    sizes = (f"{size}: {percent(share)}" for size, share in found.mixed_at.items())
    lines = {
        "mixed groups": f"{interval(found.mixed)} at a group size of {found.group_size}",
        "always fail": interval(found.always_fail),
        "always pass": interval(found.always_pass),
        "by group size": ", ".join(sizes),
        "pass@k": ", ".join(_pass_words(found, k) for k in shown),
        "gradient": f"{found.groups_per_step:.1f} of {found.prompts_per_step} groups per step, "
        f"mean |advantage| {found.advantage_abs_mean:.3f} ({found.advantage}), "
        f"{percent(found.learning_tokens)} of the tokens have one",
        "reward": f"mean {found.reward_mean:.3f}, {percent(found.errored)} errored",
        "entropy": f"{found.entropy:.3f} nats per token (token mean)",
        "length": f"mean {found.length_mean:.1f}, median {median:g}, p95 {p95:.0f}, longest "
        f"{longest:,.0f} tokens",
        "truncated": f"{percent(found.truncated)} at {found.max_tokens} tokens",
    }
    if found.probe is not None:
        change = found.probe.change
        tells = change.low > 0 or change.high < 0
        lines["probe"] = (
            f"mean reward {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] from the "
            f"earlier to the later half, {found.probe.num_rising} of {len(found.probe.rewards)} "
            f"seeds rose{'' if tells else ': too short to tell'}"
        )
    if found.drift is not None:
        drift = found.drift
        each = drift.kl_per_token
        note = (
            ""
            if found.temperature == 1.0
            else (f", at temperature 1 on samples at {found.temperature:g}")
        )
        lines["drift from base"] = (
            f"KL {each.value:.3f} [{each.low:.3f}, {each.high:.3f}] nats per token (k3: "
            f"{drift.k3_per_token:.3f}), {drift.kl_per_completion:.2f} per completion, over "
            f"{drift.num_completions:,}{note}"
        )
    return lines


def _pass_words(found: Readiness, k: int) -> str:
    each = found.pass_at[k]
    return f"{k}: {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"


def _gap_words(name: str, measured: Mapping[str, Any]) -> str:
    gap = measured[f"{name}_gap"]
    if gap is None:
        return f"{name}: not compared, the checkpoint has no handover.json"
    return f"{name}: log-probs within {gap:.1g} nats of the trainer's"


def _tasks(found: Readiness) -> Table:
    """Each game or set."""
    rows = [
        [task, f"{num:,}", f"{rate:.3f}", percent(mixed)]
        for task, (num, rate, mixed) in found.by_task.items()
    ]
    return Table(["task", "prompts", "pass@1", "mixed groups"], rows)
