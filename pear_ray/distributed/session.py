"""The run's connection to Ray: a cluster that is there or a local one."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray

from pear_ray.config.sections import ClusterConfig
from pear_ray.connection import connect

WITH_URL = "`pear submit RUN.yaml --address URL`"


@dataclass(frozen=True, slots=True)
class Session:
    """A connected driver. `dashboard_url` is None where the dashboard is not installed."""

    dashboard_url: str | None
    resources: Mapping[str, float]


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[Session]:
    """Connect to `cluster.address`, or start a local Ray that ends with this process.

    Raises:
        ConfigError, PearRayError: No cluster answers at the address.
    """
    if ray.is_initialized():  # a test's or a notebook's own session is left running
        yield _describe()
        return
    connect(cluster.address, setting="cluster.address", with_url=WITH_URL)
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
