"""How a driver gets to Ray: to a cluster that is there, or to one of its own."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import ray

from pear_ray.errors import ConfigError, PearRayError

REACH_S = 5.0  # to find out whether anything listens at a cluster's address
JOB_VARIABLE, ADDRESS_VARIABLE = "RAY_JOB_ID", "RAY_ADDRESS"
OWN = "local"  # without it Ray would join any cluster that was started on this machine


def connect(address: str | None, *, setting: str, with_url: str) -> bool:
    """Connect this process to Ray; whether to a cluster that was there before.

    Without an address, and where none is in the environment, a Ray is started that ends with this
    process.

    Args:
        address: `HOST:PORT` of a cluster's head, or `auto` on a node of it.
        setting: What the address is called where it was given, as `--address`.
        with_url: What to do who has only the URL of a dashboard.

    Raises:
        ConfigError: The address is none.
        PearRayError: No cluster answers there.
    """
    if ray.is_initialized():  # a test's or a notebook's own
        return True
    wanted = wanted_cluster(address, os.environ)
    if wanted is not None and wanted != OWN:
        _check_reachable(wanted, setting=setting, with_url=with_url)
    options: dict[str, Any] = {} if wanted is None else {"address": wanted}
    if wanted == OWN:
        options["include_dashboard"] = True
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"{ADDRESS_VARIABLE}={os.environ.get(ADDRESS_VARIABLE)}"
        raise PearRayError(
            f"no Ray cluster at {where if wanted is None else f'{setting}={wanted}'} ({error}); "
            "start one with `ray start --head`, check RAY_AUTH_MODE and the token, or leave the "
            "address out"
        ) from error
    return wanted != OWN


def wanted_cluster(address: str | None, environ: Mapping[str, str]) -> str | None:
    """The address to give Ray: `address`, `local` for a Ray of one's own, None: Ray knows it.

    A job is a driver of the cluster that it was submitted to, whatever the address says; elsewhere
    an address that was given counts before RAY_ADDRESS.
    """
    if JOB_VARIABLE in environ:
        return None
    if address:
        return address
    return None if ADDRESS_VARIABLE in environ else OWN


def _check_reachable(address: str, *, setting: str, with_url: str) -> None:
    """See that something listens there: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(
            f"{setting}={address}: give HOST:PORT of the cluster's head (6379 where nothing else "
            f"was said), or `auto` on a node of it; with only its dashboard's URL, {with_url}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise PearRayError(
            f"{setting}={address}: nothing answers there ({error.strerror or error}); start a "
            "cluster with `ray start --head`, see `ray status` on it, or leave the address out"
        ) from error
