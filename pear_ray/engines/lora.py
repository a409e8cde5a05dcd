"""Low-rank adapters on a policy; the only module that imports peft."""

import copy
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

from pear_ray.config.lora import LoraConfig
from pear_ray.engines.policy import Policy, load_causal_lm
from pear_ray.engines.target_modules import linear_modules

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter's file, as peft writes it


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
    config = copy.copy(policy.causal_lm.peft_config["default"])
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
