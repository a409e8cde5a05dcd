"""Warnings about weights come when a bound has been broken long enough, once, with what to do."""

import pytest

from pear_ray.config.sft import AlarmsConfig, SftConfig
from pear_ray.distributed.sft_alarms import RULES, WeightAlarms, weights_are_absolute

LASTING = [rule for rule in RULES if not rule.at_once]

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


FLOOR = FINE | {
    "sft/num_tokens": 1234.0,
    "sft/log_weight_floor_fraction": 1.0,
    "sft/weight/mean": 4.54e-5,
}


def words_of(
    steps: list[dict[str, float]], *, weights_are_absolute: bool = True, **settings: object
) -> list[list[str]]:
    config = AlarmsConfig.model_validate(settings)
    alarms = WeightAlarms(config, weights_are_absolute=weights_are_absolute)
    return [alarms.check(each, step=number) for number, each in enumerate(steps, start=1)]


def test_a_rule_speaks_once_after_its_patience() -> None:
    said = words_of([FINE, BAD, BAD, BAD, BAD, BAD])
    assert [len(each) for each in said] == [0, 0, 0, len(LASTING), 0, 0]
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


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.02, "step 2: sft/grad_norm_ratio_to_uniform is 0.02, below 0.03: the weights let next"),
        (31.0, "step 2: sft/grad_norm_ratio_to_uniform is 31, above 30: steps are far larger"),
        (float("inf"), "step 2: sft/grad_norm_ratio_to_uniform is inf, above 30: "),
    ],
)
def test_the_gradient_ratio_speaks_at_once(ratio: float, words: str) -> None:
    """It is looked at every fifty steps: patience in steps would have no meaning."""
    beyond = FINE | {"sft/grad_norm_ratio_to_uniform": ratio}
    within = FINE | {"sft/grad_norm_ratio_to_uniform": 0.5}
    said = words_of([within, beyond, FINE, beyond])
    assert [len(each) for each in said] == [0, 1, 0, 0]
    assert said[1][0].startswith(words)
    assert "; " in said[1][0]  # what to do


def test_both_sides_of_the_gradient_ratio_can_speak() -> None:
    low, high = ({"sft/grad_norm_ratio_to_uniform": ratio} for ratio in (0.001, 100.0))
    assert [len(each) for each in words_of([low, high, low])] == [1, 1, 0]


def test_all_weights_at_the_floor_are_told_at_once() -> None:
    said = words_of([FINE, FLOOR, FLOOR, FLOOR])
    assert [len(each) for each in said] == [0, 1, 0, 1]  # the last one is of max_floor_fraction
    assert said[1][0].startswith(
        "step 2: all weights are at the floor: each of the step's 1,234 tokens weighs 4.54e-05, so "
        "the step trains next to nothing"
    )
    assert "sft.reduction=weight_norm" in said[1][0]


@pytest.mark.parametrize(
    "step",
    [
        FLOOR | {"sft/log_weight_floor_fraction": 0.999},  # a token trains
        FLOOR | {"sft/weight/mean": 0.9},  # log_weight_clip_low=-0.1: as good as plain SFT
    ],
)
def test_a_floor_that_trains_is_not_told_at_once(step: dict[str, float]) -> None:
    assert words_of([step]) == [[]]


def test_weights_that_are_divided_by_their_sum_train_at_the_floor() -> None:
    assert words_of([FLOOR], weights_are_absolute=False) == [[]]


@pytest.mark.parametrize(
    ("changes", "absolute"),
    [
        ({}, True),
        ({"reduction": "sum"}, True),
        ({"reduction": "weight_norm"}, False),
        ({"weights": {"kind": "pear", "rescale": "batch_mean_one"}}, False),
        ({"weights": {"kind": "pear", "rescale": "sequence_mean_one"}}, False),
        ({"weights": {"kind": "pear", "rescale": "centred"}}, True),
        ({"weights": {"kind": "uniform"}}, True),
    ],
)
def test_when_small_weights_are_small_steps(changes: dict[str, object], *, absolute: bool) -> None:
    config = SftConfig.model_validate({"optimizer": {"learning_rate": 1e-3}} | changes)
    assert weights_are_absolute(config) is absolute


def of_sources(nll: float, weight_share: float) -> dict[str, float]:
    """A step in which source F is a fifth of the tokens."""
    rows = {"F": (nll, weight_share, 0.2), "N": (2.0, 1 - weight_share, 0.8)}
    return FINE | {
        f"sft/source/{name}/{metric}": value
        for name, row in rows.items()
        for metric, value in zip(("nll", "weight_share", "token_share"), row, strict=True)
    }


def test_a_source_that_is_forgotten_as_its_weight_falls_is_named_once() -> None:
    """Of best .2: .5 is more than twice that; three such steps in a row, then silence."""
    falls = [of_sources(0.3, 0.6), of_sources(0.2, 0.3)]
    said = words_of(falls + [of_sources(0.5, 0.02)] * 5)
    assert [len(each) for each in said] == [0, 0, 0, 0, 1, 0, 0]
    (words,) = said[4]
    assert words.startswith(
        "step 5: the policy forgets source F: 0.5 nats per token, 0.2 at its best, and 2.0% of the "
        "weight for 20.0% of the tokens"
    )
    assert "ratio_policy=init" in words


@pytest.mark.parametrize(
    "later",
    [
        of_sources(0.4, 0.02),  # just twice its best
        of_sources(0.5, 0.1),  # half of its even weight
        FINE,  # no source in the step
    ],
)
def test_a_source_that_keeps_its_weight_or_is_known_is_not_forgotten(
    later: dict[str, float],
) -> None:
    assert words_of([of_sources(0.2, 0.3), *[later] * 6]) == [[]] * 7


def test_a_source_may_have_the_name_of_a_setting() -> None:
    """What it has lasted is its own: the rule of that name speaks as well."""
    named = [
        {key.replace("/F/", "/min_ess_fraction/"): value for key, value in step.items()}
        for step in (of_sources(0.2, 0.3), *[of_sources(0.5, 0.02) | {"sft/ess_fraction": 0.1}] * 3)
    ]
    assert [len(each) for each in words_of(named)] == [0, 0, 0, 2]


def test_what_is_known_by_heart_may_double() -> None:
    assert words_of([of_sources(0.01, 0.3), *[of_sources(0.09, 0.02)] * 6]) == [[]] * 7
