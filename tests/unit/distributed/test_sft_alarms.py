"""Warnings about weights come when a bound has been broken long enough, once, with what to do."""

from pear_ray.config.sft import AlarmsConfig
from pear_ray.distributed.sft_alarms import RULES, WeightAlarms

FINE = {
    "sft/ess_fraction": 0.8,
    "sft/log_weight_floor_fraction": 0.0,
    "sft/log_weight_ceiling_fraction": 0.0,
    "sft/log_ratio_clip_low_fraction": 0.4,
    "sft/log_ratio_clip_high_fraction": 0.2,
}
BAD = {
    "sft/ess_fraction": 0.1,
    "sft/log_weight_floor_fraction": 0.2,
    "sft/log_weight_ceiling_fraction": 0.2,
    "sft/log_ratio_clip_low_fraction": 0.6,
    "sft/log_ratio_clip_high_fraction": 0.35,
}


def words_of(steps: list[dict[str, float]], **settings: object) -> list[list[str]]:
    alarms = WeightAlarms(AlarmsConfig.model_validate(settings))
    return [alarms.check(each, step=number) for number, each in enumerate(steps, start=1)]


def test_a_rule_speaks_once_after_its_patience() -> None:
    said = words_of([FINE, BAD, BAD, BAD, BAD, BAD])
    assert [len(each) for each in said] == [0, 0, 0, len(RULES), 0, 0]
    assert said[3][0].startswith(
        "step 4: sft/ess_fraction is 0.1, below 0.2 for 3 steps: the gradient is decided by few"
    )
    assert any("sft/log_ratio_clip_fraction is 0.95, above 0.9" in line for line in said[3])
    assert all("; " in line for line in said[3])  # what to do


def test_a_good_step_starts_the_count_again() -> None:
    assert words_of([BAD, BAD, FINE, BAD, BAD]) == [[]] * 5


def test_exactly_at_the_bound_is_within_it() -> None:
    at = FINE | {
        "sft/ess_fraction": 0.2,
        "sft/log_weight_floor_fraction": 0.05,
        "sft/log_weight_ceiling_fraction": 0.05,
        "sft/log_ratio_clip_low_fraction": 0.9,
        "sft/log_ratio_clip_high_fraction": 0.0,
    }
    assert words_of([at], patience=1) == [[]]


def test_a_step_of_negatives_only_breaks_no_rule() -> None:
    assert words_of([{"sft/grad_norm": 1.0}], patience=1) == [[]]
