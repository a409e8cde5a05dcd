"""What a run's gauges say, worked out from its progress; who exports them is not known here."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pear_ray.telemetry.follow import ProgressState, StageProgress, StageState
from pear_ray.telemetry.status import run_health

GAUGE_PREFIX = "pear_ray_"
LINGER_S = 60.0  # two scrapes of a Prometheus that looks twice a minute
# The gauges of a state give its place in these; the dashboard's words are made from them.
RUN_STATES = ("waiting", "running", "finished", "failed", "stopped", "silent", "dead")
STAGE_STATES = tuple(StageState)
DEAD = float(RUN_STATES.index("dead"))
# Metrics whose name has a part that varies: pattern, the gauge's metric, its tags. One gauge for
# all of them, so that a panel shows them side by side.
_FAMILIES = (
    (r"(\w+)/source/(?P<source>[^/]+)/(.+)", r"\1/source/\3"),
    (r"(\w+)/reward/(?P<component>[^/]+)/mean", r"\1/reward/component"),
    (r"memory/(?P<phase>.+)_gib", "memory/gib"),
    (r"time/(?P<phase>.+)_s", "time/s"),
    (
        r"((?:\w+/)?eval)/(?:(?P<suite>[^/]+)/)?(pass|mean|maj)_at_(?P<k>\d+)((?:/low|/high)?)",
        r"\1/\3_at_k\5",
    ),
)
_ABSENT = {"suite": "main"}  # the evaluation's own problems, which name no suite
_CHECKPOINTED = {"sft", "rl", "rl_train"}


@dataclass(frozen=True, slots=True)
class GaugeValue:
    """One number to export.

    Attributes:
        name: Of the gauge, as Prometheus allows them, without Ray's own prefix `ray_`.
        description: What it measures.
    """

    name: str
    description: str
    tags: Mapping[str, str]
    value: float


def gauges_of(state: ProgressState, *, now: float) -> list[GaugeValue]:
    """All gauges of a run whose driver lives, at the Unix time `now`.

    Of the run and of each stage how far they are; the ETA is that of `pear status`. Of a stage that
    runs, or ended less than `LINGER_S` ago, the latest value of every metric: an hour later they
    would only look as if it still went on. What is not finite has no gauge, for Ray drops it, but
    is counted in `stage_not_finite`.
    """
    found = _of_run(state, now)
    for index, stage in enumerate(state.stages.values(), start=1):
        found += _of_stage(state.run, stage, index, now)
    return found


def gauge_of(name: str) -> tuple[str, dict[str, str]]:
    """What the gauge of the metric `name` measures, and its tags besides run and stage.

    `sft/source/NAME/nll` is `sft/source/nll` with the tag `source`.
    """
    for pattern, metric in _FAMILIES:
        found = re.fullmatch(pattern, name)
        if found is not None:
            tags = {tag: value or _ABSENT[tag] for tag, value in found.groupdict().items()}
            return found.expand(metric), tags
    return name, {}


def of_a_dead_driver(values: list[GaugeValue]) -> list[GaugeValue]:
    """The last `values` of a driver that is gone: the run is dead, and none of its stages goes on.

    What is known of the stages stays as it was, but what would go on in a live run (an ETA, time
    that passes) is left out.
    """
    passing = {GAUGE_PREFIX + name for name in ("run_silent_s", "stage_eta_s", "stage_unsaved_s")}
    return [
        GaugeValue(one.name, one.description, one.tags, DEAD)
        if one.name == GAUGE_PREFIX + "run_state"
        else one
        for one in values
        if one.name not in passing
    ]


def _of_run(state: ProgressState, now: float) -> list[GaugeValue]:
    stages = list(state.stages.values())
    word = run_health(state, alive=True, now=now).word
    ended = [one for one in stages if one.state in {StageState.DONE, StageState.SKIPPED}]
    numbers = {
        "run_state": float(RUN_STATES.index(word)),
        "run_stages": float(len(stages)),
        "run_stages_done": float(len(ended)),
        "run_done_fraction": (len(ended) + sum(map(_part_done, stages))) / len(stages),
        "run_warnings": float(state.num_warnings),
    }
    if state.last_time is not None and len(ended) < len(stages):
        numbers["run_silent_s"] = max(0.0, now - state.last_time)
    return [_gauge(name, value, {"run": state.run}) for name, value in numbers.items()]


def _part_done(stage: StageProgress) -> float:
    """Of a running stage the share of its steps that is done; nothing of any other."""
    if stage.state is not StageState.RUNNING or not stage.num_steps:
        return 0.0
    return stage.step / stage.num_steps


def _of_stage(run: str, stage: StageProgress, index: int, now: float) -> Iterator[GaugeValue]:
    tags = {"run": run, "stage": stage.name}
    numbers = {
        "stage_index": float(index),
        "stage_state": float(STAGE_STATES.index(stage.state)),
    }
    if stage.state not in {StageState.WAITING, StageState.SKIPPED}:
        numbers |= {"stage_step": float(stage.step), "stage_steps": float(stage.num_steps)}
        numbers |= _passing(stage, now)
    for name, value in numbers.items():
        yield _gauge(name, value, tags)
    if _is_fresh(stage, now):
        yield from _metrics(stage, tags)


def _passing(stage: StageProgress, now: float) -> dict[str, float]:
    """What is known of the stage's time and speed."""
    eta_s, step_s = stage.eta_s(now), stage.step_s()
    began = stage.started if stage.started is not None else now
    numbers = {"stage_elapsed_s": (stage.finished or now) - began}
    if stage.state is not StageState.RUNNING:
        return numbers
    if eta_s is not None:
        numbers["stage_eta_s"] = eta_s
    if step_s is not None:
        numbers["stage_step_s"] = step_s
    if stage.tokens_per_s is not None:
        numbers["stage_tokens_per_s"] = stage.tokens_per_s
    if stage.name in _CHECKPOINTED:
        numbers["stage_unsaved_s"] = max(0.0, now - max(began, stage.checkpointed or began))
    return numbers


def _is_fresh(stage: StageProgress, now: float) -> bool:
    if stage.state in {StageState.WAITING, StageState.SKIPPED}:
        return False
    return stage.finished is None or now - stage.finished < LINGER_S


def _metrics(stage: StageProgress, tags: Mapping[str, str]) -> Iterator[GaugeValue]:
    missing = 0
    for name, value in stage.metrics.items():
        if not math.isfinite(value):
            missing += 1
            continue
        metric, more = gauge_of(name)
        yield _gauge(metric, value, {**tags, **more})
    yield _gauge("stage_not_finite", float(missing), tags)


def _gauge(metric: str, value: float, tags: Mapping[str, str]) -> GaugeValue:
    return GaugeValue(GAUGE_PREFIX + re.sub(r"\W", "_", metric), metric, tags, value)
