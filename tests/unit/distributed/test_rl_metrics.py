"""A step's metrics from two ranks' sums, by hand."""

import pytest

from pear_ray.algorithms.weight_health import merge
from pear_ray.distributed.rl_metrics import lag_sums, rollout_sums, step_metrics
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    Reward,
    RewardStatus,
    Rollout,
    RolloutGroup,
)

# Of the trainer, as if merged already: 20 tokens trained, with advantages 1 (x 5) and -1/3 (x 15).
TRAINED = {
    "trained_tokens": 20.0,
    "updates": 1.0,
    "loss": 0.5,
    "grad_norm": 2.0,
    "advantage": 0.0,
    "advantage_abs": 10.0,
    "advantage_squared": 5 + 15 / 9,
    "clipped_low": 1.0,
    "clipped_high": 3.0,
    "correction_masked": 0.0,
    "correction_bounded": 0.0,
    "correction_weight": 20.0,
    "correction_weight_squared": 20.0,
    "tokens": 20.0,
    "abs_gap": 0.0,
    "max/abs_gap": 0.0,
    "mismatch_kl_k1": 0.0,
    "mismatch_kl_k3": 0.0,
    "ratio": 20.0,
    "ratio_squared": 20.0,
}


def group(*lengths: int, reward: float, policy_version: int = 0) -> RolloutGroup:
    return RolloutGroup(
        [
            Rollout(
                problem=Problem("game/0/0", "game", "1 + 1", "{}"),
                prompt_ids=[1],
                completion=Completion([2] * length, [-0.5] * length, "", FinishReason.STOP),
                policy_version=policy_version,
                reward=Reward(RewardStatus.OK, reward),
            )
            for length in lengths
        ]
    )


def test_lengths_rewards_advantages_and_speeds_over_ranks() -> None:
    """Rank 0 is the slower sampler, rank 1 the slower trainer: the others wait for those."""
    first = rollout_sums([group(2, 10, reward=1.0)])
    first |= {"max/time/sample_s": 4.0, "max/time/train_s": 1.0, "discarded_tokens": 10.0}
    second = rollout_sums([group(3, 15, reward=0.0)])
    second |= {"max/time/sample_s": 3.0, "max/time/train_s": 2.0, "discarded_tokens": 0.0}
    metrics = step_metrics(TRAINED | merge(first, second))
    lengths = {stat: metrics[f"rl/completion_length/{stat}"] for stat in ("min", "mean", "max")}
    assert lengths == {"min": 2, "mean": 7.5, "max": 15}
    assert (metrics["rl/reward/mean"], metrics["rl/reward/std"]) == (0.5, 0.5)
    assert metrics["rl/advantage/mean_abs"] == 0.5
    assert metrics["rl/advantage/std"] == pytest.approx((1 / 3) ** 0.5)
    assert metrics["rl/tokens_per_s"] == 30 / 6
    assert metrics["rl/tokens_per_s/sample"] == 30 / 4
    assert metrics["rl/tokens_per_s/train"] == 20 / 2
    assert metrics["rl/entropy"] == 0.5


def test_a_replay_has_no_speed_of_sampling() -> None:
    sums = rollout_sums([group(2, 2, reward=0.0)]) | {"max/time/train_s": 2.0}
    metrics = step_metrics(TRAINED | sums)
    assert metrics["rl/tokens_per_s/train"] == 2.0
    assert "rl/tokens_per_s/sample" not in metrics
    assert metrics["rl/reward/std"] == 0.0


def test_a_lag_is_the_mean_over_rollouts() -> None:
    """Three rollouts of version 2 and one of version 5, in training at version 6."""
    first = [group(2, 4, reward=1.0, policy_version=2)]
    second = [group(3, reward=0.0, policy_version=2), group(3, reward=1.0, policy_version=5)]
    times = {"max/time/sample_s": 1.0, "max/time/train_s": 1.0}
    sums = merge(
        rollout_sums(first) | lag_sums(first, 6) | times,
        rollout_sums(second) | lag_sums(second, 6) | times,
    )
    assert step_metrics(TRAINED | sums)["rl/policy_lag"] == (3 * 4 + 1) / 4
    without = {name: value for name, value in sums.items() if name != "lag"}
    assert "rl/policy_lag" not in step_metrics(TRAINED | without)
