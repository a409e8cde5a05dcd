"""Which layers of a policy an adapter can be put on, known without its weights."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pear_ray.errors import ConfigError, InputError


def linear_modules(causal_lm: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the decoder: neither embedding nor output head."""
    inside = {id(module) for module in causal_lm.get_decoder().modules()}
    return [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]


def check_target_modules(folder: Path, targets: Sequence[str], *, key: str) -> None:
    """See that each of `targets` is the end of the name of a linear layer of the model in `folder`.

    Only its config.json is read.

    Args:
        folder: The model's.
        targets: The ends of names.
        key: The config's section that has them, for the message.

    Raises:
        ConfigError: One is not; the message names it and says what there is.
        InputError: transformers cannot make a model of that config, or it has no linear layer.
    """
    known = linear_modules(_skeleton(folder))
    if not known:
        raise InputError(
            f"{folder}: the decoder has no linear layer that an adapter can be put on; leave "
            f"{key} out"
        )
    kinds = sorted({name.rpartition(".")[2] for name in known})
    missing = [
        target for target in targets if not any(f".{name}".endswith(f".{target}") for name in known)
    ]
    if not missing:
        return
    close = difflib.get_close_matches(missing[0], kinds, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{key}.target_modules: no linear layer of the policy's decoder is called "
        f"{', '.join(map(repr, missing))}{meant}; there are {', '.join(kinds)} ({folder}), or use "
        "all-linear"
    )


def _skeleton(folder: Path) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: transformers cannot make a model of this config: {error}"
        ) from error
