"""One rank of a training group, as a plan knows it."""

from dataclasses import dataclass, field

from pear_ray.config.backends import BackendConfig, FsdpBackend
from pear_ray.config.lora import LoraConfig
from pear_ray.config.sections import compute_dtype
from pear_ray.memory.activations import FLOAT32_BYTES, Microbatch
from pear_ray.memory.adapters import adapted, adapter_parameters
from pear_ray.memory.model_shape import ModelShape

TRAINERS = "cluster.num_trainers"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPlan:
    """One rank of a training group.

    Attributes:
        shape: The policy's shape.
        num_trainers: Ranks.
        batch: The largest microbatch.
        device: `cpu` or `cuda`.
        dtype: As `models.dtype`; on CPU training computes in float32 whatever it says.
        checkpointing: Whether layers are computed again in backward.
        backend: What spreads parameters, gradients and moments over the ranks.
        keeps_average: Whether an average of the weights is kept.
        num_candidates: Ids besides its own that each token's log-probs are taken of.
        moments_on_host: Whether AdamW's moments are on the device for the update alone.
        lora: The adapters that alone train; None where all parameters do.
    """

    shape: ModelShape
    num_trainers: int
    batch: Microbatch
    device: str
    dtype: str
    checkpointing: bool = False
    backend: BackendConfig = field(default_factory=FsdpBackend)
    keeps_average: bool = False
    num_candidates: int = 0
    moments_on_host: bool = False
    lora: LoraConfig | None = None

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient and with moments."""
        if self.lora is None:
            return self.shape.num_parameters
        return adapter_parameters(self.shape, self.lora)

    @property
    def num_parameters(self) -> int:
        """All parameters, adapters included."""
        return self.shape.num_parameters + (self.num_trained if self.lora else 0)

    @property
    def layer_trained(self) -> int:
        """Parameters of one layer that have a gradient."""
        if self.lora is None:
            return self.shape.layer_parameters
        return self.num_trained // self.shape.num_layers

    @property
    def largest_trained(self) -> int:
        """Parameters of the largest tensor that has a gradient."""
        if self.lora is None:
            return self.shape.embedding_parameters
        return self.lora.rank * max(max(sides) for sides in adapted(self.shape, self.lora))

    @property
    def bytes_each(self) -> int:
        """Bytes of a number in forward and backward passes."""
        narrow = compute_dtype(self.dtype, device=self.device) == "bfloat16"
        return 2 if narrow else FLOAT32_BYTES
