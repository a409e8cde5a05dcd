"""What an engine computes with, read back parameter by parameter and compared bit for bit.

The canary sees a parameter through the log-probs it moves, and one small step of one norm moves
them less than rounding does. Bits do not round: of every parameter a few columns are compared,
others at each sync. Where vLLM packs a weight away (on CPU it does), the engine's own product with
unit vectors gives its columns, exactly: all other terms are zeros.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

HEAD = "lm_head.weight"
NUM_COLUMNS = 4
Place = tuple[nn.Module, slice, str]
Products = dict[tuple[Any, ...], torch.Tensor]  # by layer and columns
_places: WeakKeyDictionary[nn.Module, dict[str, Place | None]] = WeakKeyDictionary()
COLUMN_STRIDE = 7919  # a prime: the columns of successive syncs go through any width


class SentWeights:
    """What one sync is to bring about: of each parameter the columns that will be looked at.

    Attributes:
        seen: By Hugging Face name, a vector whole, of a matrix [output, column]. Copies.
        columns: By the name of a matrix, which of its columns those are.
        not_seen: Names of what was sent besides: tensors of three and more dimensions.
    """

    def __init__(self, *, sync: int) -> None:
        self._sync = sync
        self.seen: dict[str, torch.Tensor] = {}
        self.columns: dict[str, list[int]] = {}
        self.not_seen: list[str] = []

    def note(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Take down full tensors as they are sent."""
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.ndim == 1:
                self.seen[name] = tensor.clone()
            elif tensor.ndim == 2:  # noqa: PLR2004 - a matrix
                self.columns[name] = columns_of(tensor.shape[1], sync=self._sync)
                self.seen[name] = tensor[:, self.columns[name]]
            else:
                self.not_seen.append(name)


def columns_of(width: int, *, sync: int) -> list[int]:
    """The columns that sync number `sync` compares; every one has its turn."""
    first = sync * NUM_COLUMNS
    return [(first + index) * COLUMN_STRIDE % width for index in range(min(NUM_COLUMNS, width))]


@torch.no_grad()
def differing(model: nn.Module, sent: SentWeights, *, dtype: torch.dtype) -> list[str]:
    """Names of the parameters that `model`, vLLM's, holds otherwise than they were sent.

    One that cannot be found in the model or read is not among them; see `unseen`.

    Args:
        model: After the sync.
        sent: What was sent.
        dtype: What the engine rounds parameters to.
    """
    found = []
    products: Products = {}
    for name, tensor in sent.seen.items():
        readings = _readings(model, name, sent, products)
        if not all(_same(reading, tensor, dtype) for reading in readings):
            found.append(name)
    return found


def unseen(model: nn.Module, names: Sequence[str], sent: SentWeights) -> list[str]:
    """Which of `names` the comparison cannot see in this model: the canary alone covers them."""
    return [
        name
        for name in names
        if name not in sent.seen or not any(True for _ in _readings(model, name, sent, {}))
    ]


def _same(reading: torch.Tensor, sent: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `reading` is `sent`, rounded to `dtype` or to what it has itself.

    On CPUs with AMX vLLM keeps biases of bfloat16 models in float32, and loads them as sent.
    """
    found = reading[: len(sent)]  # beyond the vocabulary an embedding has rows that pad it
    wanted = (sent.to(reading.device, each).to(reading.dtype) for each in (dtype, reading.dtype))
    return any(torch.equal(found, each) for each in wanted)


def _readings(
    model: nn.Module, name: str, sent: SentWeights, products: Products
) -> Iterator[torch.Tensor]:
    """All that the engine holds of the parameter `name`: stored, packed, and as a tied head."""
    columns = sent.columns.get(name, [0])
    for place in places_of(model, name, sent):
        yield from _readings_of(*place, columns=columns, products=products)


def places_of(model: nn.Module, name: str, sent: SentWeights) -> list[Place]:
    """Where vLLM's model has the parameter `name`: layer, rows and attribute, and a tied head's.

    Args:
        model: vLLM's.
        name: As in a model's file.
        sent: All that is sent to it.
    """
    place, head = _place(model, name), _place(model, HEAD)
    if place is None:
        return []
    is_tied = head is not None and HEAD not in sent.seen and _is_embedding(place[0])
    if is_tied and head[0] is not place[0]:
        return [place, head]  # vLLM has a second layer on the same parameter
    return [place]


def _readings_of(
    layer: Any, rows: slice, kind: str, *, columns: list[int], products: Products
) -> Iterator[torch.Tensor]:
    stored = getattr(layer, kind)
    if stored.ndim == 1 and stored.numel():
        yield stored[rows]
        return
    if stored.numel():
        yield stored[rows][:, columns]
    if "cpu_linear" in vars(layer):  # set by vLLM when it packs; it computes with the packed copy
        if (layer, *columns) not in products:  # the parts of a layer have the same columns
            products[layer, *columns] = _columns(layer, columns)
        yield products[layer, *columns][rows]


def _columns(layer: Any, columns: list[int]) -> torch.Tensor:
    """Columns of a packed weight, [output, column]: its product with unit vectors."""
    width = layer.embedding_dim if _is_embedding(layer) else layer.input_size
    dtype = layer.weight.dtype if layer.weight.numel() else layer.params_dtype
    unit = torch.zeros(len(columns), width, dtype=dtype)
    unit[range(len(columns)), columns] = 1
    return layer.quant_method.apply(layer, unit).T


def _place(model: nn.Module, name: str) -> Place | None:
    """The engine's layer with the parameter `name`, which of its rows are that, and as what."""
    known = _places.setdefault(model, {})
    if name not in known:
        known[name] = _find_place(model, name)
    return known[name]


def _find_place(model: nn.Module, name: str) -> Place | None:
    path, _, kind = name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    layer, rows = _submodule(model, path), slice(None)
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    for fused, parts in packed.items():
        whole = _submodule(model, f"{parent}.{fused}") if leaf in parts else None
        sizes = getattr(whole, "output_partition_sizes", ())
        if whole is not None and len(sizes) == len(parts):
            begin = sum(sizes[: parts.index(leaf)])
            layer, rows = whole, slice(begin, begin + sizes[parts.index(leaf)])
    # A layer split over devices holds a part of what was sent.
    if layer is None or getattr(layer, "tp_size", 1) > 1:
        return None
    return (layer, rows, kind) if isinstance(getattr(layer, kind, None), torch.Tensor) else None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return None
    return getattr(found, "base_layer", found)  # in an engine that takes adapters they are wrapped


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, VocabParallelEmbedding)
