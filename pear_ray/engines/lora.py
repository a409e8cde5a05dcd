"""Low-rank adapters on a policy; the only module that imports peft."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from pear_ray.config.lora import LoraConfig
from pear_ray.engines.policy import Policy, load_causal_lm
from pear_ray.engines.target_modules import linear_modules

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter's file, as peft writes it
NAME = "default"  # of the one adapter, where peft keeps several apart


@dataclass(frozen=True, slots=True)
class Added:
    """What an adapter adds to a weight: `scale * up @ down`, of parameters with these names."""

    down: str
    up: str
    scale: float


def adapt(policy: Policy, lora: LoraConfig, *, base: Path, seed: int) -> None:
    """Put adapters into `policy`, which then are all that trains.

    In place, without peft's wrappers: decoder and head stay where transformers has them. B begins
    at zero, so that the log-probs are still those of the model; A is drawn from `seed`, alike on
    every rank.

    Args:
        policy: The model of `base`, not yet spread over ranks.
        lora: Shape and places of the adapters.
        base: The model's folder, which an adapter is loaded onto.
        seed: Seed of A.
    """
    every = {name.rpartition(".")[2] for name in linear_modules(policy.causal_lm)}
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.named_targets or sorted(every),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, policy.causal_lm)
    policy.frozen_base = base


def write_adapter(policy: Policy, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter as peft does, for `PeftModel.from_pretrained`.

    Args:
        policy: One that `adapt` has changed; its parameters are not read.
        weights: Whole tensors under the policy's names.
        folder: Made where it is not there.
    """
    named = peft.get_peft_model_state_dict(
        policy.causal_lm,
        state_dict={name.removeprefix("causal_lm."): each for name, each in weights.items()},
        save_embedding_layers=False,  # they cannot have changed
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: each.contiguous() for name, each in named.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config = copy.copy(policy.causal_lm.peft_config[NAME])
    config.inference_mode = True  # as peft saves it: loaded, it does not train unless asked to
    config.target_modules = sorted(config.target_modules)  # a set's order is chance
    config.save_pretrained(str(folder))


def merged(base: Path, adapter: Path) -> Policy:
    """The model of `base` in float32 with an adapter added to its weights.

    From the files of both: what is merged is what a user of the adapter gets, whatever dtype it was
    trained in.
    """
    model = peft.PeftModel.from_pretrained(load_causal_lm(base), str(adapter), torch_device="cpu")
    return Policy(model.merge_and_unload())


def file_names(causal_lm: nn.Module) -> dict[str, str]:
    """Names of all parameters but the adapters', in order, by the name in the model's file."""
    layers = [name for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)]
    found = {}
    for name, _ in causal_lm.named_parameters():
        layer = next((each for each in layers if name.startswith(f"{each}.")), None)
        if layer is None:
            found[name] = name
        elif name.startswith(f"{layer}.base_layer."):
            found[layer + name.removeprefix(f"{layer}.base_layer")] = name
    return found


def added_weights(causal_lm: nn.Module) -> dict[str, Added]:
    """What each adapter adds, by the name of the weight in the model's file."""
    return {
        f"{name}.weight": Added(
            down=f"{name}.lora_A.{NAME}.weight",
            up=f"{name}.lora_B.{NAME}.weight",
            scale=module.scaling[NAME],
        )
        for name, module in causal_lm.named_modules()
        if isinstance(module, LoraLayer)
    }


def merge(
    weight: torch.Tensor, *, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """`weight` with its adapter added, [out, in]: a new tensor, as `merged` makes it in float32.

    The sum is made in float32 whatever the dtype: in bfloat16 the product would round twice.

    Args:
        weight: [out, in].
        down: [rank, in].
        up: [out, rank].
        scale: Of the product.
    """
    return (weight.float() + (up.float() @ down.float()) * scale).to(weight.dtype)


@contextmanager
def left_out(policy: Policy) -> Iterator[None]:
    """Within this the policy is the model that its adapters are on, to the bit."""
    layers = [each for each in policy.causal_lm.modules() if isinstance(each, LoraLayer)]
    for each in layers:
        each.set_scale(NAME, 0.0)
    try:
        yield
    finally:
        for each in layers:
            each.set_scale(NAME, 1.0)  # of the scale that its settings give
