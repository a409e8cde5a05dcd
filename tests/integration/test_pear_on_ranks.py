"""One PEAR-weighted step: at once, in microbatches, on two ranks; the same loss and gradient."""

import pear_ranks
import pytest
from spawned_ranks import WAYS, found_by_way


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Loss and gradient norm by way, backend and reduction."""
    return found_by_way(pear_ranks.run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("reduction", pear_ranks.REDUCTIONS)
@pytest.mark.parametrize("backend", pear_ranks.BACKENDS)
def test_neither_microbatches_nor_ranks_nor_the_backend_change_a_step(
    found: dict[str, dict[str, list[float]]], backend: str, reduction: str
) -> None:
    loss, norm = found["at once"][f"fsdp {reduction}"]
    assert norm > 0
    for way in WAYS:
        here = found[way][f"{backend} {reduction}"]
        assert here[0] == pytest.approx(loss, rel=1e-5), way
        assert here[1] == pytest.approx(norm, rel=1e-4), way
