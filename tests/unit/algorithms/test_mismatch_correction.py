"""Weights that correct for the sampler: every level and mode by hand, by loops, harmless at 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.mismatch import correction_weights

QUICK = settings(deadline=None, max_examples=30)
LEVELS = ["token", "sequence", "geometric"]
MODES = ["mask", "clip", "truncate"]
NAN = math.nan
# Sequence 0 has ratios 3, 1 (and a masked one), sequence 1 has 0.4, sequence 2 has 1.25.
PROXIMAL = torch.tensor([3.0, 1.0, NAN, 0.4, 1.25]).log().requires_grad_()
BEHAVIOR = torch.zeros(5)
IDS = torch.tensor([0, 0, 0, 1, 2])
MASK = torch.tensor([True, True, False, True, True])
ROOT = math.sqrt(3)


@pytest.mark.parametrize(
    ("level", "mode", "weights", "changed"),
    [
        ("token", "mask", [0, 1, 0, 0, 1.25], [1, 0, 0, 1, 0]),
        ("token", "clip", [2, 1, 0, 0.5, 1.25], [1, 0, 0, 1, 0]),
        ("token", "truncate", [2, 1, 0, 0.4, 1.25], [1, 0, 0, 0, 0]),
        ("sequence", "mask", [0, 0, 0, 0, 1.25], [1, 1, 0, 1, 0]),
        ("sequence", "clip", [2, 2, 0, 0.5, 1.25], [1, 1, 0, 1, 0]),
        ("sequence", "truncate", [2, 2, 0, 0.4, 1.25], [1, 1, 0, 0, 0]),
        ("geometric", "mask", [ROOT, ROOT, 0, 0, 1.25], [0, 0, 0, 1, 0]),
        ("geometric", "clip", [ROOT, ROOT, 0, 0.5, 1.25], [0, 0, 0, 1, 0]),
        ("geometric", "truncate", [ROOT, ROOT, 0, 0.4, 1.25], [0, 0, 0, 0, 0]),
    ],
)
def test_by_hand(level, mode, weights, changed):
    got = correction_weights(
        PROXIMAL, BEHAVIOR, IDS, MASK, level=level, mode=mode, low=0.5, high=2.0
    )
    assert got.weights.tolist() == pytest.approx(weights, rel=1e-6)
    assert not got.weights.requires_grad
    here, nowhere = (got.masked, got.bounded) if mode == "mask" else (got.bounded, got.masked)
    assert here.tolist() == [bool(each) for each in changed]
    assert not nowhere.any()


def test_bounds_that_leave_out_agreement_are_refused():
    for low, high in ((1.5, 2.0), (0.5, 0.9), (-0.1, 2.0)):
        with pytest.raises(ValueError, match="leaves out the ratio 1"):
            correction_weights(
                PROXIMAL, BEHAVIOR, IDS, MASK, level="token", mode="mask", low=low, high=high
            )


def loop(proximal, behavior, ids, level, mode, low, high):
    """Token by token, from the definition."""
    out = []
    for t in range(len(ids)):
        own = [s for s in range(len(ids)) if ids[s] == ids[t]]
        gaps = [float(proximal[s]) - float(behavior[s]) for s in own]
        log_ratio = {
            "token": float(proximal[t]) - float(behavior[t]),
            "sequence": math.fsum(gaps),
            "geometric": math.fsum(gaps) / len(gaps),
        }[level]
        ratio = math.exp(log_ratio)
        out.append(
            {
                "mask": ratio if low <= ratio <= high else 0.0,
                "clip": min(max(ratio, low), high),
                "truncate": min(ratio, high),
            }[mode]
        )
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-3, 0.3, 2.0]),
)
def test_against_a_loop(level, mode, lengths, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    behavior = -torch.rand(size, generator=generator, dtype=torch.float64)
    proximal = behavior + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = torch.ones(size, dtype=torch.bool)
    knobs = {"level": level, "mode": mode, "low": 0.5, "high": 2.0}
    got = correction_weights(proximal, behavior, ids, mask, **knobs)
    assert got.weights.tolist() == pytest.approx(loop(proximal, behavior, ids, **knobs), rel=1e-9)
    # A sampler that agrees is not corrected, whatever the knobs.
    same = correction_weights(proximal, proximal, ids, mask, **knobs)
    assert same.weights.eq(1).all()
    assert not (same.masked | same.bounded).any()


def test_token_weights_make_an_expectation_the_trainers():
    """Unbiased where no bound is in force: sum_v q(v) w(v) f(v) = sum_v p(v) f(v)."""
    trainer = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    sampler = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    values = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    ids, mask = torch.arange(3), torch.ones(3, dtype=torch.bool)
    got = correction_weights(
        trainer.log(), sampler.log(), ids, mask, level="token", mode="truncate", low=0.0, high=2.0
    )
    torch.testing.assert_close((sampler * got.weights * values).sum(), (trainer * values).sum())
