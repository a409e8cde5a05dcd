"""What each rank does in test_pear_on_ranks.py: a PEAR-weighted step per backend and reduction."""

from pathlib import Path
from typing import Any

import torch
from spawned_ranks import rank_of_group

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
    at = (rank, folder, port, num_ranks, microbatch_tokens)
    with rank_of_group(*at, write_corpus=write_corpus) as (run_dir, found):
        for backend in BACKENDS:
            for reduction in REDUCTIONS:
                step = (run_dir, backend, reduction, num_ranks, microbatch_tokens)
                found[f"{backend} {reduction}"] = _step(*step)


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
