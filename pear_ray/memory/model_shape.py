"""A model's sizes, from its config.json and, where they are there, its safetensors headers."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.errors import InputError
from pear_ray.memory.headers import TensorHeader, read_headers

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a `model_type`'s decoder layer differs from Llama's; what its config may leave out."""

    num_norms: int = 2
    packs: bool = True
    has_qk_norm: bool = False
    has_float32_norms: bool = False
    has_qkv_bias: bool = False
    is_tied: bool = False
    head_dim: int | None = None


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(has_qkv_bias=True),
    "qwen3": Family(has_qk_norm=True, head_dim=128),
    "gemma": Family(has_float32_norms=True, is_tied=True, head_dim=256),
    "gemma2": Family(num_norms=4, packs=False, has_float32_norms=True, is_tied=True, head_dim=256),
    "gemma3_text": Family(
        num_norms=4, has_qk_norm=True, has_float32_norms=True, is_tied=True, head_dim=256
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a causal language model's memory follows from.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads of a layer.
        num_key_value_heads: Key and value heads of a layer.
        head_dim: Width of a head.
        num_norms: RMS norms of a layer that are as wide as the residual stream.
        has_qk_norm: Whether queries and keys are normed per head.
        has_float32_norms: Whether norms multiply by their weight before they leave float32.
        is_tied: Whether the output head is the embedding.
        num_parameters: All parameters, a tied head counted once.
        layer_parameters: Parameters of the largest layer.
        packs: Whether its attention takes rows laid end to end, as far as its `model_type` tells.
        quantised_bytes: Size of a quantised model's tensors; None where it is not quantised.
        estimated: Why the counts or the layer formula are an estimate; empty where they are not.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    num_norms: int
    has_qk_norm: bool
    has_float32_norms: bool
    is_tied: bool
    num_parameters: int
    layer_parameters: int
    packs: bool = True
    quantised_bytes: int | None = None
    estimated: str = ""

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding: of any model here its largest tensor."""
        return self.vocab_size * self.hidden_size

    @property
    def outside_parameters(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.num_parameters - self.num_layers * self.layer_parameters


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`, which needs no more than its config.json.

    Raises:
        InputError: There is no config.json, it lacks a size, or it is of a kind that cannot be
            counted without the model's safetensors, which are not there.
    """
    file = folder / "config.json"
    tree = _decoder(_read_json(file))
    model_type = str(tree.get("model_type"))
    family, headers = FAMILIES.get(model_type), read_headers(folder)
    if family is None and not headers:
        raise InputError(
            f"{file}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}, so its "
            "parameters cannot be counted from its config; put its safetensors beside it"
        )
    sizes = _sizes(tree, family or Family(), file)
    layer = _layer_parameters(tree, family or Family(), sizes)
    embeddings = sizes["vocab_size"] * sizes["hidden_size"] * (1 if sizes["is_tied"] else 2)
    total = embeddings + sizes["num_layers"] * layer + sizes["hidden_size"]
    quantised = sum(h.num_bytes for h in headers.values()) if _is_quantised(tree) else None
    if not headers or (family and quantised is not None):
        # Packed weights have shapes of their own; the config says what they stand for.
        return ModelShape(
            **sizes,
            num_parameters=total,
            layer_parameters=layer,
            quantised_bytes=quantised,
            estimated="" if quantised is None else "quantised: only its files' size is known",
        )
    counted = {
        "num_parameters": _counted(headers, is_tied=sizes["is_tied"]),
        "layer_parameters": _counted_layer(headers) or layer,
    }
    estimated = ""
    if family is None:
        estimated = f"model_type {model_type!r} is taken for a dense decoder like Llama's"
    elif counted != {"num_parameters": total, "layer_parameters": layer}:
        estimated = (
            f"the safetensors hold {counted['num_parameters']:,} parameters, a {model_type} of "
            f"these sizes has {total:,}; the former are taken, with the latter's activations"
        )
    return ModelShape(**sizes, **counted, quantised_bytes=quantised, estimated=estimated)


def _sizes(tree: Mapping[str, Any], family: Family, file: Path) -> dict[str, Any]:
    """What config.json says, under the names of `ModelShape`."""
    hidden_size = _size(tree, "hidden_size", file)
    num_heads = _size(tree, "num_attention_heads", file)
    return {
        "vocab_size": _size(tree, "vocab_size", file),
        "hidden_size": hidden_size,
        "intermediate_size": _size(tree, "intermediate_size", file),
        "num_layers": _size(tree, "num_hidden_layers", file),
        "num_heads": num_heads,
        "num_key_value_heads": _size(tree, "num_key_value_heads", file, default=num_heads),
        "head_dim": _size(
            tree, "head_dim", file, default=family.head_dim or hidden_size // num_heads
        ),
        "num_norms": family.num_norms,
        "has_qk_norm": family.has_qk_norm,
        "has_float32_norms": family.has_float32_norms,
        "packs": family.packs,
        "is_tied": bool(tree.get("tie_word_embeddings", family.is_tied)),
    }


def _layer_parameters(tree: Mapping[str, Any], family: Family, sizes: Mapping[str, Any]) -> int:
    hidden, inner, head_dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_heads"] * head_dim, sizes["num_key_value_heads"] * head_dim
    biases = queries + 2 * keys if family.has_qkv_bias else 0
    if tree.get("attention_bias"):
        biases = queries + 2 * keys + hidden
    if tree.get("mlp_bias"):
        biases += 2 * inner + hidden
    return (
        2 * hidden * queries  # queries in, attention out
        + 2 * hidden * keys  # keys and values in
        + 3 * hidden * inner  # gate, up, down
        + family.num_norms * hidden
        + (2 * head_dim if family.has_qk_norm else 0)
        + biases
    )


def _counted(headers: Mapping[str, TensorHeader], *, is_tied: bool) -> int:
    """Parameters in the files; some write a tied head beside the embedding all the same."""
    return sum(
        header.num_elements
        for name, header in headers.items()
        if not (is_tied and name.endswith(HEAD))
    )


def _counted_layer(headers: Mapping[str, TensorHeader]) -> int:
    """Parameters of the largest layer in the files; 0 where no name tells layers apart."""
    layers: dict[str, int] = {}
    for name, header in headers.items():
        if within := LAYER.search(name):
            layers[within[1]] = layers.get(within[1], 0) + header.num_elements
    return max(layers.values(), default=0)


def _is_quantised(tree: Mapping[str, Any]) -> bool:
    return bool(tree.get("quantization_config"))


def _decoder(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model; it may sit beside a vision tower."""
    inner = tree.get("text_config")
    return tree | inner if isinstance(inner, dict) else tree


def _size(tree: Mapping[str, Any], key: str, file: Path, *, default: int | None = None) -> int:
    found = tree.get(key)
    value = default if found is None else found
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"{file}: {key} is {found!r}, wanted a whole number above 0; `pear plan` knows decoder "
            "language models with Llama's names for their sizes"
        )
    return value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); give a model folder"
        ) from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{file}: not valid JSON ({error}); save the model again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected an object, got {type(tree).__name__}")
    return tree
