"""What verdicts sum up to, and what is refused, on samples written by hand."""

import pytest

from pear_ray.config.evaluate import EvaluateConfig, suites_of
from pear_ray.errors import RewardError
from pear_ray.records import Reward, RewardStatus
from pear_ray.tasks.judging import summarise
from pear_ray.tasks.sample_metrics import Judged

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}
OK, FAILED = Reward(RewardStatus.OK, 1.0), Reward(RewardStatus.FAILED, 0.0)
ERRORED = Reward(RewardStatus.ERRORED, 0.0, "planted")


def evaluated(
    verdicts: list[list[Reward]], *, max_errored_fraction: float = 1.0, k: tuple[int, ...] = (1, 8)
) -> dict[str, dict[str, float]]:
    config = EvaluateConfig.model_validate(
        {
            "problems": GAMES,
            "k": list(k),
            "rewards": {"max_errored_fraction": max_errored_fraction},
        }
    )
    groups = [
        [
            Judged(num_tokens=2, is_truncated=False, logprob_sum=-1.0, reward=reward)
            for reward in group[:-1]
        ]
        + [Judged(num_tokens=4, is_truncated=True, logprob_sum=-1.0, reward=group[-1])]
        for group in verdicts
    ]
    return summarise(suites_of(config)[0], groups, seed=0)


def test_pass_at_k_of_known_verdicts() -> None:
    """Of 8 samples 2, 0 and 8 are right: pass@1 = (1/4 + 0 + 1)/3, pass@8 = (1 + 0 + 1)/3."""
    found = evaluated([[OK] * 2 + [FAILED] * 6, [FAILED] * 8, [OK] * 8])
    assert found["pass_at_1"]["value"] == pytest.approx(1.25 / 3)
    assert found["pass_at_8"]["value"] == pytest.approx(2 / 3)
    assert found["mean_length"]["value"] == pytest.approx((7 * 2 + 4) / 8)
    assert found["truncated_fraction"]["value"] == pytest.approx(1 / 8)
    assert found["entropy"]["value"] == pytest.approx(8 / 18)
    assert found["mean_at_8"] == found["pass_at_1"]
    assert found["errored_fraction"]["value"] == 0.0
    for each in found.values():
        assert each["low"] <= each["value"] <= each["high"]


def test_equal_problems_have_no_interval() -> None:
    found = evaluated([[OK] * 4 + [FAILED] * 4] * 5)["pass_at_1"]
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_errored_rewards_are_left_out_not_wrong() -> None:
    """Of ten samples two errored: 4 of 8 judged are right, not 4 of 10."""
    found = evaluated([[ERRORED] * 2 + [OK] * 4 + [FAILED] * 4])
    assert found["pass_at_1"]["value"] == 0.5
    assert found["errored_fraction"]["value"] == pytest.approx(0.2)


def test_too_many_errored_rewards() -> None:
    verdicts = [[ERRORED] * 2 + [OK] * 8]
    evaluated(verdicts, max_errored_fraction=0.2)
    with pytest.raises(
        RewardError, match=r"2 of 10 rewards could not be computed .*; the first: plan"
    ):
        evaluated(verdicts, max_errored_fraction=0.19)


def test_too_few_judged_samples_for_k() -> None:
    verdicts = [[ERRORED] + [OK] * 7, [OK] * 8]
    with pytest.raises(RewardError, match="1 problems have fewer than 8 judged samples"):
        evaluated(verdicts)
    assert evaluated(verdicts, k=(1, 7))["pass_at_7"]["value"] == 1.0
