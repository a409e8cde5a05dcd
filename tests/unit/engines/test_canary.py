"""The canary after a weight sync: what passes, what does not."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.policy import load_policy
from pear_ray.engines.weights import (
    canary_batch,
    canary_gap,
    canary_ids,
    canary_logprobs,
    check_gap,
)
from pear_ray.errors import WeightSyncError


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0])
def test_a_gap_up_to_the_limit_passes(gap: float) -> None:
    check_gap(gap, max_gap=1.0, where="here")


@pytest.mark.parametrize("gap", [1.0001, math.inf, math.nan])
def test_a_larger_gap_fails(gap: float) -> None:
    with pytest.raises(WeightSyncError, match=r"here: .*does not hold the trainer's weights"):
        check_gap(gap, max_gap=1.0, where="here")


def test_canary_ids_are_in_the_vocabulary_and_distinct() -> None:
    ids = canary_ids(272)
    assert ids[:3] == [31, 62, 93]  # 7919 = 29 * 272 + 31
    assert len(set(ids)) == 48
    assert all(0 <= each < 272 for each in ids)


class Reference:
    """transformers as the engine, `offset` nats off."""

    def __init__(self, folder: Path, offset: float) -> None:
        self.folder, self.offset = folder, offset

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        found = reference_logprobs(self.folder, sequences)
        return [np.asarray(each, dtype=np.float32) + self.offset for each in found]


def test_the_gap_is_the_mean_absolute_difference(student: Path) -> None:
    policy = load_policy(student)
    batch = canary_batch(272, device=torch.device("cpu"))
    assert batch.num_loss_tokens == 47
    trained = canary_logprobs(policy, batch)
    assert canary_gap(Reference(student, 0.0), trained, batch) < 1e-5
    assert canary_gap(Reference(student, -0.25), trained, batch) == pytest.approx(0.25, abs=1e-4)


def test_a_stale_weight_is_seen(student: Path) -> None:
    policy = load_policy(student)
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight.mul_(1.01)
    batch = canary_batch(272, device=torch.device("cpu"))
    trained = canary_logprobs(policy, batch)
    assert canary_gap(Reference(student, 0.0), trained, batch) > 1e-3
