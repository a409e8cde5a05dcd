"""A process that is a worker group of one, stage after stage, and keeps its engine between them.

Small runs, many of them, would spend most of their time starting processes and engines. Such a
process runs the same stages with the same loops: what differs is where the group and the engine
come from, and where checkpoints go.
"""

import contextlib
import dataclasses
import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pear_ray.config.rewards import RewardConfig
from pear_ray.engines.vllm.spec import EngineSpec
from pear_ray.tasks.reward_pool import RewardPool

if TYPE_CHECKING:
    from pear_ray.engines.vllm.engine import VllmEngine

CHECKPOINT = "checkpoint"  # in the stage's folder


class Host:
    """What this process keeps from stage to stage."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.engine: VllmEngine | None = None
        self.others: dict[Hashable, Any] = {}
        self.stage_dir: Path | None = None


# What two configs of one network have in common, whatever version of transformers wrote them.
_SHAPE = (
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
_hosts: list[Host] = []  # one, or none
Kept = TypeVar("Kept")


def become_host(device: str) -> None:
    """From now on the groups and engines of this process's stages are in the process itself.

    Args:
        device: `cpu` or `cuda`, as `cluster.device`.
    """
    if _hosts:
        return
    _hosts.append(Host(device))
    _make_group(device)


def _make_group(device: str) -> None:
    import torch.distributed as dist  # noqa: PLC0415 - seconds, and only a host pays them

    if dist.is_initialized():
        return
    # It stays: groups that are made later meet there too.
    with tempfile.NamedTemporaryFile(prefix="pear_ray_host_", delete=False) as meeting:
        pass
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{meeting.name}",
        rank=0,
        world_size=1,
    )


def is_host() -> bool:
    """Whether this process is its own worker group."""
    return bool(_hosts)


def open_engine(spec: EngineSpec) -> "VllmEngine":
    """An engine of `spec` that takes weights and holds those of `spec.model`.

    In a host the one that an earlier stage has left, where it is of the same kind. Its weights are
    then replaced, read back and compared on the canary.

    Raises:
        EngineError: It could not start.
        WeightSyncError: The engine that was there did not take the weights.
    """
    from pear_ray.engines.vllm.engine import VllmEngine  # noqa: PLC0415 - seconds

    host = _hosts[0] if _hosts else None
    if host is None:
        return VllmEngine(spec, takes_weights=True)
    if host.engine is None or not _is_like(host.engine.spec, spec):
        if host.engine is not None:
            # Before the other one takes its memory. vLLM takes the process group along.
            host.engine = None
            gc.collect()
            _make_group(host.device)
        host.engine = VllmEngine(spec, takes_weights=True)
        return host.engine
    from pear_ray.engines.weights import MAX_GAP, load_checkpoint  # noqa: PLC0415

    load_checkpoint(host.engine, Path(spec.model), max_gap=MAX_GAP[spec.dtype])
    return host.engine


def kept(key: Hashable, make: Callable[[], Kept]) -> Kept:
    """What this host has under `key`, made at the first call; elsewhere made at each."""
    if not _hosts:
        return make()
    others = _hosts[0].others
    if key not in others:
        others[key] = make()
    return others[key]


def open_rewards(config: RewardConfig) -> RewardPool:
    """A pool of verifiers; in a host the one that an earlier stage has left, if it is the same."""
    if not _hosts:
        return RewardPool(config)
    key = ("rewards", config.model_dump_json())
    if not kept(key, lambda: RewardPool(config)).is_open:
        del _hosts[0].others[key]
    return kept(key, lambda: RewardPool(config))


def close_rewards(pool: RewardPool) -> None:
    """End the pool, unless this process is a host, which keeps it for its next stage."""
    if not _hosts:
        pool.close()


@contextlib.contextmanager
def reward_pool(config: RewardConfig) -> Iterator[RewardPool]:
    """`open_rewards`, and at the end `close_rewards`."""
    pool = open_rewards(config)
    try:
        yield pool
    finally:
        close_rewards(pool)


def _is_like(there: EngineSpec, wanted: EngineSpec) -> bool:
    """Whether an engine can serve as another: all but weights, seed and sleep is the same.

    Requests carry their own seeds. One that can sleep serves one that need not.
    """
    same = dataclasses.replace(
        wanted,
        model=there.model,
        seed=there.seed,
        sleeps=there.sleeps or wanted.sleeps,
    )
    return same == there and _architecture(there.model) == _architecture(wanted.model)


def _architecture(model: str) -> dict[str, Any]:
    """What config.json says of the network; not who wrote it, in which version."""
    found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in _SHAPE if key in found}


def run_here(
    loop: Callable[[dict[str, Any]], None], job: dict[str, Any], *, stage_dir: Path
) -> None:
    """Run `loop(job)` as a group of one; it takes up at its last checkpoint in `stage_dir`."""
    _hosts[0].stage_dir = stage_dir
    loop(job)


def saved_here() -> Path | None:
    """The last checkpoint of the stage that this host runs; None before the first."""
    folder = _stage_dir() / CHECKPOINT
    return folder if folder.exists() else None


def save_here(write: Callable[[Path], None]) -> None:
    """Replace the stage's checkpoint by what `write` writes into a folder, whole or not at all."""
    place = _stage_dir() / CHECKPOINT
    partial, old = (place.with_name(f".{CHECKPOINT}.{mark}") for mark in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    write(partial)
    if place.exists():
        place.rename(old)
    partial.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _stage_dir() -> Path:
    folder = _hosts[0].stage_dir
    if folder is None:
        raise RuntimeError("no stage runs in this process")
    return folder
