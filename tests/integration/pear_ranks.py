"""What each rank does in test_pear_on_ranks.py: a PEAR-weighted step per backend and reduction."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.artifacts.tables import SCORED, write_rows
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.sft_loop import SftWorker, TrainJob
from pear_ray.embedded.paths import embedded_path

BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp": {"kind": "fsdp"},
    "ddp": {"kind": "ddp"},
    "zero-2": {"kind": "deepspeed", "zero_stage": 2},
    "zero-3": {"kind": "deepspeed", "zero_stage": 3},
}
REDUCTIONS = ("sum", "token_mean", "seq_mean", "weight_norm")
NUM_ROWS = 9  # odd: ranks have unequal shares
GAME = {"games": [{"name": "chain_sum"}], "size": 8}


def run_rank(rank: int, folder: Path, port: int, num_ranks: int, microbatch_tokens: int) -> None:
    """Take the step each way; rank 0 writes loss and gradient norm."""
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
    run_dir = folder / f"{num_ranks}-{microbatch_tokens}"
    if rank == 0:
        write_corpus(run_dir)
    dist.barrier()
    found = {
        f"{backend} {reduction}": _step(run_dir, backend, reduction, num_ranks, microbatch_tokens)
        for backend in BACKENDS
        for reduction in REDUCTIONS
    }
    if rank == 0:
        (run_dir / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def write_corpus(run_dir: Path) -> None:
    """Rows of various lengths with made-up behavior log-probs."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(NUM_ROWS):
        length = 9 + 3 * number
        rows.append(
            {
                "example_id": f"row-{number}",
                "source": "test",
                "is_negative": False,
                "token_ids": torch.randint(5, 60, (length,), generator=generator).tolist(),
                "loss_mask": [False] * 4 + [True] * (length - 4),
                "behavior_logprobs": (-torch.rand(length, generator=generator) * 5).tolist(),
            }
        )
    (run_dir / "score" / "scored").mkdir(parents=True)
    write_rows(run_dir / "score" / "scored" / "rows.parquet", rows, SCORED)
    (run_dir / "sft").mkdir()


def _step(
    run_dir: Path, backend: str, reduction: str, num_ranks: int, microbatch_tokens: int
) -> list[float]:
    config = run_config(
        num_ranks, reduction=reduction, microbatch_tokens=microbatch_tokens, **_backend(backend)
    )
    job = TrainJob(config=config, run_dir=run_dir, attempt=1, model=embedded_path("student"))
    metrics = SftWorker(job).step(0)
    return [metrics["sft/weighted_loss"], metrics["sft/grad_norm"]]


def _backend(name: str) -> dict[str, Any]:
    return {"backend": BACKENDS[name]}


def run_config(num_ranks: int, **sft: Any) -> RunConfig:
    """One step takes all rows; weights are PEAR's own."""
    optimizer = {"learning_rate": 1e-3}
    return validate_run(
        {
            "name": "test",
            "models": {
                "policy": "embedded:student",
                "behavior": "embedded:teacher",
                "dtype": "float32",
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {"optimizer": optimizer, "global_batch_size": 16} | sft,
            "rl": {"problems": GAME, "optimizer": optimizer, "num_steps": 1},
            "evaluate": {"problems": GAME},
            "cluster": {"num_trainers": num_ranks},
        },
        origin="test",
    )
