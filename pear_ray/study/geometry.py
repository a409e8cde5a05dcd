"""How far SFT and RL moved the parameters, and whether they moved them the same way."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def update_geometry(base: Path, sft: Path, rl: Path) -> dict[str, float]:
    """L2 norms of both updates, also over that of the base's parameters, and their cosine.

    The cosine is left out where one of them is 0. A parameter that not all of the three folders
    have (a head that is tied in one) is left out as well.
    """
    first, second, third = (_parameters(folder) for folder in (base, sft, rl))
    total = {"base": 0.0, "sft": 0.0, "rl": 0.0, "dot": 0.0}
    for name in first.keys() & second.keys() & third.keys():
        before, between, after = (each[name].double() for each in (first, second, third))
        moved, then = between - before, after - between
        for key, value in (
            ("base", before.square().sum()),
            ("sft", moved.square().sum()),
            ("rl", then.square().sum()),
            ("dot", (moved * then).sum()),
        ):
            total[key] += float(value)
    base_norm, sft_norm, rl_norm = (math.sqrt(total[key]) for key in ("base", "sft", "rl"))
    found = {
        "update/sft_norm": sft_norm,
        "update/rl_norm": rl_norm,
        "update/relative_sft_norm": sft_norm / base_norm,
        "update/relative_rl_norm": rl_norm / base_norm,
    }
    if sft_norm and rl_norm:
        found["update/cosine"] = total["dot"] / (sft_norm * rl_norm)
    return found


def _parameters(folder: Path) -> Mapping[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
