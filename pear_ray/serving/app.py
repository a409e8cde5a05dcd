"""The application that Ray Serve deploys: one gateway, and a group of replicas per model.

`serve.yaml` names `build` as its import path, with `ServeSettings` for its arguments.
"""

import os
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from pear_ray.engines.environment import engine_environment
from pear_ray.engines.vllm.spec import MAX_NUM_SEQS, ServerSpec
from pear_ray.errors import ConfigError
from pear_ray.serving.gateway import Gateway
from pear_ray.serving.replica import ModelReplica
from pear_ray.serving.settings import ServedModel, ServeSettings

KV_CACHE_GIB = 1  # of a replica on CPU
# Requests per replica that more replicas are started for. An engine decodes MAX_NUM_SEQS at once,
# each the slower for it: a quarter leaves room while the next replica loads.
TARGET_ONGOING = MAX_NUM_SEQS // 4
MAX_ONGOING = 2 * MAX_NUM_SEQS  # per replica; what is beyond waits at the gateway
CONSTRUCTOR_TRIES = 2  # what a model fails at once, such as memory, it fails at again


def build(arguments: dict[str, Any]) -> Application:
    """The application of `arguments`, which are `ServeSettings` as a dictionary.

    Raises:
        ConfigError: They are not.
    """
    try:
        settings = ServeSettings.model_validate(arguments)
    except ValidationError as error:
        raise ConfigError(f"serve.yaml: args of the application: {error}") from error
    replicas = {model.name: _replicas(model, settings) for model in settings.models}
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING * len(settings.models) * settings.max_replicas,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
    )
    return gateway.bind(settings.model_dump(mode="json"), replicas)


def _replicas(model: ServedModel, settings: ServeSettings) -> Application:
    spec = ServerSpec(
        name=model.name,
        model=model.folder,
        adapters={adapter.name: adapter.folder for adapter in model.adapters},
        max_lora_rank=model.max_lora_rank,
        dtype=settings.dtype,
        device=settings.device,
        tensor_parallel_size=settings.tensor_parallel_size,
        ray_metrics=True,
    )
    wanted = settings.replica_resources
    deployment = serve.deployment(ModelReplica).options(
        name=model.name,
        ray_actor_options={
            "num_cpus": wanted["CPU"],
            "num_gpus": wanted.get("GPU", 0),
            "runtime_env": {"env_vars": _environment(settings)},
        },
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": TARGET_ONGOING,
        },
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
    )
    return deployment.bind(spec)


def _environment(settings: ServeSettings) -> dict[str, str]:
    # Names only of what holds no secret: Ray shows a runtime_env in its dashboard.
    inherited = {
        name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ
    }
    return inherited | engine_environment(
        device=settings.device,
        num_threads=settings.cpus_per_replica,
        kv_cache_gib=KV_CACHE_GIB,
    )
