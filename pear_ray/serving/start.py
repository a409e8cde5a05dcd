"""`pear serve`: checks all of it, deploys, and stays until it is told to stop."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

import ray
from ray import serve
from ray.serve.context import _get_global_client as serve_client

from pear_ray.connection import connect
from pear_ray.errors import CapacityError, EngineError, InputError, StopRequested
from pear_ray.serving.app import build
from pear_ray.serving.order import ServeOrder, check_devices, free_port
from pear_ray.serving.settings import APP_NAME, ServeSettings
from pear_ray.stopping import stop_on_sigterm

WITH_URL = "write serve.yaml with --address auto --dry-run and `serve deploy serve.yaml -a URL`"
# A line per request costs time, and shows who asked when.
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


def run_serve(settings: ServeSettings, order: ServeOrder) -> int:
    """Serve until SIGINT or SIGTERM; the exit code.

    Raises:
        ConfigError, PearRayError: No cluster at the address.
        InputError: Another deployment is in the way there.
        CapacityError: Not even the least number of replicas fits.
        EngineError: A model did not start.
    """
    with contextlib.suppress(KeyboardInterrupt, StopRequested), deployed(settings, order):
        asked = "asked for" if settings.needs_key else "not asked for"
        sys.stdout.write(
            f"models:   {', '.join(settings.names)}\n"
            f"base URL: http://{_in_url(order.host)}:{order.port}/v1 (API key: {asked})\n"
            "Ctrl-C stops it\n"
        )
        sys.stdout.flush()
        threading.Event().wait()
    return 0


@contextlib.contextmanager
def deployed(settings: ServeSettings, order: ServeOrder) -> Iterator[None]:
    """Within this the models answer; afterwards they and a Ray of our own are gone.

    Raises:
        As `run_serve`.
    """
    elsewhere = connect(order.address, setting="--address", with_url=WITH_URL)
    with stop_on_sigterm():  # Ray has taken the signal for itself by here
        try:
            _check_cluster(settings, elsewhere=elsewhere)
            _check_free(order)
            _deploy(settings, order, elsewhere=elsewhere)
            yield
        finally:
            with contextlib.suppress(Exception):  # whatever ended it is the error to see, not this
                serve.delete(APP_NAME) if elsewhere else serve.shutdown()
            ray.shutdown()


def _deploy(settings: ServeSettings, order: ServeOrder, *, elsewhere: bool) -> None:
    # On a Ray of our own the gateway listens at the port; Ray Serve starts its proxy all the same.
    port = order.port if elsewhere else free_port(order.host)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it would name the proxy's port
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": order.host, "port": port},
        logging_config=LOGGING,
    )
    try:
        application = build(settings.model_dump(mode="json"))
        serve.run(application, name=APP_NAME, route_prefix="/", logging_config=LOGGING)
    except RuntimeError as error:
        raise EngineError(f"the models did not start: {_reason(error)}") from error


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


def _reason(error: RuntimeError) -> str:
    """What a replica said last, of Ray Serve's long messages; else what Serve says."""
    found = serve.status().applications.get(APP_NAME)
    messages = [each.message for each in found.deployments.values()] if found else []
    lines = [line.strip() for message in messages for line in message.splitlines()]
    ours = [line for line in lines if "Error: " in line]
    return ours[-1] if ours else str(error)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
