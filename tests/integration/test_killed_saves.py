"""A rank killed in the middle of a save: the group goes on from the save before, bitwise."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pear_ray.artifacts.tables import SCORED, write_rows
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.train_group import CHECKPOINTS_KEPT, run_train_group
from pear_ray.embedded.paths import embedded_path
from pear_ray.telemetry.metrics_log import MetricRecord, read_metrics

GAME = {"games": [{"name": "chain_sum"}], "size": 8}
DIES_AT = 3


def make_loop(*, dies: bool) -> Callable[[dict[str, Any]], None]:
    """The SFT loop; with `dies`, rank 1 is killed once while the third checkpoint is written.

    Made here and not named at the top: workers cannot import a module of tests.
    """
    dies_at = DIES_AT if dies else 0

    def loop(job: dict[str, Any]) -> None:
        import torch.distributed as dist

        from pear_ray.distributed.sft_loop import sft_loop
        from pear_ray.engines.native_trainer import NativeTrainer

        whole, died = NativeTrainer.save, job["run_dir"] / "died"

        def half(self: NativeTrainer, folder: Path) -> None:
            whole(self, folder)
            if self.step_count == dies_at and dist.get_rank() == 1 and not died.exists():
                died.touch()
                for file in folder.iterdir():
                    os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        NativeTrainer.save = half
        sft_loop(job)

    return loop


def run_config(folder: Path) -> RunConfig:
    optimizer = {"learning_rate": 1e-3}
    return validate_run(
        {
            "name": "test",
            "output_dir": str(folder),
            "models": {
                "policy": "embedded:student",
                "behavior": "embedded:teacher",
                "dtype": "float32",
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {
                "optimizer": optimizer,
                "global_batch_size": 8,
                "num_epochs": 2,
                "checkpoint_every": 1,
            },
            "rl": {"problems": GAME, "optimizer": optimizer, "num_steps": 1},
            "evaluate": {"problems": GAME},
            "cluster": {"num_trainers": 2, "cpus_per_worker": 0.5, "max_failures": 1},
        },
        origin="test",
    )


def train(loop: Any, folder: Path) -> tuple[dict[int, dict[str, float]], dict[str, torch.Tensor]]:
    """Run `loop` on two trainers; the last attempt's metrics of each step, and the model."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(16):
        length = 12 + 2 * (number % 5)
        rows.append(
            {
                "example_id": f"row-{number:02d}",
                "source": "test",
                "is_negative": False,
                "token_ids": torch.randint(5, 60, (length,), generator=generator).tolist(),
                "loss_mask": [False] * 4 + [True] * (length - 4),
                "behavior_logprobs": (-torch.rand(length, generator=generator) * 5).tolist(),
            }
        )
    (folder / "score" / "scored").mkdir(parents=True)
    write_rows(folder / "score" / "scored" / "rows.parquet", rows, SCORED)
    (folder / "sft").mkdir()
    config = run_config(folder)
    job = {
        "config": config,
        "run_dir": folder,
        "attempt": 1,
        "model": embedded_path("student"),
    }
    run_train_group(loop, job, cluster=config.cluster, stage_dir=folder / "sft")
    records = read_metrics(folder / "metrics.jsonl")
    steps = {r.step: r.metrics for r in records if isinstance(r, MetricRecord)}
    return steps, load_file(folder / "sft" / "model" / "model.safetensors")


def test_a_rank_killed_in_mid_save(local_ray: None, tmp_path: Path) -> None:
    steps, weights = train(make_loop(dies=False), tmp_path / "undisturbed")
    assert sorted(steps) == [1, 2, 3, 4]
    again, same = train(make_loop(dies=True), tmp_path / "killed")
    assert (tmp_path / "killed" / "died").exists()
    records = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    taken = [r.step for r in records if isinstance(r, MetricRecord)]
    # From a checkpoint before the one that was cut off; Ray Train learns of each a moment later.
    assert taken in ([1, 2, 3, 3, 4], [1, 2, 3, 2, 3, 4])
    for step, metrics in steps.items():
        for name in ("sft/weighted_loss", "sft/grad_norm"):
            assert again[step][name] == metrics[name]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    for folder in ("undisturbed", "killed"):
        kept = list((tmp_path / folder / "sft" / "train").glob("step-*"))
        assert len(kept) <= CHECKPOINTS_KEPT
