"""Ray's launcher file (`ray up FILE`): the fields that our files use, and no others.

The names are those of Ray 2.60's `ray-schema.json`; a test has Ray's own `validate_config` read the
same files.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from pear_ray.clusters.instances import Instance
from pear_ray.clusters.node_configs import (
    AwsNodeConfig,
    AzureNodeConfig,
    GcpNodeConfig,
    Names,
)
from pear_ray.clusters.prices import Price
from pear_ray.config.base import Section

Count = Annotated[int, Field(ge=0)]
ProviderT = TypeVar("ProviderT", bound=Section)
NodeT = TypeVar("NodeT", AwsNodeConfig, GcpNodeConfig, AzureNodeConfig)


class Metadata(Section):
    """What Ray hands through and `pear plan --cluster` reads."""

    shared_storage: Annotated[str, Field(pattern=r"^(/|[a-z0-9]+://).+")]
    """Where every node reaches the same files: a mounted folder, or an object store's URI. A run's
    `output_dir` lies below it."""
    prices: dict[str, Price] = Field(default={})
    """What you pay, by type of machine."""
    instances: dict[str, Instance] = Field(default={})
    """Types of machines that `clusters/instances.py` does not know."""
    worker: Instance | None = None
    """What each worker is, on premises."""


class SecurityGroup(Section):
    """Rules that Ray adds to a group of its own, which opens port 22 to everyone."""

    GroupName: str | None = None
    IpPermissions: list[dict[str, Any]] | None = None


class AwsProvider(Section):
    """Amazon Web Services."""

    type: Literal["aws"]
    region: str
    availability_zone: str | None = None
    cache_stopped_nodes: bool = False
    use_internal_ips: bool = False
    security_group: SecurityGroup | None = None


class GcpProvider(Section):
    """Google Cloud."""

    type: Literal["gcp"]
    region: str
    availability_zone: str
    project_id: str
    use_internal_ips: bool = False


class AzureProvider(Section):
    """Microsoft Azure."""

    type: Literal["azure"]
    location: str
    resource_group: str
    subscription_id: str | None = None
    subnet_mask: str | None = None
    unique_id: str | None = None
    availability_zone: str | None = None
    use_internal_ips: bool = False
    cache_stopped_nodes: bool = False


class LocalProvider(Section):
    """Machines that are there already."""

    type: Literal["local"]
    head_ip: str
    worker_ips: Names


class Auth(Section):
    """How `ray up` logs in."""

    ssh_user: str
    ssh_private_key: str | None = None
    ssh_public_key: str | None = None
    ssh_proxy_command: str | None = None


class Docker(Section):
    """The container that everything runs in."""

    image: str
    container_name: str
    pull_before_run: bool = True
    run_options: list[str] = Field(default=[])
    head_image: str | None = None
    head_run_options: list[str] | None = None
    worker_image: str | None = None
    worker_run_options: list[str] | None = None


class NodeDocker(Section):
    """What one type of node does otherwise."""

    pull_before_run: bool | None = None
    worker_image: str | None = None
    worker_run_options: list[str] | None = None


class NodeType(Section, Generic[NodeT]):
    """One type of node."""

    node_config: NodeT
    resources: dict[str, Count]
    min_workers: Count = 0
    max_workers: Count
    labels: dict[str, str] = Field(default={})
    priority: int | None = None
    idle_timeout_s: Annotated[float, Field(gt=0)] | None = None
    docker: NodeDocker | None = None
    initialization_commands: list[str] | None = None
    worker_setup_commands: list[str] | None = None


class Common(Section):
    """What every launcher file has."""

    cluster_name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    metadata: Metadata
    max_workers: Count
    upscaling_speed: Annotated[float, Field(gt=0)] = 1.0
    idle_timeout_minutes: Annotated[float, Field(gt=0)]
    auth: Auth
    docker: Docker
    file_mounts: dict[str, str]
    initialization_commands: list[str]
    setup_commands: list[str] | None = None
    head_setup_commands: list[str] | None = None
    worker_setup_commands: list[str] | None = None
    head_start_ray_commands: Names
    worker_start_ray_commands: Names
    cluster_synced_files: list[str] = Field(default=[])
    file_mounts_sync_continuously: bool = False
    rsync_exclude: list[str] = Field(default=[])
    rsync_filter: list[str] = Field(default=[])


class Launcher(Common, Generic[ProviderT, NodeT]):
    """A launcher file of a cloud."""

    provider: ProviderT
    available_node_types: dict[str, NodeType[NodeT]]
    head_node_type: str


class AwsLauncher(Launcher[AwsProvider, AwsNodeConfig]):
    """A launcher file for AWS."""


class GcpLauncher(Launcher[GcpProvider, GcpNodeConfig]):
    """A launcher file for Google Cloud."""


class AzureLauncher(Launcher[AzureProvider, AzureNodeConfig]):
    """A launcher file for Azure."""


class OnPremLauncher(Common):
    """A launcher file for machines that are there already; all workers are alike."""

    provider: LocalProvider
    min_workers: Count | None = None


CloudLauncher = AwsLauncher | GcpLauncher | AzureLauncher
AnyLauncher = CloudLauncher | OnPremLauncher
LAUNCHERS: dict[str, type[Common]] = {
    "aws": AwsLauncher,
    "gcp": GcpLauncher,
    "azure": AzureLauncher,
    "local": OnPremLauncher,
}
