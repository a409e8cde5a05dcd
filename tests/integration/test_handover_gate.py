"""The hand-over gate in the workers: what only a loaded trainer and a real engine can show."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import job, run_config

from pear_ray.distributed.train_worker import export
from pear_ray.engines.handover.live import check_engine
from pear_ray.errors import HandoverError


def exported(worker: Any, folder: Path, *, factor: float = 1.0) -> Path:
    """What a worker leaves whose weights were moved by `factor`."""
    worker.trainer.module.reshard()  # the root stays gathered after a forward pass
    with torch.no_grad():
        for parameter in worker.trainer.module.parameters():
            parameter.mul_(factor)
    export(worker.trainer, worker.chat, folder)
    return folder


def test_an_engine_that_holds_the_checkpoint_passes(grpo: Any, engine: Any, tmp_path: Path) -> None:
    folder = exported(grpo, tmp_path / "sft" / "model")
    gap = check_engine(engine, folder, dtype="float32")
    assert gap is not None
    assert gap < 1e-5


def test_an_engine_that_holds_another_is_stopped_by_name(
    grpo: Any, engine: Any, tmp_path: Path
) -> None:
    """1 % of the weights: far less than a lost tie or a stale head."""
    folder = exported(grpo, tmp_path / "sft" / "model", factor=1.01)
    with pytest.raises(HandoverError, match=r"engine: the engine's log-probs differ .* by 0\.\d"):
        check_engine(engine, folder, dtype="float32")


def test_a_worker_does_not_start_on_a_checkpoint_that_loads_as_another(
    grpo: Any, tmp_path: Path
) -> None:
    from pear_ray.distributed.rl_replay import ReplayWorker

    folder = exported(grpo, tmp_path / "sft" / "model")
    told = dataclasses.replace(job(run_config(tmp_path), tmp_path, "rl_train"), model=folder)
    ReplayWorker(told, [])  # as it was exported
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HandoverError, match=r"reload: loaded again, log-probs differ .* by 0\.\d"):
        ReplayWorker(told, [])
