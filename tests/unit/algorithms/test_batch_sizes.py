"""Sizes by device and model, by hand."""

import pytest

from pear_ray.algorithms.batch_sizes import ALL, enough_group_tokens, head_chunk_tokens


@pytest.mark.parametrize(
    ("device", "hidden_size", "tokens"),
    [("cpu", 96, 4608), ("cpu", 128, 3456), ("cpu", 192, 2304), ("cpu", 4096, 2304)],
)
def test_groups_of_narrow_models_are_larger(device: str, hidden_size: int, tokens: int) -> None:
    assert enough_group_tokens(device, hidden_size=hidden_size) == tokens


def test_a_gpu_takes_all_that_it_may() -> None:
    assert enough_group_tokens("cuda", hidden_size=4096) == ALL


@pytest.mark.parametrize(
    ("device", "vocab_size", "tokens"),
    [("cpu", 272, 512), ("cpu", 8192, 512), ("cpu", 8193, 256), ("cuda", 272, 1024)],
)
def test_chunks_of_a_small_vocabulary_are_larger(device: str, vocab_size: int, tokens: int) -> None:
    assert head_chunk_tokens(device, vocab_size=vocab_size) == tokens
