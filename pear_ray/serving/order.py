"""The command line of `pear serve`, and all of it that can be checked without a cluster.

Imports no Ray and no vLLM: what cannot be served is said at once.
"""

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

from pear_ray.errors import CapacityError, ConfigError, InputError
from pear_ray.machine import num_gpus
from pear_ray.serving.checkpoints import served_models
from pear_ray.serving.key import is_loopback, key_from_environment
from pear_ray.serving.settings import ServeSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOrder:
    """The command line of `pear serve`, not yet checked."""

    checkpoints: Sequence[str]
    named: Sequence[str] = ()
    adapters: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    min_replicas: int = 1
    max_replicas: int | None = None
    tensor_parallel_size: int = 1
    device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    address: str | None = None


def check_order(order: ServeOrder) -> ServeSettings:
    """The deployment of `order`, with everything checked that can be without a cluster.

    Raises:
        ConfigError: Options that do not go together, or no key where one is needed.
        InputError: A checkpoint that cannot be served, or a port that is taken.
        HandoverError: A checkpoint that is not what its trainer exported.
        CapacityError: More replicas than this machine has devices for.
    """
    most = order.max_replicas or order.min_replicas
    if most < order.min_replicas:
        raise ConfigError(f"--min-replicas {order.min_replicas} is more than --max-replicas {most}")
    loopback = is_loopback(order.host)
    key = key_from_environment(needed=not loopback, why=f"--host {order.host} is not loopback")
    if not loopback and os.environ.get("RAY_AUTH_MODE") == "disabled":
        raise ConfigError(
            f"--host {order.host} with RAY_AUTH_MODE=disabled: whoever reaches Ray's own ports "
            "could run code here, key or not; unset RAY_AUTH_MODE, or serve on 127.0.0.1"
        )
    models = served_models(order.checkpoints, order.named, order.adapters)
    device = order.device or ("cuda" if num_gpus() else "cpu")
    cores = len(os.sched_getaffinity(0))
    share = cores // (len(models) * most * order.tensor_parallel_size)
    settings = ServeSettings(
        models=models,
        device=device,
        dtype=order.dtype or ("bfloat16" if device == "cuda" else "float32"),
        min_replicas=order.min_replicas,
        max_replicas=most,
        # Elsewhere the nodes' cores are not known: one each, and OMP threads to match.
        cpus_per_replica=max(1, share) if is_local(order) else 1,
        tensor_parallel_size=order.tensor_parallel_size,
        needs_key=key is not None or not loopback,
    )
    if is_local(order):
        check_port(order.host, order.port)
        if device == "cpu":
            check_devices(settings, {"CPU": float(cores)}, replicas=most)
    return settings


def is_local(order: ServeOrder) -> bool:
    """Whether a Ray is started for it on this machine."""
    return order.address is None and "RAY_ADDRESS" not in os.environ


def local_environment(order: ServeOrder) -> dict[str, str]:
    """Variables that Ray Serve reads when it is imported, for a Ray of our own.

    A message between its actors costs about a millisecond, and a stream has one per token and hop.
    So the gateway listens at the port itself, instead of a proxy in front of it, and talks to
    replicas by gRPC (whose server every replica has anyway, behind Ray's token) and on one thread.
    """
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(order.port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(order.port + 1),  # not itself
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no balancer in front to wait for
        "RAY_worker_niceness": "0",  # of 15, Ray's own, answers would wait for whatever else runs
    }


def check_devices(settings: ServeSettings, have: Mapping[str, float], *, replicas: int) -> None:
    """See that so many replicas of every model fit at once.

    Raises:
        CapacityError: They do not.
    """
    for name, one in settings.replica_resources.items():
        wanted = one * replicas * len(settings.models)
        if wanted > have.get(name, 0.0):
            raise CapacityError(
                f"{replicas} replicas of each of {len(settings.models)} models ask for {wanted:g} "
                f"{name}, and there are {have.get(name, 0.0):g}; serve fewer models, or lower "
                "--min-replicas and --max-replicas"
            )


def check_port(host: str, port: int) -> None:
    """See that nothing listens at `host` and `port`.

    Raises:
        InputError: Something does (named where this user may know), or the host is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise InputError(f"--port {port}: this user may not listen there; take 8000") from error
        except OSError as error:
            if owner := _listener(port):
                raise InputError(
                    f"--port {port} on {host} is taken by {owner}; end that, or give another --port"
                ) from error
            raise InputError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); "
                "give an address of this machine and a free --port"
            ) from error


def free_port(host: str) -> int:
    """One of `host` that nothing listens at."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _listener(port: int) -> str:
    """Who listens at `port`; empty where nobody does or this user may not know."""
    with contextlib.suppress(psutil.Error):
        for found in psutil.net_connections(kind="tcp"):
            # (host, port), in a tuple that is empty where it has no address
            if found.status == psutil.CONN_LISTEN and found.laddr[1:2] == (port,):
                name = psutil.Process(found.pid).name() if found.pid else "another user's process"
                return f"{name} (process {found.pid})" if found.pid else name
    return ""
