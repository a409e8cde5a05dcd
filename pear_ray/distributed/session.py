"""The run's connection to Ray: a cluster that is there or a local one."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray

from pear_ray.config.sections import ClusterConfig
from pear_ray.errors import PearRayError


@dataclass(frozen=True, slots=True)
class Session:
    """A connected driver. `dashboard_url` is None where the dashboard is not installed."""

    dashboard_url: str | None
    resources: Mapping[str, float]


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[Session]:
    """Connect to `cluster.address`, or start a local Ray that ends with this process.

    Raises:
        PearRayError: No cluster answers at the address.
    """
    if ray.is_initialized():  # a test's or a notebook's own session is left running
        yield _describe()
        return
    # "local": without it Ray would join any cluster that was started on this machine.
    options = (
        {"address": cluster.address}
        if cluster.address
        else {"address": "local", "include_dashboard": True}
    )
    # Inside a submitted job Ray knows the address itself, and options given twice are an error.
    if "RAY_JOB_ID" in os.environ or "RAY_ADDRESS" in os.environ:
        options = {}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PearRayError(
            f"no Ray cluster at cluster.address={cluster.address!r} ({error}); start one with "
            "`ray start --head`, check RAY_AUTH_MODE and the token, or leave the address out"
        ) from error
    try:
        yield _describe()
    finally:
        ray.shutdown()


def _describe() -> Session:
    dashboard = ray.get_runtime_context().gcs_address and ray._private.worker.global_worker.node  # noqa: SLF001
    url = getattr(dashboard, "webui_url", None)
    return Session(
        dashboard_url=f"http://{url}" if url else None, resources=ray.cluster_resources()
    )
