"""`pear serve`: checks all of it, deploys, and stays until it is told to stop."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import ray
from ray import serve
from ray.serve.context import _get_global_client as serve_client

from pear_ray.errors import CapacityError, ConfigError, EngineError, InputError, PearRayError
from pear_ray.machine import num_gpus
from pear_ray.serving.app import build
from pear_ray.serving.checkpoints import served_models
from pear_ray.serving.key import is_loopback, key_from_environment
from pear_ray.serving.production import write_serve_yaml
from pear_ray.serving.settings import APP_NAME, ServeSettings

REACH_S = 5.0  # to find out whether anything listens at a cluster's address
LOGGING = {"enable_access_log": False}  # a line per request costs time, and shows who asked when


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


def run_serve(order: ServeOrder, *, dry_run: bool) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. `dry_run` writes serve.yaml and ends.

    Raises:
        ConfigError: Options that do not go together, or no key where one is needed.
        InputError: A checkpoint that cannot be served, or a port that is taken.
        CapacityError: More replicas than there are devices.
        PearRayError: No cluster at the address.
        EngineError: A model did not start.
    """
    settings = check_order(order)
    if dry_run:
        file = write_serve_yaml(settings, host=order.host, port=order.port)
        sys.stdout.write(f"checked: {', '.join(settings.names)}\nwritten: {file}\n")
        return 0
    with contextlib.suppress(KeyboardInterrupt), _sigterm_as_interrupt(), deployed(settings, order):
        asked = "asked for" if settings.needs_key else "not asked for"
        sys.stdout.write(
            f"models:   {', '.join(settings.names)}\n"
            f"base URL: http://{_in_url(order.host)}:{order.port}/v1 (API key: {asked})\n"
            "Ctrl-C stops it\n"
        )
        sys.stdout.flush()
        threading.Event().wait()
    return 0


def check_order(order: ServeOrder) -> ServeSettings:
    """The deployment of `order`, with everything checked that can be without a cluster.

    Raises:
        ConfigError, InputError, CapacityError: As `run_serve`.
    """
    most = order.max_replicas or order.min_replicas
    if most < order.min_replicas:
        raise ConfigError(f"--min-replicas {order.min_replicas} is more than --max-replicas {most}")
    loopback = is_loopback(order.host)
    key = key_from_environment(needed=not loopback, why=f"--host {order.host} is not loopback")
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
        cpus_per_replica=max(1, share) if order.address is None else 1,
        tensor_parallel_size=order.tensor_parallel_size,
        needs_key=key is not None or not loopback,
    )
    if order.address is None and "RAY_ADDRESS" not in os.environ:
        check_port(order.host, order.port)
        if device == "cpu":
            check_devices(settings, {"CPU": float(cores)}, replicas=most)
    return settings


def check_devices(settings: ServeSettings, have: Mapping[str, float], *, replicas: int) -> None:
    """See that so many replicas of every model fit at once.

    Raises:
        CapacityError: They do not.
    """
    for name, one in settings.replica_resources.items():
        wanted = one * replicas * len(settings.models)
        if wanted > have.get(name, 0.0):
            raise CapacityError(
                f"{len(settings.models)} models of {replicas} replicas ask for {wanted:g} {name}, "
                f"and there are {have.get(name, 0.0):g}; serve fewer models, or lower "
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


@contextlib.contextmanager
def deployed(settings: ServeSettings, order: ServeOrder) -> Iterator[None]:
    """Within this the models answer; afterwards they and a Ray of our own are gone.

    Raises:
        As `run_serve`.
    """
    elsewhere = _connect(order.address)
    try:
        _check_cluster(settings, elsewhere=elsewhere)
        _check_free(order)
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": order.host, "port": order.port},
            logging_config=LOGGING,
        )
        try:
            application = build(settings.model_dump(mode="json"))
            serve.run(application, name=APP_NAME, route_prefix="/", logging_config=LOGGING)
        except RuntimeError as error:
            raise EngineError(f"the models did not start: {_reason(error)}") from error
        yield
    finally:
        with contextlib.suppress(Exception):  # whatever ended it is the error to see, not this
            serve.delete(APP_NAME) if elsewhere else serve.shutdown()
        ray.shutdown()


def _connect(address: str | None) -> bool:
    """Whether it is a cluster that was there before."""
    if ray.is_initialized():  # a test's or a notebook's own
        return True
    if address:
        _check_reachable(address)
    inside = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ
    options = {"address": address} if address else {} if inside else {"include_dashboard": True}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PearRayError(
            f"no Ray cluster at --address {address} ({error}); see `ray status` there, check "
            "RAY_AUTH_MODE and the token, or leave the address out"
        ) from error
    return bool(address) or inside


def _check_reachable(address: str) -> None:
    """See that something listens there: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(
            f"--address {address}: give HOST:PORT of the cluster's head (6379 where nothing else "
            "was said), or `auto` on a node of it; with only its dashboard's URL, write serve.yaml "
            "with --dry-run and `serve deploy serve.yaml -a URL`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise PearRayError(
            f"--address {address}: nothing answers there ({error.strerror or error}); start a "
            "cluster with `ray start --head`, see `ray status` on it, or leave the address out"
        ) from error


def _check_cluster(settings: ServeSettings, *, elsewhere: bool) -> None:
    have = ray.cluster_resources()
    check_devices(settings, have, replicas=settings.min_replicas)
    try:
        check_devices(settings, have, replicas=settings.max_replicas)
    except CapacityError as error:
        if not elsewhere:
            raise
        sys.stderr.write(f"note: {error}; fewer start until the cluster grows\n")


def _check_free(order: ServeOrder) -> None:
    """See that no other deployment on the cluster is in the way."""
    client = serve_client(raise_if_no_controller_running=False)
    if client is None:
        return
    if APP_NAME in serve.status().applications:
        raise InputError(
            f"the cluster already serves an application {APP_NAME!r}; stop that `pear serve`, or "
            "change it with `serve deploy`"
        )
    options = client.http_config
    if (options.host, options.port) != (order.host, order.port):
        raise InputError(
            f"Ray Serve already listens at {options.host}:{options.port} on this cluster; give "
            f"--host {options.host} --port {options.port}, or `serve shutdown` it first"
        )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listener(port: int) -> str:
    """Who listens at `port`; empty where nobody does or this user may not know."""
    with contextlib.suppress(psutil.Error):
        for found in psutil.net_connections(kind="tcp"):
            # (host, port), in a tuple that is empty where it has no address
            if found.status == psutil.CONN_LISTEN and found.laddr[1:2] == (port,):
                name = psutil.Process(found.pid).name() if found.pid else "another user's process"
                return f"{name} (process {found.pid})" if found.pid else name
    return ""


def _reason(error: RuntimeError) -> str:
    """The last line of a replica's traceback that says something, of Ray Serve's long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "Error: " in line]
    return ours[-1] if ours else str(error)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
