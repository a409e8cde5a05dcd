"""A small run on the embedded student, for the tests of both training loops."""

from pathlib import Path
from typing import Any

import torch

from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.embedded.paths import embedded_path

GAME = {"name": "chain_sum", "params": {"min_terms": 2, "max_terms": 3, "max_digits": 1}}


def run_config(tmp_path: Path, **sft: Any) -> RunConfig:
    spans = sft.get("weights", {}).get("level") == "span"
    return validate_run(
        {
            "name": "test",
            "output_dir": str(tmp_path),
            "models": {
                "policy": "embedded:student",
                "behavior": "embedded:teacher",
                "align": "bytes" if spans else "refuse",
                "dtype": "float32",
                "max_model_len": 160,
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "score": {"top_k": 4 if "forward_kl" in str(sft) else 0},
            "sft": {"optimizer": {"learning_rate": 1e-3}, "global_batch_size": 8} | sft,
            "rl": {
                "problems": {"games": [GAME], "size": 16, "seed": 2},
                "optimizer": {"learning_rate": 1e-4, "warmup_fraction": 0.0},
                "num_steps": 4,
                "prompts_per_step": 4,
                "group_size": 8,
                "max_tokens": 64,
            },
            "evaluate": {"problems": {"games": [GAME], "size": 8, "seed": 3}},
            "cluster": {"num_trainers": 1},
        },
        origin="test",
    )


def job(config: RunConfig, tmp_path: Path, stage: str) -> TrainJob:
    (tmp_path / stage).mkdir(exist_ok=True)
    return TrainJob(config=config, run_dir=tmp_path, attempt=1, model=embedded_path("student"))


def parameters_of(worker: Any) -> list[tuple[str, torch.Tensor]]:
    worker.trainer.module.reshard()  # the root stays gathered after a forward pass
    named = worker.trainer.module.named_parameters()
    return [(name, parameter.detach().full_tensor()) for name, parameter in named]
