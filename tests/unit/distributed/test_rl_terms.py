"""Advantages, loss, correction, KL and entropy of an RL step meet in a microbatch by hand."""

import math
from typing import Any

import pytest
import torch

from pear_ray.algorithms.policy_losses import clipped_surrogate
from pear_ray.config.rl import RlConfig
from pear_ray.distributed.rl_advantages import ALIGNED, Microbatch, give_advantages, rollout_row
from pear_ray.distributed.rl_terms import denominator_of, microbatch_terms
from pear_ray.engines.batches import TokenBatch, collate
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    Reward,
    RewardStatus,
    Rollout,
    RolloutGroup,
)

PROBLEM = Problem("game/0/0", "game", "1 + 1", "{}")


def settings(**changes: Any) -> RlConfig:
    tree = {
        "problems": {"games": [{"name": "chain_sum"}], "size": 1},
        "optimizer": {"learning_rate": 1e-3},
        "num_steps": 1,
        "group_size": 2,
        "max_tokens": 4,
        "advantage": "mean_baseline",
    }
    return RlConfig.model_validate(tree | changes)


def rollout(behavior: list[float], reward: float, reason: FinishReason) -> Rollout:
    ids = list(range(3, 3 + len(behavior)))
    return Rollout(
        problem=PROBLEM,
        prompt_ids=[1, 2],
        completion=Completion(ids, behavior, "", reason),
        policy_version=0,
        reward=Reward(RewardStatus.OK, reward),
    )


# One group: a right answer of two tokens, and a wrong one of four that was cut off.
GROUP = RolloutGroup(
    [
        rollout([-1.0, -1.0], 1.0, FinishReason.STOP),
        rollout([-2.0] * 4, 0.0, FinishReason.LENGTH),
    ]
)


def batch_of(config: RlConfig, **aligned: list[float]) -> TokenBatch:
    masked = config.overlong.mask_truncated
    rows = [rollout_row(one, mask_truncated=masked) for one in GROUP.rollouts]
    batch = collate(rows, pad_id=0, names=ALIGNED, device=torch.device("cpu"))
    batch.aligned.update({name: torch.tensor(values) for name, values in aligned.items()})
    give_advantages([Microbatch([0, 1], batch)], [GROUP], config)
    return batch


def loss_of(config: RlConfig, logprobs: list[float], **aligned: list[float]) -> Any:
    batch = batch_of(config, **aligned)
    flat = torch.tensor(logprobs, requires_grad=True)
    terms = microbatch_terms({"logprobs": flat, "entropies": flat * -2.0}, batch, config)
    loss = terms.numerator / denominator_of(terms.sums, config)
    (gradient,) = torch.autograd.grad(loss, flat)
    return loss.item(), gradient.tolist(), terms.sums


BEHAVIOR = [-1.0, -1.0, -2.0, -2.0, -2.0, -2.0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # Advantages .5 and -.5, ratio 1: each token's gradient is -A over the denominator.
        ("token_mean", [-0.5 / 6] * 2 + [0.5 / 6] * 4),
        ("seq_mean", [-0.5 / 2 / 2] * 2 + [0.5 / 4 / 2] * 4),
        ("dr_grpo", [-0.5 / 8] * 2 + [0.5 / 8] * 4),
    ],
)
def test_reductions_by_hand(reduction: str, expected: list[float]) -> None:
    _, gradient, sums = loss_of(settings(reduction=reduction), BEHAVIOR)
    assert gradient == pytest.approx(expected)
    assert sums["correction_weight"] == 6
    assert sums["trained_tokens"] == sums["tokens"] == 6
    assert (sums["advantage"], sums["advantage_abs"]) == (2 * 0.5 - 4 * 0.5, 6 * 0.5)
    assert sums["advantage_squared"] == 6 * 0.25


def test_the_correction_weighs_tokens_and_the_clip_does_not_see_it() -> None:
    """Trainer over sampler is 3, 3/4, 1, ...: truncated at 2; the ratio stays 1."""
    policy = [-1.0 + math.log(3), -1.0 + math.log(0.75), *BEHAVIOR[2:]]
    _, gradient, sums = loss_of(settings(), policy)
    assert gradient == pytest.approx([-0.5 * 2 / 6, -0.5 * 0.75 / 6] + [0.5 / 6] * 4)
    assert sums["max/ratio"] == sums["min/ratio"] == 1.0
    assert (sums["correction_bounded"], sums["correction_masked"]) == (1, 0)
    assert sums["max/abs_gap"] == pytest.approx(math.log(3))
    knobs = {"level": "token", "mode": "mask"}
    _, gradient, sums = loss_of(settings(mismatch_correction=knobs), policy)
    assert gradient == pytest.approx([0.0, -0.5 * 0.75 / 6] + [0.5 / 6] * 4)
    assert sums["correction_masked"] == 1
    _, gradient, _ = loss_of(settings(mismatch_correction={"level": "off"}), policy)
    assert gradient == pytest.approx([-0.5 / 6] * 2 + [0.5 / 6] * 4)


def test_while_sampler_and_trainer_nearly_agree_it_is_the_loss_against_the_sampler() -> None:
    """What the loop did before: GRPO's ratio against the sampler, within its clip."""
    gaps = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 0.05
    policy = (torch.tensor(BEHAVIOR) + gaps).tolist()
    loss, gradient, _ = loss_of(settings(), policy)
    flat = torch.tensor(policy, requires_grad=True)
    advantages = torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5, -0.5])
    mask = torch.ones(6, dtype=torch.bool)
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    old = clipped_surrogate(flat, torch.tensor(BEHAVIOR), advantages, mask, **clip)
    (theirs,) = torch.autograd.grad(old.losses.sum() / 6, flat)
    assert loss == pytest.approx(old.losses.sum().item() / 6, rel=1e-6)
    assert gradient == pytest.approx(theirs.tolist(), rel=1e-6)


def test_the_ratio_is_against_the_proximal_policy() -> None:
    """Ratios 2 with A > 0 (clipped at 1.28) and 1/2 with A < 0 (clipped at .8): no gradient."""
    policy = [-1.0 + math.log(2), -1.0, -2.0 - math.log(2), -2.0, -2.0, -2.0]
    loss, gradient, sums = loss_of(settings(), policy, proximal_logprobs=BEHAVIOR)
    assert gradient == pytest.approx([0.0, -0.5 / 6, 0.0] + [0.5 / 6] * 3)
    assert loss == pytest.approx((-0.64 - 0.5 + 0.4 + 1.5) / 6)
    assert (sums["clipped_low"], sums["clipped_high"]) == (1, 1)
    assert sums["correction_weight"] == 6  # the sampler agrees with the proximal policy
    assert sums["abs_gap"] == 0


def test_kl_and_entropy_are_added_to_the_loss() -> None:
    kl = {"coefficient": 0.5, "estimator": "k2"}
    reference = [-1.0, -1.2, -2.0, -2.0, -2.0, -2.4]
    config = settings(kl=kl, entropy_coefficient=0.1)
    _, gradient, sums = loss_of(config, BEHAVIOR, reference_logprobs=reference)
    # k2's gradient is the log-ratio; entropies of -2 log p add .1 * 2 with a plus sign.
    pulls = [0.0, 0.2, 0.0, 0.0, 0.0, 0.4]
    base = [-0.5] * 2 + [0.5] * 4
    expected = [(b + 0.5 * p + 0.2) / 6 for b, p in zip(base, pulls, strict=True)]
    assert gradient == pytest.approx(expected, rel=1e-5)
    assert sums["kl"] == pytest.approx(sum(math.exp(-p) - 1 + p for p in pulls), rel=1e-4)
    assert sums["entropy"] == pytest.approx(20.0)


def test_a_kl_that_is_only_measured_changes_nothing_else() -> None:
    logprobs, reference = [-1.0, -1.0, -2.0, -2.0, -2.0, -2.0], [-1.1, -0.7, -2.0, -2.0, -1.5, -3.0]
    loss, gradient, sums = loss_of(
        settings(kl={"measure": True}), logprobs, reference_logprobs=reference
    )
    pulls = [p - r for p, r in zip(logprobs, reference, strict=True)]
    assert sums["kl"] == pytest.approx(sum(math.exp(-p) - 1 + p for p in pulls), rel=1e-5)
    bare, same, without = loss_of(settings(), logprobs)
    assert (loss, gradient) == (bare, same)
    assert "kl" not in without


def test_a_kl_in_the_reward_changes_advantages() -> None:
    kl = {"coefficient": 0.5, "estimator": "k1", "placement": "reward"}
    reference = [-1.3, -1.1, -2.0, -2.0, -2.0, -2.0]
    frozen = {"proximal_logprobs": BEHAVIOR, "reference_logprobs": reference}
    # 1 - .5 * (.3 + .1) = .8 against 0: advantages .4 and -.4.
    batch = batch_of(settings(kl=kl), **frozen)
    assert batch.aligned["advantages"].tolist() == pytest.approx([0.4] * 2 + [-0.4] * 4)
    alone = batch_of(settings(kl=kl, advantage="rloo"), **frozen)
    assert alone.aligned["advantages"].tolist() == pytest.approx([0.8] * 2 + [-0.8] * 4)


def test_length_is_punished_and_truncated_rows_can_be_left_out() -> None:
    # Four of four tokens, the last two of them buffer: -3. 1 against -3.
    punished = settings(overlong={"buffer_tokens": 2, "penalty": 3.0})
    assert batch_of(punished).aligned["advantages"].tolist() == [2.0] * 2 + [-2.0] * 4
    masked = settings(overlong={"mask_truncated": True})
    _, gradient, sums = loss_of(masked, BEHAVIOR)
    assert gradient == pytest.approx([-0.25, -0.25, 0, 0, 0, 0])  # two tokens are left
    assert (sums["trained_tokens"], sums["tokens"]) == (2, 6)  # the gap is measured on all
    assert denominator_of({"denominator": 0.0}, masked) == 1.0


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo", "reinforce"])
def test_the_first_update_is_the_same_for_every_loss(loss: str) -> None:
    _, gradient, _ = loss_of(settings(loss={"kind": loss}), BEHAVIOR)
    assert gradient == pytest.approx([-0.5 / 6] * 2 + [0.5 / 6] * 4)
