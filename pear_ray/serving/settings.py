"""What a deployment is told, as `pear serve` passes it on and `serve.yaml` spells it."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section

KEY_VARIABLE = "PEAR_RAY_API_KEY"
"""Where the API key is read from, by every process that needs it; it is written nowhere."""
APP_NAME = "pear"
BUILDER = "pear_ray.serving.app:build"


class ServedAdapter(Section):
    """A low-rank adapter, asked for by its own name."""

    name: str
    """What a request calls `model`."""
    folder: str
    """With adapter_config.json and adapter_model.safetensors, as peft saves them."""


class ServedModel(Section):
    """One model, with replicas of its own."""

    name: str
    """What a request calls `model`."""
    folder: str
    """With safetensors, tokenizer and chat template; every node that serves it must see it."""
    adapters: Annotated[list[ServedAdapter], Field(default_factory=list)]
    """On this model."""
    max_lora_rank: Annotated[int, Field(ge=0)] = 0
    """The largest rank among `adapters`."""


class ServeSettings(Section):
    """All that `build` makes an application of."""

    models: Annotated[list[ServedModel], Field(min_length=1)]
    """Those that requests choose from."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where they compute."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What they compute in."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Of each model, whatever the load."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Of each model, at most."""
    cpus_per_replica: Annotated[int, Field(ge=1)] = 1
    """Compute threads of one on CPU; what Ray sets aside for it."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Devices that one replica is spread over."""
    needs_key: bool = True
    """Refuse to start where PEAR_RAY_API_KEY is not set. Without this the key is asked of callers
    only where it is set."""

    @property
    def names(self) -> list[str]:
        """All that a request may call `model`, adapters behind the model they are on."""
        return [
            name
            for model in self.models
            for name in (model.name, *(adapter.name for adapter in model.adapters))
        ]

    @property
    def replica_resources(self) -> dict[str, float]:
        """What one replica asks Ray for."""
        if self.device == "cuda":
            return {"CPU": 1.0, "GPU": float(self.tensor_parallel_size)}
        return {"CPU": float(self.cpus_per_replica * self.tensor_parallel_size)}
