"""Planned durations, for people and for machines."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.run import RunConfig
from pear_ray.memory.durations import Duration, Workload, num_rows
from pear_ray.memory.pace import DEVICES, Pace

MINUTE_S, HOUR_S = 60, 3600
SMALL_S = 120  # below it seconds are said


def time_lines(
    config: RunConfig, durations: Sequence[Duration], pace: Pace | None, workload: Workload
) -> Iterator[str]:
    """The time of every phase, with all that it rests on."""
    if pace is None:
        yield f"time: not known; say which GPU with --device ({', '.join(DEVICES)})"
        return
    yield "time, an estimate, of:"
    yield f"  {pace.words}"
    yield (
        f"  assumed: {pace.training_share:.0%} of that FLOP/s in training, "
        f"{pace.prefill_share:.0%} over given tokens, {pace.decoding_share:.0%} of that bandwidth "
        "while tokens are sampled"
    )
    yield f"  {_rows_words(config, workload)}"
    yield f"  {_start_words(config)}"
    for each in durations:
        yield ""
        yield f"{each.phase}: {duration_words(each.seconds)}"
        width = max(len(part.name) for part in each.parts)
        for part in each.parts:
            yield f"  {part.name:<{width}}  {duration_words(part.seconds):>8}  {part.formula}"
    yield ""
    yield f"all phases: {duration_words(sum(each.seconds for each in durations))}"


def time_tree(durations: Sequence[Duration], pace: Pace | None) -> dict[str, Any] | None:
    """The same for machines; None where the pace is not known."""
    if pace is None:
        return None
    return {
        "pace": asdict(pace),
        "phases": [
            {
                "phase": each.phase,
                "seconds": each.seconds,
                "parts": [asdict(part) for part in each.parts],
            }
            for each in durations
        ],
    }


def duration_words(seconds: float) -> str:
    """Seconds for people: `12 s`, `3.5 min`, `7.2 h`."""
    if seconds < SMALL_S:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.1f} min"
    return f"{seconds / HOUR_S:.1f} h"


def _rows_words(config: RunConfig, workload: Workload) -> str:
    rows = num_rows(config, workload)
    if workload.num_rows is not None:
        origin = "as --rows says"
    elif isinstance(config.corpus, SampledCorpus):
        origin = "if every sample is kept; --rows says otherwise"
    else:
        origin = "not counted: say how many with --rows"
    completion = workload.completion_tokens
    sampled = "half of max_tokens" if completion is None else f"{completion:,} tokens"
    return (
        f"{rows:,} rows ({origin}) of {workload.row_tokens:,} tokens (--row-tokens), sampled "
        f"completions of {sampled} (--completion-tokens)"
    )


def _start_words(config: RunConfig) -> str:
    if config.cluster.device == "cpu":
        return "start-ups as the demo took; a stage that is current takes none of this"
    return (
        "without start-ups, checkpoints, kernel launches and what else is beside computing: "
        "nothing of it was measured on a GPU, and small models spend most of their time there"
    )
