"""`pear inspect` of rollouts: steps in one table, then the groups of one step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pear_ray.errors import InputError
from pear_ray.records import RewardStatus
from pear_ray.reporting.rollouts.facts import StepFacts, step_facts
from pear_ray.reporting.token_view import (
    TokenRow,
    logprob_scale,
    printable,
    render_legend,
    render_tokens,
)

SHOWN_STEPS = 24  # of a longer run: evenly spread, the first and the last among them
_SCALE = logprob_scale("behavior log-prob")


def render_rollouts(
    steps: Mapping[int, Path],
    *,
    step: int | None,
    num_groups: int,
    texts_of: Callable[[Sequence[int]], Sequence[str]],
    notes: Sequence[str],
) -> Iterator[RenderableType]:
    """What each step sums up to, then the first groups of one step.

    Args:
        steps: Files by step.
        step: Which to show; the last if None.
        num_groups: How many of its groups.
        texts_of: The text of each token.
        notes: What the legend is to say besides.

    Raises:
        InputError: There is no such step.
        ArtifactError: A file cannot be read.
    """
    shown = max(steps) if step is None else step
    if shown not in steps:
        raise InputError(
            f"--step {shown}: no rollouts of it; there are {len(steps)} steps, "
            f"{min(steps)} to {max(steps)}: give one that is there"
        )
    yield _steps_table([step_facts(steps[each]) for each in _spread(list(steps), shown)], shown)
    rows = sorted(
        pq.read_table(steps[shown], filters=[("group", "<", num_groups)]).to_pylist(),
        key=lambda row: (row["group"], row["sample_index"]),
    )
    if rows:
        yield render_legend(_SCALE, weighted=False, note="; ".join(notes))
    last = None
    for row in rows:
        if row["group"] != last:
            yield _question(row)
            last = row["group"]
        ids = row["token_ids"]
        tokens = TokenRow(
            heading_of(row), texts_of(ids), [True] * len(ids), row["behavior_logprobs"]
        )
        yield render_tokens(tokens, _SCALE)


def heading_of(row: Mapping[str, Any]) -> str:
    """A completion in a line: reward by component, advantage, end, length, sampler and trainer."""
    told = [f"completion {row['sample_index']}: {reward_words(row)}"]
    if row["advantage"] is not None:
        told.append(f"advantage {row['advantage']:+.3f}")
    told.append(f"ended by {row['finish_reason']} after {len(row['token_ids'])} tokens")
    if row["proximal_logprobs"]:
        gaps = np.subtract(row["proximal_logprobs"], row["behavior_logprobs"], dtype=np.float64)
        ratios = np.exp(gaps)
        told.append(
            f"trainer to sampler: ratio mean {ratios.mean():.4f}, {ratios.min():.4f} to "
            f"{ratios.max():.4f}, gap mean {np.abs(gaps).mean():.2g}, max {np.abs(gaps).max():.2g}"
        )
    return ", ".join(told)


def reward_words(row: Mapping[str, Any]) -> str:
    """The reward with its components, or why there is none."""
    status, detail = row["reward_status"], row["reward_detail"]
    if status == RewardStatus.ERRORED:
        return f"reward errored ({detail.strip().splitlines()[-1] if detail.strip() else 'why?'})"
    components = ", ".join(f"{name} {value:g}" for name, value in row["reward_components"])
    outcome = "right" if status == RewardStatus.OK else "wrong"
    return f"{outcome}, reward {row['reward_value']:.3f} ({components})"


def _question(row: Mapping[str, Any]) -> Text:
    text = Text()
    text.append(f"group {row['group']}: {row['task']} {printable(row['problem_id'])}", "bold cyan")
    text.append(f", policy version {row['policy_version']}\n", "dim")
    text.append(printable(row["question"]))
    return text


def _steps_table(facts: Sequence[StepFacts], shown: int) -> Table:
    names = list(dict.fromkeys(name for each in facts for name in each.component_sums))
    # A hundred columns hold it with several components, in a terminal and on a page.
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    columns = ["step", "policy", "groups", "reward", *names, "right", "errored"]
    columns += ["equal", "cut", "length", "mean gap", "max gap"]
    for column in columns:
        table.add_column(printable(column), justify="right", no_wrap=True)
    for each in facts:
        judged = max(1, each.num_judged)
        gaps = None if each.gaps is None else np.abs(each.gaps)
        cells = [
            f"{each.step:,}",
            "-".join(map(str, dict.fromkeys((each.versions[0], each.versions[-1])))),
            f"{each.num_groups:,} of {each.num_rollouts // each.num_groups:,}",
            f"{each.reward_sum / judged:.3f}",
            *(f"{each.component_sums.get(name, 0.0) / judged:.3f}" for name in names),
            f"{100 * each.statuses[RewardStatus.OK] / judged:.1f} %",
            f"{100 * each.statuses[RewardStatus.ERRORED] / each.num_rollouts:.1f} %",
            f"{100 * each.num_degenerate / each.num_groups:.0f} %",
            f"{100 * each.num_truncated / each.num_rollouts:.1f} %",
            f"{each.lengths.mean():.1f}",
            "" if gaps is None else f"{gaps.mean():.2g}",
            "" if gaps is None else f"{gaps.max():.2g}",
        ]
        table.add_row(*cells, style="bold" if each.step == shown else "")
    return table


def _spread(steps: list[int], shown: int) -> list[int]:
    """At most `SHOWN_STEPS` of them and `shown`."""
    if len(steps) <= SHOWN_STEPS:
        return steps
    places = np.linspace(0, len(steps) - 1, SHOWN_STEPS).round().astype(int)
    return sorted({*(steps[place] for place in places), shown})
