"""What a run's gauges say: the numbers of `pear status`, of every state that a run can be in."""

import math

import pytest

from pear_ray.telemetry.follow import ProgressState
from pear_ray.telemetry.gauges import (
    LINGER_S,
    RUN_STATES,
    STAGE_STATES,
    gauge_of,
    gauges_of,
    of_a_dead_driver,
)
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, MetricRecord


def metric(time, step, metrics, *, stage="rl", num_steps=10):
    return MetricRecord(time, "demo", stage, 1, step, num_steps, metrics)


def event(time, kind, *, stage="rl", message=""):
    return EventRecord(time, "demo", stage, 1, kind, message)


def folded(*records, stages=("score", "sft", "rl")):
    state = ProgressState(stages)
    for record in records:
        state.fold(record)
    return state


SKIPPED = (
    event(0, EventKind.STAGE_SKIPPED, stage="score"),
    event(1, EventKind.STAGE_SKIPPED, stage="sft"),
)


def exported(values):
    """By name and the tags beside the run; a series that is set twice is an error."""
    found = {}
    for one in values:
        assert one.tags["run"] == "demo"
        key = (one.name, *(value for tag, value in one.tags.items() if tag != "run"))
        assert key not in found
        found[key] = one.value
    return found


def test_a_running_stage_says_how_far_it_is_and_when_it_will_be_done():
    state = folded(
        *SKIPPED,
        event(100, EventKind.STAGE_STARTED),
        *(metric(t, s, {"rl/tokens_per_s": 50.0}) for t, s in [(110, 1), (120, 2), (130, 3)]),
        event(131, EventKind.WARNING),
    )
    found = exported(gauges_of(state, now=134))
    assert {key: value for key, value in found.items() if "stage" in key[0] and "rl" in key} == {
        ("pear_ray_stage_index", "rl"): 3,
        ("pear_ray_stage_state", "rl"): STAGE_STATES.index("running"),
        ("pear_ray_stage_step", "rl"): 3,
        ("pear_ray_stage_steps", "rl"): 10,
        ("pear_ray_stage_elapsed_s", "rl"): 34,
        ("pear_ray_stage_eta_s", "rl"): 66,  # 7 steps of 10 s, less the 4 s since the last
        ("pear_ray_stage_step_s", "rl"): 10,
        ("pear_ray_stage_tokens_per_s", "rl"): 50,
        ("pear_ray_stage_unsaved_s", "rl"): 34,  # no checkpoint: since it started
        ("pear_ray_stage_not_finite", "rl"): 0,
    }
    assert found["pear_ray_stage_eta_s", "rl"] == state.stages["rl"].eta_s(134)
    assert found["pear_ray_run_state",] == RUN_STATES.index("running")
    assert (found["pear_ray_run_stages",], found["pear_ray_run_stages_done",]) == (3, 2)
    assert found["pear_ray_run_done_fraction",] == pytest.approx(2.3 / 3)
    assert found["pear_ray_run_warnings",] == 1
    assert found["pear_ray_run_silent_s",] == 3
    assert found["pear_ray_stage_state", "score"] == STAGE_STATES.index("skipped")
    assert ("pear_ray_stage_step", "score") not in found
    state.stages["rl"].checkpointed = 120.0
    assert exported(gauges_of(state, now=134))["pear_ray_stage_unsaved_s", "rl"] == 14


def test_the_numbers_of_an_ended_stage_go_and_its_state_stays():
    state = folded(
        event(0, EventKind.STAGE_STARTED),
        metric(5, 10, {"rl/loss": 0.5}),
        event(6, EventKind.STAGE_FINISHED),
    )
    soon, later = (exported(gauges_of(state, now=6 + wait)) for wait in (1, LINGER_S))
    assert soon["pear_ray_rl_loss", "rl"] == 0.5
    assert ("pear_ray_rl_loss", "rl") not in later
    assert later["pear_ray_stage_state", "rl"] == STAGE_STATES.index("done")
    assert later["pear_ray_stage_elapsed_s", "rl"] == 6
    assert ("pear_ray_stage_eta_s", "rl") not in soon


@pytest.mark.parametrize(
    ("records", "now", "word"),
    [
        ([], 5, "waiting"),
        ([*SKIPPED, event(2, EventKind.STAGE_SKIPPED)], 5, "finished"),
        ([*SKIPPED, event(2, EventKind.STAGE_FAILED)], 5, "failed"),
        ([*SKIPPED, event(2, EventKind.STAGE_STARTED)], 5, "running"),
        ([*SKIPPED, event(2, EventKind.STAGE_STARTED)], 5000, "silent"),
        ([*SKIPPED], 5, "running"),  # between stages
    ],
)
def test_the_runs_state_is_the_word_of_pear_status(records, now, word):
    state = folded(*records)
    state.run = "demo"
    found = exported(gauges_of(state, now=now))
    assert RUN_STATES[int(found["pear_ray_run_state",])] == word
    # What has ended is not silent: an alert would never stop.
    assert (("pear_ray_run_silent_s",) in found) == (word not in {"waiting", "finished"})


def test_of_a_dead_driver_nothing_goes_on():
    state = folded(
        event(0, EventKind.STAGE_STARTED), metric(1, 1, {}), metric(2, 2, {"rl/loss": 1})
    )
    alive = gauges_of(state, now=3)
    dead = exported(of_a_dead_driver(alive))
    assert RUN_STATES[int(dead["pear_ray_run_state",])] == "dead"
    assert exported(alive).keys() - dead.keys() == {
        ("pear_ray_run_silent_s",),
        ("pear_ray_stage_eta_s", "rl"),
        ("pear_ray_stage_unsaved_s", "rl"),
    }
    assert dead["pear_ray_rl_loss", "rl"] == 1


def test_what_is_not_finite_is_counted_not_exported():
    metrics = {"rl/loss": math.nan, "rl/ratio/max": math.inf, "rl/grad_norm": 2.0}
    found = exported(gauges_of(folded(metric(1, 1, metrics)), now=2))
    assert found["pear_ray_stage_not_finite", "rl"] == 2
    assert found["pear_ray_rl_grad_norm", "rl"] == 2
    assert ("pear_ray_rl_loss", "rl") not in found


@pytest.mark.parametrize(
    ("name", "metric", "tags"),
    [
        ("sft/source/gsm8k/ess_fraction", "sft/source/ess_fraction", {"source": "gsm8k"}),
        ("sft/source/a.b-c/log_ratio/mean", "sft/source/log_ratio/mean", {"source": "a.b-c"}),
        ("sft/log_ratio/mean", "sft/log_ratio/mean", {}),
        ("memory/wake_trainer_gib", "memory/gib", {"phase": "wake_trainer"}),
        ("time/sample_s", "time/s", {"phase": "sample"}),
        ("rl/reward/mean", "rl/reward/mean", {}),
        ("rl/reward/form/mean", "rl/reward/component", {"component": "form"}),
        ("eval/pass_at_1", "eval/pass_at_k", {"k": "1", "suite": "main"}),
        ("eval/hard/pass_at_16", "eval/pass_at_k", {"k": "16", "suite": "hard"}),
        ("rl/eval/pass_at_8/low", "rl/eval/pass_at_k/low", {"k": "8", "suite": "main"}),
        ("sft/eval/maj_at_8", "sft/eval/maj_at_k", {"k": "8", "suite": "main"}),
        ("eval/mean_length", "eval/mean_length", {}),
    ],
)
def test_what_varies_in_a_name_becomes_a_tag(name, metric, tags):
    assert gauge_of(name) == (metric, tags)
