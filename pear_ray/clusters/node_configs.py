"""What stands inside `node_config`: the fields of each provider that our files use.

Ray hands it to the provider as it is: AWS's `run_instances`, GCP's `instances.insert`, and the
parameters of Ray's own ARM template. Field names are those of the file, not ours.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from pear_ray.config.base import Section

Names = Annotated[list[str], Field(min_length=1)]


class Ebs(Section):
    """A disk of AWS."""

    VolumeSize: Annotated[int, Field(gt=0)]
    VolumeType: Literal["gp2", "gp3", "io1", "io2"] = "gp3"
    Iops: int | None = None
    Throughput: int | None = None
    Encrypted: bool | None = None
    DeleteOnTermination: bool | None = None


class BlockDevice(Section):
    """Where a disk of AWS appears."""

    DeviceName: str
    Ebs: Ebs


class SpotMarket(Section):
    """That a machine of AWS may be taken back."""

    MarketType: Literal["spot"]
    SpotOptions: dict[str, Any] | None = None


class InstanceProfile(Section):
    """The role that a machine of AWS has."""

    Name: str | None = None
    Arn: str | None = None


class AwsNodeConfig(Section):
    """Arguments of `run_instances`."""

    InstanceType: str
    ImageId: str
    """Ray's own default is Ubuntu 18.04, whose driver is too old for the GPU image."""
    SecurityGroupIds: Names | None = None
    SubnetIds: Names | None = None
    KeyName: str | None = None
    IamInstanceProfile: InstanceProfile | None = None
    BlockDeviceMappings: list[BlockDevice] | None = None
    InstanceMarketOptions: SpotMarket | None = None
    MetadataOptions: dict[str, Any] | None = None
    Placement: dict[str, Any] | None = None
    CapacityReservationSpecification: dict[str, Any] | None = None
    NetworkInterfaces: list[dict[str, Any]] | None = None
    TagSpecifications: list[dict[str, Any]] | None = None

    @property
    def machine(self) -> tuple[str, str]:
        """The type's key and name."""
        return "InstanceType", self.InstanceType

    @property
    def is_spot(self) -> bool:
        """Whether it may be taken back."""
        return self.InstanceMarketOptions is not None


class GcpDiskParameters(Section):
    """What a disk of GCP is made of."""

    diskSizeGb: Annotated[int, Field(gt=0)]
    sourceImage: str
    diskType: str | None = None


class GcpDisk(Section):
    """A disk of GCP."""

    boot: bool = False
    autoDelete: bool = True
    type: Literal["PERSISTENT", "SCRATCH"] = "PERSISTENT"
    initializeParams: GcpDiskParameters


class GuestAccelerator(Section):
    """GPUs of a machine of GCP."""

    acceleratorType: str
    acceleratorCount: Annotated[int, Field(gt=0)]


class GcpScheduling(Section):
    """Whether a machine of GCP may be taken back or moved."""

    provisioningModel: Literal["STANDARD", "SPOT"] = "STANDARD"
    instanceTerminationAction: Literal["STOP", "DELETE"] | None = None
    onHostMaintenance: Literal["MIGRATE", "TERMINATE"] | None = None
    automaticRestart: bool | None = None
    preemptible: bool | None = None


class GcpInterface(Section):
    """A network card of a machine of GCP."""

    network: str | None = None
    subnetwork: str | None = None
    accessConfigs: list[dict[str, Any]] | None = None


class GcpItem(Section):
    """A pair of GCP's metadata."""

    key: str
    value: str


class GcpItems(Section):
    """GCP's metadata."""

    items: list[GcpItem]


class GcpTags(Section):
    """Network tags, which firewall rules name."""

    items: list[str]


class GcpAccount(Section):
    """The account that a machine of GCP acts as."""

    email: str
    scopes: Names


class GcpNodeConfig(Section):
    """The body of `instances.insert`."""

    machineType: str
    disks: list[GcpDisk]
    networkInterfaces: list[GcpInterface] | None = None
    guestAccelerators: list[GuestAccelerator] | None = None
    scheduling: GcpScheduling = GcpScheduling()
    metadata: GcpItems | None = None
    tags: GcpTags | None = None
    labels: dict[str, str] | None = None
    serviceAccounts: list[GcpAccount] | None = None

    @property
    def machine(self) -> tuple[str, str]:
        """The type's key and name."""
        return "machineType", self.machineType

    @property
    def is_spot(self) -> bool:
        """Whether it may be taken back."""
        return self.scheduling.provisioningModel == "SPOT" or bool(self.scheduling.preemptible)


class AzureBilling(Section):
    """The most that is paid for a machine of Azure; -1: up to what one that stays costs."""

    maxPrice: float


class AzureParameters(Section):
    """Parameters of Ray's ARM template (`azure-vm-template.json`)."""

    vmSize: str
    imagePublisher: str | None = None
    imageOffer: str | None = None
    imageSku: str | None = None
    imageVersion: str | None = None
    imageId: str | None = None
    osDiskSize: Annotated[int, Field(gt=0)] | None = None
    priority: Literal["Regular", "Low", "Spot"] = "Regular"
    evictionPolicy: Literal["Deallocate", "Delete"] | None = None
    billingProfile: AzureBilling | None = None
    availability_zone: str | None = None
    enableAcceleratedNetworking: bool | None = None


class AzureNodeConfig(Section):
    """What Ray's provider for Azure reads."""

    azure_arm_parameters: AzureParameters

    @property
    def machine(self) -> tuple[str, str]:
        """The type's key and name."""
        return "azure_arm_parameters.vmSize", self.azure_arm_parameters.vmSize

    @property
    def is_spot(self) -> bool:
        """Whether it may be taken back."""
        return self.azure_arm_parameters.priority != "Regular"
