import pytest

from pear_ray.telemetry.follow import Follower, ProgressState, StageState
from pear_ray.telemetry.metrics_log import EventKind, EventRecord, MetricRecord, MetricsLog
from pear_ray.telemetry.phase import PHASE_FILE, Phase
from pear_ray.telemetry.view import key_metric, phase_words, short_line, step_line


def metric(time, step, *, stage="rl", attempt=1, num_steps=10, **metrics):
    values = {name.replace("__", "/"): value for name, value in metrics.items()}
    return MetricRecord(time, "demo", stage, attempt, step, num_steps, values)


def event(time, kind, *, stage="rl", attempt=1, message=""):
    return EventRecord(time, "demo", stage, attempt, kind, message)


def folded(*records):
    state = ProgressState()
    for record in records:
        state.fold(record)
    return state


def test_the_follower_hands_out_each_complete_line_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    log = MetricsLog(tmp_path, run="demo", stage="rl", attempt=1)
    log.log({}, step=1, num_steps=2)
    log.log({}, step=2, num_steps=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [r.step for r in follower.poll()] == [1]
    path.write_bytes(whole)
    assert [r.step for r in follower.poll()] == [2]
    assert follower.poll() == []


def test_eta_is_steps_left_times_the_median_step_less_what_has_passed():
    # Steps took 10, 10, 40 (a checkpoint) and 10 s: median 10 s, 5 of 10 steps left.
    state = folded(
        event(0, EventKind.STAGE_STARTED),
        *(metric(t, s) for t, s in [(100, 1), (110, 2), (120, 3), (160, 4), (170, 5)]),
    )
    stage = state.stages["rl"]
    assert stage.step_s() == 10
    assert stage.eta_s(170) == 50
    assert stage.eta_s(173) == 47
    assert stage.eta_s(900) == 0


def test_eta_counts_the_steps_between_two_records():
    assert folded(metric(0, 2), metric(12, 5)).stages["rl"].eta_s(12) == 20  # 4 s a step, 5 left


def test_no_eta_before_two_steps_or_out_of_running():
    assert folded(metric(0, 1)).stages["rl"].eta_s(1) is None
    ended = folded(metric(0, 1), metric(5, 2), event(6, EventKind.STAGE_FAILED))
    assert ended.stages["rl"].eta_s(6) is None


def test_the_gap_between_two_attempts_is_no_step_time():
    state = folded(
        metric(0, 1),
        metric(10, 2),
        event(5000, EventKind.STAGE_STARTED, attempt=2),
        metric(5100, 2, attempt=2),
        metric(5104, 3, attempt=2),
    )
    stage = state.stages["rl"]
    assert stage.step_s() == 4
    assert (stage.step, stage.attempt, stage.started) == (3, 2, 5000)


def test_steps_done_again_in_the_same_attempt_start_a_new_pace():
    # A worker group restarted from its checkpoint rewrites step 2.
    stage = folded(metric(0, 2), metric(10, 3), metric(500, 2), metric(507, 3)).stages["rl"]
    assert stage.step_s() == 7


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (EventKind.STAGE_STARTED, StageState.RUNNING),
        (EventKind.STAGE_FINISHED, StageState.DONE),
        (EventKind.STAGE_SKIPPED, StageState.SKIPPED),
        (EventKind.STAGE_FAILED, StageState.FAILED),
        (EventKind.WARNING, StageState.WAITING),
    ],
)
def test_events_set_the_state(kind, state):
    stages = folded(event(1, kind)).stages
    assert stages["rl"].state is state
    assert stages["sft"].state is StageState.WAITING


def test_a_failed_stage_that_is_started_again_runs():
    state = folded(
        event(1, EventKind.STAGE_STARTED),
        event(2, EventKind.STAGE_FAILED, message="no disk"),
        event(3, EventKind.STAGE_STARTED, attempt=2),
    )
    stage = state.stages["rl"]
    assert (stage.state, stage.started, stage.finished) == (StageState.RUNNING, 3, None)


def test_a_skipped_stage_took_no_time_in_this_attempt():
    state = folded(
        event(1, EventKind.STAGE_STARTED),
        event(9, EventKind.STAGE_FINISHED),
        event(5000, EventKind.STAGE_SKIPPED, attempt=2),
    )
    stage = state.stages["rl"]
    assert (stage.state, stage.started, stage.finished) == (StageState.SKIPPED, None, 5000)


def test_key_metric_and_speed_are_each_stages_own():
    state = folded(
        metric(0, 1, rl__reward__mean=0.25, rl__tokens_per_s=900.0),
        metric(1, 2, rl__loss=0.5),
        metric(2, 1, stage="evaluate", eval__pass_at_1=0.5),
    )
    assert state.stages["rl"].key_metric == 0.25  # the latest value that was said
    assert state.stages["rl"].tokens_per_s == 900.0
    assert state.stages["evaluate"].key_metric == 0.5
    assert state.stages["evaluate"].tokens_per_s is None


def test_pass_at_k_is_shown_beside_the_key_metric():
    """Of the smallest k, whatever the order; intervals are no values."""
    names = {
        "sft/eval/pass_at_8": 0.5,
        "sft/eval/pass_at_2/low": 0.1,
        "sft/eval/pass_at_2": 0.25,
        "sft/weighted_loss": 1.5,
    }
    stage = folded(MetricRecord(0, "demo", "sft", 1, 0, 10, names)).stages["sft"]
    assert stage.pass_at_k == ("pass@2", 0.25)
    assert key_metric(stage) == "sft/weighted_loss 1.50, pass@2 0.250"
    assert folded(metric(0, 1, rl__loss=0.5)).stages["rl"].pass_at_k is None


def test_a_line_of_rl_says_how_it_goes():
    names = {
        "rl/reward/mean": 0.35,
        "rl/correct_fraction": 0.25,
        "rl/degenerate_group_fraction": 0.5,
        "rl/completion_length/mean": 41.3,
        "rl/tokens_per_s": 1250.0,
    }
    for name in ("rl", "rl_train"):
        stage = folded(MetricRecord(0, "demo", name, 1, 4, 10, names)).stages[name]
        assert step_line(stage, 0) == (
            f"{name} step 4/10, rl/reward/mean 0.350, correct 0.250, degenerate 0.500, "
            "length 41.3, 1,250 tokens/s"
        )


def test_a_narrow_column_has_the_time_left_before_the_numbers():
    log = folded(event(0.0, EventKind.STAGE_STARTED), *(metric(t, t, rl__x=1.0) for t in (1, 2)))
    assert short_line(log.stages["rl"], 2.0) == "rl 2/10, 8 s left"
    named = folded(MetricRecord(0, "demo", "rl", 1, 10, 10, {"rl/reward/mean": 0.35}))
    assert short_line(named.stages["rl"], 0) == "rl 10/10, rl/reward/mean 0.350"


def test_a_phase_is_the_running_attempts(tmp_path):
    (tmp_path / "rl").mkdir()
    log = folded(event(100.0, EventKind.STAGE_STARTED))
    log.look_at_phases(tmp_path)
    assert log.stages["rl"].phase is None
    write = (tmp_path / "rl" / PHASE_FILE).write_text
    for content, found in (
        ('{"name": "train", "since": 99.0}', None),  # an earlier attempt's
        ('{"name": "train", "since": 110.0}', Phase("train", 110.0)),
        ('{"name": "tr', None),  # while it is being written
        ("[]", None),
        ('{"name": "sync", "since": 120.0}', Phase("sync", 120.0)),
    ):
        write(content)
        log.look_at_phases(tmp_path)
        assert log.stages["rl"].phase == found
    log.fold(event(130.0, EventKind.STAGE_FINISHED))
    log.look_at_phases(tmp_path)
    assert log.stages["rl"].phase is None


def test_how_long_a_phase_lasts_is_said_where_it_is_known():
    assert phase_words(Phase("sample", 100.0), 112.0) == "in sample for 12 s"
    assert phase_words(Phase("sample", 100.0), 90.0) == "in sample"  # left in it by a dead driver


def test_warnings_are_kept_apart_and_forgotten_by_a_new_driver():
    state = folded(metric(0, 1, rl__reward__mean=0.25), event(1, EventKind.WARNING, message="gap"))
    assert [w.message for w in state.warnings] == ["gap"]
    state.forget_states()
    assert not state.warnings
    assert state.stages["rl"].state is StageState.WAITING
    assert state.stages["rl"].key_metric == 0.25
