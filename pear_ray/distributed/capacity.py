"""What a run asks of a cluster, and whether that is there. Starts nothing, imports no Ray."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from pear_ray.config.run import RunConfig
from pear_ray.config.sections import ClusterConfig
from pear_ray.config.spans import engine_span, spans_in_words
from pear_ray.engines.environment import engine_environment
from pear_ray.engines.vllm.spec import EngineSpec
from pear_ray.errors import CapacityError


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What one trainer or sampler asks Ray for."""
    wanted = {"CPU": cluster.cpus_per_worker}
    return wanted | {"GPU": 1.0} if cluster.device == "cuda" else wanted


CPU_SHARE_LEFT = 0.5  # of a scorer's CPUs, so that Ray Data's own tasks find a place


def engine_resources(config: RunConfig, stage: str) -> dict[str, float]:
    """What one engine of `stage` asks Ray for, all on one node."""
    devices = engine_span(config, stage)
    return {name: amount * devices for name, amount in worker_resources(config.cluster).items()}


def num_threads(cluster: ClusterConfig) -> int:
    """Compute threads of one worker."""
    return max(1, int(cluster.cpus_per_worker))


def engine_spec(
    config: RunConfig,
    model: Path,
    *,
    seed: int = 0,
    chunk_tokens: int | None = None,
    max_top_k: int = 0,
    tensor_parallel_size: int = 1,
    sleeps: bool = False,
    spans_ranks: bool = False,
) -> EngineSpec:
    """The run's engine on the weights in `model`."""
    on_gpu = config.cluster.device == "cuda"
    return EngineSpec(
        model=str(model),
        dtype=config.models.dtype,
        max_model_len=config.models.max_model_len,
        device=config.cluster.device,
        gpu_memory_fraction=config.cluster.gpu_memory_fraction,
        seed=seed,
        chunk_tokens=chunk_tokens,
        max_top_k=max_top_k,
        tensor_parallel_size=tensor_parallel_size,
        spans_ranks=spans_ranks and tensor_parallel_size > 1,
        eager=config.cluster.enforce_eager,
        sleeps=sleeps and on_gpu and not config.cluster.shares_gpu,
        cache_gib=config.cluster.kv_cache_gib if on_gpu and config.cluster.shares_gpu else None,
    )


def rl_engine_spec(config: RunConfig, model: Path) -> EngineSpec:
    """The engine of RL's ranks: one each, or one of `rl.tensor_parallel_size` of them together."""
    lora = config.rl.lora
    spec = engine_spec(
        config,
        model,
        seed=config.seed,
        tensor_parallel_size=config.rl.tensor_parallel_size,
        spans_ranks=True,
        sleeps=config.rl.colocation.sleep,
    )
    if lora is None or lora.sync == "merged":
        return spec
    return dataclasses.replace(spec, max_lora_rank=lora.rank)


def sampler_spec(config: RunConfig, model: Path, *, stage: str, sleeps: bool = False) -> EngineSpec:
    """An engine that samples for `stage`, on one device or on as many as that spreads it over."""
    return engine_spec(
        config,
        model,
        tensor_parallel_size=engine_span(config, stage),
        spans_ranks=True,
        sleeps=sleeps,
    )


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment of every worker process that may hold an engine."""
    inherited = {
        name: os.environ[name]
        for name in ("HF_HUB_OFFLINE", "HF_HOME", "PEAR_RAY_CACHE")
        if name in os.environ
    }
    return inherited | engine_environment(
        device=cluster.device,
        num_threads=num_threads(cluster),
        kv_cache_gib=cluster.kv_cache_gib,
    )


def demand(config: RunConfig) -> dict[str, float]:
    """The most that any stage needs at once; scoring grows beyond it where it can."""
    cluster = config.cluster
    engines = cluster.min_samplers or cluster.num_samplers
    widest = max(engine_span(config, stage) for stage in ("collect", "score", "evaluate"))
    workers = max(cluster.num_trainers, engines * widest)
    return {name: amount * workers for name, amount in worker_resources(cluster).items()}


def check_capacity(config: RunConfig, found: Mapping[str, float]) -> None:
    """See that the largest stage fits.

    Raises:
        CapacityError: It does not; the message says what was asked and found, and what to set.
    """
    short = {
        name: (wanted, found.get(name, 0.0))
        for name, wanted in demand(config).items()
        if wanted > found.get(name, 0.0)
    }
    if short:
        asked = "; ".join(
            f"asked for {want:g} {name}, the cluster has {have:g}"
            for name, (want, have) in short.items()
        )
        spans = spans_in_words(config)
        raise CapacityError(
            f"{asked}: lower cluster.num_trainers={config.cluster.num_trainers}, "
            f"cluster.num_samplers={config.cluster.num_samplers}, {f'{spans} ' if spans else ''}or "
            f"cluster.cpus_per_worker={config.cluster.cpus_per_worker:g}, or give the cluster more"
        )
