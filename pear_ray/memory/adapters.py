"""How many numbers low-rank adapters have, from a model's shape."""

from pear_ray.config.lora import LoraConfig
from pear_ray.memory.model_shape import ModelShape


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Parameters of all adapters: of each adapted layer, rank x (inputs + outputs).

    A name that Llama's layers do not have counts as the largest of them, and one that is meant for
    some layers alone counts in all.
    """
    return shape.num_layers * lora.rank * sum(sum(sides) for sides in adapted(shape, lora))


def adapted(shape: ModelShape, lora: LoraConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear layer of a decoder layer that has an adapter."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = {
        "q_proj": (hidden, shape.query_size),
        "k_proj": (hidden, shape.key_size),
        "v_proj": (hidden, shape.key_size),
        "o_proj": (shape.query_size, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    names = {name.rpartition(".")[2] for name in lora.named_targets} or set(sizes)
    return [sizes.get(name, max(sizes.values(), key=sum)) for name in sorted(names)]
