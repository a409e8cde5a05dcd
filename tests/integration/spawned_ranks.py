"""Ranks of a gloo group in processes of their own, for tests of one step in several ways."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from free_ports import free_ports

WAYS = {"at once": (1, 8192), "in microbatches": (1, 40), "on two ranks": (2, 40)}


def found_by_way(run_rank: Callable[..., None], folder: Path) -> dict[str, Any]:
    """What rank 0 of `run_rank` wrote down, for each way of taking a step."""
    results = {}
    for way, (num_ranks, microbatch_tokens) in WAYS.items():
        [port] = free_ports(1)
        torch.multiprocessing.spawn(
            run_rank, args=(folder, port, num_ranks, microbatch_tokens), nprocs=num_ranks
        )
        file = _run_dir(folder, num_ranks, microbatch_tokens) / "found.json"
        results[way] = json.loads(file.read_text(encoding="utf-8"))
    return results


@contextlib.contextmanager
def rank_of_group(
    rank: int,
    folder: Path,
    port: int,
    num_ranks: int,
    microbatch_tokens: int,
    *,
    write_corpus: Callable[[Path], None],
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run's folder, with a corpus in it, and what rank 0 leaves in `found.json`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run_dir = _run_dir(folder, num_ranks, microbatch_tokens)
    if rank == 0:
        write_corpus(run_dir)
    dist.barrier()
    found: dict[str, Any] = {}
    yield run_dir, found
    if rank == 0:
        (run_dir / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _run_dir(folder: Path, num_ranks: int, microbatch_tokens: int) -> Path:
    return folder / f"{num_ranks}-{microbatch_tokens}"
