"""What each of two ranks does in test_backends.py: the same two steps on every backend."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.config.backends import BackendConfig, DdpBackend, DeepSpeedBackend, FsdpBackend
from pear_ray.config.lora import LoraConfig
from pear_ray.config.sections import OptimizerConfig
from pear_ray.config.sft import SftConfig
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines import backends
from pear_ray.engines.backends import make_trainer
from pear_ray.engines.batches import Row, TokenBatch, collate
from pear_ray.engines.compiling import compile_layers
from pear_ray.engines.trainer import Trainer
from pear_ray.errors import TrainingError

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, weight_decay=0.01)
ROWS = [
    [5, 60, 70, 80, 90, 257],
    [7, 33, 257],
    [9, 40, 41, 42, 257],
    [11, 257],
    [5, 61, 71, 257],
    [8, 9, 10, 11, 12, 13, 257],
]
# Uneven on purpose: three microbatches on one rank; on the other two, and one without a row.
CUTS = [[[0, 3], [1], [5]], [[2], [4], []]]
CANDIDATES = {60: 0.5, 7: 0.3}
REST = 0.2
EMA_DECAY = 0.75
NUM_TOKENS = sum(len(row) - 1 for row in ROWS)
BACKENDS: dict[str, BackendConfig] = {
    "fsdp": FsdpBackend(),
    "fsdp-recomputing": FsdpBackend(),
    "fsdp-hybrid": FsdpBackend(shard_over=1),
    "fsdp-average": FsdpBackend(),
    "fsdp-compiled-recomputing-average": FsdpBackend(),
    "ddp": DdpBackend(),
    "ddp-average": DdpBackend(),
    "zero-1": DeepSpeedBackend(zero_stage=1),
    "zero-2": DeepSpeedBackend(zero_stage=2),
    "zero-2-offload": DeepSpeedBackend(zero_stage=2, offload="optimizer"),
    "zero-3": DeepSpeedBackend(zero_stage=3),
    "zero-3-offload": DeepSpeedBackend(zero_stage=3, offload="all"),
    "fsdp-lora-recomputing": FsdpBackend(),
    "fsdp-lora-average": FsdpBackend(),
    "ddp-lora": DdpBackend(),
    "zero-1-lora": DeepSpeedBackend(zero_stage=1),
    "zero-2-lora": DeepSpeedBackend(zero_stage=2),
    "zero-3-lora": DeepSpeedBackend(zero_stage=3),
}
LORA = LoraConfig(rank=4, alpha=6.0)
SEED = 3

ALONE = ("fsdp", "fsdp-average", "ddp", "zero-2", "zero-3")


def run_rank(rank: int, folder: Path, port: int) -> None:
    """Take the steps on every backend; rank 0 writes what came out."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(len(CUTS)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # The same graphs without the minutes in which their code is generated.
    backends.compile_layers = functools.partial(compile_layers, backend="aot_eager")
    found = {name: _steps(name, folder / name, rank) for name in BACKENDS}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def go_on_alone(rank: int, folder: Path, port: int) -> None:
    """In a group of one, take up what two ranks saved after their first step, and take the next."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in ALONE:
        trainer = make(name)
        try:
            trainer.load(folder / name / "checkpoint")
        except TrainingError as error:
            found[name] = str(error)
            continue
        for share in range(len(CUTS)):
            _accumulate(trainer, share)
        found[name] = trainer.step(NUM_TOKENS).grad_norm
        trainer.export(folder / name / "alone", save_tokenizer=lambda _: None)
        _export_average(trainer, name, folder / name / "alone-average")
    (folder / "alone.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def make(name: str) -> Trainer:
    """The embedded student on the backend."""
    return make_trainer(
        embedded_path("student"),
        SftConfig(
            optimizer=OPTIMIZER,
            backend=BACKENDS[name],
            activation_checkpointing="recomputing" in name,
            ema_decay=EMA_DECAY if name.endswith("average") else None,
            compile="compiled" in name,
            lora=LORA if "lora" in name else None,
        ),
        num_steps=2,
        device="cpu",
        dtype="float32",
        seed=SEED,
    )


def _steps(name: str, folder: Path, rank: int) -> dict[str, Any]:
    trainer = make(name)
    _accumulate(trainer, rank)
    norms = [trainer.probe(NUM_TOKENS)]
    _accumulate(trainer, rank)
    norms.append(trainer.step(NUM_TOKENS).grad_norm)
    trainer.save(folder / "checkpoint")
    dist.barrier()
    _accumulate(trainer, rank)
    norms.append(trainer.step(NUM_TOKENS).grad_norm)
    with torch.no_grad():
        trained = trainer.policy(_batch(ROWS[:2]), temperature=1.0).tolist()
    trainer.export(folder / "model", save_tokenizer=lambda _: None)
    _export_average(trainer, name, folder / "average")

    distilling = make(name)
    _accumulate(distilling, rank, distil=True)
    distilled = distilling.probe(NUM_TOKENS)

    resumed = make(name)
    resumed.load(folder / "checkpoint")
    _accumulate(resumed, rank, factor=3.0)
    half_way = resumed.probe(NUM_TOKENS)  # half-way too, a look at a gradient must leave no trace
    _accumulate(resumed, rank)
    again = resumed.step(NUM_TOKENS).grad_norm
    resumed.export(folder / "resumed", save_tokenizer=lambda _: None)
    _export_average(resumed, name, folder / "average-resumed")

    poisoned = make(name)
    _accumulate(poisoned, rank, factor=float("nan"))
    try:
        poisoned.step(NUM_TOKENS)
        error = ""
    except Exception as caught:  # noqa: BLE001 - whatever it is, the test compares it
        error = f"{type(caught).__name__}: {caught}"
    poisoned.export(folder / "poisoned", save_tokenizer=lambda _: None)
    return {
        "norms": norms,
        "trained": trained,
        "distilled": distilled,
        "half_way": half_way,
        "again": again,
        "count": resumed.step_count,
        "error": error,
    }


def _batch(ids: list[list[int]]) -> TokenBatch:
    rows = [row_of(each) for each in ids]
    return collate(rows, pad_id=256, names=(), device=torch.device("cpu"))


def _export_average(trainer: Trainer, name: str, folder: Path) -> None:
    if name.endswith("average"):
        with trainer.averaged():
            trainer.export(folder, save_tokenizer=lambda _: None)


def _accumulate(trainer: Trainer, rank: int, *, factor: float = 1.0, distil: bool = False) -> None:
    for number, places in enumerate(CUTS[rank], start=1):
        rows = [row_of(ROWS[place]) for place in places]
        with trainer.microbatch(last=number == len(CUTS[rank])):
            batch = collate(
                rows,
                pad_id=256,
                names=(),
                device=torch.device("cpu"),
                num_candidates=len(CANDIDATES) if distil else 0,
            )
            if getattr(trainer, "_average", None):  # a look at the average must disturb nothing
                with trainer.averaged(), torch.no_grad():
                    trainer.policy(batch, temperature=1.0)
            found = trainer.policy(batch, temperature=1.0, entropy_k=5 if distil else 0)
            if isinstance(found, dict):
                # Cross-entropy against one fixed distribution: of two ids, and of all others.
                weights = torch.tensor([*CANDIDATES.values()])
                losses = -(found["candidates"] * weights).sum(1) - REST * found["rest"]
                trainer.backward((losses * found["entropies"]).sum() - found["logprobs"].sum())
            else:
                trainer.backward(-found.sum() * factor)


def row_of(ids: list[int]) -> Row:
    """A row that trains on all its tokens, with the same candidates for each of them."""
    candidates = (list(CANDIDATES) * len(ids), list(CANDIDATES.values()) * len(ids))
    return Row(ids, [True] * len(ids), {}, candidates)
