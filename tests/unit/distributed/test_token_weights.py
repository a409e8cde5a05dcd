"""The SFT loop weighs tokens exactly as the algorithm core does, with the config's own numbers."""

import math
from collections.abc import Callable

import pytest
import torch

from pear_ray.algorithms import pear
from pear_ray.config.sections import OptimizerConfig
from pear_ray.config.sft import PearWeights, SftConfig, UniformWeights
from pear_ray.distributed.sft_terms import token_weights
from pear_ray.engines.batches import Row, TokenBatch, collate

SETTINGS = {
    "gamma": 0.9,
    "block_size": 2,
    "log_ratio_clip_low": -0.5,
    "log_ratio_clip_high": 0.4,
    "log_weight_clip_low": -0.6,
    "log_weight_clip_high": 0.7,
}
CLIPS = {"log_ratio_clip": (-0.5, 0.4), "log_weight_clip": (-0.6, 0.7)}


@pytest.fixture
def batch() -> TokenBatch:
    rows = [
        Row(
            [1, 2, 3, 4, 5],
            [False, True, True, True, True],
            {"behavior_logprobs": [0.0, -1, -2, -1, -3]},
        ),
        Row([1, 2, 3], [False, False, True], {"behavior_logprobs": [0.0, 0.0, -0.5]}),
    ]
    return collate(rows, pad_id=0, names=("behavior_logprobs",), device=torch.device("cpu"))


def settings(weights: PearWeights | UniformWeights) -> SftConfig:
    return SftConfig(optimizer=OptimizerConfig(learning_rate=1e-3), weights=weights)


LOGPROBS = torch.tensor([-1.2, -1.9, -2.0, -2.5, -0.75])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", lambda *a: pear.pear_token_weights(*a, gamma=0.9, **CLIPS)),
        ("block", lambda *a: pear.pear_block_weights(*a, gamma=0.9, block_size=2, **CLIPS)),
        ("sequence", lambda *a: pear.pear_sequence_weights(*a, **CLIPS)),
    ],
)
def test_each_level_is_its_own_function(
    batch: TokenBatch, level: str, expected: Callable[..., pear.PearWeights]
) -> None:
    config = PearWeights.model_validate({"level": level} | SETTINGS)
    found = token_weights(LOGPROBS, batch, settings(config))
    wanted = expected(
        LOGPROBS, batch.aligned["behavior_logprobs"], batch.sequence_ids, batch.loss_mask
    )
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.log_weights, wanted.log_weights)


def test_sequence_weights_by_hand(batch: TokenBatch) -> None:
    """Log-ratios -0.2, 0.1, -1 (clipped to -0.5), 0.5 (to 0.4) sum to -0.2; and -0.25 alone."""
    config = PearWeights.model_validate({"level": "sequence"} | SETTINGS)
    found = token_weights(LOGPROBS, batch, settings(config))
    expected = [math.exp(-0.2)] * 4 + [math.exp(-0.25)]
    assert found.weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_uniform_weights_are_one_and_still_measure_ratios(batch: TokenBatch) -> None:
    found = token_weights(LOGPROBS, batch, settings(UniformWeights()))
    assert found.weights.tolist() == [1.0] * 5
    assert found.log_weights.tolist() == [0.0] * 5
    assert found.log_ratios.tolist() == pytest.approx([-0.2, 0.1, -1.0, 0.5, -0.25], abs=1e-6)


def test_weights_carry_no_gradient(batch: TokenBatch) -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    assert not token_weights(logprobs, batch, settings(PearWeights())).weights.requires_grad
