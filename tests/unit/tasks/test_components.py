"""Weighted sums, outcomes apart from them, totals, and refusals: by hand."""

import json
import math

import pytest
from pydantic import ValidationError

from pear_ray.config.rewards import RewardConfig, describe
from pear_ray.errors import RewardError
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.components import ComponentError, load_verifier
from pear_ray.tasks.reward_totals import check_errored, reward_metrics, reward_sums

EXACT = {"kind": "exact"}
FORM = {"kind": "regex", "name": "form", "pattern": "^<think>", "compare": "match", "weight": 0.1}


def rewards(*components: dict[str, object], **settings: object) -> RewardConfig:
    return RewardConfig.model_validate({"components": list(components), **settings})


def judged(config: RewardConfig, completion_text: str, answer: str | None = "7") -> Reward:
    entry = {"file": "p.jsonl", "row": 1, "answer": answer, "metadata": {}}
    return load_verifier(config)(Problem("p/1", "p", "?", json.dumps(entry)), completion_text)


@pytest.mark.parametrize(
    ("completion_text", "status", "value", "values"),
    [
        ("<think> <answer>7</answer>", "ok", 1.1, {"exact": 1.0, "form": 1.0}),
        ("<answer>7</answer>", "ok", 1.0, {"exact": 1.0, "form": 0.0}),
        ("<think> <answer>8</answer>", "failed", 0.1, {"exact": 0.0, "form": 1.0}),
        ("", "failed", 0.0, {"exact": 0.0, "form": 0.0}),
    ],
)
def test_a_format_term_adds_to_the_sum_and_not_to_the_outcome(
    completion_text: str, status: str, value: float, values: dict[str, float]
) -> None:
    reward = judged(rewards(EXACT, FORM), completion_text)
    assert (str(reward.status), reward.value, dict(reward.components)) == (status, value, values)


def test_marked_components_decide_together() -> None:
    alone = rewards(EXACT, FORM | {"outcome": True})
    assert judged(alone, "<think> <answer>8</answer>").status is RewardStatus.OK
    both = rewards(EXACT | {"outcome": True}, FORM | {"outcome": True})
    assert judged(both, "<think> <answer>8</answer>").status is RewardStatus.FAILED
    assert judged(both, "<answer>7</answer>").status is RewardStatus.FAILED
    assert judged(both, "<think> <answer>7</answer>").status is RewardStatus.OK


def test_a_component_that_errors_is_no_zero() -> None:
    with pytest.raises(ComponentError, match="exact") as caught:
        judged(rewards(FORM, EXACT), "<think> <answer>7</answer>", answer=None)
    assert isinstance(caught.value.__cause__, ValueError)


def test_in_words() -> None:
    assert describe(rewards(EXACT, FORM)) == "exact x 1, outcome + form (regex) x 0.1"
    assert describe(RewardConfig()) == "game x 1, outcome"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"components": []}, "at least 1"),
        ({"components": [EXACT, EXACT]}, "two components are called exact; give them a `name`"),
        ({"components": [{"kind": "regex", "pattern": "("}]}, "is no regular expression"),
        ({"components": [{"kind": "regex", "pattern": "7"}]}, "has no group 1; put the answer in"),
        ({"components": [{"kind": "function", "function": "verify"}]}, "should match pattern"),
        (
            {"components": [{"kind": "unit_tests"}], "deadline_s": 5.0},
            "unit tests may take 5 s, and the whole verification is killed after deadline_s=5",
        ),
    ],
)
def test_refusals(config: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        RewardConfig.model_validate(config)


def ok(value: float) -> Reward:
    return Reward(RewardStatus.OK, value, "", {"a": 1.0, "b": value - 1.0})


def failed(value: float) -> Reward:
    return Reward(RewardStatus.FAILED, value, "", {"a": 0.0, "b": value})


ERRORED = Reward(RewardStatus.ERRORED, 0.0, "problem p/1: planted")


def test_metrics_of_known_rewards() -> None:
    """Group 1 all wrong with other sums, group 2 mixed, group 3 without a verdict."""
    groups = [[failed(0.1), failed(0.0), ERRORED], [ok(1.1), failed(0.0)], [ERRORED]]
    metrics = reward_metrics(reward_sums(groups))
    assert metrics == pytest.approx(
        {
            "reward/mean": 1.2 / 4,
            "reward/std": math.sqrt((0.2**2 + 0.3**2 + 0.8**2 + 0.3**2) / 4),
            "reward/a/mean": 1 / 4,
            "reward/b/mean": 0.2 / 4,
            "correct_fraction": 1 / 4,
            "errored_fraction": 2 / 6,
            "degenerate_group_fraction": 1 / 2,
        }
    )


def test_the_limit_of_errors_and_that_nothing_computed_always_stops() -> None:
    def check(errored: int, limit: float) -> None:
        check_errored(errored=errored, total=10, limit=limit, key="rl.rewards", first="why\nwhere")

    check(0, 0.0)
    check(1, 0.1)
    check(9, 1.0)
    said = r"2 of 10 rewards could not be computed \(rl.rewards.max_errored_fraction=0.1\); the f"
    with pytest.raises(RewardError, match=said):
        check(2, 0.1)
    with pytest.raises(RewardError, match=r"10 of 10 rewards .*; the first: why\nwhere"):
        check(10, 1.0)
