"""Diagnostics per source are the batch's, cut in pieces: worked by hand, and adding up to it."""

import math

import pytest
import torch

from pear_ray.algorithms.group_health import NAMES, finalise_groups, group_sums
from pear_ray.algorithms.pear import PearWeights, pear_token_weights
from pear_ray.algorithms.weight_health import finalise, merge, weight_sums

# Two sequences of source 0 around one of source 1; a masked position whose values are garbage.
IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
GROUPS = torch.tensor([0, 0, 1, 1, 1, 0, 0])
MASK = torch.tensor([True, True, True, True, True, True, False])
BY_HAND = PearWeights(
    weights=torch.tensor([2.0, 1.0, 0.5, 0.5, 1.0, 3.0, 77.0]),
    log_weights=torch.tensor([math.log(2.0), 0.0, -11.0, -12.0, 0.0, math.log(3.0), -50.0]),
    log_ratios=torch.tensor([0.5, -0.1, -0.2, 0.1, 0.0, 0.2, float("nan")]),
    clipped_log_ratios=torch.zeros(7),
)
POLICY = torch.tensor([-1.0, -2.0, -0.5, -0.25, -0.25, -3.0, float("nan")])


def test_two_sources_by_hand() -> None:
    sums = group_sums(BY_HAND, POLICY, GROUPS, MASK, num_groups=3)
    one, other, absent = finalise_groups(sums, num_groups=3)
    assert one == pytest.approx(
        {
            "num_tokens": 3,
            "token_share": 3 / 6,
            "weight_share": 6 / 8,
            "nll": (1 + 2 + 3) / 3,
            "weight/mean": 6 / 3,
            "ess_fraction": 36 / (4 + 1 + 9) / 3,
            "log_ratio/mean": (0.5 - 0.1 + 0.2) / 3,
            "log_ratio_clip_low_fraction": 1 / 3,
            "log_ratio_clip_high_fraction": 1 / 3,
            "log_weight_floor_fraction": 0.0,
        }
    )
    assert other == pytest.approx(
        {
            "num_tokens": 3,
            "token_share": 3 / 6,
            "weight_share": 2 / 8,
            "nll": 1 / 3,
            "weight/mean": 2 / 3,
            "ess_fraction": 4 / (0.25 + 0.25 + 1) / 3,
            "log_ratio/mean": -0.1 / 3,
            "log_ratio_clip_low_fraction": 1 / 3,
            "log_ratio_clip_high_fraction": 0.0,
            "log_weight_floor_fraction": 2 / 3,
        },
        abs=1e-7,
    )
    assert absent == {"num_tokens": 0.0, "token_share": 0.0, "weight_share": 0.0}


def random_batch(num_sequences: int, seed: int) -> tuple[PearWeights, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(num_sequences).repeat_interleave(9)
    policy, behavior = (-torch.rand(2, len(ids), generator=generator) * 3).unbind()
    mask = torch.ones(len(ids), dtype=torch.bool)
    return pear_token_weights(policy, behavior, ids, mask, gamma=0.9), policy, ids


def test_sources_add_up_to_the_step() -> None:
    pear, policy, ids = random_batch(40, seed=1)
    mask = torch.rand(len(ids), generator=torch.Generator().manual_seed(2)) < 0.8
    groups = (ids * 7) % 5
    sums = group_sums(pear, policy, groups, mask, num_groups=5)
    totals = weight_sums(pear, policy, ids, mask)
    for name in NAMES:
        added = math.fsum(
            value
            for key, value in sums.items()
            if key.endswith(f"_{name}") and key.removeprefix("group_")[3:] == name
        )
        assert added == pytest.approx(totals[name], rel=1e-12), name


def test_cut_otherwise_the_sums_are_the_same() -> None:
    """Whole, and sequence by sequence as over microbatches and ranks: no mean of means."""
    pear, policy, ids = random_batch(12, seed=3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    groups = ids % 3
    whole = finalise_groups(group_sums(pear, policy, groups, mask, num_groups=3), num_groups=3)
    merged: dict[str, float] = {}
    for sequence in range(12):
        only = ids == sequence
        merged = merge(merged, group_sums(pear, policy, groups, only, num_groups=3))
    for one, other in zip(finalise_groups(merged, num_groups=3), whole, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_one_group_of_all_has_the_metrics_of_the_step() -> None:
    pear, policy, ids = random_batch(6, seed=4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    sums = group_sums(pear, policy, torch.zeros_like(ids), mask, num_groups=1)
    (found,) = finalise_groups(sums, num_groups=1)
    step = finalise(weight_sums(pear, policy, ids, mask))
    shares = {"token_share": 1.0, "weight_share": 1.0}
    assert found == pytest.approx({name: step[name] for name in found if name in step} | shares)
    assert found.keys() - step.keys() == shares.keys()
