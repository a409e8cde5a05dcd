"""One PEAR-weighted step: at once, in microbatches, on two ranks; the same loss and gradient."""

import json
import socket

import pear_ranks
import pytest
import torch

WAYS = {"at once": (1, 8192), "in microbatches": (1, 40), "on two ranks": (2, 40)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Loss and gradient norm by way, backend and reduction."""
    folder = tmp_path_factory.mktemp("ranks")
    results = {}
    for way, (num_ranks, microbatch_tokens) in WAYS.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(
            pear_ranks.run_rank,
            args=(folder, port, num_ranks, microbatch_tokens),
            nprocs=num_ranks,
        )
        file = folder / f"{num_ranks}-{microbatch_tokens}" / "found.json"
        results[way] = json.loads(file.read_text(encoding="utf-8"))
    return results


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
