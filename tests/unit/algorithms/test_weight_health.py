"""Diagnostics by hand, and their independence of how the step was cut up."""

import functools
import math

import pytest
import torch

from pear_ray.algorithms.loss_tokens import select_loss_tokens
from pear_ray.algorithms.pear import PearWeights, pear_token_weights
from pear_ray.algorithms.weight_health import finalise, merge, position_deciles, weight_sums


def by_hand():
    """Two sequences of loss tokens (1, 3, | 2) with one masked position in between."""
    weights = torch.tensor([1.0, 9.0, 3.0, 2.0])
    log_ratios = torch.tensor([-0.08, math.nan, 0.5, -0.2])
    pear = PearWeights(weights, torch.tensor([-11.0, 0.0, 6.0, 0.0]), log_ratios, log_ratios)
    policy = torch.tensor([-1.0, math.nan, -2.0, -4.0])
    return pear, policy, torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, True, True])


def test_weights_that_are_all_zero_divide_nothing():
    """Fixed weights by source can be: no share, and no effective token."""
    pear, *others = by_hand()
    nothing = PearWeights(torch.zeros(4), torch.zeros(4), pear.log_ratios, pear.log_ratios)
    metrics = finalise(weight_sums(nothing, *others))
    for name in ("effective_sample_size", "ess_fraction", "sequence_ess_fraction", "weight/mean"):
        assert metrics[name] == 0.0
    shares = [value for name, value in metrics.items() if name.endswith("weight_share")]
    assert shares == [0.0] * 11
    assert all(math.isfinite(value) for value in metrics.values())


def test_every_metric_by_hand():
    metrics = finalise(weight_sums(*by_hand()))
    mean = (-0.08 + 0.5 - 0.2) / 3
    expected = {
        "num_tokens": 3,
        "num_sequences": 2,
        "effective_sample_size": 36 / 14,
        "ess_fraction": 12 / 14,
        "sequence_ess_fraction": (16 / 10 / 2 + 1) / 2,
        "weight/mean": 2.0,
        "log_ratio/mean": mean,
        "log_ratio/std": math.sqrt((0.0064 + 0.25 + 0.04) / 3 - mean**2),
        "log_ratio_clip_low_fraction": 1 / 3,  # -0.08 itself is not clipped
        "log_ratio_clip_high_fraction": 1 / 3,
        "log_weight_floor_fraction": 1 / 3,
        "log_weight_ceiling_fraction": 1 / 3,
        "nll": 7 / 3,
        "weighted_nll": (1 + 6 + 8) / 3,
        "last_tenth_weight_share": 5 / 6,
        "decile_0_weight_share": 3 / 6,  # the first of two tokens, and the only one
        "decile_5_weight_share": 3 / 6,
        "decile_9_weight_share": 0.0,
        "log_ratio/min": -0.2,
        "log_ratio/max": 0.5,
        "log_weight/min": -11.0,
        "log_weight/max": 6.0,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def make(num_sequences=6):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 300, (num_sequences,), generator=generator)
    ids = torch.repeat_interleave(torch.arange(num_sequences), lengths)
    policy = -torch.rand(len(ids), generator=generator)
    behavior = policy - 0.05 * torch.randn(len(ids), generator=generator)
    mask = torch.rand(len(ids), generator=generator) > 0.2
    return policy, behavior, ids, mask


def test_the_metrics_do_not_depend_on_the_microbatches():
    policy, behavior, ids, mask = make()

    def sums(at):
        part = (policy[at], behavior[at], ids[at], mask[at])
        return weight_sums(pear_token_weights(*part, gamma=0.999), part[0], *part[2:])

    whole = finalise(sums(ids >= 0))
    parts = [sums(ids == sequence) for sequence in range(6)] + [sums(ids > 99)]
    for order in (parts, parts[::-1]):
        assert finalise(functools.reduce(merge, order)) == pytest.approx(whole, rel=1e-6)
    shares = [whole[f"decile_{decile}_weight_share"] for decile in range(10)]
    assert sum(shares) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no loss token"):
        finalise(parts[-1])


def test_quantiles_of_the_histogram_are_near_the_true_ones():
    policy, behavior, ids, mask = make()
    pear = pear_token_weights(policy, behavior, ids, mask, gamma=0.999)
    metrics = finalise(weight_sums(pear, policy, ids, mask))
    ratios, log_weights = pear.log_ratios[mask], pear.log_weights[mask]
    for name, values, tolerance in (("log_ratio", ratios, 0.02), ("log_weight", log_weights, 0.3)):
        for label, quantile in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            true = values.clamp(-10, 5).quantile(quantile).item()
            assert metrics[f"{name}/{label}"] == pytest.approx(true, abs=tolerance), (name, label)


def test_merge_by_prefix():
    left = {"tokens": 2.0, "min/x": -1.0, "max/x": 3.0}
    right = {"tokens": 5.0, "min/x": -4.0, "max/x": 1.0, "extra": 1.0}
    assert merge(left, right) == {"tokens": 7.0, "min/x": -4.0, "max/x": 3.0, "extra": 1.0}
    assert left == {"tokens": 2.0, "min/x": -1.0, "max/x": 3.0}


def test_deciles_by_hand():
    ids = torch.tensor([0] * 20 + [1] * 3)
    loss_tokens = select_loss_tokens(ids, torch.ones(23, dtype=torch.bool))
    twenty = [k // 2 for k in range(20)]
    assert position_deciles(loss_tokens).tolist() == [*twenty, 0, 3, 6]
