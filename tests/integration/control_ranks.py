"""What each rank does in test_controls_on_ranks.py: a step under every control."""

from pathlib import Path
from typing import Any

from pear_ranks import run_config, write_corpus
from spawned_ranks import rank_of_group

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
    at = (rank, folder, port, num_ranks, microbatch_tokens)
    with rank_of_group(*at, write_corpus=write_corpus) as (run_dir, found):
        for arm, weights in ARMS.items():
            config = run_config(num_ranks, weights=weights, microbatch_tokens=microbatch_tokens)
            job = TrainJob(
                config=config, run_dir=run_dir, attempt=1, model=embedded_path("student")
            )
            worker = SftWorker(job)
            if arm == "shuffled sequence":  # the guard has rows that are on every rank
                worker._check_equivalence()
            metrics = worker.step(0)
            found[arm] = {name: metrics[name] for name in KEPT}
