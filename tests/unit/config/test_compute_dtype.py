"""bfloat16 is computed in on CUDA only."""

import pytest

from pear_ray.config.sections import compute_dtype


@pytest.mark.parametrize(
    ("dtype", "device", "computed"),
    [
        ("bfloat16", "cuda", "bfloat16"),
        ("bfloat16", "cpu", "float32"),
        ("float32", "cuda", "float32"),
        ("float32", "cpu", "float32"),
    ],
)
def test_what_training_computes_in(dtype: str, device: str, computed: str) -> None:
    assert compute_dtype(dtype, device=device) == computed
