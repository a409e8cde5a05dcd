"""What spreads parameters, gradients and optimizer state over the trainers."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section, by_kind

PARAMETERS_SPLIT = 3  # the ZeRO stage


class FsdpBackend(Section):
    """PyTorch's FSDP2: each parameter split over the ranks, whole only while its layer computes."""

    kind: Literal["fsdp"] = "fsdp"
    shard_over: Annotated[int, Field(gt=0)] | None = None
    """Ranks that a parameter is split over, a divisor of `cluster.num_trainers`; groups of so many
    are copies of each other (hybrid sharding: fewer bytes over slow links, more memory). None: all
    ranks."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory between uses (CUDA)."""


class DdpBackend(Section):
    """PyTorch's DistributedDataParallel: each rank has all of it; gradients are averaged."""

    kind: Literal["ddp"] = "ddp"


class DeepSpeedBackend(Section):
    """DeepSpeed ZeRO; needs the extra `deepspeed`."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[1, 2, 3] = 2
    """What is split over the ranks: optimizer state (1), gradients too (2), parameters too (3)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What stays in the host's memory between uses: nothing, the optimizer's state and step, or
    (stage 3) the parameters too."""


BackendConfig = Annotated[
    Annotated[FsdpBackend | DdpBackend | DeepSpeedBackend, Field(discriminator="kind")],
    by_kind("fsdp"),
]
