import pytest

from pear_ray.reporting.load import Estimate, Evaluation
from pear_ray.reporting.words import (
    change_sentence,
    estimate_words,
    overlap,
    summary_order,
    verdict,
)

LOW, MIDDLE, HIGH = Estimate(0.2, 0.15, 0.25), Estimate(0.24, 0.19, 0.29), Estimate(0.5, 0.45, 0.55)


def evaluation(**checkpoints):
    return Evaluation("main", {}, 200, 8, 1.0, 96, 0.95, checkpoints)


def test_disjoint_intervals_are_said_to_rise_or_fall():
    rose = change_sentence("pass_at_1", ("sft", LOW), ("rl", HIGH))
    assert rose == (
        "pass@1 rose from 0.200 [0.150, 0.250] after SFT to 0.500 [0.450, 0.550] after RL: "
        "the intervals do not overlap."
    )
    assert "pass@1 fell from 0.500" in change_sentence("pass_at_1", ("sft", HIGH), ("rl", LOW))


def test_overlapping_intervals_claim_nothing():
    sentence = change_sentence("pass_at_1", ("base", LOW), ("sft", MIDDLE))
    assert sentence == (
        "pass@1 went from 0.200 [0.150, 0.250] for the base model to 0.240 [0.190, 0.290] after "
        "SFT: the intervals overlap, so this evaluation does not tell them apart."
    )
    assert "rose" not in sentence


def test_touching_intervals_overlap():
    assert overlap(Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.3, 0.5))
    assert not overlap(Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.301, 0.5))


def test_the_verdict_begins_with_the_last_stage_and_goes_by_k():
    metrics = {"pass_at_8": HIGH, "pass_at_1": LOW, "pass_at_16": HIGH}
    sentences = verdict(evaluation(rl=metrics, base=metrics, sft=metrics))
    assert [s.split(" ")[0] for s in sentences] == ["pass@1", "pass@8", "pass@16"] * 2
    assert all("after SFT to" in s and "after RL" in s for s in sentences[:3])
    assert all("for the base model to" in s and "after SFT" in s for s in sentences[3:])


def test_one_checkpoint_is_compared_with_nothing():
    (sentence,) = verdict(evaluation(base={"pass_at_1": LOW}))
    assert sentence == (
        "pass@1 is 0.200 [0.150, 0.250] for the base model; there is no other checkpoint to "
        "compare it with."
    )


def test_unknown_rewards_are_told():
    errored = {"pass_at_1": LOW, "errored_fraction": Estimate(0.034, 0.02, 0.05)}
    sentences = verdict(evaluation(base={"pass_at_1": LOW}, sft=errored))
    assert sentences[-1] == "3.4 % of the rewards after SFT could not be computed."


@pytest.mark.parametrize(
    ("name", "estimate", "text"),
    [
        ("pass_at_1", Estimate(0.2134, 0.18, 0.2461), "0.213 [0.180, 0.246]"),
        ("mean_length", Estimate(41.26, 40.0, 42.0), "41.3 [40.0, 42.0]"),
        ("truncated_fraction", Estimate(0.031, 0.02, 0.044), "3.1 % [2.0, 4.4]"),
    ],
)
def test_estimates(name, estimate, text):
    assert estimate_words(estimate, name=name) == text


def test_columns_come_in_reading_order():
    names = {"errored_fraction", "mean_length", "pass_at_16", "pass_at_8", "pass_at_1", "answered"}
    assert summary_order(names) == [
        "pass_at_1",
        "pass_at_8",
        "pass_at_16",
        "mean_length",
        "errored_fraction",
        "answered",
    ]
