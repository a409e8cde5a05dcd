"""What the providers' machines have: processors, memory, GPUs.

What is known of them, most checked only in part: the providers' pages of instance types have the
last word (aws.amazon.com/ec2/instance-types,
cloud.google.com/compute/docs/accelerator-optimized-machines,
learn.microsoft.com/azure/virtual-machines/sizes). A type that is missing here, or wrong, can be
described in a cluster file, under `metadata.instances`, which is asked first.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section

Gpu = Literal[
    "H100", "H100-NVL", "H200", "A100-80GB", "A100-40GB", "L4", "L40S", "A10", "A10G", "T4"
]
GPU_MEMORY_GB: Mapping[str, int] = {  # decimal, as in NVIDIA's data sheets
    "H100": 80,
    "H100-NVL": 94,
    "H200": 141,
    "A100-80GB": 80,
    "A100-40GB": 40,
    "L4": 24,
    "L40S": 48,
    "A10": 24,
    "A10G": 24,
    "T4": 16,
}
DEVICE_OF: Mapping[str, str] = {  # those whose pace `memory.pace.DEVICES` knows
    "H100": "h100",
    "H200": "h200",
    "A100-80GB": "a100",
    "L4": "l4",
}


class Instance(Section):
    """One machine."""

    cpus: Annotated[int, Field(gt=0)]
    """Virtual processors, as the provider counts them."""
    memory_gib: Annotated[float, Field(gt=0)]
    """Memory of the host."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs."""
    gpu: Gpu | None = None
    """Which; none on a machine without."""

    @model_validator(mode="after")
    def _gpus_have_a_kind(self) -> "Instance":
        if bool(self.gpus) != (self.gpu is not None):
            raise ValueError(
                f"gpus={self.gpus} and gpu={self.gpu}: say both, or neither on a machine without"
            )
        return self

    @property
    def words(self) -> str:
        """`8 H100, 192 CPUs`."""
        gpus = f"{self.gpus} {self.gpu}, " if self.gpus else "no GPU, "
        return f"{gpus}{self.cpus} CPUs"


def _machine(cpus: int, memory_gib: float, gpus: int = 0, gpu: Gpu | None = None) -> Instance:
    return Instance(cpus=cpus, memory_gib=memory_gib, gpus=gpus, gpu=gpu)


AWS = {
    "c7i.4xlarge": _machine(16, 32),
    "c7i.8xlarge": _machine(32, 64),
    "m7i.2xlarge": _machine(8, 32),
    "m7i.4xlarge": _machine(16, 64),
    "m7i.8xlarge": _machine(32, 128),
    "g6.xlarge": _machine(4, 16, 1, "L4"),
    "g6.2xlarge": _machine(8, 32, 1, "L4"),
    "g6.4xlarge": _machine(16, 64, 1, "L4"),
    "g6.8xlarge": _machine(32, 128, 1, "L4"),
    "g6.12xlarge": _machine(48, 192, 4, "L4"),
    "g6.16xlarge": _machine(64, 256, 1, "L4"),
    "g6.24xlarge": _machine(96, 384, 4, "L4"),
    "g6.48xlarge": _machine(192, 768, 8, "L4"),
    "g6e.xlarge": _machine(4, 32, 1, "L40S"),
    "g6e.4xlarge": _machine(16, 128, 1, "L40S"),
    "g6e.8xlarge": _machine(32, 256, 1, "L40S"),
    "g6e.12xlarge": _machine(48, 384, 4, "L40S"),
    "g6e.48xlarge": _machine(192, 1536, 8, "L40S"),
    "p4d.24xlarge": _machine(96, 1152, 8, "A100-40GB"),
    "p4de.24xlarge": _machine(96, 1152, 8, "A100-80GB"),
    "p5.4xlarge": _machine(16, 256, 1, "H100"),
    "p5.48xlarge": _machine(192, 2048, 8, "H100"),
    "p5e.48xlarge": _machine(192, 2048, 8, "H200"),
    "p5en.48xlarge": _machine(192, 2048, 8, "H200"),
}
GCP = {
    "n2-standard-8": _machine(8, 32),
    "n2-standard-16": _machine(16, 64),
    "n2-standard-32": _machine(32, 128),
    "g2-standard-4": _machine(4, 16, 1, "L4"),
    "g2-standard-8": _machine(8, 32, 1, "L4"),
    "g2-standard-12": _machine(12, 48, 1, "L4"),
    "g2-standard-16": _machine(16, 64, 1, "L4"),
    "g2-standard-24": _machine(24, 96, 2, "L4"),
    "g2-standard-32": _machine(32, 128, 1, "L4"),
    "g2-standard-48": _machine(48, 192, 4, "L4"),
    "g2-standard-96": _machine(96, 384, 8, "L4"),
    "a2-highgpu-1g": _machine(12, 85, 1, "A100-40GB"),
    "a2-highgpu-2g": _machine(24, 170, 2, "A100-40GB"),
    "a2-highgpu-4g": _machine(48, 340, 4, "A100-40GB"),
    "a2-highgpu-8g": _machine(96, 680, 8, "A100-40GB"),
    "a2-ultragpu-1g": _machine(12, 170, 1, "A100-80GB"),
    "a2-ultragpu-2g": _machine(24, 340, 2, "A100-80GB"),
    "a2-ultragpu-4g": _machine(48, 680, 4, "A100-80GB"),
    "a2-ultragpu-8g": _machine(96, 1360, 8, "A100-80GB"),
    "a3-highgpu-1g": _machine(26, 234, 1, "H100"),
    "a3-highgpu-2g": _machine(52, 468, 2, "H100"),
    "a3-highgpu-4g": _machine(104, 936, 4, "H100"),
    "a3-highgpu-8g": _machine(208, 1872, 8, "H100"),
    "a3-megagpu-8g": _machine(208, 1872, 8, "H100"),
    "a3-ultragpu-8g": _machine(224, 2952, 8, "H200"),
}
AZURE = {
    "Standard_D8s_v5": _machine(8, 32),
    "Standard_D16s_v5": _machine(16, 64),
    "Standard_D32s_v5": _machine(32, 128),
    "Standard_NV36ads_A10_v5": _machine(36, 440, 1, "A10"),
    "Standard_NV72ads_A10_v5": _machine(72, 880, 2, "A10"),
    "Standard_NC24ads_A100_v4": _machine(24, 220, 1, "A100-80GB"),
    "Standard_NC48ads_A100_v4": _machine(48, 440, 2, "A100-80GB"),
    "Standard_NC96ads_A100_v4": _machine(96, 880, 4, "A100-80GB"),
    "Standard_NC40ads_H100_v5": _machine(40, 320, 1, "H100-NVL"),
    "Standard_NC80adis_H100_v5": _machine(80, 640, 2, "H100-NVL"),
    "Standard_ND96asr_v4": _machine(96, 900, 8, "A100-40GB"),
    "Standard_ND96amsr_A100_v4": _machine(96, 1900, 8, "A100-80GB"),
    "Standard_ND96isr_H100_v5": _machine(96, 1900, 8, "H100"),
    "Standard_ND96isr_H200_v5": _machine(96, 1850, 8, "H200"),
}
INSTANCES: Mapping[str, Mapping[str, Instance]] = {"aws": AWS, "gcp": GCP, "azure": AZURE}
GCP_ACCELERATORS: Mapping[str, str] = {  # what `guestAccelerators` calls them
    "nvidia-l4": "L4",
    "nvidia-tesla-a100": "A100-40GB",
    "nvidia-a100-80gb": "A100-80GB",
    "nvidia-h100-80gb": "H100",
    "nvidia-h100-mega-80gb": "H100",
    "nvidia-h200-141gb": "H200",
    "nvidia-tesla-t4": "T4",
}
PRODUCTS: Mapping[str, str] = {  # label `nvidia.com/gpu.product`, by NVIDIA's GPU feature discovery
    "NVIDIA-H100-80GB-HBM3": "H100",
    "NVIDIA-H200": "H200",
    "NVIDIA-A100-SXM4-80GB": "A100-80GB",
    "NVIDIA-A100-SXM4-40GB": "A100-40GB",
    "NVIDIA-L4": "L4",
    "NVIDIA-L40S": "L40S",
    "NVIDIA-A10": "A10",
    "Tesla-T4": "T4",
}


def with_gpus(provider: str, gpu: str, at_least: int) -> Iterator[str]:
    """The provider's types that have so many GPUs of a kind, smallest first."""
    kinds = INSTANCES.get(provider, {})
    fitting = [name for name, each in kinds.items() if each.gpu == gpu and each.gpus >= at_least]
    yield from sorted(fitting, key=lambda name: (kinds[name].gpus, kinds[name].cpus))
