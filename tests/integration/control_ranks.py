"""What each rank does in test_controls_on_ranks.py: a step under every control."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pear_ranks import run_config, write_corpus

from pear_ray.distributed.sft_loop import SftWorker, TrainJob
from pear_ray.embedded.paths import embedded_path

ARMS: dict[str, dict[str, Any]] = {
    f"{control} {level}": {"kind": "pear", "control": control, "level": level}
    for control in ("none", "shuffled", "position_profile", "likelihood_only")
    for level in ("token", "sequence")
}
ARMS["shuffled token, mean one"] = ARMS["shuffled token"] | {"rescale": "batch_mean_one"}
KEPT = ("sft/weighted_loss", "sft/grad_norm", "sft/weight/mean", "sft/ess_fraction", "sft/nll")


def run_rank(rank: int, folder: Path, port: int, num_ranks: int, microbatch_tokens: int) -> None:
    """Take the step with each arm; rank 0 writes the metrics."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run_dir = folder / f"{num_ranks}-{microbatch_tokens}"
    if rank == 0:
        write_corpus(run_dir)
    dist.barrier()
    found = {}
    for arm, weights in ARMS.items():
        config = run_config(num_ranks, weights=weights, microbatch_tokens=microbatch_tokens)
        job = TrainJob(config=config, run_dir=run_dir, attempt=1, model=embedded_path("student"))
        worker = SftWorker(job)
        if arm == "shuffled sequence":  # the guard has rows that are on every rank
            worker._check_equivalence()
        metrics = worker.step(0)
        found[arm] = {name: metrics[name] for name in KEPT}
    if rank == 0:
        (run_dir / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
